"""Patterns: token-to-source maps with the metadata that says how they may be read.

A softmax head's pattern is a probability distribution over sources. The *effective* pattern of a mixer that is linear in its
values (retention, state-space, linear attention, BDH) reproduces the output exactly, `output = pattern @ values`, but is signed
and its rows sum to nothing in particular; entropy or "attention mass" of such a map would be a number without a meaning, so it
is refused in words.
"""

import base64
import io
from dataclasses import asdict, dataclass, replace
from html import escape
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from workbench.instrument.errors import RefusedByPattern, suggestion

# Kinds of pattern, with what is said of those that are no weights.
PATTERN_KINDS = {
    "weights": "",
    "jacobian": "Jacobian norms, not weights: how strongly the output moves with each source",
    "mean": "mean over channels that mix differently, not the weights of any one",
}


@dataclass(frozen=True)
class PatternMeta:
    """How a pattern may be read.

    Args:
        columns: what a column is: `"token"`, `"memory slot"`, `"landmark"`, ...
        signed: entries may be negative.
        rows_sum_to: `"1"` for distributions, `"free"` otherwise.
        exact: pattern @ values equals the mixer's output (before the output projection); False for Jacobian norms.
        effective: computed from a mixer that never forms it, rather than formed by the model itself.
        causal: `"inclusive"` (sees itself), `"strict"` (only the past) or `"none"`.
        kind: what an entry is: `"weights"` (what a source's value is multiplied by), `"jacobian"` (the norm of a derivative: how
            strongly the output moves with the source; never exact) or `"mean"` (weights averaged over channels that mix differently).
        label: what a reader must know besides, in a few words.
        before: kind of the columns before the tokens', e.g. `"memory slot"`; empty where all columns are of the kind `columns`.

    Raises:
        ValueError: an unknown kind, or a Jacobian or mean that claims to be exact.
    """

    columns: str = "token"
    signed: bool = False
    rows_sum_to: str = "1"
    exact: bool = True
    effective: bool = False
    causal: str = "inclusive"
    kind: str = "weights"
    label: str = ""
    before: str = ""

    def __post_init__(self) -> None:
        if self.kind not in PATTERN_KINDS:
            raise ValueError(f"Unknown kind of pattern {self.kind!r}.{suggestion(self.kind, PATTERN_KINDS)}")
        if self.kind != "weights" and self.exact:
            raise ValueError(f"A pattern of kind {self.kind!r} does not reproduce the output. Expected exact=False.")

    @property
    def is_distribution(self) -> bool:
        """Non-negative rows that sum to one."""
        return not self.signed and self.rows_sum_to == "1"

    def in_words(self) -> str:
        """E.g. `"effective, exact; signed; rows sum to anything; row = reading token, column = token"`."""
        kind = "effective" if self.effective else "formed by the model"
        sign = "signed" if self.signed else "non-negative"
        rows = "rows sum to 1" if self.rows_sum_to == "1" else "rows do not sum to 1"
        sees = {
            "inclusive": "a token sees itself and the past",
            "strict": "a token sees only the past",
            "none": "not causal",
        }
        words = PATTERN_KINDS[self.kind] or f"{kind}, {'exact' if self.exact else 'approximate'}"
        label = f"; {self.label}" if self.label else ""
        columns = f"{self.before}s, then {self.columns}s" if self.before else f"{self.columns}s"
        return f"{words}; {sign}; {rows}; {sees[self.causal]}; columns are {columns}{label}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for manifests."""
        return asdict(self)

    def require_tokens(self, measure: str) -> None:
        """Raise `RefusedByPattern` unless every column is a token."""
        if self.before or self.columns != "token":
            raise RefusedByPattern(
                f"{measure} needs columns that are tokens; those of this pattern are {self.before or self.columns}s"
                f"{f', then {self.columns}s' if self.before else ''}. Expected pattern.tokens_only(), or another measure."
            )

    def require_distribution(self, measure: str) -> None:
        """Raise `RefusedByPattern` unless rows are probability distributions."""
        if not self.is_distribution:
            reasons = (["it is signed"] if self.signed else []) + (
                ["its rows do not sum to 1"] if self.rows_sum_to != "1" else []
            )
            raise RefusedByPattern(
                f"{measure} needs rows that are probability distributions, and this pattern is not one: {' and '.join(reasons)}. "
                "Use a measure of absolute weights instead (pattern.received(), pattern.values.abs())."
            )


