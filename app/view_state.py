"""The view: everything that decides what the dashboard shows, as one frozen value that round-trips through the URL.

`ViewState.from_url` never fails: an unknown key is ignored, a value that is not of its kind falls back to its default.
`ViewState.clamped` then fits the view to a run, so that a permalink made for a longer run still opens. The query string
is canonical: one view has one string (version first, then keys in alphabetical order, defaults left out).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode

VERSION = 1
RUN_ID = re.compile(r"[a-z0-9-]{1,64}")
POOLINGS = {"max": "largest magnitude, sign kept", "mean": "mean", "sum": "sum"}
SCALES = {"linear": "linear", "sqrt": "square root", "log": "logarithmic", "row": "share of the row's largest"}
SORTS = {"index": "neuron number", "total": "total activity", "first": "first time active", "peak": "largest activity"}
LENSES = {"logit": "logit lens", "tuned": "tuned lens"}
LENS_COLOURS = {
    "top": "probability of the best", "target": "probability of the target", "rank": "rank of the target", "entropy": "entropy",
    "divergence": "KL(final ‖ lens)",
}  # fmt: skip
MATCHES = {"index": "the same number", "pattern": "most alike"}
HEAD_SCORES = {
    "distance": "mean distance", "entropy": "entropy of a row", "first": "weight on the first token", "previous": "weight on the previous",
    "itself": "weight on itself",
}  # fmt: skip
PARTS = {"encoder": "what the encoder of an encoder-decoder reads, the source"}
MAX_TRACKED = 8
MAX_SYNAPSES = 6
_LARGEST = 10**7
LONGEST_LINES = 6_000
"""Characters of a text in the address; what is longer is not kept there."""

_SPANS = ("rows", "columns", "state_rows", "state_columns", "shared_rows", "shared_columns")

Span = tuple[int, int]
Entry = tuple[int, int]
SynapseAddress = tuple[int, int, int, int, int, int]
"""(source layer, source head, source neuron, target layer, target head, target neuron) of a BDH synapse."""


@dataclass(frozen=True)
class ViewState:
    """One view. Positions count from 0; spans are half open; `None` means "not chosen".

    `score_map` names which scores the pattern map shows, "" its weights.
    `part` is "" for the run's own text and layers, or a key of `PARTS`: tokens, layers and heads are then those of that part.
    `rows` and `columns` are the tokens that the pattern map shows; `state_rows` and `state_columns` are the part of the
    state that its picture shows; `slot` names which of the things that the layer carries it is, "" the first.
    `run_b` is the run that the open one is compared with, `head_b` how its head is found (a key of `MATCHES`, or "layer.head"),
    `shared_rows` and `shared_columns` the part of the text of both that is shown. `depth` counts layers that the residual stream
    has passed, `lens` reads it there.
    `score` and `against` are scores of a measurement of heads ("probe.score"), `measured_head` is a row and a head of its tables
    ("row.head"); `feature` is a feature of a dictionary.
    `basket` are operations and `prompts` texts that they run on, one a line.
    """

    page: str = field(default="overview", metadata={"key": None})
    run: str = field(default="", metadata={"key": "run"})
    part: str = field(default="", metadata={"key": "part"})
    layer: int = field(default=0, metadata={"key": "layer"})
    slot: str = field(default="", metadata={"key": "slot"})
    head: int = field(default=0, metadata={"key": "head"})
    query: int | None = field(default=None, metadata={"key": "q"})
    key: int | None = field(default=None, metadata={"key": "k"})
    score_map: str = field(default="", metadata={"key": "map"})
    rows: Span | None = field(default=None, metadata={"key": "rows"})
    columns: Span | None = field(default=None, metadata={"key": "cols"})
    state_rows: Span | None = field(default=None, metadata={"key": "srows"})
    state_columns: Span | None = field(default=None, metadata={"key": "scols"})
    pooling: str = field(default="max", metadata={"key": "pool"})
    scale: str = field(default="sqrt", metadata={"key": "scale"})
    position: int | None = field(default=None, metadata={"key": "t"})
    compare: int | None = field(default=None, metadata={"key": "t2"})
    sort: str = field(default="total", metadata={"key": "sort"})
    tracked: tuple[Entry, ...] = field(default=(), metadata={"key": "track"})
    synapses: tuple[SynapseAddress, ...] = field(default=(), metadata={"key": "syn"})
    study: str = field(default="", metadata={"key": "study"})
    result: str = field(default="", metadata={"key": "result"})
    score: str = field(default="", metadata={"key": "score"})
    against: str = field(default="", metadata={"key": "vs"})
    measured_head: str = field(default="", metadata={"key": "mh"})
    feature: int | None = field(default=None, metadata={"key": "feature"})
    basket: str = field(default="", metadata={"key": "do"})
    prompts: str = field(default="", metadata={"key": "on"})
    depth: int | None = field(default=None, metadata={"key": "depth"})
    lens: str = field(default="tuned", metadata={"key": "lens"})
    lens_colour: str = field(default="top", metadata={"key": "lc"})
    run_b: str = field(default="", metadata={"key": "b"})
    head_b: str = field(default="index", metadata={"key": "hb"})
    head_score: str = field(default="distance", metadata={"key": "hs"})
    shared_rows: Span | None = field(default=None, metadata={"key": "urows"})
    shared_columns: Span | None = field(default=None, metadata={"key": "ucols"})

    @classmethod
    def from_url(cls, path: str | None, query: str | None) -> ViewState:
        """The view that a path such as `/attention` and a query string such as `?v=1&layer=2` describe.

        A query of another version is read as empty, since its keys may mean something else.
        """
        page = (path or "/").strip("/") or "overview"
        given = dict(parse_qsl((query or "").lstrip("?"), keep_blank_values=False, max_num_fields=64))
        if given.get("v", str(VERSION)) != str(VERSION):
            given = {}
        found: dict[str, Any] = {"page": page if re.fullmatch(r"[a-z][a-z0-9-]{0,31}", page) else "overview"}
        for each in fields(cls):
            text = given.get(each.metadata["key"] or "")
            if text is not None:
                value = _READERS[each.name](text)
                if value is not None:
                    found[each.name] = value
        return cls(**found)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ViewState:
        """The view that `as_dict` described, after a trip through JSON; unknown names are ignored."""
        known = {each.name for each in fields(cls)}
        kept = {name: value for name, value in values.items() if name in known}
        for name in _SPANS:
            kept[name] = tuple(kept[name]) if kept.get(name) else None
        kept["tracked"] = tuple((int(row), int(column)) for row, column in kept.get("tracked") or ())
        kept["synapses"] = tuple(_synapse(each) for each in kept.get("synapses") or ())
        return cls(**kept)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready values, by field name."""
        return asdict(self)

    def to_query(self) -> str:
        """The canonical query string, without the question mark: `v=1&layer=2&run=…`."""
        pairs = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if each.metadata["key"] and value != each.default:
                pairs[each.metadata["key"]] = _written(value)
        ordered = [("v", str(VERSION)), *sorted(pairs.items())]
        return urlencode(ordered, quote_via=quote, safe=".,-~")

    def to_url(self) -> str:
        """Path and query: the permalink of this view."""
        path = "/" if self.page == "overview" else f"/{self.page}"
        return f"{path}?{self.to_query()}"

    def change(self, **values: Any) -> ViewState:
        """A copy with some fields replaced."""
        return replace(self, **values)

    def own_text(self) -> ViewState:
        """The view of the run's own text: what names layers and tokens of another part is left out."""
        if not self.part:
            return self
        named = {"part", "layer", "head", "query", "key", "rows", "columns", "position", "compare", "score_map"}
        return self.change(**{each.name: each.default for each in fields(self) if each.name in named})

    def clamped(
        self,
        n_tokens: int,
        heads_per_layer: Sequence[int],
        slots_per_layer: Sequence[Sequence[str]] = (),
        columns_per_layer: Sequence[int] = (),
        score_maps: Sequence[str] = (),
    ) -> ViewState:
        """The nearest view that exists in a run with these sizes, whose layers carry states of these names, and some have these score maps.

        columns_per_layer: tokens that the layers' patterns have as columns, where these are not the run's.
        """
        layer = min(self.layer, max(len(heads_per_layer) - 1, 0))
        heads = heads_per_layer[layer] if heads_per_layer else 1
        slots = slots_per_layer[layer] if layer < len(slots_per_layer) else ()
        columns = columns_per_layer[layer] if layer < len(columns_per_layer) else n_tokens
        return replace(
            self,
            layer=layer,
            head=min(self.head, max(heads - 1, 0)),
            slot=self.slot if self.slot in slots[1:] else "",
            score_map=self.score_map if self.score_map in score_maps else "",
            query=_clamp_position(self.query, n_tokens),
            key=_clamp_position(self.key, columns),
            rows=clamp_span(self.rows, n_tokens),
            columns=clamp_span(self.columns, columns),
            position=_clamp_position(self.position, n_tokens),
            compare=_clamp_position(self.compare, n_tokens),
        )

    def query_position(self, n_tokens: int) -> int:
        """The pinned query token, or the last token when none is pinned."""
        return n_tokens - 1 if self.query is None else self.query

    def state_position(self, n_tokens: int) -> int:
        """The token whose state is shown: the chosen one, else the pinned query token, else the last."""
        return self.query_position(n_tokens) if self.position is None else self.position


