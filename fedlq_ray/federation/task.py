"""The task of an experiment, built and checked from a configuration before anything is written or started."""

import copy
import functools
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedlq_ray.config.load import Config
from fedlq_ray.config.settings import ClientsConfig
from fedlq_ray.data import Dataset, GivenData, Split, as_dataset, hold_out, inputs, load, partition
from fedlq_ray.errors import ConfigError, FedLQError
from fedlq_ray.federation.availability import Always, Availability, availability
from fedlq_ray.federation.bandwidth import Bandwidth, bandwidth
from fedlq_ray.federation.profiles import Profile, load_profiles
from fedlq_ray.federation.trial import try_step
from fedlq_ray.files import expand
from fedlq_ray.models import MODELS, FlatModel, GivenModel, Layer, build, training_flops
from fedlq_ray.problems import Classification, GivenProblem, Problem
from fedlq_ray.problems import find as find_problem
from fedlq_ray.quantization import LAYER_HEADER, PAYLOAD_HEADER, Family, GivenQuantizer, family
from fedlq_ray.seeding import numpy_rng, seeded
from fedlq_ray.significance import Measurement, gather, in_blocks, measure
from fedlq_ray.strategies import GivenStrategy, Probe, StrategyContext
from fedlq_ray.training import own
from fedlq_ray.training.augment import require_images
from fedlq_ray.training.local import Evaluation, Plan, Reply, Trainer, client_round, evaluate
from fedlq_ray.training.own import GivenLocal, Local, OwnTraining
from fedlq_ray.training.payloads import MEMORIES
from fedlq_ray.training.sgd import LocalSGD


@dataclass(frozen=True)
class Task:
    """Everything that is constant over rounds. It is pickled, so that every process has the same.

    Attributes:
        shards, held: each client's indices into the training data, to train on and held out.
        builtin: whether the model is one of this package's.
        flops: of the forward and backward pass of one sample.
        problem: what clients train for.
        statistics: names of the buffers that training changes, which are sent like parameters.
        names: the clients' ids, if the data has them.
        notes: sentences on how the data and the clients' availability were read.
        local: the user's own local training, if any.
    """

    config: Config
    data: Dataset
    shards: list[NDArray[np.int64]]
    held: list[NDArray[np.int64]]
    profiles: list[Profile]
    module: nn.Module
    layers: tuple[Layer, ...]
    builtin: bool
    flops: float
    quantizer: Family
    problem: Problem = Classification()
    statistics: frozenset[str] = frozenset()
    names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    local: Local | None = None
    availability: Availability = Always()
    bandwidth: Bandwidth = Bandwidth()

    @property
    def always_available(self) -> bool:
        return isinstance(self.availability, Always)

    def flat_model(self, device: str = "cpu") -> FlatModel:
        """A copy of the model, flat, with its initial weights."""
        return FlatModel(copy.deepcopy(self.module), device, self.statistics)

    @functools.cached_property
    def clients(self) -> ClientsConfig:
        """The settings of clients, with the number that the data led to: `data.partition=natural` may have fewer."""
        return self.config.clients.model_copy(update={"count": len(self.shards)})

    @property
    def test_clients(self) -> NDArray[np.str_] | None:
        """Whose each test sample is, (n,); None if they belong to nobody, or evaluations are of other samples."""
        return self.data.clients_test if self.config.evaluate_on == "test" else None

    @functools.cached_property
    def frozen_digest(self) -> str | None:
        """16 hex digits that change with any frozen parameter; None without frozen parameters."""
        frozen = [(name, p) for name, p in self.module.named_parameters() if not p.requires_grad]
        whole = hashlib.sha256()
        for name, parameter in frozen:
            whole.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
            whole.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        return whole.hexdigest()[:16] if frozen else None

    @functools.cached_property
    def data_digest(self) -> str:
        """The digest of `data`, computed once: large data take seconds."""
        return self.data.digest()


@dataclass(frozen=True)
class Parts:
    """A caller's own objects in place of those that the configuration names (`fedlq_ray.simulate`); None: as named."""

    model: GivenModel | None = None
    data: GivenData | None = None
    strategy: GivenStrategy | None = None
    quantizer: GivenQuantizer | None = None
    problem: GivenProblem | None = None
    local: GivenLocal | None = None


