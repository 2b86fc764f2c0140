"""Package names that load their module on first use (PEP 562), so that importing a package costs nothing."""

from collections.abc import Callable
from importlib import import_module
from typing import Any


def lazy_names(package: str, home: dict[str, str]) -> Callable[[str], Any]:
    """A module-level `__getattr__` for `package`: `home` maps each public name to the submodule that defines it."""

    def load(name: str) -> Any:
        if name in home:
            return getattr(import_module(f"{package}.{home[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return load
