"""The parts against planted truth: sizes, what counts as beyond, the choice of the rate, the pictures; the study end to end."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from case_studies import run_study
from case_studies.harness.evidence import summarise
from case_studies.who_can_do_what import cells, mixers, pictures, study
from case_studies.who_can_do_what.cells import TASKS
from case_studies.who_can_do_what.mixers import MIXERS
from workbench.lab.checkpoints import write_json
from workbench.lab.jobs import JobCancelled
from workbench.lab.runs import RunStore
from workbench.lab.tasks import TaskBatch
from workbench.lab.training import TrainingDiverged

SETTINGS: dict[str, Any] = {"steps": 2, "selection_steps": 1, "batch": 4, "held_out": 8, "rates": [0.005, 0.02]}


@pytest.mark.parametrize("mixer", MIXERS)
def test_all_models_have_the_same_size(mixer: str) -> None:
    model = mixers.build(mixer, seed=3)
    assert mixers.parameters(model) == pytest.approx(mixers.PARAMETERS, rel=0.005)
    assert model.config.seed == 3


def test_the_memories_that_are_compared_hold_equally_many_numbers() -> None:
    """Layer state of the delta rule and of its control, without the windows of the convolutions."""
    for mixer in ("mamba2", "gated-deltanet", "deltanet", "simple-gla", "gla"):
        _, state = mixers.build(mixer, 0)(torch.zeros(1, 9, dtype=torch.long), return_state=True)
        assert state.slot(0, "state").numel() == mixers.HEADS * mixers.D_KEY * mixers.D_VALUE


def test_groups_and_names() -> None:
    groups = mixers.POSITIVE + mixers.TURNING + mixers.NONLINEAR + ("softmax",)
    assert sorted(groups) == sorted(MIXERS) and set(mixers.CHOOSING) < set(mixers.POSITIVE)
    with pytest.raises(ValueError, match="Did you mean 'mamba' or 'mamba2'"):
        mixers.build("mamba3", 0)


class ParityOracle(nn.Module):
    """Says the parity of what it has read, but its opposite before position `right_from`."""

    def __init__(self, right_from: int) -> None:
        super().__init__()
        self.right_from = right_from

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, pos] -> [batch, pos, 4]."""
        wrong = torch.arange(tokens.shape[1]) < self.right_from
        return nn.functional.one_hot((tokens.cumsum(1) + wrong) % 2, 4).float()


def test_beyond_counts_only_answers_past_the_training_length() -> None:
    """Position p answers token p + 1; training has answers up to token length − 1, so position length − 1 is the first new one."""
    task = cells.task_of("parity", 0)
    right_later: Any = ParityOracle(task.length - 1)
    assert cells.accuracy(right_later, task, 16) == 0.0 and cells.accuracy_beyond(right_later, task, 16) == 1.0
    one_late: Any = ParityOracle(task.length)
    assert cells.accuracy_beyond(one_late, task, 16) == pytest.approx(1 - 1 / (task.length - 1))


@pytest.mark.parametrize("name", TASKS)
def test_rows_twice_as_long_ask_beyond_and_chance_is_what_guessing_gives(name: str) -> None:
    task = cells.task_of(name, 0)
    longer = cells.twice_as_long(task)
    batch = longer.batch(64, 0, "validation")
    assert longer.length - 1 == 2 * (task.length - 1)
    assert batch.loss_mask[:, task.length :].any() and int(batch.targets.max()) < mixers.VOCAB
    asked = batch.targets[batch.loss_mask]
    values, counts = asked.unique(return_counts=True)
    assert cells.chance(task) == pytest.approx(1 / len(values)) and counts.min() > 0.3 * len(asked) / len(values)


def test_held_out_rows_differ_between_seeds() -> None:
    first, second = (cells.task_of("parity", seed).batch(4, 0, "validation").tokens for seed in (0, 1))
    assert not torch.equal(first, second)


def test_the_rate_with_the_smallest_loss_wins_and_divergence_loses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    losses = {0.001: 0.7, 0.01: 0.2, 0.1: math.nan}
    seeds = []

    def fake(mixer: str, task: str, seed: int, rate: float, *rest: Any) -> tuple[None, Any]:
        seeds.append(seed)
        if math.isnan(losses[rate]):
            raise TrainingDiverged("planted")
        return None, SimpleNamespace(validation_loss=losses[rate])

    monkeypatch.setattr(cells, "_train", fake)
    settings = {**SETTINGS, "rates": list(losses)}
    assert cells.settled_rate("gru", "parity", 5, settings, tmp_path, threading.Event()) == 0.01
    assert set(seeds) == {5 + cells.SELECTION_SEED}, "another seed than the one that is reported"


