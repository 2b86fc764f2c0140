"""Trace runs against the model that they were made with: every stored array, on every architecture, with and without interventions."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from models.decoder import Decoder
from models.language_model import LanguageModel, LanguageModelConfig
from models.registry import ARCHITECTURES
from workbench.instrument.hook_points import HookPoint
from workbench.instrument.hooked_model import main_point
from workbench.instrument.interventions import Ablate, BlockEdge, EditPattern, EditState, Intervention, Scale
from workbench.instrument.selection import Select
from workbench.lab import trace as trace_module
from workbench.lab.factors import LayerFactors
from workbench.lab.pooling import max_pool_signed
from workbench.lab.run_folder import Run
from workbench.lab.runs import RunStore
from workbench.lab.trace import TraceCancelled, trace_run

models.architecture("bdh")  # registers all
NAMES = list(ARCHITECTURES)
LINEAR = [name for name in NAMES if "state" in ARCHITECTURES[name].shows]
TEXT = "A dragon hatches; é dragons watch."
LENGTH = len(TEXT.encode())
CLOSE = 1e-5  # relative to the largest value: float32 rounding of factors, and no more


def lively(name: str) -> Decoder:
    """The tiny preset with larger weights, so that patterns are neither flat nor states negligible.

    In float64, because some memories amplify rounding; what a run stores is float32 all the same.
    """
    model = models.build(name).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(4)
            else:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


@pytest.fixture(scope="module", params=NAMES)
def traced(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, Run]:
    model = lively(request.param)
    return model, trace_run(model, TEXT, RunStore(tmp_path_factory.mktemp("runs")))


def close(got: Any, expected: Any) -> bool:
    got, expected = np.asarray(got, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    assert got.shape == expected.shape, (got.shape, expected.shape)
    return bool(np.abs(got - expected).max() <= CLOSE * max(1e-3, np.abs(expected).max()))


def stored_slot(model: Decoder, layer: int) -> HookPoint:
    """The state that `LayerFactors.state` reads, where a layer carries several."""
    point = main_point(model.hook_points.points.values(), "state", layer)
    assert point is not None
    return point


def array(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy()


def patterns_of(model: Decoder, text: Any = TEXT, **options: Any) -> dict[int, np.ndarray]:
    """{layer: [head, query, key]}; of the last pass where the model repeats its blocks."""
    found = {}
    for key, pattern in model.patterns(text, **options).items():
        found[key if isinstance(key, int) else key[0]] = array(pattern.values[0])
    return found


# ----------------------------------------------------------------------------------------------------- what is stored


def test_factors_give_the_models_patterns(traced: tuple[Decoder, Run]) -> None:
    model, run = traced
    for layer, expected in patterns_of(model).items():
        factors = LayerFactors.from_run(run, layer)
        for head in range(len(expected)):
            assert close(factors.pattern(head), expected[head]), (layer, head)


def test_factors_give_the_models_states(traced: tuple[Decoder, Run]) -> None:
    """Matrix or vector states, whatever the layer carries; keys of softmax layers."""
    model, run = traced
    positions = [0, 7, LENGTH - 1]
    for layer in range(model.n_layers):
        record, factors = run.layer(layer), LayerFactors.from_run(run, layer)
        if record["form"] == "softmax":
            point = model.mixers[layer].factor_points["key"].name
            _, cache = model.run_with_cache(TEXT, names=point)
            keys = array(list(cache.values())[-1][0])
            for group in range(keys.shape[1]):
                assert close(run.array(f"layer.{layer}.key")[group], keys[:, group])
        if not record["state"] or record["state"]["role"] != "state":
            continue
        slot = stored_slot(model, layer).name.rsplit(".hook_", 1)[-1]
        states = model.states(TEXT, positions, layers=layer, slot=slot)[layer][0]
        if states.dim() < 1 + len(record["state"]["shape"]):
            states = states[:, None]  # a state without heads is that of one
        assert list(states.shape[1:]) == record["state"]["shape"]
        for head in range(states.shape[1]):
            for number, position in enumerate(positions):
                expected = array(states[number, head])
                expected = expected.reshape(-1, expected.shape[-1]) if expected.ndim > 1 else expected[:, None]
                assert close(factors.state(head, position), expected), (layer, head, position)
            norms = run.array(f"state_norm.{layer}")[head]
            assert close(norms[positions], array(states[:, head].flatten(1).norm(dim=-1)))


def test_losses_and_predictions_are_the_models(traced: tuple[Decoder, Run]) -> None:
    model, run = traced
    logits, loss = model(TEXT, return_type="both", loss_per_token=True)
    assert np.isnan(run.array("loss")[0])
    assert close(run.array("loss")[1:], array(loss[0]))
    log_probs = logits[0].log_softmax(-1)
    best = log_probs.topk(10, dim=-1)
    assert close(run.array("next.log_probs"), array(best.values))
    chosen = torch.as_tensor(run.array("next.ids").astype(np.int64))
    assert close(array(log_probs.gather(1, chosen)), array(best.values))
    assert run.array("tokens").tolist() == list(TEXT.encode()) == run.manifest["tokens"]["ids"]


def test_residual_norms_are_the_models(traced: tuple[Decoder, Run]) -> None:
    model, run = traced
    names = [f"blocks.{layer}.hook_resid_pre" for layer in range(model.n_layers)]
    names.append(f"blocks.{model.n_layers - 1}.hook_resid_post")
    _, cache = model.run_with_cache(TEXT, names=names)
    steps = {name: model.hook_dict[name].steps for name in names}  # of a repeated block the last pass counts
    last = [name if steps[name] == 1 else f"{name}@{steps[name] - 1}" for name in names]
    expected = [array(cache[address][0].norm(dim=-1)) for address in last]
    assert close(run.array("resid_norm"), np.stack(expected))
    assert run.array("resid_norm").shape == (model.n_layers + 1, LENGTH)


def test_summaries_follow_from_the_patterns(traced: tuple[Decoder, Run]) -> None:
    """Overview, entropy and received attention are those of the model's own patterns."""
    model, run = traced
    patterns = {key if isinstance(key, int) else key[0]: p for key, p in model.patterns(TEXT).items()}
    for layer, pattern in patterns.items():
        values = array(pattern.values[0])
        received = array(pattern.received()[0])
        for head in range(len(values)):
            assert close(run.array(f"overview.{layer}")[head], max_pool_signed(values[head], 96, 96))
            stored = run.array(f"received.{layer}")[head]
            seen = ~np.isnan(stored)
            assert seen[:-1].all() and bool(seen[-1]) == (pattern.meta.causal != "strict")
            if run.layer(layer)["window"] is None:  # within a window fewer rows can see a source
                assert close(stored[seen], received[head][seen])
        assert run.has(f"entropy.{layer}") == pattern.meta.is_distribution
        if pattern.meta.is_distribution:
            assert close(run.array(f"entropy.{layer}"), array(pattern.entropy()[0]))


