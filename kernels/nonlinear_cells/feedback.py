"""Feeding a cell's output back: r = R h + bias, block-diagonal over heads, or diagonal."""

import torch
from torch import Tensor


class FeedBack:
    """The recurrent weights, laid out once for many steps. Calling it: h [head, ..., unit] -> r [head, ..., drive, unit].

    matrix: [head, drive, unit, unit] (from, to), or [head, drive, unit] where each unit feeds back to itself alone.
    bias: [head, drive, unit] or None.
    """

    def __init__(self, matrix: Tensor, bias: Tensor | None) -> None:
        self.matrix, self.bias = matrix, bias
        self.diagonal = matrix.ndim == 3
        self._head, self._drive, self._unit = matrix.shape[:3]
        if not self.diagonal:
            self._flat = matrix.transpose(1, 2).reshape(self._head, self._unit, self._drive * self._unit)
            self._flat_bias = None if bias is None else bias.reshape(self._head, 1, self._drive * self._unit)

    def __call__(self, h: Tensor) -> Tensor:
        if self.diagonal:
            ones = [1] * (h.ndim - 2)
            r = h.unsqueeze(-2) * self.matrix.view(self._head, *ones, self._drive, self._unit)
            return r if self.bias is None else r + self.bias.view(self._head, *ones, self._drive, self._unit)
        rows = h.flatten(1, -2)
        r = torch.bmm(rows, self._flat) if self._flat_bias is None else torch.baddbmm(self._flat_bias, rows, self._flat)
        return r.view(*h.shape[:-1], self._drive, self._unit)
