"""Probes on a model that reads a call in pieces: they speak of the text's tokens, or refuse in words. Oracle: single interventions."""

import pytest
import torch
from torch import Tensor

from models.segments import in_segments
from probes.edges import EdgeGraph
from probes.erasure import fit_eraser
from probes.objectives import LogitDifference
from probes.patching import activation_patching
from probes.positions import rotation_base
from probes.reading_edits import KeepTopScores, ReadOnly, streaming
from probes.relevance_propagation import NoRule, propagate
from tests.models.test_consistency import lively
from workbench.instrument.errors import HookError
from workbench.instrument.interventions import Patch

OBJECTIVE = LogitDifference(3, 4)


@pytest.fixture(scope="module")
def prompts() -> Tensor:
    """[clean and corrupted, pos]: three segments of five tokens, and two tokens of the fourth."""
    return torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def by_hand(prompts: Tensor, layer: int, position: int) -> float:
    model = lively("recurrent-memory")
    _, cache = model.run_with_cache(prompts[:1])
    patch = Patch(f"blocks.{layer}.hook_resid_post", value=cache["resid_post", layer], positions=[position])
    logits = model.run_with_hooks(prompts[1:], hooks=[patch])
    return float(logits[0, -1, 3] - logits[0, -1, 4])


def test_patching_grids_name_tokens_of_the_text(prompts: Tensor) -> None:
    """Cells in every segment; in the first ones only the memory carries the patch to the end."""
    model = lively("recurrent-memory")
    grid = activation_patching(model, *prompts[:, None], OBJECTIVE, role="resid_post", by=("pos",))
    plain = float(grid.corrupted)
    for layer, position in ((0, 0), (0, 6), (1, 11), (2, 14), (0, 16), (2, 16)):
        assert float(grid.values[layer, position].squeeze()) == pytest.approx(
            by_hand(prompts, layer, position), abs=1e-9
        )
    assert all(abs(float(grid.values[0, position].squeeze()) - plain) > 1e-7 for position in (0, 4, 9, 12, 16))


def test_an_eraser_at_a_position_is_there_once(prompts: Tensor) -> None:
    model, name = lively("recurrent-memory"), "blocks.0.hook_resid_post"
    _, cache = model.run_with_cache(prompts, names=name)
    rows = cache[name].flatten(0, 1)
    eraser = fit_eraser(rows, torch.arange(len(rows)) % 2)
    _, erased = model.run_with_cache(prompts, names=name, hooks=[eraser.at(name, positions=[6])])
    expected = cache[name].clone()
    expected[:, 6] = eraser(cache[name][:, 6])
    before = [position for position in range(10) if position != 6]
    torch.testing.assert_close(erased[name][:, before], expected[:, before], rtol=0, atol=1e-10)
    torch.testing.assert_close(erased[name][:, 6], expected[:, 6], rtol=0, atol=1e-8)


def test_edges_are_refused_over_several_segments(prompts: Tensor) -> None:
    """One segment has edges; between segments the memory is another way than they are."""
    model = lively("recurrent-memory")
    with pytest.raises(ValueError, match="in pieces"):
        EdgeGraph(model, prompts[:1], prompts[1:])
    assert EdgeGraph(model, prompts[:1, :5], prompts[1:, :5]).present.any()  # which checks its runs by itself


def test_what_has_no_rule_for_a_memory_is_refused(prompts: Tensor) -> None:
    model = lively("recurrent-memory")
    with pytest.raises(NoRule, match="memory slots get the rest"):
        propagate(model, prompts, lambda logits, tokens: logits[:, -1, 3])
    with pytest.raises(HookError, match="begin anew with every segment"):
        rotation_base(model, 20000.0, layer=1)


def test_edits_of_scores_and_masks_are_the_same_segment_by_segment(prompts: Tensor) -> None:
    """In one call and handed on: what a mask hides and which scores are kept is counted in the text."""
    model = lively("recurrent-memory")
    plain = model(prompts)
    for edit in (KeepTopScores(k=2), ReadOnly(allowed=streaming(17, sinks=1, window=2))):
        whole = model.run_with_hooks(prompts, hooks=[edit])
        with model.hooks([edit], strict=False):
            pieces = torch.cat([logits for logits, _ in in_segments(model, prompts, 5)], 1)
        torch.testing.assert_close(whole, pieces, rtol=0, atol=1e-10)
        assert float((whole - plain).detach().abs().max()) > 1e-3
