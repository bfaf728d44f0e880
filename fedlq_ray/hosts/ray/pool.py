"""The training actors: how they start, where, how they rest, and how a dead one is replaced."""

from fedlq_ray import startup  # noqa: F401  (first: a user's file could hide later imports)

# isort: split
import itertools
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorUnschedulableError, GetTimeoutError, OutOfMemoryError, RayActorError

from fedlq_ray.errors import FedLQError, first_line
from fedlq_ray.federation.task import Task
from fedlq_ray.hosts.ray.actors import Bell, ClientActor
from fedlq_ray.hosts.ray.placement import Nodes, asks, deal, fitting, on

DIED = (RayActorError, OutOfMemoryError)  # the second: Ray itself ended an actor because memory ran out
_START_S = 300.0  # minimum time that actors get to start


def why(exc: Exception) -> str:
    """What happened to an actor, in one line. Ray's last line has the error that the actor's constructor raised."""
    first = first_line(exc)
    return (
        str(exc).strip().splitlines()[-1] if "creation task" in first else f"{type(exc).__name__}: {first.rstrip('.')}"
    )


@dataclass(eq=False)
class Slot:
    """An actor, and its work.

    Attributes:
        home: the node that it was assigned to; None: Ray chose one.
        ticket: it waits at the bell with this ticket; None: it does not wait.
        load: samples of its jobs under way.
        heard: when it last replied, or began with nothing under way.
        silent: it was killed because it was silent.
        blamed: it died, and the job that it was running counts as failed.
    """

    actor: Any
    home: str | None
    ticket: int | None = None
    load: int = 0
    heard: float = field(default_factory=time.monotonic)
    silent: bool = False
    blamed: bool = False

    def took(self, samples: int) -> None:
        self.heard = self.heard if self.load else time.monotonic()
        self.load += samples

    def replied(self, samples: int) -> None:
        self.load, self.heard = self.load - samples, time.monotonic()


class Pool:
    """The actors that train: one per client (`dedicated`), or a few (`packed`).

    Attributes:
        slots: one per actor; of dedicated ones, in the order of clients.
        depth: how many jobs keep the cluster busy.
        not_forked: actors that should have been forked, and were not.
    """

    def __init__(self, task: Task, kind: str) -> None:
        self.task, self.clients, self.packed = task, task.clients, kind == "packed"
        self.shared = ray.put(task)
        self.nodes, self.asks = Nodes(), asks(self.clients)
        self.fitted: set[str] = set()  # the nodes at the last `fit`
        self.slots: list[Slot] = []
        self.not_forked = 0
        self.tickets = itertools.count()
        if not self.packed:
            here = on(ray.get_runtime_context().get_node_id())
            room = 2 * self.clients.count + 10  # every actor may wait and be woken at once
            self.bell = Bell.options(max_concurrency=room, scheduling_strategy=here).remote()  # type: ignore[attr-defined]  # of ray.remote
        self.fit()

    @property
    def asks_to_evaluate(self) -> dict[str, Any]:
        """Resources that the evaluator requests from Ray: only its share of a GPU, if any."""
        if self.task.config.train.device == "cpu":
            return {}
        return {name: asked for name, asked in self.asks.items() if name not in ("num_cpus", "resources")}

    def evaluator(self) -> Any:
        """Starts the actor that evaluates and probes; it does not rest."""
        (slot,) = self.start(1, self.asks_to_evaluate)
        self.wake(slot)
        return slot.actor

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

    def fit(self) -> None:
        """Adapts to nodes that joined or left: surplus actors of a node move or end, and missing ones start."""
        if self.fitted == self.nodes.look().keys():
            return
        self.fitted = set(self.nodes.known)
        actors = self.clients.actors or (self._room() if self.asks else self.nodes.cores)
        wanted = min(actors, self.clients.count) if self.packed else self.clients.count
        self.depth = wanted if self.packed else self.nodes.cores
        room = Counter(deal(wanted, self.nodes.known.values(), {}))
        kept: list[Slot | None] = []
        for slot in self.slots:
            room[slot.home or ""] -= 1
            kept.append(slot if self.asks or room[slot.home or ""] >= 0 else None)
        staying = [slot for slot in kept if slot]
        fresh = self.start(wanted - len(staying), self.asks, staying)
        for slot in self.slots:
            if slot not in staying:
                self.end(slot)
        self.slots = [slot or fresh.pop() for slot in kept if slot or fresh] + fresh

    def start(self, count: int, asks: dict[str, Any], beside: Iterable[Slot] = ()) -> list[Slot]:
        """Starts actors and returns them once they are ready.

        If some die while starting, all start again, up to `clients.retries` times. If a node leaves meanwhile, they
        start on another node.
        """
        wait_s, left = max(_START_S, self.clients.timeout_s), self.clients.retries
        while True:
            taken = Counter(slot.home or "" for slot in beside)
            homes = [None] * count if asks else deal(count, self.nodes.look().values(), taken)
            options = [self.nodes.options(home) for home in homes]
            slots = [Slot(self.create(own | asks), home) for own, home in zip(options, homes, strict=True)]
            alive = [slot.actor.alive.remote() for slot in slots]
            for slot in slots:
                self.rest(slot)  # at once: hundreds of idle actors would slow the start of the others
            try:
                forked = ray.get(alive, timeout=wait_s)
                self.not_forked += sum(
                    "runtime_env" in own and not its for own, its in zip(options, forked, strict=True)
                )
                return slots
            except GetTimeoutError:
                told = ", ".join(f"{name}={value}" for name, value in asks.items() if name != "scheduling_strategy")
                hint = f" with {told}: does the cluster have such nodes?" if asks else ""
                raise FedLQError(f"clients' actors did not start in {wait_s:g} s{hint}") from None
            except (*DIED, ActorUnschedulableError) as exc:
                at_fault = getattr(exc, "actor_init_failed", False)
                stayed = bool(asks) or set(homes) <= self.nodes.look().keys()
                if at_fault or stayed and not left:
                    hint = "" if at_fault else "; too little memory? fewer clients.actors use less"
                    raise FedLQError(f"a client's actor did not start: {why(exc)}{hint}") from None
                left -= stayed
                for slot in slots:
                    self.end(slot)

    def create(self, options: dict[str, Any]) -> Any:
        """Creates one actor, with Ray's options."""
        return ClientActor.options(**options).remote(self.shared)  # type: ignore[attr-defined]  # of ray.remote

    def end(self, slot: Slot) -> None:
        self.wake(slot)  # so that the bell does not keep its ticket
        ray.kill(slot.actor)

    def replace(self, slot: Slot) -> None:
        """Starts another actor in a dead one's place, unless that was done already."""
        self.wake(slot)
        if slot in self.slots:
            at = self.slots.index(slot)
            (self.slots[at],) = self.start(1, self.asks, [other for other in self.slots if other is not slot])
            for other in self.slots:
                other.heard = time.monotonic()  # no replies were read meanwhile

    def rest(self, slot: Slot) -> None:
        """Makes a dedicated actor wait after its queued calls."""
        if not self.packed:
            slot.ticket = next(self.tickets)
            slot.actor.rest.remote([self.bell.wait.remote(slot.ticket)])

    def wake(self, slot: Slot) -> None:
        if slot.ticket is not None:
            self.bell.ring.remote(slot.ticket)
            slot.ticket = None
