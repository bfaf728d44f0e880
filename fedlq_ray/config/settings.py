"""Every setting, typed, with its unit, bounds and meaning."""

import os
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fedlq_ray.config.sections import Args, Section, Text, key
from fedlq_ray.errors import ConfigError

VARIABLES = {"uri": "MLFLOW_TRACKING_URI", "experiment": "MLFLOW_EXPERIMENT_NAME"}  # defaults of TrackingConfig


Positive = Annotated[float, Field(gt=0)]
Level = Literal[1, 2, 3, 4, 5, 6, 7, 8, 16, 32]


class DataConfig(Section):
    name: Text = key("digits", "digits, fashion-mnist, mnist, cifar10, npz, or your own as module:function")
    path: Text | None = key(None, "file or folder of the data; for npz required, else searched in the usual places")
    layout: Literal["auto", "features", "images", "series", "channels_first"] = key(
        "auto",
        "how samples lie: features (n, ...), which are flattened; images (n, height, width[, channels]); series (n, "
        "length, channels); channels_first, as PyTorch has images and series; auto: as the shape tells, an error where "
        "it has two readings",
    )
    partition: Literal["iid", "dirichlet", "shards", "quantity"] = key("dirichlet", "how samples go to clients")
    alpha: Positive = key(0.3, "concentration of dirichlet (by label) and quantity (by size); small is uneven", le=1e6)
    classes_per_client: int = key(2, "label-sorted shards that a client gets, for shards", ge=1)
    min_samples: int = key(8, "least samples of a client", unit="samples", ge=1)
    holdout: float = key(0.1, "share of each client's shard that is held out of training, for probes", ge=0, lt=1)
    args: Args = key({}, "arguments of your own data function")


class ModelConfig(Section):
    name: Text = key("auto", "auto, mlp, cnn, lenet5, resnet8_gn, vgg9, torchvision:NAME, or module:function")
    args: Args = key({}, "arguments of the model's function")


class ClientsConfig(Section):
    count: int = key(50, "clients in the federation", ge=1, le=1_000_000)
    cohort: int = key(10, "clients that take part in a round", ge=1)
    hosting: Literal["auto", "dedicated", "packed", "serial"] = key(
        "auto", "dedicated: an actor a client; packed: a few actors host all; serial: no Ray, in this process"
    )
    actors: int | None = key(None, "actors that host the clients when packed; null: one a core", ge=1)
    num_cpus: float = key(
        0.0, "cores that an actor reserves of Ray; with it, or the three below, Ray chooses its node", ge=0
    )
    num_gpus: float = key(
        0.0, "GPUs that an actor reserves, such as 0.25: four share one; for train.device=cuda, or parts of yours", ge=0
    )
    resources: dict[str, float] = key({}, "Ray's custom resources that an actor reserves, such as {big: 1}")
    labels: dict[str, str] = key({}, "Ray's labels that an actor's node must have, such as {market-type: spot}")
    profiles: Text = key("mixed", "a population's name, or a CSV with a row a client")
    variation: float = key(0.0, "sigma of the log-normal variation of bandwidth and compute by round", ge=0, le=3)
    dropout: float = key(0.0, "probability that a client fails to answer in a round", ge=0, le=1)
    retries: int = key(
        2,
        "times that a client that raised, or whose actor died, is run again in a round; as often one that was silent",
        ge=0,
    )
    timeout_s: Positive = key(
        600.0, "wall time after which a silent actor is given up, and its client run again", unit="s"
    )
    on_failure: Literal["fail", "skip_client"] = key(
        "fail",
        "when a client raised or its actor died, and retries did not help: the run fails, or the round goes on without "
        "it (record: skipped); one whose actor was only silent is never skipped, the run fails",
    )


class TrainConfig(Section):
    device: Literal["cpu", "cuda"] = key(
        "cpu", "where clients train, and evaluations and probes run; a GPU's results are not a CPU's"
    )
    lr: Positive = key(0.1, "learning rate of the clients' SGD", le=1e3)
    momentum: float = key(0.0, "momentum of the clients' SGD, fresh each round", ge=0, lt=1)
    weight_decay: float = key(0.0, "L2 penalty of the clients' SGD", ge=0, le=1)
    max_grad_norm: Positive | None = key(None, "gradients of a step are scaled down to this Euclidean norm")
    batch_size: int = key(16, "samples in a step", unit="samples", ge=1)
    local_epochs: int = key(2, "passes over the shard in a round", ge=1)
    prox_mu: float = key(0.0, "FedProx's pull to the global weights (Li et al., MLSys 2020)", ge=0, le=1e3)
    adaptive_work: float = key(
        1.0, "above 1, a cohort's members train for equally long: from 1 / sqrt(w) to w times the base, "
        "sqrt(w) in the mean; updates are normalised by work (FedNova)", ge=1, le=100,
    )  # fmt: skip
    max_samples: int | None = key(None, "samples of a pass at most, drawn anew each round", unit="samples", ge=1)


