"""Sparse features: training a dictionary from the page, opening or finishing one in the runs root. The jobs behind the Features page."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Mapping
from functools import cache
from typing import Any

from app.measure.common import FormError, checked_choice, checked_number, part_of
from app.measure.probes import checked_any_model
from app.services import Services
from app.studies import CancelOf
from workbench.instrument.errors import suggestion
from workbench.lab.corpora import list_corpora
from workbench.lab.jobs import Job

KIND = "features"
KINDS = {
    "topk": "TopK: the k largest of each row", "batch_topk": "BatchTopK: k on average", "jumprelu": "JumpReLU: learned thresholds",
    "gated": "gated", "standard": "standard: ReLU with a penalty",
}  # fmt: skip
SITE_ROLES = (
    "resid_post",
    "resid_mid",
    "mlp_post",
    "mlp_out",
    "mixer_out",
    "attn_out",
    "z",
    "neuron",
    "neuron_gated",
    "state",
)
REQUEST, FOUND = "request.json", "features.json"
MOST_FEATURES, MOST_STEPS, MOST_SEQUENCES, MOST_CONTEXT = 16_384, 50_000, 5_000, 1_024
BATCH, LOADING = 1024, 4.0
SLOW, LARGE = 10.0, 2e9
"""Seconds and bytes from which the estimate is a warning."""


def corpora() -> list[tuple[str, str]]:
    """The corpora that are here, as (value, words)."""
    return [(record.name, record.name) for record in list_corpora() if record.available]


def sites_of(services: Services, name: str) -> list[str]:
    """Hook points of a model whose activations become rows, in the order of the forward pass. [] for an unknown model."""
    try:
        points = services.models.describe(name)["hook_points"]
    except (ValueError, LookupError):
        return []
    return [
        str(point["name"])
        for point in points
        if point.get("role") in SITE_ROLES and ("pos" in point["axes"] or point["role"] == "state")
    ]


def folders(services: Services) -> list[tuple[str, str]]:
    """Dictionaries in the runs root, as (name, words): finished ones, and such as were stopped."""
    found = []
    for path in sorted(services.store.root.glob(f"*/{REQUEST}")):
        record = _read(path)
        if record and not path.parent.name.startswith("."):
            state = "" if (path.parent / FOUND).exists() else " (stopped: it goes on)"
            found.append(
                (path.parent.name, f"{path.parent.name}: {record['site']['point']} of {record['model']}{state}")
            )
    return found


def _read(path: Any) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text("utf-8"))
        return record if {"model", "site", "control"} <= set(record) and "point" in record["site"] else None
    except (OSError, ValueError, TypeError, AttributeError):
        return None


def checked_settings(
    services: Services,
    name: Any,
    site: Any,
    head: Any,
    kind: Any,
    size: Any,
    k: Any,
    sparsity: Any,
    corpus: Any,
    sequences: Any,
    context: Any,
    every: Any,
    steps: Any,
    seed: Any,
    control: Any,
) -> dict[str, Any]:
    """What a training is asked for, checked. FormError, in words for the reader."""
    model = checked_any_model(services, name)
    known = sites_of(services, model)
    if site not in known:
        raise FormError(f"{model} has no site {site!r} to learn from.{suggestion(str(site), known)}")
    chosen = checked_choice(kind, "the kind of dictionary", list(KINDS))
    features = checked_number(size, "the number of features", 2, MOST_FEATURES)
    settings: dict[str, Any] = {
        "model": model, "site": str(site), "head": None if head in (None, "") else checked_number(head, "the head", 0, 4096),
        "every": checked_number(every, "every n-th position", 1, MOST_CONTEXT), "kind": chosen, "features": features,
        "corpus": checked_choice(corpus, "the corpus", [value for value, _ in corpora()]),
        "sequences": checked_number(sequences, "the number of sequences", 10, MOST_SEQUENCES),
        "context": checked_number(context, "tokens of a sequence", 8, MOST_CONTEXT),
        "steps": checked_number(steps, "the number of steps", 1, MOST_STEPS), "seed": checked_number(seed, "the seed", 0, 10**6),
        "control": bool(control),
    }  # fmt: skip
    if "topk" in chosen:
        return {**settings, "k": checked_number(k, "k, the active features of a row,", 1, features)}
    if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)) or not 0 < sparsity < 1e4:
        raise FormError(f"The weight of the penalty is {sparsity!r}; expected a positive number.")
    return {**settings, "sparsity": float(sparsity)}


def folder_name(settings: Mapping[str, Any]) -> str:
    """Where a training with these settings is kept below the runs root: the same settings go on where they stopped."""
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode()).hexdigest()[:8]
    words = re.sub(
        r"[^a-z0-9]+", "-", f"{settings['model']} {settings['site'].removesuffix('_post')}".lower().replace("hook_", "")
    )
    return f"features-{words[:40].strip('-')}-{digest}"


def start_training(services: Services, **form: Any) -> Job:
    """Queue the training of a dictionary; its folder lies in the runs root, its record is a run. FormError for a bad form."""
    settings = checked_settings(services, **form)
    folder = folder_name(settings)
    title = f"Features of {settings['model']}, {settings['site']}"
    return services.jobs.submit(
        title, _train, key=f"{KIND}:{folder}", services=services, settings=settings, folder=folder
    )


def start_opening(services: Services, folder: Any) -> Job:
    """Queue the record of a dictionary in the runs root; one that was stopped is finished first. FormError for an unknown name."""
    known = [name for name, _ in folders(services)]
    if folder not in known:
        raise FormError(f"There is no dictionary {folder!r} in the runs root.{suggestion(str(folder), known)}")
    return services.jobs.submit(
        f"Dictionary {folder}", _open, key=f"{KIND}:{folder}", services=services, folder=str(folder)
    )


def _telling(job: Job, last: float) -> Any:
    """Progress that never raises: a cancelled training first keeps what it has, see `find_features`."""
    whole = part_of(job, 0.02, last)

    def tell(fraction: float, message: str) -> None:
        if not job.cancelling:
            whole(fraction, message)

    return tell


def _train(job: Job, services: Services, settings: dict[str, Any], folder: str) -> str:
    job.progress(0.0, "loading the model")
    from probes.features.dictionaries import CONFIGS
    from probes.features.study import corpus_tokens, find_features
    from probes.features.training import FeatureTraining
    from workbench.lab.activation_store import Site

    model = services.models.load(settings["model"])
    choices: dict[str, Any] = {"n_features": settings["features"], "seed": settings["seed"]}
    choices |= {key: settings[key] for key in ("k", "sparsity") if key in settings}
    training = FeatureTraining(steps=settings["steps"], seed=settings["seed"], checkpoint_every=200)

    def study(cancel: threading.Event) -> Any:
        return find_features(
            model, Site(settings["site"], settings["head"], settings["every"]), corpus_tokens(model, settings["corpus"]),
            CONFIGS[settings["kind"]](**choices), services.store.root / folder, training=training,
            random_twin=_twin(model) if settings["control"] else None, context=settings["context"], sequences=settings["sequences"],
            progress=_telling(job, 0.75), cancel=cancel,
        )  # fmt: skip

    return _record(job, services, model, study, folder, settings)


def _open(job: Job, services: Services, folder: str) -> str:
    job.progress(0.0, "loading the model")
    from probes.features.study import continue_study, requested

    path = services.store.root / folder
    asked = requested(path)
    model = services.models.load(asked["model"])

    def study(cancel: threading.Event) -> Any:
        return continue_study(
            model,
            path,
            random_twin=_twin(model) if asked["control"] else None,
            progress=_telling(job, 0.75),
            cancel=cancel,
        )

    return _record(job, services, model, study, folder, {"folder": folder})


def _twin(model: Any) -> Any:
    import models

    return models.build(model.architecture, config=model.config)


def _record(job: Job, services: Services, model: Any, study: Any, folder: str, settings: dict[str, Any]) -> str:
    from probes.features.record import store_features
    from probes.progress import MeasurementCancelled

    try:
        found = study(CancelOf(job))
    except MeasurementCancelled:
        job.check_cancelled()
        raise
    progress = part_of(job, 0.75, 1.0)
    return store_features(services.store, model, found, folder=folder, settings=settings, progress=progress).id


# ---- what it will take -----------------------------------------------------------------------------------------------


@cache
def multiplications_per_second() -> float:
    """Multiply-adds per second of this machine's matrix product, measured once."""
    import numpy as np

    one, other = np.ones((512, 512), np.float32), np.ones((512, 1024), np.float32)
    one @ other
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        one @ other
        best = min(best, time.perf_counter() - began)
    return 512 * 512 * 1024 / best


