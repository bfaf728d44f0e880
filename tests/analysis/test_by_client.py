import csv
from statistics import fmean

import numpy as np
import pytest

from fedlq_ray import plots, resume, simulate
from fedlq_ray.analysis import by_client, compare, report, runs
from fedlq_ray.problems import Goal, Regression
from fedlq_ray.runs import rundir

NAMES = ["a, b", "é", *"cdefghijkl"]


def data(*, owners=True, regression=False):
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 6))

    def draw(n):
        y = rng.integers(0, 3, n)
        x = centres[y] + rng.normal(size=(n, 6)) * (0.5 + np.arange(n)[:, None] % 12 / 6)
        return x.astype(np.float32), y.astype(np.float32) if regression else y

    made = dict(zip(("x_train", "y_train", "x_test", "y_test"), (*draw(600), *draw(240)), strict=True))
    for key, n in (("clients_train", 600), ("clients_test", 240)) if owners else ():
        made[key] = [NAMES[i % 12] for i in range(n)]
    return made


def run(out, given, watch=None, uri=None, problem=None, **settings):
    clients = {"count": 12, "cohort": 4, "hosting": "serial"}
    settings = {"rounds": 3, "target": None, "evaluate_every": 2, **settings}
    settings |= {"clients": clients, "tracking": {"uri": uri}, "out": str(out)}
    return simulate(settings, data=given, watch=watch, problem=problem)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "a", data())


def table(folder):
    with (folder / "test_clients.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_table_has_what_the_last_evaluation_averaged(whole):
    rows, last = table(whole.path), rundir.journal(whole.path)[-1]
    assert [row["client"] for row in rows] == sorted(NAMES) and {row["samples"] for row in rows} == {"20"}
    values = [float(row["accuracy"]) for row in rows]
    assert fmean(values) == last.metrics["accuracy_of_clients"]
    assert min(values) == last.metrics["accuracy_of_worst_clients"]  # a tenth of twelve is one
    assert fmean(values) == pytest.approx(last.accuracy)  # all have as many samples
    assert plots.test_clients(whole.path, Goal()) == sorted(values)


def test_a_resumed_run_has_the_same_table(whole, tmp_path):
    def stop(event):
        if getattr(event, "record", None) is not None and event.record.round == 1:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        run(tmp_path / "b", data(), stop, checkpoint={"every_rounds": 1})
    assert not (tmp_path / "b/test_clients.csv").exists()
    resume(tmp_path / "b", data=data())
    assert (tmp_path / "b/test_clients.csv").read_bytes() == (whole.path / "test_clients.csv").read_bytes()


@pytest.mark.parametrize(("owners", "on"), [(False, "test"), (True, "holdout")])
def test_without_clients_of_test_samples_there_is_no_table_and_no_picture(owners, on, tmp_path):
    result = run(tmp_path / "c", data(owners=owners), evaluate_on=on)
    assert not (result.path / "test_clients.csv").exists()
    found = runs.find([str(result.path)], None, tmp_path / "scratch")
    assert by_client.shown(found.runs) is None


def test_the_report_says_mean_and_worst_tenth(whole, tmp_path):
    found = runs.find([str(whole.path)], None, tmp_path / "scratch")
    shown = by_client.shown(found.runs)
    values = [float(row["accuracy"]) for row in table(whole.path)]
    assert f"mean {fmean(values):.2%}, worst tenth {min(values):.2%}" in shown.title and "12 clients" in shown.caption
    told = {text.get_text() for text in shown.figure.axes[0].texts}
    assert f"worst tenth {100 * min(values):.3g} %" in told
    (steps,) = (part for part in shown.figure.axes[0].patches if hasattr(part, "get_data"))
    assert steps.get_data().values.tolist() == [100 * value for value in sorted(values)]
    plots.plt.close(shown.figure)
    assert "Accuracy per client" in report.page(found, compare.rows(found), {}, "")


class Pinball(Regression):
    goal = Goal("pinball", higher_is_better=False, percent=False)

    def metrics(self, means):
        return {"pinball": means["loss"]}


def test_an_own_problems_worst_clients_have_the_largest_error_and_mlflow_gets_the_picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = data(regression=True)
    settings = {"train": {"lr": 0.01}, "data": {"partition": "iid"}}
    result = run(tmp_path / "d", given, uri="sqlite:///m.db", problem=Pinball(), **settings)
    goal = Pinball.goal
    values = plots.test_clients(result.path, goal)
    assert values == sorted(values, reverse=True) and goal.worst(values) == [max(values)]
    assert {"test_clients.csv", "test_clients.png"} <= {file.name for file in tmp_path.glob("mlruns/*/artifacts/*")}
