"""Edits of what models read, against their rules cell by cell."""

from typing import Any

import pytest
import torch
from torch import Tensor

import models
from probes.reading_edits import (
    CalibrateSinks,
    KeepTopScores,
    ReadOnly,
    parallel_contexts,
    parallel_positions,
    sinks_of,
    star,
    streaming,
)
from workbench.instrument.errors import HookError
from workbench.instrument.interventions import Ablate, Intervention, Scale


@pytest.fixture(scope="module")
def model() -> Any:
    model = models.build("llama").double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.dim() > 1 else 1)
    return model


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(0, 256, (2, 17), generator=torch.Generator().manual_seed(0))


def patterns(model: Any, tokens: Tensor, hooks: Any) -> list[Tensor]:
    with model.hooks(hooks):
        _, cache = model.run_with_cache(tokens, role="pattern")
    return list(cache.values())


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and float((a - b).detach().abs().max()) < 1e-10


def test_calibration_is_its_rule(model: Any, tokens: Tensor) -> None:
    """Planted sinks: column 5 of head 1. Rows keep their sums, sinks get β, the rest shares in proportion, the first token too."""
    logits = torch.randn(1, 2, 9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[0, 1, :, 5] += 4
    x = logits.masked_fill(~torch.ones(9, 9).tril().bool(), float("-inf")).softmax(-1)
    edit = CalibrateSinks("blocks.0.attn.hook_pattern", beta=0.4, threshold=0.45)
    got = edit.apply(x, model.hook_dict["blocks.0.attn.hook_pattern"])
    for h in range(2):
        marked = [j for j in range(1, 9) if float(x[0, h, j:, j].mean()) > 0.45]
        assert (5 in marked) == (h == 1)
        for i in range(9):
            row = x[0, h, i]
            expected = row.clone()
            other = [j for j in range(9) if j not in marked]
            if i and float(row[other].sum()) > 0:
                expected[marked] = 0.4 * row[marked]
                expected[other] = row[other] * (1 + 0.6 * row[marked].sum() / row[other].sum())
            assert close(got[0, h, i], expected)
    assert close(got.sum(-1), torch.ones(1, 2, 9).double())
    assert not sinks_of(x, threshold=0.45)[0, 0].any()


def test_calibration_changes_chosen_heads_only(model: Any, tokens: Tensor) -> None:
    plain, edited = (
        patterns(model, tokens, []),
        patterns(model, tokens, [CalibrateSinks(layer=1, heads=[2], threshold=0.05)]),
    )
    assert close(plain[0], edited[0]) and close(plain[1][:, [0, 1, 3]], edited[1][:, [0, 1, 3]])
    assert not close(plain[1][:, 2], edited[1][:, 2])
    with pytest.raises(HookError, match="no distribution"):
        models.build("diff-transformer").run_with_hooks(tokens, hooks=[CalibrateSinks(layer=0)])


@pytest.mark.parametrize("k", [1, 4, 100])
def test_top_scores(k: int, model: Any, tokens: Tensor) -> None:
    """Each row's k largest weights, renormalised."""
    plain = patterns(model, tokens, [])[0]
    got = patterns(model, tokens, [KeepTopScores(k=k, layer=0)])[0]
    least = plain.topk(min(k, 17), -1).values[..., -1:]
    kept = plain * (plain >= least)
    assert close(got, kept / kept.sum(-1, keepdim=True))


def allowed_by_loop(rule: Any) -> Tensor:
    return torch.tensor([[j <= i and bool(rule(i, j)) for j in range(17)] for i in range(17)])


def test_masks_are_their_rules() -> None:
    assert torch.equal(streaming(17, 2, 3), allowed_by_loop(lambda i, j: j < 2 or i - j < 3))
    assert torch.equal(star(17, 4, 12), allowed_by_loop(lambda i, j: i >= 12 or i // 4 == j // 4 or j < 4))
    inside = lambda i: next((n for n, (a, b) in enumerate([(2, 6), (6, 9), (9, 13)]) if a <= i < b), None)  # noqa: E731
    spans = [(2, 6), (6, 9), (9, 13)]
    assert torch.equal(
        parallel_contexts(17, spans),
        allowed_by_loop(lambda i, j: inside(j) is None or inside(i) is None or inside(i) == inside(j)),
    )
    assert torch.equal(
        parallel_contexts(17, spans, dropped=[1]),
        allowed_by_loop(
            lambda i, j: inside(j) is None or inside(i) == inside(j) or (inside(i) is None and inside(j) != 1)
        ),
    )
    assert parallel_positions(17, spans)[0].tolist() == [0, 1, 2, 3, 4, 5, 2, 3, 4, 2, 3, 4, 5, 6, 7, 8, 9]


def test_reading_under_a_mask(model: Any, tokens: Tensor) -> None:
    """The pattern is the plain one of layer 0, restricted and renormalised; generating with a cache sees the same mask."""
    allowed = streaming(40, 2, 3)
    plain, got = patterns(model, tokens, [])[0], patterns(model, tokens, [ReadOnly(allowed=allowed)])[0]
    kept = plain * allowed[:17, :17]
    assert close(got, kept / kept.sum(-1, keepdim=True))
    with model.hooks([ReadOnly(allowed=allowed)]):
        with_state = model.generate(tokens[:, :5], 8)
        assert torch.equal(with_state, model.generate(tokens[:, :5], 8, use_state=False))


def test_star_attention_leaves_query_rows_of_one_layer(model: Any, tokens: Tensor) -> None:
    plain = patterns(model, tokens, [])[0]
    got = patterns(model, tokens, [ReadOnly(allowed=star(17, 4, 12))])[0]
    assert close(plain[:, :, 12:], got[:, :, 12:]) and close(plain[:, :, :4], got[:, :, :4])
    assert not close(plain[:, :, 4:12], got[:, :, 4:12])


def test_equal_contexts_in_parallel_are_read_alike(model: Any, tokens: Tensor) -> None:
    """Twice the same context at the same positions: a query reads both copies with the same weights, in every layer."""
    text = torch.cat([tokens[:1, :2], tokens[:1, 2:6], tokens[:1, 2:6], tokens[:1, 6:9]], 1)
    spans = [(2, 6), (6, 10)]
    edit = ReadOnly(allowed=parallel_contexts(13, spans))
    with model.hooks([edit]):
        _, cache = model.run_with_cache(text, role="pattern", facts={"positions": parallel_positions(13, spans)})
    for pattern in cache.values():
        assert close(pattern[:, :, 10:, 2:6], pattern[:, :, 10:, 6:10])
    with model.hooks([edit]):
        _, cache = model.run_with_cache(text, role="pattern")
    assert not close(
        cache["blocks.0.attn.hook_pattern"][:, :, 10:, 2:6], cache["blocks.0.attn.hook_pattern"][:, :, 10:, 6:10]
    )


def test_edits_are_stored_and_read(model: Any, tokens: Tensor) -> None:
    for edit in (CalibrateSinks(layer=0, beta=0.3), KeepTopScores(k=2), ReadOnly(allowed=star(17, 4, 9), layer=1)):
        tensors: dict[str, Tensor] = {}
        again = Intervention.from_json(edit.to_json(tensors), tensors)
        assert close(model.run_with_hooks(tokens, hooks=[edit]), model.run_with_hooks(tokens, hooks=[again]))
    assert not isinstance(again, Ablate | Scale)


@pytest.mark.parametrize(
    "make",
    [
        lambda: KeepTopScores(k=0),
        lambda: ReadOnly(),
        lambda: ReadOnly(allowed=torch.ones(3, 4)),
        lambda: streaming(5, 1, 0),
        lambda: star(5, 0, 2),
        lambda: parallel_contexts(9, [(2, 5), (4, 7)]),
        lambda: parallel_contexts(9, [(2, 5)], dropped=[1]),
        lambda: parallel_positions(9, [(1, 3), (4, 6)]),
    ],
)
def test_impossible_edits_are_refused(make: Any) -> None:
    with pytest.raises((HookError, ValueError)):
        make()


def test_a_text_longer_than_the_mask_is_refused(model: Any, tokens: Tensor) -> None:
    with pytest.raises(HookError, match="for 9 tokens"):
        model.run_with_hooks(tokens, hooks=[ReadOnly(allowed=star(9, 3, 6))])
