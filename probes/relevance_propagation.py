"""Relevance by layer-wise propagation, and the transformer attribution that is made of it (Chefer, Gur & Wolf 2020).

    relevance_propagation(model, tokens, metric).scores      Π_l (I + mean_h (∇A_l ⊙ R_l)⁺), [batch, pos]
    last_layer(model, tokens, metric, "partial_lrp")         what that paper compares with, from one layer; or "attention", "gradcam"
    propagate(model, tokens, metric).embedding               relevance handed on to the token embeddings themselves

Relevance starts as the metric's gradient by the logits (1 at the logit that is explained) and is handed backwards; its positive and its
negative part apart, because the rule of sums divides by sums. S = R / output, 0 where the output is 0; every rule keeps the sum of R:

    linear map   x⁺ ⊙ (W⁺ᵀ S) + x⁻ ⊙ (W⁻ᵀ S), output = W⁺x⁺ + W⁻x⁻: what pushed up, without the bias (the α = 1 rule)
    sum a + b    a ⊙ S and b ⊙ S, each rescaled so that the two get shares |Σ a ⊙ S| and |Σ b ⊙ S| of R
    product      of patterns with values, of queries with keys: each factor times its gradient with S, and half of it
    norms, activations, softmax hand R on unchanged; what a position term adds to scores gets none

Two rules are not in the paper, whose models lack what they are for: a gated MLP is a product, and a rotation of queries or keys hands on
each factor times its gradient with S.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.attention.site import Attention
from models.encoder import Encoder
from models.language_model import Block, LanguageModel
from models.parts.channel_mixers import MLP
from probes.relevance import Metric, Relevance, check_own, depth_order, one_per_sequence, real_scores, rolled_out
from workbench.instrument.errors import suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.lab.catalogue import implements

ROLES = {
    "embed", "pos_embed", "resid", "resid_mid", "mixer_out", "normalized", "query", "key", "value", "rotated_query", "rotated_key",
    "pattern", "z", "mlp_pre", "mlp_pre_linear", "mlp_post", "mlp_out", "unembed_input",
}  # fmt: skip
BASELINES = ("attention", "gradcam", "partial_lrp")


class NoRule(ValueError):
    """A model with a part that no rule of relevance propagation is known for."""


@dataclass(frozen=True)
class Propagation:
    """Relevance of every pattern and embedding for one output of each sequence.

    Args:
        patterns, gradients, relevance: A, ∂metric/∂A and R of each layer, [batch, head, query, key].
        embedding: R of each token's embedding, [batch, pos]. positions: of its position embedding; None where there is none.
        start: Σ R at the logits, [batch]: what `embedding` and `positions` sum to.
    """

    patterns: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]
    relevance: tuple[Tensor, ...]
    embedding: Tensor
    positions: Tensor | None
    start: Tensor

    @property
    def conservation_gap(self) -> Tensor:
        """How far relevance at the embeddings is from what was put in, [batch]: 0 but for rounding."""
        arrived = self.embedding.sum(1) if self.positions is None else (self.embedding + self.positions).sum(1)
        return arrived - self.start


@implements("chefer-relevancy", "probe", "relevance_propagation")
def relevance_propagation(
    model: Any,
    tokens: Any,
    metric: Metric,
    at: int = -1,
    *,
    start_layer: int = 0,
    row_norm: bool = False,
    own: str = "keep",
    mask: Tensor | None = None,
) -> Relevance:
    """Rollout of (∇A ⊙ R)⁺ of the token at `at`. Arguments as for `gradient_attention`, which has A for R.

    Raises:
        NoRule: a part without a rule. ValueError: unknown choices.
    """
    check_own(own)
    layers = depth_order(range(model.n_layers), start_layer, model)
    found = propagate(model, tokens, metric, mask=mask)
    steps = [(found.gradients[layer] * found.relevance[layer]).clamp(min=0).mean(1) for layer in layers]
    return Relevance(real_scores(rolled_out(steps, at, row_norm, own), mask), "relevance_propagation")


@implements("chefer-relevancy", "probe", "last_layer", note="the baselines: raw attention, GradCAM, partial LRP")
def last_layer(
    model: Any, tokens: Any, metric: Metric, kind: str = "partial_lrp", at: int = -1, *, mask: Tensor | None = None
) -> Relevance:
    """Relevance from the last layer's patterns alone, of the token at `at`.

    Args:
        kind: `"attention"`, mean_h A; `"gradcam"`, (mean_h g_h A_h)⁺ with g_h the mean of ∇A_h over all cells; `"partial_lrp"`, mean_h R.

    Raises:
        NoRule: a part without a rule. ValueError: an unknown kind.
    """
    if kind not in BASELINES:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(BASELINES)}.{suggestion(kind, BASELINES)}")
    found = propagate(model, tokens, metric, mask=mask)
    pattern, gradient = found.patterns[-1], found.gradients[-1]
    if kind == "gradcam":
        rows = (gradient.mean((2, 3), keepdim=True) * pattern).mean(1).clamp(min=0)
    else:
        rows = (pattern if kind == "attention" else found.relevance[-1]).mean(1)
    return Relevance(real_scores(rows[:, at], mask), kind)


def propagate(model: Any, tokens: Any, metric: Metric, *, mask: Tensor | None = None) -> Propagation:
    """Relevance of everything between the logits and the embeddings, in one forward pass.

    Raises:
        NoRule: a part without a rule, named with its layer. ValueError: a metric that is not one number per sequence.
    """
    _check_rules(model)
    run = _Run(model, model.to_tokens(tokens), metric, mask)
    start = run.gradients[0]
    parts = [_handed_back(model, run, sign * (sign * start).clamp(min=0)) for sign in (1, -1)]
    maps, embedding, positions = (tuple(a + b for a, b in zip(*part, strict=True)) for part in zip(*parts, strict=True))
    patterns = tuple(run[block.attn.hook_pattern] for block in model.blocks)
    return Propagation(
        patterns, tuple(run.gradients[1:]), maps, embedding[0], positions[0] if positions else None, start.sum((1, 2))
    )


def _handed_back(model: Any, run: "_Run", relevance: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Relevance of each layer's pattern, of the embedding and of the positions (if there are any), from that of the logits."""
    maps: list[Tensor] = []
    relevance = _linear(run[model.unembed.hook_in], model.unembed.W_U.T, relevance)
    for block in reversed(model.blocks):
        relevance, of_pattern = _block(block, run, relevance)
        maps.insert(0, of_pattern)
    if not model.has_position_embedding:
        return maps, [relevance.sum(-1)], []
    of_tokens, of_places = _sum([run[model.hook_embed], run[model.hook_pos_embed]], relevance)
    return maps, [of_tokens.sum(-1)], [of_places.sum(-1)]


