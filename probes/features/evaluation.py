"""Is a dictionary any good? Reconstruction and sparsity of its rows, and what the model loses when it must use the reconstruction.

FVU = Σ ‖x − x̂‖² / Σ ‖x − x̄‖², by its definition. (Some published tools report an `explained_variance` that subtracts another mean and
grows with the mean of the activations; `compat_explained_variance` is theirs, for comparison only.)
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from probes.features.dictionaries import Dictionary
from probes.features.interventions import reconstruct
from workbench.instrument.html import table
from workbench.instrument.pieces import by_position
from workbench.lab.activation_store import pos_second


@dataclass(frozen=True)
class Evaluation:
    """Of `rows` rows. `density` [feature] is the share of rows on which each feature fires."""

    rows: int
    l0: float  # mean active features per row
    fvu: float  # fraction of variance unexplained
    cosine: float  # mean cosine of x and its reconstruction
    norm_ratio: float  # mean ‖x̂‖ / ‖x‖
    alive: float  # share of features that fire at all
    dense_1: float  # share of features that fire on more than 1 % of the rows
    dense_10: float  # … on more than 10 %
    nearest: float  # median, over features, of the cosine to the nearest other feature's direction
    compat_explained_variance: float
    density: Tensor

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, densities as a list."""
        return {**asdict(self), "density": self.density.tolist()}

    def _numbers(self) -> list[tuple[str, str]]:
        shown = {
            name: value for name, value in asdict(self).items() if name not in ("density", "compat_explained_variance")
        }
        return [(name, f"{value:,}" if isinstance(value, int) else f"{value:.4g}") for name, value in shown.items()]

    def __repr__(self) -> str:
        return "\n".join(f"{name:>12}  {value}" for name, value in self._numbers())

    def _repr_html_(self) -> str:
        return table("Dictionary", ("measure", "value"), self._numbers())


@torch.no_grad()
def evaluate(dictionary: Dictionary, x: Tensor, target: Tensor | None = None, batch_size: int = 4096) -> Evaluation:
    """Measure a dictionary on rows x [row, d_in] that it was not trained on (`target` [row, d_out] for a transcoder).

    Raises:
        ValueError: fewer than two rows.
    """
    if len(x) < 2:
        raise ValueError(f"An evaluation needs at least two rows, got {len(x)}.")
    target = x if target is None else target
    mean = target.double().mean(0)
    error = variance = active = cosine = ratio = squares = 0.0
    fired = torch.zeros(dictionary.n_features, dtype=torch.float64)
    for start in range(0, len(x), batch_size):
        piece = slice(start, start + batch_size)
        codes = dictionary.encode(x[piece])
        out, wanted = dictionary.decode(codes).double(), target[piece].double()
        error += float((out - wanted).pow(2).sum())
        variance += float((wanted - mean).pow(2).sum())
        squares += float(wanted.pow(2).sum())
        active += float((codes > 0).sum())
        fired += (codes > 0).sum(0)
        cosine += float(torch.cosine_similarity(out, wanted, dim=-1).sum())
        ratio += float((out.norm(dim=-1) / wanted.norm(dim=-1).clamp_min(1e-12)).sum())
    rows, density = len(x), (fired / len(x)).float()
    # what those tools subtract: the square of the mean over dimensions of E[x_d²], instead of Σ_d E[x_d]²
    per_dimension = target.double().pow(2).mean(0)
    compat = 1 - (error / rows) / (squares / rows - float(per_dimension.mean() ** 2))
    return Evaluation(
        rows, active / rows, error / variance, cosine / rows, ratio / rows,
        float((density > 0).double().mean()), float((density > 0.01).double().mean()), float((density > 0.1).double().mean()),
        float(_nearest(dictionary.W_dec).median()), compat, density,
    )  # fmt: skip


def _nearest(directions: Tensor, block: int = 2048) -> Tensor:
    """Largest cosine of every direction with another one, [feature]; blockwise, so that feature × feature never exists."""
    unit = directions / directions.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    found = []
    for start in range(0, len(unit), block):
        cosine = unit[start : start + block] @ unit.T
        cosine[torch.arange(len(cosine)), start + torch.arange(len(cosine))] = -1.0
        found.append(cosine.max(1).values)
    return torch.cat(found)


