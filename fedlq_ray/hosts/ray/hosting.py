"""Clients as Ray actors: `dedicated`, one actor per client, or `packed`, many clients in a few actors."""

from fedlq_ray import startup  # noqa: F401  (first: a user's file could hide later imports)

# isort: split
import time
from bisect import insort
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import ray
import torch
from ray.exceptions import GetTimeoutError, ObjectLostError, RayError, RayTaskError
from torch import Tensor

from fedlq_ray.errors import ClientError, DivergedError, FedLQError
from fedlq_ray.federation.host import Answer
from fedlq_ray.federation.task import Job
from fedlq_ray.hosts.ray.pool import DIED, Pool, Slot, why
from fedlq_ray.strategies import Probe


def _get(ref: Any, timeout: float | None = None) -> Any:
    try:
        return ray.get(ref, timeout=timeout)
    except RayTaskError as exc:
        cause = exc.cause
        # A Ray error: an object was lost with its node; the driver restarts from its checkpoint.
        raise (cause if isinstance(cause, FedLQError | RayError) else FedLQError(f"in an actor: {cause!r}")) from None


class Order(NamedTuple):
    """A submitted job, with what it starts from."""

    job: Job
    weights: Any
    memory: Any


@dataclass
class Attempt:
    """An order under way: its actor, and the reference of the client's next memory."""

    order: Order
    slot: Slot
    kept: Any
    withdrawn: bool = False


class RayHost:
    """Dispatches jobs to actors, the longest first.

    Dedicated: as many jobs at once as there are cores. Packed: one job per actor, and a second one for each while more
    jobs wait than there are actors, so that no actor idles. The last jobs go to the actor with the least work.

    An actor that dies, or is silent for `clients.timeout_s`, is replaced. Its jobs run again from the same state and
    give the same bytes. Late replies from a replaced actor are ignored. Only the job that it was running counts as
    failed, not its queued jobs. A client that merely timed out is never skipped.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool, self.clients = pool, pool.clients
        self.evaluator = pool.evaluator()
        self.waiting: list[Order] = []  # the next one last
        self.under_way: dict[Any, Attempt] = {}  # by the reference of the reply; an actor's in their order
        self.failed: Counter[tuple[int, int, bool]] = Counter()  # by the job's key, and whether its actor was silent

    def publish(self, weights: Tensor) -> Any:
        return ray.put(weights.numpy())

    def recall(self, memories: Mapping[int, Any]) -> dict[int, Tensor]:
        return {client: torch.from_numpy(ray.get(kept)) for client, kept in memories.items()}

    def remember(self, memories: Mapping[int, Tensor]) -> dict[int, Any]:
        return {client: ray.put(memory.numpy()) for client, memory in memories.items()}

    def submit(self, job: Job, weights: Any, memory: Any) -> None:
        if not self.waiting and not self.under_way:
            self.pool.fit()
            self.failed.clear()
        insort(self.waiting, Order(job, weights, memory), key=lambda order: (order.job.samples, order.job.client))

    def withdraw(self, jobs: Iterable[Job]) -> None:
        keys = {job.key for job in jobs}
        self.waiting = [order for order in self.waiting if order.job.key not in keys]
        for attempt in self.under_way.values():
            attempt.withdrawn |= attempt.order.job.key in keys

    def result(self) -> Answer:
        while True:
            while self.waiting and len(self.under_way) < self._room_for(len(self.waiting)):
                self._dispatch(self.waiting.pop())
            done, _ = ray.wait(list(self.under_way), num_returns=1, timeout=min(5.0, self.clients.timeout_s / 4))
            if not done:
                self._give_up_silent()
                continue
            attempt = self.under_way[done[0]]
            running = next(other for other in self.under_way.values() if other.slot is attempt.slot) is attempt
            del self.under_way[done[0]]
            attempt.slot.replied(attempt.order.job.samples)
            try:
                reply = _get(done[0])
                kept = self._kept(attempt) if reply.keeps else None
                answer: Answer | None = Answer(attempt.order.job, reply, kept)
            except (*DIED, ObjectLostError, ClientError) as exc:
                answer = self._failed(exc, attempt, running)
            if answer and not attempt.withdrawn:
                return answer

    def _room_for(self, waiting: int) -> int:
        """How many jobs may be under way: packed, a second one per actor while more wait than there are actors."""
        return self.pool.depth * (1 + (self.pool.packed and waiting > len(self.pool.slots)))

    def _dispatch(self, order: Order) -> None:
        """Sends a job to its client's actor; packed, to the actor with the fewest samples under way."""
        pool, job = self.pool, order.job
        slot = min(pool.slots, key=lambda slot: slot.load) if pool.packed else pool.slots[job.client]
        slot.took(job.samples)
        pool.wake(slot)
        ref, kept = slot.actor.train.options(num_returns=2).remote(job, order.weights, order.memory)
        pool.rest(slot)
        self.under_way[ref] = Attempt(order, slot, kept)
        for coming in () if pool.packed else self.waiting[-pool.depth :]:
            pool.wake(pool.slots[coming.job.client])

    def _kept(self, attempt: Attempt) -> Any:
        """The client's next memory; with several nodes, a copy here survives the loss of another node."""
        return attempt.kept if len(self.pool.nodes.known) == 1 else ray.put(_get(attempt.kept))

    def _failed(self, exc: Exception, attempt: Attempt, running: bool) -> Answer | None:
        """Queues a failed job again (None), or gives it up.

        Args:
            running: the actor was running this job, and not one before it.
        Raises:
            ClientError: it failed too often, and may not be skipped.
        """
        job, slot, died = attempt.order.job, attempt.slot, isinstance(exc, DIED)
        fault = self._fault(exc, attempt)
        if died:
            self.pool.replace(slot)
        blamed = not died or running and not slot.blamed
        slot.blamed |= died and blamed
        if attempt.withdrawn:
            return None
        silent = died and slot.silent
        self.failed[*job.key, silent] += blamed
        if self.failed[*job.key, silent] <= self.clients.retries and not isinstance(fault, DivergedError):
            self.waiting.append(attempt.order)
            return None
        if self.clients.on_failure == "skip_client" and not silent:
            return Answer(job, fault, None)
        raise fault from None

    def _fault(self, exc: Exception, attempt: Attempt) -> ClientError:
        """Why an attempt failed."""
        if isinstance(exc, ClientError):
            return exc
        if isinstance(exc, ObjectLostError):
            what = f"its reply was lost ({why(exc)})"
        elif attempt.slot.silent:
            what = f"its actor was silent for {self.clients.timeout_s:g} s; raise clients.timeout_s if it needs longer"
        else:
            what = f"its actor died ({why(exc)}); too little memory? fewer clients.actors use less"
        job = attempt.order.job
        return ClientError(f"{what}; continue with fedlq resume", round=job.round, client=job.client)

    def _give_up_silent(self) -> None:
        """Kills actors that have been silent for too long. Their jobs then fail like those of any dead actor."""
        for slot in {attempt.slot for attempt in self.under_way.values()}:
            if time.monotonic() - slot.heard > self.clients.timeout_s:
                slot.silent = True
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
            except (*DIED, GetTimeoutError) as exc:
                last = exc
                if self.of is self.host.evaluator:  # else another request has already replaced it
                    ray.kill(self.of)
                    self.host.evaluator = self.host.pool.evaluator()
                self.of = self.host.evaluator
                self.ref = self.ask(self.of)
        raise FedLQError(f"the actor that evaluates died or hung ({why(last)}); too little memory?")
