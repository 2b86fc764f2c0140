"""Parameters read over tokens: against the whole matrices, and on models in which the answer was planted."""

import numpy as np
import pytest
import torch

import models
from probes.embedding_space import (
    NotBilinear,
    head_map,
    head_pairs,
    key_value_overlap,
    layer_alignment,
    neuron_tokens,
    neurons,
)


@pytest.mark.parametrize("name", ["gpt2", "llama", "retnet"])
@pytest.mark.parametrize("which", ["qk", "ov"])
def test_pairs_are_the_largest_entries_of_the_whole_matrix(name: str, which: str) -> None:
    """Formed in strips or whole, of the weights under their other names."""
    model = models.build(name).double()
    left, right = head_map(model, 1, 2, which)
    whole = model.W_E @ left @ right @ (model.W_E.T if which == "qk" else model.W_U)
    values, places = whole.flatten().topk(15)
    for rows in (50, 256):
        found = head_pairs(model, 1, 2, which, k=15, rows=rows)
        assert [a * 256 + b for a, b, _ in found] == places.tolist() and np.allclose(
            [v for *_, v in found], values.tolist()
        )
    if name != "retnet":
        attention = model.blocks[1].attn
        if which == "ov":
            group = 2 * attention.n_kv // 4
            assert torch.allclose(left @ right, attention.W_V[group] @ attention.W_O[2])
        else:
            assert torch.allclose(left @ right, attention.W_Q[2] @ attention.W_K[2 * attention.n_kv // 4].T)


def test_ov_of_a_head_is_what_it_writes() -> None:
    """A head of a model without norms' effect: its result for a token read alone is that token's row of the OV map."""
    model = models.build("retnet").double()
    mixer = model.mixers[0]
    left, right = head_map(model, 0, 1, "ov")
    x = torch.randn(24, dtype=torch.float64)
    value = (mixer.value.weight @ x).unflatten(0, (mixer.n_heads, -1))[1]
    joined = torch.zeros(mixer.n_heads, len(value), dtype=torch.float64)
    joined[1] = value
    assert torch.allclose(x @ left @ right, mixer.output.weight @ joined.flatten())


@pytest.mark.parametrize("name", ["gpt2", "llama", "retnet", "bdh"])
def test_planted_neurons_are_read(name: str) -> None:
    model = models.build(name)
    with torch.no_grad():
        model.W_U[:, 65] *= 3
        model.W_E[66] *= 3
        unit = model.W_U[:, 65] / model.W_U[:, 65].norm()
        embedded = model.W_E[66] / model.W_E[66].norm()
        if name == "bdh":
            model.weights.E[1, 4], model.weights.D_x[1, :, 4] = 9 * unit, 9 * embedded
            number = 16 + 4
        else:
            mlp = model.blocks[1].mlp
            mlp.outward.weight[:, 20] = 9 * unit
            (mlp.gate or mlp.inward).weight[20] = 9 * embedded
            number = 20
    (promoted,) = neuron_tokens(model, 1, [number], "value", k=3)
    (wanted,) = neuron_tokens(model, 1, [number], "key", k=3)
    assert promoted[0][0] == 65 and wanted[0][0] == 66 and promoted[0][1] > promoted[1][1]
    assert len(neuron_tokens(model, 1)) == len(neurons(model, 1, "value"))


def test_overlap_finds_neurons_that_promote_what_they_read() -> None:
    model = models.build("gpt2", tie_embeddings=True)
    plain = key_value_overlap(model, 0, 40)
    assert abs(plain.paired.mean() - plain.random.mean()) < 0.08
    assert abs(plain.random.mean() - 40 / 256) < 0.08, "the overlap of unrelated sets of 40 of 256"
    with torch.no_grad():
        model.blocks[0].mlp.outward.weight[:, :20] = model.blocks[0].mlp.inward.weight[:20].T
    planted = key_value_overlap(model, 0, 40)
    assert (planted.paired[:20] == 1).all() and planted.paired[20:].mean() < 0.3 and planted.random.mean() < 0.3


@pytest.mark.parametrize("parameter", ["keys", "values", "query", "output"])
def test_alignment_finds_the_same_layers_in_another_basis(parameter: str) -> None:
    """The second model is the first with its stream rotated, its neurons and heads left in place and its layers turned round."""
    first, second = models.build("gpt2").double(), models.build("gpt2", seed=1).double()
    turn = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).Q
    with torch.no_grad():
        second.embed.W_E.copy_(first.embed.W_E @ turn)
        second.unembed.weight.copy_(first.unembed.weight @ turn)
        for block, source in zip(second.blocks, [first.blocks[i] for i in (2, 0, 1)], strict=True):
            block.mlp.inward.weight.copy_(source.mlp.inward.weight @ turn)
            block.mlp.outward.weight.copy_(turn.T @ source.mlp.outward.weight)
            block.attn.query.weight.copy_(source.attn.query.weight @ turn)
            block.attn.output.weight.copy_(turn.T @ source.attn.output.weight)
    found = layer_alignment(first, second, parameter)
    assert found.assignment == (1, 2, 0) and np.isclose(found.similarity[0, 1], 1) and found.accuracy == 0
    raw = layer_alignment(first, second, parameter, space="raw")
    assert raw.similarity.max() < 0.8, "without the tokens there is no common basis"
    assert layer_alignment(first, first, parameter).accuracy == 1


def test_what_is_not_defined_is_refused_in_words() -> None:
    mamba = models.build("mamba2")
    with pytest.raises(NotBilinear, match="no linear map 'query'"):
        head_map(mamba, 0, 0, "qk")
    with pytest.raises(NotBilinear, match="no channel mixer"):
        neurons(mamba, 0, "key")
    with pytest.raises(NotBilinear, match="no linear map"):
        head_map(models.build("bdh"), 0, 0)
    with pytest.raises(NotBilinear, match="does more to its query"):
        head_map(models.build("diff-transformer"), 0, 0, "qk")  # two maps per head
    model = models.build("gpt2")
    for call, message in (
        (lambda: head_map(model, 0, 4), "heads 0..3"),
        (lambda: head_map(model, 0, 0, "vo"), "Did you mean"),
        (lambda: neurons(model, 9, "key"), "layers 0..2"),
        (lambda: neuron_tokens(model, 0, [40]), "neurons 0..39"),
        (lambda: layer_alignment(model, model, "value_"), "Did you mean 'value'"),
        (lambda: key_value_overlap(model, 0, 256), "expected 1..255"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
