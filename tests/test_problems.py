"""Learning problems: their losses and metrics by hand, and runs of each, with every strategy."""

import json

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import nn

from fedlq_ray import ConfigError, resume, simulate, sweep
from fedlq_ray.config.load import load
from fedlq_ray.data import as_dataset
from fedlq_ray.data import load as load_data
from fedlq_ray.models import FlatModel
from fedlq_ray.problems import Classification, Goal, MultiLabel, Problem, Regression, Tokens, find, score
from fedlq_ray.strategies import STRATEGIES
from fedlq_ray.training.local import evaluate, summarise

SMALL = {"rounds": 2, "tracking": {"uri": None}, "evaluate_every": 2}
FEW = {"count": 4, "cohort": 2, "hosting": "serial"}


def means(problem, outputs, y):
    return summarise(problem, score(problem, outputs, y))


def test_tokens_by_hand():
    y = torch.tensor([[0, 1, -1], [1, -1, -1]])
    outputs = torch.zeros(2, 3, 2)
    outputs[0, 0, 0] = outputs[1, 0, 0] = np.log(3)  # three to one for token 0: right, and wrong
    found = means(Tokens(), outputs, y)
    losses = [np.log(4 / 3), np.log(2), np.log(4)]
    assert found.loss == pytest.approx(np.mean(losses), rel=1e-6)
    assert found.metrics["accuracy"] == pytest.approx(1 / 3)
    assert found.metrics["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-6)
    assert float(Tokens().loss(outputs, y)) == pytest.approx(found.loss, rel=1e-6)  # positions count, not samples


def test_regression_by_hand():
    found = means(Regression(), torch.tensor([[1.0], [4.0]]), torch.tensor([[0.0], [1.0]]))
    assert found.loss == 5 and found.metrics == {"absolute_error": 2, "root_mean_square_error": 5**0.5}


def test_multilabel_by_hand():
    y = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    found = means(MultiLabel(), torch.tensor([[2.0, 2.0, -2.0], [-2.0, -2.0, 2.0]]), y)
    assert found.metrics["micro_f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found.metrics["label_accuracy"] == pytest.approx(4 / 6)
    right, wrong = np.log1p(np.exp(-2)), np.log1p(np.exp(2))
    assert found.loss == pytest.approx((4 * right + 2 * wrong) / 6, rel=1e-6)


def test_a_goal_knows_what_is_better():
    lower = Regression.goal
    assert lower.best([3.0, 1.0, 2.0]) == 1 and Goal().best([0.3, 0.1]) == 0.3 and Goal().best([]) is None
    assert (
        lower.reaches(1, 1) and not lower.reaches(2, 1) and Goal().reaches(0.9, 0.8) and not Goal().reaches(None, 0.8)
    )


RNG = np.random.default_rng(0)
TEXT = RNG.integers(0, 6, (200, 9))
INPUTS = RNG.random((200, 5), np.float32)
DATA = {
    "tokens": (TEXT[:, :-1], TEXT[:, 1:]),
    "regression": (INPUTS, INPUTS @ np.array([1.0, 2, 0, 0, -1])),
    "multilabel": (INPUTS, (INPUTS[:, :3] > 0.5).astype(int)),
}
MODEL = {"tokens": {"name": "lstm", "args": {"hidden": 12, "layers": 1}}}


def arrays(problem):
    x, y = DATA[problem]
    return x[:150], y[:150], x[150:], y[150:]


def run(problem, out, strategy="fedlq", rounds=2, **parts):
    settings = {**SMALL, "rounds": rounds, "clients": FEW, "out": str(out), "target": None, "problem": problem}
    settings |= {"model": {} if "model" in parts else MODEL.get(problem, {}), "strategy": {"name": strategy}}
    settings["data"] = {"partition": "iid"}
    settings["train"] = {"lr": 0.1 if problem != "regression" else 0.01}
    return simulate(settings, data=arrays(problem), **parts)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_runs_on_tokens_and_on_a_frozen_backbone(strategy, tmp_path):
    result = run("tokens", tmp_path / "tokens", strategy)
    assert result.summary["final_accuracy"] is not None and result.history["metrics"].iloc[-1]["perplexity"] > 1
    backbone = nn.Sequential(nn.Linear(5, 400), nn.ReLU(), nn.Linear(400, 1))
    backbone[0].requires_grad_(False)
    frozen = run("regression", tmp_path / "frozen", strategy, model=backbone)
    assert len(frozen.weights) == 401 and frozen.summary["final_absolute_error"] > 0


@pytest.mark.parametrize("problem", DATA)
def test_a_run_has_the_problems_metrics_and_resumes(problem, tmp_path):
    result = run(problem, tmp_path / "a", rounds=4)
    goal = find(problem).goal
    values = [r if goal.metric == "accuracy" else None for r in result.history["accuracy"].dropna()]
    if goal.metric != "accuracy":
        values = [m[goal.metric] for m in result.history["metrics"].dropna()]
        assert result.summary["goal"]["metric"] == goal.metric and "final_accuracy" not in result.summary
    assert result.summary[f"final_{goal.metric}"] == values[-1]
    assert result.summary[f"best_{goal.metric}"] == goal.best(values)
    assert goal.merit(values[-1]) >= goal.merit(values[0])
    for line in (tmp_path / "a/rounds.jsonl").read_text().splitlines()[1::2]:
        assert json.loads(line)["test_loss"] > 0
    stopped = {"rounds": 4, "checkpoint.every_rounds": 1}
    with pytest.raises(RuntimeError):
        run(problem, tmp_path / "b", rounds=4, watch=_stop_after(2))
    again = resume(tmp_path / "b", data=arrays(problem)) if stopped else None
    assert again.summary["weights_sha256"] == result.summary["weights_sha256"]


def _stop_after(rounds):
    seen = []

    def watch(event):
        seen.extend([event] if hasattr(event, "record") else [])
        if len(seen) == rounds:
            raise RuntimeError("stop")

    return watch


def test_accuracy_of_clients_by_hand():
    flat = FlatModel(nn.Sequential(nn.Linear(1, 2)))
    x, y = torch.ones(6, 1), torch.tensor([0, 0, 0, 1, 0, 1])  # logits (x, -x): class 0 for all
    found = evaluate(flat, torch.tensor([1.0, -1.0, 0.0, 0.0]), x, y, clients=np.array(["a", "a", "b", "b", "c", "c"]))
    expected = {"accuracy": 4 / 6, "accuracy_of_clients": 4 / 6, "accuracy_of_worst_clients": 0.5}
    assert found.metrics == pytest.approx(expected) and found.of_clients == {"a": 1.0, "b": 0.5, "c": 0.5}


def test_linear_regression_is_as_good_as_ridge_regression(tmp_path):
    result = simulate(
        load(None, ["data.name=diabetes", "tracking.uri=null", "clients.hosting=serial", f"out={tmp_path}/r"])
    )
    data = load_data("diabetes", problem=Regression())
    x, tests = ((part - data.mean) / data.std for part in (data.x_train, data.x_test))
    ridge = Ridge(alpha=1.0).fit(x, data.y_train)
    error = abs(ridge.predict(tests).reshape(-1) - data.y_test[:, 0]).mean()
    assert result.summary["final_absolute_error"] == pytest.approx(error, rel=0.02)


class Quantile(Regression):
    """Pinball loss, a problem of a user's own."""

    goal = Goal("pinball", higher_is_better=False, percent=False)

    def loss(self, outputs, y):
        error = y - outputs.float()
        return torch.maximum(0.9 * error, -0.1 * error).mean()

    def scores(self, outputs, y):
        error = (y - outputs.float()).double()
        loss = torch.maximum(0.9 * error, -0.1 * error).mean(1)
        return {"loss": loss, "main": loss}


def test_a_problem_of_ones_own(tmp_path, monkeypatch):
    x, y = DATA["regression"]
    settings = {**SMALL, "clients": FEW, "target": None, "out": str(tmp_path / "a"), "rounds": 3}
    settings["data"] = {"partition": "iid"}
    result = simulate(settings, data=(x[:150], y[:150], x[150:], y[150:]), problem=Quantile)
    assert result.summary["final_pinball"] < 1 and result.summary["goal"]["higher_is_better"] is False
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "mine.py").write_text("from fedlq_ray.problems import MultiLabel as Theirs\n")
    assert isinstance(find("mine:Theirs"), MultiLabel)


class NoScalar(Classification):
    def loss(self, outputs, y):
        return (outputs.float().argmax(1) - y).float()


class NoGoal(Classification):
    goal = None


@pytest.mark.parametrize(
    ("problem", "data", "message"),
    [
        ("clasification", None, "problem: no 'clasification'.*did you mean 'classification'"),
        (NoScalar(), None, r"problem: its loss is a tensor of shape \(\d,\); it must be a scalar"),
        (NoGoal, None, "problem: NoGoal has no main metric; set its attribute goal"),
        (nn.Linear, None, "problem"),
        ("tokens", {"x_test": TEXT[150:, :-1] + 4}, r"x_test\[0, \d\] is token \d, but the largest of the training"),
        ("tokens", {"y_train": np.where(TEXT[:150, 1:] < 9, -1, 0)}, r"y_train\[0\] is nothing but padding"),
        ("tokens", {"x_train": TEXT[:150, :-1] - 2}, "x_train must hold tokens, whole numbers from 0"),
        ("multilabel", {"y_test": INPUTS[150:, :3]}, r"y_test\[0, 0\] is 0\.\d+; a label is 1 if the sample has it"),
        ("regression", {"y_train": np.full(150, np.nan)}, r"y_train\[0\] is a NaN"),
        ("regression", {"clients_train": ["a"] * 3}, "clients_train must be one number or text per sample, 150 in all"),
        ("regression", {"clients_train": ["a"] * 150}, "of 1 clients of the data, 1 with 8 samples or more; two"),
    ],
)
def test_what_is_wrong_is_told_in_one_line_and_nothing_is_written(problem, data, message, tmp_path):
    kind = problem if problem in DATA else "multilabel"
    given = dict(zip(("x_train", "y_train", "x_test", "y_test"), arrays(kind), strict=True)) | (data or {})
    if kind not in (problem, "tokens"):
        given |= {"y_train": np.arange(150) % 3, "y_test": np.arange(50) % 3}
    settings = {**SMALL, "clients": FEW, "target": None, "out": str(tmp_path / "a")}
    settings["data"] = {"partition": "natural" if "clients_train" in given else "iid"}
    with pytest.raises(ConfigError, match=message) as told:
        simulate(settings, data=given, problem=problem)
    assert "\n" not in str(told.value) and not (tmp_path / "a").exists()


def test_a_model_must_fit_the_problem(tmp_path):
    with pytest.raises(ConfigError, match=r"returns \(2, 6\) for 2 samples, but the data's 6 tokens need \(2, 8, 6\)"):
        run("tokens", tmp_path / "a", model=nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(32, 6)))


