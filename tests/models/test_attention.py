"""The attention site against the equations, cell by cell; positions, groups, windows; and what the fused path must not allocate."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention.site import Attention, AttentionConfig
from models.context import Context
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.parts.positions import Rotary, alibi_slopes, sinusoidal
from workbench.instrument.errors import UnknownHookPoint

EXACT = 1e-10
LENGTH, WIDTH = 13, 24


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def site(config: AttentionConfig) -> Attention:
    torch.manual_seed(0)
    made = Attention(config, WIDTH, {"use_attn_result": False}).double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=torch.float64) * 0.5)
    made.requires_grad_(False)
    return made


def context(length: int = LENGTH, start: int = 0) -> Context:
    positions = torch.arange(start, start + length)[None]
    return Context(positions, positions, None, None, 0, True)


def stream(batch: int = 2, length: int = LENGTH) -> Tensor:
    return torch.randn(batch, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def published_slopes(n_heads: int) -> list[float]:
    """ALiBi's slopes as the paper words them: a geometric sequence from 2^(−8/n) for a power of two n; else that of the next lower
    power, followed by every second one of the next higher power."""
    power = 2 ** int(math.log2(n_heads))
    if power == n_heads:
        first = 2 ** (-8 / n_heads)
        return [first ** (head + 1) for head in range(n_heads)]
    return published_slopes(power) + published_slopes(2 * power)[0::2][: n_heads - power]


def turned(vector: Tensor, position: int, config: AttentionConfig) -> Tensor:
    """One query or key of a head, rotated by RoPE through complex numbers."""
    if config.position != "rope":
        return vector
    rotary = int(len(vector) * config.rope_fraction)
    result = vector.clone()
    for pair in range(rotary // 2):
        i, j = (2 * pair, 2 * pair + 1) if config.rope_interleaved else (pair, pair + rotary // 2)
        angle = position * config.rope_base ** (-2 * pair / rotary)
        value = complex(float(vector[i]), float(vector[j])) * complex(math.cos(angle), math.sin(angle))
        result[i], result[j] = value.real, value.imag
    return result


def textbook_attention(layer: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output [pos, d_model] and pattern [head, query, key] of one sequence x [pos, d_model], by loops over heads, queries and keys."""
    config, width = layer.config, layer.d_head
    x, length = x.detach(), len(x)
    projected = {}
    for name, linear in (("q", layer.query), ("k", layer.key), ("v", layer.value)):
        projected[name] = x @ linear.weight.T + (0 if linear.bias is None else linear.bias)
    scale = config.scale if config.scale is not None else 1 / math.sqrt(width)
    slopes = published_slopes(layer.n_heads) if config.position == "alibi" else [0.0] * layer.n_heads
    pattern = torch.zeros(layer.n_heads, length, length, dtype=x.dtype)
    z = torch.zeros(length, layer.n_heads * width, dtype=x.dtype)
    for head in range(layer.n_heads):
        group = head // (layer.n_heads // layer.n_kv)
        own, shared = slice(head * width, (head + 1) * width), slice(group * width, (group + 1) * width)
        for i in range(length):
            first = 0 if config.window is None else max(0, i - config.window + 1)
            query = turned(projected["q"][i, own], i, config)
            scores = [
                scale * float(query @ turned(projected["k"][j, shared], j, config)) - slopes[head] * (i - j)
                for j in range(first, i + 1)
            ]
            weights = [math.exp(score - max(scores)) for score in scores]
            for j, weight in zip(range(first, i + 1), weights, strict=True):
                pattern[head, i, j] = weight / sum(weights)
            z[i, own] = pattern[head, i] @ projected["v"][:, shared]
    return z @ layer.output.weight.T + (0 if layer.output.bias is None else layer.output.bias), pattern


