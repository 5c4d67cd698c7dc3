"""The calibration: trials deal subjects, planted copies raise power, their absence does not; what is kept is shown."""

import dataclasses

import numpy as np
import pytest

from lookalike import calibration, calibration_models, pages, paths
from lookalike.calibration import NO_LEAK, SECOND_SITE, calibrate, deal, make_pool, powers
from lookalike.data import phantoms
from lookalike.data.plants import plant
from lookalike.files import write_json
from lookalike.metrics.extractors import random_conv
from lookalike.metrics.intervals import clopper_pearson

SIDE = 16
COPIES = ("gan_leaks_pixels", "pgan_pairwise_pixels", "aligned_similarity")


@pytest.fixture(scope="module")
def pool():
    images = phantoms.mammography(160, 0, image_size=SIDE).image_set
    other = phantoms.mammography(60, 1, image_size=SIDE).image_set
    elsewhere = dataclasses.replace(other, images=plant(other.images, "noise"))
    return make_pool(images, random_conv(0, 16, 32), elsewhere=elsewhere, leaks=("copy",))


@pytest.fixture(scope="module")
def found(pool):
    return calibrate(pool, members=24, synthetic=40, shares=(0.6, 0.05), repeats=8, leaks=("copy",))


def test_copies_are_seen_and_their_absence_is_not(found):
    for name in COPIES:
        assert found["copy, 60%"][name]["power"] >= 0.75
        assert found["copy, 60%"][name]["power"] >= found["copy, 5%"][name]["power"]
    assert np.mean([found[NO_LEAK][name]["power"] for name in COPIES]) <= 0.25


def test_another_site_looks_like_a_leak(found):
    assert max(found[SECOND_SITE][name]["power"] for name in ("gan_leaks_pixels", "gan_leaks_features")) >= 0.5


def test_another_detector_sees_the_same_trials_and_knows_who_was_copied(pool):
    drawn = []

    def count_copies(trial):
        """How many members stand among the made images, pixel for pixel."""
        drawn.append(trial)
        made = {image.tobytes() for image in trial.synthetic.pixels}
        alike = np.array([image.tobytes() in made for image in trial.members.pixels])
        if trial.copied is not None:
            assert np.flatnonzero(alike).tolist() == trial.copied.tolist()
        return {"copies": float(alike.sum())}

    settings = {"members": 24, "synthetic": 40, "shares": (0.5,), "repeats": 3, "leaks": ("copy",)}
    found = calibrate(pool, **settings, detect=count_copies)
    assert {world: row["copies"]["power"] for world, row in found.items()} == {
        NO_LEAK: 0, "copy, 50%": 1, SECOND_SITE: 0
    }  # fmt: skip
    again = calibration.trials(pool, **settings, detect=lambda trial: trial)
    flat = [again[world][i] for i in range(3) for world in again]
    assert all((a.synthetic.pixels == b.synthetic.pixels).all() for a, b in zip(drawn, flat, strict=True))


def test_more_quiet_trials_leave_the_others_as_they_are(pool):
    settings = {"members": 24, "synthetic": 40, "shares": (0.5,), "repeats": 2, "leaks": ("copy",)}
    few, many = (calibration.trials(pool, **settings, quiet=n, detect=lambda trial: trial.seed) for n in (None, 7))
    assert many.pop("threshold")[:2] == few.pop("threshold")
    assert many == few
    drawn = calibration.trials(pool, **settings, quiet=7, detect=lambda trial: trial.copied)["threshold"]
    assert len(drawn) == 7
    assert set(drawn) == {None}
    with pytest.raises(ValueError, match="quiet is 1, repeats 2"):
        calibration.trials(pool, **settings, quiet=1, detect=len)


def test_no_subject_is_dealt_twice(pool):
    parts = deal(pool.subjects, [10, 21, 30], np.random.default_rng(0))
    whose = [set(pool.subjects[part]) for part in parts]
    assert not whose[0] & whose[1]
    assert not whose[1] & whose[2]
    assert [len(part) >= count for part, count in zip(parts, [10, 21, 30])] == [True] * 3
    with pytest.raises(ValueError, match="A trial needs 500 images and the pool has 160"):
        deal(pool.subjects, [500], np.random.default_rng(0))


def test_power_counts_what_passes_the_quiet_trials():
    quiet = [{"x": value} for value in range(100)]
    found = powers(quiet, {"leak": [{"x": 94}, {"x": 95}, {"x": 96}, {"x": 200}]})
    assert found["leak"]["x"] == {"power": 0.5, "interval": list(clopper_pearson(2, 4))}


def test_attacks_on_an_overfitted_model_find_it():
    images = phantoms.grey28(120, 0, image_size=12).image_set
    found = calibration_models.calibrate_gans(
        images, random_conv(0, 16, 32), models=2, members=12, samples=40, epochs=100, width=8, search_steps=6
    )
    assert found[calibration_models.OVERFITTED]["logan_white_box"]["power"] == 1
    assert set(found[calibration_models.OVERFITTED]) == set(found[calibration_models.DISJOINT])


def test_a_kept_calibration_is_shown_and_quoted(found, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "results_dir", lambda: tmp_path)
    assert pages.calibrations() == "No calibration is kept yet."
    assert calibration.quote() is None
    document = {
        "made": "2026-11-22T10:00:00+00:00",
        "provenance": {"commit": "0123456789abcdef"},
        **{"data": "phantom_mammography", "side": 16, "members": 24, "synthetic": 40, "repeats": 8},
        **{"features": "random", "worlds": found},
    }
    write_json(tmp_path / "calibration.json", {"phantom_mammography": document})
    page = pages.calibrations()
    assert "**60 % of the released images are copies**" in page
    power = found["copy, 60%"]["gan_leaks_pixels"]["power"]
    row = next(line for line in page.splitlines() if line.startswith("| nearest released image, pixels"))
    assert row.rstrip("| ").endswith(f"{power:.2f}")
    monkeypatch.setattr(calibration, "SHARES", (0.6, 0.05))
    assert calibration.quote()["attacks"]["gan_leaks_pixels"] == power
