"""Linear probes: what can be read from activations, measured against what a probe could say without them.

words = word_activations(model, load_treebank("dev")[:200], sites)          activations of words, states included
train, test = Examples(words[site], words.facts("upos"), words.documents, words.types).split("document")
probe(train, test)                                                          accuracy, interval, baselines, selectivity
online_code(train)                                                          bits instead of accuracy
fit_structural_probe(sentences)                                             is the syntax tree a distance?
logme(train), h_score(train), neighbour_accuracy(train)                     without training
cka(x, y)                                                                   are two sites alike?
probe_layers(model, sentences)                                              all layers, with the embedding and a random twin
"""

from workbench.lazy import lazy_names

_HOME = {
    "WordActivations": "words",
    "word_activations": "words",
    "Examples": "examples",
    "control_labels": "examples",
    "ProbeResult": "classifier",
    "ProbeSettings": "classifier",
    "fit_probe": "classifier",
    "probe": "classifier",
    "OnlineCode": "description_length",
    "online_code": "description_length",
    "StructuralProbe": "structural",
    "TreeSentence": "structural",
    "fit_structural_probe": "structural",
    "linear_baseline": "structural",
    "score_distances": "structural",
    "tree_distances": "structural",
    "tree_sentences": "structural",
    "h_score": "transferability",
    "logme": "transferability",
    "neighbour_accuracy": "transferability",
    "cka": "similarity",
    "cka_matrix": "similarity",
    "LayerProbes": "layers",
    "probe_layers": "layers",
    "stream_sites": "layers",
}

__all__ = sorted(_HOME)

__getattr__ = lazy_names(__name__, _HOME)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
