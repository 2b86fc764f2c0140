"""Mamba-2 against its recurrence (Dao & Gu 2024, sections 2 and 7), with explicit loops over tokens, taps, heads and groups."""

import math

import pytest
import torch
from torch import Tensor

from models.context import Context
from models.language_model import LanguageModel, LanguageModelConfig
from models.recurrent.linear_core import inverse_softplus
from models.recurrent.mamba2 import Mamba2, Mamba2Config

EXACT = 1e-10
LENGTH, WIDTH = 17, 12
# d_inner 24 = 6 heads of 4 channels in 2 groups; state width 5; 3 taps: no axis has the size of another
CONFIG = Mamba2Config(d_state=5, d_head=4, n_groups=2, d_conv=3)


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def mixer(config: Mamba2Config = CONFIG) -> Mamba2:
    """One layer in float64; every parameter random, decays from slow to fast."""
    torch.manual_seed(0)
    made = Mamba2(config, WIDTH, {})
    made.initialise_own()
    made.double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name == "dt_bias":
                parameter.copy_(torch.linspace(-3, 1, made.n_heads))
            elif name == "A_log":
                parameter.copy_(torch.linspace(-2, 1.5, made.n_heads))
            else:
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.7)
    return made


def context(length: int) -> Context:
    positions = torch.arange(length)[None]
    return Context(positions, positions, None, None, 0, True)


