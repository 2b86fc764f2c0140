"""Which devices run the project's Triton kernels."""

import importlib.util

import torch


def has_kernel(device: torch.device) -> bool:
    """The kernels' matrix products need NVIDIA's compute capability 8.0 (Ampere) or later. Triton itself is not imported."""
    if device.type != "cuda" or torch.version.hip is not None or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)
