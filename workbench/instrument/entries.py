"""What can be attached to a hook point: a function, an intervention, a gradient hook, a cache entry. Each checks what it gets and gives."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from workbench.instrument.errors import (
    CachedTensorChanged,
    HookError,
    HookReturnError,
    HookSignatureError,
    ReadOnlyHookPoint,
)
from workbench.instrument.hook_points import Entry, HookPoint, unhooked

if TYPE_CHECKING:
    from workbench.instrument.interventions import Intervention


def check_signature(function: Callable[..., Any], where: str) -> bool:
    """Raise `HookSignatureError` unless the function takes an activation and a hook point.

    Returns whether the hook point is passed by the keyword `hook`, as TransformerLens does; the second parameter may have any other name.
    """
    if not callable(function):
        raise HookSignatureError(
            f"The hook for {where} is {type(function).__name__}, not a function. Expected hook(activation, hook)."
        )
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature; calling them will tell
        return False
    kinds = inspect.Parameter
    positional = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
    variadic = any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
    needed = sum(p.default is kinds.empty for p in positional)
    unmet = [
        p.name for p in parameters if p.kind is kinds.KEYWORD_ONLY and p.default is kinds.empty and p.name != "hook"
    ]
    keyword_hook = any(p.name == "hook" and p.kind is kinds.KEYWORD_ONLY for p in parameters) or any(
        p.kind is kinds.VAR_KEYWORD for p in parameters
    )
    takes_two = variadic or len(positional) >= 2 or (len(positional) == 1 and keyword_hook)
    if not takes_two or needed > 2 or unmet:
        raise HookSignatureError(
            f"The hook for {where} has the signature {inspect.signature(function)}. "
            "Expected two arguments: hook(activation, hook), where `hook` is the hook point (its .name, .layer(), .axes)."
        )
    named_hook = any(p.name == "hook" and p.kind is not kinds.POSITIONAL_ONLY for p in parameters)
    return named_hook or (not variadic and len(positional) < 2)


def describe_shape(point: HookPoint, x: Tensor) -> str:
    """`"(batch=2, pos=8, d_model=64)"`, falling back to plain sizes where the rank is not the declared one."""
    if len(point.axes) == x.dim():
        return "(" + ", ".join(f"{axis}={size}" for axis, size in zip(point.axes, x.shape, strict=True)) + ")"
    return str(tuple(x.shape))


def check_replacement(result: Any, x: Tensor, point: HookPoint, what: str = "The hook") -> Tensor:
    """Raise `HookReturnError` unless `result` can take the place of `x`: a tensor of the same shape, dtype and device."""
    if not isinstance(result, Tensor):
        raise HookReturnError(
            f"{what} on {point.name!r} returned {type(result).__name__}. Expected a torch.Tensor of shape "
            f"{describe_shape(point, x)}, or None to leave the activation as it is."
        )
    if result.shape != x.shape:
        differing = (
            ", ".join(
                f"{axis}: got {got}, expected {want}"
                for axis, got, want in zip(point.axes, result.shape, x.shape, strict=True)
                if got != want
            )
            if result.dim() == x.dim() == len(point.axes)
            else f"got {tuple(result.shape)}"
        )
        raise HookReturnError(
            f"{what} on {point.name!r} returned the wrong shape ({differing}). Expected {describe_shape(point, x)}; "
            "shapes are never broadcast."
        )
    if result.dtype != x.dtype:
        raise HookReturnError(
            f"{what} on {point.name!r} returned dtype {result.dtype}. Expected {x.dtype}; convert with .to(activation.dtype)."
        )
    if result.device != x.device:
        raise HookReturnError(
            f"{what} on {point.name!r} returned a tensor on device {result.device}. Expected {x.device}; "
            "convert with .to(activation.device)."
        )
    return result


class FunctionEntry(Entry):
    """A user's function. It gets a copy that the model goes on with, so in-place edits work and never reach cached tensors."""

    def __init__(self, address: str, function: Callable[..., Any], **where: Any) -> None:
        super().__init__(address, **where)
        self.function = function
        self.by_keyword = check_signature(function, repr(address))

    def apply(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """Call the function and check what it returns."""
        value = x.clone()
        fresh = 0 if torch.compiler.is_compiling() or value.is_inference() else value._version
        with unhooked():
            result = self.function(value, hook=point) if self.by_keyword else self.function(value, point)
        if not point.editable:
            changed = not torch.compiler.is_compiling() and not value.is_inference() and value._version != fresh
            if (result is not None and result is not value) or changed:
                raise ReadOnlyHookPoint(
                    f"{point.name!r} only reports: the hook must return None and leave the activation unchanged. "
                    "Use a hook point whose .editable is True."
                )
            return x
        if result is None or result is value:
            return value
        # A copy, because the caller may keep the tensor it returned and write into it later.
        return check_replacement(result, x, point).clone()


class InterventionEntry(Entry):
    """A declarative intervention. Pure by construction, so no copies are made and compiled code keeps one graph for all its values."""

    def __init__(self, address: str, intervention: "Intervention", **where: Any) -> None:
        super().__init__(address, **where)
        self.intervention = intervention

    def touches(self, x: Tensor, point: HookPoint) -> bool:
        """Whether the chosen heads, positions, ... occur in this call (a decoding step may hold none of them)."""
        return torch.compiler.is_compiling() or self.intervention.touches(x, point)

    def apply(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """Apply the intervention and check that the activation kept its form."""
        result = self.intervention.apply(x, point)
        return check_replacement(result, x, point, what=type(self.intervention).__name__)


class GradientEntry(Entry):
    """A function on the gradient of the loss with respect to the activation; it may return a replacement of the same shape."""

    edits = False  # the forward value is left alone

    def __init__(self, address: str, function: Callable[..., Any], **where: Any) -> None:
        super().__init__(address, **where)
        self.function = function
        self.by_keyword = check_signature(function, repr(address))
        self.fired = False

    def apply(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """Register on the tensor's gradient."""
        if not x.requires_grad:
            raise HookError(
                f"A backward hook on {point.name!r} can never fire: no gradient flows there. Expected gradients to be enabled "
                "(no torch.no_grad) and at least one parameter or input below this point that requires them."
            )

        def on_gradient(gradient: Tensor) -> Tensor | None:
            self.fired = True
            value = gradient.clone()
            with unhooked():
                result = self.function(value, hook=point) if self.by_keyword else self.function(value, point)
            if result is None or result is value:
                return value
            return check_replacement(result, gradient, point, what="The backward hook").clone()

        # A view of its own, so that edits of the gradient stay at this point even where two points share one tensor.
        own = x.view_as(x)
        own.register_hook(on_gradient)
        return own


class CacheEntry(Entry):
    """Stores (a selection of) the activation. Runs after all edits at its point: the cache holds what the model went on with."""

    edits = False

    def __init__(
        self,
        address: str,
        key: str,
        store: dict[str, Tensor],
        *,
        index: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        detach: bool = True,
        per_step: bool = False,
        gather: dict[str, list[tuple[int, Tensor]]] | None = None,
        **where: Any,
    ) -> None:
        super().__init__(address, **where)
        self.key, self.store, self.index = key, store, index or {}
        self.dtype, self.device, self.detach, self.per_step = dtype, device, detach, per_step
        self.gather = gather
        self.versions: list[tuple[Tensor, int, str]] = []

    def apply(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """Select, convert and store; returns the activation unchanged."""
        value = x.detach() if self.detach else x
        if self.index:
            value = select(value, point, self.index)
        if self.dtype is not None and value.is_floating_point():
            value = value.to(self.dtype)
        if self.device is not None:
            value = value.to(self.device)
        key = f"{self.key}@{point.step}" if self.per_step else self.key
        if self.gather is not None and position is not None:
            self.gather.setdefault(key, []).append((position, value))
        else:
            self.store[key] = value
        if not torch.compiler.is_compiling() and not value.is_inference():
            self.versions.append((value, value._version, key))
        return x

    def finish(self) -> None:
        """Verify that nothing wrote into the stored tensors since."""
        for value, version, key in self.versions:
            if value._version != version:
                raise CachedTensorChanged(
                    f"The cached tensor {key!r} was changed in place after it had been stored, by code that kept a reference to it. "
                    "Expected cached activations to stay as they were: work on a clone."
                )
        self.versions.clear()


class GradientCapture(Entry):
    """Keeps the activation in the graph so that a metric can be differentiated with respect to it afterwards."""

    edits = False

    def __init__(
        self, address: str, key: str, kept: dict[str, Tensor], *, per_step: bool = False, **where: Any
    ) -> None:
        super().__init__(address, **where)
        self.key, self.kept, self.per_step = key, kept, per_step

    def apply(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """Goes on with a view of its own, which requires a gradient even where every parameter is frozen."""
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        key = f"{self.key}@{point.step}" if self.per_step else self.key
        self.kept[key if position is None else f"{key}[{position}]"] = own
        return own


def select(x: Tensor, point: HookPoint, index: dict[str, Any]) -> Tensor:
    """Keep a part of some axes. A copy, so that the whole tensor is not kept alive by its part."""
    for axis, wanted in index.items():
        dim = point.axes.index(axis)
        if isinstance(wanted, slice):
            x = x[(slice(None),) * dim + (wanted,)]
        else:
            size = x.shape[dim]
            positions = torch.as_tensor(wanted, device=x.device)
            bad = [int(p) for p in positions if not -size <= int(p) < size]
            if bad:
                raise HookError(
                    f"Cannot keep {axis} {bad} of {point.name!r}: this run has {axis} 0..{size - 1} (negative numbers count from the end)."
                )
            x = x.index_select(dim, positions % size)
    return x.clone()