@dataclass(frozen=True)
class Recovery:
    """Mean loss in nats per token of the model as it is, with the reconstruction in place of the site, and with the site ablated; and the
    divergence of its predictions from the clean ones. A score is (ablated − reconstructed) / (ablated − clean): 1 loses nothing."""

    tokens: int
    ablation: str
    ce_clean: float
    ce_reconstructed: float
    ce_ablated: float
    kl_reconstructed: float
    kl_ablated: float

    @property
    def ce_score(self) -> float:
        """Share of the loss difference that the reconstruction recovers."""
        return (self.ce_ablated - self.ce_reconstructed) / (self.ce_ablated - self.ce_clean)

    @property
    def kl_score(self) -> float:
        """The same for the divergence."""
        return 1 - self.kl_reconstructed / self.kl_ablated

    def to_json(self) -> dict[str, Any]:
        """Plain numbers with both scores."""
        return {**asdict(self), "ce_score": self.ce_score, "kl_score": self.kl_score}


@torch.no_grad()
def recovered(
    model: Any,
    tokens: Tensor,
    point: str,
    dictionary: Dictionary,
    *,
    head: int | None = None,
    ablation: str = "mean",
    skip: int = 1,
    batch_size: int = 16,
    hooks: Sequence[Any] = (),
) -> Recovery:
    """What the model loses when a site is replaced by its reconstruction.

    Args:
        tokens: int64 [sequence, pos]. point, head: where the dictionary was trained. skip: positions left alone at the start.
        ablation: `"mean"` (over the rows given) or `"zero"`: what the loss is compared with.
    """
    if ablation not in ("mean", "zero"):
        raise ValueError(f"ablation {ablation!r}: expected 'mean' or 'zero'")
    constant: Tensor | float = 0.0
    if ablation == "mean":
        constant = _mean(model, tokens, point, skip, batch_size, hooks)
    replace = reconstruct(dictionary, point, head=head, skip=skip)

    @by_position
    def ablate(x: Tensor, hook: Any) -> Tensor:
        out = x.clone()
        place = (slice(None), slice(skip, None)) if head is None else (slice(None), slice(skip, None), head)
        pos_second(out, hook)[place] = (
            constant if not isinstance(constant, Tensor) else (constant if head is None else constant[head]).to(x.dtype)
        )
        return out

    sums = dict.fromkeys(("ce_clean", "ce_reconstructed", "ce_ablated", "kl_reconstructed", "kl_ablated"), 0.0)
    count = 0
    for start in range(0, len(tokens), batch_size):
        batch = tokens[start : start + batch_size]
        clean = model.run_with_hooks(batch, hooks=list(hooks)).double().log_softmax(-1)[:, skip:-1]
        wanted = batch[:, skip + 1 :, None]
        count += wanted.numel()
        sums["ce_clean"] -= float(clean.gather(-1, wanted).sum())
        for name, edit in (("reconstructed", replace), ("ablated", (point, ablate))):
            logits = model.run_with_hooks(batch, hooks=[*hooks, edit]).double().log_softmax(-1)[:, skip:-1]
            sums[f"ce_{name}"] -= float(logits.gather(-1, wanted).sum())
            sums[f"kl_{name}"] += float((clean.exp() * (clean - logits)).sum())
    return Recovery(count, ablation, **{name: value / count for name, value in sums.items()})


def _mean(model: Any, tokens: Tensor, point: str, skip: int, batch_size: int, hooks: Sequence[Any]) -> Tensor:
    """Mean activation over sequences and positions: the hook point's other axes."""
    total, count = None, 0
    for start in range(0, len(tokens), batch_size):
        _, cache = model.run_with_cache(tokens[start : start + batch_size], names=point, hooks=list(hooks))
        rows = pos_second(cache[point], cache.point(point))[:, skip:].double()
        total = rows.sum((0, 1)) if total is None else total + rows.sum((0, 1))
        count += rows.shape[0] * rows.shape[1]
    assert total is not None
    return total / count
