"""Small published-style checkpoints with random weights, written by transformers, and what transformers computes from them.

The reference runs in float64, casts to float32 in its files (norms, softmax, rotations, scans) going to float64 instead, so that a
comparison is as sharp as the formulas; and in float32 as it comes.
"""

import importlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models.decoder import Decoder

LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH, NEW = 3, 32, 4, 61, 11, 32
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
}
ENDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}


@dataclass(frozen=True)
class Case:
    """One configuration to compare: `model` is a class of transformers, `settings` of its configuration."""

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    patterns: bool = True
    states: bool = False
    exact: float = 1e-10
    streams: str = "resid_pre"  # ours that is the reference's l-th hidden state

    def config(self) -> Any:
        import transformers

        kind = getattr(transformers, self.model).config_class
        return kind(**{**ENDS, **self.settings, "attn_implementation": "eager"})


LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 5}
MAMBA2 = {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4, "tie_word_embeddings": True}
CASES = {
    "gpt2": Case(
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    ),
    "llama": Case("LlamaForCausalLM", {**LLAMA, "rms_norm_eps": 1e-5}),
    "llama-tied-biased": Case(
        "LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "head_dim": 12}
    ),
    "llama-3-rope": Case(
        "LlamaForCausalLM",
        {
            **LLAMA,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 5e5,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": Case("MistralForCausalLM", {**LLAMA, "sliding_window": 5}),
    "qwen2": Case(
        "Qwen2ForCausalLM", {**LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
    ),
    "gpt_neo": Case(
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "hidden_size": WIDTH,
            "num_layers": 3,
            "num_heads": HEADS,
            "attention_types": [[["global", "local", "local"], 1]],
            "window_size": 5,
            "intermediate_size": 48,
        },
    ),
    "openai-gpt": Case(
        "OpenAIGPTLMHeadModel",
        {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
        streams="resid_pre",
    ),
    "gptj": Case(
        "GPTJForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "n_positions": 64,
            "n_embd": WIDTH,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "rotary_dim": 4,
        },
    ),
    "gpt_neox": Case("GPTNeoXForCausalLM", {**SIZES, "intermediate_size": 48}),
    "gpt_neox-serial": Case("GPTNeoXForCausalLM", {**SIZES, "intermediate_size": 48, "use_parallel_residual": False}),
    "phi": Case("PhiForCausalLM", {**LLAMA}),
    "opt": Case("OPTForCausalLM", {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": WIDTH}),
    "bloom": Case(
        "BloomForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": 36, "n_layer": LAYERS, "n_head": 6},
        exact=1e-8,  # its GELU has √(2/π) to eight digits only
    ),
    "falcon": Case("FalconForCausalLM", {**SIZES}),
    "falcon-new": Case(
        "FalconForCausalLM", {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}
    ),
    "falcon-serial": Case("FalconForCausalLM", {**SIZES, "multi_query": False, "parallel_attn": False}),
    "gemma": Case("GemmaForCausalLM", {**LLAMA, "hidden_size": 64, "head_dim": 10}),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        {**LLAMA, "hidden_size": 64, "head_dim": 10, "query_pre_attn_scalar": 20, "sliding_window": 5}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "mamba": Case("MambaForCausalLM", MAMBA, patterns=False, states=True, streams="resid_post"),
    "falcon_mamba": Case("FalconMambaForCausalLM", MAMBA, patterns=False, states=True, streams="resid_post"),
    "mamba2": Case("Mamba2ForCausalLM", MAMBA2, patterns=False, states=True, streams="resid_post"),
    "diffllama": Case(
        "DiffLlamaForCausalLM", {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4}, patterns=False
    ),
    "qwen3": Case("Qwen3ForCausalLM", {**LLAMA, "head_dim": 10, "tie_word_embeddings": True}),
}


class _Double:
    """The torch module as seen by a file, with float64 where it says float32."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def all_double(model: str) -> Iterator[None]:
    """Casts to float32 in the files of transformers that this model runs go to float64 while the block runs."""
    import transformers

    files = [
        inspect.getmodule(getattr(transformers, model)),
        importlib.import_module("transformers.modeling_rope_utils"),
    ]
    patch = pytest.MonkeyPatch()
    for file in files:
        patch.setattr(file, "torch", _Double())
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)  # what whole numbers divide into
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        patch.undo()


def lively(model: Any) -> Any:
    """Random weights with effects: every matrix wide, every norm and bias off its neutral value."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if "A_log" in name or name.endswith(".D"):
                parameter.copy_(0.5 * noise)
            elif parameter.dim() == 1:
                parameter.copy_(noise * 0.2 + ("norm" in name or "ln" in name) * ("bias" not in name))
            else:
                parameter.copy_(noise * 0.2)
    return model.double().eval()


def largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def batch(side: str | None) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [2, 11], a mask whose second row is padded by 4 at `side`, and the position of each real token."""
    tokens = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    if side == "left":
        mask[1, :4] = False
    elif side == "right":
        mask[1, -4:] = False
    return tokens, mask, (mask.cumsum(1) - 1).clamp(min=0)


@dataclass
class Pair:
    """A checkpoint opened by both sides."""

    case: Case
    theirs: Any
    ours: Decoder
    folder: Path

    def reference(self, side: str | None, **wanted: bool) -> Any:
        """What transformers computes of `batch(side)` in float64."""
        tokens, mask, positions = batch(side)
        known = inspect.signature(self.theirs.forward).parameters
        extra: dict[str, Any] = {}
        if side is not None:
            extra["attention_mask"] = mask.long()
            if "position_ids" in known:
                extra["position_ids"] = positions
        with torch.no_grad(), all_double(self.case.model):
            return self.theirs(tokens, output_hidden_states=True, **extra, **wanted)


def write(case: Case, folder: Path) -> Any:
    """The checkpoint's model in transformers, saved to `folder` in float64."""
    import transformers

    torch.manual_seed(0)
    with all_double(case.model):
        theirs = lively(getattr(transformers, case.model)(case.config()))
    theirs.save_pretrained(folder)
    record = json.loads((folder / "config.json").read_text())
    assert "model_type" in record
    return theirs


def pair(case: Case, folder: Path) -> Pair:
    theirs = write(case, folder)
    return Pair(case, theirs, models.load(folder, dtype=torch.float64), folder)
