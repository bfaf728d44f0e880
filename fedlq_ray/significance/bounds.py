"""Computes the convergence bound of docs/theory.md: what a plan of levels costs, in gradient norm.

Theorem 1 assumes full participation and unbiased quantizers whose noise is independent between clients. With sampled
clients, or with a biased quantizer and error feedback, the result ranks plans but is not a bound.
"""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike

from fedlq_ray.significance.error_factors import Floats


@dataclass(frozen=True)
class Problem:
    """The constants of the losses that the bound depends on.

    Args:
        smoothness: L of every client's loss.
        noise: sigma^2 of a stochastic gradient.
        heterogeneity: sigma_g^2 >= sum p_i |grad f_i - grad f|^2, at all weights.
        gap: f(w_0) - f*.
    """

    smoothness: float
    noise: float
    heterogeneity: float
    gap: float


@dataclass(frozen=True)
class Bound:
    """Theorem 1's bound on the mean over rounds of E|grad f(w_t)|^2, split by cause."""

    start: float
    noise: float
    drift: float
    quantization: float

    @property
    def total(self) -> float:
        return self.start + self.noise + self.drift + self.quantization


def mean_error(shares: ArrayLike, errors: ArrayLike) -> float:
    """E|sum p_i (Q_i(x_i) - x_i)|^2 = sum p_i^2 sum_l errors, averaged over all leading axes.

    Args:
        shares: p_i (clients,).
        errors: E|Q(x) - x|^2 (..., clients, layers): `minmax_error`, or q (`plan_q`) times the squared norms of the
            payload (the update; or the model, with payload `model`). Multiply by L_l / L if the smoothness of each
            layer is known.
    """
    return float(np.einsum("i,...il->...", np.square(_shares(shares)), np.asarray(errors)).mean())


def convergence_bound(
    problem: Problem, *, lr: float, local_steps: ArrayLike, rounds: int, shares: ArrayLike, error: float
) -> Bound:
    """Theorem 1, with the constants of its proof for this step size; Theorem 2 if clients' steps differ.

    Args:
        lr: eta; eta L tau must give rho > 0, which holds up to 3/4.
        local_steps: tau; or tau_i (clients,), if updates are divided by tau_i and rescaled by their mean (FedNova).
        shares: p_i (clients,), with sum 1.
        error: the result of `mean_error`, averaged over rounds; for updates as sent, so after normalisation.
    """
    p = _shares(shares)
    steps = np.broadcast_to(np.asarray(local_steps, dtype=float), p.shape)
    mean, most = float(p @ steps), float(steps.max())
    kappa, rho = _constants(problem, lr, most)
    x = lr * problem.smoothness * mean
    spread = (mean - 1) * problem.noise / 2 + (most - 1) * (2 * most - 1) * problem.heterogeneity / 6
    averaged = mean * float((p**2 / steps).sum())
    return Bound(
        start=2 * problem.gap / (lr * mean * rounds) / rho,
        noise=problem.smoothness * lr * problem.noise * averaged / (1 - x) / rho,
        drift=kappa * (lr * problem.smoothness) ** 2 * spread / rho,
        quantization=problem.smoothness * error / (lr * mean) / rho,
    )


def worst_case_bound(
    problem: Problem, *, lr: float, local_steps: int, rounds: int, shares: ArrayLike, q: ArrayLike
) -> float:
    """Corollary 2: the bound before any update has been seen, from q (clients, layers) alone, such as `plan_q`
    returns; for payload `update`.

    Raises:
        ValueError: the learning rate is too large for a plan this coarse.
    """
    kappa, rho = _constants(problem, lr, local_steps)
    worst = float(np.max(_shares(shares)[:, None] * np.asarray(q)))
    left = rho - kappa * worst * lr * problem.smoothness * local_steps
    if left <= 0:
        raise ValueError(f"lr={lr:g} is too large for p q = {worst:g}; lower lr or raise bits")
    exact = convergence_bound(problem, lr=lr, local_steps=local_steps, rounds=rounds, shares=shares, error=0.0)
    sent = local_steps * problem.heterogeneity + problem.noise
    return (exact.total * rho + kappa * worst * lr * problem.smoothness * sent) / left


def fedpaq_bound(
    problem: Problem, *, q: float, clients: int, participants: int, local_steps: int, iterations: int
) -> float:
    """FedPAQ's theorem 2: the mean over all T = rounds x tau iterations of E|grad f|^2 at the clients' mean weights.

    Source: Reisizadeh et al., AISTATS 2020, arXiv:1909.13014. It assumes that all clients draw from one distribution,
    that shares are equal, and that lr is 1 / (L sqrt(T)).

    Raises:
        ValueError: heterogeneity is not zero, or tau exceeds the theorem's limit (its condition 16).
    """
    if problem.heterogeneity:
        raise ValueError("FedPAQ's theorem 2 does not allow heterogeneity")
    n, r = clients, participants
    absent = (n - r) / (r * (n - 1)) if n > 1 else 0.0
    b2 = q / n + 4 * absent * (1 + q)
    most = (sqrt(b2**2 + 0.8) - b2) / 8 * sqrt(iterations)
    if iterations < 2 or local_steps > most:
        raise ValueError(
            f"local_steps={local_steps}, but FedPAQ's theorem 2 holds up to {most:.3g} at this q: lower it"
        )
    first = (1 + q) * problem.noise / n * (1 + n * absent)
    second = problem.noise * (n + 1) / n
    start = 2 * problem.smoothness * problem.gap
    return (start + first) / sqrt(iterations) + second * (local_steps - 1) / iterations


def _constants(problem: Problem, lr: float, local_steps: float) -> tuple[float, float]:
    """Returns kappa and rho of the drift lemma. Raises ValueError if the step is too large for the theorem."""
    step = lr * problem.smoothness
    root = 1 - step * sqrt(local_steps * (local_steps - 1) / 2)
    kappa = root**-2 if root > 0 else float("inf")
    rho = 1 - kappa * step**2 * (local_steps - 1) * (2 * local_steps - 1) / 6
    if not (step * local_steps < 1 and rho > 0):
        raise ValueError(f"lr x L x local_steps is {step * local_steps:g}; the theorem holds up to 0.75: lower lr")
    return kappa, rho


def _shares(shares: ArrayLike) -> Floats:
    """Returns p_i as an array. Raises ValueError unless they are the weights of a mean."""
    p = np.asarray(shares, dtype=float)
    if not (p >= 0).all() or abs(p.sum() - 1) > 1e-6:
        raise ValueError(f"shares must be non-negative and sum to 1, got {shares!r}")
    return p
