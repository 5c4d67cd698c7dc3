"""The evidence on three sets: verdicts on planted leaks, controls, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from lookalike import card
from lookalike.data import phantoms
from lookalike.data.plants import plant
from lookalike.evaluate import evaluate
from lookalike.metrics.extractors import random_conv
from lookalike.verdict import EvidenceError

SIDE = 24


def phantom_set(seed, n=120, origin="phantom", name="phantom"):
    images = phantoms.mammography(n, seed, image_size=SIDE).image_set
    return dataclasses.replace(images, origin=origin, name=name)


def with_copies(synthetic, real, count, kind="shift"):
    images = synthetic.images.copy()
    images[:count] = plant(real.images, kind)[:count]
    return dataclasses.replace(synthetic, images=images)


@pytest.fixture(scope="module")
def sets():
    return phantom_set(1), phantom_set(2, 160, "synthetic", "made"), phantom_set(3)


@pytest.fixture(scope="module")
def extractor():
    return random_conv(0)


@pytest.fixture(scope="module")
def honest(sets, extractor):
    return evaluate(*sets, extractor=extractor)


def test_the_document_has_what_machines_read(honest):
    document = json.loads(json.dumps(honest.document, allow_nan=False))
    assert document["verdict"] in ("pass", "fail", "cannot tell")
    for row in document["measures"].values():
        low, high = row["interval"]
        assert low <= row["value"] <= high
        assert row["direction"] in ("higher", "lower")
        assert row["control"]["value"] is not None
    for row in document["attacks"].values():
        assert row["interval"][0] <= row["auc"] <= row["interval"][1]
        assert 0 <= row["tpr_at_1pct_fpr"] <= 1
        assert set(row["control"]) == {"no leak", "planted copies"}
    assert set(document["thresholds"]) == set(document["criteria"])
    assert any("LiRA" in line for line in document["not_tested"])


def test_an_honest_set_does_not_fail(honest):
    assert honest.document["verdict"] != "fail"
    assert honest.document["copies"]["exact"] == 0
    for row in honest.document["attacks"].values():
        assert row["interval"][0] <= 0.58


def test_shifted_copies_are_found_and_named(sets, extractor):
    real, synthetic, holdout = sets
    found = evaluate(real, with_copies(synthetic, real, 60), holdout, extractor=extractor).document
    assert found["verdict"] == found["criteria"]["copies"]["verdict"] == "fail"
    assert found["criteria"]["copies_share"]["verdict"] == "fail"
    flagged = [row for row in found["copies"]["worst"] if row["flagged"]]
    assert np.mean([row["synthetic"] == row["real"] for row in flagged]) > 0.8


def test_a_few_copies_fail_where_no_honest_image_is_as_near(sets, extractor):
    real, synthetic, holdout = sets
    found = evaluate(real, with_copies(synthetic, real, 4, "jpeg"), holdout, extractor=extractor).document
    copies = found["copies"]
    assert 3 <= copies["as_alike_as_copies"] <= 4
    assert copies["flagged"] <= copies["chance"][1]  # counting alone could not tell
    assert found["privacy"] == "fail"


def test_exact_copies_fail_even_without_held_out_images(sets, extractor):
    real, synthetic, _ = sets
    found = evaluate(real, with_copies(synthetic, real, 3, "copy"), extractor=extractor).document
    assert found["verdict"] == "fail"
    assert found["copies"]["exact"] == 3
    assert found["attacks"] == {}
    assert found["not_tested"][0].startswith("membership attacks")


def test_held_out_images_that_are_training_images_are_left_out(sets, extractor):
    real, synthetic, holdout = sets
    mixed = dataclasses.replace(
        holdout,
        images=np.concatenate([holdout.images, real.images[:10]]),
        labels=np.concatenate([holdout.labels, real.labels[:10]]),
        subjects=np.concatenate([holdout.subjects, real.subjects[:10]]),
    )
    document = evaluate(real, synthetic, mixed, extractor=extractor).document
    assert document["sets"]["holdout"]["images"] == len(holdout)
    assert any("10 held-out images repeat a training image" in note for note in document["notes"])


def test_with_few_held_out_images_no_attack_is_made(sets, extractor):
    real, synthetic, holdout = sets
    document = evaluate(real, synthetic, holdout.subset(range(24)), extractor=extractor).document
    assert document["attacks"] == {}
    assert document["privacy"] == "cannot tell"
    assert "membership attacks: they need 40 held-out real images" in document["not_tested"][0]


def test_copies_are_not_certain_where_everything_is_alike(extractor):
    """At eight pixels honest images are as alike as copies are elsewhere."""
    sets = [phantoms.mammography(n, seed, image_size=8).image_set for seed, n in ((1, 100), (2, 120), (3, 60))]
    document = evaluate(*sets, extractor=extractor).document
    assert document["copies"]["as_alike_as_copies"] == 0
    assert document["privacy"] != "fail"


def test_an_honest_set_passes_limits_that_its_size_can_meet(sets, extractor):
    loose = {"copies_share": 0.15, "attack_auc": 0.75, "attack_tpr_at_1pct_fpr": 0.5, "utility_kept": -10}
    real, synthetic, _ = sets
    document = evaluate(real, synthetic, phantom_set(3, 240), extractor=extractor, thresholds=loose).document
    assert document["privacy"] == "pass"
    assert document["thresholds"]["attack_auc"] == 0.75


def test_a_holdout_of_another_scanner_is_no_leak(sets, extractor):
    real, synthetic, holdout = sets
    darker = dataclasses.replace(holdout, images=(holdout.images * 0.7).astype(np.uint8))
    document = evaluate(real, synthetic, darker, extractor=extractor).document
    assert not document["training_against_held_out"]["alike"]
    assert not any(row["believed"] for row in document["attacks"].values())
    assert document["criteria"]["attack_auc"]["verdict"] == "cannot tell"


def test_a_generator_that_remembers_much_fails_by_attacks_alone(sets, extractor):
    real, synthetic, holdout = sets
    images = plant(real.images, "noise")[np.arange(len(synthetic)) % len(real)]
    found = evaluate(real, dataclasses.replace(synthetic, images=images), holdout, extractor=extractor).document
    assert found["criteria"]["attack_auc"]["verdict"] == "fail"
    assert found["attacks"]["aligned_similarity"]["believed"]


def test_released_held_out_images_are_copies_too(sets, extractor):
    real, synthetic, holdout = sets
    images = np.concatenate([holdout.images[:30], synthetic.images[30:]])
    found = evaluate(real, dataclasses.replace(synthetic, images=images), holdout, extractor=extractor).document
    assert found["copies"]["exact_held_out"] == 30
    assert found["criteria"]["copies"]["verdict"] == "fail"


def test_released_images_that_are_all_one_training_image_fail(sets, extractor):
    real, synthetic, holdout = sets
    same = dataclasses.replace(synthetic, images=np.repeat(real.images[:1], len(synthetic), 0))
    found = evaluate(real, same, holdout, extractor=extractor).document
    assert found["verdict"] == "fail"
    assert found["attacks"] == {}


def test_the_same_seed_gives_the_same_evidence(sets, extractor, honest):
    again = evaluate(*sets, extractor=extractor)
    changing = {"made", "provenance"}
    assert {k: v for k, v in again.document.items() if k not in changing} == {
        k: v for k, v in honest.document.items() if k not in changing
    }


def test_sets_that_cannot_be_compared_are_refused(sets, extractor):
    real, synthetic, _ = sets
    other = phantoms.mammography(40, 5, image_size=16).image_set
    with pytest.raises(EvidenceError, match=r"different shapes \(real 1 x 24 x 24, synthetic 1 x 16 x 16"):
        evaluate(real, other, extractor=extractor)
    with pytest.raises(EvidenceError, match="The synthetic set has 5 images"):
        evaluate(real, synthetic.subset(range(5)), extractor=extractor)
    alone = dataclasses.replace(real, subjects=np.full(len(real), "one"))
    with pytest.raises(EvidenceError, match="The real set shows 1 subjects"):
        evaluate(alone, synthetic, extractor=extractor)
    with pytest.raises(EvidenceError, match="There is no threshold utility"):
        evaluate(real, synthetic, extractor=extractor, thresholds={"utility": 1})
    with pytest.raises(EvidenceError, match="held-out images are training images too"):
        evaluate(real, synthetic, real, extractor=extractor)


# --- the card -----------------------------------------------------------------------------------------------


def test_the_card_is_one_file_without_scripts_or_addresses(honest, tmp_path):
    paths = card.write(honest, tmp_path / "card")
    assert [path.name for path in paths] == ["card.json", "card.md", "card.html"]
    page = paths[2].read_text("utf-8")
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert "<img" not in page
    for name in honest.document["attacks"]:
        assert card.NAMES[name] in page
        assert card.NAMES[name] in paths[1].read_text("utf-8")
    assert json.loads(paths[0].read_text("utf-8"))["verdict"] == honest.document["verdict"]


def test_images_are_drawn_only_on_request(honest, tmp_path):
    page = card.write(honest, tmp_path, draw=True)[2].read_text("utf-8")
    assert page.count("<img") == 2 * len(honest.document["copies"]["worst"])


def test_nothing_restricted_is_drawn(sets, extractor, tmp_path):
    real, synthetic, holdout = sets
    found = evaluate(dataclasses.replace(real, restricted=True), synthetic, holdout, extractor=extractor)
    with pytest.raises(EvidenceError, match="restricted, so no image of it is drawn"):
        card.write(found, tmp_path, draw=True)
    assert not list(tmp_path.iterdir())


def test_names_of_files_cannot_become_markup(honest, tmp_path):
    document = json.loads(json.dumps(honest.document))
    document["copies"]["worst"][0]["synthetic"] = "<b>x</b>.png"
    page = card.html(document)
    assert "<b>x</b>.png" not in page
    assert "&lt;b&gt;x" in page
