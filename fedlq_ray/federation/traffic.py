"""What happens between two steps of the server: clients are asked, fly, and end, in the order of simulated time.

A flight is a function of what is known when it departs, so its job runs at once, long before its simulated end. The
end is known when the host has answered; before that, a lower bound is. An event is the next one as soon as no flight
that has yet to be answered can end before it, so real time changes nothing, and nothing is ever undone
(conservative parallel simulation: Chandy and Misra, IEEE TSE 5(5), 1979).
"""

import heapq
import math
from collections import Counter
from typing import Any, Generic, TypeVar

import numpy as np

from fedlq_ray.errors import FedLQError
from fedlq_ray.federation.downlink import Shared
from fedlq_ray.federation.flight import Flight, FlightEnd, Landing, cut, earliest_s, end
from fedlq_ray.federation.host import Answer, Host
from fedlq_ray.federation.planning import Dispatch, Rules, plan
from fedlq_ray.federation.state import ServerState
from fedlq_ray.federation.task import Job
from fedlq_ray.training.payloads import MEMORIES

FRUITLESS = 2000  # so many flights in a row without an update end a run; at a dropout of 0.99 they have p = 2e-9
Landings = dict[tuple[int, int], Landing]  # of jobs that the host has yet to answer, by (dispatch, client)


def land(host: Host, landings: Landings) -> Answer:
    """Waits for the host's next answer, and hands it to its flight. Only the first answer to a job counts."""
    answer = host.result()
    if landing := landings.pop(answer.job.key, None):
        landing.answer = answer
    return answer


Item = TypeVar("Item")
Order = tuple[int, int]  # of a flight: client, dispatch


class Queue(Generic[Item]):
    """Items by their times, of which any may be removed."""

    def __init__(self) -> None:
        self.items: dict[Order, Item] = {}
        self._heap: list[tuple[float, int, int]] = []  # with entries of removed items

    def add(self, order: Order, at_s: float, item: Item) -> None:
        self.items[order] = item
        heapq.heappush(self._heap, (at_s, *order))

    def first(self) -> tuple[float, Item | None]:
        """The first item and its time; items of the same time in order. (inf, None) if there is none."""
        while self._heap and self._heap[0][1:] not in self.items:
            heapq.heappop(self._heap)
        return (self._heap[0][0], self.items[self._heap[0][1:]]) if self._heap else (math.inf, None)


