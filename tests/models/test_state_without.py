"""`ModelState.without`: a layer that carries nothing reads its call alone, at the positions that its tokens have, in every architecture."""

import pytest
import torch

import models
from models.architecture_record import ARCHITECTURES
from tests.models.test_consistency import lively
from workbench.instrument.errors import HookError
from workbench.instrument.interventions import EditState

models.list_models()  # registers all
BOUNDARY, LENGTH = 12, 20


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@torch.no_grad()
def test_without_all_layers_it_is_the_segment_alone_at_its_positions(name: str, tokens: torch.Tensor) -> None:
    model, segment = lively(name), tokens[:, BOUNDARY:]
    _, state = model(tokens[:, :BOUNDARY], return_state=True)
    found = model(segment, state=state.without(*range(len(state.layers))))
    positions = torch.arange(BOUNDARY, LENGTH)[None]
    torch.testing.assert_close(found, model(segment, facts={"positions": positions}), rtol=0, atol=1e-10)
    assert float((found - model(segment, state=state)).abs().max()) > 1e-6
    single = [model(segment, state=state.without(layer)) for layer in range(len(state.layers))]
    assert all(float((each - model(segment, state=state)).abs().max()) > 1e-9 for each in single)


@pytest.mark.parametrize("name", ["llama", "gpt2", "alibi", "diff-transformer"])
@torch.no_grad()
def test_one_attention_layer_without_its_cache_reads_no_earlier_token(name: str, tokens: torch.Tensor) -> None:
    """The same as one call on the whole text in which this layer's scores are cut at the boundary."""
    model, layer = lively(name), 1

    def cut(scores: torch.Tensor, hook: object) -> None:
        scores[..., BOUNDARY:, :BOUNDARY] = -torch.inf

    whole = model.run_with_hooks(tokens, hooks=[(f"blocks.{layer}.attn.hook_attn_scores", cut)])
    _, state = model(tokens[:, :BOUNDARY], return_state=True)
    found = model(tokens[:, BOUNDARY:], state=state.without(layer))
    torch.testing.assert_close(found, whole[:, BOUNDARY:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["retnet", "gla", "bdh", "bdh-paper", "simple-gla"])
@torch.no_grad()
def test_one_linear_layer_without_its_state_forgot_everything(name: str, tokens: torch.Tensor) -> None:
    """The same as one call on the whole text in which this layer's state is put to zero at the boundary."""
    model, layer = lively(name), 1
    whole = model.run_with_hooks(
        tokens, hooks=[EditState(layer=layer, after=BOUNDARY - 1, operation="scale", value=0.0)]
    )
    _, state = model(tokens[:, :BOUNDARY], return_state=True)
    found = model(tokens[:, BOUNDARY:], state=state.without(layer))
    torch.testing.assert_close(found, whole[:, BOUNDARY:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["llama", "mamba2"])
@torch.no_grad()
def test_padding_is_no_obstacle(name: str, tokens: torch.Tensor) -> None:
    """A row with padding in front gives what it gives without."""
    model, mask = lively(name), torch.ones(2, BOUNDARY, dtype=torch.bool)
    mask[1, :5] = False
    _, both = model(tokens[:, :BOUNDARY], mask=mask, return_state=True)
    _, alone = model(tokens[1:, 5:BOUNDARY], return_state=True)
    segment = tokens[:, BOUNDARY:]
    found = model(segment, state=both.without(1))[1:]
    torch.testing.assert_close(found, model(segment[1:], state=alone.without(1)), rtol=0, atol=1e-10)


def test_mistakes_are_named(tokens: torch.Tensor) -> None:
    model = lively("llama")
    _, state = model(tokens, return_state=True)
    with pytest.raises(HookError, match=r"layers 0\.\.2, not 3"):
        state.without(3)
    with pytest.raises(ValueError, match="without layer 1"):
        model(tokens, state=state.without(1), return_state=True)
    kept = state.without(-1)
    assert not kept.layers[2] and kept.layers[0] and state.layers[2]
    kept.layers[0]["key"].zero_()  # a copy
    assert state.slot(0, "key").any()