class _Run:
    """One forward pass whose activations stay in the graph. gradients: of the metric, by the logits and by each layer's pattern."""

    def __init__(self, model: Any, tokens: Tensor, metric: Metric, mask: Tensor | None) -> None:
        self.live: dict[str, Tensor] = {}

        def keep(x: Tensor, hook: HookPoint) -> Tensor:
            self.live[hook.name] = x if x.requires_grad else x.detach().requires_grad_()
            return self.live[hook.name]

        points = [point for point in model.hook_points.points.values() if point.role in ROLES]
        padding = {} if mask is None else {"mask": mask}
        with torch.enable_grad():
            logits = model.run_with_hooks(tokens, hooks=[(point.name, keep) for point in points], **padding)
            total = one_per_sequence(metric(logits, tokens), tokens).sum()
        wanted = [logits, *(self.live[block.attn.hook_pattern.name] for block in model.blocks)]
        self.gradients = torch.autograd.grad(total, wanted, retain_graph=True)

    def __getitem__(self, point: HookPoint) -> Tensor:
        return self.live[point.name].detach()

    def through(self, before: HookPoint, after: HookPoint, relevance: Tensor) -> Tensor:
        """Relevance at `before` from that at `after`, which is a linear function of it."""
        x, y = self.live[before.name], self.live[after.name]
        (slope,) = torch.autograd.grad(y, x, _over(relevance, y.detach()), retain_graph=True)
        return x.detach() * slope


# ------------------------------------------------------------------------------------------------------------- blocks


