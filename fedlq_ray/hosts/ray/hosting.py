"""Clients as Ray actors: `dedicated`, one actor per client, or `packed`, many clients in a few actors."""

from fedlq_ray import startup  # noqa: F401  (first: a user's file could hide later imports)

# isort: split
import asyncio
import contextlib
import itertools
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from numpy.typing import NDArray
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
from fedlq_ray.federation.task import Job, Task, Timed, Workplace, timed
from fedlq_ray.hosts.ray import forkserver
from fedlq_ray.hosts.ray.placement import Nodes, asks, deal, fitting, on
from fedlq_ray.models import saved_bytes
from fedlq_ray.strategies import Probe
from fedlq_ray.training.device import reproducible
from fedlq_ray.training.local import Reply

# Memory of an actor without its model (experiments/benchmarks/README.md; ARCHITECTURE.md).
FORKED_BYTES, ORDINARY_BYTES = 42e6, 212e6
VECTORS = 8  # vectors of the model's length that training and quantizing hold at once
_START_S = 300.0  # minimum time that actors get to start
_DIED = (RayActorError, OutOfMemoryError)  # the second: Ray itself ended an actor because memory ran out
ACTORS_A_CORE = 8  # an actor takes about a second of a core to start


def _tensor(array: NDArray[np.float32]) -> Tensor:
    """A shared, read-only array of the object store as a tensor of this process."""
    return torch.from_numpy(array.copy())


@ray.remote(num_cpus=0)
class ClientActor:
    """Hosts one client or many. A call's job names its client; the client's memory travels with the call."""

    def __init__(self, task: Task) -> None:
        self.settings = reproducible(task.config.train.device)
        self.settings.__enter__()  # for the lifetime of this process
        self.place = Workplace(task)

    def alive(self) -> bool:
        """Returns once the actor runs: whether it was forked."""
        return forkserver.FORKED in os.environ

    def rest(self, rung: list[Any]) -> None:
        """Wait until the bell rings or no longer exists."""
        with contextlib.suppress(RayError):
            ray.get(rung[0])

    def train(
        self, job: Job, weights: NDArray[np.float32], memory: NDArray[np.float32] | None
    ) -> tuple[Reply, NDArray[np.float32] | None]:
        reply, kept = self.place.train(job, _tensor(weights), None if memory is None else _tensor(memory))
        return reply, None if kept is None else kept.numpy()

    def evaluate(self, weights: NDArray[np.float32]) -> Timed:
        return timed(self.place.evaluate, _tensor(weights))

    def probe(self, probe: Probe, base: NDArray[np.float32], sent: NDArray[np.float32], round: int) -> Timed:
        return timed(self.place.probe, probe, _tensor(base), _tensor(sent), round)


@ray.remote(num_cpus=0)
class Bell:
    """Dedicated actors wait on it between their jobs, each with its own ticket.

    An idle Ray process takes half a percent of a core. Two thirds of this are signal checks, 100 times per second. A
    process that waits in a call checks once per second.
    """

    def __init__(self) -> None:
        self.rung: dict[int, asyncio.Event] = {}

    async def wait(self, ticket: int) -> None:
        await self.rung.setdefault(ticket, asyncio.Event()).wait()
        del self.rung[ticket]

    async def ring(self, ticket: int) -> None:
        self.rung.setdefault(ticket, asyncio.Event()).set()


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


class Attempt(NamedTuple):
    """A job under way: its actor and the actor's index, and the reference of the client's next memory."""

    job: Job
    at: int
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
            self.bell = Bell.options(max_concurrency=room, scheduling_strategy=here).remote()  # type: ignore[attr-defined]
        self.fit()
        self.evaluator = self.start_evaluator()
        self.memories: dict[int, Any] = {}

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
            actors = [ClientActor.options(**own, **asks).remote(self.shared) for own in options]  # type: ignore[attr-defined]
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

    def remember(self, memories: Mapping[int, Tensor]) -> None:
        self.memories = {client: ray.put(memory.numpy()) for client, memory in memories.items()}

    def train(self, jobs: Sequence[Job], weights: Mapping[int, Any]) -> Iterator[tuple[int, Reply | ClientError]]:
        self.fit()
        packed = self.kind == "packed"
        waiting = sorted(jobs, key=lambda job: (job.samples, job.client))
        under_way: dict[Any, Attempt] = {}
        load = [0] * self.count  # samples
        heard = [time.monotonic()] * self.count  # start of each actor's silence
        failed: Counter[tuple[int, bool]] = Counter()  # by client, and whether it was silent
        mourned = set[Any]()  # ended actors whose running job is already blamed
        while waiting or under_way:
            while waiting and len(under_way) < self.depth * (1 + (packed and len(waiting) > self.count)):
                job = waiting.pop()
                at = min(range(self.count), key=load.__getitem__) if packed else job.client
                heard[at] = heard[at] if load[at] else time.monotonic()
                load[at] += job.samples
                self._wake(self.actors[at])
                method = self.actors[at].train.options(num_returns=2)
                ref, kept = method.remote(job, weights[job.client], self.memories.get(job.client))
                under_way[ref] = Attempt(job, at, self.actors[at], kept)
                self._rest(self.actors[at])
                for coming in waiting[-self.depth :] if self.resting else ():
                    self._wake(self.actors[coming.client])
            done, _ = ray.wait(list(under_way), num_returns=1, timeout=min(5.0, self.clients.timeout_s / 4))
            if not done:
                self._give_up_silent(under_way.values(), heard)
                continue
            job, at, actor, kept = under_way[done[0]]
            current = next(ref for ref, attempt in under_way.items() if attempt.actor is actor) is done[0]
            blamed, silent = True, False
            del under_way[done[0]]
            load[at], heard[at] = load[at] - job.samples, time.monotonic()
            try:
                reply = _get(done[0])
                if job.plan.error_feedback:  # with several nodes, a copy here survives the loss of another node
                    self.memories[job.client] = kept if len(self.nodes.known) == 1 else ray.put(_get(kept))
                yield job.client, reply
                continue
            except _DIED as exc:
                why = f"died ({_why(exc)}); too little memory? fewer clients.actors use less"
                if silent := actor in self.silent:
                    why = f"was silent for {self.clients.timeout_s:g} s; raise clients.timeout_s if it needs longer"
                fault = ClientError(f"its actor {why}; continue with fedlq resume", round=job.round, client=job.client)
                blamed = current and actor not in mourned
                mourned |= {actor} if blamed else set()
                self._wake(actor)  # so that the bell does not keep its ticket
                if self.actors[at] is actor:  # else another of its jobs has already replaced it
                    (self.actors[at],) = self.start(1, self.asks, {*self.actors} - {actor})
                    heard = [time.monotonic()] * self.count  # no replies were read meanwhile
            except ObjectLostError as exc:
                why = f"its reply was lost ({_why(exc)}); continue with fedlq resume"
                fault = ClientError(why, round=job.round, client=job.client)
            except ClientError as exc:
                fault = exc
            failed[job.client, silent] += blamed
            if failed[job.client, silent] <= self.clients.retries and not isinstance(fault, DivergedError):
                waiting.append(job)
            elif self.clients.on_failure == "skip_client" and not silent:
                yield job.client, fault
            else:
                raise fault from None

    def _give_up_silent(self, attempts: Iterable[Attempt], heard: Sequence[float]) -> None:
        """Kills actors that have been silent for too long. Their jobs then fail like those of any dead actor."""
        for at in {attempt.at for attempt in attempts}:
            if time.monotonic() - heard[at] > self.clients.timeout_s:
                self.silent.add(self.actors[at])
                ray.kill(self.actors[at])

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
