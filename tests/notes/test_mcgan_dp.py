"""Minimal cases of the notes to the authors of "Enhancing the Utility ...", and what Table 1 itself says of its claims.

Each case stands alone: the paper's own numbers, or a few made ones, on which what a note says can be seen, and what
mends it. Lines are short because the page may show them. No code of the authors is in them.
"""

import math

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import RandomResizedCrop

from lookalike import paths
from lookalike.metrics.distances import frechet_distance
from lookalike.metrics.scores import auprc
from lookalike.models.mcgan import cross_entropy
from lookalike.privacy.accounting import group_bound, rdp_epsilon

REPORTED = paths.book_dir() / "reported" / "mcgan_dp.csv"
EPSILONS = (1, 6, 12, 20, 60)
TESTS = ("cbis", "bcdr")


@pytest.fixture(scope="module")
def table():
    """The paper's numbers by key."""
    return pd.read_csv(REPORTED, index_col="key")


@pytest.fixture(scope="module")
def score(table):
    """A cell of Table 1."""
    return lambda test, row, metric="auprc": float(table.value[f"table1/{test}/{row}/{metric}"])


# ---- Table 1 and the text ---------------------------------------------------------------------------------


def test_the_text_quotes_the_row_of_another_epsilon(score):
    """Text: on BCDR Real at epsilon 6 reaches 0.600, "on par" with Syn."""
    assert score("bcdr", "real_eps6") == 0.579
    assert score("bcdr", "real_eps12") == 0.600
    assert score("bcdr", "syn") - score("bcdr", "real_eps6") > 0.02


def test_a_spread_of_a_tenth_would_need_runs_far_apart(table):
    """Real at epsilon 60: 0.721 +- .110 over three runs, as printed."""
    farthest = 0.110 * 3 / math.sqrt(2)  # least range of three such runs
    assert farthest > 0.23
    private = table.filter(regex=r"table1/cbis/real_eps\d+/auprc", axis=0)
    others = private.drop("table1/cbis/real_eps60/auprc")
    assert 3 * others.spread.max() < 0.110
    assert private.spread.iloc[-1] == 0.011  # what we take


def test_the_text_has_the_spread_of_fid_ten_times_too_small(table):
    """FID of the three pairs of Real and BCDR, from the authors' spreadsheet."""
    pairs = [140.17, 175.00, 154.11]
    assert np.mean(pairs) == pytest.approx(156.43, abs=0.005)
    assert np.std(pairs) == pytest.approx(14.3, abs=0.05)  # text: 1.43
    assert table.spread["fig2/real_bcdr/fid"] == 14.3


def test_at_weak_privacy_synthetic_images_cost_auprc(score):
    """Table 1, CBIS-DDSM: Real+Syn minus Real, epsilon 1 to 60."""
    pairs = [(f"real_syn_eps{e}", f"real_eps{e}") for e in EPSILONS]
    gains = [score("cbis", both) - score("cbis", real) for both, real in pairs]
    assert [gain > 0 for gain in gains] == [True, True, True, False, False]


def test_out_of_domain_the_gain_does_not_shrink(score):
    """Text: the stricter the budget, the more synthetic images add."""

    def gain(test, epsilon):
        real = score(test, f"real_eps{epsilon}")
        return score(test, f"real_syn_eps{epsilon}") - real

    strict, loose = [{t: gain(t, e) for t in TESTS} for e in (1, 60)]
    assert strict["cbis"] > loose["cbis"]
    assert strict["bcdr"] < loose["bcdr"]


def test_at_epsilon_1_real_is_at_chance(table, score):
    """AUPRC of a blind classifier is the share of the positive class, benign."""
    benign, images = (table.value[f"data/bcdr/test/{x}"] for x in ("benign", "images"))
    bcdr, cbis = benign / images, 245 / 402
    assert (round(cbis, 3), round(bcdr, 3)) == (0.609, 0.561)
    assert score("cbis", "real_eps1") - cbis < 0.032
    assert score("bcdr", "real_eps1") < bcdr


def test_the_positive_class_moves_the_chance_line():
    """Scores without information, BCDR's 620 benign and 486 malignant images."""
    benign = np.repeat([1, 0], [620, 486])
    blind = np.full(len(benign), 0.5)
    assert auprc(benign, blind) == pytest.approx(0.561, abs=1e-3)
    assert auprc(1 - benign, 1 - blind) == pytest.approx(0.439, abs=1e-3)


# ---- what is compared -------------------------------------------------------------------------------------


def test_more_records_of_any_kind_mean_less_noise():
    """300 epochs in batches of 128 at epsilon 6; 3000 images are added."""

    def spent(sigma, images):
        batches = math.ceil(images / 128)
        return rdp_epsilon(sigma, 1 / batches, 300 * batches, delta=1e-4)

    sigmas = {1104: 4.336, 4104: 2.344}
    for images, sigma in sigmas.items():
        assert spent(sigma, images) == pytest.approx(6, abs=0.02)
    assert sigmas[4104] / sigmas[1104] < 0.55  # what they show does not enter


