import numpy as np
import pytest
import torch

from workbench.lab.tokenizers import ByteTokenizer, Tokenizer

TEXTS = ["", "plain", "tab\tnew\nline", "naïve café", "数 🐉 end", "e\u0301", "\x00\x7f\u200b"]


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_the_utf8_bytes_and_decode_gives_the_text_back(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids, errors="strict") == text
    assert tokenizer.decode(torch.tensor(ids, dtype=torch.int64)) == text
    assert tokenizer.decode(np.array(ids, dtype=np.int32)) == text


def test_the_byte_tokenizer_fulfils_the_protocol() -> None:
    assert isinstance(ByteTokenizer(), Tokenizer) and ByteTokenizer().vocab_size == 256


@pytest.mark.parametrize(
    ("data", "strings"),
    [
        (b"a b\n\t~", ["a", " ", "b", "↵", "⇥", "~"]),
        (b"\x00\r\x7f", ["<0x00>", "<0x0D>", "<0x7F>"]),
        ("é→🐉".encode(), ["é", "·", "→", "·", "·", "🐉", "·", "·", "·"]),
        (b"a\xffb", ["a", "<0xFF>", "b"]),
        (b"\xe2\x86", ["<0xE2>", "<0x86>"]),  # cut off inside a character
        (b"\xe2\x86x", ["<0xE2>", "<0x86>", "x"]),
        (b"\x86", ["<0x86>"]),  # a continuation byte alone
        (b"\xed\xa0\x80", ["<0xED>", "<0xA0>", "<0x80>"]),  # a surrogate
        ("\u200b".encode(), ["<0xE2>", "<0x80>", "<0x8B>"]),  # valid, but invisible
        ("e\u0301".encode(), ["e", "◌\u0301", "·"]),
    ],
)
def test_display_strings(data: bytes, strings: list[str]) -> None:
    assert ByteTokenizer().token_strings(list(data)) == strings


def test_every_byte_has_one_visible_string() -> None:
    generator = np.random.default_rng(0)
    ids = generator.integers(256, size=4096).tolist()
    strings = ByteTokenizer().token_strings(ids)
    assert len(strings) == len(ids)
    assert all(string and string.isprintable() for string in strings)


def test_a_model_may_generate_invalid_utf8() -> None:
    assert ByteTokenizer().decode([65, 255, 66]) == "A\ufffdB"
    with pytest.raises(UnicodeDecodeError):
        ByteTokenizer().decode([65, 255, 66], errors="strict")


def test_errors_name_what_is_wrong() -> None:
    tokenizer = ByteTokenizer()
    with pytest.raises(ValueError, match=r"U\+D83D at character 3"):
        tokenizer.encode("abc\ud83d")
    with pytest.raises(TypeError, match="expects a str, got bytes"):
        tokenizer.encode(b"abc")  # type: ignore[arg-type]
    for wrong in ([3, 256], [3, -1], [3, 1.5], [3, True]):
        with pytest.raises(ValueError, match="at position 1 is not a byte value"):
            tokenizer.decode(wrong)
    with pytest.raises(ValueError, match="choose one row"):
        tokenizer.token_strings(torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="single number 7"):
        tokenizer.decode(torch.tensor(7))
