"""Eight metrics of how much quantizing one layer alone matters: one function each, which returns a table (L, n).

`loss` and `accuracy` measure it; the others need fewer passes over the samples than one per layer and level, or none.
With w the weights, e the error of layer l at a level, zero elsewhere, and f the mean loss of the samples,
f(w + e) - f(w) = g'e + e'He / 2 + ...: `taylor` is its first term, `fisher` and `hawq` are two models of its second.
No metric is normalised per layer: a layer with small gradients should get a small value.

The sources are on pruning and centralised quantization; experiments/significance compares the losses that the metrics
predict in federated learning.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from fedlq_ray.models import FlatModel, Layer
from fedlq_ray.problems import Classification, Problem
from fedlq_ray.seeding import numpy_rng, torch_rng
from fedlq_ray.training.local import sample_scores

Table = NDArray[np.float64]
CHUNK = 128  # samples whose graph is in memory at a time


@dataclass(frozen=True)
class Evidence:
    """The inputs of a metric, for L layers and n quantizers.

    Args:
        base: flat vector (d,) that `sent` is added to: zeros for payload `model`, the old weights for `update`.
        sent: flat vector (d,): the weights, or the last cohort's mean update.
        layers: the L layers that may be quantized; none is a buffer.
        decoded: `sent` after each quantizer, (n, d); buffers are unchanged.
        sizes: bytes of each layer with each quantizer, (L, n).
        unbiased: whether each quantizer's expected error over its rounding is zero, (n,).
        x, y: a model's inputs (samples, ...) and targets (samples, ...), on the model's device.
        seed, round, block: keys of the random draws.
        problem: has the loss and the metrics.
    """

    model: FlatModel
    base: Tensor
    sent: Tensor
    layers: Sequence[Layer]
    decoded: Tensor
    sizes: NDArray[np.int64]
    unbiased: NDArray[np.bool_]
    x: Tensor
    y: Tensor
    seed: int
    round: int
    block: int = 0
    problem: Problem = Classification()

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.layers), len(self.decoded)

    @property
    def weights(self) -> Tensor:
        """The weights (d,) without any quantization."""
        return self.base + self.sent

    def with_layer(self, layer: Layer, column: int) -> Tensor:
        """The weights (d,) with only this layer quantized, by one of the quantizers."""
        changed, piece = self.weights, slice(layer.start, layer.stop)
        changed[piece] = self.base[piece] + self.decoded[column, piece]
        return changed

    @cached_property
    def tried(self) -> tuple[Table, Table]:
        """Rise of the loss and fall of the main metric (rise, if lower is better), means over samples, with one layer
        quantized: (L, n) each."""
        losses, good = self._scores(self.weights)
        rises, falls = np.zeros(self.shape), np.zeros(self.shape)
        for row, layer in enumerate(self.layers):
            for column in range(self.shape[1]):
                after, still = self._scores(self.with_layer(layer, column))
                rises[row, column] = float((after - losses).mean())
                falls[row, column] = float((good - still).mean())
        return rises, falls

    def _scores(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Each sample's loss and main metric, the latter such that higher is better: (samples,) float64 each."""
        found = sample_scores(self.model, weights, self.x, self.y, self.problem)
        sign = 1 if self.problem.goal.higher_is_better else -1
        return found["loss"] / found["parts"], sign * found["main"] / found["parts"]


def rise(evidence: Evidence) -> Table:
    """f(w + e) - f(w)."""
    return evidence.tried[0]


def first_order(evidence: Evidence) -> Table:
    """g'e with g the mean gradient."""
    total = torch.zeros(evidence.model.num_parameters, dtype=torch.float64)
    for gradient, count in _gradients(evidence, CHUNK):
        total += gradient * (count / len(evidence.y))
    return _by_layer(evidence, total, 1)


def loss(evidence: Evidence) -> Table:
    """The measured rise of the loss. For unbiased quantizers, its first-order term is subtracted as a control variate:
    it is zero in expectation, but noise in one draw that would dominate (see experiments/significance)."""
    found = rise(evidence)
    return np.where(evidence.unbiased, found - first_order(evidence), found) if evidence.unbiased.any() else found


def accuracy(evidence: Evidence) -> Table:
    """The measured main metric before minus after; after minus before, if lower is better."""
    return evidence.tried[1]


def _by_layer(evidence: Evidence, weights: Tensor, power: int) -> Table:
    """sum_i weights_i e_i^power for each layer and level; weights (num_parameters,) are float64."""
    rows = []
    for layer in evidence.layers:
        piece = slice(layer.start, layer.stop)
        rows.append((evidence.decoded[:, piece] - evidence.sent[piece]).double() ** power @ weights[piece])
    return torch.stack(rows).numpy()


def squared_error(evidence: Evidence) -> Table:
    """|e|^2: every parameter matters equally. L-GreCo and Kimad use this metric."""
    return _by_layer(evidence, torch.ones(evidence.model.num_parameters, dtype=torch.float64), 2)


