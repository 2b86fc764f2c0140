"""Several probes on one model, and their results as a run.

    results = run_probes(model, ["census", "sinks"], text="the cat sat on the mat and the cat sat on the hat")
    run = store_probes(RunStore(), model, results)

    found = survey(model, ["induction", "sinks"], lengths=(48, 192))      # also at other lengths, and on a random twin
    run = store_probes(RunStore(), model, found)

A probe that has no answer for this model or these texts does not stop the others: its result is a `NoAnswer` that says why.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from threading import Event
from typing import Any

import numpy as np
import torch
from torch import Tensor

from probes.census import head_census, random_twin
from probes.heads import head_scores
from probes.long_context import adaptive_heads, segment_attention
from probes.progress import Progress as Telling
from probes.retrieval import needle_grid, retrieval_scores
from probes.score_tables import ScoreTable, layer_labels, score_tables, twin_tables
from probes.sinks import find_sinks
from probes.statistics import attention_statistics
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
    compare: bool = True  # whether the census makes a random twin of its own
    progress: Progress | None = None

    def batch(self) -> TaskBatch:
        """Sequences of the induction task with varied periods."""
        task = make_task("induction", vocab_size=self.vocab, length=self.length, seed=self.seed)
        return task.batch(self.sequences, split="validation")


def _induction(setting: _Setting) -> Any:
    return head_scores(setting.model, setting.batch(), ("previous_token", "duplicate_token", "induction"))


def _census(setting: _Setting) -> Any:
    batch = setting.batch() if setting.texts is None else setting.texts
    try:
        twin = random_twin(setting.model, setting.seed + 1) if setting.compare else None
    except ValueError:
        twin = None
    return head_census(setting.model, batch, twin=twin, seed=setting.seed, progress=setting.progress)


def _sinks(setting: _Setting) -> Any:
    tokens = setting.batch().tokens if setting.texts is None else setting.texts
    return find_sinks(setting.model, tokens, whole_patterns=setting.whole_patterns)


def _retrieval(setting: _Setting) -> Any:
    runs = needle_grid(setting.vocab, (setting.length // 2, setting.length - 8), repeats=2, seed=setting.seed)
    return retrieval_scores(setting.model, runs, whole_patterns=setting.whole_patterns)


def _local(setting: _Setting) -> Any:
    tokens = setting.batch().tokens if setting.texts is None else setting.texts
    return adaptive_heads(setting.model, tokens)


def _basin(setting: _Setting) -> Any:
    tokens = setting.batch().tokens if setting.texts is None else setting.texts
    return segment_attention(setting.model, tokens, 8, rows=8, whole_patterns=setting.whole_patterns)


PROBES: dict[str, Callable[[_Setting], Any]] = {
    "induction": _induction,
    "census": _census,
    "sinks": _sinks,
    "retrieval": _retrieval,
    "local": _local,
    "basin": _basin,
}


def run_probes(
    model: Any,
    probes: Sequence[str] = tuple(PROBES),
    *,
    text: str | Tensor | None = None,
    corpus: str | None = None,
    vocab: int | None = None,
    length: int = 96,
    sequences: int = 16,
    seed: int = 0,
    whole_patterns: bool = False,
    compare: bool = True,
    progress: Progress | None = None,
    cancel: Event | None = None,
) -> dict[str, Any]:
    """Results by probe: what each probe's function returns, or `NoAnswer`; each has `to_json`.

    Args:
        probes: names from `PROBES`. text, corpus: what `census`, `sinks`, `local` and `basin` read (at most one; None: sequences of the
            induction task; a corpus gives `sequences` pieces of `length` tokens of its validation text). `induction` and `retrieval` make
            their own.
        vocab: tokens that made-up sequences use (None: at most 128). length: their length. whole_patterns: as for `attention_statistics`.
        compare: whether the census is compared with a random twin. progress, cancel: as everywhere.

    Raises:
        ValueError: an unknown probe, both text and corpus. MeasurementCancelled: `cancel` was set.
    """
    for probe in probes:
        if probe not in PROBES:
            raise ValueError(f"Unknown probe {probe!r}.{suggestion(probe, PROBES)} Known: {', '.join(PROBES)}.")
    length = min(length, model.n_ctx or length)
    texts = texts_read(model, text, corpus, length, sequences)
    size = min(model.vocab_size, 128) if vocab is None else vocab
    tell = Telling(progress, cancel)
    results: dict[str, Any] = {}
    training = model.training
    model.eval()
    try:
        for number, probe in enumerate(probes):
            part = tell.part(number / len(probes), (number + 1) / len(probes))
            part(0.0, probe)
            setting = _Setting(model, texts, size, length, sequences, seed, whole_patterns, compare, part)
            try:
                results[probe] = PROBES[probe](setting)
            except (ValueError, HookError) as error:
                results[probe] = NoAnswer(str(error))
    finally:
        model.train(training)
    return results


def texts_read(model: Any, text: str | Tensor | None, corpus: str | None, length: int, sequences: int) -> Tensor | None:
    """Token ids of the text, or of pieces of the corpus, [sequence, pos]; None where neither is given. ValueError for both."""
    if text is not None and corpus is not None:
        raise ValueError("Give a text or a corpus, not both.")
    return (
        model.to_tokens(text)
        if text is not None
        else None
        if corpus is None
        else pieces(model, corpus, length, sequences)
    )


@dataclass(frozen=True)
class Survey:
    """What `survey` found.

    Args:
        results: by probe, as `run_probes` gives them. twin: the same of the random twin, without the census, which has its own; a
            `NoAnswer` for all where the model has no twin. by_length: results of the other lengths, shortest first.
        profile: mean weight at each distance, [layer, head, distance], nan where no pair exists; None with `no_profile` saying why.
        twin_profile: of the twin. profile_layers: what the profile's rows are called.
    """

    results: dict[str, Any]
    twin: dict[str, Any] = field(default_factory=dict)
    by_length: dict[int, dict[str, Any]] = field(default_factory=dict)
    length: int = 0
    profile: np.ndarray | None = None
    twin_profile: np.ndarray | None = None
    no_profile: str = ""
    profile_layers: tuple[str, ...] = ()


def survey(
    model: Any,
    probes: Sequence[str] = tuple(PROBES),
    *,
    lengths: Sequence[int] = (),
    twin: bool = True,
    progress: Progress | None = None,
    cancel: Event | None = None,
    **options: Any,
) -> Survey:
    """Probes at one length and at others, on the model and on a random twin, with the profile over distances of every head.

    Args:
        lengths: further lengths (a text is read up to each). twin: whether to measure the random twin. options: as for `run_probes`.

    Raises:
        ValueError: as `run_probes`; a length below `LEAST_LENGTH` or beyond the model's context or the text.
    """
    length = min(int(options.pop("length", 96)), model.n_ctx or 10**9)
    text = options.get("text")
    others = sorted({int(each) for each in lengths} - {length})
    _check_lengths(model, others, text)
    tell = Telling(progress, cancel)
    parts = 1 + int(twin) + len(others)

    def part(number: int) -> Telling:
        return tell.part(0.95 * number / parts, 0.95 * (number + 1) / parts)

    results = run_probes(model, probes, length=length, compare=twin, progress=part(0), **options)
    untrained: dict[str, Any] = {}
    other: Any = None
    if twin:
        try:
            other = random_twin(model, int(options.get("seed", 0)) + 1)
        except ValueError as error:
            untrained = dict.fromkeys(probes, NoAnswer(str(error)))
        else:
            rest = [probe for probe in probes if probe != "census"]
            untrained = run_probes(other, rest, length=length, compare=False, progress=part(1), **options)
    by_length = {}
    for number, each in enumerate(others):
        cut = {**options, "text": _first_tokens(model, text, each)} if text is not None else options
        step = part(parts - len(others) + number)
        by_length[each] = run_probes(model, probes, length=each, compare=False, progress=step, **cut)
    tell(0.95, "profiles over distances")
    profile, layers, reason = _profiles(model, length, options)
    twin_profile = _profiles(other, length, options)[0] if other is not None else None
    return Survey(results, untrained, by_length, length, profile, twin_profile, reason, layers)


LEAST_LENGTH = 24
"""Tokens that made-up sequences and needles need."""


def _check_lengths(model: Any, lengths: Sequence[int], text: str | Tensor | None) -> None:
    longest = min(model.n_ctx or 10**9, 10**9 if text is None else model.to_tokens(text).shape[1])
    for length in lengths:
        if not LEAST_LENGTH <= length <= longest:
            limit = f"from {LEAST_LENGTH}" if longest == 10**9 else f"from {LEAST_LENGTH} to {longest}"
            raise ValueError(f"length {length}: expected {limit} tokens, what the model and the text allow.")


def _first_tokens(model: Any, text: str | Tensor, length: int) -> Tensor:
    return model.to_tokens(text)[:, :length]


def sequences_read(
    model: Any,
    *,
    text: str | Tensor | None = None,
    corpus: str | None = None,
    vocab: int | None = None,
    length: int = 96,
    sequences: int = 16,
    seed: int = 0,
) -> Tensor:
    """What the census and the sinks read, [sequence, pos]: the text, pieces of the corpus, or made-up sequences. As `run_probes`."""
    length = min(length, model.n_ctx or length)
    tokens = texts_read(model, text, corpus, length, sequences)
    if tokens is not None:
        return tokens
    size = min(model.vocab_size, 128) if vocab is None else vocab
    return make_task("induction", vocab_size=size, length=length, seed=seed).batch(sequences, split="validation").tokens


def _profiles(model: Any, length: int, options: dict[str, Any]) -> tuple[np.ndarray | None, tuple[str, ...], str]:
    """Mean weight by distance of every head on what the probes read: ([layer, head, distance], layer names, why there is none)."""
    read = {key: value for key, value in options.items() if key != "whole_patterns"}
    tokens = sequences_read(model, length=length, **read)
    try:
        whole = bool(options.get("whole_patterns", False))
        found = attention_statistics(model, tokens, statistics=["profile"], whole_patterns=whole)
    except (ValueError, HookError) as error:
        return None, (), str(error)
    names = tuple("·".join(map(str, layer)) if isinstance(layer, tuple) else str(layer) for layer in found)
    lines = []
    for statistics in found.values():
        profile = (
            statistics.need("profile").double()[..., max(0, -statistics.first_distance) :].nanmean(0)
        )  # [head, distance]
        start = max(0, statistics.first_distance)
        lines.append(np.pad(profile.cpu().numpy(), ((0, 0), (start, 0)), constant_values=np.nan))
    heads, distances = max(len(line) for line in lines), max(line.shape[1] for line in lines)
    table = np.full((len(lines), heads, distances), np.nan)
    for row, line in enumerate(lines):
        table[row, : len(line), : line.shape[1]] = line
    return table, names, ""


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
    results: "dict[str, Any] | Survey",
    *,
    title: str | None = None,
    settings: dict[str, Any] | None = None,
) -> Run:
    """The results as a run of kind `"probe"`: `results[probe]` in the manifest, and these arrays:

    | array | axes | meaning |
    |---|---|---|
    | `<probe>.<score>` | layer, head | the score; with `.low` and `.high` its bootstrap interval, nan where there is none |
    | `<probe>.<score>.chance` | layer | what a head without the habit scores, nan where that is not known |
    | `<probe>.<score>.twin` | layer, head | the random twin's scores |
    | `<probe>.<score>.stands_out` | layer, head | 1 where the interval lies above chance and above the twin's best head |
    | `<probe>.<score>.by_length`, `.by_length.low`, `.by_length.high` | length, layer, head | at each of `lengths` |
    | `profile`, `profile.twin` | layer, head, distance | mean weight by distance |

    Of a `Survey`, `results[probe]` also says under `twin` and `by_length` why something is missing.
    """
    found = results if isinstance(results, Survey) else Survey(results)
    about: dict[str, Any] = model.about() if hasattr(model, "about") else {}
    name = getattr(model, "name", type(model).__name__)
    record = {"name": name, "architecture": getattr(model, "architecture", "unknown"), **about}
    lengths = sorted({found.length, *found.by_length}) if found.by_length else []
    said: dict[str, dict[str, Any]] = {}
    with store.create("probe", title or f"{', '.join(found.results)} of {name}", model=record) as run:
        for probe, result in found.results.items():
            said[probe] = {"kind": type(result).__name__, **result.to_json(), "layer_labels": layer_labels(result)}
            other = found.twin.get(probe)
            untrained = twin_tables(result) or score_tables(other)
            by_length = {each: score_tables(found.by_length.get(each, found.results)[probe]) for each in lengths}
            reasons = {
                str(each): kept[probe].reason
                for each, kept in found.by_length.items()
                if isinstance(kept[probe], NoAnswer)
            }
            said[probe] |= {"twin": other.reason if isinstance(other, NoAnswer) else "", "by_length": reasons}
            for score, table in score_tables(result).items():
                _store_table(run, f"{probe}.{score}", table, untrained.get(score))
                if lengths:
                    _store_curves(run, f"{probe}.{score}", [by_length[each].get(score) for each in lengths], table)
        if lengths:
            run.add_array("lengths", np.array(lengths, np.int32), axes=("length",))
        for array, values in (("profile", found.profile), ("profile.twin", found.twin_profile)):
            if values is not None:
                run.add_array(array, values.astype(np.float32), axes=("layer", "head", "distance"))
        about_profile = {"layer_labels": list(found.profile_layers), "no_profile": found.no_profile}
        run.set(
            results=said,
            settings={**(settings or {}), **({"profile": about_profile} if isinstance(results, Survey) else {})},
        )
    return store.open(run.id)


def _store_table(run: Any, name: str, table: ScoreTable, untrained: ScoreTable | None) -> None:
    run.add_array(name, table.values.astype(np.float32), axes=("layer", "head"))
    for end, values in (("low", table.low), ("high", table.high)):
        run.add_array(f"{name}.{end}", values.astype(np.float32), axes=("layer", "head"))
    run.add_array(f"{name}.chance", table.chance.astype(np.float32), axes=("layer",))
    run.add_array(f"{name}.stands_out", table.stands_out(untrained).astype(np.uint8), axes=("layer", "head"))
    if untrained is not None and untrained.values.shape == table.values.shape:
        run.add_array(f"{name}.twin", untrained.values.astype(np.float32), axes=("layer", "head"))


def _store_curves(run: Any, name: str, tables: list[ScoreTable | None], like: ScoreTable) -> None:
    """nan at lengths without an answer."""
    for end, part in (("", "values"), (".low", "low"), (".high", "high")):
        lines = [np.full_like(like.values, np.nan) if table is None else getattr(table, part) for table in tables]
        run.add_array(f"{name}.by_length{end}", np.stack(lines).astype(np.float32), axes=("length", "layer", "head"))
