"""The memory itself: a small network whose weights are the state, with its read-out and its gradient written out.

Depth 1 is a matrix, M(x) = x W. Depth L > 1 is an MLP with hidden width h,

    x_0 = x,  x_l = act(x_{l-1} W_l),  y = x_{L-1} W_L;    M(x) = y,  x + y (residual)  or  x + LN(y) (norm_residual)

LN has no parameters. All weights of one head lie in one matrix [row, column], the *packed* weights, one column per hidden neuron:
first the rows of W_1, then those of W_2 … W_{L-1}, last the rows of W_L transposed. So column c holds all that neuron c reads and
writes. At depth 1 the packed weights are W [state_k, state_v] itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import pi, sqrt

import torch
import torch.nn.functional as F
from torch import Tensor

OUTPUTS = ("plain", "residual", "norm_residual")
EPS = 1e-6


def _gelu_slope(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(x / sqrt(2))) + x * torch.exp(-0.5 * x * x) / sqrt(2 * pi)


def _silu_slope(x: Tensor) -> Tensor:
    gate = torch.sigmoid(x)
    return gate * (1 + x * (1 - gate))


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gelu": (F.gelu, _gelu_slope),
    "silu": (F.silu, _silu_slope),
}


@dataclass(frozen=True)
class Memory:
    """state_k, state_v: widths of keys and values. depth: number of weight matrices. hidden: width between them (depth > 1)."""

    state_k: int
    state_v: int
    depth: int = 1
    hidden: int | None = None
    activation: str = "gelu"
    output: str = "plain"

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"depth: expected at least 1 weight matrix, got {self.depth}")
        if (self.depth > 1) != (self.hidden is not None):
            raise ValueError(
                f"hidden: expected a width exactly when depth > 1, got {self.hidden} with depth {self.depth}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {list(ACTIVATIONS)}, got {self.activation!r}")
        if self.output not in OUTPUTS:
            raise ValueError(f"output: expected one of {list(OUTPUTS)}, got {self.output!r}")
        if self.output != "plain" and self.state_k != self.state_v:
            raise ValueError(
                f"output {self.output!r} adds the key: expected state_k = state_v, got {self.state_k} and {self.state_v}"
            )

    @property
    def linear(self) -> bool:
        """Whether the memory is linear in its values: one matrix, read as it is."""
        return self.depth == 1 and self.output == "plain"

    @property
    def shape(self) -> tuple[int, int]:
        """(row, column) of the packed weights."""
        if self.hidden is None:
            return self.state_k, self.state_v
        return self.state_k + (self.depth - 2) * self.hidden + self.state_v, self.hidden

    def unpack(self, packed: Tensor) -> list[Tensor]:
        """[..., row, column] -> the weights W_1 … W_L, each [..., in, out]."""
        if self.hidden is None:
            return [packed]
        sizes = [self.state_k, *([self.hidden] * (self.depth - 2)), self.state_v]
        *inward, outward = packed.split(sizes, -2)
        return [*inward, outward.mT]

    def pack(self, layers: list[Tensor]) -> Tensor:
        """The inverse of `unpack`."""
        return layers[0] if self.hidden is None else torch.cat([*layers[:-1], layers[-1].mT], -2)

    def read(self, packed: Tensor, x: Tensor) -> Tensor:
        """M(x) for x [..., n, state_k] and packed [..., row, column]: [..., n, state_v]."""
        return self.run(x, [partial(_times, w) for w in self.unpack(packed)])

    def run(self, x: Tensor, layers: list[Callable[[Tensor], Tensor]]) -> Tensor:
        """M(x) with the product of each layer given as a function."""
        h = x
        for number, layer in enumerate(layers):
            h = layer(h)
            if number < self.depth - 1:
                h = ACTIVATIONS[self.activation][0](h)
        if self.output == "norm_residual":
            h = _normalised(h)[0]
        return h if self.output == "plain" else x + h

    def write_factors(
        self, packed: Tensor, k: Tensor, slope: Callable[[Tensor], Tensor]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """The gradient of a loss of M(k) with respect to every layer, as factors: that of W_l is inputs_lᵀ errors_l, token by token.

        packed [..., row, column], k [..., n, state_k]. slope(M(k)) is the derivative of the loss by M(k), [..., n, state_v].

        Returns (inputs, errors, M(k)): per layer [..., n, in] and [..., n, out].
        """
        activation, derivative = ACTIVATIONS[self.activation]
        weights = self.unpack(packed)
        inputs, before = [k], []
        for weight in weights:
            before.append(inputs[-1] @ weight)
            inputs.append(activation(before[-1]))
        y = before[-1]
        normal, scale = _normalised(y) if self.output == "norm_residual" else (y, None)
        prediction = normal if self.output == "plain" else k + normal
        error = slope(prediction)
        if scale is not None:
            error = (error - error.mean(-1, keepdim=True) - normal * (error * normal).mean(-1, keepdim=True)) / scale
        errors = [error]
        for weight, z in zip(reversed(weights[1:]), reversed(before[:-1]), strict=True):
            errors.append((errors[-1] @ weight.mT) * derivative(z))
        return inputs[:-1], errors[::-1], prediction


def _times(weight: Tensor, x: Tensor) -> Tensor:
    return x @ weight


def _normalised(y: Tensor) -> tuple[Tensor, Tensor]:
    """Layer norm without parameters, and what it divided by."""
    centred = y - y.mean(-1, keepdim=True)
    scale = (centred.square().mean(-1, keepdim=True) + EPS).sqrt()
    return centred / scale, scale
