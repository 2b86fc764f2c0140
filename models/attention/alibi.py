"""ALiBi (Press, Smith & Lewis 2021): a penalty on scores that grows linearly with distance, one slope per head."""

from dataclasses import dataclass

from torch import Tensor

from models.attention.stages import Call, ScoreTerm, Sizes, register_part
from models.parts.positions import alibi_slopes
from models.parts.precision import KeepsPrecision


@dataclass(frozen=True)
class AlibiConfig:
    """−slope_h · |i − j|, with the slopes of the paper, non-powers of two included."""

    kind: str = "alibi"


@register_part(AlibiConfig)
class Alibi(ScoreTerm, KeepsPrecision):
    """The term of one layer; `slopes` [head] stay in float32 in 16-bit models."""

    exact_buffers = ("slopes",)
    slopes: Tensor

    def __init__(self, config: AlibiConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        self.register_buffer("slopes", alibi_slopes(sizes.n_maps), persistent=False)

    def term(self, call: Call) -> Tensor:
        """[batch or 1, head, query, key]."""
        dtype = call.q.dtype
        return self.slopes.to(dtype)[None, :, None, None] * -call.context.distances().abs().to(dtype)
