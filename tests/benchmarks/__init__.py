"""Benchmarks: ratios measured on this machine, printed beside their limits. They report; they are no tests.

A benchmark is a file `bench_<name>.py` here with a function `run()` that returns the rows it measured:

    from tests.benchmarks import Row

    def run() -> list[Row]:
        return [Row("cache all sites / raw forward hooks", ratio=1.01, limit=1.02, note="process time, median of 7")]

Time both sides of a ratio in one process, alternating, and check against the slow equation before timing.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measured ratio.

    `limit` is the goal, None when there is none; `at_least` says that bigger is better. `unit` names what was compared
    ("time", "bytes"), `note` how, and what machine limit stands beside it.
    """

    name: str
    ratio: float
    limit: float | None = None
    unit: str = "time"
    note: str = ""
    at_least: bool = False

    @property
    def within(self) -> bool | None:
        """Whether the goal is met; None without a goal."""
        if self.limit is None:
            return None
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit
