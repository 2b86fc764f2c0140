"""Runs of encoder-decoders keep what the encoder reads: its own patterns, as a trace of the source inside the run."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch

import models
from models.attention.cross import CrossAttentionConfig
from models.attention.site import AttentionConfig
from models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from models.parts.channel_mixers import MLPConfig
from tests.lab.test_trace_source import SOURCE, TEXT, lively
from workbench import Ablate, Patch
from workbench.instrument.errors import HookNeverReached
from workbench.lab.factors import FactorError, LayerFactors
from workbench.lab.run_format import RunError, check_manifest
from workbench.lab.runs import RunNotFoundError, RunStore
from workbench.lab.trace import trace_run

PATTERN = "encoder.blocks.{}.attn.hook_pattern"


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path)


def rotary(seed: int = 0) -> EncoderDecoder:
    """Rotary positions, and another number of heads and of layers than the decoder has."""
    heads = AttentionConfig(2, d_head=6, position="rope")
    config = EncoderDecoderConfig(
        2, 12, mixer=(heads, CrossAttentionConfig(2, d_head=6)), mlp=(None, MLPConfig(20)), seed=seed, init_std=0.5,
        encoder_layers=2, encoder_mixer=AttentionConfig(3, d_head=4, position="rope", causal=False), encoder_mlp=MLPConfig(16),
    )  # fmt: skip
    return EncoderDecoder(config).eval()


@pytest.mark.parametrize("name", ["t5", "rotary"])
def test_the_encoders_patterns_are_stored(store: RunStore, name: str) -> None:
    """Against what the hook points of the encoder hold."""
    model = (lively("t5") if name == "t5" else rotary()).with_source(SOURCE)
    run = trace_run(model, TEXT, store)
    n_layers = model.config.encoder_layers
    _, cache = model.run_with_cache(TEXT, names="encoder.*")
    side = run.encoder
    assert (len(side.layers), side.id, side.kind) == (n_layers, run.id, "trace")
    assert side.manifest["tokens"]["ids"] == list(SOURCE.encode()) and side.manifest["text"] == SOURCE
    assert side.array("tokens").tolist() == list(SOURCE.encode()) and run.array("tokens").tolist() == list(
        TEXT.encode()
    )
    for layer in range(n_layers):
        whole = cache[PATTERN.format(layer)][0].numpy()
        record, factors = side.layer(layer), LayerFactors.from_run(side, layer)
        assert record["form"] == "dense" and not record["pattern"]["causal"]
        assert (factors.length, factors.columns, factors.n_heads) == (
            17,
            17,
            whole.shape[0],
        ) and factors.visible().all()
        for head in range(whole.shape[0]):
            assert np.allclose(factors.pattern(head), whole[head], atol=1e-6)
            assert np.allclose(factors.received(head), whole[head].mean(0), atol=1e-6)
            assert np.allclose(factors.entropy(head), -(whole[head] * np.log(whole[head])).sum(-1), atol=1e-5)
        assert np.allclose(side.array(f"received.{layer}"), whole.mean(1), atol=1e-6)
        assert np.ptp(whole, axis=-1).max() > 0.02 and abs(whole[:, 0, 1:]).max() > 0, (
            "it looks ahead, and not everywhere alike"
        )
    norms = [cache[f"encoder.blocks.{layer}.hook_resid_pre"] for layer in range(n_layers)]
    norms.append(cache[f"encoder.blocks.{n_layers - 1}.hook_resid_post"])
    assert np.allclose(side.array("resid_norm"), torch.cat(norms).norm(dim=-1).numpy(), rtol=1e-5)
    assert not side.has("loss") and run.has("loss"), "what the text costs is no fact of the source"
    assert run.array("resid_norm").shape == (model.n_layers + 1, len(TEXT))
    run.verify(), side.verify()


def test_the_run_of_the_text_is_as_before(store: RunStore) -> None:
    """What the encoder adds has names of its own."""
    run = trace_run(lively("t5").with_source(SOURCE), TEXT, store)
    assert [layer["layer"] for layer in run.layers] == [0, 1, 2, 3]
    assert run.array("layer.0.pattern").shape == (4, 5, 5) and run.encoder.array("layer.0.pattern").shape == (4, 17, 17)
    own = {name: record["shape"] for name, record in run.arrays().items() if not name.startswith("encoder.")}
    assert own["received.0"] == [4, 5] and own["received.1"] == [4, 17] and own["tokens"] == [5]
    assert {name.split(".")[1] for name in own if name.startswith("layer.")} == {"0", "1", "2", "3"}
    with pytest.raises(FactorError, match="has no head 4"):
        LayerFactors.from_run(run.encoder, 0).pattern(4)
    with pytest.raises(RunNotFoundError, match="has no layer 3"):
        run.encoder.layer(3)


def test_edits_of_the_encoder_are_in_its_patterns(store: RunStore) -> None:
    """An ablated head changes the next layer's map; a patched pattern is kept as it was patched."""
    model = rotary().with_source(SOURCE)
    before = trace_run(model, TEXT, store).encoder
    after = trace_run(
        model, TEXT, store, interventions=[Ablate("encoder.blocks.0.attn.hook_z", heads=[0, 1, 2])]
    ).encoder
    assert np.allclose(before.array("layer.0.query"), after.array("layer.0.query"))
    assert abs(before.array("layer.1.query") - after.array("layer.1.query")).max() > 0.01
    even = torch.full((1, 3, 17, 17), 1 / 17)
    patched = trace_run(model, TEXT, store, interventions=[Patch(PATTERN.format(1), value=even)])
    assert patched.encoder.layer(1)["overwritten"] == ["pattern"] and "overwritten" not in patched.layer(1)
    assert np.allclose(LayerFactors.from_run(patched.encoder, 1).pattern(2), 1 / 17)


