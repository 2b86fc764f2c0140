"""Feed-forward layers as attention, generalised cross-attention, and randomised positions."""

import math
from pathlib import Path

import pytest
import torch

import models
from models.attention.site import AttentionConfig
from models.diagram import model_blocks
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.parts.knowledge import KnowledgeBase, KnowledgeConfig, feed_forward_attention
from models.parts.positions import randomised_positions

EXACT = 1e-10


def largest(x: torch.Tensor) -> float:
    return float(x.detach().abs().max())


@pytest.mark.parametrize("mlp", [MLPConfig(20, "relu"), MLPConfig(20), MLPConfig(20, "silu", True, False)], ids=str)
def test_a_feed_forward_layer_is_attention_over_its_neurons(mlp: MLPConfig) -> None:
    """Weights times output directions is the layer's output; for ReLU, weights are ReLU(keys · x + threshold) cell by cell."""
    model = LanguageModel(LanguageModelConfig(2, 12, 37, 64, AttentionConfig(3), mlp, init_std=0.5)).double()
    tokens = torch.arange(9)[None]
    view = feed_forward_attention(model, tokens, -1)
    _, cache = model.run_with_cache(tokens, names=["blocks.1.hook_mlp_out", "blocks.1.ln2.hook_normalized"])
    assert largest(view.output() - cache["mlp_out", 1]) < EXACT
    assert view.meta.columns == "neuron" and view.meta.signed == (mlp.activation != "relu")
    if mlp.activation == "relu":
        part, x = model.blocks[1].mlp, cache["blocks.1.ln2.hook_normalized"][0]
        for position, neuron in ((0, 3), (8, 19)):
            score = float(x[position] @ part.W_in[:, neuron] + part.b_in[neuron])
            assert float(view.weights[0, position, neuron]) == pytest.approx(max(score, 0), abs=1e-12)


def test_generalised_cross_attention() -> None:
    """Its equation by loops; with entries = one-hot rows it is any feed-forward layer with the same weights."""
    torch.manual_seed(0)
    layer = KnowledgeBase(KnowledgeConfig(7, 5, 4), 6).double()
    layer.initialise_own()
    x = torch.randn(2, 3, 6).double()
    out, entries = layer(x), layer.entries
    expected = layer.outward.bias.clone()
    for entry in range(7):
        score = float(layer.query(x[1, 2]) @ layer.key(entries[entry])) / 2 + float(layer.threshold(entries[entry]))
        expected = expected + max(score, 0) * (layer.outward.weight @ entries[entry])
    assert largest(out[1, 2] - expected) < EXACT
    layer = KnowledgeBase(KnowledgeConfig(7, 7, 6), 6).double()
    with torch.no_grad():
        layer.query.weight.copy_(torch.eye(6))
        layer.entries.copy_(torch.eye(7))
    mlp = (
        x @ layer.key.weight / math.sqrt(6) + layer.threshold.weight[0] + layer.threshold.bias
    ).relu() @ layer.outward.weight.T
    assert largest(layer(x) - mlp - layer.outward.bias) < EXACT


def knowing(config: KnowledgeConfig | tuple[KnowledgeConfig, ...]) -> LanguageModel:
    return LanguageModel(
        LanguageModelConfig(3, 24, mixer=AttentionConfig(4, position="rope"), mlp=config, init_std=0.5)
    )


def test_entries_are_shared_between_layers_and_trained_by_all() -> None:
    shared, own = knowing(KnowledgeConfig(9, 5, 4)), knowing(KnowledgeConfig(9, 5, 4, shared=False))
    assert [name for name, _ in shared.named_parameters() if "entries" in name] == ["blocks.0.mlp.own_entries"]
    assert shared.blocks[2].mlp.entries is shared.blocks[0].mlp.entries
    assert own.n_parameters() - shared.n_parameters() == 2 * 9 * 5
    shared(torch.arange(8)[None], return_type="loss").backward()
    cut = shared.run_with_hooks(
        torch.arange(8)[None], hooks=[("blocks.2.hook_mlp_out", lambda x, hook: 0 * x)], return_type="loss"
    )
    gradient = shared.blocks[0].mlp.own_entries.grad.clone()
    shared.zero_grad()
    cut.backward()
    assert largest(gradient - shared.blocks[0].mlp.own_entries.grad) > 1e-8  # the last layer's share
    mixed = knowing((KnowledgeConfig(9, 5, 4), KnowledgeConfig(8, 5, 4)))
    assert mixed.blocks[2].mlp.entries is mixed.blocks[0].mlp.entries is not mixed.blocks[1].mlp.entries


def test_a_knowledge_base_is_saved_cached_and_drawn(tmp_path: Path) -> None:
    model = models.build("gpt", mlp=KnowledgeConfig(9, 5, 4))
    again = models.load(models.save(model, tmp_path / "kept"))
    tokens = torch.arange(8)[None]
    assert torch.equal(model(tokens), again(tokens)) and again.config == model.config
    _, cache = model.run_with_cache(tokens, role="mlp_post")
    assert cache["blocks.1.mlp.hook_post"].shape == (1, 8, 9) and float(cache["blocks.1.mlp.hook_post"].min()) == 0
    assert ("Knowledge base", "9 shared entries") in {
        (block["label"], block["detail"]) for block in model_blocks(model)
    }
    with pytest.raises(ValueError, match="KnowledgeBase; expected an MLP"):
        feed_forward_attention(model, tokens, 1)
    with pytest.raises(ValueError, match="size below 1"):
        KnowledgeConfig(0, 5, 4)


def test_randomised_positions() -> None:
    """Distinct, ascending, uniform: each position is drawn equally often, and models take them as facts."""
    generator = torch.Generator().manual_seed(0)
    drawn = randomised_positions(5, 20, generator, batch=4000)
    assert drawn.shape == (4000, 5) and bool((drawn.diff(dim=-1) > 0).all())
    counts = torch.bincount(drawn.flatten(), minlength=20).double()
    assert (
        len(counts) == 20 and largest(counts / 1000 - 1) < 0.15
    )  # 20 000 draws over 20 positions: 5 standard deviations are 0.14
    assert torch.equal(randomised_positions(6, 6), torch.arange(6)[None])
    with pytest.raises(ValueError, match="21 tokens cannot have different positions below 20"):
        randomised_positions(21, 20)
    model = models.build("gpt").double()
    tokens = torch.arange(8)[None]
    given = model(tokens, facts={"positions": randomised_positions(8, 50, generator)})
    assert largest(given - model(tokens)) > 1e-6
