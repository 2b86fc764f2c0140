"""Published ways to change what a trained model reads, as interventions on any attention model.

    CalibrateSinks(layer=3, heads=[1])                    ACT (Yu et al. 2024): weight is taken from sinks after the first token
    KeepTopScores(k=8, layer=[2, 3])                      selective hard attention (AxFormer, Nagarajan et al. 2020)
    ReadOnly(allowed=streaming(n, sinks=4, window=64))    StreamingLLM (Xiao et al. 2023): the first tokens and the last ones
    ReadOnly(allowed=star(n, block=32, query_from=96))    Star Attention (Acharya et al. 2024): context blocks read themselves and the first
    ReadOnly(allowed=parallel_contexts(n, spans))         parallel context encoding: contexts do not read each other; with shared sinks

The last three are masks [query, key] over a whole text; positions stay those of the text unless the call says otherwise
(`facts={"positions": parallel_positions(n, spans)}`); StreamingLLM with positions within its cache is `probes.positions.stream`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from workbench.instrument.errors import HookError
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.intervention import Intervention, as_tensor
from workbench.instrument.interventions import EditPattern
from workbench.instrument.selection import Select
from workbench.lab.catalogue import implements

Spans = Sequence[tuple[int, int]]


@implements(
    "attention-sinks-act", "intervention", "CalibrateSinks", note="the rule; heads come from a search of the user's"
)
@dataclass
class CalibrateSinks(EditPattern):
    """Columns j ≥ 1 with mean_{i ≥ j} P_ij > `threshold` are multiplied by `beta`; what this frees goes to the row's other columns in
    proportion to their weights, the first token's included. Row 0 stays. Rows keep their sums.

    The mean is over the rows of this call: give the whole text at once.
    """

    beta: float = field(default=0.4, kw_only=True)
    threshold: float = field(default=0.1, kw_only=True)

    def check(self, point: HookPoint) -> None:
        """Refuse patterns that are no distributions."""
        super().check(point)
        if point.meta is not None and not point.meta.is_distribution:
            raise HookError(
                f"CalibrateSinks moves attention mass; {point.name!r} is no distribution ({point.meta.in_words()})."
            )

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The calibrated pattern."""
        sink = sinks_of(x, point.offset, self.threshold)
        lowered = torch.where(sink, x * self.beta, x)
        others = (x * ~sink).sum(-1, keepdim=True)
        freed = (x - lowered).sum(-1, keepdim=True)
        raised = torch.where(sink | (others <= 0), lowered, x * (1 + freed / others.clamp(min=1e-30)))
        new = torch.where(others > 0, raised, x)  # a row that reads sinks alone stays
        if point.offset == 0:
            new = torch.cat([x[..., :1, :], new[..., 1:, :]], dim=-2)
        return self.where_chosen(x, point, new)


def sinks_of(pattern: Tensor, offset: int = 0, threshold: float = 0.1) -> Tensor:
    """True at the sinks after the first token, [batch, head, 1, key]. pattern [batch, head, query, key]; `offset`: of its first row."""
    queries = torch.arange(offset, offset + pattern.shape[-2], device=pattern.device)
    keys = torch.arange(pattern.shape[-1], device=pattern.device)
    readers = (queries[:, None] >= keys).sum(0)
    received = pattern.sum(-2, keepdim=True) / readers.clamp(min=1)
    return (received > threshold) & (keys > 0)


@implements(
    "axformer", "intervention", "KeepTopScores", note="selective hard attention; the pruning search is not here"
)
@dataclass
class KeepTopScores(Intervention):
    """Every row of scores keeps its `k` largest; the others become −inf (ties with the k-th stay). Rows of a softmax still sum to 1."""

    point: str | Select = ""
    layer: int | Sequence[int] | None = field(default=None, kw_only=True)
    k: int = field(default=8, kw_only=True)

    def __post_init__(self) -> None:
        if self.k < 1:
            raise HookError(f"KeepTopScores: k is {self.k}; expected at least 1.")
        self.point = self.point or Select(role="scores", layer=self.layer)
        super().__post_init__()

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """The scores that are left."""
        least = x.topk(min(self.k, x.shape[-1]), dim=-1).values[..., -1:]
        return self.where_chosen(x, point, x.masked_fill(x < least, float("-inf")))