def test_a_target_is_checked_by_problem():
    with pytest.raises(ConfigError, match="target: 93 must be above 0 and at most 1"):
        load(None, ["target=93"])
    assert load(None, ["problem=regression", "target=93"]).target == 93


def test_a_dataset_brings_its_settings_and_what_is_set_wins():
    config = load(None, ["data.name=shakespeare"])
    assert (config.problem, config.target, config.train.batch_size) == ("tokens", None, 4)
    assert load(None, ["data.name=shakespeare", "train.lr=0.5"]).train.lr == 0.5
    other = load(None, ["data.name=shakespeare", "model.name=transformer"])
    assert other.model.args == {} and load(None, ["data.name=shakespeare"]).model.args == {"hidden": 128}
    assert load(None, []).problem == "classification" and load(None, []).target == 0.93


def test_everything_a_problem_is():
    given = as_dataset(arrays("tokens"), problem=Tokens())
    assert given.vocabulary == 6 and given.x_train.dtype == np.int32 and given.input_shape == (8,)
    assert issubclass(Tokens, Problem) and find(Tokens).goal == Goal()


def test_a_sweep_over_links_keeps_the_problems_metric(tmp_path):
    tree = {
        "base": {
            "rounds": 2,
            "data": {"name": "diabetes"},
            "tracking": {"uri": None},
            "clients": {"hosting": "serial"},
        },
        "populations": {"thin": ["clients.profiles=thin"], "mixed": ["clients.profiles=mixed"]},
        "runs": {"u": ["strategy.name=uniform"]},
        "seeds": [0],
    }
    with pytest.warns(UserWarning, match="only its times are recomputed"):
        table = sweep(tree, out=tmp_path / "s").table
    assert len(table) == 2 and table["final_absolute_error"].nunique() == 1
    assert all("goal" in json.loads(file.read_text()) for file in (tmp_path / "s").glob("u@*/summary.json"))
