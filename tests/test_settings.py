"""The settings that every test runs under hold: threads, runs root, and no skipped browser test in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_floors import ROOT

SKIPPING = """
import pytest

@pytest.mark.browser
def test_with_a_browser():
    pytest.skip("no browser here")

def test_without():
    pytest.skip("something else is missing")
"""


@pytest.mark.parametrize(("ci", "summary"), [("true", "1 failed, 1 skipped"), ("", "2 skipped")])
def test_a_browser_test_may_not_skip_in_ci(tmp_path: Path, ci: str, summary: str) -> None:
    file = tmp_path / "test_planted.py"
    file.write_text(SKIPPING)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-c", ROOT / "pyproject.toml", "-p", "tests.conftest", file],
        cwd=ROOT,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        check=False,
    )
    assert summary in done.stdout.splitlines()[-1], done.stdout
    assert ("may not skip in CI" in done.stdout) == bool(ci)


def test_torch_computes_on_one_thread() -> None:
    import torch

    assert torch.get_num_threads() == 1


def test_runs_go_to_a_temporary_folder() -> None:
    assert not Path(os.environ["WORKBENCH_RUNS"]).is_relative_to(ROOT)
