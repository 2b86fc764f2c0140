"""Tasks of one-token parts (lookups, latest values, delays, relations, facts): every answer against its definition, by slow loops."""

import math
from typing import Any

import pytest
import torch

from workbench.lab.tasks import Delay, Facts, ForAndAgainst, Lookup, NthLatest, SameDifferent, make_task

NAMES = ["lookup", "nth_latest", "delay", "same_different", "facts", "for_and_against"]


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_a_function_of_seed_step_and_split(name: str) -> None:
    task = make_task(name, seed=3)
    batch, again = task.batch(4, 5), make_task(**task.describe()).batch(4, 5)
    assert torch.equal(batch.tokens, again.tokens) and torch.equal(batch.targets, again.targets)
    assert all(torch.equal(batch.metadata[key], again.metadata[key]) for key in batch.metadata)
    for other in (task.batch(4, 6), task.batch(4, 5, "validation"), make_task(name, seed=4).batch(4, 5)):
        assert not torch.equal(batch.tokens, other.tokens)


@pytest.mark.parametrize("name", NAMES)
def test_answers_fit_the_task(name: str) -> None:
    """Something is asked in every row, never of the first place; as many answers occur as chance_loss says, at their frequency."""
    task = make_task(name, seed=1)
    tokens, asked, _ = batch = task.batch(300)
    assert tokens.min() >= 0 and tokens.max() < task.vocab_size
    assert bool(asked.any(1).all()) and not bool(asked[:, 0].any())
    found = batch.targets[asked].bincount()
    assert len(found) == round(math.exp(task.chance_loss)) and bool((found > 0).all())


