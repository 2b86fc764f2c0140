"""Which documents of a prompt a model reads at which places, and in which order they should stand: the job behind the Order page."""

from __future__ import annotations

from typing import Any

from app.measure.common import FormError, checked_number, checked_text, model_of, part_of, repeatable
from app.services import Scene, Services
from workbench.lab.jobs import Job
from workbench.lab.runs import RunError

KIND = "document-order"
MOST_DOCUMENTS = 24
EXAMPLE = (
    "The old lighthouse keeper lives in the north.\nThe young baker lives in the south.\nThe tall miller lives in the east.\n"
    "A ship came in at noon.\nThe old lighthouse keeper lives in the "
)


def start_order(services: Services, scene: Scene, prompt: Any, answer: Any, rounds: Any, bases: Any) -> Job:
    """Queue the planners on the open run's model. FormError, in words for the reader, for a bad form."""
    try:
        run = repeatable(services, scene.opened())
    except RunError as error:
        raise FormError(f"{str(error)[:1].upper()}{str(error)[1:]}. Open a run above.") from None
    lines = checked_text(prompt, "prompt").splitlines()
    documents, question = [f"{line}\n" for line in lines[:-1] if line.strip()], lines[-1]
    if not 2 <= len(documents) <= MOST_DOCUMENTS or not question.strip():
        raise FormError(
            f"There are {len(documents)} documents before the last line; expected 2 to {MOST_DOCUMENTS}, one a line, and then the question."
        )
    try:
        given = [float(each) for each in str(bases or "").split(",") if each.strip()]
    except ValueError:
        raise FormError(f"Bases: {bases!r} is not understood. Expected numbers with commas between, such as 10000,17500.") from None
    settings = {
        "run": run.id, "model": run.model["name"], "documents": documents, "question": question, "answer": str(answer or ""),
        "rounds": checked_number(rounds, "Rounds", 1, 20), "bases": given,
    }  # fmt: skip
    title = f"Order of {len(documents)} documents for {run.model['name']}"
    return services.jobs.submit(title, _run, key=f"{KIND}:{settings}", services=services, run_id=run.id, settings=settings)


def _run(job: Job, services: Services, run_id: str, settings: dict[str, Any]) -> str:
    job.progress(0.0, "loading the model")
    from probes.document_order import plan_order, store_order

    model = model_of(services, services.open_run(run_id))
    found = plan_order(
        model, settings["documents"], settings["question"], answer=settings["answer"], rounds=settings["rounds"],
        bases=settings["bases"], progress=part_of(job, 0.1, 0.95),
    )  # fmt: skip
    call = model.tokenizer.token_strings if model.tokenizer is not None else lambda ids: [str(i) for i in ids]
    said = {name: [[call([token])[0], chance] for token, chance in best] for name, best in found.next_tokens.items()}
    return str(store_order(services.store, model, found, job.title, {**settings, "said": said}).id)
