"""What a study's `run(context)` is given: tier, seeds, settings, random numbers, progress, and a place for artefacts.

    def run(context):
        seeds = context.each_seed(measure)             # measure(context) once per seed, kept when it is done
        context.save_figure("risk", risk_figure(seeds))
        return seeds.measurements()                    # {name: [one number per seed]}

    def measure(context):                              # this context has a seed
        model = train(context.rng("data"), **context.settings)
        context.progress(0.5, "trained")
        return {"risk_ratio": 1.004, "curve": curve}   # numbers are measurements; arrays and the rest are kept too

`run` returns `{measurement: value}`: a number, a list with one number per seed, a `Sample`, or `NotRun(reason)`.
"""

from __future__ import annotations

import json
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from case_studies.harness.errors import StudyError
from case_studies.harness.evidence import NotRun, Sample, as_number, summarise
from case_studies.harness.workspace import Workspace
from workbench.instrument.errors import suggestion
from workbench.lab.jobs import JobCancelled
from workbench.lab.run_format import ARRAY_NAME, FIGURE_NAME
from workbench.lab.run_writer import code_version

__all__ = ["Context", "SeedResults"]

Report = Callable[[float, str], None]


class SeedResults(Sequence[Mapping[str, Any]]):
    """What each seed returned, in the order of the seeds: `results[0]["risk"]`, `results["risk"]` for all of them."""

    def __init__(self, stage: str, seeds: Sequence[int], records: Sequence[Mapping[str, Any]]):
        self.stage, self.seeds, self._records = stage, tuple(seeds), list(records)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, str):
            names = self._records[0]
            if which not in names:
                raise StudyError(f"{self.stage} returned nothing called {which!r}.{suggestion(which, names)}")
            return [record[which] for record in self._records]
        return self._records[which]

    def measurements(self) -> dict[str, Any]:
        """The results that are numbers, `Sample`s or `NotRun`, as `{name: [one per seed]}`. A measurement that a seed
        could not make is `NotRun` as a whole."""
        found: dict[str, Any] = {}
        for name, first in self._records[0].items():
            if as_number(first) is None and not isinstance(first, (Sample, NotRun)):
                continue
            column = self[name]
            refused = [each for each in column if isinstance(each, NotRun)]
            found[name] = refused[0] if refused else column
        return found


