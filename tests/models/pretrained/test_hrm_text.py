"""HRM-Text checkpoints: every run of every block, in transformers and from the same files here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models.pretrained.family import UnsupportedCheckpoint
from tests.models.pretrained.page import same_tokens, shown, single
from tests.models.pretrained.reference import (
    HEADS,
    NEW,
    VOCABULARY,
    WIDTH,
    Case,
    Pair,
    all_double,
    batch,
    largest,
    pair,
)

EXACT, CLOSE = 1e-10, 1e-4
STACK, CYCLES, STEPS = 2, 2, 3
CASES = {
    "hrm_text": Case(
        "HrmTextForCausalLM",
        {
            "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": STACK,
            "num_attention_heads": HEADS, "head_dim": 10, "H_cycles": CYCLES, "L_cycles": STEPS, "embedding_scale": 5.0,
        },
    )
}  # fmt: skip


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(CASES["hrm_text"], tmp_path_factory.mktemp("hrm_text"))


def visited(both: Pair) -> list[str]:
    """`blocks.l` and the step of every run of a block, in order."""
    return [f"blocks.{layer}.{{}}@{step}" for layer, step in both.ours.visits]


def differences(both: Pair, side: str | None, prefix: int = 0) -> dict[str, float]:
    """The largest differences of logits (watched and not), streams behind every run of a block, and patterns."""
    tokens, mask, positions = batch(side)
    kinds = (positions < prefix) & mask
    with torch.no_grad(), all_double(both.case.model):
        expected = both.theirs(
            tokens,
            attention_mask=mask.long(),
            position_ids=positions,
            token_type_ids=kinds.long() if prefix else None,
            output_hidden_states=True,
            output_attentions=True,
        )
    given: dict[str, Any] = {"mask": mask, "facts": {"prefix_length": prefix} if prefix else None}
    with torch.no_grad():
        logits, cache = both.ours.run_with_cache(tokens, **given)
        unwatched = both.ours(tokens, **given)
    assert float(logits.std()) > 0.1, "not a comparison of zeros"
    runs = visited(both)
    assert len(runs) == len(expected.attentions) == STACK * CYCLES * (STEPS + 1)
    streams = [cache[run.format("hook_resid_pre")] for run in runs] + [cache["ln_final.hook_normalized"]]
    patterns = [cache[run.format("attn.hook_pattern")] for run in runs]
    # theirs: what enters the first run, what leaves each, the last behind its norm; between stacks the states are summed anew
    same = [k for k in range(len(runs)) if k % STACK or k == 0]
    pairs = [(streams[k], expected.hidden_states[k]) for k in (*same, len(runs))]
    pairs += [
        (cache[run.format("hook_resid_post")], h) for run, h in zip(runs, expected.hidden_states[1:-1], strict=False)
    ]
    return {
        "logits": max(largest((x - expected.logits)[mask]) for x in (logits, unwatched)),
        "streams": max(largest((ours - theirs)[mask]) for ours, theirs in pairs),
        "patterns": max(
            largest((ours - theirs).transpose(1, 2)[mask])
            for ours, theirs in zip(patterns, expected.attentions, strict=True)
        ),
    }


def row(both: Pair) -> dict[str, str]:
    """A line of docs/pretrained.md."""
    worst = {"logits": 0.0, "streams": 0.0, "patterns": 0.0}
    for side in (None, "left", "right"):
        worst = {name: max(worst[name], value) for name, value in differences(both, side).items()}
    return {name: shown(value) for name, value in worst.items()} | {
        "float32": f"{single(both):.0e}",
        "generation": f"{same_tokens(both)} of {NEW}",
    }


@pytest.mark.parametrize("prefix", [0, 5], ids=["causal", "prefix"])
@pytest.mark.parametrize("side", [None, "left", "right"], ids=["whole", "left", "right"])
def test_logits_streams_and_patterns(both: Pair, side: str | None, prefix: int) -> None:
    for name, difference in differences(both, side, prefix).items():
        assert difference < EXACT, name


def test_a_prefix_changes_the_logits(both: Pair) -> None:
    tokens, _, _ = batch(None)
    with torch.no_grad():
        assert largest(both.ours(tokens, facts={"prefix_length": 5}) - both.ours(tokens)) > 1e-3


def test_generation(both: Pair) -> None:
    assert same_tokens(both) == NEW


def test_single_precision_as_it_comes(both: Pair) -> None:
    assert single(both) < CLOSE


def test_the_first_fast_state_comes_from_the_file(both: Pair) -> None:
    assert torch.equal(both.ours.wiring.start_low, both.theirs.model.z_L_init.detach())
    assert largest(both.ours.wiring.start_low) > 0


def test_saved_again(both: Pair, tmp_path: Path) -> None:
    tokens, _, _ = batch(None)
    models.save(both.ours, tmp_path / "saved")
    again = models.load(tmp_path / "saved", dtype=torch.float64)
    with torch.no_grad():
        assert largest(again(tokens) - both.ours(tokens)) < 1e-12


def test_sixteen_bit(both: Pair) -> None:
    """The stored first state, of another precision than the weights, does not widen the stream."""
    tokens, _, _ = batch(None)
    assert models.load(both.folder, dtype=torch.bfloat16)(tokens).dtype == torch.bfloat16


def test_what_is_not_supported_is_named(both: Pair, tmp_path: Path) -> None:
    for item in both.folder.iterdir():
        (tmp_path / item.name).write_bytes(item.read_bytes())
    record = json.loads((tmp_path / "config.json").read_text())
    for name in ("attention_bias", "mlp_bias"):
        (tmp_path / "config.json").write_text(json.dumps({**record, name: True}))
        with pytest.raises(UnsupportedCheckpoint, match=f"{name} = True is not supported for hrm_text. Expected False"):
            models.load(tmp_path)
