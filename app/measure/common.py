"""What all measurements share: the models to choose from, checked texts, starting a job, the model's record in a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from app.reading import again
from app.services import LARGEST_PROMPT, Services
from workbench.instrument.errors import suggestion
from workbench.lab.jobs import Job, JobError
from workbench.lab.runs import Run

LONGEST_TEXT = 4_000
"""Tokens of a text that synapses are searched in."""


class FormError(ValueError):
    """A form asks for something that cannot be measured; the message is for the reader."""


def bdh_models(services: Services) -> list[Mapping[str, Any]]:
    """The BDH models that a reader can choose, best first."""
    return [model for model in services.models.list_models() if model.get("architecture") == "bdh"]


def checked_model(services: Services, name: str | None) -> str:
    """The name of a BDH of the catalogue. FormError with the nearest for any other."""
    known = [str(model["name"]) for model in bdh_models(services)]
    if name not in known:
        raise FormError(
            f"There is no BDH called {name!r}.{suggestion(str(name), known)} Known: {', '.join(known) or 'none'}."
        )
    return str(name)


def checked_text(text: str | None, what: str = "text", longest: int = LONGEST_TEXT) -> str:
    """A text with something in it, not longer than a measurement takes."""
    if not text or not text.strip():
        raise FormError(f"Type a {what} first: there is nothing to read.")
    if len(text.encode()) > min(longest, LARGEST_PROMPT):
        raise FormError(
            f"The {what} has {len(text.encode()):,} tokens; at most {min(longest, LARGEST_PROMPT):,} can be measured from here."
        )
    return text


def checked_number(value: Any, name: str, first: int, last: int) -> int:
    """A whole number from `first` to `last`. FormError names it."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or value != int(value)
        or not first <= value <= last
    ):
        raise FormError(f"{name} is {value!r}; expected a whole number from {first} to {last}.")
    return int(value)


def checked_choice(value: Any, name: str, known: Sequence[str]) -> str:
    """One of the known words. FormError with the nearest."""
    if value not in known:
        raise FormError(f"{name} is {value!r}.{suggestion(str(value), known)} Expected one of {', '.join(known)}.")
    return str(value)


def repeatable(services: Services, run: Run) -> Run:
    """The run, if its model can read its text again: one of the catalogue, unchanged. FormError for any other."""
    if run.manifest.get("interventions"):
        raise FormError(
            "This run was changed by interventions; what is measured here runs the model as it is. Open an unchanged run."
        )
    name = run.model.get("name")
    if name not in {model["name"] for model in services.models.list_models()}:
        raise FormError(f"The run's model {name!r} is not in the catalogue, so it cannot be run again here.")
    return run


NO_LOGIT = "there is no logit whose change could be shown"


def says_here(run: Run) -> bool:
    """Whether the run's model says what stands at a position (an encoder with a head for masked tokens), not what comes behind it."""
    return run.has("here.ids")


def why_no_prediction(run: Run, so: str) -> str:
    """Why the model of a trace predicts no token, and `so` what cannot be done, in words for the reader; "" where it predicts some."""
    if says_here(run) or run.has("next.ids"):
        return ""
    return (
        f"{run.model.get('name')} is an encoder without a head that predicts tokens, so {so}. "
        "Open a run of a language model, or of an encoder with a head for masked tokens."
    )


def model_of(services: Services, run: Run) -> Any:
    """The model that made a run, loaded, and bound to the run's source if it reads one.

    Raises:
        ValueError: the catalogue has other weights under its name by now, or a source whose tokens are not known.
    """
    model = services.models.load(str(run.model["name"]))
    made_by = run.model.get("weights_sha256")
    if made_by is not None and made_by != model.weights_sha256():
        raise ValueError(
            f"{run.model['name']!r} has other weights than when this run was made, so it would give other numbers. Make a new run of it."
        )
    return again(model, run.manifest)


def try_to_start(start: Callable[[], Job]) -> tuple[str | None, str]:
    """(job id or None, what to tell the reader) of something that starts a job."""
    try:
        return start().id, ""
    except (FormError, JobError) as error:
        return None, str(error)


def model_record(model: Any) -> dict[str, Any]:
    """What the manifest of a run says of a model."""
    return {"name": model.name, "architecture": model.architecture, **model.about()}


def part_of(job: Job, first: float, last: float) -> Callable[[float, str], None]:
    """A progress callback for one part of a job; it is also where a cancelled job stops."""
    return lambda fraction, message: job.progress(first + (last - first) * min(1.0, max(0.0, fraction)), message)