def test_a_cell_is_kept_and_a_cancelled_one_goes_on(tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(JobCancelled):
        cells.measure_cell("elman", "parity", 0, SETTINGS, tmp_path, stop)
    assert not (tmp_path / "cell.json").exists()
    cell = cells.measure_cell("elman", "parity", 0, SETTINGS, tmp_path, threading.Event())
    assert cell["rate"] in SETTINGS["rates"] and cell["chance"] == 0.5
    again = cells.trained_model("elman", "parity", 0, cell, SETTINGS, tmp_path)
    assert cells.accuracy(again, cells.task_of("parity", 0), 8) == cell["accuracy"]
    write_json(tmp_path / "cell.json", {**cell, "accuracy": 0.123})
    assert cells.measure_cell("elman", "parity", 0, SETTINGS, tmp_path, stop)["accuracy"] == 0.123


def test_planted_share_of_made_patterns() -> None:
    """Head 0 reads the source alone (with a negative sign), head 1 everything alike."""
    batch = TaskBatch(
        torch.zeros(1, 5, dtype=torch.long),
        torch.tensor([[False, False, False, True, True]]),
        {"source": torch.tensor([[-1, -1, -1, 1, 0]])},
    )
    pattern = torch.ones(1, 2, 4, 4).tril()
    pattern[0, 0, 2:] = torch.tensor([[0.0, -2.0, 0.0, 0.0], [-2.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(pictures.planted_share(pattern, batch), torch.tensor([1.0, (1 / 3 + 1 / 4) / 2]))


def test_the_number_that_goes_with_parity_is_found_and_judged_on_other_rows() -> None:
    """Of 40 planted numbers one is minus the parity on every row and one only on the rows by which the choice is made."""
    task = cells.task_of("parity", 0)
    tokens = task.batch(pictures.ROWS, 0, "validation").tokens
    truth = (tokens.cumsum(1) % 2).float()
    numbers = torch.randn(*tokens.shape, 40, generator=torch.Generator().manual_seed(0))
    expected = np.corrcoef(numbers[:, :, 3].flatten(), truth.flatten())[0, 1]
    assert float(pictures.correlations(numbers, truth)[3]) == pytest.approx(expected, abs=1e-6)
    assert float(pictures.correlations(torch.ones(2, 3, 1), truth[:2, :3])[0]) == 0

    def seen(numbers: Tensor) -> dict[str, Any]:
        model: Any = SimpleNamespace(n_layers=1, states=lambda tokens, positions: {0: numbers})
        return pictures.parity_picture(model, task)

    lucky = numbers.clone()
    lucky[: pictures.ROWS // 2, :, 7] = truth[: pictures.ROWS // 2]
    assert abs(seen(lucky)["correlation"]) < 0.1
    numbers[:, :, 12] = -truth
    found = seen(numbers)
    assert found["correlation"] == pytest.approx(1.0) and np.array_equal(found["trace"], found["parity"])


class SignOracle(nn.Module):
    """Answers a product of permutations of three with the identity if it is even, else with the exchange of the last two."""

    EVEN = (0, 3, 4)  # in lexicographic order: the identity and the two rotations

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, pos] -> [batch, pos, 16]."""
        odd = torch.tensor([number not in self.EVEN for number in range(6)]).long()
        return nn.functional.one_hot(odd[tokens].cumsum(1) % 2, 16).float()


def test_the_sign_can_be_right_where_the_permutation_is_not() -> None:
    task = cells.task_of("permutations", 0)
    oracle: Any = SignOracle()
    assert pictures.right_sign(oracle, cells.twice_as_long(task), task.length) == 1.0
    assert cells.accuracy_beyond(oracle, task, 256) == pytest.approx(1 / 3, abs=0.02)
    always_odd: Any = lambda tokens: oracle(tokens).roll(1, -1)  # noqa: E731 0 -> 1 and 1 -> 2, both odd
    assert pictures.right_sign(always_odd, cells.twice_as_long(task), task.length) == pytest.approx(0.5, abs=0.05)


def test_what_the_claims_are_given() -> None:
    table = {(mixer, task): {"accuracy": 0.5, "beyond": 0.25} for mixer in MIXERS for task in TASKS}
    table["lstm", "parity"] = {"accuracy": 1.0, "beyond": 0.9}
    table["deltanet-negative", "parity"] = {"accuracy": 1.0, "beyond": 0.8}
    table["gla", "selective_copy"] = {"accuracy": 0.9, "beyond": 0.0}
    table["gated-deltanet", "associative_recall"] = {"accuracy": 0.75, "beyond": 0.0}
    measured = study.measurements(table)
    assert (measured["parity_nonlinear"], measured["parity_turning"], measured["parity_positive"]) == (0.9, 0.8, 0.25)
    assert measured["parity_negative_gain"] == pytest.approx(0.55) and measured["recall_delta_gain"] == 0.25
    assert measured["copy_choosing_best"] == 0.9 and measured["copy_choosing_gain"] == pytest.approx(0.1)


@pytest.mark.parametrize(("within", "beyond", "holds"), [(1.0, 0.5, True), (1.0, 0.95, False), (0.9, 0.1, False)])
def test_the_rule_of_the_passkey(within: float, beyond: float, holds: bool) -> None:
    measured = {"passkey_softmax": summarise("a", within), "passkey_softmax_beyond": summarise("b", beyond)}
    assert study.passkey_within_and_not_beyond(measured)[0] is holds


def test_the_study_runs(tmp_path: Path) -> None:
    """The smoke tier end to end: every cell, every picture; it decides no claim."""
    result = run_study("who_can_do_what", "smoke", store=RunStore(tmp_path))
    assert {claim.verdict for claim in result.claims} == {"not run here"}
    run = RunStore(tmp_path).open(result.run)
    assert run.figures() == ["parity.json", "patterns.json", "retention.json", "table.json"]
    assert run.array("accuracy").shape == (1, len(MIXERS), len(TASKS))
    kept = run.array("kept.mamba2")
    assert np.isnan(kept[0, 1]) and np.abs(kept[np.tril_indices(len(kept))]).max() <= 1 + 1e-5
