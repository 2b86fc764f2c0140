"""A model whose hook points have names: what it says of itself, and how its modules' hook points are found and called."""

import re
from typing import Any, Protocol

from torch import Tensor, nn

from workbench.instrument.errors import HookError, UnknownHookPoint, suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.html import table
from workbench.instrument.selection import HookPoints


class Mixer(Protocol):
    """What a layer's sequence mixer tells about itself, so that patterns and states are read the same way everywhere.

    `factor_points` are the hook points whose tensors determine the pattern and the state: `query`, `key`, `value` and, where they exist,
    `log_decay` and `write`. `constant_factors()` gives those that do not depend on the input, e.g. RetNet's decays [head].
    A mixer whose pattern and state no factors determine says `form = "dense"` and may have none; runs then keep what its `hook_pattern`
    and its hook points of role `state` give. Any mixer may name per-token signals in `signal_points`: {name: (point, label, unit)}.
    `slots` names what the mixer carries from call to call (the slots of `ModelState`).
    """

    factor_points: dict[str, HookPoint]
    slots: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest (docs/architecture.md, section 4)."""
        ...

    def constant_factors(self) -> dict[str, Tensor]:
        """Factors that are the same for every input."""
        ...


class NamedPoints(nn.Module):
    """Hook points by name, and the switches that add optional ones. The lowest part of `HookedModel`."""

    def __init__(self) -> None:
        super().__init__()
        self.switches: dict[str, bool] = {}
        self.hook_points: HookPoints = HookPoints({}, 0, self.switches)

    @property
    def n_layers(self) -> int:
        """Number of layers (blocks)."""
        raise TypeError(f"{type(self).__name__} does not say how many layers it has")

    @property
    def mixers(self) -> list[Mixer]:
        """The sequence mixer of each layer."""
        raise TypeError(f"{type(self).__name__} does not list its sequence mixers")

    # ------------------------------------------------------------------ names

    def hook_aliases(self) -> dict[str, str]:
        """Other names for hook points (a paper's, another tool's), to their name here."""
        return {}

    def name_hook_points(self) -> None:
        """Give every hook point its name from the module tree and index them. Call once, at the end of the constructor."""
        points: dict[str, HookPoint] = {}
        seen: set[int] = set()
        modules = dict(self.named_modules())
        for path, module in modules.items():
            parts = path.split(".")
            shown = [
                part
                for i, part in enumerate(parts)
                if not getattr(modules[".".join(parts[: i + 1])], "transparent_in_names", False)
            ]
            module_name = ".".join(shown)
            for attribute, value in vars(module).items():
                if isinstance(value, HookPoint):
                    name = f"{module_name}.{attribute}" if module_name else attribute
                    if name in points or value.uid in seen:
                        raise HookError(
                            f"The hook point {name!r} of {type(module).__name__} is there twice. Expected one name for each."
                        )
                    value.name = name
                    layer = re.match(r"blocks\.(\d+)\.", name)
                    value.layer_index = int(layer[1]) if layer else None
                    points[name] = value
                    seen.add(value.uid)
                elif isinstance(value, (list, tuple, dict)) and any(
                    isinstance(item, HookPoint) for item in (value.values() if isinstance(value, dict) else value)
                ):
                    raise HookError(
                        f"{type(module).__name__}.{attribute} holds hook points, which get no name there. Expected each as an attribute."
                    )
        self.hook_points = HookPoints(points, self.n_layers, self.switches, self.hook_aliases())

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """All hook points by name."""
        return dict(self.hook_points.points)

    def _repr_html_(self) -> str:
        """Hook points by role: how many, what axes, and one name to begin with."""
        rows = []
        for role in self.hook_points.roles:
            points = [point for point in self.hook_points.points.values() if point.role == role]
            rows.append((role, len(points), " ".join(points[0].axes), points[0].name))
        summary = repr(self) if type(self).__repr__ is not nn.Module.__repr__ else type(self).__name__
        return table(summary, ("role", "hook points", "axes", "first"), rows)

    def set_switch(self, name: str, on: bool) -> None:
        """Turn an optional group of hook points on or off; raises `UnknownHookPoint` with the nearest switch."""
        if name not in self.switches:
            raise UnknownHookPoint(
                f"This model has no switch {name!r}.{suggestion(name, self.switches)} It has: {', '.join(self.switches)}."
            )
        self.switches[name] = bool(on)

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Include `attn.hook_result` (each head's contribution to the residual stream) in "cache everything"."""
        self.set_switch("use_attn_result", use_attn_result)

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Give queries, keys and values their own copies of the block input, per head: `hook_{q,k,v}_input`."""
        self.set_switch("use_split_qkv_input", use_split_qkv_input)

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Give each head its own copy of the block input: `hook_attn_in`."""
        self.set_switch("use_attn_in", use_attn_in)

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Include `hook_mlp_in` in "cache everything"."""
        self.set_switch("use_hook_mlp_in", use_hook_mlp_in)

    def to_tokens(self, tokens: Any) -> Tensor:
        """[batch, pos] token ids from ids or text. Models with a tokenizer override this to accept text."""
        if not isinstance(tokens, Tensor):
            raise HookError(f"Expected token ids as a tensor [batch, pos], got {type(tokens).__name__}.")
        return tokens if tokens.dim() == 2 else tokens[None]
