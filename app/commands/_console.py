"""What the commands share: output on stdout, everything else on stderr, failures in words, text from several places."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

# Messages of these are written for the reader, as are those of the project's own exceptions; any other exception is
# shown with its class, since it is likely a bug.
WRITTEN_FOR_THE_READER = (ValueError, LookupError, OSError, FloatingPointError)
PIPED_WIDTH = 200  # columns of a table that goes to a file or another program, which have no width of their own
FLOORS = ("kernels", "workbench", "models", "probes", "case_studies", "app")


class Failure(Exception):
    """A command that cannot do what was asked: one line for the reason, one for what to try."""

    def __init__(self, reason: str, hint: str = ""):
        super().__init__(reason)
        self.hint = hint


def describe_failure(error: Exception) -> tuple[str, str]:
    """(reason, hint) of any exception, the reason on one line."""
    message = error.args[0] if type(error) is KeyError and error.args else error
    if isinstance(error, OSError) and error.strerror and not error.filename:
        message = error.strerror
    reason = " ".join(str(message).split())
    if isinstance(error, Failure):
        return reason, error.hint
    if isinstance(error, ModuleNotFoundError):
        return reason, "Is the project installed completely? `make install` does that; --debug shows where it failed."
    expected = isinstance(error, WRITTEN_FOR_THE_READER) or type(error).__module__.split(".")[0] in FLOORS
    if type(error) is KeyError or not expected or not reason:
        reason = f"{type(error).__name__}: {reason}".rstrip(": ")
    return reason, "" if expected else "Run it again with --debug for the traceback."


def stdout() -> Console:
    from rich.console import Console

    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = PIPED_WIDTH
    return console


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def print_failure(reason: str, hint: str = "") -> None:
    from rich.text import Text

    console = stderr()
    # soft_wrap keeps the reason on one line, for people who search it and programs that read it.
    console.print(Text.assemble(("error: ", "bold red"), reason), soft_wrap=True)
    if hint:
        console.print(Text.assemble(("hint: ", "bold cyan"), hint), soft_wrap=True)


def note(message: str) -> None:
    """A remark for the person at the terminal, on stderr."""
    from rich.text import Text

    stderr().print(Text(message, style="dim"), soft_wrap=True)


def print_json(value: Any) -> None:
    """Exactly one JSON document on stdout. NaN and infinities become null, dataclasses objects, paths strings."""
    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The value in JSON's own types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, Iterable):
        return [plain(item) for item in value]
    raise TypeError(f"{type(value).__name__} has no JSON form here")


def new_table(*columns: str, numbers: Iterable[str] = (), wide: Iterable[str] = ()) -> Table:
    """A table without vertical lines. Columns in `numbers` are right-aligned; only those in `wide` wrap their text."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    right, wraps = set(numbers), set(wide)
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", no_wrap=column not in wraps)
    return table


def facts_table(title: str, name: str, facts: Mapping[str, object]) -> Table:
    """What is known about one thing, a line each; facts that are None or "" are left out."""
    table = new_table(title, name, wide=(name,))
    for fact, value in facts.items():
        if value not in (None, ""):
            add_row(table, fact, value)
    return table


def add_row(table: Table, *cells: object) -> None:
    """A row of literal text: square brackets in a cell are no markup."""
    from rich.text import Text

    table.add_row(*[cell if isinstance(cell, Text) else Text("" if cell is None else str(cell)) for cell in cells])


def four_digits(value: float) -> str:
    """A number in at most four significant digits; `–` where there is none."""
    return "–" if value != value else f"{value:.4g}"


def two_decimals(value: float) -> str:
    """A score with two decimals, never −0.00; `–` where there is none."""
    return "–" if value != value else f"{round(value, 2) + 0.0:.2f}"


def read_text(text: str | None, file: Path | None) -> str:
    """The text of a command: its argument, `-` for stdin, or the content of `--file`. Exactly one of them.

    Raises Failure when there is none, more than one, nothing in it, or when it is not UTF-8.
    """
    if (text is None) == (file is None):
        reason = "no text was given" if text is None else "text was given twice: as an argument and with --file"
        raise Failure(reason, 'Give it in quotes ("To be"), as - to read standard input, or with --file PATH.')
    where = "standard input" if text == "-" else str(file)
    try:
        if file is not None:
            text = file.read_bytes().decode("utf-8")
        elif text == "-":
            text = sys.stdin.buffer.read().decode("utf-8") if hasattr(sys.stdin, "buffer") else sys.stdin.read()
    except UnicodeDecodeError as error:
        raise Failure(f"{where} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    assert text is not None
    if not text:
        raise Failure("the text is empty", "A model needs at least one token to read.")
    return text


def counted(number: int, noun: str) -> str:
    """`1 run`, `2,048 runs`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def readable_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float, str], None]]:
    """A bar on stderr, moved by calling it with the share done (0 to 1) and a few words; silent without a terminal."""
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

    console = stderr()
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda share, words: bar.update(task, completed=share, description=f"{title}: {words}")


@contextlib.contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising, so that long work can end in good order; a second one stops at once."""
    cancel = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield cancel
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: Any) -> None:
        cancel.set()
        signal.signal(signal.SIGINT, before)
        note("stopping after this step; Ctrl-C again stops at once")

    signal.signal(signal.SIGINT, stop)
    try:
        yield cancel
    finally:
        signal.signal(signal.SIGINT, before)
