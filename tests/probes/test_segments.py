"""What a state is worth between segments: against single runs, on planted memories, and where there is nothing to measure."""

from __future__ import annotations

import threading
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import models
from models.attention.site import AttentionConfig
from models.decoder import next_token_loss
from models.encoder import Encoder, EncoderConfig
from probes.progress import MeasurementCancelled
from probes.segments import segment_memory, store_segments
from tests.models.test_consistency import lively
from workbench.instrument.interventions import EditState
from workbench.instrument.states import ModelState
from workbench.lab.runs import RunStore

LENGTH = 5  # of a segment in the tiny presets of the memory family
CARRIERS = ["transformer-xl", "recurrent-memory", "infini", "infini-delta", "landmark", "retnet", "mamba2", "gated-deltanet", "lstm",
            "bdh", "titans-mac", "llama", "qwen3-next", "universal-transformer"]  # fmt: skip


def text(seed: int, count: int = 3 * LENGTH + 3) -> Tensor:
    return torch.randint(0, 256, (1, count), generator=torch.Generator().manual_seed(seed))


def per_place(model: Any, tokens: Tensor, state: ModelState | None = None) -> np.ndarray:
    """Loss of one segment in one run, nan in the first place and behind the end."""
    with torch.no_grad():
        losses = next_token_loss(model(tokens, state=state), tokens, per_token=True)[0].numpy()
    return np.concatenate([[np.nan], losses, [np.nan] * (LENGTH - tokens.shape[1])])


@pytest.mark.parametrize("name", CARRIERS)
def test_the_true_state_is_one_run_and_no_state_the_segment_alone(name: str) -> None:
    model, tokens, other = lively(name), text(0), text(1)
    found = segment_memory(model, tokens, LENGTH, other=other)
    with torch.no_grad():
        whole = np.concatenate([[np.nan], next_token_loss(model(tokens), tokens, per_token=True)[0].numpy()])
    expected = np.full((4, LENGTH), np.nan)
    expected.ravel()[: len(whole)] = whole
    expected[:, 0] = np.nan
    np.testing.assert_allclose(found.loss["state"], expected, rtol=0, atol=1e-10)
    for number in (1, 3):
        start = number * LENGTH
        segment = tokens[:, start : start + LENGTH]
        np.testing.assert_allclose(found.loss["none"][number], per_place(model, segment), rtol=0, atol=1e-12)
        with torch.no_grad():
            _, own = model(tokens[:, :start], return_state=True)
            _, theirs = model(other[:, :start], return_state=True)
        np.testing.assert_allclose(found.loss["other"][number], per_place(model, segment, theirs), rtol=0, atol=1e-10)
        last = len(found.layers) - 1
        swapped = own.replaced(last, **theirs.layers[last])
        at = found.layer_loss["other"][last, number]
        np.testing.assert_allclose(at, per_place(model, segment, swapped), rtol=0, atol=1e-10)
        cut = per_place(model, segment, own.without(last))
        np.testing.assert_allclose(found.layer_loss["cut"][last, number], cut, rtol=0, atol=1e-10)
        layer, slot = found.slots[-1]
        one = own.replaced(layer, **{slot: theirs.slot(layer, slot)})
        np.testing.assert_allclose(
            found.slot_loss["other"][-1, number], per_place(model, segment, one), rtol=0, atol=1e-10
        )
        sizes = [float(own.slot(*each).double().norm()) for each in found.slots]
        np.testing.assert_allclose(found.norm[:, number], sizes, rtol=1e-12)
        assert found.bytes[:, number].sum() == own.nbytes()
    assert all(np.isnan(values[..., 0, :]).all() for values in (found.loss["none"], found.layer_loss["cut"]))
    assert abs(found.worth("none")[0]) > 1e-6


@pytest.mark.parametrize("name", ["transformer-xl", "retnet", "llama", "lstm"])
def test_the_own_state_patched_in_changes_nothing(name: str) -> None:
    found = segment_memory(lively(name), text(0), LENGTH, other=text(0))
    for lost in (found.lost("other"), found.by_layer("other"), found.by_slot()):
        assert float(np.nanmax(np.abs(lost))) < 1e-12
    assert found.worth("other")[0] == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("name", ["transformer-xl", "llama", "retnet", "gla", "mamba2"])