def test_records_describe_the_run(traced: tuple[Decoder, Run]) -> None:
    model, run = traced
    manifest = run.manifest
    assert manifest["kind"] == "trace" and manifest["text"] == TEXT and manifest["title"] == TEXT
    assert manifest["model"]["name"] == f"{model.architecture}-random"
    assert manifest["model"]["architecture"] == model.architecture
    assert manifest["model"]["provenance"] == "random"
    assert manifest["model"]["parameters"] == model.n_parameters()
    assert manifest["model"]["weights_sha256"] == model.weights_sha256()
    assert manifest["tokens"]["tokenizer"] == "bytes" and len(manifest["tokens"]["strings"]) == LENGTH
    assert manifest["interventions"] == [] and manifest["settings"]["layers"] == list(range(model.n_layers))
    assert {point["name"] for point in manifest["hook_points"]} == set(model.hook_dict)
    for layer in range(model.n_layers):
        record = run.layer(layer)
        described = model.mixers[layer].describe()
        assert record["form"] == described["form"] and record["pattern"]["exact"] is described["pattern"]["exact"]
        assert record["pattern"]["columns"] == "tokens"
        for signal in record["signals"]:
            assert run.array(signal["array"]).shape == (record["n_heads"], LENGTH)


def test_neurons_of_bdh_are_stored(store: RunStore) -> None:
    """x and y as cached, in float16; the share of active ones per head and token; the mean gate."""
    model = lively("bdh")
    run = trace_run(model, TEXT, store)
    names = [f"blocks.{layer}.{name}" for layer in range(3) for name in ("hook_x", "hook_y", "hook_gate")]
    _, cache = model.run_with_cache(TEXT, names=names)
    for layer in range(3):
        for letter in "xy":
            expected = cache[f"blocks.{layer}.hook_{letter}"][0]
            stored = run.array(f"layer.{layer}.{letter}")
            assert stored.dtype == np.float16
            # half a unit in the last place of float16, and the float32 rounding of another run
            assert np.abs(stored - array(expected)).max() <= 2**-11 * float(expected.detach().max()) * 1.01
            share = (expected != 0).double().mean(-1)
            assert close(run.array(f"layer.{layer}.{letter}_active"), array(share))
        assert close(run.array(f"layer.{layer}.gate_mean"), array(cache[f"blocks.{layer}.hook_gate"][0].mean(-1)))
        assert {signal["name"] for signal in run.layer(layer)["signals"]} == {"x_active", "y_active", "gate_mean"}
    assert 0 < run.array("layer.1.y_active")[:, 1:].mean() < run.array("layer.1.x_active").mean() < 1