class ServerConfig(Section):
    optimizer: Literal["none", "momentum", "adam"] = key("none", "what the server steps along the mean update with")
    lr: Positive = key(1.0, "factor of the server's step", le=1e3)
    momentum: float = key(0.9, "momentum, or Adam's first decay", ge=0, lt=1)
    beta2: float = key(0.99, "Adam's second decay", ge=0, lt=1)
    tau: Positive = key(1e-3, "Adam's degree of adaptivity, added to the root", le=1e3)


class StrategyConfig(Section):
    name: Text = key("fedlq", "a scheme by name (README.md lists them), or your own as module:function")
    quantizer: Text = key("minmax", "minmax, qsgd, or your own as module:attribute")
    payload: Literal["update", "model"] = key("update", "what a client sends: its update, or its whole model")
    bits: float = key(
        4.0,
        "uniform, eden, ecsq, and others with budget=bits: rate of a client's payload; uniform: the level, of which "
        "fractions mix two levels over clients",
        unit="bits a parameter", gt=0, le=32,
    )  # fmt: skip
    scope: Literal["layer", "model"] = key("layer", "schemes of one quantizer: it takes a layer, or the whole model")
    error_feedback: bool | Literal["ef21"] | None = key(
        None,
        "clients add what quantization lost in a round to what they send in the next; ef21: they send the difference "
        "from what the server has of them; null: as the strategy has it; signsgd takes neither",
    )
    levels: tuple[Level, ...] = key(
        (1, 2, 3, 4, 6, 8), "fedlq, fedhq, kimad: the levels to choose from", unit="bits a parameter"
    )
    budget: Literal["bits", "deadline", "cohort"] = key(
        "cohort",
        "bytes for each client from `bits`, from a fixed deadline_s, or from the cohort: the slowest member at "
        "floor_bits sets the time that the others may fill",
    )
    floor_bits: float | None = key(
        2.0, "budget=cohort: rate of the slowest, or the lowest level where that is more; null: what the convergence "
        "bound finds best for a round. fedlq_rd, budget=deadline: who cannot send at this rate in time is late; "
        "null: at 0.02",
        unit="bits a parameter", gt=0, le=32,
    )  # fmt: skip
    noise_cost: float = key(
        0.05, "floor_bits=null: how much a relative squared error of the averaged update adds to the rounds", ge=0
    )
    cap_bits: float = key(
        8.0, "the most that a client sends: beyond it bits buy nothing", unit="bits a parameter", gt=0, le=32
    )
    deadline_s: Positive | None = key(None, "budget=deadline: simulated length of a round", unit="s")
    late: Literal["wait", "drop", "partial"] = key(
        "wait",
        "fedlq, fedlq_rd, budget=deadline: what becomes of clients that cannot send all layers in time: the "
        "round waits for them, goes "
        "on without them, or they send what fits: the most significant layers (fedlq), all at a lower rate (fedlq_rd)",
    )
    allocation: Literal["greedy", "exact"] = key(
        "greedy", "fedlq: how levels are found under a budget: step by step, or those of the least total accuracy drop"
    )
    significance: Literal["ratio", "sum"] = key(
        "ratio", "fedlq: accuracy drop per memory saved, or a weighted sum, which allocation=greedy alone has"
    )
    significance_alpha: float = key(0.5, "fedlq, significance=sum: weight of the accuracy drop", ge=0, le=1)
    metric: Literal["loss", "accuracy", "squared_error", "fisher", "taylor", "hawq", "size", "random"] | None = key(
        None,
        "in what a layer's drop is measured, or by what it is predicted; null: loss for fedlq, squared_error, which "
        "needs no probe, for fedlq_rd",
    )
    probe_on: Literal["proxy", "clients"] = key(
        "proxy", "whose held-out samples: all clients', drawn once, or those of the round's cohort (time not billed)"
    )
    probe_every: int = key(10, "fedlq, fedlq_rd: rounds between measurements of the drop", unit="rounds", ge=1)
    probe_samples: int = key(512, "fedlq, fedlq_rd: held-out samples to measure on", unit="samples", ge=8)
    probe_decay: float = key(0.5, "fedlq, fedlq_rd: weight of the past in the running average", ge=0, lt=1)
    args: Args = key({}, "the strategy's own arguments, such as {fraction: 0.01} for topk")

    @model_validator(mode="after")
    def _fits(self) -> "StrategyConfig":
        if not self.levels or sorted(set(self.levels)) != list(self.levels):
            raise ValueError("levels must be distinct and rise, such as [1,2,4,8]")
        if self.budget == "deadline" and self.deadline_s is None:
            raise ValueError("budget=deadline needs deadline_s")
        if self.floor_bits is not None and self.floor_bits > self.cap_bits:
            raise ValueError(f"floor_bits ({self.floor_bits:g}) must not be above cap_bits ({self.cap_bits:g})")
        return self


