"""Altered copies are found among honest images, with no more false alarms than were promised."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lookalike.data import alignment, load, manifest, phantoms
from lookalike.data import duplicates as finder
from lookalike.data.duplicates import (
    audit_set,
    duplicate_groups,
    flag_copies,
    near_duplicates,
    subject_overlap,
    without_duplicates,
)
from lookalike.data.image_set import ImageSet
from lookalike.data.plants import KINDS, plant

MIRROR = os.environ.get("LOOKALIKE_MIRROR")
real_data = pytest.mark.skipif(not (MIRROR and Path(MIRROR).is_dir()), reason="LOOKALIKE_MIRROR names no folder")


def mammograms(n, seed):
    return phantoms.mammography(n, seed=seed, image_size=64).image_set


def image_set(images, labels=None, subjects=None):
    n = len(images)
    labels = np.zeros(n, np.int64) if labels is None else np.asarray(labels, np.int64)
    kind = "image" if subjects is None else "patient"
    subjects = np.arange(n) if subjects is None else subjects
    return ImageSet(
        images, labels, np.asarray(subjects).astype(str), ("a", "b"), "set", "all", "none", False, "phantom",
        subject_kind=kind,
    )  # fmt: skip


# --- the measure itself, against a slow twin ----------------------------------------------------------------


def slow_best_cosine(query, reference, view):
    """Over all shifts and mirrorings, by loops over the overlaps of the detail images; no zoom."""
    q = alignment._details(query[None], view)[0, 0].numpy().astype(float)
    best, m = (-2.0, None, None), alignment.MAX_SHIFT
    for flip in alignment.FLIPS:
        turned = {"none": reference, "horizontal": reference[..., ::-1], "vertical": reference[..., ::-1, :]}[flip]
        r = alignment._details(np.ascontiguousarray(turned)[None], view)[0, 0].numpy().astype(float)
        for dy in range(-m, m + 1):
            for dx in range(-m, m + 1):
                height, width = q.shape
                a = q[max(0, dy) : height + min(0, dy), max(0, dx) : width + min(0, dx)]
                b = r[max(0, -dy) : height + min(0, -dy), max(0, -dx) : width + min(0, -dx)]
                cosine = (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())
                if cosine > best[0] + 1e-6:
                    best = (cosine, (dy, dx), flip)
    return best


@pytest.mark.parametrize("view", list(alignment.VIEWS))
def test_similarity_is_the_best_cosine_over_what_overlaps(view, monkeypatch):
    monkeypatch.setattr(alignment, "ZOOMS", (1.0,))
    rng = np.random.default_rng(0)
    images = phantoms.grey28(6, seed=0).image_set.images[..., :24]  # not square
    queries = np.roll(images[..., ::-1, :], (1, -2), (2, 3)) // 2 + rng.integers(0, 60, images.shape, dtype=np.uint8)
    for query in queries:
        found = near_duplicates(query[None], images[:1], view=view)
        cosine, shift, flip = slow_best_cosine(query, images[0], view)
        assert found.similarity[0] == pytest.approx(cosine, abs=1e-5)
        assert (tuple(found.shifts[0]), found.flips[0]) == (shift, flip)


@settings(max_examples=15)
@given(st.integers(0, 99), st.integers(-3, 3), st.integers(-3, 3), st.sampled_from(alignment.FLIPS))
def test_a_moved_and_mirrored_window_of_an_image_is_recovered(seed, down, right, flip):
    """Two windows of one larger picture: all that overlaps is equal, but for the band's edges."""
    large = mammograms(8, seed=seed % 3).images
    reference = np.ascontiguousarray(large[:, :, 3:-3, 3:-3])
    turned = {"none": large, "horizontal": large[..., ::-1], "vertical": large[..., ::-1, :]}[flip]
    query = np.ascontiguousarray(turned[seed % 8, :, 3 - down : 61 - down, 3 - right : 61 - right])[None]
    found = near_duplicates(query, reference, view="fine")
    assert found.indices[0] == seed % 8
    assert found.similarity[0] > 0.95
    assert (found.shifts[0].tolist(), found.flips[0]) == ([down, right], flip)


