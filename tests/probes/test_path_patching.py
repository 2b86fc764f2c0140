"""Path patching against runs made by hand from the weights, and its place between direct and total effects."""

import json

import pytest
import torch
from torch import Tensor

from probes.objectives import LogitDifference
from probes.patching import activation_patching
from probes.path_patching import Site, heads_of, path_patching
from tests.probes.attribution_cases import ARCHITECTURES, left_padded, perturbed, random_tokens
from workbench import Patch

ANSWER, WRONG = torch.tensor([3, 8, 21]), torch.tensor([5, 1, 30])
OBJECTIVE = LogitDifference(ANSWER, WRONG)


def prompts(model) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
    original = random_tokens(model)
    new = original.clone()
    new[:, [2, 5, 8]] = (original[:, [2, 5, 8]] + 7) % model.vocab_size
    return original, new


@pytest.mark.parametrize("freeze_mlps", [False, True])
def test_the_way_to_the_logits_by_hand(freeze_mlps: bool) -> None:
    """From the weights: the head's changed result travels up the stream past held heads, through recomputed or held MLPs."""
    model = perturbed("gpt2")
    original, new = prompts(model)
    found = path_patching(model, original, new, OBJECTIVE, senders=[Site("z", 1, 2)], freeze_mlps=freeze_mlps)
    model.set_use_attn_result(True)
    _, one = model.run_with_cache(original)
    _, other = model.run_with_cache(new)
    result = "blocks.1.attn.hook_result"
    stream = one["resid_mid", 1] + (other[result] - one[result])[:, :, 2]
    for layer in (1, 2):
        if layer == 2:
            stream = stream + one["attn_out", 2]
        block = model.blocks[layer]
        stream = stream + (one["mlp_out", layer] if freeze_mlps else block.mlp(block.ln2(stream)))
    expected = OBJECTIVE(model.unembed(model.ln_final(stream)))
    torch.testing.assert_close(found.values[0], expected.detach(), atol=1e-12, rtol=0)
    assert found.effects().abs().min() > 1e-6


def test_the_way_into_a_query_by_hand() -> None:
    model = perturbed("gpt2")
    original, new = prompts(model)
    found = path_patching(model, original, new, OBJECTIVE, senders=[Site("z", 0, 1)], receivers=[Site("query", 1, 3)])
    model.set_use_attn_result(True)
    _, one = model.run_with_cache(original)
    _, other = model.run_with_cache(new)
    result = "blocks.0.attn.hook_result"
    stream = one["resid_mid", 0] + (other[result] - one[result])[:, :, 1]
    stream = stream + model.blocks[0].mlp(model.blocks[0].ln2(stream))
    attention = model.blocks[1].attn
    query = model.blocks[1].ln1(stream) @ attention.W_Q[3] + attention.b_Q[3]
    patched = one["blocks.1.attn.hook_q"].clone()
    patched[:, :, 3] = query
    logits = model.run_with_hooks(original, hooks=[Patch("blocks.1.attn.hook_q", value=patched)])
    torch.testing.assert_close(found.values[0], OBJECTIVE(logits).detach(), atol=1e-12, rtol=0)
    assert found.effects().abs().min() > 1e-7


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_last_layer_has_only_the_direct_path(name: str) -> None:
    """With no mixer above, path patching to the logits is activation patching; below, the two differ."""
    model = perturbed(name)
    original, new = prompts(model)
    found = path_patching(model, original, new, OBJECTIVE)
    total = activation_patching(model, new, original, OBJECTIVE, role="z", by=("head",))
    for site, value in zip(found.senders, found.values, strict=True):
        whole = total.values[site.layer, site.head]
        if site.layer == model.n_layers - 1:
            torch.testing.assert_close(value, whole, atol=1e-12, rtol=0)
    first = torch.stack([v for site, v in zip(found.senders, found.values, strict=True) if site.layer == 0])
    assert (first - total.values[0]).abs().max() > 1e-9


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_receivers_hear_what_the_sender_says(name: str) -> None:
    """A sender that says the same in both prompts changes nothing; one that differs reaches queries, keys and values above it."""
    model = perturbed(name)
    original, new = prompts(model)
    receivers = [Site(role, 1) for role in ("query", "key", "value")]
    same = path_patching(model, original, original, OBJECTIVE, senders=[Site("z", 0, 0)], receivers=receivers)
    assert same.effects().abs().max() < 1e-12
    found = path_patching(model, original, new, OBJECTIVE, senders=[Site("z", 0, 0)], receivers=receivers)
    assert found.effects().abs().max() > 1e-9
    embedding = path_patching(model, original, new, OBJECTIVE, senders=[Site("embed")], receivers=receivers)
    assert embedding.effects().abs().max() > 1e-9


def test_no_mlp_between_means_no_difference() -> None:
    model = perturbed("attention-only")
    original, new = prompts(model)
    one, other = (path_patching(model, original, new, OBJECTIVE, freeze_mlps=freeze) for freeze in (False, True))
    torch.testing.assert_close(one.values, other.values, atol=1e-12, rtol=0)
    model = perturbed("gpt2")
    one, other = (path_patching(model, original, new, OBJECTIVE, freeze_mlps=freeze) for freeze in (False, True))
    assert (one.values - other.values).abs().max() > 1e-6


def test_padding_and_order_change_nothing() -> None:
    model = perturbed("retnet")
    original, new = prompts(model)
    receivers = [Site("key", 2, 1)]
    found = path_patching(model, original, new, OBJECTIVE, receivers=receivers, senders=heads_of(model)[:3])
    (long, mask), (other, _) = left_padded(original), left_padded(new)
    again = path_patching(model, long, other, OBJECTIVE, receivers=receivers, senders=heads_of(model)[:3], mask=mask)
    torch.testing.assert_close(again.values, found.values, atol=1e-11, rtol=1e-9)


def test_mistakes_are_named() -> None:
    model = perturbed("gpt2")
    original, new = prompts(model)
    with pytest.raises(ValueError, match=r"no path from z 1\.0 to query 1\.0"):
        path_patching(model, original, new, OBJECTIVE, senders=[Site("z", 1, 0)], receivers=[Site("query", 1, 0)])
    with pytest.raises(ValueError, match="no single heads"):
        path_patching(model, original, new, OBJECTIVE, senders=[Site("mlp_out", 1, 0)])
    with pytest.raises(ValueError, match="names no layer"):
        path_patching(model, original, new, OBJECTIVE, senders=[Site("z")])
    with pytest.raises(ValueError, match="repeats its layers"):
        path_patching(perturbed("looped"), original, new, OBJECTIVE)
    found = path_patching(model, original, new, OBJECTIVE, senders=[Site("mlp_out", 0)])
    record = json.loads(json.dumps(found.to_json()))
    assert record["senders"] == ["mlp_out 0"] and record["receivers"] == ["logits"] and not record["freeze_mlps"]
