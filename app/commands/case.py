"""`workbench case`: run the case studies and see which published claims hold here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from app.commands._console import (
    Failure,
    add_row,
    counted,
    interruptible,
    new_table,
    note,
    print_json,
    progress_bar,
    stdout,
)
from app.commands._options import RUNS_HELP, AsJson, open_store

if TYPE_CHECKING:
    from rich.text import Text

    from case_studies import ClaimResult, Study, StudyResult

PANEL = "Look inside"
COLOURS = {"reproduced": "bold green", "not reproduced": "bold red", "not run here": "dim"}
Runs = Annotated[Path | None, typer.Option("--runs", help=RUNS_HELP, file_okay=False, show_default=False)]


class StudyOrWord(TyperGroup):
    """`workbench case NAME` is `workbench case run NAME`, unless NAME is one of the words."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = args and (args[0] in self.commands or args[0].startswith("-"))
        return super().resolve_command(ctx, args if known else ["run", *args])


group = typer.Typer(
    cls=StudyOrWord, help="Run case studies: which published claims hold here?", rich_markup_mode="markdown"
)


def complete_studies(incomplete: str) -> list[str]:
    """Study names for the shell's tab key."""
    from case_studies import list_studies

    return [study.name for study in list_studies() if study.name.startswith(incomplete)]


StudyName = Annotated[
    str,
    typer.Argument(
        help="Study, from `workbench case list`, or the path of its folder.", autocompletion=complete_studies
    ),
]


@group.callback(invoke_without_command=True)
def default(context: typer.Context) -> None:
    """Run case studies: which published claims hold here?

    `workbench case linear_attention_regression --smoke` runs one; without a further word all are listed.
    """
    if context.invoked_subcommand is None:
        list_command()


# ---- run -------------------------------------------------------------------------------------------------------------


@group.command("run")
def run_command(
    name: StudyName,
    smoke: Annotated[bool, typer.Option("--smoke", help="Seconds: checks that everything works.")] = False,
    small: Annotated[bool, typer.Option("--small", help="Minutes on one core: decides claims. The default.")] = False,
    full: Annotated[bool, typer.Option("--full", help="The paper's own setting, as far as there is one here.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds.", min=1, show_default=False)] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    model: Annotated[
        str | None,
        typer.Option(help="Model to study, where the study lets one choose: a name or a folder.", show_default=False),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away what an interrupted run left.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Also write results, figures and arrays into this new folder.", file_okay=False, show_default=False
        ),
    ] = None,
    runs: Runs = None,
    as_json: AsJson = False,
) -> None:
    """Run a study and say which of its claims hold here.

    A claim that does not hold is a finding: the exit code is 0 all the same. Ctrl-C stops after the current step; the same
    command then goes on at the seed where it stopped.
    """
    if smoke + small + full > 1:
        raise typer.BadParameter("give at most one of --smoke, --small and --full")
    tier = "smoke" if smoke else "full" if full else "small"
    from case_studies import find_study, run_study
    from case_studies.harness.export import check_free, write_folder
    from workbench.lab.jobs import JobCancelled

    study = find_study(name)
    chosen = study.tier(tier)
    if out is not None:
        check_free(out)
    store = open_store(runs)
    if chosen.minutes and chosen.minutes >= 1 and not as_json:
        asked = seeds or chosen.seeds
        minutes = max(1, round(chosen.minutes * asked / chosen.seeds))
        note(f"About {counted(minutes, 'minute')} on one core with {counted(asked, 'seed')}.")
    try:
        with interruptible() as cancel, progress_bar(study.name) as progress:
            result = run_study(
                study, tier, seeds, store=store, progress=progress, cancel=cancel, device=device, fresh=fresh,
                changes={} if model is None else {"model": model},
            )  # fmt: skip
    except (JobCancelled, KeyboardInterrupt):
        raise Failure(
            "stopped before the end; finished seeds are kept", "The same command goes on from there."
        ) from None
    if out is not None:
        write_folder(store.open(result.run), out)
    if as_json:
        print_json(result)
        return
    show_result(result)
    note(f"Kept as run {result.run}" + (f" and in {out}." if out else "."))


# ---- list ------------------------------------------------------------------------------------------------------------


