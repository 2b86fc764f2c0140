"""The basket of the Intervene page: its text line by line, the form that writes a line, and what a run of it costs. No torch here.

The language is `probes.interventions`: what is written in the basket runs from a script and from `workbench intervene` as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from app.measure.common import FormError
from app.services import Scene, Services
from probes.interventions.kinds import BDH, KINDS
from probes.interventions.language import (
    InterventionError,
    Operation,
    check_tokens,
    parse,
    parse_line,
    read_span,
    written_text,
)
from probes.interventions.offers import Offer, dictionaries_below, offered_operations

MOST_PROMPTS = 64
LONG_SECONDS = 10
NUMBERS_PER_SECOND = 4e9  # multiply-adds of one thread: only a guide before a job has measured itself
SECONDS_PER_RUN = 0.01
FIELDS = (
    "place",
    "layer",
    "units",
    "name",
    "synapse",
    "neurons",
    "at",
    "queries",
    "keys",
    "after",
    "by",
    "to",
    "count",
    "sinks",
    "texts",
)
PLACED = {"place": ("place", "layer", "units"), "heads": ("layer", "units"), "gate": ("place", "layer", "units"),
          "layered": ("layer", "units"), "inner": ("layer", "units"), "tokens": ("at",), "random": ()}  # fmt: skip
SWITCHED = ("mixer_input", "query_input", "key_input", "value_input")  # behind switches that a page does not set


@dataclass(frozen=True)
class Row:
    """One line of the basket: its text, what it says, or what is wrong with it."""

    line: str
    operation: Operation | None
    problem: str = ""


def parse_basket(text: str, length: int | None = None) -> list[Operation]:
    """The operations of a basket on texts of at least `length` tokens. FormError for what is not understood."""
    try:
        return parse(text or "", length)
    except InterventionError as error:
        raise FormError(str(error)) from None


def lines_of(text: str) -> list[str]:
    """The lines that say something."""
    return [line.strip() for line in (text or "").splitlines() if line.strip()]


def texts_of(text: str) -> list[str]:
    """The prompts of a text, one a line, with their spaces."""
    return [line for line in (text or "").splitlines() if line.strip()]


def rows_of(text: str, length: int | None, offers: Mapping[str, Offer]) -> list[Row]:
    """Every line, read by itself."""
    rows = []
    for line in lines_of(text):
        try:
            operation = parse_line(line)
            if length is not None:
                check_tokens(operation, length)
            offer = offers.get(operation.kind)
            rows.append(
                Row(
                    line,
                    operation,
                    "" if offer is None or offer.offered else f"This model does not take it: {offer.reason}.",
                )
            )
        except InterventionError as error:
            rows.append(Row(line, None, str(error)))
    return rows


def moved(text: str, index: int, by: int) -> str:
    """The basket with a line moved up (−1) or down (1)."""
    lines = lines_of(text)
    if 0 <= index < len(lines) and 0 <= index + by < len(lines):
        lines[index], lines[index + by] = lines[index + by], lines[index]
    return "\n".join(lines)


def put(text: str, index: int | None, line: str | None) -> str:
    """The basket with the line at an index replaced (None: removed), or with a line more at its end (no index)."""
    lines = lines_of(text)
    if index is None or index >= len(lines):
        lines.append(line or "")
    elif line is None:
        del lines[index]
    else:
        lines[index] = line
    return "\n".join(each for each in lines if each)


def shown_fields(kind: str) -> tuple[str, ...]:
    """The inputs that a kind needs, of `FIELDS`."""
    named = [part for field in KINDS[kind].fields for part in PLACED.get(field, (field,))]
    return tuple(field for field in FIELDS if field in named)


def line_of(kind: str | None, values: Mapping[str, Any]) -> str:
    """The line that a filled-in form says. FormError names what is missing."""
    if kind not in KINDS:
        raise FormError("Choose what to do first.")
    given = {name: "" if values.get(name) is None else str(values[name]).strip() for name in FIELDS}
    operation = Operation(kind, place=_fixed_place(kind, given))
    try:
        for name in shown_fields(kind):
            text = given[name]
            if not text or name == "place" or (name == "layer" and operation.place.find("hook_") >= 0):
                continue
            operation = operation.change(**{name: _read(kind, name, text)})
    except ValueError:
        raise FormError(
            f"{name}: {text!r} is not understood. A line of this kind: {KINDS[kind].verb} {KINDS[kind].example}"
        ) from None
    return str(parse_basket(str(operation))[0])


def _fixed_place(kind: str, given: Mapping[str, str]) -> str:
    """The place that the form names; heads and layers are told apart by whether heads are given."""
    if "heads" in KINDS[kind].fields:
        return "head" if given["units"] else "layer"
    return given["place"] if "place" in shown_fields(kind) else ""


def _read(kind: str, name: str, text: str) -> Any:
    if name in ("at", "queries", "keys"):
        return read_span(",".join(text.replace(",", " ").split()))
    if name == "units":
        return tuple(int(each) for each in text.replace(",", " ").split())
    if name in ("by", "to"):
        return float(text)
    if name in ("layer", "after", "count", "sinks"):
        return int(text)
    if name == "texts":
        return parse_line(f"resample mlp 0 from: {text}").texts
    if name == "neurons":
        return tuple((int(h), int(n)) for h, _, n in (pair.partition(".") for pair in text.replace(",", " ").split()))
    if name == "synapse":
        return parse_line(f"mute {text}").synapse
    return text


def form_values(operation: Operation) -> dict[str, str]:
    """What the form's inputs hold for an operation, by field."""
    values: dict[str, str] = {}
    for name in FIELDS:
        value = getattr(operation, name)
        if name in ("at", "queries", "keys"):
            values[name] = ",".join(
                str(p) if isinstance(p, int) else f"{p[0] or ''}:{'' if p[1] is None else p[1]}" for p in value
            )
        elif name == "texts":
            values[name] = " || ".join(map(written_text, value))
        elif name == "neurons":
            values[name] = " ".join(f"{head}.{neuron}" for head, neuron in value)
        elif name == "synapse":
            values[name] = "" if value is None else "{}.{}.{}-{}.{}.{}".format(*value)
        elif isinstance(value, tuple):
            values[name] = ",".join(map(str, value))
        else:
            values[name] = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return values


