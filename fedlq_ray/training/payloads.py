"""What a client sends, and what it keeps for later rounds: the kinds of payload, and the kinds of memory.

All vectors are flat, (d,) float32.
"""

from typing import Literal, Protocol

from torch import Tensor

Feedback = bool | Literal["ef21", "cafe"]  # `strategy.error_feedback`, without null


class Payload(Protocol):
    """What a payload stands for (`strategy.payload`)."""

    def of(self, weights: Tensor, update: Tensor) -> Tensor:
        """What a client sends: from the weights that it started with, and its update."""
        ...

    def change(self, value: Tensor, weights: Tensor) -> Tensor:
        """The client's update, from what the server has of it (float64)."""
        ...

    def probed(self, weights: Tensor, update: Tensor) -> Tensor:
        """What a probe quantizes: what clients send, at these weights and after this mean update."""
        ...


class Update:
    """The update."""

    def of(self, weights: Tensor, update: Tensor) -> Tensor:
        return update

    def change(self, value: Tensor, weights: Tensor) -> Tensor:
        return value

    def probed(self, weights: Tensor, update: Tensor) -> Tensor:
        return update


class Model:
    """The whole model."""

    def of(self, weights: Tensor, update: Tensor) -> Tensor:
        return weights + update

    def change(self, value: Tensor, weights: Tensor) -> Tensor:
        return value - weights.double()

    def probed(self, weights: Tensor, update: Tensor) -> Tensor:
        return weights


PAYLOADS: dict[str, Payload] = {"update": Update(), "model": Model()}


class Memory(Protocol):
    """How what quantization loses is carried to later rounds; None is the memory before the first round.

    Attributes:
        common: the memory is the server's last mean update (d,), the same for all clients, and no client keeps one.
    """

    common: bool

    def before(self, x: Tensor, memory: Tensor | None) -> Tensor:
        """What is quantized, where x is to arrive."""
        ...

    def after(self, sent: Tensor, received: Tensor, memory: Tensor | None) -> Tensor | None:
        """The client's next memory, from what was quantized and what it decodes to."""
        ...

    def at_server(self, received: Tensor, tracked: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the server takes for x, and what it tracks of the client."""
        ...


class NoMemory:
    """Nothing is kept."""

    common = False

    def before(self, x: Tensor, memory: Tensor | None) -> Tensor:
        return x

    def after(self, sent: Tensor, received: Tensor, memory: Tensor | None) -> Tensor | None:
        return None

    def at_server(self, received: Tensor, tracked: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return received, tracked


class ErrorFeedback(NoMemory):
    """What is lost is added to what is sent next (Seide et al., INTERSPEECH 2014; Karimireddy et al., ICML 2019)."""

    def before(self, x: Tensor, memory: Tensor | None) -> Tensor:
        return x if memory is None else x + memory

    def after(self, sent: Tensor, received: Tensor, memory: Tensor | None) -> Tensor | None:
        return sent - received


class Ef21:
    """The difference from what the server has of the client is sent (EF21: Richtarik et al., NeurIPS 2021)."""

    common = False

    def before(self, x: Tensor, memory: Tensor | None) -> Tensor:
        return x if memory is None else x - memory

    def after(self, sent: Tensor, received: Tensor, memory: Tensor | None) -> Tensor | None:
        return received if memory is None else memory + received

    def at_server(self, received: Tensor, tracked: Tensor | None) -> tuple[Tensor, Tensor | None]:
        held = 0 + received if tracked is None else tracked + received
        return held, held


class Cafe(NoMemory):
    """The difference from the last mean update is sent (CAFe: arXiv:2512.22623)."""

    common = True

    def before(self, x: Tensor, memory: Tensor | None) -> Tensor:
        return x if memory is None else x - memory

    def at_server(self, received: Tensor, tracked: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return received if tracked is None else received + tracked, None


MEMORIES: dict[Feedback, Memory] = {False: NoMemory(), True: ErrorFeedback(), "ef21": Ef21(), "cafe": Cafe()}
