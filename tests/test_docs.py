"""The Python in the README and the guides runs as printed, top to bottom, and their links lead somewhere."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_CODE = [page for page in PAGES if "```python" in page.read_text()]


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.name)
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    """All Python blocks of a page, joined, exit without an error (in a process and folder of their own)."""
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)
    program = "import torch\ntorch.set_num_threads(1)\n" + "\n".join(blocks)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "WORKBENCH_RUNS": str(tmp_path / "runs")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


LINKED = [*PAGES, *sorted((ROOT / "case_studies").glob("*/README.md"))]
COMMANDS = sorted(
    {
        (page.name, line.partition("  #")[0].strip())
        for page in LINKED
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), flags=re.DOTALL)
        for line in re.sub(r"\\\n\s*", " ", block).splitlines()
        if line.startswith("workbench ")
    }
)


def prose(page: Path) -> str:
    """A page without its blocks of code, in which brackets mean something else."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What the headings of a page are linked as: lower case, without punctuation, spaces as hyphens, and a number behind repeated ones."""
    found: list[str] = []
    for heading in re.findall(r"^#+ +(.+?) *$", prose(page), flags=re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "").lower()
        slug = re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{sum(each.startswith(slug) for each in found)}")
    return set(found)


@pytest.mark.parametrize("page", LINKED, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_links_lead_somewhere(page: Path) -> None:
    """Relative links and pictures exist, inside the project, and the headings that they name are there."""
    for target in re.findall(r"\]\(([^()\s]+)(?: \"[^\"]*\")?\)", prose(page)):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists() and there.is_relative_to(ROOT), target
        if anchor:
            assert there.suffix == ".md" and anchor in anchors(there), f"{target}: {sorted(anchors(there))}"


def test_every_guide_is_listed_and_every_picture_shown() -> None:
    """Nothing lies in docs that no page leads to."""
    linked = {
        (page.parent / target.partition("#")[0]).resolve()
        for page in PAGES
        for target in re.findall(r"\]\(([^()\s]+)\)", prose(page))
    }
    lost = [
        path.name
        for path in (*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "screenshots").glob("*.png"))
        if path not in linked
    ]
    assert not lost, f"no page leads to {lost}"


def test_links_that_are_broken_are_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c\n## Twice\n## Twice\n```\n# no heading [x](nowhere)\n```\n")
    assert anchors(page) == {"a-b-c", "twice", "twice-1"} and "nowhere" not in prose(page)


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda part: part[:60])
def test_commands_are_typed_as_the_command_line_has_them(page: str, line: str) -> None:
    """Every command of the guides: it exists, its options too, and their values are of the right kind. Nothing is run."""
    from typer import BadParameter
    from typer.main import get_command

    from app.cli import build

    command: Any = get_command(build())
    words, context = shlex.split(line, comments=True)[1:], None
    while words and hasattr(command, "commands"):  # a group: the next word names one of its commands
        context = command.make_context(command.name, [], parent=context, resilient_parsing=True)
        asked = words[0]
        _, command, words = command.resolve_command(context, words)
        assert command is not None, f"there is no command {asked!r}"
    try:
        command.make_context(command.name, words, parent=context)
    except BadParameter as error:  # files of the reader's own are not here
        assert "does not exist" in str(error), error