class Traffic:
    """The flights of one step.

    Args:
        published: the weights of `state`, in the form of the host.
        landings: receives the jobs that this step starts.

    Attributes:
        flying: by client.
        ended: since the last step, in the order of their ends.
        now_s: the simulated time.
        arrived: how many updates have arrived since the last step.
        late: the deadline has passed.
        vacant: there may be a client to ask.
        wake_s: when the next client becomes available, if there is room for it.
        shared: what all clients hold, with what each has fetched by now.
        held, memories: by client, with what the flights that have ended changed.
        common: the last mean update in the form of the host, if clients need it.
    """

    def __init__(self, rules: Rules, host: Host, state: ServerState, published: Any, landings: Landings) -> None:
        self.rules, self.host, self.state, self.landings = rules, host, state, landings
        self.task, self.config = rules.task, rules.task.config
        self.flying = {flight.client: flight for flight in state.flights}
        self.ended: list[FlightEnd] = []
        self.now_s, self.dispatches = state.sim_time_s, state.dispatches
        self.held, self.memories, self.common = dict(state.held), dict(state.memories), None
        self.shared = None if (s := state.shared) is None else Shared(s.model, s.sent, dict(s.fetched))
        self.starts = {id(state.weights): (state.weights, published)}  # models that clients start from, by id
        deadline_s = self.config.server.deadline_s
        self.deadline_s = math.inf if deadline_s is None else state.sim_time_s + deadline_s
        self.arrived, self.late, self.vacant, self.wake_s = 0, False, False, math.inf
        self._ends = Queue[FlightEnd]()
        self._awaited = Queue[Flight]()  # by the time before which they cannot end
        for flight in state.flights:
            self._watch(flight)
        self.ask()

    def ask(self) -> None:
        """Asks idle clients, as many as may be under way; if nobody is available or under way, time passes."""
        self.vacant, self.wake_s = False, math.inf
        while (room := self.task.clients.cohort - len(self.flying)) > 0:
            idle = self._idle()
            if len(idle):
                dispatch = Dispatch(self.dispatches, self.now_s, self.held, self.shared)
                self.dispatches += 1
                chosen = self.rules.choose(self.state, idle, min(room, len(idle)), dispatch.number, self.now_s)
                for flight in plan(self.rules, self.state, dispatch, chosen):
                    self._depart(flight)
            if self.flying or not self._pass_time():
                break
        if self.config.continuous and len(self.flying) < min(self.task.clients.cohort, self.task.clients.count):
            self.wake_s = self._next_return_s()

    def _next_return_s(self) -> float:
        """When the next client that is not under way becomes available."""
        idle = (client for client in range(self.task.clients.count) if client not in self.flying)
        return min(self.task.availability.returns_s(client, self.now_s) for client in idle)

    def _pass_time(self) -> bool:
        """Jumps to when the next client becomes available; False if the server's step comes first."""
        found = self._next_return_s()
        if self.arrived and (math.isinf(found) or found >= self.deadline_s):
            self.late |= math.isinf(found)  # nobody will come any more: the step takes what has arrived
            return False
        if math.isinf(found):
            raise FedLQError(
                f"step {self.state.round}: no client is available after {self.now_s:.6g} simulated seconds "
                "(clients.availability)"
            )
        if not self.arrived:  # nobody was there to keep the deadline
            self.deadline_s += found - self.now_s
        self.now_s = found
        return True

    def _idle(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        idle = np.delete(np.arange(self.task.clients.count), sorted(self.flying))
        if not self.task.always_available:
            there = [self.task.availability.leaves_s(client, self.now_s) > self.now_s for client in idle.tolist()]
            idle = idle[np.array(there, bool)]
        return idle

    def _depart(self, flight: Flight) -> None:
        self.flying[flight.client] = flight
        if flight.job is not None:
            self.landings[flight.key] = flight.landing
            model = flight.download.model
            if id(model) not in self.starts:
                self.starts[id(model)] = model, self.host.publish(model)
            self.host.submit(flight.job, self.starts[id(model)][1], self._memory(flight.job))
        self._watch(flight)

    def _memory(self, job: Job) -> Any:
        """What the job's client gets of earlier rounds, in the form of the host."""
        if not MEMORIES[job.plan.error_feedback].common:
            return self.memories.get(job.client)
        if self.common is None:
            (self.common,) = self.host.remember({job.client: self.state.update}).values()
        return self.common

    def _watch(self, flight: Flight) -> None:
        """Notes when a flight ends, or when it ends at the earliest."""
        if found := end(self.task, flight):
            self._ends.add(flight.order, found.at_s, found)
        else:
            self._awaited.add(flight.order, earliest_s(self.task, flight), flight)

    @property
    def full(self) -> bool:
        """Whether the server takes its step now."""
        wanted = self.config.server.buffer
        if wanted is not None and self.arrived >= wanted or self.late and self.arrived:
            return True
        return not self.flying and not self.config.continuous

    def advance(self) -> None:
        """Moves on by all events that are certain: until the server takes its step, or an answer of the host is needed.

        A place that is free is filled when nothing more can happen at the same time, so that after a step it gets the
        new model.
        """
        while not self.full:
            for flight in [flight for flight in self._awaited.items.values() if not flight.awaited]:
                del self._awaited.items[flight.order]
                self._watch(flight)
            end_s, ended = self._ends.first()
            bound_s, _ = self._awaited.first()
            deadline_s = math.inf if self.late else self.deadline_s
            if self.vacant and min(end_s, bound_s, deadline_s) > self.now_s:
                self.ask()
                continue
            # The bytes of a plan may fill the deadline to the last bit: rounding does not make them late.
            tolerant_s = deadline_s * (1 + 1e-9)
            if bound_s <= min(end_s, tolerant_s, self.wake_s):
                return
            if ended and end_s <= min(tolerant_s, self.wake_s):
                self._end(ended)
            elif self.wake_s < deadline_s:
                self.now_s, self.vacant, self.wake_s = self.wake_s, True, math.inf
            else:
                self.now_s, self.late = max(self.now_s, deadline_s), True

    def _end(self, ended: FlightEnd) -> None:
        flight = ended.flight
        self.now_s = max(self.now_s, ended.at_s)
        del self.flying[flight.client]
        self._ends.items.pop(flight.order, None)
        self._awaited.items.pop(flight.order, None)
        self.ended.append(ended)
        self.vacant = self.config.continuous
        if ended.fetched and flight.download.coded:
            if self.shared is None:
                self.held[flight.client] = flight.download.model
            else:
                fetched = self.shared.fetched
                fetched[flight.client] = fetched.get(flight.client, 0) + flight.download.num_bytes
        if flight.awaited and flight.job:  # it left, or is stopped, before it was trained
            self.host.withdraw([flight.job])
            self.landings.pop(flight.key, None)
        if ended.how == "arrived":
            self.arrived += 1
            if (answer := flight.landing.answer) and answer.memory is not None:
                self.memories[flight.client] = answer.memory
        # Where many are under way, the first to end may all be some that drop out.
        fruitless = self.config.continuous and not self.arrived
        if fruitless and len(self.ended) >= max(FRUITLESS, 100 * self.task.clients.cohort):
            how = ", ".join(f"{name}: {n}" for name, n in sorted(Counter(e.how for e in self.ended).items()))
            raise FedLQError(
                f"step {self.state.round}: {len(self.ended)} clients were asked since the last step, and no update "
                f"arrived ({how}); look at clients.availability and clients.dropout"
            )

    def close(self) -> list[FlightEnd]:
        """Stops the flights that this step makes too stale; all that have ended since the last step, in order."""
        limit = self.config.server.max_staleness
        for flight in sorted(self.flying.values(), key=lambda flight: flight.order):
            if limit is not None and self.state.round + 1 - flight.version > limit:
                self._end(cut(self.task, flight, "stopped", self.now_s))
        return sorted(self.ended, key=lambda e: e.flight.order)

    def abandon(self) -> None:
        """Takes back the jobs that this step has started."""
        before = {flight.key for flight in self.state.flights}
        jobs = [flight.job for flight in self.flying.values() if flight.job and flight.key not in before]
        self.host.withdraw(jobs)
        for job in jobs:
            self.landings.pop(job.key, None)
