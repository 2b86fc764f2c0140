"""The command line as a whole: help, speed, exit codes, failures in words, completion, output in two forms."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import typer

from app import cli
from app.commands import _console
from app.commands._console import Failure, describe_failure, plain, read_text, readable_bytes

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


# ---- help ----------------------------------------------------------------------------------------------------------


def test_help_names_every_command(workbench: Callable) -> None:
    shown = workbench("--help")
    assert shown.code == 0 and shown.err == ""
    files = {path.stem for path in (ROOT / "app" / "commands").glob("[a-z]*.py")}
    assert files >= {"serve", "trace", "train", "models", "catalogue", "data", "bench", "runs", "version"}
    for name in files:
        assert f" {name} " in shown.out, f"`workbench --help` does not list {name}"


@pytest.mark.parametrize("name", cli.command_names())
def test_every_command_explains_itself(workbench: Callable, name: str) -> None:
    shown = workbench(name, "-h")
    assert shown.code == 0 and f"Usage: workbench {name}" in shown.out


def test_help_loads_nothing_heavy_and_is_fast() -> None:
    code = (
        "import json, sys, time\nstart = time.process_time()\nfrom app.cli import main\ncode = main(['--help'])\n"
        "heavy = [name for name in ('torch', 'numpy', 'dash', 'plotly', 'transformers') if name in sys.modules]\n"
        "print('MEASURED', json.dumps([code, time.process_time() - start, heavy]))"
    )
    measured = []
    for _ in range(3):
        done = python(code)
        assert done.returncode == 0, done.stderr
        measured.append(json.loads(done.stdout.split("MEASURED")[1]))
    assert [(code, heavy) for code, _, heavy in measured] == [(0, [])] * 3
    assert statistics.median(seconds for _, seconds, _ in measured) < 1.0


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_idle_threads_sleep_unless_told_otherwise(given: dict[str, str], spins: str | None) -> None:
    """Before torch is loaded, which reads it once."""
    code = (
        "import os, sys; from app.cli import main; main(['version', '--json']); "
        "print(os.environ.get('GOMP_SPINCOUNT'), file=sys.stderr)"
    )
    bare = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**bare, **given}, capture_output=True, text=True, check=True
    )
    assert done.stderr.split()[-1] == str(spins)


def test_a_new_command_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workbench: Callable) -> None:
    import app.commands

    (tmp_path / "planted.py").write_text('def command() -> None:\n    """A planted command."""\n    print("it ran")\n')
    (tmp_path / "_hidden.py").write_text("raise RuntimeError('helper files are not commands')\n")
    monkeypatch.setattr(app.commands, "__path__", [*app.commands.__path__, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "app.commands.planted", raising=False)
    assert "A planted command." in workbench("--help").out
    assert workbench("planted").out == "it ran\n"


def test_a_command_file_without_a_command_is_an_error(monkeypatch: pytest.MonkeyPatch, workbench: Callable) -> None:
    monkeypatch.setitem(sys.modules, "app.commands.version", ModuleType("app.commands.version"))
    failed = workbench("--help")
    assert failed.code == 1 and "app/commands/version.py defines neither `command` nor `group`" in failed.err


# ---- exit codes and failures ---------------------------------------------------------------------------------------


def plant(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """Make `workbench version` raise."""
    module = ModuleType("app.commands.version")

    def command() -> None:
        print("half a result")
        raise error

    module.command = command  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "app.commands.version", module)


def test_a_mistyped_command_or_option_is_a_usage_error(workbench: Callable) -> None:
    command = workbench("tracee")
    assert command.code == 2 and "Did you mean" in command.err and "'trace'" in command.err and command.out == ""
    option = workbench("version", "--jsn")
    assert option.code == 2 and "--json" in option.err and option.out == ""


def test_a_failure_is_one_line_and_a_hint(monkeypatch: pytest.MonkeyPatch, workbench: Callable) -> None:
    plant(monkeypatch, Failure("the reason\nis long [bold]and[/bold] " + "x" * 300, "try this"))
    failed = workbench("version")
    assert failed.code == 1 and failed.out == "half a result\n"
    assert failed.err.splitlines() == ["error: the reason is long [bold]and[/bold] " + "x" * 300, "hint: try this"]


@pytest.mark.parametrize("place", [("--debug", "version"), ("version", "--debug")])
def test_debug_shows_the_traceback_wherever_it_stands(
    monkeypatch: pytest.MonkeyPatch, workbench: Callable, place: tuple[str, str]
) -> None:
    plant(monkeypatch, TypeError("boom"))
    quiet = workbench("version")
    assert quiet.code == 1 and "Traceback" not in quiet.err
    assert quiet.err.splitlines() == ["error: TypeError: boom", "hint: Run it again with --debug for the traceback."]
    loud = workbench(*place)
    assert loud.code == 1 and "Traceback" in loud.err and "in command" in loud.err


def test_debug_after_a_double_dash_is_text(monkeypatch: pytest.MonkeyPatch, workbench: Callable) -> None:
    module = ModuleType("app.commands.version")
    module.command = lambda text: print(text)  # type: ignore[attr-defined]
    module.command.__annotations__ = {"text": str}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "app.commands.version", module)
    assert workbench("version", "--", "--debug").out == "--debug\n"


class Nearest(KeyError):
    def __str__(self) -> str:
        return str(self.args[0])


Nearest.__module__ = "workbench.somewhere"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            ValueError("no corpus 'englsh'. Did you mean 'english'?"),
            ("no corpus 'englsh'. Did you mean 'english'?", ""),
        ),
        (KeyError("a"), ("KeyError: a", "")),
        (Nearest("no hook point 'x'"), ("no hook point 'x'", "")),
        (ValueError(), ("ValueError", "")),
        (OSError(98, "Address already in use"), ("Address already in use", "")),
        (FileNotFoundError(2, "No such file", "a.txt"), ("[Errno 2] No such file: 'a.txt'", "")),
        (Failure("reason"), ("reason", "")),
    ],
)
def test_failures_in_words(error: Exception, expected: tuple[str, str]) -> None:
    assert describe_failure(error) == expected


def test_no_arguments_show_the_help(workbench: Callable) -> None:
    assert "Usage: workbench" in "".join([workbench().out, workbench().err])


# ---- output --------------------------------------------------------------------------------------------------------


@dataclass
class Point:
    place: Path
    values: tuple[float, ...]


def test_json_is_plain_and_finite() -> None:
    record = Point(Path("a/b"), (1.5, float("nan"), float("inf")))
    assert plain({"p": record, 3: {"x"}}) == {"p": {"place": "a/b", "values": [1.5, None, None]}, "3": ["x"]}
    with pytest.raises(TypeError, match="object has no JSON form"):
        plain(object())


def test_version_in_both_forms(workbench: Callable) -> None:
    shown = workbench("version", "--json")
    assert shown.code == 0 and shown.err == ""
    assert shown.json["python"] == sys.version.split()[0] and shown.json["torch"].startswith("2.")
    assert shown.json["torch"] in workbench("version").out


def test_readable_bytes() -> None:
    shown = [readable_bytes(count) for count in (0, 999, 1000, 123_456, 5_000_000, 2e12)]
    assert shown == ["0 B", "999 B", "1.0 kB", "123 kB", "5.0 MB", "2.0 TB"]


def test_text_comes_from_exactly_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    file = tmp_path / "text.txt"
    file.write_bytes("Ünïcode\r\n".encode())
    assert read_text("words", None) == "words"
    assert read_text(None, file) == "Ünïcode\r\n", "a file's text is read exactly, line ends included"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("piped é".encode())))
    assert read_text("-", None) == "piped é"
    with pytest.raises(Failure, match="no text was given"):
        read_text(None, None)
    with pytest.raises(Failure, match="given twice"):
        read_text("words", file)
    with pytest.raises(Failure, match="empty"):
        read_text("", None)
    file.write_bytes(b"ab\xff")
    with pytest.raises(Failure, match=r"not UTF-8.*byte 2"):
        read_text(None, file)


def test_square_brackets_in_a_table_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = _console.new_table("name", "title")
    _console.add_row(table, "run", "[bold]hello[/bold] [x]")
    _console.stdout().print(table)
    assert "[bold]hello[/bold] [x]" in capsys.readouterr().out


# ---- completion ----------------------------------------------------------------------------------------------------


def test_the_shell_completes_commands_and_slugs() -> None:
    def complete(words: str) -> list[str]:
        done = python(
            "from app.cli import main; raise SystemExit(main([]))",
            _WORKBENCH_COMPLETE="complete_bash",
            COMP_WORDS=words,
            COMP_CWORD=str(words.count(" ")),
        )
        return done.stdout.split()

    assert complete("workbench ver") == ["version"]
    assert complete("workbench catalogue bert-at") == ["bert-attention"]
    assert "--json" in complete("workbench version --")


def test_completion_scripts_are_printed_for_the_usual_shells() -> None:
    for shell, mark in (("bash", "complete -o default -F"), ("zsh", "#compdef workbench"), ("fish", "complete ")):
        done = python("from app.cli import main; raise SystemExit(main([]))", _WORKBENCH_COMPLETE=f"source_{shell}")
        assert mark in done.stdout, f"{shell}: {done.stdout} {done.stderr}"


def test_typer_is_recent_enough_to_suggest_commands() -> None:
    assert tuple(map(int, typer.__version__.split(".")[:2])) >= (0, 20)