def _clamp_position(position: int | None, n_tokens: int) -> int | None:
    return None if position is None or n_tokens < 1 else min(position, n_tokens - 1)


def clamp_span(span: Span | None, size: int) -> Span | None:
    """The part of the span that lies in `range(size)`; None (everything) when that is empty or is all of it."""
    if span is None:
        return None
    start, stop = max(0, span[0]), min(span[1], size)
    if stop - start < 1 or (start, stop) == (0, size):
        return None
    return start, stop


def _read_count(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,8}", text) and int(text) <= _LARGEST else None


def _read_span(text: str) -> Span | None:
    ends = [_read_count(part) for part in text.split("-")]
    if len(ends) != 2 or ends[0] is None or ends[1] is None or ends[1] <= ends[0]:
        return None
    return ends[0], ends[1]


def _read_entries(text: str) -> tuple[Entry, ...] | None:
    found: list[Entry] = []
    for part in text.split(",")[: 4 * MAX_TRACKED]:
        pair = [_read_count(number) for number in part.split(".")]
        if len(pair) == 2 and pair[0] is not None and pair[1] is not None and (pair[0], pair[1]) not in found:
            found.append((pair[0], pair[1]))
    return tuple(found[:MAX_TRACKED]) or None


def _synapse(numbers: Sequence[int]) -> SynapseAddress:
    one, two, three, four, five, six = map(int, numbers)
    return one, two, three, four, five, six


