"""How much quantizing one layer alone matters: eight answers, one function each, all of one signature: a table (L, n).

`loss` and `accuracy` try it out; the others need no pass over the samples for each layer and level, or none at all.
With w the weights, e the error of layer l at a level, zero elsewhere, and f the mean loss of the samples,
f(w + e) - f(w) = g'e + e'He / 2 + ...: `taylor` is its first term, `fisher` and `hawq` are two models of its second.
None of them is scaled by the layer: a layer whose gradients are small is to come out small.

The sources are of pruning and of centralised quantization; the losses that each predicts in federated learning are
compared in experiments/significance.
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
from torch.nn.functional import cross_entropy

from fedlq_ray.models import FlatModel, Layer
from fedlq_ray.seeding import numpy_rng, torch_rng
from fedlq_ray.training.local import sample_losses

Table = NDArray[np.float64]
CHUNK = 128  # samples whose graph is kept at a time


@dataclass(frozen=True)
class Evidence:
    """All that a metric may look at, for L layers and n quantizers.

    Args:
        base: flat vector (d,) that `sent` is added to: zeros for payload `model`, the old weights for `update`.
        sent: flat vector (d,): the weights, or the last cohort's mean update.
        layers: the L that may be quantized; none is a buffer.
        decoded: what comes of `sent` by each quantizer, (n, d); buffers as they are.
        sizes: bytes of each layer by each quantizer, (L, n).
        unbiased: of each quantizer, whether its error is zero in expectation over its rounding (n,).
        x, y: normalised inputs (samples, ...) and labels (samples,), where the model is.
        seed, round, block: what randomness is keyed by.
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

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.layers), len(self.decoded)

    @property
    def weights(self) -> Tensor:
        """The weights (d,) without any quantization."""
        return self.base + self.sent

    def with_layer(self, layer: Layer, column: int) -> Tensor:
        """The weights (d,) with this layer alone quantized, by one of the quantizers."""
        changed, piece = self.weights, slice(layer.start, layer.stop)
        changed[piece] = self.base[piece] + self.decoded[column, piece]
        return changed

    @cached_property
    def tried(self) -> tuple[Table, Table]:
        """How much the loss rises and the accuracy falls, means over samples, with one layer quantized: (L, n) each."""
        losses, right = sample_losses(self.model, self.weights, self.x, self.y)
        rises, falls = np.zeros(self.shape), np.zeros(self.shape)
        for row, layer in enumerate(self.layers):
            for column in range(self.shape[1]):
                after, still = sample_losses(self.model, self.with_layer(layer, column), self.x, self.y)
                rises[row, column] = float((after - losses).double().mean())
                falls[row, column] = float((right.double() - still.double()).mean())
        return rises, falls


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
    """The rise of the loss, measured, less its first order where that is zero in expectation over the rounding: of the
    draw at hand it is not, and would drown the rest (a control variate; experiments/significance has what it saves)."""
    found = rise(evidence)
    return np.where(evidence.unbiased, found - first_order(evidence), found) if evidence.unbiased.any() else found


def accuracy(evidence: Evidence) -> Table:
    """The accuracy before minus the accuracy after, measured."""
    return evidence.tried[1]


def _by_layer(evidence: Evidence, weights: Tensor, power: int) -> Table:
    """sum_i weights_i e_i^power of each layer and level, weights (num_parameters,) in double."""
    rows = []
    for layer in evidence.layers:
        piece = slice(layer.start, layer.stop)
        rows.append((evidence.decoded[:, piece] - evidence.sent[piece]).double() ** power @ weights[piece])
    return torch.stack(rows).numpy()


def squared_error(evidence: Evidence) -> Table:
    """|e|^2: every parameter matters alike. What L-GreCo and Kimad go by."""
    return _by_layer(evidence, torch.ones(evidence.model.num_parameters, dtype=torch.float64), 2)