@pytest.mark.parametrize("why", ["read already", "no encoder", "older run"])
def test_runs_without_an_encoders_patterns(store: RunStore, why: str) -> None:
    """A source that was read before, a model of one text, and runs of earlier versions open as ever and say that there are none."""
    model = lively("t5")
    model = {
        "read already": model.with_source(model.encode(SOURCE)),
        "no encoder": lively("gpt2"),
        "older run": model.with_source(SOURCE),
    }[why]
    run = trace_run(model, TEXT, store)
    if why == "older run":
        del run.manifest["encoder"]
        check_manifest(run.manifest)
    assert run.manifest.get("encoder") is None
    with pytest.raises(RunNotFoundError, match="stores no patterns of an encoder"):
        _ = run.encoder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(encoder=[]), "encoder is not an object"),
        (lambda m: m.update(source=None, layers=[m["layers"][0], m["layers"][2]]), "without the source"),
        (lambda m: m["encoder"]["layers"][0].update(n_heads=0), "n_heads is 0"),
        (lambda m: m["encoder"]["layers"][1].update(layer=0), "increasing numbers"),
        (lambda m: m["arrays"].pop("encoder.layer.0.pattern"), "needs the array 'layer.0.pattern'"),
        (lambda m: m["arrays"]["encoder.received.1"].update(shape=[4, 5]), "expected .4, 17."),
    ],
)
def test_a_manifest_that_contradicts_itself(store: RunStore, change: Callable[[dict], object], message: str) -> None:
    manifest = deepcopy(trace_run(lively("t5").with_source(SOURCE), TEXT, store).manifest)
    check_manifest(manifest)
    change(manifest)
    with pytest.raises(RunError, match=message):
        check_manifest(manifest)


def test_a_copy_that_travels(store: RunStore, tmp_path: Path) -> None:
    run = trace_run(lively("t5").with_source(SOURCE), TEXT, store)
    store.export_zip(run.id, tmp_path / "run.zip")
    other = RunStore(tmp_path / "other").import_zip(tmp_path / "run.zip")
    assert np.array_equal(other.encoder.array("layer.2.pattern"), run.encoder.array("layer.2.pattern"))


@pytest.mark.parametrize("name", ["t5", "rotary"])
def test_the_encoder_alone(name: str) -> None:
    """The same numbers as inside, by the same weights, at hook points of its own."""
    whole = lively("t5") if name == "t5" else rotary()
    alone = whole.encoder_alone()
    assert alone.architecture == {"t5": "t5-encoder", "rotary": "unknown"}[name]
    assert alone.W_E is whole.W_E and not any(tensor.is_meta for tensor in (*alone.parameters(), *alone.buffers()))
    _, inside = whole.run_with_cache(TEXT, names="encoder.*", facts={"source": SOURCE})
    output, own = alone.run_with_cache(SOURCE)
    assert torch.allclose(output, inside["encoder.hook_output"], atol=1e-5)
    for layer in range(alone.n_layers):
        address = f"blocks.{layer}.attn.hook_pattern"
        assert torch.allclose(own[address], inside[f"encoder.{address}"], atol=1e-6)
        assert torch.allclose(alone.patterns(SOURCE)[layer].values, own[address], atol=1e-6)
    with (
        pytest.raises(HookNeverReached),
        whole.hooks([("encoder.blocks.0.hook_resid_pre", lambda x, hook: None)]),
    ):
        alone(SOURCE)  # the whole's hooks do not fire in it
    with torch.no_grad():
        alone.blocks[0].attn.W_Q.zero_()
    assert not whole.encoder.blocks[0].attn.W_Q.any(), "one set of weights"


def test_probes_of_the_encoder() -> None:
    """What asks for patterns by role answers about the source, once the encoder is a model of its own."""
    from probes.census import head_census
    from probes.sinks import find_sinks

    alone = models.build("t5").encoder_alone()
    tokens = torch.randint(1, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    assert find_sinks(alone, tokens, whole_patterns=True).first_mass.shape == (3, 4)
    census = head_census(alone, tokens)
    assert {(row["layer"], row["head"]) for row in census.table()} == {
        (layer, head) for layer in range(3) for head in range(4)
    }
