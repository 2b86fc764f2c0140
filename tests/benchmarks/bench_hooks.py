"""What hook points cost: idle, with one activation cached, with everything cached, beside the same model written without them.

    python -m tests.benchmarks --only hooks

The bare model is ordinary PyTorch (fused attention, `nn.LayerNorm`, `nn.Linear`) on the same weights; its logits must equal ours before
anything is timed. All sides run in turn in one process on one thread; each measured call follows an unmeasured one of the same kind, so
that none profits from its neighbour's caches. A ratio is the median over rounds of the ratios within a round, so that what slows the
machine for a while slows both sides of a pair; its quartiles stand beside it. TransformerLens's bridge stands beside, against
the Hugging Face model that it wraps, as its users meet it.
"""

import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention.site import AttentionConfig
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from tests.benchmarks import Row
from workbench.instrument.interventions import Steer

WIDTH, LAYERS, HEADS, TOKENS, VOCABULARY = 64, 12, 4, 32, 200
MIDDLE = f"blocks.{LAYERS // 2}.hook_resid_post"


class BareAttention(nn.Module):
    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (
            linear(w) for w in (weights.query, weights.key, weights.value, weights.output)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.output(mixed.transpose(1, 2).flatten(-2))


class BareMLP(nn.Module):
    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.inward, self.outward = linear(weights.inward), linear(weights.outward)

    def forward(self, x: Tensor) -> Tensor:
        return self.outward(F.gelu(self.inward(x), approximate="tanh"))


class BareBlock(nn.Module):
    def __init__(self, weights: Any) -> None:
        super().__init__()
        self.ln1, self.ln2 = norm(weights.ln1), norm(weights.ln2)
        self.attn, self.mlp = BareAttention(weights.attn), BareMLP(weights.mlp)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class Bare(nn.Module):
    """GPT-2 as anybody would write it, on the weights of one of our models."""

    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(model.W_E)
        self.pos_embed = nn.Embedding.from_pretrained(model.W_pos)
        self.blocks = nn.ModuleList(BareBlock(block) for block in model.blocks)
        self.ln_final = norm(model.ln_final)
        self.unembed = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.unembed.weight = model.unembed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.pos_embed(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.unembed(self.ln_final(x))


def linear(weights: nn.Linear) -> nn.Linear:
    copy = nn.Linear(weights.in_features, weights.out_features)
    copy.weight, copy.bias = weights.weight, weights.bias
    return copy


def norm(weights: Any) -> nn.LayerNorm:
    copy = nn.LayerNorm(WIDTH, eps=weights.eps)
    copy.weight, copy.bias = weights.w, weights.b
    return copy


def seconds_by_round(sides: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """CPU seconds of each side in every round, measured in turn, each time after an unmeasured call of the same side."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    gc.collect()
    gc.disable()
    try:
        for _ in range(repeats):
            for name, side in sides.items():
                side()
                start = time.process_time()
                side()
                times[name].append(time.process_time() - start)
    finally:
        gc.enable()
    return times


def paired(times: dict[str, list[float]], side: str, other: str) -> tuple[float, str]:
    """(median ratio of two sides within a round, its quartiles and both medians in words)."""
    ratios = [a / b for a, b in zip(times[side], times[other], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    each = " and ".join(f"{statistics.median(times[name]) * 1e3:.3f} ms" for name in (side, other))
    return middle, f"quartiles {low:.3f} to {high:.3f}; {each}"


def require_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Nothing is timed that computes something else."""
    error = float((actual - expected).abs().max() / expected.abs().max())
    if not error < 1e-5:
        raise AssertionError(f"{what}: relative error {error:.1e}, not timed")


def our_rows(model: LanguageModel, bare: nn.Module, tokens: Tensor, repeats: int) -> list[Row]:
    steer = [Steer(MIDDLE, direction=torch.zeros(WIDTH))]
    sides: dict[str, Callable[[], Any]] = {
        "bare": lambda: bare(tokens),
        "idle hooks": lambda: model(tokens),
        "one intervention": lambda: model.run_with_hooks(tokens, hooks=steer),
        "cache one residual stream": lambda: model.run_with_cache(tokens, names=MIDDLE),
        "cache everything": lambda: model.run_with_cache(tokens),
    }
    expected = bare(tokens)
    for name, side in sides.items():
        result = side()
        require_equal(result[0] if isinstance(result, tuple) else result, expected, name)
    goals = {"idle hooks": 1.02, "cache everything": 1.3}
    times = seconds_by_round(sides, repeats)
    entries = len(sides["cache everything"]()[1])
    rows = []
    for name in sides:
        if name != "bare":
            ratio, words = paired(times, name, "bare")
            note = f"{words}{f', {entries} activations' if name == 'cache everything' else ''}"
            rows.append(Row(f"{name} / bare", ratio, goals.get(name), note=note))
    return rows


def peer_rows(ours: LanguageModel, tokens: Tensor, repeats: int) -> list[Row]:
    """TransformerLens's bridge around a Hugging Face GPT-2 of the same size, and our cache beside its cache."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, attn_implementation="eager"
    )
    wrapped, alone = (GPT2LMHeadModel(config).eval() for _ in range(2))
    alone.load_state_dict(wrapped.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        wrapped.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, hf_model=wrapped, device="cpu")
    require_equal(bridge(tokens), alone(tokens).logits, "the bridge")
    sides: dict[str, Callable[[], Any]] = {
        "Hugging Face": lambda: alone(tokens).logits,
        "bridge forward": lambda: bridge(tokens),
        "bridge cache everything": lambda: bridge.run_with_cache(tokens),
        "our cache everything": lambda: ours.run_with_cache(tokens),
    }
    times = seconds_by_round(sides, repeats)
    pairs = [
        ("bridge forward", "Hugging Face"),
        ("bridge cache everything", "Hugging Face"),
        ("bridge cache everything", "our cache everything"),
    ]
    found = {pair: paired(times, *pair) for pair in pairs}
    return [Row(f"TransformerLens 4.3 {a} / {b}", ratio, note=words) for (a, b), (ratio, words) in found.items()]


@torch.no_grad()
def run(repeats: int = 150, peers: bool = True) -> list[Row]:
    config = LanguageModelConfig(LAYERS, WIDTH, VOCABULARY, 64, AttentionConfig(HEADS), MLPConfig(4 * WIDTH))
    model = LanguageModel(config).eval()
    tokens = torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    rows = our_rows(model, Bare(model), tokens, repeats)
    return rows + (peer_rows(model, tokens, repeats // 3) if peers else [])
