"""Layer normalisation (Ba, Kiros & Hinton 2016) and RMS normalisation (Zhang & Sennrich 2019) with their scale as a hook point.

`hook_scale` is what the (centred) input is divided by, in float32 at least; `hook_normalized` is the output. Freezing the scale makes
the norm linear.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.instrument.hook_points import HookPoint

NORMS = ("layer", "rms")


class Norm(nn.Module):
    """`kind="layer"`: (x − mean) / √(var + eps) · w + b.  `kind="rms"`: x / √(mean(x²) + eps) · w.  Over the last axis.

    Args:
        width: size of the last axis. affine: learn w (and b for layer norm). axes: names of the input's axes, for the hook points.
    """

    def __init__(
        self, kind: str, width: int, eps: float = 1e-5, affine: bool = True, axes: str = "batch pos d_model"
    ) -> None:
        super().__init__()
        if kind not in NORMS:
            raise ValueError(f"Unknown norm {kind!r}. Expected one of {', '.join(NORMS)}.")
        self.kind, self.width, self.eps = kind, width, eps
        self.w = nn.Parameter(torch.ones(width)) if affine else None
        self.b = nn.Parameter(torch.zeros(width)) if affine and kind == "layer" else None
        self.hook_scale = HookPoint("norm_scale", " ".join([*axes.split()[:-1], "one"]))
        self.hook_normalized = HookPoint("normalized", axes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; the fused kernel runs unless somebody watches the scale."""
        if not self.hook_scale.active:
            if self.kind == "layer":
                return self.hook_normalized(F.layer_norm(x, (self.width,), self.w, self.b, self.eps))
            return self.hook_normalized(F.rms_norm(x, (self.width,), self.w, self.eps))
        dtype = x.dtype
        if dtype in (torch.float16, torch.bfloat16):  # as the fused kernel does: a square overflows float16 above 256
            x = x.float()
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        scale = self.hook_scale((x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        x = x / scale
        if self.w is not None:
            x = x * self.w
        if self.b is not None:
            x = x + self.b
        return self.hook_normalized(x.to(dtype))