@implements("star-attention", "intervention", "ReadOnly(star(...))", note="the mask; not the distributed execution")
@dataclass
class ReadOnly(Intervention):
    """A mask on top of the model's own: queries read only where `allowed` [query, key], counted in the whole text, and themselves."""

    point: str | Select = ""
    layer: int | Sequence[int] | None = field(default=None, kw_only=True)
    allowed: Tensor | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.point = self.point or Select(role="mask", layer=self.layer)
        super().__post_init__()
        if self.allowed is None:
            raise HookError("ReadOnly has no mask. Expected allowed=..., True where a query may read, [query, key].")
        self.allowed = as_tensor(self.allowed, "ReadOnly: allowed").bool()
        if self.allowed.dim() != 2 or self.allowed.shape[0] != self.allowed.shape[1]:
            raise HookError(
                f"ReadOnly: allowed has shape {tuple(self.allowed.shape)}; expected [query, key] of one text."
            )

    def apply(self, x: Tensor, point: HookPoint) -> Tensor:
        """−inf where reading is not allowed."""
        assert self.allowed is not None
        length, start, stop = self.allowed.shape[0], point.offset, point.offset + x.shape[-2]
        if stop > length or x.shape[-1] != stop:
            raise HookError(
                f"ReadOnly on {point.name!r}: allowed is for {length} tokens, this call reads {stop} from {x.shape[-1]} keys. Expected a "
                "mask for the longest text, and a model that keeps all keys."
            )
        itself = torch.eye(length, dtype=torch.bool)
        visible = (self.allowed | itself)[start:stop, :stop].to(x.device)
        return self.where_chosen(x, point, x.masked_fill(~visible, float("-inf")))


def _grid(length: int) -> tuple[Tensor, Tensor]:
    at = torch.arange(length)
    return at[:, None], at[None, :]


def streaming(length: int, sinks: int, window: int) -> Tensor:
    """The first `sinks` tokens and the last `window`, the query's own included. [query, key]."""
    if window < 1 or sinks < 0:
        raise ValueError(f"sinks is {sinks}, window {window}; expected at least 0 and at least 1.")
    query, key = _grid(length)
    return (key <= query) & ((key < sinks) | (query - key < window))


def star(length: int, block: int, query_from: int) -> Tensor:
    """Tokens before `query_from` read their own block and the first one (the anchor); those from there on read everything. [query, key]."""
    if block < 1 or not 0 <= query_from <= length:
        raise ValueError(
            f"block is {block}, query_from {query_from}; expected at least 1, and a position of the {length} tokens."
        )
    query, key = _grid(length)
    local = (query // block == key // block) | (key < block)
    return (key <= query) & (local | (query >= query_from))


def parallel_contexts(length: int, spans: Spans, dropped: Sequence[int] = ()) -> Tensor:
    """Contexts at `spans` [start, stop) do not read each other; all read what belongs to no span before them (a shared prefix, the sinks),
    and tokens outside the spans read everything but the `dropped` contexts (the selective fix: keep those that matter). [query, key]."""
    context = _owner(length, spans)
    for number in dropped:
        if not 0 <= number < len(spans):
            raise ValueError(f"dropped names the context {number}; there are {len(spans)}.")
    query, key = _grid(length)
    own, other = context[:, None], context[None, :]
    kept = ~torch.isin(context, torch.tensor(list(dropped), dtype=context.dtype))[None, :]
    return (key <= query) & ((other == -1) | (own == other) | ((own == -1) & kept))


@implements(
    "attention-entropy",
    "intervention",
    "ReadOnly(parallel_contexts(...))",
    note="mask, shared prefix, dropped contexts",
)
def parallel_positions(length: int, spans: Spans) -> Tensor:
    """Positions [1, pos] in which every context begins where the first one does, and what follows goes on behind the longest."""
    context = _owner(length, spans)
    positions, first = torch.arange(length), spans[0][0]
    longest = max(stop - start for start, stop in spans)
    for start, stop in spans:
        positions[start:stop] = first + torch.arange(stop - start)
    end = max(stop for _, stop in spans)
    positions[end:] = first + longest + torch.arange(length - end)
    if bool((context[first:end] == -1).any()):
        raise ValueError("There are tokens between the contexts. Expected spans that follow each other.")
    return positions[None]


def _owner(length: int, spans: Spans) -> Tensor:
    """The number of the span of every token, −1 outside. [pos]."""
    owner = torch.full((length,), -1)
    for number, (start, stop) in enumerate(spans):
        if not 0 <= start < stop <= length or bool((owner[start:stop] >= 0).any()):
            raise ValueError(
                f"The context {number} at {start}:{stop} is empty, outside the {length} tokens, or overlaps another."
            )
        owner[start:stop] = number
    return owner
