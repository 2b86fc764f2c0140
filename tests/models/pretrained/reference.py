"""Small published-style checkpoints with random weights, written by transformers, and what transformers computes from them.

The reference runs in float64, casts to float32 in its files (norms, softmax, rotations, scans) going to float64 instead, so that a
comparison is as sharp as the formulas; and in float32 as it comes.
"""

import importlib
import inspect
import json
from collections.abc import Callable, Iterator
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


def in_the_cache(theirs: Any, outputs: Any, layer: int) -> Tensor:
    """The recurrent state of a layer after a run, where transformers' caches keep it."""
    cache = outputs.get("cache_params") or outputs["past_key_values"]
    return cache.get_recurrent_state(layer, state_idx=0)


def on_the_module(theirs: Any, outputs: Any, layer: int) -> Tensor:
    """RecurrentGemma keeps states on its modules, overwritten by the next call."""
    return theirs.model.layers[layer].temporal_block.rg_lru.recurrent_states.clone()


def in_the_xlstm_cache(theirs: Any, outputs: Any, layer: int) -> Tensor:
    """The memory; normaliser and stabiliser stand beside it."""
    return outputs.cache_params.rnn_state[layer][0]


@dataclass(frozen=True)
class Case:
    """One configuration to compare: `model` is a class of transformers, `settings` of its configuration.

    states: where a layer without attention keeps its state after a run. padding: False where the reference lets padding into its memories
    (each place says how), so that it reads and continues every text by itself, and we the padded batch.
    """

    model: str
    settings: dict[str, Any] = field(default_factory=dict)
    patterns: bool = True
    states: Callable[[Any, Any, int], Tensor] | None = None
    exact: float = 1e-10
    streams: str = "resid_pre"  # ours that is the reference's l-th hidden state
    padding: bool = True

    def config(self) -> Any:
        import transformers

        kind = getattr(transformers, self.model).config_class
        return kind(**{**ENDS, **self.settings, "attn_implementation": "eager"})


LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
QWEN_NEXT = {
    **LLAMA,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "shared_expert_intermediate_size": 24,
    "mlp_only_layers": [1],
    "experts_implementation": "eager",
}
MAMBA = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "state_size": 5}
MAMBA2 = {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4, "tie_word_embeddings": True}
CASES = {
    "gpt2": Case(
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS},
    ),
    "llama": Case("LlamaForCausalLM", {**LLAMA, "rms_norm_eps": 1e-5}),
    "llama-tied-biased": Case(
        "LlamaForCausalLM",
        {**LLAMA, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
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
    "mamba": Case("MambaForCausalLM", MAMBA, patterns=False, states=in_the_cache, streams="resid_post"),
    "falcon_mamba": Case("FalconMambaForCausalLM", MAMBA, patterns=False, states=in_the_cache, streams="resid_post"),
    "mamba2": Case("Mamba2ForCausalLM", MAMBA2, patterns=False, states=in_the_cache, streams="resid_post"),
    "diffllama": Case(
        "DiffLlamaForCausalLM", {**LLAMA, "num_attention_heads": 8, "num_key_value_heads": 4}, patterns=False
    ),
    "qwen3": Case("Qwen3ForCausalLM", {**LLAMA, "head_dim": 10, "tie_word_embeddings": True}),
    "qwen3_next": Case("Qwen3NextForCausalLM", {**QWEN_NEXT, "num_experts": 0}, states=in_the_cache),
    "qwen3_next-experts": Case("Qwen3NextForCausalLM", QWEN_NEXT | EXPERTS, states=in_the_cache),
}
RECURRENT_GEMMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": 80,
    "num_key_value_heads": 1,
    "lru_width": 56,
    "attention_window_size": 5,
    "logits_soft_cap": 3.0,
    "block_types": ["recurrent", "attention", "recurrent"],
}
# The reference's convolution reads padding on the left, and its states go on through padding on the right.
CASES["recurrent_gemma"] = Case("RecurrentGemmaForCausalLM", RECURRENT_GEMMA, states=on_the_module, padding=False)
XLSTM = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,  # the reference's cache rounds the widths of queries and values up to 64, its layers do not
    "num_hidden_layers": LAYERS,
    "num_heads": HEADS,
    "ffn_proj_factor": 0.3,
    "ffn_round_up_to_multiple_of": 8,
}
# Padding is a token like any other to the reference.
CASES["xlstm"] = Case("xLSTMForCausalLM", XLSTM, patterns=False, states=in_the_xlstm_cache, padding=False)
CASES["xlstm-in-chunks"] = Case(
    "xLSTMForCausalLM", {**XLSTM, "chunk_size": 4}, patterns=False, states=in_the_xlstm_cache, padding=False
)


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
    for function in _functions(files[0]):
        kept = function.__defaults__ or ()
        if torch.float32 in kept:
            wider = tuple(torch.float64 if value is torch.float32 else value for value in kept)
            patch.setattr(function, "__defaults__", wider)
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)  # what whole numbers divide into
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        patch.undo()


