"""Epsilon against closed forms, numerical integration and the figures recomputed for the paper."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from lookalike.privacy.accounting import ORDERS, rdp_epsilon


def test_full_batches_meet_the_gaussian_closed_form():
    """Without subsampling one step has Rényi divergence a / (2 sigma^2) (Mironov 2017, Cor. 3)."""
    sigma, steps, delta = 3.0, 50, 1e-3
    orders = np.array([a for a in ORDERS if a > 1])
    conversion = np.log1p(-1 / orders) - (np.log(delta) + np.log(orders)) / (orders - 1)
    assert rdp_epsilon(sigma, 1.0, steps, delta) == pytest.approx(
        (steps * orders / (2 * sigma**2) + conversion).min(), rel=1e-9
    )


@pytest.mark.parametrize(("sigma", "order"), [(0.3, 1.05), (1.0, 1.5), (2.0, 4.0)])
def test_subsampled_divergence_meets_numerical_integration(sigma, order):
    from opacus.accountants.analysis import rdp

    rate = 0.5
    x = np.linspace(-12 * sigma - 1, 12 * sigma + 2, 2_000_001)
    log_p = norm.logpdf(x, 0, sigma)
    log_q = np.logaddexp(np.log1p(-rate) + log_p, np.log(rate) + norm.logpdf(x, 1, sigma))
    integral = np.trapezoid(np.exp(order * log_q - (order - 1) * log_p), x)
    ours = rdp.compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=[order])
    assert float(np.squeeze(ours)) == pytest.approx(np.log(integral) / (order - 1), rel=1e-3)


# sigma: epsilon at delta 0.01 after 20,000 steps at rate 0.5, by the central limit of the privacy loss
PAPER = {0.1: 4.9e5, 0.2: 1.1e5, 0.3: 4.5e4, 0.4: 2.3e4, 1.0: 3.0e3, 10.0: 42}


@pytest.mark.parametrize("sigma", PAPER)
def test_the_papers_settings_cost_what_the_central_limit_says(sigma):
    ours = rdp_epsilon(sigma, 0.5, 20_000, 0.01)
    assert 0.97 * PAPER[sigma] < ours < 1.2 * PAPER[sigma]


@settings(max_examples=25, deadline=None)
@given(st.floats(0.3, 20), st.floats(0.05, 1), st.integers(1, 500))
def test_epsilon_falls_with_noise_and_grows_with_steps_and_rate(sigma, rate, steps):
    here = rdp_epsilon(sigma, rate, steps, 1e-3)
    assert rdp_epsilon(1.5 * sigma, rate, steps, 1e-3) <= here * (1 + 1e-6)
    assert rdp_epsilon(sigma, rate, 2 * steps, 1e-3) >= here * (1 - 1e-6)
    assert rdp_epsilon(sigma, rate / 2, steps, 1e-3) <= here * (1 + 1e-6)


def test_ends_and_refusals():
    assert rdp_epsilon(1.0, 0.5, 0, 0.01) == 0
    assert rdp_epsilon(0.0, 0.5, 10, 0.01) == float("inf")
    with pytest.raises(ValueError, match="delta"):
        rdp_epsilon(1.0, 0.5, 10, 1.0)
    with pytest.raises(ValueError, match="sample_rate"):
        rdp_epsilon(1.0, 0.0, 10, 0.01)
