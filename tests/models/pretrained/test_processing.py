"""Weight processing on checkpoints of every family: the logits stay, or the option is refused for the reason that holds there."""

from pathlib import Path

import pytest
import torch

import models
from models.encoder_decoder import EncoderDecoder
from models.pretrained.family import families
from models.weight_processing import CannotProcess, process_weights, reading_norms
from tests.models.pretrained import test_encoder_decoders, test_encoders, test_hrm_text
from tests.models.pretrained.reference import CASES, Case, largest, write

EXACT = 1e-10
ALL: dict[str, Case] = {**CASES, **test_encoders.CASES, **test_encoder_decoders.CASES, **test_hrm_text.CASES}
HEADLESS = {name for name in test_encoders.CASES if not name.endswith("-masked")}
WITHOUT_READING_NORMS = {"openai-gpt", *HEADLESS}  # their norms' outputs are the stream
CAPPED = {"gemma2", "recurrent_gemma", "xlstm", "xlstm-in-chunks"}
CENTRED = {
    "gpt2",
    "gpt_neo",
    "gptj",
    "gpt_neox",
    "gpt_neox-serial",
    "phi",
    "opt",
    "falcon",
    "falcon-new",
    "falcon-serial",
}
ELSE = "bdh"  # has no such norms; its checkpoints are in test_bdh_checkpoints


def first_of_each_family() -> set[str]:
    """One checkpoint for every converter; the others run with the slow tests."""
    import transformers

    found: dict[object, str] = {}
    for name, case in ALL.items():
        kind = getattr(transformers, case.model).config_class.model_type
        found.setdefault((families()[kind], name in HEADLESS), name)
    return set(found.values())


QUICK = first_of_each_family()


@torch.no_grad()
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in ALL])
def test_logits_stay(name: str, tmp_path: Path) -> None:
    write(ALL[name], tmp_path / name)
    model = models.load(tmp_path / name, dtype=torch.float64)
    if isinstance(model, EncoderDecoder):
        model = model.with_source(torch.arange(9)[None])
    tokens = torch.arange(22).view(2, 11) * 7 % model.vocab_size
    logits = model(tokens)
    size = max(1.0, largest(logits))

    if name in WITHOUT_READING_NORMS:
        with pytest.raises(CannotProcess, match="nothing to fold"):
            process_weights(model, fold_norms=True)
    else:
        made = process_weights(model, fold_norms=True)
        assert set(made.processing.folded) == set(reading_norms(model)) and not made.processing.left
        assert largest(made(tokens) - logits) < EXACT * size

    if name in CENTRED:
        made = process_weights(model, fold_norms=True, centre_writing=True)
        assert largest(made(tokens) - logits) < EXACT * size
        _, cache = made.run_with_cache(tokens, role="resid_post")
        assert max(largest(stream.mean(-1)) for stream in cache.values()) < EXACT * size
    else:
        with pytest.raises(
            CannotProcess, match=r"RMS norms do not remove the mean|norms stand 'after'|a norm behind the embedding"
        ):
            process_weights(model, centre_writing=True)

    if name in CAPPED | HEADLESS:
        with pytest.raises(CannotProcess, match="caps its logits" if name in CAPPED else "no unembedding to logits"):
            process_weights(model, centre_unembedding=True)
    else:
        made = process_weights(model, centre_unembedding=True)
        after = made(tokens)
        assert largest(after.log_softmax(-1) - logits.log_softmax(-1)) < EXACT * size
        assert largest(after.mean(-1)) < EXACT * size < largest(logits.mean(-1)), "there was something to remove"
    assert torch.equal(model(tokens), logits), "the model itself is untouched"


def test_every_family_is_processed() -> None:
    """No converter without a checkpoint here."""
    import transformers

    covered = {families()[getattr(transformers, case.model).config_class.model_type] for case in ALL.values()}
    assert {kind for kind, converter in families().items() if converter not in covered} == {ELSE}
