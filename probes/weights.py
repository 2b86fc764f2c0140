"""Heads read from their weights alone: which heads can read which (composition), and what a head's maps do (singular directions).

    composition(model)                        Q-, K- and V-composition of every pair of heads, with what chance would give
    head_svd(model, 1, 3, "ov")               singular values and directions of a head's map, with the tokens that they stand for

Row vectors, as in `embedding_space`: a head moves W_V W_O (OV) and matches by W_Q W_Kᵀ (QK), both d_model × d_model of rank d_head. A later
head composes with an earlier one by its queries, keys or values (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"):

    Q: ‖OV₁ QK₂‖ / ‖OV₁‖‖QK₂‖      K: ‖OV₁ QK₂ᵀ‖ / ‖OV₁‖‖QK₂‖      V: ‖OV₁ OV₂‖ / ‖OV₁‖‖OV₂‖      (Frobenius norms)

Chance is the same two maps with the stream between them turned by a random rotation: the mean square of the score is then exactly
1 / d_model, whatever the maps' spectra, and its spread is sampled. No d_model × d_model matrix is formed: every norm and every singular
value comes from the d_head × d_head middles of factored maps.

Norms between the heads are left out; their gains are part of the maps once they are folded (`models.weight_processing`), and positions
are not in the QK maps (a rotary head's is the one at distance 0). Layers without linear maps of heads take no part, and are named.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.embedding_space import NotBilinear, head_map, head_weights, project

KINDS = ("Q", "K", "V")
DRAWS = 50


@dataclass(frozen=True)
class Pair:
    """One composition: `later` reads `earlier`, both (layer, head). z: deviations of chance above its mean."""

    kind: str
    earlier: tuple[int, int]
    later: tuple[int, int]
    score: float
    chance: float
    z: float

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "kind": self.kind, "earlier": list(self.earlier), "later": list(self.later), "score": self.score,
            "chance": self.chance, "z": self.z,
        }  # fmt: skip


@dataclass(frozen=True)
class Composition:
    """Composition scores of a model's heads.

    Args:
        heads: (layer, head) of each row and column. scores: kind -> [earlier, later], nan where no head of the one runs before the other.
        chance, spread: mean and standard deviation of each score over random rotations of the stream, like scores.
        expected: root mean square of every score over all rotations, 1/√d_model. skipped: layer -> why its heads take no part.
    """

    heads: tuple[tuple[int, int], ...]
    scores: dict[str, NDArray[np.float64]]
    chance: dict[str, NDArray[np.float64]]
    spread: dict[str, NDArray[np.float64]]
    expected: float
    skipped: dict[int, str]

    def largest(self, kind: str | None = None, k: int = 10) -> list[Pair]:
        """The k pairs of largest score, of one kind or of all.

        Raises:
            ValueError: an unknown kind.
        """
        if kind is not None and kind not in KINDS:
            raise ValueError(f"Unknown kind {kind!r}. Expected one of {', '.join(KINDS)}, or None for all.")
        pairs = [
            Pair(
                one,
                self.heads[a],
                self.heads[b],
                float(self.scores[one][a, b]),
                float(self.chance[one][a, b]),
                float((self.scores[one][a, b] - self.chance[one][a, b]) / self.spread[one][a, b]),
            )
            for one in (KINDS if kind is None else (kind,))
            for a, b in np.argwhere(np.isfinite(self.scores[one]))
        ]
        return sorted(pairs, key=lambda pair: -pair.score)[:k]

    def to_json(self) -> dict[str, Any]:
        """Plain data; what does not exist is None."""

        def table(values: NDArray[np.float64]) -> list[list[float | None]]:
            return [[float(x) if np.isfinite(x) else None for x in row] for row in values]

        return {
            "heads": [list(head) for head in self.heads],
            "scores": {kind: table(values) for kind, values in self.scores.items()},
            "chance": {kind: table(values) for kind, values in self.chance.items()},
            "spread": {kind: table(values) for kind, values in self.spread.items()},
            "expected": self.expected,
            "skipped": {str(layer): why for layer, why in self.skipped.items()},
        }


@torch.no_grad()
def composition(model: Any, draws: int = DRAWS, seed: int = 0) -> Composition:
    """Q-, K- and V-composition of every pair of heads of which one runs before the other.

    Args:
        draws: random rotations that chance is estimated from. seed: of these.

    Raises:
        NotBilinear: no layer, or a single one, has heads with linear maps. ValueError: fewer than two draws.
    """
    if draws < 2:
        raise ValueError(f"draws is {draws}; expected at least 2, for a spread.")
    layers: dict[int, _Heads] = {}
    skipped: dict[int, str] = {}
    for layer in range(model.n_layers):
        try:
            layers[layer] = _Heads.of(model, layer)
        except NotBilinear as reason:
            skipped[layer] = str(reason)
    before = _runs_before(model)
    pairs = [(a, b) for a in layers for b in layers if (a, b) in before]
    if not pairs:
        reasons = " ".join(skipped.values())
        raise NotBilinear(
            f"{model.name} has no two layers of heads with linear maps, of which one runs first. {reasons}".strip()
        )
    heads = [(layer, head) for layer, found in layers.items() for head in range(len(found))]
    first = {layer: heads.index((layer, 0)) for layer in layers}
    empty = np.full((len(heads), len(heads)), np.nan)
    scores, chance, spread = ({kind: empty.copy() for kind in KINDS} for _ in range(3))
    generator = torch.Generator().manual_seed(seed)
    for a, b in pairs:
        earlier, later = layers[a], layers[b]
        rows, columns = slice(first[a], first[a] + len(earlier)), slice(first[b], first[b] + len(later))
        for kind in KINDS:
            scores[kind][rows, columns] = earlier.read_by(later, kind).numpy(force=True)
            by_chance = torch.stack([earlier.read_by_chance(later, kind, generator) for _ in range(draws)])
            chance[kind][rows, columns] = by_chance.mean(0).numpy(force=True)
            spread[kind][rows, columns] = by_chance.std(0).numpy(force=True)
    return Composition(tuple(heads), scores, chance, spread, float(model.d_model) ** -0.5, skipped)


def _runs_before(model: Any) -> set[tuple[int, int]]:
    """(a, b) where some run of layer a precedes some run of layer b; with shared depth also b = a and both orders."""
    order = [layer for layer, _ in getattr(model, "visits", [(layer, 0) for layer in range(model.n_layers)])]
    return {(a, b) for place, a in enumerate(order) for b in order[place + 1 :]}


@dataclass(frozen=True)
class _Heads:
    """The maps of a layer's heads in float64, X [head, d_model, width] and O [head, width, d_model], and the triangles of X = Q R."""

    maps: dict[str, Tensor]
    triangles: dict[str, Tensor]

    @classmethod
    def of(cls, model: Any, layer: int) -> "_Heads":
        mixer = model.mixers[layer]
        if getattr(mixer, "reads_source", False):
            raise NotBilinear(
                f"Layer {layer} of {model.name} takes its keys and values from a source, not from the stream."
            )
        maps = {
            name: head_weights(model, layer, name).detach().double() for name in ("query", "key", "value", "output")
        }
        n_heads = len(maps["output"])
        groups = {name: torch.arange(n_heads, device=part.device) * len(part) // n_heads for name, part in maps.items()}
        maps = {name: part[groups[name]] for name, part in maps.items()}
        tall = {name: part.transpose(1, 2) if name == "output" else part for name, part in maps.items()}
        return cls(maps, {name: torch.linalg.qr(part).R for name, part in tall.items()})

    def __len__(self) -> int:
        return len(self.maps["output"])

    def _reading(self, kind: str) -> tuple[str, str]:
        """The map that meets what is read, and the one beyond it."""
        return {"Q": ("query", "key"), "K": ("key", "query"), "V": ("value", "output")}[kind]

    def _small(self, kind: str) -> Tensor:
        """R_x R_yᵀ of the map that `kind` goes through: of its norm, [head, width, width]."""
        near, far = self._reading(kind)
        return self.triangles[near] @ self.triangles[far].transpose(1, 2)

    def _moved(self) -> Tensor:
        """R_V R_Oᵀ, of the norm of OV."""
        return self.triangles["value"] @ self.triangles["output"].transpose(1, 2)

    def _lengths(self, later: "_Heads", kind: str) -> Tensor:
        return self._moved().flatten(1).norm(dim=1)[:, None] * later._small(kind).flatten(1).norm(dim=1)

    def read_by(self, later: "_Heads", kind: str) -> Tensor:
        """Scores [head, head of `later`]."""
        near, far = later._reading(kind)
        middle = torch.einsum("aid,bdj->abij", self.maps["output"], later.maps[near])
        product = self.triangles["value"][:, None] @ middle @ later.triangles[far].transpose(1, 2)
        return product.flatten(2).norm(dim=2) / self._lengths(later, kind)

    def read_by_chance(self, later: "_Heads", kind: str, generator: torch.Generator) -> Tensor:
        """The same with the stream between turned at random. A rotation's block between two subspaces is all that matters of it."""
        left, right = self._moved(), later._small(kind)
        d_model, width = self.maps["value"].shape[1], right.shape[1]
        frame, triangle = torch.linalg.qr(torch.randn(d_model, width, generator=generator, dtype=torch.float64))
        turned = (frame * triangle.diagonal().sign())[: left.shape[2]].to(left.device)
        inner = turned @ (right @ right.transpose(1, 2)) @ turned.T
        squares = (left.transpose(1, 2) @ left).flatten(1) @ inner.flatten(1).T
        return squares.clamp(min=0).sqrt() / self._lengths(later, kind)


# ---------------------------------------------------------------------------------------------- singular directions


@dataclass(frozen=True)
class Direction:
    """One singular direction of a head's map. Its sign is arbitrary, but the same on both sides: `reads` goes with `writes`.

    Args:
        value: singular value. share: of the map's squared norm. left, right: unit vectors [d_model], map ≈ Σ value · left rightᵀ.
        reads, writes: (token, score) of the tokens that lie furthest along left and right. reads_against, writes_against: the other way.
            Of a QK map "reads" are query tokens and "writes" key tokens.
    """

    value: float
    share: float
    left: Tensor
    right: Tensor
    reads: list[tuple[int, float]]
    writes: list[tuple[int, float]]
    reads_against: list[tuple[int, float]]
    writes_against: list[tuple[int, float]]

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the vectors."""
        names = ("value", "share", "reads", "writes", "reads_against", "writes_against")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class HeadSVD:
    """A head's map as directions. values: all singular values, largest first. effective_rank: exp of the entropy of their shares."""

    layer: int
    head: int
    which: str
    values: NDArray[np.float64]
    directions: tuple[Direction, ...]

    @property
    def effective_rank(self) -> float:
        """Between 1 and d_head: how many directions carry the squared norm."""
        shares = np.square(self.values) / np.square(self.values).sum()
        shares = shares[shares > 0]
        return float(np.exp(-(shares * np.log(shares)).sum()))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "layer": self.layer, "head": self.head, "map": self.which, "values": self.values.tolist(),
            "effective_rank": self.effective_rank, "directions": [one.to_json() for one in self.directions],
        }  # fmt: skip


