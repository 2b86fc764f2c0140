"""What trained cells look like inside: the pattern that finds the answer, what the state keeps, the bit of parity, half a group."""

from __future__ import annotations

from itertools import combinations, permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.language_model import LanguageModel
from probes.state_tools import retention_matrix
from workbench.lab.tasks import Task, TaskBatch

ROWS = 64
RECALL_CELLS = ("softmax", "retnet", "mamba2", "deltanet", "gated-deltanet")  # all with an exact pattern
KEEPING_CELLS = ("mamba2", "gated-deltanet")
SIGN_CELLS = ("gru", "slstm", "softmax", "mamba2")
PARITY_CELLS = ("gru", "elman", "deltanet-negative", "simple-gla", "mamba2")


def planted_share(pattern: Tensor, batch: TaskBatch) -> Tensor:
    """Share of the absolute weight of answering rows that lies on the planted source, mean over answers: [head].

    pattern [batch, head, query, key] over tokens[:, :-1]. Answer t is given at query t − 1 and stands at source[t].
    """
    row, position = batch.loss_mask.nonzero(as_tuple=True)
    reading = pattern[row, :, position - 1].abs()  # [answer, head, key]
    source = batch.metadata["source"][row, position]
    found = reading.gather(-1, source[:, None, None].expand(-1, reading.shape[1], 1))[..., 0]
    return (found / reading.sum(-1).clamp(min=1e-12)).mean(0)


def recall_picture(model: LanguageModel, task: Task) -> dict[str, Any]:
    """The layer and head whose pattern points most at the planted sources: its share, and its pattern on one row [query, key]."""
    batch = task.batch(ROWS, 0, "validation")
    with torch.no_grad():
        patterns = model.patterns(batch.tokens[:, :-1])
    shares = {layer: planted_share(pattern.values, batch) for layer, pattern in patterns.items()}
    layer = max(shares, key=lambda number: float(shares[number].max()))
    head = int(shares[layer].argmax())
    shown = patterns[layer].values[0, head]
    return {"layer": layer, "head": head, "share": float(shares[layer][head]), "pattern": shown.detach().numpy()}


def kept(model: LanguageModel, task: Task, layer: int, head: int) -> np.ndarray:
    """Retention [t, j] of one head, mean over rows: how well the state after token t answers the key of token j; nan for j > t."""
    with torch.no_grad():
        retention = retention_matrix(model, task.batch(ROWS, 0, "validation").tokens[:, :-1], layer)
    return retention.cosine[:, head].mean(0).numpy()


def parity_picture(model: LanguageModel, task: Task) -> dict[str, Any]:
    """The one number of all states that goes most with the parity of the ones read so far.

    It is chosen by its absolute correlation on one half of the rows; `correlation` is that of the other half. `trace` [pos] is the number
    on the first row of that half, turned so that it goes up with parity, and `parity` [pos] the truth.
    """
    tokens = task.batch(ROWS, 0, "validation").tokens
    truth = (tokens.cumsum(1) % 2).float()
    with torch.no_grad():
        reading = model.states(tokens, positions=list(range(tokens.shape[1])))
    numbers = torch.cat([reading[layer].flatten(2) for layer in range(model.n_layers)], -1)  # [batch, pos, number]
    half = ROWS // 2
    chosen = correlations(numbers[:half], truth[:half])
    best = int(chosen.abs().argmax())
    sign = 1.0 if chosen[best] >= 0 else -1.0
    trace = sign * numbers[half, :, best]
    return {
        "correlation": float(sign * correlations(numbers[half:, :, best : best + 1], truth[half:])[0]),
        "trace": trace.numpy(),
        "parity": truth[half].numpy(),
    }


def correlations(numbers: Tensor, truth: Tensor) -> Tensor:
    """Pearson correlation of numbers [batch, pos, number] with truth [batch, pos], over both axes: [number]; 0 for constants."""
    x = numbers.flatten(0, 1).double()
    y = truth.flatten().double()
    x, y = x - x.mean(0), y - y.mean()
    size = x.norm(dim=0) * y.norm()
    return torch.where(size > 0, (x * y[:, None]).sum(0) / size.clamp(min=1e-30), torch.zeros_like(size))


def right_sign(model: LanguageModel, task: Task, first: int) -> float:
    """Share of the answers from position `first` on that name a permutation of the right sign, be it the right one or not.

    Even and odd are the coarsest part of the group: who tracks only that is right in 2 / items! of all cases, but here always.
    """
    batch = task.batch(ROWS, 0, "validation")
    orders = permutations(range(task.items))  # type: ignore[attr-defined]
    odd = torch.tensor([sum(a > b for a, b in combinations(order, 2)) % 2 for order in orders])
    with torch.no_grad():
        said = model(batch.tokens[:, :-1])[..., : len(odd)].argmax(-1)[:, first - 1 :]
    return float((odd[said] == odd[batch.targets[:, first:]]).float().mean())
