"""What a forward pass knows besides its activations: positions, padding, what is carried between calls, and further facts by name."""

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class Context:
    """Per-call facts that blocks need.

    Args:
        positions: position of each token in its own sequence, padding not counted, [batch or 1, pos]. Whole numbers, unless the caller
            gave positions of its own (`facts["positions"]`), which may be fractions or times.
        key_positions: the same for all tokens read so far and now, [batch or 1, key].
        mask: True at real tokens of this call, [batch, pos]; None without padding.
        key_mask: the same over all tokens so far, [batch, key]; None without padding.
        offset: tokens read in earlier calls.
        keep_state: whether the caller wants the state handed on.
        token_ids: the tokens of this call, [batch, pos]; None when a run starts from a residual stream.
        facts: what the caller says besides the tokens, by name: `"positions"`, `"prefix_length"`, ... Parts ask with `fact`.
        cross: the keys are those of another sequence (a source), all of them visible but for its padding.
        beside: what blocks hand to the next block of the same call beside the residual stream, by name.
    """

    positions: Tensor
    key_positions: Tensor
    mask: Tensor | None
    key_mask: Tensor | None
    offset: int
    keep_state: bool
    token_ids: Tensor | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    cross: bool = False
    asked: set[str] = field(default_factory=set, repr=False)
    memo: dict[Hashable, Tensor] = field(default_factory=dict, repr=False)
    beside: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def fact(self, name: str) -> Any:
        """What the caller said under this name, or None. Facts that nobody asks for are an error of the call."""
        self.asked.add(name)
        return self.facts.get(name)

    @property
    def read_before(self) -> int | Tensor:
        """Real tokens read in earlier calls: a number, or [batch] where sequences were padded differently."""
        return self.offset if self.key_mask is None else self.key_mask[:, : self.offset].sum(1)

    def once(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        """A tensor that is the same for all layers that use this key: made by the first of them."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def distances(self) -> Tensor:
        """How far back each key lies from each query (negative: ahead), [batch or 1, 1, query, key]."""
        return self.once("distances", lambda: self.positions[:, None, :, None] - self.key_positions[:, None, None, :])

    def itself(self, length: int, device: torch.device) -> Tensor:
        """True where a key is the query's own token, [1, 1, query, key]."""
        queries = torch.arange(self.offset, self.offset + length, device=device)
        return (queries[:, None] == torch.arange(self.key_positions.shape[-1], device=device))[None, None]

    def knowing(self, last: int) -> "Context":
        """The same for a layer that knows only the `last` tokens of earlier calls. Positions go on counting."""
        gone = self.offset - last
        mask = None if self.key_mask is None else self.key_mask[:, gone:]
        return replace(self, key_positions=self.key_positions[:, gone:], key_mask=mask, offset=last, memo={})

    def of_source(self, positions: Tensor, mask: Tensor | None = None) -> "Context":
        """The context of a cross-attention site: queries of this call, keys at the source's `positions` [batch or 1, key].

        mask: True at the source's real tokens, [batch, key].
        """
        return Context(
            self.positions, positions, self.mask, mask, self.offset, self.keep_state, None, self.facts, True, self.asked
        )


def allowed(
    context: Context, length: int, device: torch.device, window: int | None = None, causal: bool = True
) -> Tensor:
    """True where a query may read a key: the past and itself, real tokens only, within the window. [batch or 1, query, key].

    Not `causal`: the future too, and a window reaches as far ahead as back. A padding token may read itself, so that no row is empty
    (an empty softmax row is not a number).
    """
    keys = torch.arange(context.key_positions.shape[-1], device=device)
    if context.cross:
        visible = torch.ones(1, length, len(keys), dtype=torch.bool, device=device)
        return visible if context.key_mask is None else visible & context.key_mask[:, None, :]
    queries = torch.arange(context.offset, context.offset + length, device=device)
    visible = (
        (keys[None, :] <= queries[:, None])[None]
        if causal
        else torch.ones(1, length, len(keys), dtype=torch.bool, device=device)
    )
    if window is not None:
        distance = context.positions[:, :, None] - context.key_positions[:, None, :]
        visible = visible & ((distance if causal else distance.abs()) < window)
    if context.key_mask is not None:
        visible = (visible & context.key_mask[:, None, :]) | (keys[None, :] == queries[:, None])
    return visible


def to_add(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as something to add to scores: 0 where visible, −inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))
