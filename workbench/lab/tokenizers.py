"""Text to token ids and back.

The shipped models read bytes: the vocabulary is the 256 byte values, the id of a token is the byte itself, and there
are no special tokens. Any object with the same five members can take the byte tokenizer's place, for instance a
wrapped tokenizer of a pretrained model.
"""

import unicodedata
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

_CONTROL_SYMBOLS = {"\n": "↵", "\t": "⇥"}


@runtime_checkable
class Tokenizer(Protocol):
    """What the workbench asks of a tokenizer."""

    @property
    def name(self) -> str:
        """Identifies the tokenizer in a run's manifest."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of ids; every id lies in 0 … vocab_size − 1."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids."""
        ...

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """One short printable string for every id, for labels; not meant to be joined back into the text."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte: vocab 256, id = byte value, no special tokens."""

    name = "bytes"
    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of `text`.

        Raises TypeError if `text` is not a string, and ValueError if it holds a lone surrogate, which no UTF-8
        sequence stands for (such characters come from broken JSON escapes or from file names).
        """
        if not isinstance(text, str):
            raise TypeError(f"ByteTokenizer.encode expects a str, got {type(text).__name__}")
        try:
            return list(text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}, which has "
                "no UTF-8 form: a full surrogate pair must be one character above U+FFFF, anything else must be removed"
            ) from None

    def decode(self, ids: Any, errors: str = "replace") -> str:
        """The text that the bytes `ids` (integers [pos]: a sequence, array or tensor) spell.

        A model may generate any bytes, so by default an invalid sequence becomes U+FFFD; `errors="strict"` raises
        UnicodeDecodeError instead. With valid UTF-8, `decode(encode(text)) == text`.
        Raises ValueError for an id outside 0 … 255.
        """
        return bytes(self._checked(ids)).decode("utf-8", errors=errors)

    def token_strings(self, ids: Any) -> list[str]:
        """One display string for every byte.

        Printable ASCII stands for itself, the space included. Newline is `↵`, tab is `⇥`. The first byte of a
        multi-byte character shows the whole character and each continuation byte shows `·`. Every other byte (control
        characters, invalid or incomplete UTF-8) is `<0xNN>`.
        """
        data = bytes(self._checked(ids))
        strings: list[str] = []
        while len(strings) < len(data):
            start = len(strings)
            character = _character_at(data, start)
            if character is None:
                strings.append(f"<0x{data[start]:02X}>")
            elif character in _CONTROL_SYMBOLS:
                strings.append(_CONTROL_SYMBOLS[character])
            elif not character.isprintable():
                strings.extend(f"<0x{byte:02X}>" for byte in character.encode("utf-8"))
            else:
                # a combining mark needs a base, or it would sit on whatever the figure draws before it
                shown = "◌" + character if unicodedata.combining(character) else character
                strings.extend([shown, *"·" * (len(character.encode("utf-8")) - 1)])
        return strings

    def _checked(self, ids: Any) -> list[int]:
        """`ids` (any one-dimensional sequence, array or tensor of integers) as a list of byte values."""
        values = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        if not isinstance(values, list):
            raise ValueError(f"expected a one-dimensional sequence of ids, got the single number {values}")
        for position, value in enumerate(values):
            if isinstance(value, list):
                raise ValueError("expected a one-dimensional sequence of ids [pos]; choose one row of the batch first")
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 255:
                raise ValueError(f"id {value!r} at position {position} is not a byte value 0 … 255")
        return values


def _character_at(data: bytes, start: int) -> str | None:
    """The character whose UTF-8 sequence begins at `start`, or None if no complete valid sequence begins there."""
    for width in (1, 2, 3, 4):
        try:
            return data[start : start + width].decode("utf-8")
        except UnicodeDecodeError:
            continue
    return None
