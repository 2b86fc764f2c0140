"""Shared test settings: one thread, no network, runs in a temporary folder, and no browser test skipped in CI."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.references import transformers_in_plain_torch

# Set before the first import of torch or a tokenizer, and inherited by the subprocesses that some tests start.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "disabled"


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Torch computes on one thread, so that results repeat and parallel test runs do not fight for cores."""
    import torch

    torch.set_num_threads(1)


def pytest_configure() -> None:
    transformers_in_plain_torch()


@pytest.fixture(scope="session", autouse=True)
def runs_in_a_temporary_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """No test writes into the checkout's own `runs/`: the default runs root is a fresh temporary folder."""
    root = tmp_path_factory.mktemp("runs")
    before = os.environ.get("WORKBENCH_RUNS")
    os.environ["WORKBENCH_RUNS"] = str(root)
    yield root
    if before is None:
        del os.environ["WORKBENCH_RUNS"]
    else:
        os.environ["WORKBENCH_RUNS"] = before


def in_ci() -> bool:
    return os.environ.get("CI", "").lower() in {"1", "true", "yes"}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI a browser test that skips itself fails: a skipped check is never reported as passed."""
    report = yield
    if report.skipped and in_ci() and item.get_closest_marker("browser") and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"browser tests may not skip in CI, but {item.nodeid} did: {reason}"
    return report
