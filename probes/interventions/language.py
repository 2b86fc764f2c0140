"""Interventions as text, one a line: what every line may say, how it is read, written, and turned into JSON. No torch here.

    zero head 1.3                                           layer 1, head 3
    scale mlp 2 by 0.5 at 10:20                             only tokens 10 to 19
    patch resid 2 at -1 from: Paris is the capital of       the last token's stream as in another text of the same length
    steer resid_post 1 by 4 from: I love it || I hate it    the difference of two texts' means, four times

`KINDS` is the whole language. A template names the fields of a kind in braces; brackets hold what may be left out. Parser, writer, forms
and guides all follow from it, so a new kind is one entry there and one function in `executor`.

Texts stand as they are, or in quotes with the escapes of JSON where spaces at an end, a new line or `||` matter.

A *place* is a part and a layer (`mlp 2`, `resid 0`, `key 1`), with heads or neurons behind a point (`head 1.3,5`), or a hook point by its
name (`blocks.1.attn.hook_k:0,2`). Tokens are counted from 0, from the end if negative; `3:10` is 3 to 9.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from probes.interventions.kinds import KINDS, ONE_TEXT, TWO_TEXTS
from workbench.instrument.errors import suggestion

MOST_LINES = 12
Span = tuple[int | tuple[int, int | None], ...]  # single tokens and half-open stretches
SynapseAddress = tuple[int, int, int, int, int, int]  # source layer, head, neuron; target layer, head, neuron


class InterventionError(ValueError):
    """A line that says nothing that can be done; the message names it, what was expected, and the nearest right word."""


@dataclass(frozen=True)
class Operation:
    """One intervention. Fields that its kind does not have keep their defaults.

    Args:
        kind: a key of `KINDS`. place: a part (`"head"`, `"mlp"`, a role) or the name of a hook point. layer: of a part.
        units: heads or neurons. at: tokens. after: the token after which a state is changed.
        by, to: a factor or coefficient; a value. texts: where values or directions come from.
        name: of a dictionary of features. random: the number of a random direction that takes the true one's place.
    """

    kind: str
    place: str = ""
    layer: int | None = None
    units: tuple[int, ...] = ()
    at: Span = ()
    queries: Span = ()
    keys: Span = ()
    after: int | None = None
    by: float | None = None
    to: float | None = None
    count: int | None = None
    sinks: int | None = None
    texts: tuple[str, ...] = ()
    name: str = ""
    synapse: SynapseAddress | None = None
    neurons: tuple[tuple[int, int], ...] = ()
    random: int | None = None

    def __str__(self) -> str:
        """The line that says it."""
        spec = KINDS[self.kind]
        parts = _OPTIONAL.split(spec.template)  # outside and inside brackets by turns
        return "".join(_fill(part, self) for at, part in enumerate(parts) if at % 2 == 0 or _given(part, self))

    def to_json(self) -> dict[str, Any]:
        """Plain data: the kind and the fields that it has."""
        given = {
            each.name: getattr(self, each.name) for each in fields(self) if getattr(self, each.name) != each.default
        }
        return {"line": str(self), **_plain(given)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Operation":
        """Back from `to_json`; a record of `line` alone is read like typed text. InterventionError for other data."""
        known = {"line", *(each.name for each in fields(cls))}
        for name in record:
            if name not in known:
                raise InterventionError(f"An operation has no field {name!r}.{suggestion(name, known)}")
        values = {name: _frozen(value) for name, value in record.items() if name != "line"}
        if "kind" in values and values["kind"] not in KINDS:
            raise InterventionError(f"No kind is called {values['kind']!r}.{suggestion(str(values['kind']), KINDS)}")
        if "line" not in record and "kind" not in record:
            raise InterventionError(f"An operation needs a line or a kind; got {sorted(record)}.")
        operation = parse_line(str(record["line"]) if "line" in record else str(cls(**values)))
        if values and operation != cls(**{"kind": operation.kind, **values}):
            raise InterventionError(f"The record of {str(operation)!r} contradicts its line: its fields say {values}.")
        return operation

    def change(self, **values: Any) -> "Operation":
        """A copy with some fields replaced."""
        return replace(self, **values)


_OPTIONAL = re.compile(r"\[(.*?)\]")
_NUMBERS, _NUMBER = r"\d{1,7}(?:,\d{1,7})*", r"[+-]?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?"
_SPAN = r"(?:-?\d{1,7}|-?\d{0,7}:-?\d{0,7})(?:,(?:-?\d{1,7}|-?\d{0,7}:-?\d{0,7}))*"
_PLACE = rf"(?:[a-z_]+ \d{{1,4}}(?:\.{_NUMBERS})?|(?=\S*hook_)[a-zA-Z_]\w*(?:\.\w+)*(?::{_NUMBERS})?)"
_HEADS = rf"(?:(?:head|layer) \d{{1,4}}(?:\.{_NUMBERS})?)"
_PATTERNS = {
    "place": _PLACE, "heads": _HEADS, "gate": rf"[a-z_]+ \d{{1,4}}(?:\.{_NUMBERS})?", "layered": rf"\d{{1,4}}(?:\.{_NUMBERS})?",
    "inner": rf"\d{{1,4}}\.{_NUMBERS}", "at": _SPAN, "queries": _SPAN, "keys": _SPAN, "after": r"-?\d{1,7}", "by": _NUMBER, "to": _NUMBER,
    "count": r"\d{1,7}", "sinks": r"\d{1,7}", "random": r"\d{1,9}", "units": _NUMBERS, "texts": r".+", "name": r"[\w.-]+",
    "synapse": r"\S+", "neurons": r"\d+\.\d+(?: \d+\.\d+)*", "tokens": r"\d{1,7}(?: \d{1,7})*",
}  # fmt: skip


def parse(text: str | Sequence[str | Operation], length: int | None = None) -> list[Operation]:
    """The operations of a text (one a line) or a list of lines.

    Args:
        length: tokens of the shortest prompt, if known: a change after its last token but one could show nothing, and is refused.

    Raises:
        InterventionError: an unknown verb, a line of another form, no line or too many, or a token that is too late.
    """
    given: Sequence[str | Operation] = text.splitlines() if isinstance(text, str) else text
    lines = [line for line in given if isinstance(line, Operation) or line.strip()]
    if not 1 <= len(lines) <= MOST_LINES:
        raise InterventionError(f"The basket has {len(lines)} edits; expected 1 to {MOST_LINES}, one a line.")
    operations = [line if isinstance(line, Operation) else parse_line(line) for line in lines]
    for operation in operations:
        if length is not None:
            check_tokens(operation, length)
    return operations


def parse_line(line: str) -> Operation:
    """One line. InterventionError says what was expected."""
    head, mark, tail = line.strip().partition("from:")
    line = " ".join(head.split()) + (f" {mark} {tail.strip()}" if mark else "")
    verb = line.partition(" ")[0]
    kinds = {name: kind for name, kind in KINDS.items() if kind.verb == verb}
    if not kinds:
        verbs = list(dict.fromkeys(kind.verb for kind in KINDS.values()))
        raise InterventionError(
            f"{line!r}: no edit is called {verb!r}.{suggestion(verb, verbs)} Expected one of {', '.join(verbs)}."
        )
    for name, kind in sorted(kinds.items(), key=lambda each: len(each[1].required), reverse=True):
        found = re.fullmatch(_regex(kind.template), line)
        if found is not None:
            values = {key: value for key, value in found.groupdict().items() if value is not None}
            return _checked(Operation(name, **_read(values, line)), line)
    examples = "; or ".join(f"{kind.verb} {kind.example}" for kind in kinds.values())
    raise InterventionError(f"{line!r} is not understood. Expected for example: {examples}")


def check_tokens(operation: Operation, length: int) -> None:
    """InterventionError for tokens that a text of `length` tokens does not have, or after which nothing could change."""
    late = [operation.after] if operation.after is not None else []
    if operation.kind == "block":
        late += [at for at in operation.at if isinstance(at, int)]
    for at in late:
        if not -length <= at < length - 1 or at == -1:
            raise InterventionError(
                f"{str(operation)!r}: token {at} is too late: the text has {length} tokens, and only later ones show an effect."
            )
    for name in ("at", "queries", "keys"):
        tokens_of(getattr(operation, name), length, f"{str(operation)!r}")


def tokens_of(span: Span, length: int, what: str) -> list[int]:
    """The tokens of a span in a text of `length` tokens, ascending. InterventionError, beginning with `what`, for those it lacks."""
    found: set[int] = set()
    for part in span:
        if isinstance(part, int):
            if not -length <= part < length:
                raise InterventionError(f"{what}: there is no token {part}: the text has {length} tokens.")
            found.add(part % length)
            continue
        start, stop, _ = slice(*part).indices(length)
        if start >= stop:
            raise InterventionError(f"{what}: {_written_span((part,))} holds none of the text's {length} tokens.")
        found.update(range(start, stop))
    return sorted(found)


def in_python(model: str, operations: Sequence[Operation], text: str) -> str:
    """Python that runs the operations on a text."""
    lines = "\n".join(map(str, operations)).replace("\\", "\\\\").replace('"""', '\\"\\"\\"')
    return (
        "import models\nfrom probes.interventions import intervene\n\n"
        f'effects = intervene(models.load({model!r}), {text!r}, """\n{lines}\n""")\nprint(effects)\n'
    )


