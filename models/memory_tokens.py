"""Recurrent Memory Transformer (Bulatov, Kuratov & Burtsev 2022): memory tokens around every segment of an ordinary language model.

    [m_s ; segment s ; m_s]  ->  blocks  ->  [· ; outputs of the segment ; m_{s+1}]

The first copy of the memory is read by the segment, the second, which stands last and so sees everything, is written: its outputs (after
the final norm) are the memory of the next segment. Nothing else goes from one segment to the next.

Here the three parts go through the blocks one after the other, which a causal model cannot tell from all at once: the slots leave keys and
values, the tokens read these and each other, and at the end of a segment the slots come again and write. So the axis `pos` counts the
text's tokens alone, and a text may be cut into calls anywhere. A call of several segments is read in pieces
(`workbench.instrument.pieces`): hooks on blocks fire once per segment, caches hold the whole text. They see and change the text's tokens.
Of the memory's own way through the blocks, `hook_writing_pattern` of every layer says which tokens are written into which slot, and
`blocks.0.attn.hook_state[t]` what comes of it, the memory after token t; the rest of it has no hook points.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.memory_slots import MemorySlots, MemorySlotsConfig, SlotsContext
from models.context import Context
from models.language_model import LanguageModel, LanguageModelConfig
from workbench.instrument.pieces import Pieces, silence
from workbench.instrument.states import ModelState


@dataclass(frozen=True)
class Kept:
    """Keys and values that a layer made of the tokens from the absolute position `begin` on, [batch, key, kv_head, width] each."""

    begin: int
    key: Tensor
    value: Tensor

    def since(self, position: int) -> "Kept":
        """Without those before a position."""
        gone = max(position - self.begin, 0)
        return Kept(self.begin + gone, self.key[:, gone:], self.value[:, gone:])

    def after(self, slots: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a site goes on from: the memory's keys and values, then these."""
        return {"key": torch.cat([slots["key"], self.key], 1), "value": torch.cat([slots["value"], self.value], 1)}


