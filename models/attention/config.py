"""The configuration of an attention site: sizes, and which part fills which stage."""

from dataclasses import dataclass
from typing import Any

from models.attention.alibi import AlibiConfig
from models.attention.rotary import RopeConfig
from models.attention.stages import Mask, Reweight, Sizes, part_class
from models.parts.positions import POSITIONS
from workbench.instrument.errors import suggestion

PROJECTIONS = ("query", "key", "value", "output")


@dataclass(frozen=True)
class AttentionConfig:
    """An attention site. The fields from `causal` on fill stages; see `models.attention.stages`.

    Args:
        n_heads: query heads. n_key_value_heads: key/value groups (None: one per head; 1: multi-query).
        d_head: width of a head's queries and keys (None: d_model / n_heads, shared by the maps that a reweighting joins into a head).
        position: `"learned"`, `"sinusoidal"` act at the embedding, `"none"` not at all; `"rope"` is short for `RopeConfig` of the
            rope_ fields, `"alibi"` for `AlibiConfig()`; or a part that rotates or adds a term; or a tuple of these, applied in order.
        rope_base, rope_fraction, rope_interleaved: see `Rotary`.
        bias: biases on the projections: all, none, or those named (of `"query"`, `"key"`, `"value"`, `"output"`).
        scale: score factor (None: d_head^-½; 1.0: unscaled). window: how many tokens back a token may read (None: all).
        d_value: width of a head's values (None: d_head times the maps per head).
        causal: False lets tokens read the future. qk_norm: a `QKNormConfig`. softcap: c·tanh(s/c) of scores before the mask.
        project, score, mask, normalise: one part each; None is the default of the stage.
        reweight, mix, post: a part or a tuple of parts, applied in order.
    """

    n_heads: int
    n_key_value_heads: int | None = None
    d_head: int | None = None
    position: Any = "learned"
    rope_base: float = 10000.0
    rope_fraction: float = 1.0
    rope_interleaved: bool = False
    bias: bool | tuple[str, ...] = True
    scale: float | None = None
    window: int | None = None
    d_value: int | None = None
    causal: bool = True
    qk_norm: Any = None
    softcap: float | None = None
    project: Any = None
    score: Any = None
    mask: Any = None
    normalise: Any = None
    reweight: Any = ()
    mix: Any = ()
    post: Any = ()
    kind: str = "attention"

    def check(self) -> None:
        """Raise for what is wrong whatever the model's width."""
        for item in several(self.position):
            if isinstance(item, str) and item not in POSITIONS:
                raise ValueError(
                    f"Unknown position {item!r}.{suggestion(item, POSITIONS)} Expected one of {', '.join(POSITIONS)}, or a part."
                )
        if self.window is not None and self.window < 1:
            raise ValueError(f"window is {self.window}; expected at least 1 (the token itself), or None for no limit.")
        for name in () if isinstance(self.bias, bool) else self.bias:
            if name not in PROJECTIONS:
                raise ValueError(
                    f"bias names {name!r}.{suggestion(name, PROJECTIONS)} Expected some of {', '.join(PROJECTIONS)}."
                )

    @property
    def embedded_positions(self) -> set[str]:
        """The kinds of positions that this site wants added at the embedding."""
        return {item for item in several(self.position) if item in ("learned", "sinusoidal")}

    @property
    def position_parts(self) -> tuple[Any, ...]:
        """The parts that `position` asks for, short forms spelled out."""
        rope = RopeConfig(self.rope_base, self.rope_fraction, self.rope_interleaved)
        short = {"rope": rope, "alibi": AlibiConfig()}
        named = tuple(short.get(item, item) if isinstance(item, str) else item for item in several(self.position))
        return tuple(item for item in named if not isinstance(item, str))

    def has_bias(self, name: str) -> bool:
        """Whether the projection `name` has a bias."""
        return self.bias if isinstance(self.bias, bool) else name in self.bias

    def sizes(self, d_model: int) -> Sizes:
        """The sizes of a site in a model of this width.

        Raises:
            ValueError: heads that do not divide evenly into groups, or d_model into heads; an unknown position or projection; a window
                below 1.
        """
        self.check()
        n_kv = self.n_key_value_heads or self.n_heads
        if self.n_heads % n_kv:
            raise ValueError(f"n_heads ({self.n_heads}) must be a multiple of n_key_value_heads ({n_kv}).")
        maps = 1
        for item in several(self.reweight):
            reweight: type[Reweight] = part_class(item, "reweight", ("reweight",))  # type: ignore[assignment]
            maps *= reweight.maps_per_head
        if self.d_head is None and d_model % (self.n_heads * maps):
            joined = "" if maps == 1 else f" × {maps} maps"
            raise ValueError(
                f"d_model ({d_model}) must be a multiple of n_heads ({self.n_heads}){joined} unless d_head is given."
            )
        d_head = self.d_head or d_model // (self.n_heads * maps)
        scale = self.scale if self.scale is not None else d_head**-0.5
        mask: type[Mask] | None = None if self.mask is None else part_class(self.mask, "mask", ("mask",))  # type: ignore[assignment]
        causal = self.causal if mask is None or mask.causal is None else mask.causal
        return Sizes(d_model, self.n_heads, n_kv, maps, d_head, self.d_value or d_head * maps, scale, causal)


def several(value: Any) -> tuple[Any, ...]:
    """One or several, as a tuple."""
    return value if isinstance(value, tuple) else (value,)
