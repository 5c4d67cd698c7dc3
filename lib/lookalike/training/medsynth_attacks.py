"""Membership inference on MedSynth: as the paper does it, as it should be, and with nobody to find.

Papers: Kanagavelu et al. 2024, "MedSynth", Sec. 4.5, Fig. 3; Hayes et al. 2019, "LOGAN". Chapter: medsynth. The paper's
non-members are synthetic images. A critic is trained to part real from synthetic, so its attack finds that, and not who
was in the training set: real images that *nobody* trained on, in the members' place, show it. In the black box a local
GAN takes the released images for real ones, so synthetic non-members come out on top and the attack lies below random
guesses by design. Non-members should be held-out real images. An attack below random is no safety either: turned
round it is an attack above.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from scipy.stats import rankdata

from lookalike.data import datasets
from lookalike.metrics.neighbours import nearest
from lookalike.models.acgan import SourceHead
from lookalike.privacy import membership
from lookalike.privacy import shadows as shadow_attacks
from lookalike.privacy.attack import RATES, _called, _drawer, attack_result
from lookalike.training import medsynth, vertebra_trials
from lookalike.training.cells import load_samples
from lookalike.training.pass_through import trained_rows

RESAMPLES = 1000
PAIRS = {
    ("train", "synthetic"): "as published: trained on, against synthetic",
    ("held_out", "synthetic"): "nobody is a member: never trained on, against synthetic",
    ("train", "held_out"): "as it should be: trained on, against held out",
    ("inputs", "held_out"): "the images that the released ones were made from, against held out",
    ("held_out", "also_held_out"): "nothing to find: two halves of the held-out images",
}
RULES = ("white_box", "black_box")
NEEDS = {"white_box": "the critic", "black_box": "released images", "nearest": "released images"}


def logan_rule(scores, members):
    """`LoganAccuracy` of scores (N,) where `members` (N,) bool says who is one: the top n of N are called, n members.

    1 for perfect scores; n / N in expectation for scores that say nothing, whatever their ties: tied scores share the
    seats that are left for them (LOGAN's own code breaks ties by the label's name). Paper: Sec. 4.5.
    """
    scores, members = np.asarray(scores, np.float64), np.asarray(members)
    if members.dtype != bool or members.shape != scores.shape or scores.ndim != 1:
        raise ValueError(
            f"Scores (N,) and a boolean per score; got {scores.shape} and {members.dtype} {members.shape}."
        )
    return membership.logan_accuracy(scores[members], scores[~members])


def rule_interval(members, non_members, member_subjects=None, non_member_subjects=None, level=0.95, seed=0):
    """Bootstrap interval (low, high) of `logan_rule`'s accuracy, members and non-members each drawn anew, so that the
    baseline stays nearly what it is; whole subjects where they are named.
    """
    rng = np.random.default_rng(seed)
    sides = _drawer(members, member_subjects), _drawer(non_members, non_member_subjects)
    drawn = [membership.logan_accuracy(*(draw(rng) for draw in sides)) for _ in range(RESAMPLES)]
    low, high = np.quantile([found.accuracy for found in drawn], [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def logan_both_ways(
    folder, *, trained, released, data, image_size, seed, share=0.1, split_out="test", local_steps=1000,
    local_width=64, batch_size=64,
):  # fmt: skip
    """A stage: LOGAN's attacks and the nearest released image, against each kind of non-members.

    trained: the folder of a phase; released: a folder of `make_set` of it, on the train split. The attacker's members
    are a random `share` of the images that it was trained on (paper: 10 %), "synthetic" are one half of the released
    images (the local GAN of the black box, `local_steps` long, learns from the other half), "held_out" and
    "also_held_out" are from `split_out`, "inputs" are the training images that the released ones were made from, if
    any. At most as many non-members as members.

    Returns "rows" by "attack" ("white_box": the critic's own score; "black_box"; "nearest": minus the distance to the
    nearest released image, real candidates only), "members" and "non_members" (PAIRS, its words under "says"), each a
    `judge`; "needs": what the attacker is given; and "released", "trained_with".
    """
    made, labels, sources = _released(released)
    train, held_out = (datasets.load(data, split, image_size) for split in ("train", split_out))
    rng = np.random.default_rng(seed)
    half = rng.permutation(len(made))
    taught, shown = half[::2], half[1::2]
    settings = medsynth.load_settings(trained)
    known = trained_rows(settings, data, "train", len(train))
    sets = _candidates(train, known, held_out, (made[shown], labels[shown]), sources, share, rng)
    together, ends = [np.concatenate(part) for part in zip(*(s[:2] for s in sets.values()))], _ends(sets)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    critic = SourceHead(medsynth.load_networks(trained)[1]).to(device)
    scores = {
        "white_box": membership.logan_white_box(together[0], critic),
        "black_box": membership.logan_black_box(
            together[0], made[taught], labels=together[1], synthetic_labels=labels[taught], steps=local_steps,
            width=local_width, batch_size=batch_size, seed=seed, device=device,
        ),
        "nearest": -nearest(together[0], made)[0],
    }  # fmt: skip
    of = {attack: dict(zip(sets, np.split(values, ends))) for attack, values in scores.items()}
    rows = [
        {"attack": attack, "needs": NEEDS[attack], "members": pair[0], "non_members": pair[1], "says": says}
        | judge(of[attack][pair[0]], of[attack][pair[1]], sets[pair[0]][2], sets[pair[1]][2])
        for attack in scores
        for pair, says in PAIRS.items()
        if set(pair) <= set(sets) and (attack in RULES or "synthetic" not in pair)
    ]
    return {"rows": rows, "released": len(made), "trained_with": settings["source"]}


def judge(members, non_members, member_subjects=None, non_member_subjects=None):
    """Everything that is said of an attack's scores (n,) and (m,), larger for members.

    "accuracy" (`logan_rule`) with "accuracy_low", "accuracy_high", "baseline" (what random guesses get) and "side":
    "above" or "below" it by the whole interval, or "at" it; "auc", "low", "high", 0.5 is blind, and "auc_either_way",
    what an attacker gets who may turn the scores round (never below 0.5: at chance a little above); "tpr_1", members
    called at 1 % of false alarms, with "tpr_1_low", "tpr_1_high", "tpr_1_turned" with the scores turned round, and
    "resolved": whether there are 100 non-members or more; "n", "m". Intervals of 95 %, over subjects where named.
    """
    whose = member_subjects, non_member_subjects
    found = attack_result("", members, non_members, *whose)
    turned = _called(-found.members, -found.non_members, RATES[0])
    rule, (low, high) = membership.logan_accuracy(members, non_members), rule_interval(members, non_members, *whose)
    called = found.operating[0]
    side = "above" if low > rule.baseline else "below" if high < rule.baseline else "at"
    return {
        "accuracy": rule.accuracy, "accuracy_low": low, "accuracy_high": high, "baseline": rule.baseline, "side": side,
        "auc": found.auc, "low": found.low, "high": found.high, "auc_either_way": max(found.auc, 1 - found.auc),
        "tpr_1": called.tpr, "tpr_1_low": called.low, "tpr_1_high": called.high,
        "tpr_1_turned": turned, "resolved": called.resolved,
        "n": len(found.members), "m": len(found.non_members),
    }  # fmt: skip


def attack_shadows(folder, *, shadows, released, data, image_size, inclusion_seed, split_out="test", population=500):
    """A stage: LiRA and RMIA with shadow models, each the target once, every one trained on half of the subjects.

    shadows, released: folders of a phase and of `make_set`, in the order of `vertebra_trials.inclusion(data, number,
    image_size, inclusion_seed)`; six or more, an even number. Signals: the critic's score ("critic") and minus the
    distance to the nearest released image ("nearest"). RMIA's population: at most `population` images of `split_out`.

    Returns "rows": "attack" (signal itself, or "lira", "rmia"), "signal", "auc", "low", "high", "tpr_1", "tpr_1_low",
    "tpr_1_high", intervals over subjects; "disjoint": the same scores judged by halves that nobody trained on, where
    nothing can be found; "notes" on what was left out; "targets", "subjects".
    """
    images, outside = datasets.load(data, "train", image_size), datasets.load(data, split_out, image_size)
    if len(released) != len(shadows):
        raise ValueError(f"There are {len(shadows)} shadows and {len(released)} released sets: give one for each.")
    included = vertebra_trials.inclusion(data, len(shadows), image_size, inclusion_seed)
    vertebra_trials._check_trained_on(shadows, included)
    few = outside.subset(np.sort(np.random.default_rng(inclusion_seed).permutation(len(outside))[:population]))
    halves = {"rows": included, "disjoint": vertebra_trials.crossed(included, images.subjects, inclusion_seed)}
    judged, notes = {name: [] for name in halves}, []
    for signal in ("critic", "nearest"):
        own, other = _signals(signal, shadows, released, images), _signals(signal, shadows, released, few)
        found = shadow_attacks.shadow_scores(own, included, other)
        notes += [f"{signal}: {note}" for note in found.notes if "_offline" not in note]
        named = {"signal alone" if name == "loss" else name: scores for name, scores in found.scores.items()}
        for which, inside in halves.items():
            judged[which] += [
                _pooled_row(name, signal, scores, inside, images.subjects)
                for name, scores in named.items()
                if "_offline" not in name
            ]
    return judged | {"notes": notes, "targets": len(shadows), "subjects": len(np.unique(images.subjects))}


# --- steps --------------------------------------------------------------------------------------------------


def _released(folder):
    """Images uint8, labels, and the training row (N,) that each was made from, -1: none."""
    images, labels = load_samples(folder)
    if len(images) < 4:
        raise ValueError(f"{folder} holds {len(images)} images: the attacks need four or more released ones.")
    found = load_file(Path(folder) / "samples.safetensors")
    if "source_rows" not in found:
        raise ValueError(f"{folder} does not say from which images its own were made: it is no folder of make_set.")
    return images, labels, found["source_rows"].numpy()


def _candidates(train, known, held_out, made, sources, share, rng):
    """{origin: images, labels, subjects or None}; made: images and labels."""
    members = round(share * len(known))
    if not 0 < share <= 1 or members < 2:
        raise ValueError(f"A share of {share} of {len(known)} training images makes {members} members; two are needed.")
    if sources.max() >= len(train):
        raise ValueError("The released images were made from rows that the train split does not have.")
    outside = rng.permutation(len(held_out))
    most = min(members, len(held_out) // 2)
    found = {
        "train": _side(train, rng.permutation(known)[:members]),
        "held_out": _side(held_out, outside[:most]),
        "also_held_out": _side(held_out, outside[most : 2 * most]),
        "synthetic": (*(part[:members] for part in made), None),
    }
    if len(inputs := np.unique(sources[sources >= 0])) > 1:
        found["inputs"] = _side(train, rng.permutation(inputs)[:members])
    return found


def _side(images, rows):
    chosen = images.subset(np.sort(rows))
    return chosen.images, chosen.labels, None if chosen.subject_kind == "image" else chosen.subjects


def _ends(sets):
    return np.cumsum([len(s[0]) for s in sets.values()])[:-1]


def _signals(signal, shadows, released, images):
    """Signals (S, N) of all shadows about images."""
    if signal == "nearest":
        return shadow_attacks.sample_signals([_released(folder)[0] for folder in released], images.images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    critics = (SourceHead(medsynth.load_networks(folder)[1]).to(device) for folder in shadows)
    return np.stack([membership.logan_white_box(images, critic) for critic in critics])


def _pooled_row(attack, signal, scores, included, subjects):
    """One attack on all targets; by ranks within each, for the scores of two models have no common scale."""
    found = attack_result(attack, *shadow_attacks.pool(rankdata(scores, axis=1), included, subjects))
    called = found.operating[0]
    return {
        "attack": attack, "signal": signal, "auc": found.auc, "low": found.low, "high": found.high,
        "tpr_1": called.tpr, "tpr_1_low": called.low, "tpr_1_high": called.high,
    }  # fmt: skip
