"""What a run will take, before it is trained: bytes and simulated seconds of a step, wall time and memory."""

import os
import resource
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from fedlq_ray.config.load import Config, parse
from fedlq_ray.errors import FedLQError
from fedlq_ray.federation.flight import least_bytes, samples
from fedlq_ray.federation.planning import Rules
from fedlq_ray.federation.rounds import begin
from fedlq_ray.federation.selections import SELECTIONS
from fedlq_ray.federation.task import Job, Parts, Task, Worker
from fedlq_ray.quantization import decode
from fedlq_ray.runs.ceiling import Ceiling, Stepped, ceiling, rules_of, walk
from fedlq_ray.runs.simulation import checked
from fedlq_ray.strategies import Strategy, make
from fedlq_ray.training.device import reproducible
from fedlq_ray.training.local import Plan, evaluate

Known = Literal["exactly", "at most", "about"]  # in order
KNOWN: tuple[Known, ...] = ("exactly", "at most", "about")
BATCHES, EVALUATED = 20, 500  # how much is trained and evaluated to measure wall time
STEP_FIGURES = ("uplink_bytes", "downlink_bytes", "seconds")


class Trial(NamedTuple):
    """One client's first round, cut short, and an evaluation, measured here.

    Attributes:
        payload_bytes: of what it sends.
        memory_bytes: of what the client keeps between rounds.
        sample_s, evaluated_s: wall seconds per sample of training and of evaluation.
        encode_s, decode_s: wall seconds of coding its payload.
    """

    payload_bytes: int
    memory_bytes: int
    sample_s: float
    evaluated_s: float
    encode_s: float
    decode_s: float


@dataclass(frozen=True)
class Forecast:
    """What a run will take.

    Attributes:
        ceiling: what compression can gain; None if it is not known.
        known: how well bytes and seconds of a step are known: exactly, at most, or about.
        steps: how many steps of the server were looked at.
        turn: what a step is called: round, or step.
        uplink_bytes, downlink_bytes, seconds: of a step, mean over these; seconds are simulated.
        payload_bytes: the smallest, median and largest payload.
        rounds: of the whole run.
        wall_s, memory_bytes: of the whole run on this machine, about; None if it cannot train here.
        workers: processes that train clients at the same time.
        notes: sentences on what the figures leave out.
    """

    ceiling: Ceiling | None
    known: Known
    steps: int
    turn: str
    uplink_bytes: float
    downlink_bytes: float
    seconds: float
    payload_bytes: tuple[float, float, float]
    rounds: int
    wall_s: float | None
    memory_bytes: float | None
    workers: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """A plain mapping."""
        found = asdict(self) | {"payload_bytes": list(self.payload_bytes), "notes": list(self.notes)}
        if self.ceiling:
            ratios = self.ceiling.ratios._asdict()
            found["ceiling"] = asdict(self.ceiling) | {"ratios": ratios, "gain": self.ceiling.gain}
        return found


class Sizes:
    """The bytes of a job's payload before anything is trained, as far as its plan and one client's trial say.

    Attributes:
        known: the least certain answer so far.
    """

    def __init__(self, task: Task, learns: bool) -> None:
        self.here, self.learns = here(task), learns
        self.known: Known = "exactly" if task.config.network.downlink_bits is None else "at most"
        self.trial: Trial | None = None
        self._seen: dict[int, tuple[Plan, int]] = {}

    def __call__(self, job: Job) -> int:
        self.trial = self.trial or tried(self.here, job)
        known = self._seen.get(id(job.plan))
        if known is None or known[0] is not job.plan:
            known = self._seen[id(job.plan)] = job.plan, self._of(job.plan)
        return known[1]

    def _of(self, plan: Plan) -> int:
        budget = getattr(plan.segments, "budget", None)
        if budget is not None:
            self._at_best("at most")
            return max(least_bytes(plan), int(budget))
        if not callable(plan.segments) and all(s.quantizer.size(s.stop - s.start) is not None for s in plan.segments):
            self._at_best("about" if self.learns else "exactly")
            return least_bytes(plan)
        self._at_best("about")
        return max(least_bytes(plan), self.trial.payload_bytes if self.trial else 0)

    def _at_best(self, known: Known) -> None:
        self.known = max(self.known, known, key=KNOWN.index)


def here(task: Task) -> Task:
    """The task on a device that this machine has."""
    train = task.config.train
    if train.device == "cpu" or torch.cuda.is_available():
        return task
    return replace(task, config=task.config.model_copy(update={"train": train.model_copy(update={"device": "cpu"})}))


def tried(task: Task, job: Job) -> Trial:
    """Trains a client for a few batches, codes its payload, and evaluates a few samples."""
    worker, device = Worker(task), task.config.train.device
    weights, batch = worker.initial_weights(), task.config.train.batch_size
    with reproducible(device):
        worker.train(replace(job, samples=min(job.samples, batch)), weights, None)  # what is built on first use
        count, started = min(job.samples, BATCHES * batch), time.perf_counter()
        reply, memory = worker.train(replace(job, samples=count), weights, None)
        trained_s = time.perf_counter() - started - reply.encode_s
        started = time.perf_counter()
        decode(
            reply.payload,
            len(weights),
            kind=job.plan.payload,
            custom=task.quantizer,
            round=job.round,
            client=job.client,
        )
        decode_s, started = time.perf_counter() - started, time.perf_counter()
        x, y = worker.normalise(task.data.x_test[:EVALUATED]), torch.from_numpy(task.data.y_test[:EVALUATED].copy())
        evaluate(worker.model, weights, x, y.to(worker.model.device), task.problem)
        evaluated_s = (time.perf_counter() - started) / len(x)
    kept = 0 if memory is None else memory.nbytes
    return Trial(len(reply.payload), kept, trained_s / count, evaluated_s, reply.encode_s, decode_s)


