"""What opening a model would take, before anything large is read or downloaded: type, size, licence, memory.

    outlook("openai-community/gpt2")          asks the hub for the file list, the configuration and the model card only
    outlook("path/to/folder", dtype="auto")   reads the configuration and the headers of the weight files

Folders of models can be collected under one root, `$WORKBENCH_MODELS`; their names are then names for `models.load`, the command line
and the dashboard alike.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from models.architecture_record import UnknownModel
from models.configs import config_from_json
from models.pretrained.family import UnsupportedCheckpoint
from models.pretrained.folders import folder_called, why_missing
from models.pretrained.hub import CONVERT, cached, hub_id, listed, small_file
from models.pretrained.loader import conversion_of, is_published, licence_of
from models.pretrained.stored import Checkpoint, shapes
from workbench.lab.checkpoints import CheckpointError, read_json

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
STORED_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


@dataclass(frozen=True)
class Outlook:
    """What is known of a model before it is opened. None: cannot be known without downloading it.

    Args:
        place: "folder", "cache" (of hub downloads) or "hub". problem: why it cannot be opened, in words; "" if it can.
        file_bytes: of its weights. download_bytes: of what is still to come. load_bytes: weights in memory.
        trace_bytes_per_token: about what one token of a trace takes on top of that while it runs.
        gives: what its output is, in words; None before its files are here, where only they tell. reads_source: whether an encoder reads
            another text first.
    """

    name: str
    place: str
    model_type: str
    architecture: str | None
    problem: str
    parameters: int | None
    stored_dtypes: tuple[str, ...]
    licence: str | None
    file_bytes: int
    download_bytes: int
    load_bytes: int | None
    trace_bytes_per_token: int | None
    gives: str | None = None
    reads_source: bool = False

    def to_json(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def outlook(name: str | Path, *, dtype: str = "float32", cache_dir: Path | None = None) -> Outlook:
    """What opening `name` would take.

    Args:
        name: a folder in Hugging Face layout or written by `models.save`, a name under `$WORKBENCH_MODELS`, or a hub id.
        dtype: as for `models.load`, as a word.

    Raises:
        UnknownModel: neither. CheckpointError: a damaged folder, or a hub that cannot be asked. ValueError: an unknown dtype.
    """
    return outlook_of(str(name), folder_called(str(name)), dtype=dtype, cache_dir=cache_dir)


def outlook_of(name: str, folder: Path | None, *, dtype: str = "float32", cache_dir: Path | None = None) -> Outlook:
    """The same for a folder that is known, or (None) for a hub id that no folder of this name must hide."""
    if dtype != "auto" and dtype not in BYTES:
        raise ValueError(f"dtype={dtype!r}. Expected 'auto' (as stored) or one of {', '.join(BYTES)}.")
    if folder is None:
        identity = hub_id(name)
        if identity is None:
            raise UnknownModel(
                why_missing(name) or f"{name!r} is no folder with a config.json and no hub id such as 'owner/name'."
            )
        folder = cached(identity, cache_dir=cache_dir)
        if folder is None:
            return _on_the_hub(identity, dtype, cache_dir)
        return _of_folder(identity, "cache", folder, dtype)
    return _of_folder(name, "folder", folder, dtype)


def _of_folder(name: str, place: str, folder: Path, dtype: str) -> Outlook:
    stored, damage = _stored(folder)
    counts = {tensor: prod(shape) for tensor, (shape, _) in stored.items()}
    sizes = [counts[tensor] * STORED_BYTES.get(kind, 4) for tensor, (_, kind) in stored.items()]
    loaded = sum(sizes) if dtype == "auto" else BYTES[dtype] * sum(counts.values())
    record = read_json(folder / "config.json")
    told = _converted(folder, list(stored)) if is_published(folder) else _saved(record)
    return Outlook(
        name=name,
        place=place,
        model_type=str(record.get("model_type") or record.get("architecture") or "unknown"),
        architecture=told["architecture"],
        problem=told["problem"] or damage,
        parameters=sum(counts.values()) or None,
        stored_dtypes=tuple(sorted({kind for _, kind in stored.values()})),
        licence=licence_of(folder),
        file_bytes=sum(sizes),
        download_bytes=0,
        load_bytes=loaded or None,
        trace_bytes_per_token=_per_token(told["config"]),
        gives=_gives(told["config"]),
        reads_source=hasattr(told["config"], "encoder_layers"),
    )


def _stored(folder: Path) -> tuple[dict[str, tuple[tuple[int, ...], str]], str]:
    """The tensors in a folder by name, from headers alone, and what is wrong with its weights, in words."""
    try:
        Checkpoint(folder)
    except CheckpointError as error:
        damage = str(error)
    else:
        damage = ""
    try:
        return shapes(folder), damage
    except CheckpointError as error:
        return {}, damage or str(error)


def _on_the_hub(name: str, dtype: str, cache_dir: Path | None) -> Outlook:
    files = listed(name, cache_dir=cache_dir)
    weights = {file: size for file, size in files.items() if file.endswith(".safetensors") and size}
    if "config.json" not in files:
        raise CheckpointError(f"{name!r} holds no config.json. It holds: {', '.join(sorted(files)) or 'nothing'}.")
    folder = small_file(name, "config.json", cache_dir=cache_dir).parent
    if "README.md" in files:
        small_file(name, "README.md", cache_dir=cache_dir)
    config = read_json(folder / "config.json")
    told = _converted(folder, [])
    kind = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    parameters = sum(weights.values()) // BYTES.get(kind, 4) if weights else None
    problem = told["problem"] or (
        "" if weights else f"it holds no safetensors weights, only pickles or none at all. {CONVERT}"
    )
    return Outlook(
        name=name,
        place="hub",
        model_type=str(config.get("model_type")),
        architecture=told["architecture"],
        problem=problem,
        parameters=parameters,
        stored_dtypes=(kind,),
        licence=licence_of(folder),
        file_bytes=sum(weights.values()),
        download_bytes=sum(size or 0 for size in files.values()),
        load_bytes=None if parameters is None else parameters * BYTES.get(kind if dtype == "auto" else dtype, 4),
        trace_bytes_per_token=_per_token(told["config"]),
        gives=None if hasattr(told["config"], "masked_head") else _gives(told["config"]),
        reads_source=hasattr(told["config"], "encoder_layers"),
    )


def _converted(folder: Path, names: list[str]) -> Mapping[str, Any]:
    """Our architecture and configuration for a folder's config.json, or why there is none."""
    try:
        conversion, _ = conversion_of(folder, names)
    except (UnknownModel, UnsupportedCheckpoint, CheckpointError) as error:
        return {"architecture": None, "config": None, "problem": str(error)}
    return {"architecture": conversion.architecture, "config": conversion.config, "problem": ""}