@group.command("list")
def list_command(runs: Runs = None, as_json: AsJson = False) -> None:
    """Every study, and what its last run found."""
    from case_studies import known_results, list_studies, study_problems
    from case_studies.harness.results import most_telling

    studies = list_studies()
    last = most_telling(known_results(open_store(runs) if runs is not None or has_store() else None))
    if as_json:
        print_json([study_record(study) | {"last": last.get(study.name)} for study in studies])
    else:
        table = new_table(
            "study", "title", "claims", "tiers", "last run", numbers=("claims",), wide=("title", "last run")
        )
        for study in studies:
            found = last.get(study.name)
            words = f"{found.tier}: {found.words}{', shipped' if found.shipped else ''}" if found else "never run here"
            add_row(table, study.name, study.title, len(study.claims), " ".join(study.tiers), words)
        stdout().print(table)
    for problem in study_problems():
        note(f"{problem.folder} is not a readable study: {problem.reason}")


def has_store() -> bool:
    """Whether the default runs folder exists: listing studies should not make one."""
    return Path(os.environ.get("WORKBENCH_RUNS") or "runs").expanduser().is_dir()


def study_record(study: Study) -> dict[str, Any]:
    return {
        "name": study.name, "title": study.title, "summary": study.summary, "paper": study.paper,
        "tiers": {tier.name: {"seeds": tier.seeds, "minutes": tier.minutes} for tier in study.tiers.values()},
        "claims": [
            {key: getattr(claim, key) for key in ("id", "sentence", "paper", "where", "published", "source", "evidence",
                                                  "rule", "measurement", "tier", "seeds", "unit", "note")}
            for claim in study.claims
        ],
    }  # fmt: skip


# ---- show ------------------------------------------------------------------------------------------------------------


@group.command("show")
def show_command(
    name: Annotated[str, typer.Argument(help="Study, or id of one of its runs.", autocompletion=complete_studies)],
    runs: Runs = None,
    as_json: AsJson = False,
) -> None:
    """What a study claims to decide, and what its last run (or a given run) found."""
    from case_studies import find_study, known_results
    from case_studies.harness.errors import UnknownStudy
    from case_studies.harness.results import read_result
    from case_studies.harness.shipped import known_result

    store = open_store(runs)
    try:
        study = find_study(name)
    except UnknownStudy:
        result = next((each for each in known_results(store) if each.run == name), None)
        if result is None:
            if not (store.root / name).is_dir():
                raise
            result = read_result(store.open(name))
    else:
        result = known_result(store, study.name)
        if result is None:
            if as_json:
                print_json(study_record(study) | {"last": None})
            else:
                show_claims(study)
            return
    if as_json:
        print_json(result)
    elif result is not None:
        show_result(result)


# ---- ship ------------------------------------------------------------------------------------------------------------


@group.command("ship")
def ship_command(
    run_id: Annotated[str, typer.Argument(help="Id of the run of a study.")], runs: Runs = None, as_json: AsJson = False
) -> None:
    """Put a run into its study's folder as the result that comes with the workbench, in place of the one before."""
    from case_studies.harness.shipped import ship

    folder = ship(open_store(runs).open(run_id))
    if as_json:
        print_json({"run": run_id, "folder": folder})
    else:
        note(f"{run_id} is what {folder.parent.parent.name} shows from now on.")


def show_claims(study: Study) -> None:
    table = new_table("claim", "published", "rule", "tier", "seeds", numbers=("seeds",), wide=("claim", "published"))
    for claim in study.claims:
        add_row(table, claim.sentence, claim.published, claim.rule, claim.tier, claim.seeds)
    stdout().print(table)
    note(f"{study.title}: never run here. `workbench case {study.name} --smoke` runs it.")


def show_result(result: StudyResult) -> None:
    from rich.text import Text

    table = new_table(
        "claim", "published", "ours", "n", "verdict", "why", numbers=("n",), wide=("claim", "published", "why")
    )
    for claim in result.claims:
        add_row(
            table,
            claim.sentence,
            claim.published,
            value_and_interval(claim),
            claim.n or "",
            verdict(claim),
            claim.reason,
        )
    console = stdout()
    seeds = counted(len(result.seeds), "seed")
    shipped = " · shipped with the workbench" if result.shipped else ""
    console.print(
        Text.assemble((result.title, "bold"), f" · {result.tier} · {seeds} · {result.seconds:.0f} s{shipped}")
    )
    console.print(table)
    methods = sorted({f"{round(100 * c.confidence)} % {c.interval} over {c.over}" for c in result.claims if c.interval})
    console.print(Text(f"{result.words}" + (f". Intervals: {', '.join(methods)}." if methods else "."), style="dim"))


def value_and_interval(claim: ClaimResult) -> str:
    from case_studies.harness.results import ours

    return ours(claim)


def verdict(claim: ClaimResult) -> Text:
    from rich.text import Text

    return Text(claim.verdict, style=COLOURS[claim.verdict])
