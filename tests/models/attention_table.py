"""What every part of the attention site and every way through the blocks is compared with, read from attention_parity.toml.

Tests take their tolerance from the list (the fixture `agrees`); `test_attention_page.py` holds it to the registry, to the tests that it
names and to docs/attention-parity.md, which `python -m tests.models.attention_page` writes.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SPECIAL = "test_attention_reductions.py::test_special_settings"
EXACT = 1e-10
_READ = tomllib.loads(Path(__file__).with_name("attention_parity.toml").read_text())
VERSIONS: dict[str, str] = _READ["versions"]
WHOLE: dict[str, dict[str, str]] = _READ["whole"]


@dataclass(frozen=True)
class Parity:
    """package: one of VERSIONS. reference: what of it. test: file::function. differs: where the reference is another thing, and what the
    test does about it. tolerance: largest difference, relative to the largest entry where that is above 1."""

    package: str
    reference: str
    test: str
    differs: str = ""
    tolerance: float = EXACT


@dataclass(frozen=True)
class Reduction:
    """words: in which case it is what. test: file::function. case: of `CASES` there, where the test is SPECIAL."""

    words: str
    test: str = SPECIAL
    case: str = ""


@dataclass(frozen=True)
class Entry:
    """kind: of its configuration, or "". setting: what it is called by `attention_page.parts_in` where it is a field of another
    configuration. alone: why nothing is compared with, where that is so."""

    name: str
    stage: str
    kind: str
    setting: str
    parities: tuple[Parity, ...]
    reductions: tuple[Reduction, ...]
    alone: str


def _entry(fields: dict[str, Any]) -> Entry:
    parities = tuple(Parity(**parity) for parity in fields.pop("parities", ()))
    reductions = [Reduction(**reduction) for reduction in fields.pop("reductions", ())]
    reductions += [
        Reduction(words, case=f"{fields['kind']}: {case}") for case, words in fields.pop("special", {}).items()
    ]
    return Entry(**{"kind": "", "setting": "", "alone": "", **fields}, parities=parities, reductions=tuple(reductions))


ENTRIES = [_entry(fields) for fields in _READ["entry"]]


def tolerance(test: str) -> float:
    """That of the comparisons made by the test function of this name.

    Raises:
        ValueError: a test that no entry names, or entries that disagree.
    """
    named = [parity for entry in ENTRIES for parity in entry.parities if parity.test.split("::")[1] == test]
    found = {parity.tolerance for parity in named}
    if len(found) != 1:
        raise ValueError(
            f"The entries of attention_parity.toml that name {test} have the tolerances {sorted(found)}; expected one."
        )
    return found.pop()


def kinds() -> set[str]:
    """Of all configurations in the list."""
    return {entry.kind for entry in ENTRIES} - {""}