class Segments:
    """Where segments of `length` tokens lie among all tokens that a call knows, counted in every text by itself.

    Tokens are named by their column, the absolute position with padding; `stop` is a column behind the last.

    Raises:
        ValueError: positions that the caller gave (`facts["positions"]`) and that do not count the tokens one by one.
    """

    def __init__(self, context: Context, length: int) -> None:
        positions = context.key_positions
        if context.fact("positions") is not None and not bool((positions.diff(dim=1) == 1).all()):
            raise ValueError(
                "facts['positions'] say where segments end, so they must go up by one from token to token in a model with memory tokens."
            )
        self.place = positions % length  # [batch or 1, key]
        number, place = (
            (positions // length).cpu(),
            self.place.cpu(),
        )  # plans are made there, without waiting for a device
        real = torch.ones_like(number, dtype=torch.bool) if context.key_mask is None else context.key_mask.cpu()
        self.number = torch.where(real, number, -1)
        self._last = real & (place == length - 1)

    def ends(self, start: int) -> set[int]:
        """Where segments of some text are full: columns behind their last tokens, from those of the column `start` on."""
        return {start + column + 1 for column in self._last[:, start:].any(0).nonzero()[:, 0].tolist()}

    def full(self, stop: int) -> Tensor:
        """Whether the token before `stop` is the last of a segment, in each text, [batch or 1]."""
        return self._last[:, stop - 1]

    def unfinished(self, stop: int) -> int:
        """The first column of the segments that the tokens before `stop` began and did not fill; `stop` if there are none."""
        before = self.number[:, :stop]
        if not stop or not before.numel():
            return stop
        newest = before.amax(1, keepdim=True)
        inside = (before == newest) & (newest >= 0)
        inside &= ~(inside & self._last[:, :stop]).any(1, keepdim=True)
        return int(torch.where(inside.any(1), inside.float().argmax(1), stop).min())

    def own(self, first: int, begin: int, stop: int) -> Tensor | None:
        """True where a token from the column `first` on is of the segment read from `begin` to `stop`, [batch or 1, key]; None: all."""
        now = self.number[:, begin:stop].amax(1, keepdim=True)
        own = (self.number[:, first:stop] == now) & (now >= 0)
        return None if bool(own.all()) else own.to(self.place.device)


class RecurrentMemory(LanguageModel):
    """A language model whose mixers are all `MemorySlotsConfig`. `first_memory` [slot, d_model] is the learned memory of the first segment.

    Between calls it hands on the memory (slot `state` of layer 0) and keys and values of the segment that is not full yet. Every piece
    reads the memory anew, so a patched one holds from the next token on, for reading and for writing.
    """

    stream_is_all = False  # below a later segment stands what the last layer made of an earlier one

    def _build(self, config: LanguageModelConfig, position: str | None) -> None:
        found = config.mixers
        if not all(isinstance(mixer, MemorySlotsConfig) for mixer in found):
            names = sorted({type(mixer).__name__ for mixer in found})
            raise ValueError(f"The mixers are {', '.join(names)}; expected MemorySlotsConfig in every layer.")
        sizes = sorted({(mixer.slots, mixer.segment, mixer.both_ways) for mixer in found})
        if len(sizes) > 1:
            raise ValueError(
                f"Layers disagree on (slots, segment, both_ways): {', '.join(map(str, sizes))}. Expected one memory for all layers."
            )
        if config.loops != 1 or config.wiring is not None:
            raise ValueError("A recurrent memory repeats its blocks over segments. Expected loops=1 and no wiring.")
        self.n_memory, self.segment, self.both_ways = sizes[0]
        self.first_memory = nn.Parameter(torch.empty(self.n_memory, config.d_model))
        self.first_memory._own_init = True  # type: ignore[attr-defined]
        super()._build(config, position)

    def initialise(self) -> None:
        """As every language model; memory tokens begin as large as ordinary ones."""
        super().initialise()
        generator = torch.Generator().manual_seed(self.config.seed)
        with torch.no_grad():
            drawn = torch.randn(self.first_memory.shape, generator=generator)
            self.first_memory.copy_(drawn * self.W_E.std())

    def _through_blocks(
        self, x: Tensor, context: Context, state: ModelState | None, start: int, stop: int | None
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Piece by piece: the memory is read, then the tokens, and where a segment is full the memory is written."""
        if stop is not None and stop <= start:
            return x, []
        offset, end = context.offset, context.offset + x.shape[1]
        text = Segments(context, self.segment)
        carried: Sequence[dict[str, Tensor]] = [{}] * self.n_layers if state is None else state.layers
        first_memory = self.first_memory.to(x.dtype).expand(x.shape[0], -1, -1)
        memory = carried[0].get("state", first_memory)
        kept = [self._kept(site, slots, x, offset) for site, slots in zip(self.sites, carried, strict=True)]
        point, whole = self.sites[0].hook_state, any(site.watched for site in self.sites)
        stops = {offset + t + 1 for t in point.stops(offset, x.shape[1])} if point.active else set()
        cuts = sorted({offset, *stops, *text.ends(offset), end})
        pieces = Pieces(offset, x.shape[1]) if len(cuts) > 2 else None
        outputs: list[Tensor] = []
        read: list[dict[str, Tensor]] = []
        was_read: Tensor | None = None
        for here, there in pairwise(cuts):
            if memory is not was_read:
                read, was_read = self._read_memory(memory), memory
            if not whole:
                kept = [each.since(text.unfinished(here)) for each in kept]
            shared = {begin: self._keys(text, begin, here, there, context) for begin in {each.begin for each in kept}}
            contexts = [shared[each.begin] for each in kept]  # with one mask for all layers
            with nullcontext() if pieces is None else pieces.reading(here - offset, there - offset):
                piece = x[:, here - offset : there - offset]
                output, kept = self._read_tokens(piece, contexts, read, kept, stop, there == end)
            outputs.append(output)
            full = text.full(there)
            if bool(full.any()) and (there < end or context.keep_state or there in stops):
                shown = [
                    (each.begin, site.hook_writing_pattern.active) for each, site in zip(kept, self.sites, strict=True)
                ]
                behind = {
                    case: self._keys_of_writing(text, case[0], here, there, context, full, case[1])
                    for case in set(shown)
                }
                contexts = [behind[case] for case in shown]
                with nullcontext() if pieces is None else pieces.reading(here - offset, there - offset):
                    written = self._write_memory(memory, contexts, read, kept)
                memory = torch.where(full.to(x.device)[:, None, None], written, memory)
            if there in stops:
                memory = point.at(there - 1, memory)
        if pieces is not None:
            pieces.finish()
        handed_on: list[dict[str, Tensor]] = []
        if context.keep_state:
            kept = [each.since(text.unfinished(end)) for each in kept]
            handed_on = [{"key": each.key, "value": each.value} for each in kept]
            handed_on[0]["state"] = memory
        return torch.cat(outputs, dim=1), handed_on

    @property
    def sites(self) -> list[MemorySlots]:
        """The mixers, as what they are."""
        return self.mixers  # type: ignore[return-value]

    def _kept(self, site: MemorySlots, slots: dict[str, Tensor], x: Tensor, offset: int) -> Kept:
        """Keys and values that earlier calls handed on; none where they did not."""
        sizes = site.sizes
        key = slots.get("key", x.new_zeros(x.shape[0], 0, sizes.n_key_maps, sizes.d_head))
        value = slots.get("value", x.new_zeros(x.shape[0], 0, sizes.n_kv, sizes.d_value))
        return Kept(offset - key.shape[1], key, value)

    def _keys(self, text: Segments, first: int, here: int, there: int, context: Context) -> SlotsContext:
        """Of a layer whose keys are the memory's and those of the tokens from `first` to `there`, read from `here` on.

        Slots and tokens have the places that they would have in [memory ; segment ; memory].
        """
        place, own = text.place[:, first:there] + self.n_memory, text.own(first, here, there)
        slots = torch.arange(self.n_memory, device=place.device).expand(len(place), -1)
        keys, offset = torch.cat([slots, place], 1), self.n_memory + here - first
        return SlotsContext(
            keys[:, offset:], keys, None, _beside(own, self.n_memory, 0), offset, True, facts=context.facts, asked=context.asked,
            slots=self.n_memory, first=first,
        )  # fmt: skip

    def _keys_of_writing(
        self, text: Segments, first: int, here: int, there: int, context: Context, full: Tensor, watched: bool
    ) -> SlotsContext:
        """The same where the slots are queries, behind segments that are `full` [batch or 1], and keys besides."""
        reading, own = self._keys(text, first, here, there, context), text.own(first, here, there)
        places = reading.key_positions[:, : self.n_memory] + self.n_memory + self.segment
        keys, mask = torch.cat([reading.key_positions, places], 1), _beside(own, self.n_memory, self.n_memory)
        written = None
        if watched:
            tokens = torch.ones(1, there - first, dtype=torch.bool, device=keys.device) if own is None else own
            written = tokens & full.to(keys.device)[:, None]
        return SlotsContext(
            places, keys, None, mask, keys.shape[1] - self.n_memory, True, facts=context.facts, asked=context.asked,
            slots=self.n_memory, first=first if watched else None, writing=written, last=text.place.shape[1],
        )  # fmt: skip

    def _read_memory(self, memory: Tensor) -> list[dict[str, Tensor]]:
        """Keys and values that the slots leave in every layer, before a segment."""
        places = torch.arange(self.n_memory, device=memory.device)[None]
        context = SlotsContext(places, places, None, None, 0, True, cross=self.both_ways, slots=self.n_memory)
        left = []
        with silence():
            for block in self.blocks:
                memory, out = block(memory, context, None)
                left.append(out)
        return left

    def _read_tokens(
        self,
        x: Tensor,
        contexts: list[SlotsContext],
        read: list[dict[str, Tensor]],
        kept: list[Kept],
        stop: int | None,
        last: bool,
    ) -> tuple[Tensor, list[Kept]]:
        """One piece of the text through the blocks: what comes out of the last one, or enters `stop`, and the longer `kept`.

        Before the last piece all blocks run even so, because what they make of it enters the memory.
        """
        entering, longer = x, list(kept)
        for layer, block in enumerate(self.blocks):
            if layer == stop:
                entering = x
                if last:
                    break
            x, out = block(x, contexts[layer], kept[layer].after(read[layer]))
            longer[layer] = Kept(kept[layer].begin, out["key"][:, self.n_memory :], out["value"][:, self.n_memory :])
        return x if stop is None or stop >= self.n_layers else entering, longer

    def _write_memory(
        self, memory: Tensor, contexts: list[SlotsContext], read: list[dict[str, Tensor]], kept: list[Kept]
    ) -> Tensor:
        """The slots once more, behind a full segment: the memory of the next one, [batch, slot, d_model]."""
        with silence():
            for block, context, slots, tokens in zip(self.blocks, contexts, read, kept, strict=True):
                memory, _ = block(memory, context, tokens.after(slots))
            return memory if self.ln_final is None else self.ln_final(memory)


def _beside(own: Tensor | None, before: int, behind: int) -> Tensor | None:
    """A mask of tokens [batch or 1, key] with so many more keys, all visible, before and behind them; None stays None."""
    return own if own is None else F.pad(own, (before, behind), value=True)
