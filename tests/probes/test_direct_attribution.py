"""Direct attribution against the textbook formulas, exact sums on every architecture, and planted writers."""

import json

import pytest
import torch

import models
from models.registry import ARCHITECTURES as REGISTERED
from probes.direct_attribution import Component, direct_attribution
from probes.heads import head_scores
from probes.objectives import Divergence, LogitDifference
from tests.probes.attribution_cases import ARCHITECTURES, left_padded, perturbed, random_tokens
from workbench import Ablate
from workbench.lab.tasks import make_task

models.architecture("bdh")  # registers all
ANSWER, WRONG = torch.tensor([3, 8, 21]), torch.tensor([5, 1, 30])
OBJECTIVE = LogitDifference(ANSWER, WRONG)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_parts_are_the_textbook_ones(name: str) -> None:
    """((c − mean c) / σ)·(γ ⊙ (u_a − u_b)) under LayerNorm, the same without the mean under RMSNorm; the constant from β and b_U."""
    model = perturbed(name)
    tokens = random_tokens(model)
    found = direct_attribution(model, tokens, OBJECTIVE)
    model.set_use_attn_result(True)
    _, cache = model.run_with_cache(tokens)
    norm, unembedding = model.ln_final, model.W_U.T
    direction = unembedding[ANSWER] - unembedding[WRONG]
    scale = cache["ln_final.hook_scale"][:, -1]

    def worth(written: torch.Tensor) -> torch.Tensor:
        centre = written.mean(-1, keepdim=True) if norm.kind == "layer" else 0.0
        return ((written - centre) / scale * norm.w * direction).sum(-1)

    for layer in range(model.n_layers):
        result = cache[f"blocks.{layer}.attn.hook_result"][:, -1]
        for head in range(result.shape[1]):
            assert result[:, head].mean(-1).abs().min() > 1e-6  # or centring would not be tested
            torch.testing.assert_close(found["head", layer, head], worth(result[:, head]), atol=1e-12, rtol=1e-10)
        torch.testing.assert_close(found["mlp", layer], worth(cache["mlp_out", layer][:, -1]), atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(found["embed"], worth(cache["hook_embed"][:, -1]), atol=1e-12, rtol=1e-10)
    constant = torch.zeros(3, dtype=torch.float64)
    if norm.b is not None:
        constant = (norm.b * direction).sum(-1) + model.b_U[ANSWER] - model.b_U[WRONG]
        torch.testing.assert_close(found["positions"], worth(cache["hook_pos_embed"][:, -1]), atol=1e-12, rtol=1e-10)
        bias = worth(model.blocks[0].attn.b_O)
        torch.testing.assert_close(found["rest", 0], bias, atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(found.constant, constant, atol=1e-12, rtol=1e-10)


NO_HEADS = (
    "titans-mac",
    "titans-mag",
    "titans-mal",
)  # two paths are multiplied: their heads have no share of their own


NO_SUM = ("hrm-text",)  # every run of its blocks ends in a norm: what earlier runs added is not what the next one reads


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_parts_sum_to_the_logit_difference(name: str) -> None:
    """On every architecture; only capped logits, which are no sum, and weights of steps, which depend on them, are refused."""
    model = perturbed(name)
    tokens = random_tokens(model)
    no_sum = bool(getattr(model.config, "logit_softcap", None)) or "halting" in model.hook_points.roles or name in NO_SUM
    if no_sum or name in NO_HEADS:
        with pytest.raises(ValueError, match=r"sum to something else .* not affine"):
            direct_attribution(model, tokens, OBJECTIVE)
    if no_sum:
        return
    found = direct_attribution(model, tokens, OBJECTIVE, heads=name not in NO_HEADS)
    logits = model(tokens)[:, -1]
    expected = (logits.gather(1, ANSWER[:, None]) - logits.gather(1, WRONG[:, None]))[:, 0].detach()
    torch.testing.assert_close(found.contributions.sum(0) + found.constant, expected, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.total, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sums_in_float32(name: str) -> None:
    model = perturbed(name, torch.float32)
    assert direct_attribution(model, random_tokens(model), OBJECTIVE).error < 1e-4


def test_retention_heads_are_pattern_times_values_through_norm_and_gate() -> None:
    model = perturbed("retnet")
    tokens = random_tokens(model)
    found = direct_attribution(model, tokens, OBJECTIVE)
    _, cache = model.run_with_cache(tokens)
    patterns = model.patterns(tokens)
    direction = (model.W_U.T[ANSWER] - model.W_U.T[WRONG]) * model.ln_final.w / cache["ln_final.hook_scale"][:, -1]
    direction = direction - direction.mean(-1, keepdim=True) if model.ln_final.kind == "layer" else direction
    for layer, block in enumerate(model.blocks):
        here = f"blocks.{layer}.mixer."
        read = torch.einsum("bhqk,bkhd->bqhd", patterns[layer].values, cache[here + "hook_v"])
        gated = read / cache[here + "norm.hook_scale"] * cache[here + "hook_gate"]
        weight = block.mixer.output.weight.T.unflatten(0, gated.shape[-2:])
        written = torch.einsum("bhd,hdm->bhm", gated[:, -1], weight)
        expected = torch.einsum("bhm,bm->hb", written, direction)
        for head in range(len(expected)):
            torch.testing.assert_close(found["head", layer, head], expected[head], atol=1e-12, rtol=1e-9)


def test_bdh_heads_are_gated_neurons_through_the_norms_above() -> None:
    model = perturbed("bdh")
    tokens = random_tokens(model)
    found = direct_attribution(model, tokens, OBJECTIVE)
    _, cache = model.run_with_cache(tokens)
    direction = model.W_U.T[ANSWER] - model.W_U.T[WRONG]

    def centred(x: torch.Tensor) -> torch.Tensor:
        return x - x.mean(-1, keepdim=True)

    above = 1.0
    for layer in reversed(range(model.n_layers)):
        here = f"blocks.{layer}."
        above = above / cache[here + "ln_v.hook_scale"][:, -1]
        scale = above / cache[here + "ln_u.hook_scale"][:, -1]
        for head in range(model.config.n_heads):
            written = cache[here + "hook_y"][:, head, -1] @ model.weights.E[head]
            expected = (centred(written) * scale * direction).sum(-1)
            torch.testing.assert_close(found["head", layer, head], expected, atol=1e-12, rtol=1e-9)


def test_only_the_planted_writer_counts() -> None:
    """One head alone may write along the answer's direction; all others write where no logit looks."""
    model = perturbed("llama", n_layers=2)
    with torch.no_grad():
        model.ln_final.w.fill_(1.0)
        weight = model.unembed.weight
        weight[:, model.d_model // 2 :] = 0.0  # logits look at the first half only
        for block in model.blocks:
            block.attn.output.weight[: model.d_model // 2] = 0.0
            block.mlp.outward.weight[: model.d_model // 2] = 0.0
        model.embed.W_E[:, : model.d_model // 2] = 0.0
        d_head = model.blocks[1].attn.d_head
        model.blocks[1].attn.output.weight[: model.d_model // 2, 2 * d_head : 3 * d_head] = 0.3
        weight[ANSWER, 0] += 1.0
    found = direct_attribution(model, random_tokens(model), OBJECTIVE)
    assert found.top(1)[0][0] == Component("head", 1, 2)
    assert abs(found.top(1)[0][1]) > 1e-3
    assert max(abs(value) for _, value in found.top(50)[1:]) < 1e-15


def test_the_induction_heads_write_the_answer_of_the_shipped_circuit() -> None:
    """The direct writers are layer 1's induction heads; the previous-token head, without which nothing works, writes next to nothing."""
    model = models.load("induction-circuit")
    batch = make_task("induction", vocab_size=128, length=65, min_period=10, max_period=30, seed=7).batch(
        8, 1, "validation"
    )
    tokens = batch.tokens
    ends = [int(row.nonzero()[-1]) for row in batch.loss_mask]
    answer = tokens[torch.arange(8), ends]
    found = direct_attribution(
        model, tokens[:, :-1], LogitDifference(answer, (answer + 1) % 128, torch.tensor(ends) - 1)
    )
    scores = head_scores(model, batch, ("induction", "previous_token"))
    readers = {head for head in range(4) if scores["induction"][1, head] > 0.2}
    feeder = scores.best("previous_token", 1)[0][:2]
    written = {c: v for c, v in found.top(50) if c.kind == "head"}
    from_readers = sum(value for c, value in written.items() if c.layer == 1 and c.head in readers)
    assert from_readers > 0.8 * float(found.total.mean())
    assert abs(written[Component("head", *feeder)]) < 0.1 * from_readers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_and_order_change_nothing(name: str) -> None:
    model = perturbed(name)
    tokens = random_tokens(model)
    found = direct_attribution(model, tokens, OBJECTIVE)
    filled, mask = left_padded(tokens)
    padded = direct_attribution(model, filled, OBJECTIVE, mask=mask)
    torch.testing.assert_close(padded.contributions, found.contributions, atol=1e-10, rtol=1e-8)
    right = torch.cat([tokens, tokens[:, :2]], 1)
    mask = torch.cat([torch.ones_like(tokens), torch.zeros_like(tokens[:, :2])], 1).bool()
    padded = direct_attribution(model, right, OBJECTIVE, mask=mask)
    torch.testing.assert_close(padded.contributions, found.contributions, atol=1e-10, rtol=1e-8)
    placed = LogitDifference(ANSWER, WRONG, at=torch.tensor([8, 8, 8]))  # one position for each sequence
    torch.testing.assert_close(direct_attribution(model, right, placed, mask=mask).total, found.total)
    turned = direct_attribution(model, tokens.flip(0), LogitDifference(ANSWER.flip(0), WRONG.flip(0)))
    torch.testing.assert_close(turned.contributions.flip(1), found.contributions, atol=1e-12, rtol=1e-9)


def test_edited_runs_are_explained_as_they_are() -> None:
    model = perturbed("gpt2")
    found = direct_attribution(
        model, random_tokens(model), OBJECTIVE, hooks=[Ablate("blocks.1.attn.hook_z", heads=[0])]
    )
    assert found["head", 1, 0].abs().max() == 0 and found["head", 1, 1].abs().min() > 0


def test_what_is_not_linear_is_refused() -> None:
    model = perturbed("titans-mag")
    tokens = random_tokens(model)
    with pytest.raises(ValueError, match=r"heads of layer 0 .* heads=False"):
        direct_attribution(model, tokens, OBJECTIVE)
    with pytest.raises(TypeError, match=r"Divergence is not linear"):
        direct_attribution(model, tokens, Divergence(model(tokens)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"answer is .* expected token ids"):
        direct_attribution(model, tokens, LogitDifference(10**6), heads=False)
    with pytest.raises(ValueError, match=r"at is 9"):
        direct_attribution(model, tokens, LogitDifference(1, at=9), heads=False)


def test_results_are_plain_and_named() -> None:
    model = perturbed("gpt2")
    found = direct_attribution(model, random_tokens(model), LogitDifference(3))
    record = json.loads(json.dumps(found.to_json()))
    assert record["components"][0] == "embed" and len(record["contributions"]) == len(found.components)
    assert sum(value for _, value in found.by_depth()) == pytest.approx(float(found.contributions.mean(1).sum()))
    with pytest.raises(KeyError, match=r"No component 'head 0.9'. There are: embed"):
        found["head", 0, 9]