CONFIGS = {
    "multi-head": AttentionConfig(n_heads=4),
    "grouped, rotary": AttentionConfig(n_heads=6, n_key_value_heads=2, position="rope", bias=False),
    "multi-query, ALiBi": AttentionConfig(n_heads=3, n_key_value_heads=1, position="alibi"),
    "partial interleaved rotary, own base": AttentionConfig(
        n_heads=3, d_head=10, position="rope", rope_fraction=0.6, rope_interleaved=True, rope_base=500.0
    ),
    "window, own scale": AttentionConfig(n_heads=4, position="none", window=4, scale=0.9),
    "window of one": AttentionConfig(n_heads=2, position="alibi", window=1),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_output_and_pattern_are_the_textbooks(config: AttentionConfig) -> None:
    """Fused and explicit path, grouped heads, rotations, biases and windows: the numbers of loops over queries and keys."""
    layer, x = site(config), stream()
    model = LanguageModel(LanguageModelConfig(1, WIDTH, 37, 64, config, None)).double()
    model.blocks[0].attn.load_state_dict(layer.state_dict())
    fused, _ = layer((x, x, x), context(), None)
    # the layer norms are out of the way: blocks are fed x through the model, the site alone by hand
    for row in range(2):
        expected, pattern = textbook_attention(layer, x[row])
        assert largest(fused[row] - expected) < EXACT
        normal = model.blocks[0].ln1(x[row : row + 1])
        watched, cache = model.run_with_cache(
            x[row : row + 1], start_at_layer=0, stop_at_layer=1, names=["*.hook_pattern", "*.hook_attn_out"]
        )
        expected, pattern = textbook_attention(layer, normal[0])
        assert largest(cache["pattern", 0][0] - pattern) < EXACT
        assert largest(cache["attn_out", 0][0] - expected) < EXACT
        assert largest(watched - (x[row] + expected)) < EXACT


# ------------------------------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("n_heads", [1, 2, 3, 4, 6, 8, 12, 16, 20])
def test_alibi_slopes(n_heads: int) -> None:
    assert alibi_slopes(n_heads).tolist() == pytest.approx(published_slopes(n_heads), rel=1e-6)


def test_alibi_slopes_in_numbers() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(6).tolist() == [2.0**e for e in (-2, -4, -6, -8, -1, -3)]


def test_alibi_bias_is_a_term_of_its_own() -> None:
    """hook_bias holds −slope · distance; removing it leaves attention without positions; slopes stay float32 in 16-bit models."""
    config = LanguageModelConfig(1, WIDTH, 37, None, AttentionConfig(n_heads=3, position="alibi"), None, init_std=0.3)
    model = LanguageModel(config).double()
    tokens = torch.randint(0, 37, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_cache(tokens, names="blocks.0.attn.bias.alibi.hook_bias")
    bias = cache["blocks.0.attn.bias.alibi.hook_bias"]
    for head, slope in enumerate(published_slopes(3)):
        assert float(bias[1, head, 9, 2]) == pytest.approx(-7 * slope)
    bare = LanguageModel(
        LanguageModelConfig(1, WIDTH, 37, None, AttentionConfig(n_heads=3, position="none"), None, init_std=0.3)
    ).double()
    without = model.run_with_hooks(tokens, hooks=[("blocks.0.attn.bias.alibi.hook_bias", lambda b, hook: 0 * b)])
    assert largest(without - bare(tokens)) < EXACT
    assert largest(without - model(tokens)) > 1e-6
    assert model.to(torch.bfloat16).blocks[0].attn.bias["alibi"].slopes.dtype == torch.float32


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rotated_scores_depend_on_the_distance_alone(interleaved: bool, fraction: float) -> None:
    """⟨R_i q, R_j k⟩ is a function of i − j, and another one for another distance; norms are kept."""
    rotary = Rotary(16, fraction=fraction, interleaved=interleaved)
    generator = torch.Generator().manual_seed(2)
    q, k = torch.randn(2, 16, generator=generator, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        cosine, sine = rotary.angles(torch.tensor([[i, j]]), torch.float64)
        both = rotary(torch.stack([q, k])[None, :, None], cosine, sine)[0, :, 0]
        assert float(both[0].norm()) == pytest.approx(float(q.norm()), rel=1e-12)
        return float(both[0] @ both[1])

    for distance in (0, 1, 5, 900):
        assert score(distance, 0) == pytest.approx(score(distance + 77, 77), abs=1e-10)
    assert score(0, 0) == pytest.approx(float(q @ k), abs=1e-12)
    assert abs(score(5, 0) - score(6, 0)) > 1e-3


def test_an_attention_layer_with_rotary_positions_ignores_where_a_text_begins() -> None:
    layer, x = site(CONFIGS["grouped, rotary"]), stream()
    here, _ = layer((x, x, x), context(), None)
    later, _ = layer((x, x, x), context(start=500), None)
    assert largest(here - later) < EXACT


def test_rotary_needs_pairs() -> None:
    with pytest.raises(ValueError, match=r"RoPE rotates pairs: d_head·fraction is 7"):
        Rotary(14, fraction=0.5)
    with pytest.raises(ValueError, match=r"is 0, expected an even number above 0"):
        Rotary(8, fraction=0.1)


def test_sinusoidal_embedding() -> None:
    """PE(p, 2i) = sin(p / 10000^(2i/d)), PE(p, 2i + 1) = cos of the same (Vaswani et al. 2017)."""
    for width in (10, 7):
        got = sinusoidal(torch.tensor([[0.0, 1.0, 50.0]], dtype=torch.float64), width)
        for row, position in enumerate((0, 1, 50)):
            for entry in range(width):
                angle = position / 10000 ** (2 * (entry // 2) / width)
                expected = math.sin(angle) if entry % 2 == 0 else math.cos(angle)
                assert float(got[0, row, entry]) == pytest.approx(expected, abs=2e-5 if position else 1e-12)


def test_learned_positions_end_somewhere() -> None:
    """Beyond the last learned position every way in is refused, and the message says how long a text may be."""
    config = LanguageModelConfig(1, WIDTH, 37, 16, AttentionConfig(n_heads=4), None)
    model = LanguageModel(config)
    text = torch.zeros(1, 17, dtype=torch.long)
    assert model(text[:, :16]).shape == (1, 16, 37)
    with pytest.raises(ValueError, match=r"17 tokens are more than this model's context of 16"):
        model(text)
    _, state = model(text[:, :10], return_state=True)
    with pytest.raises(ValueError, match="17 tokens are more"):
        model(text[:, :7], state=state)
    with pytest.raises(ValueError, match="17 tokens are more"):
        model.generate(text[:, :14], 5)
    assert model.generate(text[:, :14], 3).shape == (1, 17)  # the last token is written, never read
    padded = torch.cat([text, text[:, :3]], dim=1)
    mask = torch.arange(20)[None] >= 4
    assert model(padded, mask=mask).shape == (1, 20, 37)  # only real tokens count
    with pytest.raises(ValueError, match="Learned positions need n_ctx"):
        LanguageModel(LanguageModelConfig(1, WIDTH, 37, None, AttentionConfig(n_heads=4), None))


# --------------------------------------------------------------------------------------------------------------- groups


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_grouped_heads_equal_repeated_heads(groups: int) -> None:
    """A grouped site is a multi-head site whose key and value heads are copies."""
    grouped = site(AttentionConfig(n_heads=6, n_key_value_heads=groups, position="rope", d_head=4))
    full = site(AttentionConfig(n_heads=6, position="rope", d_head=4))
    full.query.load_state_dict(grouped.query.state_dict())
    full.output.load_state_dict(grouped.output.state_dict())
    for name in ("key", "value"):
        source, target = getattr(grouped, name), getattr(full, name)
        target.weight.copy_(source.weight.unflatten(0, (groups, 4)).repeat_interleave(6 // groups, 0).flatten(0, 1))
        target.bias.copy_(source.bias.unflatten(0, (groups, 4)).repeat_interleave(6 // groups, 0).flatten())
    x = stream()
    a, carried = grouped((x, x, x), context(), None)
    b, carried_full = full((x, x, x), context(), None)
    assert largest(a - b) < EXACT
    assert carried["key"].shape == (2, LENGTH, groups, 4)  # the cache holds each group once
    assert largest(carried["key"].repeat_interleave(6 // groups, 2) - carried_full["key"]) < EXACT
    assert full.W_K.shape == (6, WIDTH, 4) and grouped.W_K.shape == (groups, WIDTH, 4)
    assert largest(full.W_V[-1] - grouped.W_V[-1]) == 0


def test_window_of_a_model() -> None:
    """A windowed pattern is 0 beyond the window, and widening the window to the text's length changes nothing."""
    tokens = torch.randint(0, 37, (1, LENGTH), generator=torch.Generator().manual_seed(0))

    def model(window: int | None) -> LanguageModel:
        mixer = AttentionConfig(n_heads=4, position="rope", window=window)
        return LanguageModel(LanguageModelConfig(2, WIDTH, 37, None, mixer, None, init_std=0.3)).double()

    pattern = model(5).patterns(tokens, layers=1)[1].values[0]
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    assert bool(((pattern > 0) == ((distance >= 0) & (distance < 5))).all())
    assert largest(model(LENGTH)(tokens) - model(None)(tokens)) < EXACT
    assert largest(model(5)(tokens) - model(None)(tokens)) > 1e-6


# --------------------------------------------------------------------------------------------------------- blocks, hooks


def test_parallel_blocks() -> None:
    """x + attention(ln1 x) + mlp(ln2 x): both read the same stream, and there is no stream between them."""
    config = LanguageModelConfig(
        1, WIDTH, 37, None, AttentionConfig(n_heads=4, position="rope"), MLPConfig(30), parallel=True, init_std=0.3
    )
    model = LanguageModel(config).double()
    assert "blocks.0.hook_resid_mid" not in model.hook_dict
    tokens = torch.randint(0, 37, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    x = model(tokens, stop_at_layer=0)
    block = model.blocks[0]
    mixed, _ = block.attn((block.ln1(x),) * 3, context(), None)
    assert largest(model(tokens, stop_at_layer=1) - (x + mixed + block.mlp(block.ln2(x)))) < EXACT
    one_after_the_other = LanguageModel(LanguageModelConfig(**{**vars(config), "parallel": False})).double()
    assert largest(one_after_the_other(tokens) - model(tokens)) > 1e-6


def test_results_of_heads_sum_to_the_attention_output() -> None:
    """Σ_head hook_result + b_O = hook_attn_out, and head h's result is its z through its W_O."""
    config = LanguageModelConfig(2, WIDTH, 37, 64, AttentionConfig(n_heads=6, n_key_value_heads=2), MLPConfig(30))
    model = LanguageModel(config).double()
    with torch.no_grad():
        for block in model.blocks:
            block.attn.output.bias.normal_()
    tokens = torch.randint(0, 37, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    names = [
        f"blocks.{layer}.{name}" for layer in (0, 1) for name in ("attn.hook_result", "hook_attn_out", "attn.hook_z")
    ]
    _, cache = model.run_with_cache(tokens, names=names)
    for layer in (0, 1):
        result, site_ = cache["result", layer], model.blocks[layer].attn
        assert result.shape == (2, LENGTH, 6, WIDTH)
        assert largest(result.sum(2) + site_.b_O - cache["attn_out", layer]) < EXACT
        assert largest(result[:, :, 3] - cache["z", layer][:, :, 3] @ site_.W_O[3]) < EXACT
    _, everything = model.run_with_cache(tokens)
    assert ("result", 0) not in everything
    model.set_use_attn_result(True)
    _, everything = model.run_with_cache(tokens)
    assert ("result", 0) in everything


def test_inputs_of_heads_can_be_patched_apart() -> None:
    """With split inputs, changing one head's query input changes that head's pattern and no other's."""
    config = LanguageModelConfig(1, WIDTH, 37, 64, AttentionConfig(n_heads=4, n_key_value_heads=2), None, init_std=0.3)
    model = LanguageModel(config).double()
    tokens = torch.randint(0, 37, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    plain, before = model(tokens), model.patterns(tokens)[0].values
    with pytest.raises(UnknownHookPoint, match="set_use_split_qkv_input"):
        model.run_with_hooks(tokens, hooks=[("blocks.0.hook_q_input", lambda x, hook: x)])
    model.set_use_split_qkv_input(True)
    assert largest(model(tokens) - plain) < EXACT

    def change(x: Tensor, hook: object) -> Tensor:
        x[:, :, 2] = x[:, :, 2].flip(-1)
        return x

    after = model.patterns(tokens, hooks=[("blocks.0.hook_q_input", change)])[0].values
    difference = (after - before).abs().amax(dim=(0, 2, 3))
    assert float(difference[2]) > 1e-3 and float(difference[[0, 1, 3]].max()) < EXACT
    model.set_use_split_qkv_input(False)
    model.set_use_attn_in(True)
    with pytest.raises(ValueError, match="use_attn_in needs one key/value head per query head"):
        model(tokens)


# ------------------------------------------------------------------------------------------------------- fast == explicit


@pytest.mark.parametrize("name", ["grouped, rotary", "multi-query, ALiBi", "window, own scale"])
def test_fused_and_explicit_agree_in_float32_on_a_long_text(name: str) -> None:
    """1500 tokens: the two paths differ by rounding of float32 only."""
    config = LanguageModelConfig(1, WIDTH, 37, 2048, CONFIGS[name], None, init_std=0.3)
    model = LanguageModel(config)
    tokens = torch.randint(0, 37, (1, 1500), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        _, fast = model.run_with_cache(tokens, names="blocks.0.attn.hook_z")
        _, slow = model.run_with_cache(tokens, names=["blocks.0.attn.hook_z", "blocks.0.attn.hook_attn_scores"])
    z = fast["z", 0]
    assert largest(z - slow["z", 0]) < 2e-5 * largest(z)


def test_only_watching_scores_or_pattern_makes_attention_explicit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other hook point leaves the fused kernel in place; a watched pattern makes its own layer explicit and no other."""
    model = LanguageModel(LanguageModelConfig(3, WIDTH, 37, 64, AttentionConfig(n_heads=4), MLPConfig(30)))
    tokens = torch.randint(0, 37, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    explicit: list[Attention] = []
    original = Attention._mix_explicitly

    def counted(self: Attention, *arguments: Tensor) -> Tensor:
        explicit.append(self)
        return original(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Attention, "_mix_explicitly", counted)
    watched = ("hook_pattern", "hook_attn_scores", "hook_mask")
    model(tokens)
    for name in model.hook_dict:
        if not name.endswith(watched) and not model.hook_dict[name].gated:
            model.run_with_cache(tokens, names=name)
    model.generate(tokens, 2)
    assert not explicit
    for layer in range(3):
        for name in watched:
            model.run_with_cache(tokens, names=f"blocks.{layer}.attn.{name}")
            assert explicit == [model.blocks[layer].attn]
            explicit.clear()
    model(tokens)
    assert not explicit


def test_one_mask_serves_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows and ALiBi hand the fused kernel a mask of batch size 1; padding needs one per sequence."""
    shapes: list[tuple[int, ...]] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def recorded(*arguments: Any, **options: Any) -> Tensor:
        shapes.append(tuple(options["attn_mask"].shape))
        return original(*arguments, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", recorded)
    tokens = torch.randint(0, 37, (5, LENGTH), generator=torch.Generator().manual_seed(0))
    padding = torch.ones(5, LENGTH, dtype=torch.bool)
    padding[2, :3] = False
    for mixer, heads in ((AttentionConfig(3, position="alibi"), 3), (AttentionConfig(3, position="rope", window=4), 1)):
        model = LanguageModel(LanguageModelConfig(1, WIDTH, 37, None, mixer, None))
        model(tokens)
        model(tokens, mask=padding)
        assert shapes == [(1, heads, LENGTH, LENGTH), (5, heads, LENGTH, LENGTH)]
        shapes.clear()


MEMORY = """
import resource, torch
from models.attention.site import AttentionConfig
from models.language_model import LanguageModel, LanguageModelConfig
torch.set_num_threads(1)
model = LanguageModel(LanguageModelConfig(1, 192, 256, None, AttentionConfig(12, position="rope"), None)).eval()
tokens = torch.randint(0, 256, (1, 4096), generator=torch.Generator().manual_seed(0))
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
with torch.no_grad():
    model(tokens[:, :64])
    start = peak()
    model.run_with_cache(tokens, names="blocks.0.attn.hook_z")
    unwatched = peak()
    model.run_with_cache(tokens, names="blocks.0.attn.hook_pattern")
print(unwatched - start, peak() - start)
"""


def test_no_query_by_key_array_exists_unless_watched() -> None:
    """12 heads on 4096 tokens: one array of scores takes 805 MB; the peak of an unwatched run grows by a small part of that."""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=root, capture_output=True, text=True, check=True)
    unwatched, watched = map(int, done.stdout.split())
    assert unwatched < 150
    assert watched > 600  # the measure would have seen it


# -------------------------------------------------------------------------------------------------------------- mistakes


def test_configurations_that_cannot_be() -> None:
    cases = [
        (
            AttentionConfig(n_heads=4, n_key_value_heads=3),
            r"n_heads \(4\) must be a multiple of n_key_value_heads \(3\)",
        ),
        (AttentionConfig(n_heads=5), r"d_model \(24\) must be a multiple of n_heads \(5\) unless d_head is given"),
        (
            AttentionConfig(n_heads=4, position="rotary"),
            r"Unknown position 'rotary'.*Expected one of learned, sinusoidal, rope",
        ),
        (AttentionConfig(n_heads=4, position="alibi_"), r"Unknown position 'alibi_'.*Did you mean 'alibi'"),
        (AttentionConfig(n_heads=4, window=0), r"window is 0; expected at least 1"),
    ]
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            Attention(config, WIDTH, {})
