"""Weights on disk: finished models as a folder of three files, and single-file checkpoints that are never half written.

A finished model is a folder with `model.safetensors`, `config.json` (what builds the model) and `card.json` (what it
is: data, losses, command, licence, sha256 of the weights). Nothing is ever unpickled: a pickle can run any code when
it is read.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

STORAGE_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}
_PICKLES = (".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt")
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "card.json"


class CheckpointError(ValueError):
    """A file or folder that is not the checkpoint it is asked to be."""


# ----------------------------------------------------------------------------------------------------------------------
# Files that are complete or absent


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON under a temporary name, then rename. NaN and infinity are refused: they are not JSON."""
    _replace(Path(path), (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8"))


def read_json(path: str | Path) -> Any:
    path = Path(path)
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path.parent} has no {path.name}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any] | None = None) -> None:
    """Write named tensors and a JSON record as one safetensors file, under a temporary name, then rename.

    A kill at any moment leaves the previous file of that name, whole. Names that share one tensor (tied weights)
    store it once.
    """
    path = Path(path)
    stored: dict[str, Tensor] = {}
    same_as: dict[str, str] = {}
    first_name: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        # tied means the same view of the same memory; anything that merely overlaps is stored as its own copy
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and place in first_name:
            same_as[name] = first_name[place]
        else:
            first_name[place] = name
            stored[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    # one entry, because safetensors writes several in random order and equal content must give equal bytes
    metadata = {"workbench": json.dumps({"about": dict(about or {}), "same_as": same_as}, allow_nan=False)}
    temporary = _temporary(path)
    try:
        save_file(stored, temporary, metadata=metadata)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the JSON record that `write_tensors` wrote. Tied names share one tensor again.

    Raises CheckpointError for a missing, damaged or pickled file. A safetensors file of other origin has an empty
    record.
    """
    path = Path(path)
    if path.suffix.lower() in _PICKLES:
        raise CheckpointError(_pickle_message(path))
    if not path.is_file():
        raise CheckpointError(f"no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            record = json.loads((file.metadata() or {}).get("workbench", "{}"))
    except SafetensorError as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None
    for name, original in record.get("same_as", {}).items():
        tensors[name] = tensors[original]
    return tensors, record.get("about", {})


def _replace(path: Path, data: bytes) -> None:
    temporary = _temporary(path)
    try:
        temporary.write_bytes(data)
        _flush(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _flush(path: Path) -> None:
    """Force a file to disk, so that after a power cut the renamed file is not an empty one."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


# ----------------------------------------------------------------------------------------------------------------------
# Finished models


def save_model(
    folder: str | Path,
    state_dict: Mapping[str, Tensor],
    config: Mapping[str, Any],
    card: Mapping[str, Any],
    dtype: str = "float32",
    overwrite: bool = False,
) -> str:
    """Write a finished model; returns the sha256 of its weights file.

    Floating tensors are stored as `dtype` (`"float32"`, `"float16"`, `"bfloat16"`, `"float64"`) and come back from
    `load_weights` in the dtype they have now; other tensors are stored as they are. The card is written with three
    entries added: `weights_sha256`, `storage_dtype`, `stored_values` (their number, tied ones once). The
    folder appears whole or not at all.

    Raises CheckpointError if the folder exists and `overwrite` is false, if a value does not fit `dtype`, or if a
    weight is not finite.
    """
    folder = Path(folder)
    if dtype not in STORAGE_DTYPES:
        raise CheckpointError(f"unknown storage dtype {dtype!r}: expected one of {', '.join(STORAGE_DTYPES)}")
    if not state_dict:
        raise CheckpointError("the state dict is empty")
    if folder.exists() and not overwrite:
        raise CheckpointError(f"{folder} exists; pass overwrite=True to replace it")
    for added in ("weights_sha256", "storage_dtype", "stored_values"):
        if added in card:
            raise CheckpointError(f"the card already has the entry {added!r}, which save_model writes")
    cast_once: dict[tuple[Any, ...], Tensor] = {}  # so that tied weights stay tied through the cast
    tensors = {}
    for name, tensor in state_dict.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() == 0 or place not in cast_once:
            cast_once[place] = _stored_as(name, tensor.detach(), STORAGE_DTYPES[dtype])
        tensors[name] = cast_once[place]
    partial = folder.with_name(f".partial-{folder.name}-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in state_dict.items()}
        write_tensors(partial / WEIGHTS, tensors, {"dtypes": dtypes})
        digest = hashlib.sha256((partial / WEIGHTS).read_bytes()).hexdigest()
        unique = {id(tensor): tensor.numel() for tensor in tensors.values()}
        added_entries = {"weights_sha256": digest, "storage_dtype": dtype, "stored_values": sum(unique.values())}
        write_json(partial / CONFIG, dict(config))
        write_json(partial / CARD, {**card, **added_entries})
        if folder.exists():
            replaced = folder.with_name(f".replaced-{folder.name}-{os.getpid()}")
            os.replace(folder, replaced)
            os.replace(partial, folder)
            shutil.rmtree(replaced)
        else:
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return digest


def load_weights(folder: str | Path) -> dict[str, Tensor]:
    """The state dict of a finished model, in the dtypes it was saved from.

    Raises CheckpointError if the folder is no finished model, holds only pickles, or its weights are not the ones
    whose sha256 is on the card.
    """
    folder = Path(folder)
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = (
            sorted(entry for entry in folder.glob("*") if entry.suffix.lower() in _PICKLES) if folder.is_dir() else []
        )
        raise CheckpointError(_pickle_message(pickles[0]) if pickles else f"{folder} has no {WEIGHTS}")
    digest, expected = hashlib.sha256(path.read_bytes()).hexdigest(), load_card(folder).get("weights_sha256")
    if digest != expected:
        raise CheckpointError(
            f"{path} has sha256 {digest}, but its card says {expected}: the file was changed or damaged"
        )
    tensors, about = read_tensors(path)
    cast: dict[int, Tensor] = {}  # by identity, so that tied weights stay tied
    for name, tensor in tensors.items():
        cast.setdefault(id(tensor), tensor.to(getattr(torch, about["dtypes"][name])))
    return {name: cast[id(tensor)] for name, tensor in tensors.items()}


def load_config(folder: str | Path) -> dict[str, Any]:
    """The configuration that builds a finished model."""
    return read_json(Path(folder) / CONFIG)


def load_card(folder: str | Path) -> dict[str, Any]:
    """The card of a finished model."""
    return read_json(Path(folder) / CARD)


def _stored_as(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    if not bool(torch.isfinite(tensor).all()):
        raise CheckpointError(f"weight {name!r} has values that are not finite; such a model is not saved")
    stored = tensor.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise CheckpointError(
            f"weight {name!r} reaches {tensor.abs().max().item():.3g}, too large for {dtype}; use bfloat16"
        )
    return stored


def _pickle_message(path: Path) -> str:
    return (
        f"{path} is a pickle, which can run any code when it is read, so it is never opened here. "
        "Convert it to safetensors where you trust it (safetensors.torch.save_file(state_dict, 'model.safetensors'))."
    )
