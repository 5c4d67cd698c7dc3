"""Released images that repeat a real one: what is certain, what is beyond chance, and whether the search can see it.

`data.duplicates` compares fine detail after alignment and lets held-out images set the threshold. Two answers come of
it: images that equal a real one, or are as alike as its JPEG copy where honest images are far from that, are copies one
by one; the rest can only be counted against the flags that honest images set off.
"""

import numpy as np
from scipy.stats import betabinom

from lookalike.data import duplicates
from lookalike.data.splits import image_digests
from lookalike.privacy.controls import PLANTS, planted_copies

WORST = 12  # pairs that the card lists
FAR, FULL = 6, 0.9999  # standard deviations from honest images to copies; the largest similarity with a finite arctanh


def search(synthetic, real, holdout, whose, names):
    """The document's part on copies, and its worst pairs of images; `whose`: subjects of real and holdout, or None.

    names(set, row) says what an image is called.
    """
    found = duplicates.flag_copies(synthetic, real, holdout, *whose)
    fine = found.matches["fine"]
    alike = np.argsort(-fine.likeness, kind="stable")
    worst = np.concatenate([found.flagged, alike[~np.isin(alike, found.flagged)]])[:WORST]
    partner = dict(zip(found.flagged.tolist(), found.real.tolist()))
    pairs = [(int(i), partner.get(int(i), int(fine.indices[i]))) for i in worst]
    held_out = [] if holdout is None else image_digests(holdout)
    document = {
        "flagged": len(found.flagged),
        "exact": len(found.exact),
        "exact_held_out": int(np.isin(image_digests(synthetic), held_out).sum()),
        "as_alike_as_copies": _as_alike_as_copies(fine, real, holdout, whose),
        "expected_false_flags": found.expected_false,
        "chance": [_fewest_by_chance(found, len(synthetic)), found.false_high],
        "planted": _planted_found(real, holdout, whose),
        "control": {"flagged": found.control_flagged, "expected": found.control_expected},
        "against_held_out": {"flagged": found.reverse_flagged, "expected": found.reverse_expected},
        "note": " ".join(found.notes),
        "worst": [
            {
                "synthetic": names("synthetic", i),
                "real": names("real", j),
                "similarity": float(fine.similarity[i]),
                "flagged": i in partner,
            }
            for i, j in pairs
        ],
    }
    return document, tuple((synthetic[i], real[j]) for i, j in pairs)


def findings(copies, released):
    """{criterion: (value, (low, high), note)}: copies that are certain, and the share of flags beyond chance."""
    certain = float(max(copies["exact"], copies["as_alike_as_copies"]) + copies["exact_held_out"])
    planted, (fewest, most) = copies["planted"], copies["chance"]
    found = {"copies": (certain, (certain, certain), "")}
    flagged = copies["flagged"]
    note = f"{flagged} flagged, {copies['expected_false_flags']:.2g} expected by chance"
    value = max(flagged - copies["expected_false_flags"], 0) / released
    interval = max(flagged - most, 0) / released, max(flagged - fewest, 0) / released
    if 10 * planted["found"] < 9 * planted["of"] and interval[0] == 0:
        note = f"the search found {planted['found']} of {planted['of']} planted copies, so its silence proves little"
        return found | {"copies_share": (None, None, note)}
    return found | {"copies_share": (value, (min(interval[0], value), interval[1]), note)}


def _as_alike_as_copies(fine, real, holdout, whose):
    """Released images as alike to a training image as its JPEG copy is; 0 where honest images lie within six standard
    deviations of that, on Fisher's scale: there it proves nothing.
    """
    alike = duplicates.copy_similarity(real)
    judged, owner = (holdout, whose[1]) if holdout is not None else (real, whose[0])
    honest = duplicates.near_duplicates(judged, real, owner, whose[0], view="fine").similarity
    honest = np.arctanh(honest.clip(-FULL, FULL))
    far = honest.mean() + FAR * honest.std() < np.arctanh(min(alike, FULL))
    return int((fine.similarity >= alike).sum()) if far else 0


def _planted_found(real, holdout, whose):
    """How many of altered copies of real images the same search flags."""
    rows = np.unique(np.linspace(0, len(real) - 1, PLANTS).astype(int))
    found = duplicates.flag_copies(planted_copies(real[rows]), real, holdout, *whose, reverse=False)
    return {"found": len(found.flagged), "of": len(rows)}


def _fewest_by_chance(found, released):
    """Flags that honest images would set off in 95 of 100 cases at least, in the view that sets off most."""
    honest = min(len(values) for values in found.calibration.values())
    return int(betabinom.ppf(0.05, released, 1, honest))