def test_two_heads_of_different_size_share_the_noise_differently():
    """Real trains both layers, SynPre+RealFT one: gradients are clipped to 1."""
    two = nn.Sequential(nn.Linear(768, 384), nn.LeakyReLU(0.2), nn.Linear(384, 2))
    one = nn.Linear(768, 2)
    n_two, n_one = (sum(p.numel() for p in m.parameters()) for m in (two, one))
    assert (n_two, n_one) == (296_066, 1_538)
    noise = [4.336 * math.sqrt(n) / 122 for n in (n_two, n_one)]  # its length
    assert noise[0] > 13 * noise[1]  # beside a mean gradient of at most 1


def test_a_seed_that_is_counted_twice_narrows_the_spread():
    """SynPre: two of three runs are the same, so the spread is of two."""
    a, b = 0.65, 0.617
    thrice, twice = np.std([a, b, a]), np.std([a, b])
    assert thrice / twice == pytest.approx(0.943, abs=1e-3)
    assert np.mean([a, b, a]) > np.mean([a, b])  # and the mean leans


def test_distances_between_parts_shrink_with_their_size():
    """One distribution: Real's parts have 360 images, Syn's 3240."""
    rng = np.random.default_rng(0)

    def apart(n, d=102):  # FRD's features
        return frechet_distance(*rng.normal(size=(2, n, d)))

    small, large = apart(360), apart(3240)
    assert 8 < small / large < 14  # Fig. 2: 3.48 / 0.57 = 6.1


# ---- privacy ----------------------------------------------------------------------------------------------


def test_what_image_level_privacy_says_of_a_patient():
    """delta 1e-4; a patient of CBIS-DDSM has up to 14 images, mostly two."""
    assert group_bound(1, 1e-4, 14).epsilon == math.inf  # delta reaches 1
    two = group_bound(6, 1e-4, 2)
    assert two.epsilon == 12
    assert two.delta == pytest.approx(1e-4 * (1 + math.exp(6)))  # 0.04
    assert 2 * 1e-4 * math.exp(6) == pytest.approx(0.081, abs=1e-3)  # coarser


# ---- the GAN ----------------------------------------------------------------------------------------------


def test_torch_refuses_targets_above_one():
    """One-sided smoothing draws the real images' targets from 0.7 to 1.2."""
    logits = torch.tensor([-2.0, 0.5, 3.0])
    targets = torch.tensor([0.7, 1.0, 1.2])
    with pytest.raises(RuntimeError, match="between 0 and 1"):
        F.binary_cross_entropy(logits.sigmoid(), targets)

    p = logits.sigmoid()
    by_hand = -(targets * p.log() + (1 - targets) * (1 - p).log())
    torch.testing.assert_close(cross_entropy(logits, targets), by_hand)


def test_above_one_a_surer_discriminator_always_pays_less():
    """A target of 1.2 has no best answer; one of 0.9 has."""
    logits = torch.linspace(0, 20, 201)
    falls = cross_entropy(logits, torch.tensor(1.2)).diff()
    assert (falls < 0).all()
    best = cross_entropy(logits, torch.tensor(0.9)).argmin()
    assert logits[best].sigmoid() == pytest.approx(0.9, abs=0.01)


def test_a_counter_that_rests_skips_every_second_generator_step():
    """n discriminator steps per generator step, counted from 0; n = 1."""

    def generator_steps(n, steps=69):  # 1104 images in batches of 16
        count, taken = n, []
        for step in range(steps):
            if count != n:
                count += 1
            else:
                count = 0
                taken.append(step)
        return taken

    assert generator_steps(1)[:3] == [0, 2, 4]
    assert len(generator_steps(1)) == 35
    assert len(generator_steps(0)) == 69  # what one to one would need


def test_a_loss_with_one_minus_sign_wants_every_image_real():
    """The printed loss of the discriminator: -E log D(x) + E log(1 - D(G))."""

    def printed(on_real, on_made):
        return -math.log(on_real) + math.log(1 - on_made)

    def meant(on_real, on_made):
        return -math.log(on_real) - math.log(1 - on_made)

    right, fooled = (0.99, 0.01), (0.99, 0.99)
    assert printed(*fooled) < printed(*right)
    assert meant(*fooled) > meant(*right)


def test_real_images_in_0_1_are_known_by_their_sign():
    """The generator ends in tanh; the real images are not normalised."""
    draw = torch.Generator().manual_seed(0)
    real = torch.rand(50, 128 * 128, generator=draw)
    made = torch.randn(50, 128 * 128, generator=draw).mul(0.1).tanh()
    assert real.min() >= 0
    assert (made.amin(1) < 0).all()  # one pixel tells

    mended = 2 * real - 1
    assert (mended.amin(1) < 0).all()


