"""The table of `docs/probes.md`: every probe has its tests there, and the tests that it names exist."""

import re
from pathlib import Path

import pytest

import probes
from probes.battery import PROBES

ROOT = Path(__file__).resolve().parents[2]
SHARED = {"battery", "intervals", "progress"}  # parts of probes that measure nothing by themselves


def rows() -> list[list[str]]:
    text = (ROOT / "docs/probes.md").read_text(encoding="utf-8").split("## What each probe was tested on")[1]
    lines = [line for line in text.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


ROWS = rows()


def measuring_modules() -> list[str]:
    """Modules and packages of `probes`, those of `probes.bdh` each."""
    folder = Path(probes.__file__).parent
    found = {path.stem for path in folder.glob("[!_]*.py")} | {
        path.parent.name for path in folder.glob("*/__init__.py")
    }
    return sorted(found - SHARED - {"bdh"}) + sorted(f"bdh/{path.stem}" for path in (folder / "bdh").glob("[!_]*.py"))


def named(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


def test_every_probe_has_a_row() -> None:
    listed = {name for row in ROWS for name in named(row[0])}
    known = [*PROBES, *measuring_modules()]
    missing = [
        name for name in known
        if name not in listed and not any(each.endswith("…") and name.startswith(each[:-1]) for each in listed)
    ]  # fmt: skip
    assert not missing, f"docs/probes.md, the table at its end: add a row with the tests of {missing}"
    gone = [
        name
        for name in listed
        if name not in known and not (name.endswith("…") and any(k.startswith(name[:-1]) for k in known))
    ]
    assert not gone, f"docs/probes.md names probes that are not there: {gone}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_the_tests_of_a_row_exist(row: list[str]) -> None:
    """Of the first column of tests all, of the second those that are named; otherwise it says in words why there is none."""
    probe, planted, unmoved = row
    for cell in (planted, unmoved):
        for one in cell.split(", ") if "::" in cell else []:
            file, name = one.split("::")
            path = ROOT / "tests/probes" / Path(file).with_name(f"test_{Path(file).name}.py")
            assert path.is_file(), f"{probe}: there is no {path.name}"
            assert f"def test_{name}(" in path.read_text(encoding="utf-8"), f"{probe}: {path.name} has no test_{name}"
    assert "::" in planted and unmoved