@pytest.mark.parametrize("name", ["gpt", "mamba2", "bdh"])
def test_texts_longer_than_the_overview(store: RunStore, name: str) -> None:
    """Beyond 96 tokens the overview is pooled; factors still give single cells exactly."""
    model = lively(name)
    text = (TEXT * 8)[:250]
    run = trace_run(model, text, store)
    length = len(text.encode())
    expected = patterns_of(model, text)
    for layer in range(model.n_layers):
        assert run.array(f"overview.{layer}").shape[1:] == (96, 96)
        factors = LayerFactors.from_run(run, layer)
        for head in (0, len(expected[layer]) - 1):
            assert close(run.array(f"overview.{layer}")[head], max_pool_signed(expected[layer][head], 96, 96))
            assert close(factors.row(head, length - 1), expected[layer][head, -1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "retnet", "mamba2", "bdh"])
def test_models_of_other_precision_are_stored_in_float32(store: RunStore, name: str, dtype: torch.dtype) -> None:
    model = lively(name).to(dtype)
    run = trace_run(model, TEXT, store)
    tolerance = 1e-5 if dtype == torch.float64 else 0.03
    loss = array(model(TEXT).double().log_softmax(-1)[0, :-1].gather(1, model.to_tokens(TEXT)[0, 1:, None])[:, 0])
    assert np.abs(run.array("loss")[1:] + loss).max() < tolerance * np.abs(loss).max()
    for layer, expected in patterns_of(model).items():
        got = LayerFactors.from_run(run, layer).pattern(1)
        assert np.abs(got - expected[1]).max() < tolerance * np.abs(expected[1]).max()


def test_token_ids_and_single_tokens(store: RunStore) -> None:
    """Ids instead of text, one token alone, and a model without tokenizer."""
    model = lively("gpt2")
    ids = torch.tensor(list(b"abc"))
    assert trace_run(model, ids, store).manifest["text"] == "abc"
    assert trace_run(model, ids[None], store, title="Mine").manifest["title"] == "Mine"
    single = trace_run(model, "a", store)
    assert np.isnan(single.array("loss")).all() and LayerFactors.from_run(single, 0).value(0, 0, 0) == pytest.approx(1)
    own = LanguageModel(LanguageModelConfig(1, 24, 300, 16))
    bare = trace_run(own, torch.tensor([5, 299, 7]), store)
    assert bare.manifest["tokens"] == {"ids": [5, 299, 7], "strings": ["5", "299", "7"], "tokenizer": "none"}
    assert bare.array("next.ids").shape == (3, 10)


