"""One synapse over time, exactly, in time and memory proportional to the number of tokens: no neuron × neuron matrix exists.

For source neuron i (layer k) and target neuron j (layer l), with z_τ = x_τ[j₀] + i·x_τ[j₀+1] the rotary pair that holds j, ω its
frequency, and C_t = Σ_{τ≤t} y_{τ,k}[i] z_τ e^{iωτ}:

fixed      σ̃_t = Σ_{τ≤t} y_τ[i] (R_τ x_τ)[j], the entry that the model's own (fixed-frame) state is made of
current    σ_t = Re or Im of e^{−iωt} C_t, seen from token t; the paper's equation 16 and figure 12. It turns even when nothing is written
strength   |C_t|: unchanged by rotation, so it needs no filter for the negative values that rotation introduces. Shared by the pair
count      Σ_{τ≤t} y_τ[i] x_τ[j]: how often both fired, the Hebbian sum without positions; it never decreases
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import torch
from torch import Tensor

from models.bdh.model import BDH
from probes.bdh.capture import Synapse, require_bdh, token_strings
from workbench.instrument.errors import suggestion
from workbench.lab.catalogue import implements

VIEWS = ("fixed", "current", "strength", "count")


@dataclass(frozen=True)
class SynapseTraces:
    """The four views of some synapses over time, each [batch, pos, synapse] in float64, and what they mean (module docstring).

    `tokens` are the token strings of each sequence. `traces.view("strength")` looks one up by name.
    """

    synapses: tuple[Synapse, ...]
    tokens: tuple[tuple[str, ...], ...]
    fixed: Tensor
    current: Tensor
    strength: Tensor
    count: Tensor

    def view(self, name: str) -> Tensor:
        """One view by name, [batch, pos, synapse]; ValueError with the nearest name."""
        if name not in VIEWS:
            raise ValueError(f"Unknown view {name!r}.{suggestion(name, VIEWS)} Expected one of {', '.join(VIEWS)}.")
        return getattr(self, name)

    def changes(self, name: str = "fixed") -> Tensor:
        """What each token added to a view, [batch, pos, synapse]. Of `fixed` and `count` these are the tokens' own writes."""
        values = self.view(name)
        return torch.diff(values, dim=1, prepend=torch.zeros_like(values[:, :1]))

    def __repr__(self) -> str:
        batch, pos, synapse = self.fixed.shape
        return f"SynapseTraces(batch={batch}, pos={pos}, synapse={synapse}; views {', '.join(VIEWS)})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td><code>{escape(str(synapse))}</code></td><td>{_curve(self.strength[0, :, number])}</td>"
            + "".join(f"<td>{float(self.view(name)[0, -1, number]):.4g}</td>" for name in VIEWS)
            + "</tr>"
            for number, synapse in enumerate(self.synapses)
        )
        head = "".join(f"<th>{name}</th>" for name in VIEWS)
        text = escape("".join(self.tokens[0]))
        return (
            f"<table><caption>Synapses over the first sequence: “{text}”; numbers after its last token</caption>"
            f"<thead><tr><th>synapse</th><th>strength over tokens</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
        )


def _curve(values: Tensor) -> str:
    """A small line drawing (SVG) of values [pos] from zero."""
    top = float(values.max().clamp(min=1e-300))
    step = 120 / max(1, len(values) - 1)
    points = " ".join(f"{i * step:.1f},{23 - 22 * float(v) / top:.1f}" for i, v in enumerate(values))
    return f"<svg width='120' height='24' role='img'><polyline points='{points}' fill='none' stroke='#004696'/></svg>"


