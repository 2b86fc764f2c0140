"""BDH as a graph of neurons and synapses, for at most 256 neurons: the reference form (Kosowski et al. 2025, table 1 and equation 6).

Every neuron i holds quantities X(i), Y(i), A(i) and their excitatory and inhibitory counters; every synapse holds σ_l(i, j); five graphs
with non-negative weights say who acts on whom. One token is four rounds per layer, each a local rule along edges:

    4l      σ_l(i,j) fades by u(i,j);  A(i) ← Σ_j σ_l(i,j) X(j)                            reading the synapses
    4l + 1  σ_l(i,j) += G_s(i,j) Y(i) X(j);  Y fades away                                  Hebbian writing
    4l + 2  Y^e, Y^i ← G_y^e A, G_y^i A;  Y ← (Y^e − Y^i)⁺ · X;  A fades away              integrate, fire, gate
    4l + 3  X^e, X^i ← G_x^e Y, G_x^i Y;  X += (X^e − X^i)⁺                                 integrate, fire

With D_x E and D_y E split into excitation and inhibition (`split`, claim 3) this is exactly BDH-Normfree, the tensor form without norms:

    x_l = x_{l−1} + (D_x E y_{l−1})⁺,   y_l = (D_y ρ_{t−1,l} x_l)⁺ ⊙ x_l,   ρ_{t,l} = (ρ_{t−1,l} + E y_{l−1} x_lᵀ) U

Choices where the published table leaves room. σ(i, j) leads from X(j) to A(i), the orientation that the tensor form has. It fades before it
is read, not after: then the rounds and the tensor form, which fades what a token writes before the next token reads it, agree. U is
diagonal here, a fading per synapse; a rotation has negative entries and is no rule between non-negative quantities. What a token puts in
(X and Y before round 0) is given by the caller: the paper does not specify it. The trainable BDH adds layer norms and a residual stream.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from workbench.lab.catalogue import implements

LARGEST = 256
"""Neurons beyond which n × n graphs are refused."""


def split(decoder: Tensor, encoder: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Claim 3: write decoder @ encoder as the difference of two products of non-negative factors, with twice the hidden width.

    Args:
        decoder: D [n, d]. encoder: E [d, n].

    Returns:
        D^e, D^i [n, 2d] and E' [2d, n], all ≥ 0, with D^e E' − D^i E' = D E.
    """
    hidden = torch.cat([encoder.clamp(min=0), (-encoder).clamp(min=0)])
    positive, negative = decoder.clamp(min=0), (-decoder).clamp(min=0)
    return torch.cat([positive, negative], 1), torch.cat([negative, positive], 1), hidden


@dataclass(frozen=True)
class Round:
    """One round of the rules: what the quantities are after it. `synapses` is σ_l [n, n] of the round's layer."""

    number: int
    layer: int
    rule: str
    X: Tensor
    Y: Tensor
    A: Tensor
    synapses: Tensor


implements("bdh", "model", "GraphBDH", note="reference form for n ≤ 256; fading synapses, no rotation")


