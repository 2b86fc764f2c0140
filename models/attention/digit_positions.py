"""SeqPE (Li et al. 2025): a position is read digit by digit by a small transformer, and the two codes that it gives are matched.

    digits of i, leading zeros hidden, then [CLS]  →  causal transformer over digits  →  e_i = W_out h_[CLS]
    bias_ij = (W_q e_i) · (W_k e_j) · scale                        the paper's way in which codes enter scores; one W_q, W_k per layer

One digit transformer serves all layers. So every number up to base^digits has a code, also one that no text reached in training. Not here:
the two losses that shape the codes, a contrastive one by distance and one that carries codes over to far positions; without them only the
task teaches codes. The code's other uses, added to the embedding or turned into rotations, are not here either.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.stages import Call, Part, ScoreTerm, Sizes, register_part
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class DigitPositionConfig:
    """Args: digits: how many a position has. base: of the numbers. width, heads, layers: of the transformer over digits."""

    digits: int = 4
    base: int = 10
    width: int = 32
    heads: int = 4
    layers: int = 2
    kind: str = "digit_positions"

    def __post_init__(self) -> None:
        if self.digits < 1 or self.base < 2 or self.layers < 1 or self.width % self.heads:
            raise ValueError(
                f"{self}: expected at least 1 digit, a base of at least 2, at least 1 layer, and a width that is a multiple of heads."
            )


class DigitEncoder(nn.Module):
    """Whole numbers [...] to codes [..., width]. Pre-norm blocks with GELU and four times the width, as GPT-2's."""

    def __init__(self, config: DigitPositionConfig) -> None:
        super().__init__()
        self.config = config
        self.digit = nn.Parameter(torch.empty(config.base, config.width))
        self.place = nn.Parameter(torch.empty(config.digits, config.width))
        self.last = nn.Parameter(torch.empty(1, config.width))  # [CLS], which has no place
        gelu = partial(F.gelu, approximate="tanh")
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                config.width, config.heads, 4 * config.width, 0.0, gelu, norm_first=True, batch_first=True
            )
            for _ in range(config.layers)
        )
        self.out = nn.Linear(config.width, config.width)

    def forward(self, positions: Tensor) -> Tensor:
        """See the class.

        Raises:
            ValueError: fractions, or numbers of more digits than there are.
        """
        base, count = self.config.base, self.config.digits
        if positions.is_floating_point():
            raise ValueError("SeqPE reads whole positions, digit by digit; got fractional facts['positions'].")
        if int(positions.min()) < 0 or int(positions.max()) >= base**count:
            raise ValueError(
                f"Positions reach from {int(positions.min())} to {int(positions.max())}; {count} digits of base {base} tell 0 to "
                f"{base**count - 1} apart. Expected more digits."
            )
        flat = positions.flatten()
        powers = base ** torch.arange(count - 1, -1, -1, device=flat.device)
        digits = flat[:, None] // powers % base
        shown = (flat[:, None] >= powers) | (powers == 1)  # 0 has one digit
        shown = torch.cat([shown, torch.ones_like(shown[:, :1])], dim=1)
        length = count + 1
        visible = torch.ones(length, length, dtype=torch.bool, device=flat.device).tril() & shown[:, None, :]
        visible = visible | torch.eye(
            length, dtype=torch.bool, device=flat.device
        )  # no empty rows; nobody reads what is hidden
        x = torch.cat([self.digit[digits] + self.place, self.last.expand(len(flat), 1, -1)], dim=1)
        hidden = (~visible).repeat_interleave(self.config.heads, dim=0)
        for block in self.blocks:
            x = block(x, src_mask=hidden)
        code: Tensor = self.out(x[:, -1])
        return code.unflatten(0, positions.shape)


@register_part(DigitPositionConfig)
class DigitPositions(ScoreTerm):
    """`encoder` is the transformer over digits (None in layers that use the first one's); `hook_code` [batch, key, code] fires there."""

    def __init__(self, config: DigitPositionConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.encoder: DigitEncoder | None = DigitEncoder(config)
        self.owner: list[DigitPositions] = [self]  # in a list, so that a shared transformer is registered once
        self.query, self.key = (nn.Linear(config.width, sizes.n_maps * sizes.d_head, bias=False) for _ in range(2))
        self.hook_code: HookPoint | None = HookPoint("position_code", "batch key code")

    def placed(self, layer: int, earlier: list[Part]) -> None:
        """Use the transformer of the first layer that has one."""
        if earlier:
            self.encoder, self.owner, self.hook_code = None, [earlier[0]], None  # type: ignore[list-item]

    def codes(self, call: Call) -> Tensor:
        """Of all tokens read so far and now, [batch, key, code]."""
        assert self.encoder is not None and self.hook_code is not None
        codes = self.encoder(call.context.key_positions)
        return self.hook_code(codes.expand(len(call.stream), -1, -1))

    def term(self, call: Call) -> Tensor:
        """[batch, head, query, key]."""
        owner, shape = self.owner[0], (self.sizes.n_maps, self.sizes.d_head)
        codes = call.context.once(("digit_positions", id(owner)), lambda: owner.codes(call))
        q, k = self.query(codes[:, call.context.offset :]).unflatten(-1, shape), self.key(codes).unflatten(-1, shape)
        return torch.einsum("bqhd,bkhd->bhqk", q, k) * self.sizes.scale
