"""What every decoder does: tokens and texts, losses by hand, generation, states on disk, and an error in words for every mistake."""

import copy

import pytest
import torch
from torch import Tensor, nn

import models
from models.decoder import Decoder, next_token_loss
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLP, MLPConfig
from models.parts.norms import Norm
from workbench.instrument.errors import HookError
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.states import ModelState

EXACT = 1e-10
LENGTH = 11


@pytest.fixture(scope="module")
def gpt() -> Decoder:
    return lively("gpt2")


@pytest.fixture(scope="module")
def retnet() -> Decoder:
    return lively("retnet")


def lively(name: str, **changes: object) -> Decoder:
    """A tiny model in float64, without gradients, with weights large enough to make choices."""
    model = models.build(name, **changes).double().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.mul_(4)
    return model


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


# ----------------------------------------------------------------------------------------------------- tokens and texts


def test_texts_become_tokens(gpt: Decoder) -> None:
    assert gpt.to_tokens("hé").tolist() == [[104, 0xC3, 0xA9]]
    assert gpt.to_tokens(["abc", "xyz"]).tolist() == [[97, 98, 99], [120, 121, 122]]
    assert torch.equal(gpt("abc"), gpt(torch.tensor([97, 98, 99])))
    assert gpt.to_string(torch.tensor([104, 0xC3, 0xA9])) == "hé"
    assert gpt.to_string(torch.tensor([[97], [98]])) == ["a", "b"]
    assert gpt.to_single_token("a") == 97


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_integer_type_mean_the_same(gpt: Decoder, tokens: Tensor, dtype: torch.dtype) -> None:
    """Bytes read from a file are uint8, which torch would take for a mask: they are ids here."""
    ids = (tokens % 100).to(dtype)
    assert torch.equal(gpt(ids), gpt(tokens % 100))
    assert torch.equal(gpt(ids, return_type="loss"), gpt(tokens % 100, return_type="loss"))
    assert torch.equal(gpt.generate(ids, 2), gpt.generate(tokens % 100, 2))


def test_what_is_no_input_is_refused(gpt: Decoder, tokens: Tensor) -> None:
    cases: list[tuple[object, str]] = [
        (torch.zeros(1, 4), r"Expected token ids \[batch, pos\], got shape \(1, 4\) of torch.float32"),
        (torch.zeros(1, 4, dtype=torch.bool), r"of torch.bool"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"got shape \(1, 2, 3\)"),
        (torch.zeros(1, 0, dtype=torch.long), "holds no tokens"),
        ("", "holds no tokens"),
        ([], "got list"),
        ([1, 2, 3], "a text or a list of texts; got list"),
        (["ab", "c"], r"different numbers of tokens. Use tokens, mask = model.pad\(texts\)"),
        (torch.tensor([[3, 256]]), r"Token ids must lie in 0..255; got 3..256"),
        (torch.tensor([[-1, 2]]), r"got -1..2"),
    ]
    for value, message in cases:
        with pytest.raises(ValueError, match=message):
            gpt(value)
    with pytest.raises(ValueError, match=r"'ab' is 2 tokens, expected exactly one"):
        gpt.to_single_token("ab")
    with pytest.raises(ValueError, match=r"no token to prepend"):
        gpt.to_tokens("ab", prepend_bos=True)
    assert gpt.to_tokens("ab", prepend_bos=False).shape == (1, 2)


def test_a_model_without_tokenizer_says_so() -> None:
    model = LanguageModel(LanguageModelConfig(1, 8, 50, 16))
    for action in (
        lambda: model("text"),
        lambda: model.to_string(torch.zeros(2, dtype=torch.long)),
        lambda: model.pad(["a"]),
    ):
        with pytest.raises(ValueError, match=r"no tokenizer: pass token ids \[batch, pos\]"):
            action()


def test_padding(gpt: Decoder) -> None:
    for side, expected in (("left", [[0, 0, 99], [97, 98, 99]]), ("right", [[99, 0, 0], [97, 98, 99]])):
        ids, mask = gpt.pad(["c", "abc"], side=side)
        assert ids.tolist() == expected
        assert mask.tolist() == [[id_ != 0 for id_ in row] for row in expected]
    logits = gpt(ids, mask=mask)
    assert largest(logits[0, 0] - gpt("c")[0, 0]) < EXACT
    with pytest.raises(ValueError, match=r"Unknown side 'centre'. Expected 'left' or 'right'"):
        gpt.pad(["a"], side="centre")
    with pytest.raises(ValueError, match=r"pad expects a list of texts, got str"):
        gpt.pad("abc")
    with pytest.raises(ValueError, match=r"pad got no texts"):
        gpt.pad([])
    with pytest.raises(ValueError, match=r"text 1 is empty"):
        gpt.pad(["a", ""])


