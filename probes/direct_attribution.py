"""Direct attribution: a logit difference as an exact sum over what was written into the residual stream.

    found = direct_attribution(model, tokens, LogitDifference(answer, wrong))
    found.top(5)                      [(component, contribution), ...]

With every norm's scale as it was in the run, and every component's output held fixed, the logits are affine in the outputs of
embeddings, heads and MLPs, so

    logit(a) − logit(b) = Σ_c ⟨c, g_c⟩ + constant,   g_c = ∂(logit(a) − logit(b)) / ∂c

Under a final LayerNorm g = centred(γ ⊙ (u_a − u_b)) / σ, so that a component's mean does not count; under RMSNorm the same without
centring; the constant is β·(u_a − u_b) + b_a − b_b (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; Nanda's
TransformerLens). Here g is taken by differentiation through the frozen norms rather than from these formulas, which gives the same and
also covers BDH, whose stream is normalised after every layer, and models that pass through their blocks several times.

A head's part: the mixer's output is affine in the heads' outputs z once its gate and inner norm are held as they were. For attention
that is W_O z_h; for retention, Mamba-2 and their kin each head's α v through frozen norm and gate; for BDH each head's y through E. What
the mixer adds besides its heads (a bias, Mamba's skip) is the component "rest". Whether all this holds is checked on every call: the same
sums are recomputed with the outputs set to zero, and a model for which they do not add up is refused: capped logits are no sum.

"Direct" is meant strictly: what a head does by feeding later heads is not in here. That is what `probes.patching` is for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.objectives import LogitDifference, last_real, rows_at
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import heads_first
from workbench.instrument.interventions import FreezeNorm
from workbench.instrument.pieces import whole_call
from workbench.instrument.selection import Select

TOLERANCE = {torch.float64: 1e-8}  # of a sum relative to its largest part; 32 bit: 1e-3
Depth = int | tuple[int, int]  # a layer, or (layer, step) where weights are shared over depth


@dataclass(frozen=True)
class Component:
    """What wrote into the stream: `kind` is "embed", "positions", "head", "mixer" (whole), "rest" (of a mixer, besides heads) or "mlp"."""

    kind: str
    layer: Depth | None = None
    head: int | None = None

    def __str__(self) -> str:
        place = "" if self.layer is None else f" {self.layer}" if self.head is None else f" {self.layer}.{self.head}"
        return f"{self.kind}{place}"


@dataclass(frozen=True)
class DirectAttribution:
    """Result of `direct_attribution`.

    Args:
        components: what wrote into the stream, from the embedding on.
        contributions: [component, batch], in logits. constant: what no component wrote, e.g. the biases of norm and unembedding, [batch].
        total: the model's own logit difference, [batch]. error: largest |Σ contributions + constant − total|.
    """

    components: tuple[Component, ...]
    contributions: Tensor
    constant: Tensor
    total: Tensor
    error: float

    def __getitem__(self, wanted: tuple[Any, ...] | str) -> Tensor:
        """`found["embed"]`, `found["mlp", 0]`, `found["head", 1, 3]`: [batch]; KeyError for another, naming those there are."""
        component = Component(*((wanted,) if isinstance(wanted, str) else wanted))
        if component not in self.components:
            known = ", ".join(map(str, self.components))
            raise KeyError(f"No component '{component}'. There are: {known}.")
        return self.contributions[self.components.index(component)]

    def top(self, n: int = 10) -> list[tuple[Component, float]]:
        """The n components of largest mean contribution by absolute value, with its sign."""
        mean = self.contributions.mean(1)
        return [(self.components[i], float(mean[i])) for i in mean.abs().argsort(descending=True)[:n].tolist()]

    def by_depth(self) -> list[tuple[str, float]]:
        """Mean contribution of the embeddings and of each layer's mixer and MLP, in the order in which they are added."""
        sums: dict[str, float] = {}
        for component, value in zip(self.components, self.contributions.mean(1).tolist(), strict=True):
            kind = {"head": "mixer", "rest": "mixer"}.get(component.kind, component.kind)
            name = kind if component.layer is None else f"{kind} {component.layer}"
            sums[name] = sums.get(name, 0.0) + value
        return list(sums.items())

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; contributions are means over the batch."""
        return {
            "components": [str(component) for component in self.components],
            "contributions": self.contributions.mean(1).tolist(),
            "constant": float(self.constant.mean()),
            "total": float(self.total.mean()),
            "error": self.error,
        }

    def __repr__(self) -> str:
        parts = ", ".join(f"{component} {value:+.3f}" for component, value in self.top(5))
        return f"DirectAttribution(of {float(self.total.mean()):.3f}: {parts}; error {self.error:.1e})"


def direct_attribution(
    model: Any,
    tokens: Any,
    objective: LogitDifference,
    *,
    heads: bool = True,
    mask: Tensor | None = None,
    hooks: Sequence[Any] = (),
) -> DirectAttribution:
    """Split a logit difference of each sequence into what each component wrote at that position.

    Args:
        tokens: ids [batch, pos] or text. objective: a `LogitDifference`: nothing else is linear in the logits. Its `at` of −1 means the
            last real token where there is a `mask` (True at real tokens, [batch, pos]).
        heads: split mixers into heads. hooks: attached to the run that is explained.

    Raises:
        TypeError: another objective. ValueError: the parts do not add up, so that the logits are not affine in them in this model.
    """
    if not isinstance(objective, LogitDifference):
        raise TypeError(
            f"{type(objective).__name__} is not linear in the logits, so it has no exact parts. Expected a LogitDifference."
        )
    tokens = model.to_tokens(tokens)
    at = objective.at
    if mask is not None and isinstance(at, int) and at == -1:
        at = last_real(mask)
    objective = LogitDifference(objective.answer, objective.wrong, at)
    split = _Split(model, tokens, mask, tuple(hooks), heads)
    return split.attribute(objective)


class _Split:
    """The run to explain, cut at every component: a component's output is a leaf, and nothing reaches it from below."""

    def __init__(self, model: Any, tokens: Tensor, mask: Tensor | None, hooks: tuple[Any, ...], heads: bool) -> None:
        self.model, self.tokens, self.mask, self.hooks = model, tokens, mask, hooks
        self.written, self.inner = stream_writers(model), head_outputs(model) if heads else []
        names = [point.name for point in (*self.written, *self.inner)]
        with torch.no_grad():
            selection: list[Any] = [*names, Select(role="norm_scale")]
            self.logits, cache = model.run_with_cache(tokens, names=selection, mask=mask, hooks=list(hooks))
        self.frozen = FreezeNorm.from_cache(cache)
        self.values = {address: value for address, value in cache.items() if cache.point(address).name in names}
        self.point = {address: cache.point(address) for address in self.values}
        self.depth = {address: cache.depth(address) for address in self.values}

    def attribute(self, objective: LogitDifference) -> DirectAttribution:
        """Two runs of the cut model: one to differentiate, one with nothing written, for the constants."""
        leaves = {address: value.detach().clone().requires_grad_() for address, value in self.values.items()}
        with torch.enable_grad():
            logits, made = self.cut(leaves)
            stream = [address for address in leaves if self.point[address] in self.written]
            slopes = self.slopes(objective(logits).sum(), leaves, stream)
            within = {address: made[address] for address in stream if made[address].requires_grad}
            owed = torch.stack([(made[a] * slopes[a].detach()).sum() for a in within]).sum() if within else None
            inner = [address for address in leaves if address not in stream]
            slopes |= self.slopes(owed, leaves, inner)
        with torch.no_grad():
            nothing = {
                a: value if a in stream else torch.zeros_like(value) for a, value in self.values.items()
            }  # the stream as it was, so that only the insides are empty
            _, bare = self.cut(nothing)
            empty, _ = self.cut({address: torch.zeros_like(value) for address, value in self.values.items()})
            constant = objective(empty)
            total = objective(self.logits)
        at = objective.at
        components: dict[Component, Tensor] = {}
        for address in stream:
            layer, whole = self.depth[address], _worth(self.values[address], slopes[address], at)
            if layer is None or self.point[address].role == "mlp_out":
                components[Component(_KINDS[self.point[address].role], layer)] = whole
                continue
            parts = [a for a in inner if self.depth[a] == layer]
            if not parts:
                components[Component("mixer", layer)] = whole
                continue
            split: dict[Component, Tensor] = {}
            for part in parts:
                values, slope = (heads_first(x, self.point[part]) for x in (self.values[part], slopes[part]))
                for head in range(values.shape[1]):
                    split[Component("head", layer, head)] = _worth(values[:, head], slope[:, head], at)
            rest = _worth(bare[address], slopes[address], at)
            self.check(f"the heads of layer {layer}", sum(split.values()) + rest, whole, [*split.values(), rest])
            components |= split
            if bool(rest.abs().max() > 1e-12):
                components[Component("rest", layer)] = rest
        contributions = torch.stack(list(components.values()))
        self.check("the components", contributions.sum(0) + constant, total, [*components.values(), constant])
        error = float((contributions.sum(0) + constant - total).abs().max())
        return DirectAttribution(tuple(components), contributions.detach(), constant, total, error)

    def cut(self, leaves: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits with these outputs in place of the components' own, and what each would have written by itself."""
        made: dict[str, Tensor] = {}

        def address(hook: HookPoint) -> str:
            return hook.name if hook.steps == 1 else f"{hook.name}@{hook.step}"

        @whole_call
        def keep(x: Tensor, hook: HookPoint) -> None:
            made[address(hook)] = x

        def replace(x: Tensor, hook: HookPoint) -> Tensor:
            return leaves[address(hook)]

        cuts = [(point.name, act) for point in (*self.written, *self.inner) for act in (keep, replace)]
        logits = self.model.run_with_hooks(self.tokens, mask=self.mask, hooks=[*self.hooks, self.frozen, *cuts])
        return logits, made

    @staticmethod
    def slopes(metric: Tensor | None, leaves: dict[str, Tensor], wanted: list[str]) -> dict[str, Tensor]:
        """∂metric / ∂leaf; zero where the metric does not depend on it."""
        if metric is None or not wanted:
            return {address: torch.zeros_like(leaves[address]) for address in wanted}
        found = torch.autograd.grad(metric, [leaves[a] for a in wanted], allow_unused=True, retain_graph=True)
        return {a: torch.zeros_like(leaves[a]) if g is None else g for a, g in zip(wanted, found, strict=True)}

    def check(self, what: str, total: Tensor, expected: Tensor, parts: Sequence[Tensor]) -> None:
        """Raise ValueError if a sum of parts misses what it should be by more than rounding."""
        size = max(float(part.abs().max()) for part in (*parts, expected))
        missed = float((total - expected).abs().max())
        if not missed <= TOLERANCE.get(total.dtype, 1e-3) * max(size, 1e-6):
            raise ValueError(
                f"{what[0].upper()}{what[1:]} sum to something else than expected (off by {missed:.2g}): in {self.model.name!r} the "
                "logits are not affine in them, so there is no direct attribution."
                + (" Try heads=False, which keeps each mixer whole." if "heads" in what else "")
            )


_KINDS = {"embed": "embed", "pos_embed": "positions", "mlp_out": "mlp"}


def stream_writers(model: Any) -> list[HookPoint]:
    """Where embeddings, mixers and MLPs write into the stream. BDH does so before a norm of its own (`mixer_out_pre`)."""
    roles = _roles_of_layers(model)

    def writes(point: HookPoint) -> bool:
        if point.layer_index is None:
            return point.role in ("embed", "pos_embed")
        mixer = "mixer_out_pre" if "mixer_out_pre" in roles[point.layer_index] else "mixer_out"
        return point.role in (mixer, "mlp_out")

    return [point for point in model.hook_dict.values() if writes(point)]


def head_outputs(model: Any) -> list[HookPoint]:
    """What heads hand to their mixer's output, which is affine in it: z; in BDH the gated neurons, as its gate is a function of z."""
    roles = _roles_of_layers(model)
    inside = [p for p in model.hook_dict.values() if p.layer_index is not None and not p.per_position]
    return [p for p in inside if p.role == ("neuron_gated" if "neuron_gated" in roles[p.layer_index] else "z")]


def _roles_of_layers(model: Any) -> dict[int | None, set[str]]:
    roles: dict[int | None, set[str]] = {}
    for point in model.hook_dict.values():
        roles.setdefault(point.layer_index, set()).add(point.role)
    return roles


def _worth(value: Tensor, slope: Tensor, at: Any) -> Tensor:
    """⟨value, slope⟩ at one position: [batch, pos, width] -> [batch]."""
    return rows_at((value * slope).sum(-1), at)
