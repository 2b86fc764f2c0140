"""What a model carries from segment to segment of a text, and what it is worth: the job behind the Segments page."""

from __future__ import annotations

from typing import Any

from app.measure.common import FormError, checked_number, checked_text, part_of
from app.measure.probes import at_trace, checked_any_model
from app.services import Services
from workbench.lab.jobs import Job
from workbench.lab.runs import Run

KIND = "segment-memory"
SHORTEST, LONGEST = 2, 2048
EXAMPLE = (
    "The old lighthouse keeper climbed the stairs and lit the lamp. A storm came up from the west that evening, and no ship was seen. "
    "The old lighthouse keeper climbed the stairs and lit the lamp again, since somebody might still be out at sea. In the morning the sea "
    "was calm. The old lighthouse keeper climbed the stairs and put out the lamp."
)
OTHER = (
    "A young baker sold warm bread in the square. When it rained she closed the shop early and went home to read the letters of her "
    "sister, who had lived abroad for years and wrote of trains, of snow, and of a language that nobody at home could speak. Once a year "
    "the young baker answered, and sent a loaf along."
)


def start_segments(services: Services, name: Any, text: Any, length: Any, other: Any, parts: Any) -> Job:
    """Queue the measurement of `workbench segments`. FormError, in words for the reader, for a bad form.

    `other`: the text whose state is patched in; empty for none. `parts`: whether layers and slots are exchanged one by one.
    """
    settings = {
        "name": checked_any_model(services, name), "text": checked_text(text),
        "length": checked_number(length, "Tokens of a segment", SHORTEST, LONGEST),
        "other": checked_text(other, "other text") if other and other.strip() else None, "parts": bool(parts),
    }  # fmt: skip
    title = f"{settings['name']} in segments of {settings['length']}"
    return services.jobs.submit(title, _measure, key=f"{KIND}:{settings}", services=services, **settings)


def _measure(job: Job, services: Services, name: str, text: str, length: int, other: str | None, parts: bool) -> str:
    job.progress(0.0, "loading the model")
    from probes.segments import segment_memory, store_segments

    model = services.models.load(name)
    found = segment_memory(model, text, length, other=other, parts=parts, progress=part_of(job, 0.05, 0.98))
    return store_segments(services.store, model, found, text=text, other=other, parts=parts, title=job.title).id


def look_at(services: Services, found: Run, page: str, layer: int, segment: int) -> dict[str, Any] | Job:
    """A layer at the boundary before a segment, on a page over a trace of the same text, for the store `go`; or a job that makes the trace.

    The State page shows what the layer carries there, the Attention page what the segment's first token reads, and the basket of the
    Intervene page an operation that takes the memory away. FormError for a layer or a segment that the measurement does not have.
    """
    results = found.manifest["results"]
    if not (0 <= layer < len(results["layers"]) and 0 < segment < len(results["starts"])):
        raise FormError(f"The result has no layer {layer} that hands something to segment {segment}.")
    first = results["starts"][segment]
    block = int(results["layers"][layer].partition("@")[0])
    place: dict[str, Any] = {
        "/state": {"t": first - 1}, "/attention": {"q": first}, "/intervene": {"do": _taken_away(services, found, block, segment)},
    }[page]  # fmt: skip
    return at_trace(services, found, page, {"layer": block, **place}, f"at the boundary before token {first}")


def _taken_away(services: Services, found: Run, layer: int, segment: int) -> str:
    """An operation, as a line: a recurrent state is reset; of a cache, the segment no longer reads what came before."""
    points = services.models.describe(str(found.model["name"]))["hook_points"]
    starts = [*found.manifest["results"]["starts"], found.manifest["results"]["tokens"]]
    first, stop = starts[segment : segment + 2]
    if any(point["role"] == "state" and str(point["name"]).startswith(f"blocks.{layer}.") for point in points):
        return f"reset state {layer} after {first - 1}"
    return f"cut layer {layer} queries {first}:{stop} keys 0:{first}"