def prepare(config: Config, parts: Parts = Parts()) -> Task:
    """Loads, splits and builds everything that `config` names, but for the parts that are given.

    Raises:
        ConfigError: the user's input is wrong.
    """
    expand(config.checkpoint.path or "", "checkpoint.path")
    how = config.data
    local = own.find(config.train.local if parts.local is None else parts.local)
    own.require_fits(local, config.train, config.strategy.error_feedback)
    problem = find_problem(config.problem if parts.problem is None else parts.problem)
    with seeded(config.seed, "data"):  # a user's function may draw from global generators
        if parts.data is not None:
            dataset = as_dataset(parts.data, layout=how.layout, problem=problem)
        else:
            dataset = load(how.name, how.path, how.args, how.layout, problem)
    require_images(config.train.augment, dataset.input_shape)
    count, strata = len(dataset.y_train), problem.strata(dataset.y_train)
    split = partition(count, strata, dataset.clients_train, how, clients=config.clients.count, seed=config.seed)
    _require_cohort(config, split)
    kept, held = hold_out(split.shards, how.holdout, config.seed)
    profiles = load_profiles(
        config.clients.profiles, count=len(split.shards), seed=config.seed, variation=config.clients.variation
    )
    names = None if split.names is None else tuple(split.names)
    available, said = availability(config, len(split.shards), names)
    named = config.model.name if parts.model is None else parts.model
    with seeded(config.seed, "weights"):
        wanted = problem.output_shape(dataset.y_train[:2], dataset.num_classes)[1:]
        module = build(
            named, dataset.input_shape, dataset.num_classes, config.model.args,
            vocabulary=dataset.vocabulary, output_shape=wanted,
        )  # fmt: skip
        if local is not None:
            own.set_up(local, module)
    with seeded(config.seed, "trial"):
        statistics = try_step(module, dataset, kept, config, problem, local)
        flops = training_flops(module, dataset.input_shape, dataset.vocabulary)
    layers = FlatModel(copy.deepcopy(module), statistics=statistics).layers
    builtin = parts.model is None and config.model.name in ("auto", *MODELS)
    quantizers = family(getattr(config.strategy, "quantizer", "minmax"), parts.quantizer)
    notes = (dataset.description, *([split.note] if split.note else []), *said)
    return Task(
        config, dataset, kept, held, profiles, module, layers, builtin, flops, quantizers, problem, statistics, names,
        notes, local, available, bandwidth(config.network.bandwidth, profiles, names),
    )  # fmt: skip


def _require_cohort(config: Config, split: Split) -> None:
    """Raises ConfigError if there are fewer clients than take part in a round."""
    if len(split.shards) < config.clients.cohort:
        raise ConfigError(
            f"clients.cohort: {config.clients.cohort} clients take part in a round, but there are {len(split.shards)} "
            f"({split.note})"
        )


class Timed(NamedTuple):
    """A result and its wall seconds, which are written only to timing.json."""

    value: Any
    wall_s: float


def timed(function: Callable[..., Any], *arguments: Any) -> Timed:
    """Calls and times an evaluation or a probe. Any error that a user's model raises there becomes a FedLQError."""
    started = time.perf_counter()
    try:
        value = function(*arguments)
    except FedLQError:
        raise
    except Exception as exc:
        raise FedLQError(f"{function.__name__} failed: {type(exc).__name__}: {exc}") from exc
    return Timed(value, time.perf_counter() - started)


@dataclass(frozen=True)
class Job:
    """One client's part in a round: what it sends, and how many samples it trains on.

    Attributes:
        round: the dispatch that asked it; with the client, the key of all randomness.
        step: of the server at that moment; in a synchronous run, the round.
    """

    round: int
    client: int
    plan: Plan
    samples: int
    step: int = 0

    @property
    def key(self) -> tuple[int, int]:
        return self.round, self.client


