"""`python -m models.trainings run [NAME ...] [--seeds 0 1] [--folder FOLDER]` and `python -m models.trainings page`."""

import argparse
import sys
from pathlib import Path

from models.trainings.page import PAGE, page
from models.trainings.record import all_experiments, find
from models.trainings.runner import read_results, run


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m models.trainings", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("run", help="train and measure what is not stored yet")
    training.add_argument("names", nargs="*", help="experiments (default: all)")
    training.add_argument("--seeds", nargs="+", type=int, default=[0])
    training.add_argument("--folder", type=Path, default=Path("scratch/trainings"), help="where the trainings are kept")
    commands.add_parser("page", help=f"write {PAGE.name}")
    chosen = parser.parse_args(arguments)
    if chosen.command == "page":
        PAGE.write_text(page(all_experiments(), read_results()), encoding="utf-8")
        return
    experiments = [find(name) for name in chosen.names] or list(all_experiments().values())
    run(experiments, chosen.folder, chosen.seeds, progress=_say)


def _say(share: float, words: str) -> None:
    print(f"\r{100 * share:5.1f} %  {words:<70}", end="" if share < 1 else "\n", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
