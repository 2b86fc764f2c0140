"""The interventions basket as text: one edit of a BDH's memory a line, parsed without torch, each with its matched random twin.

ablate and clamp set a synapse once a token is read, copy sets it to its value at the end of another text, mute leaves it out of the whole
run; neurons silences neurons (head.neuron); freeze stores nothing new from a token on; block keeps tokens from reading; scale lets a
layer's state decay (0 resets it); state gives a layer the state that another text leaves. `EXAMPLES` has one line of each.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace

from app.measure.common import FormError
from app.view_state import SynapseAddress, ViewState
from workbench.instrument.errors import suggestion

SYNAPSE, AFTER, NUMBER = r"(?P<synapse>\S+)", r"after (?P<after>\d{1,7})", r"(?P<value>-?\d+(?:\.\d+)?)"
FORMS = {
    "ablate": rf"{SYNAPSE} {AFTER}", "clamp": rf"{SYNAPSE} to {NUMBER} {AFTER}", "copy": rf"{SYNAPSE} {AFTER} from: (?P<text>.+)",
    "mute": SYNAPSE, "neurons": r"(?P<neurons>\d+\.\d+(?: \d+\.\d+)*)", "freeze": r"since (?P<after>\d{1,7})",
    "block": r"(?P<positions>\d{1,7}(?: \d{1,7})*)", "scale": rf"layer (?P<layer>\d{{1,3}}) by {NUMBER} {AFTER}",
    "state": rf"layer (?P<layer>\d{{1,3}}) {AFTER} from: (?P<text>.+)",
}  # fmt: skip
EXAMPLES = {
    "ablate": "1.0.210-2.2.190 after 40", "clamp": "1.0.210-2.2.190 to 3.0 after 40", "copy": "1.0.210-2.2.190 after 40 from: text",
    "mute": "1.0.210-2.2.190", "neurons": "0.3 1.7", "freeze": "since 40", "block": "50 51", "scale": "layer 1 by 0.5 after 40",
    "state": "layer 1 after 40 from: text",
}  # fmt: skip
OF_SYNAPSES = ("ablate", "clamp", "copy", "mute")
MOST_LINES = 12


@dataclass(frozen=True)
class Edit:
    """One line of the basket. Fields that its kind does not have keep their defaults."""

    kind: str
    synapse: SynapseAddress | None = None
    after: int = 0
    value: float = 0.0
    layer: int = 0
    neurons: tuple[tuple[int, int], ...] = ()
    positions: tuple[int, ...] = ()
    text: str = ""


def parse_basket(text: str, length: int) -> list[Edit]:
    """The edits of a text of `length` tokens. FormError names the line, what was expected and the nearest known word."""
    lines = [" ".join(line.split()) for line in (text or "").splitlines() if line.strip()]
    if not 1 <= len(lines) <= MOST_LINES:
        raise FormError(f"The basket has {len(lines)} edits; expected 1 to {MOST_LINES}, one a line.")
    return [_parse(line, length) for line in lines]


def _parse(line: str, length: int) -> Edit:
    kind, _, rest = line.partition(" ")
    if kind not in FORMS:
        raise FormError(
            f"{line!r}: no edit is called {kind!r}.{suggestion(kind, FORMS)} Expected one of {', '.join(FORMS)}."
        )
    found = re.fullmatch(FORMS[kind], rest)
    if found is None:
        raise FormError(f"{line!r} is not understood. Expected for example: {kind} {EXAMPLES[kind]}")
    given = {name: value for name, value in found.groupdict().items() if value is not None}
    edit = Edit(kind, after=int(given.get("after", 0)), value=float(given.get("value", 0)), layer=int(given.get("layer", 0)),
                text=given.get("text", ""), positions=tuple(map(int, given.get("positions", "").split())))  # fmt: skip
    if "synapse" in given:
        synapses = ViewState.from_url("/", f"syn={given['synapse']}").synapses
        if len(synapses) != 1:
            raise FormError(f"{line!r}: {given['synapse']!r} is no synapse. Expected layer.head.neuron-layer.head.neuron, such as "
                            "1.0.210-2.2.190, from a lower to a higher layer.")  # fmt: skip
        edit = replace(edit, synapse=synapses[0])
    pairs = [pair.split(".") for pair in given.get("neurons", "").split()]
    edit = replace(edit, neurons=tuple((int(head), int(neuron)) for head, neuron in pairs))
    late = [at for at in (edit.after, *edit.positions) if at >= length - 1]
    if late:
        raise FormError(
            f"{line!r}: token {late[0]} is too late: the text has {length} tokens, and only later ones show an effect."
        )
    return edit


def random_twin(edit: Edit, length: int, draw: random.Random, activity: dict[tuple[int, int], float]) -> Edit:
    """An edit of the same kind that means nothing: other tokens, a shuffled source text, or other neurons of about the same activity.

    `activity`: mean x of every neuron (head, neuron). Twins of synapses are chosen where the model is (`probes.bdh.concepts_causal`).
    """
    if edit.kind == "neurons":
        used, twins = set(edit.neurons), []
        for neuron in edit.neurons:
            near = sorted(
                (abs(size - activity[neuron]), other)
                for other, size in activity.items()
                if other[0] == neuron[0] and other not in used
            )
            twins.append(draw.choice(near[: max(8, len(near) // 32)])[1])
            used.add(twins[-1])
        return replace(edit, neurons=tuple(twins))
    if edit.kind == "block":
        return replace(edit, positions=tuple(draw.sample(range(1, length - 1), len(edit.positions))))
    if edit.kind == "state":
        letters = list(edit.text)
        draw.shuffle(letters)
        return replace(edit, text="".join(letters))
    return replace(edit, after=draw.randrange(1, length - 1))
