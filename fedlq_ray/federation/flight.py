"""A client under way: from the moment it is asked until its payload arrives, or something else ends its flight."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fedlq_ray.errors import ClientError
from fedlq_ray.federation import cohorts
from fedlq_ray.federation.bandwidth import Course
from fedlq_ray.federation.clock import ClientTime, client_time, conditions
from fedlq_ray.federation.downlink import Download
from fedlq_ray.federation.host import Answer
from fedlq_ray.federation.profiles import Profile
from fedlq_ray.federation.task import Job, Task
from fedlq_ray.quantization import LAYER_HEADER, PAYLOAD_HEADER
from fedlq_ray.strategies import Member
from fedlq_ray.training.local import Plan, Reply

End = Literal["arrived", "idle", "dropped_out", "failed", "left", "stopped"]


@dataclass
class Landing:
    """What a host answers to a flight's job; None until it does. The answer is a function of the flight alone."""

    answer: Answer | None = None


@dataclass(frozen=True)
class Flight:
    """A client under way.

    Attributes:
        member: the client as its plan saw it.
        dispatch: the moment at which it was asked, counted from 0; with the client, the key of its randomness.
        version: the step of the server at that moment. In a synchronous run both are the round.
        start_s: the simulated time of that moment.
        leaves_s: when the client stops being available.
        link: the client's profile in this flight.
        download: the model that it fetches.
        sends: whether it has a plan; without one it fetches nothing, and ends at once.
        job: what it trains and sends; None if it has no plan, drops out, or leaves before it could send anything.
        least_bytes: that its payload has at least, by its plan.
    """

    member: Member
    dispatch: int
    version: int
    start_s: float
    leaves_s: float
    link: Profile
    download: Download
    sends: bool
    job: Job | None
    least_bytes: int = 0
    landing: Landing = field(default_factory=Landing, compare=False)

    @property
    def client(self) -> int:
        return self.member.client

    @property
    def key(self) -> tuple[int, int]:
        return self.dispatch, self.client

    @property
    def order(self) -> tuple[int, int]:
        """Flights of a step are summed and recorded in this order."""
        return self.client, self.dispatch

    @property
    def awaited(self) -> bool:
        """Whether the host has yet to answer."""
        return self.job is not None and self.landing.answer is None


@dataclass(frozen=True)
class FlightEnd:
    """A flight that has ended.

    Attributes:
        how: arrived; idle, without a plan; dropped_out, did not answer; failed, and is skipped; left, became
            unavailable; stopped, because a step would have made it too stale.
        at_s: the simulated time of its end.
        times: how long it fetched, trained and sent.
        uplink_bytes, downlink_bytes: that were transferred by then.
    """

    flight: Flight
    how: End
    at_s: float
    times: ClientTime
    uplink_bytes: int
    downlink_bytes: int

    @property
    def reply(self) -> Reply | None:
        """Its reply, if it arrived."""
        answer = self.flight.landing.answer
        return answer.reply if self.how == "arrived" and answer and isinstance(answer.reply, Reply) else None

    @property
    def fetched(self) -> bool:
        """Whether it fetched the whole model."""
        return self.flight.sends and self.downlink_bytes == self.flight.download.num_bytes

    @property
    def wasted(self) -> int:
        """Bytes of a flight that did not arrive, in both directions."""
        return 0 if self.how in ("arrived", "idle") else self.uplink_bytes + self.downlink_bytes


def depart(
    task: Task, member: Member, dispatch: int, version: int, start_s: float, download: Download, plan: Plan | None
) -> Flight:
    """A client's flight. A client that drops out, or leaves before it could send anything, does not train."""
    client = member.client
    flight = Flight(
        member=member,
        dispatch=dispatch,
        version=version,
        start_s=start_s,
        leaves_s=task.availability.leaves_s(client, start_s),
        link=conditions(task.profiles[client], seed=task.config.seed, round=dispatch, client=client),
        download=download,
        sends=plan is not None,
        job=None,
    )
    trained_s = start_s + times(task, flight, 0).total_s
    if plan is None or cohorts.drops_out(task, dispatch, client) or trained_s > flight.leaves_s:
        return flight
    # A client that fails and may be skipped ends before it sends anything.
    least = 0 if task.config.clients.on_failure == "skip_client" else least_bytes(plan)
    job = Job(dispatch, client, plan, cohorts.samples_of_member(task, member), version)
    return replace(flight, job=job, least_bytes=least)


def least_bytes(plan: Plan) -> int:
    """Bytes that a payload has at least; where its quantizers have a fixed size, all of them."""
    if callable(plan.segments):
        return PAYLOAD_HEADER + LAYER_HEADER
    sizes = [segment.quantizer.size(segment.stop - segment.start) for segment in plan.segments]
    return PAYLOAD_HEADER + sum(LAYER_HEADER + (size or 0) for size in sizes)


def samples(task: Task, flight: Flight) -> int:
    """Samples that a flight trains on, over all passes."""
    return cohorts.samples_of_member(task, flight.member) if flight.sends else 0


