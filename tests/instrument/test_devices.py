"""Devices by name: what this machine lacks is refused in words, in one place, before anything is read or written."""

import re
from pathlib import Path

import pytest
import torch

import models
from case_studies import run_study
from workbench.instrument import devices
from workbench.instrument.devices import available_devices, checked_device
from workbench.lab.batches import TaskBatches
from workbench.lab.tasks import make_task
from workbench.lab.training import TrainingConfig, train


@pytest.fixture
def only_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch, only_cpu: None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.parametrize("asked", ["cuda", "cuda:1", torch.device("cuda"), "mps", "xpu:0"])
def test_a_device_that_is_not_here(only_cpu: None, asked: object) -> None:
    with pytest.raises(
        ValueError, match=rf"device='{re.escape(str(asked))}' is not available\. .*This machine has cpu\."
    ):
        checked_device(asked)


@pytest.mark.parametrize(("built", "why"), [(False, "built without CUDA"), (True, "no NVIDIA GPU or no driver")])
def test_why_there_is_no_cuda(only_cpu: None, monkeypatch: pytest.MonkeyPatch, built: bool, why: str) -> None:
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: built)
    with pytest.raises(ValueError, match=why):
        checked_device("cuda")


def test_a_name_that_is_none(two_gpus: None) -> None:
    with pytest.raises(ValueError, match=r"There is no device 'gpu'.*This machine has cpu, cuda:0, cuda:1\."):
        checked_device("gpu")
    with pytest.raises(ValueError, match=r"There is no device 'cuda0'\. Did you mean 'cuda:0'"):
        checked_device("cuda0")
    with pytest.raises(ValueError, match=r"There is no device 1\.5"):
        checked_device(1.5)


def test_devices_that_are_here(two_gpus: None) -> None:
    assert available_devices() == ["cpu", "cuda:0", "cuda:1"]
    for name in ("cpu", "cpu:0", "cuda", "cuda:0", "cuda:1", "meta"):
        assert checked_device(name) == torch.device(name)
    assert checked_device(None) is None
    with pytest.raises(ValueError, match=r"device='cuda:2' is not available\. This machine has cpu, cuda:0, cuda:1\."):
        checked_device("cuda:2")


def test_everything_that_takes_a_device_says_so(
    only_cpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models, trainings and case studies; nothing is opened or written before."""
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path / "runs"))
    words = "device='cuda' is not available"
    for call in (
        lambda: models.build("gpt2", device="cuda"),
        lambda: models.load("gpt-english", device="cuda"),
        lambda: models.load("nobody/nothing", device="cuda"),
        lambda: run_study("linear_attention_regression", "smoke", device="cuda"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    data = TaskBatches(make_task("parity", length=8), 2)
    with pytest.raises(ValueError, match=words):
        train(models.build("gpt2"), data, TrainingConfig(steps=1, device="cuda"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "runs").exists()


def test_the_commands_say_so(only_cpu: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from app.cli import main

    out = ["--out", str(tmp_path / "out")]
    for command in (
        ["train", "--model", "gpt2", "--task", "parity", *out],
        ["case", "retrieval_heads", "--smoke", *out],
    ):
        assert main([*command, "--device", "cuda", "--runs", str(tmp_path / "runs")]) != 0
        assert "error: device='cuda' is not available." in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_device_that_is_here_is_used() -> None:
    assert models.build("gpt2", device="cpu").W_E.device.type == "cpu"
    assert models.build("gpt2", device="meta").W_E.is_meta
    assert devices.checked_device("meta") is not None
    assert torch.equal(models.load("gpt2-random", device="cpu").W_E, models.build("gpt2").W_E)
