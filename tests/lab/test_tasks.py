import math
from itertools import islice, pairwise, permutations

import pytest
import torch

from workbench.lab.tasks import (
    AssociativeRecall,
    Copy,
    Counting,
    FlipFlop,
    Induction,
    Parity,
    Passkey,
    Permutations,
    SelectiveCopy,
    Task,
    list_tasks,
    make_task,
    register_task,
)  # fmt: skip

RECALL = ["copy", "induction", "associative_recall", "selective_copy", "passkey", "flip_flop"]
TRACKING = ["counting", "parity", "permutations"]
NAMES = RECALL + TRACKING
ELSEWHERE = [
    "delay",
    "facts",
    "for_and_against",
    "lookup",
    "nth_latest",
    "same_different",
]  # their own file: test_lookup_tasks.py


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_a_function_of_seed_step_and_split(name: str) -> None:
    task = make_task(name, seed=3)
    batch = task.batch(4, step=5)
    again = make_task(**task.describe()).batch(4, step=5)
    assert torch.equal(batch.tokens, again.tokens) and torch.equal(batch.loss_mask, again.loss_mask)
    assert all(torch.equal(batch.metadata[key], again.metadata[key]) for key in batch.metadata)
    others = [
        task.batch(4, step=6),
        task.batch(4, step=5, split="validation"),
        make_task(name, seed=4).batch(4, step=5),
    ]
    assert all(not torch.equal(batch.tokens, other.tokens) for other in others)
    streamed = list(islice(task.batches(4), 6))
    assert torch.equal(streamed[5].tokens, batch.tokens)


@pytest.mark.parametrize("name", RECALL)
@pytest.mark.parametrize("sizes", [{}, {"vocab_size": 17, "length": 33}, {"vocab_size": 200, "length": 24}])
def test_the_planted_source_holds_the_answer_and_lies_in_the_past(name: str, sizes: dict[str, int]) -> None:
    task = make_task(name, **sizes)
    batch = task.batch(16)
    tokens, loss_mask, metadata = batch
    assert batch.targets is tokens
    assert tokens.shape == loss_mask.shape == metadata["source"].shape == (16, task.length)
    assert tokens.dtype == torch.int64 and loss_mask.dtype == torch.bool
    assert tokens.min() >= 0 and tokens.max() < task.vocab_size
    assert torch.equal(loss_mask, metadata["source"] >= 0)
    assert bool(loss_mask.any(dim=1).all()) and not bool(loss_mask[:, 0].any())
    row, t = loss_mask.nonzero(as_tuple=True)
    source = metadata["source"][row, t]
    assert torch.equal(tokens[row, source], tokens[row, t])
    assert bool((source < t).all())  # at the query position t − 1 or before it


def test_copy_rows_follow_their_spec() -> None:
    task = Copy(vocab_size=12, length=40, min_span=3, max_span=9)
    tokens, loss_mask, metadata = task.batch(200)
    assert set(metadata["span"].tolist()) == set(range(3, 10))
    for row, mask, span in zip(tokens.tolist(), loss_mask, metadata["span"].tolist(), strict=True):
        start, marker = 40 - 2 * span - 2, 40 - span - 1
        assert row[start] == 10 and row[marker] == 11 and row.count(10) == row.count(11) == 1
        assert row[start + 1 : marker] == row[marker + 1 :]
        assert mask.nonzero().flatten().tolist() == list(range(marker + 1, 40))
    assert task.chance_loss == pytest.approx(math.log(10))


def test_induction_rows_repeat_with_varied_periods_and_prefixes() -> None:
    task = Induction(vocab_size=40, length=60, min_period=4, max_period=12, max_prefix=7)
    tokens, loss_mask, metadata = task.batch(300)
    assert set(metadata["period"].tolist()) == set(range(4, 13))
    assert set(metadata["prefix"].tolist()) == set(range(8))
    for i, (period, prefix) in enumerate(zip(metadata["period"].tolist(), metadata["prefix"].tolist(), strict=True)):
        row = tokens[i].tolist()
        segment = row[prefix : prefix + period]
        assert len(set(segment)) == period and not set(row[:prefix]) & set(segment)
        assert all(row[t] == segment[(t - prefix) % period] for t in range(prefix, 60))
        predictable = list(range(prefix + period + 1, 60))
        assert loss_mask[i].nonzero().flatten().tolist() == predictable
        assert all(metadata["source"][i, t] == t - period for t in predictable)


