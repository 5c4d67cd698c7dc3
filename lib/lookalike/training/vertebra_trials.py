"""What the attacks on made vertebral units can find: trials with planted leaks, shadow models, and the site's part.

Paper: Sun, Plawinski et al. 2023 (PLOS ONE, 10.1371/journal.pone.0280316), Sec. 2.3 and 6.5. Chapter: pgan. The paper's
two attacks have no control: nobody knows what they would have found. Here they stand beside leaks of known size, beside
attackers who are given more, and beside real images in the released ones' place, where nothing can leak. All functions
are stages of a run. A score means something within one target alone, so targets are pooled by ranks.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata

from lookalike import calibration
from lookalike.data import datasets
from lookalike.data.duplicates import flag_copies, near_duplicates
from lookalike.data.plants import KINDS, plant
from lookalike.files import read_json
from lookalike.metrics.diversity import fit_umap
from lookalike.metrics.intervals import clopper_pearson, over_seeds
from lookalike.models.acgan import SourceHead
from lookalike.privacy import membership, projection, suite
from lookalike.privacy import shadows as shadow_attacks
from lookalike.privacy.attack import attack_result, auc
from lookalike.privacy.reidentification import distance_attacks
from lookalike.training import vertebrae
from lookalike.training.cells import load_samples
from lookalike.training.mass_attacks import load_made, together

COMPONENTS = 64  # numbers of the paper's embedding (Sec. 6.5); its code has 32
SHARES = {"pixels": 0.01, "embedding": 0.001}  # of all distances that count as near in the distribution attack
ATTACKS = ("pairwise", "nearest", "distribution")
POOL = 200  # samples of a class among which a search through the generator begins; GAN-Leaks' default here is 1000
CALLED = 0.01  # of the non-members that an attacker may call by mistake

DETECTORS = {
    **{
        f"{attack}_{space}": f"{what}, in {'pixels' if space == 'pixels' else 'the UMAP embedding'} (pGAN)"
        for space in SHARES
        for attack, what in {
            "pairwise": "distance to the nearest released image over the median distance",
            "nearest": "distance to the nearest released image",
            "distribution": "released images within the radius that holds a set share of all distances",
        }.items()
    },
    "logan_embedding": "a linear classifier of released against other real images, in the UMAP embedding (after LOGAN)",
    "aligned_similarity": "detail of the central slice shared with the released image that fits best after shifts",
    "copies_flagged": "released images more like one member than held-out images ever are, by that same detail",
}
RELEASED, DISCRIMINATOR, GENERATOR = "released images", "the discriminator", "the generator's weights"
TRAINER = ", and shadow models trained alike on known halves of the subjects"
NEEDS = {
    **dict.fromkeys(ATTACKS, RELEASED),  # "nearest" is GAN-Leaks' full black box
    "logan_white_box": DISCRIMINATOR,
    "gan_leaks_white_box": GENERATOR,
    "latent_projection": GENERATOR,
    **{f"{attack}_nearest": RELEASED + TRAINER for attack in ("lira", "rmia")},
    **{f"{attack}_source": DISCRIMINATOR + TRAINER for attack in ("lira", "rmia")},
}


# --- planted leaks ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What one detector made of one trial. value: what its power is judged by, larger for a leak: `auc` (None for
    flags) or the number of flags; found: how many of the copied members it calls (None: none were copied).
    """

    value: float
    auc: float | None
    found: int | None


