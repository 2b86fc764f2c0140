"""What the residual stream says at every depth of one text, and who wrote a logit difference: the job behind the Lens page.

A result keeps the logit lens always and a tuned lens where one was asked for. Tuned lenses are runs of their own (`tuned-lens`), trained
here once for a model, corpus and number of steps; a training that is cancelled goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from app.measure.common import (
    FormError,
    checked_choice,
    checked_number,
    model_of,
    model_record,
    part_of,
    repeatable,
    why_no_prediction,
)
from app.services import Scene, Services
from workbench.lab.jobs import Job
from workbench.lab.runs import Run

KIND = "lens"
LENS_KIND = "tuned-lens"
PLAIN, TRAIN = "logit", "train"
TARGETS = {"next": "the token that really follows", "answer": "token A, everywhere"}
TARGETS_HERE = {
    **TARGETS,
    "next": "the token that really stands there",
}  # of encoders, whose predictions are of the position itself
MEASURES = ("divergence", "entropy", "loss", "rank")
TOP = 10
CONTEXT, BATCH, HELD_OUT = 64, 8, 32
LARGEST = 2**28
"""Logits (tokens × vocabulary) of one depth that are held at once."""


def lenses_of(services: Services, run: Run) -> list[tuple[str, str]]:
    """Tuned lenses in the store that were trained for the run's model as it was: (id, title), newest first."""
    entries = services.store.list(kind=LENS_KIND, model=run.model.get("name"))
    made_by = run.model.get("weights_sha256")
    return [(e.id, e.title) for e in entries if services.open_run(e.id).model.get("weights_sha256") == made_by]


def corpora() -> list[str]:
    """Names of the corpora that can be read here."""
    from workbench.lab.corpora import list_corpora

    return [record.name for record in list_corpora() if record.available]


def why_no_lens(run: Run) -> str:
    """Why no lens can read the run's residual stream, in words for the reader; "" where one can."""
    if not (run.manifest.get("tokens") or {}).get("ids"):
        return "This run has no tokens to read. Open a trace of a text."
    return why_no_prediction(run, "what it holds at a depth cannot be read as some")


def start_reading(
    services: Services, scene: Scene, lens: Any, corpus: Any, steps: Any, answer: Any, wrong: Any, target: Any
) -> Job:
    """Queue the reading of the open run's text at every depth, and the attribution of logit A − logit B after the pinned (else last) token.

    `lens`: "logit", "train" or the id of a tuned lens. `corpus`, `steps`: what one is trained on. `answer`, `wrong`: tokens A and B as text
    or "#id"; empty: the two most likely. `target`: a key of `TARGETS`. FormError, in words for the reader, for what cannot be read.
    """
    if why := why_no_lens(scene.opened()):
        raise FormError(why)
    run = repeatable(services, scene.opened())
    stored = [name for name, _ in lenses_of(services, run)]
    settings = {
        "run": run.id, "at": scene.query, "lens": checked_choice(lens, "lens", [PLAIN, TRAIN, *stored]),
        "target": checked_choice(target, "the target", list(TARGETS)),
        "answer": checked_token(run, answer, "Token A"), "wrong": checked_token(run, wrong, "Token B"),
    }  # fmt: skip
    if settings["wrong"] is not None and settings["answer"] is None:
        raise FormError("Token B is given and token A is not: give both, or A alone, or neither.")
    if lens == TRAIN:
        settings["corpus"] = checked_choice(corpus, "the corpus", corpora())
        settings["steps"] = checked_number(steps, "steps", 1, 100_000)
    title = f"Lens of {run.model['name']} on “{' '.join(str(run.manifest.get('text') or '').split())[:32]}”"
    return services.jobs.submit(title, _read, key=f"{KIND}:{settings}", services=services, run=run, settings=settings)


def checked_token(run: Run, text: Any, name: str) -> str | None:
    """A token as the reader typed it, or None for nothing. FormError where it is surely not one token of the run's vocabulary."""
    if text is None or text == "":
        return None
    text = str(text)
    if text[0] == "#" and text[1:].isascii() and text[1:].isdigit():
        return text
    if (run.manifest.get("tokens") or {}).get("tokenizer") == "bytes" and len(text.encode("utf-8", "replace")) != 1:
        count = len(text.encode("utf-8", "replace"))
        raise FormError(
            f"{name} is {text!r}, which is {count} tokens of this model; give one character of one byte, or #id."
        )
    return text


def token_id(model: Any, text: str, name: str) -> int:
    """The id of one token given as text or "#id". ValueError if it is none, or several."""
    if text[0] == "#" and text[1:].isdigit():
        found = [int(text[1:])]
    elif model.tokenizer is None:
        raise ValueError(
            f"{name} is {text!r}, and {model.name!r} has no tokenizer: give the token's number, such as #7."
        )
    else:
        found = getattr(model.tokenizer, "encode_plain", model.tokenizer.encode)(text)
    if len(found) != 1 or not 0 <= found[0] < model.vocab_size:
        raise ValueError(
            f"{name} is {text!r}, which is no single token of {model.name!r} (ids {found}, of {model.vocab_size})."
        )
    return int(found[0])