def times(task: Task, flight: Flight, uplink_bytes: int) -> ClientTime:
    """How long a flight takes if it sends so many bytes."""
    network, fetches = task.config.network, flight.download.num_bytes if flight.sends else 0
    found = client_time(
        flight.link,
        flops=task.flops * samples(task, flight),
        uplink_bytes=uplink_bytes,
        downlink_bytes=fetches,
        bill=network.bill,
        uplink_free=network.uplink_free,
    )
    if (rates := task.bandwidth.of_clients.get(flight.client)) is None:
        return found
    # The rates over time, in place of the profile's. What takes no time still takes none.
    latency_s, factor = flight.link.latency_ms / 1e3, _factor(task, flight)

    def transfer_s(num_bytes: int, course: Course, at_s: float) -> float:
        return latency_s + course.seconds(8e-6 * num_bytes / factor, at_s + latency_s)

    download_s = transfer_s(fetches, rates.downlink, flight.start_s) if found.download_s else 0.0
    sends_s = flight.start_s + download_s + found.compute_s
    upload_s = transfer_s(uplink_bytes, rates.uplink, sends_s) if found.upload_s else 0.0
    return ClientTime(download_s, found.compute_s, upload_s)


def _factor(task: Task, flight: Flight) -> float:
    """What the conditions of a flight multiply its client's rates by."""
    return flight.link.uplink_mbps / task.profiles[flight.client].uplink_mbps


def _transferred(task: Task, flight: Flight, way: Literal["uplink", "downlink"], at_s: float, for_s: float) -> int:
    """Bytes of a transfer so long after it began: none while its latency lasts."""
    latency_s = flight.link.latency_ms / 1e3
    if (rates := task.bandwidth.of_clients.get(flight.client)) is None:
        mbps: float = getattr(flight.link, f"{way}_mbps")
        return math.floor(max(0.0, for_s - latency_s) * mbps * 1e6 / 8)
    course: Course = getattr(rates, way)
    return math.floor(course.megabits(at_s + latency_s, at_s + for_s) * _factor(task, flight) * 1e6 / 8)


def earliest_s(task: Task, flight: Flight) -> float:
    """A time before which a flight cannot end, unless it is stopped; known before the host answers."""
    return min(flight.leaves_s, flight.start_s + times(task, flight, flight.least_bytes).total_s)


def end(task: Task, flight: Flight) -> FlightEnd | None:
    """How a flight ends unless it is stopped; None if that is not known before the host answers."""
    if flight.awaited:
        return None
    how: End = "dropped_out" if flight.sends else "idle"
    sent = 0
    if answer := flight.landing.answer:
        how, sent = ("failed", 0) if isinstance(answer.reply, ClientError) else ("arrived", len(answer.reply.payload))
    whole = times(task, flight, sent)
    at_s = flight.start_s + whole.total_s
    if at_s > flight.leaves_s:
        return cut(task, flight, "left", flight.leaves_s)
    return FlightEnd(flight, how, at_s, whole, sent, flight.download.num_bytes if flight.sends else 0)


def cut(task: Task, flight: Flight, how: End, at_s: float) -> FlightEnd:
    """A flight that ends before its time, with what it has transferred."""
    whole, left = times(task, flight, 0), at_s - flight.start_s
    download_s = min(whole.download_s, left)
    compute_s = min(whole.compute_s, left - download_s)
    upload_s = left - download_s - compute_s
    fetched = flight.download.num_bytes if flight.sends else 0
    if left < whole.download_s:
        fetched = min(fetched, _transferred(task, flight, "downlink", flight.start_s, left))
    sent = _transferred(task, flight, "uplink", at_s - upload_s, upload_s)
    return FlightEnd(flight, how, at_s, ClientTime(download_s, compute_s, upload_s), sent, fetched)


def packed(flight: Flight) -> dict[str, Any]:
    """A flight as plain values for checkpoints, without its memory. Its job has been answered, and never runs again."""
    member, job, answer = flight.member, flight.job, flight.landing.answer
    found: dict[str, Any] = {
        "member": vars(member),
        "dispatch": flight.dispatch,
        "version": flight.version,
        "start_s": flight.start_s,
        "fetches": flight.download.num_bytes,
        "model": flight.download.model if flight.download.coded else None,
        "sends": flight.sends,
        "reply": None,
    }
    if job is not None and answer is not None:
        plan, reply = job.plan, answer.reply
        found |= {"payload": plan.payload, "error_feedback": plan.error_feedback, "weight": plan.weight}
        if isinstance(reply, ClientError):
            found["reply"] = reply.message
        else:
            found["reply"] = vars(reply) | {"payload": np.frombuffer(reply.payload, np.uint8)}
    return found


def unpacked(task: Task, saved: Mapping[str, Any], memory: Any) -> Flight:
    """The flight that `packed` stored. `memory`: its client's next memory, in the host's form."""
    member = Member(**saved["member"])
    client, dispatch, job, landing = member.client, saved["dispatch"], None, Landing()
    if (kept := saved["reply"]) is not None:
        plan = Plan(saved["payload"], (), saved["error_feedback"], saved["weight"])
        job = Job(dispatch, client, plan, cohorts.samples_of_member(task, member))
        if isinstance(kept, str):
            landing.answer = Answer(job, ClientError(kept, round=dispatch, client=client), memory)
        else:
            landing.answer = Answer(job, Reply(**{**kept, "payload": kept["payload"].tobytes()}), memory)
    own: Tensor | None = saved["model"]
    download = Download(torch.empty(0) if own is None else own, saved["fetches"], own is not None)
    profile = conditions(task.profiles[client], seed=task.config.seed, round=dispatch, client=client)
    leaves_s = task.availability.leaves_s(client, saved["start_s"])
    return Flight(
        member, dispatch, saved["version"], saved["start_s"], leaves_s, profile,
        download, saved["sends"], job, landing=landing,
    )  # fmt: skip
