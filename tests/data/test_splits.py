"""Splits keep subjects whole, whatever the subjects; equal images are found."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookalike.data.splits import exact_duplicates, subject_split

subjects = st.lists(st.integers(0, 30).map(str), min_size=0, max_size=120)
parts = st.lists(st.integers(0, 9), min_size=1, max_size=5).filter(any).map(lambda w: np.array(w) / sum(w))


@given(subjects, parts, st.integers(0, 2**31))
def test_every_row_is_in_one_part_and_no_subject_in_two(subjects, fractions, seed):
    split = subject_split(subjects, fractions, seed)
    assert sorted(np.concatenate(split).tolist()) == list(range(len(subjects)))
    owners = [{subjects[i] for i in rows} for rows in split]
    assert sum(len(owner) for owner in owners) == len(set(subjects))


@given(subjects, parts, st.integers(0, 99))
def test_each_part_has_its_share_of_the_subjects(subjects, fractions, seed):
    split = subject_split(subjects, fractions, seed)
    for rows, fraction in zip(split, fractions):
        assert abs(len({subjects[i] for i in rows}) - fraction * len(set(subjects))) <= 1


@given(subjects, st.integers(0, 99), st.randoms())
def test_the_order_of_the_rows_does_not_matter(subjects, seed, random):
    shuffled = random.sample(subjects, len(subjects))
    first, again = (subject_split(s, (0.5, 0.5), seed) for s in (subjects, shuffled))
    assert {subjects[i] for i in first[0]} == {shuffled[i] for i in again[0]}


def test_another_seed_gives_another_split():
    subjects = np.arange(100).astype(str)
    assert subject_split(subjects, (0.5, 0.5), 0)[0].tolist() != subject_split(subjects, (0.5, 0.5), 1)[0].tolist()


@pytest.mark.parametrize("fractions", [(0.5, 0.4), (1.5, -0.5), ((0.5, 0.5),)])
def test_fractions_that_are_none_are_refused(fractions):
    with pytest.raises(ValueError, match="add up to 1"):
        subject_split(["a", "b"], fractions)


@given(st.lists(st.integers(0, 6), max_size=30))
def test_duplicates_are_exactly_the_equal_images(values):
    images = np.array(values, np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 1, 2, 2), np.uint8)
    groups = {tuple(rows) for rows in exact_duplicates(images)}
    expected = {tuple(np.flatnonzero(np.array(values) == v)) for v in set(values) if values.count(v) > 1}
    assert groups == expected
