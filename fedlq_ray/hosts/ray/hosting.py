"""Clients as Ray actors: `dedicated`, one actor per client, or `packed`, many clients in a few actors."""

from fedlq_ray import startup  # noqa: F401  (first: a user's file could hide later imports)

# isort: split
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import (
    ActorUnschedulableError,
    GetTimeoutError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
)
from torch import Tensor

from fedlq_ray.config.settings import ClientsConfig
from fedlq_ray.errors import ClientError, DivergedError, FedLQError, first_line
from fedlq_ray.federation.task import Job, Task
from fedlq_ray.hosts.ray import forkserver
from fedlq_ray.hosts.ray.actors import Bell, ClientActor
from fedlq_ray.hosts.ray.placement import Nodes, asks, deal, fitting, on
from fedlq_ray.models import saved_bytes
from fedlq_ray.strategies import Probe
from fedlq_ray.training.local import Reply

# Memory of an actor without its model (experiments/benchmarks/README.md; ARCHITECTURE.md).
FORKED_BYTES, ORDINARY_BYTES = 42e6, 212e6
VECTORS = 8  # vectors of the model's length that training and quantizing hold at once
_START_S = 300.0  # minimum time that actors get to start
_DIED = (RayActorError, OutOfMemoryError)  # the second: Ray itself ended an actor because memory ran out
ACTORS_A_CORE = 8  # an actor takes about a second of a core to start


def _why(exc: Exception) -> str:
    """What happened to an actor, in one line. Ray's last line has the error that the actor's constructor raised."""
    first = first_line(exc)
    return (
        str(exc).strip().splitlines()[-1] if "creation task" in first else f"{type(exc).__name__}: {first.rstrip('.')}"
    )


def _get(ref: Any, timeout: float | None = None) -> Any:
    try:
        return ray.get(ref, timeout=timeout)
    except RayTaskError as exc:
        cause = exc.cause
        # A Ray error: an object was lost with its node; the driver restarts from its checkpoint.
        raise (cause if isinstance(cause, FedLQError | RayError) else FedLQError(f"in an actor: {cause!r}")) from None


def actor_bytes(task: Task) -> float:
    """Approximate private memory of an actor after training."""
    vectors = VECTORS * 4 * sum(layer.size for layer in task.layers)
    frozen = 2 * sum(p.nbytes for p in task.module.parameters() if not p.requires_grad)  # in the task and in the model
    kept = task.config.train.batch_size * saved_bytes(task.module, task.data.input_shape)
    return (FORKED_BYTES if forkserver.command() else ORDINARY_BYTES) + vectors + frozen + kept


def choose(clients: ClientsConfig, each_bytes: float) -> tuple[str, str]:
    """`dedicated` or `packed`, and the reason, from Ray's free memory and its cores.

    Args:
        each_bytes: memory of an actor (`actor_bytes`).
    Raises:
        FedLQError: `dedicated` is configured, but the actors would not fit into memory.
    """
    free = ray.available_resources().get("memory", 0.0)
    cores = int(ray.cluster_resources().get("CPU", 1))
    need = clients.count * each_bytes
    figures = f"{clients.count} actors need about {need / 1e9:.1f} GB of {free / 1e9:.1f} GB free, on {cores} cores"
    if clients.hosting == "dedicated" and need > free:
        raise FedLQError(f"clients.hosting=dedicated: {figures}; use packed, which hosts many clients in an actor")
    if clients.hosting != "auto":
        return clients.hosting, "as configured"
    wanted = asks(clients)
    if wanted and not clients.actors and clients.count >= (room := fitting(wanted)):
        return "packed", f"the cluster has room for {room} actors that ask for so much"
    if need > free / 2:
        return "packed", figures
    if clients.count > ACTORS_A_CORE * cores:
        return "packed", f"{figures}: starting them would take long"
    return "dedicated", figures


@dataclass
class Slot:
    """A place for an actor during a round; a dead actor is replaced in its slot.

    Attributes:
        load: samples of its jobs under way.
        heard: when it last replied, or began with nothing under way.
    """

    actor: Any
    load: int = 0
    heard: float = field(default_factory=time.monotonic)

    def replied(self, job: Job) -> None:
        self.load, self.heard = self.load - job.samples, time.monotonic()