def test_a_crop_cannot_be_larger_than_the_image():
    """Crops of 0.9 to 1.1 times the area, as printed."""
    torch.manual_seed(0)
    image = torch.zeros(1, 128, 128)
    draw = RandomResizedCrop.get_params
    sides = [draw(image, (0.9, 1.1), (0.95, 1.1))[2:] for _ in range(300)]
    areas = np.prod(sides, axis=1) / 128**2
    assert areas.max() <= 1
    whole = np.mean(areas == 1)
    inside = [draw(image, (0.9, 1.0), (0.95, 1.1))[2:] for _ in range(300)]
    assert whole <= 0.2  # torchvision draws again, ten times
    assert areas.mean() == pytest.approx(np.prod(inside, axis=1).mean() / 128**2, abs=0.01)


# ---- the claims, by the numbers of Table 1 ----------------------------------------------------------------


def gain(score, test, metric, epsilon):
    return score(test, f"real_syn_eps{epsilon}", metric) - score(test, f"real_eps{epsilon}", metric)


def finetuned(score, test):
    """SynPre+RealFT over SynPre, and over the better of Real and Real+Syn, at the worst budget for it."""
    ours = {e: score(test, f"synpre_realft_eps{e}") for e in EPSILONS}
    best = {e: max(score(test, f"{row}_eps{e}") for row in ("real", "real_syn")) for e in EPSILONS}
    return min(ours.values()) - score(test, "synpre"), min(ours[e] - best[e] for e in EPSILONS)


def effects(score):
    """{claim key: effect, positive where the claim holds}: the formulas of the claims on Table 1."""
    found = {}
    for test in TESTS:
        for metric in ("auroc", "auprc"):
            found[f"c1_{test}_{metric}"] = np.mean([gain(score, test, metric, e) for e in EPSILONS])
        found[f"c1_eps6_{test}"] = gain(score, test, "auprc", 6)
        strict, loose = ([gain(score, test, "auprc", e) for e in pair] for pair in ((1, 6), (20, 60)))
        found[f"c2_{test}"] = np.mean(strict) - np.mean(loose)
        found[f"c3_{test}"] = score(test, "syn") - score(test, "real_eps6")
        found[f"c4_{test}"] = score(test, "synpre") - score(test, "real_eps60")
        found[f"c4_layers_{test}"] = score(test, "synpre") - score(test, "syn")
        found[f"c5_{test}"], found[f"c6_{test}"] = finetuned(score, test)
        found[f"c10_{test}"] = score(test, "syn", "auroc") - 0.5
    return found


def test_which_claims_the_papers_own_table_bears_out(score):
    """All but one: the gain out of domain is no larger at strict budgets."""
    found = effects(score)
    assert {key for key, effect in found.items() if effect <= 0} == {"c2_bcdr"}
    assert found["c2_cbis"] == pytest.approx(0.0485)
    assert found["c2_bcdr"] == pytest.approx(-0.0155)
    assert found["c1_cbis_auprc"] == pytest.approx(0.0026)  # within a spread of .011 to .03
    assert found["c6_bcdr"] == pytest.approx(0.001)


def test_which_claims_the_papers_own_figure_bears_out(table):
    fig = {key.removeprefix("fig2/"): value for key, value in table.value.items() if key.startswith("fig2/")}
    assert len(fig) == 12
    for metric in ("fid", "fid_rad", "frd"):
        assert math.log(fig[f"real_bcdr/{metric}"] / fig[f"syn_real/{metric}"]) > 0  # c7
    for metric in ("fid", "fid_rad"):
        assert math.log(1.5) - abs(math.log(fig[f"syn_syn/{metric}"] / fig[f"real_real/{metric}"])) > 0  # c8
    assert math.log(fig["real_real/frd"] / fig["syn_syn/frd"]) > 0  # c9_frd


def test_every_claim_of_table_1_has_its_formula(table, score):
    others = {"c7_fid", "c7_frd", "c8", "c9_frd", "c9_coverage"}
    claims = {key.removeprefix("claim/") for key in table.index if key.startswith("claim/")}
    assert claims == set(effects(score)) | others


def test_the_table_is_complete(table):
    rows = ["real", "syn", "synpre", *(f"{r}_eps{e}" for r in ("real", "real_syn", "synpre_realft") for e in EPSILONS)]
    wanted = {f"table1/{test}/{row}/{metric}" for test in TESTS for row in rows for metric in ("auroc", "auprc")}
    assert {key for key in table.index if key.startswith("table1/")} == wanted
    assert len(wanted) == 72
