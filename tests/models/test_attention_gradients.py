"""Gradients of every part of the attention site and every way through the blocks against differences (gradcheck, float64), and of the
choices whose gradient is not the derivative of what they give (straight-through)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from models.attention.alibi import AlibiConfig
from models.attention.bam import BAMConfig
from models.attention.combiner import CombinerConfig
from models.attention.comparison import AsScoredConfig, ComparisonConfig
from models.attention.compressive import compressive_mixer
from models.attention.cope import CoPEConfig
from models.attention.cross import CrossAttentionConfig, Source
from models.attention.differential import DifferentialConfig, DifferentialNormConfig
from models.attention.digit_positions import DigitPositionConfig
from models.attention.gates import ImportanceConfig, OutputGateConfig
from models.attention.graph import GraphDistanceConfig
from models.attention.infini import InfiniConfig
from models.attention.kernel_scores import KernelScoreConfig
from models.attention.landmark import LandmarkConfig
from models.attention.layout import LayoutScoreConfig
from models.attention.low_rank import SharedBaseConfig
from models.attention.masks import BlockCausalConfig, DocumentsConfig, FixedConfig, PrefixConfig, StridedConfig
from models.attention.memory_slots import MemorySlotsConfig
from models.attention.nats import NatsConfig
from models.attention.ngram import NGramConfig, ValuesOnlyConfig
from models.attention.normalisers import EmptyRowsConfig, HardConfig, ReluConfig, SinkConfig, TopKConfig
from models.attention.pair_scores import PairScoreConfig
from models.attention.relations import RelationsConfig, SymbolValuesConfig
from models.attention.relative import KeyPreferenceConfig, RelativeConfig, RelativeEmbeddingConfig
from models.attention.rotary import QKNormConfig, SSMaxConfig
from models.attention.routing import RoutingConfig
from models.attention.site import AttentionConfig
from models.attention.slices import SliceConfig
from models.attention.slot_memory import SlotMemoryConfig
from models.attention.t5 import T5BiasConfig
from models.attention.talking_heads import TalkingScoresConfig, TalkingWeightsConfig
from models.attention.time_rotary import TimeRopeConfig
from models.attention.transformer_xl import RecentSegmentsConfig, TransformerXLConfig
from models.attention.value_alignment import ValueAlignmentConfig
from models.configs import config_to_json
from models.context import Context
from models.depth.centrality import CentralityConfig
from models.depth.dense import DenseFormerConfig
from models.depth.halting import ACTConfig, PonderConfig
from models.depth.hierarchical import HierarchicalConfig
from models.depth.hierarchical_text import HierarchicalTextConfig
from models.depth.looped import LoopedConfig
from models.language_model import LanguageModel, LanguageModelConfig
from models.memory_tokens import RecurrentMemory
from models.mixers import build_mixer
from models.parts.knowledge import KnowledgeConfig
from tests.models import attention_table
from tests.models.attention_sites import largest, lively, stream

WIDTH, HEADS, LENGTH = 8, 2, 6


def attention(**changes: Any) -> AttentionConfig:
    return AttentionConfig(HEADS, **{"position": "none", **changes})


DIFFERENTIAL = {"position": "rope", "reweight": DifferentialConfig(), "post": DifferentialNormConfig(), "bias": False}
SITES: dict[str, Any] = {
    "plain": attention(),
    "rope, capped, normed": attention(position="rope", softcap=2.0, qk_norm=QKNormConfig()),
    "ssmax and BAM": attention(position=(SSMaxConfig(), BAMConfig(0.7, 0.3))),
    "alibi and T5": attention(position=(AlibiConfig(), T5BiasConfig(6, 8))),
    "Transformer-XL's": attention(position=(KeyPreferenceConfig(), RelativeConfig())),
    "relative embedding": attention(position=RelativeEmbeddingConfig(4)),
    "CoPE": attention(position=CoPEConfig(3)),
    "differential": attention(**DIFFERENTIAL),
    "shared base": attention(**DIFFERENTIAL, project=SharedBaseConfig(2)),
    "importance and gate": attention(reweight=ImportanceConfig(), post=OutputGateConfig()),
    "slices": attention(bias=False, project=SliceConfig(("key", "value"))),
    "relations": attention(project=SymbolValuesConfig(1, 3), mix=RelationsConfig(1, 2, 3)),
    "n-grams": attention(project=ValuesOnlyConfig(), score=NGramConfig((0, 1)), normalise=EmptyRowsConfig()),
    "pairs": attention(score=PairScoreConfig(4)),
    "kernel": attention(score=KernelScoreConfig(frequencies=3)),
    "kernel, generated": attention(score=KernelScoreConfig("fourier", "generated", frequencies=3)),
    "comparison": attention(score=ComparisonConfig(), normalise=AsScoredConfig()),
    "talking heads": attention(position=TalkingScoresConfig(), reweight=TalkingWeightsConfig()),
    "alignment": attention(reweight=ValueAlignmentConfig(LENGTH)),
    "layout": attention(project=ValuesOnlyConfig(), score=LayoutScoreConfig(grid=LENGTH, width=4)),
    "times": attention(position=TimeRopeConfig()),
    "graph": attention(position=GraphDistanceConfig(3)),
    "digits": attention(position=DigitPositionConfig(2, 3, width=4, heads=2, layers=1)),
    "sink": attention(normalise=SinkConfig()),
    "top-k": attention(normalise=TopKConfig(2)),
    "ReLU": attention(normalise=ReluConfig()),
    "landmark": attention(normalise=LandmarkConfig(1)),
    "landmark, retrieving": attention(normalise=LandmarkConfig(1, retrieve=1)),
    "combiner": attention(normalise=CombinerConfig(2)),
    "combiner, largest": attention(normalise=CombinerConfig(2, "max")),
    "prefix": attention(mask=PrefixConfig(3)),
    "blocks": attention(mask=BlockCausalConfig(2)),
    "documents": attention(mask=DocumentsConfig()),
    "strided": attention(mask=StridedConfig(2)),
    "fixed": attention(mask=FixedConfig(3, 1)),
    "clusters": attention(mask=RoutingConfig(2)),
    "segments": TransformerXLConfig(HEADS, mask=RecentSegmentsConfig(2, 2)),
    "compressed": compressive_mixer(HEADS, segment=2, memory=0, slots=2, rate=2, learned=True),
    "slots": attention(mask=RecentSegmentsConfig(2, 0), mix=SlotMemoryConfig(3, 2)),
    "infini": InfiniConfig(HEADS, 2),
    "infini, delta": InfiniConfig(HEADS, 2, "delta"),
    "cross": CrossAttentionConfig(HEADS),
}
# their gradient is not the derivative of what they give: tests of their own below
NOT_DERIVATIVES: dict[str, Any] = {
    "hard": attention(normalise=HardConfig()),
    "types": attention(normalise=NatsConfig(2)),
}


def call() -> Context:
    """Six tokens that say everything a part may ask for."""
    positions, ids = torch.arange(LENGTH)[None], torch.tensor([[3, 1, 3, 1, 3, 2]]).expand(2, -1)
    facts = {"documents": torch.tensor([[0, 0, 0, 1, 1, 1]]), "source": Source(stream(4, WIDTH, seed=4))}
    return Context(positions, positions, None, None, 0, False, ids, facts)


def built(config: Any) -> Any:
    layer = lively(
        build_mixer(config, WIDTH, {"use_attn_result": False}), std=0.6
    ).eval()  # centroids stay where they are
    if hasattr(layer, "placed"):
        layer.placed(1, [])
    return layer


def run(layer: Any, x: Tensor, weights: dict[str, Tensor] | None = None) -> Tensor:
    """What the layer gives for a stream, with other weights if some are named."""
    given = (x, x, x) if isinstance(layer.config, AttentionConfig) else x
    found: Tensor = torch.func.functional_call(layer, weights or {}, (given, call(), None))[0]
    return found


@pytest.mark.parametrize("name", SITES)
def test_gradients_are_differences(name: str) -> None:
    """With respect to the stream and to every weight."""
    layer = built(SITES[name])
    names, leaves = zip(*layer.named_parameters(), strict=True)
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)

    def output(x: Tensor, *weights: Tensor) -> Tensor:
        return run(layer, x, dict(zip(names, weights, strict=True)))

    x = stream(LENGTH, WIDTH).requires_grad_()
    assert torch.autograd.gradcheck(output, (x, *leaves), fast_mode=True, atol=1e-6)
    assert largest(torch.autograd.grad(output(x, *leaves).square().sum(), x)[0]) > 1e-3


def test_hard_choices_learn_like_the_softmax() -> None:
    """Through the pattern the gradient is the softmax's; what the values get is that of the one token that is read."""
    hard, soft = built(attention(normalise=HardConfig())), built(attention())
    x = stream(LENGTH, WIDTH)
    for layer in (hard, soft):
        layer.value.weight.requires_grad_()
        layer.query.weight.requires_grad_()
    got, plain = run(hard, x), run(soft, x)
    direction = torch.randn(got.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    ours, reference = (
        torch.autograd.grad(y, layer.query.weight, direction, retain_graph=True)[0]
        for y, layer in ((got, hard), (plain, soft))
    )
    assert largest(ours - reference) < 1e-10 < largest(reference) / 1e3
    values, others = (
        torch.autograd.grad(y, layer.value.weight, direction)[0] for y, layer in ((got, hard), (plain, soft))
    )
    assert largest(values - others) > 1e-2


def test_types_learn_like_their_softmax() -> None:
    """NAtS: what the types get is the derivative of a row's weights, which are linear in them; what their logits get is that, through
    the softmax over types. The first token has no choice."""
    config = LanguageModelConfig(1, WIDTH, 5, mixer=attention(normalise=NatsConfig(2)))
    model, text = lively(LanguageModel(config), std=0.6), torch.tensor([[0, 3, 1, 4, 2, 2]])
    at = "blocks.0.attn.normalise.hook_type"
    kept: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any) -> Tensor:
        kept[hook.name] = value
        return value

    model.blocks[0].attn.normalise.choose.weight.requires_grad_()
    loss = model.run_with_hooks(text, hooks=[(at, keep), (f"{at}_logits", keep)]).square().sum()
    types, logits = torch.autograd.grad(loss, [kept[at], kept[f"{at}_logits"]])

    def free(given: Tensor) -> Tensor:
        found: Tensor = model.run_with_hooks(text, hooks=[(at, lambda value, hook: given)])
        return found.square().sum()

    leaf = kept[at].detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(free, leaf, fast_mode=True, atol=1e-6)
    assert largest(torch.autograd.grad(free(leaf), leaf)[0] - types) < 1e-10 < largest(types) / 1e3
    soft = kept[f"{at}_logits"].detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad(soft.softmax(-1)[:, 1:], soft, types[:, 1:])
    assert largest(logits - expected) < 1e-10 < largest(expected) / 1e3


