"""Panels of the Features page: how often and how strongly features fire, where, what they say, what fires with them, native neurons."""

from __future__ import annotations

from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.common import number, visible_text
from app.figures.features import context_values, densities, feature_points, token_effects, value_histogram
from app.measure.features import KIND
from app.panels.base import NothingToShow, Table
from app.panels.results import ResultPanel, measured
from app.services import Scene
from app.theme import Theme
from workbench.lab.runs import Run


def chosen_feature(scene: Scene) -> int | None:
    """The feature that the view names, if the dictionary has it; else one that fires about as often as most. None without any."""
    found = measured(scene, KIND)
    if found is None:
        return None
    if scene.view.feature is not None and scene.view.feature < len(found.array("density")):
        return scene.view.feature
    shown = found.array("shown")
    return int(shown[len(shown) // 2]) if len(shown) else None


def word(found: Run, token: int) -> str:
    """The text of a token that the record mentions."""
    return str((found.manifest["results"].get("strings") or {}).get(str(int(token)), f"<{int(token)}>"))


def promoted_words(found: Run, feature: int, side: str = "promoted", count: int = 5) -> list[str]:
    """Tokens that a feature raises or lowers most; [] for sites that the unembedding cannot read."""
    if not found.has(f"{side}.ids"):
        return []
    return [visible_text(word(found, token)) for token in found.array(f"{side}.ids")[feature][:count].tolist()]


def neuron_name(found: Run, neuron: int) -> str:
    """`head·neuron` of a native neuron."""
    per_head = found.manifest["results"]["neurons"]["per_head"]
    return f"{neuron // per_head}·{neuron % per_head}"


class FeaturePanel(ResultPanel):
    """A panel over a dictionary's record."""

    kind = KIND
    depends: tuple[str, ...] = ("run", "result", "feature")
    start = "Train a dictionary with the form on this page, or open one of the runs root."

    def feature(self, scene: Scene) -> int:
        """The chosen feature. NothingToShow when none fires."""
        self.check(scene)
        found = chosen_feature(scene)
        if found is None:
            raise NothingToShow(
                "No feature fires", "Every feature of this dictionary is dead: train longer, or with a larger k."
            )
        return found

    def place(self, scene: Scene) -> int:
        """The row of the chosen feature among those with contexts."""
        feature, shown = self.feature(scene), self.array(scene, "shown")
        where = np.flatnonzero(shown == feature)
        if not len(where):
            dead = self.array(scene, "density")[feature] == 0
            reason = (
                "It never fires on the text that was read."
                if dead
                else f"Contexts are kept of {len(shown)} features; this is not one."
            )
            raise NothingToShow(f"Nothing is kept of feature {feature}", reason)
        return int(where[0])

    def study(self, scene: Scene) -> str:
        """Python that opens the dictionary's folder and reads its codes again."""
        folder = self.results(scene).get("folder")
        model = self.result(scene).model.get("name")
        named = f'RunStore().root / "{folder}"' if folder else '"the folder that was given to workbench features"'
        return f"""
from probes.features.record import dictionary_codes
from probes.features.study import continue_study, requested

model, folder = models.load("{model}"), {named}
twin = models.build(model.architecture, config=model.config) if requested(folder)["control"] else None
found = continue_study(model, folder, random_twin=twin)
codes = dictionary_codes(found.dictionary, found.store, found.site.name)
""".strip()


class FeatureDensity(FeaturePanel):
    """How often features fire."""

    id = "feature-density"
    title = "How often features fire"
    words = "Share of the dictionary by density, beside the one trained on random weights. The dotted line is the chosen feature."
    height = 240

    def series(self, scene: Scene) -> dict[str, np.ndarray]:
        """Densities by what they are of, on held-out rows; native neurons on the first of the learned text."""
        names = {
            "held.density": "features",
            "control.density": "at random weights",
            "neurons.density": "native neurons",
        }
        run = self.result(scene)
        return {words: run.array(name) for name, words in names.items() if run.has(name)}

    def values(self, scene: Scene) -> np.ndarray:
        return self.array(scene, "held.density")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        series = self.series(scene)
        if not any((values > 0).any() for values in series.values()):
            raise NothingToShow("No feature fires", "On the held-out text every feature of this dictionary is silent.")
        return densities(series, float(self.values(scene)[self.feature(scene)]), theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        learned, held = self.array(scene, "density"), self.values(scene)
        return ["feature", "on learned rows", "on held-out rows"], (
            [str(i), float(learned[i]), float(held[i])] for i in range(len(held))
        )

    def facts(self, scene: Scene) -> list[str]:
        return [
            f"{name}: {int((values > 0).sum()):,} of {len(values):,} fire"
            + (
                f", half of them on less than {number(float(np.median(values[values > 0])))}"
                if (values > 0).any()
                else ""
            )
            for name, values in self.series(scene).items()
        ]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.study(scene)}\nvalues = found.evaluation.density.numpy()"


class FeatureContextsPanel(FeaturePanel):
    """Where the chosen feature fires."""

    id = "feature-contexts"
    title = "Where it fires"
    words = ("The strongest contexts, one per sequence, then samples from four equal parts of its range: the strongest alone flatter. The "
             "marked token is where the value was taken.")  # fmt: skip
    height = 170

    def contexts(self, scene: Scene) -> list[dict[str, Any]]:
        """Of the chosen feature: `{slot, band, value, focus, tokens, values, neuron}` each, strongest first."""
        row = self.place(scene)
        tokens, values, focus, band = (
            self.array(scene, f"contexts.{key}")[row] for key in ("tokens", "values", "focus", "band")
        )
        neuron = self.array(scene, "contexts.neuron")[row] if self.result(scene).has("contexts.neuron") else None
        found = []
        for slot in np.flatnonzero(focus >= 0).tolist():
            size = int((tokens[slot] >= 0).sum())
            found.append({
                "slot": slot, "band": int(band[slot]), "value": float(values[slot, focus[slot]]), "focus": int(focus[slot]),
                "tokens": [word(self.result(scene), token) for token in tokens[slot, :size].tolist()], "values": values[slot, :size],
                "neuron": None if neuron is None else neuron[slot, :size],
            })  # fmt: skip
        return found

    def values(self, scene: Scene) -> np.ndarray:
        return np.array([each["value"] for each in self.contexts(scene)])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        bands = np.array([each["band"] for each in self.contexts(scene)])
        largest = float(self.array(scene, "largest")[self.feature(scene)])
        return context_values(self.values(scene), bands, largest, theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        return ["part of the range", "value", "before", "token", "after"], (
            ["strongest" if each["band"] < 0 else f"{each['band'] + 1} of 4", each["value"], "".join(each["tokens"][: each["focus"]]),
             each["tokens"][each["focus"]], "".join(each["tokens"][each["focus"] + 1 :])]
            for each in self.contexts(scene)
        )  # fmt: skip

    def facts(self, scene: Scene) -> list[str]:
        feature = self.feature(scene)
        density, largest = self.array(scene, "density")[feature], self.array(scene, "largest")[feature]
        return [f"feature {feature}", f"fires on {density:.2%} of the rows", f"largest value {number(float(largest))}"]

    def snippet_body(self, scene: Scene) -> str:
        return f"""
{self.study(scene)}
from probes.features.contexts import feature_contexts
from probes.features.record import AFTER, BANDS, BEFORE, PER_BAND, TOP, slotted

# samples are drawn in batches of 64 features, as when the record was made
shown = run.array("shown").tolist()
batch = shown[{self.place(scene) // 64 * 64} : {self.place(scene) // 64 * 64 + 64}]
sizes = {{"top": TOP, "bands": BANDS, "per_band": PER_BAND, "before": BEFORE, "after": AFTER}}
contexts = feature_contexts(found.store, found.site.name, found.dictionary, found.tokens, batch, **sizes)
values = np.array([context.value for _, (_, context) in slotted(contexts[batch.index({self.feature(scene)})])])
"""


class FeatureValues(FeaturePanel):
    """How strongly the chosen feature fires."""

    id = "feature-values"
    title = "How strongly it fires"
    words = "Rows by the feature's value, where it fires, on a logarithmic scale."
    height = 210

    def values(self, scene: Scene) -> np.ndarray:
        return self.array(scene, "histogram")[self.feature(scene)]

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        if not self.values(scene).any():
            raise NothingToShow(f"Feature {self.feature(scene)} never fires", "It is dead on the text that was read.")
        return value_histogram(
            self.values(scene), float(self.array(scene, "largest")[self.feature(scene)]), theme, panel=self.id
        )

    def table(self, scene: Scene) -> Table:
        counts = self.values(scene)
        width = float(self.array(scene, "largest")[self.feature(scene)]) / len(counts)
        return ["from", "to", "rows"], (
            [at * width, (at + 1) * width, float(count)] for at, count in enumerate(counts.tolist())
        )

    def facts(self, scene: Scene) -> list[str]:
        return [
            f"feature {self.feature(scene)}",
            f"{int(self.values(scene).sum()):,} of {self.results(scene)['rows']:,} rows",
        ]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.study(scene)}\nvalues = codes.histograms()[{self.feature(scene)}]"


class FeatureTokens(FeaturePanel):
    """Tokens that the chosen feature promotes and suppresses."""

    id = "feature-tokens"
    title = "What it says"
    words = "The feature's direction times the unembedding: tokens whose logit it raises or lowers most, through no later layer."
    height = 300

    def pairs(self, scene: Scene) -> list[tuple[str, float]]:
        """(token, change of its logit), raised ones first, lowered ones last."""
        feature, run = self.feature(scene), self.result(scene)
        if not run.has("promoted.ids"):
            reason = "The unembedding reads the residual stream only; this site has another width, or is of one head."
            raise NothingToShow("No direct effect on tokens", reason)
        found = []
        for side in ("promoted", "suppressed"):
            pairs = zip(
                run.array(f"{side}.ids")[feature].tolist(), run.array(f"{side}.values")[feature].tolist(), strict=True
            )
            found.append([(word(run, token), value) for token, value in pairs])
        return [*found[0], *reversed(found[1])]

    def values(self, scene: Scene) -> np.ndarray:
        return np.array([value for _, value in self.pairs(scene)])

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        return token_effects([each for each, _ in self.pairs(scene)], self.values(scene), theme, panel=self.id)

    def table(self, scene: Scene) -> Table:
        return ["token", "logit per unit"], ([text, value] for text, value in self.pairs(scene))

    def facts(self, scene: Scene) -> list[str]:
        return [f"feature {self.feature(scene)}"]

    def snippet_body(self, scene: Scene) -> str:
        return f"""
{self.study(scene)}
from probes.features.tokens import token_effects

effects = token_effects(model, found.site, found.dictionary, [{self.feature(scene)}])
values = np.concatenate([effects.promoted[1][0], effects.suppressed[1][0].flip(0)])
"""


class FeaturePartners(FeaturePanel):
    """Features that fire with the chosen one."""

    id = "feature-partners"
    title = "What fires with it"
    words = "Features that fire together with it most above chance (φ), and whether their directions point alike. Click one to go there."
    height = 270

    def values(self, scene: Scene) -> np.ndarray:
        row = self.place(scene)
        return np.stack([self.array(scene, "partners.cosine")[row], self.array(scene, "partners.phi")[row]], 1)

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values, ids, run = (
            self.values(scene),
            self.array(scene, "partners.ids")[self.place(scene)].tolist(),
            self.result(scene),
        )
        labels = [" ".join(promoted_words(run, feature, count=4)) for feature in ids]
        return feature_points(ids, values[:, 0], values[:, 1], labels, theme, panel=self.id, x_title="cosine of the directions",
                              y_title="φ of firing together")  # fmt: skip

    def table(self, scene: Scene) -> Table:
        ids, values = self.array(scene, "partners.ids")[self.place(scene)].tolist(), self.values(scene)
        return ["feature", "cosine", "φ"], ([str(f), float(x), float(y)] for f, (x, y) in zip(ids, values, strict=True))

    def facts(self, scene: Scene) -> list[str]:
        return [f"feature {self.feature(scene)}", f"its {len(self.values(scene))} nearest by φ"]

    def snippet_body(self, scene: Scene) -> str:
        feature = self.feature(scene)
        return f"""
{self.study(scene)}
import torch

unit = torch.nn.functional.normalize(found.dictionary.W_dec.detach(), dim=-1).numpy()
phi, partners = codes.phi([{feature}])[0], run.array("partners.ids")[{self.place(scene)}]
values = np.stack([unit[partners] @ unit[{feature}], phi[partners]], axis=1)
"""


class FeatureList(FeaturePanel):
    """All features."""

    id = "feature-list"
    title = "All features"
    words = "Search by number, by a token that it fires on or promotes; sort by any column. Points: how often against how strongly."
    height = 230

    def values(self, scene: Scene) -> np.ndarray:
        return np.stack([self.array(scene, "density"), self.array(scene, "largest")], 1)

    def rows(self, scene: Scene) -> list[dict[str, Any]]:
        """For the grid: number, density, largest value, the token of its largest value, tokens that it raises; dead ones last."""
        run, values = self.result(scene), self.values(scene)
        peaks = self.array(scene, "peak.token").tolist()
        order = np.argsort(-values[:, 0], kind="stable").tolist()
        return [
            {"id": str(f), "feature": f, "density": float(values[f, 0]), "largest": float(values[f, 1]),
             "peak": visible_text(word(run, peaks[f])) if peaks[f] >= 0 else "", "promotes": "  ".join(promoted_words(run, f))}
            for f in order
        ]  # fmt: skip

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values = self.values(scene)
        alive = np.flatnonzero(values[:, 0] > 0)
        run, peaks = self.result(scene), self.array(scene, "peak.token")
        labels = [f"largest on ‘{visible_text(word(run, peaks[f]))}’" for f in alive.tolist()]
        return feature_points(alive.tolist(), values[alive, 0], values[alive, 1], labels, theme, panel=self.id, log_x=True,
                              x_title="share of rows on which it fires", y_title="largest value", chosen=self.feature(scene))  # fmt: skip

    def table(self, scene: Scene) -> Table:
        headers = ["feature", "density", "largest value", "largest on", "promotes"]
        return headers, (
            [row["id"], row["density"], row["largest"], row["peak"], row["promotes"]] for row in self.rows(scene)
        )

    def facts(self, scene: Scene) -> list[str]:
        values = self.values(scene)
        return [f"{int((values[:, 0] > 0).sum()):,} of {len(values):,} features fire on the learned text"]

    def snippet_body(self, scene: Scene) -> str:
        return f"{self.study(scene)}\nvalues = np.stack([codes.density, codes.largest()], axis=1)"


class FeatureNeurons(FeaturePanel):
    """Features beside the native neurons of a BDH."""

    id = "feature-neurons"
    title = "Features beside native neurons"
    words = ("For every feature the neuron of the same layer that follows it best. Near 1 the dictionary found a neuron again; low values "
             "are directions that no single neuron has. Click a feature.")  # fmt: skip
    height = 270

    def neurons(self, scene: Scene) -> dict[str, Any]:
        """Measures of the native neurons. NothingToShow where there are none."""
        results = self.results(scene)
        if results.get("neurons") is None:
            raise NothingToShow(
                "No native neurons", str(results.get("no_neurons") or "This record was made without them.")
            )
        return results["neurons"]

    def values(self, scene: Scene) -> np.ndarray:
        self.neurons(scene)
        return np.stack([self.array(scene, "density")[self.array(scene, "shown")], self.array(scene, "neurons.r")], 1)

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values, run, shown = self.values(scene), self.result(scene), self.array(scene, "shown").tolist()
        labels = [f"neuron {neuron_name(run, neuron)}" for neuron in self.array(scene, "neurons.match").tolist()]
        return feature_points(shown, values[:, 0], values[:, 1], labels, theme, panel=self.id, log_x=True, chosen=self.feature(scene),
                              x_title="share of rows on which the feature fires", y_title="r with its best neuron")  # fmt: skip

    def table(self, scene: Scene) -> Table:
        values, run = self.values(scene), self.result(scene)
        match = self.array(scene, "neurons.match").tolist()
        lines = zip(self.array(scene, "shown").tolist(), match, values, strict=True)
        return ["feature", "density", "best neuron", "r"], (
            [str(feature), float(x), neuron_name(run, neuron), float(r)] for feature, neuron, (x, r) in lines
        )

    def facts(self, scene: Scene) -> list[str]:
        neurons, values = self.neurons(scene), self.values(scene)
        again = int((values[:, 1] > 0.9).sum())
        return [
            f"{neurons['count']:,} neurons, {neurons['l0']:.0f} active per token; features: {self.results(scene)['evaluation']['l0']:.1f}",
            f"{again} of {len(values)} features are a neuron again (r > 0.9)", f"median r {number(float(np.median(values[:, 1])))}",
            f"on {neurons['rows']:,} rows",
        ]  # fmt: skip

    def snippet_body(self, scene: Scene) -> str:
        return f"""
{self.study(scene)}
from probes.features.record import best_matches, native_neurons

active, sequences, _ = native_neurons(model, found.tokens, "{self.neurons(scene)["point"]}")
facts, shown = found.store.facts(), run.array("shown")
rows = np.flatnonzero((facts["sequence"] < sequences).numpy())
at = (facts["sequence"][rows] * found.tokens.shape[1] + facts["position"][rows]).numpy()
_, r = best_matches(np.asarray(codes.matrix[rows][:, shown].todense()), active[at])
values = np.stack([codes.density[shown], r], axis=1)
"""


DENSITY, CONTEXTS, VALUES, TOKENS = FeatureDensity(), FeatureContextsPanel(), FeatureValues(), FeatureTokens()
PARTNERS, LIST, NEURONS = FeaturePartners(), FeatureList(), FeatureNeurons()
PANELS = (DENSITY, CONTEXTS, VALUES, TOKENS, PARTNERS, LIST, NEURONS)