def _read_synapses(text: str) -> tuple[SynapseAddress, ...] | None:
    """`1.0.210-2.2.190,…`: layer, head, neuron of the source, then of the target, which lies in a higher layer."""
    found: list[SynapseAddress] = []
    for part in text.split(",")[: 4 * MAX_SYNAPSES]:
        ends = [[_read_count(number) for number in end.split(".")] for end in part.split("-")]
        numbers = [number for end in ends for number in end if number is not None]
        if [len(end) for end in ends] == [3, 3] and len(numbers) == 6 and numbers[0] < numbers[3]:
            address = _synapse(numbers)
            if address not in found:
                found.append(address)
    return tuple(found[:MAX_SYNAPSES]) or None


def _read_choice(choices: dict[str, str]) -> Callable[[str], str | None]:
    return lambda text: text if text in choices else None


def _read_lines(text: str) -> str | None:
    kept = "".join(c for c in text if c.isprintable() or c == "\n").strip("\n")
    return kept if kept.strip() and len(kept) <= LONGEST_LINES else None


def _read_run(text: str) -> str | None:
    return text if RUN_ID.fullmatch(text) else None


def _read_slot(text: str) -> str | None:
    return text if re.fullmatch(r"[A-Za-z][A-Za-z0-9_]{0,31}", text) else None


def _read_score_map(text: str) -> str | None:
    return text if re.fullmatch(r"[a-z][a-z0-9_.~]{0,63}", text) else None


def _read_head_score(text: str) -> str | None:
    return text if text in HEAD_SCORES else _read_score(text)


def _read_head(text: str) -> str | None:
    return text if text in MATCHES or re.fullmatch(r"[0-9]{1,4}\.[0-9]{1,4}", text) else None


def _read_score(text: str) -> str | None:
    return text if re.fullmatch(r"[a-z][a-z0-9_]{0,31}\.[a-z][a-z0-9_]{0,31}", text) else None


def _read_measured_head(text: str) -> str | None:
    return text if re.fullmatch(r"[0-9]{1,4}\.[0-9]{1,4}", text) else None


def _read_study(text: str) -> str | None:
    return text if re.fullmatch(r"[a-z][a-z0-9_]{0,63}", text) else None


_READERS: dict[str, Callable[[str], Any]] = {
    "run": _read_run, "part": _read_choice(PARTS),
    "layer": _read_count, "slot": _read_slot, "head": _read_count, "query": _read_count, "key": _read_count,
    "score_map": _read_score_map, "rows": _read_span, "columns": _read_span, "state_rows": _read_span, "state_columns": _read_span,
    "pooling": _read_choice(POOLINGS), "scale": _read_choice(SCALES),
    "position": _read_count, "compare": _read_count, "sort": _read_choice(SORTS), "tracked": _read_entries,
    "synapses": _read_synapses,
    "study": _read_study, "result": _read_run,
    "score": _read_score, "against": _read_score, "measured_head": _read_measured_head, "feature": _read_count,
    "basket": _read_lines, "prompts": _read_lines,
    "depth": _read_count, "lens": _read_choice(LENSES), "lens_colour": _read_choice(LENS_COLOURS),
    "run_b": _read_run, "head_b": _read_head, "head_score": _read_head_score,
    "shared_rows": _read_span, "shared_columns": _read_span,
}  # fmt: skip


def _written(value: Any) -> str:
    if isinstance(value, tuple) and value and isinstance(value[0], tuple) and len(value[0]) == 6:
        return ",".join("{}.{}.{}-{}.{}.{}".format(*each) for each in value)
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return ",".join(f"{row}.{column}" for row, column in value)
    if isinstance(value, tuple):
        return "-".join(map(str, value))
    return str(value)
