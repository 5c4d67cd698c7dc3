"""Every attack that needs nothing but released images, on the same candidates, in one go.

The calibration and the card run this suite, so that a power on the page belongs to the attack that judged the images.
Members and non-members are scored alike and at once: pGAN's radius, for one, comes from all of them. `reference` are
real images that are neither members nor non-members; the attacker's own, to know which images are near to everything.
"""

from dataclasses import dataclass, field

import numpy as np

from lookalike.data.duplicates import near_duplicates
from lookalike.privacy import membership
from lookalike.privacy.attack import attack_result
from lookalike.privacy.reidentification import distance_attacks

NOTES = {
    "gan_leaks_pixels": "distance to the nearest released image, in pixels (GAN-Leaks, full black box)",
    "pgan_pairwise_pixels": "the same, divided by the median distance to all released images (pGAN)",
    "pgan_distribution_pixels": "released images within the first percentile of all distances, in pixels (pGAN)",
    "aligned_similarity": "likeness to the released image that fits best after shifts and flips",
    "gan_leaks_features": "distance to the nearest released image, in features (GAN-Leaks, full black box)",
    "pgan_pairwise_features": "the same, divided by the median distance to all released images (pGAN)",
    "calibrated_features": "distance to the nearest released image against that to the nearest of other real images",
    "domias_features": "density of released images over that of other real images, in features (DOMIAS)",
    "discriminator_features": "a linear classifier of released against other real images, in features (after LOGAN)",
}
DENSITY_FROM = 5000  # images of a side that a density or a classifier is fitted to; the rest would hardly move it


@dataclass(frozen=True)
class View:
    """One set as attacks see it: `pixels` uint8 (N, C, H, W) and `features` (N, D), of one extractor for all sets."""

    pixels: np.ndarray = field(repr=False)
    features: np.ndarray = field(repr=False)

    def __len__(self):
        return len(self.pixels)

    def rows(self, indices):
        """The chosen rows, as a view."""
        return View(self.pixels[indices], self.features[indices])


def join(*views):
    """The views one after another."""
    return View(np.concatenate([v.pixels for v in views]), np.concatenate([v.features for v in views]))


def attack(
    members, non_members, synthetic, reference, member_subjects=None, non_member_subjects=None, seed=0, level=0.95
):
    """{name: `AttackResult`} for every attack of `NOTES`, from views; `level` is that of the intervals."""
    found, n = score(join(members, non_members), synthetic, reference, seed), len(members)
    subjects = member_subjects, non_member_subjects
    return {
        name: attack_result(name, scores[:n], scores[n:], *subjects, NOTES[name], level)
        for name, scores in found.items()
    }


def score(candidates, synthetic, reference, seed=0):
    """{name: scores (N,)} of the candidates under every attack; larger means more likely a member."""
    pixels = distance_attacks(candidates.pixels, synthetic.pixels)
    features = distance_attacks(candidates.features, synthetic.features)
    rng = np.random.default_rng(seed)
    some, others = (part.features[rng.permutation(len(part))[:DENSITY_FROM]] for part in (synthetic, reference))
    far = membership.gan_leaks_full_black_box(candidates.features, reference.features)
    return {
        "gan_leaks_pixels": -pixels.minima,
        "pgan_pairwise_pixels": pixels.pairwise,
        "pgan_distribution_pixels": pixels.distribution,
        "aligned_similarity": near_duplicates(candidates.pixels, synthetic.pixels).similarity,
        "gan_leaks_features": -features.minima,
        "pgan_pairwise_features": features.pairwise,
        "calibrated_features": membership.calibrated(-features.minima, far),
        "domias_features": membership.domias(candidates.features, some, others),
        "discriminator_features": discriminate(candidates.features, some, others, seed),
    }


def discriminate(candidates, first, second, seed=0):
    """Logits (N,) of belonging to `first` rather than `second`, by a linear classifier on rows of features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    labels = np.repeat([1, 0], [len(first), len(second)])
    model = LogisticRegression(C=0.01, class_weight="balanced", max_iter=500, random_state=seed)
    model = make_pipeline(StandardScaler(), model).fit(np.concatenate([first, second]), labels)
    return model.decision_function(candidates)
