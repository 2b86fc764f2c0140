"""The dashboard's models: the shipped checkpoints and every architecture at random weights, run in the job queue.

torch loads when the first run starts (or in the background right after start-up), never for drawing a page: the shipped models' cards
hold everything that pages show of them.
"""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from app.checkpoints import Checkpoints
from app.open_models import OpenModels
from app.reading import reading
from workbench.instrument.errors import suggestion
from workbench.lab.jobs import Job, JobQueue
from workbench.lab.runs import RunStore

DEMO_TEXT = (
    "The old lighthouse keeper climbed the stairs. At the top of the stairs the old lighthouse keeper lit the lamp, "
    "and the lamp threw its light over the water."
)
FIRST_LOOK = ": a first look"


def shipped_cards() -> list[dict[str, Any]]:
    """Cards of the shipped models in their order, each with its `name`. Reads JSON only."""
    spec = find_spec("models")
    assert spec is not None and spec.origin is not None
    cards = []
    for path in sorted((Path(spec.origin).parent / "shipped").glob("*/card.json")):
        cards.append({**json.loads(path.read_text()), "name": path.parent.name})
    return sorted(cards, key=lambda card: (card.get("order", 99), card["name"]))


class WorkbenchModels:
    """`app.services.ModelCatalogue` over `models` and `workbench.lab.trace`.

    Args:
        root: folder of model folders that are offered beside the shipped models; None: `$WORKBENCH_MODELS`.
    """

    def __init__(self, store: RunStore, jobs: JobQueue, root: Path | None = None) -> None:
        self.store, self.jobs = store, jobs
        self.checkpoints, self.held = Checkpoints(root), OpenModels()
        self._described: dict[str, dict[str, Any]] = {}
        self._random: list[dict[str, Any]] | None = None

    def list_models(self) -> Sequence[Mapping[str, Any]]:
        """Shipped models, then checkpoints; random-weight architectures once they are known (see `warm_up`)."""
        shipped = [
            {
                **{
                    key: card.get(key)
                    for key in ("name", "title", "architecture", "family", "parameters", "description")
                },
                "provenance": "trained",
                "card": card_in_words(card),
            }
            for card in shipped_cards()
        ]
        return [*shipped, *self.checkpoints.listed(), *(self._random or [])]

    def warm_up(self) -> None:
        """Import torch and the architectures, so that the first run starts at once. Meant for a background thread."""
        from models.registry import list_models

        self._random = [
            {
                "name": record.name,
                "title": record.title,
                "architecture": record.architecture,
                "family": record.family,
                "parameters": record.parameters,
                "provenance": "random",
                "description": record.description,
                "card": None,
            }
            for record in list_models()
            if record.provenance == "random"
        ]

    def describe(self, name: str) -> Mapping[str, Any]:
        """Blocks and hook points, from the card or, for random weights, from the model itself."""
        for card in shipped_cards():
            if card["name"] == name:
                return {"blocks": card["blocks"], "hook_points": card["hook_point_list"]}
        self._check_name(name)
        if name not in self._described:
            self._model(name)
        return self._described[name]

    def load(self, name: str) -> Any:
        """A shipped model, an architecture at random weights, or a checkpoint that is here; opened once and shared."""
        self._check_name(name)
        return self._model(name)

    def look_up(self, name: str, dtype: str = "float32") -> Mapping[str, Any]:
        """What opening a checkpoint would take; see `Checkpoints.look_up`."""
        return self.checkpoints.look_up(name, dtype)

    def _check_name(self, name: str, may_download: bool = False) -> None:
        """Never a path: what the browser sends names a model of the registry, a folder under the root, or an id on the hub."""
        if name in {card["name"] for card in shipped_cards()}:
            return
        if self.checkpoints.may_be_opened(name) if may_download else self.checkpoints.knows(name):
            return
        from models.registry import UnknownModel, architecture

        if not name.endswith("-random"):
            known = [str(model["name"]) for model in self.list_models()]
            raise UnknownModel(
                f"There is no model {name!r}.{suggestion(name, known)} Known: {', '.join(sorted(known))}. Other folders are offered by "
                "`workbench serve --models FOLDER`."
            )
        architecture(name.removesuffix("-random"))

    def start_trace(self, name: str, text: str, settings: Mapping[str, Any]) -> Job:
        """Queue a trace; the job's result is the run's id. `settings`: title, source, and dtype ("float32" or "auto") of a checkpoint."""
        name = name.strip()
        self._check_name(name, may_download=True)
        if not text:
            raise ValueError("The text is empty: type at least one character.")
        shown = text if len(text) <= 32 else f"{text[:32]}…"
        return self.jobs.submit(f"{name} reads “{shown}”", self._trace, name=name, text=text, settings=settings)

    def _trace(self, job: Job, name: str, text: str, settings: Mapping[str, Any]) -> str:
        job.progress(0.0, "loading the model")
        from workbench.lab.trace import trace_run

        def part(first: float, last: float) -> Callable[[float, str], None]:
            def report(fraction: float, message: str) -> None:
                job.check_cancelled()
                job.progress(first + (last - first) * fraction, message)

            return report

        title = str(settings.get("title") or "") or text[:60]
        model = self._model(name, str(settings.get("dtype") or "float32"), part(0.0, 0.5))
        bound, read = reading(model, str(settings.get("source") or "") or None, text)
        return trace_run(bound, read, self.store, title=title, progress=part(0.5, 1.0)).id

    def _model(self, name: str, dtype: str = "float32", progress: Callable[[float, str], None] | None = None) -> Any:
        from models.registry import load, shipped_names

        def open_it() -> Any:
            if name in shipped_names() or name.endswith("-random"):
                return load(name)
            return self.checkpoints.open(name, dtype, progress)

        model = self.held.get(name if dtype == "float32" else f"{name} ({dtype})", open_it)
        if name not in self._described:
            from models.diagram import model_blocks

            points = [point.describe() for point in model.hook_points.points.values()]
            self._described[name] = {"blocks": model_blocks(model), "hook_points": points}
        return model

    def start_demo_runs(self) -> list[Job]:
        """While there is nothing of the reader's own, every shipped model reads a short text, so that the first page has something to show.

        Models that did so at an earlier start (which may have been cut short) are left out.
        """
        there = self.store.list()
        if any(not entry.title.endswith(FIRST_LOOK) for entry in there):
            return []
        jobs = []
        for card in reversed(shipped_cards()):  # newest first in lists: the first model's run comes last
            if card["name"] in {entry.model for entry in there}:
                continue
            text = card.get("demo_text") or DEMO_TEXT
            jobs.append(self.start_trace(card["name"], text, {"title": f"{card['title']}{FIRST_LOOK}"}))
        return jobs


