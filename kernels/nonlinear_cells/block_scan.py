"""The linear scan h_t = J_t h_{t-1} + b_t with a small matrix J_t for every unit: what one Newton iteration solves.

With one slot J_t is a number and this is the diagonal scan. With two (ParaLSTM: h and c) it is a 2 x 2 block for every unit;
matrices are held entry by entry, because thousands of 2 x 2 products are slow and four elementwise ones are not.
"""

import torch
from torch import Tensor

from kernels.diagonal_scan import diagonal_scan
from kernels.diagonal_scan.scan import NARROW

Vector = tuple[Tensor, ...]
Matrix = tuple[Vector, ...]
WIDTH = 8  # tokens of one block, as in the diagonal scan


def block_scan(jacobian: Matrix, inputs: Vector) -> Vector:
    """h_t = J_t h_{t-1} + b_t from h = 0. jacobian[a][b] and inputs[a] are [batch, pos, channel], a and b slots.

    Returns h[a] [batch, pos, channel]. Narrow states go in blocks of eight tokens, wide ones token by token.
    """
    if len(inputs) == 1:
        return (diagonal_scan(jacobian[0][0], inputs[0])[0],)
    numbers = inputs[0][:, 0].numel() * len(inputs)
    if numbers >= NARROW.get(inputs[0].device.type, NARROW["cpu"]):
        return _by_token(jacobian, inputs)
    return _in_blocks(jacobian, inputs)


def _by_token(jacobian: Matrix, inputs: Vector) -> Vector:
    matrices = zip(*(zip(*(entry.unbind(1) for entry in row), strict=True) for row in jacobian), strict=True)
    h: Vector | None = None
    history = []
    for matrix, b in zip(matrices, zip(*(part.unbind(1) for part in inputs), strict=True), strict=True):
        h = b if h is None else _add_product(b, matrix, h)
        history.append(h)
    return tuple(torch.stack(parts, 1) for parts in zip(*history, strict=True))


def _in_blocks(jacobian: Matrix, inputs: Vector) -> Vector:
    """Tokens are summed inside blocks of eight, all blocks at once; the block ends are the same problem, eight times shorter."""
    batch, pos, channel = inputs[0].shape
    width = WIDTH if pos > 2 * WIDTH else pos
    n_blocks = -(-pos // width)
    padding = n_blocks * width - pos

    def in_blocks(x: Tensor) -> tuple[Tensor, ...]:
        if padding:  # what follows the last token is never read
            x = torch.cat([x, x.new_zeros(batch, padding, channel)], 1)
        return x.view(batch, n_blocks, width, channel).unbind(2)

    steps = list(zip(*(in_blocks(part) for part in inputs), strict=True))
    matrices = list(zip(*(zip(*map(in_blocks, row), strict=True) for row in jacobian), strict=True))
    sums, products = [steps[0]], [matrices[0]]
    for b, matrix in zip(steps[1:], matrices[1:], strict=True):
        sums.append(_add_product(b, matrix, sums[-1]))
        products.append(_product(matrix, products[-1]))
    if n_blocks > 1:
        ends = _in_blocks(products[-1], sums[-1])
        before = tuple(torch.cat([torch.zeros_like(end[:, :1]), end[:, :-1]], 1) for end in ends)
        sums = [_add_product(part, product, before) for part, product in zip(sums, products, strict=True)]
    stacked = (torch.stack(parts, 2) for parts in zip(*sums, strict=True))
    return tuple(x.reshape(batch, n_blocks * width, channel)[:, :pos] for x in stacked)


def _add_product(b: Vector, matrix: Matrix, h: Vector) -> Vector:
    """b + matrix h."""
    out = []
    for start, row in zip(b, matrix, strict=True):
        total = start
        for entry, part in zip(row, h, strict=True):
            total = torch.addcmul(total, entry, part)
        out.append(total)
    return tuple(out)


def _product(left: Matrix, right: Matrix) -> Matrix:
    columns = list(zip(*right, strict=True))
    return tuple(
        tuple(sum((a * b for a, b in zip(row[1:], column[1:], strict=True)), row[0] * column[0]) for column in columns)
        for row in left
    )
