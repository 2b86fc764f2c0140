"""Recurrent Memory Transformer (Bulatov, Kuratov & Burtsev 2022): memory tokens around every segment of an ordinary language model.

    [m_s ; segment s ; m_s]  ->  blocks  ->  [· ; outputs of the segment ; m_{s+1}]

The first copy of the memory is read by the segment, the second, which stands last and so sees everything, is written: its outputs (after
the final norm) are the memory of the next segment. Nothing else goes from one segment to the next. Whether the read tokens see each
other both ways is the model's mask: `PrefixConfig(length=n_memory)`, as in the paper's code; an ordinary causal mask otherwise.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from models.decoder import next_token_loss
from models.language_model import LanguageModel
from workbench.instrument.errors import HookError
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import main_point
from workbench.instrument.patterns import Pattern
from workbench.lab.catalogue import implements


@implements("rmt", "model", "RecurrentMemory", note="memory tokens around segments of any LanguageModel")
class RecurrentMemory(nn.Module):
    """A model that reads segment after segment. `start` [memory, d_model] is the learned first memory.

    The state is the memory itself, [batch, memory, d_model]: read it, patch it, go on. Hooks are those of `model`, whose positions count
    memory, segment, memory: `with memory.model.hooks(...)`. (So it is no architecture of the registry, whose hook points count the text's
    tokens.) `patterns` gives what the tokens of a segment read, the memory first. A text is read by
    `models.segments.in_segments(memory, tokens, length, detach=False)`.
    """

    model: LanguageModel

    def __init__(self, model: LanguageModel, n_memory: int, seed: int = 0) -> None:
        super().__init__()
        if n_memory < 1:
            raise ValueError(f"n_memory is {n_memory}; expected at least 1 memory token.")
        self.model, self.n_memory = model, n_memory
        generator = torch.Generator().manual_seed(seed)
        scale = model.W_E.detach().std()  # memory tokens start as large as ordinary ones
        like = torch.randn(n_memory, model.d_model, generator=generator).to(model.W_E)
        self.start = nn.Parameter(like * scale)

    def forward(
        self,
        tokens: Tensor,
        state: Tensor | None = None,
        return_state: bool = True,
        return_type: str = "logits",
    ) -> Any:
        """Read one segment.

        Args:
            tokens: [batch, pos]. state: the memory, [batch, memory, d_model]; None: the learned first one.
            return_type: `"logits"` [batch, pos, vocab] or `"loss"` (mean next-token cross-entropy within the segment).

        Returns:
            The output, and with `return_state` the memory that the next segment reads.

        Raises:
            ValueError: a memory of a wrong shape, or an unknown return_type.
        """
        batch, count = tokens.shape[0], self.n_memory
        memory = self.start.expand(batch, -1, -1) if state is None else state
        if memory.shape != (batch, count, self.model.d_model):
            raise ValueError(
                f"The memory has shape {tuple(memory.shape)}; expected [batch, memory, d_model] = {(batch, count, self.model.d_model)}."
            )
        if return_type not in ("logits", "loss"):
            raise ValueError(f"Unknown return_type {return_type!r}. Expected 'logits' or 'loss'.")
        stream = torch.cat([memory, self.model(tokens, stop_at_layer=0), memory], dim=1)
        stream = self.model(stream, start_at_layer=0, stop_at_layer=self.model.n_layers)
        logits: Tensor = self.model.unembed_residual(stream)[:, count:-count]
        output = logits if return_type == "logits" else next_token_loss(logits, tokens)
        written = stream[:, -count:]
        if self.model.ln_final is not None:
            written = self.model.ln_final(written)
        return (output, written) if return_state else output

    def patterns(self, tokens: Tensor, state: Tensor | None = None) -> dict[int, Pattern]:
        """{layer: what the tokens of one segment read}, [batch, head, pos, memory slot and then token]: the memory, then the segment.

        Nothing reads the memory that is being written but itself, so rows stay what they are: of softmax layers they sum to 1.

        Raises:
            ValueError: a memory of a wrong shape. HookError: a layer whose mixer forms no pattern of tokens.
        """
        points = {
            layer: main_point(self.model.hook_points.points.values(), "pattern", layer)
            for layer in range(self.model.n_layers)
        }
        missing = [layer for layer, point in points.items() if point is None]
        if missing:
            raise HookError(f"Layers {missing} form no pattern. Expected a model of attention.")
        kept: dict[str, Tensor] = {}

        def keep(pattern: Tensor, hook: HookPoint) -> None:
            kept[hook.name] = pattern

        names = {layer: point.name for layer, point in points.items() if point is not None}
        with self.model.hooks([(name, keep) for name in names.values()]):
            self(tokens, state)
        count, found = self.n_memory, {}
        for layer, name in names.items():
            point = points[layer]
            assert point is not None and point.meta is not None
            meta = replace(point.meta, before="memory slot")
            found[layer] = Pattern(kept[name][:, :, count:-count, :-count], meta, layer, name)
        return found
