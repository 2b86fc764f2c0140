"""Sparse capture of BDH's activations: for every layer and head, the active neurons of each token in compressed rows (CSR).

A dense trace of n = 32,768 neurons, 8 layers and 512 tokens takes 1.07 GB in float32; at 10 % activity the rows here take a seventh of it
(2 bytes for the neuron's number, 2 for its value). Each layer is converted as it is computed, so that one dense layer exists at a time.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.bdh.capture import checked_layer, neurons_per_head, require_bdh
from workbench.instrument.errors import suggestion
from workbench.lab.catalogue import implements

POINTS = {"x": "hook_x", "gate": "hook_gate", "y": "hook_y"}


@dataclass(frozen=True)
class SparseRows:
    """Active neurons of one head at one layer. Row r = sequence · pos + position.

    offsets [row + 1] int64: row r holds entries offsets[r] … offsets[r + 1] − 1. neurons [entry], ascending within a row, uint16 up to
    65,536 neurons, else int32. values [entry].
    """

    offsets: Tensor
    neurons: Tensor
    values: Tensor
    shape: tuple[int, int, int]  # batch, pos, neuron

    @classmethod
    def of(cls, dense: Tensor, dtype: torch.dtype) -> "SparseRows":
        """From activations [batch, pos, neuron]. Raises OverflowError where a value is too large for `dtype`."""
        rows = dense.flatten(0, 1)
        row, neuron = rows.nonzero(as_tuple=True)
        values = rows[row, neuron].to(dtype)
        if not bool(values.isfinite().all()):
            raise OverflowError(
                f"An activation of {float(rows.abs().max()):.4g} does not fit {dtype}. Expected dtype=torch.float32 (or bfloat16)."
            )
        offsets = torch.zeros(len(rows) + 1, dtype=torch.int64, device=dense.device)
        offsets[1:] = torch.bincount(row, minlength=len(rows)).cumsum(0)
        number = torch.uint16 if dense.shape[-1] <= 2**16 else torch.int32
        return cls(offsets, neuron.to(number), values, (dense.shape[0], dense.shape[1], dense.shape[2]))

    def dense(self) -> Tensor:
        """[batch, pos, neuron] in the stored dtype."""
        batch, pos, neuron = self.shape
        out = torch.zeros(batch * pos, neuron, dtype=self.values.dtype, device=self.values.device)
        rows = torch.repeat_interleave(torch.arange(batch * pos, device=out.device), self.counts().flatten())
        out[rows, self.neurons.long()] = self.values
        return out.view(batch, pos, neuron)

    def counts(self) -> Tensor:
        """Number of active neurons, [batch, pos]."""
        return self.offsets.diff().view(self.shape[:2])

    def active(self, position: int, sequence: int = 0) -> tuple[Tensor, Tensor]:
        """The active neurons of one token and their values, each [entry]."""
        batch, pos, _ = self.shape
        if not (0 <= sequence < batch and -pos <= position < pos):
            raise ValueError(
                f"(sequence, position) is {(sequence, position)}; expected within {batch} sequences of {pos} tokens."
            )
        row = sequence * pos + position % pos
        inside = slice(int(self.offsets[row]), int(self.offsets[row + 1]))
        return self.neurons[inside].long(), self.values[inside]

    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return sum(t.numel() * t.element_size() for t in (self.offsets, self.neurons, self.values))


@dataclass(frozen=True)
class SparseActivations(Mapping[tuple[str, int, int], SparseRows]):
    """Sparse rows by (name, layer, head), e.g. `sparse["y", 2, 0]`."""

    rows: dict[tuple[str, int, int], SparseRows]

    def __getitem__(self, key: tuple[str, int, int]) -> SparseRows:
        if key not in self.rows:
            names, layers, heads = (sorted({k[i] for k in self.rows}) for i in range(3))
            raise KeyError(
                f"Nothing captured for {key!r}. Expected (name, layer, head) with names {names}, layers {layers}, heads {heads}."
            )
        return self.rows[key]

    def __iter__(self) -> Iterator[tuple[str, int, int]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(rows.nbytes() for rows in self.rows.values())

    def density(self, name: str, layer: int) -> float:
        """Fraction of non-zero activations of one layer over all heads and tokens, position 0 of each sequence left out."""
        heads = [rows for (key, at, _), rows in self.rows.items() if (key, at) == (name, layer)]
        if not heads:
            raise KeyError(f"Nothing captured for name {name!r} at layer {layer}.")
        if heads[0].shape[1] < 2:
            raise ValueError("The sequences have one token, and position 0 is left out. Expected at least two tokens.")
        return sum(float(rows.counts()[:, 1:].float().mean()) / rows.shape[2] for rows in heads) / len(heads)

    def __repr__(self) -> str:
        return f"SparseActivations({len(self)} layer-head blocks, {self.nbytes() / 1e6:.2f} MB)"


@implements("bdh", "probe", "sparse_activations")
@torch.no_grad()
def sparse_activations(
    model: Any,
    tokens: Any,
    dtype: torch.dtype = torch.float16,
    *,
    names: Sequence[str] = ("x", "y"),
    layers: Sequence[int] | None = None,
    hooks: Sequence[Any] = (),
) -> SparseActivations:
    """Capture x, gate or y of a batch as sparse rows per layer and head.

    Args:
        tokens: ids [batch, pos] or text. dtype: of the stored values; which neurons are active does not depend on it.
        names: of `"x"`, `"gate"`, `"y"`. layers: None for all.
    """
    model = require_bdh(model, variants=True)
    for name in names:
        if name not in POINTS:
            raise ValueError(
                f"Unknown activation {name!r}.{suggestion(name, POINTS)} Expected some of {', '.join(POINTS)}."
            )
    chosen = (
        list(range(model.n_layers)) if layers is None else [checked_layer(model, layer, "layers") for layer in layers]
    )
    if not names or not chosen:
        raise ValueError("names or layers is empty, which captures nothing.")
    rows: dict[tuple[str, int, int], SparseRows] = {}

    def keep(name: str, layer: int) -> Any:
        def hook_function(x: Tensor, hook: Any) -> None:
            for head in range(x.shape[1]):
                rows[name, layer, head] = SparseRows.of(x[:, head], dtype)

        return hook_function

    wanted = [(f"blocks.{layer}.{POINTS[name]}", keep(name, layer)) for layer in chosen for name in names]
    model.run_with_hooks(tokens, hooks=[*hooks, *wanted], return_type=None)
    return SparseActivations(rows)


def dense_bytes(model: Any, tokens: int, arrays: int = 2) -> int:
    """Bytes that the same capture would take densely in float32: tokens · n · layers · arrays · 4."""
    model = require_bdh(model, variants=True)
    return tokens * neurons_per_head(model) * model.config.n_heads * model.n_layers * arrays * 4
