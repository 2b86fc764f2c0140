"""BDH against its published equations, written here a second time: token by token, neuron by neuron where that is affordable."""

import math

import pytest
import torch
from torch import Tensor

import models
from models.bdh.model import BDH, BDHConfig, rope_frequencies
from models.bdh.official import from_official, to_official

EXACT = 1e-10
LENGTH = 19
# no axis has the size of another: 3 heads, 4 layers, 8 neurons per head, width 10, 37 symbols
CONFIG = BDHConfig(n_layers=4, d_model=10, n_heads=3, n_neurons=24, vocab_size=37, dropout=0.0, init_std=0.3)


@pytest.fixture(scope="module")
def model() -> BDH:
    return BDH(CONFIG).double().eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 37, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def normalised(x: Tensor) -> Tensor:
    """Layer norm without weights, ε = 1e-5, biased variance."""
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def turned(x: Tensor, phase: Tensor) -> Tensor:
    """Turn neuron pairs (2k, 2k + 1) of x [..., pos, neuron] by 2π · phase [pos, neuron]; both of a pair have one phase."""
    cosine, sine = (phase * (2 * math.pi)).cos(), (phase * (2 * math.pi)).sin()
    swapped = torch.empty_like(x)
    swapped[..., 0::2], swapped[..., 1::2] = -x[..., 1::2], x[..., 0::2]
    return x * cosine + swapped * sine


def published_forward(state: dict[str, Tensor], tokens: Tensor, n_layers: int) -> Tensor:
    """Logits [batch, pos, vocab] of the published code's quadratic form, from a state dict in its layout and names."""
    heads, _, neurons = state["encoder"].shape
    batch, length = tokens.shape
    phase = (torch.arange(length, dtype=torch.float32)[:, None] * state["attn.freqs"].flatten()) % 1
    v = normalised(state["embed.weight"][tokens])
    for _ in range(n_layers):
        x = torch.einsum("btd,hdn->bhtn", v, state["encoder"]).clamp(min=0)
        q = turned(x, phase)
        scores = torch.einsum("bhtn,bhsn->bhts", q, q)
        scores = scores * torch.ones(length, length, dtype=scores.dtype).tril(-1)
        a = normalised(torch.einsum("bhts,bsd->bhtd", scores, v))
        y = x * torch.einsum("bhtd,hdn->bhtn", a, state["encoder_v"]).clamp(min=0)
        concatenated = y.permute(0, 2, 1, 3).reshape(batch, length, heads * neurons)
        v = normalised(v + normalised(concatenated @ state["decoder"]))
    return v @ state["lm_head"]


# ----------------------------------------------------------------------------------------------- published equations


@pytest.mark.parametrize("mode", ["parallel", "chunked", "recurrent"])
def test_logits_are_the_published_ones(model: BDH, tokens: Tensor, mode: str) -> None:
    expected = published_forward(to_official(model), tokens, CONFIG.n_layers)
    model.set_mode(mode)
    try:
        assert largest(model(tokens) - expected) < EXACT
    finally:
        model.set_mode("chunked")
    assert largest(expected) > 0.1  # the comparison is not of zeros


@pytest.mark.parametrize("mode", ["parallel", "chunked", "recurrent"])
def test_the_shipped_model_in_float32_gives_the_published_logits(mode: str) -> None:
    """Trained weights at their own size; the reference in float64 from the same float32 numbers."""
    shipped = models.load("bdh-english")
    text = shipped.to_tokens("The old lighthouse keeper climbed the stairs. The old lighthouse keeper lit the lamp.")
    expected = published_forward({k: v.double() for k, v in to_official(shipped).items()}, text, shipped.n_layers)
    shipped.set_mode(mode)
    assert shipped(text).dtype == torch.float32 and largest(shipped(text) - expected) < 1e-4
    assert largest(expected) > 5


def test_the_reference_notices_every_part(model: BDH, tokens: Tensor) -> None:
    """The oracle would catch a swap of D_x and D_y, a wrong head order of E, and missing rotation."""
    state, plain = to_official(model), model(tokens)
    swapped = {**state, "encoder": state["encoder_v"], "encoder_v": state["encoder"]}
    interleaved = state["decoder"].view(3, 8, 10).transpose(0, 1).reshape(24, 10)
    for wrong in (
        swapped,
        {**state, "decoder": interleaved},
        {**state, "attn.freqs": torch.zeros_like(state["attn.freqs"])},
    ):
        assert largest(published_forward(wrong, tokens, CONFIG.n_layers) - plain) > 1e-3


