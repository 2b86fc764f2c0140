"""Sparse features as rivals of concept synapses: what a dictionary trained on some site says about each sentence.

A sentence's number for a feature is its mean code over the tokens after the first, as for a neuron. The best feature is then chosen on the
discovery sentences and scored on the others (`probes.bdh.concepts_rivals`).
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from probes.bdh.concepts_recording import padded, tokenised
from probes.features.dictionaries import Dictionary
from probes.features.training import load_dictionary
from workbench.lab.activation_store import Site, site_activations
from workbench.lab.checkpoints import CheckpointError, read_json

Feature = Callable[[Sequence[Any]], NDArray[np.float32]]
CONTENT, TRAINED = "features.json", "dictionary"


def dictionary_features(model: Any, dictionary: Dictionary, site: Site | str, *, batch_size: int = 16) -> Feature:
    """A function of the list of sentences that gives every feature's mean code, [sentence, feature], for `find_concept_synapses`.

    Args:
        model: any hooked model; usually the one whose synapses are searched. site: what the dictionary was trained on.

    The function raises ValueError where the site is not as wide as what the dictionary reads.
    """
    where = Site(site) if isinstance(site, str) else site

    @torch.no_grad()
    def codes(sentences: Sequence[Any]) -> NDArray[np.float32]:
        tokens = tokenised(model, sentences)
        out = []
        for first in range(0, len(tokens), batch_size):
            batch = tokens[first : first + batch_size]
            together = padded(batch)
            _, cache = model.run_with_cache(together, names=[where.point], positions=range(1, together.shape[1]))
            rows = site_activations(cache, where)
            if rows.shape[-1] != dictionary.d_in:
                raise ValueError(
                    f"{where.name} has {rows.shape[-1]} numbers per token in {getattr(model, 'name', 'this model')}; "
                    f"the dictionary reads {dictionary.d_in}. Expected the site that it was trained on."
                )
            out += [
                dictionary.encode(row[: len(sentence) - 1]).mean(0) for row, sentence in zip(rows, batch, strict=True)
            ]
        return torch.stack(out).float().cpu().numpy()

    return codes


def stored_features(model: Any, folder: str | Path) -> dict[str, Feature]:
    """The dictionary that `find_features` or `workbench features` left in a folder, as `features` of `find_concept_synapses`.

    Raises CheckpointError for a folder of something else, ValueError for a dictionary of another model.
    """
    folder = Path(folder)
    if not (folder / CONTENT).is_file():
        raise CheckpointError(f"{folder} has no {CONTENT}: expected a folder that `workbench features` finished.")
    about = read_json(folder / CONTENT)
    name = getattr(model, "name", type(model).__name__)
    if about["model"] != name:
        raise ValueError(
            f"The dictionary in {folder} was trained on {about['model']!r}, and these sentences are read by {name!r}."
        )
    point, _, head = str(about["site"]).partition(":")
    dictionary = load_dictionary(folder / TRAINED)
    site = Site(point, int(head) if head else None)
    return {f"dictionary feature, {site.name}": dictionary_features(model, dictionary, site)}