@implements(
    "bdh", "probe", "trace_synapses", note="adds fixed-frame, rotation-invariant and Hebbian views to equation 16"
)
@torch.no_grad()
def trace_synapses(
    model: Any,
    tokens: Any,
    synapses: Synapse | Sequence[Synapse],
    *,
    mask: Tensor | None = None,
    hooks: Sequence[Any] = (),
) -> SynapseTraces:
    """Follow synapses over the tokens of a batch in one run (Kosowski et al. 2025, section 6.3).

    Args:
        tokens: ids [batch, pos] or text. synapses: one or several. mask: True at real tokens [batch, pos]; padding writes nothing.
        hooks: interventions and hook functions of the run; the views show what it went on with.

    Raises TypeError for a model that is no BDH, ValueError for a synapse that it does not have.
    """
    model = require_bdh(model)
    chosen = (synapses,) if isinstance(synapses, Synapse) else tuple(synapses)
    if not chosen:
        raise ValueError(
            "synapses is empty. Expected at least one, e.g. Synapse(source=(0, 3), target=(1, 5), target_layer=2)."
        )
    for synapse in chosen:
        synapse.check(model)
    tokens = model.to_tokens(tokens)

    columns = _Columns()
    for synapse in chosen:
        columns.want(f"blocks.{synapse.source_layer}.hook_y", *synapse.source)
        head, neuron = synapse.target
        for member in (neuron, neuron ^ 1):
            columns.want(f"blocks.{synapse.target_layer}.attn.hook_k", head, member)
            columns.want(f"blocks.{synapse.target_layer}.attn.hook_rot_k", head, member)
    model.run_with_hooks(tokens, mask=mask, hooks=[*hooks, *columns.hooks()], return_type=None)

    cosine, sine = _phases(model, tokens, mask)
    views: dict[str, list[Tensor]] = {name: [] for name in VIEWS}
    for synapse in chosen:
        y = columns.of(f"blocks.{synapse.source_layer}.hook_y", *synapse.source)
        if mask is not None:
            y = y * mask.to(y)
        head, neuron = synapse.target
        site, pair = f"blocks.{synapse.target_layer}.attn.", neuron // 2
        real = (y * columns.of(site + "hook_rot_k", head, 2 * pair)).cumsum(1)
        imaginary = (y * columns.of(site + "hook_rot_k", head, 2 * pair + 1)).cumsum(1)
        cos, sin = cosine[..., pair], sine[..., pair]
        odd = neuron % 2
        views["fixed"].append(imaginary if odd else real)
        views["current"].append(cos * imaginary - sin * real if odd else cos * real + sin * imaginary)
        views["strength"].append(torch.hypot(real, imaginary))
        views["count"].append((y * columns.of(site + "hook_k", head, neuron)).cumsum(1))
    strings = tuple(tuple(token_strings(model, row)) for row in tokens)
    return SynapseTraces(chosen, strings, **{name: torch.stack(values, dim=-1) for name, values in views.items()})


class _Columns:
    """Keeps chosen (head, neuron) columns of activations [batch, head, pos, neuron] while the model runs, in float64."""

    def __init__(self) -> None:
        self.wanted: dict[str, dict[tuple[int, int], Tensor]] = {}

    def want(self, name: str, head: int, neuron: int) -> None:
        self.wanted.setdefault(name, {})[head, neuron] = torch.empty(0)

    def hooks(self) -> list[tuple[str, Any]]:
        return [(name, self._keep) for name in self.wanted]

    def _keep(self, x: Tensor, hook: Any) -> None:
        for head, neuron in self.wanted[hook.name]:
            self.wanted[hook.name][head, neuron] = x[:, head, :, neuron].double()

    def of(self, name: str, head: int, neuron: int) -> Tensor:
        """[batch, pos]."""
        return self.wanted[name][head, neuron]


def _phases(model: BDH, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin of the model's own phase at each token, [batch or 1, pos, pair], float64."""
    if mask is None:
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
    else:
        positions = (mask.to(tokens.device).cumsum(1) - 1).clamp(min=0)
    cosine, sine = model.weights.rotation(positions)
    return cosine[:, 0].double(), sine[:, 0].double()
