"""Devices by name, checked before anything is moved there: torch's own error for one that this machine lacks says neither."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from workbench.instrument.errors import suggestion

if TYPE_CHECKING:
    import torch


def checked_device(device: Any = None) -> torch.device | None:
    """The device of this name (`"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, …) or a torch.device; None stays None.

    Raises:
        ValueError: a name that is none, or a device that this machine does not have; it names those that it has.
    """
    if device is None:
        return None
    import torch  # here: whoever only names a device loads no torch

    there = available_devices()
    has = f"This machine has {' and '.join(there) if len(there) < 3 else ', '.join(there)}."
    try:
        asked = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"There is no device {device!r}.{suggestion(str(device), there)} {has}") from None
    kinds = {name.partition(":")[0] for name in there} | {"meta"}
    if asked.type not in kinds:
        raise ValueError(f"device={str(device)!r} is not available. {_why_not(asked.type)} {has}")
    if asked.index and str(asked) not in there:
        raise ValueError(f"device={str(device)!r} is not available. {has}")
    return asked


def available_devices() -> list[str]:
    """Names of the devices that this machine has: `cpu`, then its accelerators one by one."""
    import torch

    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        names += [f"xpu:{number}" for number in range(torch.xpu.device_count())]
    return names


def _why_not(kind: str) -> str:
    import torch

    if kind == "cuda" and not torch.backends.cuda.is_built():
        return "This torch was built without CUDA."
    if kind == "cuda":
        return "torch finds no NVIDIA GPU or no driver for it."
    return f"torch finds no {kind} device."