def _functions(file: Any) -> list[Any]:
    """Functions of a module and methods of its classes."""
    own = [item for item in vars(file).values() if getattr(item, "__module__", None) == file.__name__]
    members = [member for item in own if inspect.isclass(item) for member in vars(item).values()]
    return [item for item in (*own, *members) if inspect.isfunction(item)]


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
class Expected:
    """What transformers computes: attentions and states by layer, of the layers that have them."""

    logits: Tensor
    hidden_states: list[Tensor]
    attentions: dict[int, Tensor]
    states: dict[int, Tensor]


@dataclass
class Pair:
    """A checkpoint opened by both sides."""

    case: Case
    theirs: Any
    ours: Decoder
    folder: Path

    def reference(self, side: str | None) -> Expected:
        """What transformers computes of `batch(side)` in float64."""
        tokens, mask, positions = batch(side)
        if side is not None and not self.case.padding:
            return self._apart(tokens, mask)
        extra: dict[str, Any] = {}
        if side is not None:
            extra["attention_mask"] = mask.long()
            if "position_ids" in inspect.signature(self.theirs.forward).parameters:
                extra["position_ids"] = positions
        return self._run(tokens, **extra)

    def _run(self, tokens: Tensor, **extra: Any) -> Expected:
        case = self.case
        wanted = {"output_attentions": True} if case.patterns else {}
        wanted |= {"use_cache": True} if case.states else {}
        with torch.no_grad(), all_double(case.model):
            outputs = self.theirs(tokens, output_hidden_states=True, **wanted, **extra)
        recurrent = [not getattr(block, "is_attention", True) for block in self.ours.blocks]
        attending = [layer for layer, memory in enumerate(recurrent) if not memory]
        attentions = dict(zip(attending, outputs.attentions, strict=True)) if case.patterns else {}
        find = case.states
        states = (
            {} if find is None else {i: find(self.theirs, outputs, i) for i, memory in enumerate(recurrent) if memory}
        )
        return Expected(outputs.logits, list(outputs.hidden_states), attentions, states)

    def _apart(self, tokens: Tensor, mask: Tensor) -> Expected:
        """Every text read by itself, put back where its tokens are in the batch."""
        places = [row.nonzero()[:, 0] for row in mask]
        runs = [self._run(tokens[row : row + 1, at]) for row, at in enumerate(places)]

        def spread(parts: list[Tensor]) -> Tensor:
            """[1, own pos, ...] of each text -> [batch, pos, ...]."""
            whole = parts[0].new_zeros(*mask.shape, *parts[0].shape[2:])
            for row, at in enumerate(places):
                whole[row, at] = parts[row][0]
            return whole

        def spread_pattern(parts: list[Tensor]) -> Tensor:
            """[1, head, own query, own key] of each text -> [batch, head, query, key]."""
            whole = parts[0].new_zeros(len(places), parts[0].shape[1], *(mask.shape[1],) * 2)
            for row, at in enumerate(places):
                whole[row, :, at[:, None], at] = parts[row][0]
            return whole

        return Expected(
            spread([run.logits for run in runs]),
            [spread(list(parts)) for parts in zip(*(run.hidden_states for run in runs), strict=True)],
            {layer: spread_pattern([run.attentions[layer] for run in runs]) for layer in runs[0].attentions},
            {layer: torch.cat([run.states[layer] for run in runs]) for layer in runs[0].states},
        )

    def generated(self) -> Tensor:
        """What transformers continues the left-padded batch with, greedily and with a cache, in float64. [batch, NEW]."""
        tokens, mask, _ = batch("left")
        self.theirs.generation_config.eos_token_id = None  # nothing ends a text before its time
        options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
        with all_double(self.case.model):
            if self.case.padding:
                return self.theirs.generate(tokens, attention_mask=mask.long(), **options)[:, -NEW:]
            texts = [row[real][None] for row, real in zip(tokens, mask, strict=True)]
            return torch.cat([self.theirs.generate(text, **options)[:, -NEW:] for text in texts])

    def state_of_ours(self, state: Any, layer: int, like: Tensor) -> Tensor:
        """Our state of a layer. Ours has keys before values, turned round where theirs has not; and its heads apart."""
        own = state.slot(layer, "state")
        if own.dim() > like.dim():
            return own.flatten(1, 2)
        return own if own.shape == like.shape else own.transpose(-1, -2)

    def single(self) -> Any:
        """The reference in float32 as it comes."""
        return type(self.theirs).from_pretrained(self.folder, dtype=torch.float32, attn_implementation="eager").eval()


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
