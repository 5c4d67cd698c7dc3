"""Parts by subject: nobody in two, nobody lost, sizes close; and the pairs of the figure."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookalike.data import datasets
from lookalike.metrics.subsets import mean_and_std, pairs_between, pairs_within, patient_parts

SUBJECTS = st.lists(st.integers(0, 12), min_size=3, max_size=60).filter(lambda names: len(set(names)) >= 3)


@given(SUBJECTS, st.integers(1, 3), st.integers(0, 5))
def test_parts_share_out_the_rows_and_keep_subjects_whole(names, parts, seed):
    subjects = np.array(names).astype(str)
    found = patient_parts(subjects, parts, seed)
    assert sorted(np.concatenate(found).tolist()) == list(range(len(subjects)))
    assert all((np.diff(rows) > 0).all() for rows in found)
    owners = [set(subjects[rows]) for rows in found]
    assert sum(map(len, owners)) == len(set(names))
    sizes = [len(rows) for rows in found]
    assert max(sizes) - min(sizes) <= np.unique(subjects, return_counts=True)[1].max()


def test_parts_of_single_images_differ_by_one_at_most():
    sizes = [len(rows) for rows in patient_parts(np.arange(3000).astype(str), 3, 0)]
    assert sizes == [1000, 1000, 1000]
    assert sorted(len(rows) for rows in patient_parts(np.arange(10).astype(str), 3, 0)) == [3, 3, 4]


def test_views_of_one_patient_stay_together():
    subjects = datasets.load("phantom_mammography", "val").subjects
    for rows in patient_parts(subjects, 3, 0):
        assert set(np.unique(subjects[rows], return_counts=True)[1]) == {2}


def test_parts_follow_names_and_seed_not_the_order_of_rows():
    subjects = np.repeat([f"P_{i}" for i in range(40)], 2)
    order = np.random.default_rng(0).permutation(len(subjects))
    as_they_are, shuffled = patient_parts(subjects, 3, 0), patient_parts(subjects[order], 3, 0)
    for one, two in zip(as_they_are, shuffled):
        assert sorted(subjects[one]) == sorted(subjects[order][two])
    assert any(set(a) != set(b) for a, b in zip(as_they_are, patient_parts(subjects, 3, 1)))


def test_more_parts_than_subjects_are_refused():
    with pytest.raises(ValueError, match="2 subjects cannot make 3 parts"):
        patient_parts(["a", "a", "b"], 3)


def test_pairs_are_the_papers():
    assert pairs_within(3) == [(0, 1), (0, 2), (1, 2)]  # R1R2, R1R3, R2R3
    assert pairs_between(3) == [(0, 0), (1, 1), (2, 2)]


def test_published_mean_and_spread_come_from_the_published_values():
    found = mean_and_std([16.79, 18.34, 19.22])  # FRD of Syn-Real, one per pair, from the authors' spreadsheet
    assert found["mean"] == pytest.approx(18.12, abs=0.005)
    assert found["std"] == pytest.approx(1.01, abs=0.01)