# ------------------------------------------------------------------------------------------------------ reading, writing


def _regex(template: str) -> str:
    """The template as a regular expression with a group per field."""
    parts = re.split(r"(\[|\]|{\w+})", template)
    made = []
    for part in parts:
        if part in ("[", "]"):
            made.append("(?:" if part == "[" else ")?")
        elif part.startswith("{"):
            made.append(f"(?P<{part[1:-1]}>{_PATTERNS[part[1:-1]]})")
        else:
            made.append(re.escape(part))
    return "".join(made)


def _read(values: dict[str, str], line: str) -> dict[str, Any]:
    """Field texts as an operation's fields."""
    read: dict[str, Any] = {}
    for name, text in values.items():
        if name in ("place", "heads", "gate", "layered", "inner"):
            read |= _read_place(text)
        elif name == "tokens":
            read["at"] = tuple(map(int, text.split()))
        elif name in ("at", "queries", "keys"):
            read[name] = read_span(text)
        elif name in ("by", "to"):
            read[name] = float(text)
        elif name in ("after", "count", "sinks", "random"):
            read[name] = int(text)
        elif name == "units":
            read[name] = tuple(map(int, text.split(",")))
        elif name == "texts":
            read[name] = _read_texts(text, line)
        elif name == "neurons":
            read[name] = tuple((int(h), int(n)) for h, _, n in (pair.partition(".") for pair in text.split()))
        elif name == "synapse":
            read[name] = _read_synapse(text, line)
        else:
            read[name] = text
    return read


