"""The theorem of docs/theory.md against runs of quantized FedAvg whose L, sigma^2, sigma_g^2 and f* are known."""

import functools
import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fedlq_ray.config.schemes import strategy_config
from fedlq_ray.models import Layer
from fedlq_ray.quantization import MinMax, Qsgd
from fedlq_ray.significance.bounds import Problem, convergence_bound, fedpaq_bound, mean_error, worst_case_bound
from fedlq_ray.significance.error_factors import minmax_error, minmax_q, plan_q, qsgd_q
from fedlq_ray.strategies import Member, StrategyContext
from fedlq_ray.strategies.base import by_samples
from fedlq_ray.strategies.fedlq import FedLQ

LAYERS = (9, 31)  # of different sizes; small enough that QSGD at 1 bit, with q = 30, does not diverge
EDGES = np.cumsum((0, *LAYERS))
SIZE = int(EDGES[-1])
SHARES = np.array([0.2, 0.35, 0.45])
SEEDS, ROUNDS, STEPS, LEVELS = 10, 20, 4, range(1, 9)
NEAR = 0.05  # runs start so close to the optimum that most of the gradient is what the levels put there
HELPERS = {MinMax: minmax_q, Qsgd: qsgd_q}


class Quadratics:
    """f_i(w) = (w - a_i)' A (w - a_i) / 2, A diagonal from 0.05 to 1; Gaussian noise of variance sigma^2 in all."""

    def __init__(self, spread=1.0, noise=1.0):
        rng = np.random.default_rng(1)
        self.curvature = np.geomspace(1.0, 0.05, SIZE)
        self.targets = spread * rng.normal(size=(len(SHARES), SIZE))
        self.deviation = np.sqrt(noise / SIZE)
        centre = SHARES @ self.targets  # minimises f, since all share A
        self.start = centre + NEAR
        off = self.curvature * (self.targets - centre)  # grad f_i - grad f, which is the same everywhere
        self.problem = Problem(
            smoothness=1.0,
            noise=noise,
            heterogeneity=float(SHARES @ (off**2).sum(1)),
            gap=float(self.curvature.sum() * NEAR**2 / 2),
        )

    def gradients(self, w):
        """Of every client at its own weights, (seeds, clients, d)."""
        return self.curvature * (w - self.targets)

    def noisy(self, w, rng):
        return self.gradients(w) + self.deviation * rng.normal(size=w.shape)


QUADRATICS = Quadratics()


class Logistic:
    """log(1 + exp(-v_j'w)) + mu |w|^2 / 2, averaged over a client's m samples; a gradient draws one of them.

    V_i holds the rows v_j. With s_j in (0, 1) the gradient is mu w - V's/m, so that for every w
    L = lambda / 4 + mu; sigma^2 <= mean |v_j|^2; and, as |V's/m|^2 <= lambda |s|^2/m <= lambda,
    sigma_g^2 <= sum p_i |V_i's/m|^2 <= sum p_i lambda_i, where lambda_i is the largest eigenvalue of V_i'V_i/m.
    """

    def __init__(self):
        rng = np.random.default_rng(2)
        clients, m, self.mu = len(SHARES), 30, 0.1
        truth = rng.normal(size=SIZE)
        x = rng.normal(size=(clients, m, SIZE)) / np.sqrt(SIZE) + 0.1 * rng.normal(size=(clients, 1, SIZE))
        self.rows = x * np.where(x @ truth + 0.3 * rng.normal(size=(clients, m)) > 0, 1.0, -1.0)[..., None]
        tops = np.array([np.linalg.eigvalsh(v.T @ v / m)[-1] for v in self.rows])
        optimum = self.minimiser()
        self.start = optimum + NEAR
        self.problem = Problem(
            smoothness=float(tops.max() / 4 + self.mu),
            noise=float((self.rows**2).sum(2).mean(1).max()),
            heterogeneity=float(SHARES @ tops),
            gap=self.loss(self.start) - self.loss(optimum),
        )

    def loss(self, w):
        return float(SHARES @ np.logaddexp(0, -self.rows @ w).mean(1) + self.mu * w @ w / 2)

    def minimiser(self):
        """By Newton's method, until the gradient is nothing."""
        w = np.zeros(SIZE)
        for _ in range(30):
            s = 1 / (1 + np.exp(self.rows @ w))
            weight = SHARES[:, None] * s * (1 - s) / s.shape[1]
            hessian = np.einsum("im,imd,ime->de", weight, self.rows, self.rows) + self.mu * np.eye(SIZE)
            w = w - np.linalg.solve(hessian, self.mean_gradient(w))
        assert np.linalg.norm(self.mean_gradient(w)) < 1e-12
        return w

    def mean_gradient(self, w):
        return SHARES @ self.gradients(np.broadcast_to(w, (1, len(SHARES), SIZE)))[0]

    def gradients(self, w):
        s = 1 / (1 + np.exp(np.einsum("imd,nid->nim", self.rows, w)))
        return self.mu * w - np.einsum("nim,imd->nid", s, self.rows) / s.shape[2]

    def noisy(self, w, rng):
        v = self.rows[np.arange(len(SHARES)), rng.integers(self.rows.shape[1], size=w.shape[:2])]
        s = 1 / (1 + np.exp((v * w).sum(2)))
        return self.mu * w - s[..., None] * v


