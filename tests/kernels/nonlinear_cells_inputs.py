"""Inputs for the tests of the nonlinear cells, and the cells written out gate by gate from their papers' equations."""

import torch
from torch import Tensor

from kernels.nonlinear_cells import GRU, LSTM, SLSTM, Cell, Elman, ParaGRU, ParaLSTM

BATCH, HEAD, POS, UNIT = 2, 3, 11, 4
DIAGONAL = ("paragru", "paralstm")
NAMES = ("elman", "relu", "lstm", "gru", "slstm", *DIAGONAL)


def make_cell(name: str, head: int = HEAD, unit: int = UNIT, scale: float = 1.0) -> Cell:
    generator = torch.Generator().manual_seed(7)
    peephole = scale * torch.randn(2, head, unit, generator=generator, dtype=torch.float64)
    cells: dict[str, Cell] = {
        "elman": Elman(),
        "relu": Elman("relu"),
        "lstm": LSTM(),
        "gru": GRU(),
        "slstm": SLSTM(),
        "paragru": ParaGRU(),
        "paralstm": ParaLSTM(peephole),
    }
    return cells[name]


def make_inputs(
    name: str, pos: int = POS, head: int = HEAD, unit: int = UNIT, scale: float = 1.0
) -> tuple[Cell, Tensor, Tensor, Tensor]:
    """(cell, inputs, recurrent, recurrent bias) in float64."""
    cell = make_cell(name, head, unit, scale)
    drives = len(cell.drives)
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shape = (head, drives, unit) if name in DIAGONAL else (head, drives, unit, unit)
    inputs = random(BATCH, head, pos, drives, unit)
    return cell, inputs, scale * random(*shape) * (0.3 if name == "relu" else 0.7), random(head, drives, unit)


def written_out(
    name: str, inputs: Tensor, recurrent: Tensor, bias: Tensor, cell: Cell, start: dict[str, Tensor] | None = None
) -> list[dict[str, Tensor]]:
    """The state after every token from equations in the terms of the papers, one batch row, head and token at a time."""
    batch, head, pos, _, unit = inputs.shape
    zero = inputs.new_zeros(batch, head, unit)
    s = start or {slot: zero for slot in cell.slots}
    history = []
    for t in range(pos):
        x = {drive: inputs[:, :, t, number] for number, drive in enumerate(cell.drives)}
        r = {}
        for number, drive in enumerate(cell.drives):
            weight = recurrent[:, number]
            fed = s["h"] * weight if name in DIAGONAL else torch.einsum("bhu,huv->bhv", s["h"], weight)
            r[drive] = fed + bias[:, number]
        s = step_written_out(name, x, r, s, cell)
        history.append(s)
    return history


def step_written_out(
    name: str, x: dict[str, Tensor], r: dict[str, Tensor], s: dict[str, Tensor], cell: Cell
) -> dict[str, Tensor]:
    def sigmoid(drive: str, more: Tensor | float = 0.0) -> Tensor:
        return 1 / (1 + torch.exp(-(x[drive] + r[drive] + more)))

    h = s["h"]
    if name in ("elman", "relu"):
        drive = x["candidate"] + r["candidate"]
        return {"h": torch.tanh(drive) if name == "elman" else drive.clamp(min=0)}
    if name == "lstm":
        c = sigmoid("forget") * s["c"] + sigmoid("input") * torch.tanh(x["candidate"] + r["candidate"])
        return {"h": sigmoid("output") * torch.tanh(c), "c": c}
    if name in ("gru", "paragru"):
        new = torch.tanh(x["candidate"] + sigmoid("reset") * r["candidate"])
        z = sigmoid("update")
        return {"h": z * h + (1 - z) * new if name == "gru" else (1 - z) * h + z * new}
    if name == "paralstm":
        assert isinstance(cell, ParaLSTM)
        f = sigmoid("forget", cell.peephole[0] * s["c"])
        c = f * s["c"] + (1 - f) * torch.tanh(x["candidate"] + r["candidate"])
        return {"h": sigmoid("output", cell.peephole[1] * c) * torch.tanh(c), "c": c}
    # sLSTM without the stabiliser: exponentials as they are (eq. 8-13); c and n then are exp(m) times the stabilised ones
    f, i = sigmoid("forget"), torch.exp(x["input"] + r["input"])
    c = f * s["c"] + i * torch.tanh(x["candidate"] + r["candidate"])
    n = f * s["n"] + i
    return {"h": sigmoid("output") * c / n, "c": c, "n": n, "m": s["m"]}
