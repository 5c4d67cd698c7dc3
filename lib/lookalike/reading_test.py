"""A blind reading test: real or synthetic? One page of HTML that needs no server, and the arithmetic of its answers.

Paper: Carrasco Limeros et al. 2022, Sec. 3.3 and 4.1 (four readers, 200 images each, 54 % right). Chapter:
stylegan2_dermatology. The one decision worth knowing: both sides have equally many images (and equally many of each
class), so a reader who guesses, however biased, is right in half of them, and chance is 1/2.

The page holds the truth, for it scores the reader without a server. It is hidden from a glance, not from a search: one
bit per image, mixed with the bits of a generator that starts from a number in the page (`_hide`).
"""

import hashlib
from pathlib import Path

import numpy as np
from scipy import stats

from lookalike.card import png, template
from lookalike.files import write_atomically
from lookalike.metrics.intervals import clopper_pearson

WORDS = ("real", "synthetic")  # of answers and truths 0 and 1


# --- the page -----------------------------------------------------------------------------------------------


def write(path, real, synthetic, seed, title, per_side=100, labels=None, restricted=False):
    """Writes the page to `path` and says what is in it: {"images", "per_side", "id", "bytes"}.

    real, synthetic: uint8 images (N, C, H, W) of the same shape, C 1 or 3. `per_side` of each are drawn without
    replacement and shuffled together; the same seed gives the same page. labels: (labels of real, labels of
    synthetic); then both sides hold the same number of each class, as equal as `per_side` allows, so that no reader
    can go by how common a class is. restricted: the images may not leave their place, and nothing is written.
    `id` is a hash of the images in the order shown; the reader's result carries it.

    The page itself can treat both sides alike, its makers must: give images that went through the same files and
    sizes, or a reader may find the JPEG and not the generator.
    """
    sides = [np.asarray(side) for side in (real, synthetic)]
    _check(sides, per_side, labels, restricted)
    rng = np.random.default_rng(seed)
    drawn = [side[rows] for side, rows in zip(sides, _draw(rng, sides, per_side, labels))]
    order = rng.permutation(2 * per_side)
    images, truths = np.concatenate(drawn)[order], (order >= per_side).astype(int)
    key = int(rng.integers(1, 2**32))
    document = {
        "title": title,
        "id": hashlib.sha256(images.tobytes()).hexdigest()[:16],
        "images": [png(image) for image in images],
        "hidden": _hide(truths, key),
        "key": key,
    }
    page = template("reading_test.html.jinja", escape=True).render(d=document).encode()
    write_atomically(Path(path), page)
    return {"images": len(images), "per_side": per_side, "id": document["id"], "bytes": len(page)}


def _check(sides, per_side, labels, restricted):
    """One sentence for what would make the test unfair, impossible or forbidden."""
    if restricted:
        raise ValueError("One of the sets is restricted: its images may not be put into a page that travels.")
    if per_side < 1:
        raise ValueError(f"A reading test needs at least one image per side, not {per_side}.")
    for name, side in zip(WORDS, sides):
        if side.dtype != np.uint8 or side.ndim != 4 or side.shape[1] not in (1, 3):
            raise ValueError(f"The {name} images must be uint8 (N, 1 or 3, H, W), not {side.dtype} {side.shape}.")
        if len(side) < per_side:
            raise ValueError(f"There are {len(side)} {name} images, fewer than the {per_side} per side.")
    if sides[0].shape[1:] != sides[1].shape[1:]:
        raise ValueError(f"Both sides need one shape, or it tells them apart: {sides[0].shape} and {sides[1].shape}.")
    if labels is not None and [len(of) for of in labels] != [len(side) for side in sides]:
        raise ValueError("labels is a pair, of the real and of the synthetic images, with one label per image.")


