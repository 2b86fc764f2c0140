"""Libraries that tests compare with, kept from changing each other."""

import importlib
import importlib.util
from types import ModuleType, SimpleNamespace


def transformers_in_plain_torch() -> None:
    """Without a GPU, models of transformers are plain PyTorch also where packages of kernels are installed.

    transformers takes the functions of flash-linear-attention and the authors' xLSTM wherever these can be imported (dependency group
    `parity`). The former are Triton kernels that need a device; the latter rounds otherwise. Call before any model of it is imported.
    """
    installed = [name for name in ("fla", "xlstm") if importlib.util.find_spec(name) is not None]
    if not installed or importlib.util.find_spec("transformers") is None:
        return
    import torch
    import transformers.utils
    from transformers.integrations import hub_kernels

    if torch.cuda.is_available():
        return

    def import_module(name: str, package: str | None = None) -> ModuleType:
        if name.split(".")[0] == "fla":
            raise ImportError(f"{name} is hidden from transformers: its kernels need a GPU")
        return importlib.import_module(name, package)

    hub_kernels.importlib = SimpleNamespace(**{**vars(importlib), "import_module": import_module})  # type: ignore[attr-defined]
    transformers.utils.is_xlstm_available = lambda: False
