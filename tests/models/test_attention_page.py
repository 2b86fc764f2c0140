"""attention_parity.toml: everything that is registered is in it, every test that it names is there, and the docs page is what it says."""

import ast
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest

import models.attention
from models.attention.stages import part_configs
from models.mixers import mixer_configs
from models.parts.channel_mixers import MLPConfig
from models.wiring import build_wiring
from tests.models import attention_page
from tests.models.attention_page import PAGE, STAGES, page, users
from tests.models.attention_table import ENTRIES, SPECIAL, VERSIONS, WHOLE, kinds, tolerance
from tests.models.pretrained.reference import CASES as WHOLE_CASES
from tests.models.test_attention_reductions import CASES

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
COMPARING = ("test_attention_parity.py", "test_attention_x_transformers.py", "test_attention_packages.py")


@cache
def functions(file: str) -> dict[str, ast.FunctionDef]:
    tree = ast.parse((HERE / file).read_text())
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def named_tests() -> set[str]:
    lists = [*(entry.parities for entry in ENTRIES), *(entry.reductions for entry in ENTRIES)]
    return {one.test for several in lists for one in several} | {whole["test"] for whole in WHOLE.values()}


def test_the_page_is_what_the_list_says() -> None:
    assert PAGE.read_text() == page(), "run `python -m tests.models.attention_page`"


def test_everything_registered_is_listed() -> None:
    """Parts, wirings, and mixers of models/attention; and no kind that is no longer there."""
    folder = models.attention.__name__
    mixers = {kind for kind, config in mixer_configs().items() if config.__module__.startswith(folder)}
    with pytest.raises(TypeError):  # registers the wirings
        build_wiring(MLPConfig(1), None)
    nested = set(part_configs())
    assert kinds() - {"knowledge"} == nested | mixers
    settings = {entry.setting for entry in ENTRIES} - {""}
    for name, used in users().items():
        assert used - kinds() - settings <= {"mlp"}, name
    assert settings <= set().union(*users().values())


def test_every_named_test_is_there() -> None:
    for test in named_tests():
        file, function = test.split("::")
        assert function in functions(file), test
    assert {one.case for entry in ENTRIES for one in entry.reductions if one.test == SPECIAL} == set(CASES)


def test_every_comparison_is_listed() -> None:
    """Tests that take their tolerance from the list are in it, and what it lists of these files takes it from there."""
    asking = {
        f"{file}::{name}"
        for file in COMPARING
        for name, node in functions(file).items()
        if any(argument.arg == "agrees" for argument in node.args.args)
    }
    assert asking == {test for test in named_tests() if test.split("::")[0] in COMPARING}
    assert all(0 < tolerance(test.split("::")[1]) <= 1e-6 for test in asking)


def test_versions_are_the_pinned_ones() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    group = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["parity"]
    for name, version in VERSIONS.items():
        assert pinned[name.lower()] == version
        assert name in ("transformers", "scipy") or f"{name}=={version}" in group


def test_entries_are_whole() -> None:
    """Compared with something or with a reason why not, of a known stage and package; whole architectures have their class."""
    for entry in ENTRIES:
        assert bool(entry.parities) != bool(entry.alone), entry.name
        assert entry.stage in STAGES and (entry.parities or entry.reductions)
        assert {one.package for one in entry.parities} <= set(VERSIONS)
        assert all(one.words and one.test for one in entry.reductions)
    assert set(WHOLE) <= set(users())
    for name, whole in WHOLE.items():
        if "case" in whole:
            case = WHOLE_CASES[whole["case"]]
            assert (case.model, case.exact) == (whole["class"], 1e-10), name


def test_powers_of_ten() -> None:
    assert attention_page._digits(1e-10) == "10⁻¹⁰"
