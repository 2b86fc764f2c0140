"""TransformerLens 4.3 as a user of our models: its protocols, its cache's analyses, its patching and its logit lens, against our numbers.

The one module of the tests that imports transformer_lens, which takes seconds.
"""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models.decoder import Decoder
from tests.instrument.tiny_models import largest, lively, some_tokens
from workbench.instrument.cache import ActivationCache
from workbench.instrument.interop import transformer_lens_view
from workbench.instrument.interventions import EditPattern, Patch

TOKENS = some_tokens()
CORRUPTED = some_tokens(seed=9)
EXACT = 1e-10


@pytest.fixture(scope="module")
def lens() -> Any:
    import transformer_lens
    import transformer_lens.head_detector
    import transformer_lens.model_protocol
    import transformer_lens.patching
    import transformer_lens.tools.analysis

    return transformer_lens


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def model(request: pytest.FixtureRequest) -> Decoder:
    return lively(request.param)


@pytest.fixture(scope="module")
def ours(model: Decoder) -> tuple[Tensor, ActivationCache]:
    return model.run_with_cache(TOKENS)


@pytest.mark.parametrize("name", ["gpt2", "llama", "retnet", "mamba2", "bdh"])
def test_protocols(lens: Any, name: str) -> None:
    """Every model is a TransformerLensModel; those of the language-model family have the weights as well."""
    protocols = lens.model_protocol
    model = lively(name)
    assert isinstance(model, protocols.TransformerLensModel)
    assert isinstance(model, protocols.TrainableTransformerLensModel)
    assert isinstance(model, protocols.TransformerLensModelWithWeights) or name == "bdh"


# ----------------------------------------------------------------------------------- decompositions of the stream


def components(model: Decoder, cache: ActivationCache) -> dict[str, Tensor]:
    """What is added to the residual stream, in order."""
    parts = {"embed": cache["hook_embed"]}
    if "hook_pos_embed" in cache:
        parts["pos_embed"] = cache["hook_pos_embed"]
    for layer in range(model.n_layers):
        parts[f"{layer}_attn_out"] = cache["attn_out", layer]
        parts[f"{layer}_mlp_out"] = cache["mlp_out", layer]
    return parts


def frozen_final_norm(model: Decoder, x: Tensor, cache: ActivationCache) -> Tensor:
    """The last norm with the run's scale, without its weights, as TransformerLens applies it to a stack."""
    centred = x - x.mean(-1, keepdim=True) if model.cfg.normalization_type == "LN" else x
    return centred / cache["ln_final.hook_scale"]


def test_decompose_resid(lens: Any, model: Decoder, ours: tuple[Tensor, ActivationCache]) -> None:
    _, cache = ours
    theirs = cache.to_transformer_lens(model)
    stack, labels = theirs.decompose_resid(layer=-1, return_labels=True)
    parts = components(model, cache)
    expected = {label: parts[label] for label in labels if label != "bias"}
    assert list(expected) == list(parts)
    for label, tensor in zip(labels, stack, strict=True):
        if label != "bias":
            assert largest(tensor - expected[label]) == 0, label
    assert largest(stack.sum(0) - cache["resid_post", -1]) < EXACT
    normalised = theirs.decompose_resid(layer=-1, apply_ln=True)
    by_hand = torch.stack([frozen_final_norm(model, part, cache) for part in stack])
    assert largest(normalised - by_hand) < EXACT


def test_accumulated_resid(lens: Any, model: Decoder, ours: tuple[Tensor, ActivationCache]) -> None:
    _, cache = ours
    stack, labels = cache.to_transformer_lens(model).accumulated_resid(layer=-1, incl_mid=True, return_labels=True)
    expected = []
    for layer in range(model.n_layers):
        expected += [cache["resid_pre", layer], cache["resid_mid", layer]]
    expected.append(cache["resid_post", -1])
    assert len(labels) == len(expected) and largest(stack - torch.stack(expected)) == 0


def test_head_results(lens: Any, model: Decoder, ours: tuple[Tensor, ActivationCache]) -> None:
    """stack_head_results from z and W_O == our own hook_result, head by head."""
    _, cache = ours
    _, results = model.run_with_cache(TOKENS, names="*.hook_result")
    stack, labels = cache.to_transformer_lens(model).stack_head_results(layer=-1, return_labels=True)
    assert labels[:2] == ["L0H0", "L0H1"] and len(labels) == 12
    for number, label in enumerate(labels):
        layer, head = int(label[1]), int(label[3])
        assert largest(stack[number] - results["result", layer][:, :, head]) < EXACT


