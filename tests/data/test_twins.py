"""Near-twins among slices: planted ones are found, kept together, and counted; numbers against slow twins."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.data import ImageSet, datasets
from lookalike.data.twins import (
    group_sizes,
    group_split,
    nearest_correlation,
    official_and_grouped,
    reduced,
    split_groups,
    twin_groups,
    twin_report,
)


def noise(n, seed=0, side=12, channels=1):
    return np.random.default_rng(seed).integers(0, 256, (n, channels, side, side)).astype(np.uint8)


def with_twins(n, copies, seed=0):
    """n images of noise, then `copies` of the first ones, darker and with faint noise."""
    images = noise(n, seed)
    faint = np.random.default_rng(seed + 1).normal(0, 2, (copies, *images.shape[1:]))
    return np.concatenate([images, np.clip(0.8 * images[:copies] + faint, 0, 255).astype(np.uint8)])


def image_set(images, labels, split="train", subjects=None):
    names = np.array([f"{split}-{i}" for i in range(len(images))]) if subjects is None else np.asarray(subjects)
    kind = "image" if subjects is None else "patient"
    labels = np.asarray(labels, np.int64)
    return ImageSet(images, labels, names, ("a", "b"), "toy", split, "CC0", False, "phantom", subject_kind=kind)


# --- correlation --------------------------------------------------------------------------------------------


def test_the_product_of_two_rows_is_numpys_correlation():
    images = noise(6, channels=3)
    expected = np.corrcoef(images.reshape(6, -1).astype(float))
    rows = reduced(images)
    np.testing.assert_allclose(rows @ rows.T, expected, atol=1e-5)


def test_a_slice_of_176_by_208_is_compared_at_44_by_52_by_means():
    images = np.random.default_rng(0).integers(0, 256, (2, 1, 208, 176)).astype(np.uint8)
    small = images.reshape(2, 52, 4, 44, 4).astype(float).mean((2, 4)).reshape(2, -1)
    rows = reduced(images)
    assert rows.shape == (2, 44 * 52)
    assert rows[0] @ rows[1] == pytest.approx(np.corrcoef(small)[0, 1], abs=1e-4)


def test_a_flat_image_is_nobodys_twin():
    images = np.stack([np.full((1, 8, 8), 40, np.uint8)] * 2 + [noise(1, side=8)[0]])
    assert len(np.unique(twin_groups(images, 0.9))) == 3
    assert np.isfinite(nearest_correlation(images)[0]).all()


def test_the_most_alike_other_image_is_a_slow_searchs(monkeypatch):
    monkeypatch.setattr("lookalike.data.twins.ROWS", 7)
    images, reference = noise(20), noise(15, seed=5)
    table = np.corrcoef(images.reshape(20, -1), reference.reshape(15, -1))[:20, 20:]
    best, where = nearest_correlation(images, reference)
    np.testing.assert_allclose(best, table.max(1), atol=1e-5)
    assert where.tolist() == table.argmax(1).tolist()
    own = np.corrcoef(images.reshape(20, -1)) - 2 * np.eye(20)
    best, where = nearest_correlation(images)
    np.testing.assert_allclose(best, own.max(1), atol=1e-5)
    assert where.tolist() == own.argmax(1).tolist()


# --- groups -------------------------------------------------------------------------------------------------


def slow_groups(images, threshold):
    """Groups by walking from twin to twin."""
    alike = np.corrcoef(images.reshape(len(images), -1).astype(float)) >= threshold
    names = np.full(len(images), -1)
    for start in range(len(images)):
        waiting = [start] if names[start] < 0 else []
        while waiting:
            row = waiting.pop()
            if names[row] < 0:
                names[row] = start
                waiting += np.flatnonzero(alike[row]).tolist()
    return np.unique(names, return_inverse=True)[1]


@given(st.integers(0, 10_000), st.sampled_from([0.1, 0.2, 0.3, 0.95]), st.sampled_from([3, 8, 512]))
@settings(max_examples=15)
def test_groups_are_those_of_a_walk_whatever_the_chunks(seed, threshold, chunk):
    images = with_twins(18, 6, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lookalike.data.twins.ROWS", chunk)
        assert twin_groups(images, threshold).tolist() == slow_groups(images, threshold).tolist()


def test_planted_twins_are_found_and_no_others():
    groups = twin_groups(with_twins(30, 10), 0.98)
    assert groups.tolist() == [*range(30), *range(10)]


def test_an_exact_copy_is_a_twin_at_a_threshold_of_one():
    images = np.concatenate([noise(40), noise(40)])
    assert twin_groups(images, 1.0).tolist() == [*range(40)] * 2


def test_images_of_one_known_person_are_one_group():
    images = with_twins(4, 1)  # row 4 is a twin of row 0
    groups = twin_groups(images, 0.98, subjects=["x", "y", "y", "z", "z"])
    assert groups.tolist() == [0, 1, 1, 0, 0]  # 0 and 4 are twins, 4 and 3 are z


def test_a_lower_threshold_joins_more():
    rows = group_sizes(with_twins(20, 5), (0.05, 0.98, 1.0))
    assert [row["groups"] for row in rows] == sorted(row["groups"] for row in rows)
    assert rows[0]["largest"] > rows[1]["largest"] == 2
    assert rows[1] == {"threshold": 0.98, "groups": 20, "largest": 2, "alone": 15}
    assert rows[2]["alone"] == 25


# --- the split ----------------------------------------------------------------------------------------------


def test_no_twin_is_on_the_other_side_where_a_split_by_image_has_many():
    images, labels = with_twins(100, 60), np.tile([0, 1], 80)
    labels[100:] = labels[:60]
    parts = group_split(images, labels, (0.75, 0.25), 0.98, seed=3)
    assert sorted(np.concatenate(parts).tolist()) == list(range(160))
    assert nearest_correlation(images[parts[1]], images[parts[0]])[0].max() < 0.9
    by_image = np.random.default_rng(0).permutation(160)
    assert (nearest_correlation(images[by_image[:40]], images[by_image[40:]])[0] > 0.98).mean() > 0.3


def test_classes_are_shared_out_like_the_whole():
    groups = np.repeat(np.arange(90), 2)
    labels = np.repeat([0] * 70 + [1] * 15 + [2] * 5, 2)
    parts = split_groups(groups, labels, (0.8, 0.2), seed=1)
    assert np.bincount(labels[parts[0]]).tolist() == [112, 24, 8]
    assert np.bincount(labels[parts[1]]).tolist() == [28, 6, 2]


def test_groups_of_several_classes_stay_whole_and_sizes_are_near():
    rng = np.random.default_rng(0)
    groups, labels = rng.integers(0, 60, 400), rng.integers(0, 3, 400)
    parts = split_groups(groups, labels, (0.6, 0.2, 0.2))
    assert not set(groups[parts[0]]) & set(groups[parts[1]])
    assert not set(groups[parts[2]]) & set(groups[np.concatenate(parts[:2])])
    np.testing.assert_allclose([len(rows) / 400 for rows in parts], (0.6, 0.2, 0.2), atol=0.03)


def test_the_seed_changes_the_split_and_nothing_else_does():
    groups, labels = np.arange(40), np.tile([0, 1], 20)
    first, again, other = (split_groups(groups, labels, (0.5, 0.5), seed)[0] for seed in (0, 0, 1))
    assert first.tolist() == again.tolist() != other.tolist()


def test_a_part_that_is_not_wanted_gets_nothing():
    assert [len(rows) for rows in split_groups(np.arange(6), np.zeros(6), (1.0, 0.0))] == [6, 0]


# --- reports ------------------------------------------------------------------------------------------------


def test_the_report_counts_what_was_planted():
    images = with_twins(60, 12)
    train = image_set(images[:60], np.tile([0, 1], 30))
    test = image_set(np.concatenate([images[60:], noise(28, seed=9)]), [0, 1] * 6 + [0] * 28, "test")
    report = twin_report(train, test, (0.98,))
    (row,) = report["rows"]
    assert (row["count"], row["share"], row["within"]) == (12, 0.3, 0.0)
    assert row["low"] < 0.3 < row["high"]
    assert report["same_label"] >= 0.3
    assert report["median"] < 0.5
    assert twin_report(test, train, (0.98,))["rows"][0]["share"] == 12 / 60


def test_both_splits_of_a_set_and_only_one_shares_twins(monkeypatch):
    images, labels = with_twins(100, 50), np.tile([0, 1], 75)
    rows = {"train": np.arange(110), "test": np.arange(110, 150)}  # the test images are twins of train
    monkeypatch.setattr(
        datasets, "load", lambda name, split, size: image_set(images[rows[split]], labels[rows[split]], split)
    )
    found = official_and_grouped("toy", 12, threshold=0.98)
    shares = {kind: twin_report(*parts.values(), (0.98,))["rows"][0]["share"] for kind, parts in found.items()}
    assert shares == {"official": 1.0, "grouped": 0.0}
    assert len(found["grouped"]["train"]) == pytest.approx(110, abs=2)
    grouped = found["grouped"]
    assert not set(grouped["train"].subjects) & set(grouped["test"].subjects)
    assert {part.split for part in grouped.values()} == {"train", "test"}
    assert grouped["test"].subject_kind == "group of twins"
    assert found["official"]["test"].subject_kind == "image"


def test_known_people_stay_whole_in_the_grouped_split(monkeypatch):
    people = np.array([f"p{i // 4}" for i in range(80)])
    whole = image_set(noise(80), np.tile([0, 1], 40), subjects=people)
    parts = {"train": np.arange(60), "test": np.arange(60, 80)}
    monkeypatch.setattr(
        datasets, "load", lambda name, split, size: dataclasses.replace(whole.subset(parts[split]), split=split)
    )
    grouped = official_and_grouped("toy", 12)["grouped"]
    whose = {image.tobytes(): person for image, person in zip(whole.images, people)}
    train, test = ({whose[image.tobytes()] for image in part.images} for part in grouped.values())
    assert not train & test


# --- refusals -----------------------------------------------------------------------------------------------


def test_bad_input_is_refused_in_a_sentence():
    images = noise(6)
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        twin_groups(images, 1.2)
    with pytest.raises(ValueError, match="one subject per image"):
        twin_groups(images, 0.9, subjects=["a"])
    with pytest.raises(ValueError, match="add up to 1"):
        group_split(images, np.zeros(6), (0.5, 0.6), 0.9)
    with pytest.raises(ValueError, match="one label per image"):
        group_split(images, np.zeros(5), (0.5, 0.5), 0.9)
    with pytest.raises(ValueError, match="raise the threshold"):
        split_groups(np.zeros(6), np.zeros(6), (0.5, 0.5))
    with pytest.raises(ValueError, match="one image_size"):
        nearest_correlation(images, noise(3, side=8))
    with pytest.raises(ValueError, match="no other image"):
        nearest_correlation(images[:1])
