"""Whether a call keeps derivatives: what decides if an operation may take a form that has none."""

import torch
import torch.autograd.forward_ad
from torch import Tensor


def needs_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will record what is done with these tensors."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def takes_plain_kernel(*tensors: Tensor | None) -> bool:
    """Whether a kernel that reads bare memory may stand in: it knows no gradient, tangent, vmap, subclass or compiler."""
    given = [x for x in tensors if x is not None]
    if torch.compiler.is_compiling() or needs_gradient(*given):
        return False
    if any(type(x) not in (Tensor, torch.nn.Parameter) for x in given):
        return False
    if any(torch._C._functorch.is_functorch_wrapped_tensor(x) for x in given):
        return False
    return not any(torch.autograd.forward_ad.unpack_dual(x).tangent is not None for x in given)