# -------------------------------------------------------------------------------------------------------- forward passes


def test_return_types(gpt: Decoder, tokens: Tensor) -> None:
    logits = gpt(tokens)
    assert logits.shape == (2, LENGTH, 256)
    loss = gpt(tokens, return_type="loss")
    assert loss.shape == ()
    both = gpt(tokens, return_type="both")
    assert isinstance(both, tuple) and torch.equal(both[0], logits) and torch.equal(both[1], loss)
    assert gpt(tokens, return_type=None) is None
    assert gpt(tokens, return_type="loss", loss_per_token=True).shape == (2, LENGTH - 1)
    output, state = gpt(tokens, return_type="loss", return_state=True)
    assert torch.equal(output, loss) and isinstance(state, ModelState) and state.position == LENGTH


def test_loss_is_surprisal_by_hand(gpt: Decoder, tokens: Tensor) -> None:
    """−log p of each next token in nats, averaged over the targets that are real and follow a real token."""
    logits = gpt(tokens)
    by_hand = torch.zeros(2, LENGTH - 1, dtype=torch.float64)
    for row in range(2):
        for t in range(LENGTH - 1):
            p = logits[row, t].exp() / logits[row, t].exp().sum()
            by_hand[row, t] = -p[tokens[row, t + 1]].log()
    assert largest(gpt(tokens, return_type="loss", loss_per_token=True) - by_hand) < EXACT
    assert largest(gpt(tokens, return_type="loss") - by_hand.mean()) < EXACT
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :3], mask[1, 7:] = False, False
    per_token = next_token_loss(logits, tokens, mask, per_token=True)
    expected, count = by_hand.clone(), 0
    for row in range(2):
        for t in range(LENGTH - 1):
            real = bool(mask[row, t] and mask[row, t + 1])
            count += real
            if not real:
                expected[row, t] = 0
    assert count == 7 + 6
    assert largest(per_token - expected) < EXACT
    assert largest(next_token_loss(logits, tokens, mask) - expected.sum() / count) < EXACT


def test_a_loss_without_targets_is_no_number(gpt: Decoder, tokens: Tensor) -> None:
    """One token predicts nothing: an error; a batch whose every target is padding: nan, never 0."""
    with pytest.raises(ValueError, match=r"A loss needs at least two tokens, got 1"):
        gpt(tokens[:, :1], return_type="loss")
    mask = torch.zeros(2, LENGTH, dtype=torch.bool)
    mask[:, 3] = True
    assert gpt(tokens, mask=mask, return_type="loss").isnan()


def test_mistakes_in_a_call_are_errors_in_words(gpt: Decoder, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"mask has shape \(2, 3\); expected \[batch, pos\] = \(2, 11\)"):
        gpt(tokens, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"Unknown return_type 'logit'. Did you mean 'logits'"):
        gpt(tokens, return_type="logit")
    with pytest.raises(ValueError, match=r"Unknown return_type 'perplexity'"):
        gpt(tokens, return_type="perplexity", stop_at_layer=1)
    stream = gpt(tokens, stop_at_layer=1)
    with pytest.raises(ValueError, match=r"sees no tokens, so it cannot give a loss"):
        gpt(stream, start_at_layer=1, return_type="loss")
    with pytest.raises(ValueError, match=r"residual stream \[batch, pos, d_model=24\]; got \(2, 11, 23\)"):
        gpt(stream[..., :23], start_at_layer=1)
    with pytest.raises(ValueError, match=r"residual stream \[batch, pos, d_model=24\]; got \(2, 11\)"):
        gpt(tokens, start_at_layer=1)
    for options in ({"start_at_layer": 4}, {"stop_at_layer": 5}, {"start_at_layer": 2, "stop_at_layer": 1}):
        with pytest.raises(ValueError, match=r"is no range within layers 0..3"):
            gpt(stream, **options) if "start_at_layer" in options else gpt(tokens, **options)
    with pytest.raises(ValueError, match=r"return_state needs all layers"):
        gpt(tokens, stop_at_layer=1, return_state=True)
    with pytest.raises(ValueError, match=r"ambiguous on a model that repeats its blocks"):
        models.build("looped")(tokens, stop_at_layer=1)


