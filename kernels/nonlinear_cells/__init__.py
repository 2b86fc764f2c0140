"""Nonlinear recurrent cells: LSTM, GRU, Elman, sLSTM, and the cells of ParaRNN that Newton's method runs in parallel.

Vocabulary: a token *drives* the units of a head through x, the head's last output through r = R h_{t-1}; a cell is an
elementwise *update* of both with the unit's *slots*, whose first is the output h. The *state after token t* has token t
read and written.

- `run_cell`, `cell_states_at`: outputs, final state, chosen states; states and gates can be read and edited on the way.
- `cell_gates`: the gates of every token of a run.
- `local_derivatives`, `jacobian_pattern`, `unit_jacobian`: how strongly each output moves with what drove each earlier token.
"""

from .cells import GRU, LSTM, SLSTM, Cell, Elman, ParaGRU, ParaLSTM
from .gates import cell_gates
from .jacobian import LocalDerivatives, jacobian_pattern, local_derivatives, unit_jacobian
from .run import CellRun, cell_states_at, run_cell

__all__ = [
    "GRU",
    "LSTM",
    "SLSTM",
    "Cell",
    "CellRun",
    "Elman",
    "LocalDerivatives",
    "ParaGRU",
    "ParaLSTM",
    "cell_gates",
    "cell_states_at",
    "jacobian_pattern",
    "local_derivatives",
    "run_cell",
    "unit_jacobian",
]
