"""States: what a model carries from token to token, as named slots per layer."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.instrument.errors import HookError, suggestion
from workbench.instrument.html import table


@dataclass
class ModelState:
    """Everything a following call needs: the number of tokens read so far and, per layer, named slots.

    Softmax attention carries `key` and `value` [batch, pos, kv_head, d_head]; recurrent mixers carry `state`
    [batch, head, state_k, state_v] and whatever else they need (a convolution's last inputs). `mask` [batch, pos] marks real tokens.
    Where weights are shared over depth, every pass over a layer has slots of its own, in the order in which blocks run.
    """

    position: int = 0
    layers: list[dict[str, Tensor]] = field(default_factory=list)
    mask: Tensor | None = None
    lengths: Tensor | None = None  # real tokens read per sequence, [batch]; None when there is no padding

    def slot(self, layer: int, name: str) -> Tensor:
        """One slot; raises `HookError` with the nearest name."""
        if not -len(self.layers) <= layer < len(self.layers):
            raise HookError(f"The state has layers 0..{len(self.layers) - 1}, not {layer}.")
        slots = self.layers[layer]
        if name not in slots:
            raise HookError(
                f"Layer {layer} carries no slot {name!r}.{suggestion(name, slots)} It carries: {', '.join(slots) or 'nothing'}."
            )
        return slots[name]

    def replaced(self, layer: int, **slots: Tensor) -> "ModelState":
        """A copy with some slots of one layer replaced; names and shapes are checked."""
        for name, value in slots.items():
            old = self.slot(layer, name)
            if value.shape != old.shape or value.dtype != old.dtype:
                raise HookError(
                    f"Slot {name!r} of layer {layer} is {tuple(old.shape)} {old.dtype}; got {tuple(value.shape)} {value.dtype}."
                )
        copy = self.clone()
        copy.layers[layer].update(slots)
        return copy

    def without(self, *layers: int) -> "ModelState":
        """A copy in which some layers carry nothing: in the next call they read that call alone, at the positions that its tokens have.

        What such a layer hands on would not fit the others, so the model refuses `return_state` with it. Per-position points of the layer
        count from the call.
        """
        outside = [layer for layer in layers if not -len(self.layers) <= layer < len(self.layers)]
        if outside:
            raise HookError(f"The state has layers 0..{len(self.layers) - 1}, not {outside[0]}.")
        copy, cut = self.clone(), {layer % len(self.layers) for layer in layers}
        copy.layers = [{} if number in cut else slots for number, slots in enumerate(copy.layers)]
        return copy

    def clone(self) -> "ModelState":
        """A deep copy: changing it leaves this one alone."""
        return self.map(lambda t: t.clone())

    def detach(self) -> "ModelState":
        """The same numbers without the graph."""
        return self.map(lambda t: t.detach())

    def map(self, function: Any) -> "ModelState":
        """Apply a function to every tensor."""
        return ModelState(
            self.position,
            [{name: function(t) for name, t in layer.items()} for layer in self.layers],
            None if self.mask is None else function(self.mask),
            None if self.lengths is None else function(self.lengths),
        )

    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer.values())

    def save(self, path: str | Path) -> Path:
        """Write as safetensors, to a temporary name first."""
        from safetensors.torch import save_file

        tensors = {
            f"{number}.{name}": t.contiguous() for number, layer in enumerate(self.layers) for name, t in layer.items()
        }
        if self.mask is not None:
            tensors["mask"] = self.mask.contiguous()
        if self.lengths is not None:
            tensors["lengths"] = self.lengths.contiguous()
        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        save_file(tensors, temporary, metadata={"position": str(self.position), "layers": str(len(self.layers))})
        temporary.replace(path)
        return path

    @classmethod
    def load(cls, path: str | Path) -> "ModelState":
        """Read what `save` wrote."""
        from safetensors import safe_open

        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if "position" not in metadata:
                raise HookError(f"{path} holds no model state. Expected a file written by ModelState.save.")
            state = cls(int(metadata["position"]), [{} for _ in range(int(metadata["layers"]))])
            for key in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                if key in ("mask", "lengths"):
                    setattr(state, key, file.get_tensor(key))
                else:
                    layer, name = key.split(".", 1)
                    state.layers[int(layer)][name] = file.get_tensor(key)
        return state

    def __repr__(self) -> str:
        slots = sorted({name for layer in self.layers for name in layer})
        return f"ModelState(after {self.position} tokens, {len(self.layers)} layers, slots {slots}, {self.nbytes() / 1e6:.2f} MB)"

    def _repr_html_(self) -> str:
        rows = [
            (
                layer,
                name,
                "×".join(map(str, t.shape)),
                str(t.dtype).removeprefix("torch."),
                f"{float(t.double().norm()):.4g}",
            )
            for layer, slots in enumerate(self.layers)
            for name, t in slots.items()
        ]
        return table(repr(self), ("layer", "slot", "shape", "dtype", "norm"), rows)


@dataclass(frozen=True)
class StateReading(Mapping[int, Tensor]):
    """States at chosen positions: `reading[layer]` is [batch, position, head, state_k, state_v]."""

    positions: tuple[int, ...]
    layers: Mapping[int, Tensor]

    def __getitem__(self, layer: int) -> Tensor:
        if layer not in self.layers:
            raise HookError(f"No state was read at layer {layer}. Layers read: {sorted(self.layers)}.")
        return self.layers[layer]

    def __iter__(self) -> Iterator[int]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def at(self, layer: int, position: int) -> Tensor:
        """[batch, head, state_k, state_v] after one of the read positions."""
        if position not in self.positions:
            raise HookError(f"Position {position} was not read. Positions read: {list(self.positions)}.")
        return self[layer][:, self.positions.index(position)]

    def norms(self, layer: int) -> Tensor:
        """Frobenius norms [batch, position, head]."""
        return torch.linalg.matrix_norm(self[layer])

    def __repr__(self) -> str:
        shapes = {layer: tuple(t.shape) for layer, t in self.layers.items()}
        return f"StateReading(positions {list(self.positions)}, batch position head state_k state_v = {shapes})"

    def _repr_html_(self) -> str:
        """Norms of the first sequence's states, largest head of each: one row per layer, one column per position."""
        rows = [(layer, *(f"{float(value):.4g}" for value in self.norms(layer)[0].amax(-1))) for layer in self.layers]
        return table(repr(self), ("layer", *(f"|state| after {p}" for p in self.positions)), rows)


def absolute_positions(positions: int | Sequence[int], length: int) -> tuple[int, ...]:
    """Resolve negative positions against a length; raises `HookError` for any outside."""
    wanted = [positions] if isinstance(positions, int) else list(positions)
    bad = [p for p in wanted if not -length <= p < length]
    if bad or not wanted:
        raise HookError(f"Positions {bad or wanted} are outside this sequence of {length} tokens (0..{length - 1}).")
    return tuple(sorted({p % length for p in wanted}))
