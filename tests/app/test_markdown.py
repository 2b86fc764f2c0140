"""Brackets that are no links are escaped; links and code are left alone."""

import pytest

from app.markdown import literal_brackets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.5 [0.4, 0.6] and [SEP]", r"0.5 \[0.4, 0.6\] and \[SEP\]"),
        ("[a page](page.md) [0, 1]", r"[a page](page.md) \[0, 1\]"),
        ("`[CLS] text` [CLS]", r"`[CLS] text` \[CLS\]"),
        ("```\nx[0]\n```\nx[0]", "```\nx[0]\n```\nx\\[0\\]"),
        (r"\[done\]", r"\[done\]"),
        ("[paper][1]\n\n[1]: https://example.org", "[paper][1]\n\n[1]: https://example.org"),
        ("no brackets", "no brackets"),
    ],
)
def test_brackets(text: str, expected: str) -> None:
    assert literal_brackets(text) == expected