def planted_leaks(
    folder, *, data, elsewhere, image_size, members, released, shares, repeats, embedding_rows, seed, leaks=KINDS,
    quiet=None, per_subject=None,
):  # fmt: skip
    """A stage: pGAN's attacks, LOGAN's and a search for detail on `repeats` draws with known leaks, see `calibration`.

    Pool: train and val of `data`, dealt by subjects into `members` images, as many held-out and reference ones, and
    `released` ones, of which `shares` are copies of members. `per_subject` images of each subject at most are in the
    pool, drawn once (None: all): the fewer, the more subjects are on each side, and the steadier the thresholds, which
    `quiet` trials set (None: `repeats`). The second site is the test split of `elsewhere` ("": none is tried). The
    embedding is a UMAP of `embedding_rows` images of `data`'s test split, which are in no trial.
    Returns "worlds": {world: {detector: {"power", "interval", "auc", "found", "found_interval"}}}: share of trials that
    pass a threshold which 5 % of leak-free ones pass; mean AUC of all members against held-out images (None for flags);
    share of the copied members that are called at 1 % of false alarms in the trial's own held-out images (None where
    none are), flags at their own 0.1 %. Beside it "detectors" (what each looks at), "images" and "subjects" of the
    pool, "quiet" and "embedding".
    """
    pool = _pool(data, elsewhere, image_size, members, leaks, embedding_rows, seed, per_subject)
    found = calibration.trials(
        pool, members=members, synthetic=released, shares=shares, repeats=repeats, seed=seed, leaks=leaks, detect=look,
        quiet=quiet,
    )  # fmt: skip
    values = {world: [{name: s.value for name, s in t[0].items()} for t in drawn] for world, drawn in found.items()}
    power = calibration.powers(values.pop("threshold"), values)
    worlds = {
        world: {name: row | _over_trials(found[world], name) for name, row in rows.items()}
        for world, rows in power.items()
    }
    counts = {"images": len(pool.images), "subjects": len(np.unique(pool.subjects)), "quiet": len(found["threshold"])}
    return {"worlds": worlds, "detectors": DETECTORS, **counts, "embedding": pool.images.features.shape[1]}


def look(trial):
    """{detector: `Seen`} of a `calibration.Trial`, and how many of its members have a copy among the released."""
    n, candidates = len(trial.members), suite.join(trial.members, trial.holdout)
    seen = {name: _judged(scores, n, trial.copied) for name, scores in _scores(candidates, trial).items()}
    inner = [_central(view.pixels) for view in (trial.synthetic, trial.members, trial.holdout)]
    flags = flag_copies(*inner, reverse=False)
    found = None if trial.copied is None else int(np.isin(trial.copied, flags.real).sum())
    seen["copies_flagged"] = Seen(float(len(flags.flagged)), None, found)
    return seen, 0 if trial.copied is None else len(trial.copied)


def _scores(candidates, trial):
    """{detector: scores (N,)} of the candidates, members first."""
    released, scores = trial.synthetic, {}
    spaces = {
        "pixels": (_as_floats(candidates.pixels), _as_floats(released.pixels)),
        "embedding": (candidates.features, released.features),
    }
    for space, rows in spaces.items():
        found = distance_attacks(*rows, SHARES[space])
        scores |= {f"{attack}_{space}": getattr(found, attack) for attack in ATTACKS}
    told = suite.discriminate(candidates.features, released.features, trial.reference.features, trial.seed)
    near = near_duplicates(_central(candidates.pixels), _central(released.pixels))
    return scores | {"logan_embedding": told, "aligned_similarity": near.similarity}


def _judged(scores, n, copied):
    area = auc(scores[:n], scores[n:])
    limit = np.sort(scores[n:])[::-1][int(CALLED * (len(scores) - n))]
    return Seen(area, area, None if copied is None else int((scores[copied] > limit).sum()))


def _as_floats(pixels):
    """The same grey levels: `scan` is as exact on them, and three times faster on processors with slow int8."""
    return pixels.astype(np.float32)


def _central(pixels):
    """The middle slice alone, (N, 1, H, W): all nine take ten times as long to align."""
    middle = pixels.shape[1] // 2
    return pixels[:, middle : middle + 1]


