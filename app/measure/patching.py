"""Patching grids: which activations carry the difference between two texts, exactly and estimated. The job behind the Patching page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.measure.basket import offers_of, seconds_of
from app.measure.common import (
    NO_LOGIT,
    FormError,
    checked_choice,
    checked_text,
    model_of,
    model_record,
    part_of,
    repeatable,
    why_no_prediction,
)
from app.services import Scene, Services
from workbench.lab.jobs import Job
from workbench.lab.runs import RunError

KIND = "patching"
LONGEST = 400
DIRECTIONS = {"denoise": "clean into corrupted", "noise": "corrupted into clean"}


@dataclass(frozen=True)
class GridView:
    """One grid: what is patched (the first of `roles` that the model has), what a cell is, the line that a click puts into the basket."""

    name: str
    title: str
    roles: tuple[str, ...]
    by: str
    line: str


VIEWS: dict[str, GridView] = {
    view.name: view
    for view in (
        GridView("resid", "Residual stream before each layer", ("resid",), "pos", "patch resid {y} at {x} from: {text}"),
        GridView("mixer", "What each mixer adds", ("mixer_out", "mixer_out_pre"), "pos", "patch mixer {y} at {x} from: {text}"),
        GridView("mlp", "What each MLP adds", ("mlp_out",), "pos", "patch mlp {y} at {x} from: {text}"),
        GridView("state", "State after each token", ("state",), "pos", "patch state {y} after {x} from: {text}"),
        GridView("head", "Output of each head", ("z",), "head", "patch head {y}.{x} from: {text}"),
        GridView("pattern", "Pattern of each head", ("pattern",), "head", "patch pattern {y}.{x} from: {text}"),
    )
}  # fmt: skip
FIRST = ("resid", "mixer", "mlp", "head")


def role_of(scene: Scene, view: GridView) -> str | None:
    """The role that a grid patches in the open run's model; None where the model has none that can be edited."""
    roles = {
        point["role"]
        for point in (scene.run.manifest.get("hook_points") or [] if scene.run is not None else [])
        if point["editable"]
    }
    return next((role for role in view.roles if role in roles), None)


def offered_views(scene: Scene) -> list[str]:
    """The grids that the open run's model has."""
    return [name for name, view in VIEWS.items() if role_of(scene, view) is not None]


def runs_of(scene: Scene, views: Sequence[str], tokens: int) -> int:
    """How many cells some grids have: one run each."""
    heads = sum(scene.heads_per_layer)
    return sum(heads if VIEWS[name].by == "head" else len(scene.layers) * tokens for name in views if name in VIEWS)


def seconds_for(scene: Scene, views: Sequence[str], tokens: int) -> float:
    """Roughly how long they take."""
    parameters = int((scene.run.model.get("parameters") if scene.run is not None else 0) or 0)
    return seconds_of(parameters, tokens, runs_of(scene, views, tokens))


def start_patching(
    services: Services, scene: Scene, clean: Any, corrupted: Any, answer: Any, wrong: Any, views: Any, direction: Any
) -> Job:
    """Queue grids for two texts of equally many tokens on the open run's model. FormError for what cannot be measured.

    `answer`, `wrong`: tokens whose logits are compared after the last token; empty: what the model expects of the clean and of the
    corrupted text.
    """
    try:
        if why := why_no_prediction(scene.opened(), NO_LOGIT):
            raise FormError(why)
        run = repeatable(services, scene.opened())
    except RunError as error:
        raise FormError(f"{str(error)[:1].upper()}{str(error)[1:]}. Open a run above.") from None
    texts = [
        checked_text(text, what, LONGEST).strip("\n")
        for text, what in ((clean, "clean text"), (corrupted, "corrupted text"))
    ]
    if any("\n" in text for text in texts):
        raise FormError("Each of the two texts is one line: a cell goes into the basket as one line, too.")
    if texts[0] == texts[1]:
        raise FormError("The two texts are the same, so nothing differs that could be restored.")
    if offers_of(services, scene)["patch"].reason:
        raise FormError(f"This model does not take it: {offers_of(services, scene)['patch'].reason}.")
    known = offered_views(scene)
    chosen = [checked_choice(name, "grid", known) for name in (views or [])]
    if not chosen:
        raise FormError(f"Choose at least one grid: {', '.join(known)}.")
    settings = {
        "run": run.id, "clean": texts[0], "corrupted": texts[1], "answer": str(answer or ""), "wrong": str(wrong or ""),
        "roles": {name: role_of(scene, VIEWS[name]) for name in chosen},
        "direction": checked_choice(direction, "direction", list(DIRECTIONS)),
    }  # fmt: skip
    title = f"Patching {texts[0][-28:]!r} against {texts[1][-28:]!r} in {run.model['name']}"
    return services.jobs.submit(
        title, _run, key=f"{KIND}:{settings}", services=services, run_id=run.id, settings=settings
    )