@pytest.mark.parametrize("options", [{}, {"scattered": True}, {"items": 4, "hops": 3, "length": 30}], ids=str)
def test_lookup_follows_the_function_that_the_row_gives(options: dict[str, Any]) -> None:
    task = Lookup(**options)
    n, batch = task.items, task.batch(50)
    first_query = task.length - 1 - task.queries
    for row, tokens in enumerate(batch.tokens.tolist()):
        pairs = {token // n: (token % n, place) for place, token in enumerate(tokens[:first_query]) if token < n * n}
        assert sorted(pairs) == sorted(value for value, _ in pairs.values()) == list(range(n))
        assert task.scattered or all(place < n for _, place in pairs.values())
        for place in range(first_query, task.length - 1):
            hops, key = divmod(tokens[place] - n * n, n)
            for _ in range(hops + 1):
                value, at = pairs[key]
                key = value
            assert batch.loss_mask[row, place + 1] and batch.targets[row, place + 1] == value
            assert batch.metadata["source"][row, place + 1] == at and batch.metadata["hops"][row, place + 1] == hops + 1
        others = [token for token in (*tokens[:first_query], tokens[-1]) if token >= n * n]
        assert all(token >= n * n + n * task.hops for token in others)
        assert int(batch.loss_mask[row].sum()) == task.queries
    seen = batch.metadata["hops"][batch.loss_mask].unique().tolist()
    assert seen == list(range(1, task.hops + 1))


def test_scattered_pairs_stand_everywhere_before_the_questions() -> None:
    task = Lookup(length=20, items=4, queries=5, scattered=True)
    source = task.batch(300).metadata["source"]
    assert sorted(source[source >= 0].unique().tolist()) == list(range(14))


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("density", [0.1, 0.6])
def test_the_nth_latest_value(rank: int, density: float) -> None:
    task = NthLatest(rank=rank, density=density, length=40)
    batch = task.batch(40)
    for row, tokens in enumerate(batch.tokens.tolist()):
        for t in range(1, task.length):
            values = [place for place in range(t) if tokens[place] < task.kinds]
            assert bool(batch.loss_mask[row, t]) == (len(values) >= rank)
            if len(values) >= rank:
                assert batch.metadata["source"][row, t] == values[-rank]
                assert batch.targets[row, t] == tokens[values[-rank]]
    share = (batch.tokens[:, rank:] < task.kinds).double().mean()
    assert abs(float(share) - density) < 0.05


def test_delays() -> None:
    batch = Delay(length=20, delay=4).batch(8)
    assert batch.loss_mask.nonzero()[:, 1].unique().tolist() == list(range(5, 20))
    assert torch.equal(batch.targets[:, 5:], batch.tokens[:, :-5])
    assert torch.equal(batch.metadata["source"][0, 5:], torch.arange(15))


def test_same_or_different_and_which_objects() -> None:
    """Half of the tokens repeat the one before; seen and unseen objects share no id."""
    batch = SameDifferent(objects=32).batch(100)
    assert torch.equal(batch.targets[:, 2:], (batch.tokens[:, 1:-1] == batch.tokens[:, :-2]).long())
    assert not batch.loss_mask[:, :2].any() and bool(batch.loss_mask[:, 2:].all())
    assert float(batch.targets[batch.loss_mask].double().mean()) == pytest.approx(0.5, abs=0.03)
    assert batch.tokens.unique().tolist() == list(range(32))
    assert SameDifferent(first=32).batch(100).tokens.unique().tolist() == list(range(32, 64))


def test_facts_are_the_same_in_every_row_and_split() -> None:
    known: dict[tuple[int, int], int] = {}
    task = Facts(vocab_size=6, answers_count=4)
    for batch in (
        task.batch(60),
        task.batch(60, 3, "validation"),
        Facts(vocab_size=6, answers_count=4, seed=9).batch(60),
    ):
        for tokens, targets in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
            for t in range(2, task.length):
                assert known.setdefault((tokens[t - 2], tokens[t - 1]), targets[t]) == targets[t]
    assert len(known) == 36
    assert not (task.table == Facts(vocab_size=6, answers_count=4, table_seed=1).table).all()


@pytest.mark.parametrize("options", [{}, {"length": 40}, {"groups": 2, "symbols": 5, "each": 3}], ids=str)
def test_the_symbol_that_leads_is_the_only_one_that_leads(options: dict[str, Any]) -> None:
    """Counted by hand; every group has its tokens, noise the rest, and all pairs of different groups are asked for."""
    task = ForAndAgainst(**options)
    batch, symbols, asked = task.batch(50), range(task.symbols), set()
    first_query, first_question = task.length - 1 - task.queries, task.groups * task.symbols
    for row, tokens in enumerate(batch.tokens.tolist()):
        read = [divmod(token, task.symbols) for token in tokens[:first_query] if token < first_question]
        assert sorted(group for group, _ in read) == [group for group in range(task.groups) for _ in range(task.each)]
        for place in range(first_query, task.length - 1):
            favoured, opposed = divmod(tokens[place] - first_question, task.groups)
            balance = [read.count((favoured, symbol)) - read.count((opposed, symbol)) for symbol in symbols]
            assert batch.loss_mask[row, place + 1] and balance.count(max(balance)) == 1
            assert batch.targets[row, place + 1] == balance.index(max(balance))
            asked.add((favoured, opposed))
        noise = [token for token in (*tokens[:first_query], tokens[-1]) if token >= first_question]
        assert all(token >= first_question + task.groups**2 for token in noise)
        assert int(batch.loss_mask[row].sum()) == task.queries
    assert len(asked) == task.groups * (task.groups - 1)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("lookup", {"vocab_size": 42}, "vocab_size ≥ 43"),
        ("lookup", {"length": 14}, "length ≥ 15"),
        ("lookup", {"items": 1}, "items must be at least 2"),
        ("lookup", {"hops": 0}, "hops must be at least 1"),
        ("lookup", {"queries": 0}, "queries must be at least 1"),
        ("nth_latest", {"kinds": 12}, "kinds < vocab_size"),
        ("nth_latest", {"rank": 33}, "rank < length"),
        ("nth_latest", {"density": 1.0}, "density"),
        ("delay", {"delay": 24}, "delay ≤ length"),
        ("same_different", {"first": 63}, "ids below 64"),
        ("facts", {"answers_count": 17}, "answers_count ≤ vocab_size"),
        ("facts", {"table_seed": -1}, "table_seed"),
        ("for_and_against", {"groups": 1}, "groups must be at least 2"),
        ("for_and_against", {"symbols": 1}, "symbols must be at least 2"),
        ("for_and_against", {"each": 0}, "each must be at least 1"),
        ("for_and_against", {"queries": 0}, "queries must be at least 1"),
        ("for_and_against", {"vocab_size": 32}, "vocab_size ≥ 33"),
        ("for_and_against", {"length": 32}, "length ≥ 33"),
        ("delay", {"delai": 3}, "did you mean 'delay'"),
    ],
    ids=str,
)
def test_wrong_settings_are_named(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match="(?i)" + words.replace("(", r"\(")):
        make_task(name, **options)
