"""Model folders by name: those under the models root, `$WORKBENCH_MODELS`. No torch: a page that lists models must not wait for it."""

import os
from pathlib import Path

from workbench.instrument.errors import suggestion

ROOT = "WORKBENCH_MODELS"


def root() -> Path | None:
    """The folder of model folders, `$WORKBENCH_MODELS`; None where it is not set."""
    value = os.environ.get(ROOT)
    return Path(value).expanduser() if value else None


def folder_called(name: str) -> Path | None:
    """The folder of this path or of this name under the root, if it holds a configuration."""
    above = root()
    places = [Path(name)] if above is None or escapes(name) else [Path(name), above / name]
    return next((place for place in places if (place / "config.json").is_file()), None)


def why_missing(name: str) -> str:
    """Where a path that does not exist goes wrong, in words; "" for a path that does, or a name that is none."""
    path = Path(name)
    if path.exists() or (len(path.parts) < 2 and not name.startswith(".")):
        return ""
    there = next(parent for parent in path.absolute().parents if parent.exists())
    first = path.absolute().relative_to(there).parts[0]
    names = [each.name for each in there.iterdir()] if there.is_dir() else []
    return f"There is no file or folder {name!r}: {there} has no {first!r}.{suggestion(first, names)}"


def escapes(name: str) -> bool:
    """Whether a name, put under a root, could leave it."""
    return Path(name).is_absolute() or any(part in ("..", "~", "") for part in name.replace("\\", "/").split("/"))


def folders_under(above: Path) -> dict[str, Path]:
    """Model folders at most two levels below a root, by their names there: published ones and ones written by `models.save`.

    A folder inside a model folder is a part of that (sentence embedders keep the settings of their pooling so).
    """
    found = {}
    inner = [config for config in above.glob("*/*/config.json") if not (config.parents[1] / "config.json").is_file()]
    for config in sorted([*above.glob("*/config.json"), *inner]):
        if config.parent.resolve().is_relative_to(above.resolve()):
            found[config.parent.relative_to(above).as_posix()] = config.parent
    return found


def free_memory() -> int | None:
    """Bytes of this machine's memory that nothing uses; None where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            facts = dict(line.split(":", 1) for line in file)
        return int(facts["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