def inputs(batch: int = 2) -> Tensor:
    return torch.randn(batch, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def paper_mamba2(layer: Mamba2, u: Tensor) -> Tensor:
    """Output [pos, d_model] for one sequence u [pos, d_model], token by token and head by head."""
    config, inner, heads = layer.config, layer.d_inner, layer.n_heads
    groups, state_width = config.n_groups, config.d_state
    channels = inner + 2 * groups * state_width
    projected = u @ layer.input.weight.T
    z, raw, dt = projected[:, :inner], projected[:, inner : inner + channels], projected[:, inner + channels :]
    bias = layer.conv_bias if layer.conv_bias is not None else torch.zeros(channels, dtype=u.dtype)
    states = [torch.zeros(state_width, config.d_head, dtype=u.dtype) for _ in range(heads)]
    outputs = []
    for t in range(len(u)):
        smeared = torch.zeros(channels, dtype=u.dtype)
        for channel in range(channels):
            total = float(bias[channel])
            for tap in range(config.d_conv):
                source = t - (config.d_conv - 1) + tap
                if source >= 0:
                    total += float(layer.conv[channel, tap] * raw[source, channel])
            smeared[channel] = silu(total)
        x, b, c = smeared[:inner], smeared[inner : inner + groups * state_width], smeared[-groups * state_width :]
        y = torch.zeros(inner, dtype=u.dtype)
        for head in range(heads):
            group = head // (heads // groups)
            own = slice(head * config.d_head, (head + 1) * config.d_head)
            shared = slice(group * state_width, (group + 1) * state_width)
            delta = math.log1p(math.exp(float(dt[t, head] + layer.dt_bias[head])))
            decay = math.exp(-delta * math.exp(float(layer.A_log[head])))
            states[head] = decay * states[head] + delta * torch.outer(b[shared], x[own])
            y[own] = c[shared] @ states[head] + layer.D[head] * x[own]
        gated = torch.tensor([float(y[i]) * silu(float(z[t, i])) for i in range(inner)], dtype=u.dtype)
        for group in range(groups):
            own = slice(group * inner // groups, (group + 1) * inner // groups)
            gated[own] = gated[own] / math.sqrt(float(gated[own].square().mean()) + config.norm_eps)
        outputs.append((gated * layer.norm_weight) @ layer.output.weight.T)
    return torch.stack(outputs)


@pytest.mark.parametrize("mode", ["parallel", "chunked", "recurrent"])
@pytest.mark.parametrize(
    "config",
    [CONFIG, Mamba2Config(d_state=5, d_head=8, d_conv=4, conv_bias=False), Mamba2Config(d_state=3, d_head=4, d_conv=1)],
    ids=["two groups", "one group, no bias", "one tap"],
)
@torch.no_grad()
def test_output_is_the_papers(mode: str, config: Mamba2Config) -> None:
    layer = mixer(config)
    layer.core.mode = mode
    got, _ = layer(inputs(), context(LENGTH), None)
    expected = torch.stack([paper_mamba2(layer, u) for u in inputs()])
    assert largest(got - expected) < EXACT
    assert largest(expected) > 0.1


# ------------------------------------------------------------------------------------------------ what goes on between calls


def language_model(config: Mamba2Config = CONFIG) -> LanguageModel:
    made = LanguageModel(LanguageModelConfig(2, WIDTH, 37, None, config, None, norm="rms")).double().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return made


def tokens(batch: int = 3) -> Tensor:
    return torch.randint(0, 37, (batch, LENGTH), generator=torch.Generator().manual_seed(2))


def test_what_is_carried() -> None:
    """The matrix state and the convolution's last d_conv − 1 inputs, before its nonlinearity."""
    model = language_model()
    _, state = model(tokens(), return_state=True)
    assert {name: tuple(slot.shape) for name, slot in state.layers[0].items()} == {
        "state": (3, 6, 5, 4),
        "conv": (3, 2, 24 + 2 * 2 * 5),
    }
    layer = model.blocks[0].mixer
    read = model.blocks[0].ln1(model(tokens(), stop_at_layer=0))
    raw = layer.input(read)[..., layer.d_inner : layer.d_inner + sum(layer.widths)]
    assert largest(state.slot(0, "conv") - raw[:, -2:]) < EXACT


@pytest.mark.parametrize("d_conv", [1, 2, 4])
@pytest.mark.parametrize("cuts", [[1, 2, 3, 4, 5], [1, 3, 9], [16]])
def test_segments_shorter_than_the_convolution(d_conv: int, cuts: list[int]) -> None:
    """The convolution's window is carried over any number of calls, each of them shorter than it."""
    model = language_model(Mamba2Config(d_state=5, d_head=4, n_groups=2, d_conv=d_conv))
    whole = model(tokens())
    state, pieces = None, []
    for start, stop in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        logits, state = model(tokens()[:, start:stop], state=state, return_state=True)
        pieces.append(logits)
    assert largest(torch.cat(pieces, dim=1) - whole) < EXACT


@pytest.mark.parametrize("d_conv", [1, 2, 4])
def test_padded_segments_leave_no_trace(d_conv: int) -> None:
    """Batches cut into calls with padding left, right, in the middle and everywhere: as if each sequence had been read alone."""
    model = language_model(Mamba2Config(d_state=5, d_head=4, n_groups=2, d_conv=d_conv))
    calls = [
        ["1101", "0001", "0000"],
        ["0", "1", "1"],
        ["110", "010", "000"],
        ["01", "00", "10"],
        ["11111", "00111", "11100"],
    ]
    generator = torch.Generator().manual_seed(3)
    state, read, logits = None, [[] for _ in range(3)], [[] for _ in range(3)]  # type: ignore[var-annotated]
    for call in calls:
        mask = torch.tensor([[digit == "1" for digit in row] for row in call])
        ids = torch.randint(0, 37, mask.shape, generator=generator)
        out, state = model(ids, mask=mask, state=state, return_state=True)
        for row in range(3):
            read[row] += ids[row][mask[row]].tolist()
            logits[row] += list(out[row][mask[row]])
    for row in range(3):
        alone, alone_state = model(torch.tensor([read[row]]), return_state=True)
        assert largest(torch.stack(logits[row]) - alone[0]) < EXACT
        for layer in range(2):
            for slot in ("state", "conv"):
                carried = state.slot(layer, slot)[row]  # type: ignore[union-attr]
                if carried.numel():
                    assert largest(carried - alone_state.slot(layer, slot)[0]) < EXACT, (layer, slot)


# ------------------------------------------------------------------------------------------------------- initial values


def test_initial_values_lie_in_the_published_ranges() -> None:
    """Δ = softplus(b_Δ) log-uniform in [1e-3, 1e-1], |A| uniform in [1, 16], D = 1, norm weights 1, convolution within ±d_conv^−½."""
    torch.manual_seed(0)
    layer = Mamba2(Mamba2Config(d_state=4, d_head=1), 1000, {})
    layer.initialise_own()
    heads = layer.n_heads
    assert heads == 2000
    step = torch.nn.functional.softplus(layer.dt_bias.detach().double())
    size = layer.A_log.detach().double().exp()
    bound = 4**-0.5
    assert float(step.min()) >= 1e-3 * (1 - 1e-5) and float(step.max()) <= 1e-1 * (1 + 1e-5)
    assert float(size.min()) >= 1 - 1e-5 and float(size.max()) <= 16 * (1 + 1e-5)
    for sample, low, high in (
        (step.log(), math.log(1e-3), math.log(1e-1)),
        (size, 1, 16),
        (layer.conv.flatten(), -bound, bound),
    ):
        ordered = ((sample.detach().double() - low) / (high - low)).sort().values
        uniform = (torch.arange(len(ordered)) + 0.5) / len(ordered)
        assert largest(ordered - uniform) < 1.63 / len(ordered) ** 0.5  # Kolmogorov-Smirnov at 1 %
    assert torch.equal(layer.D, torch.ones(heads)) and torch.equal(layer.norm_weight, torch.ones(layer.d_inner))
    assert layer.conv_bias is not None and largest(layer.conv_bias) == 0


def test_a_whole_model_is_initialised_so_too() -> None:
    """The language model's own initialisation leaves these parameters to the mixer, and is seeded."""
    config = LanguageModelConfig(2, 64, 37, None, Mamba2Config(d_state=4, d_head=2), None, norm="rms", seed=3)
    one, two = LanguageModel(config), LanguageModel(config)
    for block in one.blocks:
        step = torch.nn.functional.softplus(block.mixer.dt_bias.detach())
        assert 9.9e-4 < float(step.min()) < 2e-3 and 5e-2 < float(step.max()) < 0.101
        assert 0.3 < largest(block.mixer.conv) <= 0.5
    assert not torch.equal(one.blocks[0].mixer.A_log, one.blocks[1].mixer.A_log)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_inverse_softplus() -> None:
    y = torch.tensor([1e-4, 1e-3, 0.1, 1.0, 30.0], dtype=torch.float64)
    assert torch.nn.functional.softplus(inverse_softplus(y)).tolist() == pytest.approx(y.tolist(), rel=1e-12)


def test_marks_of_parameters_that_must_not_decay() -> None:
    marked = {name for name, p in mixer().named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert marked == {"A_log", "dt_bias", "D"}


# ----------------------------------------------------------------------------------------------------------- precision


def test_sixteen_bit_models_compute_decays_and_the_norm_in_32() -> None:
    """Step sizes, log decays and the gated norm are float32 in 16-bit models, as published; a large gate does not overflow float16."""
    model = language_model().half()
    with torch.no_grad():
        model.blocks[0].mixer.input.weight[:24] *= 300
    logits, cache = model.run_with_cache(tokens())
    for name in ("hook_write", "hook_log_decay", "hook_scale"):
        assert cache[f"blocks.0.mixer.{name}"].dtype == torch.float32, name
    assert largest(cache["blocks.0.mixer.hook_gate"]) > 256
    assert all(t.isfinite().all() for t in cache.values())
    exact = language_model()
    with torch.no_grad():
        exact.blocks[0].mixer.input.weight[:24] *= 300
    expected = exact(tokens())
    assert logits.dtype == torch.float16
    assert float(((logits.double() - expected).abs().mean() / expected.std()).detach()) < 0.02
    for edit in ("hook_write", "hook_log_decay"):
        changed = model.run_with_hooks(tokens(), hooks=[(f"blocks.0.mixer.{edit}", lambda x, hook: 2 * x)])
        assert changed.isfinite().all() and largest((changed - logits).float()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pattern_edits_work_in_sixteen_bits(dtype: torch.dtype) -> None:
    model = language_model().to(dtype)
    silenced = model.run_with_hooks(tokens(), hooks=[("blocks.0.mixer.hook_pattern", lambda p, hook: 0 * p)])
    assert silenced.dtype == dtype and largest((silenced - model(tokens())).float()) > 1e-3


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"inner width 24 .* must be a multiple of d_head \(5\)"):
        Mamba2(Mamba2Config(d_head=5), 12, {})
    with pytest.raises(ValueError, match="6 heads cannot share 4 groups evenly"):
        Mamba2(Mamba2Config(d_head=4, n_groups=4), 12, {})
    with pytest.raises(ValueError, match=r"d_conv is 0; expected at least 1"):
        Mamba2(Mamba2Config(d_head=4, d_conv=0), 12, {})
