"""transformers' attention interface: an attention function of ours, and who is asked when a model calls it.

A model of transformers looks up its attention function by name. `implement(model)` makes it look up ours, which computes what its eager
attention does. Calls inside `entered(subject)` go to the subject, which passes them by its hook points; all others are plainly eager.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

NAME = "workbench"
# .subject is asked in this thread, .calls is what it noted, .stop the layer before which its run ends
running = threading.local()


@contextmanager
def entered(subject: Any, stop: int | None = None) -> Iterator[list[int]]:
    """Calls of the attention function in this thread go to `subject`; gives the list that it notes them in."""
    outer = getattr(running, "subject", None), getattr(running, "calls", []), getattr(running, "stop", None)
    running.subject, running.calls, running.stop = subject, [], stop
    try:
        yield running.calls
    finally:
        running.subject, running.calls, running.stop = outer


def implement(theirs: Any, name: str) -> None:
    """Choose an attention implementation, ours registered first."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register(NAME, _interface)
    AttentionMaskInterface.register(NAME, eager_mask)
    theirs.set_attn_implementation(name)


def _interface(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    **extra: Any,
) -> Any:
    """What transformers calls: to the subject that runs in this thread, or plainly eager if none does."""
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    mask = None if mask is None else mask[..., : key.shape[2]]
    subject = getattr(running, "subject", None)
    if subject is None:
        return attend(query, key, value, mask, scale, extra)
    return subject.asked(module, query, key, value, mask, scale, extra)


def _same(x: Tensor) -> Tensor:
    return x


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    extra: Mapping[str, Any],
    at_scores: Any = _same,
    at_pattern: Any = _same,
    at_z: Any = _same,
) -> tuple[Tensor, Tensor]:
    """Eager attention: [batch, head, pos, d_head], [batch, kv_head, key, ...] -> z [batch, pos, head, d_value], [batch, head, pos, key]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) if repeats > 1 else x for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    if extra.get("softcap") is not None:
        scores = extra["softcap"] * (scores / extra["softcap"]).tanh()
    if extra.get("position_bias") is not None:
        scores = scores + extra["position_bias"]
    if mask is not None:
        unseen = hidden(mask)
        empty = unseen.all(-1, keepdim=True)  # rows of padding: theirs read everything alike, which nobody sees
        scores = scores + mask.masked_fill(unseen & ~empty, float("-inf"))
    scores = at_scores(scores)
    precise = scores.dtype if scores.dtype == torch.float64 else torch.float32
    pattern = at_pattern(scores.softmax(-1, dtype=precise).to(value.dtype))
    return at_z((pattern @ value).transpose(1, 2)).contiguous(), pattern


def hidden(mask: Tensor) -> Tensor:
    """Where a query may not read: what is added to scores there is as good as minus infinity."""
    return mask <= torch.finfo(mask.dtype).min / 2


class LayerCall:
    """What one call of the attention interface tells of its layer."""

    def __init__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> None:
        self.module, self.scale = module, scale
        self.n_heads, self.n_kv = query.shape[1], key.shape[1]
        self.d_head, self.d_value = query.shape[3], value.shape[3]
        ahead = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).triu(1)
        self.causal = mask is not None and not bool((~hidden(mask) & ahead).any())


class Listener:
    """Stands in for a subject while its layers are found."""

    def __init__(self, seen: list[LayerCall]) -> None:
        self.seen = seen

    def asked(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        extra: Mapping[str, Any],
    ) -> Any:
        """Note the call, and attend as eager attention does."""
        self.seen.append(LayerCall(module, query, key, value, mask, scale))
        return attend(query, key, value, mask, scale, extra)