def test_brightness_and_contrast_do_not_matter():
    images = mammograms(20, 0).images // 2
    brighter = (images * 1.5 + 40).astype(np.uint8)
    assert near_duplicates(brighter, images).similarity.min() > 0.99


def test_a_shift_in_an_image_of_128_is_told_in_its_own_pixels():
    images = phantoms.mammography(10, seed=0).image_set.images
    found = near_duplicates(plant(images, "shift"), images)
    assert (found.indices == np.arange(10)).all()
    assert (np.abs(found.shifts) == 2).all()


def test_images_without_detail_are_like_nothing():
    images = mammograms(5, 0).images
    black = np.zeros_like(images[:2])
    assert (near_duplicates(black, images).similarity == 0).all()
    assert len(flag_copies(black, np.concatenate([images, black]), mammograms(20, 1).images).flagged) == 0


def test_own_row_and_own_subject_are_left_out():
    images = np.repeat(mammograms(6, 0).images, 2, 0)
    assert (near_duplicates(images, images).indices == np.arange(12) ^ 1).all()
    subjects = np.arange(12) // 2
    found = near_duplicates(images, images, subjects, subjects)
    assert (found.indices // 2 != subjects).all()
    assert (found.similarity < 0.9).all()
    alone = near_duplicates(images[:2], images[:2], [0, 0], [0, 0])
    assert alone.indices.tolist() == [-1, -1]
    assert alone.similarity.tolist() == [0, 0]


def test_the_runner_up_is_of_another_subject():
    images = np.repeat(mammograms(8, 0).images, 2, 0)
    named = near_duplicates(plant(images, "noise"), images, None, np.arange(16) // 2)
    unnamed = near_duplicates(plant(images, "noise"), images)
    assert (unnamed.runner_up > named.runner_up + 0.2).all()


def test_features_can_name_a_candidate_that_thumbnails_miss():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (60, 1, 24, 24), dtype=np.uint8)
    moved = np.roll(images[:1], (3, 3), (2, 3))
    features = rng.standard_normal((60, 8))
    assert near_duplicates(moved, images, features=(features[:1], features)).indices[0] == 0


def test_nine_slices_and_three_colours():
    for make in (phantoms.vertebrae, phantoms.dermoscopy):
        images = make(12, seed=0).image_set.images
        found = near_duplicates(plant(images, "shift"), images)
        assert (found.indices == np.arange(12)).all()


def test_chunks_do_not_change_the_answer(monkeypatch):
    images, others = mammograms(40, 0).images, mammograms(30, 1).images
    whole = near_duplicates(images, others)
    for name, value in (("_AT_ONCE", 7), ("_CHUNK", 3), ("_PAIRS", 100)):
        monkeypatch.setattr(alignment, name, value)
    parts = near_duplicates(images, others)
    assert (whole.indices == parts.indices).all()
    np.testing.assert_allclose(whole.similarity, parts.similarity, atol=1e-5)


@pytest.mark.parametrize(
    ("queries", "reference", "sentence"),
    [
        (np.zeros((2, 1, 8, 8)), np.zeros((2, 1, 8, 8), np.uint8), "looked for in uint8 images"),
        (np.zeros((0, 1, 8, 8), np.uint8), np.zeros((2, 1, 8, 8), np.uint8), "at least one query and one reference"),
        (np.zeros((2, 1, 8, 8), np.uint8), np.zeros((2, 1, 8, 9), np.uint8), "need images of one shape"),
    ],
)
def test_what_cannot_be_compared_is_refused(queries, reference, sentence):
    with pytest.raises(ValueError, match=sentence):
        near_duplicates(queries, reference)


# --- planted copies among honest images ---------------------------------------------------------------------

LEAST_FOUND = {  # share of planted copies that must be found, below what was measured
    28: dict.fromkeys(("copy", "shift", "flip", "jpeg", "brightness"), 0.9) | {"noise": 0.25, "blur": 0.4},
    64: dict.fromkeys(KINDS, 0.95),
}
EACH = 20  # planted copies of a kind


@pytest.fixture(scope="module")
def worlds():
    """Real, held-out and honest new images by size; the held-out ones are disjoint draws of the same world."""
    return {
        28: tuple(phantoms.grey28(n, seed=seed).image_set for seed, n in ((0, 300), (1, 200), (2, 60))),
        64: tuple(mammograms(n, seed) for seed, n in ((0, 120), (1, 80), (2, 40))),
    }


@pytest.fixture(scope="module")
def flagged(worlds):
    """By size: EACH copies of every kind, in the order of KINDS and each of another real image, then honest images."""
    found = {}
    for size, (real, holdout, honest) in worlds.items():
        planted = [plant(real.images, kind, seed=1)[3 * k : 3 * k + EACH] for k, kind in enumerate(KINDS)]
        synthetic = np.concatenate([*planted, honest.images])
        subjects = np.char.add("h", holdout.subjects)
        found[size] = flag_copies(synthetic, real.images, holdout.images, real.subjects, subjects, reverse=False)
    return found


@pytest.mark.parametrize("size", [28, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_planted_copies_are_found_among_honest_images(flagged, size, kind):
    """At 28 px the phantoms are ten smooth shapes: a blurred, noisy, cropped or mixed one is hardly more like its
    original than honest ones are like each other, so little is asked there; at 64 px they have texture.
    """
    flags, k = flagged[size], KINDS.index(kind)
    mine = (flags.flagged >= k * EACH) & (flags.flagged < (k + 1) * EACH)
    assert mine.sum() >= EACH * LEAST_FOUND[size].get(kind, 0)
    right = flags.real[mine] == flags.flagged[mine] - k * EACH + 3 * k
    assert (~right).sum() <= 1
    exact = np.isin(flags.flagged[mine], flags.exact)
    assert exact.all() if kind == "copy" else not exact.any()


@pytest.mark.parametrize("size", [28, 64])
def test_honest_images_beside_planted_ones_are_flagged_no_more_than_promised(flagged, worlds, size):
    honest = len(worlds[size][2])
    _, high = finder._false_flags(honest, len(flagged[size].calibration["fine"]), 0.001)
    assert (flagged[size].flagged >= EACH * len(KINDS)).sum() <= high <= honest / 4


def test_honest_images_are_flagged_as_often_as_promised():
    """Twelve worlds: the count of false flags is a sum of exchangeable ranks, at most 2 n / (K + 1) on average."""
    flagged, promised, control, control_promised = 0, 0.0, 0, 0.0
    everyone = phantoms.grey28(1200, seed=7).image_set.images
    for world in np.random.default_rng(0).permutation(1200).reshape(12, 100):
        real, holdout, new = np.split(everyone[world], [40, 65])
        flags = flag_copies(new, real, holdout, reverse=False)
        flagged, promised = flagged + len(flags.flagged), promised + flags.expected_false
        control, control_promised = control + flags.control_flagged, control_promised + flags.control_expected
    assert promised == pytest.approx(12 * 2 * 35 / 26)
    assert flagged < 1.6 * promised  # the two views overlap, so less than promised; 1.6: four deviations
    assert flagged > 0.2 * promised  # a threshold that nothing passes would be no threshold
    assert control < 1.6 * control_promised


def test_false_flags_follow_the_ranks_of_exchangeable_values():
    rng = np.random.default_rng(0)
    n, count = 100, 60
    passed = [(rng.random(n) > rng.random(count).max()).sum() for _ in range(4000)]
    mean, high = finder._false_flags(n, count, 0.001)
    assert np.mean(passed) == pytest.approx(mean / 2, rel=0.1)
    assert np.mean(np.array(passed) > high / 2) <= 0.025


def test_a_lower_bar_with_enough_honest_subjects():
    assert finder._allowed(199, 0.1) == 10
    assert finder._allowed(50, 0.001) == 1
    assert finder._threshold(np.arange(199.0), 0.1) == 189  # passed by 9 of the 199 themselves


def test_unknown_real_subjects_never_meet_the_names_of_held_out_ones():
    images = phantoms.grey28(90, seed=3).image_set.images
    real, holdout, new = np.split(images, [40, 70])
    numbers = np.arange(30).astype(str)  # names that rows of the real set could have too
    named, known = (
        flag_copies(new, real, holdout, subjects, numbers)
        for subjects in (None, np.char.add("p", np.arange(40).astype(str)))
    )
    assert named.notes == known.notes == ()
    assert named.thresholds == known.thresholds
    assert len(named.calibration["fine"]) == 30
    with pytest.raises(ValueError, match="at least two held-out images"):  # the same names, known to be the same people
        flag_copies(new, real, holdout, np.arange(40).astype(str), numbers)


def test_without_a_holdout_the_real_images_set_the_threshold(worlds):
    real, _, honest = worlds[64]
    synthetic = np.concatenate([plant(real.images[:20], "shift"), honest.images[:40]])
    flags = flag_copies(synthetic, real.images[:80], real_subjects=real.subjects[:80])
    assert (flags.flagged < 20).sum() == 20
    assert (flags.flagged >= 20).sum() <= flags.false_high
    assert flags.reverse_flagged is None
    assert any("No held-out images" in note for note in flags.notes)


def test_a_leaking_holdout_is_said_and_does_not_blind(worlds):
    real, holdout, _ = worlds[64]
    leaky = np.concatenate([holdout.images[:40], real.images[:6], plant(real.images[6:12], "jpeg")])
    subjects = np.concatenate([np.char.add("h", holdout.subjects[:40]), ["x"] * 6, real.subjects[6:12]])
    flags = flag_copies(plant(real.images[:20], "shift"), real.images, leaky, real.subjects, subjects, reverse=False)
    assert len(flags.flagged) == 20
    assert any("6 held-out images equal a real image" in note for note in flags.notes)
    assert any("6 held-out images show a subject of the real set" in note for note in flags.notes)


def test_reverse_control_flags_copies_of_the_holdout_only(worlds):
    real, holdout, honest = worlds[64]
    small = real.images[:50], holdout.images[:50]
    clean = flag_copies(np.concatenate([plant(small[0][:10], "shift"), honest.images[:10]]), *small)
    assert len(clean.flagged) >= 10
    assert clean.reverse_flagged <= 2
    other = flag_copies(plant(small[1][:10], "shift"), *small)
    assert other.reverse_flagged == 10


def test_repeats_among_the_real_images_do_not_hide_a_copy(worlds):
    real, holdout, _ = worlds[64]
    doubled = np.concatenate([real.images[:60], real.images[:30]])
    flags = flag_copies(plant(real.images[:20], "noise"), doubled, holdout.images[:40], reverse=False)
    assert len(flags.flagged) >= 19
    assert any("30 real images that repeat another were left out" in note for note in flags.notes)


# --- one set, and two parts of a set ------------------------------------------------------------------------


def test_an_audit_finds_what_was_planted_and_nothing_else():
    own = mammograms(60, 0).images
    images = np.concatenate([own, own[:3], plant(own[10:14], "shift"), plant(own[20:22], "flip")])
    labels = np.zeros(len(images), int)
    labels[60] = 1
    subjects = [str(i) for i in [*range(60), 0, 1, 2, 10, 11, 98, 99, 20, 21]]
    audit = audit_set(image_set(images, labels, subjects))
    assert [group.tolist() for group in audit.exact] == [[0, 60], [1, 61], [2, 62]]
    pairs = {(0, 60), (1, 61), (2, 62), (10, 63), (11, 64), (12, 65), (13, 66), (20, 67), (21, 68)}
    assert {tuple(pair) for pair in audit.near.tolist()} == pairs
    assert [group.tolist() for group in audit.double_labels] == [[0, 60]]
    assert [group.tolist() for group in audit.double_subjects] == [[12, 65], [13, 66]]
    assert "3 of 69 images repeat another exactly." in audit.sentences()
    assert audit_set(image_set(images)).double_subjects is None


def test_groups_hold_together_and_serve_as_subjects():
    own = mammograms(30, 0).images
    images = np.concatenate([own, plant(own[:1], "jpeg"), plant(own[:1], "brightness")])
    groups = duplicate_groups(images)
    assert groups[0] == groups[30] == groups[31]
    assert len(np.unique(groups)) == 30
    assert (groups == duplicate_groups(image_set(images))).all()


def test_tiny_sets_have_no_duplicates():
    one = mammograms(2, 0).images[:1]
    assert duplicate_groups(one, threshold=0.9).tolist() == ["group-0"]
    flat = np.zeros((4, 1, 16, 16), np.uint8)
    assert len(np.unique(duplicate_groups(flat, threshold=0.9))) == 1  # equal in every pixel, if nothing else


def test_overlap_of_two_sets():
    own = mammograms(40, 0)
    other = mammograms(20, 1).images
    first = image_set(own.images, subjects=own.subjects)
    images = np.concatenate([other, own.images[:2], plant(own.images[4:6], "jpeg")])
    second = image_set(images, subjects=[*(f"new {i}" for i in range(20)), own.subjects[0], "x", "y", "z"])
    found = subject_overlap(first, second)
    assert found.subjects == (own.subjects[0],)
    assert found.subject_rows == (2, 1)
    assert found.exact.tolist() == [[0, 20], [1, 21]]
    near = {tuple(pair) for pair in found.near.tolist()}
    assert {(0, 20), (1, 21)} <= near <= {(0, 20), (1, 21), (4, 22), (5, 23)}
    assert "1 subjects are on both sides, with 2 and 1 images." in found.sentences()
    assert subject_overlap(image_set(own.images), second, threshold=0.9).subjects is None


# --- real images --------------------------------------------------------------------------------------------


@pytest.fixture
def own_mirror_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOOKALIKE_CACHE", str(tmp_path))
    if manifest.status("cbis_ddsm") != "in mirror":
        pytest.skip("cbis_ddsm is not in the mirror")


@pytest.mark.real
@real_data
def test_shifted_mammograms_are_found_among_held_out_ones(own_mirror_cache):
    real, others = load("cbis_ddsm", "train"), load("cbis_ddsm", "test")
    patients = np.random.default_rng(0).permutation(np.unique(others.subjects))
    holdout = others.subset(np.isin(others.subjects, patients[::2]))
    honest = others.subset(~np.isin(others.subjects, patients[::2])).images[:200]
    rows = np.random.default_rng(1).permutation(len(real))[:100]
    synthetic = np.concatenate([plant(real.images[rows], "shift"), honest])
    flags = flag_copies(synthetic, real.images, holdout.images, real.subjects, holdout.subjects, reverse=False)
    found = flags.flagged < 100
    assert found.sum() == 100
    assert (flags.real[found] == rows[flags.flagged[found]]).all()
    assert (~found).sum() <= flags.false_high


# --- exact duplicates taken out -----------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 1)), max_size=12))
def test_one_of_each_image_is_kept_and_none_with_two_labels(rows):
    """Against a slow twin; an image is its grey value."""
    images = np.array([grey for grey, _ in rows], np.uint8).reshape(-1, 1, 1, 1)
    whole = image_set(images, [label for _, label in rows])
    kept = [
        i
        for i, (grey, _) in enumerate(rows)
        if grey not in [other for other, _ in rows[:i]] and len({label for other, label in rows if other == grey}) == 1
    ]
    assert without_duplicates(whole).subjects.tolist() == [str(i) for i in kept]


def test_blur_by_products_is_the_blur_by_convolutions():
    images = torch.rand(3, 2, 7, 12, generator=torch.Generator().manual_seed(0)) * 255
    reach, sd = 12, 4.0
    taps = torch.exp(-torch.arange(-reach, reach + 1).float().square() / (2 * sd * sd))
    taps = (taps / taps.sum()).view(1, 1, 1, -1)
    padded = torch.nn.functional.pad(images.flatten(0, 1)[:, None], (reach,) * 4, mode="replicate")
    slow = torch.nn.functional.conv2d(torch.nn.functional.conv2d(padded, taps), taps.mT).view(images.shape)
    torch.testing.assert_close(alignment._blurred(images, sd), slow, rtol=0, atol=1e-3)
    assert alignment._blurred(images, 0.0) is images
