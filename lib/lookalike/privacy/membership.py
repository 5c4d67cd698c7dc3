"""Was this image in the training set? LOGAN, GAN-Leaks, DOMIAS and density ratios, each as scores; authenticity beside.

Papers: Hayes et al. 2019, "LOGAN" (`jhayes14/gen_mem_inf`); Chen et al. 2020, "GAN-Leaks" (`DingfanChen/GAN-Leaks`);
van Breugel et al. 2023, "Membership Inference Attacks against Synthetic Data through Overfitting Detection"
(`holarissun/DOMIAS`); Alaa et al. 2022, "How Faithful is your Synthetic Data?". Chapters: medsynth, all cards.
The one decision worth knowing: every search treats each candidate as if it were alone, from starts and noise that all
share, so that its score does not depend on who else is asked about; the originals' L-BFGS runs on a batch's mean.

All scores are (N,) float64, larger where the candidate looks more like a member, and mean nothing without those of
held-out real images *of the members' source*: every attack here also answers "is it of this source, scanner, quality?",
so non-members of another hospital, or synthetic ones (MedSynth), give an AUC far from 0.5 where nothing leaks.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.stats import gaussian_kde

from lookalike.metrics import as_array, as_images, to_unit
from lookalike.metrics.intervals import clopper_pearson
from lookalike.metrics.neighbours import nearest, scan
from lookalike.models import gan
from lookalike.privacy.projection import as_labels, evaluating, pick, ramp

PERCEPTUAL_WEIGHT = 0.2  # GAN-Leaks' lambda_2; lambda_1, of the squared difference, is 1


@dataclass(frozen=True)
class LoganAccuracy:
    """LOGAN's protocol. accuracy: share of members among the n highest scores, n being the number of members;
    baseline: what random scores give, n / (n + m); spread: the standard deviation of that.
    """

    accuracy: float
    baseline: float
    spread: float
    members: int
    non_members: int


@dataclass(frozen=True)
class Search:
    """How a latent is sought for every candidate (GAN-Leaks). Starts: the `restarts` nearest of `pool` samples.

    perceptual: function of two batches of images in [-1, 1] that gives distances (N,), weighted by 0.2, with gradients
    for the white box. latent_weight: the paper's lambda_3, for standard normal latents; 0 for any other.
    batch_size: images made at one time.
    """

    perceptual: Callable | None = None
    latent_weight: float = 0.001
    pool: int = 1000
    restarts: int = 3
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self):
        if not 1 <= self.restarts <= self.pool:
            raise ValueError(f"restarts must lie between 1 and pool ({self.pool}), not {self.restarts}.")


@dataclass(frozen=True)
class Authenticity:
    """Shares in [0, 1] of images that lie farther from their nearest training image than that one from its nearest
    other; low, high: 95 % intervals (Clopper-Pearson: as if images were independent).

    share: of the synthetic images; control: of held-out real images, and so what an innocent generator has. A share
    below the control's interval points at copies; 1 is no goal, for noise reaches it. authentic, control_authentic:
    which images, (N,) and (M,) bool.
    """

    share: float
    low: float
    high: float
    control: float
    control_low: float
    control_high: float
    authentic: np.ndarray = field(repr=False)
    control_authentic: np.ndarray = field(repr=False)


def logan_white_box(candidates, discriminator, labels=None, batch_size=256):
    """The target discriminator's own logits (LOGAN, white box).

    Attacker: has the discriminator, which is rarely released. Chance: AUC 0.5. Misleads: it was trained to part real
    from synthetic, so synthetic non-members say nothing on membership; one that has not overfitted is blind.
    """
    images = as_images(candidates)
    labels = as_labels(labels, len(images))
    device = next(discriminator.parameters()).device
    scores = []
    with evaluating(discriminator), torch.no_grad():
        for rows in torch.arange(len(images)).split(batch_size):
            given = [part.to(device) for part in (images[rows], pick(labels, rows)) if part is not None]
            scores.append(discriminator(*given).flatten().cpu())
    return torch.cat(scores).double().numpy()


def logan_black_box(
    candidates,
    synthetic,
    reference=None,
    labels=None,
    synthetic_labels=None,
    reference_labels=None,
    steps=10_000,
    batch_size=64,
    lr=2e-4,
    width=64,
    latent_dim=100,
    seed=0,
    device="cpu",
):
    """Logits of a local discriminator that took released samples for real (LOGAN, black box).

    Against a local generator, or, with `reference` images that the attacker knows not to be members, against those
    (the paper's auxiliary knowledge). Images (N, C, S, S), S a multiple of 4; labels for all sets or for none.
    Attacker: has released samples. Chance: AUC 0.5. Misleads: few steps leave the discriminator blind; with a
    reference of another source than the candidates it parts the sources.
    """
    images, synthetic = as_images(candidates), as_images(synthetic)
    reference = None if reference is None else as_images(reference)
    if images.shape[-1] % 4 or images.shape[-1] != images.shape[-2]:
        raise ValueError(f"The local GAN makes square images, sides a multiple of 4; these are {tuple(images.shape)}.")
    named = _all_labels((images, labels), (synthetic, synthetic_labels), (reference, reference_labels))
    num_classes = 1 + max(int(part.max()) for part in named if part is not None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        discriminator = gan.Discriminator(images.shape[1], num_classes, width).to(device)
        rival = None
        if reference is None:
            rival = gan.Generator(images.shape[-1], images.shape[1], num_classes, latent_dim, width).to(device)
        refused = (synthetic, named[1]) if reference is None else (reference, named[2])
        _train_locally(discriminator, rival, (synthetic, named[1]), refused, steps, batch_size, lr)
    return logan_white_box(images, discriminator, named[0])


def logan_accuracy(member_scores, non_member_scores):
    """`LoganAccuracy` of scores (n,) and (m,): sort all, call the top n members. Ties count as in random order.

    MedSynth's variant is the same call with synthetic images as non-members, and another question: real or synthetic?
    """
    members, non_members = (np.asarray(part, np.float64).ravel() for part in (member_scores, non_member_scores))
    n, m = len(members), len(non_members)
    if not n or not m or np.isnan(members).any() or np.isnan(non_members).any():
        raise ValueError("LOGAN's accuracy needs scores of members and of non-members, all of them numbers.")
    scores = np.concatenate([members, non_members])
    threshold = np.sort(scores)[::-1][n - 1]
    seats = n - (scores > threshold).sum()
    tied = (members == threshold).sum() / (scores == threshold).sum()
    baseline = n / (n + m)
    spread = np.sqrt(baseline * (1 - baseline) * m / (n + m - 1) / n)  # hypergeometric
    return LoganAccuracy(float(((members > threshold).sum() + seats * tied) / n), baseline, float(spread), n, m)


def gan_leaks_full_black_box(candidates, synthetic):
    """Minus the distance to the nearest released sample: Euclidean on [0, 1] pixels, or of rows of features (N, D).

    Attacker: has released samples. Chance: AUC 0.5. Misleads: plain images lie near everything (calibrate), and the
    more samples are released the more it finds, so compare at one number.
    """
    (candidates, synthetic), unit = _rows(candidates, synthetic)
    return -nearest(candidates, synthetic)[0] / unit


def gan_leaks_partial_black_box(
    candidates, synthesise, latent_shape, labels=None, steps=200, population=16, search=Search()
):
    """Minus the distance to the nearest image that the generator makes, sought without gradients.

    `synthesise(latents, labels)` gives images in [-1, 1]; see `projection.gan_access`. Distance: mean squared
    difference in [-1, 1] plus 0.2 times `search.perceptual`. Each step asks for `population` images per start.
    differs: an evolution strategy with cumulative step sizes (Hansen's CSA) in place of Powell's method, which runs
    one candidate at a time.
    Attacker: may choose the latents and see the images. Chance: AUC 0.5. Misleads: a search too short for the latent
    dimension scores like the pool; plain images are reached easily (calibrate).
    """
    if population < 2:
        raise ValueError(f"population must be 2 or more, not {population}.")
    task = _Task(candidates, synthesise, latent_shape, labels, search)
    return task.scores(lambda starts, rows: _evolve(task, starts, rows, steps, population), population)


def gan_leaks_white_box(candidates, synthesise, latent_shape, labels=None, steps=500, lr=0.05, search=Search()):
    """Minus the distance to the nearest image that the generator makes, sought with gradients through it.

    As `gan_leaks_partial_black_box`, but by Adam, its learning rate times `projection.ramp`. differs: from L-BFGS,
    which couples a batch's images. Attacker: has the generator's weights. Chance: AUC 0.5. Misleads: a generator that
    reaches every image scores all alike; plain images are reached easily (calibrate).
    """
    task = _Task(candidates, synthesise, latent_shape, labels, search)
    return task.scores(lambda starts, rows: _descend(task, starts, rows, steps, lr), 1)


def calibrated(scores, reference_scores):
    """GAN-Leaks' attack calibration: scores (N,) minus those of the same attack on a generator that never saw them.

    It takes away what makes an image easy for any generator. The reference generator must not be trained on the
    candidates, members or not, and should be of the same kind and source: otherwise the scores measure its leak.
    """
    scores, reference_scores = np.asarray(scores, np.float64), np.asarray(reference_scores, np.float64)
    if scores.shape != reference_scores.shape:
        raise ValueError(
            f"Give both attacks' scores of the same images, not {scores.shape} and {reference_scores.shape}."
        )
    return scores - reference_scores


def domias(candidates, synthetic, reference, density="kde", dim=8, k=1):
    """Log density of the synthetic images over that of held-out real `reference` images, at each candidate (eq. 2).

    On the `dim` main components of reference and synthetic images together (fewer where there are fewer). "kde" is the
    authors' Gaussian kernel with Scott's bandwidth for each set; "knn" the k-th neighbours' distances, sharper where
    single images are copied, with +inf for a candidate that stands k times among the synthetic ones.
    Attacker: has released samples and real images of the source, none of them a candidate. Chance: AUC 0.5. Misleads:
    a reference of another source, or one that holds candidates (they then look like non-members).
    """
    if density not in ("kde", "knn"):
        raise ValueError(f'density must be "kde" or "knn", not {density!r}.')
    rows, unit = _rows(candidates, synthetic, reference)
    points = _components([part / np.float64(unit) for part in rows], dim)
    if density == "knn":
        return density_ratio(*points, k, corrected=True)
    return _log_kernel_density(points[0], points[1]) - _log_kernel_density(points[0], points[2])


def density_ratio(candidates, first, second, k=20, corrected=False):
    """ln of the k-th neighbour's distance in `second` over that in `first`; larger where `first` is denser.

    No Free Lunch's number (Sec. 3.2) for many candidates, in the space given: rows (N, d), or [0, 1] pixels.
    corrected: times d plus ln(n_second / n_first), a log density ratio, which has a meaning where d is small.
    Attacker: has samples of the target and of a model, or real images, without the candidates. Chance: AUC 0.5.
    Misleads: two trainings differ by chance; and it bounds no epsilon (`privacy.density`).
    """
    (candidates, first, second), _ = _rows(candidates, first, second)
    if not 1 <= k <= min(len(first), len(second)):
        raise ValueError(f"k is {k}; it must not pass the sample counts, {len(first)} and {len(second)}.")
    near, far = (scan(candidates, part, k).distances[:, k - 1] for part in (first, second))
    if ((near == 0) & (far == 0)).any():
        raise ValueError("A candidate stands k times in both sets, so its ratio is not defined; take a larger k.")
    with np.errstate(divide="ignore"):
        ratio = np.log(far) - np.log(near)
    return candidates.shape[1] * ratio + np.log(len(second) / len(first)) if corrected else ratio


def authenticity(synthetic, train, holdout):
    """`Authenticity` of synthetic images with held-out real ones as its control; images or rows of features (N, D).

    Alaa et al. 2022, by the text's definition: their code looks up the real images' distances by the number of a
    synthetic image. A measure of synthetic images, not an attack: who computes it has the training set.
    """
    (synthetic, train, holdout), _ = _rows(synthetic, train, holdout)
    to_other = scan(train, train, exclude_self=True).distances[:, 0]
    flags = []
    for part in (synthetic, holdout):
        distances, indices = nearest(part, train)
        flags.append(distances > to_other[indices])
    shares = [(float(part.mean()), *clopper_pearson(int(part.sum()), len(part))) for part in flags]
    return Authenticity(*shares[0], *shares[1], *flags)


def _rows(*sets):
    """Sets as rows (N, D) and how many of their units make 1: uint8 pixels stay whole, others are in [0, 1]."""
    sets = [as_array(part) for part in sets]
    if {2, 4} <= {part.ndim for part in sets}:
        raise ValueError("Some sets are images (N, C, H, W) and some rows (N, D): give all as images or all as rows.")
    if all(part.ndim == 4 and part.dtype == np.uint8 for part in sets):
        rows, unit = [part.reshape(len(part), -1) for part in sets], 255
    else:
        rows, unit = [part if part.ndim == 2 else to_unit(as_images(part)).flatten(1).numpy() for part in sets], 1
    widths = {part.shape[1] for part in rows}
    if len(widths) > 1:
        raise ValueError(f"All sets must be of one shape; their rows have {sorted(widths)} numbers.")
    return rows, unit


def _components(parts, dim):
    """Candidates and the other sets on the main components of the others, (N, dim) each."""
    fitted = np.concatenate(parts[1:])
    centre = fitted.mean(0)
    _, sizes, axes = np.linalg.svd(fitted - centre, full_matrices=False)
    kept = axes[: min(dim, int((sizes > 1e-6 * sizes[0]).sum()))]
    if not len(kept):
        raise ValueError("All synthetic and reference images are equal; there is no density to estimate.")
    return [(part - centre) @ kept.T for part in parts]


def _log_kernel_density(points, samples):
    try:
        return gaussian_kde(samples.T).logpdf(points.T)
    except (np.linalg.LinAlgError, ValueError) as reason:
        raise ValueError(
            f"{len(samples)} samples do not fill {samples.shape[1]} dimensions, so they have no kernel density; take "
            'a smaller dim, more samples or density="knn".'
        ) from reason


# LOGAN's local networks


def _all_labels(*sets):
    """Labels of each set; all zero where no set has any."""
    sets = [(images, labels) for images, labels in sets if images is not None]
    given = [labels is not None for _, labels in sets]
    if any(given) and not all(given):
        raise ValueError("Give labels for every set of images or for none.")
    return [as_labels(np.zeros(len(images)) if labels is None else labels, len(images)) for images, labels in sets]


def _train_locally(discriminator, rival, accepted, refused, steps, batch_size, lr):
    """Adversarial training on the released samples; without a rival the images to refuse are given.

    accepted, refused: images and labels; a rival takes only the labels of `refused`.
    """
    device = next(discriminator.parameters()).device
    networks = [discriminator] if rival is None else [discriminator, rival]
    optimisers = [torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.999)) for network in networks]
    for _ in range(steps):
        real, labels = _draw(*accepted, batch_size, device)
        fake, fake_labels = _draw(*refused, batch_size, device)
        if rival is not None:
            fake = rival(rival.noise(batch_size), fake_labels)
        loss = gan.discriminator_loss(discriminator, real, fake.detach(), labels, fake_labels).mean()
        _step(optimisers[0], loss)
        if rival is not None:
            _step(optimisers[1], gan.generator_loss(discriminator, fake, fake_labels).mean())


def _draw(images, labels, n, device):
    rows = torch.randint(len(images), (n,))
    return images[rows].to(device), labels[rows].to(device)


def _step(optimiser, loss):
    optimiser.zero_grad()
    loss.backward()
    optimiser.step()


# GAN-Leaks' search for a latent


class _Task:
    """Candidates and the generator in which their latents are sought; latents are flat here, (n, R, d)."""

    def __init__(self, candidates, synthesise, latent_shape, labels, search):
        self.images = as_images(candidates)
        self.labels = as_labels(labels, len(self.images))
        self.synthesise, self.latent_shape, self.search = synthesise, tuple(latent_shape), search

    def scores(self, solve, per_start):
        """Minus the distances (N,) that `solve` finds, so many candidates at a time as `batch_size` allows."""
        at_once = max(1, self.search.batch_size // (self.search.restarts * per_start))
        starts = self._starts()
        rows = torch.arange(len(self.images)).split(at_once)
        return -torch.cat([solve(starts[part], part) for part in rows]).double().numpy()

    def judge(self, latents, rows):
        """Distance and what is minimised, both (n, R), of latents (n, R, d) for the candidates in `rows`."""
        n, restarts, dim = latents.shape
        labels = None if self.labels is None else self.labels[rows].repeat_interleave(restarts)
        made = self.synthesise(latents.reshape(-1, *self.latent_shape), labels)
        targets = self.images[rows].to(made.device).repeat_interleave(restarts, 0)
        distance = (made - targets).square().flatten(1).mean(1)
        if self.search.perceptual is not None:
            distance = distance + PERCEPTUAL_WEIGHT * self.search.perceptual(made, targets)
        distance = distance.view(n, restarts).to(latents.device)
        return distance, distance + self.search.latent_weight * (latents.square().sum(2) - dim).square()

    @torch.no_grad()
    def _starts(self):
        """Latents (N, R, d) of the samples nearest to each candidate; all candidates of a class share one pool."""
        generator = torch.Generator().manual_seed(self.search.seed)
        pool = torch.randn(self.search.pool, *self.latent_shape, generator=generator)
        classes = [None] if self.labels is None else self.labels.unique().tolist()
        starts = torch.empty(len(self.images), self.search.restarts, pool[0].numel())
        for label in classes:
            own = slice(None) if label is None else self.labels == label
            made = torch.cat([self.synthesise(part, _same(label, part)) for part in pool.split(self.search.batch_size)])
            found = scan(self.images[own].flatten(1), made.cpu().flatten(1), self.search.restarts).indices
            starts[own] = pool.flatten(1)[torch.as_tensor(found)]
        return starts


def _same(label, part):
    return None if label is None else torch.full((len(part),), label)


class _Best:
    """The distance (n,) at the lowest objective met so far, over steps and restarts."""

    def __init__(self, n):
        self.distance, self.objective = torch.full((n,), torch.inf), torch.full((n,), torch.inf)

    def see(self, distance, objective):
        lowest, where = objective.detach().min(1)
        better = lowest < self.objective
        self.objective[better] = lowest[better]
        self.distance[better] = distance.detach().gather(1, where[:, None])[better, 0]


def _descend(task, starts, rows, steps, lr):
    """Distances (n,) after Adam on every start (n, R, d)."""
    latents, best = starts.clone().requires_grad_(), _Best(len(rows))
    optimiser = torch.optim.Adam([latents])
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = lr * ramp(step / steps)
        distance, objective = task.judge(latents, rows)
        best.see(distance, objective)
        (latents.grad,) = torch.autograd.grad(objective.sum(), latents)
        optimiser.step()
    with torch.no_grad():
        best.see(*task.judge(latents, rows))
    return best.distance


@torch.no_grad()
def _evolve(task, starts, rows, steps, population):
    """Distances (n,) after a (mu / mu, lambda) evolution strategy from every start (n, R, d), same noise for all."""
    n, restarts, dim = starts.shape
    parents = population // 2
    weights = np.log(parents + 0.5) - np.log(np.arange(1, parents + 1))
    weights = torch.tensor(weights / weights.sum(), dtype=torch.float32)
    mass = float(1 / weights.square().sum())
    rate = (mass + 2) / (dim + mass + 5)
    damping = 1 + rate + 2 * max(0.0, ((mass - 1) / (dim + 1)) ** 0.5 - 1)
    expected = dim**0.5 * (1 - 1 / (4 * dim) + 1 / (21 * dim**2))  # length of a standard normal vector
    means, path, sizes = starts.clone(), torch.zeros_like(starts), torch.full((n, restarts, 1), 0.5)
    generator, best = torch.Generator().manual_seed(task.search.seed + 1), _Best(n)
    best.see(*task.judge(means, rows))
    for _ in range(steps):
        noise = torch.randn(population, dim, generator=generator)
        tried = means[:, :, None] + sizes[..., None] * noise
        distance, objective = task.judge(tried.flatten(1, 2), rows)
        best.see(distance, objective)
        chosen = objective.view(n, restarts, population).argsort(2)[:, :, :parents]
        step = (weights[:, None] * noise[chosen]).sum(2)
        means += sizes * step
        path = (1 - rate) * path + (rate * (2 - rate) * mass) ** 0.5 * step
        sizes *= torch.exp(rate / damping * (path.norm(dim=2, keepdim=True) / expected - 1))
    return best.distance
