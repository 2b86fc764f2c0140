"""Encoder-decoders: sources in calls, bound, carried, padded and edited; the consistency suite and parity with T5 are elsewhere."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models.attention.cross import CrossAttentionConfig
from models.attention.rotary import QKNormConfig
from models.attention.site import AttentionConfig
from models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from tests.models.test_consistency import EXACT, largest, lively
from workbench.instrument.errors import HookNeverReached
from workbench.instrument.interventions import BlockEdge
from workbench.instrument.states import ModelState


@pytest.fixture(scope="module")
def model() -> EncoderDecoder:
    """Without a source of its own: calls must name one."""
    made = lively("t5")
    assert isinstance(made, EncoderDecoder)
    made.config = replace(made.config, source=None)
    return made.requires_grad_(False)


def ids(length: int, seed: int = 0, batch: int = 2) -> Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


SOURCE, TEXT = ids(11), ids(6, 1)


def test_a_source_is_named_bound_or_read_before(model: EncoderDecoder) -> None:
    expected = model(TEXT, facts={"source": SOURCE})
    assert torch.equal(model.with_source(SOURCE)(TEXT), expected)
    assert torch.equal(model(TEXT, facts={"source": model.encode(SOURCE)}), expected)
    assert torch.equal(model.with_source(model.encode(SOURCE))(TEXT), expected)
    assert largest(model(TEXT, facts={"source": SOURCE.flip(0)}) - expected) > 1e-3
    assert model.bound is None, "binding leaves the model alone"
    text = model(TEXT[:1], facts={"source": "a dragon"})
    assert torch.equal(text, model(TEXT[:1], facts={"source": torch.tensor([list(b"a dragon")])}))


def test_one_source_serves_a_batch(model: EncoderDecoder) -> None:
    together = model(TEXT, facts={"source": SOURCE[:1]})
    for given in (SOURCE[:1].expand(2, -1), model.encode(SOURCE[:1])):
        assert largest(together - model(TEXT, facts={"source": given})) < EXACT


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_the_source_is_not_read(model: EncoderDecoder, side: str) -> None:
    fill, real = torch.full((2, 4), 7), torch.ones(2, 11, dtype=torch.bool)
    parts = [fill, SOURCE] if side == "left" else [SOURCE, fill]
    masks = [~real[:, :4], real] if side == "left" else [real, ~real[:, :4]]
    facts = {"source": torch.cat(parts, 1), "source_mask": torch.cat(masks, 1)}
    expected, state = model(TEXT, facts={"source": SOURCE}, return_state=True)
    got, padded = model(TEXT, facts=facts, return_state=True)
    assert largest(got - expected) < EXACT
    assert largest(model(TEXT, state=padded) - model(TEXT, state=state)) < EXACT
    _, cache = model.run_with_cache(TEXT, facts=facts, role="pattern", layers=[1, 3])
    hidden = ~facts["source_mask"]
    for pattern in cache.values():
        assert largest(pattern.transpose(1, 3)[hidden]) == 0


def test_the_state_carries_the_source(model: EncoderDecoder, tmp_path: Path) -> None:
    """The encoder does not run again; a state goes through a file."""
    whole = model(TEXT, facts={"source": SOURCE})
    first, state = model(TEXT[:, :2], facts={"source": SOURCE}, return_state=True)
    state = ModelState.load(state.save(tmp_path / "state.safetensors"))
    later = model(TEXT[:, 2:], state=state)
    assert largest(torch.cat([first, later], 1) - whole) < EXACT
    with pytest.raises(HookNeverReached):
        model.run_with_cache(TEXT[:, 2:], state=state, names="encoder.hook_output")
    with pytest.raises(ValueError, match="The state carries its source"):
        model(TEXT[:, 2:], state=state, facts={"source": SOURCE})


def test_encoder_hooks_reach_the_text(model: EncoderDecoder) -> None:
    """The text depends on the source only through what the encoder gives; a cut edge hides one token of it from one head."""
    expected = model(TEXT, facts={"source": SOURCE.flip(0)})
    output = model.encode(SOURCE.flip(0)).stream
    patched = model.run_with_hooks(
        TEXT, facts={"source": SOURCE}, hooks=[("encoder.hook_output", lambda x, hook: output)]
    )
    assert largest(patched - expected) < EXACT
    offsets: list[int] = []

    def seen(x: Tensor, hook: Any) -> None:
        offsets.append(hook.offset)

    with model.hooks([("encoder.blocks.1.attn.hook_z", seen)]):
        model.generate(TEXT, 3, source=SOURCE)
    assert offsets == [0], "once per text, from its beginning"
    edge = BlockEdge(layer=1, heads=[2], queries=[3], keys=[5])
    pattern = model.patterns(TEXT, layers=1, hooks=[edge], facts={"source": SOURCE})[1]
    assert pattern.meta.columns == "source token" and pattern.meta.causal == "none"
    assert largest(pattern.values[:, 2, 3, 5]) == 0 and float(pattern.values[:, 2, 3].sum(-1).min()) > 0.999
    assert float(pattern.values[:, 1, 3, 5].min()) > 0


def test_generation_begins_with_the_start_token(model: EncoderDecoder) -> None:
    got = model.generate(max_new_tokens=5, source=SOURCE)
    assert got.shape == (2, 6) and got[:, 0].tolist() == [model.config.start] * 2
    assert torch.equal(got, model.with_source(SOURCE).generate(model.start_tokens(2), 5, use_state=False))
    mask = torch.ones_like(SOURCE, dtype=torch.bool)
    mask[1, :5] = False
    padded = model.generate(max_new_tokens=5, source=SOURCE, source_mask=mask)
    assert torch.equal(padded[1:], model.generate(max_new_tokens=5, source=SOURCE[1:, 5:]))


def test_a_run_that_stops_before_the_source_is_read(model: EncoderDecoder) -> None:
    stream = model(TEXT, facts={"source": SOURCE}, stop_at_layer=1)
    rest = model(stream, start_at_layer=1, facts={"source": SOURCE})
    assert largest(rest - model(TEXT, facts={"source": SOURCE})) < EXACT


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({}, r"reads a source besides the text. Expected facts=\{'source'"),
        ({"source_mask": torch.ones(2, 11)}, "came without facts"),
        ({"source": ids(11, batch=3)}, r"The source holds a batch of 3, the tokens a batch of 2"),
        ({"source": SOURCE, "source_mask": torch.ones(2, 10)}, r"mask has shape \(2, 10\); expected \[batch, pos\] = \(2, 11\)"),
        ({"source": SOURCE, "source_mask": torch.zeros(2, 11)}, "nothing but padding"),
        ({"source": SOURCE + 200}, r"Token ids must lie in 0..255"),
        ({"source": SOURCE, "sauce": 1}, r"No layer asked for the fact 'sauce'. Did you mean 'source'"),
    ],
)  # fmt: skip
def test_mistakes_in_calls(model: EncoderDecoder, facts: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(TEXT, facts=facts)


def test_mistakes_in_configurations() -> None:
    tiny = models.build("t5").config
    for changes, message in (
        ({"encoder_mixer": AttentionConfig(4, position="rope")}, "causal=False"),
        ({"encoder_mixer": AttentionConfig(4, causal=False)}, "positions inside attention"),
        ({"mixer": AttentionConfig(4, position="rope")}, "No mixer reads the source. Expected a CrossAttentionConfig"),
        ({"encoder_layers": 0}, "encoder_layers is 0; expected at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(tiny, **changes)
    for changes in ({"window": 3}, {"causal": True}):
        with pytest.raises(ValueError, match="on a cross-attention site; expected"):
            EncoderDecoder(EncoderDecoderConfig(2, 24, mixer=CrossAttentionConfig(4, **changes)))  # type: ignore[arg-type]


def test_a_cross_attention_site_outside_an_encoder_decoder() -> None:
    from models.language_model import LanguageModel, LanguageModelConfig

    alone = LanguageModel(LanguageModelConfig(1, 24, mixer=CrossAttentionConfig(4)))
    with pytest.raises(ValueError, match="Cross-attention needs a source"):
        alone(TEXT)


def test_rotary_positions_and_grouped_queries_of_a_source() -> None:
    """Other parts on a cross-attention site: segments equal the whole, though queries turn by their own positions only."""
    cross = CrossAttentionConfig(4, 2, position="rope", bias=False, qk_norm=QKNormConfig())
    config = EncoderDecoderConfig(
        2, 24, mixer=(AttentionConfig(4, position="rope"), cross), encoder_layers=1, source=tuple(range(9))
    )
    made = EncoderDecoder(config).double().requires_grad_(False)
    whole = made(TEXT)
    first, state = made(TEXT[:, :3], return_state=True)
    assert largest(torch.cat([first, made(TEXT[:, 3:], state=state)], 1) - whole) < EXACT
    assert made.hook_dict["blocks.1.attn.qk_norm.key.hook_normalized"].axes[1] == "source"
    made.set_use_split_qkv_input(True)
    assert largest(made(TEXT) - whole) < EXACT