class Attempt(NamedTuple):
    """A job under way: its slot, the actor that has it, and the reference of the client's next memory."""

    job: Job
    slot: Slot
    actor: Any
    kept: Any


class RayHost:
    """Dispatches jobs to actors, the longest first.

    Dedicated: as many jobs at once as there are cores. Packed: one job per actor, and a second one for each while more
    jobs wait than there are actors, so that no actor idles. The last jobs go to the actor with the least work.

    An actor that dies, or is silent for `clients.timeout_s`, is replaced. Its jobs run again from the same state and
    give the same bytes. Late replies from a replaced actor are ignored. Only the job that it was running counts as
    failed, not its queued jobs. A client that merely timed out is never skipped.
    """

    def __init__(self, task: Task, kind: str) -> None:
        self.kind, self.task, self.clients = kind, task, task.config.clients
        self.shared = ray.put(task)
        self.nodes, self.asks = Nodes(), asks(self.clients)
        self.not_forked = 0  # actors that should have been forked
        self.homes: dict[Any, str | None] = {}  # the node that each actor was assigned to
        self.actors: list[Any] = []
        self.silent = set[Any]()  # killed because they were silent
        self.fitted: set[str] = set()  # the nodes at the last `fit`
        self.tickets, self.resting = itertools.count(), dict[Any, int]()  # the ticket that each actor waits with
        if kind == "dedicated":
            here = on(ray.get_runtime_context().get_node_id())
            room = 2 * self.clients.count + 10  # every actor may wait and be woken at once
            self.bell = Bell.options(max_concurrency=room, scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # of ray.remote
        self.fit()
        self.evaluator = self.start_evaluator()

    @property
    def asks_to_evaluate(self) -> dict[str, Any]:
        """Resources that the evaluator requests from Ray: only its share of a GPU, if any."""
        if self.task.config.train.device == "cpu":
            return {}
        return {name: asked for name, asked in self.asks.items() if name not in ("num_cpus", "resources")}

    def start_evaluator(self) -> Any:
        """Starts the actor that evaluates and probes; it does not rest."""
        (actor,) = self.start(1, self.asks_to_evaluate)
        self._wake(actor)
        return actor

    def _room(self) -> int:
        """Number of training actors that fit alongside the evaluator."""
        room = fitting(self.asks) - bool(self.asks_to_evaluate)
        if not room:
            share = self.clients.num_gpus
            raise FedLQError(
                f"clients.num_gpus={share:g}: there is no GPU left for the actor that evaluates; "
                f"set {share / 2:g} or less"
            )
        return room

    @property
    def count(self) -> int:
        return len(self.actors)

    def fit(self) -> None:
        """Adapts to nodes that joined or left: surplus actors of a node move or end, and missing ones start."""
        if self.fitted == self.nodes.look().keys():
            return
        self.fitted = set(self.nodes.known)
        packed = self.kind == "packed"
        actors = self.clients.actors or (self._room() if self.asks else self.nodes.cores)
        wanted = min(actors, self.clients.count) if packed else self.clients.count
        self.depth = wanted if packed else self.nodes.cores
        room = Counter(deal(wanted, self.nodes.known.values(), {}))
        kept: list[Any] = []
        for actor in self.actors:
            home = self.homes[actor] or ""
            room[home] -= 1
            kept.append(actor if self.asks or room[home] >= 0 else None)
        staying = [actor for actor in kept if actor]
        fresh = self.start(wanted - len(staying), self.asks, staying)
        for actor in set(self.actors) - set(staying):
            self._wake(actor)
            ray.kill(actor)
        self.actors = [actor or fresh.pop() for actor in kept if actor or fresh] + fresh

    def start(self, count: int, asks: dict[str, Any], beside: Iterable[Any] = ()) -> list[Any]:
        """Starts actors and returns them once they are ready.

        If some die while starting, all start again, up to `clients.retries` times. If a node leaves meanwhile, they
        start on another node.
        """
        wait_s, left = max(_START_S, self.clients.timeout_s), self.clients.retries
        while True:
            taken = Counter(self.homes[actor] or "" for actor in beside)
            homes = [None] * count if asks else deal(count, self.nodes.look().values(), taken)
            options = [self.nodes.options(home) for home in homes]
            actors = [ClientActor.options(**own, **asks).remote(self.shared) for own in options]  # type: ignore[attr-defined]  # as above
            alive = [actor.alive.remote() for actor in actors]
            for actor in actors:
                self._rest(actor)  # at once: hundreds of idle actors would slow the start of the others
            try:
                forked = ray.get(alive, timeout=wait_s)
                self.not_forked += sum(
                    "runtime_env" in own and not its for own, its in zip(options, forked, strict=True)
                )
                self.homes |= zip(actors, homes, strict=True)
                return actors
            except GetTimeoutError:
                told = ", ".join(f"{name}={value}" for name, value in asks.items() if name != "scheduling_strategy")
                why = f" with {told}: does the cluster have such nodes?" if asks else ""
                raise FedLQError(f"clients' actors did not start in {wait_s:g} s{why}") from None
            except (*_DIED, ActorUnschedulableError) as exc:
                at_fault = getattr(exc, "actor_init_failed", False)
                stayed = bool(asks) or set(homes) <= self.nodes.look().keys()
                if at_fault or stayed and not left:
                    hint = "" if at_fault else "; too little memory? fewer clients.actors use less"
                    raise FedLQError(f"a client's actor did not start: {_why(exc)}{hint}") from None
                left -= stayed
                for actor in actors:
                    self._wake(actor)
                    ray.kill(actor)

    def _rest(self, actor: Any) -> None:
        """Makes a dedicated actor wait after its queued calls."""
        if self.kind == "dedicated":
            ticket = self.resting[actor] = next(self.tickets)
            actor.rest.remote([self.bell.wait.remote(ticket)])

    def _wake(self, actor: Any) -> None:
        if actor in self.resting:
            self.bell.ring.remote(self.resting.pop(actor))

    def publish(self, weights: Tensor) -> Any:
        return ray.put(weights.numpy())

    def recall(self, memories: Mapping[int, Any]) -> dict[int, Tensor]:
        return {client: torch.from_numpy(ray.get(kept)) for client, kept in memories.items()}

    def remember(self, memories: Mapping[int, Tensor]) -> dict[int, Any]:
        return {client: ray.put(memory.numpy()) for client, memory in memories.items()}

    def train(
        self, jobs: Sequence[Job], weights: Mapping[int, Any], memories: Mapping[int, Any]
    ) -> Iterator[tuple[int, Reply | ClientError, Any]]:
        self.fit()
        slots = [Slot(actor) for actor in self.actors]
        waiting = sorted(jobs, key=lambda job: (job.samples, job.client))
        under_way: dict[Any, Attempt] = {}
        failed: Counter[tuple[int, bool]] = Counter()  # by client, and whether it was silent
        mourned = set[Any]()  # ended actors whose running job is already blamed
        while waiting or under_way:
            while waiting and len(under_way) < self._room_for(len(waiting)):
                job = waiting.pop()
                ref, attempt = self._dispatch(job, slots, weights, memories)
                under_way[ref] = attempt
                for coming in waiting[-self.depth :] if self.resting else ():
                    self._wake(self.actors[coming.client])
            done, _ = ray.wait(list(under_way), num_returns=1, timeout=min(5.0, self.clients.timeout_s / 4))
            if not done:
                self._give_up_silent(under_way.values())
                continue
            attempt = under_way[done[0]]
            job = attempt.job
            current = next(ref for ref, other in under_way.items() if other.actor is attempt.actor) is done[0]
            del under_way[done[0]]
            attempt.slot.replied(job)
            try:
                reply, kept = _get(done[0]), self._kept(attempt)
            except (*_DIED, ObjectLostError, ClientError) as exc:
                fault = self._fault(exc, attempt, slots)
                died = isinstance(exc, _DIED)
                silent = died and attempt.actor in self.silent
                blamed = not died or current and attempt.actor not in mourned
                mourned |= {attempt.actor} if died and blamed else set()
                failed[job.client, silent] += blamed
                if failed[job.client, silent] <= self.clients.retries and not isinstance(fault, DivergedError):
                    waiting.append(job)
                elif self.clients.on_failure == "skip_client" and not silent:
                    yield job.client, fault, None
                else:
                    raise fault from None
            else:
                yield job.client, reply, kept

    def _room_for(self, waiting: int) -> int:
        """How many jobs may be under way: packed, a second one per actor while more wait than there are actors."""
        return self.depth * (1 + (self.kind == "packed" and waiting > self.count))

    def _dispatch(
        self, job: Job, slots: Sequence[Slot], weights: Mapping[int, Any], memories: Mapping[int, Any]
    ) -> tuple[Any, Attempt]:
        """Send a job to its client's actor; packed, to the actor with the fewest samples under way."""
        slot = min(slots, key=lambda slot: slot.load) if self.kind == "packed" else slots[job.client]
        slot.heard = slot.heard if slot.load else time.monotonic()
        slot.load += job.samples
        self._wake(slot.actor)
        method = slot.actor.train.options(num_returns=2)
        ref, kept = method.remote(job, weights[job.client], memories.get(job.client))
        self._rest(slot.actor)
        return ref, Attempt(job, slot, slot.actor, kept)

    def _kept(self, attempt: Attempt) -> Any:
        """The client's next memory; with several nodes, a copy here survives the loss of another node."""
        if not attempt.job.plan.error_feedback:
            return None
        return attempt.kept if len(self.nodes.known) == 1 else ray.put(_get(attempt.kept))

    def _fault(self, exc: Exception, attempt: Attempt, slots: Sequence[Slot]) -> ClientError:
        """Why an attempt failed; a dead actor is replaced."""
        job, slot = attempt.job, attempt.slot
        if isinstance(exc, ClientError):
            return exc
        if isinstance(exc, ObjectLostError):
            why = f"its reply was lost ({_why(exc)})"
        elif attempt.actor in self.silent:
            why = f"its actor was silent for {self.clients.timeout_s:g} s; raise clients.timeout_s if it needs longer"
        else:
            why = f"its actor died ({_why(exc)}); too little memory? fewer clients.actors use less"
        if isinstance(exc, _DIED):
            self._wake(attempt.actor)  # so that the bell does not keep its ticket
            if slot.actor is attempt.actor:  # else another of its jobs has already replaced it
                at = self.actors.index(slot.actor)
                (slot.actor,) = self.start(1, self.asks, {*self.actors} - {slot.actor})
                self.actors[at] = slot.actor
                for other in slots:
                    other.heard = time.monotonic()  # no replies were read meanwhile
        return ClientError(f"{why}; continue with fedlq resume", round=job.round, client=job.client)

    def _give_up_silent(self, attempts: Iterable[Attempt]) -> None:
        """Kills actors that have been silent for too long. Their jobs then fail like those of any dead actor."""
        for slot in {id(attempt.slot): attempt.slot for attempt in attempts}.values():
            if time.monotonic() - slot.heard > self.clients.timeout_s:
                self.silent.add(slot.actor)
                ray.kill(slot.actor)

    def evaluate(self, weights: Any) -> "Ask":
        return Ask(self, lambda evaluator: evaluator.evaluate.remote(weights))

    def probe(self, probe: Probe, base: Tensor, sent: Tensor, round: int) -> "Ask":
        return Ask(self, lambda evaluator: evaluator.probe.remote(probe, base.numpy(), sent.numpy(), round))


class Ask:
    """A pending result of the evaluator, requested again if the evaluator dies or hangs."""

    def __init__(self, host: RayHost, ask: Callable[[Any], Any]) -> None:
        self.host, self.ask, self.of = host, ask, host.evaluator
        self.ref = ask(host.evaluator)

    def ready(self) -> bool:
        return bool(ray.wait([self.ref], timeout=0)[0])

    def result(self) -> Any:
        for _ in range(self.host.clients.retries + 1):
            try:
                return _get(self.ref, timeout=self.host.clients.timeout_s)
            except (*_DIED, GetTimeoutError) as exc:
                why = _why(exc)
                if self.of is self.host.evaluator:  # else another request has already replaced it
                    ray.kill(self.of)
                    self.host.evaluator = self.host.start_evaluator()
                self.of = self.host.evaluator
                self.ref = self.ask(self.of)
        raise FedLQError(f"the actor that evaluates died or hung ({why}); too little memory?")
