"""From a model to features in one call: harvest, train, evaluate against a control, and read the strongest features.

    found = find_features(model, "blocks.2.hook_resid_post", text, TopK(n_features=1024, k=16), folder)
    found.evaluation, found.recovery, found.control

The control is the same dictionary trained on the same site of the same architecture at random weights. What a dictionary finds there comes
from the text and the architecture, not from training; numbers that do not beat it say nothing about what the model has learned.
"""

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from torch import Tensor

from probes.features.contexts import FeatureContexts, feature_contexts
from probes.features.dictionaries import CONFIGS, Dictionary, DictionaryConfig
from probes.features.evaluation import Evaluation, Recovery, evaluate, recovered
from probes.features.tokens import token_effects
from probes.features.training import FeatureTraining, train_dictionary
from probes.progress import MeasurementCancelled, Progress, Report
from workbench.lab.activation_store import ActivationStore, Site, harvest, sequences_of
from workbench.lab.checkpoints import read_json, read_tensors, write_json, write_tensors
from workbench.lab.corpora import load_corpus

REQUEST, TOKENS = "request.json", "tokens.safetensors"


@dataclass
class FoundFeatures:
    """What `find_features` leaves: in memory, and in its folder (activations, dictionary, `features.json`)."""

    model: str
    site: Site
    dictionary: Dictionary
    store: ActivationStore
    tokens: Tensor  # [sequence, pos], what the store was harvested from
    evaluation: Evaluation  # on held-out rows
    recovery: Recovery | None  # on held-out sequences; None for states, which are read at some positions only
    control: Evaluation | None  # the same on the model at random weights
    features: list[FeatureContexts] = field(default_factory=list)
    directions_to_tokens: dict[int, list[tuple[int, float]]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Measures and contexts as plain data."""
        return {
            "model": self.model,
            "site": self.site.name,
            "evaluation": _without_density(self.evaluation),
            "recovery": None if self.recovery is None else self.recovery.to_json(),
            "control": None if self.control is None else _without_density(self.control),
            "features": [
                {
                    "feature": f.feature,
                    "density": f.density,
                    "largest": f.largest,
                    "top": [c.__dict__ for c in f.top],
                    "bands": [[c.__dict__ for c in band] for band in f.bands],
                    "promotes": self.directions_to_tokens.get(f.feature, []),
                }
                for f in self.features
            ],
        }


def find_features(
    model: Any,
    site: Site | str,
    text: bytes | Tensor,
    config: DictionaryConfig,
    folder: str | Path,
    *,
    training: FeatureTraining | None = None,
    random_twin: Any = None,
    context: int = 128,
    sequences: int | None = 400,
    n_features: int = 20,
    progress: Report | None = None,
    cancel: Event | None = None,
) -> FoundFeatures:
    """Harvest a site, train a dictionary, measure it on held-out text, and collect contexts of its most used features.

    Args:
        text: bytes or token ids [pos]; the last tenth of its sequences is held out. context, sequences: how it is cut.
        random_twin: the same architecture at random weights, for the control (None: no control).
        n_features: how many features get contexts: spread evenly over those that fire, by how often they do.
        folder: everything goes there; a call that was stopped continues, here or by `continue_study`.

    Raises:
        ValueError: too little text. MeasurementCancelled: `cancel` was set; what is done so far stays in the folder.
    """
    site = Site(site) if isinstance(site, str) else site
    folder = Path(folder)
    tokens = sequences_of(text, context, sequences)
    held = max(1, len(tokens) // 10)
    if len(tokens) < 10:
        raise ValueError(f"The text gives {len(tokens)} sequences of {context} tokens; expected at least 10.")
    step = Progress(progress, cancel)
    _keep_request(folder, model, site, tokens, config, training, n_features, random_twin is not None)
    try:
        return _found(
            model, site, (tokens[:-held], tokens[-held:]), config, training, random_twin, n_features, folder, step
        )
    except MeasurementCancelled as stop:
        told = f"{stop} What is done so far stays in the folder and is continued by the same call."
        raise MeasurementCancelled(told) from None


def corpus_tokens(model: Any, corpus: str) -> Tensor:
    """The training text of a corpus as the model's token ids, [pos]."""
    return model.to_tokens(load_corpus(corpus, "train").text)[0].cpu()


def continue_study(
    model: Any,
    folder: str | Path,
    *,
    random_twin: Any = None,
    progress: Report | None = None,
    cancel: Event | None = None,
) -> FoundFeatures:
    """What `find_features` found in a folder; a call that was stopped there is finished first.

    Args:
        model: the one that the folder is of. random_twin: as it was; `requested(folder)["control"]` says whether there was one.

    Raises:
        CheckpointError: no such folder. ValueError: another model. MeasurementCancelled: as `find_features`.
    """
    asked = requested(folder)
    if asked["model"] != getattr(model, "name", type(model).__name__):
        raise ValueError(
            f"{Path(folder).name!r} is of the model {asked['model']!r}, not of {getattr(model, 'name', model)!r}."
        )
    tensors, _ = read_tensors(Path(folder) / TOKENS)
    tokens = tensors["tokens"].long()
    config = dict(asked["config"])
    kind = config.pop("kind")
    if "prefixes" in config:
        config["prefixes"] = tuple(config["prefixes"])
    training = None if asked["training"] is None else FeatureTraining(**asked["training"])
    return find_features(
        model, Site(**asked["site"]), tokens.flatten(), CONFIGS[kind](**config), folder, training=training, random_twin=random_twin,
        context=tokens.shape[1], sequences=None, n_features=asked["n_features"], progress=progress, cancel=cancel,
    )  # fmt: skip


def requested(folder: str | Path) -> dict[str, Any]:
    """What was asked of `find_features` in a folder: `{model, site, config, training, n_features, control}`.

    Raises:
        CheckpointError: it is no such folder.
    """
    return read_json(Path(folder) / REQUEST)


def _keep_request(
    folder: Path, model: Any, site: Site, tokens: Tensor, config: DictionaryConfig, training: FeatureTraining | None, n_features: int,
    control: bool,
) -> None:  # fmt: skip
    about: dict[str, Any] = {
        "model": getattr(model, "name", type(model).__name__),
        "site": asdict(site),
        "config": {"kind": config.kind, **asdict(config)},
        "training": None if training is None else asdict(training),
        "n_features": n_features,
        "control": control,
    }
    if (folder / REQUEST).exists():
        kept = read_json(folder / REQUEST)
        if any(kept[key] != json.loads(json.dumps(about[key])) for key in ("model", "site", "config", "training")):
            return  # another study's folder: what follows refuses it by name, and its request stays
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / TOKENS).exists():
        write_tensors(folder / TOKENS, {"tokens": tokens.int()})
    write_json(folder / REQUEST, about)