@dataclass
class Run:
    """Squared gradient norms averaged over rounds (seeds,), and each round's squared norms and ranges (..., layers)."""

    gradients: np.ndarray
    norms: np.ndarray
    spans: np.ndarray


@functools.cache
def uniform_run(losses, kind, bits):
    """All layers of all clients at one level, with the step size of `step`; tests share it."""
    return fedavg(losses, uniform(kind, bits), step(losses))


def fedavg(losses, quantizers, lr, *, payload="update", seed=0, steps=STEPS):
    """FedAvg with all clients, in float64; quantizers (clients, layers) send each layer as their own bytes.

    Where clients take steps of their own (clients,), updates are normalised by them.
    """
    steps = np.broadcast_to(steps, SHARES.shape)
    rng, noise = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    w = np.tile(losses.start, (SEEDS, 1))
    gradients, norms, spans = [], [], []
    for _ in range(ROUNDS):
        local = np.repeat(w[:, None], len(SHARES), 1)
        gradients.append((np.einsum("i,nid->nd", SHARES, losses.gradients(local)) ** 2).sum(1))
        for k in range(steps.max()):
            local = local - lr * losses.noisy(local, rng) * (k < steps)[:, None]
        sent = (local - w[:, None]) * (SHARES @ steps / steps)[:, None] if payload == "update" else local
        pieces = np.split(sent, EDGES[1:-1], axis=2)
        norms.append(np.stack([(p**2).sum(2) for p in pieces], 2))
        spans.append(np.stack([np.ptp(p, 2) for p in pieces], 2))
        received = np.einsum("i,nid->nd", SHARES, send(sent, quantizers, noise))
        w = w + received if payload == "update" else received
    return Run(np.mean(gradients, 0), np.array(norms), np.array(spans))


def send(sent, quantizers, noise):
    """What the server decodes of each client's layers."""
    out = np.empty_like(sent)
    for n, i in np.ndindex(sent.shape[:2]):
        for layer, (start, stop) in enumerate(zip(EDGES, EDGES[1:], strict=False)):
            quantizer = quantizers[i][layer]
            body = quantizer.encode(torch.from_numpy(sent[n, i, start:stop]).float(), noise)
            out[n, i, start:stop] = quantizer.decode(memoryview(body), int(stop - start)).numpy()
    return out


def uniform(kind, bits):
    return [[kind(bits)] * len(LAYERS)] * len(SHARES)


def step(losses):
    return 1 / (8 * losses.problem.smoothness * STEPS)


