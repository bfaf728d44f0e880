"""What clients hold of the model, and what it takes to bring each up to date.

Without `network.downlink_bits` every member of a cohort gets the whole model as float32. With it the server sends
coded differences: every client tracks one model v, and a round's broadcast is Q(w - v), after which v <- v + Q(w - v).
What coding loses stays in w - v for the next broadcast, which is error feedback. A client that missed broadcasts
fetches all of them, or the whole of v where that takes fewer bytes. The initial weights come from the seed, which
every client has. (Compare DoubleSqueeze, Tang et al., ICML 2019, and DORE, Liu et al., AISTATS 2020.)
"""

from torch import Tensor

from fedlq_ray.quantization import decode, encode
from fedlq_ray.quantization.rate import OneStep
from fedlq_ray.seeding import torch_rng
from fedlq_ray.strategies.base import Setting
from fedlq_ray.strategies.budgets import bytes_at_rate, one_step

SERVER = 0xFFFF_FFFF  # in the place of a client's number on the wire


class Downlink:
    """The broadcasts so far.

    Attributes:
        model: v (d,) float32, what an up-to-date client trains from.
    """

    def __init__(self, setting: Setting, bits: float | None, weights: Tensor, whole: int, clients: int) -> None:
        self.model, self.whole, self.seed = weights, whole, setting.seed
        self.choose: OneStep | None = one_step(setting, bytes_at_rate(setting, bits)) if bits is not None else None
        self.sizes: list[int] = []  # of each broadcast, bytes
        self.held = [0] * clients  # how many of them each client has

    def broadcast(self, weights: Tensor, round: int) -> None:
        """Bring v nearer to the server's weights (d,), or onto them."""
        if self.choose is None:
            self.model = weights
            return
        change = weights - self.model
        noise = torch_rng(self.seed, "downlink", round)
        payload = encode(change, self.choose(change), kind="update", round=round, client=SERVER, rng=noise)
        self.model = self.model + decode(payload, len(change), kind="update", round=round, client=SERVER).vector
        self.sizes.append(len(payload))

    def bytes_for(self, client: int) -> int:
        """What a client must fetch to hold v."""
        return self.whole if self.choose is None else min(self.whole, sum(self.sizes[self.held[client] :]))

    def fetched(self, client: int) -> None:
        """The client holds v from now on."""
        self.held[client] = len(self.sizes)
