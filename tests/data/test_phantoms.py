"""Phantoms are what their factors say, the same for the same seed, and their classes can be learned."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from lookalike.data import phantoms

KINDS = {
    "grey28": (phantoms.grey28, (1, 28, 28), 10),
    "mammography": (phantoms.mammography, (1, 128, 128), 2),
    "vertebrae": (phantoms.vertebrae, (9, 64, 64), 3),
    "dermoscopy": (phantoms.dermoscopy, (3, 64, 64), 2),
    "brain": (phantoms.brain, (1, 64, 64), 4),
}
SMALL = {"grey28": 14, "mammography": 32, "vertebrae": 24, "dermoscopy": 24, "brain": 32}


@pytest.mark.parametrize("kind", KINDS)
def test_shape_terms_and_factors(kind):
    make, shape, classes = KINDS[kind]
    made = make(5)
    images = made.image_set
    assert images.images.shape == (5, *shape)
    assert len(images.classes) == classes
    assert (images.origin, images.licence) == ("phantom", "Apache-2.0")
    assert images.stand_in_for
    assert all(len(values) == 5 for values in made.factors.values())
    assert images.images.std() > 10


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_depends_on_seed_and_place_alone(kind):
    make, _, _ = KINDS[kind]
    few, many = make(3, seed=7, image_size=SMALL[kind]), make(9, seed=7, image_size=SMALL[kind])
    assert (few.image_set.images == many.image_set.images[:3]).all()
    assert (few.image_set.subjects == many.image_set.subjects[:3]).all()
    other = make(3, seed=8, image_size=SMALL[kind])
    assert not (few.image_set.images == other.image_set.images).all()
    assert not set(few.image_set.subjects) & set(other.image_set.subjects)


@pytest.mark.parametrize("kind", KINDS)
def test_site_is_known_changes_the_images_and_is_independent_of_the_class(kind):
    make, _, classes = KINDS[kind]
    per_subject = 8 if kind == "brain" else 6
    n = 2 * classes * per_subject
    one, two = make(n, image_size=SMALL[kind]), make(n, image_size=SMALL[kind], sites=2)
    site, labels = two.factors["site"], two.image_set.labels
    assert not one.factors["site"].any()
    assert (one.image_set.images[site == 0] == two.image_set.images[site == 0]).all()
    assert (one.image_set.images[site == 1] != two.image_set.images[site == 1]).any((1, 2, 3)).all()
    assert set(zip(site, labels)) == {(s, k) for s in (0, 1) for k in range(classes)}


@pytest.mark.parametrize(
    ("kind", "n", "at_least"), [("grey28", 400, 0.6), ("vertebrae", 60, 0.9), ("brain", 320, 0.45)]
)
def test_classes_can_be_told_apart_on_unseen_subjects(kind, n, at_least):
    make, _, _ = KINDS[kind]
    sets = [make(n, seed=seed, image_size=SMALL[kind]).image_set for seed in (0, 1)]
    (train, y), (test, truth) = [(s.images.reshape(n, -1) / 255.0, s.labels) for s in sets]
    assert LogisticRegression(C=0.05, max_iter=300).fit(train, y).score(test, truth) > at_least


def test_the_two_views_share_the_mass_and_not_the_pixels():
    made = phantoms.mammography(8, image_size=32)
    radius, view = made.factors["radius"].reshape(4, 2), made.factors["view"].reshape(4, 2)
    assert (radius[:, 0] == radius[:, 1]).all()
    assert len(np.unique(radius)) == 4
    assert (view == [0, 1]).all()
    images = made.image_set.images.reshape(4, 2, -1)
    assert (images[:, 0] != images[:, 1]).any(1).all()
    assert made.image_set.labels.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_neighbouring_brain_slices_are_near_twins_and_subjects_are_not():
    images = phantoms.brain(40).image_set.images.reshape(5, 8, -1).astype(float)
    correlation = np.corrcoef(images.reshape(40, -1))
    neighbours = [correlation[8 * s + i, 8 * s + i + 1] for s in range(5) for i in range(7)]
    strangers = correlation[0, 32:]  # another subject of the same class
    assert min(neighbours) > 0.97
    assert max(strangers) < min(neighbours)


def test_the_frame_is_planted_as_often_as_asked():
    made = phantoms.dermoscopy(400, image_size=16, frame_probability=(0.1, 0.6))
    frame, labels = made.factors["frame"], made.image_set.labels
    assert frame[labels == 0].mean() == pytest.approx(0.1, abs=4 * (0.09 / 200) ** 0.5)
    assert frame[labels == 1].mean() == pytest.approx(0.6, abs=4 * (0.24 / 200) ** 0.5)
    corners = made.image_set.images[:, :, 0, 0].mean(1)
    assert corners[frame == 1].max() < 30 < corners[frame == 0].min()


def test_masses_differ_by_shape_and_overlap():
    made = phantoms.mammography(200, image_size=8)
    malignant = made.factors["malignant"] == 1
    assert (malignant == (made.image_set.labels == 0)).all()
    for factor in ("irregularity", "spiculation", "radius", "contrast"):
        values = made.factors[factor]
        assert values[malignant].mean() > values[~malignant].mean()
        assert values[malignant].min() < values[~malignant].max()


def test_melanomas_are_larger_and_ventricles_grow_with_the_grade():
    lesions = phantoms.dermoscopy(200, image_size=8)
    radius, malignant = lesions.factors["radius"], lesions.factors["malignant"] == 1
    assert radius[malignant].mean() > radius[~malignant].mean() + 0.08
    heads = phantoms.brain(160, image_size=8)
    grades = [heads.factors["ventricles"][heads.factors["grade"] == g].mean() for g in range(4)]
    assert grades == sorted(grades)


def test_the_other_site_has_other_patients_both_classes_and_a_darker_scanner():
    here, there = (make(40, image_size=16).image_set for make in (phantoms.mammography, phantoms.mammography_elsewhere))
    assert len(there) == 40
    assert there.name == "phantom_mammography_elsewhere"
    assert there.stand_in_for == "bcdr"
    assert not set(here.subjects) & set(there.subjects)
    assert list(np.bincount(there.labels)) == [20, 20]
    assert there.images.mean() < here.images.mean()
