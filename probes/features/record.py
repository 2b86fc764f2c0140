"""Everything that the page of a dictionary shows, as one run of kind `"features"`.

    run = store_features(RunStore(), model, find_features(...), folder="my-dictionary")

| array | axes | meaning |
|---|---|---|
| `density`, `largest` | feature | share of the learned rows on which it fires; its largest value |
| `held.density`, `control.density` | feature | on held-out rows; of the dictionary of random weights |
| `histogram` | feature, bin | rows by value, in equal parts of 0 … largest |
| `peak.token` int32 | feature | the token on which it is largest, −1 where it never fires |
| `promoted.ids`, `.values`, `suppressed.…` | feature, rank | direction times unembedding; absent for sites that it cannot read |
| `shown` int32 | shown | features with contexts, most frequent first |
| `contexts.tokens`, `.values`, `.neuron` | shown, slot, pos | tokens (−1: none); values of the feature, and of its best neuron |
| `contexts.focus`, `.band` int32 | shown, slot | index of the occurrence (−1: none); −1 for the strongest, else the part of the range |
| `partners.ids`, `.phi`, `.cosine` | shown, rank | features that fire together with it most above chance; cosine of the directions |
| `curve` | point, column | of the training: step, loss, l0, dead |
| `neurons.density` | neuron | BDH: of the native neurons of the layer, head after head |
| `neurons.match` int32, `.r` | shown | the neuron that follows the feature best, and their correlation |
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from probes.features.contexts import Context, FeatureContexts, feature_contexts
from probes.features.dictionaries import Dictionary
from probes.features.study import FoundFeatures
from probes.features.tokens import token_effects
from probes.features.training import training_record
from probes.progress import Progress, Report
from workbench.lab.activation_store import ActivationStore
from workbench.lab.checkpoints import CheckpointError
from workbench.lab.runs import Run, RunStore

KIND, BINS, PARTNERS = "features", 24, 48
TOP, BANDS, PER_BAND, BEFORE, AFTER = 8, 4, 3, 20, 10
SLOTS, WIDTH = TOP + BANDS * PER_BAND, BEFORE + 1 + AFTER
LARGEST_BLOCK = 2**23  # numbers of native neurons that are looked at

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Codes:
    """All codes of some rows, sparse: `matrix` is a scipy CSC matrix [row, unit]."""

    matrix: Any

    @property
    def density(self) -> Array:
        """Share of rows on which each unit fires."""
        return (np.diff(self.matrix.indptr) / max(1, self.matrix.shape[0])).astype(np.float32)

    def values(self, unit: int) -> NDArray[np.float32]:
        """The unit's values where it fires."""
        return self.matrix.data[self.matrix.indptr[unit] : self.matrix.indptr[unit + 1]]

    def largest(self) -> Array:
        """Per unit, 0 where it never fires."""
        return np.array([self.values(unit).max(initial=0.0) for unit in range(self.matrix.shape[1])], np.float32)

    def histograms(self, bins: int = BINS) -> NDArray[np.int32]:
        """Rows by value in equal parts of 0 … largest, [unit, bin]."""
        found = np.zeros((self.matrix.shape[1], bins), np.int32)
        for unit in range(len(found)):
            values = self.values(unit)
            if len(values):
                found[unit] = np.histogram(values, bins, (0.0, values.max()))[0]
        return found

    def peaks(self) -> NDArray[np.int64]:
        """The row on which each unit is largest, −1 where it never fires."""
        return np.array(
            [
                int(self.matrix.indices[self.matrix.indptr[unit] + values.argmax()])
                if len(values := self.values(unit))
                else -1
                for unit in range(self.matrix.shape[1])
            ]
        )

    def phi(self, units: Sequence[int]) -> Array:
        """Correlation of firing (φ coefficient) of some units with all, [some, unit]; 0 for a unit that fires never or always."""
        fires = self.matrix.copy()
        fires.data = np.ones_like(fires.data, dtype=np.float64)
        both = np.asarray((fires[:, list(units)].T @ fires).todense())
        rows, counts = self.matrix.shape[0], np.diff(self.matrix.indptr).astype(np.float64)
        own = counts[list(units)]
        spread = np.sqrt((own * (rows - own))[:, None] * (counts * (rows - counts))[None])
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.nan_to_num((both * rows - own[:, None] * counts[None]) / spread).astype(np.float32)


