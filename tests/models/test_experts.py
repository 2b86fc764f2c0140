"""The sparse channel mixer against its equations written out token by token, and its hook points."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models.configs import config_from_json, config_to_json
from models.decoder import Decoder
from models.diagram import model_blocks
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig, build_channel_mixer
from models.parts.experts import SparseMLP, SparseMLPConfig

D_MODEL, EXPERTS, ACTIVE = 9, 5, 2
TEXT = "one two three one two"


def made(**changes: object) -> SparseMLP:
    """A float64 mixer with weights of order 1."""
    mixer = SparseMLP(SparseMLPConfig(**{"d_mlp": 7, "n_experts": EXPERTS, "n_active": ACTIVE, **changes}), D_MODEL)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in mixer.double().parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return mixer


def slowly(mixer: SparseMLP, x: Tensor) -> Tensor:
    """One token after the other, one chosen expert after the other."""
    rows = []
    for token in x.flatten(0, 1):
        chances = torch.exp(mixer.router.weight @ token)
        chances = chances / chances.sum()
        chosen = sorted(range(EXPERTS), key=lambda e: -float(chances[e]))[:ACTIVE]
        total = sum(chances[e] for e in chosen) if mixer.config.normalise else 1.0
        y = torch.zeros_like(token)
        for e in chosen:
            hidden = F.silu(mixer.gate[e] @ token) * (mixer.inward[e] @ token)
            y = y + chances[e] / total * (mixer.outward[e] @ hidden)
        if mixer.shared is not None:
            shared = mixer.shared
            hidden = F.silu(shared.gate.weight @ token) * (shared.inward.weight @ token)  # type: ignore[union-attr]
            y = y + torch.sigmoid(mixer.shared_gate.weight[0] @ token) * (shared.outward.weight @ hidden)
        rows.append(y)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("normalise", [True, False], ids=["normalised", "as-they-are"])
@pytest.mark.parametrize("d_shared", [None, 4], ids=["alone", "with-shared"])
def test_against_the_equations(normalise: bool, d_shared: int | None) -> None:
    mixer = made(normalise=normalise, d_shared=d_shared)
    x = torch.randn(2, 6, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (mixer(x) - slowly(mixer, x)).abs().max() < 1e-12
        assert (mixer._all_experts(x, mixer._route(x)) - mixer._chosen_experts(x, mixer._route(x))).abs().max() < 1e-12


@pytest.fixture(scope="module")
def model() -> Decoder:
    config = LanguageModelConfig(2, 12, 256, 64, mlp=SparseMLPConfig(7, EXPERTS, ACTIVE, d_shared=6), init_std=0.3)
    return models.build("gpt2", config=config).double()


def test_every_token_goes_through_a_few(model: Decoder) -> None:
    """Router weights are shares of the chosen experts, and the summands with the shared MLP are the output."""
    at = "blocks.1.mlp"
    names = [f"{at}.hook_router", f"{at}.hook_expert_out", f"{at}.hook_shared_gate", "blocks.1.hook_mlp_out"]
    _, cache = model.run_with_cache(TEXT, names=[*names, f"{at}.shared.hook_post"])
    weights, summands = cache[names[0]], cache[names[1]]
    assert ((weights > 0).sum(-1) == ACTIVE).all() and (weights.sum(-1) - 1).abs().max() < 1e-12
    assert torch.equal((summands != 0).any(-1), weights > 0)
    shared = cache[names[2]] * model.blocks[1].mlp.shared.outward(cache[f"{at}.shared.hook_post"])
    assert (summands.sum(2) + shared - cache[names[3]]).abs().max() < 1e-12


def test_sending_a_token_elsewhere_computes_the_other_expert(model: Decoder) -> None:
    """All weight on one expert: the output is that expert's, whoever was chosen before."""
    mlp, at = model.blocks[1].mlp, "blocks.1.mlp"

    def only_the_third(weights: Tensor, hook: object) -> Tensor:
        return F.one_hot(torch.full(weights.shape[:2], 3), EXPERTS).to(weights)

    names = ["blocks.1.ln2.hook_normalized", "blocks.1.hook_mlp_out", f"{at}.hook_shared_gate"]
    _, cache = model.run_with_cache(TEXT, names=names, hooks=[(f"{at}.hook_router", only_the_third)])
    x = cache[names[0]]
    expected = mlp._hidden(x, 3) @ mlp.outward[3].T + cache[names[2]] * mlp.shared(x)
    assert (cache[names[1]] - expected).abs().max() < 1e-12


def test_editing_a_neuron_of_an_expert_changes_its_summand_alone(model: Decoder) -> None:
    at = "blocks.0.mlp"
    names = [f"{at}.hook_router", f"{at}.hook_expert_out"]
    _, plain = model.run_with_cache(TEXT, names=[*names, f"{at}.hook_expert_post"])
    _, cut = model.run_with_cache(
        TEXT, names=names, hooks=[(f"{at}.hook_expert_post", lambda h, hook: h.index_fill(-1, torch.tensor([2]), 0.0))]
    )
    lost = plain[f"{at}.hook_expert_post"][..., 2, None] * model.blocks[0].mlp.outward[:, :, 2]
    expected = plain[names[1]] - plain[names[0]][..., None] * lost
    assert (cut[names[1]] - expected).abs().max() < 1e-12 < lost.abs().max()


def test_the_diagram_says_what_it_is(model: Decoder) -> None:
    parts = [(part["label"], part["detail"]) for part in model_blocks(model) if part["kind"] == "mlp"]
    assert parts == [("Experts", "2 of 5, 7")] * 2


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="n_active is 6; expected between 1 and n_experts"):
        SparseMLP(SparseMLPConfig(7, 5, 6), D_MODEL)
    with pytest.raises(ValueError, match=r"Unknown activation 'sillu'. Did you mean 'silu'"):
        SparseMLP(SparseMLPConfig(7, 5, 2, "sillu"), D_MODEL)
    with pytest.raises(ValueError, match=r"no gate. Expected gated=True"):
        build_channel_mixer(MLPConfig(7, gate_bias=True), D_MODEL)
    with pytest.raises(TypeError, match=r"int is no channel mixer configuration. Known: .*MLPConfig"):
        build_channel_mixer(3, D_MODEL)
    record = config_to_json(LanguageModelConfig(2, 8, mlp=SparseMLPConfig(7, 5, 2)))
    assert config_from_json(LanguageModelConfig, record).mlp == SparseMLPConfig(7, 5, 2)
    record["mlp"]["kind"] = "sparse_mpl"
    with pytest.raises(ValueError, match=r"Unknown channel mixer kind 'sparse_mpl'. Did you mean 'sparse_mlp'"):
        config_from_json(LanguageModelConfig, record)
