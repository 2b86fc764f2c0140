"""T5 checkpoints: what transformers computes of a source and a text, and what we compute from the same files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import models
from models.encoder import Encoder
from models.encoder_decoder import EncoderDecoder
from models.pretrained.loader import conversion_of
from tests.models.pretrained.page import shown
from tests.models.pretrained.reference import (
    HEADS,
    NEW,
    VOCABULARY,
    WIDTH,
    Case,
    Pair,
    all_double,
    largest,
    pair,
    write,
)

EXACT, CLOSE = 1e-10, 1e-4
ENCODER, DECODER, SOURCE, TEXT = 3, 2, 23, 9
SIDES = [None, "left", "right"]
T5 = {
    "vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 10, "d_ff": 48, "num_layers": ENCODER, "num_decoder_layers": DECODER,
    "num_heads": HEADS, "relative_attention_num_buckets": 12, "relative_attention_max_distance": 17,
    "pad_token_id": 0, "decoder_start_token_id": 0,
}  # fmt: skip
CASES = {
    "t5": Case("T5ForConditionalGeneration", T5),
    "t5-1.1": Case(
        "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    ),
    "mt5": Case("MT5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-silu"}),
    "umt5": Case("UMT5ForConditionalGeneration", T5),
}


def opened(name: str, folder: Path) -> Pair:
    """A checkpoint on both sides, its matrices large enough for texts that do not repeat one token; T5 1.1 with a head of its own, as
    published ones have."""
    case = CASES[name]
    theirs = write(case, folder)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            if parameter.dim() == 2 and key != "shared.weight":
                parameter.mul_(3)
        if name == "t5-1.1":
            theirs.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator).double())
    theirs.save_pretrained(folder)
    both = Pair(case, theirs, models.load(folder, dtype=torch.float64), folder)
    assert both.ours.config.tie_embeddings == (name != "t5-1.1")
    return both


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return opened(request.param, tmp_path_factory.mktemp(request.param))


def sequences(length: int, side: str | None, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens [2, length] and their mask, whose second row is padded by 4 at `side`."""
    tokens = torch.randint(1, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if side is not None:
        mask[1, slice(0, 4) if side == "left" else slice(-4, None)] = False
    return tokens, mask


def reference(both: Pair, source_side: str | None, text_side: str | None) -> Any:
    """What transformers computes in float64."""
    (source, source_mask), (text, mask) = sequences(SOURCE, source_side, 1), sequences(TEXT, text_side, 2)
    with torch.no_grad(), all_double(both.case.model):
        return both.theirs(
            source,
            attention_mask=source_mask.long(),
            decoder_input_ids=text,
            decoder_attention_mask=mask.long(),
            output_hidden_states=True,
            output_attentions=True,
        )


def differences(both: Pair, source_side: str | None, text_side: str | None) -> dict[str, float]:
    """The largest differences of logits (watched and not), streams and patterns."""
    assert isinstance(both.ours, EncoderDecoder)
    (source, source_mask), (text, mask) = sequences(SOURCE, source_side, 1), sequences(TEXT, text_side, 2)
    expected = reference(both, source_side, text_side)
    given = {"mask": mask, "facts": {"source": source, "source_mask": source_mask}}
    with torch.no_grad():
        logits, cache = both.ours.run_with_cache(text, **given)
        unwatched = both.ours(text, **given)
    assert float(logits.std()) > 0.1, "not a comparison of zeros"
    found = {"logits": max(largest((x - expected.logits)[mask]) for x in (logits, unwatched))}
    streams, patterns = [], []
    for layer in range(ENCODER):
        own = f"encoder.blocks.{layer}"
        streams.append((cache[f"{own}.hook_resid_pre"] - expected.encoder_hidden_states[layer])[source_mask])
        difference = cache[f"{own}.attn.hook_pattern"] - expected.encoder_attentions[layer]
        patterns.append(difference.transpose(1, 2)[source_mask])
    streams.append((cache["encoder.hook_output"] - expected.encoder_hidden_states[-1])[source_mask])
    for layer in range(DECODER):
        streams.append((cache["resid_pre", 2 * layer] - expected.decoder_hidden_states[layer])[mask])
        for block, theirs in ((2 * layer, expected.decoder_attentions), (2 * layer + 1, expected.cross_attentions)):
            patterns.append((cache["pattern", block] - theirs[layer]).transpose(1, 2)[mask])
    return found | {"streams": max(map(largest, streams)), "patterns": max(map(largest, patterns))}


def same_tokens(both: Pair) -> int:
    """How many greedy tokens of two sources, one padded, are the same before the first that differs."""
    assert isinstance(both.ours, EncoderDecoder)
    source, mask = sequences(SOURCE, "left", 1)
    both.theirs.generation_config.eos_token_id = None  # nothing ends a text before its time
    with all_double(both.case.model):
        expected = both.theirs.generate(
            source, attention_mask=mask.long(), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )
    ours = both.ours.generate(max_new_tokens=NEW, source=source, source_mask=mask)
    equal = (ours == expected)[:, 1:].all(0)
    return NEW if bool(equal.all()) else int((~equal).int().argmax())


def single(both: Pair) -> float:
    """The largest difference of logits in float32, nothing patched, over their largest."""
    (source, _), (text, _) = sequences(SOURCE, None, 1), sequences(TEXT, None, 2)
    with torch.no_grad():
        expected = both.single()(source, decoder_input_ids=text).logits
        return largest(models.load(both.folder)(text, facts={"source": source}) - expected) / max(
            1.0, largest(expected)
        )


def row(both: Pair) -> dict[str, str]:
    """A line of docs/pretrained.md."""
    worst = {"logits": 0.0, "streams": 0.0, "patterns": 0.0}
    for sides in ((None, None), ("left", "left"), ("right", "right")):
        worst = {name: max(worst[name], value) for name, value in differences(both, *sides).items()}
    return {name: shown(value) for name, value in worst.items()} | {
        "float32": f"{single(both):.0e}",
        "generation": f"{same_tokens(both)} of {NEW}",
    }


@pytest.mark.parametrize("text_side", SIDES, ids=lambda side: f"text-{side}")
@pytest.mark.parametrize("source_side", SIDES, ids=lambda side: f"source-{side}")
def test_logits_streams_and_patterns(both: Pair, source_side: str | None, text_side: str | None) -> None:
    for name, difference in differences(both, source_side, text_side).items():
        assert difference < EXACT, name


def test_generation(both: Pair) -> None:
    """Greedy texts of a padded batch of sources with a cache: the same 32 tokens; re-reading everything gives them too."""
    assert same_tokens(both) == NEW
    assert isinstance(both.ours, EncoderDecoder)
    source, mask = sequences(SOURCE, "right", 3)
    given = {"source": source, "source_mask": mask}
    carried = both.ours.generate(max_new_tokens=9, **given)
    assert torch.equal(carried, both.ours.generate(max_new_tokens=9, use_state=False, **given))
    assert len(set(carried.flatten().tolist())) > 3, "not one token over and over"


def test_single_precision_as_it_comes(both: Pair) -> None:
    assert single(both) < CLOSE


def test_saved_again(both: Pair, tmp_path: Path) -> None:
    (source, _), (text, _) = sequences(SOURCE, None, 1), sequences(TEXT, None, 2)
    models.save(both.ours, tmp_path / "saved")
    again = models.load(tmp_path / "saved", dtype=torch.float64)
    with torch.no_grad():
        assert largest(again(text, facts={"source": source}) - both.ours(text, facts={"source": source})) < 1e-12


def test_the_encoder_alone(tmp_path: Path) -> None:
    """A checkpoint of T5EncoderModel (sentence embedders) opens as an encoder."""
    both = pair(Case("T5EncoderModel", T5), tmp_path)
    assert isinstance(both.ours, Encoder)
    source, mask = sequences(SOURCE, "left", 1)
    with torch.no_grad(), all_double("T5EncoderModel"):
        expected = both.theirs(source, attention_mask=mask.long(), output_hidden_states=True, output_attentions=True)
    with torch.no_grad():
        output, cache = both.ours.run_with_cache(source, mask=mask)
    assert largest((output - expected.last_hidden_state)[mask]) < EXACT < largest(output)
    for layer in range(ENCODER):
        assert largest((cache["resid_pre", layer] - expected.hidden_states[layer])[mask]) < EXACT
        assert largest((cache["pattern", layer] - expected.attentions[layer]).transpose(1, 2)[mask]) < EXACT


def test_what_it_opens_as_is_known_before_the_weights_are(both: Pair, tmp_path: Path) -> None:
    """From the configuration alone, as for a model on the hub; a bare file of it opens too."""
    assert conversion_of(both.folder, [], stored={})[0].architecture == "t5"
    pair(Case("T5EncoderModel", T5), tmp_path)
    assert conversion_of(tmp_path, [], stored={})[0].architecture == "t5-encoder"
    assert models.load(both.folder / "model.safetensors").config == both.ours.config


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"feed_forward_proj": "swiglu-relu"}, r"feed_forward_proj = 'swiglu-relu' is not supported.*'gated-'"),
        ({"feed_forward_proj": "gated-gelo"}, r"feed_forward_proj = 'gelo' is not supported. Did you mean 'gelu'"),
        ({"is_decoder": True}, r"is_decoder = True is not supported for t5. Expected False"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path: Path, setting: dict[str, Any], message: str) -> None:
    import json

    from models.pretrained.family import UnsupportedCheckpoint

    pair(CASES["t5"], tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**record, **setting}))
    with pytest.raises(UnsupportedCheckpoint, match=message):
        models.load(tmp_path)
