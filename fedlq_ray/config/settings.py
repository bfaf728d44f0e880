"""Every setting, typed, with its unit, bounds and meaning."""

import os
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedlq_ray.config import presets
from fedlq_ray.config.schemes import Chosen, FedLQ
from fedlq_ray.config.sections import Args, Section, Text, key
from fedlq_ray.errors import ConfigError

VARIABLES = {"uri": "MLFLOW_TRACKING_URI", "experiment": "MLFLOW_EXPERIMENT_NAME"}  # defaults of TrackingConfig


FRACTIONS = ("classification", "tokens", "multilabel")  # problems whose main metric is a fraction
Positive = Annotated[float, Field(gt=0)]


class DataConfig(Section):
    name: Text = key(
        "digits",
        "digits, shakespeare, diabetes, fashion-mnist, mnist, cifar10, cifar100, npz, leaf, table, hf, or your own as "
        "module:function",
    )
    path: Text | None = key(None, "file or folder of the data; required for npz, else searched in the usual places")
    layout: Literal["auto", "features", "images", "series", "channels_first", "tokens"] = key(
        "auto",
        "the layout of samples: features (n, ...), which are flattened; images (n, height, width[, channels]); "
        "series (n, length, channels); channels_first, PyTorch's layout of images and series; tokens (n, length); "
        "auto: read from the shape; an ambiguous shape is an error",
    )
    partition: Literal["natural", "iid", "dirichlet", "shards", "quantity", "skew", "missing"] = key(
        "dirichlet", "how samples are distributed over clients; natural: as the data says"
    )
    alpha: Positive = key(0.3, "concentration of dirichlet (by label) and quantity (by size); small is uneven", le=1e6)
    classes_per_client: int = key(2, "partition=shards: label-sorted shards per client", ge=1)
    level: float = key(0.8, "partition=skew: the share of a class that one client has", gt=0, lt=1)
    missing: int = key(2, "partition=missing: classes that each client lacks", ge=1)
    min_samples: int = key(
        8, "minimum number of samples per client; partition=natural leaves out clients with fewer", unit="samples", ge=1
    )
    holdout: float = key(0.1, "share of each client's shard that is held out of training, for probes", ge=0, lt=1)
    args: Args = key({}, "arguments of your own data function")


class ModelConfig(Section):
    name: Text = key(
        "auto",
        "auto, mlp, cnn, cnn_large, lenet5, resnet8_gn, resnet18_gn, resnet20_gn, mobilenetv2_gn, vgg9, alexnet, lstm, "
        "transformer, torchvision:NAME, or module:function",
    )
    args: Args = key({}, "arguments of the model's function")


class ClientsConfig(Section):
    count: int = key(
        50, "clients in the federation; with data.partition=natural, the largest number", ge=1, le=1_000_000
    )
    cohort: int = key(10, "clients that take part in a round", ge=1)
    hosting: Literal["auto", "dedicated", "packed", "serial"] = key(
        "auto",
        "dedicated: one actor per client; packed: a few actors host all clients; serial: no Ray, in this process",
        affects="nothing",
    )
    actors: int | None = key(
        None, "actors that host the clients when packed; null: one per core", ge=1, affects="nothing"
    )
    num_cpus: float = key(
        0.0,
        "cores that an actor reserves from Ray; with it, or one of the three below, Ray chooses the actor's node",
        ge=0,
        affects="nothing",
    )
    num_gpus: float = key(
        0.0,
        "GPUs that an actor reserves, such as 0.25 (four share one GPU); for train.device=cuda, or your own parts",
        ge=0,
        affects="nothing",
    )
    resources: dict[str, float] = key(
        {}, "Ray's custom resources that an actor reserves, such as {big: 1}", affects="nothing"
    )
    labels: dict[str, str] = key(
        {}, "Ray's labels that an actor's node must have, such as {market-type: spot}", affects="nothing"
    )
    profiles: Text = key("mixed", "a population's name, or a CSV with one row per client", affects="clock")
    selection: Text = key(
        "random",
        "which idle clients are asked: random, oort, tifl, power_of_choice, fastest, or your own as module:class",
    )
    selection_args: Args = key({}, "arguments of the selection")
    availability: Text = key(
        "always",
        "when clients are there: always; daily, a pattern with the settings of `daily`; or a CSV with columns client, "
        "from_s and to_s",
    )
    variation: float = key(
        0.0, "sigma of the log-normal variation of bandwidth and compute by round", ge=0, le=3, affects="clock"
    )
    dropout: float = key(0.0, "probability that a client fails to answer in a round", ge=0, le=1)
    retries: int = key(
        2,
        "how often a round runs a client again that raised, whose actor died, or whose actor was silent",
        ge=0,
        affects="nothing",
    )
    timeout_s: Positive = key(
        600.0,
        "wall time after which a silent actor is replaced, and its client runs again",
        unit="s",
        affects="nothing",
    )
    on_failure: Literal["fail", "skip_client"] = key(
        "fail",
        "when a client raised or its actor died, and retries did not help: the run fails, or the round continues "
        "without the client (record: skipped); a client that merely timed out is never skipped: the run fails",
        affects="nothing",
    )


