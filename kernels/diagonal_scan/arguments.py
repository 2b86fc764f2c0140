"""Checks of the arguments of this folder, and what follows from them: types and broadcast decays."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.arguments import HALF_TYPES, check_like, check_tensor, compute_dtype, shape_of


def check_scan(decay: object, inputs: object) -> tuple[Tensor, Tensor]:
    """The decay as [batch or 1, pos or 1, *channels or 1] and the inputs, once both fit."""
    for name, tensor in (("inputs", inputs), ("decay", decay)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if not (tensor.is_floating_point() or tensor.is_complex()):
            raise ValueError(f"{name}: expected a floating-point or complex tensor, got {tensor.dtype}")
    assert isinstance(inputs, Tensor) and isinstance(decay, Tensor)
    if inputs.ndim < 2:
        raise ValueError(f"inputs: expected [batch, pos, *channels], got shape {shape_of(inputs)}")
    if 0 in (inputs.shape[0], *inputs.shape[2:]):
        raise ValueError(f"inputs: expected at least one batch and channel (only pos may be 0), got {shape_of(inputs)}")
    check_like("decay", decay, "inputs", inputs, same_dtype=False)
    if decay.shape == inputs.shape[2:]:
        return decay[None, None], inputs
    fits = decay.ndim == inputs.ndim and all(
        size in (1, full) for size, full in zip(decay.shape, inputs.shape, strict=True)
    )
    if not fits:
        raise ValueError(
            f"decay: expected {shape_of(inputs)} [batch, pos, *channels] as for inputs, with 1 for any axis along which it "
            f"is constant, or {list(inputs.shape[2:])} [*channels], got {shape_of(decay)}"
        )
    return decay, inputs


def scan_dtype(decay: Tensor, inputs: Tensor) -> torch.dtype:
    """The type of the state: at least float32, complex as soon as decay or inputs are."""
    wide = [torch.complex64 if x.dtype == torch.complex32 else compute_dtype(x.dtype) for x in (decay, inputs)]
    return torch.promote_types(*wide)


def output_dtype(inputs: Tensor, state: torch.dtype) -> torch.dtype:
    """That of 16-bit inputs, unless a complex decay makes the states complex; else that of the state."""
    return inputs.dtype if inputs.dtype in HALF_TYPES and not state.is_complex else state


def check_scan_state(
    name: str, state: object, shape: Sequence[int], axes: str, dtype: torch.dtype, like: Tensor
) -> None:
    if not isinstance(state, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(state).__name__}")
    if list(state.shape) != list(shape):
        raise ValueError(f"{name}: expected [{axes}] = {list(shape)}, got {shape_of(state)}")
    if state.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, the type of the states of these inputs, got {state.dtype}")
    check_like(name, state, "the inputs", like, same_dtype=False)


def check_selective(x: Tensor | None, delta: Tensor, A: Tensor, **projections: Tensor) -> None:
    """x (or None), delta, A, and any of B, C."""
    check_tensor("delta", delta, "batch, pos, channel", 3)
    batch, pos, channel = delta.shape
    if 0 in (batch, channel):
        raise ValueError(f"delta: expected at least one batch and channel (only pos may be 0), got {shape_of(delta)}")
    if x is not None:
        check_tensor("x", x, "batch, pos, channel", 3)
        if x.shape != delta.shape:
            raise ValueError(
                f"x: expected the shape of delta, {shape_of(delta)} [batch, pos, channel], got {shape_of(x)}"
            )
        check_like("x", x, "delta", delta, same_dtype=False)
    check_tensor("A", A, "channel, state", 2)
    if A.shape[0] != channel or A.shape[1] == 0:
        raise ValueError(f"A: expected [channel={channel}, state] with at least one state, got {shape_of(A)}")
    check_like("A", A, "delta", delta, same_dtype=False)
    for name, projection in projections.items():
        check_tensor(name, projection, "batch, pos, state", 3)
        expected = [batch, pos, A.shape[1]]
        if list(projection.shape) != expected:
            raise ValueError(f"{name}: expected [batch, pos, state] = {expected}, got {shape_of(projection)}")
        check_like(name, projection, "delta", delta, same_dtype=False)


def check_skip(D: Tensor | None, delta: Tensor) -> None:
    if D is None:
        return
    check_tensor("D", D, "channel", 1)
    if D.shape[0] != delta.shape[2]:
        raise ValueError(f"D: expected [channel] = [{delta.shape[2]}], got {shape_of(D)}")
    check_like("D", D, "delta", delta, same_dtype=False)
