"""What one token of the open run reads, and what that does to a logit: the job behind the Reads page."""

from __future__ import annotations

from typing import Any

from app.measure.common import FormError, model_of, model_record
from app.measure.synapses import searchable
from app.services import Scene, Services
from workbench.lab.jobs import Job

KIND = "bdh-reads"
EXPLAINED, PAIRS, WORDS = 12, 4, 6
"""Readings whose neurons are put into words, pairs of each, tokens of a neuron."""


def start_reads(services: Services, scene: Scene, symbol: Any = None) -> Job:
    """Queue the read circuit of the pinned token (else the last): from the logit of `symbol` to layer, head and past token.

    `symbol`: one character of one byte; without it, the one that the model expects. FormError, in words for the reader, for what
    cannot be read.
    """
    run, at = searchable(services, scene)
    if at < 1:
        raise FormError("Token 0 reads nothing: pin a later token.")
    if symbol and (not isinstance(symbol, str) or len(symbol.encode()) != 1):
        raise FormError(f"Give the one character whose logit is asked about (one byte), or none; got {symbol!r}.")
    settings = {"run": run.id, "at": at, "logit": symbol.encode()[0] if symbol else None}
    title = f"What token {at} reads" + (f", for the logit of {symbol!r}" if symbol else "")
    return services.jobs.submit(
        title, _read, key=f"{KIND}:{settings}", services=services, settings=settings, text=run.manifest["text"]
    )


def _read(job: Job, services: Services, settings: dict[str, Any], text: str) -> str:
    job.progress(0.0, "loading the model")
    from probes import bdh

    at, source = settings["at"], services.open_run(settings["run"])
    model = model_of(services, source)
    tokens = model.to_tokens(text)
    job.progress(0.2, "the logits")
    logits = model(tokens)[0, at].detach()
    logit = int(logits.argmax()) if settings["logit"] is None else settings["logit"]
    job.progress(0.4, "from the logit to what was read")
    circuit = bdh.read_circuit(model, tokens, logit=logit, at=at)
    job.progress(0.8, "what the neurons say")
    says: dict[str, dict[str, Any]] = {}
    for layer, head, past, _ in circuit.top(EXPLAINED):
        pairs = bdh.matching_pairs(model, tokens, layer, head, past=past, at=at, k=PAIRS).pairs.tolist()
        for neuron in (2 * pair + side for pair in pairs for side in (0, 1)):
            if f"{head}.{neuron}" not in says:
                meaning = bdh.neuron_says(model, head, neuron, k=WORDS)
                says[f"{head}.{neuron}"] = {"excited by": meaning.excited_by, "promotes": meaning.promotes}
    job.progress(0.95, "writing")
    with services.store.create(KIND, job.title, model=model_record(model), text=text) as run:
        run.add_array("scores", circuit.scores[0].numpy(), axes=("layer", "head", "pos"))
        run.add_array("contributions", circuit.contributions[0].numpy(), axes=("layer", "head", "pos"), unit="logits")
        run.set(settings={**settings, "logit": logit}, results={
            "logit": float(logits[logit]), "rank": int((logits > logits[logit]).sum()),
            "symbol": model.tokenizer.token_strings([logit])[0], "says": says,
        })  # fmt: skip
    return run.id
