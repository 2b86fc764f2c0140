"""How sparse a BDH is on a text, and whether surprise makes it more active: the job behind the Sparsity page."""

from __future__ import annotations

from typing import Any

from app.measure.common import FormError, checked_model, checked_text, model_record
from app.services import Services
from workbench.lab.jobs import Job

KIND = "bdh-sparsity"
ACTIVITIES = ("x", "gate", "y")
FEWEST = 4
"""Tokens of a text: three after the silent first one can be correlated."""


def start_sparsity(services: Services, name: Any, text: Any) -> Job:
    """Queue the count of active neurons of a model on a text. FormError, in words for the reader, for a bad form."""
    read = checked_text(text)
    if len(read.encode()) < FEWEST:
        raise FormError(
            f"The text has {len(read.encode())} tokens; expected at least {FEWEST}, since the first one is left out."
        )
    settings = {"model": checked_model(services, name)}
    return services.jobs.submit(
        f"Sparsity of {settings['model']}", _measure, key=f"{KIND}:{settings}:{read}", services=services, settings=settings, text=read,
    )  # fmt: skip


def _measure(job: Job, services: Services, settings: dict[str, Any], text: str) -> str:
    job.progress(0.0, "loading the model")
    import numpy as np

    from probes import bdh

    model = services.models.load(settings["model"])
    job.progress(0.3, "counting active neurons")
    found = bdh.measure_sparsity(model, text)
    job.progress(0.7, "correlations with surprisal")
    curve, card = bdh.card_curve(model.card), (model.card or {}).get("sparsity") or {}
    tied = {token: found.correlation("y", token=token) for token in ("read", "next")}
    with services.store.create(KIND, job.title, model=model_record(model), text=text) as run:
        for name in ACTIVITIES:
            run.add_array(f"active.{name}", found.of(name)[0].numpy(), axes=("layer", "head", "pos"))
            run.add_array(f"octile.{name}", found.octile_means(name).numpy(), axes=("layer", "octile"))
            run.add_array(f"dead.{name}", found.dead(name).numpy(), axes=("layer", "head"))
        if curve:
            steps, _ = bdh.over_steps(curve, "y")
            shares = np.stack([bdh.over_steps(curve, name)[1].numpy() for name in ACTIVITIES])
            run.add_array("training.step", steps.numpy(), axes=("measurement",))
            run.add_array("training.active", shares, axes=("activity", "measurement", "layer"))
            run.add_array(
                "training.surprisal", np.array([point.surprisal for point in curve]), axes=("measurement",), unit="nats"
            )
        run.add_array("surprisal", found.surprisal[0].numpy(), axes=("pos",), unit="nats")
        for token, each in tied.items():
            run.add_array(f"correlation.{token}", each.value.numpy(), axes=("layer",))
            run.add_array(f"null.{token}", each.null.numpy(), axes=("layer",))
        run.set(settings=settings, results={
            "tokens": list(found.tokens[0]), "neurons": int(found.ever["y"].shape[-1]), "compared": tied["read"].tokens,
            "training": {key: card.get(key) for key in ("tokens", "until", "difference")} if curve else None,
            "dead_everywhere": {name: len(found.dead_everywhere(name)) for name in ACTIVITIES},
        })  # fmt: skip
    return run.id