def _block(block: Block, run: _Run, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of a block's input from that of its output, and of its pattern."""
    stream, mixed = run[block.hook_resid_pre], run[block.hook_attn_out]
    reads = stream if block.norm_after else run[block.ln1.hook_normalized]
    if block.has_mlp and block.parallel:
        relevance, of_mixer, of_mlp = _sum([stream, mixed, run[block.hook_mlp_out]], relevance)
        relevance = relevance + _mlp(block.mlp, run, run[block.ln2.hook_normalized], of_mlp)
    else:
        if block.has_mlp:
            middle = run[block.ln1.hook_normalized] if block.norm_after else run[block.hook_resid_mid]
            relevance, of_mlp = _sum([middle, run[block.hook_mlp_out]], relevance)
            read = middle if block.norm_after else run[block.ln2.hook_normalized]
            relevance = relevance + _mlp(block.mlp, run, read, of_mlp)
        relevance, of_mixer = _sum([stream, mixed], relevance)
    of_reads, of_pattern = _attention(block.attn, run, reads, of_mixer)
    return relevance + of_reads, of_pattern


def _mlp(mlp: MLP, run: _Run, x: Tensor, relevance: Tensor) -> Tensor:
    """Relevance of what the MLP reads from that of what it writes."""
    hidden = _linear(run[mlp.hook_post], mlp.outward.weight, relevance)
    if mlp.gate is None:
        return _linear(x, mlp.inward.weight, hidden)
    return _linear(x, mlp.gate.weight, hidden / 2) + _linear(x, mlp.inward.weight, hidden / 2)


def _attention(site: Attention, run: _Run, x: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Relevance of what the site reads from that of what it writes, and of its pattern [batch, head, query, key]."""
    groups = site.n_heads // site.n_kv
    turned = bool(site._rotations)
    points = (site.hook_rot_q, site.hook_rot_k) if turned else (site.hook_q, site.hook_k)
    q, k, v, z = (run[point].transpose(1, 2) for point in (*points, site.hook_v, site.hook_z))
    k, v = (part.repeat_interleave(groups, 1) for part in (k, v))
    of_z = (
        _linear(run[site.hook_z].flatten(-2), site.output.weight, relevance).view_as(run[site.hook_z]).transpose(1, 2)
    )
    of_pattern, of_v = _product(run[site.hook_pattern], v, z, of_z)
    of_q, of_k = _product(q, k.mT, q @ k.mT, of_pattern)
    of_q, of_k, of_v = of_q.transpose(1, 2), *(_by_group(part, groups) for part in (of_k.mT, of_v))
    if turned:
        of_q, of_k = run.through(site.hook_q, site.hook_rot_q, of_q), run.through(site.hook_k, site.hook_rot_k, of_k)
    parts = ((site.query, of_q), (site.key, of_k), (site.value, of_v))
    return sum((_linear(x, linear.weight, part.flatten(-2)) for linear, part in parts), torch.zeros_like(x)), of_pattern


def _by_group(relevance: Tensor, groups: int) -> Tensor:
    """[batch, head, pos, width] summed over the heads that share it, [batch, pos, kv_head, width]."""
    return relevance.unflatten(1, (-1, groups)).sum(2).transpose(1, 2)


# -------------------------------------------------------------------------------------------------------------- rules


def _over(relevance: Tensor, output: Tensor) -> Tensor:
    """R / output, 0 where the output is 0."""
    return torch.where(output == 0, 0.0, relevance / torch.where(output == 0, 1.0, output))


def _linear(x: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
    """x [..., in], weight [out, in], relevance [..., out] -> [..., in]."""
    weight = weight.detach()
    up, down = weight.clamp(min=0), weight.clamp(max=0)
    more, less = x.clamp(min=0), x.clamp(max=0)
    s = _over(relevance, more @ up.T + less @ down.T)
    return more * (s @ up) + less * (s @ down)


def _sum(parts: Sequence[Tensor], relevance: Tensor) -> list[Tensor]:
    """Of each summand [batch, pos, d_model]; shares are those of a whole sequence."""
    s = _over(relevance, torch.stack(list(parts)).sum(0))
    raw = [part * s for part in parts]
    totals = torch.stack([part.sum((1, 2), keepdim=True) for part in raw])
    shares = _over(totals.abs(), totals.abs().sum(0)) * relevance.sum((1, 2), keepdim=True)
    return [part * _over(share, total) for part, share, total in zip(raw, shares, totals, strict=True)]


def _product(a: Tensor, b: Tensor, output: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor]:
    """Of both factors of a @ b, half each."""
    s = _over(relevance, output)
    return a * (s @ b.mT) / 2, b * (a.mT @ s) / 2


# ------------------------------------------------------------------------------------------------------- what has rules


def _check_rules(model: Any) -> None:
    """NoRule, naming the part and what works instead, unless every part of the model has a rule."""
    name = getattr(model, "name", type(model).__name__)
    instead = "Expected a transformer of softmax attention and MLPs; integrated_gradients works on every architecture."
    if not isinstance(model, LanguageModel) or isinstance(model, Encoder):
        raise NoRule(
            f"No rule of relevance propagation is known for {name}: it is no decoder of plain blocks. {instead}"
        )
    if model.wiring is not None or model.loops > 1:
        raise NoRule(
            f"No rule of relevance propagation is known for {name}: its blocks are not run once each, in order. {instead}"
        )
    for layer, block in enumerate(model.blocks):
        reason = _without_rule(block)
        if reason is not None:
            raise NoRule(f"No rule of relevance propagation is known for layer {layer} of {name}: {reason}. {instead}")


def _without_rule(block: Block) -> str | None:
    """What in a block has no rule; None where all has."""
    site = block.sequence_mixer
    if not isinstance(site, Attention):
        return f"its mixer is {site.describe()['kind']}, no softmax attention"
    if site.reads_source or not site.matches or site.sizes.maps_per_head > 1:
        return "its patterns are not one product of queries and keys per head"
    if not site.hook_pattern.meta.exact:
        return f"its pattern is not all that it reads ({site.hook_pattern.meta.label})"
    if site.qk_norm is not None:
        return "its queries and keys are normalised"
    if not all(isinstance(getattr(site, part), nn.Linear) for part in ("query", "key", "value")):
        return "its projections are not linear maps of the stream"
    if any(term.needs_content for term in site._terms):
        return "what it adds to the scores for their positions depends on the content"
    strange = [part for part in site.parts if part.stage not in ("project", "rotate", "bias", "mask")]
    if strange:
        return f"its attention has a part of stage {strange[0].stage!r} ({strange[0].config.kind})"
    if block.has_mlp and not isinstance(block.mlp, MLP):
        return f"its channel mixer is {type(block.mlp).__name__}, no MLP"
    return None
