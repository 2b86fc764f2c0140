"""Memformer's memory (Wu et al. 2020): slots that every segment reads, and that write themselves anew behind it.

    read     z_i += Σ_s softmax_s(q_i · k_s · scale) v_s                     q of the token, k and v of the slots M
    write    slot s reads itself and the segment's tokens:  q of M_s, keys and values of M_s and of x_j
             M′_s = W_o [ Σ softmax(q · k · scale / temperature) v ]         slots do not read each other
    forget   M_s = (M′_s + b_s) / ‖M′_s + b_s‖                               a slot that nothing writes to drifts to b_s, where it began

Use as `mix` beside `mask=RecentSegmentsConfig(segment, 0)`, so that nothing but the slots goes from segment to segment. In the paper one
memory serves an encoder's layers and is written from the last one; here every layer has its own, read and written with what the layer reads
of the stream, so that it is a part of a site. Reconstructed: the paper's equations were recalled, not read again; later code of its authors
reads slots and tokens in one softmax and gates what is written. What slots hold of a token is no weight of its value, so the pattern is the
segment's alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.attention.stages import Addition, Call, Sizes, register_part
from models.segments import SegmentGrid, real_tokens
from workbench.instrument.hook_points import HookPoint


@dataclass(frozen=True)
class SlotMemoryConfig:
    """Args: slots: of the memory. segment: tokens between two writings. temperature: below 1, slots write fewer tokens each."""

    slots: int
    segment: int
    temperature: float = 0.25
    kind: str = "slot_memory"

    def __post_init__(self) -> None:
        if self.slots < 1 or self.segment < 1 or self.temperature <= 0:
            raise ValueError(
                f"slots is {self.slots}, segment {self.segment}, temperature {self.temperature}; expected at least 1, 1 and above 0."
            )


@register_part(SlotMemoryConfig)
class SlotMemory(Addition):
    """Carries `state`, the slots [batch, slot, d_model], and `unfinished`, the stream of the segment that is not full yet.

    `hook_slot_weights` [batch, head, query, slot]: what each token reads of each slot. `hook_state[t]`: the slots after token t.
    """

    slots = ("state", "unfinished")

    def __init__(self, config: SlotMemoryConfig, sizes: Sizes) -> None:
        super().__init__(config, sizes)
        width, read = sizes.d_model, sizes.n_heads * sizes.d_head
        self.bias = nn.Parameter(torch.empty(config.slots, width))
        self.query, self.key = nn.Linear(width, read, bias=False), nn.Linear(width, read, bias=False)
        self.value = nn.Linear(width, sizes.n_heads * sizes.d_value, bias=False)
        self.write_query, self.write_key = nn.Linear(width, read, bias=False), nn.Linear(width, read, bias=False)
        self.write_value = nn.Linear(width, read, bias=False)
        self.write_output = nn.Linear(read, width, bias=False)
        self.hook_slot_weights = HookPoint("slot_weights", "batch head query slot")
        self.hook_state = HookPoint("state", "batch slot d_model", per_position=True)

    def forward(self, pattern: Tensor, call: Call) -> Tensor:
        context, x = call.context, call.stream
        length = x.shape[1]
        if call.carried is None:
            memory = _unit(self.bias).expand(len(x), -1, -1)
            begun = x.new_zeros(len(x), self.config.segment, x.shape[-1])
        else:
            memory, begun = call.carried["state"], call.carried["unfinished"]
        real, before = real_tokens(context, length, x.device), context.read_before
        stops = self.hook_state.stops(context.offset, length) if self.hook_state.active else []
        read, start = [], 0
        for stop in sorted({*(t + 1 for t in stops), length}):
            grid = SegmentGrid(before, real[:, start:stop], self.config.segment)
            slots, memory, begun = self._read_piece(x[:, start:stop], grid, memory, begun)
            read.append(slots)
            before = before + real[:, start:stop].sum(1)
            if stop - 1 in stops:
                memory = self.hook_state.at(context.offset + stop - 1, memory)
            start = stop
        if context.keep_state:
            call.handed_on.update(state=memory, unfinished=begun)
        return self._read(x, torch.cat(read, dim=1))

    def _read_piece(self, x: Tensor, grid: SegmentGrid, memory: Tensor, begun: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The slots that each token reads, [batch, pos, slot, d_model], and what is carried on."""
        segments, full = grid.sort(x, begun), grid.filled().all(-1)
        found = []
        for number in range(grid.segments):
            found.append(memory)
            written = self._write(memory, segments[:, number])
            memory = torch.where(full[:, number, None, None], written, memory)
        by_place = torch.stack(found, dim=1)[:, :, None].expand(-1, -1, grid.length, -1, -1)
        slots = grid.unsort(by_place.expand(len(x), *by_place.shape[1:]))
        return slots, memory, grid.unfinished(segments)

    def _read(self, x: Tensor, slots: Tensor) -> Tensor:
        """x [batch, pos, d_model], slots [batch, pos, slot, d_model] -> [batch, pos, head, d_value]."""
        q, k, v = (
            linear(given).unflatten(-1, (self.sizes.n_heads, -1))
            for linear, given in ((self.query, x), (self.key, slots), (self.value, slots))
        )
        weights = (torch.einsum("bphd,bpshd->bhps", q, k) * self.sizes.scale).softmax(-1)
        return torch.einsum("bhps,bpshd->bphd", self.hook_slot_weights(weights), v)

    def _write(self, memory: Tensor, x: Tensor) -> Tensor:
        """Slots behind a full segment. memory [batch, slot, d_model], x [batch, place, d_model] -> like memory."""
        heads = (self.sizes.n_heads, -1)
        q = self.write_query(memory).unflatten(-1, heads)
        own_k, own_v = (linear(memory).unflatten(-1, heads) for linear in (self.write_key, self.write_value))
        k, v = (linear(x).unflatten(-1, heads) for linear in (self.write_key, self.write_value))
        itself = torch.einsum("bshd,bshd->bhs", q, own_k)[..., None]
        scores = torch.cat([itself, torch.einsum("bshd,bphd->bhsp", q, k)], dim=-1)
        weights = (scores * (self.sizes.scale / self.config.temperature)).softmax(-1)
        taken = (
            torch.einsum("bhsp,bphd->bshd", weights[..., 1:], v) + weights[..., 0].transpose(1, 2)[..., None] * own_v
        )
        return _unit(self.write_output(taken.flatten(-2)) + self.bias)


def _unit(x: Tensor) -> Tensor:
    """Vectors of length 1."""
    return nn.functional.normalize(x, dim=-1, eps=1e-12)
