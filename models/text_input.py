"""`TextInput`: texts to tokens and back, by a model's tokenizer. A base of `Decoder`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class TextInput:
    """What a model with a `tokenizer` (None: it takes ids only) and a `device` does with texts."""

    tokenizer: Any = None

    @property
    def device(self) -> torch.device:
        """Where tokens go."""
        raise TypeError(f"{type(self).__name__} does not say where it is")

    def to_tokens(self, tokens: Any, prepend_bos: bool | None = None) -> Tensor:
        """[batch, pos] ids from ids of any integer type, text, or a list of texts of equal token length (use `pad` for unequal ones).

        `prepend_bos` is TransformerLens's; the tokenizers here have no token to prepend, so True is an error.
        """
        if prepend_bos:
            raise ValueError(
                "There is no token to prepend: bytes have no beginning-of-sequence token. Expected prepend_bos=False."
            )
        if isinstance(tokens, Tensor):
            if tokens.dim() == 1:
                tokens = tokens[None]
            if tokens.dim() != 2 or tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
                raise ValueError(f"Expected token ids [batch, pos], got shape {tuple(tokens.shape)} of {tokens.dtype}.")
            return tokens.long()  # torch would take bytes (uint8) for a mask
        texts = [tokens] if isinstance(tokens, str) else list(tokens)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"Expected token ids, a text or a list of texts; got {type(tokens).__name__}.")
        ids = [self._tokenizer().encode(text) for text in texts]
        if len({len(i) for i in ids}) > 1:
            raise ValueError(
                "The texts have different numbers of tokens. Use tokens, mask = model.pad(texts) and pass mask=mask."
            )
        return torch.tensor(ids, device=self.device)

    def pad(self, texts: Sequence[str], side: str = "left") -> tuple[Tensor, Tensor]:
        """Tokens [batch, pos] and mask [batch, pos] of texts of unequal length; padding tokens have id 0."""
        if side not in ("left", "right"):
            raise ValueError(f"Unknown side {side!r}. Expected 'left' or 'right'.")
        if isinstance(texts, str) or not len(texts):
            raise ValueError(
                f"pad expects a list of texts, got {type(texts).__name__}."
                if len(texts)
                else "pad got no texts. Expected at least one."
            )
        ids = [self._tokenizer().encode(text) for text in texts]
        for number, row in enumerate(ids):
            if not row:
                raise ValueError(f"pad: text {number} is empty. Expected at least one token.")
        length = max(len(i) for i in ids)
        rows, masks = [], []
        for row in ids:
            fill = [0] * (length - len(row))
            rows.append(fill + row if side == "left" else row + fill)
            masks.append(
                [False] * len(fill) + [True] * len(row) if side == "left" else [True] * len(row) + [False] * len(fill)
            )
        return torch.tensor(rows, device=self.device), torch.tensor(masks, device=self.device)

    def to_string(self, tokens: Tensor) -> str | list[str]:
        """Text of ids [pos] or [batch, pos]."""
        if tokens.dim() == 1:
            return self._tokenizer().decode(tokens.tolist())
        return [self._tokenizer().decode(row.tolist()) for row in tokens]

    def to_single_token(self, text: str) -> int:
        """The id of a text that is exactly one token."""
        tokenizer = self._tokenizer()
        ids = getattr(tokenizer, "encode_plain", tokenizer.encode)(text)  # without special tokens around it
        if len(ids) != 1:
            raise ValueError(f"{text!r} is {len(ids)} tokens, expected exactly one.")
        return ids[0]

    def _tokenizer(self) -> Any:
        if self.tokenizer is None:
            raise ValueError("This model has no tokenizer: pass token ids [batch, pos].")
        return self.tokenizer