def bound(losses, lr, error):
    return convergence_bound(losses.problem, lr=lr, local_steps=STEPS, rounds=ROUNDS, shares=SHARES, error=error).total


@pytest.mark.parametrize("kind", [MinMax, Qsgd])
@pytest.mark.parametrize("losses", [QUADRATICS, Logistic()], ids=["quadratic", "logistic"])
def test_the_bound_holds_at_every_level_and_ranks_levels_as_the_runs_do(losses, kind):
    lr = step(losses)
    runs = [uniform_run(losses, kind, bits) for bits in LEVELS]
    bounds = [
        bound(losses, lr, mean_error(SHARES, HELPERS[kind](bits, LAYERS) * run.norms))
        for bits, run in zip(LEVELS, runs, strict=True)
    ]
    for bits, run, relative in zip(LEVELS, runs, bounds, strict=True):
        assert run.gradients.mean() <= relative
        if kind is MinMax:  # the ranges say more than the norms do
            ranged = bound(losses, lr, mean_error(SHARES, minmax_error(bits, LAYERS, run.spans)))
            assert run.gradients.mean() <= ranged <= relative
    apart = 0
    for i in range(len(runs)):
        for j in range(i):
            difference = runs[j].gradients - runs[i].gradients
            # Six standard errors: with 9 degrees of freedom chance passes them once in 5000 pairs.
            if abs(difference.mean()) > 6 * difference.std(ddof=1) / SEEDS**0.5:
                apart += 1
                assert (bounds[j] > bounds[i]) == (difference.mean() > 0)
    assert apart >= 5  # 1 bit, at the least, is told from most of the others


def test_the_bound_holds_for_mixed_levels_and_for_the_model_as_payload():
    losses = Quadratics()
    levels = np.array([[1, 4], [8, 2], [5, 1]])
    quantizers = [[MinMax(int(b)) for b in row] for row in levels]
    for payload in ("update", "model"):
        run = fedavg(losses, quantizers, step(losses), payload=payload)
        error = mean_error(SHARES, minmax_error(levels, LAYERS, run.spans))
        assert run.gradients.mean() <= bound(losses, step(losses), error)


def test_the_bound_holds_where_drift_and_quantization_are_most_of_it():
    losses = Quadratics(spread=4.0, noise=25.0)
    for x in (1 / 8, 1 / 2, 3 / 4):
        run = fedavg(losses, uniform(MinMax, 1), x / STEPS)
        assert run.gradients.mean() <= bound(losses, x / STEPS, mean_error(SHARES, minmax_q(1, LAYERS) * run.norms))


def test_the_bound_holds_where_clients_steps_differ_and_updates_are_normalised():
    losses, steps = Quadratics(spread=4.0, noise=25.0), np.array([12, 1, 5])
    for bits, x in ((1, 1 / 8), (8, 1 / 8), (8, 3 / 4)):
        lr = x / steps.max()
        run = fedavg(losses, uniform(MinMax, bits), lr, steps=steps)
        error = mean_error(SHARES, minmax_error(bits, LAYERS, run.spans))
        due = convergence_bound(losses.problem, lr=lr, local_steps=steps, rounds=ROUNDS, shares=SHARES, error=error)
        assert run.gradients.mean() <= due.total
    # By hand: shares 1/4 and 3/4, steps 1 and 3, so 2.5 in the mean; eta L = 1/24, kappa and rho those of 3 steps;
    # L eta sigma^2 * 2.5 (1/16 + 9/48) / (1 - 2.5/24) / rho, and kappa (1.5*4/2 + 2*5*9/6)/576/rho.
    mixed = convergence_bound(
        Problem(1.0, 4.0, 9.0, 3.0), lr=1 / 24, local_steps=[1, 3], rounds=10, shares=[0.25, 0.75], error=2.0
    )
    assert mixed.noise == pytest.approx(4 / 24 * 0.625 / (1 - 2.5 / 24) / 0.996639, rel=1e-5)
    assert mixed.drift == pytest.approx(1.161615 * 18 / 576 / 0.996639, rel=1e-5)
    assert mixed.start == pytest.approx(6 * 24 / 25 / 0.996639, rel=1e-5)
    assert mixed.quantization == pytest.approx(48 / 2.5 / 0.996639, rel=1e-5)


