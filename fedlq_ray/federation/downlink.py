"""The downlink: which model each client holds, and the payload that updates it.

Without `network.downlink_bits`, every member of a cohort gets the whole model as float32. With it, the server keeps the
model that each client holds, v_n, and sends Q(w - v_n). Then v_n <- v_n + Q(w - v_n): what coding loses stays in
w - v_n for the next time, which is error feedback. The initial weights come from the seed, which every client has. As
on the uplink, the slowest link at `downlink_bits` sets a time, and the other links fill it with bits up to
`downlink_cap_bits`.

The alternative, `network.downlink=shared`, is a broadcast that all clients track, where each client fetches what it
missed. QAFeL (Ortega and Jafarkhani, 2023, Algorithm 1) is that, in asynchronous training: the server keeps the shared
model v, sends Q(w - v) after each step, v <- v + Q(w - v), and clients train from v. For the same bytes it is far
coarser: a client that takes part in every fifth round fetches five broadcasts. On a Gaussian change, one bit leaves a
relative error of 0.35, but five broadcasts at a fifth of a bit leave 0.83 each (docs/quantizers.md). Compare
DoubleSqueeze (Tang et al., ICML 2019) and DORE (Liu et al., AISTATS 2020), whose clients take part in every round.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from fedlq_ray.quantization import send
from fedlq_ray.seeding import torch_rng
from fedlq_ray.strategies.base import StrategyContext
from fedlq_ray.strategies.budgets import bytes_at_rate, one_step


class Download(NamedTuple):
    """The model (d,) that a client holds after it fetches `num_bytes`; `coded`: it may differ from the server's."""

    model: Tensor
    num_bytes: int
    coded: bool = False


@dataclass(frozen=True)
class Shared:
    """The model that all clients hold who have fetched every step's change.

    Attributes:
        model: (d,) float32.
        sent: bytes of all changes so far.
        fetched: by client, how many of them it has.
    """

    model: Tensor
    sent: int
    fetched: dict[int, int]


class Downlink:
    """Sends the model to clients. If it is coded, the server state has each client's model: d x 4 bytes per client."""

    def __init__(
        self,
        context: StrategyContext,
        bits: float | None,
        cap_bits: float,
        weights: Tensor,
        whole_bytes: int,
    ) -> None:
        self.context, self.bits, self.cap_bits, self.whole_bytes = context, bits, cap_bits, whole_bytes
        self.initial = weights

    def broadcast(self, shared: Shared | None, weights: Tensor, step: int) -> Shared | None:
        """What all clients will hold after the change of this step, which made these weights."""
        if shared is None or self.bits is None:
            return shared
        change, noise = weights - shared.model, torch_rng(self.context.seed, "broadcast", step)
        segments = one_step(self.context, bytes_at_rate(self.context, self.bits))(change)
        payload, received = send(change, segments, kind="update", round=step, client=0, rng=noise)
        return Shared(shared.model + received, shared.sent + len(payload), shared.fetched)

    def download(
        self,
        held: Mapping[int, Tensor],
        weights: Tensor,
        bytes_per_s: Mapping[int, float],
        round: int,
        shared: Shared | None = None,
    ) -> dict[int, Download]:
        """The model that each member of a cohort may fetch, given its downlink's mean rate; nothing is fetched yet.

        Args:
            held: by client, the model that it holds; a client without an entry holds the initial weights.
        """
        if shared is not None:
            return {
                client: Download(shared.model, shared.sent - shared.fetched.get(client, 0), True)
                for client in bytes_per_s
            }
        if self.bits is None:
            return {client: Download(weights, self.whole_bytes) for client in bytes_per_s}
        floor, cap = bytes_at_rate(self.context, self.bits), bytes_at_rate(self.context, self.cap_bits)
        seconds = max(floor / rate for rate in bytes_per_s.values())
        budgets = {client: max(floor, min(cap, seconds * rate)) for client, rate in bytes_per_s.items()}
        return {
            client: self._coded(held.get(client, self.initial), weights, client, budget, round)
            for client, budget in budgets.items()
        }

    def _coded(self, held: Tensor, weights: Tensor, client: int, budget: float, round: int) -> Download:
        change = weights - held
        if not bool(change.any()):
            return Download(held, 0, True)
        noise = torch_rng(self.context.seed, "downlink", round, client)
        segments = one_step(self.context, budget)(change)
        payload, received = send(change, segments, kind="update", round=round, client=client, rng=noise)
        if len(payload) >= self.whole_bytes:
            return Download(weights, self.whole_bytes, True)
        return Download(held + received, len(payload), True)