class Worker:
    """Runs clients' rounds, evaluations and probes in this process; Ray's actors and the serial host use it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._evaluated_on: tuple[Tensor, Tensor] | None = None

    @functools.cached_property
    def model(self) -> FlatModel:
        """Built on first use: a process that only plans and aggregates needs no GPU."""
        return self.task.flat_model(self.task.config.train.device)

    @functools.cached_property
    def trainer(self) -> Trainer:
        task, settings = self.task, self.task.config.train
        if task.local is None:
            return LocalSGD(self.model, settings, task.problem, record=task.builtin)
        numbers = {"clients": len(task.shards), "cohort": task.clients.cohort, "seed": task.config.seed}
        return OwnTraining(task.local, self.model, settings, task.problem, **numbers)

    def initial_weights(self) -> Tensor:
        """The initial flat vector (d,)."""
        return self.task.flat_model().read()

    @property
    def context(self) -> StrategyContext:
        task = self.task
        return StrategyContext(task.config.strategy, task.layers, task.config.seed, task.quantizer)

    def normalise(self, x: NDArray[Any]) -> Tensor:
        return inputs(x, self.task.data.mean, self.task.data.std, self.model.device)

    def model_size(self) -> int:
        """Bytes of the whole model on the wire, as float32."""
        return PAYLOAD_HEADER + sum(LAYER_HEADER + 4 * layer.size for layer in self.task.layers)

    def broadcast_size(self) -> int:
        """Bytes that a client fetches as float32: the model, and the last mean update if it needs that."""
        common = MEMORIES[self.task.config.strategy.error_feedback or False].common
        return (2 if common else 1) * self.model_size()

    def train(self, job: Job, weights: Tensor, memory: Tensor | None) -> tuple[Reply, Tensor | None]:
        shard = self.task.shards[job.client]
        return client_round(
            self.trainer,
            self.task.data.x_train[shard],
            self.task.data.y_train[shard],
            normalise=self.normalise,
            weights=weights,
            memory=memory,
            plan=job.plan,
            samples=job.samples,
            seed=self.task.config.seed,
            round=job.round,
            client=job.client,
            custom=self.task.quantizer,
            step=job.step,
        )

    def evaluate(self, weights: Tensor) -> Evaluation:
        """Evaluates on the test set, or on the clients' held-out samples (`evaluate_on`)."""
        if self._evaluated_on is None:
            data = self.task.data
            if self.task.config.evaluate_on == "test":
                self._evaluated_on = self._samples(data.x_test, data.y_test)
            else:
                self._evaluated_on = self._training_samples(np.concatenate(self.task.held))
        with seeded(self.task.config.seed, "evaluate", gpus=self._gpus):
            return evaluate(self.model, weights, *self._evaluated_on, self.task.problem, self.task.test_clients)

    @property
    def _gpus(self) -> list[torch.device]:
        return [] if self.model.device.type == "cpu" else [self.model.device]

    def _training_samples(self, chosen: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        return self._samples(self.task.data.x_train[chosen], self.task.data.y_train[chosen])

    def _samples(self, x: NDArray[Any], y: NDArray[Any]) -> tuple[Tensor, Tensor]:
        return self.normalise(x), torch.from_numpy(y.copy()).to(self.model.device)

    def probe_data(self, samples: int, clients: tuple[int, ...] | None = None, round: int = 0) -> tuple[Tensor, Tensor]:
        """Held-out samples: of `clients`, drawn by round, or of all clients, drawn once (the server's proxy).

        A mean over the clients' samples is the mean of the clients' own results, weighted by samples.
        """
        task = self.task
        chosen = range(len(task.held)) if clients is None else clients
        pool = np.concatenate([task.held[client] for client in chosen])
        if not len(pool):  # nothing is held out: the probe uses training data
            pool = np.concatenate([task.shards[client] for client in chosen])
        rng = numpy_rng(task.config.seed, "proxy", *(() if clients is None else (round,)))
        return self._training_samples(rng.permutation(pool)[:samples])

    def probe(self, probe: Probe, base: Tensor, sent: Tensor, round: int) -> Measurement:
        x, y = self.probe_data(probe.samples, probe.clients, round)
        seed, layers = self.task.config.seed, self.context.quantized
        what = (self.model, base, sent, layers, probe.quantizers)
        take = functools.partial(gather, *what, seed=seed, round=round, problem=self.task.problem)
        with seeded(seed, "measure", round, gpus=self._gpus):
            return measure(in_blocks(take, x, y), probe.metric)[probe.metric]
