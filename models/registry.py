"""The registry: architectures (how to build one) and models (a trained checkpoint, or an architecture at random weights).

register_architecture("retnet", paper="retnet", ...)    one call per architecture, in a file of models/architectures/
models.build("retnet", n_layers=2, d_model=64)           random weights
models.load("retnet-english")                            a shipped model, or a folder written by models.save
models.list_models()                                     records for the command line and the dashboard
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from models.architecture_record import ARCHITECTURES, ENCODERS, Architecture, UnknownModel, register_architecture
from models.configs import config_from_json, config_to_json
from models.decoder import Decoder
from models.diagram import model_blocks
from workbench.discovery import import_all
from workbench.instrument.devices import checked_device
from workbench.instrument.errors import suggestion

SHIPPED = Path(__file__).parent / "shipped"


def _register_all() -> None:
    """Import the files that register architectures (here, so that importing the registry stays cheap)."""
    import_all("models.architectures")


def architecture(name: str) -> Architecture:
    """Look up an architecture; raises `UnknownModel` with the nearest name."""
    _register_all()
    if name in ENCODERS:
        return ENCODERS[name]
    if name not in ARCHITECTURES:
        raise UnknownModel(
            f"Unknown architecture {name!r}.{suggestion(name, ARCHITECTURES)} Known: {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[name]


def build(name: str, preset: str = "tiny", config: Any = None, *, device: Any = None, **changes: Any) -> Decoder:
    """A model of an architecture at random weights.

    Args:
        name: architecture. preset: starting configuration. config: a whole configuration instead. changes: fields to change.
        device: where to put it; the weights are those that the seed gives on the CPU.

    Raises:
        UnknownModel: no such architecture or preset. ValueError: a configuration of another class, a field that it lacks, or a device that
            this machine lacks.
    """
    place = checked_device(device)
    record = architecture(name)
    if config is None:
        if preset not in record.presets:
            raise UnknownModel(
                f"{name!r} has no preset {preset!r}.{suggestion(preset, record.presets)} It has: {', '.join(record.presets)}."
            )
        config = record.presets[preset]
    elif not isinstance(config, record.config):
        raise ValueError(f"{name!r} is built from a {record.config.__name__}, got {type(config).__name__}.")
    known = {item.name for item in fields(config)}
    for change in changes:
        if change in record.refused:
            raise ValueError(f"{name!r} cannot be built with {change}={changes[change]!r}. {record.refused[change]}")
        if change not in known:
            raise ValueError(
                f"{type(config).__name__} has no field {change!r}.{suggestion(change, known)} Its fields: {', '.join(sorted(known))}."
            )
    model = record.module(replace(config, **changes))
    return _named(model, f"{name}-random", record, "random").to(place).eval()


@dataclass(frozen=True)
class ModelRecord:
    """One model in the list: a shipped checkpoint, or an architecture that can be built at random weights."""

    name: str
    title: str
    architecture: str
    paper: str | None
    family: str
    parameters: int
    provenance: str  # "trained" | "random"
    description: str
    capabilities: tuple[str, ...]
    hook_point_names: tuple[str, ...]
    fidelity: str
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def hook_points(self) -> int:
        """How many hook points there are."""
        return len(self.hook_point_names)


def shipped_names() -> list[str]:
    """Names of the shipped checkpoints, the default one first."""
    folders = sorted(p.parent.name for p in SHIPPED.glob("*/card.json"))
    return sorted(
        folders, key=lambda name: (json.loads((SHIPPED / name / "card.json").read_text()).get("order", 99), name)
    )


def list_models() -> list[ModelRecord]:
    """Shipped models first, then every architecture at random weights."""
    _register_all()
    records = []
    for name in shipped_names():
        card = json.loads((SHIPPED / name / "card.json").read_text())
        records.append(
            _record(name, card["title"], architecture(card["architecture"]), "trained", card["description"], card)
        )
    for record in ARCHITECTURES.values():
        records.append(
            _record(
                f"{record.name}-random", f"{record.title} (random weights)", record, "random", record.description, {}
            )
        )
    return records


def _record(
    name: str, title: str, kind: Architecture, provenance: str, description: str, card: dict[str, Any]
) -> ModelRecord:
    # Counting needs a model, a tiny one. Cards carry what is known of shipped models.
    if "parameters" in card and "hook_point_list" in card:
        parameters, points = card["parameters"], tuple(point["name"] for point in card["hook_point_list"])
    else:
        parameters, points = _counts(kind.name)
    return ModelRecord(
        name,
        title,
        kind.name,
        kind.paper,
        kind.family,
        parameters,
        provenance,
        description,
        kind.shows,
        points,
        kind.fidelity,
        card,
    )


_counted: dict[str, tuple[int, tuple[str, ...]]] = {}


def _counts(name: str) -> tuple[int, tuple[str, ...]]:
    if name not in _counted:
        model = build(name)
        _counted[name] = (model.n_parameters(), tuple(model.hook_points.points))
    return _counted[name]


def describe(name: str) -> ModelRecord:
    """The record of one model; raises `UnknownModel` with the nearest name."""
    records = {record.name: record for record in list_models()}
    if name not in records:
        from models.pretrained.folders import why_missing

        raise UnknownModel(
            why_missing(name) or f"Unknown model {name!r}.{suggestion(name, records)} Known: {', '.join(records)}."
        )
    return records[name]


def save(model: Decoder, folder: str | Path, card: dict[str, Any] | None = None, dtype: Any = None) -> Path:
    """Write `model.safetensors`, `config.json` and `card.json`; `load` reads them back.

    Args:
        folder: created if missing; files are written under temporary names and renamed.
        card: facts about the model (data, command, metrics). dtype: storage type of the weights (default: the model's own).

    Raises:
        ValueError: a processed copy (`models.weight_processing`), whose parameters its configuration does not describe.
    """
    if getattr(model, "processing", None) is not None:
        raise ValueError(
            f"{model.name} is a processed copy. Expected the model itself: process it again after opening."
        )
    from workbench.lab.checkpoints import save_model

    config = {"architecture": model.architecture, "config": config_to_json(model.config)}
    full = {
        "name": Path(folder).name,
        "architecture": model.architecture,
        "title": Path(folder).name,
        "description": "",
        **(card or {}),
    }
    full |= {"parameters": model.n_parameters(), "hook_points": len(model.hook_points.points)}
    save_model(
        folder,
        model.state_dict(),
        config,
        full,
        dtype=str(dtype or next(model.parameters()).dtype).removeprefix("torch."),
    )
    return Path(folder)


def load(
    name: str | Path,
    *,
    dtype: Any = None,
    device: Any = None,
    revision: str | None = None,
    cache_dir: Path | None = None,
    allow_pickle_conversion: bool = False,
    config: Mapping[str, Any] | None = None,
    tokenizer: bool = True,
    progress: Callable[[float, str], None] | None = None,
) -> Decoder:
    """Open a model: a shipped one by name, `<architecture>-random`, a folder written by `save`, or a published checkpoint.

    Args:
        name: also a folder in Hugging Face layout, the name of a folder under `$WORKBENCH_MODELS`, or a hub id (`owner/name`; `gpt2` and a
            few others without owner); or a file of tensors, with a config.json beside it or `config`.
        dtype: torch.float64 or "float64", for example (default: float32; `"auto"`, for published checkpoints: as stored).
        device: where to put it.
        revision, cache_dir: of a hub id. allow_pickle_conversion: read published weights that come as pickles only, with torch's
            restricted unpickler. config: fields of a published config.json to use instead of what it says, or where there is none.
        tokenizer: False opens a published checkpoint without its tokenizer, for token ids only.
        progress: called with (fraction, words) while files come and weights are read; what it raises stops the opening.

    Raises:
        UnknownModel: no such model; the message names the nearest. ValueError: a folder whose files do not fit together; a checkpoint
        that cannot be had or is not supported (`CheckpointError`, `UnsupportedCheckpoint`); a device that this machine lacks.
    """
    place = checked_device(device)
    from models.pretrained.folders import folder_called, why_missing
    from models.pretrained.hub import SHORT, hub_id, snapshot
    from models.pretrained.loader import is_published, load_folder

    text = str(name)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = _dtype_called(dtype)
    folder = SHIPPED / text if text in shipped_names() else folder_called(text) or Path(text)
    published = hub_id(text) if isinstance(name, str) and not folder.exists() else None
    report = progress or (lambda fraction, words: None)
    if published is not None:
        folder = snapshot(
            published,
            revision=revision,
            cache_dir=cache_dir,
            pickles=allow_pickle_conversion,
            progress=lambda fraction, words: report(0.8 * fraction, words),
        )
    if is_published(folder) or folder.is_file() or (config is not None and folder.exists()):
        model = load_folder(
            folder,
            architecture,
            dtype=dtype,
            name=text if published else None,
            allow_pickle_conversion=allow_pickle_conversion,
            config=config,
            tokenizer=tokenizer,
            progress=lambda done, total: report(0.8 + 0.2 * done / total, f"weight {done} of {total}"),
        )
        dtype = None
    elif config is not None:
        raise ValueError(
            f"{text!r} is no published checkpoint, so config= has no place. Expected a folder or a file of tensors."
        )
    elif (folder / "config.json").is_file():
        model = _load_folder(folder, None if dtype == "auto" else dtype)
    elif text.endswith("-random"):
        model = build(text.removesuffix("-random"))
    else:
        known = f"Known: {', '.join(shipped_names())}, <architecture>-random (`workbench models` lists all), folders and hub ids."
        if folder.exists():
            expected = "Expected a folder written by models.save or in Hugging Face layout, or a name."
            inside = sorted(str(each.parent) for each in folder.glob("*/config.json"))[:3]
            nearest = f" Did you mean {' or '.join(map(repr, inside))}?" if inside else ""
            raise UnknownModel(f"{text!r} holds no config.json.{nearest} {expected} {known}")
        names = [*SHORT, *(record.name for record in list_models())]
        raise UnknownModel(why_missing(text) or f"Unknown model {text!r}.{suggestion(text, names)} {known}")
    if dtype == "auto":
        raise ValueError(
            f"dtype='auto' is for published checkpoints, and {text!r} is none. Expected a torch dtype or None."
        )
    if dtype is not None or place is not None:
        model.to(device=place, dtype=dtype)
    return model.eval()


def _dtype_called(name: str) -> Any:
    """torch's dtype of this name; ValueError for anything that weights are not stored in."""
    from workbench.lab.checkpoints import STORAGE_DTYPES

    if name not in STORAGE_DTYPES:
        known = ", ".join(STORAGE_DTYPES)
        raise ValueError(
            f"dtype={name!r}.{suggestion(name, STORAGE_DTYPES)} Expected 'auto' (as stored), {known}, or a torch dtype."
        )
    return STORAGE_DTYPES[name]


def _load_folder(folder: Path, dtype: Any) -> Decoder:
    from workbench.lab.checkpoints import load_config, load_weights

    record = load_config(folder)
    for key in ("architecture", "config"):
        if not isinstance(record, dict) or key not in record:
            raise ValueError(f"{folder}: config.json has no {key!r}. Expected a folder written by models.save.")
    kind = architecture(record["architecture"])
    model = kind.module(config_from_json(kind.config, record["config"]))
    model.to(dtype=dtype)  # before the weights come, so that float64 weights are not rounded on their way
    weights = load_weights(folder)
    for name, own in model.state_dict().items():
        if name in weights and weights[name].shape != own.shape:
            shape, expected = tuple(weights[name].shape), tuple(own.shape)
            raise ValueError(
                f"{folder}: weights do not fit {kind.name}: {name} is {shape}, its configuration says {expected}."
            )
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if missing or unexpected:
        raise ValueError(
            f"{folder}: weights do not fit {kind.name}: missing {missing[:3]}, unexpected {unexpected[:3]}."
        )
    card = folder / "card.json"
    model.card = json.loads(card.read_text()) if card.is_file() else {}
    return _named(model, folder.name, kind, "trained")


def _named(model: Decoder, name: str, kind: Architecture, provenance: str) -> Decoder:
    model.name, model.architecture = name, kind.name
    blocks = model_blocks(model)
    model.origin = {"family": kind.family, "paper": kind.paper, "provenance": provenance, "blocks": blocks}
    return model


__all__ = [
    "ARCHITECTURES",
    "Architecture",
    "ModelRecord",
    "UnknownModel",
    "architecture",
    "build",
    "describe",
    "list_models",
    "load",
    "register_architecture",
    "save",
    "shipped_names",
]
