"""The dashboard's models: the shipped checkpoints and every architecture at random weights, run in the job queue.

torch loads when the first run starts (or in the background right after start-up), never for drawing a page: the shipped models' cards
hold everything that pages show of them.
"""

import json
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

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
    """`app.services.ModelCatalogue` over `models` and `workbench.lab.trace`."""

    def __init__(self, store: RunStore, jobs: JobQueue) -> None:
        self.store, self.jobs = store, jobs
        self._loaded: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._random: list[dict[str, Any]] | None = None

    def list_models(self) -> Sequence[Mapping[str, Any]]:
        """Shipped models first; random-weight architectures once they are known (see `warm_up`)."""
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
        return [*shipped, *(self._random or [])]

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
        from models.diagram import model_blocks

        model = self._model(name)
        points = [point.describe() for point in model.hook_points.points.values()]
        return {"blocks": model_blocks(model), "hook_points": points}

    def load(self, name: str) -> Any:
        """A shipped model, or an architecture at random weights, opened once and shared."""
        self._check_name(name)
        return self._model(name)

    def _check_name(self, name: str) -> None:
        if name not in {card["name"] for card in shipped_cards()}:
            from models.registry import UnknownModel, architecture

            if not name.endswith("-random"):  # never a path: what the browser sends names a model of the registry
                known = ", ".join(sorted(str(model["name"]) for model in self.list_models()))
                raise UnknownModel(f"There is no model {name!r}. Known: {known}.")
            architecture(name.removesuffix("-random"))

    def start_trace(self, name: str, text: str, settings: Mapping[str, Any]) -> Job:
        """Queue a trace; the job's result is the run's id."""
        self._check_name(name)
        if not text:
            raise ValueError("The text is empty: type at least one character.")
        shown = text if len(text) <= 32 else f"{text[:32]}…"
        return self.jobs.submit(f"{name} reads “{shown}”", self._trace, name=name, text=text, settings=settings)

    def _trace(self, job: Job, name: str, text: str, settings: Mapping[str, Any]) -> str:
        job.progress(0.0, "loading the model")
        from workbench.lab.trace import trace_run

        def progress(fraction: float, message: str) -> None:
            job.check_cancelled()
            job.progress(fraction, message)

        title = str(settings.get("title") or "") or None
        return trace_run(self._model(name), text, self.store, title=title, progress=progress).id

    def _model(self, name: str) -> Any:
        from models.registry import load

        with self._lock:
            if name not in self._loaded:
                self._loaded[name] = load(name)
            return self._loaded[name]

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
) -> bool:
    """What `workbench serve` does: a run store, a job queue, the models, demo runs in an empty store, the server, the browser.

    Returns, once the server was stopped, whether all of its threads have ended. A thread in the middle of a model's step (or of importing
    torch) cannot be stopped; runs are written whole or not at all, so the process may simply end.
    """
    from app.dashboard import serve

    store, jobs = RunStore(runs), JobQueue()
    models = WorkbenchModels(store, jobs)
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