class DailyConfig(Section):
    """The pattern of `clients.availability=daily`."""

    sessions: float = key(10.0, "sessions that begin per client and day", ge=0.1, le=1000)
    minutes: Positive = key(5.0, "median length of a session; lengths are log-normal", unit="min", le=1440)
    sigma: float = key(1.32, "sigma of the length", ge=0, le=5)
    swing: float = key(
        4.0, "how much more often sessions begin at the busiest hour than at the calmest, 12 hours apart", ge=1, le=1000
    )
    peak_hour: float = key(2.0, "the busiest hour", unit="h", ge=0, lt=24)
    start_hour: float = key(
        0.0, "the hour at which a run starts; it matters, because a run lasts minutes and the pattern a day", unit="h",
        ge=0, lt=24,
    )  # fmt: skip
    day_s: Positive = key(
        86400.0, "simulated seconds per day; fewer compress the pattern, lengths of sessions included", unit="s",
        le=1e9,
    )  # fmt: skip


class TrainConfig(Section):
    device: Literal["cpu", "cuda"] = key(
        "cpu", "where clients train, and evaluations and probes run; a GPU's results are not a CPU's"
    )
    precision: Literal["float32", "bfloat16"] = key(
        "float32",
        "arithmetic of a training step; bfloat16 (autocast) is faster on GPUs and on processors with "
        "instructions for it, and slower on others; weights, updates and evaluations are float32 in any case",
    )
    local: Text | None = key(
        None, "your own local training, as module:function; null: the package's, with the settings below"
    )
    optimizer: Literal["sgd", "adam", "adamw"] = key(
        "sgd", "the clients' optimizer; its state is fresh in each round, and never sent"
    )
    lr: Positive = key(0.1, "learning rate of the clients, in the first round", le=1e3)
    lr_schedule: Literal["constant", "exponential", "steps", "cosine"] = key(
        "constant",
        "how the learning rate falls over rounds: by lr_decay each round, by lr_decay each lr_rounds, or to lr_min "
        "along a half cosine of lr_rounds",
    )
    lr_decay: float = key(0.993, "factor of lr_schedule=exponential and steps", gt=0, le=1)
    lr_rounds: int = key(100, "period of lr_schedule=steps, length of cosine", unit="rounds", ge=1)
    lr_min: float = key(0.0, "the learning rate never falls below this one", ge=0, le=1e3)
    momentum: float = key(0.0, "momentum of the clients' SGD, fresh each round", ge=0, lt=1)
    nesterov: bool = key(False, "Nesterov's momentum")
    weight_decay: float = key(0.0, "L2 penalty of the clients; with adamw, decoupled weight decay", ge=0, le=1)
    max_grad_norm: Positive | None = key(None, "gradients of a step are scaled down to this Euclidean norm")
    batch_size: int = key(16, "samples per step", unit="samples", ge=1)
    local_epochs: int = key(2, "passes over the shard per round", ge=1)
    prox_mu: float = key(0.0, "FedProx's pull to the global weights (Li et al., MLSys 2020)", ge=0, le=1e3)
    adaptive_work: float = key(
        1.0, "above 1, a cohort's members train for equally long: from 1 / sqrt(w) to w times the base, "
        "sqrt(w) in the mean; updates are normalised by work (FedNova)", ge=1, le=100,
    )  # fmt: skip
    augment: Literal["none", "flip", "crop", "flip_crop"] = key(
        "none", "random changes of training images: flip left and right, or shift by up to 4 pixels (pad and crop)"
    )
    max_samples: int | None = key(None, "maximum samples per pass, drawn again each round", unit="samples", ge=1)


