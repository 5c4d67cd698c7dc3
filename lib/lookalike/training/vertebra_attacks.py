"""pGAN's two attacks as it ran them: candidates in thirds, in pixels and in an embedding, read at the top k.

Paper: Sun, Plawinski et al. 2023 (PLOS ONE, 10.1371/journal.pone.0280316), Sec. 2.3, 6.5, Fig. 4, Table S1, Fig. S2 to
S4. Chapter: pgan. As published the candidates are 1,000 in thirds: training units, held-out ones of the same source,
and ones of another source; where the data have fewer, as many of each as the rarest has. The embedding is a UMAP fitted
on real units that are no candidates, of all three kinds: the evaluator's, for an attacker holds no such units.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from lookalike.data import datasets
from lookalike.metrics.diversity import fit_umap
from lookalike.privacy.attack import attack_result
from lookalike.privacy.reidentification import ORIGINS, SIZES, cut_off, cut_off_attack, distance_attacks
from lookalike.training.mass_attacks import load_made, together
from lookalike.training.vertebra_sharing import load_sets

PIXEL_SHARE, EMBEDDING_SHARE = 0.01, 0.001  # of all distances within the radius of the distribution attack
PUBLISHED = sum(SIZES.values())  # candidates
CUT_OFFS = (50, 333)  # of the published 1,000; of fewer candidates the same shares
FITTED = {"train": 3000, "val": 1000, "test": 1000}  # units that the embedding is fitted on
FEATURES = 64
ATTACKS = ("pairwise", "nearest", "distribution")
SPACES = ("l2", "embedding")


def load_origins(data, elsewhere, image_size):
    """{"train", "val", "test"}: training units, held-out ones of the same source, and ones of another source.

    Held-out are the splits val and test of `data` together: no generator of this chapter sees either.
    """
    train, held_out = load_sets(data, image_size)
    return {"train": train, "val": held_out, "test": datasets.load(elsewhere, "test", image_size)}


def attack_as_published(folder, *, data, elsewhere, synthetic, image_size, seed=0):
    """A stage: both attacks on the released set `synthetic` (a stage's folder or a set's name), in both spaces.

    Writes scores.safetensors to `folder` (see `load_scores`). Returns "candidates" (of each origin), "features" of the
    embedding, "fitted" (units that it was fitted on), "table": a row per space, attack and cut-off with the shares of
    train, val and test, and what the cut-off is as an attack on train and val alone, and "areas": a row per space,
    attack and kind of non-member with the area under the curve, its 95 % interval over subjects, and the share found at
    1 % false alarms.
    """
    sets = load_origins(data, elsewhere, image_size)
    released = load_made(synthetic, image_size, sets["train"])
    candidates, others = choose(sets, seed)
    asked = together([candidates[origin] for origin in ORIGINS])
    origins = np.repeat(ORIGINS, [len(candidates[origin]) for origin in ORIGINS])
    fitted = together([others[origin] for origin in ORIGINS if len(others[origin])])
    embedding = fit_umap(fitted.images, seed=seed, n_components=min(FEATURES, len(fitted) - 2))
    found = {
        "l2": distance_attacks(asked.images, released.images, PIXEL_SHARE),
        "embedding": distance_attacks(
            embedding.transform(asked.images), embedding.transform(released.images), EMBEDDING_SHARE
        ),
    }
    scores = {f"{space}/{attack}": getattr(of, attack) for space, of in found.items() for attack in ATTACKS}
    whose = np.unique(asked.subjects, return_inverse=True)[1]
    save_file(scores | {"origins": _numbers(origins), "subjects": whose}, folder / "scores.safetensors")
    return {
        "candidates": {origin: len(part) for origin, part in candidates.items()},
        "released": len(released),
        "features": int(embedding.points.shape[1]),
        "fitted": {origin: len(part) for origin, part in others.items()},
        "table": [row for name, of in scores.items() for row in _shares(name, of, origins)],
        "areas": [row for name, of in scores.items() for row in _areas(name, of, origins, asked.subjects)],
    }


def choose(sets, seed=0):
    """Candidates in thirds and the units that are left for the embedding, both by origin.

    334, 333 and 333 candidates as published; where a set is smaller, as many of each as the smallest has. What is left
    may then hold no unit of that set.
    """
    fewest = min(len(s) for s in sets.values())
    enough = all(len(sets[origin]) >= SIZES[origin] for origin in ORIGINS)
    sizes = SIZES if enough else dict.fromkeys(ORIGINS, min(fewest, min(SIZES.values())))
    rng, candidates, others = np.random.default_rng(seed), {}, {}
    for origin in ORIGINS:
        order = rng.permutation(len(sets[origin]))
        candidates[origin] = sets[origin].subset(order[: sizes[origin]])
        others[origin] = sets[origin].subset(order[sizes[origin] :][: FITTED[origin]])
    return candidates, others


def cut_offs(candidates):
    """The published cut-offs by name, {"50": k, "333": k}, as numbers of so many candidates: the same shares."""
    return {str(k): max(1, round(k * candidates / PUBLISHED)) for k in CUT_OFFS}


def load_scores(folder):
    """{"l2/pairwise" and so on: scores (N,)} of the candidates, their origins (N,), and whose they are (N,)."""
    found = load_file(Path(folder) / "scores.safetensors")
    return found, np.array(ORIGINS)[found.pop("origins")], found.pop("subjects")


def _numbers(origins):
    return np.array([ORIGINS.index(origin) for origin in origins])


def _shares(name, scores, origins):
    space, attack = name.split("/")
    rows = []
    for printed, k in cut_offs(len(scores)).items():
        cut = cut_off(scores, origins, k)
        judged = cut_off_attack(cut)
        rows.append(
            {"space": space, "attack": attack, "cut_off": printed, "k": k, **cut.shares}
            | {"of_train_and_val": judged.share, "low": judged.share_interval[0], "high": judged.share_interval[1]}
            | {"p_value": judged.p_value}
        )
    return rows


def _areas(name, scores, origins, subjects):
    space, attack = name.split("/")
    rows = []
    for first, second in (("train", "val"), ("train", "test"), ("val", "test")):
        sides = [origins == first, origins == second]
        found = attack_result(name, *(scores[side] for side in sides), *(subjects[side] for side in sides))
        rate = found.operating[0]
        rows.append(
            {"space": space, "attack": attack, "of": first, "against": second}
            | {"auc": found.auc, "low": found.low, "high": found.high}
            | {"tpr_1": rate.tpr, "tpr_1_low": rate.low, "tpr_1_high": rate.high, "resolved": rate.resolved}
        )
    return rows
