"""`workbench version`: what is installed."""

from __future__ import annotations

from app.commands._console import facts_table, print_json, stdout
from app.commands._options import AsJson

PANEL = "What is here"
PARTS = ("torch", "triton", "numpy", "transformer-lens", "dash", "plotly")


def command(as_json: AsJson = False) -> None:
    """Versions of the workbench and of what decides its results."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str | None] = {}
    for part in ("interpretability-workbench", *PARTS):
        try:
            versions[part] = version(part)
        except PackageNotFoundError:
            versions[part] = None
    workbench = versions.pop("interpretability-workbench")
    record = {"workbench": workbench, "python": platform.python_version(), "system": platform.platform(), **versions}
    if as_json:
        print_json(record)
        return
    shown = {part: found or "not installed" for part, found in record.items()}
    stdout().print(facts_table("part", "version", shown))
