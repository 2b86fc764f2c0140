"""Searching the synapses of one text, and who wrote them: the job behind the Synapses page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.measure.common import FormError, checked_choice, checked_number, model_record, repeatable
from app.services import Scene, Services
from app.view_state import SynapseAddress
from workbench.lab.jobs import Job
from workbench.lab.run_synapses import RunSynapses
from workbench.lab.runs import Run, RunError

KIND = "bdh-synapses"
MEASURES = {"strength": "strength now", "change": "change over the span", "read": "contribution to a logit"}
LISTED, EXPLAINED, WRITES, WORDS = 50, 12, 12, 8


def start_search(
    services: Services, scene: Scene, measure: Any, layer: Any, since: Any = None, symbol: Any = None
) -> Job:
    """Queue a search for the strongest, most changed or most read synapses into `layer`, after the pinned token (else the last).

    `since`: for `"change"`, the token that the span begins after. `symbol`: for `"read"`, the one character whose logit is asked about.
    FormError, in words for the reader, for what cannot be searched.
    """
    run, at = searchable(services, scene)
    chosen = checked_choice(measure, "measure", list(MEASURES))
    depth = len(RunSynapses(run).layers)
    target = checked_number(layer, "layer", 1, depth - 1)
    logit = None
    if chosen == "change":
        since = checked_number(since, "the beginning of the span", 0, at - 1)
    if chosen == "read":
        if at < 1:
            raise FormError("Token 0 reads nothing: pin a later token.")
        if not isinstance(symbol, str) or len(symbol.encode()) != 1:
            raise FormError(f"Give the one character whose logit is asked about (one byte); got {symbol!r}.")
        logit = symbol.encode()[0]
    settings = {
        "run": run.id, "measure": chosen, "layer": target, "at": at, "since": since if chosen == "change" else None, "logit": logit,
    }  # fmt: skip
    followed = [each for each in scene.view.synapses if each[3] == target]
    title = f"Synapses into layer {target} by {MEASURES[chosen]}"
    return services.jobs.submit(
        title, _search, key=f"{KIND}:{settings}:{followed}", services=services, name=run.model["name"], text=run.manifest["text"],
        settings=settings, followed=followed,
    )  # fmt: skip


def searchable(services: Services, scene: Scene) -> tuple[Run, int]:
    """The open run of an unchanged BDH of the catalogue, and its pinned (else last) token. FormError for any other."""
    try:
        RunSynapses(scene.opened())
    except (RunError, ValueError) as error:
        raise FormError(f"{str(error)[:1].upper()}{str(error)[1:]}. Open a run of a BDH above.") from None
    run = repeatable(services, scene.opened())
    return run, scene.query


def synapse_of(address: SynapseAddress) -> Any:
    """The `probes.bdh.Synapse` of an address."""
    from probes.bdh import Synapse

    source_layer, source_head, source, layer, head, target = address
    return Synapse(source=(source_head, source), target=(head, target), target_layer=layer, source_layer=source_layer)


def address_of(synapse: Any) -> list[int]:
    """The address of a `probes.bdh.Synapse`."""
    return [synapse.source_layer, *synapse.source, synapse.target_layer, *synapse.target]


def _search(
    job: Job,
    services: Services,
    name: str,
    text: str,
    settings: dict[str, Any],
    followed: Sequence[SynapseAddress],
) -> str:
    job.progress(0.0, "loading the model")
    import numpy as np

    from probes import bdh

    model = services.models.load(name)
    job.progress(0.3, "searching")
    at, layer = settings["at"], settings["layer"]
    common: dict[str, Any] = {"k": LISTED}
    if settings["measure"] == "strength":
        top = bdh.strongest_synapses(model, text, layer, at=at, **common)
    elif settings["measure"] == "change":
        top = bdh.most_changed_synapses(model, text, layer, span=(settings["since"], at), **common)
    else:
        top = bdh.most_read_synapses(model, text, layer, logit=settings["logit"], at=at, **common)
    job.progress(0.7, "who wrote them")
    found = bdh.attribute_state(model, text, layer, at=at)
    wanted = [synapse_of(each) for each in followed] + list(top.synapses[:EXPLAINED])
    explained = [_explain(bdh, model, found, synapse) for synapse in dict.fromkeys(wanted)]
    paper = found.explained()
    job.progress(0.95, "writing")
    addresses = np.array([address_of(synapse) for synapse in top.synapses], dtype=np.int32).reshape(-1, 6)
    with services.store.create(KIND, job.title, model=model_record(model), text=text) as run:
        run.add_array("scores", top.scores.double().numpy(), axes=("synapse",))
        run.add_array("addresses", addresses, axes=("synapse", "part"))
        run.set(settings=settings, results={
            "total": top.total, "error": found.error, "explained": explained,
            "paper": {"share": float(paper.share.mean()), "cosine": float(paper.cosine.mean())},
        })  # fmt: skip
    return run.id


def _explain(bdh: Any, model: Any, found: Any, synapse: Any) -> dict[str, Any]:
    """Who wrote a synapse, what its neurons and the row of its target say, as plain data."""
    authors = bdh.who_wrote_synapse(found, synapse, k=WRITES)
    writes = [
        {
            "source": write.source,
            "position": write.position,
            "token": write.token,
            "value": write.value,
            "share": write.share,
        }
        for write in authors.writes
    ]
    said = {}
    for which, neuron in (("source", synapse.source), ("target", synapse.target)):
        meaning = bdh.neuron_says(model, *neuron, k=WORDS)
        said[which] = {"excited by": meaning.excited_by, "promotes": meaning.promotes, "suppresses": meaning.suppresses}
    try:
        row = bdh.row_says(model, found, *synapse.target, k=WORDS)
        said["row"] = {"promotes": row.promotes, "resembles": row.resembles}
    except ValueError:
        pass  # a row that was never written says nothing
    return {
        "address": address_of(synapse),
        "total": authors.total,
        "listed": authors.listed,
        "writes": writes,
        "says": said,
    }