class ServerConfig(Section):
    optimizer: Literal["none", "momentum", "adam"] = key("none", "how the server steps along the mean update")
    lr: Positive = key(1.0, "factor of the server's step", le=1e3)
    momentum: float = key(0.9, "momentum, or Adam's first decay", ge=0, lt=1)
    beta2: float = key(0.99, "Adam's second decay", ge=0, lt=1)
    tau: Positive = key(1e-3, "Adam's degree of adaptivity, added to the root", le=1e3)
    buffer: int | None = key(
        None, "updates that make a step of the server; null: a step waits for all clients under way", ge=1
    )
    max_staleness: int | None = key(
        0, "clients that a step would make staler than this are stopped; null: none is; with buffer or deadline_s, "
        "anything but 0 is asynchronous: a client that ends is replaced at once", unit="steps", ge=0,
    )  # fmt: skip
    staleness_exponent: float = key(
        0.5, "an update that is s steps old counts (1 + s)^-a (Xie et al., 2019; Nguyen et al., AISTATS 2022)", ge=0,
        le=10,
    )  # fmt: skip
    deadline_s: Positive | None = key(
        None, "a step comes at the latest so long after the one before, with what has arrived; if nothing has, at the "
        "first arrival", unit="s", le=1e9,
    )  # fmt: skip


class NetworkConfig(Section):
    bill: Literal["upload", "both"] = key(
        "upload", "what the simulated clock counts; downloads are logged anyway", affects="clock"
    )
    downlink_bits: float | None = key(
        None, "clients fetch the model's change, coded: the cohort's slowest link at this rate, faster links more in "
        "the same time; null: whole models as float32", unit="bits per parameter", gt=0, le=32,
    )  # fmt: skip
    downlink: Literal["own", "shared"] = key(
        "own", "downlink_bits: own: each client fetches the change from the model that it holds; shared: each step's "
        "change goes to all, who hold the same model, and a client fetches what it missed (QAFeL)",
    )  # fmt: skip
    downlink_cap_bits: float = key(
        4.0,
        "downlink_bits: maximum rate of a client; more bits do not help; not for downlink=shared",
        unit="bits per parameter",
        gt=0,
        le=32,
    )
    bandwidth: Text | None = key(
        None, "a CSV of rates over time, with columns client, t_s, uplink_mbps and downlink_mbps, which hold from t_s "
        "on; strategies plan with the profiles; null: the rates of the profiles", affects="clock",
    )  # fmt: skip
    uplink_free: bool = key(False, "uploads take no time: the infinite-bandwidth limit", affects="clock")


class CheckpointConfig(Section):
    every_rounds: int | None = key(
        None, "rounds between checkpoints; null: as often as 5 % of the run's time allows", ge=1, affects="nothing"
    )
    keep: int = key(2, "checkpoints that are kept during a run; 0: none are written", ge=0, affects="nothing")
    path: Text | None = key(
        None, "their folder, or an address such as s3://bucket/run; null: in the run's folder", affects="nothing"
    )


def variable(name: str, default: str, meaning: str, **bounds: Any) -> Any:
    """A setting whose default is an environment variable, if it is set and not empty."""

    def value() -> str:
        found = os.environ.get(name) or default
        if len(found) > 500:
            raise ConfigError(f"{name}: must have at most 500 characters, got {len(found)}")
        return found

    meaning = f"{meaning}; the default is {name}, if it is set"
    return Field(
        default_factory=value,
        description=meaning,
        json_schema_extra={"default": default, "affects": "nothing"},
        **bounds,
    )


class TrackingConfig(Section):
    uri: Text | None = variable(
        VARIABLES["uri"], "sqlite:///mlflow.db", "MLflow's tracking store or server; null: none"
    )
    experiment: Text = variable(VARIABLES["experiment"], "fedlq", "MLflow's experiment", min_length=1, max_length=500)
    log_model: bool = key(False, "log the model as an MLflow model too, which takes seconds per run", affects="nothing")