def test_the_worst_case_needs_no_norms_and_is_above_the_measured_bound():
    losses = QUADRATICS
    lr = step(losses)
    for bits in (3, 4, 8):
        q = np.tile(minmax_q(bits, LAYERS), (len(SHARES), 1))
        run = uniform_run(losses, MinMax, bits)
        worst = worst_case_bound(losses.problem, lr=lr, local_steps=STEPS, rounds=ROUNDS, shares=SHARES, q=q)
        assert run.gradients.mean() <= bound(losses, lr, mean_error(SHARES, q * run.norms)) <= worst
    with pytest.raises(ValueError, match="lower lr or raise bits"):
        q = np.full((len(SHARES), 1), 1e3)
        worst_case_bound(losses.problem, lr=lr, local_steps=STEPS, rounds=ROUNDS, shares=SHARES, q=q)


def test_it_is_evaluated_for_the_plans_of_a_strategy_and_more_bytes_never_loosen_it():
    shares = (0.1, 0.15, 0.2, 0.25, 0.3)
    layers = tuple(Layer(str(i), *ends) for i, ends in enumerate(itertools.pairwise((0, 3, 12, SIZE))))
    losses, worst = Quadratics(), []
    for seconds in (0.21, 0.23, 0.25, 0.3, 0.32):
        members = [Member(i, int(100 * p), 0.2, 1000.0 * (i + 1)) for i, p in enumerate(shares)]
        config = strategy_config(budget="deadline", deadline_s=seconds, levels=(3, 4, 6, 8))
        fedlq = FedLQ(StrategyContext(config, layers, seed=0))
        plans = fedlq.plan(fedlq.init(), 0, members)
        q = plan_q([plans[m.client] for m in members])
        worst.append(
            worst_case_bound(
                losses.problem, lr=step(losses), local_steps=STEPS, rounds=ROUNDS, shares=by_samples(members), q=q
            )
        )
    assert all(a > b for a, b in itertools.pairwise(worst))


def test_the_terms_are_those_worked_out_by_hand():
    # tau = 1: kappa = rho = 1, no drift. 2*3/(.25*10), .5*.25*2*4/(1-.125)... with L = .5, eta = .25, x = 1/8.
    terms = convergence_bound(Problem(0.5, 4.0, 9.0, 3.0), lr=0.25, local_steps=1, rounds=10, shares=[0.5] * 2, error=7)
    assert terms.start == pytest.approx(2.4) and terms.drift == 0
    assert terms.noise == pytest.approx(0.5 * 0.25 * 4 * 0.5 * 8 / 7) and terms.quantization == pytest.approx(14)
    # tau = 3, eta L = 1/24: y = sqrt(3)/24, kappa = 1/(1 - y)^2 = 1.161615, rho = 1 - kappa*10/(6*576) = 0.996639;
    # drift = kappa*2*(4/2 + 5*9/6)/576/rho.
    terms = convergence_bound(Problem(1.0, 4.0, 9.0, 3.0), lr=1 / 24, local_steps=3, rounds=10, shares=[1], error=0)
    assert terms.drift == pytest.approx(0.0384463, rel=1e-5)
    assert terms.start == pytest.approx(4.8 / 0.996639, rel=1e-5)
    # Two clients of 1/4 and 3/4, two layers: (1 + 2)/16 + 9(3 + 4)/16.
    assert mean_error([0.25, 0.75], [[1, 2], [3, 4]]) == pytest.approx(66 / 16)