def forecast(config: Config | Mapping[str, Any] | None = None, parts: Parts = Parts()) -> Forecast:
    """See `fedlq_ray.plan`."""
    config = config if isinstance(config, Config) else parse({} if config is None else config)
    task = checked(config, parts)
    strategy = make(Worker(task).context, parts.strategy)
    rules = rules_of(task, strategy)
    sizes = Sizes(task, learns=type(strategy).learn is not Strategy.learn)
    steps = walk(rules, sizes)
    most, failed = None, None
    try:
        most = ceiling(task)
    except FedLQError as exc:
        failed = f"The ceiling is not known: {exc}."
    payloads = [float(size) for step in steps for size in step.sizes]
    up, down = ([sum(getattr(e, key) for e in step.ended) for step in steps] for key in STEP_FIGURES[:2])
    workers = workers_of(task)
    return Forecast(
        ceiling=most,
        known=sizes.known,
        steps=len(steps),
        turn=config.turn,
        uplink_bytes=statistics.fmean(up),
        downlink_bytes=statistics.fmean(down),
        seconds=statistics.fmean(step.seconds for step in steps),
        payload_bytes=(min(payloads), statistics.median(payloads), max(payloads)) if payloads else (0.0, 0.0, 0.0),
        rounds=config.rounds,
        wall_s=sizes.trial and wall_s(rules, steps, sizes.trial, workers) if sizes.here is task else None,
        memory_bytes=sizes.trial and memory_bytes(task, sizes.trial, workers),
        workers=workers,
        notes=(*([failed] if failed else ()), *notes(rules, sizes)),
    )


def workers_of(task: Task) -> int:
    """How many processes train clients here; `auto` is taken as `packed`."""
    clients = task.clients
    if clients.hosting == "serial":
        return 1
    if clients.hosting == "dedicated":
        return clients.count
    return clients.actors or min(clients.count, os.cpu_count() or 1)


def wall_s(rules: Rules, steps: Sequence[Stepped], trial: Trial, workers: int) -> float:
    """Wall seconds of a whole run on this machine, without its start."""
    task, config = rules.task, rules.task.config
    jobs = [e.flight for step in steps for e in step.ended if e.flight.job]
    trained = trial.sample_s * sum(samples(task, flight) for flight in jobs) + trial.encode_s * len(jobs)
    tested = len(task.data.y_test) if config.evaluate_on == "test" else sum(map(len, task.held))
    evaluations = -(-config.rounds // config.evaluate_every)
    state, probed = begin(task, rules.strategy), 0
    for step in range(len(steps)):
        if wanted := rules.ask("probe", step, state.strategy, step):
            probed += wanted.samples * len(wanted.quantizers) * len(rules.downlink.context.quantized)
    at_once = min(workers, os.cpu_count() or 1)
    each = (trained + trial.evaluated_s * probed) / at_once + trial.decode_s * len(jobs)
    return each * config.rounds / len(steps) + trial.evaluated_s * tested * evaluations / at_once


def memory_bytes(task: Task, trial: Trial, workers: int) -> float:
    """Memory of a run at its peak: this process now, the clients' memories and models, and actors."""
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    asked = min(task.clients.count, task.clients.cohort * task.config.rounds)
    network, size = task.config.network, 4 * task.layers[-1].stop
    held = size if network.downlink_bits is not None and network.downlink == "own" else 0
    total = float(rss) + asked * (trial.memory_bytes + held)
    if task.config.clients.hosting != "serial":
        from fedlq_ray.hosts.ray.choose import actor_bytes  # it imports Ray

        total += workers * actor_bytes(task)
    return total


def notes(rules: Rules, sizes: Sizes) -> list[str]:
    """What the figures leave out, one sentence each."""
    task, config = rules.task, rules.task.config
    told = []
    if sizes.known == "about" and sizes.learns:
        told.append("The scheme learns: bytes and seconds are those of its plans before it has learned anything.")
    elif sizes.known == "about":
        told.append("Sizes depend on the values: bytes and seconds take those of one client's first update.")
    if config.network.downlink_bits is not None:
        told.append(
            "The downlink is coded: clients fetch at most what its rate allows, and nothing in the first round."
        )
    if config.clients.selection not in SELECTIONS:
        told.append("Clients are drawn at random here: your selection is not asked.")
    elif config.clients.selection != "random":
        told.append(f"The selection {config.clients.selection} learns: its choices are those before it has learned.")
    if config.network.bandwidth is not None:
        told.append("Ratios take the rates of the profiles; seconds take those of network.bandwidth.")
    if config.server.deadline_s is not None:
        told.append(
            "A deadline ends steps: compression also brings more updates into a step, which no figure here has."
        )
    if not config.synchronous:
        told.append("Steps do not wait for all: figures are per step, and leave out what staleness costs.")
    if config.stop_at_target:
        told.append("The run may end earlier, at its target.")
    if sizes.here is not task:
        told.append("PyTorch finds no GPU here, so that the wall time is not known.")
    if config.clients.hosting == "auto":
        told.append("Wall time and memory assume packed hosting.")
    return told
