"""Transformers models as subjects: against their own eager attention and against the same checkpoint on our modules; the rest refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models.decoder import Decoder
from models.interop.subject import NotASubject, TransformersSubject, hooked
from probes.ablation import ablation_effects
from probes.census import head_census
from probes.heads import head_scores
from probes.lenses import logit_lens
from probes.sinks import find_sinks
from tests.models.pretrained.reference import CASES, batch, largest, write
from tests.models.pretrained.test_encoders import CASES as ENCODERS
from tests.models.pretrained.test_encoders import padded
from workbench import Ablate, BlockEdge, EditPattern, HookError, Patch

WRAPPED = ["gpt2", "llama", "mistral", "gpt_neox", "phi", "opt", "gemma2", "qwen3"]
UPCAST = 2e-5  # most of their classes round norms and softmax to float32 even in a float64 model


@pytest.fixture(scope="module", params=WRAPPED)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, TransformersSubject, Decoder]]:
    folder = tmp_path_factory.mktemp(request.param)
    theirs = write(CASES[request.param], folder)
    with torch.no_grad():
        yield request.param, hooked(theirs), models.load(folder, dtype=torch.float64)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> tuple[TransformersSubject, Decoder]:
    folder = tmp_path_factory.mktemp("gpt2")
    return hooked(write(CASES["gpt2"], folder)), models.load(folder, dtype=torch.float64)


def differences(subject: Decoder, ours: Decoder, side: str | None, hooks: Any = ()) -> dict[str, float]:
    tokens, mask, _ = batch(side)
    padding = {} if side is None else {"mask": mask}
    (logits, cache), (expected, wanted) = (
        model.run_with_cache(tokens, hooks=hooks, **padding) for model in (subject, ours)
    )
    found = {"logits": largest((logits - expected)[mask])}
    for name in cache:
        if name in wanted:
            a, b = (x.transpose(1, 2) if "query" in cache.point(name).axes else x for x in (cache[name], wanted[name]))
            if cache.point(name).role.endswith("query"):  # OPT scales its queries itself, and its scores by 1
                layer = cache.point(name).layer_index
                a, b = a * subject.mixers[layer].scale, b * ours.mixers[layer].scale
            shown = a.isfinite() & b.isfinite()
            assert torch.equal(a.isfinite()[mask], b.isfinite()[mask]), name
            found[name] = largest(torch.where(shown, a - b, torch.zeros_like(a))[mask])
    return found


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_every_point_is_that_of_our_own_modules(
    both: tuple[str, TransformersSubject, Decoder], side: str | None
) -> None:
    """Logits, streams, queries, keys, values, scores, patterns and z, by the same names; exact where theirs does not round."""
    name, subject, ours = both
    found = differences(subject, ours, side)
    kinds = {point.split(".")[-1] for point in found}
    assert {"hook_v", "hook_attn_scores", "hook_pattern", "hook_z", "hook_resid_pre", "hook_resid_post"} <= kinds
    assert kinds & {"hook_rot_q", "hook_q"} and len(found) >= 3 * 7 + 1
    assert max(found.values()) < (1e-10 if name in ("gpt2", "opt") else UPCAST), found


@pytest.mark.parametrize(
    "edit",
    [
        ("blocks.1.attn.hook_attn_scores", lambda x, hook: x * 0.5),
        EditPattern(layer=0, heads=1, value=torch.full((11, 11), 1 / 11, dtype=torch.float64)),
        BlockEdge(layer=1, heads=[0], queries=[7], keys=[6]),
        Ablate("blocks.2.attn.hook_z", heads=[1]),
        ("blocks.0.attn.hook_v", lambda x, hook: x + 0.3),
        ("blocks.1.hook_resid_pre", lambda x, hook: x.flip(1)),
        ("blocks.1.hook_resid_post", lambda x, hook: 0.7 * x),
    ],
    ids=["scores", "pattern", "edge", "head", "values", "stream before", "stream after"],
)
def test_edits_do_what_they_do_on_our_own_modules(both: tuple[str, TransformersSubject, Decoder], edit: Any) -> None:
    name, subject, ours = both
    tokens, _, _ = batch(None)
    edited, expected = (model.run_with_hooks(tokens, hooks=[edit]) for model in (subject, ours))
    plain = subject(tokens)
    assert largest(edited - expected) < (1e-10 if name in ("gpt2", "opt") else UPCAST)
    assert largest(edited - plain) > 1e-3, "the edit has an effect"
    assert torch.equal(subject(tokens), plain), "and leaves with its call"


def test_their_own_attentions_are_the_patterns(gpt2: tuple[TransformersSubject, Decoder]) -> None:
    subject, _ = gpt2
    tokens, _, _ = batch(None)
    with torch.no_grad():
        returned = subject.theirs(tokens, output_attentions=True).attentions  # outside of a run: plainly eager
        patterns = subject.patterns(tokens)
    for layer, pattern in patterns.items():
        assert largest(pattern.values - returned[layer]) < 1e-12 and pattern.meta.causal == "inclusive"


def test_probes_give_the_same_numbers(gpt2: tuple[TransformersSubject, Decoder]) -> None:
    """Census, sinks, heads and ablation of heads, on the wrapped and on the converted model."""
    subject, ours = gpt2
    tokens = torch.randint(0, subject.vocab_size, (3, 16), generator=torch.Generator().manual_seed(4))
    tokens = tokens % 9  # so that texts repeat, at varied distances
    for probe in ("previous_token", "induction"):
        assert head_scores(subject, tokens, probe)[probe] == pytest.approx(
            head_scores(ours, tokens, probe)[probe], nan_ok=True
        )
    mine, theirs = (
        head_census(model, tokens, probes=("previous_token", "duplicate_token")) for model in (subject, ours)
    )
    for name, values in theirs.scores.items():
        assert mine.scores[name] == pytest.approx(values, nan_ok=True), name
    sinks, expected_sinks = (find_sinks(model, tokens, whole_patterns=True).to_json() for model in (subject, ours))
    assert flat(sinks) == pytest.approx(flat(expected_sinks), nan_ok=True) and len(flat(sinks)) > 20
    mine_without, theirs_without = (
        ablation_effects(model, tokens, kind="head", method="zero") for model in (subject, ours)
    )
    assert flat(mine_without.to_json()) == pytest.approx(flat(theirs_without.to_json()), abs=1e-9)
    needle = [model.generate(tokens, 4) for model in (subject, ours)]
    assert torch.equal(*needle)


def flat(value: Any) -> list[float]:
    """All numbers of a record, in order."""
    if isinstance(value, dict):
        return [number for item in value.values() for number in flat(item)]
    if isinstance(value, list | tuple):
        return [number for item in value for number in flat(item)]
    return [float(value)] if isinstance(value, int | float) else []


def test_padding_losses_and_generation(gpt2: tuple[TransformersSubject, Decoder]) -> None:
    subject, ours = gpt2
    tokens, mask, _ = batch("left")
    with torch.no_grad():
        assert float(subject(tokens, mask=mask, return_type="loss")) == pytest.approx(
            float(ours(tokens, mask=mask, return_type="loss"))
        )
    assert torch.equal(subject.generate(tokens, 6, mask=mask), ours.generate(tokens, 6, mask=mask))
    gradient = subject.run_with_cache(tokens, role="pattern", gradients_of=lambda logits: logits[:, -1].sum())[
        1
    ].gradients
    assert min(largest(gradient[f"blocks.{layer}.attn.hook_pattern"]) for layer in range(3)) > 1e-6


def test_a_patch_from_one_to_the_other(gpt2: tuple[TransformersSubject, Decoder]) -> None:
    """The converted model's activations, patched into the wrapped one."""
    subject, ours = gpt2
    tokens, other = (torch.randint(0, 50, (1, 9), generator=torch.Generator().manual_seed(seed)) for seed in (5, 6))
    with torch.no_grad():
        clean, cache = ours.run_with_cache(tokens)
        patched = subject.run_with_hooks(other, hooks=[Patch("blocks.2.hook_resid_post", value=cache["resid_post", 2])])
    assert largest(patched - clean) < 1e-10


