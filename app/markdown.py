"""Markdown for the dashboard's renderer, which takes every [bracket] for a link, also where nothing says where it leads."""

from __future__ import annotations

import re

_CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
_BRACKET = re.compile(r"(?<![\\\]])\[([^\[\]\n]*)\](?![(\[:])")


def literal_brackets(text: str) -> str:
    """The text with brackets that are no links, such as an interval [0.1, 0.2], escaped. Code and [links](…) stay as they are."""
    parts = _CODE.split(text)
    parts[::2] = [_BRACKET.sub(r"\\[\1\\]", part) for part in parts[::2]]
    return "".join(parts)