def test_a_part_of_the_layers(store: RunStore) -> None:
    """Only the chosen layers have factors; loss and residual norms are of the whole model all the same."""
    model = lively("retnet")
    whole, part = trace_run(model, TEXT, store), trace_run(model, TEXT, store, layers=[-1, 0, 0])
    assert [record["layer"] for record in part.manifest["layers"]] == [0, 2]
    assert part.manifest["settings"]["layers"] == [0, 2]
    assert not part.has("layer.1.query") and not part.has("overview.1")
    for name in ("loss", "resid_norm", "layer.2.query", "state_norm.0"):
        assert np.array_equal(part.array(name), whole.array(name), equal_nan=True)


# ------------------------------------------------------------------------------------------------------ interventions


@pytest.mark.parametrize("name", NAMES)
def test_interventions_act_and_are_recorded(store: RunStore, name: str) -> None:
    """The run is that of the changed model, and the manifest rebuilds the same interventions."""
    model = lively(name)
    interventions: list[Intervention] = [
        Ablate(Select(role="z", layer=0), heads=1),
        Scale(Select(role="resid", layer=min(1, model.n_layers - 1)), factor=0.5, positions=[3, 4]),
    ]
    run = trace_run(model, TEXT, store, interventions=interventions)
    loss = model.run_with_hooks(TEXT, hooks=interventions, return_type="loss", loss_per_token=True)
    assert close(run.array("loss")[1:], array(loss[0]))
    assert not close(run.array("loss")[1:], array(model(TEXT, return_type="loss", loss_per_token=True)[0]))
    for layer, expected in patterns_of(model, hooks=interventions).items():
        assert close(LayerFactors.from_run(run, layer).pattern(1), expected[1])
    again = [Intervention.from_json(record) for record in run.manifest["interventions"]]
    assert [type(item) for item in again] == [Ablate, Scale]
    assert torch.equal(
        model.run_with_hooks(TEXT, hooks=again, return_type="loss", loss_per_token=True),
        model.run_with_hooks(TEXT, hooks=interventions, return_type="loss", loss_per_token=True),
    )


@pytest.mark.parametrize("name", NAMES)
def test_an_overwritten_pattern_is_stored_as_it_was(store: RunStore, name: str) -> None:
    """Factors cannot know that a pattern was edited, so the layer is stored dense, with the pattern that the model went on with."""
    model = lively(name)
    edited = min(1, model.n_layers - 1)
    if not model.hook_points.resolve(Select(role="pattern", layer=edited))[0][1][0].point.editable:
        pytest.skip("this pattern only reports")
    edit = EditPattern(layer=edited, heads=0, keys=2, value=0.0)
    run = trace_run(model, TEXT, store, interventions=[edit])
    record = run.layer(edited)
    assert record["form"] == "dense" and record["overwritten"] == ["pattern"]
    for layer in set(range(model.n_layers)) - {edited}:
        assert run.layer(layer)["form"] == model.mixers[layer].describe()["form"] and "overwritten" not in run.layer(
            layer
        )
    expected = patterns_of(model, hooks=[edit])
    assert np.abs(expected[edited][0, :, 2]).max() == 0 and np.abs(expected[edited][1, :, 2]).max() > 0
    for layer in range(model.n_layers):
        factors = LayerFactors.from_run(run, layer)
        for head in range(len(expected[layer])):
            assert close(factors.pattern(head), expected[layer][head]), (layer, head)
            assert close(run.array(f"overview.{layer}")[head], max_pool_signed(expected[layer][head], 96, 96))
    assert record["pattern"]["exact"] is model.mixers[edited].describe()["pattern"]["exact"]
    assert record["pattern"]["rows_sum_to"] is None
    assert not run.has(f"entropy.{edited}")
    if name in LINEAR and (record["state"] or {}).get("role") == "state":  # what is remembered is still there
        point = main_point(model.hook_points.points.values(), "state", edited)
        states = model.states(TEXT, 5, layers=edited, hooks=[edit])[edited][0, 0]
        state = array(states[1] if "head" in point.axes else states)
        assert close(LayerFactors.from_run(run, edited).state(1, 5), state.reshape(-1, state.shape[-1]))