class Context:
    """The surroundings of a study, or of one of its seeds.

    study, tier     names; the tier is smoke, small or full
    seeds           the seeds of this run
    seed            the seed that is being measured; StudyError outside `each_seed`
    settings        what `claims.toml` sets for the tier
    device          torch device name
    folder          a folder that outlives a kill: checkpoints go here
    cancel          an event for functions that take one, such as `workbench.lab.training.train`
    """

    def __init__(
        self,
        workspace: Workspace,
        study: str,
        tier: str,
        seeds: Sequence[int],
        settings: Mapping[str, Any],
        device: str = "cpu",
        report: Report | None = None,
        cancel: threading.Event | None = None,
        facts: dict[str, Any] | None = None,
        seconds: dict[str, float] | None = None,
    ):
        self.study, self.tier, self.seeds, self.device = study, tier, tuple(seeds), device
        self.settings = settings
        self.cancel = cancel or threading.Event()
        self.facts: dict[str, Any] = {} if facts is None else facts
        self.seconds: dict[str, float] = {} if seconds is None else seconds
        self.versions: set[str] = {code_version()}
        self.resumed_seconds = 0.0
        self._workspace, self._report = workspace, report
        self._seed: int | None = None
        self._stage = "run"
        self._stages: set[str] = set()

    @property
    def seed(self) -> int:
        if self._seed is None:
            raise StudyError(f"study {self.study}: there is a seed only in a function given to context.each_seed")
        return self._seed

    @property
    def folder(self) -> Path:
        return self._workspace.work_folder(self._stage, -1 if self._seed is None else self._seed)

    def rng(self, purpose: str = "") -> np.random.Generator:
        """A numpy generator that depends on the study, the seed and the purpose in words, and on nothing else."""
        words = zlib.crc32(f"{self.study}\0{purpose}".encode())
        return np.random.default_rng([0 if self._seed is None else self._seed + 1, words])

    def torch_generator(self, purpose: str = "") -> Any:
        """A torch generator on the CPU, seeded as `rng`."""
        import torch

        return torch.Generator().manual_seed(int(self.rng(purpose).integers(2**62)))

    def progress(self, fraction: float, message: str = "") -> None:
        """Say which part, 0 to 1, of this seed (or of the study) is done. A cancelled study stops here."""
        self.check_cancelled()
        if self._report is not None:
            self._report(min(1.0, max(0.0, float(fraction))), message)

    def check_cancelled(self) -> None:
        """Raise JobCancelled when the study has been cancelled; finished seeds are kept."""
        if self.cancel.is_set():
            raise JobCancelled(self.study)

    def each_seed(
        self,
        measure: Callable[[Context], Mapping[str, Any]],
        *,
        stage: str | None = None,
        share: tuple[float, float] = (0.0, 1.0),
    ) -> SeedResults:
        """Call `measure(context)` for every seed and return what it returned, numbers as floats and arrays as numpy.

        A seed that an earlier, interrupted run finished is read back instead. The results of a seed are a dict of
        numbers, `Sample`s, `NotRun`s, arrays or tensors, and plain JSON values. `stage` names the call, the function's
        name if left out; `share` is the part of the study's progress that the call takes.
        """
        name = str(stage or getattr(measure, "__name__", ""))
        if not name.isidentifier():
            raise StudyError(f"study {self.study}: a stage needs a plain name, got {name!r}; give stage=…")
        if name in self._stages:
            raise StudyError(f"study {self.study}: two calls of each_seed are the stage {name!r}; give one stage=…")
        self._stages.add(name)
        records = [self._one_seed(measure, name, position, share) for position in range(len(self.seeds))]
        return SeedResults(name, self.seeds, records)

    def _one_seed(
        self, measure: Callable[[Context], Mapping[str, Any]], stage: str, position: int, share: tuple[float, float]
    ) -> dict[str, Any]:
        seed, width = self.seeds[position], (share[1] - share[0]) / len(self.seeds)
        start = share[0] + width * position
        kept = self._workspace.finished_seed(stage, seed)
        if kept is not None:
            record, arrays = kept
            self.progress(start + width, f"seed {seed}: done before")
            self.seconds[f"{stage}-{seed}"] = record["seconds"]
            self.resumed_seconds += record["seconds"]
            self.versions.add(record["code_version"])
            return decode(record["values"], arrays)
        inner = Context(
            self._workspace, self.study, self.tier, self.seeds, self.settings, self.device,
            lambda fraction, message: self.progress(start + width * fraction, f"seed {seed}: {message}".rstrip(": ")),
            self.cancel, self.facts, self.seconds,
        )  # fmt: skip
        inner._seed, inner._stage = seed, stage
        inner.progress(0.0, "")
        started = time.monotonic()
        returned = measure(inner)
        values, arrays = encode(returned, f"{stage} of seed {seed}")
        seconds = round(time.monotonic() - started, 3)
        self.seconds[f"{stage}-{seed}"] = seconds
        record = {"values": values, "seconds": seconds, "code_version": code_version()}
        self._workspace.finish_seed(stage, seed, record, arrays)
        return decode(values, arrays)

    def save_figure(self, name: str, figure: Any) -> None:
        """Keep a figure: a Plotly figure, or the bytes of a PNG or SVG (`name` then ends in .png or .svg)."""
        name = name if "." in name or not hasattr(figure, "to_json") else f"{name}.json"
        if not FIGURE_NAME.fullmatch(name):
            raise StudyError(f"{name!r} is not a figure name: expected a plain name, with .png or .svg for pictures")
        content = figure.to_json() if hasattr(figure, "to_json") else figure
        if not isinstance(content, (bytes, str)):
            raise StudyError(f"figure {name!r} is a {type(figure).__name__}, expected a Plotly figure, bytes or text")
        self._workspace.keep_figure(name, content.encode() if isinstance(content, str) else content)

    def save_array(self, name: str, array: Any, *, axes: Sequence[str], unit: str | None = None) -> None:
        """Keep an array or tensor for the run, with one name per axis."""
        data = as_array(array)
        if data is None or not ARRAY_NAME.fullmatch(name):
            raise StudyError(
                f"array {name!r}: expected an array or tensor under a name without spaces, got {type(array).__name__}"
            )
        if isinstance(axes, str) or len(axes) != data.ndim:
            raise StudyError(f"array {name!r} of shape {data.shape} needs {data.ndim} axis names, got {axes!r}")
        self._workspace.keep_array(name, data, {"axes": list(axes), "unit": unit})

    def record(self, **facts: Any) -> None:
        """Keep facts that belong to the results, such as the hash of a data file: plain JSON values."""
        for name, value in facts.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise StudyError(f"fact {name!r} cannot be written as JSON: {error}") from error
        self.facts.update(facts)


# ---- what a seed returned, as JSON and arrays ------------------------------------------------------------------------


def as_array(value: Any) -> np.ndarray | None:
    """A numpy array, from an array or a tensor with at least one axis; None for anything else."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return value if isinstance(value, np.ndarray) else None


def encode(returned: Any, where: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """JSON values and arrays of what a seed returned. StudyError names what cannot be kept."""
    if not isinstance(returned, Mapping) or not returned:
        raise StudyError(f"{where} returned {type(returned).__name__}, expected a dict of measurements")
    values: dict[str, Any] = {}
    arrays: dict[str, np.ndarray] = {}
    for name, value in returned.items():
        number, array = as_number(value), as_array(value)
        if number is not None or isinstance(value, Sample):
            summary = summarise(f"{name} ({where})", number if number is not None else value)  # refuses nan by name
            values[name] = (
                {"is": "sample", "values": list(summary.values), "over": value.over}
                if isinstance(value, Sample)
                else number
            )
        elif isinstance(value, NotRun):
            values[name] = {"is": "not run", "reason": value.reason}
        elif array is not None:
            arrays[name] = np.ascontiguousarray(array)
        else:
            try:
                values[name] = {"is": "value", "value": json.loads(json.dumps(value, allow_nan=False))}
            except (TypeError, ValueError) as error:
                raise StudyError(f"{name!r} ({where}) is no number, array or JSON value: {error}") from error
    return values, arrays


def decode(values: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The inverse of `encode`."""
    found: dict[str, Any] = dict(arrays)
    for name, value in values.items():
        if not isinstance(value, dict):
            found[name] = value
        elif value["is"] == "sample":
            found[name] = Sample(value["values"], value["over"])
        else:
            found[name] = NotRun(value["reason"]) if value["is"] == "not run" else value["value"]
    return found
