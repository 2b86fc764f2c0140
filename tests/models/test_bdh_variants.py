"""The variants of BDH against their equations, written here a second time as loops over tokens and the tokens before them."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

import models
from models.bdh.merge import merge
from models.bdh.model import BDH, BDHConfig
from models.bdh.official import from_official, to_official
from models.registry import ARCHITECTURES
from tests.models.test_bdh import largest, normalised, turned

EXACT = 1e-10
LENGTH, HEADS, LAYERS = 13, 4, 3
MODES = ["parallel", "chunked", "recurrent"]
# no axis has the size of another: 4 heads, 3 layers, 6 neurons per head, width 10, 37 symbols
CODE = BDHConfig(n_layers=LAYERS, d_model=10, n_heads=HEADS, n_neurons=24, vocab_size=37, dropout=0.0, init_std=0.4)
PAPER = replace(CODE, residual="neuron")
FADING = replace(CODE, decay=1.0)
VARIANTS = {
    "paper": PAPER,
    "fading": FADING,
    "fading paper": replace(PAPER, decay=0.5),
    "no BPTT": replace(CODE, detach_memory=True),
    "all": replace(PAPER, decay=2.0, detach_memory=True),
}


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 37, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def built(config: BDHConfig) -> BDH:
    return BDH(config).double().eval()


def slow_forward(model: BDH, tokens: Tensor) -> Tensor:
    """Logits [batch, pos, vocab]: every read is a sum over earlier tokens, λ^(distance) (R_t x_t · R_τ x_τ) v_τ, added up one by one."""
    config, weights = model.config, model.weights
    fade = torch.tensor(
        [math.exp(-config.decay * 2.0 ** (-8 * (head + 1) / HEADS)) for head in range(HEADS)], dtype=torch.float64
    )
    phase = (torch.arange(LENGTH, dtype=torch.float32)[:, None] * weights.frequencies) % 1
    v = normalised(model.W_E[tokens])
    x = torch.zeros(len(tokens), HEADS, LENGTH, config.n_neurons // HEADS, dtype=v.dtype)
    for _ in range(LAYERS):
        excited = torch.einsum("btd,hdn->bhtn", v, weights.D_x).clamp(min=0)
        x = x + excited if config.residual == "neuron" else excited
        q = turned(x, phase)
        past_k, past_v = (q.detach(), v.detach()) if config.detach_memory else (q, v)
        reads = []
        for t in range(LENGTH):
            read = torch.zeros(len(tokens), HEADS, config.d_model, dtype=v.dtype)
            for tau in range(t):
                match = (q[:, :, t] * past_k[:, :, tau]).sum(-1)
                read = read + (fade ** (t - tau) * match)[..., None] * past_v[:, None, tau]
            reads.append(read)
        a = torch.stack(reads, 2)
        y = x * torch.einsum("bhtd,hdn->bhtn", normalised(a), weights.D_y).clamp(min=0)
        u = normalised(torch.einsum("bhtn,hnd->btd", y, weights.E))
        v = u if config.residual == "neuron" else normalised(v + u)
    return v @ model.W_U


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_the_equations(variant: str, mode: str, tokens: Tensor) -> None:
    model = built(VARIANTS[variant])
    model.set_mode(mode)
    expected = slow_forward(model, tokens)
    assert largest(model(tokens) - expected) < EXACT
    assert largest(expected) > 0.1


def test_every_option_makes_another_model(tokens: Tensor) -> None:
    """The equations tell the variants apart, so agreeing with them means something; the weights are the same."""
    plain = built(CODE)(tokens)
    for config in (PAPER, FADING, replace(PAPER, decay=0.5)):
        assert largest(built(config)(tokens) - plain) > 0.1


# ----------------------------------------------------------------------------------------------- the paper's residual


def test_activity_accumulates_in_neuron_space(tokens: Tensor) -> None:
    """x_l is the sum of what the layers up to l added, none of it negative; v is LN(E y) of the layer before."""
    model = built(PAPER)
    _, cache = model.run_with_cache(tokens)
    total = torch.zeros_like(cache["blocks.0.hook_x"])
    for layer in range(LAYERS):
        total = total + cache[f"blocks.{layer}.hook_x_added"]
        assert largest(cache[f"blocks.{layer}.hook_x"] - total) < EXACT
        assert bool((cache[f"blocks.{layer}.hook_x_added"] >= 0).all())
    for layer, after in pairwise(range(LAYERS)):
        written = torch.einsum("bhtn,hnd->btd", cache[f"blocks.{layer}.hook_y"], model.weights.E)
        assert largest(cache[f"blocks.{after}.hook_v"] - normalised(written)) < EXACT
    assert not [name for name in model.hook_dict if "ln_v" in name or "hook_v_sum" in name]


def test_the_papers_model_says_nothing_about_the_first_tokens(tokens: Tensor) -> None:
    """Layer l reads at token t what layer l − 1 wrote at earlier tokens, so y = 0 for t ≤ l, and the first L tokens have no logits."""
    model = built(PAPER)
    logits, cache = model.run_with_cache(tokens)
    for layer in range(LAYERS):
        y = cache[f"blocks.{layer}.hook_y"]
        assert largest(y[:, :, : layer + 1]) == 0 and largest(y[:, :, layer + 1]) > 1e-3
    assert largest(logits[:, :LAYERS]) == 0 and largest(logits[:, LAYERS]) > 0.1
    assert largest(cache["blocks.0.hook_v"][:, 0]) > 0.1  # the embeddings are there
    assert not model.predicts_from_one_token and built(FADING).predicts_from_one_token


def test_editing_x_reaches_the_layers_above(tokens: Tensor) -> None:
    """x is a residual stream: what is added to it in one layer is still there two layers up."""
    model = built(PAPER)
    edit = [("blocks.0.hook_x", lambda x, hook: x + 1)]
    _, plain = model.run_with_cache(tokens, names="blocks.2.hook_x")
    _, edited = model.run_with_cache(tokens, names="blocks.2.hook_x", hooks=edit)
    # at position 0 nothing is read, so nothing but the edit itself can differ
    assert largest((edited["blocks.2.hook_x"] - plain["blocks.2.hook_x"])[:, :, 0] - 1) < EXACT


def test_no_run_begins_between_two_layers(tokens: Tensor) -> None:
    model = built(PAPER)
    stream = model(tokens, stop_at_layer=0)
    assert largest(model(stream, start_at_layer=0) - model(tokens)) < EXACT
    with pytest.raises(ValueError, match=r"start_at_layer=2.*more than the residual stream"):
        model(model(tokens, stop_at_layer=2), start_at_layer=2)
    assert (
        largest(built(FADING)(built(FADING)(tokens, stop_at_layer=2), start_at_layer=2) - built(FADING)(tokens)) < EXACT
    )


# ------------------------------------------------------------------------------------------------------ fading memory


@pytest.mark.parametrize("config", [FADING, replace(PAPER, decay=0.5)], ids=["code", "paper"])
def test_the_state_fades_at_one_rate_per_head(config: BDHConfig, tokens: Tensor) -> None:
    """S_t = Σ_{τ≤t} λ^(t−τ) (R_τ x_τ) ⊗ v_τ with λ = exp(−decay · 2^(−8(h+1)/H))."""
    model = built(config)
    at = [2, LENGTH - 1]
    reading = model.states(tokens, at)
    _, cache = model.run_with_cache(tokens)
    for layer in range(LAYERS):
        keys, values = cache[f"blocks.{layer}.attn.hook_rot_k"], cache[f"blocks.{layer}.attn.hook_value"]
        for number, position in enumerate(at):
            for head in range(HEADS):
                slope = config.decay * 2.0 ** (-8 * (head + 1) / HEADS)
                expected = sum(
                    math.exp(-slope * (position - tau)) * keys[:, head, tau, :, None] * values[:, tau, None, :]
                    for tau in range(position + 1)
                )
                assert largest(reading[layer][:, number, head] - expected) < EXACT


def test_without_decay_it_is_the_published_model_to_the_bit(tokens: Tensor) -> None:
    assert torch.equal(built(replace(FADING, decay=0.0))(tokens), built(CODE)(tokens))
    assert built(CODE).mixers[0].constant_factors() == {}
    slopes = built(FADING).mixers[0].constant_factors()["log_decay"]
    assert torch.allclose(slopes, -torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8], dtype=torch.float64), rtol=1e-12)


def test_a_strong_decay_leaves_only_the_last_token() -> None:
    """With λ ≈ 0 nothing is left of any earlier token: the reads vanish and the logits depend on the last token alone."""
    model = built(replace(CODE, decay=1e6))
    text = torch.tensor([[1, 2, 3, 4], [9, 8, 7, 4]])
    logits = model(text)
    assert largest(logits[0, -1] - logits[1, -1]) < EXACT
    assert largest(built(CODE)(text)[0, -1] - built(CODE)(text)[1, -1]) > 0.1


def test_log_decays_keep_their_precision_in_sixteen_bit() -> None:
    half = BDH(FADING).to(torch.bfloat16)
    assert half.mixers[0].constant_factors()["log_decay"].dtype == torch.float32
    assert torch.equal(half.weights.log_decay, BDH(FADING).weights.log_decay)
    assert "weights.log_decay" not in half.state_dict()


# --------------------------------------------------------------------------------------- no gradient through the past


@pytest.mark.parametrize("config", [CODE, replace(PAPER, decay=0.5)], ids=["code", "fading paper"])
@pytest.mark.parametrize("mode", MODES)
def test_detached_memory_computes_the_same_and_learns_differently(config: BDHConfig, mode: str, tokens: Tensor) -> None:
    """Logits equal to the bit; gradients are those of the equations with keys and values held constant, and not the full ones."""
    full, detached = built(config), built(replace(config, detach_memory=True))
    for model in (full, detached):
        model.set_mode(mode)
    assert torch.equal(detached(tokens), full(tokens))

    def gradients(model: BDH, logits: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(logits.square().sum(), list(model.parameters())))

    got = gradients(detached, detached(tokens))
    expected = gradients(detached, slow_forward(detached, tokens))
    for a, b in zip(got, expected, strict=True):
        assert largest(a - b) < 1e-9 * max(1.0, largest(b))
    through_time = gradients(full, full(tokens))
    assert max(largest(a - b) / largest(b) for a, b in zip(got, through_time, strict=True)) > 1e-2


def test_detached_memory_has_no_gradient_to_earlier_tokens(tokens: Tensor) -> None:
    """∂ logits_t / ∂ embedding_τ is exactly 0 for τ < t, though the logits do depend on earlier tokens."""
    reach = {}
    for name, config in (("full", CODE), ("detached", replace(CODE, detach_memory=True))):
        model, kept = built(config), []

        def keep(x: Tensor, hook: object, kept: list[Tensor] = kept) -> Tensor:
            kept.append(x.detach().requires_grad_())
            return kept[0]

        logits = model.run_with_hooks(tokens[:1], hooks=[("hook_embed", keep)])
        (gradient,) = torch.autograd.grad(logits[0, -1].square().sum(), kept[0])
        reach[name] = gradient[0].abs().sum(-1)
    assert largest(reach["detached"][:-1]) == 0 and reach["detached"][-1] > 0
    assert bool((reach["full"] > 0).all())


# ------------------------------------------------------------------------------------------------- merging, official


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_merge_with_themselves_into_themselves(variant: str, tokens: Tensor) -> None:
    """As for the published model: doubling every neuron changes nothing as ε of the norms goes to 0; the parts sum to the whole."""
    model = built(replace(VARIANTS[variant], norm_eps=1e-30))
    other = built(replace(VARIANTS[variant], norm_eps=1e-30, seed=1, n_neurons=16))
    merged, _ = merge([model, model])
    assert largest(merged(tokens) - model(tokens)) <= EXACT
    assert replace(merged.config, n_neurons=24) == model.config
    mixed, heritage = merge([model, other], ["first", "second"])
    _, cache = mixed.run_with_cache(tokens, names=["blocks.1.hook_y", "blocks.1.hook_u_pre"])
    parts = heritage.contribution(mixed, cache["blocks.1.hook_y"])
    assert largest(parts["first"] + parts["second"] - cache["blocks.1.hook_u_pre"]) < EXACT
    assert min(largest(part) for part in parts.values()) > 1e-2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (PAPER, "differ in residual: stream and neuron"),
        (FADING, r"differ in decay: 0\.0 and 1\.0"),
        (replace(CODE, detach_memory=True), "differ in detach_memory: False and True"),
    ],
)
def test_parents_of_different_variants_are_refused(config: BDHConfig, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        merge([built(CODE), built(config)])


def test_the_published_layout_holds_the_published_model_only(tokens: Tensor) -> None:
    for config in (PAPER, FADING):
        with pytest.raises(ValueError, match="only residual='stream' without decay"):
            to_official(built(config))
    detached = built(replace(CODE, detach_memory=True))  # the same model as far as the weights are concerned
    assert torch.equal(from_official(to_official(detached), LAYERS, dropout=0.0).eval()(tokens), built(CODE)(tokens))
    paper = from_official(to_official(built(CODE)), LAYERS, dropout=0.0, residual="neuron").eval()
    assert torch.equal(paper(tokens), built(PAPER)(tokens))


# --------------------------------------------------------------------------------------------------- configuration


def test_configurations_that_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"residual is 'neurons'; expected 'stream'.*Did you mean 'neuron'"):
        BDHConfig(residual="neurons")  # type: ignore[arg-type]
    for decay in (-0.1, math.nan):
        with pytest.raises(ValueError, match=r"decay is .*expected 0"):
            BDHConfig(decay=decay)


def test_the_registry_says_what_is_reconstructed() -> None:
    models.list_models()
    for name, options in (("bdh-paper", {"residual": "neuron"}), ("bdh-decay", {"decay": 1.0})):
        record = ARCHITECTURES[name]
        assert record.fidelity == "reconstructed" and record.notes and record.paper == "bdh"
        assert {key: getattr(models.build(name).config, key) for key in options} == options
    assert ARCHITECTURES["bdh"].fidelity == "faithful"
