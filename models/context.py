"""What a forward pass knows besides its activations: positions, padding, and what is carried between calls."""

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Context:
    """Per-call facts that blocks need.

    Args:
        positions: position of each token in its own sequence, padding not counted, [batch or 1, pos].
        key_positions: the same for all tokens read so far and now, [batch or 1, key].
        mask: True at real tokens of this call, [batch, pos]; None without padding.
        key_mask: the same over all tokens so far, [batch, key]; None without padding.
        offset: tokens read in earlier calls.
        keep_state: whether the caller wants the state handed on.
    """

    positions: Tensor
    key_positions: Tensor
    mask: Tensor | None
    key_mask: Tensor | None
    offset: int
    keep_state: bool
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def mask_to_add(self, q: Tensor, window: int | None = None) -> Tensor:
        """0 where `allowed` and −inf elsewhere, for queries [batch, head, query, d_head]: [batch or 1, 1, query, key].

        Made once per call for all layers of one window and dtype.
        """
        key = (window, q.dtype)
        if key not in self.masks:
            hidden = ~allowed(self, q.shape[2], q.device, window)[:, None]
            self.masks[key] = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(
                hidden, float("-inf")
            )
        return self.masks[key]


def allowed(context: Context, length: int, device: torch.device, window: int | None = None) -> Tensor:
    """True where a query may read a key: the past and itself, real tokens only, within the window. [batch or 1, query, key].

    A padding token may read itself, so that no row is empty (an empty softmax row is not a number).
    """
    queries = torch.arange(context.offset, context.offset + length, device=device)
    keys = torch.arange(context.offset + length, device=device)
    visible = (keys[None, :] <= queries[:, None])[None]
    if window is not None:
        near = context.positions[:, :, None] - context.key_positions[:, None, :] < window
        visible = visible & near
    if context.key_mask is not None:
        visible = (visible & context.key_mask[:, None, :]) | (keys[None, :] == queries[:, None])
    return visible
