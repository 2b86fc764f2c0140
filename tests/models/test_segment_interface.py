"""`forward(segment, state) -> output, state` of every architecture that reads in segments: states are read, exchanged, edited between."""

import pytest
import torch
from torch import Tensor

import models
from models.architecture_record import ARCHITECTURES
from models.segments import in_segments
from tests.models.test_consistency import lively
from workbench.instrument.interventions import EditState
from workbench.instrument.states import ModelState

models.list_models()  # registers all
SEGMENTED = [name for name, record in ARCHITECTURES.items() if record.family == "memory"]
HIDDEN = {"memformer": {"key", "value"}}  # its mask hides earlier segments, whose keys and values every attention site carries
LENGTH = 5  # of a segment in the tiny presets; landmarks stand every four tokens, which divides no segment


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 256, (2, 4 * LENGTH), generator=torch.Generator().manual_seed(0))


def tensors(state: ModelState) -> list[Tensor]:
    return [value for slots in state.layers for value in slots.values()]


def test_there_are_memory_architectures() -> None:
    assert {"infini", "infini-delta", "transformer-xl", "landmark", "recurrent-memory"} <= set(SEGMENTED)


@pytest.mark.parametrize("name", SEGMENTED)
def test_an_exchanged_state_makes_the_rest_another_texts(name: str, tokens: Tensor) -> None:
    """Sending another text's state to the reader: what follows is what that text's memory makes of it, in every later segment."""
    model, other = lively(name), tokens.flip(1)
    _, theirs = model(other[:, :LENGTH], return_state=True)
    plain = [output for output, _ in in_segments(model, tokens, LENGTH)]
    reader = in_segments(model, tokens, LENGTH)
    first, _ = next(reader)
    second, state = reader.send(theirs)
    expected, after = model(tokens[:, LENGTH : 2 * LENGTH], state=theirs, return_state=True)
    torch.testing.assert_close(first, plain[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(second, expected, rtol=0, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(tensors(state), tensors(after), strict=True))
    later = [output for output, _ in reader]
    assert len(later) == 2 and all(
        float((a - b).abs().max()) > 1e-6 for a, b in zip([second, *later], plain[1:], strict=True)
    )


@pytest.mark.parametrize("name", SEGMENTED)
def test_every_slot_is_what_later_segments_read(name: str, tokens: Tensor) -> None:
    """Each tensor of the state by itself, edited between segments, moves what is read next."""
    model = lively(name)
    _, state = model(tokens[:, :LENGTH], return_state=True)
    plain, _ = model(tokens[:, LENGTH : 2 * LENGTH], state=state, return_state=True)
    # what a segment has begun is written when it ends: nothing is begun between segments
    full = [
        (layer, slot)
        for layer, slots in enumerate(state.layers)
        for slot, value in slots.items()
        if value.abs().sum() > 0 and slot not in HIDDEN.get(name, set())
    ]
    edited = [state.replaced(layer, **{slot: 2 * state.slot(layer, slot)}) for layer, slot in full]
    assert edited
    moved = [
        float((model(tokens[:, LENGTH : 2 * LENGTH], state=each, return_state=True)[0] - plain).abs().max())
        for each in edited
    ]
    assert min(moved) > 1e-9, moved


@pytest.mark.parametrize("name", [name for name in SEGMENTED if "state" in models.build(name).hook_points.roles])
def test_an_edit_at_the_hook_point_is_an_edit_between_segments(name: str, tokens: Tensor) -> None:
    """`EditState` after the last token of a segment, in one call, equals stopping there and patching what is handed on."""
    model, half = lively(name), 2 * LENGTH
    points = {p.name.rsplit(".hook_")[-1]: p for p in model.hook_points.points.values() if p.layer_index == 0}
    slot = next(slot for slot in model.mixers[0].slots if slot in points and points[slot].role == "state")
    point = points[slot].name
    edit = EditState(point, after=half - 1, operation="scale", value=0.3)
    whole = model.run_with_hooks(tokens, hooks=[edit])
    _, state = model(tokens[:, :half], return_state=True)
    rest = model(tokens[:, half:], state=state.replaced(0, **{slot: 0.3 * state.slot(0, slot)}))
    torch.testing.assert_close(whole[:, half:], rest, rtol=0, atol=1e-10)
    assert float((rest - model(tokens)[:, half:]).abs().max()) > 1e-6


@pytest.mark.parametrize("name", SEGMENTED)
def test_hooks_see_the_second_segment_with_its_memory(name: str, tokens: Tensor) -> None:
    """Cached in a call that goes on from a state: the same activations as in one call."""
    model = lively(name)
    _, whole = model.run_with_cache(tokens, role="resid_post")
    _, state = model(tokens[:, : 2 * LENGTH], return_state=True)
    _, rest = model.run_with_cache(tokens[:, 2 * LENGTH :], state=state, role="resid_post")
    for address, stream in rest.items():
        torch.testing.assert_close(stream, whole[address][:, 2 * LENGTH :], rtol=0, atol=1e-10)
