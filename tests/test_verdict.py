"""Pass, fail or cannot tell: intervals against limits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lookalike.verdict import FAIL, NOT_APPLICABLE, PASS, THRESHOLDS, UNSURE, EvidenceError, judge, limits

GOOD = {
    "copies": (0.0, (0.0, 0.0), ""),
    "copies_share": (0.0, (0.0, 0.005), ""),
    "attack_auc": (0.5, (0.45, 0.55), "domias_features"),
    "attack_tpr_at_1pct_fpr": (0.01, (0.0, 0.03), "domias_features"),
    "coverage_kept": (0.9, (0.8, 1.0), ""),
    "utility_kept": (0.9, (0.8, 1.0), ""),
}


def test_all_on_the_good_side_passes():
    found = judge(GOOD)
    assert found["verdict"] == PASS
    assert set(found["criteria"]) == set(THRESHOLDS)
    assert found["criteria"]["attack_auc"]["limit"] == 0.6


def test_privacy_and_use_are_told_apart():
    found = judge(GOOD | {"coverage_kept": (0.2, (0.1, 0.3), "")})
    assert (found["verdict"], found["privacy"], found["use"]) == (FAIL, PASS, FAIL)
    found = judge(GOOD | {"attack_auc": (0.6, (0.5, 0.7), "")})
    assert (found["verdict"], found["privacy"], found["use"]) == (UNSURE, UNSURE, PASS)


@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_criterion_that_was_not_tested_is_no_pass(name):
    assert judge({key: value for key, value in GOOD.items() if key != name})["verdict"] == UNSURE


def test_a_criterion_that_does_not_apply_is_left_out():
    found = judge(GOOD | {"utility_kept": NOT_APPLICABLE})
    assert found["verdict"] == PASS
    assert found["criteria"]["utility_kept"]["verdict"] == NOT_APPLICABLE


@pytest.mark.parametrize(
    ("name", "bad", "unsure"),
    [
        ("copies", (7.0, (7.0, 7.0)), (2.0, (0.0, 2.0))),
        ("copies_share", (0.1, (0.05, 0.15)), (0.01, (0.0, 0.02))),
        ("attack_auc", (0.7, (0.65, 0.75)), (0.59, (0.55, 0.63))),
        ("coverage_kept", (0.3, (0.2, 0.4)), (0.5, (0.4, 0.6))),
    ],
)
def test_one_failure_fails_and_an_interval_across_the_limit_does_not_tell(name, bad, unsure):
    assert judge(GOOD | {name: (*unsure, "")})["verdict"] == UNSURE
    found = judge(GOOD | {name: (*bad, "")})
    assert found["verdict"] == found["criteria"][name]["verdict"] == FAIL
    assert judge({name: (*bad, "")})["verdict"] == FAIL


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_stricter_limit_never_turns_a_failure_into_a_pass(low, width, limit):
    finding = {"attack_auc": (low, (low, low + width), "")}
    loose, strict = (
        judge(finding, {"attack_auc": limit + slack})["criteria"]["attack_auc"]["verdict"] for slack in (0.1, 0)
    )
    order = [PASS, UNSURE, FAIL]
    assert order.index(strict) >= order.index(loose)


def test_an_unknown_threshold_is_refused():
    with pytest.raises(EvidenceError, match="There is no threshold epsilon; there are copies"):
        limits({"epsilon": 1})
