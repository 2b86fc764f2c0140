"""Panels of the overview: what the model is, what it found hard, what it expects next."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import plotly.graph_objects as go

from app.figures.common import Colours, number, token_label
from app.figures.overview import block_diagram, column_count, loss_strip, next_tokens, residual_norms, tallest_column
from app.panels.base import FigurePanel, NothingToShow, PicturePanel, Span, StripPanel, Table
from app.panels.words import kind_words
from app.services import Scene
from app.theme import Theme
from workbench.lab.pooling import pool
from workbench.lab.runs import Run


def blocks_of(scene: Scene) -> list[dict[str, Any]]:
    """The block list of a run's model, `{kind, label, detail, layer}` in the order of the forward pass.

    The run's manifest says it; of runs that were stored before it did, the catalogue knows it, or else the layers' records say enough.
    """
    recorded = scene.opened().model.get("blocks")
    if recorded:
        return [dict(block) for block in recorded]
    return scene.once("blocks", make=lambda: _known_blocks(scene) or _recorded_blocks(scene))


def _known_blocks(scene: Scene) -> list[dict[str, Any]]:
    run, name = scene.opened(), scene.opened().model.get("name")
    # Only a shipped model's blocks are known without building it, which a page must not wait for.
    if not any(model["name"] == name and model.get("card") for model in scene.models.list_models()):
        return []
    try:
        blocks = [dict(block) for block in scene.models.describe(str(name))["blocks"]]
    except (ValueError, LookupError):
        return []
    # A catalogue may since have given the name to another model.
    same = {block.get("layer") for block in blocks} - {None} == set(range(len(run.layers)))
    return blocks if same else []


def _recorded_blocks(scene: Scene) -> list[dict[str, Any]]:
    run = scene.opened()
    names = [str(point["name"]) for point in run.manifest.get("hook_points", [])]
    blocks: list[dict[str, Any]] = [{"kind": "embed", "label": "Embedding", "detail": "tokens in", "layer": None}]
    for layer in run.layers:
        index, state = layer["layer"], layer.get("state")
        detail = f"{layer['n_heads']} heads"
        if state and state.get("role") == "state":
            detail += ", " + "×".join(str(size) for size in state["shape"][1:])
        kind = str(layer["kind"])
        label = kind_words(kind)
        blocks.append({"kind": kind, "label": label[0].upper() + label[1:], "detail": detail, "layer": index})
        if any(name.startswith((f"blocks.{index}.mlp", f"blocks.{index}.hook_mlp")) for name in names):
            blocks.append({"kind": "mlp", "label": "MLP", "detail": "per token", "layer": index})
    blocks.append({"kind": "head", "label": "Unembedding", "detail": "next token", "layer": None})
    return blocks


def token_name(scene: Scene, token: int) -> str:
    """The text of a token id: exact for byte tokens and for tokens that the run holds or predicts, else `#id`."""
    return scene.once("token-names", make=lambda: token_names(scene.opened()))(token)


def token_names(run: Run) -> Callable[[int], str]:
    """`token_name` for a run."""
    record = run.manifest.get("tokens") or {}
    if record.get("tokenizer") == "bytes":
        return lambda token: chr(token) if 0 <= token < 256 else f"#{token}"
    known = dict(zip(record["ids"], record["strings"], strict=True))
    known |= {int(token): label for token, label in record.get("predicted", {}).items()}
    return lambda token: known.get(token, f"#{token}")


class Diagram(FigurePanel):
    """The model's blocks along the residual stream."""

    id = "diagram"
    title = "How the model is built"
    words = "The line is the residual stream; every block reads from it and adds to it. Click a layer to choose it."
    depends = ("run", "layer")
    height = 190

    def blocks(self, scene: Scene) -> list[dict[str, Any]]:
        self.check(scene)
        if not scene.layers:
            raise NothingToShow("No layers recorded", "This run does not say which layers its model has.")
        return blocks_of(scene)

    def values(self, scene: Scene) -> np.ndarray:
        """Heads of each layer."""
        self.blocks(scene)
        return np.array(scene.heads_per_layer)

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        return block_diagram(self.blocks(scene), theme, panel=self.id, layer=scene.view.layer)

    def pixels_high(self, scene: Scene) -> int:
        return max(self.height, 62 + 64 * tallest_column(self.blocks(scene)))

    def width(self, scene: Scene) -> int:
        """Pixels below which the labels would collide."""
        return 84 * column_count(self.blocks(scene))

    def table(self, scene: Scene) -> Table:
        rows = (
            [str(b["layer"] if b["layer"] is not None else ""), str(b["label"]), str(b["detail"])]
            for b in self.blocks(scene)
        )
        return ["layer", "block", "detail"], rows

    def snippet_body(self, scene: Scene) -> str:
        return 'values = np.array([layer["n_heads"] for layer in run.layers])'

    def facts(self, scene: Scene) -> list[str]:
        kinds: Mapping[str, int] = {}
        for layer in scene.layers:
            kinds = {**kinds, layer["kind"]: kinds.get(layer["kind"], 0) + 1}
        return [f"{count} {kind_words(kind)} layer{'s' if count > 1 else ''}" for kind, count in kinds.items()]


