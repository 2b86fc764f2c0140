"""The catalogue of papers that the workbench covers, and which part of the workbench implements which paper.

A *paper* is a row of `data/catalogue.csv`, named by its slug. A *declaration* says that something here implements it:

    @implements("bert-attention", "probe", "head_distances")
    def head_distances(...): ...

    implements("rope", "position", "rotary", note="interleaved pairs only")

Declaring costs nothing at import: the slug is checked when the declarations are read. `gather` imports the modules that
declare something, and `coverage` joins their declarations with the papers.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

from workbench.instrument.errors import suggestion

CATALOGUE_FILE = Path(__file__).parent / "data" / "catalogue.csv"
KINDS = ("model", "mixer", "position", "probe", "intervention", "view", "task", "case_study")

Declared = TypeVar("Declared")


class UnknownPaper(KeyError):
    """No paper of the catalogue has this slug."""

    def __str__(self) -> str:  # KeyError would print the repr of the message
        return str(self.args[0]) if self.args else ""


@dataclass(frozen=True, slots=True)
class Paper:
    """One row of the catalogue.

    `tier` is the order of work: 1 first, 4 last, 0 for papers read as background, with nothing to build.
    `repo` is the authors' public code as they name it, `system_name` what the paper calls its system; either may be "".
    """

    slug: str
    title: str
    year: int
    kind: str
    family: str
    system_name: str
    tier: int
    repo: str


@dataclass(frozen=True, slots=True)
class Declaration:
    """`name`, a thing of this `kind`, implements the paper `slug`; `note` says what differs from the paper."""

    slug: str
    kind: str
    name: str
    note: str = ""
    module: str = ""


@dataclass(frozen=True, slots=True)
class Coverage:
    """A paper and everything that implements it, ordered by kind and name."""

    paper: Paper
    declarations: tuple[Declaration, ...]

    @property
    def covered(self) -> bool:
        return bool(self.declarations)

    def names(self, kind: str) -> list[str]:
        """Names of the implementing things of one kind. Raises ValueError for an unknown kind."""
        check_kind(kind)
        return [declaration.name for declaration in self.declarations if declaration.kind == kind]


_declarations: dict[tuple[str, str, str], Declaration] = {}


@cache
def _papers() -> dict[str, Paper]:
    with CATALOGUE_FILE.open(encoding="utf-8", newline="") as file:
        return {row["slug"]: _read_row(row) for row in csv.DictReader(file)}


def _read_row(row: dict[str, str]) -> Paper:
    year, tier = int(row.pop("year")), int(row.pop("tier"))
    return Paper(**row, year=year, tier=tier)


def load_catalogue() -> list[Paper]:
    """Every paper, ordered by slug."""
    return list(_papers().values())


def paper(slug: str) -> Paper:
    """The paper with this slug. Raises UnknownPaper, naming the nearest slugs, when there is none."""
    papers = _papers()
    if slug not in papers:
        raise UnknownPaper(f"No paper of the catalogue has the slug {slug!r}.{suggestion(slug, papers)}")
    return papers[slug]


def check_kind(kind: str) -> None:
    """Raises ValueError, naming the nearest kind, unless `kind` is one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"{kind!r} is no kind of implementation; kinds: {', '.join(KINDS)}.{suggestion(kind, KINDS)}")


def implements(slug: str, kind: str, name: str, note: str = "") -> Callable[[Declared], Declared]:
    """Declare that `name` implements the paper `slug`; a plain call, or a decorator that returns its object unchanged.

    `note` says what differs from the paper. Raises ValueError for an unknown kind, for an empty name, and when another
    module has declared the same thing. The slug is checked by `declarations`, not here: importing stays free.
    """
    check_kind(kind)
    if not name:
        raise ValueError(f"a declaration for paper {slug!r} needs the name of the thing that implements it")
    module = sys._getframe(1).f_globals.get("__name__", "")
    known = _declarations.get((slug, kind, name))
    if known is not None and known.module != module:
        raise ValueError(f"{kind} {name!r} already implements {slug!r}: declared in {known.module} and in {module}")
    _declarations[slug, kind, name] = Declaration(slug, kind, name, note, module)
    return lambda declared: declared


def declarations() -> list[Declaration]:
    """What the modules imported so far declare, ordered by slug, kind and name.

    Raises UnknownPaper for a declaration with a wrong slug, naming the module that holds it and the nearest slugs.
    """
    for declaration in _declarations.values():
        check_slug(declaration)
    return sorted(_declarations.values(), key=_order)


def check_slug(declaration: Declaration) -> None:
    """Raises UnknownPaper, naming the declaring module, unless the declaration's slug is in the catalogue."""
    try:
        paper(declaration.slug)
    except UnknownPaper as error:
        where = f" in {declaration.module}" if declaration.module else ""
        raise UnknownPaper(f"{declaration.kind} {declaration.name!r}{where}: {error}") from None


def gather(packages: Iterable[str]) -> list[Declaration]:
    """Import every module of these packages that calls `implements`, and return all declarations.

    Only files whose text contains the call are imported, so a dashboard page or a heavy wrapper that declares nothing
    stays unloaded. Raises ModuleNotFoundError for an unknown package, UnknownPaper for a wrong slug.
    """
    for package in packages:
        for module in declaring_modules(package):
            import_module(module)
    return declarations()


def declaring_modules(package: str) -> list[str]:
    """Dotted names of the modules in a package whose source calls `implements`, found by reading, not importing."""
    spec = find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ModuleNotFoundError(f"there is no package {package!r} to gather declarations from", name=package)
    found = []
    for location in map(Path, spec.submodule_search_locations):
        for path in sorted(location.rglob("*.py")):
            if re.search(r"^\s*@?(catalogue\.)?implements\(", path.read_text(encoding="utf-8"), re.MULTILINE):
                parts = path.relative_to(location).with_suffix("").parts
                found.append(".".join([package, *(part for part in parts if part != "__init__")]))
    return [module for module in found if module != __name__]


def coverage(records: Iterable[Declaration]) -> list[Coverage]:
    """Every paper of the catalogue with the records that implement it. Raises UnknownPaper for a wrong slug."""
    by_slug: dict[str, list[Declaration]] = {slug: [] for slug in _papers()}
    for record in records:
        check_slug(record)
        check_kind(record.kind)
        by_slug[record.slug].append(record)
    return [Coverage(paper(slug), tuple(sorted(found, key=_order))) for slug, found in by_slug.items()]


def _order(declaration: Declaration) -> tuple[str, int, str]:
    return declaration.slug, KINDS.index(declaration.kind), declaration.name