def test_full_decomposition_sums_to_the_stream(lens: Any, model: Decoder, ours: tuple[Tensor, ActivationCache]) -> None:
    """Heads, neurons (or whole MLPs), embeddings and biases add up to the last residual stream."""
    _, cache = ours
    for expand_neurons in (True, False):
        theirs = cache.to_transformer_lens(model)
        stack, labels = theirs.get_full_resid_decomposition(-1, expand_neurons=expand_neurons, return_labels=True)
        assert len(labels) == len(stack) and "bias" in labels
        assert largest(stack.sum(0) - cache["resid_post", -1]) < EXACT, expand_neurons


def test_logit_attribution(lens: Any, ours: tuple[Tensor, ActivationCache], model: Decoder) -> None:
    """logit_attrs of two tokens == each normalised component times the difference of their unembedding columns."""
    _, cache = ours
    theirs = cache.to_transformer_lens(model)
    stack = theirs.decompose_resid(layer=-1)
    attributed = theirs.logit_attrs(stack, tokens=torch.tensor([3, 70]), incorrect_tokens=torch.tensor([9, 1]))
    direction = (model.W_U[:, [3, 70]] - model.W_U[:, [9, 1]]).T
    by_hand = torch.stack([(frozen_final_norm(model, part, cache) * direction[:, None]).sum(-1) for part in stack])
    assert largest(attributed - by_hand) < EXACT
    assert largest(theirs.logit_attrs(stack, tokens="A") - theirs.logit_attrs(stack, tokens=65)) == 0


# -------------------------------------------------------------------------------------------------- patching


def metric(logits: Tensor) -> Tensor:
    return logits[0, -1, 5] - logits[1, -1, 6]


def one_at_a_time(model: Decoder, cache: ActivationCache, make: Callable[..., Patch], *ranges: int) -> Tensor:
    """The table of a patching sweep by our own interventions, one run per cell."""
    table = torch.empty(*ranges, dtype=torch.float64)
    for index in torch.cartesian_prod(*(torch.arange(size) for size in ranges)).tolist():
        table[tuple(index)] = metric(model.run_with_hooks(CORRUPTED, hooks=[make(cache, *index)]))
    return table


def at_position(name: str) -> Callable[..., Patch]:
    def patch(cache: ActivationCache, layer: int, position: int) -> Patch:
        address = f"blocks.{layer}.hook_{name}"
        return Patch(address, value=cache[address], positions=position)

    return patch


def whole_head(cache: ActivationCache, layer: int, head: int) -> Patch:
    address = f"blocks.{layer}.attn.hook_z"
    return Patch(address, value=cache[address], heads=head)


def head_at_position(cache: ActivationCache, layer: int, position: int, head: int) -> Patch:
    address = f"blocks.{layer}.attn.hook_z"
    return Patch(address, value=cache[address], heads=head, positions=position)


def pattern_of_head(cache: ActivationCache, layer: int, head: int) -> Patch:
    address = f"blocks.{layer}.attn.hook_pattern"
    return Patch(address, value=cache[address], heads=head)


SWEEPS: dict[str, tuple[Callable[..., Patch], tuple[int, ...]]] = {
    "resid_pre": (at_position("resid_pre"), (3, 8)),
    "mlp_out": (at_position("mlp_out"), (3, 8)),
    "attn_head_out_all_pos": (whole_head, (3, 4)),
    "attn_head_out_by_pos": (head_at_position, (3, 8, 4)),
    "attn_head_pattern_all_pos": (pattern_of_head, (3, 4)),
}


@pytest.mark.parametrize("sweep", SWEEPS)
def test_patching_sweeps(lens: Any, model: Decoder, ours: tuple[Tensor, ActivationCache], sweep: str) -> None:
    """transformer_lens.patching on our model, with our cache as it is, == the same cells by our Patch."""
    _, cache = ours
    make, ranges = SWEEPS[sweep]
    table = getattr(lens.patching, f"get_act_patch_{sweep}")(model, CORRUPTED, cache, metric)
    assert largest(table.double() - one_at_a_time(model, cache, make, *ranges)) < 1e-6, "their table is float32"
    assert float(table.std()) > 1e-4


def test_patching_everything(lens: Any, model: Decoder, ours: tuple[Tensor, ActivationCache]) -> None:
    _, cache = ours
    every = lens.patching.get_act_patch_block_every(model, CORRUPTED, cache, metric)
    for table, name in zip(every, ("resid_pre", "attn_out", "mlp_out"), strict=True):
        assert largest(table.double() - one_at_a_time(model, cache, at_position(name), 3, 8)) < 1e-6
    assert lens.patching.get_act_patch_attn_head_all_pos_every(model, CORRUPTED, cache, metric).shape == (5, 3, 4)


