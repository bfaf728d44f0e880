"""A user's strategy that does something wrong ends the run with one message; a run's folder keeps what was there."""

import math
from dataclasses import replace

import pytest
import torch

from fedlq_ray import Config, ConfigError, FedLQError, simulate
from fedlq_ray.strategies import Strategy


class Plain(Strategy):
    def __init__(self, context) -> None:
        self.context = context

    def plan(self, state, round, cohort):
        return {m.client: self.context.at_levels([4] * len(self.context.quantized)) for m in cohort}


def run(tmp_path, strategy):
    config = Config(
        rounds=1,
        out=tmp_path / "r",
        clients={"count": 6, "cohort": 3, "hosting": "serial"},
        train={"max_samples": 16},
        tracking={"uri": None},
    )
    return simulate(config, strategy=strategy)


def planning(**changes):
    def plan(self, state, round, cohort):
        return {c: replace(plan, **changes) for c, plan in Plain.plan(self, state, round, cohort).items()}

    return plan


WRONG = {
    "plan": [
        (lambda self, *a: 1 / 0, r"plan failed: ZeroDivisionError: division by zero"),
        (lambda self, *a: None, r"plan returned a NoneType, but must return a dict of plans by client"),
        (
            lambda self, state, round, cohort: {cohort[0].client: 4},
            r"plan returned a int for client \d; it must return a Plan",
        ),
        *(
            (planning(weight=w), rf"plan gave client \d the weight {w}; it must be above 0")
            for w in (0, -1.0, math.nan)
        ),
        (planning(payload="weights"), r"plan gave client \d payload='weights', .*; payloads are update and model"),
        (planning(error_feedback="ef22"), r"plan gave client \d .*error_feedback='ef22'; .* a bool, ef21 or cafe"),
    ],
    "combine": [
        (
            lambda self, state, update: update[:5],
            r"combine must return a tensor \(\d+,\) torch\.float32, and returned \(5,\)",
        ),
        (lambda self, state, update: update.tolist(), r"combine must return a tensor .*, and returned a list"),
    ],
    "report": [
        (lambda self, state: {"x": torch.ones(2)}, r"report must return plain finite numbers.*Tensor"),
        (lambda self, state: {"x": math.inf}, r"report must return plain finite numbers"),
    ],
    "learn": [
        (lambda self, *a: {}["x"], r"learn failed: KeyError: 'x'"),
        (lambda self, *a: 3, r"learn returned a int; it must return the next state, a NoneType as before"),
    ],
    "init": [(lambda self: 1 / 0, r"init failed: ZeroDivisionError")],
    "probe": [(lambda self, state, round: int("x"), r"probe failed: ValueError: invalid literal")],
}


@pytest.mark.parametrize(("method", "number"), [(m, n) for m, cases in WRONG.items() for n in range(len(cases))])
def test_what_a_strategy_does_wrong_is_one_message(method, number, tmp_path):
    own, message = WRONG[method][number]
    with pytest.raises(FedLQError, match=rf"^round 0: Own\.{message}"):
        run(tmp_path, type("Own", (Plain,), {method: own}))


def test_a_strategy_without_the_base_class_is_refused(tmp_path):
    class Bare:
        plan = Plain.plan

    with pytest.raises(ConfigError, match=r"^strategy\.name: Bare has no .*, .*; derive it from fedlq_ray"):
        run(tmp_path, Bare())
    assert not (tmp_path / "r").exists()