class Config(Section):
    """One experiment."""

    name: Text = key("demo", "the run's name", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$", affects="nothing")
    seed: int = key(0, "the seed of all randomness", ge=0, lt=2**63)
    problem: Text = key(
        "classification",
        "what clients train for: classification, tokens, regression, multilabel, or your own as module:attribute",
    )
    rounds: int = key(60, "rounds of training", ge=1)
    target: float | None = key(
        0.93,
        "value of the problem's main metric to reach: an accuracy or F1 score as a fraction, an absolute error; null: "
        "none",
    )
    evaluate_every: int = key(1, "rounds between evaluations; the last is always evaluated", ge=1)
    evaluate_on: Literal["test", "holdout"] = key(
        "test", "which samples accuracy is of: the test set, or those of data.holdout, to choose settings"
    )
    stop_at_target: bool = key(False, "end the run when the target is reached")
    payloads: bool = key(
        False, "keep all payloads that arrive as payloads.bin in the run's folder, for fedlq recode", affects="nothing"
    )
    out: Text | None = key(None, "the run's folder; null: runs/NAME-SEED, then -2, -3 if taken", affects="nothing")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    clients: ClientsConfig = ClientsConfig()
    daily: DailyConfig = DailyConfig()
    train: TrainConfig = TrainConfig()
    server: ServerConfig = ServerConfig()
    strategy: Chosen = FedLQ()
    network: NetworkConfig = NetworkConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="before")
    @classmethod
    def _of_dataset(cls, settings: Any) -> Any:
        return presets.fill(settings) if isinstance(settings, Mapping) else settings

    @property
    def synchronous(self) -> bool:
        """Whether each step waits for all clients that were asked."""
        return self.server.buffer is None and self.server.deadline_s is None and self.clients.availability == "always"

    @property
    def turn(self) -> str:
        """What `rounds` counts: rounds, or steps of the server where these do not wait for all."""
        return "round" if self.synchronous else "step"

    @property
    def continuous(self) -> bool:
        """Whether clients fly on over steps, and a client that ends is replaced at once."""
        return self.server.max_staleness != 0 and not (self.server.buffer is None and self.server.deadline_s is None)

    @property
    def updates(self) -> int | None:
        """How many updates make a step, if each client is planned alone; else None."""
        return (self.server.buffer or self.clients.cohort) if self.continuous else None

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.clients.cohort > self.clients.count:
            raise ValueError(
                f"clients.cohort ({self.clients.cohort}) must not be larger than clients.count ({self.clients.count})"
            )
        self._steps_fit()
        self._feedback_fits()
        if self.train.device == "cuda" and self.clients.hosting != "serial" and not self.clients.num_gpus:
            raise ValueError(
                "train.device=cuda needs clients.num_gpus, an actor's share of a GPU, such as 0.25 (or hosting=serial)"
            )
        if self.train.momentum and self.train.optimizer != "sgd":
            raise ValueError(f"train.momentum: {self.train.optimizer} has none; it is for train.optimizer=sgd")
        if self.train.nesterov and not self.train.momentum:
            raise ValueError("train.nesterov needs a train.momentum")
        if self.train.lr_min > self.train.lr:
            raise ValueError(f"train.lr_min ({self.train.lr_min:g}) must not be above train.lr ({self.train.lr:g})")
        if self.stop_at_target and self.target is None:
            raise ValueError("stop_at_target needs a target")
        if self.target is not None and self.problem in FRACTIONS and not 0 < self.target <= 1:
            raise ValueError(f"target: {self.target:g} must be above 0 and at most 1: it is a fraction, such as 0.93")
        if self.evaluate_on == "holdout" and not self.data.holdout:
            raise ValueError("evaluate_on=holdout needs a data.holdout above 0")
        return self

    def _feedback_fits(self) -> None:
        """Checks that all clients have the last mean update, if they send the difference from it."""
        if self.strategy.error_feedback != "cafe":
            return
        cafe = "strategy.error_feedback=cafe sends the difference from the last mean update"
        if self.strategy.payload != "update":
            raise ValueError(f"{cafe}; it needs strategy.payload=update")
        if self.continuous:
            raise ValueError(f"{cafe}, which clients of several versions do not share; use server.max_staleness=0")
        if self.train.adaptive_work > 1:
            raise ValueError(f"{cafe}, which has the cohort's mean work; it needs train.adaptive_work=1")
        if self.network.downlink_bits is not None:
            raise ValueError(f"{cafe}, which clients fetch as float32; it needs network.downlink_bits=null")

    def _steps_fit(self) -> None:
        """Checks how steps of the server begin and end."""
        server, cohort = self.server, self.clients.cohort
        if server.buffer is not None and server.buffer > cohort:
            raise ValueError(
                f"server.buffer ({server.buffer}) must not be larger than clients.cohort ({cohort}), "
                "which are the clients under way"
            )
        if server.max_staleness != 0 and server.buffer is None and server.deadline_s is None:
            raise ValueError(
                "server.max_staleness: a step waits for all clients, so that nothing can be stale; "
                "set server.buffer or server.deadline_s"
            )
        if self.network.downlink == "shared" and self.network.downlink_bits is None:
            raise ValueError("network.downlink=shared needs network.downlink_bits, the rate of each step's change")
        if self.continuous and self.train.adaptive_work > 1:
            raise ValueError("train.adaptive_work is for steps that wait for a cohort, with server.max_staleness=0")
        if self.continuous and self.strategy.not_stale:
            what = f"strategy.name={self.strategy.name}: {self.strategy.not_stale}"
            raise ValueError(f"{what}; use it with server.max_staleness=0")