@pytest.mark.parametrize("curvature", [-2.0, 2.0])
@pytest.mark.parametrize("x", [1 / 100, 1 / 8, 3 / 4])
@pytest.mark.parametrize("steps", [2, 5, 40])
def test_the_drift_is_bounded_where_it_is_known_in_closed_form(curvature, x, steps):
    # Two clients, gradients c w + b and c w - b with noise, from w = 0, where grad f = 0 and sigma_g^2 = b^2.
    lr, b, noise = x / (2.0 * steps), 3.0, 0.7
    mean = variance = total = 0.0
    for _ in range(steps):
        total += mean**2 + variance  # E|w_k - w_0|^2, the same for both
        mean, variance = (1 - lr * curvature) * mean - lr * b, (1 - lr * curvature) ** 2 * variance + lr**2 * noise
    due = convergence_bound(Problem(2.0, noise, b**2, 0.0), lr=lr, local_steps=steps, rounds=1, shares=[1], error=0)
    assert 2.0**2 * total / steps <= due.drift
    if x == 1 / 100:  # where steps are short the lemma gives nothing away
        assert 2.0**2 * total / steps >= 0.9 * due.drift


def test_up_to_an_eighth_the_constants_are_those_of_the_corollary():
    for steps in (1, 2, 5, 50):
        for x in (0.01, 1 / 8):
            lr = x / (2.0 * steps)
            terms = convergence_bound(Problem(2.0, 3, 5, 7), lr=lr, local_steps=steps, rounds=9, shares=[1], error=11)
            assert terms.start <= 2.02 * 7 / (lr * steps * 9)
            assert terms.noise <= 1.16 * 2 * lr * 3
            assert terms.drift <= (2 * lr) ** 2 * (steps - 1) * (0.61 * 3 + 0.41 * steps * 5)
            assert terms.quantization <= 1.01 * 2 * 11 / (lr * steps)


def test_steps_and_shares_outside_the_theorem_are_refused():
    problem = Problem(1.0, 1.0, 1.0, 1.0)
    for lr, steps in ((1.0, 1), (0.2, 5), (0.085, 10)):
        with pytest.raises(ValueError, match="lower lr"):
            convergence_bound(problem, lr=lr, local_steps=steps, rounds=1, shares=[1], error=0)
    with pytest.raises(ValueError, match="shares"):
        convergence_bound(problem, lr=0.01, local_steps=2, rounds=1, shares=[1, 1], error=0)


def test_fedpaq_agrees_with_ours_where_both_apply():
    # One distribution, all clients, q the same for all: FedPAQ's N_1 term is our noise and quantization together,
    # L eta sigma^2 (1 + q) / n with eta = 1 / (L sqrt(T)); ours has 1 / (1 - x), kappa and rho on top.
    problem, q, clients, steps, rounds = Problem(2.0, 3.0, 0.0, 5.0), 0.5, 10, 4, 10**7
    lr = 1 / (2.0 * (steps * rounds) ** 0.5)
    shares, qs = [1 / clients] * clients, [[q]] * clients
    ours = worst_case_bound(problem, lr=lr, local_steps=steps, rounds=rounds, shares=shares, q=qs)
    theirs = fedpaq_bound(
        problem, q=q, clients=clients, participants=clients, local_steps=steps, iterations=steps * rounds
    )
    assert ours == pytest.approx(theirs, rel=0.01)
    # r of n by hand: (2*2*5 + 1.5*3/10*(1 + 10*5/(5*9)))/sqrt(10^4) + 3*11/10*3/10^4.
    half = fedpaq_bound(problem, q=q, clients=10, participants=5, local_steps=4, iterations=10**4)
    assert half == pytest.approx((20 + 0.45 * (1 + 10 / 9)) / 100 + 0.00099)
    # B_2 = .5/10 + 4*5*1.5/(5*9) = .716667, so tau <= (sqrt(B_2^2 + .8) - B_2)/8*100 = 5.37.
    fedpaq_bound(problem, q=q, clients=10, participants=5, local_steps=5, iterations=10**4)
    with pytest.raises(ValueError, match="5.37"):
        fedpaq_bound(problem, q=q, clients=10, participants=5, local_steps=6, iterations=10**4)
