"""Where a finished job leads, when that is not simply the page that opens runs of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Destination:
    """The result of a job that made `run` and leads to `page` (its path), with `change` of the address by URL key."""

    run: str
    page: str
    change: Mapping[str, Any] = field(default_factory=dict)

    def target(self) -> dict[str, Any]:
        """For the store `go`."""
        return {"change": {"run": self.run, **self.change}, "page": self.page}
