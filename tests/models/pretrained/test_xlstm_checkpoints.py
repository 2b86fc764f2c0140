"""xLSTM checkpoints: what is carried besides the memory, fused maps, and what is refused. Parity of the rest: `test_families`."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from models.pretrained.family import Fields, UnsupportedCheckpoint, family
from tests.models.pretrained.reference import CASES, LAYERS, Pair, all_double, batch, largest, pair

CASE = CASES["xlstm"]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(CASE, tmp_path_factory.mktemp("xlstm"))


def test_normaliser_and_stabiliser(both: Pair) -> None:
    """All three slots are theirs to the last digits, because both begin with a stabiliser of 0; so eps weighs the same, too."""
    tokens = batch(None)[0]
    with torch.no_grad(), all_double(CASE.model):
        expected = both.theirs(tokens, use_cache=True).cache_params.rnn_state
    _, state = both.ours(tokens, return_state=True)
    for layer in range(LAYERS):
        _, normaliser, stabiliser = expected[layer]
        assert largest(state.slot(layer, "normaliser") - normaliser) < CASE.exact < largest(normaliser)
        assert largest(state.slot(layer, "stabiliser") - stabiliser[..., 0]) < CASE.exact < largest(stabiliser)


def test_fused_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries, keys, values and gates stored as one map, gates as another, both maps into the MLP as a third.

    transformers cannot make such a model: its initial values add vectors of different lengths. So it makes none, and gets ours.
    """
    from transformers.models.xlstm.modeling_xlstm import xLSTMPreTrainedModel

    monkeypatch.setattr(xLSTMPreTrainedModel, "_init_weights", lambda self, module: None)
    case = dataclasses.replace(CASE, settings={**CASE.settings, "weight_mode": "fused"})
    both = pair(case, tmp_path)
    tokens = batch(None)[0]
    with torch.no_grad():
        assert largest(both.ours(tokens) - both.reference(None).logits) < CASE.exact


def test_refused_settings(both: Pair) -> None:
    record = json.loads((both.folder / "config.json").read_text())
    for change, message in (
        ({"use_bias": True}, "use_bias = True is not supported for xlstm"),
        ({"weight_mode": "split"}, "weight_mode = 'split' is not supported.*Expected 'single' or 'fused'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True is not supported"),
    ):
        with pytest.raises(UnsupportedCheckpoint, match=message):
            family("xlstm")(Fields({**record, **change}))


def test_older_names_of_sizes(both: Pair) -> None:
    """Width and depth under the names of the published file."""
    record = json.loads((both.folder / "config.json").read_text())
    older = {name: value for name, value in record.items() if name not in ("hidden_size", "num_hidden_layers")}
    assert family("xlstm")(Fields(older)).config == both.ours.config
