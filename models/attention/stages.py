"""The stages of an attention site, as the protocols that parts fill.

A part is one file in this package: a frozen configuration with a unique `kind`, and a module under `@register_part(TheConfig)` that
extends the class of its stage. It is found by being there, and named in an `AttentionConfig`:

    stage       class         field        what a part does
    project     Projection    project      makes the linear maps of queries, keys and values
    rotate      Rotation      position     changes queries and keys by position
                              qk_norm      normalises queries and keys
    score       Score         score        how well query i and key j match (default: scale · q·k)
    bias        ScoreTerm     position     a named term that is added to the scores
    mask        Mask          mask         what a query may read, besides causality, window and padding
    normalise   Normaliser    normalise    scores -> weights (default: softmax)
    reweight    Reweight      reweight     weights -> weights, in the order listed
    mix         Addition      mix          what is added to pattern @ values
    post        Post          post         what happens to z before the output projection, in the order listed

A part owns the hook points of what only it computes; the site owns the common ones. Nothing here knows a particular part.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from models.context import Context
from workbench.discovery import import_all
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta


@dataclass(frozen=True)
class Sizes:
    """The sizes of a site. `n_maps` score maps become `n_heads` patterns (more maps than heads only where a reweighting joins them).
    `causal`: no token reads the future, neither by the configuration nor by its mask."""

    d_model: int
    n_heads: int
    n_kv: int
    maps_per_head: int
    d_head: int
    d_value: int
    scale: float
    causal: bool

    @property
    def n_maps(self) -> int:
        """Heads of queries and scores."""
        return self.n_heads * self.maps_per_head

    @property
    def n_key_maps(self) -> int:
        """Heads of keys."""
        return self.n_kv * self.maps_per_head

    @property
    def one_map_each(self) -> bool:
        """Whether every head has one query, key and value of its own."""
        return self.maps_per_head == 1 and self.n_kv == self.n_heads

    @property
    def map_axis(self) -> str:
        """Name of the axis of queries and scores."""
        return "head" if self.maps_per_head == 1 else "map"

    @property
    def key_axis(self) -> str:
        """Name of the axis of keys."""
        return self.map_axis if self.n_kv == self.n_heads else f"kv_{self.map_axis}"


class Call:
    """One call of a site, as its parts see it.

    `q` [batch, map, query, d_head] and `k` [batch, map, key, d_head] after rotation, `v` [batch, head, key, d_value], groups expanded;
    `stream` [batch, query, d_model] is what the site reads. From the score stage on, `content` [batch, map, query, key] are the scores
    before any term is added; `mask` (0 or −inf) is what will be added to them.
    """

    __slots__ = ("carried", "content", "context", "handed_on", "k", "mask", "q", "sizes", "stream", "v")

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    content: Tensor

    def __init__(
        self,
        stream: Tensor,
        context: Context,
        carried: dict[str, Tensor] | None,
        handed_on: dict[str, Tensor],
        sizes: Sizes,
    ) -> None:
        self.stream, self.context, self.carried, self.handed_on, self.sizes = stream, context, carried, handed_on, sizes

    def carry(self, name: str, new: Tensor) -> Tensor:
        """Append this call's `new` [batch, pos, ...] to what earlier calls handed on in the slot `name`; gives all of it."""
        if self.carried is not None:
            new = torch.cat([self.carried[name], new], dim=1)
        if self.context.keep_state:
            self.handed_on[name] = new
        return new


