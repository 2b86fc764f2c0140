"""Sparsity over training: the numbers of the weights at each step, training itself untouched, stops and restarts."""

import json
from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor

from models.bdh.model import BDH
from probes.bdh.sparsity import measure_sparsity
from probes.bdh.sparsity_training import CURVE, SparsityWatch, over_steps, read_sparsity
from tests.probes.bdh_naive import tiny_model
from workbench.lab.tasks import make_task
from workbench.lab.training import CurvePoint, TaskBatches, TrainingConfig, train


def learner() -> BDH:
    return tiny_model(n_neurons=16, vocab_size=32, dropout=0.2)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 32, (3, 14), generator=torch.Generator().manual_seed(1))


def batches() -> TaskBatches:
    return TaskBatches(make_task("induction", vocab_size=32, length=16), 4)


def settings(steps: int = 6) -> TrainingConfig:
    return TrainingConfig(
        steps=steps, learning_rate=1e-2, warmup=0, schedule="constant", eval_every=6, checkpoint_every=3
    )


def weights_after(steps: int, folder: Path) -> BDH:
    model = learner()
    train(model, batches(), settings(steps), folder, progress=lambda point, total: None)
    return model.eval()


def test_every_point_is_the_model_at_its_step_and_training_is_untouched(tokens: Tensor, tmp_path: Path) -> None:
    model, seen = learner(), []
    watch = SparsityWatch(
        model, tokens, every=4, folder=tmp_path / "watched", then=lambda point, total: seen.append(point.step)
    )
    train(model, batches(), settings(), tmp_path / "watched", progress=watch)
    assert [point.step for point in watch.curve] == [0, 4, 6] and seen == [1, 2, 3, 4, 5, 6] and not model.training
    plain = {0: learner().eval(), 4: weights_after(4, tmp_path / "four"), 6: weights_after(6, tmp_path / "six")}
    for name, weight in plain[6].state_dict().items():
        assert torch.equal(weight, model.state_dict()[name]), name  # measuring changes no bit of the training
    for point in watch.curve:
        expected = measure_sparsity(plain[point.step], tokens)
        for name in ("x", "gate", "y"):
            assert torch.equal(torch.tensor(point.active[name]), expected.mean(name))
            assert point.dead[name] == expected.dead(name).tolist()
        assert point.correlation == pytest.approx(expected.correlation("y").value.tolist())
        logits = plain[point.step](tokens).log_softmax(-1)
        nats = -logits[:, :-1].gather(-1, tokens[:, 1:, None]).mean()
        assert point.surprisal == pytest.approx(nats.item(), rel=1e-5)
    steps, shares = watch.over_steps("y")
    assert steps.tolist() == [0, 4, 6] and shares.shape == (3, 3)
    assert torch.allclose(shares, torch.stack([watch.over_steps("y", head)[1] for head in range(2)]).mean(0))
    assert read_sparsity(tmp_path / "watched") == watch.curve
    assert not list((tmp_path / "watched").glob(".*.tmp"))


def test_a_stopped_training_goes_on_with_the_same_curve(tokens: Tensor, tmp_path: Path) -> None:
    def measured(folder: Path, stop_after: int | None) -> SparsityWatch:
        model, cancel = learner(), Event()

        def stop(point: CurvePoint, total: int) -> None:
            if point.step == stop_after:
                cancel.set()

        watch = SparsityWatch(model, tokens, every=2, folder=folder, then=stop)
        train(model, batches(), settings(), folder, progress=watch, cancel=cancel)
        return watch

    whole = measured(tmp_path / "whole", None)
    part = measured(tmp_path / "part", 5)
    assert [point.step for point in part.curve] == [0, 2, 4]
    assert measured(tmp_path / "part", None).curve == whole.curve == read_sparsity(tmp_path / "part")
    model = learner()  # begun anew in the same folder: nothing of the old curve is left
    watch = SparsityWatch(model, tokens, every=3, folder=tmp_path / "part")
    train(model, batches(), settings(), tmp_path / "part", resume=False, progress=watch)
    assert [point.step for point in read_sparsity(tmp_path / "part")] == [0, 3, 6]


def test_mistakes_are_named(tokens: Tensor, tmp_path: Path) -> None:
    watch = SparsityWatch(learner(), tokens, every=1)
    assert read_sparsity(tmp_path) == []
    with pytest.raises(ValueError, match="at least 1 step"):
        SparsityWatch(learner(), tokens, every=0)
    with pytest.raises(ValueError, match="Expected one of x, gate, y"):
        watch.over_steps("z")
    with pytest.raises(ValueError, match=r"0\.\.1"):
        over_steps(watch.curve, "y", 2)
    (tmp_path / CURVE).write_text(json.dumps({"step": 1}))
    with pytest.raises(ValueError, match="no curve of sparsity"):
        read_sparsity(tmp_path)
