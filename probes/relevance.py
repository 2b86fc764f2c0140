"""Which input tokens an output depends on: rollout, gradient-weighted attention, gradients; and a test of them.

    metric = logit_of(target=101, against=99)                       what is explained: one number per sequence
    integrated_gradients(model, tokens, metric).scores              [batch, pos]
    perturbation_curve(model, tokens, found, metric)                does removing it matter more than removing at random?

rollout              Π_l ½(I + mean_h A_l): where attention could have carried information (Abnar & Zuidema 2020). Knows no output.
gradient_attention   Π_l (I + mean_h (∇A_l ⊙ A_l)⁺) with the gradient of the metric: Chefer et al. 2021; the rule of Chefer et al. 2020
                     has ∇A ⊙ R there, R from relevance propagation: `probes.relevance_propagation`
gradient_x_input     Σ_d x ∂f/∂x at the token embeddings
integrated_gradients Σ_d (x − x') ∫ ∂f/∂x along the line from a baseline x' (Sundararajan et al. 2017): sums to f(x) − f(x')

Methods disagree, and a plausible picture is no evidence: `perturbation_curve` removes tokens in the order of their relevance, beside
random orders.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.progress import Progress
from workbench.instrument.errors import RefusedByPattern, UnknownHookPoint, suggestion
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.interventions import Patch
from workbench.instrument.patterns import Pattern
from workbench.lab.catalogue import implements

Metric = Callable[[Tensor, Tensor], Tensor]  # logits [batch, pos, vocab], tokens [batch, pos] -> [batch]
SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
ORDERS = ("positive", "negative")
OWN = ("keep", "minimum", "zero")


@dataclass(frozen=True)
class Relevance:
    """Relevance of every token for one output of its sequence.

    Args:
        scores: [batch, pos]; 0 at padding. method: which.
        output, baseline_output: the metric as it is and at the baseline, [batch], where the method has them.
    """

    scores: Tensor
    method: str
    output: Tensor | None = None
    baseline_output: Tensor | None = None

    @property
    def completeness_gap(self) -> Tensor:
        """Σ scores − (f(x) − f(x')), [batch]: 0 but for the integral's error. Only for integrated gradients."""
        if self.output is None or self.baseline_output is None:
            raise ValueError(
                f"{self.method} does not promise that its scores sum to anything. Expected integrated_gradients."
            )
        return self.scores.sum(1) - (self.output - self.baseline_output)

    def to_json(self) -> dict[str, Any]:
        """Plain lists."""
        record: dict[str, Any] = {"method": self.method, "scores": self.scores.tolist()}
        for name in ("output", "baseline_output"):
            value = getattr(self, name)
            record[name] = None if value is None else value.tolist()
        return record


def logit_of(target: int | Tensor, *, against: int | Tensor | None = None, at: int = -1) -> Metric:
    """The metric "logit of `target` at position `at`", minus that of `against` if given. Token ids: one, or one per sequence [batch]."""

    def metric(logits: Tensor, tokens: Tensor) -> Tensor:
        row = logits[:, at]
        wanted = [
            torch.as_tensor(ids, device=row.device).expand(len(row)) for ids in (target, against) if ids is not None
        ]
        found = [row.gather(1, ids[:, None])[:, 0] for ids in wanted]
        return found[0] if len(found) == 1 else found[0] - found[1]

    return metric


# --------------------------------------------------------------------------------------------------------- attention


@torch.no_grad()
def rollout(
    model: Any, tokens: Any, at: int = -1, *, residual: float = 0.5, start_layer: int = 0, mask: Tensor | None = None
) -> Relevance:
    """Attention rollout of the token at `at`, read off the product of all layers' mean patterns; each row sums to 1.

    Args:
        residual: share of a row that stays with its own token. start_layer: layers before it are left out.

    Raises:
        RefusedByPattern: a pattern that is signed, or whose rows are no distribution over tokens; a layer without a pattern.
    """
    if not 0 <= residual <= 1:
        raise ValueError(f"residual is {residual}; expected a share between 0 and 1.")
    padding = {} if mask is None else {"mask": mask}
    tokens = model.to_tokens(tokens)
    patterns = _layers_from(model, model.patterns(tokens, **padding), start_layer)
    for pattern in patterns:
        pattern.meta.require_distribution("Rollout")
    mixed = [residual * _identity(p.values) + (1 - residual) * p.values.mean(1) for p in patterns]
    return Relevance(real_scores(_product(mixed)[:, at], mask), "rollout")


@implements("chefer-relevancy", "probe", "gradient_attention", note="without relevance propagation: ∇A ⊙ A for ∇A ⊙ R")
def gradient_attention(
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
    """Rollout of attention weighted by the metric's gradient, positive parts only, of the token at `at`.

    Args:
        at: the token at which the metric is read. start_layer: layers before it are left out (the BERT scripts of Chefer et al. 2020
            take the last layer alone). row_norm: divide rows by their sums before multiplying (their BERT code does, their ViT code not).
        own: what `at` itself gets: `"keep"`, the row's `"minimum"` (their BERT code), or `"zero"` (as leaving the class token out).

    Raises:
        RefusedByPattern: a pattern that is signed or no distribution over tokens, a layer without a pattern. ValueError: unknown choices.
    """
    check_own(own)
    padding = {} if mask is None else {"mask": mask}
    tokens = model.to_tokens(tokens)
    with torch.no_grad():  # refuses before anything expensive runs
        metas = _layers_from(model, model.patterns(tokens[:1, :2]), start_layer)
    for pattern in metas:
        pattern.meta.require_distribution("Gradient-weighted attention")
    _, cache = model.run_with_cache(
        tokens,
        role="pattern",
        gradients_of=lambda logits: one_per_sequence(metric(logits, tokens), tokens).sum(),
        **padding,
    )
    by_depth = {cache.depth(address): address for address in cache}
    addresses = [by_depth[depth] for depth in depth_order(by_depth, start_layer, model)]
    steps = [(cache.gradients[address] * cache[address]).clamp(min=0).mean(1) for address in addresses]
    return Relevance(real_scores(rolled_out(steps, at, row_norm, own), mask), "gradient_attention")


def rolled_out(steps: Sequence[Tensor], at: int, row_norm: bool, own: str) -> Tensor:
    """Row `at` of Π (I + step), first layer first, [batch, pos]. `row_norm` and `own` as in `gradient_attention`."""
    maps = [step + _identity(step) for step in steps]
    row = _product([m / m.sum(-1, keepdim=True) if row_norm else m for m in maps])[:, at].clone()
    if own != "keep":
        row[:, at] = row.amin(1) if own == "minimum" else 0.0
    return row


def check_own(own: str) -> None:
    """ValueError for an unknown choice of what the reading token gets."""
    if own not in OWN:
        raise ValueError(f"own is {own!r}; expected one of {', '.join(OWN)}.{suggestion(own, OWN)}")


def _layers_from(model: Any, patterns: dict[Any, Pattern], start_layer: int) -> list[Pattern]:
    """Patterns from a layer on, in the order in which they are applied."""
    layers = {depth if isinstance(depth, int) else depth[0] for depth in patterns}
    missing = sorted(set(range(model.n_layers)) - layers)
    if missing:
        raise RefusedByPattern(
            f"Layers {missing} of {model.name} have no pattern, so nothing can be rolled out through them."
        )
    found = [patterns[depth] for depth in depth_order(patterns, start_layer, model)]
    for pattern in found:
        pattern.meta.require_tokens("Rollout")
    return found


def depth_order(depths: Any, start_layer: int, model: Any) -> list[Any]:
    """Depths from a layer on, in the order in which they are run. ValueError for a layer that does not exist."""
    if not -model.n_layers <= start_layer < model.n_layers:
        raise ValueError(f"start_layer is {start_layer}; this model has layers 0..{model.n_layers - 1}.")
    first = start_layer % model.n_layers
    by_pass = sorted(depths, key=lambda depth: (0, depth) if isinstance(depth, int) else (depth[1], depth[0]))
    return by_pass[first:]


def _identity(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _product(maps: Sequence[Tensor]) -> Tensor:
    """The last layer's map times … times the first's, [batch, query, key]."""
    total = maps[0]
    for step in maps[1:]:
        total = step @ total
    return total


# --------------------------------------------------------------------------------------------------------- gradients


def gradient_x_input(model: Any, tokens: Any, metric: Metric, *, mask: Tensor | None = None) -> Relevance:
    """Σ_d x ∂f/∂x at each token's embedding: how f would change if the embedding grew in proportion, to first order."""
    tokens = model.to_tokens(tokens)
    output, x, gradient = _at_embedding(model, tokens, metric, mask, None)
    return Relevance(real_scores((x * gradient).sum(-1), mask), "gradient_x_input", output)


def integrated_gradients(
    model: Any,
    tokens: Any,
    metric: Metric,
    *,
    baseline: str | int | Tensor = "mean",
    steps: int = 32,
    mask: Tensor | None = None,
    progress: Callable[[float, str], None] | None = None,
    cancel: Event | None = None,
) -> Relevance:
    """Gradients along the straight line from a baseline to the token embeddings, by Gauss–Legendre quadrature with `steps` points.

    Args:
        baseline: embedding that stands for "no token": `"mean"` of the vocabulary, `"zero"` (a singular point of models that normalise
            the embedding: it takes many more steps), a token id, or a tensor that broadcasts to [batch, pos, d_model].

    Raises:
        ValueError: an unknown baseline, fewer than one step. MeasurementCancelled: `cancel` was set.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; expected at least 1.")
    tokens = model.to_tokens(tokens)
    output, x, _ = _at_embedding(model, tokens, metric, mask, None)
    start = baseline_embedding(model, x, baseline)
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    total = torch.zeros_like(x)
    for number, (node, weight) in enumerate(zip((nodes + 1) / 2, weights / 2, strict=True)):
        Progress(progress, cancel)(number / steps, f"step {number + 1} of {steps}")
        total += weight * _at_embedding(model, tokens, metric, mask, start + float(node) * (x - start))[2]
    at_start, *_ = _at_embedding(model, tokens, metric, mask, start)
    return Relevance(real_scores(((x - start) * total).sum(-1), mask), "integrated_gradients", output, at_start)


def baseline_embedding(model: Any, x: Tensor, baseline: str | int | Tensor) -> Tensor:
    """What stands for "no token", of the shape of the embeddings x [batch, pos, d_model]; see `integrated_gradients`."""
    if isinstance(baseline, Tensor):
        return baseline.to(x).expand_as(x)
    if baseline == "zero":
        return torch.zeros_like(x)
    if baseline == "mean":
        return model.W_E.detach().mean(0).to(x).expand_as(x)
    if isinstance(baseline, str) or not 0 <= baseline < model.vocab_size:
        raise ValueError(
            f"baseline is {baseline!r}; expected 'mean', 'zero', a token id 0..{model.vocab_size - 1} or a tensor."
        )
    return model.W_E.detach()[baseline].to(x).expand_as(x)


def _embedding_point(model: Any) -> HookPoint:
    point = next((p for p in model.hook_points.points.values() if p.role == "embed"), None)
    if point is None:
        raise UnknownHookPoint(
            f"This model has no hook point of role 'embed'. Its roles are: {', '.join(model.hook_points.roles)}."
        )
    return point


def _at_embedding(
    model: Any, tokens: Tensor, metric: Metric, mask: Tensor | None, value: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The metric [batch], the token embeddings and its gradient there, at the embeddings themselves or with `value` in their place."""
    point = _embedding_point(model)
    kept: list[Tensor] = []

    def scalar(logits: Tensor) -> Tensor:
        found = one_per_sequence(metric(logits, tokens), tokens)
        kept.append(found.detach())
        return found.sum()

    _, cache = model.run_with_cache(
        tokens, names=point.name, hooks=[] if value is None else [Patch(point.name, value=value)], gradients_of=scalar,
        **({} if mask is None else {"mask": mask}),
    )  # fmt: skip
    return kept[0], cache[point.name], cache.gradients[point.name]


def one_per_sequence(values: Any, tokens: Tensor) -> Tensor:
    """What the metric gave, [batch]; ValueError for anything else."""
    if not isinstance(values, Tensor) or values.shape != tokens.shape[:1]:
        shape = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"The metric gave {shape}; expected one number for each of {len(tokens)} sequences, [batch].")
    return values


def real_scores(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The scores without gradients, 0 at padding."""
    scores = scores.detach()
    return scores if mask is None else torch.where(mask.to(scores.device, torch.bool), scores, 0.0)


# ------------------------------------------------------------------------------------------------------ perturbation


@dataclass(frozen=True)
class PerturbationCurve:
    """Result of `perturbation_curve`.

    Args:
        order: `"positive"` (most relevant tokens go first) or `"negative"`. shares: of the tokens removed, from 0.
        metric: mean over sequences at each share, [share]. random: of each random order, [control, share].
    """

    order: str
    shares: tuple[float, ...]
    metric: NDArray[np.float64]
    random: NDArray[np.float64]

    @property
    def auc(self) -> float:
        """Area under the curve per unit of share. Positive order: small is good; negative order: large is good."""
        return float(np.trapezoid(self.metric, self.shares) / (self.shares[-1] - self.shares[0]))

    @property
    def random_aucs(self) -> NDArray[np.float64]:
        """The same of each random order, [control]."""
        return np.asarray(np.trapezoid(self.random, self.shares, axis=1) / (self.shares[-1] - self.shares[0]))

    @property
    def p(self) -> float:
        """Share of orders, this one among them, that are at least as good as this one."""
        good = self.random_aucs <= self.auc if self.order == "positive" else self.random_aucs >= self.auc
        return float((1 + good.sum()) / (1 + len(good)))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "order": self.order, "shares": list(self.shares), "metric": self.metric.tolist(), "random": self.random.tolist(),
            "auc": self.auc, "random_aucs": self.random_aucs.tolist(), "p": self.p,
        }  # fmt: skip

    def __repr__(self) -> str:
        return f"PerturbationCurve({self.order}: AUC {self.auc:.4g}, random {self.random_aucs.mean():.4g}, p = {self.p:.3g})"


@implements("chefer-relevancy", "probe", "perturbation_curve")
@torch.no_grad()
def perturbation_curve(
    model: Any,
    tokens: Any,
    relevance: Relevance | Tensor,
    metric: Metric,
    *,
    order: str = "positive",
    shares: Sequence[float] = SHARES,
    keep: Sequence[int] = (-1,),
    baseline: str | int | Tensor = "mean",
    controls: int = 10,
    mask: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    cancel: Event | None = None,
) -> PerturbationCurve:
    """The metric while tokens are removed in the order of their relevance, and in random orders.

    A token is removed by putting the baseline in the place of its embedding.

    Args:
        shares: of the removable tokens, ascending; 0 is put before. keep: positions that stay (the reading token, in a language model).
        baseline: as for `integrated_gradients`. controls: random orders.

    Raises:
        ValueError: an unknown order, shares that do not ascend between 0 and 1, relevance of another shape.
    """
    if order not in ORDERS:
        raise ValueError(f"Unknown order {order!r}.{suggestion(order, ORDERS)} Expected 'positive' or 'negative'.")
    shares = (0.0, *shares)
    if list(shares) != sorted(set(shares)) or shares[-1] > 1 or len(shares) < 2:
        raise ValueError(f"shares are {shares[1:]}; expected ascending numbers above 0 and up to 1.")
    tokens = model.to_tokens(tokens)
    scores = relevance.scores if isinstance(relevance, Relevance) else relevance
    if scores.shape != tokens.shape:
        raise ValueError(f"relevance has shape {tuple(scores.shape)}; the tokens have {tuple(tokens.shape)}.")
    removable = (
        torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device, torch.bool).clone()
    )
    removable[:, list(keep)] = False
    point = _embedding_point(model)
    padding = {} if mask is None else {"mask": mask}
    _, cache = model.run_with_cache(tokens, names=point.name, **padding)
    x = cache[point.name]
    nothing = baseline_embedding(model, x, baseline)

    def curve(importance: Tensor) -> NDArray[np.float64]:
        rank = (
            torch.where(removable, importance.double(), -torch.inf)
            .argsort(dim=1, descending=True, stable=True)
            .argsort(dim=1)
        )
        found = []
        for share in shares:
            gone = removable & (rank < (share * removable.sum(1, keepdim=True)).round())
            edit = Patch(point.name, value=torch.where(gone[..., None], nothing, x))
            values = one_per_sequence(metric(model.run_with_hooks(tokens, hooks=[edit], **padding), tokens), tokens)
            found.append(float(values.double().mean()))
        return np.asarray(found)

    own = curve(scores if order == "positive" else -scores)
    generator = torch.Generator().manual_seed(seed)
    others = []
    for number in range(controls):
        Progress(progress, cancel)(number / controls, f"random order {number + 1} of {controls}")
        others.append(curve(torch.rand(tokens.shape, generator=generator).to(scores.device)))
    return PerturbationCurve(order, shares, own, np.asarray(others).reshape(len(others), len(shares)))
