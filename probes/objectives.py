"""What an attribution is about: one number per sequence, made of the logits.

    LogitDifference(answer, wrong, at=-1)          logit(answer) − logit(wrong)
    ProbabilityDifference(right, wrong, at=-1)     Σ p(right) − Σ p(wrong), e.g. later years against earlier ones
    Divergence(reference_logits)                   −KL(reference ‖ now), 0 where nothing changed
    MeanLogProbability(tokens, counted)            mean log p of the tokens that count, in nats

An objective is any function from logits [batch, pos, vocab] to [batch], larger meaning better; these four are the usual ones. All of
them depend on each sequence alone, so that a batch's order and a sequence's padding change nothing. `at` is a position (negative: from
the end) or one for each sequence, [batch]; `last_real(mask)` gives the last real tokens of a padded batch.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Objective = Callable[[Tensor], Tensor]


def predicts(model: Any) -> str | None:
    """What logits at a position are about: `"next"`, the token behind it; `"here"`, the token there (an encoder with a head for masked
    tokens); None for a model without a head that predicts tokens."""
    if getattr(model, "predicts_masked_tokens", False):
        return "here"
    return "next" if getattr(model, "predicts_next_token", True) else None


def last_real(mask: Tensor) -> Tensor:
    """Position of the last real token of each sequence; mask [batch, pos], True at real tokens -> [batch]."""
    return (mask.long() * torch.arange(mask.shape[1], device=mask.device)).argmax(1)


def rows_at(x: Tensor, at: int | Tensor | Sequence[int]) -> Tensor:
    """One position of each sequence: [batch, pos, ...] -> [batch, ...].

    Raises:
        ValueError: a position that does not exist, or not one for each sequence.
    """
    batch, length = x.shape[:2]
    positions = torch.as_tensor(at, device=x.device)
    if positions.is_floating_point() or positions.dtype == torch.bool or positions.dim() > 1:
        raise ValueError(f"at is {at!r}; expected a position, or one for each sequence [batch].")
    if positions.dim() == 1 and len(positions) != batch:
        raise ValueError(f"at names {len(positions)} positions for {batch} sequences; expected one for each.")
    if bool(((positions < -length) | (positions >= length)).any()):
        raise ValueError(f"at is {positions.tolist()}; the sequences have positions 0..{length - 1}.")
    return x[torch.arange(batch, device=x.device), positions.expand(batch) % length]


def token_ids(ids: int | Tensor | Sequence[int], batch: int, vocab: int, what: str) -> Tensor:
    """Ids as [batch]; raises ValueError naming `what` if they do not fit the batch or the vocabulary."""
    chosen = torch.as_tensor(ids).cpu()
    if chosen.dim() > 1 or chosen.is_floating_point() or (chosen.dim() == 1 and len(chosen) != batch):
        raise ValueError(
            f"{what} has shape {tuple(chosen.shape)}; expected a token id, or one for each of {batch} sequences."
        )
    if bool(((chosen < 0) | (chosen >= vocab)).any()):
        raise ValueError(f"{what} is {chosen.tolist()}; expected token ids 0..{vocab - 1}.")
    return chosen.expand(batch).long()


@dataclass(frozen=True)
class LogitDifference:
    """logit(answer) − logit(wrong) at one position; without `wrong`, the answer's logit alone. Ids are numbers or [batch]."""

    answer: int | Tensor | Sequence[int]
    wrong: int | Tensor | Sequence[int] | None = None
    at: int | Tensor | Sequence[int] = -1

    def direction(self, batch: int, vocab: int) -> Tensor:
        """The same as a direction over the vocabulary: +1 at the answer, −1 at the wrong token. [batch, vocab], float64."""
        result = torch.zeros(batch, vocab, dtype=torch.float64)
        rows = torch.arange(batch)
        result[rows, token_ids(self.answer, batch, vocab, "answer")] += 1
        if self.wrong is not None:
            result[rows, token_ids(self.wrong, batch, vocab, "wrong")] -= 1
        return result

    def __call__(self, logits: Tensor) -> Tensor:
        """[batch, pos, vocab] -> [batch]."""
        return (rows_at(logits, self.at) * self.direction(len(logits), logits.shape[-1]).to(logits)).sum(-1)


