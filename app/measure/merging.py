"""Merging two BDH models without training, on one text: losses, heritage, and how exact a self-merge is. The job behind the Merge page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app.measure.common import FormError, bdh_models, checked_text, model_record
from app.services import Services
from workbench.instrument.errors import suggestion
from workbench.lab.jobs import Job

KIND = "bdh-merge"
FOLDER, INITIAL = "folder:", "initial:"


def parents(services: Services) -> list[tuple[str, str]]:
    """What can be merged, as (value, words): the catalogue's BDHs, each with new initial weights, and model folders in the runs root."""
    models = [(str(model["name"]), str(model.get("title") or model["name"])) for model in bdh_models(services)]
    initial = [(INITIAL + name, f"{title}: untrained, another seed") for name, title in models]
    return [*models, *initial, *((FOLDER + name, f"folder {name}") for name in _folders(services.store.root))]


def _folders(root: Path) -> list[str]:
    """Names of folders in the runs root that `models.save` wrote with a BDH; never a path of the reader's own."""
    found = []
    for path in sorted(root.glob("*/config.json")):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(record, dict) and record.get("architecture") == "bdh" and not path.parent.name.startswith("."):
            found.append(path.parent.name)
    return found


def start_merging(services: Services, first: Any, second: Any, text: Any) -> Job:
    """Queue the merge of two parents, measured on `text`. FormError, in words for the reader, for parents that are not there."""
    known = [value for value, _ in parents(services)]
    for name in (first, second):
        if name not in known:
            raise FormError(f"There is no model {name!r} to merge.{suggestion(str(name), known)}")
    settings = {"first": str(first), "second": str(second)}
    read = checked_text(text)
    if len(read.encode()) < 2:
        raise FormError("A text needs at least two tokens to have a loss.")
    return services.jobs.submit(
        f"Merge of {first} and {second}", _merge, key=f"{KIND}:{settings}:{read}", services=services, settings=settings, text=read,
    )  # fmt: skip


def open_parent(services: Services, name: str) -> Any:
    """The model that one of `parents` names."""
    if name.startswith(FOLDER):
        import models

        return models.load(services.store.root / name.removeprefix(FOLDER))
    if name.startswith(INITIAL):
        from probes.bdh import initial_weights

        model = services.models.load(name.removeprefix(INITIAL))
        return initial_weights(model, seed=model.config.seed + 1).model
    return services.models.load(name)


def losses(model: Any, text: str) -> Any:
    """Loss of every token [pos] in nats, nan at 0, as float64."""
    import torch

    tokens = model.to_tokens(text)
    with torch.no_grad():
        loss = -model(tokens)[0, :-1].double().log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0]
    return torch.cat([loss.new_full((1,), float("nan")), loss]).numpy()


def heritage_of(merged: Any, heritage: Any, text: str) -> Any:
    """The first parent's share by layer, [layer, measure]: of the neurons that fire (y), and of E y, ⟨part, E y⟩ / ‖E y‖²."""
    import numpy as np
    import torch

    names = [f"blocks.{layer}.hook_y" for layer in range(merged.n_layers)]
    _, cache = merged.run_with_cache(text, names=names)
    shares, first = [], heritage.names[0]
    with torch.no_grad():
        for name in names:
            fired = {parent: float((part != 0).sum()) for parent, part in heritage.split(cache[name]).items()}
            parts = heritage.contribution(merged, cache[name])
            whole = sum(parts.values())
            shares.append(
                [fired[first] / sum(fired.values()), float((parts[first] * whole).sum() / (whole * whole).sum())]
            )
    return np.array(shares)


def _merge(job: Job, services: Services, settings: dict[str, Any], text: str) -> str:
    job.progress(0.0, "loading the models")
    import numpy as np

    from models.bdh.merge import merge, self_merge_error

    one, other = (open_parent(services, settings[which]) for which in ("first", "second"))
    job.progress(0.3, "merging")
    merged, heritage = merge([one, other], names=["first", "second"])
    job.progress(0.4, "reading the text")
    found = np.stack([losses(model, text) for model in (one, other, merged)])
    job.progress(0.7, "merging the first with itself")
    errors = [self_merge_error(one, one.to_tokens(text), exact=exact) for exact in (False, True)]
    shares = heritage_of(merged, heritage, text)
    record = {**model_record(one), "name": f"{settings['first']} + {settings['second']}"}
    with services.store.create(KIND, job.title, model=record, text=text) as run:
        run.add_array("losses", found, axes=("model", "pos"), unit="nats")
        run.add_array("heritage", shares, axes=("layer", "measure"))
        run.set(settings=settings, results={
            "self_merge": errors, "neurons": list(heritage.sizes),
            "tokens": list(one.tokenizer.token_strings(one.to_tokens(text)[0].tolist())),
        })  # fmt: skip
    return run.id
