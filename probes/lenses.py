"""Lenses: what would the model predict if it stopped after layer l?

    reading = logit_lens(model, tokens)            logits_l = U(LN_final(h_l))
    reading = tuned_lens.read(model, tokens)       logits_l = U(LN_final(h_l + A_l h_l + b_l))      probes.tuned_lens

h_l is the residual stream after l layers (depth 0: the embedding; the last depth is the model itself). Sources: nostalgebraist 2020,
"interpreting GPT: the logit lens"; Belrose et al. 2023, "Eliciting Latent Predictions from Transformers with the Tuned Lens" (arXiv
2303.08112). The stream is found by its role, so a lens reads every architecture here; in BDH with the paper's residual, h_l is v_l.

A logit lens says how much of the answer stands in the output's own coordinates. A depth that it cannot read may still hold the answer in
others, which is what the tuned lens is for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.objectives import divergence, predicts, token_ids
from workbench.instrument.errors import suggestion
from workbench.instrument.selection import Select

MEASURES = ("divergence", "agreement", "entropy", "loss", "rank")
Translate = Callable[[int, Tensor], Tensor]


@dataclass(frozen=True)
class LensReading:
    """What a lens says at every depth. Arrays are [depth, batch, pos], nan at padding.

    Args:
        depths: names of the depths: "embedding", then "layer l" (with steps, "layer l, step k"); the last one is the model's output.
        divergence: KL(final ‖ lens) in nats. agreement: 1 where both have the same most likely token, else 0. entropy: of the lens, nats.
        loss: −log p of the target in nats; the target is the next token (nan at the last position, after which nothing is known) unless
            another was asked for, and of an encoder with a head for masked tokens the token itself. rank: how many tokens are more likely
            than the target, 0 if none is.
        top_ids, top_log_probs: the most likely tokens, [depth, batch, pos, rank].
    """

    depths: tuple[str, ...]
    divergence: Tensor
    agreement: Tensor
    entropy: Tensor
    loss: Tensor
    rank: Tensor
    top_ids: Tensor
    top_log_probs: Tensor

    def mean(self, measure: str) -> Tensor:
        """Mean over real tokens at each depth, [depth]. Raises ValueError with the nearest name for an unknown measure."""
        if measure not in MEASURES:
            raise ValueError(
                f"Unknown measure {measure!r}.{suggestion(measure, MEASURES)} Expected one of {', '.join(MEASURES)}."
            )
        values: Tensor = getattr(self, measure)
        return values.flatten(1).nanmean(1)

    def to_json(self) -> dict[str, Any]:
        """Means by depth, and for each depth the most likely tokens of the first sequence."""
        return {
            "depths": list(self.depths),
            **{measure: self.mean(measure).tolist() for measure in MEASURES},
            "top_ids": self.top_ids[:, 0].tolist(),
            "top_log_probs": self.top_log_probs[:, 0].tolist(),
        }

    def __repr__(self) -> str:
        rows = zip(self.depths, self.mean("divergence").tolist(), self.mean("agreement").tolist(), strict=True)
        return "\n".join(
            ["LensReading", *(f"  {depth}: KL {far:.3f} nats, agrees {same:.0%}" for depth, far, same in rows)]
        )


@torch.no_grad()
def logit_lens(
    model: Any,
    tokens: Any,
    *,
    mask: Tensor | None = None,
    top: int = 5,
    batch_size: int = 16,
    hooks: Any = (),
    translate: Translate | None = None,
    target: int | None = None,
) -> LensReading:
    """Read the residual stream at every depth through the model's own final norm and unembedding.

    Args:
        tokens: ids [batch, pos] or text. mask: True at real tokens, [batch, pos]. top: how many likely tokens to keep.
        batch_size: sequences per run (memory, not results). hooks: attached to the runs, so that an edited model is read.
        translate: what is done to the stream first, `translate(depth, h) -> h`; a tuned lens gives its own.
        target: the token whose loss and rank are read everywhere (None: each position's next token; of an encoder its own).

    Raises:
        ValueError: `top` or `target` beyond the vocabulary, an encoder without a head.
    """
    said = predicts(model)
    if said is None:
        raise ValueError(
            f"{model.name} has no head that predicts tokens, so its stream cannot be read as some. Expected a model with one."
        )
    here = said == "here"
    tokens = model.to_tokens(tokens)
    if not 1 <= top <= model.vocab_size:
        raise ValueError(f"top is {top}; expected 1..{model.vocab_size}, the size of the vocabulary.")
    if target is not None:
        token_ids(target, 1, model.vocab_size, "target")
    parts = []
    for start in range(0, len(tokens), batch_size):
        some = slice(start, start + batch_size)
        padding = None if mask is None else mask[some]
        final, streams = residual_streams(model, tokens[some], mask=padding, hooks=hooks)
        parts.append(_read(model, tokens[some], final, list(streams.values()), padding, top, translate, target, here))
    return LensReading(
        depth_names(list(streams)), *(torch.cat([part[i] for part in parts], 1) for i in range(len(parts[0])))
    )


def residual_streams(
    model: Any, tokens: Tensor, *, mask: Tensor | None = None, hooks: Any = ()
) -> tuple[Tensor, dict[Any, Tensor]]:
    """Logits [batch, pos, vocab], and the residual stream [batch, pos, d_model] that enters each layer, or (layer, step), in order."""
    logits, cache = model.run_with_cache(tokens, names=Select(role="resid"), mask=mask, hooks=hooks)
    entering = cache.by_role("resid")
    order = [depth for layer, step in model.visits for depth in (layer, (layer, step)) if depth in entering]
    return logits, {depth: entering[depth] for depth in order}


def depth_names(layers: Sequence[Any]) -> tuple[str, ...]:
    """Depths by what was last added: the embedding, then each layer or (layer, step)."""
    passed = [f"layer {d[0]}, step {d[1]}" if isinstance(d, tuple) else f"layer {d}" for d in layers]
    return ("embedding", *passed)


def _read(
    model: Any,
    tokens: Tensor,
    final: Tensor,
    streams: Sequence[Tensor],
    mask: Tensor | None,
    top: int,
    translate: Translate | None,
    target: int | None,
    here: bool,
) -> tuple[Tensor, ...]:
    """The fields of `LensReading` after `depths`, in order; one depth's logits at a time are held."""
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.to(tokens.device, torch.bool)
    if target is None and here:
        asked, targets = real, tokens[..., None]
    elif target is None:
        asked = real & torch.cat([real[:, 1:], torch.zeros_like(real[:, :1])], 1)
        targets = tokens.roll(-1, 1)[..., None]
    else:
        asked, targets = real, torch.full_like(tokens, target)[..., None]
    kept: list[list[Tensor]] = [[] for _ in range(7)]
    for depth in range(len(streams) + 1):
        if depth == len(streams):
            logits = final  # not from the stream: some architectures normalise it once more on its way out
        else:
            logits = model.unembed_residual(translate(depth, streams[depth]) if translate else streams[depth])
        log_probs = logits.log_softmax(-1)
        best = log_probs.topk(top, dim=-1)
        of_target = log_probs.gather(-1, targets)
        measures = (
            divergence(final, log_probs),
            (log_probs.argmax(-1) == final.log_softmax(-1).argmax(-1)).to(final),
            -(log_probs.exp() * log_probs).sum(-1),
            (-of_target[..., 0]).masked_fill(~asked, float("nan")),
            (log_probs > of_target).sum(-1).to(final).masked_fill(~asked, float("nan")),
        )
        for values, measure in zip(kept, measures, strict=False):
            values.append(measure.masked_fill(~real, float("nan")))
        kept[5].append(best.indices)
        kept[6].append(best.values)
    return tuple(torch.stack(values) for values in kept)