def _mean_loss(evidence: Evidence, parameters: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The loss as a function of the flat parameters (num_parameters,); it is twice differentiable."""
    model = evidence.model
    return evidence.problem.loss(functional_call(model.module, model.parameters_of(parameters), (x,)), y)


def _gradients(evidence: Evidence, chunk: int) -> Iterator[tuple[Tensor, int]]:
    """Yields the mean gradient (num_parameters,) of each `chunk` samples, float64 on the CPU, and their number."""
    parameters = _at_weights(evidence)
    for x, y in zip(evidence.x.split(chunk), evidence.y.split(chunk), strict=True):
        with _differentiable(evidence.model.module):
            (gradient,) = torch.autograd.grad(_mean_loss(evidence, parameters, x, y), parameters)
        yield gradient.cpu().double(), len(y)


@contextlib.contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Disables cuDNN if a layer is recurrent, because its recurrent kernels have no gradient in evaluation mode."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = before and not any(isinstance(m, nn.RNNBase) for m in module.modules())
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _at_weights(evidence: Evidence) -> Tensor:
    """Returns the parameters as a graph leaf (num_parameters,); loads the model's buffers and sets evaluation mode."""
    evidence.model.load(evidence.weights)
    evidence.model.module.eval()
    return evidence.weights[: evidence.model.num_parameters].to(evidence.model.device).requires_grad_()


def fisher(evidence: Evidence) -> Table:
    """sum_i F_i e_i^2 / 2 with the empirical Fisher's diagonal F, the mean of squared gradients of single samples.

    Source: Theis et al., arXiv:1801.05787. The squared gradient of a batch's mean is a different, smaller quantity.
    """
    total = torch.zeros(evidence.model.num_parameters, dtype=torch.float64)
    for gradient, _ in _gradients(evidence, 1):  # as fast as vmap on a CPU, for any model
        total += gradient.square()
    return _by_layer(evidence, total / (2 * len(evidence.y)), 2)


def taylor(evidence: Evidence) -> Table:
    """|g'e| with g the mean gradient, here of a block, which has fewer samples and therefore more noise.

    Source: Molchanov et al., ICLR 2017, arXiv:1611.06440, for pruning activations.
    """
    return np.abs(first_order(evidence))


def hessian_traces(evidence: Evidence, draws: int) -> Table:
    """Hutchinson's estimates v'Hv of the trace of each layer's block of the Hessian, v Rademacher: (draws, L).

    v is zero outside the layer, which takes L products per draw. One vector for all layers would be unbiased too, but
    the off-diagonal blocks would dominate the estimate: they made the trace of a last layer, which cannot be negative,
    come out negative.
    """
    parameters = _at_weights(evidence)
    rng = torch_rng(evidence.seed, "hutchinson", evidence.round, evidence.block)
    vectors = (torch.randint(0, 2, (draws, len(parameters)), generator=rng).float() * 2 - 1).to(parameters.device)
    pieces = [slice(layer.start, layer.stop) for layer in evidence.layers]
    traces = np.zeros((draws, len(evidence.layers)))
    chunks = zip(evidence.x.split(CHUNK), evidence.y.split(CHUNK), strict=True)
    for x, y in chunks:
        value = _mean_loss(evidence, parameters, x, y) * (len(y) / len(evidence.y))
        (gradient,) = torch.autograd.grad(value, parameters, create_graph=True)
        for draw, row in np.ndindex(traces.shape):
            piece, vector = pieces[row], vectors[draw, pieces[row]]
            (product,) = torch.autograd.grad(gradient[piece] @ vector, parameters, retain_graph=True)
            traces[draw, row] += float(product[piece].double() @ vector.double())
    return traces


def hawq(evidence: Evidence, draws: int = 8) -> Table:
    """tr(H_l) / d_l x |e|^2 / 2.

    Source: Dong et al., HAWQ-V2, NeurIPS 2020, arXiv:1911.03852. Away from a minimum, a trace may be negative.
    """
    traces = hessian_traces(evidence, draws) / [2 * layer.size for layer in evidence.layers]
    mean: Table = traces.mean(0)[:, None] * squared_error(evidence)
    return mean


def size(evidence: Evidence) -> Table:
    """d_l 4^-b, where b is the bits per parameter that were sent: at equal levels, the larger layer matters more.

    Each bit quarters the error of a uniform quantizer, so this is |e|^2 for layers that all have the same range.
    """
    count = np.array([layer.size for layer in evidence.layers], float)[:, None]
    table: Table = count * 4.0 ** (-8 * evidence.sizes / count)
    return table


def random(evidence: Evidence) -> Table:
    """Uniform on [0, 1), from the seed and the round: the baseline that a metric should beat."""
    return numpy_rng(evidence.seed, "random significance", evidence.round).random(evidence.shape)


METRICS: dict[str, Callable[[Evidence], Table]] = {
    "loss": loss,
    "accuracy": accuracy,
    "squared_error": squared_error,
    "fisher": fisher,
    "taylor": taylor,
    "hawq": hawq,
    "size": size,
    "random": random,
}