def read_span(text: str) -> Span:
    """`"4,8:10,-1"` as (4, (8, 10), -1)."""
    parts: list[int | tuple[int, int | None]] = []
    for part in text.split(","):
        first, colon, last = part.partition(":")
        parts.append((int(first or 0), int(last) if last else None) if colon else int(first))
    return tuple(parts)


_TEXT = re.compile(r'\s*(?:("(?:[^"\\]|\\.)*")|((?:(?!\|\|).)*?))\s*(?:\|\||$)', re.DOTALL)


def written_text(text: str) -> str:
    """A text as a line has it: in quotes, with the escapes of JSON, where it would be read as another one otherwise."""
    plain = text == text.strip() and not text.startswith('"') and "||" not in text and "\n" not in text
    return text if plain else json.dumps(text, ensure_ascii=False)


def _read_texts(text: str, line: str) -> tuple[str, ...]:
    """Texts between `||`, each as it stands or in quotes."""
    found, at = [], 0
    while at < len(text) or text[:at].endswith("||"):
        part = _TEXT.match(text, at)
        assert part is not None  # the second alternative matches anything
        try:
            found.append(str(json.loads(part[1])) if part[1] is not None else part[2])
        except ValueError:
            raise InterventionError(
                f'{line!r}: {part[1]} is no text in quotes; write \\" for a quote and \\n for a new line.'
            ) from None
        if part.end() == at:
            break
        at = part.end()
    return tuple(found)


