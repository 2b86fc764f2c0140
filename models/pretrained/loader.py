"""Opening a published checkpoint: folder or hub id → converter → our module on no memory at all → tensors put in one by one."""

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode

from models.architecture_record import Architecture
from models.decoder import Decoder
from models.diagram import model_blocks
from models.pretrained.family import Conversion, Fields, UnsupportedCheckpoint, family, recognised
from models.pretrained.stored import Checkpoint, shapes
from models.pretrained.tokenizer import tokenizer_of
from workbench.instrument.errors import suggestion
from workbench.lab.checkpoints import CheckpointError, read_json

# what every checkpoint may hold besides weights
NO_WEIGHTS = ("rotary_emb.inv_freq", ".position_ids")
Progress = Callable[[int, int], None]


def is_published(folder: Path) -> bool:
    """Whether a folder is in Hugging Face layout, or has weights that are known without a `model_type` (not written by `models.save`)."""
    path = folder / "config.json"
    if not path.is_file():
        return False
    record = read_json(path)
    if not isinstance(record, dict):
        raise CheckpointError(f"{path} holds a {type(record).__name__}. Expected an object with the model's settings.")
    if "architecture" in record:
        return False
    return "model_type" in record or recognised(record, plain_shapes(folder)) is not None


def plain_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, from headers alone (so none of pickles)."""
    return {name: shape for name, (shape, _) in shapes(folder).items()}


def record_of(path: Path, given: Mapping[str, Any] | None, stored: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The configuration of a folder or file: `config.json` there or beside it, completed by what the tensors' shapes tell of weights that
    are known without a `model_type`, and with the fields that the caller gives.

    Raises:
        CheckpointError: no configuration, and weights that do not tell. ValueError: given fields that this configuration does not have.
    """
    place = (path.parent if path.is_file() else path) / "config.json"
    record = read_json(place) if place.is_file() and (path.is_dir() or given is None) else {}
    if not isinstance(record, dict):
        raise CheckpointError(f"{place} holds a {type(record).__name__}. Expected an object with the model's settings.")
    if "architecture" in record:
        raise CheckpointError(
            f"{place.parent} was written by models.save. Expected the folder, not a file of it, and no config=."
        )
    found = recognised(record, stored)
    if found is not None and record.get("model_type") in (None, found["model_type"]):
        record = found | record
    if "model_type" not in record:
        some = ", ".join(list(stored)[:3])
        raise CheckpointError(
            f"{path}: without a config.json that names a model_type, these weights ({some}, ...) are of no kind that is known."
        )
    for name in given or {}:
        if name not in record:
            raise ValueError(f"config: this checkpoint has no field {name!r}.{suggestion(name, record)}")
    return record | dict(given or {})


def conversion_of(
    folder: Path,
    names: Iterable[str],
    config: Mapping[str, Any] | None = None,
    stored: Mapping[str, tuple[int, ...]] | None = None,
) -> tuple[Conversion, Fields]:
    """How a checkpoint with tensors of these names is converted; raises `UnknownModel` for a type that we do not have.

    config: fields that the caller gives. stored: the shapes of all tensors, where they are known already.
    """
    fields = Fields(record_of(folder, config, plain_shapes(folder) if stored is None else stored), names)
    convert = family(fields.model_type)
    try:
        return convert(fields), fields
    except (TypeError, ZeroDivisionError, AttributeError, IndexError) as error:
        raise UnsupportedCheckpoint(
            f"{folder}: a setting in its config.json has a value of another kind than expected ({error})."
        ) from error


def load_folder(
    folder: Path,
    architecture: Callable[[str], Architecture],
    *,
    dtype: torch.dtype | str | None = None,
    name: str | None = None,
    allow_pickle_conversion: bool = False,
    config: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
    progress: Progress | None = None,
) -> Decoder:
    """Open a folder in Hugging Face layout, or a file of tensors.

    Args:
        config: fields of its config.json to use instead of what that says, or where there is none.
        architecture: the registry's look-up by name. dtype: of the weights (None: float32; `"auto"`: as stored).
        name: what the model is called. tokenizer: False opens it without one, for token ids only.
        progress: called with (weights read, all weights).

    Raises:
        UnknownModel: a model type that has no converter. UnsupportedCheckpoint: a setting that our modules lack. CheckpointError: missing,
        unexpected or misshapen tensors, a missing shard, weights only as pickles.
    """
    place = folder / "config.json"
    if place.is_file() and "model_type" in read_json(place):
        family(read_json(place)["model_type"])  # an unknown type is said before missing weights are
    checkpoint = Checkpoint(folder, allow_pickle_conversion)
    conversion, fields = conversion_of(folder, checkpoint.names, config, checkpoint.shapes)
    kind = architecture(conversion.architecture)
    with weightless():
        model = kind.module(conversion.config)
    wanted = torch.float32 if dtype is None else None if dtype == "auto" else dtype
    if isinstance(wanted, str):
        raise ValueError(f"dtype={dtype!r}. Expected a torch dtype, 'auto' (as stored), or None (float32).")
    _fill(model, conversion, checkpoint, wanted, progress)
    model.name, model.architecture = name or name_of(folder), kind.name
    blocks = model_blocks(model)
    model.origin = {"family": kind.family, "paper": kind.paper, "provenance": "pretrained", "blocks": blocks}
    tokens = tokenizer_of(folder, model.vocab_size) if tokenizer else None
    if tokens is not None or model.vocab_size != 256:
        model.tokenizer = tokens
    model.card = card_of(folder, fields)
    return model.eval()


