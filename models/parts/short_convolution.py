"""The short causal depthwise convolution that recurrent mixers put before their memory: every channel smeared over a few tokens.

y_t[c] = b[c] + Σ_{i<taps} w[c, i] x_{t − taps + 1 + i}[c]
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.context import Context


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, context: Context, carried: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Convolve real tokens only; padding leaves no trace.

    Args:
        x: [batch, pos, channel]. weight: [channel, taps]. bias: [channel] or None.
        carried: what an earlier call returned, [batch, taps − 1, channel]; None at the beginning.

    Returns:
        y [batch, pos, channel], and the last taps − 1 inputs to carry on.
    """
    taps = weight.shape[1]
    before = x.new_zeros(x.shape[0], taps - 1, x.shape[2]) if carried is None else carried
    order = None
    if context.mask is not None:
        # real tokens are gathered to the right end, so that padding is out of the convolution's sight
        x = x * context.mask[..., None]
        order = context.mask.to(torch.int8).argsort(dim=1, stable=True)  # padding first, then real tokens in order
        x = x.gather(1, order[..., None].expand_as(x))
        # what was read earlier must stand directly before the first real token
        pads = (~context.mask).sum(1)
        padded = torch.cat([before, x], dim=1)
        shift = torch.arange(taps - 1, device=x.device)[None] + pads[:, None]
        padded = padded.scatter(1, shift[..., None].expand(-1, -1, x.shape[2]), before)
    else:
        padded = torch.cat([before, x], dim=1)
    y = F.conv1d(padded.transpose(1, 2), weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    if order is not None:
        y = torch.zeros_like(y).scatter(1, order[..., None].expand_as(y), y)
    return y, padded[:, -(taps - 1) :] if taps > 1 else before
