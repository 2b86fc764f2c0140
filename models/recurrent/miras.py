"""Miras (Behrouz et al. 2025, "It's All Connected", arXiv 2504.13173): test-time memories by what they learn and by how they forget.

    Moneta   loss Σ|e|^3,             W = A / ‖A‖_4^2       A_t = α_t A_{t−1} − η_t ∇loss
    Yaad     squared loss, but linear in e where |e| > δ_t; W = A, plain decay, the same recurrence
    Memora   squared loss,            W = softmax(A)        so that W stays a distribution and log W decays

each with the memory M(x) = x + LN(W_2 GELU(W_1 x)) and no momentum, in the block of Titans' memory. What the paper leaves open or prints
otherwise, and what is done here:

- Moneta's printed weights are not what its own regulariser asks for (`links.py`); `link="lq_mirror"` is.
- Yaad switches a whole token between the two losses (`loss="huber_coordinate"` switches each coordinate).
- Gates are one number per token and head; the paper has one per channel, of low rank.
- Within a block of `every` tokens gradients are those of the block's first weights; the links are applied after every token, where the
  paper applies Moneta's once per block and takes one exact step of Memora's first. With `every=1` they are the equations above.
- Memora sums what each neuron reads with to 1; the paper says "or normalised per slice".
- No rotary positions: the convolution tells neighbours apart.
"""

from dataclasses import dataclass
from typing import Any

from models.mixers import register_mixer
from models.recurrent.titans import Titans, TitansConfig


@dataclass(frozen=True)
class MirasConfig(TitansConfig):
    """Args: those of `TitansConfig`, with the paper's common choices; the classmethods are its three models."""

    momentum: bool = False
    expansion: int = 4
    kind: str = "miras"

    @classmethod
    def moneta(cls, n_heads: int, **changes: Any) -> "MirasConfig":
        """(p, q) = (3, 4)."""
        return cls(n_heads, **{"loss": "lp", "loss_power": 3.0, "link": "lq_printed", "link_power": 4.0, **changes})

    @classmethod
    def yaad(cls, n_heads: int, **changes: Any) -> "MirasConfig":
        """Huber loss with a threshold per token."""
        return cls(n_heads, **{"loss": "huber", **changes})

    @classmethod
    def memora(cls, n_heads: int, **changes: Any) -> "MirasConfig":
        """Weights on the simplex."""
        return cls(n_heads, **{"link": "softmax", **changes})


@register_mixer(MirasConfig)
class Miras(Titans):
    """The Miras mixer of one layer. [batch, pos, d_model] -> same."""

    def describe(self) -> dict[str, Any]:
        """The layer record of a run manifest."""
        return self.memory.describe("miras")
