"""Layer normalisation (Ba, Kiros & Hinton 2016) and RMS normalisation (Zhang & Sennrich 2019) with their scale as a hook point.

`hook_scale` is what the (centred) input is divided by, in float32 at least; `hook_normalized` is the output. Freezing the scale makes
the norm linear.
"""

import torch
from torch import Tensor, nn

from workbench.instrument.hook_points import HookPoint

NORMS = ("layer", "rms")
HALF = (torch.float16, torch.bfloat16)


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
        self.kind, self.shape, self.eps = kind, (width,), eps
        self.w = nn.Parameter(torch.ones(width)) if affine else None
        self.b = nn.Parameter(torch.zeros(width)) if affine and kind == "layer" else None
        self.hook_scale = HookPoint("norm_scale", " ".join([*axes.split()[:-1], "one"]))
        self.hook_normalized = HookPoint("normalized", axes)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; the fused kernel runs unless somebody changes the scale, or differentiates with respect to it."""
        if not self.hook_scale.active:
            return self.hook_normalized(self._fused(x))
        # in 32 bit at least, as the fused kernel does: a square overflows float16 above 256
        precise = x.float() if x.dtype in HALF else x
        normalised: Tensor | None = None
        if self.kind == "rms":
            scale = (precise.pow(2).mean(-1, keepdim=True) + self.eps).sqrt()
        elif precise is not x or (x.requires_grad and torch.is_grad_enabled()):
            scale = (precise.var(-1, correction=0, keepdim=True) + self.eps).sqrt()
        else:  # the kernel hands out its scale, inverted and without a gradient
            normalised, _, inverse = torch.native_layer_norm(x, self.shape, self.w, self.b, self.eps)
            scale = inverse.reciprocal()
        watched = self.hook_scale(scale)
        if watched is not scale or scale.requires_grad:
            return self.hook_normalized(self._divide(precise, watched).to(x.dtype))
        return self.hook_normalized(self._fused(x) if normalised is None else normalised)

    def _fused(self, x: Tensor) -> Tensor:
        if self.kind == "layer":
            return torch.layer_norm(x, self.shape, self.w, self.b, self.eps)
        return torch.rms_norm(x, self.shape, self.w, self.eps)

    def _divide(self, x: Tensor, scale: Tensor) -> Tensor:
        """The norm with a given scale: linear in x (layer norm: affine)."""
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x / scale
        if self.w is not None:
            x = x * self.w
        return x if self.b is None else x + self.b
