"""What a model carries from segment to segment of a text, and what it is worth.

    found = segment_memory(model, text, 64, other="Another text …")
    found.worth("none"), found.worth("other")     nats per token that the state saves, against no state and against another text's
    found.by_segment("none"), found.by_place("none")      the same by segment, and by place in the segment: how far the memory reaches
    found.by_layer("cut")                         nats lost in each segment when one layer is handed nothing, [layer, segment]
    found.norm, found.change                      every tensor of the state, at every boundary

A text is read in segments of so many tokens by any model that hands on a state: recurrent layers, memories, caches of keys and values.
Every segment but the first is then read again from other states:

* none: the segment by itself, from its own first token on. Positions begin at 0, as in any text; with positions that only count distances
  this is exactly "nothing is remembered", with learned ones the same tokens are also at other places.
* other: the state of another text after as many tokens.
* cut, by layer: one layer is handed nothing (`ModelState.without`), all others what they are. It reads the segment alone, at its positions.
* other, by layer and by slot: one layer's part of the state, or one tensor of it, is the other text's.

The first token of a segment is predicted before the state is handed on, so it does not count. A model that cuts texts into segments of
its own (Infini-attention, Transformer-XL) begins a new one where it is handed nothing: read it in multiples of them.
"""

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.decoder import next_token_loss
from models.segments import in_segments
from probes.intervals import Interval, mean_interval
from probes.progress import Progress, Report
from probes.sinks import plain
from workbench.instrument.errors import suggestion
from workbench.instrument.states import ModelState
from workbench.lab.runs import Run, RunStore

KIND = "segment-memory"
MEASURES = ("numbers", "bytes", "norm", "change", "cosine")
"""What is measured of every tensor of the state at every boundary."""
Array = NDArray[np.float64]
Reading = tuple[str, int]
"""What a segment was read from, and the index of the layer or slot that this is about (else 0)."""


@dataclass(frozen=True)
class SegmentMemory:
    """Result of `segment_memory`. Losses are in nats, nan where a token is not predicted from a state: in the first place of each segment,
    behind the end of a short last one and, but for `loss["state"]`, in the first segment.

    Args:
        length: tokens of a segment. tokens: ids that were read. starts: where segments begin. repeated: how often the other text was begun.
        layers: names of the layers that carry something, in the order of the state ("2", or "2@1" for the second pass over layer 2).
        slots: (index into `layers`, name) of every tensor of the state.
        loss: "state", "none" and, with another text, "other", each [segment, place].
        layer_loss: "cut" and "other", each [layer, segment, place]. slot_loss: "other", [slot, segment, place]. Empty unless asked for.
        numbers, bytes, norm: size and L2 norm of what each segment is handed, [slot, segment]. change, cosine: against what the segment
            before was handed, ‖now − then‖ / ‖then‖ and the cosine; of a tensor that grew, the part that was there. nan beside nothing or
            zeros.
    """

    length: int
    tokens: tuple[int, ...]
    starts: tuple[int, ...]
    repeated: int
    layers: tuple[str, ...]
    slots: tuple[tuple[int, str], ...]
    loss: dict[str, Array]
    layer_loss: dict[str, Array]
    slot_loss: dict[str, Array]
    numbers: Array
    bytes: Array
    norm: Array
    change: Array
    cosine: Array

    @property
    def slot_names(self) -> tuple[str, ...]:
        """`layer.slot` of every tensor of the state."""
        return tuple(f"{self.layers[layer]}.{name}" for layer, name in self.slots)

    def mean_loss(self, reading: str) -> Array:
        """Nats per token in each segment, read from the true "state", "none" or the "other" text's, [segment]."""
        return _mean(_known(self.loss, reading), 1)

    def lost(self, reading: str) -> Array:
        """Nats lost on every token when a segment is read from another state: "none" or "other", [segment, place]."""
        return np.asarray(_known(self.loss, reading) - self.loss["state"])

    def by_segment(self, reading: str) -> Array:
        """The same, mean over the places of each segment, [segment]."""
        return _mean(self.lost(reading), 1)

    def by_place(self, reading: str) -> Array:
        """The same, mean over segments, [place]."""
        return _mean(self.lost(reading), 0)

    def by_layer(self, reading: str) -> Array:
        """Nats per token lost in each segment when one layer is "cut", or given the "other" text's state, [layer, segment]."""
        return _mean(_known(self.layer_loss, reading) - self.loss["state"], 2)

    def by_slot(self, reading: str = "other") -> Array:
        """Nats per token lost in each segment when one tensor of the state is the other text's, [slot, segment]."""
        return _mean(_known(self.slot_loss, reading) - self.loss["state"], 2)

    def worth(self, reading: str) -> tuple[float, Interval]:
        """Nats per token that the state saves in the segments that are handed one, against "none" or "other", with a bootstrap interval
        over segments (of two segments, which have one boundary, it is a point)."""
        lost = self.lost(reading)
        segment, place = np.nonzero(np.isfinite(lost))
        values = lost[segment, place]
        return float(values.mean()), mean_interval(values, segment)

    def along_text(self, reading: str) -> Array:
        """`lost` of every token that was read, [pos]."""
        lost = self.lost(reading)
        return np.asarray(np.concatenate(list(lost))[: len(self.tokens)])

    def to_json(self) -> dict[str, Any]:
        """Plain data, nan as None; losses as means by segment, place, layer and slot."""
        against = [name for name in self.loss if name != "state"]
        worth = {name: self.worth(name) for name in against}
        return {
            "length": self.length,
            "tokens": len(self.tokens),
            "starts": list(self.starts),
            "repeated": self.repeated,
            "layers": list(self.layers),
            "slots": list(self.slot_names),
            "loss": {name: plain(self.mean_loss(name)) for name in self.loss},
            "worth": {name: {"nats": nats, "low": ends.low, "high": ends.high} for name, (nats, ends) in worth.items()},
            "lost_by_place": {name: plain(self.by_place(name)) for name in against},
            "lost_by_layer": {name: plain(self.by_layer(name)) for name in self.layer_loss},
            "lost_by_slot": {name: plain(self.by_slot(name)) for name in self.slot_loss},
            **{name: plain(getattr(self, name)) for name in MEASURES},
        }


