"""What operations change in a model's predictions, over one or many prompts, beside matched random operations.

    effects = intervene(model, "the cat sat on the mat", "zero head 1.3", controls=10)
    effects.change("loss")                    mean change of the loss in nats per token, bootstrap interval, controls, p
    effects.change("target")                  of the target's logit (or logit difference) after the chosen token
    effects.top(0)                            the likeliest next tokens before and after

Three numbers per prompt: `target` at one token; `top`, the change of the logit of what the model itself expected most, averaged over all
tokens; `loss`, averaged over all tokens but the first (of an encoder with a head for masked tokens over all, each token's own). Intervals
are over prompts; with a single prompt over its tokens, which are not independent of each other, so that they come out somewhat narrow (the
target has none then). Controls are baskets of the same kind (`twins`); p is the share of baskets, this one among them, that change as much
in size.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.intervals import Interval, mean_interval
from probes.interventions.executor import Executor
from probes.interventions.language import InterventionError, Operation, parse
from probes.interventions.places import Dictionaries
from probes.interventions.twins import NoTwin, twins_of
from probes.objectives import predicts
from probes.progress import Progress, Report
from workbench.lab.runs import Run, RunStore

MEASURES = {
    "target": "logit of the target",
    "top": "logit of what was expected most, over all tokens",
    "loss": "loss, over all tokens",
}
KIND = "intervention"
LISTED = 10
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Change:
    """A mean change: over prompts, or over the tokens of a single one; what matched random operations changed, [control]."""

    value: float
    interval: Interval | None
    controls: Array

    @property
    def p(self) -> float | None:
        """Share of baskets that change at least as much in size, this one among them; None without controls."""
        if not len(self.controls):
            return None
        return float((1 + (np.abs(self.controls) >= abs(self.value)).sum()) / (1 + len(self.controls)))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        interval = None if self.interval is None else [self.interval.low, self.interval.high]
        return {"value": self.value, "interval": interval, "controls": self.controls.tolist(), "p": self.p}


@dataclass(frozen=True)
class Reading:
    """One run of every prompt. target: [prompt]. log_probs: after the chosen token, [prompt, vocab]. expected, loss: by token of all
    prompts in a row, [token]: the logit of what the plain run expected most, and the loss in nats (nan at each prompt's first token).
    """

    target: Array
    log_probs: Array
    expected: Array
    loss: Array


@dataclass(frozen=True)
class InterventionEffects:
    """Result of `intervene`.

    Args:
        operations: what was done. tokens: ids of all prompts in a row, prompt: the number of each one's prompt, [token].
        at: after which token the target is asked for, targets: its ids, wrong: what its logit is compared with, [prompt].
        plain, edited, controls: readings; twins: the controls' operations. no_control: why there are none, if there are none.
    """

    operations: tuple[Operation, ...]
    tokens: NDArray[np.int64]
    prompt: NDArray[np.int64]
    at: tuple[int, ...]
    targets: tuple[int, ...]
    wrong: tuple[int, ...] | None
    plain: Reading
    edited: Reading
    controls: tuple[Reading, ...]
    twins: tuple[tuple[Operation, ...], ...]
    no_control: str = ""

    def values(self, measure: str, reading: Reading | None = None) -> Array:
        """Changes of a measure: `target` [prompt]; `top`, `loss` [token], nan where there is none."""
        now = self.edited if reading is None else reading
        name = {"top": "expected"}.get(measure, measure)
        return np.asarray(getattr(now, name) - getattr(self.plain, name))

    def change(self, measure: str = "loss", level: float = 0.95, seed: int = 0) -> Change:
        """The mean change of one of `MEASURES`. ValueError for another."""
        if measure not in MEASURES:
            raise ValueError(f"Unknown measure {measure!r}. Expected one of {', '.join(MEASURES)}.")
        cases, weights = self._cases(measure, self.edited)
        interval = mean_interval(cases, weights=weights, level=level, seed=seed) if len(cases) > 1 else None
        controls = [np.average(*self._cases(measure, reading)[:1], weights=weights) for reading in self.controls]
        return Change(float(np.average(cases, weights=weights)), interval, np.asarray(controls, dtype=np.float64))

    def _cases(self, measure: str, reading: Reading) -> tuple[Array, Array]:
        """Independent cases and their weights: prompts, or the tokens of a single prompt."""
        values = self.values(measure, reading)
        if measure == "target":
            return values, np.ones(len(values))
        there = np.isfinite(values)
        values, prompt = values[there], self.prompt[there]
        if prompt.max() == 0:
            return values, np.ones(len(values))
        counts = np.bincount(prompt)
        return np.bincount(prompt, values) / counts, counts.astype(float)

    def top(self, prompt: int = 0, n: int = LISTED) -> list[tuple[int, float, float]]:
        """(token, probability before, after) of the likeliest next tokens of a prompt, of either run."""
        before, after = (np.exp(reading.log_probs[prompt]) for reading in (self.plain, self.edited))
        order = np.argsort(-np.maximum(before, after), kind="stable")[:n]
        return [(int(token), float(before[token]), float(after[token])) for token in order]

    def to_json(self, names: Sequence[str] | None = None) -> dict[str, Any]:
        """Plain data. `names`: what the tokens of the vocabulary are called."""
        call = (lambda token: token) if names is None else (lambda token: names[token])
        return {
            "operations": [operation.to_json() for operation in self.operations],
            "prompts": int(self.prompt.max()) + 1,
            "at": list(self.at),
            "targets": [call(token) for token in self.targets],
            "against": None if self.wrong is None else [call(token) for token in self.wrong],
            "changes": {measure: self.change(measure).to_json() for measure in MEASURES},
            "before_after": [
                [{"token": call(token), "before": before, "after": after} for token, before, after in self.top(prompt)]
                for prompt in range(int(self.prompt.max()) + 1)
            ],
            "controls": [[str(operation) for operation in twin] for twin in self.twins],
            "no_control": self.no_control,
        }  # fmt: skip

    def __repr__(self) -> str:
        said = []
        for measure in MEASURES:
            found = self.change(measure)
            p = "" if found.p is None else f", p = {found.p:.2g} of {len(found.controls)} random"
            said.append(f"{measure} {found.value:+.4f} {found.interval or ''}{p}")
        return f"InterventionEffects({'; '.join(map(str, self.operations))}: {'; '.join(said)})"


def intervene(
    model: Any,
    prompts: Any,
    operations: str | Sequence[str | Operation],
    *,
    target: Any = None,
    wrong: Any = None,
    at: int = -1,
    controls: int = 10,
    seed: int = 0,
    dictionaries: Dictionaries | Mapping[str, tuple[Any, str, int | None]] | None = None,
    progress: Report | None = None,
    cancel: threading.Event | None = None,
) -> InterventionEffects:
    """Run the prompts as they are, with the operations, and with matched random ones.

    Args:
        prompts: a text, a list of texts, or ids [prompt, pos]. operations: lines of `language`, or `Operation`s; they act together.
        target, wrong: a token (an id or a text of one token), or one per prompt; the measure is logit(target) − logit(wrong). Without
            target it is what the model expects most; without wrong the target's logit alone. at: after which token, in every prompt.
        controls: matched random baskets. seed: of what is drawn. dictionaries: where features come from, see `Executor`.

    Raises:
        InterventionError: a line, prompt, target or token that does not fit, a model without a head that predicts tokens. HookError: what
            this model refuses.
        MeasurementCancelled: `cancel` was set.
    """
    tell = Progress(progress, cancel)
    tell(0.0, "reading the operations")
    training = bool(model.training)
    model.eval()
    try:
        job = Executor(model, _prompts(prompts), dictionaries=dictionaries, seed=seed)
        chosen = tuple(parse(operations, job.shortest))
        places = [_place_of(at, job.length(number)) for number in range(len(job.prompts))]
        measure = _Measure(job, places, target, wrong)
        tell(0.05, "the prompts as they are")
        plain = measure.read(())
        tell(0.1, "with the operations")
        edited = measure.read(chosen)
        twins, reason = [], ""
        if controls:
            try:
                twins = twins_of(job, chosen, controls, seed)
            except NoTwin as error:
                reason = str(error)
        readings = []
        for number, twin in enumerate(twins):
            tell(0.15 + 0.85 * number / len(twins), f"matched random operations {number + 1} of {len(twins)}")
            readings.append(measure.read(twin))
        tell(1.0, "done")
    finally:
        model.train(training)
    tokens = torch.cat([prompt[0] for prompt in job.prompts]).cpu().numpy()
    prompt = np.repeat(np.arange(len(job.prompts)), [job.length(number) for number in range(len(job.prompts))])
    return InterventionEffects(
        chosen, tokens, prompt, tuple(places), tuple(measure.targets), None if measure.wrong is None else tuple(measure.wrong), plain,
        edited, tuple(readings), tuple(twins), reason,
    )  # fmt: skip


class _Measure:
    """Reads all prompts under some operations; what the plain run expects most is fixed by the first reading."""

    def __init__(self, job: Executor, places: Sequence[int], target: Any, wrong: Any) -> None:
        self.job, self.places, self.said = job, places, predicts(job.model)
        if self.said is None:
            raise InterventionError(
                f"{job.model.name} has no head that predicts tokens, so there is no logit whose change could be told. Expected a model "
                "with one; what an edited run holds, model.run_with_cache tells under the hooks of `Executor`."
            )
        self.given = _token_ids(job.model, target, len(places), "target")
        self.wrong = _token_ids(job.model, wrong, len(places), "wrong")
        self.targets: list[int] = []
        self.most: list[Tensor] = []

    @torch.no_grad()
    def read(self, operations: Sequence[Operation]) -> Reading:
        target, log_probs, expected, loss = [], [], [], []
        for number, prompt in enumerate(self.job.prompts):
            logits = self.job.model.run_with_hooks(prompt, hooks=self.job.hooks(operations, number))[0].double()
            if len(self.most) == number:
                self.most.append(logits.argmax(-1))
                own = int(self.most[number][self.places[number]])
                self.targets.append(own if self.given is None else self.given[number])
            here = logits[self.places[number]]
            against = 0.0 if self.wrong is None else float(here[self.wrong[number]])
            target.append(float(here[self.targets[number]]) - against)
            every = logits.log_softmax(-1)
            log_probs.append(every[self.places[number]].cpu())
            expected.append(logits.gather(1, self.most[number][:, None])[:, 0].cpu())
            if self.said == "here":
                loss.append(-every.gather(1, prompt[0, :, None])[:, 0].cpu())
                continue
            surprisal = -every[:-1].gather(1, prompt[0, 1:, None])[:, 0].cpu()
            loss.append(torch.cat([surprisal.new_full((1,), float("nan")), surprisal]))
        return Reading(
            np.asarray(target), torch.stack(log_probs).numpy(), torch.cat(expected).numpy(), torch.cat(loss).numpy()
        )


def _prompts(prompts: Any) -> list[Any]:
    if isinstance(prompts, Tensor):
        return [prompts[None]] if prompts.dim() == 1 else [row[None] for row in prompts]
    return [prompts] if isinstance(prompts, str) else list(prompts)


def _place_of(at: int, length: int) -> int:
    if not -length <= at < length:
        raise InterventionError(f"There is no token {at} to predict after: a prompt has {length} tokens.")
    return at % length


def _token_ids(model: Any, token: Any, count: int, what: str) -> list[int] | None:
    """Ids of a token, or of one per prompt; None for none."""
    if token is None or token == "":
        return None
    each = list(token) if isinstance(token, (list, tuple)) else [token] * count
    if len(each) != count:
        raise InterventionError(f"{what} names {len(each)} tokens for {count} prompts. Expected one, or one for each.")
    found = []
    for one in each:
        ids = [one] if isinstance(one, int) else model.to_tokens(one)[0].tolist()
        if len(ids) != 1 or not 0 <= ids[0] < model.vocab_size:
            raise InterventionError(f"{what} {one!r} is {len(ids)} tokens of this model {ids}. Expected exactly one.")
        found.append(int(ids[0]))
    return found


def store_effects(
    store: RunStore, model: Any, effects: InterventionEffects, *, title: str | None = None, settings: Mapping[str, Any] | None = None
) -> Run:  # fmt: skip
    """The effects as a run of kind `"intervention"`.

    Arrays: `loss`, `top` (changes, [pos], all prompts in a row) and `controls`, `controls.top` (of the controls, [draw, pos]); `target`,
    [prompt], `controls.target` [draw, prompt]; `log_probs`, its change after the chosen token of the first prompt, and `log_probs.before`,
    [vocab]; `prompt` [pos].
    """
    about: dict[str, Any] = model.about() if hasattr(model, "about") else {}
    name = getattr(model, "name", type(model).__name__)
    record = {"name": name, "architecture": getattr(model, "architecture", "unknown"), **about}
    names = model.tokenizer.token_strings(list(range(model.vocab_size))) if model.tokenizer is not None else None
    ids = effects.tokens.tolist()
    strings = [str(i) for i in ids] if names is None else model.tokenizer.token_strings(ids)
    lines = "; ".join(map(str, effects.operations))
    with store.create(
        KIND, title or f"{lines[:60]} in {name}", model=record, text="".join(strings) if names else ""
    ) as run:
        for measure, suffix, axis in (("loss", "", "pos"), ("top", ".top", "pos"), ("target", ".target", "prompt")):
            run.add_array(
                measure, effects.values(measure), axes=(axis,), unit="nats" if measure == "loss" else "logits"
            )
            drawn = [effects.values(measure, reading) for reading in effects.controls]
            stacked = np.stack(drawn) if drawn else np.zeros((0, len(effects.values(measure))))
            run.add_array(
                f"controls{suffix}", stacked, axes=("draw", axis), unit="nats" if measure == "loss" else "logits"
            )
        change = effects.edited.log_probs[0] - effects.plain.log_probs[0]
        run.add_array("log_probs", change, axes=("vocab",), unit="nats")
        run.add_array("log_probs.before", effects.plain.log_probs[0], axes=("vocab",), unit="nats")
        run.add_array("prompt", effects.prompt.astype(np.int32), axes=("pos",))
        results = {**effects.to_json(names), "tokens": strings, "vocab": names or []}
        run.set(
            results=results,
            settings=dict(settings or {}),
            interventions=[each.to_json() for each in effects.operations],
        )
    return store.open(run.id)
