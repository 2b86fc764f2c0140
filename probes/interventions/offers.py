"""Which kinds of operation a model takes, and at which places, from the records of its hook points. No torch here.

    offered_operations([point.describe() for point in model.hook_points.points.values()], architecture="gpt2")["zero"].places

A refusal says what the model lacks. Whether single layers can do what is asked (a gate that is a constant, say) is known when it is run.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from probes.interventions.kinds import BDH, FEATURE, KINDS, PARTS, TWO_TEXTS

RECORD = "features.json"  # what a folder of `workbench features` says of its dictionary
GATES = ("decay", "write", "step", "input_gate", "forget_gate", "momentum_decay", "threshold", "gate")


@dataclass(frozen=True)
class Offer:
    """A kind that a model takes, at these places (parts first, then hook points by name); or the `reason` why it does not."""

    kind: str
    places: tuple[str, ...] = ()
    reason: str = ""

    @property
    def offered(self) -> bool:
        """Whether the model takes it."""
        return not self.reason


@dataclass(frozen=True)
class _Model:
    """Hook points that can be edited, by role."""

    points: Sequence[Mapping[str, Any]]
    architecture: str
    dictionaries: Sequence[str]

    def having(self, role: str) -> list[Mapping[str, Any]]:
        return [point for point in self.points if point["role"] == role]

    def has(self, *roles: str) -> bool:
        return any(self.having(role) for role in roles)

    def places(self, wanted: Callable[[Mapping[str, Any]], bool]) -> tuple[str, ...]:
        chosen = [point for point in self.points if wanted(point)]
        inside = [point for point in chosen if _layer_of(point) is not None]
        roles = {str(point["role"]) for point in inside}
        short = [
            part for part, names in PARTS.items() if any(name in roles for name in names) and _countable(part, inside)
        ]
        return (*short, *sorted(roles - set(short)), *(str(point["name"]) for point in chosen))


def offered_operations(
    points: Sequence[Mapping[str, Any]], *, architecture: str = "", dictionaries: Sequence[str] = ()
) -> dict[str, Offer]:
    """An `Offer` for every kind.

    Args:
        points: records of hook points with name, role, axes and editable (`HookPoint.describe`, or a run's manifest).
        architecture: its name in the registry. dictionaries: names of sparse dictionaries of this model that are at hand.
    """
    usable = [point for point in points if point.get("editable", True) and not point.get("gated", False)]
    model = _Model(usable, architecture, dictionaries)
    return {kind: _offer(kind, model) for kind in KINDS}


def why_not(kind: str, points: Sequence[Mapping[str, Any]]) -> str:
    """What a kind needs that a model with these hook points lacks, in words; "" where nothing is missing or the kind says it itself."""
    spec = KINDS[kind]
    if spec.group in (BDH, FEATURE) or "place" in spec.fields:
        return ""
    return _missing(kind, _Model([point for point in points if point.get("editable", True)], "", ()))


def _offer(kind: str, model: _Model) -> Offer:
    spec = KINDS[kind]
    if spec.group == BDH:
        return (
            Offer(kind)
            if model.architecture == "bdh"
            else Offer(kind, reason="only a BDH has synapses and neurons of this kind")
        )
    if spec.group == FEATURE:
        if not model.dictionaries:
            return Offer(
                kind,
                reason="no dictionary of sparse features of this model is stored (`workbench features` trains one)",
            )
        return Offer(kind, tuple(model.dictionaries))
    if "place" in spec.fields:
        directions = kind in TWO_TEXTS
        places = model.places(lambda point: _tokens(point) and (not directions or len(point["axes"]) == 3))
        return (
            Offer(kind, places) if places else Offer(kind, reason="no hook point with an axis of tokens can be edited")
        )
    missing = _missing(kind, model)
    if missing:
        return Offer(kind, reason=missing)
    if "heads" in spec.fields:
        return Offer(kind, ("head", "layer"))
    return Offer(kind, tuple(role for role in GATES if model.has(role)) if "gate" in spec.fields else ())


def _missing(kind: str, model: _Model) -> str:
    """What a kind needs that the model lacks; nothing if it has it."""
    state = (
        "no layer carries a recurrent state; softmax attention keeps keys and values instead"
        if not model.has("state")
        else ""
    )
    instead = "; `cut` takes edges out of any pattern" if model.has("pattern") else ""
    if kind == "cut":
        return "" if model.has("pattern") else "no layer has a pattern whose edges are weights"
    if kind == "calibrate":
        return (
            "" if model.has("scores") else f"no layer's rows are distributions, so there are no shares to move{instead}"
        )
    if kind in ("keep", "window", "star", "separate", "stream"):
        known = model.has("scores" if kind == "keep" else "mask")
        return "" if known else f"no layer has scores that a softmax follows{instead}"
    if kind == "base":
        return "" if model.has("mask") and model.has("rotated_query") else "no layer of attention has rotary positions"
    if kind == "renumber":
        known = model.has("mask") and model.has("rotated_query", "position_bias", "pos_embed")
        return "" if known else "no layer of attention has positions that could be others"
    if kind == "hold":
        return "" if model.has(*GATES) else "no layer has a gate that depends on the token"
    if kind == "levels":
        return "" if model.has("level") else "no layer reads its state in levels"
    if kind in ("forget", "implant"):
        missing = [name for name in ("key", "value") if not model.has(name)]
        return state or (f"no memory is asked with a key: tokens have no {missing[0]}" if missing else "")
    if kind == "modes":
        return state or (
            "" if model.has("query") and model.has("key") else "no layer has a matrix state that queries read"
        )
    return state


def _layer_of(point: Mapping[str, Any]) -> int | None:
    found = re.match(r"blocks\.(\d+)\.", str(point["name"]))
    return int(found[1]) if found else None


def _tokens(point: Mapping[str, Any]) -> bool:
    return "pos" in point["axes"] and point["role"] != "logits"


def _countable(part: str, points: Sequence[Mapping[str, Any]]) -> bool:
    """Heads are offered only where they have an axis of their own."""
    return part != "head" or any(point["role"] == "z" and "head" in point["axes"] for point in points)


def dictionaries_below(root: str | Path, model: str | None = None) -> dict[str, Path]:
    """Folders of dictionaries right below a folder, by name; of one model, if it is named."""
    found = {}
    for record in sorted(Path(root).glob(f"*/{RECORD}")):
        try:
            made_of = json.loads(record.read_text(encoding="utf-8")).get("model")
        except (OSError, ValueError, AttributeError):
            continue
        if not record.parent.name.startswith(".") and model in (None, made_of):
            found[record.parent.name] = record.parent
    return found
