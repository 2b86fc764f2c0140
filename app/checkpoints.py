"""Published checkpoints in the dashboard: the folders under the models root, and hub ids that a reader types.

What comes from the browser is never a path: it is the name of a folder that was found under the root, or an id on the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

DTYPES = (("float32", "32 bit (float32)"), ("auto", "as stored"))
TRACED = 1_000
"""Tokens of the text that estimates of memory are given for."""


class Checkpoints:
    """Checkpoints by name. `root` defaults to `$WORKBENCH_MODELS`.

    `opened` maps the hub ids that were opened here to what is known of them.
    """

    def __init__(self, root: Path | None = None) -> None:
        from models.pretrained.folders import root as usual

        self.root = root if root is not None else usual()
        self.opened: dict[str, dict[str, Any]] = {}

    def folders(self) -> dict[str, Path]:
        """Model folders under the root by name."""
        from models.pretrained.folders import folders_under

        return {} if self.root is None or not self.root.is_dir() else folders_under(self.root)

    def knows(self, name: str) -> bool:
        """Whether `name` can be opened without asking anyone: a folder under the root, or a hub id whose files are here."""
        from models.pretrained.hub import cached, hub_id

        if name in self.folders() or name in self.opened:
            return True
        identity = hub_id(name)
        return identity is not None and cached(identity) is not None

    def may_be_opened(self, name: str) -> bool:
        """Whether `name` is a folder under the root or reads like a hub id."""
        from models.pretrained.hub import hub_id

        return name in self.folders() or hub_id(name) is not None

    def listed(self) -> list[dict[str, Any]]:
        """The folders under the root, and the hub ids that were opened, as entries of the list of models."""
        entries = [folder_entry(name, path) for name, path in self.folders().items()]
        return [*entries, *(entry for name, entry in self.opened.items() if name not in self.folders())]

    def look_up(self, name: str, dtype: str = "float32") -> dict[str, Any]:
        """What opening a checkpoint would take, in words too; see `models.pretrained.outlook`.

        Raises:
            ValueError: nothing of this name, or the hub cannot be asked; the message says what to do.
        """
        from models.pretrained.folders import free_memory
        from models.pretrained.hub import hub_id
        from models.pretrained.outlook import outlook_of
        from workbench.lab.checkpoints import CheckpointError

        name = name.strip()
        folder = self.folders().get(name)
        if folder is None and hub_id(name) is None:
            where = (
                f"a folder under {self.root}"
                if self.root
                else "a folder (start with `workbench serve --models FOLDER` to offer some)"
            )
            raise ValueError(f"{name!r} is neither {where} nor a hub id such as openai-community/gpt2.")
        try:
            known = outlook_of(name, folder, dtype=dtype)
        except CheckpointError as error:
            if folder is not None:
                raise
            where = f"{self.root}" if self.root else "the folder that `workbench serve --models FOLDER` names"
            raise CheckpointError(f"{error} For this page: put it under {where}.") from error
        free, needed = free_memory(), None
        if known.load_bytes is not None:
            needed = int(1.15 * known.load_bytes) + TRACED * (known.trace_bytes_per_token or 0)
        tight = free is not None and needed is not None and needed > 0.6 * free
        return {**known.to_json(), "free_bytes": free, "needed_bytes": needed, "tight": tight}

    def open(self, name: str, dtype: str, progress: Callable[[float, str], None] | None) -> Any:
        """Open a checkpoint, downloading it if it has to be. Raises ValueError in words for the reader."""
        from models.pretrained.hub import hub_id, snapshot
        from models.registry import load

        report = progress or (lambda fraction, words: None)
        folder = self.folders().get(name)
        identity = None if folder is not None else hub_id(name)
        if folder is None:
            if identity is None:
                raise ValueError(f"There is no model {name!r}.")
            folder = snapshot(identity, progress=lambda fraction, words: report(0.8 * fraction, words))
        model = load(
            folder, dtype="auto" if dtype == "auto" else None, progress=lambda f, words: report(0.8 + 0.2 * f, words)
        )
        model.name = name
        if identity is not None:
            self.opened[name] = entry_of(model)
        return model


def folder_entry(name: str, folder: Path) -> dict[str, Any]:
    """A folder under the root in the list of models, from its small files alone."""
    from workbench.lab.checkpoints import CheckpointError, read_json

    try:
        config = read_json(folder / "config.json")
        card = read_json(folder / "card.json") if (folder / "card.json").is_file() else {}
        if not (isinstance(config, dict) and isinstance(card, dict)):
            raise CheckpointError(f"{folder} has settings that are no object.")
    except CheckpointError as error:
        config, card = {}, {"description": str(error)}
    kind = config.get("architecture") or config.get("model_type") or "unknown"
    return {
        "name": name, "title": f"{card.get('title') or name} (folder)", "architecture": kind, "family": card.get("family"),
        "parameters": card.get("parameters"), "provenance": "pretrained" if "model_type" in config else "trained",
        "description": card.get("description") or f"A model folder under the models root, of type {kind}.", "card": None,
    }  # fmt: skip


def entry_of(model: Any) -> dict[str, Any]:
    """A checkpoint that was opened, in the list of models."""
    licence = model.card.get("licence") or "no licence stated"
    return {
        "name": model.name, "title": model.name, "architecture": model.architecture, "family": model.origin.get("family"),
        "parameters": model.n_parameters(), "provenance": "pretrained",
        "description": f"A published {model.card.get('model_type')} checkpoint ({licence}).", "card": None,
    }  # fmt: skip


def in_words(known: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What `look_up` found as (name, words), for a list of facts."""
    from app.commands._console import readable_bytes

    def size(number: int | None) -> str:
        return "not known" if number is None else readable_bytes(number)

    place = {"folder": "a folder here", "cache": "downloaded before", "hub": "on the hub"}[known["place"]]
    parameters = "not known" if known["parameters"] is None else f"{known['parameters']:,}"
    return [
        ("type", f"{known['model_type']}, opens as {known['architecture']}" if known["architecture"] else known["model_type"]),
        ("where", place + (f", {size(known['download_bytes'])} to download" if known["download_bytes"] else "")),
        ("parameters", f"{parameters}, stored as {', '.join(known['stored_dtypes'])}"),
        ("licence", known["licence"] or "not stated"),
        *([("output", known["gives"])] if known["gives"] else []),
        ("memory", f"about {size(known['needed_bytes'])} with a trace of {TRACED:,} tokens; {size(known['free_bytes'])} are free"),
    ]  # fmt: skip