@torch.no_grad()
def dictionary_codes(
    dictionary: Dictionary, store: ActivationStore, site: str, *, progress: Report | None = None, batch_size: int = 8192
) -> Codes:
    """Codes of every row of a site."""
    from scipy.sparse import csr_matrix, vstack

    tell, parts = Progress(progress), []
    for start in range(0, len(store), batch_size):
        tell(start / len(store), f"codes of {start:,} of {len(store):,} rows")
        parts.append(
            csr_matrix(dictionary.encode(store.rows(site, start, min(start + batch_size, len(store)))).numpy())
        )
    return Codes(vstack(parts).tocsc())


def store_features(
    runs: RunStore,
    model: Any,
    found: FoundFeatures,
    *,
    folder: str = "",
    title: str | None = None,
    settings: dict[str, Any] | None = None,
    most: int = 384,
    progress: Report | None = None,
) -> Run:
    """Write the record of a study; see the module's docstring.

    Args:
        folder: name of the dictionary's folder in the runs root, "" if it lies elsewhere. most: features that get contexts, spread over
            those that fire by how often they do. settings: what was asked for.
    """
    tell = Progress(progress)
    dictionary, store, site = found.dictionary, found.store, found.site
    codes = dictionary_codes(dictionary, store, site.name, progress=tell.part(0.0, 0.2))
    density, peaks = codes.density, codes.peaks()
    shown = _spread(density, most)
    contexts: list[FeatureContexts] = []
    for start in range(0, len(shown), 64):
        tell(0.2 + 0.5 * start / max(1, len(shown)), f"contexts of {start} of {len(shown)} features")
        contexts += feature_contexts(
            store, site.name, dictionary, found.tokens, shown[start : start + 64], top=TOP, bands=BANDS, per_band=PER_BAND, before=BEFORE,
            after=AFTER,
        )  # fmt: skip
    tell(0.7, "tokens and partners")
    effects = token_effects(model, site, dictionary)
    facts = store.facts()
    tokens_at_peak = np.where(peaks >= 0, facts["token"].numpy()[np.maximum(peaks, 0)], -1)
    cards: dict[str, Any] = {
        key: value for key, value in found.to_json().items() if key in ("evaluation", "recovery", "control")
    }
    results: dict[str, Any] = {
        **cards, "kind": dictionary.config.kind, "n_features": dictionary.n_features, "d_in": dictionary.d_in, "folder": folder,
        "site": {"name": site.name, "point": site.point, "head": site.head, "every": site.every},
        "rows": len(store), "sequences": len(found.tokens), "context": int(found.tokens.shape[1]), "neurons": None, "no_neurons": "",
    }  # fmt: skip
    about = {"name": found.model, "architecture": getattr(model, "architecture", "unknown"), **model.about()}
    name = title or f"Features of {found.model}, {site.name}"
    with runs.create(KIND, name, model=about) as run:
        run.add_array("density", density, axes=("feature",))
        run.add_array("largest", codes.largest(), axes=("feature",))
        run.add_array("histogram", codes.histograms(), axes=("feature", "bin"))
        run.add_array("peak.token", tokens_at_peak.astype(np.int32), axes=("feature",))
        run.add_array("held.density", found.evaluation.density.numpy().astype(np.float32), axes=("feature",))
        if found.control is not None:
            run.add_array("control.density", found.control.density.numpy().astype(np.float32), axes=("feature",))
        used = set(tokens_at_peak.tolist())
        if effects is not None:
            for side, (ids, values) in (("promoted", effects.promoted), ("suppressed", effects.suppressed)):
                run.add_array(f"{side}.ids", ids.numpy().astype(np.int32), axes=("feature", "rank"))
                run.add_array(f"{side}.values", values.float().numpy(), axes=("feature", "rank"))
                used |= set(ids.flatten().tolist())
        run.add_array("shown", np.array(shown, np.int32), axes=("shown",))
        arrays = context_arrays(contexts)
        used |= set(arrays["tokens"].flatten().tolist())
        tell(0.8, "native neurons")
        results["neurons"], results["no_neurons"] = _store_neurons(run, model, found, codes, contexts, arrays)
        for key, values in arrays.items():
            run.add_array(f"contexts.{key}", values, axes=("shown", "slot", "pos")[: values.ndim])
        for key, values in _partners(codes, dictionary, shown).items():
            run.add_array(f"partners.{key}", values, axes=("shown", "rank"))
        curve = _curve(store)
        if curve is not None:
            run.add_array("curve", curve, axes=("point", "column"))
        results["strings"] = _strings(model, used - {-1})
        run.set(results=results, settings=settings or {})
    tell(1.0, "done")
    return runs.open(run.id)