def offers_of(services: Services, scene: Scene) -> dict[str, Offer]:
    """What the open run's model takes."""
    if scene.run is None:
        return {}
    points = [point for point in scene.run.manifest.get("hook_points") or [] if point["role"] not in SWITCHED]
    model = scene.run.model
    dictionaries = tuple(dictionaries_below(services.store.root, model.get("name")))
    return offered_operations(points, architecture=str(model.get("architecture")), dictionaries=dictionaries)


def prompts_of(scene: Scene) -> list[str]:
    """What is read: the address's prompts, one a line, else the open run's text. FormError for too many."""
    prompts = texts_of(scene.view.prompts)
    if len(prompts) > MOST_PROMPTS:
        raise FormError(f"{len(prompts)} prompts; expected at most {MOST_PROMPTS}, one a line.")
    return prompts or [str(scene.opened().manifest.get("text") or "")]


def seconds_of(parameters: int, tokens: int, runs: int) -> float:
    """Roughly how long `runs` runs over `tokens` tokens take on one thread."""
    return runs * (SECONDS_PER_RUN + parameters * tokens / NUMBERS_PER_SECOND)


def cost_words(parameters: int, tokens: int, runs: int) -> tuple[str, bool]:
    """(what a job costs, whether it is long), for the reader before it starts."""
    seconds = seconds_of(parameters, tokens, runs)
    about = (
        "under a second"
        if seconds < 1
        else f"about {seconds:.0f} s"
        if seconds < 90
        else f"about {seconds / 60:.0f} min"
    )
    return f"{runs:,} runs over {tokens:,} tokens, roughly {about}", seconds > LONG_SECONDS


def examples(kinds: Sequence[str]) -> list[tuple[str, str, str]]:
    """(group, example, words) of some kinds."""
    return [(KINDS[kind].group, f"{KINDS[kind].verb} {KINDS[kind].example}", KINDS[kind].words) for kind in kinds]


EXAMPLES = {kind: spec.example for kind, spec in KINDS.items() if spec.group == BDH}
