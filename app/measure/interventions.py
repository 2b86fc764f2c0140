"""Running a basket of edits of a BDH's memory beside matched random twins: the job behind the Intervene page."""

from __future__ import annotations

import random
from typing import Any

from app.measure.basket import OF_SYNAPSES, Edit, parse_basket, random_twin
from app.measure.common import FormError, checked_number, model_record
from app.measure.synapses import searchable, synapse_of
from app.services import Scene, Services
from workbench.lab.jobs import Job
from workbench.lab.run_synapses import RunSynapses

KIND = "bdh-interventions"
POOL = 400


def start_intervening(services: Services, scene: Scene, basket: Any, draws: Any, seed: Any) -> Job:
    """Queue the edits of `basket` on the open run's text, with `draws` matched random baskets. FormError for what cannot be run."""
    run, at = searchable(services, scene)
    reader = RunSynapses(run)
    edits = parse_basket(str(basket or ""), scene.n_tokens)
    for edit in edits:
        if edit.synapse is not None:
            try:
                reader.check(((edit.synapse[0], *edit.synapse[1:3]), (edit.synapse[3], *edit.synapse[4:])))
            except ValueError as error:
                raise FormError(f"{edit.kind}: {error}.") from None
        if edit.layer not in reader.layers:
            raise FormError(
                f"{edit.kind}: there is no layer {edit.layer}; this model has layers 0 to {reader.layers[-1]}."
            )
        for head, neuron in edit.neurons:
            if head >= reader.heads or neuron >= reader.neurons:
                raise FormError(
                    f"neurons: there is no neuron {head}.{neuron}; there are {reader.heads} heads of {reader.neurons} neurons."
                )
    settings = {
        "run": run.id, "basket": str(basket), "at": at, "draws": checked_number(draws, "draws", 1, 100),
        "seed": checked_number(seed, "the seed", 0, 10**6),
    }  # fmt: skip
    return services.jobs.submit(
        f"{len(edits)} edit{'s' if len(edits) > 1 else ''}: {edits[0].kind} …", _run, key=f"{KIND}:{settings}", services=services,
        name=run.model["name"], text=run.manifest["text"], settings=settings,
    )  # fmt: skip


def hooks_of(model: Any, text: str, edits: list[Edit]) -> list[Any]:
    """The hooks of some edits for `model.run_with_hooks`."""
    from probes import bdh
    from workbench import EditState

    length = model.to_tokens(text).shape[1]
    hooks: list[Any] = []
    for edit in edits:
        synapse = None if edit.synapse is None else synapse_of(edit.synapse)
        if edit.kind == "ablate":
            hooks.append(bdh.ablate_synapse(model, text, synapse, after=edit.after))
        elif edit.kind == "clamp":
            hooks.append(bdh.clamp_synapse(model, text, synapse, edit.value, after=edit.after))
        elif edit.kind == "copy":
            hooks.append(
                bdh.copy_synapse(model, text, synapse, after=edit.after, source_tokens=edit.text, source_after=-1)
            )
        elif edit.kind == "mute":
            hooks += bdh.mute_synapse(model, synapse)
        elif edit.kind == "neurons":
            hooks += bdh.ablate_neurons(model, list(edit.neurons))
        elif edit.kind == "freeze":
            hooks.append(bdh.freeze_writes(model, since=edit.after, length=length))
        elif edit.kind == "block":
            hooks.append(bdh.block_reads(model, positions=list(edit.positions)))
        elif edit.kind == "scale":
            hooks.append(EditState(layer=edit.layer, after=edit.after, operation="scale", value=edit.value))
        else:
            hooks += bdh.copy_state(model, edit.text, source_after=-1, after=edit.after, layer=edit.layer)
    return hooks


def effect_of(model: Any, text: str, edits: list[Edit]) -> tuple[Any, Any]:
    """What edits change: (loss of every token [pos], nan at 0; log p of the next token [pos, vocab]), in nats, as float64."""
    import torch

    tokens = model.to_tokens(text)
    with torch.no_grad():
        plain = model(tokens)[0].double().log_softmax(-1)
        changed = model.run_with_hooks(tokens, hooks=hooks_of(model, text, edits))[0].double().log_softmax(-1)
    change = changed - plain
    loss = -change[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    return torch.cat([loss.new_full((1,), float("nan")), loss]).numpy(), change.numpy()


def twins_of(model: Any, text: str, edits: list[Edit], draws: int, seed: int) -> list[list[Edit]]:
    """`draws` baskets of matched random edits: synapses of about the same strength and reading, neurons of about the same activity."""
    import numpy as np

    from app.measure.synapses import address_of
    from probes.bdh.concepts_causal import matched_synapses

    length, chance = model.to_tokens(text).shape[1], random.Random(seed)
    synapses = [synapse_of(edit.synapse) for edit in edits if edit.synapse is not None]
    matched = (
        matched_synapses(model, synapses, [text], draws, POOL, np.random.default_rng(seed))[0]
        if synapses
        else [()] * draws
    )
    activity: dict[tuple[int, int], float] = {}
    if any(edit.kind == "neurons" for edit in edits):
        _, cache = model.run_with_cache(text, names=[f"blocks.{layer}.hook_x" for layer in range(model.n_layers)])
        mean = sum(each[0].double().mean(1) for each in cache.values()) / model.n_layers
        activity = {(h, n): float(v) for h, row in enumerate(mean.tolist()) for n, v in enumerate(row)}
    baskets = []
    for found in matched:
        others = iter(found)
        basket = []
        for edit in edits:
            if edit.kind in OF_SYNAPSES:
                address = address_of(next(others))
                basket.append(Edit(**{**vars(edit), "synapse": tuple(address)}))
            else:
                basket.append(random_twin(edit, length, chance, activity))
        baskets.append(basket)
    return baskets


def _run(job: Job, services: Services, name: str, text: str, settings: dict[str, Any]) -> str:
    job.progress(0.0, "loading the model")
    import numpy as np

    model = services.models.load(name)
    edits = parse_basket(settings["basket"], model.to_tokens(text).shape[1])
    job.progress(0.1, "the edits")
    loss, change = effect_of(model, text, edits)
    controls = []
    for number, twin in enumerate(twins_of(model, text, edits, settings["draws"], settings["seed"])):
        job.progress(
            0.3 + 0.6 * number / settings["draws"], f"matched random edits {number + 1} of {settings['draws']}"
        )
        controls.append(effect_of(model, text, twin)[0])
    with services.store.create(KIND, job.title, model=model_record(model), text=text) as run:
        run.add_array("loss", loss, axes=("pos",), unit="nats")
        run.add_array("controls", np.stack(controls), axes=("draw", "pos"), unit="nats")
        run.add_array("log_probs", change[settings["at"]], axes=("vocab",), unit="nats")
        names = model.tokenizer.token_strings(list(range(change.shape[1]))) if model.tokenizer is not None else []
        run.set(settings=settings, results={"vocab": names}, seed=settings["seed"])
    return run.id
