"""The report: one file that needs no other, well formed, with figures described; and its commands repeat the runs."""

import itertools
import json
import re
import shlex
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest

from fedlq_ray import plots, simulate
from fedlq_ray.analysis import bound, compare, figures, report, runs, svg
from fedlq_ray.config.load import digest, load
from fedlq_ray.problems import Goal

QUICK = ["rounds=4", "clients.hosting=serial", "clients.count=8", "clients.cohort=4", "tracking.uri=null"]
SETTINGS = {
    "fedavg": ["strategy.name=fedavg"],
    "fedlq": ["strategy.name=fedlq", "strategy.probe_every=2", "strategy.probe_samples=64"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two strategies, two seeds."""
    made = tmp_path_factory.mktemp("runs")
    for label, settings in SETTINGS.items():
        for seed in (0, 1):
            simulate(load(None, [*QUICK, *settings, f"seed={seed}", f"out={made}/{label}-{seed}", "target=0.3"]))
    return made


@pytest.fixture(scope="module")
def outcome(folder, tmp_path_factory):
    return runs.find([str(folder)], None, tmp_path_factory.mktemp("scratch"))


@pytest.fixture(scope="module")
def page(outcome):
    return report.page(outcome, compare.rows(outcome), {}, "fedlq report <it>")


class Reader(HTMLParser):
    """Tags that are open, ids, and what an element refers to."""

    VOID = ("meta", "path", "use", "image", "rect", "line", "br")

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.refers, self.labels, self.headings = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.open += [tag] if tag not in self.VOID else []
        self.ids += [given["id"]] if "id" in given else []
        self.refers += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.refers += [
            f"#{found}" for value in given.values() for found in re.findall(r"url\(#([^)]*)\)", value or "")
        ]
        self.labels += [given.get("aria-label")] if tag == "svg" else []

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_and_needs_no_network(page):
    reader = Reader()
    reader.feed(page)
    assert not reader.open and len(reader.ids) == len(set(reader.ids))
    inside = {f"#{name}" for name in reader.ids}
    assert all(found in inside or found.startswith("data:image/png;base64,") for found in reader.refers)
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)
    assert len(reader.labels) == 11 and all(label and len(label) > 40 for label in reader.labels)
    assert "fedlq report &lt;it&gt;" in page and "<it>" not in page
    assert len(page) < 400_000


def test_figures_have_the_pages_colours_and_the_page_has_each_of_them(page):
    style, body = page.split("</style>", 1)
    assert not re.search(r"(stroke|fill): #0072b2", body)
    used = set(re.findall(r"var\(--([\w-]+)\)", page))
    for theme in (style.split("@media")[0], style.split("@media")[1], style.split("@media print")[1]):
        assert used <= set(re.findall(r"--([\w-]+):", theme))


def luminance(colour):
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def contrast(one, other):
    """WCAG 2's contrast ratio."""
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_text_can_be_read_and_lines_be_seen_on_both_grounds(page):
    for theme in page.split("</style>")[0].split("@media (max-width")[0].split("@media (prefers"):
        colour = dict(re.findall(r"--([\w-]+): (#\w{6})", theme))
        for ground in ("page", "card"):
            for name in ("ink", "muted", *(f"run-{i}" for i in range(len(plots.COLOURS)))):  # runs' names are text
                assert contrast(colour[name], colour[ground]) >= 4.5, (name, ground)
            for name in plots.STEPS:
                assert contrast(colour[name], colour[ground]) >= 2.9, (name, ground)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


def test_the_command_of_a_run_gives_the_same_settings(outcome):
    for seeds in outcome.runs.values():
        for run in seeds:
            _, _, *settings = shlex.split(report.repeat(run.config))
            assert digest(load(None, settings)) == digest(run.config)


def test_a_sweeps_own_command_is_told_where_there_is_one(folder, outcome):
    assert "fedlq run " in report.page(outcome, compare.rows(outcome), {}, "")
    compare.save([], "runs: {a: []}", "fedlq sweep x.yaml", folder / "table.json")
    told = report.page(outcome, compare.rows(outcome), {}, "")
    (folder / "table.json").unlink()
    assert "fedlq sweep x.yaml" in told and "runs: {a: []}" in told and "fedlq run " not in told


def test_bits_by_client_are_those_of_its_payload_and_who_varies_is_drawn(outcome):
    shown, told = figures.bits(outcome.runs)
    assert [one.title.split(":")[0] for one in shown] == ["fedlq"] * 3 and told[0].startswith("fedavg sends 32")
    run = outcome.runs["fedavg"][0]
    found = figures._client_bits(run)
    for column, record in enumerate(run.records):
        assert list(np.flatnonzero(np.isfinite(found[:, column]))) == sorted(record.cohort)
    assert np.nanmean(found) == pytest.approx(32, rel=0.01)


def test_bits_by_layer_and_client_are_means_over_its_rounds_and_journals_without_them_are_read(outcome):
    run = outcome.runs["fedlq"][0]
    layers, by_round = figures._layer_bits(run)
    found = figures._layer_client_bits(run, layers)
    for client in range(run.config.clients.count):
        rounds = [r for r in run.records if client in r.answered]
        for row, layer in enumerate(layers):
            sent = [r.client_bits_per_parameter[layer][r.cohort.index(client)] for r in rounds]
            assert found[row, client] == pytest.approx(np.mean(sent)) if sent else np.isnan(found[row, client])
    for column, record in enumerate(run.records):  # the mean over who answered is what the round's record has
        for row, layer in enumerate(layers):
            sent = [bits for bits in record.client_bits_per_parameter[layer] if bits is not None]
            assert by_round[row, column] == pytest.approx(np.mean(sent), rel=0.01)
    old = [replace(r, client_bits_per_parameter={}) for r in run.records]
    shown, _ = figures.bits({"fedlq": [run._replace(records=old)]})
    assert len(shown) == 2


def test_the_straggler_is_who_takes_longest_and_its_step_is_told(outcome):
    run = outcome.runs["fedavg"][0]
    (shown, *_) = figures.timelines({"fedavg": [run]})
    lengths = np.diff([record.sim_time_s for record in run.records], prepend=0.0)
    (round,) = [int(n) - 1 for n in re.findall(r"ends round (\d+)", shown.title)]
    assert lengths[round] == sorted(lengths)[len(lengths) // 2]
    record = run.records[round]
    uploads, computes = record.client_upload_s, record.client_compute_s
    slowest = int(np.argmax(np.add(uploads, computes)))
    cause, seconds = max(("upload", uploads[slowest]), ("compute", computes[slowest]), key=lambda one: one[1])
    assert f"client {record.cohort[slowest]} ends" in shown.title
    assert f"{seconds / lengths[round]:.0%} of it {cause}" in shown.title


def test_the_bounds_charge_is_theorem_1s_term_and_pairs_are_counted_where_seeds_agree(outcome):
    run = outcome.runs["fedlq"][1]
    (charge,), (loss,) = bound._means([run], 3)
    terms, sizes = [], [client["samples"] for client in figures.clients_of(run)]
    for record in run.records[:3]:
        steps = {c: run.config.train.local_epochs * -(-sizes[c] // run.config.train.batch_size) for c in record.cohort}
        mean = sum(sizes[c] * steps[c] for c in steps) / sum(sizes[c] for c in steps)
        terms.append(record.quantization_error**2 / (run.config.train.lr * mean))
    assert charge == pytest.approx(np.mean(terms)) and charge > 0
    assert loss == pytest.approx(np.mean([record.train_loss for record in run.records[:3]]))
    shown = bound.shown(outcome.runs)
    plots.plt.close(shown.figure)
    assert (
        "Outside the theorem: sampled cohorts, clients with more steps than others." in shown.caption
        and "Hollow" not in shown.caption
    )
    one, two = outcome.runs["fedavg"]
    shown = bound.shown({"fedavg": [one, two], "fedlq": [run, run._replace(summary=None)]})
    plots.plt.close(shown.figure)  # seed 1 is common to both
    assert "rounds, of seed 1." in shown.caption and "by one seed" in shown.title
    nothing = run._replace(records=[replace(record, quantization_error=None) for record in run.records])
    assert bound.shown({"fedavg": outcome.runs["fedavg"], "votes": [nothing]}) is None
    charged = {"a": ([0, 0], [1.0, 1.2]), "b": ([1, 1], [1.1, 1.3]), "c": ([2, 2], [1.3, 1.0]), "d": ([3, 3], [0.9, 1])}
    known = {name: (np.array(x, float), np.array(y, float)) for name, (x, y) in charged.items()}
    assert "in 1 of 3 pairs of runs that the seeds distinguish" in bound._title(known)  # c differs from nobody surely
    assert bound._title({"c": known["c"], "a": known["a"]}).startswith("No two runs")


def test_clients_who_never_sent_and_folders_without_clients_are_drawn(outcome, tmp_path):
    run = outcome.runs["fedlq"][0]
    fastest = np.argsort([-client["uplink_mbps"] for client in figures.clients_of(run)])[:4].tolist()
    records = []
    for record in run.records:  # the slower half is in no cohort
        kept = [i for i, client in enumerate(record.cohort) if client in fastest]
        cut = {key: [getattr(record, key)[i] for i in kept] for key in ("cohort", "client_uplink_bytes")}
        layers = {k: [v[i] for i in kept] for k, v in record.client_bits_per_parameter.items()}
        records.append(replace(record, **cut, client_bits_per_parameter=layers))
    shown, _ = figures.bits({"fedlq": [run._replace(records=records)]})
    assert [one.title.split(":")[1] for one in shown][1:] == [" bits per parameter by client"]
    shutil.copy(run.folder / "model.safetensors", tmp_path)
    shown += figures.bits({"fedlq": [run._replace(folder=tmp_path)]})[0]
    assert len(shown) == 5 and not figures.clients_of(run._replace(folder=tmp_path))
    for one in shown:
        plots.plt.close(one.figure)


def test_titles_say_who_arrived_and_when(outcome):
    runs_ = dict(outcome.runs)
    times = {label: [figures._first(run, 0.3, "time", Goal()) for run in seeds] for label, seeds in runs_.items()}
    shown = figures.accuracy(runs_, "time")
    plots.plt.close(shown.figure)
    arrived = {label: np.mean(found) for label, found in times.items() if None not in found}
    assert arrived  # 0.3 is low enough
    soonest = min(arrived, key=arrived.get)
    assert shown.title.startswith(f"{soonest} reaches 30 % after {arrived[soonest]:.3g} s")


def test_findings_claim_only_what_the_intervals_bear():
    gains = {"fedavg": (0.0, 0.0, 0.0), "sure": (0.02, 0.01, 0.03), "unsure": (0.02, -0.01, 0.05)}
    values = {"time_to_target_s": compare.Spread(None, None)}
    made = [
        compare.Row(
            run=run, tuned=None, seeds=3, failed=0, values=values, targets={}, bits_per_parameter=None, by_seed=[],
            reference="fedavg", accuracy_gain=compare.Interval(*gain), front=True,
        )
        for run, gain in gains.items()
    ]  # fmt: skip
    told = " ".join(report.findings(made, 0.8))
    assert "No run reached 80 %" in told and "sure differs from fedavg by +2.0 (+1.0 to +3.0) points" in told
    assert "3 seeds do not distinguish unsure from fedavg" in told


def test_an_unfinished_run_and_one_without_clients_are_no_fault(folder, tmp_path):
    for name in ("fedavg-0", "fedlq-0"):
        (tmp_path / name).mkdir()
        for file in ("config.yaml", "rounds.jsonl"):
            (tmp_path / name / file).write_bytes((folder / name / file).read_bytes())
    (tmp_path / "fedlq-0/rounds.jsonl").write_text("")
    found = runs.find([str(tmp_path)], None, tmp_path / "scratch")
    told = report.page(found, compare.rows(found), {}, "")
    assert "1 of 1" in told and "not recorded" in told


@pytest.mark.parametrize("scale", ["linear", "log"])
def test_labels_of_lines_do_not_lie_on_each_other(scale):
    figure, axis = figures.canvas(3.0)
    axis.set(xlim=(0, 10), ylim=(0.01, 1), yscale=scale)
    close = [(9.0, 0.5 + 0.001 * i, f"run {i}", "#000000") for i in range(5)]
    plots.name_ends(axis, [*close, (1.0, 0.5, "alone", "#000000")])
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in axis.texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    offsets = {text.get_text(): text.xyann[1] for text in axis.texts}
    assert offsets.pop("alone") == 0 and np.mean(list(offsets.values())) == pytest.approx(0, abs=1e-6)
    axis.set_xticks([0.0], ["0.00125"])
    drawn = svg.inline(figure, "x", "alt of 0.00125")
    assert ">0.00125</text>" in drawn and "alt of 0.00125" in drawn and not re.search(r'="-?\d+\.\d{3}', drawn)
    assert drawn == drawn.strip() and drawn.startswith("<svg viewBox=") and "run 3</text>" in drawn


def test_the_table_of_a_run_is_kept_with_what_made_it(folder):
    timing = json.loads((folder / "fedavg-0/timing.json").read_text())
    assert {"versions", "commit", "machine"} == set(timing["made_by"])
