"""What a model is made of, as plain data for the dashboard's block diagram and for model cards."""

from collections import Counter
from typing import Any

from models.attention.config import AttentionConfig, several
from models.bdh.model import BDH
from models.decoder import Decoder
from models.encoder import Encoder
from models.language_model import LanguageModel

LABELS = {
    "retention": "Retention",
    "mamba2": "Mamba-2",
    "log_linear_mamba2": "Log-linear Mamba-2",
    "gla": "Gated linear",
    "gateloop": "GateLoop",
    "delta": "Delta rule",
    "log_linear_delta": "Log-linear delta",
    "rg_lru": "RG-LRU",
    "mlstm": "mLSTM",
    "slstm": "sLSTM",
    "lstm": "LSTM",
    "gru": "GRU",
    "paragru": "ParaGRU",
    "paralstm": "ParaLSTM",
    "infini": "Infini-attention",
    "titans": "Titans memory",
    "miras": "Miras memory",
}
PARTS = {
    "alibi": "ALiBi",
    "bam": "BAM",
    "cope": "CoPE",
    "nats": "NAtS",
    "qk_norm": "QK norm",
    "ssmax": "SSMax",
    "t5": "T5 buckets",
    "time_rope": "Time RoPE",
    "top_k": "Top-k",
}
STAGES = ("project", "position", "qk_norm", "score", "mask", "normalise", "reweight", "mix", "post")


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
            parts += [_part("stage", *words, layer) for words in _special_stages(config.mixers[layer])]
            if mlp is not None:
                beside = ", parallel" if config.parallel else ""
                parts.append(_part("mlp", mlp.label, mlp.words + beside, layer))
        if config.loops > 1:
            parts.append(_part("loop", "Loop", f"×{config.loops}, shared weights", None))
        if config.wiring is not None:
            passes = Counter(layer for layer, _ in model.visits)
            for layer, count in passes.items():
                if count > 1:  # behind the other parts of its layer
                    last = max(place for place, part in enumerate(parts) if part["layer"] == layer)
                    parts.insert(last + 1, _part("loop", f"×{count}", "passes", layer))
            parts.append(_part("loop", config.wiring.label, config.wiring.words, None))
        if model.ln_final is not None:
            parts.append(_part("norm", "Norm", {"layer": "layer norm", "rms": "RMS norm"}[config.norm], None))
        if isinstance(model, Encoder):
            if not model.predicts_masked_tokens:
                return parts
            parts.append(_part("mlp", "Head", "masked tokens", None))
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


def _special_stages(config: Any) -> list[tuple[str, str]]:
    """(part, stage) of what fills the stages of an attention site beside the defaults and ordinary rotation, and its `own_stages`."""
    if not isinstance(config, AttentionConfig):
        return []
    found = []
    for stage in STAGES:
        given = config.position_parts if stage == "position" else several(getattr(config, stage))
        for part in given:
            if part is not None and part.kind != "rope":
                said = PARTS.get(part.kind, part.kind.replace("_", " ").capitalize())
                found.append((said, stage.replace("_", " ")))
    if config.window is not None:
        found.append(("Window", f"{config.window} tokens"))
    if config.softcap is not None:
        found.append(("Soft cap", f"± {config.softcap:g}"))
    return [*getattr(config, "own_stages", ()), *found]


def _mixer_words(record: dict[str, Any], position: Any) -> tuple[str, str]:
    heads, keys = record["n_heads"], record["n_key_heads"]
    if record["kind"] == "attention":
        shared = "" if keys == heads else f", {keys} kv"
        where = ", rope" if position == "rope" and not shared else ""
        return "Attention", f"{heads} heads{shared or where}"
    label = LABELS.get(record["kind"], record["kind"].replace("_", " ").capitalize())
    state = record.get("state")
    if not state:
        return label, f"{heads} heads"
    sizes = [str(size) for size in state["shape"]]
    if state["axes"][0] == "head":
        return label, f"{sizes[0]} × {'×'.join(sizes[1:])}"
    return label, "×".join(sizes)  # a state without heads
