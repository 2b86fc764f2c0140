"""What the heads of a model read, by the probes of the battery, beside a random twin: the job behind the Probes page."""

from __future__ import annotations

from typing import Any

from app.destinations import Destination
from app.measure.common import FormError, checked_choice, checked_number, checked_text, part_of
from app.services import Services
from workbench.instrument.errors import suggestion
from workbench.lab.corpora import list_corpora
from workbench.lab.jobs import Job
from workbench.lab.runs import Run, RunError

KIND = "probe"
PROBES = {
    "induction": "previous token, duplicate token, induction",
    "census": "census of habits",
    "sinks": "attention sinks",
    "retrieval": "retrieval heads",
    "local": "queries that near keys answer",
    "basin": "attention basin",
}
MADE_UP, OWN = "made-up", "text"
SHORTEST, LONGEST = 24, 512
MOST_SEQUENCES, MOST_LENGTHS = 64, 6


def sources() -> list[tuple[str, str]]:
    """What the probes can read, as (value, words): made-up sequences, a text, the corpora that are here."""
    corpora = [(record.name, f"corpus {record.name}") for record in list_corpora() if record.available]
    return [(MADE_UP, "made-up sequences that repeat"), (OWN, "the text below"), *corpora]


def checked_any_model(services: Services, name: Any) -> str:
    """The name of a model of the catalogue. FormError with the nearest for any other."""
    known = [str(model["name"]) for model in services.models.list_models()]
    if name not in known:
        raise FormError(f"There is no model called {name!r}.{suggestion(str(name), known)}")
    return str(name)


def checked_lengths(text: Any) -> list[int]:
    """Whole numbers separated by commas. FormError for anything else, or too many."""
    words = [word for word in str(text or "").replace(",", " ").split() if word]
    if not all(word.isdigit() for word in words):
        raise FormError(
            f"Further lengths are {text!r}; expected whole numbers separated by commas, such as 48, 96, 192."
        )
    if len(words) > MOST_LENGTHS:
        raise FormError(f"There are {len(words)} further lengths; at most {MOST_LENGTHS} can be measured at once.")
    return [checked_number(int(word), "a further length", SHORTEST, LONGEST) for word in words]


def start_probing(
    services: Services,
    name: Any,
    probes: Any,
    source: Any,
    text: Any,
    length: Any,
    lengths: Any,
    sequences: Any,
    seed: Any,
    twin: Any,
    whole: Any,
) -> Job:
    """Queue probes of a model; the result is the run that `workbench probe` stores. FormError, in words for the reader, for a bad form.

    `source`: one of `sources`, whose text is read by the census and the sinks. `lengths`: further lengths, separated by commas. `twin`,
    `whole`: whether to measure the random twin, and to form patterns that no factors determine.
    """
    chosen = [checked_choice(probe, "a probe", list(PROBES)) for probe in probes or []]
    if not chosen:
        raise FormError(f"Choose at least one probe: {', '.join(PROBES)}.")
    read = checked_choice(source, "what is read", [value for value, _ in sources()])
    own = checked_text(text, longest=4 * LONGEST) if read == OWN else None
    settings: dict[str, Any] = {
        "probes": [probe for probe in PROBES if probe in chosen], "text": own, "corpus": None if read in (MADE_UP, OWN) else read,
        "length": checked_number(length, "the length", SHORTEST, LONGEST), "lengths": checked_lengths(lengths),
        "sequences": checked_number(sequences, "the number of sequences", 2, MOST_SEQUENCES), "vocab": None,
        "seed": checked_number(seed, "the seed", 0, 10**6), "twin": bool(twin), "whole_patterns": bool(whole),
    }  # fmt: skip
    model = checked_any_model(services, name)
    title = f"Probes of {model}: {', '.join(settings['probes'])}"
    return services.jobs.submit(
        title, _measure, key=f"{KIND}:{model}:{settings}", services=services, name=model, settings=settings
    )


def _measure(job: Job, services: Services, name: str, settings: dict[str, Any]) -> str:
    job.progress(0.0, "loading the model")
    from probes.battery import store_probes, survey

    model = services.models.load(name)
    asked = {key: value for key, value in settings.items() if key != "probes"}
    found = survey(model, settings["probes"], progress=part_of(job, 0.05, 0.98), **asked)
    return store_probes(services.store, model, found, title=job.title, settings=settings).id


def trace_of(services: Services, found: Run) -> Run | None:
    """A trace of the same model to look into: of the text that was probed if one was given, else the newest."""
    own, candidates = (found.manifest.get("settings") or {}).get("text"), []
    for entry in services.store.list(kind="trace", model=found.model.get("name")):
        try:
            run = services.open_run(entry.id)
        except RunError:
            continue
        if run.model.get("weights_sha256") == found.model.get("weights_sha256") and not run.manifest.get(
            "interventions"
        ):
            candidates.append(run)
    if own is not None:
        candidates = [run for run in candidates if run.manifest.get("text") == own]
    return candidates[0] if candidates else None


def place_of(found: Run, place: str) -> dict[str, int]:
    """Layer and head of "row.head" in the result's tables. FormError for a row that it does not have."""
    row, head = (int(part) for part in place.split("."))
    for record in (found.manifest.get("results") or {}).values():
        labels = record.get("layer_labels") or [str(each) for each in record.get("layers") or []]
        if row < len(labels):
            return {"layer": int(labels[row].split("·")[0]), "head": head}
    raise FormError(f"The result has no row {row}.")


def look_at(services: Services, found: Run, place: str) -> dict[str, Any] | Job:
    """The address of a head on the Attention page, for the store `go`; a job that traces the probed text first where there is no trace.

    Made-up sequences are traced as they were: the first one.
    """
    return at_trace(services, found, "/attention", place_of(found, place), f"for head {place}")


def at_trace(services: Services, found: Run, page: str, change: dict[str, Any], why: str) -> dict[str, Any] | Job:
    """A page, with this `change` of the address, on a trace of what a measurement read, for the store `go`; where there is none, a job that
    makes the trace, with `why` in its title."""
    trace = trace_of(services, found)
    if trace is not None:
        return Destination(trace.id, page, change).target()
    name = checked_any_model(services, found.model.get("name"))
    return services.jobs.submit(
        f"Trace of {name} {why}", _trace, services=services, name=name, settings=found.manifest.get("settings") or {}, page=page,
        change=change,
    )  # fmt: skip


def _trace(
    job: Job, services: Services, name: str, settings: dict[str, Any], page: str, change: dict[str, Any]
) -> Destination:
    job.progress(0.0, "loading the model")
    from probes.battery import sequences_read
    from workbench.lab.trace import trace_run

    model = services.models.load(name)
    text = settings.get("text")
    if text is None:
        text = sequences_read(
            model,
            **{key: settings[key] for key in ("corpus", "vocab", "length", "sequences", "seed") if key in settings},
        )[0]
    run = trace_run(
        model, text, services.store, title=f"{name}: the text that was measured", progress=part_of(job, 0.1, 1.0)
    )
    return Destination(run.id, page, change)
