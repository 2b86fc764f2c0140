"""`workbench catalogue`: the papers, and what here implements each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from app.commands._console import Failure, add_row, counted, facts_table, new_table, note, print_json, stdout
from app.commands._options import AsJson, complete_slugs

if TYPE_CHECKING:
    from workbench.lab.catalogue import Coverage

PANEL = "What is here"


def command(
    slug: Annotated[
        str | None, typer.Argument(help="One paper, by its slug.", autocompletion=complete_slugs, show_default=False)
    ] = None,
    covered: Annotated[bool, typer.Option("--covered", help="Only papers that something here implements.")] = False,
    missing: Annotated[
        bool, typer.Option("--missing", help="Only papers with work to do that nothing implements.")
    ] = False,
    family: Annotated[str | None, typer.Option(help="Only papers of this family.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """The papers, and what here implements them.

    `--missing` leaves out the papers that were read as background (tier 0): nothing of them is to be built.
    """
    from app.coverage import full_coverage
    from workbench.instrument.errors import suggestion
    from workbench.lab.catalogue import paper

    if covered and missing:
        raise typer.BadParameter("--covered and --missing exclude each other")
    entries = full_coverage()
    if family is not None:
        families = {entry.paper.family for entry in entries}
        if family not in families:
            raise Failure(
                f"the catalogue has no family {family!r}.{suggestion(family, families)}",
                f"Families: {', '.join(sorted(families))}",
            )
        entries = [entry for entry in entries if entry.paper.family == family]
    if slug is not None:
        entries = [entry for entry in entries if entry.paper == paper(slug)]
    if covered:
        entries = [entry for entry in entries if entry.covered]
    if missing:
        # Tier 0 papers are background reading: nothing of them is missing.
        entries = [entry for entry in entries if not entry.covered and entry.paper.tier > 0]
    if as_json:
        print_json([as_record(entry) for entry in entries])
    elif slug is not None and entries:
        show(entries[0])
    else:
        listing(entries)


def as_record(entry: Coverage) -> dict[str, Any]:
    """A paper's columns, and under each kind of implementation what there is of it."""
    from workbench.lab.catalogue import KINDS

    found: dict[str, Any] = {kind: [] for kind in KINDS}
    for declaration in entry.declarations:
        found[declaration.kind].append(
            {"name": declaration.name, "note": declaration.note, "module": declaration.module}
        )
    paper = entry.paper
    columns = {
        name: getattr(paper, name)
        for name in ("slug", "title", "year", "kind", "family", "system_name", "tier", "repo")
    }
    return {**columns, "covered": entry.covered, "implementations": found}


def show(entry: Coverage) -> None:
    paper = entry.paper
    facts: dict[str, object] = {
        "title": paper.title,
        "year": paper.year,
        "kind": paper.kind,
        "family": paper.family,
        "system": paper.system_name,
        "tier": paper.tier,
        "authors' code": paper.repo,
    }
    table = facts_table("paper", paper.slug, facts)
    for declaration in entry.declarations:
        about = f" ({declaration.note})" if declaration.note else ""
        add_row(table, declaration.kind.replace("_", " "), f"{declaration.name}{about}")
    stdout().print(table)
    if not entry.covered:
        note("Nothing here implements it" + (": it is background reading." if paper.tier == 0 else " yet."))


def listing(entries: list[Coverage]) -> None:
    table = new_table(
        "slug", "year", "tier", "family", "implemented by", numbers=("year", "tier"), wide=("implemented by",)
    )
    for entry in entries:
        names = ", ".join(f"{found.kind.replace('_', ' ')} {found.name}" for found in entry.declarations)
        add_row(table, entry.paper.slug, entry.paper.year, entry.paper.tier, entry.paper.family, names)
    stdout().print(table)
    done = sum(entry.covered for entry in entries)
    note(f"{counted(len(entries), 'paper')}, {done} implemented. `workbench catalogue SLUG` shows one.")
