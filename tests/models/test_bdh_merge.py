"""Merged models: a model merged with itself is itself, and every wrong way of merging is not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models.bdh import merge as merging
from models.bdh.merge import Heritage, merge
from models.bdh.model import BDH, BDHConfig
from models.bdh.official import from_official, to_official
from workbench.lab.runs import RunStore
from workbench.lab.trace import trace_run

EXACT = 1e-10
# ε so small that doubling a norm's argument changes nothing that float64 can see
CONFIG = BDHConfig(
    n_layers=3, d_model=10, n_heads=3, n_neurons=48, vocab_size=37, dropout=0.0, init_std=0.5, norm_eps=1e-30
)


@pytest.fixture(scope="module")
def model() -> BDH:
    return BDH(CONFIG).double().eval()


@pytest.fixture(scope="module")
def other() -> BDH:
    return BDH(BDHConfig(**{**vars(CONFIG), "n_neurons": 30, "seed": 1})).double().eval()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 37, (2, 15), generator=torch.Generator().manual_seed(0))


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


@pytest.mark.parametrize("copies", [2, 3])
def test_merging_a_model_with_itself_changes_nothing(model: BDH, tokens: Tensor, copies: int) -> None:
    merged, _ = merge([model] * copies)
    assert merged.config.n_neurons == copies * 48
    assert largest(merged(tokens) - model(tokens)) <= EXACT
    assert largest(model(tokens)) > 0.5


def test_epsilon_is_what_a_self_merge_sees(tokens: Tensor) -> None:
    """With the usual ε and small weights the identity holds only roughly: the norms' arguments double."""
    small = BDH(BDHConfig(**{**vars(CONFIG), "norm_eps": 1e-5, "init_std": 0.02})).double().eval()
    merged, _ = merge([small, small])
    assert largest(merged(tokens) - small(tokens)) > 1e-3


def published_merge(model: BDH, **wrong: Tensor) -> BDH:
    """The self-merge written in the published layout, with some tensors replaced by wrong ones."""
    state = to_official(model)
    neurons = 16
    rows = state["decoder"].view(3, neurons, 10)
    joined = {
        **state,
        "encoder": torch.cat([state["encoder"]] * 2, -1),
        "encoder_v": torch.cat([state["encoder_v"]] * 2, -1),
        "decoder": torch.cat([rows, rows], 1).reshape(-1, 10),
        "attn.freqs": torch.cat([state["attn.freqs"]] * 2, -1),
    }
    return from_official({**joined, **wrong}, n_layers=3, dropout=0.0, norm_eps=1e-30).eval()


def test_wrong_merges_fail_by_a_lot(model: BDH, tokens: Tensor) -> None:
    plain = model(tokens)
    assert largest(published_merge(model)(tokens) - plain) <= EXACT
    state = to_official(model)
    flat = torch.cat([state["decoder"], state["decoder"]])  # heads of E no longer belong to those of D_x and D_y
    assert largest(published_merge(model, decoder=flat)(tokens) - plain) > 0.1 * largest(plain)
    anew = BDH(BDHConfig(**{**vars(CONFIG), "n_neurons": 96})).weights.frequencies.view(1, 1, 1, -1)
    assert largest(published_merge(model, **{"attn.freqs": anew})(tokens) - plain) > 0.1 * largest(plain)


def test_every_neuron_keeps_its_weights_and_time_scale(model: BDH, other: BDH) -> None:
    merged, heritage = merge([model, other], ["first", "second"])
    assert heritage == Heritage(("first", "second"), (16, 10))
    assert heritage.parent().tolist() == [0] * 16 + [1] * 10
    for name in ("D_x", "D_y"):
        parts = heritage.split(getattr(merged.weights, name))
        assert torch.equal(parts["first"], getattr(model.weights, name))
        assert torch.equal(parts["second"], getattr(other.weights, name))
    assert torch.equal(heritage.split(merged.weights.frequencies)["second"], other.weights.frequencies)
    assert torch.equal(merged.weights.E[:, 16:], other.weights.E)
    assert torch.equal(merged.W_E, (model.W_E + other.W_E) / 2)
    assert torch.equal(merged.W_U, (model.W_U + other.W_U) / 2)
    assert merged.n_parameters() == 3 * 78 * 10 + 2 * 37 * 10


def test_a_silent_parent_leaves_the_other_alone(model: BDH, tokens: Tensor) -> None:
    """A parent whose neurons never fire, with the same embeddings, adds nothing: the merged model is the first one."""
    silent = BDH(CONFIG).double().eval()
    with torch.no_grad():
        silent.weights.D_x.zero_()
    merged, heritage = merge([model, silent], ["talks", "silent"])
    assert largest(merged(tokens) - model(tokens)) <= EXACT
    _, cache = merged.run_with_cache(tokens, names="blocks.1.hook_x")
    shares = heritage.active_share(cache["blocks.1.hook_x"])
    assert bool((shares["talks"] == 1).all()) and bool((shares["silent"] == 0).all())


