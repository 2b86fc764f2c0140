"""What a feature's direction says through the unembedding alone: the tokens whose logits it raises and lowers most."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from probes.features.dictionaries import Dictionary
from workbench.lab.activation_store import Site


@dataclass(frozen=True)
class TokenEffects:
    """Per feature (token ids, change of the logit per unit of the feature, against the mean token), [feature, rank] each."""

    promoted: tuple[Tensor, Tensor]
    suppressed: tuple[Tensor, Tensor]


@torch.no_grad()
def token_effects(
    model: Any, site: Site, dictionary: Dictionary, features: Sequence[int] | None = None, k: int = 8, block: int = 256
) -> TokenEffects | None:
    """The direct effect of directions on logits, final norm left out; None for sites that are not of the residual stream's width.

    Args:
        features: which (None: all). k: tokens each. block: directions at a time, so that feature × vocab never exists.
    """
    weights = getattr(model, "W_U", None)
    if weights is None or site.head is not None or weights.shape[0] != dictionary.d_out:
        return None
    chosen = list(range(dictionary.n_features)) if features is None else list(features)
    k = min(k, weights.shape[1])
    parts: list[list[Tensor]] = [[], [], [], []]
    for start in range(0, len(chosen), block):
        logits = dictionary.directions[chosen[start : start + block]].to(weights) @ weights
        logits = logits - logits.mean(-1, keepdim=True)
        for at, found in ((0, logits.topk(k, dim=-1)), (2, logits.topk(k, dim=-1, largest=False))):
            parts[at].append(found.indices)
            parts[at + 1].append(found.values)
    if not chosen:
        return None
    ids_up, up, ids_down, down = (torch.cat(each) for each in parts)
    return TokenEffects((ids_up, up), (ids_down, down))
