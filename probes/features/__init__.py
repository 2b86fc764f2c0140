"""Sparse features: dictionaries that rewrite an activation as a few named directions, trained, measured, read and used to intervene.

    store = harvest(model, tokens, ["blocks.2.hook_resid_post"], folder)
    dictionary, record = train_dictionary(store, "blocks.2.hook_resid_post", TopK(n_features=1024, k=16), out=folder / "sae")
    evaluate(dictionary, store.sample("blocks.2.hook_resid_post", 10000))

A dictionary maps an activation x [.., d_in] to codes f ≥ 0 [.., feature] and back: x̂ = f D + b. Any site does: residual stream, MLP, a
head's output, a recurrent state (each row one state, flattened).
"""

from workbench.lazy import lazy_names

_HOME = {
    "BatchTopK": "dictionaries",
    "Dictionary": "dictionaries",
    "Gated": "dictionaries",
    "JumpReLU": "dictionaries",
    "Standard": "dictionaries",
    "TopK": "dictionaries",
    "build_dictionary": "dictionaries",
    "FeatureTraining": "training",
    "TrainedDictionary": "training",
    "load_dictionary": "training",
    "save_dictionary": "training",
    "train_dictionary": "training",
    "Evaluation": "evaluation",
    "Recovery": "evaluation",
    "evaluate": "evaluation",
    "recovered": "evaluation",
    "PlantedFeatures": "planted",
    "match_dictionaries": "planted",
    "FeatureContexts": "contexts",
    "feature_contexts": "contexts",
    "ablate_features": "interventions",
    "clamp_features": "interventions",
    "reconstruct": "interventions",
    "steer_feature": "interventions",
}

__all__ = sorted(_HOME)

__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
