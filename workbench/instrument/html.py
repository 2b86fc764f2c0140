"""Small HTML for notebooks. Everything shown is text: what comes from a model, a file or a user is escaped."""

from collections.abc import Iterable, Sequence
from html import escape


def table(summary: str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table that folds under its summary line."""

    def line(cells: Sequence[object], tag: str) -> str:
        return (
            "<tr>" + "".join(f"<{tag} style='text-align:left'>{escape(str(cell))}</{tag}>" for cell in cells) + "</tr>"
        )

    body = "".join(line(row, "td") for row in rows)
    return (
        f"<details open><summary>{escape(summary)}</summary>"
        f"<table><thead>{line(header, 'th')}</thead><tbody>{body}</tbody></table></details>"
    )
