"""Runs the benchmarks and prints one table: `python -m tests.benchmarks [--only NAME] [--json]`.

Exit codes: 0 every benchmark ran, whatever it measured; 1 one of them raised; 2 typed wrongly.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from difflib import get_close_matches
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from tests.benchmarks import Row

FOLDER = Path(__file__).parent


def find_benchmarks(folder: Path = FOLDER) -> dict[str, Path]:
    """The benchmark files by name: `bench_cache.py` is `cache`."""
    return {path.stem.removeprefix("bench_"): path for path in sorted(folder.glob("bench_*.py"))}


def as_row(measured: Any) -> Row:
    """A Row from a Row, a mapping, or any object with its fields. Raises TypeError naming what it got instead."""
    if isinstance(measured, Row):
        return measured
    values = dict(measured) if isinstance(measured, Mapping) else dict(vars(measured))
    known = {field.name for field in fields(Row)}
    if values.keys() - known or not {"name", "ratio"} <= values.keys():
        raise TypeError(f"a benchmark row has name, ratio and possibly {sorted(known)}; got {sorted(values)}")
    return Row(**values)


def run_benchmark(path: Path) -> list[Row]:
    """Import one benchmark file and run it. Raises TypeError when it measures nothing."""
    spec = spec_from_file_location(f"tests.benchmarks.{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the file look themselves up here
    spec.loader.exec_module(module)
    rows = [as_row(measured) for measured in module.run()]
    if not rows:
        raise TypeError(f"{path.name}: run() returned no rows")
    return rows


def format_table(results: Mapping[str, Sequence[Row]]) -> str:
    """One line per row: ratio, goal beside it, whether it is met."""
    header = ("benchmark", "measured", "ratio", "goal", "met", "unit", "note")
    verdict = {True: "yes", False: "NO", None: ""}
    lines = [header]
    for name, rows in results.items():
        for row in rows:
            goal = "" if row.limit is None else f"{'≥' if row.at_least else '≤'} {row.limit:.4g}"
            lines.append((name, row.name, f"{row.ratio:.4g}", goal, verdict[row.within], row.unit, row.note))
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    rendered = ["  ".join(line).rstrip() for line in padded]
    return "\n".join([rendered[0], "-" * max(map(len, rendered)), *rendered[1:]])


def main(arguments: Sequence[str] | None = None, folder: Path = FOLDER) -> int:
    parser = argparse.ArgumentParser(
        prog="make bench", description="Ratios measured on this machine, beside their goals."
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="only this benchmark; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON document on standard output")
    options = parser.parse_args(arguments)
    benchmarks = find_benchmarks(folder)
    for name in options.only or ():
        if name not in benchmarks:
            near = get_close_matches(name, benchmarks, n=1)
            meant = f" Did you mean {near[0]!r}?" if near else ""
            parser.error(f"there is no benchmark {name!r}.{meant} There are: {', '.join(benchmarks) or 'none'}")
    results: dict[str, list[Row]] = {}
    failed = []
    for name in options.only or benchmarks:
        print(f"{name} ...", end="", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            results[name] = run_benchmark(benchmarks[name])
            print(f" {time.perf_counter() - start:.1f} s", file=sys.stderr)
        except Exception:
            failed.append(name)
            print(" raised", file=sys.stderr)
            traceback.print_exc()
    if options.json:
        rows = [
            {"benchmark": name, **asdict(row), "within": row.within} for name, rows in results.items() for row in rows
        ]
        print(json.dumps({"rows": rows, "failed": failed}, indent=2, ensure_ascii=False))
    else:
        print(format_table(results))
        if failed:
            print(f"raised: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def one_thread() -> None:
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    one_thread()  # with two threads on busy cores, small operations take many times longer and ratios mean nothing
    sys.exit(main())
