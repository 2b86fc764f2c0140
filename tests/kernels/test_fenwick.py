"""Log-linear attention: level function, recurrence over Fenwick states, closed pattern and blocks of levels are one thing."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.delta_rule import delta_rule
from kernels.fenwick import effective_pattern, level, log_linear_attention, n_levels_for
from kernels.gated_linear_attention import gated_linear_attention

EXACT = 1e-12
RULES = ("linear", "decayed", "vector", "delta", "gated_delta")


def inputs(
    rule: str, pos: int, n_levels: int, batch: int = 2, seed: int = 0
) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = normal(batch, 3, pos, 5), normal(batch, 3, pos, 5), normal(batch, 3, pos, 4)
    options: dict[str, Any] = {"scale": 0.7}
    if rule in ("decayed", "gated_delta"):
        options["log_decay"] = -0.3 * normal(batch, 3, pos).abs()
    if rule == "vector":
        options["log_decay"] = -0.3 * normal(batch, 3, pos, 5).abs()
    if rule == "decayed":
        options["write"] = normal(batch, 3, pos).abs()
    if "delta" in rule:
        k = torch.nn.functional.normalize(k, dim=-1)
        options["beta"] = normal(batch, 3, pos).sigmoid()
    return (q, k, v, normal(batch, 3, pos, n_levels).abs()), options


def slow(q: Tensor, k: Tensor, v: Tensor, weights: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """The definition: for every query, the state of each bucket of sources written alone, token by token, weighed and read."""
    batch, head, pos, size = k.shape
    n_levels = weights.shape[3]
    out = torch.zeros(batch, head, pos, v.shape[3], dtype=v.dtype)
    states = torch.zeros(batch, head, n_levels, size, v.shape[3], dtype=v.dtype)
    for b in range(batch):
        for h in range(head):
            for i in range(pos):
                buckets = torch.zeros(n_levels, size, v.shape[3], dtype=v.dtype)
                for j in range(i + 1):
                    m = 0 if i == j else min((i ^ j).bit_length(), n_levels - 1)
                    if "log_decay" in options:
                        factor = options["log_decay"][b, h, j].exp()
                        buckets = buckets * (factor[:, None] if factor.ndim else factor)
                    key = k[b, h, j]
                    if "beta" in options:
                        beta = options["beta"][b, h, j]
                        buckets = buckets - beta * key[:, None] * torch.einsum("k,lkv->lv", key, buckets)[:, None]
                        strength = beta
                    else:
                        strength = options["write"][b, h, j] if "write" in options else 1.0
                    buckets[m] = buckets[m] + strength * key[:, None] * v[b, h, j]
                out[b, h, i] = options["scale"] * torch.einsum("l,k,lkv->v", weights[b, h, i], q[b, h, i], buckets)
                states[b, h] = buckets
    return out, states


def error(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=1.0))


def test_the_level_function() -> None:
    """Against its definition, its example, and the number of buckets."""
    i, j = torch.arange(300)[:, None], torch.arange(300)[None]
    got = level(i, j, 20)
    for a in range(0, 300, 7):
        for b in range(300):
            assert got[a, b] == (0 if a == b else (a ^ b).bit_length())
    assert level(i, j, 4).max() == 3
    assert [n_levels_for(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 3, 3, 4, 4, 5]
    assert level(torch.tensor(2**40), torch.tensor(2**40 - 1), 60) == 41


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n_levels", [3, 5])
def test_all_forms_equal_the_definition(rule: str, n_levels: int) -> None:
    """Token by token, quadratic and blocks of several sizes, also with fewer levels than the text needs."""
    tensors, options = inputs(rule, 11, n_levels, batch=1)
    expected, expected_state = slow(*tensors, **options)
    for mode, size in (("recurrent", None), ("parallel", None), *(("chunked", c) for c in (1, 2, 3, 4, 64))):
        got, state = log_linear_attention(*tensors, **options, mode=mode, chunk_size=size)
        assert error(got, expected) < EXACT, (mode, size)
        assert error(state, expected_state) < EXACT, (mode, size)
    assert error(effective_pattern(tensors[0], tensors[1], tensors[3], **options) @ tensors[2], expected) < EXACT


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("chunk", [1, 2, 8, 32])
def test_blocks_equal_the_recurrence_on_longer_texts(rule: str, chunk: int) -> None:
    """Lengths that fill and do not fill blocks of every level."""
    for pos in (31, 64):
        tensors, options = inputs(rule, pos, 8)
        expected, expected_state = log_linear_attention(*tensors, **options, mode="recurrent")
        got, state = log_linear_attention(*tensors, **options, chunk_size=chunk)
        assert error(got, expected) < EXACT and error(state, expected_state) < EXACT, pos
        assert log_linear_attention(*tensors, **options, chunk_size=chunk, need_state=False)[1] is None


@pytest.mark.parametrize("rule", ["decayed", "gated_delta"])
@pytest.mark.parametrize("mode", ["chunked", "parallel", "recurrent"])
def test_going_on_from_a_state(rule: str, mode: str) -> None:
    """Any cut of the text gives the whole, in every form; the chunks stay where they are in the whole text."""
    tensors, options = inputs(rule, 45, 7)
    expected, expected_state = log_linear_attention(*tensors, **options, mode="recurrent")
    for cuts in ([17], [1, 2, 3, 20, 44], [16, 32]):
        state, outputs, start = None, [], 0
        for stop in [*cuts, 45]:
            part = [x[:, :, start:stop] for x in tensors]
            own = {name: x[:, :, start:stop] if isinstance(x, Tensor) else x for name, x in options.items()}
            out, state = log_linear_attention(*part, **own, start=start, initial_state=state, chunk_size=8, mode=mode)
            outputs.append(out)
            start = stop
        assert state is not None
        assert error(torch.cat(outputs, 2), expected) < EXACT and error(state, expected_state) < EXACT, cuts


@pytest.mark.parametrize("rule", ["decayed", "gated_delta"])
def test_edits_at_stops(rule: str) -> None:
    """An edit that fills levels that are empty at that moment goes the same way in every form."""
    tensors, options = inputs(rule, 29, 6)
    results = {}
    for mode in ("recurrent", "chunked", "parallel"):
        seen: dict[int, Tensor] = {}

        def edit(t: int, state: Tensor, seen: dict[int, Tensor] = seen) -> Tensor | None:
            seen[t] = state
            return 0.5 * state + 0.1 if t in (4, 11) else None

        out, state = log_linear_attention(
            *tensors, **options, mode=mode, chunk_size=4, stops=[0, 4, 11, 28], on_state=edit
        )
        results[mode] = (out, state, seen)
    plain, _ = log_linear_attention(*tensors, **options)
    out, state, seen = results["recurrent"]
    assert error(out[:, :, :5], plain[:, :, :5]) < EXACT and error(out[:, :, 5:], plain[:, :, 5:]) > 1e-3
    for mode in ("chunked", "parallel"):
        assert error(results[mode][0], out) < EXACT and error(results[mode][1], state) < EXACT, mode
        for t in seen:
            assert error(results[mode][2][t], seen[t]) < EXACT, (mode, t)


@pytest.mark.parametrize("rule", ["decayed", "gated_delta"])
@pytest.mark.parametrize("mode", ["chunked", "parallel", "recurrent"])
def test_padding_is_not_there(rule: str, mode: str) -> None:
    """Sequences with padding on either side and in the middle, and going on from them, equal the sequences without it."""
    (q, k, v, weights), options = inputs(rule, 20, 6, batch=3)
    real = torch.ones(3, 20, dtype=torch.bool)
    real[0, :7] = False
    real[1, 12:] = False
    real[2, 3:6] = False
    stops, seen = [8, 15], {}
    out, state = log_linear_attention(
        q, k, v, weights, **options, real=real, mode=mode, chunk_size=4, stops=stops,
        on_state=lambda t, s: seen.__setitem__(t, s),
    )  # fmt: skip
    for b in range(3):
        kept = real[b].nonzero().squeeze(-1)
        own = {n: x[b : b + 1][:, :, kept] if isinstance(x, Tensor) else x for n, x in options.items()}
        alone = [x[b : b + 1][:, :, kept] for x in (q, k, v, weights)]
        expected, expected_state = log_linear_attention(*alone, **own, mode="recurrent")
        assert error(out[b : b + 1][:, :, kept], expected) < EXACT
        assert state is not None and error(state[b : b + 1], expected_state) < EXACT
        for stop in stops:
            n = int(real[b, : stop + 1].sum())
            own_part = {name: x[:, :, :n] if isinstance(x, Tensor) else x for name, x in own.items()}
            _, then = log_linear_attention(*(x[:, :, :n] for x in alone), **own_part, mode="recurrent")
            assert then is not None and error(seen[stop][b : b + 1], then) < EXACT
        pattern = effective_pattern(q, k, weights, **options, real=real)[b]
        assert error((pattern @ v[b])[:, kept], expected[0]) < EXACT
    alone_out, nothing = log_linear_attention(q, k, v, weights, **options, real=real, mode=mode, need_state=False)
    assert (
        nothing is None
        and error(alone_out[real[:, None].expand(3, 3, 20)], out[real[:, None].expand(3, 3, 20)]) < EXACT
    )
    more, more_options = inputs(rule, 9, 6, batch=3, seed=1)
    assert state is not None
    start = real.sum(1)
    together, _ = log_linear_attention(*more, **more_options, start=start, initial_state=state, mode=mode, chunk_size=4)
    for b in range(3):
        own = {n: x[b : b + 1] if isinstance(x, Tensor) else x for n, x in more_options.items()}
        alone = [x[b : b + 1] for x in more]
        expected, _ = log_linear_attention(
            *alone, **own, start=int(start[b]), initial_state=state[b : b + 1], mode="recurrent"
        )
        assert error(together[b : b + 1], expected) < EXACT


@pytest.mark.parametrize("rule", ["decayed", "gated_delta"])
def test_equal_weights_are_the_rule_itself(rule: str) -> None:
    """With weight 1 at every level the levels only take the ordinary state apart."""
    (q, k, v, weights), options = inputs(rule, 23, 6)
    out, state = log_linear_attention(q, k, v, torch.ones_like(weights), **options, chunk_size=4)
    ordinary = delta_rule if "delta" in rule else gated_linear_attention
    plain = {name: x for name, x in options.items() if name != "beta"}
    args = (q, k, v, options["beta"]) if "delta" in rule else (q, k, v)
    expected, expected_state = ordinary(*args, **plain)  # type: ignore[operator]
    assert state is not None and error(out, expected) < EXACT and error(state.sum(2), expected_state) < EXACT


def test_gradients_agree() -> None:
    """Of every input, the carried state included, between blocks and the recurrence; and gradcheck of the blocks."""
    for rule in ("decayed", "gated_delta"):
        tensors, options = inputs(rule, 19, 6)
        state = torch.randn(2, 3, 6, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
        leaves = [*tensors, *(x for x in options.values() if isinstance(x, Tensor)), state]
        names = [name for name, x in options.items() if isinstance(x, Tensor)]
        grads = []
        for mode in ("chunked", "recurrent"):
            fresh = [x.clone().requires_grad_() for x in leaves]
            own = {**options, **dict(zip(names, fresh[4:-1], strict=True))}
            out, last = log_linear_attention(
                *fresh[:4], **own, start=5, initial_state=fresh[-1], chunk_size=4, mode=mode
            )
            assert last is not None
            grads.append(torch.autograd.grad(out.sin().sum() + last.sin().sum(), fresh))
        for a, b in zip(*grads, strict=True):
            assert error(a, b) < 1e-11


def test_sixteen_bit_inputs_are_summed_in_float32() -> None:
    tensors, options = inputs("decayed", 33, 7)
    half = [x.to(torch.bfloat16) for x in tensors]
    own = {name: x.float() if isinstance(x, Tensor) else x for name, x in options.items()}
    out, state = log_linear_attention(*half, **own)
    wide, _ = log_linear_attention(*(x.double() for x in half), **options)
    assert out.dtype == torch.bfloat16 and state is not None and state.dtype == torch.float32
    assert error(out.double(), wide) < 0.01


def test_mistakes_are_named() -> None:
    (q, k, v, weights), options = inputs("gated_delta", 9, 5)
    with pytest.raises(ValueError, match="write: given together with beta"):
        log_linear_attention(q, k, v, weights, **options, write=options["beta"])
    with pytest.raises(ValueError, match="weights: expected"):
        log_linear_attention(q, k, v, weights[:, :, :4], **options)
    with pytest.raises(ValueError, match=r"initial_state: expected \[batch, head, level"):
        log_linear_attention(q, k, v, weights, **options, initial_state=torch.zeros(2, 3, 5, 4))
    with pytest.raises(ValueError, match="start: expected"):
        log_linear_attention(q, k, v, weights, **options, start=-1)
    with pytest.raises(ValueError, match="real: expected"):
        log_linear_attention(q, k, v, weights, **options, real=torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="Did you mean 'chunked'"):
        log_linear_attention(q, k, v, weights, **options, mode="chunk")
    with pytest.raises(ValueError, match="on_state: given without stops"):
        log_linear_attention(q, k, v, weights, **options, on_state=lambda t, s: s)
