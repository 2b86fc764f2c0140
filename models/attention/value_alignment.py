"""Super attention (Hosseini & Hosseini 2024, "You need to pay better attention"): values are mixed over positions before they are read.

    z = P (W_A V) = (P W_A) V,   W_A [position, position] learned, one per layer

so the map that is applied is P W_A: `hook_raw_pattern` is P, `hook_pattern` the product. In a causal site W_A is lower triangular, or
tokens would read the future through the values of the past. W_A knows places by their number, so texts end where it does. It starts near
the identity, which is attention without alignment. With `SliceConfig(("key", "value"))`, efficient attention, this is the paper's super
attention; reconstructed from its description and an unofficial implementation, which leaves out the triangle.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.attention.stages import Call, Reweight, Sizes, register_part
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.patterns import PatternMeta


@dataclass(frozen=True)
class ValueAlignmentConfig:
    """Args: length: the number of places that W_A knows, the longest text."""

    length: int
    kind: str = "value_alignment"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length is {self.length}; expected at least 1, the longest text.")


@register_part(ValueAlignmentConfig)
class ValueAlignment(Reweight):
    """`align` W_A [place, place]; `hook_alignment` [batch, key, aligned_key] is what of it applies to the tokens of a text."""

    def __init__(self, config: ValueAlignmentConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.align = nn.Parameter(torch.empty(config.length, config.length))
        self.hook_alignment = HookPoint("alignment", "batch key aligned_key")

    def initialise_own(self) -> None:
        """The identity and the small numbers that are there already."""
        with torch.no_grad():
            self.align.add_(torch.eye(self.config.length).to(self.align))

    def meta(self, meta: PatternMeta) -> PatternMeta:
        return replace(meta, signed=True, rows_sum_to="free", label="softmax map times the alignment of values")

    def forward(self, pattern: Tensor, call: Call) -> Tensor:
        return pattern @ self.hook_alignment(self._alignment(call).expand(len(pattern), -1, -1))[:, None]

    def _alignment(self, call: Call) -> Tensor:
        """[batch or 1, key, key], 0 where a value must not be mixed in.

        Raises:
            ValueError: a text longer than W_A, or positions that are no places.
        """
        context = call.context
        at, known = context.key_positions, self.config.length
        if at.is_floating_point():
            raise ValueError("Super attention aligns whole places; got fractional facts['positions'].")
        if int(at.max()) >= known:
            raise ValueError(
                f"A text reaches place {int(at.max())}; super attention aligns the values of {known} places, 0 to {known - 1}. Expected a "
                "shorter text, or a model with a larger `length`."
            )
        weights = self.align[at[:, :, None], at[:, None, :]]
        if self.sizes.causal:
            weights = weights.tril()
        return weights if context.key_mask is None else weights * context.key_mask[:, None, :]
