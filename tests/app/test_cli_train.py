"""`workbench train`: a real training of a tiny model, its finished folder, its run, and every way to type it wrongly."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import models
from app.commands import train as train_command
from app.commands._console import Failure
from probes.bdh import card_curve, measure_sparsity
from workbench.lab.runs import RunStore
from workbench.lab.tasks import make_task
from workbench.lab.training import TaskBatches

TINY = ("--task", "induction", "--task-set", "length=24", "--batch-size", "4", "--threads", "1")


def test_a_training_leaves_a_model_and_a_run(workbench: Callable, tmp_path: Path) -> None:
    out, runs = tmp_path / "first", tmp_path / "runs"
    options = ("--model", "retnet", "--set", "n_layers=1", *TINY, "--steps", "6", "--out", out, "--runs", runs)
    done = workbench("train", *options, "--json")
    assert done.code == 0, done.err
    model = models.load(done.json["model"])
    assert model.architecture == "retnet" and model.n_layers == 1
    assert done.json["model"] == str(out / "retnet-induction") and done.json["steps"] == 6

    run = RunStore(runs).open(done.json["run"])
    assert run.kind == "training" and run.model["architecture"] == "retnet" and run.model["provenance"] == "trained"
    assert run.model["name"] == "retnet-induction" and run.model["parameters"] == model.n_parameters()
    curve = [json.loads(line) for line in (out / "curve.jsonl").read_text().splitlines()]
    assert np.array_equal(run.array("train_loss"), np.float32([point["train_loss"] for point in curve]))
    assert run.array("step").tolist() == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(run.array("validation_loss")).tolist() == [False] * 5 + [True]
    assert done.json["validation_loss"] == curve[-1]["validation_loss"]


def test_a_bdh_is_watched_while_it_learns(workbench: Callable, tmp_path: Path) -> None:
    """Its card says how it became sparse; the last point is the finished model on the same held-out sequences."""
    options = ("--model", "bdh", *TINY, "--steps", "6", "--out", tmp_path / "out", "--runs", tmp_path / "runs", "--json")
    done = workbench("train", *options)
    assert done.code == 0, done.err
    model = models.load(done.json["model"])
    curve = card_curve(model.card)
    assert [point.step for point in curve] == [0, 5, 6]
    task = make_task("induction", length=24, seed=0)
    held_out = TaskBatches(task, 4).validation_batches()[0][0][:8, :-1]
    for point, of in ((curve[0], models.build("bdh", seed=0)), (curve[-1], model)):
        np.testing.assert_allclose(point.active["y"], measure_sparsity(of.eval(), held_out).mean("y"), atol=1e-5)
    assert curve[0].active["y"] != curve[-1].active["y"]


def test_a_bdh_that_reads_two_tokens_is_trained_without_a_watch(workbench: Callable, tmp_path: Path) -> None:
    options = ("--model", "bdh", "--corpus", "pydoc", "--context", "2", "--batch-size", "2", "--threads", "1", "--steps", "1")
    done = workbench("train", *options, "--out", tmp_path / "out", "--runs", tmp_path / "runs", "--json")
    assert done.code == 0, done.err
    assert "sparsity" not in models.load(done.json["model"]).card


def test_it_neither_overwrites_nor_resumes_by_accident(workbench: Callable, tmp_path: Path) -> None:
    options = ("train", "--model", "gpt2", "--set", "n_layers=1", *TINY, "--out", tmp_path / "t", "--runs", tmp_path)
    nothing = workbench(*options, "--steps", "2", "--resume")
    assert nothing.code == 1 and "no training in" in nothing.err
    first = workbench(*options, "--steps", "2", "--json")
    assert first.code == 0, first.err
    again = workbench(*options, "--steps", "2")
    assert again.code == 1 and "--resume" in again.err and "--restart" in again.err
    restarted = workbench(*options, "--steps", "2", "--restart", "--json")
    assert restarted.code == 0, restarted.err
    assert restarted.json["train_loss"] == first.json["train_loss"], "the same seed gives the same bits"


def test_an_interrupted_training_goes_on_bit_for_bit(
    workbench: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import workbench.lab.training as training

    def options(out: str) -> tuple[object, ...]:
        return ("train", "--model", "gpt2", "--set", "n_layers=1", *TINY, "--steps", "8", "--out", tmp_path / out,
                "--runs", tmp_path / "runs", "--json")  # fmt: skip

    whole = workbench(*options("whole"))
    real_train = training.train

    def interrupted(*arguments: object, **named: object) -> object:
        def after_three(point: training.CurvePoint, steps: int) -> None:
            if point.step == 3:
                signal.raise_signal(signal.SIGINT)

        return real_train(*arguments, **named, progress=after_three)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "train", interrupted)
    stopped = workbench(*options("parts"))
    assert stopped.code == 1 and stopped.out == "" and "stopped after step 3 of 8" in stopped.err
    monkeypatch.setattr(training, "train", real_train)
    resumed = workbench(*options("parts"), "--resume")
    assert resumed.code == 0, resumed.err
    for name in ("train_loss", "validation_loss", "tokens"):
        assert resumed.json[name] == whole.json[name]
    one, other = (models.load(tmp_path / folder / "gpt2-induction").state_dict() for folder in ("whole", "parts"))
    assert all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--model", "gpt2"], 2, "--corpus and --task"),
        (["--model", "gpt2", "--corpus", "pydoc", "--task", "copy"], 2, "--corpus and --task"),
        (["--model", "gpt2", "--corpus", "pydoc", "--task-set", "length=9"], 2, "goes with --task"),
        (["--model", "gpt2", *TINY, "--resume", "--restart"], 2, "exclude each other"),
        (["--task", "copy"], 2, "--model"),
        (["--model", "gtp2", *TINY], 1, "'gpt2'"),
        (["--model", "gpt2", "--config", "tinny", *TINY], 1, "'tiny'"),
        (["--model", "gpt2", "--set", "n_layer=2", *TINY], 1, "'n_layers'"),
        (["--model", "gpt2", "--set", "n_layers", *TINY], 1, "name=value"),
        (["--model", "gpt2", "--task", "inductoin"], 1, "'induction'"),
        (["--model", "gpt2", "--task", "induction", "--task-set", "lenth=9"], 1, "'length'"),
        (["--model", "gpt2", "--corpus", "pydok"], 1, "'pydoc'"),
    ],
)
def test_what_is_typed_wrongly_is_named(
    workbench: Callable, tmp_path: Path, options: list[str], code: int, words: str
) -> None:
    failed = workbench("train", *options, "--out", tmp_path / "out", "--steps", "1", "--runs", tmp_path)
    assert failed.code == code and words in failed.err, failed.err
    assert failed.out == "" and "Traceback" not in failed.err
    assert not (tmp_path / "out" / "checkpoint.safetensors").exists()


@pytest.mark.parametrize("name", ["gpt2", "gpt2-random"])
def test_a_model_from_a_whole_configuration(tmp_path: Path, name: str) -> None:
    from models.configs import config_to_json

    expected = models.build("gpt2", n_layers=2, d_model=16, seed=5)
    file = tmp_path / "config.json"
    for content in (
        config_to_json(expected.config),
        {"architecture": "gpt2", "config": config_to_json(expected.config)},
    ):
        file.write_text(json.dumps(content))
        built = train_command.build_model(name, str(file), [], seed=5)
        assert built.config == expected.config
        assert all(value.equal(expected.state_dict()[key]) for key, value in built.state_dict().items())
    file.write_text("[1, 2]")
    with pytest.raises(Failure, match="holds no configuration"):
        train_command.build_model(name, str(file), [], seed=5)


@pytest.mark.parametrize("name", sorted({record.architecture for record in models.list_models()}))
def test_every_architecture_takes_a_seed(name: str) -> None:
    one, same, other = (train_command.build_model(name, "tiny", [], seed).state_dict() for seed in (1, 1, 2))
    assert all(one[key].equal(same[key]) for key in one)
    assert not all(one[key].equal(other[key]) for key in one)


def test_settings_are_json_where_they_can_be() -> None:
    parsed = train_command.parse_settings(["n=4", "norm=rms", "tied=true", "rate=1e-3", "expression=a=b"], "--set")
    assert parsed == {"n": 4, "norm": "rms", "tied": True, "rate": 0.001, "expression": "a=b"}


@pytest.mark.parametrize(
    ("given", "name"),
    [("english", "english"), ("associative_recall", "associative-recall"), ("/a/b/My Text.v2.txt", "my-text-v2")],
)
def test_models_are_named_after_their_data(given: str, name: str) -> None:
    assert train_command.data_name(given) == name