# ---------------------------------------------------------------------------------------------------------------- depth

WIRINGS: dict[str, Any] = {
    "DenseFormer": DenseFormerConfig(),
    "ACT": ACTConfig(steps=3, threshold=0.8, halt_bias=0.0),
    "centrality": CentralityConfig(2),
    "exits": PonderConfig(steps=3, width=4),
    "loop": LoopedConfig(times=2, before=1),
    "two levels": HierarchicalConfig(low=1),
    "two levels of text": HierarchicalTextConfig(low=1),
}
SLOTS = MemorySlotsConfig(HEADS, slots=2, segment=2)
KNOWLEDGE = KnowledgeConfig(entries=6, d_entry=5, d_key=3)


@pytest.mark.parametrize("name", [*WIRINGS, "knowledge", "memory tokens"])
def test_gradients_through_depth_are_differences(name: str) -> None:
    """Of a whole model of three layers with respect to its embedding and the weights of the wiring, of a knowledge base that its layers
    share, or of memory tokens. ACT's tokens keep their step of halting under small changes, as almost all do."""
    more: dict[str, Any] = {"wiring": WIRINGS.get(name)}
    more |= {"knowledge": {"mlp": KNOWLEDGE}, "memory tokens": {"mixer": SLOTS}}.get(name, {})
    kind = RecurrentMemory if name == "memory tokens" else LanguageModel
    model = lively(kind(LanguageModelConfig(3, WIDTH, 5, **{"mixer": attention(), **more})), std=0.5)
    parts = ("embed.W_E", "wiring.", ".mlp.", "first_memory")
    own = {key: value for key, value in model.named_parameters() if any(part in key for part in parts)}
    text = torch.tensor([[0, 3, 1, 4, 2]])

    def output(*weights: Tensor) -> Tensor:
        found: Tensor = torch.func.functional_call(model, dict(zip(own, weights, strict=True)), (text,))
        return found

    leaves = tuple(value.detach().clone().requires_grad_() for value in own.values())
    assert torch.autograd.gradcheck(output, leaves, fast_mode=True, atol=1e-6)
    gradients = torch.autograd.grad(output(*leaves).square().sum(), leaves)
    assert min(largest(gradient) for gradient in gradients) > 1e-6


def kinds(value: Any) -> set[str]:
    """Every `kind` in a stored configuration."""
    if isinstance(value, dict):
        own = {value["kind"]} if "kind" in value else set()
        return own | kinds(list(value.values()))
    return set().union(*map(kinds, value)) if isinstance(value, list) else set()


def test_every_part_is_among_them() -> None:
    """Whatever has a kind in docs/attention-parity.md stands in one of the sites or wirings here."""
    used = set()
    for config in (*SITES.values(), *NOT_DERIVATIVES.values()):
        used |= {part.kind for part in getattr(config, "position_parts", ())}
        used |= kinds(config_to_json(LanguageModelConfig(1, WIDTH, mixer=config)))
    used |= {config.kind for config in (*WIRINGS.values(), KNOWLEDGE, SLOTS)}
    assert attention_table.kinds() - used == {"rope_scaling"}  # other constants in the same rotation