def test_layers_counted_from_the_end(gpt: Decoder, tokens: Tensor) -> None:
    assert torch.equal(gpt(tokens, stop_at_layer=-1), gpt(tokens, stop_at_layer=2))
    assert torch.equal(gpt(gpt(tokens, stop_at_layer=-1), start_at_layer=-1), gpt(tokens))
    _, cache = gpt.run_with_cache(tokens, names="hook_embed")
    assert largest(gpt(tokens, stop_at_layer=0) - cache["embed"] - gpt.W_pos[:LENGTH]) < EXACT  # type: ignore[index]


def test_a_state_of_something_else_is_refused(gpt: Decoder, retnet: Decoder, tokens: Tensor) -> None:
    """Another batch, another depth, another architecture: errors that name the state, never a wrong number."""
    _, state = retnet(tokens, return_state=True)
    with pytest.raises(ValueError, match=r"state holds a batch of 2; the tokens are a batch of 1"):
        retnet(tokens[:1], state=state)
    shallow = models.build("retnet", n_layers=2).double()
    with pytest.raises(ValueError, match=r"state has 3 layers; this model has 2"):
        shallow(tokens, state=state)
    with pytest.raises(ValueError, match=r"state of layer 0 holds 'state'.*expected 'key', 'value'"):
        gpt(tokens, state=state)
    _, looped = models.build("looped")(tokens, return_state=True)
    assert len(looped.layers) == 6
    with pytest.raises(ValueError, match=r"state has 3 layers; this model has 6"):
        models.build("looped").double()(tokens, state=gpt(tokens, return_state=True)[1])


def test_modes(gpt: Decoder) -> None:
    model = models.build("mamba2")
    for mode in ("parallel", "recurrent", "chunked"):
        model.set_mode(mode)
        assert all(block.mixer.core.mode == mode for block in model.blocks)
    with pytest.raises(ValueError, match=r"Unknown mode 'recurent'. Did you mean 'recurrent'"):
        model.set_mode("recurent")
    assert all(block.mixer.core.mode == "chunked" for block in model.blocks)
    with pytest.raises(ValueError, match=r"no linear mixer"):
        gpt.set_mode("parallel")


# ------------------------------------------------------------------------------------------------------------ generation