def _read(job: Job, services: Services, run: Run, settings: dict[str, Any]) -> str:
    job.progress(0.0, "loading the model")
    import torch

    model = model_of(services, run)
    ids = run.manifest["tokens"]["ids"]
    if len(ids) * model.vocab_size > LARGEST:
        raise ValueError(
            f"{len(ids)} tokens × {model.vocab_size} logits are more than fit at once; read a shorter text."
        )
    tokens = torch.tensor([ids])
    chosen = settings["lens"]
    lens_id = train(job, services, model, settings["corpus"], settings["steps"]) if chosen == TRAIN else chosen
    job.progress(0.9, "reading every depth")
    answer, wrong = pair(model, tokens, settings)
    target = answer if settings["target"] == "answer" else None
    with services.store.create(KIND, job.title, model=model_record(model), text=run.manifest.get("text")) as result:
        found, names = {}, set[int]()
        lenses = {PLAIN: None} | ({"tuned": load_lens(services.open_run(lens_id))} if lens_id != PLAIN else {})
        for name, lens in lenses.items():
            found[name] = reading_of(model, tokens, lens, target)
            _store_reading(result, name, found[name])
            names |= set(found[name].top_ids.flatten().tolist())
        job.progress(0.95, "attributing the logit difference")
        norms, cosines = stream_shape(model, tokens)
        result.add_array("resid_norm", norms, axes=("depth", "pos"))
        result.add_array("resid_cosine", cosines, axes=("depth", "pos"))
        parts, contributions = parts_of(model, tokens, answer, wrong, settings["at"])
        result.add_array("contributions", contributions, axes=("component",), unit="logits")
        names |= {answer} | ({wrong} if wrong is not None else set())
        labels = {str(i): name_of(model, i) for i in sorted(names)}
        results = {
            "depths": list(found[PLAIN].depths), "names": labels, "answer": answer, "wrong": wrong, "attribution": parts,
            "means": {name: {m: _mean(reading, m) for m in (*MEASURES, "agreement")} for name, reading in found.items()},
            "training": services.open_run(lens_id).manifest["results"] if lens_id != PLAIN else None,
        }  # fmt: skip
        result.set(settings={**settings, "lens": lens_id}, results=results)
    return result.id


def _mean(reading: Any, measure: str) -> list[float | None]:
    return [None if np.isnan(value) else value for value in reading.mean(measure).double().tolist()]


def reading_of(model: Any, tokens: Any, lens: Any = None, target: int | None = None) -> Any:
    """What a lens (None: the logit lens) says at every depth, with as many likely tokens as the page shows."""
    from probes.lenses import logit_lens

    return logit_lens(model, tokens, top=min(TOP, model.vocab_size), translate=lens, target=target)


def _store_reading(result: Any, name: str, reading: Any) -> None:
    for measure in MEASURES:
        values = getattr(reading, measure)[:, 0].float().numpy()
        result.add_array(f"{name}.{measure}", values, axes=("depth", "pos"), unit="" if measure == "rank" else "nats")
    axes = ("depth", "pos", "rank")
    result.add_array(f"{name}.top_log_probs", reading.top_log_probs[:, 0].float().numpy(), axes=axes, unit="nats")
    result.add_array(f"{name}.top_ids", reading.top_ids[:, 0].numpy().astype(np.int32), axes=axes)


def name_of(model: Any, token: int) -> str:
    """A token's label: of a byte the character, of another its text, "#id" where there is no tokenizer."""
    if model.tokenizer is None:
        return f"#{token}"
    if model.tokenizer.name == "bytes":
        return chr(token)
    return str(model.tokenizer.token_strings([token])[0])


def pair(model: Any, tokens: Any, settings: dict[str, Any]) -> tuple[int, int | None]:
    """Tokens A and B of the settings; the two most likely after the asked token where neither is given."""
    import torch

    given = [settings[which] for which in ("answer", "wrong")]
    answer, wrong = (
        None if text is None else token_id(model, text, f"Token {letter}")
        for text, letter in zip(given, "AB", strict=True)
    )
    if answer is not None:
        return answer, wrong
    with torch.no_grad():
        best = model(tokens)[0, settings["at"]].topk(2).indices.tolist()
    return int(best[0]), int(best[1])


