"""The command line `workbench`. Every file of `app/commands` is one command; this file finds them and reports failures.

A command file `app/commands/<name>.py` defines

    command   a function, which becomes `workbench <name>`, or
    group     a `typer.Typer`, whose commands become `workbench <name> <command>`
    PANEL     optional: the heading of the help page under which it is listed

and imports what is heavy inside its functions, so that `workbench --help` stays instant. Exit codes: 0 done, 1 failed
with a one-line reason (and the traceback with `--debug`), 2 the command was typed wrongly.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated

import typer

import app.commands
from app.commands._console import describe_failure, print_failure

ABOUT = """Look inside neural sequence models: attention and recurrent state alike.

Start with `workbench serve` to explore in the browser, or with `workbench trace` in a script.
"""
PANELS = ("Look inside", "Make", "What is here", "Commands")  # the order of the help page


def command_names() -> list[str]:
    """The names of the files in `app/commands`, without those that start with an underscore."""
    return sorted(found.name for found in iter_modules(app.commands.__path__) if not found.name.startswith("_"))


def build() -> typer.Typer:
    """The whole command line. Raises TypeError, naming the file, when a command file defines no command."""
    line = typer.Typer(
        help=ABOUT,
        rich_markup_mode="markdown",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    line.callback()(options)
    modules = {name: import_module(f"app.commands.{name}") for name in command_names()}

    def panel(name: str) -> str:
        return getattr(modules[name], "PANEL", PANELS[-1])

    for name in sorted(modules, key=lambda name: (PANELS.index(panel(name)), name)):
        if hasattr(modules[name], "group"):
            line.add_typer(modules[name].group, name=name, rich_help_panel=panel(name))
        elif hasattr(modules[name], "command"):
            line.command(name, rich_help_panel=panel(name))(modules[name].command)
        else:
            raise TypeError(f"app/commands/{name}.py defines neither `command` nor `group`")
    return line


def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the whole traceback when something fails.")] = False,
) -> None:
    """Options before the command. `--debug` is accepted after it too, so `main` reads it itself."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    _yield_idle_threads()
    given = list(sys.argv[1:] if arguments is None else arguments)
    end_of_options = given.index("--") if "--" in given else len(given)
    debug = "--debug" in given[:end_of_options] or os.environ.get("WORKBENCH_DEBUG", "") not in ("", "0")
    given = [word for position, word in enumerate(given) if word != "--debug" or position > end_of_options]
    try:
        typer.main.get_command(build()).main(args=given, prog_name="workbench")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception as error:
        if debug:
            traceback.print_exc()
        print_failure(*describe_failure(error))
        return 1
    return 0


def _yield_idle_threads() -> None:
    """Let OpenMP's threads sleep soon when they wait for each other, unless the environment says how they wait.

    They spin for milliseconds otherwise, in every operation that is shared out, and where other programs keep the cores busy most of the
    time goes there: commands took up to six times as long. OpenMP reads this once, when torch is loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


if __name__ == "__main__":
    sys.exit(main())
