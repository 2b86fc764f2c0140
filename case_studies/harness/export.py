"""Results of a study for use elsewhere: JSON, CSV, the Python that reads them, and a folder with everything."""

from __future__ import annotations

import csv
import io
import json
import os
import secrets
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from case_studies.harness.errors import StudyError
from case_studies.harness.results import ClaimResult, StudyResult, read_result
from workbench.lab.run_folder import Run


def as_record(result: StudyResult) -> dict[str, Any]:
    """The result as plain JSON values."""
    return json.loads(json.dumps(asdict(result)))


def as_csv(result: StudyResult) -> str:
    """One line per claim; the values of the seeds are joined by blanks."""
    names = [each.name for each in fields(ClaimResult)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for claim in result.claims:
        row = asdict(claim) | {"values": " ".join(map(repr, claim.values))}
        writer.writerow([_cell(row[name]) for name in names])
    return text.getvalue()


def _cell(value: Any) -> Any:
    """Words that a spreadsheet would take for a formula get a quotation mark in front."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "@", "\t", "\r") else value


def as_python(result: StudyResult) -> str:
    """Python that reads this result, and that measures it again."""
    return (
        f"from case_studies import known_results, run_study\n"
        f"from case_studies.harness.shipped import open_run\n"
        f"from workbench import RunStore\n\n"
        f"store = RunStore()\n"
        f"result = next(each for each in known_results(store, {result.study!r}) if each.run == {result.run!r})\n"
        f"print(result)\n"
        f"run = open_run(store, result.run)  # run.arrays(), run.figures()\n\n"
        f"# Measured again:\n"
        f"# run_study({result.study!r}, tier={result.tier!r}, seeds={list(result.seeds)})\n"
    )


def write_folder(run: Run, out: str | os.PathLike[str]) -> Path:
    """Write results.json, claims.csv, the arrays and the figures (Plotly ones also as pages to open) into a new folder.

    StudyError when the folder exists; nothing is left behind when writing fails.
    """
    target = Path(out)
    check_free(target)
    result = read_result(run)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}-{secrets.token_hex(3)}.tmp")
    (partial / "figures").mkdir(parents=True)
    try:
        record = as_record(result) | {"measurements": run.manifest["results"].get("measurements", {})}
        (partial / "results.json").write_text(json.dumps(record, indent=1, ensure_ascii=False), encoding="utf-8")
        (partial / "claims.csv").write_text(as_csv(result), encoding="utf-8")
        shutil.copyfile(run.path / "arrays.safetensors", partial / "arrays.safetensors")
        for name in run.figures():
            (partial / "figures" / name).write_bytes(run.figure(name))
            if name.endswith(".json"):
                _write_page(partial / "figures", name)
        os.rename(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def check_free(target: Path) -> None:
    """StudyError when there is something where a folder is to be written."""
    if os.path.lexists(target):
        raise StudyError(f"{target} exists already; give the name of a folder that does not")


def _write_page(folder: Path, name: str) -> None:
    """A Plotly figure as an HTML page that works without a network; the script beside it is shared by all pages."""
    import plotly.io

    figure = plotly.io.from_json((folder / name).read_text(encoding="utf-8"))
    figure.write_html(folder / f"{Path(name).stem}.html", include_plotlyjs="directory")
