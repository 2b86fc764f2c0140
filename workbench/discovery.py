"""A file is part of the house by being there: packages whose files register what they define are imported whole, when first asked for."""

import pkgutil
from functools import cache
from importlib import import_module


@cache
def import_all(package: str) -> None:
    """Import every module directly inside `package`, in alphabetical order."""
    for module in sorted(info.name for info in pkgutil.iter_modules(import_module(package).__path__)):
        import_module(f"{package}.{module}")
