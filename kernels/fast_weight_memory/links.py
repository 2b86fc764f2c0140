"""From what a memory accumulates to the weights that it uses: mirror descent with the retention gate as regulariser.

    identity      W = A                                              Titans, Yaad: plain decay of the weights
    lq_printed    W = A / ‖A‖_q^(q-2)                                Moneta as printed in its paper
    lq_mirror     W = sign(A) |A|^(q-1) / ‖A‖_q^(q-2)                what its regulariser ‖W‖²_q' / (2(q'-1)) asks for, 1/q + 1/q' = 1
    softmax       W = c · softmax(A) over what a neuron reads        Memora: A holds log W, KL and entropy as regulariser

each layer of the memory by itself. The two lq forms agree only at q = 2: the printed one lacks the elementwise power, so tripling A
divides its weights by 3^(q-3), which at q = 4 makes them smaller. Behrouz et al. 2025, arXiv 2504.13173.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .memory import Memory

LINKS = ("identity", "lq_printed", "lq_mirror", "softmax")


@dataclass(frozen=True)
class Link:
    """kind: one of LINKS. q: the exponent of the lq links. total: c, the sum of the weights that a neuron reads with (softmax)."""

    kind: str = "identity"
    q: float = 4.0
    total: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in LINKS:
            raise ValueError(f"link: expected one of {list(LINKS)}, got {self.kind!r}")

    @property
    def trivial(self) -> bool:
        """Whether what is accumulated are the weights."""
        return self.kind == "identity"

    def weights(self, accumulated: Tensor, memory: Memory) -> Tensor:
        """Packed [..., row, column] -> packed."""
        if self.trivial:
            return accumulated
        return memory.pack([self._layer(layer) for layer in memory.unpack(accumulated)])

    def _layer(self, a: Tensor) -> Tensor:
        if self.kind == "softmax":
            return self.total * a.softmax(-2)
        size = (
            a.abs()
            .pow(self.q)
            .sum((-2, -1), keepdim=True)
            .clamp(min=torch.finfo(a.dtype).tiny)
            .pow((self.q - 2) / self.q)
        )
        raised = a if self.kind == "lq_printed" else a.sign() * a.abs().pow(self.q - 1)
        return raised / size
