"""From evidence to pass, fail or cannot tell, against limits that stand beside the answer.

A criterion passes where the whole interval lies on the good side of its limit and fails where the whole interval lies
on the bad side; in between nothing can be said, and more images are the remedy. The whole fails if one criterion fails,
and passes only if all pass that apply: what was not tested is no reason to pass.
"""


class EvidenceError(ValueError):
    """Evidence that cannot be had from what was given; the message says what to do."""


PASS, FAIL, UNSURE, NOT_APPLICABLE = "pass", "fail", "cannot tell", "does not apply"

# name: limit, the side of it on which a value passes, what is limited
THRESHOLDS = {
    "copies": (0.0, "below", "released images that equal a real one, or are as alike as its JPEG copy"),
    "copies_share": (0.01, "below", "share of released images flagged as copies, beyond what held-out images set off"),
    "attack_auc": (0.60, "below", "the strongest of the attacks that can be believed"),
    "attack_tpr_at_1pct_fpr": (0.05, "below", "training images called while 1 % of the others are, strongest attack"),
    "coverage_kept": (0.50, "above", "coverage of the training images, as a share of what held-out images cover"),
    "utility_kept": (0.50, "above", "a classifier's gain over chance, as a share of training on real images"),
}
PRIVACY = ("copies", "copies_share", "attack_auc", "attack_tpr_at_1pct_fpr")  # the rest is about use


def limits(changed=None):
    """The thresholds with the values of `changed` ({name: limit}) in their place."""
    unknown = set(changed or {}) - set(THRESHOLDS)
    if unknown:
        raise EvidenceError(f"There is no threshold {', '.join(unknown)}; there are {', '.join(THRESHOLDS)}.")
    return {name: (float((changed or {}).get(name, limit)), *rest) for name, (limit, *rest) in THRESHOLDS.items()}


def judge(findings, changed=None):
    """{"verdict", "privacy", "use", "criteria"}: `findings` ({name: (value, (low, high), note)}) against their limits.

    A criterion that is missing from `findings` cannot be told; one that is `NOT_APPLICABLE` there does not count.
    """
    criteria = {name: _criterion(findings.get(name), *limit) for name, limit in limits(changed).items()}
    private = {name: criterion["verdict"] for name, criterion in criteria.items() if name in PRIVACY}
    useful = {name: criterion["verdict"] for name, criterion in criteria.items() if name not in PRIVACY}
    parts = {"verdict": private | useful, "privacy": private, "use": useful}
    return {part: _worst(answers.values()) for part, answers in parts.items()} | {"criteria": criteria}


def _worst(answers):
    return FAIL if FAIL in answers else UNSURE if UNSURE in answers else PASS


def _criterion(finding, limit, side, what):
    if finding == NOT_APPLICABLE:
        empty = {"value": None, "interval": None, "note": ""}
        return {"limit": limit, "passes": side, "what": what, **empty, "verdict": NOT_APPLICABLE}
    value, interval, note = finding or (None, None, "not tested")
    stated = {"limit": limit, "passes": side, "what": what, "value": value, "interval": interval, "note": note}
    if interval is None:
        return stated | {"verdict": UNSURE}
    low, high = interval if side == "below" else (-interval[1], -interval[0])
    bound = limit if side == "below" else -limit
    return stated | {"verdict": PASS if high <= bound else FAIL if low > bound else UNSURE}