# ---------------------------------------------------------------------------------------------------- lenses


@pytest.mark.parametrize("name", ["gpt2", "llama", "retnet", "mamba2"])
def test_logit_lens(lens: Any, name: str) -> None:
    """Every depth's stream through the last norm and the unembedding, from our cache or from a view that runs the model."""
    model = lively(name)
    logits, cache = model.run_with_cache(TOKENS)
    result = lens.tools.analysis.logit_lens(cache.to_transformer_lens(model), positions=None)
    streams = [model(TOKENS, stop_at_layer=layer) for layer in range(model.n_layers + 1)]
    assert result.values.shape == (model.n_layers + 1, 2, 8, 256)
    for depth, stream in enumerate(streams):
        assert largest(result.values[depth] - model.unembed_residual(stream)) < EXACT
    assert largest(result.values[-1] - logits) < EXACT

    by_view = lens.tools.analysis.logit_lens(transformer_lens_view(model), TOKENS, top_k=3)
    assert torch.equal(by_view.readout.top_ids[-1].squeeze(), logits[:, -1].topk(3).indices)
    assert largest(by_view.values[-1].squeeze() - logits[:, -1].topk(3).values) < EXACT


def test_a_view_shares_everything_with_the_model(lens: Any) -> None:
    model = lively("gpt2")
    view = transformer_lens_view(model)
    plain = model(TOKENS)
    assert isinstance(view, type(model)) and torch.equal(view(TOKENS), plain)
    assert isinstance(view.run_with_cache(TOKENS)[1], lens.ActivationCache)
    assert isinstance(model.run_with_cache(TOKENS)[1], ActivationCache)
    handle = model.add_hook("blocks.0.hook_attn_out", lambda x, hook: 0 * x)
    assert torch.equal(view(TOKENS), model(TOKENS)) and largest(view(TOKENS) - plain) > 1e-3
    handle.remove()
    view.set_use_attn_result(True)
    assert "blocks.0.attn.hook_result" in model.run_with_cache(TOKENS)[1]


def test_head_detector(lens: Any, model: Decoder) -> None:
    """Their score of a previous-token head is the mean weight one below the diagonal; a planted head stands out."""
    text = "the dragon hatches, the dragon flies"
    previous = torch.eye(len(text), dtype=torch.float64).roll(-1, dims=1)
    previous[0], previous[0, 0] = 0, 1
    with model.hooks([EditPattern(layer=1, heads=2, value=previous)]):
        scores = lens.head_detector.detect_head(transformer_lens_view(model), text, "previous_token_head")
        patterns = torch.stack([pattern.values[0] for pattern in model.patterns(text).values()])
    expected = patterns.diagonal(-1, dim1=-2, dim2=-1).sum(-1) / len(text)
    assert largest(scores - expected) < 1e-3, "they round to three decimals"
    assert scores.argmax() == 1 * 4 + 2 and float(scores.max()) == pytest.approx(1 - 1 / len(text), abs=1e-3)


# ------------------------------------------------------------------------------------- words, flags, no surprises


def test_flags_and_configuration(lens: Any) -> None:
    model = lively("gpt2")
    model.set_use_attn_result(True)
    assert model.cfg.use_attn_result and not model.cfg.use_split_qkv_input
    _, cache = model.run_with_cache(TOKENS)
    theirs = cache.to_transformer_lens(model)
    logging.disable(logging.WARNING)  # it warns that the head results are there already
    assert largest(theirs.stack_head_results(-1).sum(0) - sum(cache["result", i].sum(2) for i in range(3))) < EXACT
    logging.disable(logging.NOTSET)
    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_head, model.cfg.d_mlp) == (3, 4, 6, 40)


def test_the_cache_keys_that_its_users_write(lens: Any, model: Decoder, ours: tuple[Tensor, ActivationCache]) -> None:
    """Our cache answers the same short keys as theirs with the same tensors."""
    _, cache = ours
    theirs = cache.to_transformer_lens(model)
    for key in (
        ("pattern", 0),
        ("resid_post", -1),
        ("q", 1),
        ("post", 2),
        ("scale", 0, "ln1"),
        ("normalized", 1, "ln2"),
    ):
        assert torch.equal(cache[key], theirs[key]), key
    names = [lens.utilities.get_act_name(*key) for key in (("k", 2), ("attn_scores", 0), ("mlp_out", 1))]
    assert all(name in cache for name in names)