def _fill(
    model: Decoder, conversion: Conversion, checkpoint: Checkpoint, dtype: torch.dtype | None, progress: Progress | None
) -> None:
    """Every weight of the model from the checkpoint, and every tensor of the checkpoint in the model.

    Buffers that the converter names are taken as they are stored, in their own precision.
    """
    own: dict[str, Tensor] = dict(model.named_parameters())
    own |= {name: buffer for name, buffer in model.named_buffers() if name in conversion.weights}
    sources = {name: source for name, source in conversion.weights.items() if name in own}
    lacking = sorted(set(own) - set(sources))
    if lacking:
        raise CheckpointError(f"The converter of {checkpoint.folder} says nothing about our weight {lacking[0]!r}.")
    for number, (name, source) in enumerate(sources.items()):
        source = type(source)(tuple(_found(item, conversion.prefix, checkpoint) for item in source.names), source.make)
        tensor = checkpoint.read(source, dtype if isinstance(own[name], nn.Parameter) else None)
        if tensor.shape != own[name].shape:
            raise CheckpointError(
                f"{checkpoint.folder}: {' and '.join(source.names)} gives {name} the shape {tuple(tensor.shape)}; its config.json says "
                f"{tuple(own[name].shape)}."
            )
        _assign(model, name, own[name], tensor)
        if progress is not None:
            progress(number + 1, len(sources))
    ignored = (*NO_WEIGHTS, *conversion.ignored)
    unexpected = sorted(n for n in set(checkpoint.names) - checkpoint.read_names if not any(i in n for i in ignored))
    tied = [n for n in unexpected if getattr(conversion.config, "tie_embeddings", False) and "lm_head" in n]
    unexpected = [n for n in unexpected if n not in tied]
    if unexpected:
        used = [item for source in conversion.weights.values() for item in source.names]
        raise CheckpointError(
            f"{checkpoint.folder} holds {len(unexpected)} tensors that its config.json has no place for: {', '.join(unexpected[:3])}."
            f"{suggestion(unexpected[0], used)}"
        )


def _found(name: str, prefix: str, checkpoint: Checkpoint) -> str:
    """The name as stored: files of a bare base model lack its prefix, and old ones call a norm's numbers gamma and beta."""
    old = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    candidates = [spelling for item in (name, old) for spelling in (item, item.removeprefix(prefix), prefix + item)]
    return next((candidate for candidate in candidates if checkpoint.has(candidate)), name)


def _assign(model: nn.Module, name: str, placeholder: Tensor, tensor: Tensor) -> None:
    path, _, last = name.rpartition(".")
    if not isinstance(placeholder, nn.Parameter):
        setattr(model.get_submodule(path), last, tensor)
        return
    parameter = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    parameter.__dict__.update(placeholder.__dict__)  # such as: no weight decay
    setattr(model.get_submodule(path), last, parameter)


class _NoValues(TorchFunctionMode):
    """In-place changes of tensors without memory are left out. They would do nothing, but import a large part of torch first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        in_place = name.endswith("_") and not name.startswith("_") and name != "requires_grad_"
        changed = args[0] if args else (kwargs or {}).get("tensor")  # what torch.nn.init calls it
        if in_place and isinstance(changed, Tensor) and changed.is_meta:
            return changed
        return func(*args, **(kwargs or {}))


@contextmanager
def weightless() -> Iterator[None]:
    """Models built in this thread meanwhile have parameters without memory; their buffers, which are computed, are real."""
    here = threading.get_ident()

    def on_meta(module: nn.Module, name: str, parameter: Any) -> Any:
        if threading.get_ident() != here or parameter is None:
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(on_meta)
    try:
        with _NoValues():
            yield
    finally:
        handle.remove()


def card_of(folder: Path, fields: Fields) -> dict[str, Any]:
    """What is known of a checkpoint without opening its weights."""
    stored = shapes(folder)
    card = {
        "title": fields.get("_name_or_path", "") or folder.name,
        "model_type": fields.model_type,
        "licence": licence_of(folder),
        "stored_values": sum(prod(shape) for shape, _ in stored.values()),
        "storage_dtypes": sorted({dtype for _, dtype in stored.values()}),
    }
    return card


def name_of(folder: Path) -> str:
    """The folder's or file's name, unless that says nothing (`model`, a commit): then that of the folder around it."""
    folder = folder.with_suffix("") if folder.is_file() else folder
    return folder.parent.name if folder.name in ("model", "checkpoint", "weights") else folder.name


def licence_of(folder: Path) -> str | None:
    """The licence that the model card's header names, if there is one."""
    page = folder / "README.md"
    if not page.is_file():
        return None
    lines = page.read_text("utf-8", errors="replace").splitlines()
    if not lines or lines[0].strip() != "---":
        return None
    for line in lines[1:]:
        if line.strip() == "---":
            return None
        if line.startswith("license:"):
            return line.removeprefix("license:").strip() or None
    return None
