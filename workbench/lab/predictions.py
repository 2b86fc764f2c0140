"""What a trace run keeps of a model's predictions: the most likely tokens of every position, and the surprisal of what came.

A language model says what comes next: `loss`, `next.log_probs`, `next.ids`. An encoder with a head for masked tokens says what stands here,
having read both sides and, unless it is masked, the token itself: `here.log_probs`, `here.ids`. An encoder without one says neither.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.lab.run_writer import RunWriter

RANKS = 10


def add_predictions(run: RunWriter, model: Any, logits: Tensor, tokens: Tensor) -> dict[str, str]:
    """Write the arrays of logits [pos, vocab] at tokens [pos]; the names of all predicted tokens by id, where a tokenizer tells them."""
    after = getattr(model, "predicts_next_token", True)
    if not (after or getattr(model, "predicts_masked_tokens", False)):
        return {}
    log_probs = logits.float().log_softmax(-1)
    if after:
        loss = np.full(len(tokens), np.nan, dtype=np.float32)
        loss[1:] = -log_probs[:-1].gather(1, tokens[1:, None])[:, 0].cpu().numpy()
        run.add_array("loss", loss, axes=("pos",), unit="nats")
    best = log_probs.topk(min(RANKS, log_probs.shape[-1]), dim=-1)
    where = "next" if after else "here"
    run.add_array(f"{where}.log_probs", best.values.cpu().numpy(), axes=("pos", "rank"), unit="nats")
    run.add_array(f"{where}.ids", best.indices.cpu().numpy().astype(np.int32), axes=("pos", "rank"))
    return token_names(model.tokenizer, best.indices)


def token_names(tokenizer: Any, ids: Tensor) -> dict[str, str]:
    """The label of every id that occurs, by its number in digits; none of bytes, which need no table."""
    if tokenizer is None or tokenizer.name == "bytes":
        return {}
    found = torch.unique(ids).tolist()
    labels = [
        tokenizer.token_strings([token])[0] for token in found
    ]  # one by one: labels may depend on what stands beside
    return {str(token): label for token, label in zip(found, labels, strict=True)}
