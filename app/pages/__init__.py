"""The pages. Every module here with a constant `PAGE` is one; a new page is a new file."""

from __future__ import annotations

import importlib
import pkgutil

from app.page import GROUPS, Page


def find_pages() -> list[Page]:
    """All pages in the order of the navigation. Raises ValueError when two have one name."""
    modules = [importlib.import_module(f"{__name__}.{found.name}") for found in pkgutil.iter_modules(__path__)]
    pages = sorted(
        (module.PAGE for module in modules if hasattr(module, "PAGE")),
        key=lambda page: (GROUPS.index(page.group), page.order),
    )
    names = [page.name for page in pages]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two page modules are called {name!r}")
    return pages