def _over_trials(drawn, name):
    """Mean AUC, and the share of copied members found with its 95 % interval over trials, never narrower than
    Clopper-Pearson's for all copied members together.
    """
    seen = [trial[name] for trial, _ in drawn]
    areas = None if seen[0].auc is None else float(np.mean([s.auc for s in seen]))
    if seen[0].found is None:
        return {"auc": areas, "found": None, "found_interval": None}
    copied = [count for _, count in drawn]
    mean = over_seeds([s.found / count for s, count in zip(seen, copied)], level=0.95)
    low, high = clopper_pearson(sum(s.found for s in seen), sum(copied))
    if mean["low"] is not None:
        low, high = max(0.0, min(low, mean["low"])), min(1.0, max(high, mean["high"]))
    return {"auc": areas, "found": mean["value"], "found_interval": [low, high]}


def thin(subjects, most, seed):
    """Sorted rows of at most `most` images of each subject, drawn at random."""
    if most < 1:
        raise ValueError(f"per_subject must be 1 image of a subject or more, not {most}.")
    order = np.random.default_rng(seed).permutation(len(subjects))
    taken = {}
    for row in order:
        taken.setdefault(subjects[row], []).append(row)
    return np.sort(np.concatenate([rows[:most] for rows in taken.values()]))


def _pool(data, elsewhere, image_size, members, leaks, embedding_rows, seed, per_subject=None):
    """`calibration.Pool` with the embedding as features; every set is embedded once, in one call."""
    images = together([datasets.load(data, split, image_size) for split in ("train", "val")])
    images = images if per_subject is None else images.subset(thin(images.subjects, per_subject, seed))
    beside = datasets.load(data, "test", image_size)
    if embedding_rows > len(beside):
        raise ValueError(
            f"The test split of {data} has {len(beside)} images; embedding_rows asks for {embedding_rows}."
        )
    other = datasets.load(elsewhere, "test", image_size) if elsewhere else None
    if other is not None and len(other) < 2 * members:
        raise ValueError(f"A trial takes {2 * members} images of {elsewhere}, which has {len(other)}; lower members.")
    rows = np.random.default_rng(seed).permutation(len(beside))[:embedding_rows]
    space = fit_umap(beside.images[rows], seed=seed, n_components=min(COMPONENTS, embedding_rows // 2))

    def view(pixels):
        return suite.View(pixels, space.transform(pixels))

    copies = {kind: view(plant(images.images, kind, seed)) for kind in leaks}
    return calibration.Pool(view(images.images), images.subjects, copies, None if other is None else view(other.images))


# --- shadow models ------------------------------------------------------------------------------------------


def inclusion(data, models, image_size, seed):
    """Which images of `data`'s train split each of `models` shadows trains on, bool (models, N): half of the subjects,
    in complementary pairs (0 and 1, 2 and 3, ...).
    """
    images = datasets.load(data, "train", image_size)
    return shadow_attacks.draw_inclusion(models, len(images), seed=seed, subjects=images.subjects)


def inclusion_rows(data, models, image_size, seed, model):
    """Row `model` of `inclusion` as a list of row numbers, for the stage that trains this shadow."""
    return np.flatnonzero(inclusion(data, models, image_size, seed)[model]).tolist()


def attack_shadows(
    folder, *, shadows, data, image_size, inclusion_seed, search_steps=50, candidates=64, seed=0
):  # fmt: skip
    """A stage: every attack of `NEEDS` on AC-GANs that saw half of the subjects each; every one is the target once.

    shadows: folders of `train_vertebrae` stages in the order of `inclusion(data, len(shadows), image_size,
    inclusion_seed)`. Searches through the generator take `search_steps` steps for `candidates` images, drawn for all
    targets; the others ask about all. RMIA's population is the val split; LiRA and RMIA are online.
    Returns "rows", per attack: "attack", "needs" (what the attacker is given), "auc", "low", "high", "tpr_1" (share of
    members called at 1 % of false alarms) with "tpr_1_low" and "tpr_1_high", intervals over subjects, "members" and
    "non_members" (pairs of target and image); "disjoint", the same scores judged by halves that cut across those that
    were trained on, where nothing can be found; and "notes" on attacks that were left out.
    """
    images = datasets.load(data, "train", image_size)
    population = datasets.load(data, "val", image_size)
    if not 2 <= candidates <= len(images):
        raise ValueError(f"candidates must lie between 2 and the {len(images)} images of {data}, not at {candidates}.")
    included = inclusion(data, len(shadows), image_size, inclusion_seed)
    _check_trained_on(shadows, included)
    few = np.sort(np.random.default_rng(seed).permutation(len(images))[:candidates])
    asked = [_ask(Path(path), images, images.subset(few), population, search_steps, seed) for path in shadows]
    scores = {name: np.stack([target[name] for target in asked]) for name in asked[0]}
    notes = []
    for signal in ("nearest", "source"):
        own = scores["logan_white_box" if signal == "source" else signal]
        found = shadow_attacks.shadow_scores(own, included, scores.pop(f"population_{signal}"))
        scores |= {f"{name}_{signal}": found.scores[name] for name in ("lira", "rmia") if name in found.scores}
        notes += [f"On the signal {signal!r}: {note}" for note in found.notes if "_offline" not in note]
    control = crossed(included, images.subjects, seed)
    judged = {
        which: [_row(name, scores[name], halves, images.subjects, few) for name in NEEDS if name in scores]
        for which, halves in {"rows": included, "disjoint": control}.items()
    }
    return judged | {"notes": notes, "targets": len(shadows), "subjects": len(np.unique(images.subjects))}


def crossed(included, subjects, seed=0):
    """A second inclusion (S, N), of half of the subjects that a model saw and half of those it did not: what members
    have in common cannot show. Complementary in pairs, as the first is.
    """
    _, first, owners = np.unique(subjects, return_index=True, return_inverse=True)
    rng, rows = np.random.default_rng(seed), []
    for inside in included[::2, first]:
        chosen = np.zeros(len(first), bool)
        for side in (True, False):
            chosen[rng.permutation(np.flatnonzero(inside == side))[::2]] = True
        rows += [chosen[owners], ~chosen[owners]]
    return np.array(rows)


def _ask(folder, images, few, population, steps, seed):
    """{attack or signal: scores} of one target, (N,), (n,) for searches, (M,) for the population's signals."""
    generator, discriminator = vertebrae.load_networks(folder)
    made, _ = load_samples(folder)
    if made.shape[1:] != images.images.shape[1:]:
        raise ValueError(f"{folder} made images of {made.shape[1:]}, the candidates are {images.images.shape[1:]}.")
    made, head = _as_floats(made), SourceHead(discriminator)
    found = distance_attacks(_as_floats(images.images), made)
    synthesise, shape = projection.gan_access(generator)
    asked = datasets.as_tensor(few), torch.as_tensor(few.labels)
    search = membership.Search(pool=POOL, restarts=1, seed=seed)
    projector = projection.Projector(steps=steps, seed=seed)
    searched = membership.gan_leaks_white_box(asked[0], synthesise, shape, asked[1], steps, search=search)
    projected = projection.project(asked[0], synthesise, projection.normal_start(shape), asked[1], projector)
    return {
        **{attack: getattr(found, attack) for attack in ATTACKS},
        "logan_white_box": membership.logan_white_box(datasets.as_tensor(images), head),
        "gan_leaks_white_box": searched,
        "latent_projection": projected.scores,
        "population_nearest": shadow_attacks.sample_signals([made], _as_floats(population.images))[0],
        "population_source": membership.logan_white_box(datasets.as_tensor(population), head),
    }


def _check_trained_on(folders, included):
    """A stage's own record of its rows, where there is one, must be the row of `inclusion` in its place."""
    for number, folder in enumerate(folders):
        record = Path(folder) / "stage.json"
        rows = read_json(record)["settings"].get("rows") if record.exists() else None
        if rows is not None and rows != np.flatnonzero(included[number]).tolist():
            raise ValueError(f"{folder} was not trained on the images of shadow {number}; see inclusion_rows.")


def _row(name, scores, included, subjects, few):
    """One attack on all targets; scores become ranks within each target, for no attacker mixes two generators."""
    if scores.shape[1] < included.shape[1]:
        included, subjects = included[:, few], subjects[few]
    ranks = rankdata(scores, axis=1) / scores.shape[1]
    found = attack_result(name, *shadow_attacks.pool(ranks, included, subjects))
    called = found.operating[0]
    return {
        "attack": name, "needs": NEEDS[name], "auc": found.auc, "low": found.low, "high": found.high,
        "tpr_1": called.tpr, "tpr_1_low": called.low, "tpr_1_high": called.high,
        "members": len(found.members), "non_members": len(found.non_members),
    }  # fmt: skip


# --- the second site ----------------------------------------------------------------------------------------


def site_artefact(folder, *, data, elsewhere, synthetic, image_size, seed, holdout_splits=("val",)):
    """A stage: how much of "test looks safer than train" is the second scanner, from images where nothing can leak.

    One half of the training subjects are the candidates "train"; "val" are held-out images of the same source
    (`holdout_splits` of `data`), "test" the test split of `elsewhere`. They are scored by pixels against `synthetic`
    (a set's name or a stage's folder), and against the other half of the training subjects, real images that pose as
    released: then no candidate is among what was released, and train against test is the scanner alone. Both times as
    many images are released, a random part of whichever set has more.
    Returns "rows": "released" ("synthetic" or "real"), "attack", "members", "non_members" (origins; "val" may pose as
    members), "auc" (chance that a member scores higher) with "low", "high" over subjects, "n_members", "n_non_members",
    "can_leak" (synthetic images and training images as members); and "released_images".
    """
    train = datasets.load(data, "train", image_size)
    candidates = {
        "val": together([datasets.load(data, split, image_size) for split in holdout_splits]),
        "test": datasets.load(elsewhere, "test", image_size),
    }
    rng = np.random.default_rng(seed)
    asked, posing = calibration.deal(train.subjects, _halves(train.subjects), rng)
    candidates["train"] = train.subset(asked)
    released = {"synthetic": load_made(synthetic, image_size, train).images, "real": train.images[posing]}
    count = min(map(len, released.values()))
    rows = []
    for name, pixels in released.items():
        scores = _scores_of(candidates, pixels[rng.permutation(len(pixels))[:count]])
        for attack in ATTACKS:
            rows += [
                _pair(name, attack, candidates, scores[attack], *pair)
                for pair in (("train", "val"), ("train", "test"), ("val", "test"))
            ]
    return {"rows": rows, "released_images": count}


def _halves(subjects):
    """Image counts of two halves of the subjects, for `deal`."""
    if len(np.unique(subjects)) < 4:
        raise ValueError(f"Half of the subjects pose as released: that takes four or more, not {len(set(subjects))}.")
    return [len(subjects) // 2, len(subjects) - len(subjects) // 2]


def _scores_of(candidates, released):
    """{attack: {origin: scores}} of all candidates at once, for they share a radius."""
    ends = np.cumsum([len(s) for s in candidates.values()])[:-1]
    found = distance_attacks(np.concatenate([s.images for s in candidates.values()]), released)
    return {attack: dict(zip(candidates, np.split(getattr(found, attack), ends))) for attack in ATTACKS}


def _pair(released, attack, candidates, scores, members, non_members):
    whose = [None if candidates[o].subject_kind == "image" else candidates[o].subjects for o in (members, non_members)]
    found = attack_result(attack, scores[members], scores[non_members], *whose)
    return {
        "released": released, "attack": attack, "members": members, "non_members": non_members,
        "auc": found.auc, "low": found.low, "high": found.high,
        "n_members": len(found.members), "n_non_members": len(found.non_members),
        "can_leak": released == "synthetic" and members == "train",
    }  # fmt: skip
