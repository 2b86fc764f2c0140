"""Row and key statistics of softmax attention as two Triton kernels; profile, map, features and top-k stay with the strips in torch.

`read_rows`: a program owns some queries and walks over the keys that they may read with the online softmax of Milakov & Gimelshein 2018
(running maximum m, sums rescaled by 2^(m_old − m)); besides Σ e it carries Σ e·(s − m), from which the entropy comes, the position of the
maximum, and the weights on first, own and previous token. `read_columns`: a program owns some keys and walks over the queries that may
read them, with the log normalisers that the first kernel left. Nobody writes where another does: no atomics, the same bits every time.

Loads are widened to float32 before any arithmetic. Scores are in units of log 2, since 2^x is what the hardware has.
"""

from collections.abc import Set
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import LOG2_E, SoftmaxTiles
from .visibility import Visibility

ROWS = ("log_normaliser", "entropy", "largest", "first", "self", "previous", "distance", "distance_squared")
COLUMNS = ("received", "received_largest")
SUPPORTED = frozenset({*ROWS[:7], *COLUMNS})


@triton.jit
def score_tile(
    q, k, row, key, real_place, segment_place, bias_place, first, keys, window, factor, softcap, lowest_distance,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, REAL: tl.constexpr, SEGMENTS: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr,
    WINDOW: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores [row, key] in units of log 2, and which of them may be read. row, key: indices; q [row, d], k [d, key]."""
    s = tl.dot(q, k, input_precision=PRECISION) * factor
    if SOFTCAP:  # tanh x = 1 − 2 / (e^{2x} + 1); factor already divides by the cap
        s = softcap * (1.0 - 2.0 / (tl.exp2(s * 2.8853900817779268) + 1.0)) * 1.4426950408889634
    distance = first + row[:, None] - key[None, :]
    visible = (key < keys)[None, :] & (row >= 0)[:, None]
    if CAUSAL:
        visible &= (distance > 0) if STRICT else (distance >= 0)
    if WINDOW:
        visible &= (distance < window) & (distance > -window)
    if REAL:
        visible &= (tl.load(real_place + key, mask=key < keys, other=0) > 0)[None, :]
    if SEGMENTS:
        own = tl.load(segment_place + first + row, mask=first + row < keys, other=-1)
        visible &= tl.load(segment_place + key, mask=key < keys, other=0)[None, :] == own[:, None]
    if BIAS:
        s += tl.load(bias_place + distance - lowest_distance, mask=visible, other=0.0)
    return tl.where(visible, s, float("-inf")), visible


@triton.jit
def read_rows(
    q_pointer, k_pointer, bias_pointer, real_pointer, segment_pointer, output_pointer, at_pointer,
    q_batch, q_head, q_pos, k_batch, k_head, k_pos, heads, group_size, queries, keys, width, window,
    first_key_pointer, factor, softcap, lowest_distance, n_distances,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, REAL: tl.constexpr, SEGMENTS: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (row blocks, batch * head). output [statistic, batch * head, query] float32, at [batch * head, query] int32."""
    flat = tl.program_id(1).to(tl.int64)
    item, head = flat // heads, flat % heads
    first = keys - queries
    real_place, segment_place = real_pointer + item * keys, segment_pointer + item * keys
    bias_place = bias_pointer + head * n_distances
    row = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    exists = row < queries
    d = tl.arange(0, BLOCK_D)
    q_place = q_pointer + item * q_batch + head * q_head + row.to(tl.int64)[:, None] * q_pos + d[None, :]
    q = tl.load(q_place, mask=exists[:, None] & (d < width)[None, :], other=0.0).to(tl.float32)
    k_place = k_pointer + item * k_batch + (head // group_size) * k_head
    first_key = tl.load(first_key_pointer + item)
    low, high = 0, keys
    if CAUSAL:
        high = tl.minimum(keys, first + (tl.program_id(0) + 1) * BLOCK_Q)
    if WINDOW:
        low = tl.maximum(0, first + tl.program_id(0) * BLOCK_Q - window + 1) // BLOCK_K * BLOCK_K
        high = tl.minimum(high, first + (tl.program_id(0) + 1) * BLOCK_Q + window)
    m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    at = tl.full([BLOCK_Q], -1, tl.int32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    inner = tl.zeros([BLOCK_Q], tl.float32)
    on_first = tl.zeros([BLOCK_Q], tl.float32)
    on_self = tl.zeros([BLOCK_Q], tl.float32)
    on_previous = tl.zeros([BLOCK_Q], tl.float32)
    mean = tl.zeros([BLOCK_Q], tl.float32)
    square = tl.zeros([BLOCK_Q], tl.float32)
    for start in range(low, high, BLOCK_K):
        key = start + tl.arange(0, BLOCK_K)
        k_mask = (d < width)[:, None] & (key < keys)[None, :]
        k = tl.load(k_place + key.to(tl.int64)[None, :] * k_pos + d[:, None], mask=k_mask, other=0.0).to(tl.float32)
        s, visible = score_tile(
            q, k, row, key, real_place, segment_place, bias_place, first, keys, window, factor, softcap, lowest_distance,
            SOFTCAP, BIAS, REAL, SEGMENTS, CAUSAL, STRICT, WINDOW, PRECISION,
        )  # fmt: skip
        top = tl.max(s, axis=1)
        here = start + tl.argmax(s, axis=1)
        at = tl.where(top > m, here, at)
        higher = tl.maximum(m, top)
        safe = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has read nothing yet
        e = tl.where(visible, tl.exp2(s - safe[:, None]), 0.0)
        down = tl.where(m == float("-inf"), 0.0, m - safe)
        keep = tl.where(m == float("-inf"), 0.0, tl.exp2(down))
        distance = first + row[:, None] - key[None, :]
        away = tl.abs(distance).to(tl.float32)
        inner = keep * (inner + down * total) + tl.sum(tl.where(visible, e * (s - safe[:, None]), 0.0), axis=1)
        total = keep * total + tl.sum(e, axis=1)
        on_first = keep * on_first + tl.sum(tl.where((key == first_key)[None, :], e, 0.0), axis=1)
        on_self = keep * on_self + tl.sum(tl.where(distance == 0, e, 0.0), axis=1)
        on_previous = keep * on_previous + tl.sum(tl.where(distance == 1, e, 0.0), axis=1)
        mean = keep * mean + tl.sum(e * away, axis=1)
        square = keep * square + tl.sum(e * away * away, axis=1)
        m = higher
    some = exists & (total > 0)
    if REAL:
        some &= tl.load(real_place + first + row, mask=exists, other=0) > 0
    over = tl.where(some, 1.0 / total, float("nan"))
    logs = tl.log2(total)
    maps = tl.num_programs(1).to(tl.int64)
    place = output_pointer + flat * queries + row
    step = maps * queries
    ln2 = 0.6931471805599453
    tl.store(place, tl.where(some, (m + logs) * ln2, float("nan")), mask=exists)
    tl.store(place + step, tl.where(some, tl.maximum((logs - inner / total) * ln2, 0.0), float("nan")), mask=exists)
    tl.store(place + 2 * step, over, mask=exists)
    tl.store(place + 3 * step, on_first * over, mask=exists)
    tl.store(place + 4 * step, on_self * over, mask=exists)
    tl.store(place + 5 * step, on_previous * over, mask=exists)
    tl.store(place + 6 * step, mean * over, mask=exists)
    tl.store(place + 7 * step, square * over, mask=exists)
    tl.store(at_pointer + flat * queries + row, tl.where(some, at, -1), mask=exists)


@triton.jit
def read_columns(
    q_pointer, k_pointer, bias_pointer, real_pointer, segment_pointer, normaliser_pointer, output_pointer,
    q_batch, q_head, q_pos, k_batch, k_head, k_pos, heads, group_size, queries, keys, width, window,
    factor, softcap, lowest_distance, n_distances,
    SOFTCAP: tl.constexpr, BIAS: tl.constexpr, REAL: tl.constexpr, SEGMENTS: tl.constexpr, CAUSAL: tl.constexpr, STRICT: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Grid: (key blocks, batch * head). normaliser [batch * head, query], nan for rows that count for nothing.

    output [sum or largest, batch * head, key] float32.
    """
    flat = tl.program_id(1).to(tl.int64)
    item, head = flat // heads, flat % heads
    first = keys - queries
    real_place, segment_place = real_pointer + item * keys, segment_pointer + item * keys
    bias_place = bias_pointer + head * n_distances
    key = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.arange(0, BLOCK_D)
    k_place = k_pointer + item * k_batch + (head // group_size) * k_head
    k_mask = (d < width)[:, None] & (key < keys)[None, :]
    k = tl.load(k_place + key.to(tl.int64)[None, :] * k_pos + d[:, None], mask=k_mask, other=0.0).to(tl.float32)
    q_place = q_pointer + item * q_batch + head * q_head
    low, high = 0, queries
    if CAUSAL:
        low = tl.maximum(0, tl.program_id(0) * BLOCK_K - first) // BLOCK_Q * BLOCK_Q
    if WINDOW:
        high = tl.maximum(0, tl.minimum(queries, (tl.program_id(0) + 1) * BLOCK_K + window - first))
        low = tl.maximum(low, tl.maximum(0, tl.program_id(0) * BLOCK_K - first - window + 1) // BLOCK_Q * BLOCK_Q)
    received = tl.zeros([BLOCK_K], tl.float32)
    best = tl.zeros([BLOCK_K], tl.float32)
    for start in range(low, high, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        exists = row < queries
        q_mask = exists[:, None] & (d < width)[None, :]
        q = tl.load(q_place + row.to(tl.int64)[:, None] * q_pos + d[None, :], mask=q_mask, other=0.0).to(tl.float32)
        normaliser = tl.load(normaliser_pointer + flat * queries + row, mask=exists, other=float("nan"))
        s, visible = score_tile(
            q, k, row, key, real_place, segment_place, bias_place, first, keys, window, factor, softcap, lowest_distance,
            SOFTCAP, BIAS, REAL, SEGMENTS, CAUSAL, STRICT, WINDOW, PRECISION,
        )  # fmt: skip
        counts = normaliser == normaliser  # not nan
        p = tl.exp2(s - tl.where(counts, normaliser, 0.0)[:, None] * 1.4426950408889634)
        p = tl.where(visible & counts[:, None], p, 0.0)
        received += tl.sum(p, axis=0)
        best = tl.maximum(best, tl.max(p, axis=0))
    maps = tl.num_programs(1).to(tl.int64)
    tl.store(output_pointer + flat * keys + key, received, mask=key < keys)
    tl.store(output_pointer + (maps + flat) * keys + key, best, mask=key < keys)


def launch_options(dtype: torch.dtype, width: int) -> dict[str, Any]:
    """Tile sizes, precision of the product, warps and stages. float32 takes three tf32 passes; 16-bit numbers are exact in tf32."""
    block = max(16, triton.next_power_of_2(width))
    if dtype == torch.float32:
        keys = 32 if block <= 64 else 16  # more would spill registers
        return {
            "BLOCK_Q": 64,
            "BLOCK_K": keys,
            "BLOCK_D": block,
            "PRECISION": "tf32x3",
            "num_warps": 8,
            "num_stages": 1,
        }
    return {"BLOCK_Q": 64, "BLOCK_K": 64, "BLOCK_D": block, "PRECISION": "tf32", "num_warps": 8, "num_stages": 2}


def supports(source: SoftmaxTiles) -> bool:
    """Float64, callable biases and heads wider than 256 take the strips."""
    narrow = source.q.shape[-1] <= 256
    return narrow and source.bias is None and source.q.dtype in (torch.float32, torch.float16, torch.bfloat16)


def forward(source: SoftmaxTiles, see: Visibility, statistics: Set[str]) -> dict[str, Tensor]:
    """The fields of the result for those of `statistics` in `SUPPORTED`; `received` is the sum over rows, [batch, head, key].

    On CUDA tensors, or on CPU tensors when Triton interprets (TRITON_INTERPRET=1 before it is imported).
    """
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (source.q, source.k))
    batch, head, queries, width = q.shape
    keys, device = k.shape[2], q.device
    options = launch_options(q.dtype, width)
    # a tensor that exists stands in for every pointer that is never read
    bias = real = segments = first_key = torch.zeros(batch, dtype=torch.int32, device=device)
    if source.distance_bias is not None:
        bias = (source.distance_bias.to(device, torch.float64) * LOG2_E).to(torch.float32).contiguous()
    if see.real is not None:
        real = see.real.to(device, torch.int32).contiguous()
        first_key = see.real.to(device, torch.int8).argmax(1).to(torch.int32)
    if see.segments is not None:
        segments = see.segments.to(device, torch.int32).contiguous()
    flags = {
        "SOFTCAP": source.softcap is not None,
        "BIAS": source.distance_bias is not None,
        "REAL": see.real is not None,
        "SEGMENTS": see.segments is not None,
        "CAUSAL": see.causal != "none",
        "STRICT": see.causal == "strict",
        "WINDOW": see.window is not None,
    }
    strides = (*q.stride()[:3], *k.stride()[:3])
    sizes = (head, head // k.shape[1], queries, keys, width, see.window or 0)
    factor = source.scale * (LOG2_E if source.softcap is None else 1.0 / source.softcap)
    numbers = (factor, source.softcap or 0.0, see.distances.start, len(see.distances))
    pointers = (q, k, bias, real, segments)
    rows = torch.empty(len(ROWS), batch, head, queries, dtype=torch.float32, device=device)
    at = torch.empty(batch, head, queries, dtype=torch.int32, device=device)
    grid = (triton.cdiv(queries, options["BLOCK_Q"]), batch * head)
    read_rows[grid](*pointers, rows, at, *strides, *sizes, first_key, *numbers, **flags, **options)
    found = {"self_weight" if name == "self" else name: rows[i] for i, name in enumerate(ROWS) if name in statistics}
    if "distance" in statistics:
        found["distance_squared"] = rows[ROWS.index("distance_squared")]
    if "largest" in statistics:
        found["largest_at"] = at.long()
    if statistics & set(COLUMNS):
        columns = torch.empty(2, batch, head, keys, dtype=torch.float32, device=device)
        grid = (triton.cdiv(keys, options["BLOCK_K"]), batch * head)
        read_columns[grid](*pointers, rows[0].contiguous(), columns, *strides, *sizes, *numbers, **flags, **options)
        found |= {name: columns[i] for i, name in enumerate(COLUMNS) if name in statistics}
    return found