@pytest.mark.parametrize("stop", [0, 1, 2, 3, -1])
def test_a_run_stops_between_layers(both: tuple[str, TransformersSubject, Decoder], stop: int) -> None:
    """With the stream that enters the layer; what comes later is neither run nor counted."""
    name, subject, ours = both
    tokens, mask, _ = batch("left")
    seen: list[int] = []
    hooks = [(f"blocks.{layer}.attn.hook_z", lambda z, hook: seen.append(hook.layer_index)) for layer in range(3)]
    with torch.no_grad(), subject.hooks(hooks, strict=False):
        stream = subject(tokens, mask=mask, stop_at_layer=stop)
        expected = ours(tokens, mask=mask, stop_at_layer=stop)
    assert largest((stream - expected)[mask]) < (1e-10 if name in ("gpt2", "opt") else UPCAST)
    assert seen == list(range(stop % 3 if stop < 0 else stop))


def tiny(name: str) -> Any:
    import transformers

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 60}
    wide = {**sizes, "intermediate_size": 40, "max_position_embeddings": 64}
    if name == "BertModel":
        return transformers.BertModel(transformers.BertConfig(**wide))
    if name == "MptForCausalLM":
        return transformers.MptForCausalLM(
            transformers.MptConfig(d_model=24, n_heads=4, n_layers=2, vocab_size=60, max_seq_len=64)
        )
    if name == "LongformerModel":
        return transformers.LongformerModel(transformers.LongformerConfig(**wide, attention_window=[4, 4]))
    if name == "BigBirdModel":
        return transformers.BigBirdModel(transformers.BigBirdConfig(**wide, attention_type="original_full"))
    if name == "XLNetModel":
        return transformers.XLNetModel(
            transformers.XLNetConfig(d_model=24, n_layer=2, n_head=4, d_inner=40, vocab_size=60)
        )
    raise KeyError(name)