@dataclass(frozen=True)
class Pattern:
    """The pattern of one layer: `values` [batch, head, query, key] with its metadata."""

    values: Tensor
    meta: PatternMeta
    layer: int
    name: str
    tokens: tuple[str, ...] = ()

    def row_sums(self) -> Tensor:
        """[batch, head, query]."""
        return self.values.sum(-1)

    def entropy(self) -> Tensor:
        """Shannon entropy of each row in nats, [batch, head, query]. Refused unless rows are distributions."""
        self.meta.require_distribution("Entropy")
        return torch.special.entr(self.values).sum(-1)

    def received(self) -> Tensor:
        """Mean absolute weight that each source gets from the rows that can see it, [batch, head, key]."""
        queries, keys = self.values.shape[-2:]
        first = torch.arange(keys, device=self.values.device) - (keys - queries)  # first query row that sees key j
        if self.meta.causal == "strict":
            first = first + 1
        seen = (
            (queries - first.clamp(min=0)).clamp(min=1)
            if self.meta.causal != "none"
            else torch.full_like(first, queries)
        )
        return self.values.abs().sum(-2) / seen

    def tokens_only(self) -> "Pattern":
        """Without the columns before the tokens' (as many columns as rows remain); rows then need not sum to 1."""
        if not self.meta.before:
            self.meta.require_tokens("Leaving out other columns")
            return self
        meta = replace(self.meta, before="", rows_sum_to="free", exact=False, label=f"without {self.meta.before}s")
        return Pattern(self.values[..., -self.values.shape[-2] :], meta, self.layer, self.name, self.tokens)

    def apply_to(self, values: Tensor) -> Tensor:
        """Mix `values` [batch, head, key, width] by the pattern: [batch, head, query, width]."""
        return self.values @ values

    def __repr__(self) -> str:
        batch, head, query, key = self.values.shape
        return f"Pattern({self.name}: batch={batch}, head={head}, query={query}, key={key}; {self.meta.in_words()})"

    def _repr_html_(self) -> str:
        """One small picture per head of the first sequence: row = reading token, column = token read."""
        cells = "".join(
            f"<figure style='margin:4px;display:inline-block;text-align:center'><img style='image-rendering:pixelated;width:140px' "
            f"src='{picture(self.values[0, head], self.meta.signed)}' alt='head {head}'><figcaption>head {head}</figcaption></figure>"
            for head in range(min(self.values.shape[1], 16))
        )
        return f"<div><b>{escape(self.name)}</b><br><small>{escape(self.meta.in_words())}; scaled per head</small><br>{cells}</div>"


def _pooled(values: Tensor, limit: int) -> Tensor:
    """At most `limit` cells a side: each keeps the entry of largest magnitude that it covers, with its sign."""
    size = tuple(-(-side // limit) for side in values.shape)
    if max(size) == 1:
        return values
    _, where = F.max_pool2d(values.abs()[None], size, ceil_mode=True, return_indices=True)
    return values.flatten()[where[0]]


def picture(values: Tensor, signed: bool) -> str:
    """A data URL of a matrix as a small PNG: blue = positive, orange = negative (signed), or white to blue."""
    from PIL import Image

    v = _pooled(values.detach().float().cpu(), 256)
    v = (v / v.abs().max().clamp(min=1e-12)).clamp(-1, 1)
    white, blue, orange = (torch.tensor(c, dtype=torch.float32) for c in ([255, 255, 255], [0, 70, 150], [190, 85, 0]))
    amount = v.abs()[..., None].sqrt()
    target = torch.where(v[..., None] >= 0, blue, orange) if signed else blue
    rgb = (white * (1 - amount) + target * amount).to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
