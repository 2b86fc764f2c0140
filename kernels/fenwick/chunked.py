"""Log-linear attention in blocks: the quadratic form inside chunks, and one run of the ordinary recurrence per level between them.

Chunks of 2^c tokens begin at multiples of 2^c. Two tokens of one chunk have levels 0 … c, and the pattern of the rule times
the level weights is formed there. A token sees a token of another chunk at level m > c exactly if they lie in the two halves
of one block of 2^m tokens that begins at a multiple of 2^m. So one run over all such blocks at once, with values in the first
halves only and read in the second, gives that level's share: log2(pos / 2^c) runs, each linear in the length.
Guo et al. 2025, arXiv 2506.04761, section 3.4, describes the same split of levels.
"""

import torch
from torch import Tensor

from .levels import level, level_later, regrouped
from .rule import Rule, apart, at_level, folded, side_by_side, unfolded

CHUNK = 64


def chunked(
    q: Tensor, v: Tensor, weights: Tensor, rule: Rule, state: Tensor | None, start: int, chunk: int, need_state: bool
) -> tuple[Tensor, Tensor | None]:
    """Arguments as in `reference.recurrent`, for sequences that all begin at position `start`; chunk a power of two.

    state None: empty, start 0. Returns (output, state after the last token; None without need_state).
    """
    batch, _, pos, _ = q.shape
    n_levels = weights.shape[3]
    output = _inside_chunks(q, v, weights, rule, start, chunk)
    half = chunk
    while half < start + pos:
        output = _add_level(output, q, v, weights, rule, start, half)
        half *= 2
    if state is not None:
        output = output + _of_carried(q, weights, rule, state, start)
    if not need_state:
        return output, None
    last = torch.full((batch,), start + pos - 1, device=q.device)
    places = torch.arange(start, start + pos, device=q.device)
    carried = None if state is None else side_by_side(regrouped(state, torch.full_like(last, start - 1), last))
    after = rule.last_state(at_level(v, level(last[:1], places, n_levels), n_levels), carried)
    return output, apart(after, n_levels)


def level_pattern(pattern: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """pattern_ij · weights_i at level(i, j). pattern [batch, head, query, key], weights [batch, head, query, level], places
    [batch or 1, pos]."""
    levels = level(places[:, :, None], places[:, None, :], weights.shape[3])[:, None]
    return pattern * weights.gather(3, levels.expand(*weights.shape[:2], -1, -1))


def _inside_chunks(q: Tensor, v: Tensor, weights: Tensor, rule: Rule, start: int, chunk: int) -> Tensor:
    batch, _, pos, _ = q.shape
    front = start % chunk
    if front + pos <= chunk:
        places = torch.arange(start, start + pos, device=q.device)[None]
        return level_pattern(rule.pattern(q), weights, places) @ v
    q, v, weights = (folded(x, front, chunk) for x in (q, v, weights))
    pattern = rule.folded(front, chunk).pattern(q)
    places = torch.arange(chunk, device=q.device)[None]  # only differences of digits below the chunk's count
    return unfolded(level_pattern(pattern, weights, places) @ v, batch, front, pos)


def _add_level(output: Tensor, q: Tensor, v: Tensor, weights: Tensor, rule: Rule, start: int, half: int) -> Tensor:
    """Adds what the second halves of blocks of 2 · half tokens read from the first halves."""
    batch, pos, stop, size = q.shape[0], q.shape[2], start + q.shape[2], 2 * half
    number = min(size.bit_length() - 1, weights.shape[3] - 1)
    middles = [middle for middle in range((start // size) * size + half, stop, size) if start < middle]
    if not middles:
        return output
    if len(middles) == 1:  # a block that is not whole is cut to what there is of it
        low, middle, high = (
            max(middles[0] - half, start) - start,
            middles[0] - start,
            min(middles[0] + half, stop) - start,
        )
        values = v[:, :, low:high].clone()
        values[:, :, middle - low :] = 0
        read = rule.part(low, high).read(q[:, :, low:high], values)[:, :, middle - low :]
        share = read * weights[:, :, middle:high, number, None]
        return torch.cat([output[:, :, :middle], output[:, :, middle:high] + share, output[:, :, high:]], 2)
    front = start % size
    values = folded(v, front, size)
    values = torch.cat([values[:, :, :half], torch.zeros_like(values[:, :, half:])], 2)
    read = rule.folded(front, size).read(folded(q, front, size), values)
    read = torch.cat([torch.zeros_like(read[:, :, :half]), read[:, :, half:]], 2)
    return output + unfolded(read, batch, front, pos) * weights[..., number, None]


def _of_carried(q: Tensor, weights: Tensor, rule: Rule, state: Tensor, start: int) -> Tensor:
    """What every token reads from the states carried in, at the levels to which they have moved by then."""
    n_levels = state.shape[2]
    wide = side_by_side(state)
    empty = q.new_zeros(*q.shape[:3], wide.shape[3])
    read = rule.read(q, empty, wide).unflatten(3, (n_levels, -1))  # [batch, head, pos, level, state_v]
    places = torch.arange(start, start + q.shape[2], device=q.device)
    now = level_later(torch.tensor(max(start - 1, 0), device=q.device), places, n_levels)  # [pos, level]
    weight = weights.gather(3, now.expand_as(weights))
    return torch.einsum("bhtl,bhtlv->bhtv", weight, read)
