"""The diagonal scan h_t = a_t * h_{t-1} + b_t, and Mamba's selective scan built on it.

The decay is elementwise and may differ for every token and number of the state, real or complex: RG-LRU, QRNN, minGRU,
GateLoop, S4D and moving averages as step modes, Mamba-1. The *state after token t* has token t read and written.

- `diagonal_scan`, `scan_states_at`: all states, or those at chosen tokens; forwards or in reverse; edits propagate.
- `selective_scan`, `selective_states_at`, `selective_entries`: the scan of Mamba-1 without positions x state memory.
- `selective_pattern`: its exact token-to-source weights, channel by channel.
"""

from .pattern import selective_pattern
from .scan import diagonal_scan, scan_states_at
from .selective import selective_entries, selective_scan, selective_states_at

__all__ = [
    "diagonal_scan",
    "scan_states_at",
    "selective_entries",
    "selective_pattern",
    "selective_scan",
    "selective_states_at",
]