@torch.no_grad()
def segment_memory(
    model: Any,
    text: Any,
    length: int,
    *,
    other: Any = None,
    parts: bool = True,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> SegmentMemory:
    """Read a text in segments of `length` tokens, and each segment again from other states.

    Args:
        text, other: texts, or ids [1, pos]. A shorter other text is read from its beginning again. None: no readings with its state.
        parts: whether to exchange parts of the state too, layer by layer and slot by slot; about as many runs of each segment as there are.

    Raises:
        ValueError: an encoder, or a model that carries nothing; several texts; segments of fewer than two tokens; a text of fewer than two
            segments or of more tokens than the model takes. MeasurementCancelled: `cancel` was set.
    """
    tokens = model.to_tokens(text)
    _check(model, tokens, length)
    starts = tuple(range(0, tokens.shape[1] - 1, length))  # a last segment of one token has nothing to predict
    tokens = tokens[:, : starts[-1] + length]
    repeated, theirs = 0, None
    if other is not None:
        foreign = model.to_tokens(other)
        if foreign.shape[0] != 1 or not foreign.shape[1]:
            raise ValueError(f"The other text is [batch, pos] = {list(foreign.shape)}; expected one text with tokens.")
        repeated = -(-starts[-1] // foreign.shape[1])
        theirs = in_segments(model, foreign.repeat(1, repeated)[:, : starts[-1]], length)
    names = [f"{layer}@{step}" if _passes(model, layer) > 1 else str(layer) for layer, step in model.visits]
    slots = [(number, name) for number, (layer, _) in enumerate(model.visits) for name in model.mixers[layer].slots]
    per_segment = 1 + (other is not None) + parts * (len(names) + (other is not None) * (len(names) + len(slots)))
    tell, reader = Progress(progress, cancel), in_segments(model, tokens, length)
    losses: dict[Reading, Array] = defaultdict(lambda: np.full((len(starts), length), np.nan))
    nothing = [(float("nan"),) * len(MEASURES)] * len(slots)  # is handed to the first segment
    sizes: list[list[tuple[float, ...]]] = [nothing]
    own: ModelState | None = None
    foreign_state: ModelState | None = None
    for number, start in enumerate(starts):
        segment, said = tokens[:, start : start + length], f"segment {number + 1} of {len(starts)}"
        places = slice(1, segment.shape[1])
        tell(number / len(starts), said)
        if own is not None:
            for done, (reading, state) in enumerate(_readings(own, foreign_state, slots if parts else None)):
                tell((number + done / per_segment) / len(starts), f"{said}: {reading[0]}")
                losses[reading][number, places] = _loss(model(segment, state=state), segment)
        logits, after = next(reader)
        losses["state", 0][number, places] = _loss(logits, segment)
        if number + 1 < len(starts):
            sizes.append([_sizes(after.slot(*slot), None if own is None else own.slot(*slot)) for slot in slots])
            own, foreign_state = after, None if theirs is None else next(theirs)[1]
    tell(1.0, "done")
    stacks = {
        kind: np.stack([losses[kind, index] for index in range(count)])
        for kind, count in (("layer cut", len(names)), ("layer other", len(names)), ("slot other", len(slots)))
        if (kind, 0) in losses
    }
    return SegmentMemory(
        length, tuple(tokens[0].tolist()), starts, repeated, tuple(names), tuple(slots),
        {name: losses[name, 0] for name in ("state", "none", "other") if (name, 0) in losses},
        {kind.removeprefix("layer "): each for kind, each in stacks.items() if kind.startswith("layer ")},
        {kind.removeprefix("slot "): each for kind, each in stacks.items() if kind.startswith("slot ")},
        *np.array(sizes).transpose(2, 1, 0),
    )  # fmt: skip


def _check(model: Any, tokens: Tensor, length: int) -> None:
    if not getattr(model, "predicts_next_token", True):
        raise ValueError(
            f"{model.name} is an encoder: it reads a text as a whole and predicts no next token. Expected a model that hands on a state."
        )
    if hasattr(model, "with_source"):
        raise ValueError(
            f"{model.name} is an encoder-decoder, whose state holds its source too. Expected a model that reads one text."
        )
    if not any(mixer.slots for mixer in model.mixers):
        raise ValueError(f"{model.name} carries nothing from call to call. Expected a model that hands on a state.")
    if tokens.shape[0] != 1:
        raise ValueError(f"One text is read in segments; got a batch of {tokens.shape[0]}.")
    if length < 2:
        raise ValueError(
            f"Segments of {length} tokens. Expected at least 2: the first token of a segment does not count."
        )
    if tokens.shape[1] < length + 2:
        raise ValueError(
            f"The text has {tokens.shape[1]} tokens. Expected at least {length + 2}: a segment of {length} and two tokens of a second "
            "one; or shorter segments."
        )
    if model.n_ctx is not None and tokens.shape[1] > model.n_ctx:
        raise ValueError(
            f"The text has {tokens.shape[1]} tokens, more than the {model.n_ctx} that {model.name} has positions for. "
            "Expected a shorter one."
        )


def _passes(model: Any, layer: int) -> int:
    """How often a layer runs in one call."""
    return sum(each == layer for each, _ in model.visits)


def _readings(
    own: ModelState, theirs: ModelState | None, slots: Sequence[tuple[int, str]] | None
) -> Iterator[tuple[Reading, ModelState | None]]:
    """Everything that a segment is read from beside the true state; of `slots` None no parts are exchanged."""
    yield ("none", 0), None
    if theirs is not None:
        yield ("other", 0), theirs
    if slots is None:
        return
    for layer in range(len(own.layers)):
        yield ("layer cut", layer), own.without(layer)
        if theirs is not None:
            yield ("layer other", layer), own.replaced(layer, **theirs.layers[layer])
    if theirs is not None:
        for number, (layer, name) in enumerate(slots):
            yield ("slot other", number), own.replaced(layer, **{name: theirs.slot(layer, name)})


def _loss(logits: Tensor, segment: Tensor) -> Array:
    """Nats of every token of a segment but the first."""
    return next_token_loss(logits.double(), segment, per_token=True)[0].cpu().numpy()


def _sizes(now: Tensor, before: Tensor | None) -> tuple[float, ...]:
    """(numbers, bytes, norm, change, cosine) of a tensor of the state."""
    change, cosine = float("nan"), float("nan")
    if before is not None:
        kept = now
        for axis, size in enumerate(before.shape):
            kept = kept.narrow(axis, 0, min(size, kept.shape[axis]))
        if kept.shape == before.shape and kept.any() and before.any():
            a, b = _real(kept), _real(before)
            change, cosine = float((a - b).norm() / b.norm()), float(a @ b / (a.norm() * b.norm()))
    return now.numel(), now.numel() * now.element_size(), float(_real(now).norm()), change, cosine


def _real(value: Tensor) -> Tensor:
    """All numbers of a tensor in a row, in float64."""
    return (torch.view_as_real(value) if value.is_complex() else value).double().flatten()


def _mean(values: Array, axis: int) -> Array:
    """Mean over what is not nan; nan where everything is."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(known, values, 0.0).sum(axis) / known.sum(axis))


def _known(found: dict[str, Array], reading: str) -> Array:
    if reading not in found:
        raise ValueError(
            f"There is no reading {reading!r}.{suggestion(reading, found)} Here are: {', '.join(found) or 'none'}; readings of "
            "another text need other=..., and those of layers and slots parts=True."
        )
    return found[reading]


def store_segments(
    store: RunStore,
    model: Any,
    found: SegmentMemory,
    *,
    text: str,
    other: str | None = None,
    parts: bool = True,
    title: str | None = None,
) -> Run:
    """Write a run of kind `segment-memory`: `loss.<reading>` [segment, place], `layer.<reading>` [layer, segment, place], `slot.<reading>`
    [slot, segment, place] in nats, and what `SegmentMemory` has of every slot [slot, segment]; means of them in its results."""
    record = {"name": model.name, "architecture": model.architecture, **model.about()}
    call = model.tokenizer.token_strings if model.tokenizer is not None else lambda ids: [str(each) for each in ids]
    with store.create(KIND, title or f"{model.name} in segments of {found.length}", model=record, text=text) as run:
        for group, axes in (("loss", ()), ("layer_loss", ("layer",)), ("slot_loss", ("slot",))):
            for name, values in getattr(found, group).items():
                run.add_array(
                    f"{group.partition('_')[0]}.{name}", values, axes=(*axes, "segment", "place"), unit="nats"
                )
        for name in MEASURES:
            run.add_array(name, getattr(found, name), axes=("slot", "segment"))
        settings = {"model": model.name, "length": found.length, "text": text, "other": other, "parts": parts}
        run.set(results={**found.to_json(), "strings": call(list(found.tokens))}, settings=settings)
    return store.open(run.id)
