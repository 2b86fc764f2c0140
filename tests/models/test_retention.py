"""Retention against the paper's equations (Sun et al. 2023, sections 2.1-2.2), written here with complex numbers and a loop over tokens."""

import math

import pytest
import torch
from torch import Tensor

import models
from models.context import Context
from models.recurrent.retention import Retention, RetentionConfig
from workbench.instrument.hook_points import HookPoint

EXACT = 1e-10
LENGTH, WIDTH, HEADS = 23, 24, 3


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def mixer(**settings: object) -> Retention:
    """One layer in float64 with weights far from symmetric."""
    torch.manual_seed(0)
    made = Retention(RetentionConfig(n_heads=HEADS, **settings), WIDTH, {}).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64))
    return made


def context(length: int = LENGTH, start: int = 0) -> Context:
    positions = torch.arange(start, start + length)[None]
    return Context(positions, positions, None, None, 0, True)


def inputs(batch: int = 2) -> Tensor:
    return torch.randn(batch, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gamma(head: int) -> float:
    return 1 - 2.0 ** (-5 - head)


def paper_retention(layer: Retention, x: Tensor, eps: float) -> tuple[Tensor, list[Tensor]]:
    """Output [batch, pos, d_model] and the complex state [batch, pair, state_v] of each head after the last token.

    S_t = γ S_{t−1} + (k_t e^{itθ})* v_tᵀ,  o_t = Re( (q_t e^{itθ})ᵀ S_t ),  q and k as complex pairs.
    """
    batch, length, _ = x.shape
    d_key = WIDTH // HEADS
    theta = [10000.0 ** (-m / (d_key / 2 - 1)) for m in range(d_key // 2)]
    turn = torch.tensor(
        [[complex(math.cos(t * w), math.sin(t * w)) for w in theta] for t in range(length)], dtype=torch.complex128
    )
    q, k, v = (x @ linear.weight.T for linear in (layer.query, layer.key, layer.value))
    d_value = v.shape[-1] // HEADS
    heads, states = [], []
    for head in range(HEADS):
        own_key, own_value = slice(head * d_key, (head + 1) * d_key), slice(head * d_value, (head + 1) * d_value)
        # pairs (2m, 2m + 1) are one complex number
        q_pairs = torch.view_as_complex(q[..., own_key].unflatten(-1, (-1, 2)).contiguous()) * turn
        k_pairs = torch.view_as_complex(k[..., own_key].unflatten(-1, (-1, 2)).contiguous()) * turn
        state = torch.zeros(batch, d_key // 2, d_value, dtype=torch.complex128)
        outputs = []
        for t in range(length):
            state = gamma(head) * state + k_pairs[:, t, :, None].conj() * v[:, t, None, own_value] / math.sqrt(d_key)
            outputs.append((q_pairs[:, t, :, None] * state).sum(1).real)
        o = torch.stack(outputs, dim=1)
        heads.append(o / (o.square().mean(-1, keepdim=True) + eps).sqrt())
        states.append(state)
    mixed = torch.cat(heads, dim=-1)
    if layer.gate is not None:
        gate = x @ layer.gate.weight.T
        mixed = mixed * gate / (1 + (-gate).exp())
    return mixed @ layer.output.weight.T, states


@pytest.mark.parametrize("mode", ["parallel", "chunked", "recurrent"])
@pytest.mark.parametrize("settings", [{}, {"gate": False}, {"value_factor": 1.0, "norm_eps": 1e-2}])
def test_output_is_the_papers(mode: str, settings: dict[str, object]) -> None:
    layer = mixer(**settings)
    layer.core.mode = mode
    got, carried = layer(inputs(), context(), None)
    expected, states = paper_retention(layer, inputs(), layer.config.norm_eps)
    assert largest(got - expected) < EXACT
    assert largest(expected) > 0.1
    for head, state in enumerate(states):  # the carried state holds the same complex numbers as pairs of rows
        rows = carried["state"][:, head]
        assert largest(torch.complex(rows[:, 0::2], -rows[:, 1::2]) - state) < EXACT


def test_decays_and_rotations_are_the_published_constants() -> None:
    layer = mixer()
    for head in range(HEADS):
        assert float(layer.log_decay[head].exp()) == pytest.approx(gamma(head), abs=1e-15)
    assert layer.log_decay.dtype == torch.float64
    pairs = WIDTH // HEADS // 2
    assert layer.theta.tolist() == pytest.approx([10000.0 ** (-m / (pairs - 1)) for m in range(pairs)], rel=1e-14)
    assert float(layer.theta[0]) == 1.0 and float(layer.theta[-1]) == pytest.approx(1e-4)


def test_pattern_is_the_papers_parallel_form() -> None:
    """(Q Kᵀ / √d_k) ⊙ D with D_nm = γ^(n−m) for n ≥ m and 0 else; scores depend on positions through their distance alone."""
    layer = mixer()
    model = models.build("retnet").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)
    tokens = torch.randint(0, 256, (1, LENGTH), generator=torch.Generator().manual_seed(2))
    site = model.blocks[1].mixer
    pattern = model.patterns(tokens, layers=1)[1].values
    _, cache = model.run_with_cache(tokens, names=["blocks.1.mixer.hook_q", "blocks.1.mixer.hook_k"])
    q, k = cache["q", 1][0], cache["k", 1][0]  # k carries the factor d_k^(−1/2)
    weight = model.blocks[1].mixer.key.weight
    read = model.blocks[1].ln1(model(tokens, stop_at_layer=1))[0] @ weight.T
    assert largest(k.flatten(-2) - read / math.sqrt(site.d_key)) < EXACT
    for n, m in ((0, 0), (5, 0), (20, 7), (22, 22)):
        for head in range(HEADS):
            a, b = q[n, head].unflatten(-1, (-1, 2)), k[m, head].unflatten(-1, (-1, 2))
            angle = (n - m) * layer.theta
            turned = a[:, 0] * b[:, 0] + a[:, 1] * b[:, 1], a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
            expected = (turned[0] * angle.cos() + turned[1] * angle.sin()).sum() * gamma(head) ** (n - m)
            assert largest(pattern[0, head, n, m] - expected) < EXACT
    assert largest(pattern.triu(1)) == 0


def test_only_distances_matter() -> None:
    """The same tokens 1000 positions later give the same output: rotations and decays are relative."""
    layer = mixer()
    here, _ = layer(inputs(), context(), None)
    later, _ = layer(inputs(), context(start=1000), None)
    assert largest(here - later) < EXACT


def test_published_row_normalisations_vanish_in_the_norm() -> None:
    """Dividing row n by √(Σ_m D_nm) and by max(|Σ_m row|, 1), as published for stability, changes nothing at eps = 0."""
    model = models.build("retnet").double()
    tokens = torch.randint(0, 256, (1, LENGTH), generator=torch.Generator().manual_seed(3))
    _, cache = model.run_with_cache(tokens, names=["blocks.0.mixer.hook_pattern", "blocks.0.mixer.hook_v"])
    pattern, value = cache["pattern", 0][0], cache["v", 0][0].transpose(0, 1)
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    decay = torch.stack([(gamma(head) ** distance.clamp(min=0)).double().tril() for head in range(HEADS)])
    normalised = pattern / decay.sum(-1, keepdim=True).sqrt()
    normalised = normalised / normalised.sum(-1, keepdim=True).abs().clamp(min=1)
    plain, published = pattern @ value, normalised @ value

    def rms(o: Tensor) -> Tensor:
        return o / o.square().mean(-1, keepdim=True).sqrt()

    assert largest(rms(plain) - rms(published)) < EXACT
    assert largest(plain - published) > 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_keep_their_decays(dtype: torch.dtype) -> None:
    """1 − 2^−7 rounded to bfloat16 would forget at another rate; constants stay exact, also where states are traced from factors."""
    model = models.build("retnet").to(dtype)
    site = model.blocks[0].mixer
    assert site.log_decay.dtype == torch.float64 and site.theta.dtype == torch.float64
    assert largest(site.constant_factors()["log_decay"].double() - site.log_decay) < 1e-8
    tokens = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(4))
    state = model.states(tokens, 59)[0][:, 0]
    entries = [(0, 0, 0), (2, 3, 5)]
    traced = model.trace_state(tokens, 0, entries)[:, -1]
    expected = torch.stack([state[:, h, i, j] for h, i, j in entries], dim=1)
    assert largest(traced.float() - expected) < 2e-3 * largest(state)


def test_pattern_edits_work_in_sixteen_bits() -> None:
    """The pattern is float32 beside 16-bit values; an edited one still reaches the output."""
    model = models.build("retnet").to(torch.bfloat16)
    tokens = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(5))
    plain = model(tokens)
    silenced = model.run_with_hooks(tokens, hooks=[("blocks.0.mixer.hook_pattern", lambda p, hook: 0 * p)])
    assert silenced.dtype == torch.bfloat16 and silenced.isfinite().all()
    assert largest((silenced - plain).float()) > 1e-3


def test_a_pair_of_state_rows_decays_at_its_heads_rate() -> None:
    """With keys silenced from token 5 on, the state fades by γ per token."""
    model = models.build("retnet").double()
    tokens = torch.randint(0, 256, (1, LENGTH), generator=torch.Generator().manual_seed(6))

    def stop_writing(k: Tensor, hook: HookPoint) -> Tensor:
        k[:, 5:] = 0
        return k

    reading = model.states(tokens, [4, 15], layers=0, hooks=[("blocks.0.mixer.hook_rot_k", stop_writing)])[0]
    for head in range(HEADS):
        assert largest(reading[:, 1, head] - gamma(head) ** 11 * reading[:, 0, head]) < EXACT
    assert largest(reading) > 1e-4


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"d_model \(24\) must be a multiple of 2·n_heads \(10\)"):
        Retention(RetentionConfig(n_heads=5), 24, {})
    with pytest.raises(ValueError, match=r"values \(25\) must be a multiple of n_heads \(3\)"):
        Retention(RetentionConfig(n_heads=3, value_factor=25 / 24), 24, {})
