"""What can be attached to a hook point: a function, an intervention, a gradient hook, a cache entry. Each checks what it gets and gives."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from workbench.instrument.errors import (
    CachedTensorChanged,
    HookError,
    HookReturnError,
    HookSignatureError,
    ReadOnlyHookPoint,
)
from workbench.instrument.hook_points import ACTIVE, Entry, HookPoint, Item, unhooked, written

if TYPE_CHECKING:
    from workbench.instrument.interventions import Intervention


def check_signature(function: Callable[..., Any], where: str) -> bool:
    """Raise `HookSignatureError` unless the function takes an activation and a hook point.

    Returns whether the hook point is passed by the keyword `hook`, as TransformerLens does; the second parameter may have any other name.
    """
    expected = (
        "Expected two arguments: hook(activation, hook), where `hook` is the hook point (its .name, .layer(), .axes)."
    )
    if not callable(function):
        raise HookSignatureError(f"The hook for {where} is {type(function).__name__}, not a function. {expected}")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        raise HookSignatureError(
            f"The hook for {where}, {function!r}, does not tell its signature. {expected} Wrap it: lambda x, hook: ..."
        ) from None
    kinds = inspect.Parameter
    parameters = signature.parameters
    named_hook = "hook" in parameters and parameters["hook"].kind not in (kinds.POSITIONAL_ONLY, kinds.VAR_POSITIONAL)
    takes_any_name = any(p.kind is kinds.VAR_KEYWORD for p in parameters.values())
    for by_keyword in (True,) if named_hook else (True, False) if takes_any_name else (False,):
        try:
            signature.bind(None, hook=None) if by_keyword else signature.bind(None, None)
        except TypeError:
            continue
        return by_keyword
    raise HookSignatureError(f"The hook for {where} has the signature {signature}. {expected}")


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


class _CallsFunction(Entry):
    """Shared by hooks that call a user's function: how it is called, and that it is not called from within itself."""

    def __init__(self, function: Callable[..., Any], where: str, **restriction: Any) -> None:
        super().__init__(**restriction)
        self.function = function
        self.by_keyword = check_signature(function, where)

    def fire(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """Apply, except in a model that the function itself calls (a permanent hook would call itself for ever)."""
        return x if self in ACTIVE.running else super().fire(x, point, position)

    def call(self, value: Tensor, point: HookPoint) -> Any:
        """The function's result. An exception leaves with a note that names the hook point."""
        with unhooked(self):
            try:
                return self.function(value, hook=point) if self.by_keyword else self.function(value, point)
            except Exception as error:
                if not is_compiling():
                    error.add_note(f"raised by the hook on {point.name!r}, whose activation is {tuple(value.shape)}")
                raise


class FunctionEntry(_CallsFunction):
    """A user's function. It gets a copy and the model goes on with another, so that in-place edits work, and neither the cache
    nor the rest of the run changes when the function writes later into a tensor that it kept."""

    def __init__(self, function: Callable[..., Any], where: str, **restriction: Any) -> None:
        super().__init__(function, where, **restriction)
        self.joins = getattr(function, "reads_whole_call", False)
        self.by_position = getattr(function, "acts_by_position", False)

    def apply(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """Call the function and check what it returns."""
        piece = ACTIVE.piece
        value = x.clone() if piece is None or not self.by_position else piece.at_its_place(x, point)
        if not point.editable:
            self._only_read(value, point)
            return x
        result = self.call(value, point)
        if self.joins and result is not None:
            raise HookReturnError(
                f"The hook on {point.name!r} returned a replacement, but it said that it only reads (whole_call). Expected None."
            )
        if piece is not None:
            value = piece.part_of(value, x, point)
            result = piece.part_of(result, x, point) if isinstance(result, Tensor) else result
        return value.clone() if result is None else check_replacement(result, x, point).clone()

    def _only_read(self, value: Tensor, point: HookPoint) -> None:
        counted = not is_compiling() and not value.is_inference()
        before = value._version if counted else 0
        result = self.call(value, point)
        if (result is not None and result is not value) or (counted and value._version != before):
            raise ReadOnlyHookPoint(
                f"{point.name!r} only reports: the hook must return None and leave the activation unchanged. "
                "Use a hook point whose .editable is True."
            )


class InterventionEntry(Entry):
    """A declarative intervention. Pure by construction, so no copies are made and compiled code keeps one graph for all its values."""

    def __init__(self, intervention: "Intervention", **restriction: Any) -> None:
        super().__init__(**restriction)
        self.intervention = intervention
        # What compiled code came across: (number of the point, offset, shape) -> point. Equal calls leave it as it is, so that
        # compiled code, which depends on what it finds here, is not compiled anew.
        self.unchecked: dict[tuple[int, ...], HookPoint] = {}

    def apply(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """Apply the intervention and check that the activation kept its form."""
        if is_compiling():
            self.unchecked[(point.uid, point.offset, *x.shape)] = point
            return check_replacement(self.intervention.apply(x, point), x, point, type(self.intervention).__name__)
        met = self.intervention.chosen_in(tuple(x.shape), point, point.offset)
        if met is None:  # a decoding step may hold none of the chosen positions
            return x
        self.met.update(met)
        try:
            result = self.intervention.apply(x, point)
        except RuntimeError as error:
            raise HookError(
                f"{self.intervention.in_words()} cannot be applied at {point.name!r}, {describe_shape(point, x)}: {error}"
            ) from error
        return check_replacement(result, x, point, type(self.intervention).__name__)

    def finish(self) -> None:
        """Check what compiled code could not: whether the chosen heads and positions exist."""
        for (_, offset, *shape), point in self.unchecked.items():
            self.met.update(self.intervention.chosen_in(tuple(shape), point, offset) or ())
        self.unchecked.clear()

    def missing(self) -> list[str]:
        """Chosen positions that occurred in no call."""
        absent = [
            f"{axis} {index}"
            for axis, indices in self.intervention.bounds.items()
            for index in indices
            if (axis, index) not in self.met
        ]
        return super().missing() + absent


class GradientEntry(_CallsFunction):
    """A function on the gradient of the loss with respect to the activation; it may return a replacement of the same shape."""

    edits = False  # the forward value is left alone

    def apply(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """Register on the tensor's gradient."""
        if not x.requires_grad:
            raise HookError(
                f"A backward hook on {point.name!r} can never fire: no gradient flows there. Expected gradients to be enabled "
                "(no torch.no_grad) and at least one parameter or input below this point that requires them."
            )

        def on_gradient(gradient: Tensor) -> Tensor | None:
            value = gradient.clone()
            result = self.call(value, point)
            if result is None or result is value:
                return value
            return check_replacement(result, gradient, point, what="The backward hook").clone()

        # A view of its own, so that edits of the gradient stay at this point even where two points share one tensor.
        own = x.view_as(x)
        own.register_hook(on_gradient)
        return own


@dataclass
class Kept:
    """What of an activation is stored, and how. `heads` and `pos` are indices along those axes (`query` counts as `pos`)."""

    heads: tuple[int, ...] | None = None
    pos: tuple[int, ...] | slice | None = None
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    everything: bool = field(init=False)

    def __post_init__(self) -> None:
        self.everything = self.heads is None and self.pos is None and self.dtype is None and self.device is None

    def of(self, x: Tensor, point: HookPoint) -> Tensor:
        """The part to store. A selection is a copy, so that the whole tensor is not kept alive by its part."""
        if self.heads is not None and "head" in point.axes:
            x = _select(x, point, "head", self.heads, 0)
        if self.pos is not None and not point.per_position:
            for axis in ("pos", "query"):
                if axis in point.axes:
                    x = _select(x, point, axis, self.pos, point.offset)
        dtype = self.dtype if x.is_floating_point() else None
        return x if dtype is None and self.device is None else x.to(device=self.device, dtype=dtype)


def _select(x: Tensor, point: HookPoint, axis: str, wanted: tuple[int, ...] | slice, first: int) -> Tensor:
    """Keep the wanted numbers of an axis that starts at number `first` (absolute positions, where a state is carried)."""
    dim = point.axes.index(axis)
    end = first + x.shape[dim]
    if isinstance(wanted, slice):
        chosen = [i for i in range(end)[wanted] if i >= first]
        bad = [] if chosen else [written((wanted.start or 0, wanted.stop))]
    else:
        chosen = [i if i >= 0 else end + i for i in wanted]
        bad = [written(i) for i, number in zip(wanted, chosen, strict=True) if not first <= number < end]
    if bad:
        raise HookError(
            f"Cannot keep {axis} {', '.join(bad)} of {point.name!r}: this run has {axis} {first}..{end - 1} "
            "(negative numbers count from the end)."
        )
    return x.index_select(dim, torch.tensor(chosen, device=x.device) - first)


class CacheEntry(Entry):
    """Stores whole activations: address -> tensor. Runs after all edits at its points: the cache holds what the model went on with.

    This is the case that happens hundreds of times in one run; `SelectingCacheEntry` does everything else.
    """

    edits = False
    stores = joins = True

    def __init__(
        self, store: dict[str, Tensor], detach: bool, step: int | None = None, positions: tuple[Item, ...] | None = None
    ) -> None:
        super().__init__(step, positions)
        self.store, self.detach = store, detach
        self.counted = (
            not torch.is_inference_mode_enabled()
        )  # inference tensors do not count how often they are written into
        self.versions: list[tuple[Tensor, int, HookPoint]] = []

    def fire(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """Store; returns the activation unchanged."""
        self.reached = True
        value = x.detach() if x.requires_grad and self.detach else x
        self.store[point.name] = value
        if self.counted and not is_dynamo_compiling():
            try:
                self.versions.append((value, value._version, point))
            except RuntimeError:  # the caller gave an inference tensor
                self.counted = False
        return x

    def finish(self) -> None:
        """Verify that nothing wrote into the stored tensors since."""
        for value, version, point in self.versions:
            if value._version != version:
                raise CachedTensorChanged(
                    f"The cached tensor of {point.name!r} was changed in place after it had been stored, by code that kept a "
                    "reference to it. Expected cached activations to stay as they were: work on a clone."
                )
        self.versions.clear()


class SelectingCacheEntry(CacheEntry):
    """Stores a part, another dtype or device, one pass over shared weights, or the positions of per-position points.

    Args:
        trajectories: address -> {position: tensor}, for several positions of a per-position point.
        kept: which part. suffix: the positions as written in the address.
    """

    def __init__(
        self,
        store: dict[str, Tensor],
        detach: bool,
        trajectories: dict[str, dict[int, Tensor]],
        kept: Kept,
        suffix: str = "",
        step: int | None = None,
        positions: tuple[Item, ...] | None = None,
    ) -> None:
        super().__init__(store, detach, step, positions)
        self.trajectories, self.kept, self.suffix = trajectories, kept, suffix
        self.single = suffix != "" and positions is not None and len(positions) == 1 and isinstance(positions[0], int)

    def fire(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """Select, convert and store; returns the activation unchanged."""
        if not self.wants(position):
            return x
        self.reached = True
        value = self.kept.of(x.detach() if self.detach else x, point)
        key = address_of(point) + self.suffix
        if position is None or self.single:
            self.store[key] = value
        else:
            self.trajectories.setdefault(key, {})[position] = value
        if self.counted and not is_dynamo_compiling():
            try:
                self.versions.append((value, value._version, point))
            except RuntimeError:  # the caller gave an inference tensor
                self.counted = False
        return x

    def finish(self) -> None:
        """Verify also that no chosen position is missing between the others."""
        super().finish()
        if self.reached and self.missing():
            raise HookError(
                f"Cannot keep {', '.join(self.missing())} of a state: the run has positions 0..{ACTIVE.end - 1}."
            )


class GradientCapture(Entry):
    """Keeps activations in the graph so that a metric can be differentiated with respect to them afterwards.

    `captured` receives (address, position, hook point, tensor) in the order of the run.
    """

    edits = False
    stores = True

    def __init__(
        self, captured: list[tuple[str, int | None, HookPoint, Tensor]], suffix: str = "", **restriction: Any
    ) -> None:
        super().__init__(**restriction)
        self.captured, self.suffix = captured, suffix

    def apply(self, x: Tensor, point: HookPoint, position: int | None) -> Tensor:
        """Goes on with a view of its own, which requires a gradient even where every parameter is frozen."""
        own = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        self.captured.append((address_of(point) + self.suffix, position, point, own))
        return own


def address_of(point: HookPoint) -> str:
    """The address of the pass that is running now: `name`, or `name@step` where weights are shared over depth."""
    return point.name if point.steps == 1 else f"{point.name}@{ACTIVE.step}"
