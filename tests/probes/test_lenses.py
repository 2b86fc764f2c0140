"""The logit lens against the slow equation, on every architecture, and on models whose last layers do nothing."""

import json

import pytest
import torch

import models
from models.registry import ARCHITECTURES as REGISTERED
from probes.lenses import logit_lens
from tests.probes.attribution_cases import ARCHITECTURES, left_padded, perturbed, random_tokens
from workbench import Ablate

models.architecture("bdh")  # registers all


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_the_last_depth_is_the_model(name: str) -> None:
    model = perturbed(name)
    reading = logit_lens(model, random_tokens(model))
    depths = len(model.visits) + 1
    assert reading.divergence.shape == (depths, 3, 9)
    assert reading.divergence[-1].abs().max() < 1e-12 and reading.agreement[-1].min() == 1
    assert reading.divergence[0].min() > 1e-9  # the embedding alone is another prediction
    loss = model(random_tokens(model), return_type="loss")
    torch.testing.assert_close(reading.mean("loss")[-1], loss.detach())


@pytest.mark.parametrize("name", ["gpt2", "llama", "retnet", "mamba2", "bdh"])
def test_depths_are_runs_that_stop_early(name: str) -> None:
    """Independent of the hooks: run up to a layer, normalise and unembed by hand."""
    model = perturbed(name)
    tokens = random_tokens(model)
    reading = logit_lens(model, tokens, top=4)
    final = model(tokens).softmax(-1)
    for depth in range(model.n_layers):
        stream = model(tokens, stop_at_layer=depth)
        logits = stream @ model.W_U if name == "bdh" else model.ln_final(stream) @ model.W_U
        logits = logits + getattr(model, "b_U", 0)
        p = logits.softmax(-1)
        torch.testing.assert_close(
            reading.divergence[depth], (final * (final / p).log()).sum(-1), atol=1e-12, rtol=1e-9
        )
        torch.testing.assert_close(reading.entropy[depth], -(p * p.log()).sum(-1))
        torch.testing.assert_close(reading.top_log_probs[depth], p.log().sort(-1, descending=True).values[..., :4])
        assert torch.equal(reading.top_ids[depth][..., 0], p.argmax(-1))


def test_layers_that_write_nothing_change_no_reading() -> None:
    """With the last two layers silent, the prediction is complete one depth earlier than where it would otherwise be."""
    model = perturbed("gpt2")
    silent = [Ablate(f"blocks.{layer}.{point}") for layer in (1, 2) for point in ("hook_attn_out", "hook_mlp_out")]
    reading = logit_lens(model, random_tokens(model), hooks=silent)
    far = reading.mean("divergence")
    assert far[0] > 1e-3 and far[1:].abs().max() < 1e-12


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_order_and_batches_change_nothing(name: str) -> None:
    model = perturbed(name)
    tokens = random_tokens(model)
    reading = logit_lens(model, tokens)
    filled, mask = left_padded(tokens)
    padded = logit_lens(model, filled, mask=mask, batch_size=2)
    assert padded.divergence[:, :, :2].isnan().all()
    torch.testing.assert_close(padded.divergence[:, :, 2:], reading.divergence, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(padded.loss[:, :, 2:], reading.loss, equal_nan=True, atol=1e-10, rtol=1e-8)
    turned = logit_lens(model, tokens.flip(0))
    torch.testing.assert_close(turned.entropy.flip(1), reading.entropy)
    torch.testing.assert_close(padded.mean("entropy"), reading.mean("entropy"))


def test_steps_of_shared_layers_are_depths_in_order() -> None:
    model = perturbed("looped")
    reading = logit_lens(model, random_tokens(model))
    assert reading.depths[:2] == ("embedding", "layer 0, step 0")
    assert reading.depths[-1] == f"layer {model.n_layers - 1}, step {model.loops - 1}"


def test_results_are_plain_and_mistakes_are_named() -> None:
    model = perturbed("llama")
    reading = logit_lens(model, random_tokens(model), top=2)
    record = json.loads(json.dumps(reading.to_json()))
    assert record["depths"][0] == "embedding" and len(record["divergence"]) == model.n_layers + 1
    with pytest.raises(ValueError, match=r"Unknown measure 'entropie'. Did you mean 'entropy'"):
        reading.mean("entropie")
    with pytest.raises(ValueError, match=r"top is 0"):
        logit_lens(model, random_tokens(model), top=0)


@pytest.mark.parametrize("name", ["gpt2", "mamba2"])
def test_ranks_and_targets_of_ones_own(name: str) -> None:
    """Rank = place in the sorted logits; a given target is read everywhere, the last position included."""
    model = perturbed(name)
    tokens = random_tokens(model)
    plain, asked = logit_lens(model, tokens), logit_lens(model, tokens, target=7)
    order = model(tokens).argsort(-1, descending=True)
    ranks = order.argsort(-1)
    expected = ranks[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].double()
    assert torch.equal(plain.rank[-1, :, :-1], expected) and plain.rank[:, :, -1].isnan().all()
    assert torch.equal(asked.rank[-1], ranks[..., 7].double())
    torch.testing.assert_close(asked.loss[-1], -model(tokens).log_softmax(-1)[..., 7].detach())
    assert torch.equal(asked.divergence, plain.divergence)
    with pytest.raises(ValueError, match=r"target is 256; expected token ids 0..255"):
        logit_lens(model, tokens, target=256)