def estimate(settings: Mapping[str, Any], width: int, parameters: int, speed: float) -> dict[str, float]:
    """`{seconds, memory, disk}` that a training will take: products of the model and of the dictionary, in bytes and multiply-adds.

    `width`: numbers per row. TopK kinds touch only active features on the way back; the others are dense in both directions.
    """
    rows = settings["sequences"] * max(1, (settings["context"] - 1) // settings["every"])
    batch, features = min(BATCH, rows), settings["features"]
    passes = 3 if "topk" in settings["kind"] else 5
    reading = settings["sequences"] * settings["context"] * parameters
    training = settings["steps"] * batch * width * features * passes
    times = 2 if settings["control"] else 1
    contexts = 8 * rows * width * features
    weights = 2 * width * features * 4
    return {
        "seconds": LOADING + (times * (reading + training) + contexts) / speed,
        "memory": 4.0 * weights
        + 4.0 * batch * features * 4
        + min(rows, 8192) * features * 4
        + rows * 64 * 4
        + 4.0 * parameters,
        "disk": times * 1.2 * rows * width * 2 + times * 3.0 * weights,
    }


def estimate_words(services: Services, settings: Mapping[str, Any]) -> str:
    """The estimate in a sentence, with a warning from 10 s or 2 GB on."""
    width, parameters = _size(services, settings["model"], settings["site"], settings["head"])
    found = estimate(settings, width, parameters, multiplications_per_second())
    words = f"About {_spoken(found['seconds'])}, {found['memory'] / 1e6:,.0f} MB of memory and {found['disk'] / 1e6:,.0f} MB on disk."
    if found["memory"] > LARGE:
        return f"{words} That is much memory: take fewer features."
    return f"{words} It can be cancelled and goes on later." if found["seconds"] > SLOW else words


def _size(services: Services, name: str, site: str, head: int | None) -> tuple[int, int]:
    """(numbers per row, parameters of the model)."""
    from workbench.lab.activation_store import Site, site_activations

    model = services.models.load(name)
    _, cached = model.run_with_cache(model.to_tokens("ab"), names=[site], positions=[1])
    rows = site_activations(cached, Site(site, head)).flatten(0, 1)
    return int(rows.shape[-1]), sum(parameter.numel() for parameter in model.parameters())


def _spoken(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