def test_one_layer_cut_is_the_whole_state_cut_where_only_that_layer_mixes(name: str) -> None:
    """Layers that add nothing to the stream ignore their state; the one that is left has everything that the memory is worth."""
    model, keeper = lively(name), 1
    with torch.no_grad():
        for layer, block in enumerate(model.blocks):
            if layer != keeper:
                block.sequence_mixer.output.weight.zero_()
    found = segment_memory(model, text(0), LENGTH, other=text(1))
    cut, swapped = found.by_layer("cut"), found.by_layer("other")
    for layer in range(model.n_layers):
        if layer == keeper:
            np.testing.assert_allclose(found.layer_loss["cut"][layer], found.loss["none"], rtol=0, atol=1e-10)
            np.testing.assert_allclose(found.layer_loss["other"][layer], found.loss["other"], rtol=0, atol=1e-10)
        else:
            assert float(np.nanmax(np.abs([cut[layer], swapped[layer]]))) == 0
    assert abs(found.worth("none")[0]) > 1e-6


def test_cutting_a_linear_layer_is_forgetting_at_the_boundary() -> None:
    model, tokens = lively("retnet"), text(0)
    found = segment_memory(model, tokens, LENGTH)
    edit = EditState(layer=1, after=2 * LENGTH - 1, operation="scale", value=0.0)
    with torch.no_grad():
        logits = model.run_with_hooks(tokens, hooks=[edit])[:, 2 * LENGTH : 3 * LENGTH]
    expected = next_token_loss(logits, tokens[:, 2 * LENGTH : 3 * LENGTH], per_token=True)[0].numpy()
    np.testing.assert_allclose(found.layer_loss["cut"][1, 2, 1:], expected, rtol=0, atol=1e-10)


class Rememberer:
    """Expects the first token of the text with probability 0.9 ever after, which layer 0 carries; layer 1 counts, and nobody asks it."""

    name, architecture, tokenizer, n_ctx, visits = "planted", "planted", None, None, ((0, 0), (1, 0))
    mixers = (SimpleNamespace(slots=("first",)), SimpleNamespace(slots=("count",)))

    def to_tokens(self, tokens: Tensor) -> Tensor:
        return tokens

    def __call__(self, tokens: Tensor, state: ModelState | None = None, return_state: bool = False) -> Any:
        layers = [{}, {}] if state is None else state.layers
        first = layers[0].get("first", tokens[:, :1])
        chances = torch.full((1, tokens.shape[1], 16), 0.1 / 15, dtype=torch.float64)
        chances[:, :, int(first)] = 0.9
        before = 0 if state is None else state.position
        logits, read = chances.log(), before + tokens.shape[1]
        counted = torch.full((1, read), 1.0)  # one more number with every token
        return (logits, ModelState(read, [{"first": first}, {"count": counted}])) if return_state else logits


def test_a_planted_memory_is_found_and_its_worth_is_known() -> None:
    """Segments begin with 3 and ask for 7, the first token of the text: −ln 0.9 with the state, −ln(0.1/15) without."""
    segment = [3, 7, 7, 7, 7]
    tokens = torch.tensor([[7, 7, 7, 7, 7, *segment, *segment, *segment[:3]]])
    other = torch.tensor([[5, 1]])
    found = segment_memory(Rememberer(), tokens, LENGTH, other=other)
    known, unknown = -log(0.9), -log(0.1 / 15)
    assert found.repeated == 8 and found.starts == (0, 5, 10, 15)
    np.testing.assert_allclose(np.nan_to_num(found.loss["state"][:3, 1:]), known)
    for reading in ("none", "other"):
        np.testing.assert_allclose(found.by_place(reading)[1:], unknown - known)
        nats, interval = found.worth(reading)
        assert nats == pytest.approx(unknown - known) and interval.low == pytest.approx(nats)
        np.testing.assert_allclose(
            found.by_layer({"none": "cut"}.get(reading, reading))[:, 1:], [[unknown - known] * 3, [0] * 3]
        )
    np.testing.assert_allclose(found.by_slot()[:, 1:], [[unknown - known] * 3, [0] * 3])
    along = found.along_text("none")
    assert len(along) == 18 and np.isnan(along[[0, 1, 5, 10, 15]]).all() and along[17] == pytest.approx(unknown - known)
    assert found.slot_names == ("0.first", "1.count")
    np.testing.assert_array_equal(found.numbers[:, 1:], [[1, 1, 1], [5, 10, 15]])
    np.testing.assert_array_equal(found.norm[0, 1:], [7, 7, 7])
    np.testing.assert_allclose(found.norm[1, 1:], np.sqrt([5, 10, 15]))
    np.testing.assert_allclose(found.change[:, 2:], 0)  # what grew had ones there before
    np.testing.assert_allclose(found.cosine[:, 2:], 1)
    assert np.isnan(found.change[:, :2]).all()


