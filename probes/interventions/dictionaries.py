"""Sparse dictionaries that operations name: the folders that `workbench features` writes."""

import json
from pathlib import Path
from typing import Any

from probes.features.training import load_dictionary
from probes.interventions.language import InterventionError
from probes.interventions.offers import RECORD


def open_dictionary(folder: str | Path) -> tuple[Any, str, int | None]:
    """(dictionary, hook point, head) of a folder that `find_features` wrote.

    Raises:
        InterventionError: no such folder, or one without a record of its site. CheckpointError: a broken dictionary.
    """
    folder = Path(folder)
    try:
        site = str(json.loads((folder / RECORD).read_text(encoding="utf-8"))["site"])
    except (OSError, ValueError, KeyError, TypeError):
        raise InterventionError(
            f"{str(folder)!r} is no folder of `workbench features`: it has no {RECORD} that names a site."
        ) from None
    point, _, head = site.partition(":")
    return load_dictionary(folder / "dictionary").double(), point, int(head) if head else None
