"""What a model is made of, as plain data for the dashboard's block diagram and for model cards."""

from typing import Any

from models.bdh.model import BDH
from models.decoder import Decoder
from models.language_model import LanguageModel

LABELS = {
    "retention": "Retention",
    "mamba2": "Mamba-2",
    "log_linear_mamba2": "Log-linear Mamba-2",
    "gla": "Gated linear",
    "gateloop": "GateLoop",
    "delta": "Delta rule",
    "rg_lru": "RG-LRU",
}


def model_blocks(model: Decoder) -> list[dict[str, Any]]:
    """`{kind, label, detail, layer}` of each part in the order of the forward pass; `layer` is None before and after the layers."""
    parts = [_part("embed", "Embedding", f"{model.vocab_size} → {model.d_model}", None)]
    if isinstance(model, LanguageModel):
        config = model.config
        if model.has_position_embedding:
            parts.append(_part("embed", "Positions", str(config.position_embedding), None))
        for layer, (mixer, mlp) in enumerate(zip(model.mixers, config.mlps, strict=True)):
            record = mixer.describe()
            label, detail = _mixer_words(record, getattr(config.mixers[layer], "position", None))
            parts.append(_part(record["kind"], label, detail, layer))
            if mlp is not None:
                beside = ", parallel" if config.parallel else ""
                parts.append(_part("mlp", mlp.label, mlp.words + beside, layer))
        if config.loops > 1:
            parts.append(_part("loop", "Loop", f"×{config.loops}, shared weights", None))
        if config.wiring is not None:
            times = f"up to ×{model.loops}, shared weights" if model.loops > 1 else "all earlier outputs"
            parts.append(_part("loop", config.wiring.kind.capitalize(), times, None))
        parts.append(_part("norm", "Norm", {"layer": "layer norm", "rms": "RMS norm"}[config.norm], None))
    elif isinstance(model, BDH):
        config = model.config
        neurons = config.n_neurons // config.n_heads
        for layer in range(model.n_layers):
            parts.append(_part("bdh", "Linear attn", f"{config.n_heads}×{neurons} neurons", layer))
            parts.append(_part("mlp", "Gate · E", "y = gate ⊙ x", layer))
    parts.append(_part("unembed", "Unembedding", f"{model.d_model} → {model.vocab_size}", None))
    return parts


def _part(kind: str, label: str, detail: str, layer: int | None) -> dict[str, Any]:
    return {"kind": kind, "label": label, "detail": detail, "layer": layer}


def _mixer_words(record: dict[str, Any], position: Any) -> tuple[str, str]:
    heads, keys = record["n_heads"], record["n_key_heads"]
    if record["kind"] == "attention":
        shared = "" if keys == heads else f", {keys} kv"
        where = f", {position}" if position in ("rope", "alibi") and not shared else ""
        return "Attention", f"{heads} heads{shared or where}"
    label = LABELS.get(record["kind"], record["kind"].replace("_", " ").capitalize())
    state = record.get("state")
    if not state:
        return label, f"{heads} heads"
    sizes = [str(size) for size in state["shape"]]
    if state["axes"][0] == "head":
        return label, f"{sizes[0]} × {'×'.join(sizes[1:])}"
    return label, "×".join(sizes)  # a state without heads