def test_frequencies(model: BDH) -> None:
    """θ^(−2⌊j/2⌋/N) / 2π for neuron j of N in a head, the same in every head, to the last bit or two of float32."""
    for neurons, theta in ((8, 2.0**16), (512, 2.0**16), (64, 10000.0)):
        expected = [theta ** (-2 * (j // 2) / neurons) / (2 * math.pi) for j in range(neurons)]
        got = rope_frequencies(neurons, theta)
        assert got.dtype == torch.float32
        assert largest(got.double() / torch.tensor(expected, dtype=torch.float64) - 1) < 2**-22
        assert torch.equal(got[0::2], got[1::2])
    assert model.weights.frequencies.dtype == torch.float32
    assert torch.equal(model.weights.frequencies, rope_frequencies(8, 2.0**16))


def test_phases_are_reduced_before_they_become_angles(model: BDH) -> None:
    """Phases are cycles in float32, taken modulo 1, then multiplied by 2π; the other order is off by more than 1e-3 far out."""
    positions = torch.tensor([[0, 1, 7, 1000, 999_983]])
    cosine, sine = model.weights.rotation(positions)
    assert cosine.shape == (1, 1, 5, 4) and cosine.dtype == torch.float32
    cycles = positions[0, :, None].float() * model.weights.frequencies[::2]
    exact = 2 * math.pi * (cycles % 1).double()
    assert largest(cosine[0, 0].double() - exact.cos()) < 1e-6
    assert largest(sine[0, 0].double() - exact.sin()) < 1e-6
    multiplied_first = (cycles * (2 * math.pi)).cos().double()
    assert largest(multiplied_first - exact.cos()) > 1e-3
    assert torch.equal(cosine[0, 0, 0], torch.ones(4)) and torch.equal(sine[0, 0, 0], torch.zeros(4))


def test_position_zero_is_silent(model: BDH, tokens: Tensor) -> None:
    """The first token reads nothing: a = 0, so y = 0, and v is only normalised again, in every layer."""
    _, cache = model.run_with_cache(tokens)
    for layer in range(CONFIG.n_layers):
        assert largest(cache[f"blocks.{layer}.hook_a"][:, :, 0]) == 0
        assert largest(cache[f"blocks.{layer}.hook_y"][:, :, 0]) == 0
        assert largest(cache[f"blocks.{layer}.hook_u"][:, 0]) == 0
        assert largest(cache[f"blocks.{layer}.hook_x"][:, :, 0]) > 0
        # v has variance 1 up to ε already, and normalising it again moves it by that much only
        before, after = cache[f"blocks.{layer}.hook_v"][:, 0], cache[f"blocks.{layer}.hook_resid_post"][:, 0]
        assert largest(after - normalised(before)) < EXACT
        assert largest(after - before) < 1e-3
        assert largest(cache[f"blocks.{layer}.hook_y"][:, :, 1:]) > 0


def test_pattern_is_strictly_past_and_signed_only_by_rotation(model: BDH, tokens: Tensor) -> None:
    """α_ij = (R_i x_i)·(R_j x_j) for j < i, 0 elsewhere; without rotation no entry could be negative."""
    _, cache = model.run_with_cache(tokens, names=["blocks.2.attn.hook_scores", "blocks.2.hook_x"])
    pattern, x = cache["blocks.2.attn.hook_scores"], cache["blocks.2.hook_x"]
    assert pattern.shape == (2, 3, LENGTH, LENGTH)
    assert largest(pattern.triu()) == 0
    phase = (torch.arange(LENGTH, dtype=torch.float32)[:, None] * model.weights.frequencies) % 1
    for i, j in ((1, 0), (7, 3), (18, 17), (18, 0)):
        # rotations compose: only the difference of the phases matters
        difference = (phase[i].double() - phase[j].double())[None]
        expected = (turned(x[:, :, i : i + 1], difference)[:, :, 0] * x[:, :, j]).sum(-1)
        assert largest(pattern[:, :, i, j] - expected) < 1e-5
    assert bool((x >= 0).all()) and bool((pattern < 0).any())


def test_neurons_of_a_head_may_be_renumbered_in_pairs(model: BDH, tokens: Tensor) -> None:
    """Permuting neuron pairs in D_x, D_y, E and the frequencies alike changes nothing; leaving the frequencies behind does."""
    state = to_official(model)
    generator = torch.Generator().manual_seed(3)
    pairs = torch.randperm(4, generator=generator)
    order = torch.stack([2 * pairs, 2 * pairs + 1], dim=1).flatten()
    assert not torch.equal(order, torch.arange(8))
    moved = {
        **state,
        "encoder": state["encoder"][:, :, order],
        "encoder_v": state["encoder_v"][:, :, order],
        "decoder": state["decoder"].view(3, 8, 10)[:, order].reshape(24, 10),
        "attn.freqs": state["attn.freqs"][..., order],
    }
    renumbered = from_official(moved, CONFIG.n_layers, dropout=0.0).eval()
    assert largest(renumbered(tokens) - model(tokens)) < EXACT
    forgetful = from_official({**moved, "attn.freqs": state["attn.freqs"]}, CONFIG.n_layers, dropout=0.0).eval()
    assert largest(forgetful(tokens) - model(tokens)) > 1e-3


# -------------------------------------------------------------------------------------------------------------- state


def test_state_is_the_sum_of_rotated_activations_times_values(model: BDH, tokens: Tensor) -> None:
    """S_t = Σ_{τ ≤ t} (R_τ x_τ) ⊗ v_τ, neuron by neuron, with one value for all heads."""
    positions = [0, 4, LENGTH - 1]
    reading = model.states(tokens, positions)
    names = [f"blocks.{layer}.{name}" for layer in range(4) for name in ("hook_x", "attn.hook_value")]
    _, cache = model.run_with_cache(tokens, names=names)
    phase = (torch.arange(LENGTH, dtype=torch.float32)[:, None] * model.weights.frequencies) % 1
    for layer in range(4):
        rotated = turned(cache[f"blocks.{layer}.hook_x"], phase)
        value = cache[f"blocks.{layer}.attn.hook_value"]
        assert reading[layer].shape == (2, 3, 3, 8, 10)
        for number, position in enumerate(positions):
            expected = torch.zeros(2, 3, 8, 10, dtype=torch.float64)
            for tau in range(position + 1):
                expected += rotated[:, :, tau, :, None] * value[:, None, tau, None, :]
            assert largest(reading[layer][:, number] - expected) < EXACT


def test_the_papers_co_rotating_state_is_the_state_turned_back(model: BDH, tokens: Tensor) -> None:
    """ρ_t = R_{−1} ρ_{t−1} + x_t ⊗ v_t (the paper's recurrence) equals R_{−t} S_t, up to the rounding of float32 phases."""
    _, cache = model.run_with_cache(tokens, names=["blocks.1.hook_x", "blocks.1.attn.hook_value"])
    x, value = cache["blocks.1.hook_x"], cache["blocks.1.attn.hook_value"]
    frequencies = model.weights.frequencies.double()
    rho = torch.zeros(2, 3, 8, 10, dtype=torch.float64)
    for t in range(LENGTH):
        rho = turned(rho.transpose(-1, -2), -frequencies[None]).transpose(-1, -2)
        rho = rho + x[:, :, t, :, None] * value[:, None, t, None, :]
    state = model.states(tokens, LENGTH - 1)[1][:, 0]
    back = turned(state.transpose(-1, -2), -(LENGTH - 1) * frequencies[None]).transpose(-1, -2)
    assert largest(back - rho) < 1e-5 * largest(rho)
    assert largest(state - rho) > 1e-2 * largest(rho)  # the two frames do differ


# -------------------------------------------------------------------------------------------------- published weights


def test_official_state_dict_round_trip(model: BDH, tokens: Tensor) -> None:
    state = to_official(model)
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "encoder": (3, 10, 8),
        "encoder_v": (3, 10, 8),
        "decoder": (24, 10),
        "embed.weight": (37, 10),
        "lm_head": (10, 37),
        "attn.freqs": (1, 1, 1, 8),
    }
    again = from_official(state, CONFIG.n_layers, dropout=0.0).eval()
    assert torch.equal(again(tokens), model(tokens))
    assert all(torch.equal(to_official(again)[name], tensor) for name, tensor in state.items())
    state["encoder"].zero_()  # the state dict is a copy
    assert largest(model.weights.D_x) > 0
    without = {name: tensor for name, tensor in to_official(model).items() if name != "attn.freqs"}
    assert torch.equal(from_official(without, CONFIG.n_layers, dropout=0.0).eval()(tokens), model(tokens))


def test_wrong_official_state_dicts_are_refused(model: BDH) -> None:
    state = to_official(model)

    def changed(**tensors: Tensor) -> dict[str, Tensor]:
        return {**state, **tensors}

    without = {name: tensor for name, tensor in state.items() if name != "encoder_v"}
    with pytest.raises(KeyError, match="encoder_v missing"):
        from_official(without, 4)
    with pytest.raises(ValueError, match=r"decoder has shape \(8, 3, 10\); expected \(24, 10\)"):
        from_official(changed(decoder=state["decoder"].view(8, 3, 10)), 4)
    with pytest.raises(ValueError, match=r"lm_head has shape \(37, 10\); expected \(10, 37\)"):
        from_official(changed(lm_head=state["lm_head"].T), 4)
    with pytest.raises(ValueError, match=r"encoder_v has shape \(3, 10, 6\)"):
        from_official(changed(encoder_v=state["encoder_v"][..., :6]), 4)
    with pytest.raises(ValueError, match=r"encoder has shape \(30, 8\); expected \[head, d_model, neuron\]"):
        from_official(changed(encoder=state["encoder"].flatten(0, 1)), 4)
    with pytest.raises(ValueError, match=r"attn.freqs has 6 numbers; expected 8"):
        from_official({**state, "attn.freqs": state["attn.freqs"][..., :6]}, 4)
    with pytest.raises(ValueError, match="within a pair"):
        from_official({**state, "attn.freqs": torch.rand(1, 1, 1, 8)}, 4)
    with pytest.raises(ValueError, match=r"has no tensor 'encoder_w'.*Did you mean 'encoder_v'"):
        from_official({**state, "encoder_w": state["encoder"]}, 4)
    with pytest.raises(ValueError, match=r"'droput'.*Did you mean 'dropout'"):
        from_official(state, 4, droput=0.1)


# -------------------------------------------------------------------------------------------------------- hook points


def test_hook_points_by_their_names(model: BDH, tokens: Tensor) -> None:
    """Every stage of a layer can be read under its name, in the documented shape; the paper's symbols are other names of some."""
    batch, heads, neurons, width = 2, 3, 8, 10
    per_head = (batch, heads, LENGTH, neurons)
    stream = (batch, LENGTH, width)
    shapes = {
        "hook_resid_pre": stream,
        "hook_x_pre": per_head,
        "hook_x": per_head,
        "attn.hook_q": per_head,
        "attn.hook_k": per_head,
        "attn.hook_rot_q": per_head,
        "attn.hook_rot_k": per_head,
        "attn.hook_value": stream,
        "attn.hook_pattern": (batch, heads, LENGTH, LENGTH),
        "hook_a": (batch, heads, LENGTH, width),
        "ln_a.hook_scale": (batch, heads, LENGTH, 1),
        "ln_a.hook_normalized": (batch, heads, LENGTH, width),
        "hook_gate_pre": per_head,
        "hook_gate": per_head,
        "hook_y": per_head,
        "hook_u_pre": stream,
        "ln_u.hook_scale": (batch, LENGTH, 1),
        "ln_u.hook_normalized": stream,
        "hook_v_sum": stream,
        "ln_v.hook_scale": (batch, LENGTH, 1),
        "hook_resid_post": stream,
    }
    aliases = {
        "hook_v": "hook_resid_pre",
        "hook_a_scale": "ln_a.hook_scale",
        "hook_a_ln": "ln_a.hook_normalized",
        "hook_u_scale": "ln_u.hook_scale",
        "hook_u": "ln_u.hook_normalized",
        "hook_v_scale": "ln_v.hook_scale",
        "attn.hook_scores": "attn.hook_pattern",
    }
    _, cache = model.run_with_cache(tokens)
    for layer in range(4):
        for name, shape in shapes.items():
            assert cache[f"blocks.{layer}.{name}"].shape == shape, name
        for alias, name in aliases.items():
            assert cache[f"blocks.{layer}.{alias}"] is cache[f"blocks.{layer}.{name}"], alias
            _, alone = model.run_with_cache(tokens, names=f"blocks.{layer}.{alias}")
            assert largest(alone[f"blocks.{layer}.{alias}"] - cache[f"blocks.{layer}.{name}"]) < EXACT
    assert cache["hook_embed"].shape == stream
    assert cache["unembed.hook_out"].shape == (batch, LENGTH, 37)
    assert model.states(tokens, 3)[2].shape == (batch, 1, heads, neurons, width)


def test_stages_follow_from_one_another(model: BDH, tokens: Tensor) -> None:
    """What is cached satisfies the layer's equations, so each name means what it says."""
    _, cache = model.run_with_cache(tokens)
    layer = "blocks.1."
    gate, x, y = cache[layer + "hook_gate"], cache[layer + "hook_x"], cache[layer + "hook_y"]
    assert largest(y - x * gate) == 0
    assert torch.equal(x, cache[layer + "hook_x_pre"].clamp(min=0))
    assert torch.equal(gate, cache[layer + "hook_gate_pre"].clamp(min=0))
    a = cache[layer + "attn.hook_scores"] @ cache[layer + "attn.hook_value"][:, None]
    assert largest(cache[layer + "hook_a"] - a) < EXACT
    assert largest(cache[layer + "hook_a_ln"] - normalised(cache[layer + "hook_a"])) < EXACT
    u = torch.einsum("bhtn,hnd->btd", y, model.weights.E)
    assert largest(cache[layer + "hook_u_pre"] - u) < EXACT
    assert largest(cache[layer + "hook_u"] - normalised(u)) < EXACT
    v_sum = cache[layer + "hook_v"] + cache[layer + "hook_u"]
    assert largest(cache[layer + "hook_v_sum"] - v_sum) < EXACT
    assert torch.equal(cache["blocks.2.hook_v"], cache[layer + "hook_resid_post"])


def test_queries_and_keys_are_edited_apart(model: BDH, tokens: Tensor) -> None:
    """q and k are one tensor until somebody edits one: a changed query leaves the state, a changed key does not."""
    before = model.states(tokens, 6, layers=0)[0]
    queries = model.states(tokens, 6, layers=0, hooks=[("blocks.0.attn.hook_q", lambda q, hook: 2 * q)])[0]
    keys = model.states(tokens, 6, layers=0, hooks=[("blocks.0.attn.hook_k", lambda k, hook: 2 * k)])[0]
    assert torch.equal(queries, before)
    assert largest(keys - 2 * before) < EXACT


# ----------------------------------------------------------------------------------------- sizes, precision, training


@pytest.mark.parametrize("config", [BDHConfig(), CONFIG, BDHConfig(n_neurons=4096, d_model=128)])
def test_number_of_parameters(config: BDHConfig) -> None:
    """3 n d + 2 V d, whatever the depth: 25,296,896 for the published configuration."""
    with torch.device("meta"):
        model = BDH(config)
    expected = 3 * config.n_neurons * config.d_model + 2 * config.vocab_size * config.d_model
    assert model.n_parameters() == expected
    if config == BDHConfig():
        assert expected == 25_296_896
    assert len(model.blocks) == config.n_layers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_models_keep_frequencies_and_attention_in_32(
    model: BDH, tokens: Tensor, dtype: torch.dtype
) -> None:
    small = BDH(CONFIG).to(dtype).eval()
    assert small.weights.frequencies.dtype == torch.float32
    assert torch.equal(small.weights.frequencies, model.weights.frequencies)
    logits, cache = small.run_with_cache(tokens)
    assert logits.dtype == dtype and logits.isfinite().all()
    # six times the rounding unit of the type, relative to the spread of the logits
    error = (logits.double() - model(tokens)).abs().mean() / model(tokens).std()
    assert error < 6 * torch.finfo(dtype).eps
    for name in ("attn.hook_rot_q", "attn.hook_scores", "hook_a"):
        assert cache[f"blocks.0.{name}"].dtype == torch.float32, name
    assert cache["blocks.0.hook_x"].dtype == dtype
    assert small.states(tokens, 3)[0].dtype == torch.float32


def test_unnormalised_attention_does_not_overflow_in_half_precision(tokens: Tensor) -> None:
    """a grows with the text; beyond the largest float16 the logits stay finite and near those of float32."""
    config = BDHConfig(n_layers=2, d_model=16, n_heads=2, n_neurons=256, vocab_size=37, dropout=0.0, init_std=2.0)
    text = torch.randint(0, 37, (1, 600), generator=torch.Generator().manual_seed(1))
    half = BDH(config).half().eval()
    logits, cache = half.run_with_cache(text)
    assert largest(cache["blocks.0.hook_a"]) > torch.finfo(torch.float16).max
    assert logits.isfinite().all() and all(tensor.isfinite().all() for tensor in cache.values())
    assert largest(cache["blocks.0.hook_u_pre"]) > 256  # its square is no float16, so the norm must not form it there
    unwatched = half(text).detach().float()
    assert float((unwatched - logits.detach().float()).abs().mean() / unwatched.std()) < 0.02
    exact = BDH(config).eval()(text)
    assert float(((logits.float() - exact).abs().mean() / exact.std()).detach()) < 0.05


def test_dropout_acts_on_y_while_training_only(tokens: Tensor) -> None:
    model = BDH(BDHConfig(**{**vars(CONFIG), "dropout": 0.5})).double()
    model.eval()
    assert torch.equal(model(tokens), model(tokens))
    assert torch.equal(model(tokens), BDH(CONFIG).double().eval()(tokens))
    model.train()
    torch.manual_seed(0)
    _, cache = model.run_with_cache(tokens, names=["blocks.0.hook_y", "blocks.0.hook_u_pre"])
    y, u = cache["blocks.0.hook_y"], cache["blocks.0.hook_u_pre"]
    plain = torch.einsum("bhtn,hnd->btd", y, model.weights.E)
    assert largest(u - plain) > 1e-3  # hook_y is before dropout, what follows is after it
    draws = []
    for seed in range(200):
        torch.manual_seed(seed)
        _, drawn = model.run_with_cache(tokens, names="blocks.0.hook_u_pre", stop_at_layer=1)
        draws.append(drawn["blocks.0.hook_u_pre"])
    mean, error = torch.stack(draws).mean(0), torch.stack(draws).std(0) / 200**0.5
    # y / (1 - p) at the kept places: the mean over draws is y, within sampling error
    assert float(((mean - plain).abs() / error.clamp(min=1e-9)).detach().mean()) < 1.2


def test_no_limit_on_length() -> None:
    """The context is not bounded: a long text runs at once and in pieces, with a state that does not grow."""
    model = BDH(BDHConfig(n_layers=2, d_model=8, n_heads=2, n_neurons=16, vocab_size=37, dropout=0.0, init_std=0.3))
    model = model.double().eval()
    assert model.n_ctx is None
    text = torch.randint(0, 37, (1, 3000), generator=torch.Generator().manual_seed(2))
    whole = model(text)
    first, state = model(text[:, :2990], return_state=True)
    size = state.nbytes()
    rest, state = model(text[:, 2990:], state=state, return_state=True)
    assert largest(torch.cat([first, rest], dim=1) - whole) < EXACT
    assert state.nbytes() == size == 2 * 2 * 8 * 8 * 8  # layers, heads, neurons, width, bytes


def test_targets_need_not_be_contiguous(model: BDH, tokens: Tensor) -> None:
    transposed = tokens.T.contiguous().T
    assert not transposed.is_contiguous()
    assert torch.equal(model(transposed, return_type="loss"), model(tokens, return_type="loss"))


def test_configurations_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"n_neurons \(30\) must be a multiple of 2·n_heads \(8\)"):
        BDH(BDHConfig(n_layers=1, d_model=8, n_heads=4, n_neurons=30))