def context_arrays(contexts: Sequence[FeatureContexts]) -> dict[str, Any]:
    """Contexts of several features as arrays: `tokens`, `values` [shown, slot, pos], `focus`, `band` [shown, slot]."""
    count = len(contexts)
    tokens = np.full((count, SLOTS, WIDTH), -1, np.int32)
    values = np.full((count, SLOTS, WIDTH), np.nan, np.float32)
    focus, band = np.full((count, SLOTS), -1, np.int32), np.full((count, SLOTS), -1, np.int32)
    for row, each in enumerate(contexts):
        for slot, (number, context) in slotted(each):
            size = len(context.tokens)
            tokens[row, slot, :size], values[row, slot, :size] = context.tokens, context.values
            focus[row, slot], band[row, slot] = context.focus, number
    return {"tokens": tokens, "values": values, "focus": focus, "band": band}


def slotted(each: FeatureContexts) -> list[tuple[int, tuple[int, Context]]]:
    """(slot, (band, context)): the strongest occurrences (band −1) first, then samples of every part of the range."""
    found = [(slot, (-1, context)) for slot, context in enumerate(each.top[:TOP])]
    for number, band in enumerate(each.bands):
        found += [(TOP + number * PER_BAND + at, (number, context)) for at, context in enumerate(band[:PER_BAND])]
    return found


def _spread(density: Array, most: int) -> list[int]:
    """At most `most` units that fire, spread evenly over how often they do; most frequent first."""
    order = [int(unit) for unit in np.argsort(-density, kind="stable") if density[unit] > 0]
    if len(order) <= most:
        return order
    return [order[at] for at in np.unique(np.linspace(0, len(order) - 1, most).round().astype(int))]


def _partners(codes: Codes, dictionary: Dictionary, shown: Sequence[int]) -> dict[str, Any]:
    count = min(PARTNERS, dictionary.n_features - 1)
    ids, phi = np.zeros((len(shown), count), np.int32), np.zeros((len(shown), count), np.float32)
    cosine = np.zeros_like(phi)
    unit = torch.nn.functional.normalize(dictionary.W_dec.detach(), dim=-1).numpy()
    for start in range(0, len(shown), 128):
        some = list(shown[start : start + 128])
        together = codes.phi(some)
        for row, feature in enumerate(some):
            together[row, feature] = -np.inf
            best = np.argsort(-together[row], kind="stable")[:count]
            ids[start + row], phi[start + row] = best, together[row, best]
            cosine[start + row] = unit[best] @ unit[feature]
    return {"ids": ids, "phi": phi, "cosine": cosine}


def _curve(store: ActivationStore) -> NDArray[np.float64] | None:
    try:
        points = training_record(store.path.parent / "dictionary")["curve"]
    except CheckpointError:
        return None
    return np.array([[point[key] for key in ("step", "loss", "l0", "dead")] for point in points]).reshape(-1, 4)


