"""Everything about one layer's memory on one text: what each token did, what is remembered, how much room it takes, what an edit changes.

`workbench state` prints this; the parts are those of `state_tools`.
"""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.state_tools import Retention, Spectrum, retention_matrix, state_point, state_spectrum, token_table
from workbench.instrument.errors import HookError
from workbench.instrument.hooked_model import HookedModel

__all__ = ["MemoryReport", "first_with_state", "memory_report"]


@dataclass(frozen=True)
class MemoryReport:
    """One layer's memory on one text of `length` tokens.

    table: {column: [head, pos]}, see `token_table`. retention: None with `no_retention` in words where nothing is stored under keys.
    spectrum: after every token of `positions`; None for vector states. loss: nats per token, nan at the first. divergence: KL(plain ‖
    with the edits) of every next-token distribution in nats, [pos]; None without edits.
    """

    layer: int
    kind: str
    table: dict[str, Tensor]
    retention: Retention | None
    no_retention: str
    spectrum: Spectrum | None
    loss: Tensor
    divergence: Tensor | None

    @property
    def forgetting(self) -> Tensor | None:
        """Mean cosine of what was written n tokens ago, [head, n]."""
        return None if self.retention is None else self.retention.by_age()[0]

    def to_json(self) -> dict[str, Any]:
        """Plain lists, by head."""
        spectrum = self.spectrum
        return {
            "layer": self.layer,
            "kind": self.kind,
            "tokens": {name: column[0].tolist() for name, column in self.table.items()},
            "retention": None if self.retention is None else self.retention.cosine[0].tolist(),
            "relative_error": None if self.retention is None else self.retention.relative_error[0].tolist(),
            "no_retention": self.no_retention,
            "spectrum": None
            if spectrum is None
            else {
                "positions": list(spectrum.positions),
                "singular_values": spectrum.singular_values[0].tolist(),
                "effective_rank": spectrum.effective_rank[0].tolist(),
                "stable_rank": spectrum.stable_rank[0].tolist(),
            },
            "loss": self.loss.tolist(),
            "divergence": None if self.divergence is None else self.divergence.tolist(),
        }


def first_with_state(model: HookedModel) -> int:
    """The first layer that carries a state. Raises UnknownHookPoint where no layer does."""
    carrying = [
        p.layer_index for p in model.hook_points.points.values() if p.role == "state" and p.layer_index is not None
    ]
    return min(carrying) if carrying else state_point(model, 0).layer_index or 0


def memory_report(
    model: HookedModel, text: Any, layer: int, *, hooks: Sequence[Any] = (), positions: Sequence[int] = (-1,)
) -> MemoryReport:
    """Read one layer's memory, under some edits if `hooks` are given (interventions or hook functions).

    Args:
        text: one text, or ids [1, pos]. layer: negative counts from the last. positions: after which tokens the spectrum is taken.

    Raises:
        UnknownHookPoint: the layer has no recurrent state. ValueError: several texts.
    """
    tokens = model.to_tokens(text)
    if tokens.shape[0] != 1:
        raise ValueError(f"A report reads one text; got a batch of {tokens.shape[0]}.")
    layer = range(model.n_layers)[layer]
    state_point(model, layer)
    edits = list(hooks)
    retention, why = None, ""
    try:
        retention = retention_matrix(model, tokens, layer, hooks=edits)
    except HookError as reason:
        why = str(reason)
    spectrum = None
    with contextlib.suppress(HookError):  # a vector has none
        slot = state_point(model, layer).name.rsplit(".hook_", 1)[-1]
        spectrum = state_spectrum(model, tokens, layer, list(positions), slot=slot, hooks=edits)
    with torch.no_grad():
        log_probs = model.run_with_hooks(tokens, hooks=edits)[0].double().log_softmax(-1)
        divergence = None
        if edits:
            plain = model(tokens)[0].double().log_softmax(-1)
            divergence = (plain.exp() * (plain - log_probs)).sum(-1)
    table = token_table(model, tokens, layer, hooks=edits)
    loss = torch.cat([log_probs.new_full((1,), torch.nan), -log_probs[:-1].gather(1, tokens[0, 1:, None])[:, 0]])
    kind = str(model.mixers[layer].describe()["kind"])
    return MemoryReport(layer, kind, table, retention, why, spectrum, loss, divergence)