def test_a_cut_edge_leaves_a_distribution(store: RunStore) -> None:
    """Where the rest of a row takes over what a cut edge frees, rows still sum to 1 and have an entropy."""
    model = lively("llama")
    edit = BlockEdge(layer=0, queries=[9, 10], keys=[2])
    run = trace_run(model, TEXT, store, interventions=[edit])
    assert run.layer(0)["form"] == "dense" and run.layer(0)["pattern"]["rows_sum_to"] == 1
    pattern = model.patterns(TEXT, layers=0, hooks=[edit])[0]
    assert close(run.array("entropy.0"), array(pattern.entropy()[0]))
    scores = trace_run(model, TEXT, store, interventions=[Scale("blocks.2.attn.hook_attn_scores", factor=0.5)])
    assert scores.layer(2)["overwritten"] == ["pattern"]


@pytest.mark.parametrize("name", LINEAR)
def test_an_overwritten_state_is_stored_as_it_was(store: RunStore, name: str) -> None:
    """States are the edited ones, at every stored position; the pattern is called approximate, as it knows nothing of the edit."""
    model = lively(name)
    carrying = [p.layer_index for p in model.hook_points.points.values() if p.role == "state"]
    layer = 1 if 1 in carrying else 0  # hybrids
    point = stored_slot(model, layer)
    slot = point.name.rsplit(".hook_", 1)[-1]
    edit = EditState(point.name, after=6, operation="scale", value=0.25)
    run = trace_run(model, TEXT, store, interventions=[edit])
    record = run.layer(layer)
    assert record["form"] == "dense" and record["overwritten"] == ["state"] and record["pattern"]["exact"] is False
    factors = LayerFactors.from_run(run, layer)
    positions = [0, 5, 6, 7, LENGTH - 1]
    reading = model.states(TEXT, positions, layers=layer, slot=slot, hooks=[edit])[layer][0]
    plain = model.states(TEXT, positions, layers=layer, slot=slot)[layer][0]
    head = 1 if "head" in point.axes else 0

    def expected(states: Tensor, number: int) -> np.ndarray:
        one = array(states[number, head] if "head" in point.axes else states[number])
        return one.reshape(-1, one.shape[-1]) if one.ndim > 1 else one[:, None]

    for number, position in enumerate(positions):
        assert close(factors.state(head, position), expected(reading, number)), position
    assert not close(factors.state(head, 7), expected(plain, 3))
    assert close(factors.state(head, 5), expected(plain, 1))
    loss = model.run_with_hooks(TEXT, hooks=[edit], return_type="loss", loss_per_token=True)
    assert close(run.array("loss")[1:], array(loss[0]))


