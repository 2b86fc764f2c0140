"""Processed copies compute what their models compute, on every architecture that allows it; the others are refused in words."""

from pathlib import Path

import pytest
import torch

import models
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.parts.norms import Norm
from models.weight_processing import CannotProcess, process_weights, reading_norms
from tests.models.test_consistency import EXACT, NAMES, largest, lively

TOKENS = torch.randint(0, 256, (2, 13), generator=torch.Generator().manual_seed(0))
WITHOUT_READING_NORMS = {
    "bdh", "bdh-paper", "bdh-decay", "universal-transformer", "hrm", "transformer-xl", "compressive-transformer", "gpt1",
}  # fmt: skip
# the norm in front of the mixer stays: relations, slices of the stream, slots, a pooled context, or an sLSTM's parameters read it too;
# the last norm stays, because the memory of the next segment is what it gives
SOME_LEFT = {
    "shared-diff", "dual-attention", "optimised-attention", "efficient-attention", "super-attention", "memformer", "titans-mac", "xlstm",
    "recurrent-memory",
}  # fmt: skip
LAYER_NORMS = [name for name in NAMES if getattr(models.architecture(name).presets["tiny"], "norm", "") == "layer"]
NOT_CENTRED = {  # norms after sums, behind the embedding; a halting gate that reads the stream; sinusoidal positions, which are
    # no weights; an sLSTM, whose output no linear map makes
    "universal-transformer", "transformer-xl", "compressive-transformer", "gpt1", "bloom", "palbert", "looped", "xlstm",
}  # fmt: skip


def norms_are_neutral(model: LanguageModel) -> bool:
    return all(
        bool((norm.w == 1).all()) and (norm.b is None or not norm.b.any()) for norm in reading_norms(model).values()
    )


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_folding_norms_changes_no_logit(name: str) -> None:
    model = lively(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if name in WITHOUT_READING_NORMS:
        with pytest.raises(CannotProcess, match="nothing to fold"):
            process_weights(model, fold_norms=True)
        return
    if name in SOME_LEFT:
        with pytest.raises(CannotProcess, match=r"(ln1|ln_final) cannot be folded .*partial=True"):
            process_weights(model, fold_norms=True)
    made = process_weights(model, fold_norms=True, partial=name in SOME_LEFT)
    assert largest(made(TOKENS) - model(TOKENS)) < EXACT
    assert set(made.processing.folded) | set(made.processing.left) == set(reading_norms(model))
    assert norms_are_neutral(made) == (name not in SOME_LEFT) and not norms_are_neutral(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items()), "the model is untouched"
    assert list(made.hook_dict) == list(model.hook_dict)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYER_NORMS)
def test_centring_what_is_written_changes_no_logit_and_leaves_a_centred_stream(name: str) -> None:
    model = lively(name)
    if name in NOT_CENTRED:
        with pytest.raises(CannotProcess, match=r"centred|mean of its own|removing its mean"):
            process_weights(model, centre_writing=True)
        return
    made = process_weights(model, centre_writing=True)
    assert largest(made(TOKENS) - model(TOKENS)) < EXACT
    (_, ours), (_, theirs) = (x.run_with_cache(TOKENS, role="resid_post") for x in (made, model))
    for address, stream in theirs.items():
        assert largest(stream.mean(-1)) > 1e-4, "there was something to remove"
        assert largest(ours[address] - (stream - stream.mean(-1, keepdim=True))) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama", "retnet", "bdh", "t5"])
def test_centring_the_unembedding_keeps_log_probabilities_and_only_these(name: str) -> None:
    model = lively(name)
    made = process_weights(model, centre_unembedding=True)
    logits, before = made(TOKENS), model(TOKENS)
    assert largest(logits.log_softmax(-1) - before.log_softmax(-1)) < EXACT
    assert largest(logits.mean(-1)) < EXACT and largest(logits - before) > 1e-4


@torch.no_grad()
def test_all_of_it_at_once_by_hand() -> None:
    """gpt2, against the formulas: gains on columns, biases through the map, means off rows and columns."""
    model = lively("gpt2")
    made = process_weights(model, fold_norms=True, centre_writing=True, centre_unembedding=True)
    difference = made(TOKENS).log_softmax(-1) - model(TOKENS).log_softmax(-1)
    assert largest(difference) < EXACT
    block, old = made.blocks[1], model.blocks[1]
    assert torch.allclose(block.attn.query.weight, old.attn.query.weight * old.ln1.w)
    assert torch.allclose(block.attn.b_Q.flatten(), old.attn.b_Q.flatten() + old.attn.query.weight @ old.ln1.b)
    assert torch.allclose(block.mlp.W_out, old.mlp.W_out - old.mlp.W_out.mean(1, keepdim=True))
    unembedding = (model.ln_final.w[:, None] * model.W_U) if model.ln_final is not None else model.W_U
    assert torch.allclose(made.W_U, unembedding - unembedding.mean(1, keepdim=True))
    assert made.processing.folded["blocks.1.ln1"] == tuple(
        f"blocks.1.attn.{part}" for part in ("query", "key", "value")
    )
    assert made.origin["processing"]["centred"][-1] == "unembed"


@torch.no_grad()
def test_ties_are_undone_and_missing_biases_are_made() -> None:
    """A tied model with biased norms and maps without biases."""
    config = LanguageModelConfig(2, 12, 40, 16, mlp=MLPConfig(20, gated=True, bias=False), tie_embeddings=True)
    model = LanguageModel(config).double()
    for module in model.modules():
        if isinstance(module, Norm):
            module.b.uniform_(-1, 1), module.w.uniform_(0.5, 2)  # type: ignore[union-attr]
    made = process_weights(model, fold_norms=True, centre_writing=True)
    tokens = TOKENS % 40
    assert largest(made(tokens) - model(tokens)) < EXACT
    assert model.unembed.weight is None and made.unembed.weight is not None and not made.config.tie_embeddings
    assert model.blocks[0].mlp.gate.bias is None and made.blocks[0].mlp.gate.bias is not None


@torch.no_grad()
def test_float32_stays_float32() -> None:
    model = models.load("induction-circuit")
    made = process_weights(model, fold_norms=True, centre_writing=True)
    tokens = TOKENS % model.vocab_size
    assert made.W_U.dtype == torch.float32 and largest(made(tokens) - model(tokens)) < 1e-3


def test_refusals_say_why(tmp_path: Path) -> None:
    llama, gemma = lively("llama"), lively("gemma2")
    with pytest.raises(CannotProcess, match="Nothing to do"):
        process_weights(llama)
    with pytest.raises(CannotProcess, match="RMS norms do not remove the mean"):
        process_weights(llama, centre_writing=True)
    with pytest.raises(CannotProcess, match="caps its logits"):
        process_weights(gemma, centre_unembedding=True)
    made = process_weights(llama, fold_norms=True)
    with pytest.raises(CannotProcess, match="is a processed copy"):
        process_weights(made, fold_norms=True)
    with pytest.raises(ValueError, match="processed copy"):
        models.save(made, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
