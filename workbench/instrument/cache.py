"""The activation cache: what a run stored, by address, with short forms and errors that help."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workbench.instrument.errors import HookError, UnknownHookPoint, suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.html import table


class ActivationCache(Mapping[str, Tensor]):
    """Cached activations by address.

    `cache["blocks.0.attn.hook_pattern"]`, or short as in TransformerLens: `cache["pattern", 0]`, `cache["resid_post", -1]`,
    `cache["scale", 1, "ln1"]`. `cache.by_role("pattern")` gives `{layer: tensor}`. Gradients, if asked for, are `cache.gradients[address]`.
    """

    def __init__(
        self,
        tensors: dict[str, Tensor],
        points: Mapping[str, HookPoint],
        n_layers: int,
        gradients: dict[str, Tensor] | None = None,
        aliases: Mapping[str, str] | None = None,
    ) -> None:
        self.aliases = aliases or {}
        self._tensors, self.points, self.n_layers = tensors, points, n_layers
        self.gradients: dict[str, Tensor] = gradients if gradients is not None else {}

    def __getitem__(self, key: Any) -> Tensor:
        return self._tensors[self.resolve(key)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __contains__(self, key: object) -> bool:
        try:
            self.resolve(key)
        except UnknownHookPoint:
            return False
        return True

    def resolve(self, key: Any) -> str:
        """The full address of a short or full key; raises `UnknownHookPoint` naming the nearest stored one."""
        if isinstance(key, str):
            if key in self._tensors:
                return key
            if f"hook_{key}" in self._tensors:
                return f"hook_{key}"
            if self.aliases.get(key) in self._tensors:
                return self.aliases[key]
            known = key.split("@")[0].split("[")[0] in self.points
            why = (
                "is a hook point of the model but was not cached in this run"
                if known
                else "is neither cached nor a hook point"
            )
            raise UnknownHookPoint(f"{key!r} {why}.{suggestion(key, self._tensors)}")
        if isinstance(key, tuple) and len(key) in (2, 3) and isinstance(key[0], str) and isinstance(key[1], int):
            name, layer = key[0], key[1]
            if not -self.n_layers <= layer < self.n_layers:
                raise UnknownHookPoint(f"Layer {layer} is out of range: this model has layers 0..{self.n_layers - 1}.")
            prefix = f"blocks.{layer % self.n_layers}."
            homes = [f"{key[2]}."] if len(key) == 3 else ["", "attn.", "mixer.", "mlp.", "ln1."]
            for home in homes:
                if f"{prefix}{home}hook_{name}" in self._tensors:
                    return f"{prefix}{home}hook_{name}"
                if self.aliases.get(f"{prefix}{home}hook_{name}") in self._tensors:
                    return self.aliases[f"{prefix}{home}hook_{name}"]
            short = {re.sub(r"^.*hook_", "", address) for address in self._tensors if address.startswith(prefix)}
            raise UnknownHookPoint(
                f"Nothing cached for {key!r} (looked for {prefix}[{'|'.join(homes)}]hook_{name}).{suggestion(name, short)}"
            )
        raise UnknownHookPoint(
            f"Cannot look up {key!r}. Expected an address such as 'blocks.0.hook_resid_post', or (name, layer) such as ('resid_post', 0)."
        )

    def by_role(self, role: str) -> dict[Any, Tensor]:
        """Cached tensors of one role by layer (`None` outside the blocks; `(layer, step)` where depth shares weights).

        Raises:
            UnknownHookPoint: the role is unknown, nothing of it was cached, or a layer has several (then look them up by address).
        """
        roles = {point.role for point in self.points.values()}
        if role not in roles:
            raise UnknownHookPoint(
                f"Unknown role {role!r}.{suggestion(role, roles)} Roles of this model: {', '.join(sorted(roles))}."
            )
        addresses: dict[Any, str] = {}
        for address in self._tensors:
            if self.point(address).role == role:
                depth = self.depth(address)
                if depth in addresses:
                    raise UnknownHookPoint(
                        f"Role {role!r} occurs more than once at layer {depth}: {addresses[depth]!r} and {address!r}. "
                        "Expected one; look them up by address, or cache fewer with names=."
                    )
                addresses[depth] = address
        if not addresses:
            raise UnknownHookPoint(f"No hook point of role {role!r} was cached in this run.")
        return {depth: self._tensors[address] for depth, address in addresses.items()}

    def point(self, address: str) -> HookPoint:
        """The hook point that a cached address belongs to."""
        return self.points[re.sub(r"(@\d+)?(\[[^\]]*\])?$", "", address)]

    def depth(self, address: str) -> Any:
        """Layer of a cached address, `(layer, step)` where depth shares weights, None outside the blocks."""
        point = self.point(address)
        return point.layer_index if point.steps == 1 else (point.layer_index, int(address.split("@")[1].split("[")[0]))

    def stack(self, name: str) -> Tensor:
        """The same short name of every layer, stacked: [layer, ...]."""
        layers = [layer for layer in range(self.n_layers) if (name, layer) in self]
        if len(layers) != self.n_layers:
            raise UnknownHookPoint(
                f"hook_{name} is cached for layers {layers} of 0..{self.n_layers - 1}; stacking needs all of them."
            )
        tensors = [self[name, layer] for layer in layers]
        if len({t.shape for t in tensors}) > 1:
            raise HookError(
                f"hook_{name} has different shapes in different layers: {[tuple(t.shape) for t in tensors]}."
            )
        return torch.stack(tensors)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "ActivationCache":
        """A new cache on another device or in another floating dtype."""

        def move(t: Tensor) -> Tensor:
            return t.to(device=device, dtype=dtype if t.is_floating_point() else None)

        return ActivationCache(
            {k: move(t) for k, t in self._tensors.items()},
            self.points,
            self.n_layers,
            {k: move(t) for k, t in self.gradients.items()},
            self.aliases,
        )

    def remove_batch_dim(self) -> "ActivationCache":
        """A new cache without the batch axis; refused if the batch holds more than one sequence."""
        for address, tensor in self._tensors.items():
            if tensor.shape[0] != 1:
                raise HookError(f"Cannot drop the batch axis: {address!r} has batch={tensor.shape[0]}, expected 1.")
        return ActivationCache(
            {k: t[0] for k, t in self._tensors.items()},
            self.points,
            self.n_layers,
            {k: t[0] for k, t in self.gradients.items()},
            self.aliases,
        )

    def nbytes(self) -> int:
        """Bytes held, counting storage shared by several entries once."""
        return sum(
            {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self._tensors.values()}.values()
        )

    def save(self, path: str | Path) -> Path:
        """Write as safetensors (to a temporary name first). Gradients are stored under `<address>_grad`."""
        from safetensors.torch import save_file

        path = Path(path)
        temporary = path.with_name(path.name + ".tmp")
        tensors = {**self._tensors, **{f"{k}_grad": t for k, t in self.gradients.items()}}
        save_file({k: t.contiguous().clone() for k, t in tensors.items()}, temporary)
        temporary.replace(path)
        return path

    def to_transformer_lens(self, model: Any) -> Any:
        """The same activations as a `transformer_lens.ActivationCache`, for its analysis methods."""
        from transformer_lens import ActivationCache as LensCache

        return LensCache(dict(self._tensors), model)

    def __repr__(self) -> str:
        head = ", ".join(list(self._tensors)[:4])
        more = f", … {len(self) - 4} more" if len(self) > 4 else ""
        return f"ActivationCache({len(self)} activations, {self.nbytes() / 1e6:.1f} MB: {head}{more})"

    def _repr_html_(self) -> str:
        rows = [
            (
                address,
                self.point(address).role,
                " ".join(self.point(address).axes),
                "×".join(map(str, t.shape)),
                short_dtype(t),
            )
            for address, t in self._tensors.items()
        ]
        return table(repr(self), ("address", "role", "axes", "shape", "dtype"), rows)


def short_dtype(x: Tensor) -> str:
    """`float32` rather than `torch.float32`."""
    return str(x.dtype).removeprefix("torch.")
