"""What a model is trained on: windows of text or sequences of a task, always the same ones for a seed and step."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from workbench.lab.corpora import Corpus, load_corpus
from workbench.lab.ngram import NgramModel
from workbench.lab.tasks import Task, TaskBatch
from workbench.lab.tokenizers import ByteTokenizer, Tokenizer


class Batches(Protocol):
    """What `train` asks of its data.

    A batch is `tokens` int64 [batch, pos] and `loss_mask` bool [batch, pos] with pos = context + 1: the model reads
    `tokens[:, :-1]`, and `loss_mask[b, t]` says whether predicting `tokens[b, t]` from the tokens before it counts. A
    third tensor, `targets` int64 [batch, pos], takes the place of the tokens as what is predicted.
    """

    batch_size: int
    context: int

    def next_batch(self, step: int) -> tuple[Tensor, ...]:
        """The batch of a step (from 0): the same one whenever it is asked for."""
        ...

    def validation_batches(self) -> Sequence[tuple[Tensor, ...]]:
        """Held-out batches, always the same."""
        ...

    def describe(self) -> dict[str, Any]:
        """A JSON record that identifies the data exactly."""
        ...

    def references(self) -> dict[str, float]:
        """Losses that a model should beat, in nats per token."""
        ...


class TextBatches:
    """Random windows of a corpus for training; evenly spaced windows of its held-out part for validation.

    Parameters
    ----------
    corpus
        A name or path for `load_corpus`, or a training Corpus together with `validation`.
    context
        Number of tokens that the model reads; a window holds one token more.
    validation_windows
        Number of held-out windows (fewer if the text is too short for so many without overlap).

    Raises ValueError for a text that is shorter than one window.
    """

    def __init__(
        self,
        corpus: str | Path | Corpus,
        context: int,
        batch_size: int,
        seed: int = 0,
        validation: Corpus | None = None,
        validation_windows: int = 256,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        if isinstance(corpus, Corpus):
            if validation is None:
                raise ValueError("give the held-out Corpus as `validation`, or name the corpus instead of passing it")
        elif validation is not None:
            raise ValueError("`validation` goes with a Corpus object; a named corpus has its own held-out part")
        else:
            name = corpus
            corpus, validation = load_corpus(name, "train"), load_corpus(name, "validation")
        _check_sizes(context=context, batch_size=batch_size, validation_windows=validation_windows)
        self.corpus, self.validation = corpus, validation
        self.context, self.batch_size, self.seed = context, batch_size, seed
        self.tokenizer = tokenizer or ByteTokenizer()
        self._tokens, held_out = (_token_tensor(self.tokenizer, part) for part in (corpus, validation))
        for part, tokens in ((corpus, self._tokens), (validation, held_out)):
            if len(tokens) <= context:
                raise ValueError(
                    f"{part!r} has {len(tokens)} tokens; a window of context {context} needs {context + 1}"
                )
        windows = min(validation_windows, len(held_out) // (context + 1))
        starts = torch.linspace(0, len(held_out) - context - 1, windows, dtype=torch.float64).long()
        self._held_out = self._windows(held_out, starts)  # [window, pos]

    def next_batch(self, step: int) -> tuple[Tensor, ...]:
        choices = len(self._tokens) - self.context
        starts = torch.from_numpy(np.random.default_rng([self.seed, step]).integers(choices, size=self.batch_size))
        tokens = self._windows(self._tokens, starts)
        return tokens, _all_but_first(tokens)

    def validation_batches(self) -> Sequence[tuple[Tensor, ...]]:
        return [(tokens, _all_but_first(tokens)) for tokens in self._held_out.split(self.batch_size)]

    def describe(self) -> dict[str, Any]:
        corpora = [
            {"name": part.name, "split": part.split, "bytes": len(part), "sha256": part.sha256,
             "licence": part.licence, "source": part.source}
            for part in (self.corpus, self.validation)
        ]  # fmt: skip
        return {
            "kind": "text", "tokenizer": self.tokenizer.name, "context": self.context, "batch_size": self.batch_size,
            "seed": self.seed, "validation_windows": len(self._held_out), "corpora": corpora,
        }  # fmt: skip

    def references(self) -> dict[str, float]:
        """Loss of a byte trigram model: on the validation windows, with no more context than they hold, and on all the
        held-out text. Empty for tokens that are not bytes."""
        if not isinstance(self.tokenizer, ByteTokenizer):
            return {}
        trigram = NgramModel(order=3).fit(self.corpus.data)
        windows = np.concatenate([trigram.losses(bytes(row))[1:] for row in self._held_out.to(torch.uint8).numpy()])
        return {
            "trigram_same_windows": float(windows.mean()),
            "trigram_whole_text": float(trigram.losses(self.validation.data).mean()),
        }

    def _windows(self, tokens: Tensor, starts: Tensor) -> Tensor:
        return tokens[starts[:, None] + torch.arange(self.context + 1)].long()  # [batch, pos]


class TaskBatches:
    """Batches of a synthetic task (see `workbench.lab.tasks`). The context is the task's length minus one, since the
    last token is only predicted, never read."""

    def __init__(self, task: Task, batch_size: int, validation_batches: int = 8) -> None:
        _check_sizes(batch_size=batch_size, validation_batches=validation_batches)
        self.task, self.batch_size, self.context = task, batch_size, task.length - 1
        self._held_out = [task.batch(batch_size, step, "validation") for step in range(validation_batches)]

    def next_batch(self, step: int) -> tuple[Tensor, ...]:
        return self._asked(self.task.batch(self.batch_size, step, "train"))

    def validation_batches(self) -> Sequence[tuple[Tensor, ...]]:
        return [self._asked(batch) for batch in self._held_out]

    def _asked(self, batch: TaskBatch) -> tuple[Tensor, ...]:
        beside = self.task.answers == "beside"
        return (batch.tokens, batch.loss_mask, batch.targets) if beside else (batch.tokens, batch.loss_mask)

    def describe(self) -> dict[str, Any]:
        return {
            "kind": "task", "task": self.task.describe(), "context": self.context, "batch_size": self.batch_size,
            "validation_batches": len(self._held_out),
        }  # fmt: skip

    def references(self) -> dict[str, float]:
        """The loss of guessing each answer uniformly among the tokens that an answer can be."""
        return {"chance": self.task.chance_loss}


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def _token_tensor(tokenizer: Tokenizer, corpus: Corpus) -> Tensor:
    if isinstance(tokenizer, ByteTokenizer):
        return torch.from_numpy(np.frombuffer(corpus.data, dtype=np.uint8).copy())
    return torch.tensor(tokenizer.encode(corpus.text), dtype=torch.int32)


def _all_but_first(tokens: Tensor) -> Tensor:
    mask = torch.ones(tokens.shape, dtype=torch.bool)
    mask[:, 0] = False  # nothing comes before it
    return mask
