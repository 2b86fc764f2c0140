"""Running a basket of operations beside matched random ones: the job behind the Intervene page and behind "ablate" on other pages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.measure.basket import offers_of, parse_basket, prompts_of, texts_of
from app.measure.common import (
    NO_LOGIT,
    FormError,
    checked_number,
    checked_text,
    model_of,
    part_of,
    repeatable,
    why_no_prediction,
)
from app.services import Scene, Services
from probes.interventions.language import Operation
from probes.interventions.offers import dictionaries_below
from workbench.lab.jobs import Job
from workbench.lab.run_synapses import RunSynapses
from workbench.lab.runs import RunError

KIND = "intervention"
MOST_DRAWS = 100


def start_intervening(
    services: Services,
    scene: Scene,
    basket: Any,
    draws: Any,
    seed: Any,
    prompts: Any = None,
    target: Any = "",
    against: Any = "",
) -> Job:
    """Queue the operations of `basket` on the open run's model, with `draws` matched random baskets.

    `prompts`: one a line; none: the address's, else the open run's text. `target`, `against`: single tokens; none: what is expected most.
    The target is watched after the pinned token of the run's text, or after the last token of other prompts. FormError for what cannot run.
    """
    try:
        run = scene.opened()
    except RunError as error:
        raise FormError(f"{str(error)[:1].upper()}{str(error)[1:]}. Open a run above.") from None
    if why := why_no_prediction(run, NO_LOGIT):
        raise FormError(why)
    repeatable(services, run)
    own = prompts_of(scene) if prompts is None else texts_of(str(prompts))
    is_run = not own or own == [run.manifest.get("text")]
    texts = [str(run.manifest.get("text"))] if is_run else [checked_text(each, "prompt") for each in own]
    operations = parse_basket(str(basket or ""), scene.n_tokens if is_run else None)
    check(services, scene, operations)
    settings = {
        "run": run.id, "basket": str(basket), "prompts": texts, "at": scene.query if is_run else -1, "target": str(target or ""),
        "against": str(against or ""), "draws": checked_number(draws, "draws", 0, MOST_DRAWS),
        "seed": checked_number(seed, "the seed", 0, 10**6),
    }  # fmt: skip
    title = f"{'; '.join(map(str, operations))[:70]} in {run.model['name']}"
    return services.jobs.submit(
        title, _run, key=f"{KIND}:{settings}", services=services, run_id=run.id, settings=settings
    )


def check(services: Services, scene: Scene, operations: Sequence[Operation]) -> None:
    """FormError for operations that the open run's model does not take, or for layers, heads and synapses that it lacks."""
    offers, layers = offers_of(services, scene), scene.layers
    for operation in operations:
        offer = offers[operation.kind]
        if not offer.offered:
            raise FormError(f"{str(operation)!r}: this model does not take it: {offer.reason}.")
        if operation.layer is not None and layers and operation.layer >= len(layers):
            raise FormError(
                f"{str(operation)!r}: there is no layer {operation.layer}; this model has layers 0 to {len(layers) - 1}."
            )
        if (
            operation.place == "head"
            and layers
            and max(operation.units) >= (heads := layers[operation.layer or 0]["n_heads"])
        ):
            raise FormError(
                f"{str(operation)!r}: there is no head {max(operation.units)}; layer {operation.layer} has {heads}."
            )
        if operation.synapse is not None or operation.neurons:
            _check_bdh(scene, operation)


def _check_bdh(scene: Scene, operation: Operation) -> None:
    reader = RunSynapses(scene.opened())
    for head, neuron in operation.neurons:
        if head >= reader.heads or neuron >= reader.neurons:
            raise FormError(
                f"neurons: there is no neuron {head}.{neuron}; there are {reader.heads} heads of {reader.neurons} neurons."
            )
    if operation.synapse is not None:
        one, two, three, four, five, six = operation.synapse
        try:
            reader.check(((one, two, three), (four, five, six)))
        except ValueError as error:
            raise FormError(f"{operation.kind}: {error}.") from None


def dictionaries_of(services: Services, model: str) -> Any:
    """Where the names of dictionaries lead: folders of this model right below the runs root, never a path of the reader's own."""

    def find(name: str) -> Any:
        from probes.interventions.dictionaries import open_dictionary

        known = dictionaries_below(services.store.root, model)
        if name not in known:
            raise FormError(
                f"There is no dictionary {name!r} of this model in the runs folder. Known: {', '.join(known) or 'none'}."
            )
        return open_dictionary(known[name])

    return find


def _run(job: Job, services: Services, run_id: str, settings: dict[str, Any]) -> str:
    job.progress(0.0, "loading the model")
    from probes.interventions import intervene, store_effects

    run = services.open_run(run_id)
    model = model_of(services, run)
    effects = intervene(
        model, settings["prompts"], settings["basket"], target=settings["target"], wrong=settings["against"], at=settings["at"],
        controls=settings["draws"], seed=settings["seed"], dictionaries=dictionaries_of(services, str(run.model["name"])),
        progress=part_of(job, 0.1, 0.98),
    )  # fmt: skip
    return store_effects(services.store, model, effects, title=job.title, settings=settings).id