def card_in_words(card: Mapping[str, Any]) -> str:
    """A shipped model's card as Markdown."""
    metrics, data = card.get("metrics", {}), card.get("data", {})
    corpus = data.get("corpora") or data
    lines = [
        card.get("description", ""),
        "",
        f"**Architecture** {card['architecture']} · **parameters** {card['parameters']:,}",
        "",
    ]
    losses = {"validation loss": metrics.get("validation_loss"), "training loss": metrics.get("train_loss")}
    losses |= {f"reference: {name.replace('_', ' ')}": value for name, value in metrics.get("references", {}).items()}
    lines += ["| | nats per token |", "|---|---|"] + [
        f"| {name} | {value:.3f} |" for name, value in losses.items() if value is not None
    ]
    lines += ["", "**Data**", "", "```json", json.dumps(corpus, indent=1)[:1500], "```"]
    lines += [
        f"**Licence of the data** {card.get('licence', 'not stated')}",
        "",
        "**Command**",
        "",
        "```",
        card.get("command", ""),
        "```",
    ]
    lines += [f"weights sha256 `{card.get('weights_sha256', '')}`"]
    return "\n".join(lines)


def open_dashboard(
    host: str,
    port: int,
    runs: Any = None,
    token: str | None = None,
    allowed_hosts: Sequence[str] = (),
    open_browser: bool = True,
    models_root: Path | None = None,
) -> bool:
    """What `workbench serve` does: a run store, a job queue, the models, demo runs in an empty store, the server, the browser.

    Returns, once the server was stopped, whether all of its threads have ended. A thread in the middle of a model's step (or of importing
    torch) cannot be stopped; runs are written whole or not at all, so the process may simply end.
    """
    from app.dashboard import serve

    store, jobs = RunStore(runs), JobQueue()
    models = WorkbenchModels(store, jobs, models_root)
    models.start_demo_runs()
    ready = threading.Event()
    warming = threading.Thread(target=_after_start, args=(ready, models, host, port, token, open_browser), daemon=True)
    warming.start()
    try:
        serve(store, jobs, models, host=host, port=port, token=token, allowed_hosts=allowed_hosts, ready=ready)
    finally:
        ended = True
        try:
            jobs.shutdown(timeout=2)
        except TimeoutError:
            ended = False
    return ended and not warming.is_alive()


def _after_start(
    ready: threading.Event, models: WorkbenchModels, host: str, port: int, token: str | None, open_browser: bool
) -> None:
    ready.wait()
    if open_browser and port:
        import webbrowser

        webbrowser.open(f"http://localhost:{port}/{f'?token={token}' if token else ''}")
    models.warm_up()
