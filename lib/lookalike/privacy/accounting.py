"""Epsilon of Poisson-subsampled Gaussian steps, image level, add-or-remove-one neighbours.

Rényi accounting (Mironov 2017; Mironov et al. 2019) by Opacus. At the settings of no_free_lunch (sigma 0.1 to 0.4,
20,000 steps) epsilon is in the ten thousands; near-exact accountants need more memory there than a machine has, so
Rényi it is.
"""

import warnings

# Opacus' own orders and, for tiny sigma, orders close to 1, where the best bound lies.
ORDERS = [1 + x / 100 for x in range(1, 10)] + [1 + x / 10 for x in range(1, 100)] + list(range(12, 64))


def rdp_epsilon(noise_multiplier, sample_rate, steps, delta):
    """Upper bound on epsilon at `delta` after `steps` steps; infinite without noise, 0 before the first step."""
    if not 0 < delta < 1:
        raise ValueError(f"delta must lie between 0 and 1, not {delta}; take it below 1 / number of records.")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate must lie in (0, 1], not {sample_rate}.")
    if steps == 0:
        return 0.0
    if noise_multiplier <= 0:
        return float("inf")
    from opacus.accountants.analysis import rdp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Optimal order is the")  # a looser bound is still a bound
        divergence = rdp.compute_rdp(q=sample_rate, noise_multiplier=noise_multiplier, steps=steps, orders=ORDERS)
        epsilon, _ = rdp.get_privacy_spent(orders=ORDERS, rdp=divergence, delta=delta)
    return float(epsilon)