class Part(nn.Module):
    """Base of all parts. `slots` names what it carries from call to call with `Call.carry`."""

    stage: ClassVar[str]
    slots: tuple[str, ...] = ()
    reads_tokens = False  # True: it needs `context.token_ids`

    def __init__(self, config: Any, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes

    @property
    def signals(self) -> dict[str, tuple[HookPoint, str, str | None]]:
        """What runs keep per head and token, {name: (hook point [batch, pos, head, ...], label, unit)}; the last axis is averaged."""
        return {}

    def placed(self, layer: int, earlier: list["Part"]) -> None:
        """Told once, when a model is built: the layer, and the parts of the same kind in earlier layers (to share weights with)."""


class Projection(Part):
    """Makes the maps of queries, keys and values; each must have a `weight` [out, in] and a `bias` ([out] or None), like `nn.Linear`.

    A map that is more than these also has `per_head(x, heads)`, [batch, pos, head, d_model] -> [batch, pos, head, width], for heads with
    inputs of their own.
    """

    stage = "project"
    projects: tuple[str, ...] = ("query", "key", "value")  # the site does not build (nor score with) what is not listed

    def linear(self, name: str, width: int, bias: bool) -> nn.Module:
        """The map called `name` (one of `projects`), from d_model to `width`."""
        return nn.Linear(self.sizes.d_model, width, bias=bias)


class Rotation(Part):
    """Changes queries and keys before they meet."""

    stage = "rotate"

    def prepare(self, positions: Tensor, context: Context, dtype: torch.dtype) -> Any:
        """Whatever `forward` needs that does not depend on the tensor, e.g. cosines and sines. positions [batch or 1, pos]."""

    def forward(self, x: Tensor, prepared: Any, name: str) -> Tensor:
        """x [batch, pos, head, d_head], `name` is `"query"` or `"key"`; same shape."""
        raise TypeError(f"{type(self).__name__} does not say how it rotates")


class Score(Part):
    """How well queries and keys match."""

    stage = "score"

    def forward(self, call: Call) -> Tensor:
        """[batch, map, query, key], scale included; the mask comes later."""
        raise TypeError(f"{type(self).__name__} does not say how it scores")


class ScoreTerm(Part):
    """A named term of the scores, readable and editable at `hook_bias`."""

    stage = "bias"
    needs_content = False  # True: it reads `call.content` or `call.mask`, so that the fused kernel cannot be used
    role = "position_bias"

    def __init__(self, config: Any, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.hook_bias = HookPoint(self.role, f"batch {sizes.map_axis} query key")

    def term(self, call: Call) -> Tensor:
        """[batch or 1, map or 1, query or 1, key]."""
        raise TypeError(f"{type(self).__name__} does not say what it adds")

    def forward(self, call: Call) -> Tensor:
        """`term`, past its hook point."""
        bias = self.term(call)
        if not self.hook_bias.active:
            return bias
        return self.hook_bias(bias.expand(call.q.shape[0], self.sizes.n_maps, call.q.shape[2], -1))


class Mask(Part):
    """What queries may read, besides what causality, window and padding forbid. Every token may always read itself."""

    stage = "mask"
    depends_on_call = (
        False  # False: `visible` uses only `call.context`, so that layers of one configuration share the mask
    )
    causal: bool | None = None  # False: replaces causality; None: leaves it to the site
    continues = False  # whether a text can be read on from a carried state although tokens read the future

    def visible(self, call: Call) -> Tensor:
        """True where allowed, [batch or 1, map or 1, query, key]."""
        raise TypeError(f"{type(self).__name__} does not say what is visible")


class Normaliser(Part):
    """Scores to weights."""

    stage = "normalise"

    def meta(self, meta: PatternMeta) -> PatternMeta:
        """What its weights are, given what they would be with a softmax."""
        return meta

    def forward(self, scores: Tensor, call: Call) -> Tensor:
        """Masked scores [batch, map, query, key] (−inf where hidden) to weights of the same shape."""
        raise TypeError(f"{type(self).__name__} does not say how it normalises")


class Reweight(Part):
    """Weights to weights. The last one must give one map per head."""

    stage = "reweight"
    maps_per_head = 1  # how many maps it joins into one head
    adjacent = True  # whether these follow each other; otherwise the first map of all heads precedes the second

    def meta(self, meta: PatternMeta) -> PatternMeta:
        """What its weights are, given what it gets."""
        return meta

    def forward(self, pattern: Tensor, call: Call) -> Tensor:
        """[batch, map, query, key] -> [batch, head, query, key]."""
        raise TypeError(f"{type(self).__name__} does not say how it weighs")


class Addition(Part):
    """Something added to z = pattern @ values."""

    stage = "mix"

    def forward(self, pattern: Tensor, call: Call) -> Tensor:
        """Pattern [batch, head, query, key] -> [batch, query, head, d_value]."""
        raise TypeError(f"{type(self).__name__} does not say what it adds")


class Post(Part):
    """What happens to z before the output projection."""

    stage = "post"

    def forward(self, z: Tensor, stream: Tensor) -> Tensor:
        """z [batch, pos, head, d_value], stream [batch, pos, d_model] -> like z."""
        raise TypeError(f"{type(self).__name__} does not say what it does")


# ------------------------------------------------------------------------------------------------------------ registry

_PARTS: dict[type, type[Part]] = {}
P = TypeVar("P", bound=Part)


def register_part(config: type) -> Callable[[type[P]], type[P]]:
    """Class decorator: the part that is built from configurations of this class.

    Raises:
        ValueError: another part has the same `kind` (saved configurations could not be told apart).
    """
    for known in _PARTS:
        if known.kind == config.kind:  # type: ignore[attr-defined]
            raise ValueError(
                f"{config.__name__} and {known.__name__} both have the kind {config.kind!r}. Expected a unique one."  # type: ignore[attr-defined]
            )

    def register(part: type[P]) -> type[P]:
        _PARTS[config] = part
        return part

    return register


_NESTED: list[type] = []


def register_nested(config: type) -> None:
    """Let saved configurations hold this one inside a part's, known by its `kind`."""
    _NESTED.append(config)


def part_configs() -> dict[str, type]:
    """Configuration classes of all parts, and of what is nested in them, by their `kind`."""
    import_all("models.attention")
    return {config.kind: config for config in (*_PARTS, *_NESTED)}  # type: ignore[attr-defined]


def part_class(config: Any, field_name: str, stages: tuple[str, ...]) -> type[Part]:
    """The part of a configuration; it must be of one of the `stages` that the field of `AttentionConfig` takes.

    Raises:
        TypeError: no configuration of a part. ValueError: a part of another stage, with the field where it belongs.
    """
    import_all("models.attention")
    fitting = [c.__name__ for c, part in _PARTS.items() if part.stage in stages]
    if type(config) not in _PARTS:
        raise TypeError(
            f"{field_name}={config!r} is no part.{suggestion(type(config).__name__, fitting)} Expected one of {', '.join(fitting)}."
        )
    part = _PARTS[type(config)]
    if part.stage not in stages:
        home = {"rotate": "position", "bias": "position"}.get(part.stage, part.stage)
        raise ValueError(
            f"{type(config).__name__} is a part of the stage {part.stage!r}, not of {field_name!r}. Expected {home}=... for it, "
            f"and for {field_name} one of {', '.join(fitting)}."
        )
    return part


def build_parts(configs: Iterable[Any], field_name: str, stages: tuple[str, ...], sizes: Sizes) -> nn.ModuleDict:
    """The parts of one field by name: their kind, numbered from the second of a kind on."""
    parts = nn.ModuleDict()
    for config in configs:
        made = part_class(config, field_name, stages)(config, sizes)
        name, number = config.kind, 2
        while name in parts:
            name, number = f"{config.kind}_{number}", number + 1
        parts[name] = made
    return parts