def _mean_loss(model: FlatModel, parameters: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The loss as a function of the flat parameters (num_parameters,), which differentiates twice."""
    logits = functional_call(model.module, model.parameters_of(parameters), (x,))
    return cross_entropy(logits.float(), y)


def _gradients(evidence: Evidence, chunk: int) -> Iterator[tuple[Tensor, int]]:
    """The mean gradient (num_parameters,) of each so many samples, in double on the CPU, and how many they were."""
    parameters = _at_weights(evidence)
    for x, y in zip(evidence.x.split(chunk), evidence.y.split(chunk), strict=True):
        with _differentiable(evidence.model.module):
            (gradient,) = torch.autograd.grad(_mean_loss(evidence.model, parameters, x, y), parameters)
        yield gradient.cpu().double(), len(y)


@contextlib.contextmanager
def _differentiable(module: nn.Module) -> Iterator[None]:
    """Without cuDNN where a layer is recurrent: its kernels for those have no gradient in evaluation mode."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = before and not any(isinstance(m, nn.RNNBase) for m in module.modules())
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def _at_weights(evidence: Evidence) -> Tensor:
    """The parameters as a leaf of the graph (num_parameters,); the model gets its buffers, and evaluation mode."""
    evidence.model.load(evidence.weights)
    evidence.model.module.eval()
    return evidence.weights[: evidence.model.num_parameters].to(evidence.model.device).requires_grad_()


def fisher(evidence: Evidence) -> Table:
    """sum_i F_i e_i^2 / 2 with the empirical Fisher's diagonal F, the mean of squared gradients of single samples.

    Source: Theis et al., arXiv:1801.05787. Squared gradients of a batch's mean would be another, smaller thing.
    """
    total = torch.zeros(evidence.model.num_parameters, dtype=torch.float64)
    for gradient, _ in _gradients(evidence, 1):  # as fast as vmap on a CPU, for any model
        total += gradient.square()
    return _by_layer(evidence, total / (2 * len(evidence.y)), 2)


def taylor(evidence: Evidence) -> Table:
    """|g'e| with g the mean gradient, here of a block: fewer samples, and so more of their noise in it.

    Source: Molchanov et al., ICLR 2017, arXiv:1611.06440, who prune activations.
    """
    return np.abs(first_order(evidence))


def hessian_traces(evidence: Evidence, draws: int) -> Table:
    """Hutchinson's estimates v'Hv of the trace of each layer's block of the Hessian, v Rademacher: (draws, L).

    v is zero outside the layer, so that there are L products a draw. A vector that served all layers would have no
    bias either, but the blocks off the diagonal would drown what is sought: a last layer's trace, which cannot be
    negative, then came out so.
    """
    parameters = _at_weights(evidence)
    rng = torch_rng(evidence.seed, "hutchinson", evidence.round, evidence.block)
    vectors = (torch.randint(0, 2, (draws, len(parameters)), generator=rng).float() * 2 - 1).to(parameters.device)
    pieces = [slice(layer.start, layer.stop) for layer in evidence.layers]
    traces = np.zeros((draws, len(evidence.layers)))
    chunks = zip(evidence.x.split(CHUNK), evidence.y.split(CHUNK), strict=True)
    for x, y in chunks:
        value = _mean_loss(evidence.model, parameters, x, y) * (len(y) / len(evidence.y))
        (gradient,) = torch.autograd.grad(value, parameters, create_graph=True)
        for draw, row in np.ndindex(traces.shape):
            piece, vector = pieces[row], vectors[draw, pieces[row]]
            (product,) = torch.autograd.grad(gradient[piece] @ vector, parameters, retain_graph=True)
            traces[draw, row] += float(product[piece].double() @ vector.double())
    return traces


def hawq(evidence: Evidence, draws: int = 8) -> Table:
    """tr(H_l) / d_l x |e|^2 / 2.

    Source: Dong et al., HAWQ-V2, NeurIPS 2020, arXiv:1911.03852. Away from a minimum a trace may be below zero.
    """
    traces = hessian_traces(evidence, draws) / [2 * layer.size for layer in evidence.layers]
    mean: Table = traces.mean(0)[:, None] * squared_error(evidence)
    return mean


def size(evidence: Evidence) -> Table:
    """d_l 4^-b with b the bits a parameter that were sent: at one level the larger layer matters more.

    Each bit quarters the error of an even quantizer, so this is |e|^2 of layers that all have one range.
    """
    count = np.array([layer.size for layer in evidence.layers], float)[:, None]
    table: Table = count * 4.0 ** (-8 * evidence.sizes / count)
    return table


def random(evidence: Evidence) -> Table:
    """Uniform on [0, 1), from the seed and the round: what a metric has to beat."""
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