def _draw(rng, sides, per_side, labels):
    """Rows of each side, `per_side` of them."""
    if labels is None:
        return [rng.permutation(len(side))[:per_side] for side in sides]
    labels = [np.asarray(of) for of in labels]
    classes = np.union1d(*labels)
    counts = [per_side // len(classes) + (i < per_side % len(classes)) for i in range(len(classes))]
    return [np.concatenate([_of_class(rng, of, k, n) for k, n in zip(classes, counts)]) for of in labels]


def _of_class(rng, labels, label, count):
    rows = np.flatnonzero(labels == label)
    if len(rows) < count:
        raise ValueError(f"Class {label} has {len(rows)} images on one side; {count} are needed on each.")
    return rng.permutation(rows)[:count]


def _hide(truths, key):
    """Truths as a text of 0 and 1, each turned or not by the top bit of x <- 1664525 x + 1013904223 mod 2^32."""
    text, x = "", key
    for truth in truths:
        x = (1664525 * x + 1013904223) % 2**32
        text += str(int(truth) ^ x >> 31)
    return text


# --- the arithmetic -----------------------------------------------------------------------------------------


def score(answers, truths, level=0.95):
    """What a reader's answers say: a dict of plain numbers, the same as the page's.

    answers, truths (N,): 0 real, 1 synthetic. "accuracy" in [0, 1] with its Clopper-Pearson interval "low", "high":
    near 1/2 the synthetic images pass as real. "p": two-sided and exact, against answers by the toss of a coin.
    "said_real": the tendency, the share of answers "real", with "said_real_low" and "said_real_high". Then four
    counts, truth first: "real_as_real", "real_as_synthetic", "synthetic_as_real", "synthetic_as_synthetic". A reader's
    answers count as independent; over several readers see `survey`.
    """
    answers, truths = np.asarray(answers), np.asarray(truths)
    if answers.shape != truths.shape or answers.ndim != 1 or not len(answers):
        raise ValueError(f"Every image needs an answer and a truth: there are {answers.shape} and {truths.shape}.")
    if not np.isin(np.concatenate([answers, truths]), (0, 1)).all():
        raise ValueError("Answers and truths are 0 (real) or 1 (synthetic).")
    n, right, said_real = len(answers), int((answers == truths).sum()), int((answers == 0).sum())
    counts = {f"{WORDS[t]}_as_{WORDS[a]}": int(((truths == t) & (answers == a)).sum()) for t in (0, 1) for a in (0, 1)}
    return {"n": n, "right": right} | _share("accuracy", right, n, level) | _tendency(said_real, n, level) | counts


def _share(name, successes, n, level):
    low, high = clopper_pearson(successes, n, level)
    return {name: successes / n, "low": low, "high": high, "p": float(stats.binomtest(successes, n).pvalue)}


def _tendency(said_real, n, level):
    low, high = clopper_pearson(said_real, n, level)
    return {"said_real": said_real / n, "said_real_low": low, "said_real_high": high}


def survey(readers=4, images=200, accuracy=0.54, printed=0.005, all_right=5, all_wrong=7, level=0.95):
    """What a survey says of which only a mean accuracy is printed; the defaults are the paper's (Sec. 4.1).

    "answers", "right", "accuracy", "low", "high", "p": as `score`, over all answers taken as independent.
    "p_range": p over all counts that round to the printed accuracy (`printed`: half of its last digit), smallest first.
    "one_reader": the fewest right answers of `images` above chance at 1 - level. "likeness": the correlation between
    two readers' errors on one image above which the mean is no longer beyond chance (normal approximation).
    "unanimous": images that all readers call alike rightly or wrongly, "seen" and "expected" if their errors were
    independent and all images equally hard, and "p_as_few": the chance of so few or fewer. The paper says "true
    positives" and "false negatives", so its counts may be of one class only: "expected_of_half" is for that reading.
    """
    n = readers * images
    lowest, highest = (accuracy - printed) * n, (accuracy + printed) * n
    counts = range(int(np.ceil(lowest - 1e-9)), int(np.floor(highest + 1e-9)) + 1)
    right = round(accuracy * n)
    p_values = sorted(float(stats.binomtest(count, n).pvalue) for count in counts)
    alike = [accuracy**readers, (1 - accuracy) ** readers]
    return {
        "answers": n,
        "right": right,
        **_share("accuracy", right, n, level),
        "p_range": [p_values[0], p_values[-1]],
        "one_reader": next(k for k in range(images // 2, images + 1) if stats.binomtest(k, images).pvalue < 1 - level),
        "likeness": _likeness(right, n, readers, level),
        "unanimous": {
            "seen": [all_right, all_wrong],
            "expected": [images * share for share in alike],
            "expected_of_half": [images / 2 * share for share in alike],
            "p_as_few": float(stats.binom.cdf(all_right + all_wrong, images, sum(alike))),
        },
    }


def _likeness(right, n, readers, level):
    """rho at which z of the pooled share, divided by sqrt(1 + (readers - 1) rho), meets its limit; 0 if it is below."""
    z = (right - n / 2) / np.sqrt(n / 4)
    inflation = (z / stats.norm.ppf((1 + level) / 2)) ** 2
    return float(np.clip((inflation - 1) / (readers - 1), 0, 1)) if readers > 1 else None