def test_greedy_generation_takes_the_most_likely_token(gpt: Decoder, tokens: Tensor) -> None:
    got = gpt.generate(tokens, 5)
    expected = tokens
    for _ in range(5):
        expected = torch.cat([expected, gpt(expected)[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(got, expected)
    assert torch.equal(gpt.generate(tokens, 5, temperature=1.0, top_k=1, seed=0), expected)
    assert torch.equal(gpt.generate(tokens, 0), tokens)
    assert gpt.generate("ab", 3).shape == (1, 5)
    assert gpt.generate(["ab", "cd"]).shape == (2, 34)


def test_seeds_of_generation(gpt: Decoder, tokens: Tensor) -> None:
    """A seed fixes the continuation and leaves the global generator alone; without one the global generator decides."""
    torch.manual_seed(1)
    expected_next = torch.rand(1)
    torch.manual_seed(1)
    first = gpt.generate(tokens, 20, temperature=2.0, seed=7)
    assert torch.equal(torch.rand(1), expected_next)
    assert torch.equal(first, gpt.generate(tokens, 20, temperature=2.0, seed=7))
    assert not torch.equal(first, gpt.generate(tokens, 20, temperature=2.0, seed=8))
    torch.manual_seed(2)
    free = gpt.generate(tokens, 20, temperature=2.0)
    torch.manual_seed(2)
    assert torch.equal(free, gpt.generate(tokens, 20, temperature=2.0))


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, None), (0.5, None), (3.0, 4)])
def test_samples_follow_the_distribution(gpt: Decoder, temperature: float, top_k: int | None) -> None:
    """Frequencies of the first sampled token against softmax(logits / temperature) among the top k: a χ² test at 0.1 %."""
    prompt = torch.full((6000, 1), 65)
    logits = gpt(prompt[:1])[0, -1] / temperature
    if top_k is not None:
        logits = torch.where(logits >= logits.sort(descending=True).values[top_k - 1], logits, float("-inf"))
    expected = logits.softmax(-1) * 6000
    drawn = gpt.generate(prompt, 1, temperature=temperature, top_k=top_k, seed=0)[:, 1]
    counts = torch.bincount(drawn, minlength=256).double()
    assert float(counts[expected == 0].sum()) == 0
    common = expected >= 5
    observed = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    observed, wanted = observed[wanted > 0], wanted[wanted > 0]
    chi = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    # Wilson-Hilferty: the cube root of χ²/n is close to normal
    assert ((chi / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5 < 3.1
    assert freedom >= 3


def test_generation_refuses_what_cannot_be(gpt: Decoder, tokens: Tensor) -> None:
    with pytest.raises(ValueError, match=r"temperature is -1; expected 0 \(most likely token\) or more"):
        gpt.generate(tokens, 1, temperature=-1)
    with pytest.raises(ValueError, match=r"top_k is 0; expected at least 1"):
        gpt.generate(tokens, 1, temperature=1.0, top_k=0)
    with pytest.raises(ValueError, match=r"max_new_tokens is -2; expected 0 or more"):
        gpt.generate(tokens, -2)
    assert gpt.generate(tokens, 2, temperature=1.0, top_k=1000, seed=0).shape == (2, LENGTH + 2)


def test_interventions_act_while_generating(gpt: Decoder, tokens: Tensor) -> None:
    """A hook on the logits decides what comes next."""

    def only_seven(logits: Tensor, hook: HookPoint) -> Tensor:
        logits[..., 7] = 1e6
        return logits

    got = gpt.generate(tokens, 4, hooks=[("unembed.hook_out", only_seven)])
    assert bool((got[:, LENGTH:] == 7).all())
    assert not bool((gpt.generate(tokens, 4)[:, LENGTH:] == 7).all())


# ---------------------------------------------------------------------------------------------------------------- states


@pytest.mark.parametrize("name", ["gpt2", "llama", "retnet", "mamba2", "bdh", "looped"])
def test_a_saved_state_goes_on(name: str, tokens: Tensor, tmp_path) -> None:  # type: ignore[no-untyped-def]
    """Stopping, writing the state to disk, reading it and going on: the logits of reading at once, also with padding."""
    model = lively(name)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, :2] = False
    for padding in (None, mask):
        _, state = model(tokens, mask=padding, return_state=True)
        more = tokens[:, :3].flip(0)
        expected = model(more, state=state)
        path = state.save(tmp_path / f"{padding is None}.safetensors")
        loaded = ModelState.load(path)
        assert loaded.position == LENGTH and loaded.nbytes() == state.nbytes()
        assert torch.equal(model(more, state=loaded), expected)
        assert list(tmp_path.glob("*.tmp")) == []
        # the run that continued left the state alone, so it can be continued twice
        assert torch.equal(model(more, state=state), expected)


def test_replacing_parts_of_a_state(retnet: Decoder, tokens: Tensor) -> None:
    _, state = retnet(tokens, return_state=True)
    slot = state.slot(1, "state")
    edited = state.replaced(1, state=slot * 0)
    assert largest(edited.slot(1, "state")) == 0 and largest(state.slot(1, "state")) > 0
    assert largest(retnet(tokens[:, :2], state=edited) - retnet(tokens[:, :2], state=state)) > 1e-6
    assert torch.equal(edited.slot(0, "state"), state.slot(0, "state"))
    with pytest.raises(HookError, match=r"no slot 'stat'. Did you mean 'state'"):
        state.replaced(1, stat=slot)
    with pytest.raises(
        HookError, match=r"Slot 'state' of layer 1 is \(2, 3, 8, 16\) torch.float64; got \(1, 3, 8, 16\)"
    ):
        state.replaced(1, state=slot[:1])
    with pytest.raises(HookError, match=r"got \(2, 3, 8, 16\) torch.float32"):
        state.replaced(1, state=slot.float())
    with pytest.raises(HookError, match=r"layers 0..2, not 3"):
        state.slot(3, "state")
    twin = state.clone()
    twin.slot(0, "state").zero_()
    assert largest(state.slot(0, "state")) > 0


# ------------------------------------------------------------------------------------------------------ the model's facts


def test_facts_about_a_model(gpt: Decoder) -> None:
    assert gpt.n_parameters() == sum(p.numel() for p in gpt.parameters())
    tied, untied = models.build("alibi"), models.build("alibi", tie_embeddings=False)
    assert untied.n_parameters() - tied.n_parameters() == 256 * 24  # shared weights count once
    about = gpt.about()
    assert about["provenance"] == "random" and about["family"] == "attention" and about["config"]["n_layers"] == 3
    assert "gpt2-random" in repr(gpt) and "3 layers" in repr(gpt)
    twin = copy.deepcopy(gpt)
    assert twin.weights_sha256() == gpt.weights_sha256() == about["weights_sha256"]
    with torch.no_grad():
        twin.blocks[2].mlp.W_in[0, 0] += 1e-12
    assert twin.weights_sha256() != gpt.weights_sha256()
    assert gpt.float().weights_sha256() != about["weights_sha256"]
    gpt.double()


def test_the_base_says_what_is_missing() -> None:
    class Unfinished(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.vocab_size, self.d_model, self.blocks = 5, 3, nn.ModuleList()
            self.name_hook_points()

    with pytest.raises(TypeError, match=r"Unfinished does not say how it embeds tokens"):
        Unfinished()(torch.zeros(1, 2, dtype=torch.long))


# ----------------------------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize("affine", [True, False])
def test_norms_by_hand(kind: str, affine: bool) -> None:
    """(x − mean)/√(var + ε)·w + b, or x/√(mean x² + ε)·w; the same with the scale watched, replaced by itself, or in 16 bits."""
    torch.manual_seed(0)
    norm = Norm(kind, 7, eps=0.3, affine=affine).double().requires_grad_(False)
    if affine:
        norm.w.copy_(torch.randn(7))  # type: ignore[union-attr]
        if norm.b is not None:
            norm.b.copy_(torch.randn(7))
    x = torch.randn(2, 3, 7, dtype=torch.float64) * 2
    expected = torch.empty_like(x)
    for row in range(2):
        for t in range(3):
            values = x[row, t]
            if kind == "layer":
                values = values - values.sum() / 7
            values = values / ((values * values).sum() / 7 + 0.3) ** 0.5
            values = values if norm.w is None else values * norm.w
            expected[row, t] = values if norm.b is None else values + norm.b
    assert largest(norm(x) - expected) < EXACT


def test_watched_norms_do_not_overflow_in_half_precision() -> None:
    """A stream above 256 squares beyond float16: watched or not, the normalised stream is the same and finite."""
    model = models.build("llama").half()
    tokens = torch.randint(0, 256, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.embed.W_E *= 2e5
    plain = model(tokens)
    _, cache = model.run_with_cache(tokens, names=["blocks.0.hook_resid_pre", "blocks.0.ln1.hook_scale"])
    assert largest(cache["resid_pre", 0]) > 256 and cache["scale", 0, "ln1"].isfinite().all()
    watched = model.run_with_hooks(tokens, hooks=[("*.hook_scale", lambda scale, hook: scale * 1)])
    assert plain.isfinite().all()
    assert largest((watched - plain).float()) <= 4e-3 * largest(plain.float())


def test_channel_mixers_by_hand() -> None:
    x = torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gated = MLP(MLPConfig(5, "silu", gated=True, bias=False), 8).double()
    g = x @ gated.gate.weight.T  # type: ignore[union-attr]
    hidden = g / (1 + (-g).exp()) * (x @ gated.W_in)
    assert largest(gated(x) - hidden @ gated.W_out) < EXACT
    assert largest(gated.b_in) == 0 and gated.b_out.shape == (8,)
    plain = MLP(MLPConfig(5, "relu"), 8).double()
    assert largest(plain(x) - ((x @ plain.W_in + plain.b_in).clamp(min=0) @ plain.W_out + plain.b_out)) < EXACT
    gelu = MLP(MLPConfig(5, "gelu"), 8).double()
    before = x @ gelu.W_in + gelu.b_in
    assert largest(gelu(x) - (before * (1 + torch.erf(before / 2**0.5)) / 2 @ gelu.W_out + gelu.b_out)) < EXACT


def test_unknown_parts_are_named() -> None:
    with pytest.raises(ValueError, match=r"Unknown activation 'gelo'. Did you mean 'gelu'"):
        MLP(MLPConfig(5, "gelo"), 8)
    with pytest.raises(ValueError, match=r"Unknown norm 'batch'. Expected one of layer, rms"):
        Norm("batch", 8)
    with pytest.raises(TypeError, match=r"MLPConfig is no mixer configuration. Known: AttentionConfig"):
        LanguageModel(LanguageModelConfig(1, 8, mixer=MLPConfig(4)))