class NetworkConfig(Section):
    bill: Literal["upload", "both"] = key("upload", "what the simulated clock counts; downloads are logged anyway")
    downlink_bits: float | None = key(
        None, "clients fetch the model's change, coded: the cohort's slowest link at this rate, the others as much as "
        "that takes them time for; null: whole models as float32", unit="bits a parameter", gt=0, le=32,
    )  # fmt: skip
    downlink_cap_bits: float = key(
        4.0,
        "downlink_bits: the most that a client is sent: beyond it bits buy nothing",
        unit="bits a parameter",
        gt=0,
        le=32,
    )
    uplink_free: bool = key(False, "uploads take no time: the infinite-bandwidth limit")


class CheckpointConfig(Section):
    every_rounds: int | None = key(None, "rounds between checkpoints; null: as often as takes 5 % of the time", ge=1)
    keep: int = key(2, "checkpoints that are kept while a run is going on; 0: none are written", ge=0)
    path: Text | None = key(None, "their folder, or an address such as s3://bucket/run; null: in the run's folder")


def variable(name: str, default: str, meaning: str, **bounds: Any) -> Any:
    """A setting whose default is an environment variable, where that is set and not empty."""

    def value() -> str:
        found = os.environ.get(name) or default
        if len(found) > 500:
            raise ConfigError(f"{name}: must have at most 500 characters, and has {len(found)}")
        return found

    meaning = f"{meaning}; the default is {name}, where that is set"
    return Field(default_factory=value, description=meaning, json_schema_extra={"default": default}, **bounds)


class TrackingConfig(Section):
    uri: Text | None = variable(
        VARIABLES["uri"], "sqlite:///mlflow.db", "MLflow's tracking store or server; null: none"
    )
    experiment: Text = variable(VARIABLES["experiment"], "fedlq", "MLflow's experiment", min_length=1, max_length=500)


class Config(Section):
    """One experiment."""

    name: Text = key("demo", "the run's name", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    seed: int = key(0, "what all randomness comes from", ge=0, lt=2**63)
    rounds: int = key(60, "rounds of training", ge=1)
    target_accuracy: float | None = key(0.93, "test accuracy to reach, a fraction", gt=0, le=1)
    evaluate_every: int = key(1, "rounds between evaluations; the last is always evaluated", ge=1)
    evaluate_on: Literal["test", "holdout"] = key(
        "test", "whose accuracy counts: the test set's, or, to choose settings by, that of the samples in data.holdout"
    )
    stop_at_target: bool = key(False, "end the run when the target is reached")
    out: Text | None = key(None, "the run's folder; null: runs/NAME-SEED, then -2, -3 where taken")
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    clients: ClientsConfig = ClientsConfig()
    train: TrainConfig = TrainConfig()
    server: ServerConfig = ServerConfig()
    strategy: StrategyConfig = StrategyConfig()
    network: NetworkConfig = NetworkConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = Field(default_factory=TrackingConfig)

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.clients.cohort > self.clients.count:
            raise ValueError(
                f"clients.cohort ({self.clients.cohort}) must not be larger than clients.count ({self.clients.count})"
            )
        if self.train.device == "cuda" and self.clients.hosting != "serial" and not self.clients.num_gpus:
            raise ValueError(
                "train.device=cuda needs clients.num_gpus, an actor's share of a GPU, such as 0.25 (or hosting=serial)"
            )
        if self.stop_at_target and self.target_accuracy is None:
            raise ValueError("stop_at_target needs a target_accuracy")
        if self.evaluate_on == "holdout" and not self.data.holdout:
            raise ValueError("evaluate_on=holdout needs a data.holdout above 0")
        return self