def _strings(model: Any, ids: set[int]) -> dict[str, str]:
    """Texts of some tokens, by id."""
    ordered = sorted(ids)
    if getattr(model, "tokenizer", None) is None:
        return {str(token): f"<{token}>" for token in ordered}
    return dict(zip(map(str, ordered), model.tokenizer.token_strings(ordered), strict=True))


# ---- native neurons --------------------------------------------------------------------------------------------------


def _store_neurons(
    run: Any,
    model: Any,
    found: FoundFeatures,
    codes: Codes,
    contexts: Sequence[FeatureContexts],
    arrays: dict[str, Any],
) -> tuple[dict[str, Any] | None, str]:
    """The layer's own neurons on the same text, (measures, why there are none); adds `neuron` to the arrays of the contexts."""
    layer = re.match(r"blocks\.(\d+)\.", found.site.point)
    point = f"blocks.{layer.group(1)}.hook_x" if layer else ""
    if getattr(model, "architecture", "") != "bdh":
        return None, "Only a BDH has sparse neurons of its own to compare with."
    if point not in model.hook_dict or found.site.every != 1:
        return None, "Native neurons are compared at sites of a layer that have a row for every token."
    active, sequences, heads = native_neurons(model, found.tokens, point)
    facts, length = found.store.facts(), found.tokens.shape[1]
    rows = np.flatnonzero((facts["sequence"] < sequences).numpy())
    neurons = active[(facts["sequence"][rows] * length + facts["position"][rows]).numpy()]  # [row, neuron]
    shown = [each.feature for each in contexts]
    match, strength = best_matches(np.asarray(codes.matrix[rows][:, shown].todense()), neurons)
    arrays["neuron"] = np.full_like(arrays["values"], np.nan)
    for row, each in enumerate(contexts):
        for slot, (_, context) in slotted(each):
            if context.sequence < sequences:
                first = context.sequence * length + context.position - context.focus
                arrays["neuron"][row, slot, : len(context.tokens)] = active[
                    first : first + len(context.tokens), match[row]
                ]
    fires = neurons > 0
    run.add_array("neurons.density", fires.mean(0).astype(np.float32), axes=("neuron",))
    run.add_array("neurons.match", match.astype(np.int32), axes=("shown",))
    run.add_array("neurons.r", strength.astype(np.float32), axes=("shown",))
    return {"point": point, "count": active.shape[1], "per_head": active.shape[1] // heads, "l0": float(fires.sum(1).mean()),
            "alive": float(fires.any(0).mean()), "rows": len(rows), "sequences": sequences}, ""  # fmt: skip


@torch.no_grad()
def native_neurons(model: Any, tokens: torch.Tensor, point: str) -> tuple[NDArray[np.float32], int, int]:
    """Activity of a BDH's neurons over the first sequences, as many as fit: ([sequence · pos, head · neuron], sequences, heads)."""
    parts: list[NDArray[np.float32]] = []
    heads = 1
    for sequence in tokens:
        _, cache = model.run_with_cache(sequence[None], names=[point])
        x = cache[point][0]  # [head, pos, neuron]
        heads = x.shape[0]
        parts.append(x.permute(1, 0, 2).flatten(1).float().cpu().numpy())
        if (len(parts) + 1) * parts[0].size > LARGEST_BLOCK:
            break
    return np.concatenate(parts), len(parts), heads


def best_matches(features: NDArray[np.float32], neurons: NDArray[np.float32]) -> tuple[NDArray[np.int64], Array]:
    """The neuron whose activity correlates most with each feature's, and Pearson's r: [feature] each; 0 where one is constant."""
    scaled = []
    for values in (features, neurons):
        centred = values - values.mean(0)
        scaled.append(centred / np.maximum(np.linalg.norm(centred, axis=0), 1e-12))
    r = scaled[0].T @ scaled[1]
    match = r.argmax(1)
    return match, r[np.arange(len(match)), match]