def test_the_order_of_neuron_pairs_does_not_matter(model: BDH, tokens: Tensor) -> None:
    """Rotary pairs may stand in any order as long as their frequencies go with them: why concatenation is allowed at all."""
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    neurons = torch.stack([2 * order, 2 * order + 1], 1).flatten()
    shuffled, halves = BDH(CONFIG).double().eval(), BDH(CONFIG).double().eval()
    with torch.no_grad():
        for other in (shuffled, halves):
            for name, dim in (("D_x", -1), ("D_y", -1), ("E", 1)):
                getattr(other.weights, name).copy_(getattr(model.weights, name).index_select(dim, neurons))
        shuffled.weights.frequencies.copy_(model.weights.frequencies[neurons])
    assert largest(shuffled(tokens) - model(tokens)) <= EXACT
    assert largest(halves(tokens) - model(tokens)) > 1e-2  # without their frequencies it does


def test_heritage_of_activity(model: BDH, other: BDH, tokens: Tensor) -> None:
    merged, heritage = merge([model, other], ["first", "second"])
    _, cache = merged.run_with_cache(tokens, names=["blocks.1.hook_y", "blocks.1.hook_u_pre"])
    y = cache["blocks.1.hook_y"]
    parts = heritage.contribution(merged, y)
    assert largest(parts["first"] + parts["second"] - cache["blocks.1.hook_u_pre"]) < EXACT
    assert largest(parts["first"]) > 1e-2 and largest(parts["second"]) > 1e-2
    shares = heritage.active_share(y[:, :, 1:])
    expected = (y[:, :, 1:, :16] != 0).sum(-1) / (y[:, :, 1:] != 0).sum(-1)
    assert torch.equal(shares["first"].nan_to_num(), expected.nan_to_num())
    assert bool(heritage.active_share(y)["first"][:, :, 0].isnan().all())  # position 0 is silent


def test_merged_models_are_saved_with_their_frequencies(model: BDH, other: BDH, tokens: Tensor, tmp_path: Path) -> None:
    first, second = models.build("bdh"), models.build("bdh", n_neurons=16, seed=5)
    merged, _ = merge([first, second])
    again = models.load(models.save(merged, tmp_path / "merged"))
    assert torch.equal(again(tokens), merged(tokens))
    assert torch.equal(again.weights.frequencies, merged.weights.frequencies)  # type: ignore[union-attr]


def test_parents_that_do_not_fit(model: BDH) -> None:
    with pytest.raises(ValueError, match="at least two"):
        merge([model])
    with pytest.raises(ValueError, match="differ in d_model: 10 and 12"):
        merge([model, BDH(BDHConfig(**{**vars(CONFIG), "d_model": 12})).double()])
    with pytest.raises(ValueError, match="differ in dtype"):
        merge([model, BDH(CONFIG)])
    with pytest.raises(ValueError, match="2 different names"):
        merge([model, model], ["a", "a"])
    with pytest.raises(TypeError, match="Parent 1 is a LanguageModel"):
        merge([model, models.build("gpt2")])  # type: ignore[list-item]
    _, heritage = merge([model, model])
    with pytest.raises(ValueError, match="The last axis has 3 entries; expected 32"):
        heritage.split(torch.zeros(3))


def test_a_merged_model_is_traced_like_any_other(tmp_path: Path) -> None:
    """Its run says what it was merged of, and its diagram has the neurons of both."""
    merged, _ = merge([models.build("bdh"), models.build("bdh", seed=1)], ["first", "second"])  # type: ignore[list-item]
    run = trace_run(merged, "hello", RunStore(tmp_path))
    assert run.model["merged_from"] == ["first", "second"]
    (neurons,) = {block["detail"] for block in run.model["blocks"] if block["kind"] == "bdh"}
    assert neurons == f"{merged.config.n_heads}×{merged.config.n_neurons // merged.config.n_heads} neurons"


def test_the_self_merge_badge_tells_a_wrong_merge(model: BDH, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge that makes rotation frequencies anew instead of keeping each parent's is not the identity."""
    float32 = BDH(replace(model.config, norm_eps=1e-5)).eval()
    assert merging.self_merge_error(float32, tokens) < 1e-12 < merging.self_merge_error(float32, tokens, exact=False)

    def with_new_frequencies(parents: Any, names: Any) -> Any:
        merged, heritage = merge(parents, names)
        merged.weights.frequencies.copy_(BDH(merged.config).weights.frequencies)
        return merged, heritage

    monkeypatch.setattr(merging, "merge", with_new_frequencies)
    assert merging.self_merge_error(float32, tokens) > 1e-3