class SurprisalText(StripPanel):
    """The text, coloured by how unexpected each token was."""

    id = "surprisal-text"
    title = "The text, and what surprised the model"
    words = "Colour = surprisal of each token given everything before it. Click a token to pin it on every page."
    depends = ("run",)
    unit = "nats"

    def values(self, scene: Scene) -> np.ndarray:
        self.check(scene)
        if not scene.opened().has("loss"):
            raise NothingToShow(
                "No surprisal in this run",
                "Its model reads the whole text at once (an encoder) and predicts no next token.",
            )
        return np.asarray(scene.opened().array("loss"))

    def snippet_body(self, scene: Scene) -> str:
        return 'values = run.array("loss")  # nats per token, nan for the first'

    def facts(self, scene: Scene) -> list[str]:
        loss = self.values(scene)
        finite = loss[np.isfinite(loss)]
        if not len(finite):
            return [f"{scene.n_tokens} tokens"]
        mean = float(finite.mean(dtype=np.float64))
        return [
            f"{scene.n_tokens} tokens",
            f"mean {number(mean)} nats per token",
            f"perplexity {number(float(np.exp(mean)))}",
        ]


class LossStrip(FigurePanel):
    """The same numbers as a curve."""

    id = "surprisal"
    title = "Surprisal along the text"
    words = "How unexpected each token was, in nats. 0 = certain; ln 256 ≈ 5.5 = a blind guess among 256 bytes."
    depends = ("run",)
    height = 220

    def values(self, scene: Scene) -> np.ndarray:
        return TEXT.values(scene)

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        return loss_strip(self.values(scene), scene.tokens, theme, panel=self.id)

    def snippet_body(self, scene: Scene) -> str:
        return TEXT.snippet_body(scene)

    def facts(self, scene: Scene) -> list[str]:
        return ["nats per token", "no prediction for the first token"]

    def summary(self, scene: Scene) -> str:
        loss = self.values(scene)
        if not np.isfinite(loss).any():
            return "No token has a surprisal."
        top = int(np.nanargmax(loss))
        return f"Most surprising is token {token_label(scene.tokens, top)} with {number(float(loss[top]))} nats."