def test_stored_states_fit_their_budget(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lively("retnet")
    numbers = 3 * 8 * 16
    monkeypatch.setattr(trace_module, "STORED_STATE_NUMBERS", 5 * numbers)
    run = trace_run(model, TEXT, store, interventions=[EditState(layer=0, after=3, value=0.0)])
    positions = run.array("layer.0.state_positions").tolist()
    assert len(positions) == 5 and positions[-1] == LENGTH - 1 and positions[0] == 0
    assert run.array("layer.0.states").shape == (3, 5, 8, 16)


def test_only_edits_of_the_stored_pass_overwrite(store: RunStore) -> None:
    """Where depth shares weights the last pass is stored: an edit of an earlier one leaves the factors true."""
    model = lively("looped")
    early = trace_run(model, TEXT, store, interventions=[Scale("blocks.1.attn.hook_pattern@0", factor=0.5)])
    assert early.layer(1)["form"] == "softmax"
    late = trace_run(model, TEXT, store, interventions=[Scale("blocks.1.attn.hook_pattern@1", factor=0.5)])
    assert late.layer(1)["form"] == "dense"


# -------------------------------------------------------------------------------- progress, cancelling, mistakes, failures


def nothing_left(store: RunStore) -> bool:
    return not store.list() and not [path for path in store.root.iterdir() if path.is_dir()]


def test_progress_and_cancelling(store: RunStore) -> None:
    """Progress rises from 0 to 1 with words; a cancelled trace leaves nothing, whenever it is cancelled."""
    model = lively("gpt2")
    steps: list[tuple[float, str]] = []
    trace_run(model, TEXT, store, progress=lambda fraction, words: steps.append((fraction, words)))
    fractions = [fraction for fraction, _ in steps]
    assert fractions[0] == 0 and fractions[-1] == 1 and fractions == sorted(fractions) and len(steps) >= 6
    assert all(words for _, words in steps)
    store.delete(store.list()[0].id)
    for number in range(len(steps)):
        cancel, seen = threading.Event(), [0]

        def progress(fraction: float, words: str, stop: int = number, event: Any = cancel, count: Any = seen) -> None:
            count[0] += 1
            if count[0] == stop:
                event.set()

        if number == 0:
            cancel.set()
        with pytest.raises(TraceCancelled, match=r"nothing was stored"):
            trace_run(model, TEXT, store, progress=progress, cancel=cancel)
        assert nothing_left(store)


def test_mistakes_are_errors_in_words_and_store_nothing(store: RunStore) -> None:
    model = lively("gpt2")
    batch = torch.zeros(2, 4, dtype=torch.long)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ("", {}, r"The text is empty. Expected at least one token"),
        (batch, {}, r"A trace holds one sequence; got a batch of 2"),
        ("x" * 65, {}, r"65 tokens are more than this model's context of 64"),
        (TEXT, {"layers": [3]}, r"Layer 3 is out of range: this model has layers 0..2"),
        (TEXT, {"layers": []}, r"The list of layers is empty"),
        (TEXT, {"interventions": [("hook_embed", lambda x, hook: x)]}, r"must be declarative; got \('hook_embed'"),
        (TEXT, {"interventions": [EditPattern(layer=0, heads=9)]}, r"head \[9\] is out of range 0..3"),
        (TEXT, {"interventions": [EditState(layer=0, after=2)]}, r"no recurrent state to edit"),
        (TEXT, {"interventions": [Ablate("blocks.0.hook_resid_prex")]}, r"Did you mean 'blocks.0.hook_resid_pre'"),
        (TEXT, {"interventions": [Ablate("hook_embed", positions=500)]}, r"500"),
    ]
    for text, options, message in cases:
        with pytest.raises(Exception, match=message) as caught:
            trace_run(model, text, store, **options)
        assert type(caught.value).__name__ in ("ValueError", "HookError", "UnknownHookPoint", "HookNeverReached")
        assert nothing_left(store)


def test_a_pattern_too_large_to_store_is_refused_before_the_run(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_module, "LARGEST_PATTERN", 4 * LENGTH**2 - 1)
    model = lively("gpt2")
    edit = EditPattern(layer=1, heads=0, keys=2)
    with pytest.raises(ValueError, match=r"overwrite the pattern of layer 1, so its pattern must be stored whole"):
        trace_run(model, TEXT, store, interventions=[edit])
    assert trace_run(model, TEXT, store, interventions=[edit], layers=[0, 2]).manifest["settings"]["layers"] == [0, 2]


def test_a_failure_while_writing_leaves_nothing(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a run nor a partial folder, nor hooks on the model."""
    model, calls = lively("retnet"), []

    def fail(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError("disk full")

    monkeypatch.setattr(trace_module, "add_layer_arrays", fail)
    with pytest.raises(OSError, match="disk full"):
        trace_run(model, TEXT, store)
    assert nothing_left(store)
    assert model.list_hooks() == {}


def test_a_trace_needs_no_gradient_and_changes_nothing(store: RunStore) -> None:
    model = models.build("bdh", dropout=0.5)
    model.train()
    before = model.weights_sha256()
    first = trace_run(model, TEXT, store)
    assert model.weights_sha256() == before and model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    second = trace_run(model.eval(), TEXT, store)
    assert first.id != second.id
    # dropout would make a run one of many: a trace always reads in evaluation mode
    assert np.array_equal(first.array("loss"), second.array("loss"), equal_nan=True)