def _read_place(text: str) -> dict[str, Any]:
    found = re.fullmatch(rf"(?:(?P<part>[a-z_]+) )?(?P<layer>\d+)(?:\.(?P<units>{_NUMBERS}))?", text)
    if found is None:
        name, _, units = text.partition(":")
        return {"place": name, "units": tuple(map(int, units.split(","))) if units else ()}
    units = found["units"]
    return {
        "place": found["part"] or "",
        "layer": int(found["layer"]),
        "units": tuple(map(int, units.split(","))) if units else (),
    }


def _read_synapse(text: str, line: str) -> SynapseAddress:
    numbers = re.fullmatch(r"(\d+)\.(\d+)\.(\d+)-(\d+)\.(\d+)\.(\d+)", text)
    if numbers is None or int(numbers[1]) >= int(numbers[4]):
        raise InterventionError(
            f"{line!r}: {text!r} is no synapse. Expected layer.head.neuron-layer.head.neuron, such as 1.0.210-2.2.190, from a lower to "
            "a higher layer."
        )
    one, two, three, four, five, six = map(int, numbers.groups())
    return one, two, three, four, five, six


def _checked(operation: Operation, line: str) -> Operation:
    """What no template says: how many texts, and that heads and neurons are named."""
    count = len(operation.texts)
    if any(not text for text in operation.texts):
        raise InterventionError(f"{line!r}: one of its texts is empty.")
    if operation.kind in TWO_TEXTS and count != 2:
        raise InterventionError(
            f"{line!r} needs two texts, the direction from the second to the first; write from: one || other."
        )
    if operation.kind in ONE_TEXT and count != 1:
        raise InterventionError(f"{line!r} takes one text, got {count}.")
    if operation.place in ("head", "neuron") and operation.kind in KINDS and not operation.units:
        raise InterventionError(
            f"{line!r} names no {operation.place}. Write for example {operation.place} {operation.layer}.0"
        )
    return operation


def _given(part: str, operation: Operation) -> bool:
    """Whether the fields of an optional part are set."""
    return all(_field_text(name, operation) for name in re.findall(r"{(\w+)}", part))


def _fill(part: str, operation: Operation) -> str:
    return re.sub(r"{(\w+)}", lambda found: _field_text(found[1], operation), part)


def _field_text(name: str, operation: Operation) -> str:
    if name in ("place", "heads", "gate", "layered", "inner"):
        units = ",".join(map(str, operation.units))
        if operation.layer is None:
            return operation.place + (f":{units}" if units else "")
        part = f"{operation.place} " if operation.place else ""
        return f"{part}{operation.layer}" + (f".{units}" if units else "")
    if name == "tokens":
        return " ".join(map(str, operation.at))
    value = getattr(operation, name)
    if value is None or value == () or value == "":
        return ""
    if name in ("at", "queries", "keys"):
        return _written_span(value)
    if name in ("by", "to"):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if name == "texts":
        return " || ".join(map(written_text, value))
    if name == "neurons":
        return " ".join(f"{head}.{neuron}" for head, neuron in value)
    if name == "synapse":
        return "{}.{}.{}-{}.{}.{}".format(*value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _written_span(span: Span) -> str:
    return ",".join(str(p) if isinstance(p, int) else f"{p[0] or ''}:{'' if p[1] is None else p[1]}" for p in span)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