def stream_shape(model: Any, tokens: Any) -> tuple[np.ndarray, np.ndarray]:
    """Norm of the residual stream and its cosine with the final one, at every depth: float32 [depth, pos] each; nan where a stream is 0."""
    import torch

    from probes.lenses import residual_streams
    from workbench.lab.dense_layers import last_step

    points = model.hook_points.points.values()
    final = next(last_step(p) for p in points if p.role == "resid_post" and p.layer_index == model.n_layers - 1)
    with torch.no_grad():
        _, streams = residual_streams(model, tokens)
        _, cache = model.run_with_cache(tokens, names=[final])
        last = cache[final][0].double()
        depths = [*(stream[0].double() for stream in streams.values()), last]
        norms = torch.stack([each.norm(dim=-1) for each in depths])
        cosines = torch.stack([torch.cosine_similarity(each, last, dim=-1) for each in depths])
        cosines[(norms == 0) | (norms[-1] == 0)] = float("nan")
    return norms.float().numpy(), cosines.float().numpy()


def parts_of(model: Any, tokens: Any, answer: int, wrong: int | None, at: int) -> tuple[dict[str, Any], np.ndarray]:
    """The direct attribution of logit A − logit B at a position: (its record, contributions [component] in logits).

    Where heads cannot be told apart, each mixer is one component and `heads_refused` says why; where there is no attribution at all,
    `refused` says why and the array is empty.
    """
    from probes.direct_attribution import direct_attribution
    from probes.objectives import LogitDifference

    objective, refusals = LogitDifference(answer, wrong, at=at), []
    for heads in (True, False):
        try:
            found = direct_attribution(model, tokens, objective, heads=heads)
        except ValueError as error:
            refusals.append(str(error))
            continue
        record = {
            "components": [{"name": str(c), "kind": c.kind, "layer": c.layer, "head": c.head} for c in found.components],
            "constant": float(found.constant), "total": float(found.total), "error": found.error,
            "heads_refused": refusals[0] if refusals else "",
        }  # fmt: skip
        return record, found.contributions[:, 0].double().numpy()
    return {"components": [], "refused": refusals[-1], "heads_refused": refusals[0]}, np.zeros(0)


# ---- tuned lenses ----------------------------------------------------------------------------------------------------


def load_lens(run: Run) -> Any:
    """The `probes.tuned_lens.TunedLens` that a run of kind `tuned-lens` keeps."""
    import torch

    from probes.tuned_lens import TunedLens

    A, b = (torch.from_numpy(np.array(run.array(name))) for name in ("A", "b"))
    lens = TunedLens(*b.shape).to(b.dtype)
    lens.load_state_dict({"A": A, "b": b})
    return lens


def train(job: Job, services: Services, model: Any, corpus: str, steps: int) -> str:
    """Train a tuned lens, or go on with a cancelled training of it; the id of its run. One that is there already is not trained again."""
    from probes.tuned_lens import train_tuned_lens
    from workbench.lab.batches import TextBatches

    if model.tokenizer is None:
        raise ValueError(
            f"{model.name!r} has no tokenizer, so there is no text to train a lens on. Use the logit lens."
        )
    context = min(CONTEXT, (model.n_ctx or CONTEXT + 1) - 1)
    job.progress(0.01, f"reading the corpus {corpus}")
    data = TextBatches(corpus, context, BATCH, validation_windows=HELD_OUT, tokenizer=model.tokenizer)
    asked = {"steps": steps, "corpus": corpus, "data": data.describe()}
    weights = model.weights_sha256()
    for known in (services.open_run(entry.id) for entry in services.store.list(kind=LENS_KIND, model=model.name)):
        if known.manifest["settings"] == json.loads(json.dumps(asked)) and known.model.get("weights_sha256") == weights:
            return known.id
    identity = hashlib.sha256(json.dumps([asked, weights], sort_keys=True).encode()).hexdigest()[:16]
    folder, cancel, part = services.store.root / ".lenses" / identity, threading.Event(), part_of(job, 0.02, 0.9)

    def report(fraction: float, message: str) -> None:
        if job.cancelling:
            cancel.set()  # the training writes a checkpoint and returns
        else:
            part(fraction, message)

    result = train_tuned_lens(model, data, folder, steps=steps, progress=report, cancel=cancel)
    job.check_cancelled()
    with services.store.create(LENS_KIND, f"Tuned lens, {corpus}, {steps} steps", model=model_record(model)) as run:
        run.add_array("A", result.lens.A.detach().numpy(), axes=("depth", "d_model_out", "d_model"))
        run.add_array("b", result.lens.b.detach().numpy(), axes=("depth", "d_model"))
        run.set(settings=asked, results=result.to_json(), seed=data.seed)
    shutil.rmtree(folder, ignore_errors=True)
    return run.id


def shown_lenses(run: Run) -> Sequence[str]:
    """Which of "logit" and "tuned" a result holds."""
    return [name for name in ("logit", "tuned") if run.has(f"{name}.entropy")]
