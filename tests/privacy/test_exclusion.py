"""Exclusion and tolerance: radii in closed form, nothing inside, equal releases, and the hole that too much leaves."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from lookalike.data import to_uint8
from lookalike.metrics.neighbours import nearest
from lookalike.privacy.attack import attack_result
from lookalike.privacy.exclusion import (
    NothingLeft,
    calibrated_radius,
    class_counts,
    distance_limit,
    drop_nearest,
    nearest_centre,
    radius_that_redraws,
    sample_excluding,
    tolerant_subset,
)

Z, SIDE = 5, 12
SCALE = 250.0  # grey levels per unit of latent distance
GREY = 2 / 255  # in [-1, 1]


def orthonormal(rows, seed=0):
    matrix = np.random.default_rng(seed).standard_normal((SIDE * SIDE, rows))
    return torch.tensor(np.linalg.qr(matrix)[0].T, dtype=torch.float32)


def synthesise(z, labels):
    """Latents (N, Z) to images at SCALE times their distances, within a few tenths by rounding; grey 128 at zero."""
    return (SCALE * GREY * z @ orthonormal(Z)).reshape(-1, 1, SIDE, SIDE)


def noise(n, generator=None):
    return torch.randn(n, Z, generator=generator)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def images_at(latents, aside=0.0):
    """Images of latents, moved by `aside` grey levels in a direction that the generator does not know."""
    away = aside * GREY * orthonormal(Z + 1)[-1].reshape(1, 1, SIDE, SIDE)
    return to_uint8(synthesise(latents, None) + away)


LATENTS = 0.3 * noise(12, seeded(1))
HELD_OUT = images_at(0.3 * noise(40, seeded(2)))
FINE = np.arange(0, 2, 0.1)


@pytest.mark.parametrize("aside", [0.0, 40.0])
def test_the_radius_has_its_closed_form_on_a_linear_generator(aside):
    images = images_at(LATENTS, aside)
    found = calibrated_radius(images, HELD_OUT, LATENTS, None, synthesise, distances=FINE)
    limit = np.quantile(cdist(HELD_OUT.reshape(40, -1), images.reshape(12, -1)).min(1), 0.05)
    assert found.limit == pytest.approx(limit)
    expected = (limit**2 - aside**2) ** 0.5 / SCALE
    assert 0.1 < expected < 1  # inside the grid
    np.testing.assert_allclose(found.radii, expected, rtol=0.1)
    assert (found.beyond, found.reached) == (0, 12)
    tried = found.distances
    assert (found.shares[tried < expected - 0.05] == 1).all()
    assert (found.shares[tried > expected + 0.05] == 0).all()


def test_chance_is_what_random_latents_reach():
    found = calibrated_radius(images_at(LATENTS), HELD_OUT, LATENTS, None, synthesise, distances=FINE, directions=64)
    apart = cdist(images_at(noise(2000, seeded(7))).reshape(2000, -1), images_at(LATENTS).reshape(12, -1))
    expected = (apart <= found.limit).mean()
    assert found.chance == pytest.approx(expected, abs=4 * (expected / (12 * 64)) ** 0.5)
    plain = calibrated_radius(images_at(LATENTS), HELD_OUT, LATENTS, None, lambda z, y: synthesise(0 * z, y))
    assert plain.chance == pytest.approx(plain.shares[0])  # one image for all latents


def test_an_image_that_its_projection_does_not_reach_has_no_radius():
    images = images_at(LATENTS)
    latents = LATENTS.clone()
    latents[:4] += 1.0
    found = calibrated_radius(images, HELD_OUT, latents, None, synthesise, distances=FINE)
    assert (found.radii[:4] == 0).all()
    assert (found.radii[4:] > 0.1).all()
    assert found.reached == 8
    assert found.shares[0] == pytest.approx(8 / 12)


def test_a_radius_beyond_those_tried_is_said_to_be():
    found = calibrated_radius(images_at(LATENTS), HELD_OUT, LATENTS, None, synthesise, distances=(0, 0.01))
    assert found.beyond == 12
    assert (found.radii == 0.01).all()


def test_calibration_repeats_with_its_seed_and_asks_for_each_image_s_own_label():
    asked = []

    def labelled(z, labels):
        asked.append((len(z), labels))
        return synthesise(z * (1 + labels[:, None]), labels)

    labels = torch.arange(12) % 2
    images = images_at(LATENTS * (1 + labels[:, None]))
    one, two = (calibrated_radius(images, HELD_OUT, LATENTS, labels, labelled, distances=FINE) for _ in range(2))
    np.testing.assert_array_equal(one.radii, two.radii)
    np.testing.assert_allclose(one.radii[1::2], one.radii[::2].mean() / 2, rtol=0.1)
    assert all(len(of) == n for n, of in asked)


def test_bad_calibrations_are_refused():
    images = images_at(LATENTS)
    with pytest.raises(ValueError, match="start at 0 and rise"):
        calibrated_radius(images, HELD_OUT, LATENTS, None, synthesise, distances=(0.1, 1))
    with pytest.raises(ValueError, match="one latent"):
        calibrated_radius(images, HELD_OUT, LATENTS[:5], None, synthesise)
    with pytest.raises(ValueError, match="between 0 and 1"):
        distance_limit(images, HELD_OUT, rate=1)


@pytest.mark.parametrize("one_each", [False, True])
def test_no_excluded_latent_lies_inside_and_only_its_own_class_counts(one_each):
    labels, centre_labels = torch.arange(400) % 2, torch.tensor([0, 0, 2])
    centres = torch.stack([torch.zeros(Z), torch.ones(Z), torch.zeros(Z)])
    radius = torch.tensor([1.8, 0.9, 3.0]) if one_each else 1.5
    latents, share = sample_excluding(noise, labels, centres, centre_labels, radius, seeded(3))
    first = noise(400, seeded(3))
    radii = torch.as_tensor(radius).expand(3)
    inside = ((first[:, None] - centres).norm(dim=2) < radii)[:, :2].any(1) & (labels == 0)
    assert 0.05 < share == pytest.approx(float(inside.double().mean()))
    assert torch.equal(latents[~inside], first[~inside])
    of_class_0 = latents[labels == 0]
    assert ((of_class_0[:, None] - centres[:2]).norm(dim=2) >= radii[:2]).all()
    assert ((latents[labels == 1] - centres[0]).norm(dim=1) < 1.5).any()  # no centre has this label


def test_a_radius_of_zero_excludes_nothing():
    labels = torch.zeros(50, dtype=torch.long)
    centres = noise(50, seeded(4))
    latents, share = sample_excluding(noise, labels, centres, labels, 0.0, seeded(4))
    assert torch.equal(latents, centres)  # the very same latents
    assert share == 0


def test_a_radius_that_leaves_nothing_is_refused():
    labels = torch.zeros(5, dtype=torch.long)
    with pytest.raises(NothingLeft, match="5 of 5 latents still lie within") as caught:
        sample_excluding(noise, labels, torch.zeros(1, Z), labels[:1], 1000.0, seeded(0), most=3)
    assert caught.value.redrawn == 1


def test_the_radius_that_redraws_a_share_does():
    labels, centre_labels = torch.arange(3000) % 3, torch.arange(60) % 3
    centres = noise(60, seeded(5))
    for share in (0.1, 0.5):
        radius = radius_that_redraws(share, noise(3000, seeded(6)), labels, centres, centre_labels)
        _, redrawn = sample_excluding(noise, labels, centres, centre_labels, radius, seeded(7))
        assert redrawn == pytest.approx(share, abs=0.03)


def test_the_nearest_centre_is_one_of_the_same_class():
    latents, centres = noise(30, seeded(8)), noise(20, seeded(9))
    labels, centre_labels = torch.arange(30) % 3, torch.arange(20) % 2
    distances, indices = nearest_centre(latents, labels, centres, centre_labels)
    apart = cdist(latents, centres)
    apart[labels.numpy()[:, None] != centre_labels.numpy()] = np.inf
    np.testing.assert_allclose(distances, apart.min(1), rtol=1e-5)
    alone = labels.numpy() == 2
    np.testing.assert_array_equal(indices.numpy(), np.where(alone, -1, apart.argmin(1)))


def test_latents_in_a_hundred_dimensions_are_hardly_excluded():
    def wide(n, generator=None):
        return torch.randn(n, 100, generator=generator)

    labels, centres = torch.zeros(2000, dtype=torch.long), wide(300, seeded(1))
    shares = [sample_excluding(wide, labels, centres, labels[:300], r, seeded(2))[1] for r in (8.0, 10.0, 11.5)]
    assert shares[0] == 0
    assert shares[1] < 0.05 < shares[2]


# --- tolerance


def test_the_nearest_go_first_and_the_number_is_rounded_down():
    distances = np.array([3.0, 1.0, 2.0, 1.0, 5.0])
    assert drop_nearest(distances, 0).tolist() == [0, 1, 2, 3, 4]
    assert drop_nearest(distances, 0.2).tolist() == [0, 2, 3, 4]
    assert drop_nearest(distances, 0.5).tolist() == [0, 2, 4]
    assert len(drop_nearest(np.arange(100), 0.29)) == 71  # 0.29 * 100 is 28.999...
    with pytest.raises(ValueError, match="from 0 to below 1"):
        drop_nearest(distances, 1)


def test_every_share_releases_as_many_of_each_class_and_none_of_the_nearest():
    rng = np.random.default_rng(0)
    labels = rng.choice(3, 400, p=(0.25, 0.55, 0.2))
    distances = rng.random(400) + labels  # one class lies much nearer than another
    counts = []
    for share in (0, 0.3, 0.7):
        rows = tolerant_subset(distances, labels, share, 90)
        assert len(set(rows)) == 90
        counts.append(np.bincount(labels[rows]).tolist())
        for label in range(3):
            of = distances[labels == label]
            assert distances[rows][labels[rows] == label].min() >= np.quantile(of, share) - 0.02
    assert counts[0] == counts[1] == counts[2] == list(class_counts(labels, 90).values())
    np.testing.assert_allclose(counts[0], 90 * np.bincount(labels) / 400, atol=1)


def test_releases_of_two_shares_differ_only_as_far_as_they_must():
    rng = np.random.default_rng(1)
    labels, distances = np.zeros(200, int), rng.random(200)
    plain, strict = (set(tolerant_subset(distances, labels, share, 60, seed=3)) for share in (0, 0.3))
    dropped = set(np.flatnonzero(distances < np.sort(distances)[60]))
    assert plain - dropped <= strict
    assert plain != set(tolerant_subset(distances, labels, 0, 60, seed=4))


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="has 10 images of class 0, and 11 are"):
        tolerant_subset(np.arange(20), np.zeros(20), 0.5, 11)
    with pytest.raises(ValueError, match="a distance and a label per image"):
        tolerant_subset(np.arange(20), np.zeros(19), 0.5, 11)


def test_class_counts_sum_up_and_favour_the_largest_remainder():
    assert class_counts([0, 0, 0, 1, 1, 2], 10) == {0: 5, 1: 3, 2: 2}
    assert class_counts([0, 1, 1, 2, 2, 2, 2], 3) == {0: 0, 1: 1, 2: 2}


# --- what a tolerance does to attacks: points in a plane, where nearest neighbours mean something

PLANE = 2


def flat(n, seed):
    """Points of one distribution as images; a disc of 300 grey levels or so in a plane of pixels."""
    z = np.random.default_rng(seed).standard_normal((n, PLANE)).astype(np.float32)
    return to_uint8((300 * GREY * torch.tensor(z) @ orthonormal(PLANE)).reshape(-1, 1, SIDE, SIDE))


def near_attack(pool, share, members, others, dropped_near=None):
    """The attack by nearest distance on 150 of the pool, after dropping the share nearest to some images."""
    distances = nearest(pool, members if dropped_near is None else dropped_near)[0]
    rows = tolerant_subset(distances, np.zeros(len(pool), int), share, 150)
    return attack_result("nearest", *(-nearest(side, pool[rows])[0] for side in (members, others)))


def test_tolerance_takes_a_copier_s_leak_away():
    members, others = flat(150, 1), flat(150, 2)
    copies = members.astype(int) + np.random.default_rng(0).integers(-1, 2, (2, *members.shape))
    pool = np.concatenate([flat(300, 3), *copies.clip(0, 255).astype(np.uint8)])
    leaking, less = (near_attack(pool, share, members, others) for share in (0, 0.5))
    assert leaking.low > 0.6
    assert less.high < leaking.low


def test_too_much_tolerance_leaves_a_hole_in_which_members_are_found():
    members, others, pool = flat(150, 1), flat(150, 2), flat(1200, 4)  # the pool knows nothing of the members
    innocent, holed = (near_attack(pool, share, members, others) for share in (0, 0.5))
    assert innocent.low < 0.5 < innocent.high
    assert holed.high < 0.45


def test_dropping_near_any_real_image_hides_members_among_the_images_used_and_from_no_other():
    among, against = [], []
    for draw in range(0, 60, 10):
        members, others, fresh, pool = flat(150, draw), flat(150, draw + 1), flat(150, draw + 2), flat(1200, draw + 3)
        both = np.concatenate([members, others])
        among.append(near_attack(pool, 0.8, members, others, both).auc)
        against.append(near_attack(pool, 0.8, members, fresh, both).auc)
    assert np.mean(among) == pytest.approx(0.5, abs=0.05)  # one draw: 0.03
    assert np.mean(against) < 0.45
