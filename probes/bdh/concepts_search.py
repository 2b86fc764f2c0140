"""The search over all synapses for those that tell two classes of sentences apart, without an n × n array per sentence.

For every source layer, target layer and target head the statistic of all discovery sentences is formed for a block of source neurons
(one matrix product per sentence), adjusted, and compared with the class labels. The same block serves every shuffled labelling, so that
a control through the whole search costs one more row of a matrix product, not one more search.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.bdh.capture import Synapse
from probes.bdh.concepts_recording import Recording, check_statistic
from probes.bdh.concepts_statistics import partial_basis, partial_directions
from probes.progress import Progress

BLOCK = 2**23
"""Numbers per block over all sentences: 32 MB in float32."""


@dataclass(frozen=True)
class SearchSpace:
    """Which synapses are searched: (source layer, target layer) pairs, source heads and target heads."""

    layers: tuple[tuple[int, int], ...]
    source_heads: tuple[int, ...]
    target_heads: tuple[int, ...]

    def size(self, recording: Recording, statistic: str) -> int:
        """Number of synapses (of rotary pairs, where the statistic belongs to the pair)."""
        width = recording.n_neurons // recording.n_heads
        columns = width if statistic == "count" else width // 2
        return len(self.layers) * len(self.source_heads) * len(self.target_heads) * width * columns


@dataclass(frozen=True)
class Blocks:
    """The statistic of the sentences `chosen`, block by block."""

    recording: Recording
    space: SearchSpace
    chosen: NDArray[np.int64]
    statistic: str

    def __iter__(self) -> Iterator[tuple[tuple[int, int, int], Tensor, Tensor]]:
        """((source layer, target layer, target head), rows [row], values [sentence, row, column]). Silent neurons are left out."""
        recording = self.recording
        width = recording.n_neurons // recording.n_heads
        heads = torch.tensor(self.space.source_heads)
        for source, target in self.space.layers:
            fires = torch.stack([(recording.y[source][s] != 0).any(0) for s in self.chosen]).any(0)
            allowed = torch.isin(torch.arange(recording.n_neurons) // width, heads)
            rows = (fires & allowed).nonzero()[:, 0]
            for head in self.space.target_heads:
                factors = [recording.targets(target, head, int(s), self.statistic) for s in self.chosen]
                step = max(1, BLOCK // (len(factors) * factors[0].shape[2]))
                for block in rows.split(step):
                    values = [
                        recording.block(source, block, factor, int(s), self.statistic)
                        for factor, s in zip(factors, self.chosen, strict=True)
                    ]
                    yield (source, target, head), block, torch.stack(values)


@dataclass(frozen=True)
class Found:
    """The k synapses of largest effect for one labelling, best first, and their effects (partial correlations) [synapse]."""

    synapses: tuple[Synapse, ...]
    effects: Tensor


@torch.no_grad()
def search(
    recording: Recording,
    space: SearchSpace,
    labels: NDArray[np.bool_],
    covariates: NDArray[np.float64],
    discovery: NDArray[np.int64],
    *,
    statistic: str,
    k: int,
    two_sided: bool = False,
    progress: Progress | None = None,
) -> list[Found]:
    """The best k synapses on the discovery sentences, for each labelling in labels [assignment, sentence].

    The effect is the partial correlation of statistic and class given covariates [sentence, covariate]; `two_sided` ranks by its size.
    """
    check_statistic(statistic)
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1.")
    dtype = recording.y[space.layers[0][0]][0].dtype
    basis64 = partial_basis(covariates[discovery])
    directions = torch.from_numpy(partial_directions(labels[:, discovery], basis64)).to(dtype)
    basis = torch.from_numpy(basis64).to(dtype)
    best = _Best(len(labels), k, two_sided)
    blocks, done, total = Blocks(recording, space, discovery, statistic), 0, space.size(recording, statistic)
    for place, rows, values in blocks:
        if progress is not None:
            progress(
                min(1.0, done / total),
                f"searching synapses from layer {place[0]} into head {place[2]} of layer {place[1]}",
            )
        done += values[0].numel()
        best.add(effects(values.flatten(1), basis, directions), place, rows, values.shape[2])
    return best.found(recording, statistic)


def effects(values: Tensor, basis: Tensor, directions: Tensor) -> Tensor:
    """Partial correlations [assignment, column] of values [sentence, column] (overwritten), 0 for columns that do not vary."""
    size = values.norm(dim=0)
    values -= basis @ (basis.T @ values)
    left = values.norm(dim=0)
    # what rounding leaves of a column that the covariates explain completely is no variation
    still = left <= 1e-5 * size
    return (directions @ values / left.masked_fill(still, 1)).masked_fill(still, 0)


class _Best:
    """The k largest effects of every labelling among the blocks added so far."""

    def __init__(self, assignments: int, k: int, two_sided: bool) -> None:
        self.k, self.two_sided = k, two_sided
        self.effects = torch.zeros(assignments, 0)
        self.places = torch.zeros(assignments, 0, 5, dtype=torch.long)  # source layer, target layer, head, row, column

    def add(self, effects: Tensor, place: tuple[int, int, int], rows: Tensor, columns: int) -> None:
        ranked = effects.abs() if self.two_sided else effects
        at = ranked.topk(min(self.k, effects.shape[1]), dim=1).indices
        where = torch.tensor(place).expand(*at.shape, 3)
        new = torch.cat([where, rows[at // columns][..., None], (at % columns)[..., None]], -1)
        values = torch.cat([self.effects.to(effects), effects.gather(1, at)], 1)
        places = torch.cat([self.places, new], 1)
        order = (values.abs() if self.two_sided else values).argsort(dim=1, descending=True, stable=True)[:, : self.k]
        self.effects = values.gather(1, order)
        self.places = places.gather(1, order[..., None].expand(-1, -1, 5))

    def found(self, recording: Recording, statistic: str) -> list[Found]:
        width = recording.n_neurons // recording.n_heads
        each = 1 if statistic == "count" else 2  # the even neuron stands for its pair
        out = []
        for effects, places in zip(self.effects, self.places, strict=True):
            keep = effects.abs() > 0 if self.two_sided else effects > 0
            synapses = tuple(
                Synapse(divmod(row, width), (head, column * each), target, source)
                for source, target, head, row, column in places[keep].tolist()
            )
            out.append(Found(synapses, effects[keep]))
        return out


def synapse_values(recording: Recording, synapses: Sequence[Synapse], statistic: str) -> NDArray[np.float64]:
    """The statistic of every sentence, [sentence, synapse], in float64."""
    return recording.of(synapses, statistic).double().numpy()
