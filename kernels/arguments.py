"""Checks of arguments shared by the operations: each mistake is named with what was expected."""

import difflib
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

MODES = ("chunked", "recurrent", "parallel")
HALF_TYPES = (torch.float16, torch.bfloat16)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of the state and of every sum: float32 for 16-bit inputs, else the type of the inputs."""
    return torch.float32 if dtype in HALF_TYPES else dtype


def shape_of(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def check_tensor(name: str, tensor: object, axes: str, n_dims: int) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor [{axes}], got {type(tensor).__name__}")
    if tensor.ndim != n_dims:
        raise ValueError(f"{name}: expected {n_dims} axes [{axes}], got shape {shape_of(tensor)}")
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point tensor, got {tensor.dtype}")


def check_like(name: str, tensor: Tensor, other_name: str, other: Tensor, same_dtype: bool) -> None:
    if tensor.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as for {other_name}, got {tensor.device}")
    if same_dtype and tensor.dtype != other.dtype:
        raise ValueError(f"{name}: expected {other.dtype} as for {other_name}, got {tensor.dtype}")


def check_query(q: Tensor, k: Tensor) -> None:
    check_tensor("q", q, "batch, head, pos, state_k", 4)
    if q.shape != k.shape:
        raise ValueError(f"q: expected the shape of k, {shape_of(k)} [batch, head, pos, state_k], got {shape_of(q)}")
    check_like("q", q, "k", k, same_dtype=True)


def check_key(k: Tensor) -> None:
    check_tensor("k", k, "batch, head, pos, state_k", 4)
    if 0 in (k.shape[0], k.shape[1], k.shape[3]):
        raise ValueError(f"k: expected at least one batch, head and state_k (only pos may be 0), got {shape_of(k)}")


def check_value(v: Tensor, k: Tensor) -> None:
    check_tensor("v", v, "batch, head or 1, pos, state_v", 4)
    batch, head, pos, _ = k.shape
    if v.shape[0] != batch or v.shape[1] not in (head, 1) or v.shape[2] != pos:
        raise ValueError(
            f"v: expected [batch={batch}, head={head} or 1, pos={pos}, state_v] to match k {shape_of(k)}, got {shape_of(v)}"
        )
    if v.shape[3] == 0:
        raise ValueError(f"v: expected at least one state_v, got {shape_of(v)}")
    check_like("v", v, "k", k, same_dtype=True)


def check_decay(log_decay: Tensor | None, k: Tensor) -> None:
    """Shapes only: a test of the values (finite, at most 0) would read the whole tensor on every call."""
    if log_decay is None:
        return
    if not isinstance(log_decay, Tensor):
        raise TypeError(f"log_decay: expected a tensor or None, got {type(log_decay).__name__}")
    batch, head, pos, state_k = k.shape
    allowed = [(head,), (batch, head, pos), (batch, head, pos, state_k)]
    if tuple(log_decay.shape) not in allowed:
        raise ValueError(
            f"log_decay: expected [head={head}], [batch={batch}, head={head}, pos={pos}] or [batch={batch}, "
            f"head={head}, pos={pos}, state_k={state_k}], got {shape_of(log_decay)}"
        )
    if not log_decay.is_floating_point():
        raise ValueError(f"log_decay: expected a floating-point tensor, got {log_decay.dtype}")
    check_like("log_decay", log_decay, "k", k, same_dtype=False)


def check_write(write: Tensor | None, k: Tensor) -> None:
    if write is not None:
        check_token_weight("write", write, k)


def check_token_weight(name: str, weight: object, k: Tensor) -> None:
    """One number per token and head: the write of linear attention, the beta of the delta rule."""
    check_tensor(name, weight, "batch, head, pos", 3)
    assert isinstance(weight, Tensor)
    if weight.shape != k.shape[:3]:
        raise ValueError(f"{name}: expected [batch, head, pos] = {list(k.shape[:3])}, got {shape_of(weight)}")
    check_like(name, weight, "k", k, same_dtype=False)


def check_state(name: str, state: object, k: Tensor, state_v: int) -> None:
    expected = [k.shape[0], k.shape[1], k.shape[3], state_v]
    if not isinstance(state, Tensor):
        raise TypeError(f"{name}: expected a tensor or None, got {type(state).__name__}")
    if list(state.shape) != expected:
        raise ValueError(f"{name}: expected [batch, head, state_k, state_v] = {expected}, got {shape_of(state)}")
    dtype = compute_dtype(k.dtype)
    if state.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, the type of states of {k.dtype} inputs, got {state.dtype}")
    check_like(name, state, "k", k, same_dtype=False)


def check_mode(mode: str, modes: Sequence[str] = MODES) -> None:
    if mode not in modes:
        near = difflib.get_close_matches(str(mode), modes, n=1, cutoff=0.0)[0]
        raise ValueError(f"mode: unknown mode {mode!r}; expected one of {list(modes)}. Did you mean {near!r}?")


def check_positive_integer(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def check_positions(
    name: str, positions: Sequence[int] | Tensor, pos: int, axis: str = "position", size_name: str = "pos"
) -> list[int]:
    """The positions as a list of integers, each in 0 … pos - 1; or the indices into another axis."""
    raw = positions.tolist() if isinstance(positions, Tensor) else list(positions)
    for position in raw:
        if not isinstance(position, int) or isinstance(position, bool):
            raise ValueError(f"{name}: expected integer {axis}s, got {position!r}")
        if not 0 <= position < pos:
            raise ValueError(f"{name}: {axis} {position} is outside 0 … {pos - 1} ({size_name} = {pos})")
    return raw


def check_run(
    k: Tensor,
    state_v: int,
    initial_state: Tensor | None,
    chunk_size: int | None,
    stops: Sequence[int] | None,
    on_state: object,
) -> tuple[Tensor, list[int]]:
    """What every run of a matrix state over tokens begins with: (the state before the first, where to stop)."""
    if chunk_size is not None:
        check_positive_integer("chunk_size", chunk_size)
    batch, head, pos, state_k = k.shape
    if initial_state is None:
        state = k.new_zeros(batch, head, state_k, state_v, dtype=compute_dtype(k.dtype))
    else:
        check_state("initial_state", initial_state, k, state_v)
        state = initial_state
    if stops is None and on_state is not None:
        raise ValueError("on_state: given without stops, so it would never be called; pass the positions to stop at")
    return state, [] if stops is None else check_stops(stops, on_state, pos)


def check_stops(stops: Sequence[int], on_state: object, pos: int) -> list[int]:
    positions = check_positions("stops", stops, pos)
    for before, after in itertools.pairwise(positions):
        if after <= before:
            raise ValueError(f"stops: expected strictly increasing positions, got {before} before {after}")
    if positions and on_state is None:
        raise ValueError("stops: given without on_state; pass on_state(position, state) or leave stops out")
    return positions
