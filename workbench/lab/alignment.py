"""Which tokens of two texts stand for the same letters, whatever the tokenizers.

    found = align(TokenText.of(one_run.manifest), TokenText.of(other_run.manifest))
    found.parts                      int [part, 4]: tokens first_start:first_stop of the one are second_start:second_stop of the other
    found.aligned                    bool [part]; where False, one of the two is empty: that token has no counterpart

Parts are as short as they can be: two tokenizations are cut wherever both have a boundary. Texts that differ are matched by their words
(longest matching blocks, as `difflib` finds them), so that a changed word leaves the rest aligned. Tokens that stand for no letters
(`[CLS]`, `</s>`) are aligned with equal ones when the tokenizers are the same, and with nothing otherwise. Offsets are counted in bytes of
UTF-8: a byte tokenizer cuts inside letters. numpy and the standard library only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any, Self

import numpy as np

Span = tuple[int, int]
WORD = re.compile(rb"[A-Za-z0-9_\x80-\xff]+|[^\s]")
"""In bytes of UTF-8: letters beyond ASCII belong to words."""
REACH = 64
"""Bytes that one token whose letters are not found (such as an unknown word's) may stand for."""


@dataclass(frozen=True)
class TokenText:
    """A text with its tokens: ids, a label for each (as `Tokenizer.token_strings` makes them), and the tokenizer's name."""

    text: str
    ids: Sequence[int]
    labels: Sequence[str]
    tokenizer: str

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Self:
        """The text of a run. ValueError for a run without tokens."""
        record = manifest.get("tokens")
        if not record or not record.get("ids"):
            raise ValueError(f"run {manifest.get('id')} has no tokens to align: it is a {manifest.get('kind')} run")
        return cls(manifest.get("text") or "", record["ids"], record["strings"], record["tokenizer"])


@dataclass(frozen=True)
class Alignment:
    """Parts in the order of both texts: `parts` int64 [part, 4] of (first start, first stop, second start, second stop) tokens."""

    parts: np.ndarray

    @cached_property
    def aligned(self) -> np.ndarray:
        """Which parts have tokens on both sides: bool [part]."""
        return np.asarray(self.sizes.min(axis=1) > 0)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Number of tokens of each part on either side: int [part, 2]."""
        return np.stack([self.parts[:, 1] - self.parts[:, 0], self.parts[:, 3] - self.parts[:, 2]], axis=1)

    @cached_property
    def identical(self) -> bool:
        """Whether token i of the one is token i of the other, for every i."""
        return bool((self.sizes == 1).all())

    def tokens(self, side: int) -> np.ndarray:
        """Start and stop of every part on side 0 (first) or 1 (second): int [part, 2]."""
        return self.parts[:, 2 * side : 2 * side + 2]

    def in_words(self) -> str:
        """How much is aligned, in one sentence."""
        single, grouped = (self.sizes == 1).all(axis=1), self.aligned
        first, second = (int(n) for n in self.sizes.sum(axis=0))
        if self.identical:
            return f"All {first} tokens align one to one."
        left = [int(self.sizes[~grouped, side].sum()) for side in (0, 1)]
        groups = int((grouped & ~single).sum())
        words = [f"{int(single.sum())} tokens align one to one"]
        if groups:
            words.append(f"{groups} group{'s' if groups > 1 else ''} of several with several")
        return (
            f"{', '.join(words)}; without a counterpart: {left[0]} of {first} tokens of A, {left[1]} of {second} of B."
        )


def align(first: TokenText, second: TokenText) -> Alignment:
    """The shortest parts at whose ends both tokenizations have a boundary."""
    same = first.tokenizer == second.tokenizer
    if same and list(first.ids) == list(second.ids):
        each = np.arange(len(first.ids))
        return Alignment(np.stack([each, each + 1, each, each + 1], axis=1))
    spans = [token_spans(each) for each in (first, second)]
    owners = [_owners(each, len(of.text.encode())) for each, of in zip(spans, (first, second), strict=True)]
    links: set[Span] = set()
    for i, j, size in matching_bytes(first.text, second.text):
        pairs = np.stack([owners[0][i : i + size], owners[1][j : j + size]], axis=1)
        links |= {(a, b) for a, b in np.unique(pairs, axis=0).tolist() if a >= 0 and b >= 0}
    silent = [{t for t, (start, stop) in enumerate(each) if start == stop} for each in spans]
    parts: list[tuple[int, int, int, int]] = []
    done = (0, 0)
    for group in _groups(sorted(links)):
        parts += _gap(first, second, (done[0], group[0]), (done[1], group[2]), silent if same else None)
        parts.append(group)
        done = group[1], group[3]
    parts += _gap(first, second, (done[0], len(first.ids)), (done[1], len(second.ids)), silent if same else None)
    return Alignment(np.array(parts, dtype=np.int64).reshape(-1, 4))


def token_spans(tokens: TokenText) -> list[Span]:
    """Where every token lies in its text, (start, stop) in bytes of UTF-8; an empty span where a token stands for no letters of it.

    Exact for byte tokens. For others the labels are found in the text one after the other: with the marks of byte-level, sentencepiece
    and wordpiece vocabularies undone, with or without leading white space, capital or not. A token that is not found (an unknown word)
    takes what lies between its neighbours.
    """
    data = tokens.text.encode()
    if tokens.tokenizer == "bytes" and len(data) == len(tokens.ids):
        return [(at, at + 1) for at in range(len(data))]
    lowered, spans = data.lower(), list[Span]()
    cursor, lost = 0, 0
    for label in tokens.labels:
        found = _find(lowered, cursor, _spellings(label), REACH * lost)
        if found is None:
            spans.append((cursor, cursor))
            lost += 1
            continue
        if lost == 1 and found[0] > cursor:
            spans[-1] = cursor, found[0]
        spans.append(found)
        cursor, lost = found[1], 0
    return spans


def _spellings(label: str) -> list[bytes]:
    """What the label may look like in the text, in lower case, the likeliest first."""
    plain = label.replace("↵", "\n").replace("⇥", "\t")
    found = [label, plain, plain.lstrip(" ")]
    if label.startswith("##") and len(label) > 2:
        found.insert(0, label[2:])
    spelled = [each.encode() for each in found if each]
    byte = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", label)
    if byte:
        spelled.insert(0, bytes([int(byte[1], 16)]))
    elif not label.isascii() and all(letter in BYTE_OF_LETTER for letter in label):
        spelled.append(bytes(BYTE_OF_LETTER[letter] for letter in label))
    return [each.lower() for each in spelled]


def _letters_of_bytes() -> dict[str, int]:
    """The alphabet of byte-level vocabularies (GPT-2's): printable bytes stand for themselves, the others follow from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)} | {" ": 32}


BYTE_OF_LETTER = _letters_of_bytes()


def _find(data: bytes, cursor: int, spellings: Sequence[bytes], reach: int) -> Span | None:
    """The first spelling that stands at the cursor, after white space, or (within `reach` bytes) after what lost tokens stand for."""
    spaces = len(data) - len(data[cursor:].lstrip()) if reach == 0 else cursor
    for start in dict.fromkeys((cursor, spaces)):
        for spelling in spellings:
            if data.startswith(spelling, start):
                return start, start + len(spelling)
    if reach:
        places = [(data.find(s, cursor, cursor + reach + len(s)), len(s)) for s in spellings]
        reached = [(at, at + size) for at, size in places if at >= 0]
        return min(reached, default=None)
    return None


def matching_bytes(first: str, second: str) -> list[tuple[int, int, int]]:
    """Equal blocks of whole words, ascending in both: (start in the first, start in the second, length), in bytes of UTF-8."""
    texts = [first.encode(), second.encode()]
    if first == second:
        return [(0, 0, len(texts[0]))] if first else []
    words = [[(m.group(), m.start()) for m in WORD.finditer(each)] for each in texts]
    names = [[word for word, _ in each] for each in words]
    shorter = min(map(len, names))
    head = next((i for i in range(shorter) if names[0][i] != names[1][i]), shorter)
    tail = next((i for i in range(shorter - head) if names[0][-1 - i] != names[1][-1 - i]), shorter - head)
    middle = [each[head : len(each) - tail] for each in names]
    matcher = SequenceMatcher(
        None, middle[0], middle[1]
    )  # in long texts, a frequent word extends a match and starts none
    pairs = [(i, i) for i in range(head)]
    pairs += [(head + a + i, head + b + i) for a, b, n in matcher.get_matching_blocks() for i in range(n)]
    pairs += [(len(names[0]) - tail + i, len(names[1]) - tail + i) for i in range(tail)]
    blocks: list[tuple[int, int, int]] = []
    for a, b in pairs:
        (word, start), (_, other) = words[0][a], words[1][b]
        size, after = len(word), (blocks[-1][0] + blocks[-1][2], blocks[-1][1] + blocks[-1][2]) if blocks else (0, 0)
        while (
            start > after[0]
            and other > after[1]
            and texts[0][start - 1] == texts[1][other - 1]
            and texts[0][start - 1 : start].isspace()
        ):
            start, other, size = start - 1, other - 1, size + 1
        if blocks and (start, other) == after:
            blocks[-1] = (*blocks[-1][:2], blocks[-1][2] + size)
            continue
        if blocks:
            blocks[-1] = (*blocks[-1][:2], blocks[-1][2] + _spaces(texts, after, (start, other)))
        blocks.append((start, other, size))
    ends = (blocks[-1][0] + blocks[-1][2], blocks[-1][1] + blocks[-1][2]) if blocks else (0, 0)
    more = _spaces(texts, ends, (len(texts[0]), len(texts[1])))
    return [*blocks[:-1], (*blocks[-1][:2], blocks[-1][2] + more)] if blocks else []


def _spaces(texts: Sequence[bytes], start: Span, stop: Span) -> int:
    """How many bytes of white space both texts have from `start` on, before `stop`."""
    count = 0
    while start[0] + count < stop[0] and start[1] + count < stop[1]:
        one, other = (text[at + count : at + count + 1] for text, at in zip(texts, start, strict=True))
        if one != other or not one.isspace():
            break
        count += 1
    return count


def _owners(spans: Sequence[Span], length: int) -> np.ndarray:
    """The token that each byte belongs to, −1 for none: int64 [byte]."""
    owners = np.full(length, -1, dtype=np.int64)
    for token, (start, stop) in enumerate(spans):
        owners[start:stop] = token
    return owners


def _groups(links: Sequence[Span]) -> list[tuple[int, int, int, int]]:
    """Tokens that are linked directly or through others, as ranges; `links` ascending."""
    groups: list[tuple[int, int, int, int]] = []
    for a, b in links:
        if groups and (a < groups[-1][1] or b < groups[-1][3]):
            start, stop, other, last = groups[-1]
            groups[-1] = start, max(stop, a + 1), other, max(last, b + 1)
        else:
            groups.append((a, a + 1, b, b + 1))
    return groups


def _gap(
    first: TokenText, second: TokenText, ones: Span, others: Span, silent: Sequence[set[int]] | None
) -> list[tuple[int, int, int, int]]:
    """Parts of the tokens between two groups: each alone, but for those without letters that both have."""
    parts: list[tuple[int, int, int, int]] = []
    b = others[0]
    for a in range(*ones):
        same = next(
            (
                t
                for t in range(b, others[1])
                if silent and a in silent[0] and t in silent[1] and first.ids[a] == second.ids[t]
            ),
            None,
        )
        if same is None:
            parts.append((a, a + 1, b, b))
            continue
        parts += [(a, a, t, t + 1) for t in range(b, same)]
        parts.append((a, a + 1, same, same + 1))
        b = same + 1
    return [*parts, *((ones[1], ones[1], t, t + 1) for t in range(b, others[1]))]
