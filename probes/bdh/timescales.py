"""Time scales of BDH's neurons: the rotation period of a neuron decides how far back it can tell positions apart.

The octile of neuron j is ⌊8 j₀ / N⌋ with j₀ the even neuron of its pair; the frequencies fall as θ^(−j₀/N), so octile o holds the neurons
with 1/ω in θ^(o/8) … θ^((o+1)/8) tokens (for θ = 2¹⁶: 4^o … 4^(o+1), the buckets of figure 14b). Octiles are read off the frequencies
themselves, so they are right for merged models too, whose neurons are not in the order of their frequencies.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from probes.bdh.capture import require_bdh

N_OCTILES = 8


def octiles(model: Any) -> Tensor:
    """The octile 0 (fastest) … 7 (slowest) of each neuron of a head, [neuron]."""
    model = require_bdh(model, variants=True)
    radians = model.weights.frequencies.double() * (2 * math.pi)
    # log_θ(1/ω) = j₀/N; the sum of a millionth keeps float32 frequencies on the right side of a boundary
    place = -radians.log() / math.log(model.config.theta)
    return (N_OCTILES * place + 1e-6).floor().long().clamp(0, N_OCTILES - 1)


def periods(model: Any) -> Tensor:
    """Tokens per full turn of each neuron of a head, [neuron]."""
    return 1 / require_bdh(model, variants=True).weights.frequencies.double()


def neurons_of(model: Any, chosen: int | Sequence[int]) -> list[int]:
    """The neurons of a head (the same in every head) that belong to some octiles. Raises ValueError for one that is empty or unknown."""
    wanted = [chosen] if isinstance(chosen, int) else list(chosen)
    found = octiles(model)
    for octile in wanted:
        if not 0 <= octile < N_OCTILES:
            raise ValueError(f"Octile {octile} does not exist; expected 0 (fastest) … {N_OCTILES - 1} (slowest).")
        if not bool((found == octile).any()):
            raise ValueError(
                f"Octile {octile} is empty: this model has {len(found)} neurons per head, in octiles {sorted(set(found.tolist()))}."
            )
    if not wanted:
        raise ValueError("No octile was chosen.")
    return torch.isin(found, torch.tensor(wanted, device=found.device)).nonzero()[:, 0].tolist()
