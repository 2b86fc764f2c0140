"""Hook points carry TransformerLens's names and shapes; the table in data/ was recorded from its models."""

import json
from pathlib import Path

import pytest

from tests.instrument.tiny_models import gpt2, llama, some_tokens
from workbench.instrument.errors import UnknownHookPoint

TABLE = json.loads((Path(__file__).parent / "data" / "transformer_lens_shapes.json").read_text())


def expected(kind: str) -> dict[str, tuple[int, ...]]:
    """Every name of the table, written out for two layers."""
    return {name.format(layer=layer): tuple(shape) for name, shape in TABLE[kind].items() for layer in range(2)}


@pytest.mark.parametrize("kind", ["gpt2", "gpt2+flags", "llama"])
def test_every_name_exists_with_its_shape(kind: str) -> None:
    model = llama() if kind == "llama" else gpt2()
    if kind == "gpt2+flags":
        model.set_use_attn_result(True)
        model.set_use_split_qkv_input(True)
        model.set_use_hook_mlp_in(True)
    _, cache = model.run_with_cache(some_tokens())
    shapes = {name: tuple(tensor.shape) for name, tensor in cache.items()}
    wanted = expected(kind)
    assert len(wanted) > 38
    assert {name: shapes.get(name) for name in wanted} == wanted


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_every_name_can_be_asked_for_alone(kind: str) -> None:
    """Asked for by name, each is the same tensor as when everything is cached: no name is an empty promise."""
    model = llama() if kind == "llama" else gpt2()
    model.double()
    _, everything = model.run_with_cache(some_tokens())
    for name, shape in expected(kind).items():
        _, cache = model.run_with_cache(some_tokens(), names=name)
        assert list(cache) == [name] and tuple(cache[name].shape) == shape
        assert (cache[name] - everything[name]).nan_to_num(0.0, 0.0, 0.0).abs().max() < 1e-12, name


def test_on_demand_points_need_no_switch_but_gated_ones_do() -> None:
    """The head results can be asked for by name at any time; split inputs exist only behind their switch."""
    model = gpt2()
    _, cache = model.run_with_cache(some_tokens(), names="blocks.*.attn.hook_result")
    assert [tuple(tensor.shape) for tensor in cache.values()] == [(2, 8, 4, 64)] * 2
    with pytest.raises(UnknownHookPoint, match=r"set_use_split_qkv_input\(True\)"):
        model.run_with_cache(some_tokens(), names="blocks.0.hook_q_input")
    with pytest.raises(UnknownHookPoint, match="Did you mean 'use_attn_result'"):
        model.set_switch("use_atn_result", True)


def test_head_results_sum_to_the_attention_output() -> None:
    """hook_result is each head's own share: with the output bias they add up to hook_attn_out."""
    model = gpt2().double()
    _, cache = model.run_with_cache(some_tokens(), names=["blocks.1.attn.hook_result", "blocks.1.hook_attn_out"])
    total = cache["result", 1].sum(2) + model.blocks[1].attn.b_O
    assert (total - cache["attn_out", 1]).abs().max() < 1e-14


def test_short_keys_find_the_same_tensors() -> None:
    """TransformerLens's `cache["pattern", 0]`, `cache["scale", 1, "ln1"]`, `cache["embed"]`, negative layers."""
    model = gpt2()
    _, cache = model.run_with_cache(some_tokens())
    pairs = {
        ("pattern", 0): "blocks.0.attn.hook_pattern",
        ("resid_post", -1): "blocks.1.hook_resid_post",
        ("scale", 1, "ln1"): "blocks.1.ln1.hook_scale",
        ("post", 0): "blocks.0.mlp.hook_post",
        "embed": "hook_embed",
    }
    for short, name in pairs.items():
        assert cache[short] is cache[name]
        assert short in cache
    assert ("pattern", 7) not in cache and "patern" not in cache
