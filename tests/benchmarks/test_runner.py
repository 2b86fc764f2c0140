"""The benchmark runner finds the files, takes rows in every form, puts the goal beside the ratio, and never judges."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks import Row
from tests.benchmarks.__main__ import as_row, find_benchmarks, main

PLANTED = """
from tests.benchmarks import Row
from types import SimpleNamespace
def run():
    return [
        Row("cached / raw", 1.5, 1.02, note="copy 12 GB/s"),
        {"name": "loop / chunked", "ratio": 9.0, "limit": 8.0, "at_least": True},
        SimpleNamespace(name="bytes", ratio=0.25, limit=None, unit="bytes"),
    ]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "bench_cache.py").write_text(PLANTED)
    (tmp_path / "bench_broken.py").write_text("def run():\n    raise RuntimeError('oracle disagrees')\n")
    (tmp_path / "helper.py").write_text("raise RuntimeError('not a benchmark')\n")
    return tmp_path


def test_files_are_found_by_name(folder: Path) -> None:
    assert list(find_benchmarks(folder)) == ["broken", "cache"]


def test_the_table_puts_the_goal_beside_the_ratio(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "cache"], folder) == 0, "missing a goal is a result, not a failure"
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["benchmark", "measured", "ratio", "goal", "met", "unit", "note"]
    assert lines[0].split() == ["cache", "cached", "/", "raw", "1.5", "≤", "1.02", "NO", "time", "copy", "12", "GB/s"]
    assert lines[1].split() == ["cache", "loop", "/", "chunked", "9", "≥", "8", "yes", "time"]
    assert lines[2].split() == ["cache", "bytes", "0.25", "bytes"]


def test_json_holds_the_same_and_a_raising_benchmark_is_reported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--json"], folder) == 1
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    assert result["failed"] == ["broken"] and "oracle disagrees" in printed.err
    assert [(row["ratio"], row["limit"], row["within"]) for row in result["rows"]] == [
        (1.5, 1.02, False),
        (9.0, 8.0, True),
        (0.25, None, None),
    ]


def test_an_unknown_name_is_a_usage_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--only", "cach"], folder)
    assert stop.value.code == 2 and "Did you mean 'cache'" in capsys.readouterr().err


def test_a_row_with_wrong_fields_and_no_rows_at_all_are_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(TypeError, match="name, ratio"):
        as_row({"name": "x", "ratio": 1.0, "goal": 2.0})
    with pytest.raises(TypeError, match="name, ratio"):
        as_row({"name": "x"})
    (tmp_path / "bench_empty.py").write_text("def run():\n    return []\n")
    assert main([], tmp_path) == 1 and "returned no rows" in capsys.readouterr().err


def test_goals_in_both_directions() -> None:
    assert Row("x", 1.0, 1.0).within and Row("x", 1.0, 1.0, at_least=True).within
    assert not Row("x", 1.1, 1.0).within and not Row("x", 0.9, 1.0, at_least=True).within