def _found(
    model: Any, site: Site, parts: tuple[Tensor, Tensor], config: DictionaryConfig, training: FeatureTraining | None,
    random_twin: Any, n_features: int, folder: Path, step: Progress,
) -> FoundFeatures:  # fmt: skip
    learn, check = parts
    store, dictionary, measured = _fit(model, site, learn, check, config, training, folder, step.part(0.0, 0.6))
    control = None
    if random_twin is not None:
        twin = (random_twin, site, learn, check, config, training, folder / "control", step.part(0.6, 0.85))
        _, _, control = _fit(*twin)
    recovery = None
    if site.every == 1:
        recovery = recovered(model, check, site.point, dictionary, head=site.head)
    step(0.9, "contexts")
    firing = measured.density.argsort(descending=True)[: int((measured.density > 0).sum())]
    picked = firing[torch.linspace(0, max(len(firing) - 1, 0), min(n_features, len(firing))).round().long()].tolist()
    contexts = feature_contexts(store, site.name, dictionary, learn, picked, cancel=step.cancel) if picked else []
    found = FoundFeatures(
        getattr(model, "name", type(model).__name__), site, dictionary, store, learn, measured, recovery, control, contexts,
        _promoted(model, site, dictionary, picked),
    )  # fmt: skip
    write_json(folder / "features.json", _finite(found.to_json()))
    step(1.0, "done")
    return found


def _fit(
    model: Any, site: Site, learn: Tensor, check: Tensor, config: DictionaryConfig, training: FeatureTraining | None,
    folder: Path, step: Progress,
) -> tuple[ActivationStore, Dictionary, Evaluation]:  # fmt: skip
    # harvest and training stop at a cancel themselves, after keeping what they have: their reports must not raise before that
    told = replace(step, cancel=None)
    store = harvest(model, learn, [site], folder / "activations", progress=told.part(0.0, 0.3), cancel=step.cancel)
    held = harvest(model, check, [site], folder / "held-out", cancel=step.cancel)
    step(0.35, "harvesting activations")
    training = training or FeatureTraining()
    training = replace(training, batch_size=min(training.batch_size, len(store)))  # a short text is one batch
    trained = train_dictionary(
        store, site.name, config, training, out=folder / "dictionary", progress=told.part(0.35, 1.0), cancel=step.cancel
    )
    step(1.0, "training the dictionary")
    return store, trained.dictionary, evaluate(trained.dictionary, held.rows(site.name))


def _promoted(
    model: Any, site: Site, dictionary: Dictionary, features: list[int]
) -> dict[int, list[tuple[int, float]]]:
    """Tokens whose logits a feature's direction raises most; {} for sites that the unembedding cannot read."""
    effects = token_effects(model, site, dictionary, features)
    if effects is None:
        return {}
    ids, values = effects.promoted
    return {f: list(zip(ids[i].tolist(), values[i].tolist(), strict=True)) for i, f in enumerate(features)}


def _without_density(evaluation: Evaluation) -> dict[str, Any]:
    return {name: value for name, value in evaluation.to_json().items() if name != "density"}


def _finite(content: Any) -> Any:
    """nan (a position without a row) as null: JSON has no nan."""
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and content != content else content
