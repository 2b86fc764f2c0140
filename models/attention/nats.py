"""Neural Attention Search (NAtS, Deng et al. 2025): every token decides how long it is kept.

A linear map gives each token one of three types per key/value head. With e_j the first global token from j on (itself included),

    global   read by every later query
    local    read by queries i ≤ e_j: until the next global token ends its stretch
    sliding  read by queries i ≤ j + window

The first token of a text is global. Types are the largest logit; gradients are those of the softmax over types, through the weights that
the mask lets through (straight-through; the released kernel uses a hand-written approximation). In training the released code draws Gumbel
noise; here types are deterministic. `keep_cost` is the paper's regulariser: how many later queries must keep a token.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.stages import Call, Normaliser, Sizes, register_part
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta

TYPES = ("global", "local", "sliding")


@dataclass(frozen=True)
class NatsConfig:
    """Args: window: how long a sliding token is read, besides by itself."""

    window: int
    kind: str = "nats"

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is {self.window}; expected at least 1.")


@register_part(NatsConfig)
class Nats(Normaliser):
    """A softmax over the tokens that are kept. `hook_type` [batch, pos, kv_head, type] is 1 at a token's type: edit it to force one."""

    slots = ("token_type",)

    def __init__(self, config: NatsConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.choose = nn.Linear(sizes.d_model, len(TYPES) * sizes.n_kv, bias=False)
        self.hook_type_logits = HookPoint("type_logits", "batch pos kv_head token_type")
        self.hook_type = HookPoint("token_type", "batch pos kv_head token_type")

    def meta(self, meta: PatternMeta) -> PatternMeta:
        return replace(meta, label="over the tokens that are still kept")

    def forward(self, scores: Tensor, call: Call) -> Tensor:
        types = call.carry("token_type", self.hook_type(self.types(call))).permute(0, 2, 3, 1)
        types = types.repeat_interleave(self.sizes.n_maps // self.sizes.n_kv, dim=1)
        kept = torch.einsum("bhtk,bhtqk->bhqk", types, kept_by_type(types, call, self.config.window))
        most = scores.detach().masked_fill(kept < 0.5, float("-inf")).amax(-1, keepdim=True)
        weights = (scores - most).clamp(max=50).exp() * kept  # what is not kept may score far higher
        return weights / weights.sum(-1, keepdim=True)

    def types(self, call: Call) -> Tensor:
        """One-hot with the gradient of the softmax, [batch, pos, kv_head, type]; the first token of a text is global."""
        logits = self.hook_type_logits(self.choose(call.stream).unflatten(-1, (self.sizes.n_kv, len(TYPES))))
        soft = logits.softmax(-1)
        hard = F.one_hot(logits.argmax(-1), len(TYPES)).to(soft) + (soft - soft.detach())
        first = F.one_hot(torch.zeros_like(logits.argmax(-1)), len(TYPES)).to(soft)
        return torch.where((call.context.positions == 0)[..., None, None], first, hard)


def kept_by_type(types: Tensor, call: Call, window: int) -> Tensor:
    """1 where a token of each type would be kept for a query, [batch, map, type, query, key]; types [batch, map, type, key], one-hot.

    Which tokens are global is looked up as it is, without gradient.
    """
    context, length = call.context, call.stream.shape[1]
    marked = (types[:, :, 0] > 0.5).to(types.dtype).detach()
    if context.key_mask is not None:
        marked = marked * context.key_mask[:, None]
    before = marked.cumsum(-1) - marked  # global tokens before each token
    local = before[..., context.offset : context.offset + length, None] <= before[..., None, :]
    sliding = (context.distances() <= window).expand_as(local)
    local = local | context.itself(length, local.device)
    return torch.stack([torch.ones_like(local), local, sliding], dim=2).to(types.dtype)


def keep_cost(types: Tensor) -> Tensor:
    """Share of the text for which each token is kept, on account of its type, [batch, pos, kv_head]: global (N − e_j)/N, local
    (e_j − j)/N, sliding 0. types [batch, pos, kv_head, type] of a whole text, with its gradient."""
    length = types.shape[1]
    at = torch.arange(length, device=types.device)[:, None].expand(types.shape[1:3])
    marked = torch.where(types[..., 0] > 0.5, at, length - 1)
    end = marked.flip(1).cummin(1).values.flip(1)
    later, between = ((length - end).to(types.dtype) / length, (end - at).to(types.dtype) / length)
    return types[..., 0] * later + types[..., 1] * between