def test_the_induction_score_of_a_fixed_distance_is_perfect_only_at_a_fixed_period() -> None:
    """The confound that varied periods exist to remove: a head that looks back a constant distance."""

    def best_fixed_distance(task: Induction) -> float:
        _, loss_mask, metadata = task.batch(300)
        row, t = loss_mask.nonzero(as_tuple=True)
        distance = t - metadata["source"][row, t]
        return max((distance == d).double().mean().item() for d in range(1, task.length))

    assert best_fixed_distance(Induction(period=12, length=60)) == 1.0
    assert best_fixed_distance(Induction(min_period=4, max_period=16, length=60)) < 0.15


def test_the_control_offset_never_points_at_the_answer() -> None:
    for options in ({"min_period": 4, "max_period": 12}, {"period": 9}, {"period": 2}):
        tokens, loss_mask, metadata = make_task("induction", vocab_size=40, length=60, **options).batch(100)
        control = metadata["control_source"]
        assert bool((control[~loss_mask] == -1).all())
        row, t = (control >= 0).nonzero(as_tuple=True)
        assert len(row) > 0.8 * loss_mask.sum()
        assert bool((control[row, t] < t).all())
        assert not bool((tokens[row, control[row, t]] == tokens[row, t]).any())


def test_the_shuffled_control_keeps_counts_and_breaks_induction() -> None:
    task = Induction(vocab_size=40, length=60, period=10, max_prefix=0, shuffled=True)
    tokens, loss_mask, metadata = task.batch(200)
    for row in tokens.tolist():
        assert all(sorted(row[start : start + 10]) == sorted(row[:10]) for start in range(0, 60, 10))
    row_index, t = loss_mask.nonzero(as_tuple=True)
    agreement = (tokens[row_index, metadata["source"][row_index, t]] == tokens[row_index, t]).double().mean().item()
    assert agreement < 0.15  # chance is about one in ten


def test_associative_recall_rows_follow_their_spec() -> None:
    task = AssociativeRecall(vocab_size=40, length=64, pairs=6, queries=4)
    tokens, loss_mask, metadata = task.batch(200)
    for i in range(200):
        row = tokens[i].tolist()
        keys, values = row[0:12:2], row[1:12:2]
        assert len(set(keys)) == 6 and max(keys) < 20 <= min(values)
        answers = loss_mask[i].nonzero().flatten().tolist()
        assert len(answers) == 4 and len({row[t - 1] for t in answers}) == 4
        recall = dict(zip(keys, values, strict=True))
        for t in answers:
            assert recall[row[t - 1]] == row[t]
            assert row[metadata["key_source"][i, t]] == row[t - 1]
            assert metadata["source"][i, t] == metadata["key_source"][i, t] + 1
        queries = {t - 1 for t in answers}
        filler = [row[t] for t in range(12, 64) if t not in queries and t not in answers]
        assert not set(filler) & set(keys) and max(filler) < 20
    first_slots = (loss_mask[:, 13] & True).double().mean().item()
    late_slots = loss_mask[:, 63].double().mean().item()
    assert first_slots > 0.5 > 0.2 > late_slots  # the power law puts most queries early
    assert task.chance_loss == pytest.approx(math.log(20))


@pytest.mark.parametrize("name", TRACKING)
def test_tracked_answers_stand_beside_the_sequence(name: str) -> None:
    task = make_task(name, length=19)
    batch = task.batch(64)
    (tokens, loss_mask, metadata), targets = batch, batch.targets
    assert tokens.shape == targets.shape == loss_mask.shape == (64, 19)
    assert bool(loss_mask[:, 1:].all()) and not bool(loss_mask[:, 0].any())
    assert bool((metadata["source"] == -1).all())
    assert int(targets.min()) >= 0 and int(targets.max()) < task.vocab_size > int(tokens.max())
    assert bool((tokens != targets).any())


def test_parity_counts_every_one_so_far() -> None:
    batch = Parity(length=30, density=0.3).batch(100)
    tokens, targets = batch.tokens, batch.targets
    assert set(tokens.unique().tolist()) == {0, 1}
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert answers[1:] == [sum(row[:t]) % 2 for t in range(1, 30)]
    assert 0.25 < tokens.double().mean() < 0.35


@pytest.mark.parametrize("items", [2, 3, 5])
def test_permutations_are_composed_in_the_order_read(items: int) -> None:
    """Oracle: move real things about, one token at a time, and look the arrangement up."""
    count = math.factorial(items)
    table = list(permutations(range(items)))
    batch = Permutations(vocab_size=max(count, 4), length=12, items=items).batch(50)
    tokens, targets = batch.tokens, batch.targets
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        image = list(range(items))  # image[x] = where thing x is now
        for t in range(11):
            image = [table[row[t]][place] for place in image]
            assert answers[t + 1] == table.index(tuple(image))


