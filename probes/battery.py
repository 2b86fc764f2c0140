"""Several probes on one model, and their results as a run.

    results = run_probes(model, ["census", "sinks"], text="the cat sat on the mat and the cat sat on the hat")
    run = store_probes(RunStore(), model, results)

A probe that has no answer for this model or these texts does not stop the others: its result is a `NoAnswer` that says why.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probes.census import head_census, random_twin
from probes.heads import head_scores
from probes.retrieval import needle_grid, retrieval_scores
from probes.sinks import find_sinks
from workbench.instrument.errors import HookError, suggestion
from workbench.lab.corpora import load_corpus
from workbench.lab.runs import Run, RunStore
from workbench.lab.tasks import TaskBatch, make_task

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class NoAnswer:
    """A probe that could not be answered, and why."""

    reason: str

    def to_json(self) -> dict[str, Any]:
        """`{"reason": …}`."""
        return asdict(self)


@dataclass(frozen=True)
class _Setting:
    """What all probes of one call share. `texts` [batch, pos]: None where no text was given."""

    model: Any
    texts: Tensor | None
    vocab: int
    length: int
    sequences: int
    seed: int
    whole_patterns: bool

    def batch(self) -> TaskBatch:
        """Sequences of the induction task with varied periods."""
        task = make_task("induction", vocab_size=self.vocab, length=self.length, seed=self.seed)
        return task.batch(self.sequences, split="validation")


def _induction(setting: _Setting) -> Any:
    return head_scores(setting.model, setting.batch(), ("previous_token", "duplicate_token", "induction"))


def _census(setting: _Setting) -> Any:
    batch = setting.batch() if setting.texts is None else setting.texts
    try:
        twin = random_twin(setting.model, setting.seed + 1)
    except ValueError:
        twin = None
    return head_census(setting.model, batch, twin=twin, seed=setting.seed)


def _sinks(setting: _Setting) -> Any:
    tokens = setting.batch().tokens if setting.texts is None else setting.texts
    return find_sinks(setting.model, tokens, whole_patterns=setting.whole_patterns)


def _retrieval(setting: _Setting) -> Any:
    runs = needle_grid(setting.vocab, (setting.length // 2, setting.length - 8), repeats=2, seed=setting.seed)
    return retrieval_scores(setting.model, runs, whole_patterns=setting.whole_patterns)


PROBES: dict[str, Callable[[_Setting], Any]] = {
    "induction": _induction,
    "census": _census,
    "sinks": _sinks,
    "retrieval": _retrieval,
}


def run_probes(
    model: Any,
    probes: Sequence[str] = tuple(PROBES),
    *,
    text: str | None = None,
    corpus: str | None = None,
    vocab: int | None = None,
    length: int = 96,
    sequences: int = 16,
    seed: int = 0,
    whole_patterns: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Results by probe: `HeadScores`, `Census`, `SinkReport`, `RetrievalScores` or `NoAnswer`, each with `to_json`.

    Args:
        probes: names from `PROBES`. text, corpus: what `census` and `sinks` read (at most one; None: sequences of the induction task;
            a corpus gives `sequences` pieces of `length` tokens of its validation text). `induction` and `retrieval` make their own.
        vocab: tokens that made-up sequences use (None: at most 128). length: their length. whole_patterns: as for `attention_statistics`.

    Raises:
        ValueError: an unknown probe, both text and corpus.
    """
    for probe in probes:
        if probe not in PROBES:
            raise ValueError(f"Unknown probe {probe!r}.{suggestion(probe, PROBES)} Known: {', '.join(PROBES)}.")
    if text is not None and corpus is not None:
        raise ValueError("Give a text or a corpus, not both.")
    length = min(length, model.n_ctx or length)
    texts = model.to_tokens(text) if text is not None else None
    if corpus is not None:
        texts = pieces(model, corpus, length, sequences)
    size = min(model.vocab_size, 128) if vocab is None else vocab
    setting = _Setting(model, texts, size, length, sequences, seed, whole_patterns)
    results: dict[str, Any] = {}
    training = model.training
    model.eval()
    try:
        for number, probe in enumerate(probes):
            if progress is not None:
                progress(number / len(probes), probe)
            try:
                results[probe] = PROBES[probe](setting)
            except (ValueError, HookError) as error:
                results[probe] = NoAnswer(str(error))
    finally:
        model.train(training)
    return results


def pieces(model: Any, corpus: str, length: int, sequences: int) -> Tensor:
    """Pieces of a corpus's validation text, evenly spread over it, as token ids [sequence, pos]. ValueError if it is too short."""
    data = load_corpus(corpus, "validation").text
    tokens = model.to_tokens(data[: 64 * length * sequences])[0]
    if len(tokens) < length:
        raise ValueError(
            f"corpus {corpus!r}: its validation text has {len(tokens)} tokens, fewer than one piece of {length}."
        )
    count = min(sequences, len(tokens) // length)
    starts = np.linspace(0, len(tokens) - length, count).round().astype(int)
    return torch.stack([tokens[start : start + length] for start in starts.tolist()])


def store_probes(
    store: RunStore,
    model: Any,
    results: dict[str, Any],
    *,
    title: str | None = None,
    settings: dict[str, Any] | None = None,
) -> Run:
    """The results as a run of kind `"probe"`: `results[probe]` in the manifest, score tables as arrays `<probe>.<score>` [layer, head]."""
    about: dict[str, Any] = model.about() if hasattr(model, "about") else {}
    name = getattr(model, "name", type(model).__name__)
    record = {"name": name, "architecture": getattr(model, "architecture", "unknown"), **about}
    with store.create("probe", title or f"{', '.join(results)} of {name}", model=record) as run:
        for probe, result in results.items():
            tables = getattr(result, "scores", {})
            for score, values in (tables if isinstance(tables, dict) else {"score": tables}).items():
                run.add_array(f"{probe}.{score}", values.astype(np.float32), axes=("layer", "head"))
        run.set(
            results={probe: {"kind": type(result).__name__, **result.to_json()} for probe, result in results.items()},
            settings=settings or {},
        )
    return store.open(run.id)