@torch.no_grad()
def head_svd(model: Any, layer: int, head: int, which: str = "ov", directions: int = 5, tokens: int = 8) -> HeadSVD:
    """Singular values and directions of a head's OV or QK map, and the tokens along them.

    The left directions are what the head reads (queries, of a QK map), projected with the embedding; the right ones what it writes,
    projected with the unembedding (of a QK map: keys, with the embedding). See `probes.embedding_space`.

    Raises:
        NotBilinear: a mixer without such weights, or a model without an unembedding. ValueError: an unknown map, layer or head.
    """
    left, right = (part.double() for part in head_map(model, layer, head, which))
    if which == "ov" and not hasattr(model, "unembed"):
        raise NotBilinear(
            f"{model.name} has no unembedding, so what its heads write stands for no tokens. Expected which='qk'."
        )
    (outer_left, inner_left), (outer_right, inner_right) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, values, vh = torch.linalg.svd(inner_left @ inner_right.T)
    lefts, rights = (outer_left @ u).T, (outer_right @ vh.T).T
    shares = values.square() / values.square().sum()
    dtype = model.W_E.dtype
    found = []
    for number in range(min(directions, len(values))):
        read = project(model, lefts[number].to(dtype), "key")
        written = project(model, rights[number].to(dtype), "key" if which == "qk" else "value")
        found.append(
            Direction(
                float(values[number]), float(shares[number]), lefts[number], rights[number],
                _along(read, tokens), _along(written, tokens), _along(-read, tokens), _along(-written, tokens),
            )
        )  # fmt: skip
    return HeadSVD(layer % int(model.n_layers), head, which, values.numpy(force=True), tuple(found))


def _along(scores: Tensor, k: int) -> list[tuple[int, float]]:
    best = scores.topk(min(k, len(scores)))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
