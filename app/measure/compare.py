"""Next-token predictions of two models after the same text, and what either says at every depth: the job behind the Compare page."""

from __future__ import annotations

from typing import Any

import numpy as np

from app.measure.common import model_of, model_record, repeatable
from app.measure.lens import LARGEST
from app.services import Scene, Services
from workbench.lab.alignment import Alignment, TokenText, align
from workbench.lab.jobs import Job
from workbench.lab.runs import Run

KIND = "comparison"


def start_comparing(services: Services, scene: Scene) -> Job:
    """Queue the comparison of the open run with run B. FormError, in words for the reader, for runs that cannot be made again."""
    from app.measure.common import FormError

    if scene.other is None:
        raise FormError(scene.other_problem or "Choose a second run under “B” first.")
    runs = [repeatable(services, run) for run in (scene.opened(), scene.other)]
    for run, letter in zip(runs, "AB", strict=True):
        if not (run.manifest.get("tokens") or {}).get("ids"):
            raise FormError(f"Run {letter} has no tokens: choose a trace of a text.")
    settings = {"run": runs[0].id, "run_b": runs[1].id}
    names = [str(run.model["name"]) for run in runs]
    title = f"{names[0]} beside {names[1]}" if names[0] != names[1] else f"{names[0]} on two runs"
    return services.jobs.submit(
        title, _compare, key=f"{KIND}:{settings}", services=services, runs=runs, settings=settings
    )


def predictions(model: Any, run: Run) -> Any:
    """Log p of the next token after every token of a run: float64 [pos, vocab]."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([run.manifest["tokens"]["ids"]]))[0].double().log_softmax(-1)


def divergences(alignment: Alignment, first: Any, second: Any) -> np.ndarray:
    """How far predictions are apart after every part, in nats: float64 [3, part] of KL(A ‖ B), KL(B ‖ A) and Jensen–Shannon.

    nan where a part is not aligned; after a part of several tokens, the prediction after its last one counts.
    `first`, `second`: log p [pos, vocab].
    """
    import torch

    found = np.full((3, len(alignment.parts)), np.nan)
    for part in np.flatnonzero(alignment.aligned).tolist():
        _, a, _, b = alignment.parts[part].tolist()
        one, other = first[a - 1], second[b - 1]
        middle = torch.logaddexp(one, other) - np.log(2)
        to = [(p.exp() * (p - q)).sum() for p, q in ((one, other), (other, one), (one, middle), (other, middle))]
        found[:, part] = float(to[0]), float(to[1]), 0.5 * float(to[2] + to[3])
    return found


def _compare(job: Job, services: Services, runs: list[Run], settings: dict[str, Any]) -> str:
    import torch

    from probes.lenses import logit_lens

    found: list[Any] = []
    lenses, vocabularies = [], []
    for number, run in enumerate(runs):
        job.progress(0.45 * number, f"loading the model of {'AB'[number]}")
        model = model_of(services, run)
        ids = run.manifest["tokens"]["ids"]
        if len(ids) * model.vocab_size > LARGEST:
            raise ValueError(
                f"Run {'AB'[number]}: {len(ids)} tokens × {model.vocab_size} logits are too many at once; take a shorter text."
            )
        job.progress(0.45 * number + 0.2, f"reading the text of {'AB'[number]} at every depth")
        lenses.append(logit_lens(model, torch.tensor([ids]), top=1))
        found.append(predictions(model, run))
        vocabularies.append((run.manifest["tokens"]["tokenizer"], model.vocab_size))
    job.progress(0.92, "comparing the predictions")
    alignment = align(*(TokenText.of(run.manifest) for run in runs))
    refused = ""
    if vocabularies[0] != vocabularies[1]:
        refused = (
            f"A predicts {vocabularies[0][1]} tokens of “{vocabularies[0][0]}”, B {vocabularies[1][1]} of “{vocabularies[1][0]}”: "
            "probabilities of different vocabularies have no divergence. The surprisal of the text is comparable."
        )
    with services.store.create(KIND, job.title, model=model_record(model), text=runs[0].manifest.get("text")) as result:
        if not refused:
            result.add_array("divergence", divergences(alignment, *found), axes=("measure", "part"), unit="nats")
            same = np.full(len(alignment.parts), np.nan)
            for part in np.flatnonzero(alignment.aligned).tolist():
                _, a, _, b = alignment.parts[part].tolist()
                same[part] = float(found[0][a - 1].argmax() == found[1][b - 1].argmax())
            result.add_array("agreement", same, axes=("part",))
        for letter, lens in zip("ab", lenses, strict=True):
            for measure in ("agreement", "divergence"):
                unit = "nats" if measure == "divergence" else None
                result.add_array(
                    f"lens.{letter}.{measure}", lens.mean(measure).double().numpy(), axes=("depth",), unit=unit
                )
        result.set(settings=settings, results={"refused": refused, "depths": [list(lens.depths) for lens in lenses]})
    return result.id