def test_change_is_measured_against_the_state_before() -> None:
    model, tokens = lively("retnet"), text(0)
    found = segment_memory(model, tokens, LENGTH, parts=False)
    with torch.no_grad():
        before, now = (model(tokens[:, :end], return_state=True)[1].slot(2, "state").flatten() for end in (5, 10))
    assert found.change[2, 2] == pytest.approx(float((now - before).norm() / before.norm()), rel=1e-12)
    assert found.cosine[2, 2] == pytest.approx(float(torch.cosine_similarity(now, before, dim=0)), rel=1e-12)
    assert not found.layer_loss and not found.slot_loss and set(found.loss) == {"state", "none"}
    with pytest.raises(ValueError, match="parts=True"):
        found.by_layer("cut")
    with pytest.raises(ValueError, match="other=") as raised:
        found.lost("othr")
    assert "Here are: state, none" in str(raised.value)


def test_passes_over_one_layer_are_told_apart() -> None:
    found = segment_memory(lively("looped"), text(0), LENGTH)
    assert found.layers == ("0@0", "1@0", "2@0", "0@1", "1@1", "2@1") and len(found.layer_loss["cut"]) == 6


def test_it_is_stored_and_stops(tmp_path: Path) -> None:
    model, store, said = models.build("retnet"), RunStore(tmp_path), list[tuple[float, str]]()
    words = "one two three one two three"
    found = segment_memory(model, words, 8, other="another text", progress=lambda *each: said.append(each))
    run = store_segments(store, model, found, text=words, other="another text")
    np.testing.assert_array_equal(run.array("layer.cut"), found.layer_loss["cut"])
    np.testing.assert_array_equal(run.array("change"), found.change)
    assert run.manifest["results"]["worth"]["none"]["nats"] == found.worth("none")[0]
    assert "".join(run.manifest["results"]["strings"]) == words and run.manifest["settings"]["length"] == 8
    fractions = [fraction for fraction, _ in said]
    assert fractions == sorted(fractions) and fractions[-1] == 1.0 and max(fractions[:-1]) < 1.0
    assert "segment 2 of 4: layer cut" in {each for _, each in said}
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(MeasurementCancelled):
        segment_memory(model, words, 8, cancel=cancel)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"length": 1}, "at least 2"),
        ({"length": 20}, "at least 22"),
        ({"text": text(0).repeat(2, 1)}, "batch of 2"),
        ({"other": text(0).repeat(2, 1)}, r"\[2, 18\]"),
        ({"other": text(0)[:, :0]}, r"\[1, 0\]"),
    ],
)
def test_mistakes_are_named(asked: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        segment_memory(models.build("retnet"), **{"text": text(0), "length": LENGTH, **asked})


def test_models_that_hand_on_nothing_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"18 tokens, more than the 16"):
        segment_memory(models.build("gpt2", n_ctx=16), text(0), LENGTH)
    with pytest.raises(ValueError, match="t5-random is an encoder-decoder"):
        segment_memory(models.build("t5"), text(0), LENGTH)
    nobody = Rememberer()
    nobody.mixers = (SimpleNamespace(slots=()),) * 2  # type: ignore[assignment]
    with pytest.raises(ValueError, match="carries nothing"):
        segment_memory(nobody, text(0), LENGTH)
    encoder = Encoder(EncoderConfig(2, 16, 40, 12, AttentionConfig(4, causal=False)))
    with pytest.raises(ValueError, match="is an encoder: it reads a text as a whole"):
        segment_memory(encoder, text(0), LENGTH)
