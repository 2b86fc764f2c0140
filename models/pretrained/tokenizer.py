"""A checkpoint's own tokenizer behind our protocol (`workbench.lab.tokenizers.Tokenizer`)."""

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.lab.checkpoints import CheckpointError, read_json

FAST = "tokenizer.json"
WITHOUT = "For token ids only: models.load(..., tokenizer=False)."
SENTENCEPIECE = ("spiece.model", "tokenizer.model")
CONVERTERS = {"sentencepiece": "sentencepiece", "google.protobuf": "protobuf"}  # module: what pip calls it
INSTALL = "pip install sentencepiece protobuf (in a checkout: pip install -c constraints.txt -e '.[sentencepiece]')"
RENAMED = {
    "MT5Tokenizer": "T5Tokenizer",
    "MT5TokenizerFast": "T5Tokenizer",
}  # classes that transformers 5 no longer has
OTHERS = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "tokenizer_config.json")
MASKS = ("[MASK]", "<mask>")  # of BERT and DistilBERT; of RoBERTa and its relatives
_MARKS = {"Ġ": " ", "▁": " ", "Ċ": "↵", "ĉ": "⇥", "\n": "↵", "\t": "⇥"}


class PretrainedTokenizer:
    """Wraps a tokenizer of the `tokenizers` library. Texts get the special tokens that the checkpoint was trained with.

    Args: backend: a `tokenizers.Tokenizer`. name: recorded in runs. vocab_size: of the model, which may have more rows than the tokenizer.
    """

    def __init__(self, backend: Any, name: str, vocab_size: int) -> None:
        if backend.get_vocab_size() > vocab_size:
            raise ValueError(
                f"The tokenizer knows {backend.get_vocab_size()} tokens, the model embeds {vocab_size}. They do not belong together."
            )
        self.backend, self.name, self.vocab_size = backend, name, vocab_size
        backend.no_padding()
        backend.no_truncation()

    @property
    def mask_id(self) -> int | None:
        """The token that stands for a masked one and that a text may name, `[MASK]` or `<mask>`; None if there is none."""
        found = [self.backend.token_to_id(name) for name in MASKS]
        return next((token for token in found if token is not None), None)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, with special tokens."""
        return self._ids(text, True)

    def encode_plain(self, text: str) -> list[int]:
        """Ids of a text without special tokens (for a piece of a text)."""
        return self._ids(text, False)

    def _ids(self, text: str, special: bool) -> list[int]:
        if not isinstance(text, str):
            raise TypeError(f"{self.name}: expected a str, got {type(text).__name__}")
        return list(self.backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens included."""
        return str(self.backend.decode([int(i) for i in ids], skip_special_tokens=False))

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """One label per id: word boundaries as spaces, bytes that are no character by themselves in the tokenizer's own notation."""
        return [self._label(int(i)) for i in ids]

    def _label(self, token: int) -> str:
        raw = self.backend.id_to_token(token)
        if raw is None:
            return f"<{token}>"
        if not raw.isascii() and not set(raw) <= set(_MARKS) and raw[:1] != "▁":
            whole = self.backend.decode([token], skip_special_tokens=False)
            if whole and "�" not in whole:
                raw = whole
        return "".join(_MARKS.get(character, character) for character in raw)


def tokenizer_of(folder: Path, vocab_size: int) -> PretrainedTokenizer | None:
    """The tokenizer in a checkpoint's folder; None if there is none. Formats other than `tokenizer.json` go through transformers."""
    path = folder / FAST
    if path.is_file():
        from tokenizers import Tokenizer

        name = f"{folder.name}:{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
        try:
            backend = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise CheckpointError(f"{path} is no tokenizer that can be read: {error}. {WITHOUT}") from None
        return PretrainedTokenizer(backend, name, vocab_size)
    there = [name for name in OTHERS[:-1] if (folder / name).is_file()]
    if not there:
        return None
    try:
        backend = _class_of(folder).from_pretrained(str(folder), local_files_only=True).backend_tokenizer
    except Exception as error:  # whatever a tokenizer's class makes of a file that it does not understand
        lacking = [package for module, package in CONVERTERS.items() if not _installed(module)]
        if lacking and any(name in there for name in SENTENCEPIECE):
            raise CheckpointError(
                f"{folder}: its tokenizer is a SentencePiece file ({', '.join(there)}), and {' and '.join(lacking)} "
                f"{'is' if len(lacking) == 1 else 'are'} not installed. Expected both packages, {INSTALL}, or {FAST} beside it. {WITHOUT}"
            ) from error
        raise CheckpointError(
            f"{folder}: its tokenizer ({', '.join(there)}) cannot be converted by transformers: {_reason(error)} Expected {FAST}, which "
            f"most checkpoints have beside it. {WITHOUT}"
        ) from error
    return PretrainedTokenizer(backend, folder.name, vocab_size)


def _class_of(folder: Path) -> Any:
    """What opens a folder's tokenizer: transformers' own choice, but for classes whose names it has given up."""
    import transformers

    config = folder / "tokenizer_config.json"
    named = read_json(config).get("tokenizer_class") if config.is_file() else None
    return getattr(transformers, RENAMED[named]) if named in RENAMED else transformers.AutoTokenizer


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # the package that it would lie in is not there
        return False


def _reason(error: Exception) -> str:
    """The first sentence or line of what went wrong."""
    line = (str(error).splitlines() or [type(error).__name__])[0].strip()
    return line if line.endswith(".") else f"{line}."