def test_counting_resets_and_saturates() -> None:
    task = Counting(vocab_size=8, length=60, limit=3, density=0.6)
    batch = task.batch(100)
    tokens, targets = batch.tokens, batch.targets
    for row, answers in zip(tokens.tolist(), targets.tolist(), strict=True):
        for t in range(1, 60):
            since = max((i for i in range(t) if row[i] == 1), default=-1)
            assert answers[t] == min(3, row[since + 1 : t].count(0))
    assert set(targets[:, 1:].unique().tolist()) == {0, 1, 2, 3}


def test_flip_flop_reads_what_was_written_last() -> None:
    tokens, loss_mask, metadata = FlipFlop(vocab_size=5, length=41, ignore=0.7).batch(100)
    for i, row in enumerate(tokens.tolist()):
        stored, reads = None, []
        for at in range(1, 40, 2):
            if row[at - 1] == 2:
                stored = at
            elif row[at - 1] == 4:
                assert stored is not None and row[at] == row[stored] and metadata["source"][i, at] == stored
                reads.append(at)
        assert reads == loss_mask[i].nonzero().flatten().tolist() and reads[-1] == 39


def test_selective_copy_says_the_content_in_order() -> None:
    task = SelectiveCopy(vocab_size=20, length=40, content=5)
    tokens, loss_mask, metadata = task.batch(100)
    gaps = set()
    for i, row in enumerate(tokens.tolist()):
        assert row[34] == 19 and [t for t in row[:34] if t != 18] == row[35:]
        assert loss_mask[i].nonzero().flatten().tolist() == list(range(35, 40))
        gaps |= set((torch.arange(35, 40) - metadata["source"][i, 35:]).tolist())
    assert len(gaps) > 15  # no fixed distance solves it


def test_the_passkey_stands_where_the_depth_says() -> None:
    for depth, place in ((0.0, 0), (1.0, 50), (0.5, 25)):
        tokens, _, metadata = Passkey(vocab_size=32, length=60, key_length=4, depth=depth).batch(20)
        assert metadata["place"].tolist() == [place] * 20
        for row in tokens.tolist():
            assert [t for t, token in enumerate(row) if token == 31] == [place, 55]
            assert row[place + 1 : place + 5] == row[56:] and min(row[56:]) >= 15
            filler = row[:place] + row[place + 5 : 55]
            assert all((b - a) % 15 == 1 for a, b in pairwise(filler)) and max(filler) < 15
    assert len(set(Passkey(length=60).batch(50).metadata["place"].tolist())) > 20


def test_a_task_of_ones_own_is_listed_and_no_name_is_taken_twice() -> None:
    with pytest.raises(ValueError, match="'copy' is registered already"):
        register_task(type("Other", (Task,), {"name": "copy"}))


def test_the_list_of_tasks_is_complete_and_its_defaults_work() -> None:
    records = {record.name: record for record in list_tasks()}
    assert sorted(records) == sorted(NAMES + ELSEWHERE)
    for name, record in records.items():
        assert record.description.endswith(".") and "arXiv" in record.paper
        assert make_task(name, **record.options).describe() == make_task(name).describe()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_task("inductoin"), "Did you mean 'induction'"),
        (lambda: make_task("induction", periode=3), "no setting 'periode'.*Did you mean 'period'"),
        (lambda: make_task("copy").batch(4, split="valid"), "Did you mean 'validation'"),
        (lambda: make_task("copy").batch(0), "batch_size must be at least 1"),
        (lambda: Induction(vocab_size=16, period=16), "needs vocab_size > 16"),
        (lambda: Induction(length=32, period=30), "need length ≥ 37, got 32"),
        (lambda: Induction(period=8, max_period=9), "give either period, or"),
        (lambda: Copy(length=20, max_span=10), "min_span ≤ max_span ≤ 9"),
        (lambda: Parity(density=1.0), "between 0 and 1"),
        (lambda: Permutations(items=4), "need vocab_size ≥ 24, got 6"),
        (lambda: Counting(limit=12), "limit < vocab_size"),
        (lambda: FlipFlop(ignore=1.0), "below 1"),
        (lambda: SelectiveCopy(length=12, content=6), "content ≤ 5"),
        (lambda: Passkey(depth=1.5), "between 0 and 1"),
        (lambda: AssociativeRecall(vocab_size=10, pairs=5), "need more than 5 keys"),
        (lambda: AssociativeRecall(length=20, pairs=6), "need length ≥ 24"),
        (lambda: AssociativeRecall(pairs=3, queries=4), "1 ≤ queries ≤ pairs"),
        (lambda: Copy(length=4), "length must be at least 8"),
        (lambda: Copy(seed=-1), "seed must not be negative"),
    ],
)
def test_errors_name_the_setting_and_the_limit(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