class GraphBDH:
    """The rules on explicit graphs. All graphs are [n, n] and ≥ 0; entry (i, j) acts from neuron j on neuron i.

    Args:
        x_excite, x_inhibit, y_excite, y_inhibit: G_x^e, G_x^i, G_y^e, G_y^i. synapse: G_s, which synapses exist (1 everywhere in BDH-GPU).
        fading: u(i, j) in 0 … 1, what is left of a synapse after a token. n_layers: L, each with its own σ.

    Raises ValueError for more than 256 neurons, for graphs of different sizes, and for negative weights.
    """

    def __init__(
        self,
        x_excite: Tensor,
        x_inhibit: Tensor,
        y_excite: Tensor,
        y_inhibit: Tensor,
        synapse: Tensor,
        fading: Tensor,
        n_layers: int,
    ) -> None:
        graphs = {
            "x_excite": x_excite,
            "x_inhibit": x_inhibit,
            "y_excite": y_excite,
            "y_inhibit": y_inhibit,
            "synapse": synapse,
            "fading": fading,
        }
        size = x_excite.shape[0]
        check_size(size)
        for name, graph in graphs.items():
            if tuple(graph.shape) != (size, size):
                raise ValueError(f"{name} has shape {tuple(graph.shape)}; expected ({size}, {size}) as x_excite.")
            if bool((graph < 0).any()):
                raise ValueError(
                    f"{name} has negative weights. Expected graphs ≥ 0: models.bdh.graph.split gives an excitatory and an inhibitory one."
                )
        if bool((fading > 1).any()):
            raise ValueError("fading has entries above 1; expected what is left of a synapse, 0 … 1.")
        self.x_excite, self.x_inhibit = x_excite, x_inhibit
        self.y_excite, self.y_inhibit = y_excite, y_inhibit
        self.synapse, self.fading, self.n_layers = synapse, fading, n_layers
        self.synapses = [torch.zeros_like(x_excite) for _ in range(n_layers)]

    @classmethod
    def from_tensors(cls, D_x: Tensor, D_y: Tensor, E: Tensor, fading: Tensor, n_layers: int) -> "GraphBDH":
        """The graphs of BDH-Normfree by `split`. D_x, D_y [n, d], E [d, n], fading [n] per target neuron (U's diagonal)."""
        n = D_x.shape[0]
        check_size(n)
        x_excite, x_inhibit, hidden = split(D_x, E)
        y_excite, y_inhibit, _ = split(D_y, E)
        products = [factor @ hidden for factor in (x_excite, x_inhibit, y_excite, y_inhibit)]
        ones = torch.ones(n, n).to(E)
        return cls(products[0], products[1], products[2], products[3], ones, fading.to(E) * ones, n_layers)

    def rounds(self, X: Tensor, Y: Tensor) -> Iterator[Round]:
        """Read one token that puts in X and Y [n], and yield the 4 L rounds in order. The synapses are kept for the next token."""
        n = self.x_excite.shape[0]
        for name, value in (("X", X), ("Y", Y)):
            if tuple(value.shape) != (n,) or bool((value < 0).any()):
                raise ValueError(
                    f"{name} must be {n} non-negative numbers, one per neuron; got shape {tuple(value.shape)}."
                )
        nothing = torch.zeros_like(X)
        for layer in range(self.n_layers):
            self.synapses[layer] = self.synapses[layer] * self.fading
            A = self.synapses[layer] @ X
            yield Round(4 * layer, layer, "read", X, Y, A, self.synapses[layer])
            self.synapses[layer] = self.synapses[layer] + self.synapse * torch.outer(Y, X)
            Y = nothing
            yield Round(4 * layer + 1, layer, "write", X, Y, A, self.synapses[layer])
            Y = (self.y_excite @ A - self.y_inhibit @ A).clamp(min=0) * X
            A = nothing
            yield Round(4 * layer + 2, layer, "gate", X, Y, A, self.synapses[layer])
            X = X + (self.x_excite @ Y - self.x_inhibit @ Y).clamp(min=0)
            yield Round(4 * layer + 3, layer, "spread", X, Y, A, self.synapses[layer])

    def run(self, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """Read tokens one after the other. X, Y [pos, n] are what each puts in.

        Returns:
            x [pos, layer, n], what each layer read the synapses with, and y [pos, layer, n], what it made of them.
        """
        if X.shape[0] != Y.shape[0]:
            raise ValueError(f"X has {X.shape[0]} tokens and Y has {Y.shape[0]}; expected as many.")
        xs, ys = [], []
        for x, y in zip(X, Y, strict=True):
            rounds = list(self.rounds(x, y))
            xs.append(torch.stack([r.X for r in rounds if r.rule == "read"]))
            ys.append(torch.stack([r.Y for r in rounds if r.rule == "gate"]))
        return torch.stack(xs), torch.stack(ys)


def check_size(n: int) -> None:
    """Raises ValueError for graphs that are too large to be written out."""
    if n > LARGEST:
        raise ValueError(
            f"The graph form writes out n × n synapses and five n × n graphs; {n} neurons are more than its {LARGEST}. "
            "Use models.bdh.model.BDH, which never forms them, and probes.bdh for single synapses."
        )


def normfree(
    D_x: Tensor, D_y: Tensor, E: Tensor, fading: Tensor, n_layers: int, X: Tensor, Y: Tensor
) -> tuple[Tensor, Tensor]:
    """BDH-Normfree, equation 7, with the low-rank state ρ [layer, d, n] instead of synapses. Arguments and results as in `GraphBDH`."""
    state = torch.zeros(n_layers, *E.shape, dtype=E.dtype, device=E.device)
    xs, ys = [], []
    for x, y in zip(X, Y, strict=True):
        layers_x, layers_y = [], []
        for layer in range(n_layers):
            a = state[layer] @ x
            state[layer] = (state[layer] + torch.outer(E @ y, x)) * fading
            y = (D_y @ a).clamp(min=0) * x
            layers_x.append(x)
            layers_y.append(y)
            x = x + (D_x @ (E @ y)).clamp(min=0)
        xs.append(torch.stack(layers_x))
        ys.append(torch.stack(layers_y))
    return torch.stack(xs), torch.stack(ys)