def _saved(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same for a folder written by `models.save`."""
    from models.registry import architecture

    if "architecture" not in record:
        problem = "its config.json names neither a model_type nor an architecture, so it is no model's."
        return {"architecture": None, "config": None, "problem": problem}
    name = str(record["architecture"])
    try:
        config: Any = config_from_json(architecture(name).config, record.get("config") or {})
    except (UnknownModel, ValueError) as error:
        return {"architecture": None, "config": None, "problem": str(error)}
    return {"architecture": name, "config": config, "problem": ""}


def _per_token(config: Any) -> int | None:
    """Float32 logits and their logarithms, if it gives some, and what each layer keeps: a few streams and its hidden layer."""
    if config is None or not hasattr(config, "d_model"):
        return None
    hidden = max((getattr(mlp, "d_mlp", 0) for mlp in getattr(config, "mlps", []) if mlp is not None), default=0)
    layers = getattr(config, "n_layers", 1)
    predicts = getattr(config, "masked_head", "") is not None
    return 4 * (3 * config.vocab_size * predicts + layers * 8 * config.d_model + 3 * hidden)


def _gives(config: Any) -> str | None:
    """What the output of a model of this configuration is."""
    if config is None:
        return None
    if not hasattr(config, "masked_head"):
        return "logits of the next token"
    if config.masked_head is not None:
        return "logits of masked tokens (an encoder with its head)"
    return "the last residual stream (an encoder without a head for masked tokens)"
