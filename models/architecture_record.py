"""What an architecture is to the registry: a name, a paper, a configuration class and presets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from models.decoder import Decoder


@dataclass(frozen=True)
class Architecture:
    """How to build one architecture.

    Args:
        name: unique, lower case. title: for people. paper: slug of the catalogue (None for a family without a paper of its own).
        family: `"attention"`, `"state-space"`, `"linear-attention"`, `"bdh"`, ...
        config: configuration class. module: model class. presets: named configurations; `"tiny"` is the one the consistency suite runs.
        fidelity: `"faithful"` (tested against the published equations or code) or `"reconstructed"`.
        shows: what it can show: `"pattern"`, `"state"`, `"neurons"`, ...
        refused: settings of the published model that are left out, each with a sentence that says why, and what to use instead.
    """

    name: str
    title: str
    paper: str | None
    family: str
    config: type
    module: Callable[[Any], Decoder]
    presets: dict[str, Any]
    description: str
    shows: tuple[str, ...] = ("pattern",)
    fidelity: str = "faithful"
    notes: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)


ARCHITECTURES: dict[str, Architecture] = {}
ENCODERS: dict[str, Architecture] = {}  # found by name, but not among the models that continue a text by itself


class UnknownModel(ValueError):
    """A model or architecture name that does not exist; the message holds the nearest one."""


def register_architecture(architecture: Architecture) -> Architecture:
    """Add to the registry. Refuses a name twice and an architecture without a `"tiny"` preset (the consistency suite needs it)."""
    if architecture.name in ARCHITECTURES:
        raise ValueError(f"An architecture named {architecture.name!r} is registered already.")
    if "tiny" not in architecture.presets:
        raise ValueError(f"{architecture.name!r} has no 'tiny' preset; the consistency suite needs one.")
    ARCHITECTURES[architecture.name] = architecture
    return architecture


def register_encoder(architecture: Architecture) -> Architecture:
    """Add an architecture that reads texts as a whole, or a source besides the text: it can be built, saved and opened, and is not listed
    among language models."""
    if architecture.name in (*ARCHITECTURES, *ENCODERS):
        raise ValueError(f"An architecture named {architecture.name!r} is registered already.")
    ENCODERS[architecture.name] = architecture
    return architecture