def single_token(model: Any, text: str, expected: int, what: str) -> int:
    """The id of a typed token; of an empty one, what is expected. FormError for more than one token."""
    if not text:
        return expected
    ids = model.to_tokens(text)[0].tolist()
    if len(ids) != 1:
        raise FormError(f"The {what} {text!r} is {len(ids)} tokens of this model; expected exactly one.")
    return int(ids[0])


def grid(model: Any, settings: dict[str, Any], name: str, *, exact: bool = True, **progress: Any) -> Any:
    """The `PatchingGrid` of one view, as a run's settings ask for it: one run per cell, or its estimate from one gradient."""
    from probes.objectives import LogitDifference
    from probes.patching import activation_patching, attribution_patching

    objective = LogitDifference(settings["answer_id"], settings["wrong_id"])
    measure = activation_patching if exact else attribution_patching
    return measure(
        model, settings["clean"], settings["corrupted"], objective, role=settings["roles"][name], by=(VIEWS[name].by,),
        direction=settings["direction"], **progress,
    )  # fmt: skip


def _run(job: Job, services: Services, run_id: str, settings: dict[str, Any]) -> str:
    job.progress(0.0, "loading the model")
    import torch

    from probes.patching import correlation, pair

    model = model_of(services, services.open_run(run_id))
    tokens = pair(model, settings["clean"], settings["corrupted"])
    with torch.no_grad():
        expected = [int(model(ids)[0, -1].argmax()) for ids in tokens.values()]
    settings["answer_id"] = single_token(model, settings["answer"], expected[0], "answer")
    settings["wrong_id"] = single_token(model, settings["wrong"], expected[1], "wrong token")
    if settings["answer_id"] == settings["wrong_id"]:
        same = (
            model.to_string(torch.tensor([settings["answer_id"]]))
            if model.tokenizer is not None
            else settings["answer_id"]
        )
        raise FormError(
            f"Answer and wrong token are both ‘{same}’ (what is left empty is what the model expects). Type two that differ."
        )
    call = model.tokenizer.token_strings if model.tokenizer is not None else lambda ids: [str(i) for i in ids]
    results: dict[str, Any] = {
        "answer": call([settings["answer_id"]])[0], "wrong": call([settings["wrong_id"]])[0], "views": {},
        "tokens": {name: list(call(ids[0].tolist())) for name, ids in tokens.items()},
    }  # fmt: skip
    arrays = {}
    for number, name in enumerate(settings["roles"]):
        first, last = (0.05 + 0.9 * (number + part) / len(settings["roles"]) for part in (0, 1))
        exact = grid(model, settings, name, progress=part_of(job, first, last))
        guess = grid(model, settings, name, exact=False)
        arrays[f"exact.{name}"], arrays[f"estimated.{name}"] = exact.normalised().numpy(), guess.normalised().numpy()
        try:
            agreement = correlation(guess, exact)
        except ValueError:  # all cells alike
            agreement = None
        results["views"][name] = {
            "layers": [f"{layer[0]}@{layer[1]}" if isinstance(layer, tuple) else str(layer) for layer in exact.layers],
            "correlation": agreement,
        }  # fmt: skip
        results |= {"clean": float(exact.clean.mean()), "corrupted": float(exact.corrupted.mean())}
    with services.store.create(KIND, job.title, model=model_record(model), text=settings["corrupted"]) as run:
        for name, values in arrays.items():
            run.add_array(name, values, axes=("layer", VIEWS[name.partition(".")[2]].by))
        run.set(settings=settings, results=results)
    return run.id