@pytest.mark.parametrize("name", ["bert-masked", "roberta-masked", "distilbert", "bert-classes"])
def test_encoders_are_subjects(name: str, tmp_path: Path) -> None:
    """With and without a head, against our own modules; they say what they do not do."""
    theirs = write(ENCODERS[name], tmp_path)
    subject, ours = hooked(theirs), models.load(tmp_path, dtype=torch.float64)
    tokens, mask = padded(theirs.config.pad_token_id)
    with torch.no_grad():
        assert (
            largest((subject(tokens, mask=mask, stop_at_layer=3) - ours(tokens, mask=mask, stop_at_layer=3))[mask])
            < 1e-6
        )
        if name != "bert-classes":  # whose head we leave out
            assert largest((subject(tokens, mask=mask) - ours(tokens, mask=mask))[mask]) < 1e-6
    assert subject.predicts_masked_tokens == ours.predicts_masked_tokens and not subject.predicts_next_token
    assert subject.n_ctx == ours.n_ctx
    with pytest.raises(ValueError, match="predicts no next token"):
        subject(tokens, return_type="loss")
    with pytest.raises(ValueError, match="cannot generate"):
        subject.generate(tokens)


def test_an_encoder_reads_both_ways() -> None:
    theirs = tiny("BertModel")
    subject = hooked(theirs)
    tokens = torch.arange(9)[None]
    with torch.no_grad():
        pattern = subject.patterns(tokens)[1]
        theirs.set_attn_implementation("eager")
        expected = theirs(tokens, output_attentions=True)
        assert largest(subject(tokens) - expected.last_hidden_state) < 1e-6, (
            "another implementation chosen meanwhile is set back"
        )
    assert pattern.meta.causal == "none" and largest(pattern.values - expected.attentions[1]) < 1e-6


@pytest.mark.parametrize(
    "name",
    ["falcon", "bloom", "gpt_neo", "gptj", "mamba", "MptForCausalLM", "LongformerModel", "BigBirdModel", "XLNetModel"],
)
def test_classes_that_ignore_the_interface_are_refused(name: str, tmp_path: Path) -> None:
    """Nothing attached there would do anything; the way out is named, and the model is left as it was."""
    theirs = write(CASES[name], tmp_path) if name in CASES else tiny(name)
    before = theirs.config._attn_implementation
    with pytest.raises(NotASubject, match=r"never asks transformers' attention interface.*models\.load"):
        hooked(theirs)
    assert theirs.config._attn_implementation == before


def test_refusals_say_why(gpt2: tuple[TransformersSubject, Decoder], tmp_path: Path) -> None:
    subject, _ = gpt2
    with pytest.raises(NotASubject, match=r"Layers \[0, 2\] .*have no attention"):
        hooked(write(CASES["qwen3_next"], tmp_path))
    with pytest.raises(NotASubject, match="is no transformers model"):
        hooked(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Reading the stream as logits.*models\.load"):
        logit_lens(subject, torch.arange(5)[None])
    with pytest.raises(ValueError, match="start_at_layer needs the inside"):
        subject(torch.arange(5)[None], start_at_layer=1)
    with pytest.raises(ValueError, match=r"no range within layers 0\.\.3"):
        subject(torch.arange(5)[None], stop_at_layer=4)
    with pytest.raises(ValueError, match=r"Token ids must lie in 0\.\."):
        subject(torch.full((1, 4), 10**6))
    with pytest.raises(HookError, match=r"hook_zz.*hook_z"):
        subject.run_with_hooks(torch.arange(5)[None], hooks=[Ablate("blocks.0.attn.hook_zz")])
    with pytest.raises(ValueError, match="use_state=False"):
        subject.generate(torch.arange(5)[None], 2, use_state=True)


def test_a_layer_that_stops_asking_is_an_error(
    gpt2: tuple[TransformersSubject, Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted in every run, not only when the model is wrapped."""
    subject, _ = gpt2
    attention = subject.theirs.transformer.h[1].attn
    monkeypatch.setattr(attention, "forward", lambda hidden_states, *given, **named: (hidden_states, None))
    with pytest.raises(NotASubject, match=r"Layer 1 .*asked the attention interface 0 times"):
        subject(torch.arange(5)[None])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_bridge_of_transformer_lens_is_a_subject(name: str, tmp_path: Path) -> None:
    """The same logits and patterns as the bridge gives, by the same parameters; the bridge itself is left alone."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    theirs = write(CASES[name], tmp_path)
    bridge = build_bridge_from_module(theirs, type(theirs).__name__, hf_config=theirs.config, dtype=torch.float64)
    tokens, _, _ = batch(None)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(tokens)
        subject = hooked(bridge)
        assert largest(subject(tokens) - logits) < UPCAST
        for layer, pattern in subject.patterns(tokens).items():
            assert largest(pattern.values - cache[f"blocks.{layer}.attn.hook_pattern"]) < UPCAST
        again = bridge(tokens)
        assert largest(again - logits) == 0
        head = subject.run_with_hooks(tokens, hooks=[Ablate("blocks.1.attn.hook_z", heads=[2])])
        assert largest(head - logits) > 1e-3
        subject.W_E[5] += 1
        assert largest(bridge(tokens % 6) - subject(tokens % 6)) < UPCAST, "one set of parameters"
