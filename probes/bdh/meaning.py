"""What a neuron, or a row of BDH's state, says in tokens.

A neuron has two ends: D_x decides which streams excite it, E what it adds to the stream when it fires. A row of the state (head, j) is a
vector of the stream, the sum of all values that were written while neuron j was active: what a later token finds when its own x_j fires.
No norm and no later layer is applied here, so these are tendencies (a logit lens), not contributions; `probes.bdh.reading` has those.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.bdh.model import BDH
from probes.bdh.attribution import StateAttribution
from probes.bdh.capture import centred, checked_neuron, require_bdh, token_strings
from workbench.lab.catalogue import implements

Ranked = list[tuple[str, float]]
"""Tokens with a number, largest first."""


@dataclass(frozen=True)
class NeuronMeaning:
    """excited_by: tokens whose embedding gives the largest D_x pre-activation at layer 0. promotes and suppresses: logits cen(E_i) W_U."""

    head: int
    neuron: int
    excited_by: Ranked
    promotes: Ranked
    suppresses: Ranked


@dataclass(frozen=True)
class RowMeaning:
    """promotes: logits row W_U. resembles: cosines with the tokens' first residual streams.

    opens: (neuron, gate) of the same head with the largest gate ReLU(LN(row) D_y), were the row all that is read.
    """

    layer: int
    head: int
    neuron: int
    norm: float
    promotes: Ranked
    resembles: Ranked
    opens: list[tuple[int, float]]


@torch.no_grad()
def says(model: Any, direction: Tensor, k: int = 10) -> Ranked:
    """The k tokens whose logits a direction of the stream [d_model] raises most. Raises ValueError for another shape."""
    model = require_bdh(model, variants=True)
    if direction.shape != (model.d_model,):
        raise ValueError(f"direction has shape {tuple(direction.shape)}; expected ({model.d_model},).")
    return _ranked(model, direction.to(model.W_U) @ model.W_U, k)


@implements("bdh", "probe", "neuron_says")
@torch.no_grad()
def neuron_says(model: Any, head: int, neuron: int, k: int = 10) -> NeuronMeaning:
    """The tokens that excite a neuron directly, and those that its firing promotes. Raises ValueError for a neuron that does not exist."""
    model = require_bdh(model, variants=True)
    checked_neuron(model, head, neuron, "neuron")
    encoder = centred(model.weights.E[head, neuron])
    excited = _ranked(model, _streams(model) @ model.weights.D_x[head, :, neuron], k)
    suppressed = [(token, -value) for token, value in says(model, -encoder, k)]
    return NeuronMeaning(head, neuron, excited, says(model, encoder, k), suppressed)


@implements("bdh", "probe", "row_says")
@torch.no_grad()
def row_says(
    model: Any, attribution: StateAttribution, head: int, neuron: int, *, sequence: int = 0, k: int = 10
) -> RowMeaning:
    """What row (head, neuron) of an attributed state says. Raises ValueError for a row that does not exist or was never written."""
    model = require_bdh(model)
    checked_neuron(model, head, neuron, "row")
    if not 0 <= sequence < attribution.state.shape[0]:
        raise ValueError(f"sequence is {sequence}; the batch has sequences 0..{attribution.state.shape[0] - 1}.")
    row = attribution.state[sequence, head, neuron]
    norm = float(row.norm())
    if norm == 0:
        raise ValueError(
            f"Row {(head, neuron)} of layer {attribution.layer} is zero: neither neuron of its pair has fired yet."
        )
    streams = _streams(model).to(row)
    resembles = streams @ row / (streams.norm(dim=-1) * norm)
    read = centred(row) / (row.var(correction=0) + model.config.norm_eps).sqrt()
    gates = (read @ model.weights.D_y[head].to(row)).clamp(min=0)
    best = gates.topk(min(k, len(gates)))
    opens = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
    return RowMeaning(attribution.layer, head, neuron, norm, says(model, row, k), _ranked(model, resembles, k), opens)


def _streams(model: BDH) -> Tensor:
    """Every token's first residual stream, LN(embedding), [vocab, d_model]."""
    embedded = model.W_E
    return centred(embedded) / (embedded.var(-1, correction=0, keepdim=True) + model.config.norm_eps).sqrt()


def _ranked(model: BDH, numbers: Tensor, k: int) -> Ranked:
    best = numbers.topk(min(k, len(numbers)))
    return list(zip(token_strings(model, best.indices), best.values.tolist(), strict=True))