@dataclass(frozen=True)
class ProbabilityDifference:
    """Σ p(right) − Σ p(wrong) at one position. `right`, `wrong`: True at the tokens meant, [vocab] or [batch, vocab]."""

    right: Tensor
    wrong: Tensor
    at: int | Tensor | Sequence[int] = -1

    def __call__(self, logits: Tensor) -> Tensor:
        """[batch, pos, vocab] -> [batch]."""
        chosen = rows_at(logits, self.at)
        for name, tokens in (("right", self.right), ("wrong", self.wrong)):
            if tokens.dtype != torch.bool or tokens.shape not in (chosen.shape, chosen.shape[1:]):
                raise ValueError(
                    f"{name} is {tokens.dtype} {tuple(tokens.shape)}; expected bool [vocab] or [batch, vocab] = {tuple(chosen.shape)}."
                )
        sign = self.right.to(chosen) - self.wrong.to(chosen)
        return (chosen.softmax(-1) * sign).sum(-1)


@dataclass(frozen=True)
class Divergence:
    """−KL(reference ‖ now) in nats, so that larger is better.

    Args:
        reference: logits of the run to stay close to, [batch, pos, vocab]. at: a position, or None for the mean over positions.
        mask: True at the positions that count, [batch, pos], where `at` is None.
    """

    reference: Tensor
    at: int | Tensor | Sequence[int] | None = -1
    mask: Tensor | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """[batch, pos, vocab] -> [batch]."""
        if logits.shape != self.reference.shape:
            raise ValueError(
                f"logits have shape {tuple(logits.shape)}; the reference's is {tuple(self.reference.shape)}."
            )
        if self.at is not None:
            return -divergence(rows_at(self.reference, self.at), rows_at(logits, self.at))
        every = divergence(self.reference, logits)
        if self.mask is None:
            return -every.mean(1)
        counted = self.mask.to(every)
        return -(every * counted).sum(1) / counted.sum(1)


@dataclass(frozen=True)
class MeanLogProbability:
    """Mean log p of the tokens that count, in nats: `counted[b, t]` (bool [batch, pos]) asks for tokens[b, t] from those before it."""

    tokens: Tensor
    counted: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        """[batch, pos, vocab] -> [batch]; logits of all positions, or of all but the last."""
        targets, counted = self.tokens[:, 1:], self.counted[:, 1:]
        if bool(self.counted[:, 0].any()) or not bool(counted.any(1).all()):
            raise ValueError("counted must name at least one token of every sequence, and never the first.")
        chosen = logits[:, : targets.shape[1]].log_softmax(-1).gather(-1, targets[..., None])[..., 0]
        return (chosen * counted).sum(1) / counted.sum(1)


def divergence(reference: Tensor, logits: Tensor) -> Tensor:
    """KL(reference ‖ logits) in nats over the last axis: [..., vocab] -> [...]."""
    wanted = reference.log_softmax(-1)
    return (wanted.exp() * (wanted - logits.log_softmax(-1))).sum(-1)


def measured(objective: Objective, logits: Any, copies: int = 1) -> Tensor:
    """The objective of each of `copies` stacked copies of a batch: logits [copies · batch, pos, vocab] -> [copies, batch].

    Raises:
        ValueError: the objective does not give one number for each sequence.
    """
    each = logits.unflatten(0, (copies, -1))
    values = [objective(part) for part in each]
    for value in values:
        if not isinstance(value, Tensor) or value.shape != each.shape[1:2]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"The objective gave {got}; expected one number for each of {each.shape[1]} sequences.")
    return torch.stack(values)