class NextTokens(FigurePanel):
    """What the model expects after the pinned token; of an encoder with a head for masked tokens, what it would put in its place."""

    id = "next-tokens"
    title = "What it expects next"
    words = "The most likely next tokens after the pinned token. The one that really came next is green (✓)."
    depends = ("run", "query")
    height = 330

    def heading(self, scene: Scene) -> str:
        return "What it would put here" if self._here(scene) else self.title

    def explanation(self, scene: Scene) -> str:
        if not self._here(scene):
            return self.words
        return (
            "The most likely tokens in the place of the pinned token, which this encoder reads too unless it is a mask. "
            "The one that stands there is green (✓)."
        )

    def _here(self, scene: Scene) -> bool:
        return scene.run is not None and scene.run.has("here.log_probs")

    def _name(self, scene: Scene) -> str:
        return "here" if self._here(scene) else "next"

    def _target(self, scene: Scene) -> int:
        """The token that is predicted at the pinned one."""
        return scene.query if self._here(scene) else scene.query + 1

    def values(self, scene: Scene) -> np.ndarray:
        self.check(scene)
        name = f"{self._name(scene)}.log_probs"
        if not scene.opened().has(name):
            raise NothingToShow(
                "No predictions in this run",
                "Its model is an encoder without a head for masked tokens: it predicts neither these nor the next token.",
            )
        return np.asarray(scene.opened().array(name)[scene.query])

    def _ids(self, scene: Scene) -> list[int]:
        return scene.opened().array(f"{self._name(scene)}.ids")[scene.query].tolist()

    def _actual(self, scene: Scene) -> int | None:
        target = self._target(scene)
        if target >= scene.n_tokens:
            return None
        token, ids = int(scene.opened().array("tokens")[target]), self._ids(scene)
        return ids.index(token) if token in ids else None

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        values = self.values(scene)
        labels = [token_name(scene, token) for token in self._ids(scene)]
        return next_tokens(labels, values, theme, panel=self.id, actual=self._actual(scene))

    def table(self, scene: Scene) -> Table:
        rows: list[list[str | float]] = [
            [token_name(scene, token), str(token), float(value), float(np.exp(value))]
            for token, value in zip(self._ids(scene), self.values(scene), strict=True)
        ]
        return ["token", "id", "log probability", "probability"], iter(rows)

    def snippet_body(self, scene: Scene) -> str:
        name = self._name(scene)
        return f'values = run.array("{name}.log_probs")[{scene.query}]  # token ids: run.array("{name}.ids")'

    def facts(self, scene: Scene) -> list[str]:
        facts = [f"{'at' if self._here(scene) else 'after'} token {token_label(scene.tokens, scene.query)}"]
        target = self._target(scene)
        if target < scene.n_tokens and self._actual(scene) is None:
            stands = "stands there" if self._here(scene) else "came next"
            facts.append(f"what {stands}, {token_label(scene.tokens, target)}, is not among them")
        return facts


class ResidualNorms(PicturePanel):
    """Size of the residual stream by depth."""

    id = "residual"
    title = "Size of the residual stream"
    words = "L2 norm of the residual stream after each layer, at each token."
    depends = ("run",)
    height = 220

    def _norms(self, scene: Scene) -> np.ndarray:
        self.check(scene)
        if not scene.opened().has("resid_norm"):
            raise NothingToShow("Not recorded", "This run does not store the size of the residual stream.")
        return scene.opened().array("resid_norm")

    def shape(self, scene: Scene) -> tuple[int, int]:
        rows, columns = self._norms(scene).shape
        return rows, columns

    def block(self, scene: Scene, rows: Span, columns: Span) -> np.ndarray:
        return np.asarray(self._norms(scene)[slice(*rows), slice(*columns)])

    def pooled(self, scene: Scene, size: int) -> np.ndarray:
        return pool(self._norms(scene), size, size, "max")

    def colours(self, scene: Scene, theme: Theme) -> Colours:
        return Colours(theme.table_name(False), float(self._norms(scene).max()), "linear", False, "norm")

    def figure(self, scene: Scene, theme: Theme) -> go.Figure:
        depths, _ = self.shape(scene)
        return residual_norms(
            self.address(scene, theme), scene.tokens, depths, self.colours(scene, theme), theme, panel=self.id
        )

    def place(self, scene: Scene, row: int, column: int) -> list[tuple[str, str]]:
        return [
            ("after", "the embedding" if row == 0 else f"layer {row - 1}"),
            ("at", token_label(scene.tokens, column)),
        ]

    def snippet_body(self, scene: Scene) -> str:
        return 'values = run.array("resid_norm")  # depth, pos'


TEXT = SurprisalText()
PANELS = (Diagram(), TEXT, LossStrip(), NextTokens(), ResidualNorms())
