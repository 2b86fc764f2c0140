"""What each part of the attention site and each way through the blocks becomes at special settings. docs/attention-parity.md lists them.

Both sides have the same weights. Where a setting is made by an edit, the two differ without it.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.alibi import AlibiConfig
from models.attention.bam import BAMConfig
from models.attention.combiner import CombinerConfig
from models.attention.comparison import AsScoredConfig, ComparisonConfig
from models.attention.compressive import compressive_mixer
from models.attention.cope import CoPEConfig
from models.attention.cross import CrossAttentionConfig, Source
from models.attention.differential import DifferentialConfig
from models.attention.gates import ImportanceConfig, OutputGateConfig
from models.attention.infini import InfiniConfig
from models.attention.landmark import LandmarkConfig
from models.attention.low_rank import SharedBaseConfig
from models.attention.masks import BlockCausalConfig, DocumentsConfig, FixedConfig, PrefixConfig, StridedConfig
from models.attention.nats import NatsConfig
from models.attention.ngram import NGramConfig, ValuesOnlyConfig
from models.attention.normalisers import EmptyRowsConfig, HardConfig, ReluConfig, SinkConfig, TopKConfig
from models.attention.pair_scores import PairScoreConfig
from models.attention.relations import RelationsConfig, SymbolValuesConfig
from models.attention.relative import KeyPreferenceConfig, RelativeConfig, RelativeEmbeddingConfig
from models.attention.rotary import QKNormConfig, RopeConfig, SSMaxConfig
from models.attention.routing import RoutingConfig
from models.attention.site import Attention, AttentionConfig
from models.attention.t5 import T5BiasConfig
from models.attention.talking_heads import TalkingScoresConfig, TalkingWeightsConfig
from models.attention.transformer_xl import RecentSegmentsConfig, TransformerXLConfig
from models.attention.value_alignment import ValueAlignmentConfig
from models.depth.halting import ACTConfig, PonderConfig
from models.depth.hierarchical import HierarchicalConfig
from models.depth.looped import LoopedConfig
from models.parts.rope_scaling import RopeScaling
from tests.models.attention_sites import HEADS, LENGTH, WIDTH, context, largest, model, out, site, stream, tokens

EXACT = 1e-10
Edit = Callable[[Any], Any]


def attention(**changes: Any) -> AttentionConfig:
    return AttentionConfig(HEADS, **{"position": "none", **changes})


def rope(scaling: RopeScaling | None = None) -> AttentionConfig:
    return attention(position=RopeConfig(scaling=scaling))


PLAIN, BOTH_WAYS = attention(), attention(causal=False)
TRANSFORMER_XL = (KeyPreferenceConfig(), RelativeConfig())

# in this case: the site, what it becomes, and the edit that makes it so, where its settings do not
CASES: dict[str, tuple[AttentionConfig, AttentionConfig, Edit | None]] = {
    "alibi: slopes 0": (attention(position=AlibiConfig()), PLAIN, lambda s: s.bias["alibi"].slopes.zero_()),
    "t5: one number for all buckets": (
        attention(position=T5BiasConfig(8, 16)),
        PLAIN,
        lambda s: s.bias["t5"].table.fill_(0.7),
    ),
    "relative: no weights": (
        attention(position=TRANSFORMER_XL),
        PLAIN,
        lambda s: (s.bias["key_preference"].u.zero_(), s.bias["relative"].project.weight.zero_()),
    ),
    "key_preference: a query of its own": (
        attention(position=KeyPreferenceConfig(), bias=("query",)),
        attention(bias=("query",)),
        lambda s: (s.query.bias.add_(s.bias["key_preference"].u.flatten()), s.bias["key_preference"].u.zero_()),
    ),
    "relative_embedding: no vectors": (
        attention(position=RelativeEmbeddingConfig(6)),
        PLAIN,
        lambda s: s.bias["relative_embedding"].table.zero_(),
    ),
    "cope: no vectors": (attention(position=CoPEConfig(8)), PLAIN, lambda s: s.bias["cope"].table.zero_()),
    "bam: shape 0": (attention(position=BAMConfig()), PLAIN, lambda s: s.bias["bam"].shape.zero_()),
    "rope_scaling: linear by 1": (rope(RopeScaling("linear", 1.0)), rope(), None),
    "rope_scaling: dynamic within its context": (rope(RopeScaling("dynamic", 4.0, LENGTH)), rope(), None),
    "rope_scaling: yarn by 1": (rope(RopeScaling("yarn", 1.0, 16)), rope(), None),
    "rope_scaling: llama3 by 1": (rope(RopeScaling("llama3", 1.0, 16)), rope(), None),
    "rope_scaling: longrope of ones": (
        rope(RopeScaling("longrope", 1.0, 16, short_factors=(1.0,) * 4, long_factors=(1.0,) * 4)),
        rope(),
        None,
    ),
    "strided: stride 1": (attention(mask=StridedConfig(1, split=False)), PLAIN, None),
    "strided: stride of the text": (attention(mask=StridedConfig(LENGTH, split=False)), PLAIN, None),
    "fixed: one block": (attention(mask=FixedConfig(LENGTH, split=False)), PLAIN, None),
    "fixed: blocks that are all summary": (attention(mask=FixedConfig(3, 3, split=False)), PLAIN, None),
    "prefix: none": (attention(mask=PrefixConfig(0)), PLAIN, None),
    "prefix: the whole text": (attention(mask=PrefixConfig(LENGTH)), BOTH_WAYS, None),
    "block_causal: blocks of one": (attention(mask=BlockCausalConfig(1)), PLAIN, None),
    "block_causal: one block": (attention(mask=BlockCausalConfig(LENGTH)), BOTH_WAYS, None),
    "recent_segments: segments of one": (attention(mask=RecentSegmentsConfig(1, 3)), attention(window=4), None),
    "recent_segments: one segment": (attention(mask=RecentSegmentsConfig(LENGTH, 0)), PLAIN, None),
    "transformer_xl: one segment": (
        TransformerXLConfig(HEADS, mask=RecentSegmentsConfig(LENGTH, 0)),
        attention(position=TRANSFORMER_XL),
        None,
    ),
    "routing: one cluster": (attention(mask=RoutingConfig(1)), PLAIN, None),
    "sink: far below all scores": (
        attention(normalise=SinkConfig()),
        PLAIN,
        lambda s: s.normalise.logit.fill_(-1e4),
    ),
    "top_k: all tokens": (attention(normalise=TopKConfig(LENGTH)), PLAIN, None),
    "top_k: one token": (attention(normalise=TopKConfig(1)), attention(normalise=HardConfig()), None),
    "hard: scores a million times as large": (
        attention(bias=False),
        attention(bias=False, normalise=HardConfig()),
        lambda s: s.query.weight.mul_(1e6),
    ),
    "empty_rows: no empty row": (attention(normalise=EmptyRowsConfig()), PLAIN, None),
    "landmark: within the first block": (attention(normalise=LandmarkConfig(LENGTH)), PLAIN, None),
    "landmark: every block retrieved": (
        attention(normalise=LandmarkConfig(2, retrieve=9)),
        attention(normalise=LandmarkConfig(2)),
        None,
    ),
    "combiner: segments of one": (attention(normalise=CombinerConfig(1)), PLAIN, None),
    "combiner: segments of one, largest": (attention(normalise=CombinerConfig(1, "max")), PLAIN, None),
    "combiner: one segment": (attention(normalise=CombinerConfig(LENGTH)), PLAIN, None),
    "importance: alike": (
        attention(reweight=ImportanceConfig()),
        PLAIN,
        lambda s: s.reweight["importance"].weigh.weight.zero_(),
    ),
    "relations: weigh nothing": (
        attention(project=SymbolValuesConfig(2, 5), mix=RelationsConfig(2)),
        attention(project=SymbolValuesConfig(2, 5)),
        lambda s: s.mix["relations"].combine.zero_(),
    ),
}


def twins(first: AttentionConfig, second: AttentionConfig) -> tuple[Attention, Attention]:
    """Both sites, the second with what it shares of the first's weights."""
    one, two = site(first), site(second)
    shared = {name: value for name, value in one.state_dict().items() if name in two.state_dict()}
    two.load_state_dict(shared)
    return one, two


@pytest.mark.parametrize("name", CASES)
def test_special_settings(name: str) -> None:
    first, second, edit = CASES[name]
    one, two = twins(first, second)
    x = stream()
    assert largest(out(two, x)) > 0.1
    if edit is None:
        assert first != second
    else:
        assert largest(out(one, x) - out(two, x)) > 1e-3
        edit(one)
        if name.startswith("key_preference"):  # u·k is what a query bias u adds to the scores
            two.query.bias.copy_(one.query.bias)
    assert largest(out(one, x) - out(two, x)) < EXACT


# ------------------------------------------------------------------------------------------------- patterns of one layer

AT = "blocks.0.attn."


def pattern(ours: Any, text: Tensor | None = None, hooks: Any = (), **options: Any) -> Tensor:
    text = tokens() if text is None else text
    return ours.run_with_cache(text, names="blocks.0.*.hook_pattern", hooks=hooks, **options)[1]["pattern", 0]


def uniform(length: int = LENGTH) -> Tensor:
    """Every token reads the past and itself alike."""
    return torch.ones(length, length).double().tril() / torch.arange(1, length + 1)[:, None]


def test_what_knows_nothing_reads_alike() -> None:
    """SSMax with strength 0, n-gram heads of order 0, and networks of pairs that are blind to keys: uniform rows."""
    sharp = model(attention(position=SSMaxConfig()))
    assert largest(pattern(sharp) - uniform()) > 0.01
    sharp.blocks[0].attn.rotate["ssmax"].s.zero_()
    assert largest(pattern(sharp) - uniform()) < EXACT
    parts = {"project": ValuesOnlyConfig(), "normalise": EmptyRowsConfig()}
    ngram = model(attention(score=NGramConfig((0, 0, 1, 1)), **parts))
    assert largest(pattern(ngram)[:, :2] - uniform()) < EXACT
    blind = model(attention(score=PairScoreConfig(6)))
    assert largest(pattern(blind) - uniform()) > 1e-3
    blind.blocks[0].attn.score.first_key.weight.zero_()
    assert largest(pattern(blind) - uniform()) < EXACT


def test_an_ngram_head_of_order_one_is_an_induction_head() -> None:
    """On a repeated text without repeats inside, every token of the copy reads the one behind its first occurrence."""
    parts = {"project": ValuesOnlyConfig(), "normalise": EmptyRowsConfig()}
    ngram = model(attention(score=NGramConfig((1,) * HEADS), **parts))
    text = torch.randperm(20, generator=torch.Generator().manual_seed(0))[None, :7].repeat(1, 2)
    expected = torch.zeros(14, 14).double()
    expected[range(7, 14), range(1, 8)] = 1
    assert largest(pattern(ngram, text) - expected) == 0


def test_relu_weights_are_nonnegative_scores_shared_out() -> None:
    """Where all scores are positive, weights times the number of visible tokens are the scores themselves."""
    ours = model(attention(normalise=ReluConfig()))

    def lift(scores: Tensor, hook: object) -> Tensor:
        return scores.masked_fill(scores.isfinite(), 0) + scores.abs()

    kept: list[Tensor] = []
    hooks = [(AT + "hook_attn_scores", lift), (AT + "hook_attn_scores", lambda s, hook: kept.append(s))]
    weights = pattern(ours, hooks=hooks)
    counts = torch.arange(1, LENGTH + 1)[:, None]
    lower = torch.ones(LENGTH, LENGTH).tril().bool()
    assert largest((weights * counts - kept[0])[..., lower]) < EXACT


def test_norms_of_queries_and_keys_forget_their_size() -> None:
    ours = model(attention(position="rope", qk_norm=QKNormConfig(eps=0.0), bias=False))
    before = pattern(ours)
    for linear, factor in ((ours.blocks[0].attn.query, 3.0), (ours.blocks[0].attn.key, 0.2)):
        linear.weight.mul_(factor)
    assert largest(pattern(ours) - before) < EXACT


def test_a_gate_of_zeros_halves() -> None:
    """σ(0) = ½; a gate that is held open is no gate."""
    gated, two = model(attention(post=OutputGateConfig(), bias=False)), model(attention(bias=False))
    two.load_state_dict({name: value for name, value in gated.state_dict().items() if "gate" not in name})
    point = AT + "post.output_gate.hook_gate"
    opened = gated.run_with_hooks(tokens(), hooks=[(point, lambda gate, hook: torch.ones_like(gate))])
    assert largest(opened - two(tokens())) < EXACT
    gated.blocks[0].attn.post["output_gate"].gate.weight.zero_()
    names = "blocks.0.hook_attn_out"
    half, whole = (each.run_with_cache(tokens(), names=names)[1][names] for each in (gated, two))
    assert largest(2 * half - whole) < EXACT


def test_pairs_of_maps_in_either_order() -> None:
    """Maps (2h, 2h + 1) are maps (h, h + H) with rows of the projections in another order."""
    adjacent = site(AttentionConfig(HEADS, position="rope", bias=False, reweight=DifferentialConfig("adjacent")))
    halves = site(AttentionConfig(HEADS, position="rope", bias=False, reweight=DifferentialConfig("halves")))
    order = torch.arange(2 * HEADS).view(HEADS, 2).T.flatten()
    halves.load_state_dict(adjacent.state_dict())
    assert largest(out(adjacent, stream()) - out(halves, stream())) > 0.1
    for name in ("query", "key"):
        weight = getattr(adjacent, name).weight.unflatten(0, (2 * HEADS, -1))
        getattr(halves, name).weight.copy_(weight[order].flatten(0, 1))
    assert largest(out(adjacent, stream()) - out(halves, stream())) < EXACT


def test_a_shared_base_without_updates_leaves_one_map() -> None:
    """Both maps are then equal, and their difference is (1 − λ) of either."""
    parts = {"reweight": DifferentialConfig(), "project": SharedBaseConfig(3)}
    ours = model(AttentionConfig(HEADS, position="rope", bias=False, **parts))
    for name in ("query", "key"):
        getattr(ours.blocks[0].attn, name).up.zero_()
    names = [AT + name for name in ("hook_raw_pattern", "hook_pattern", "reweight.differential.hook_lambda")]
    _, cache = ours.run_with_cache(tokens(), names=names)
    raw, difference, weight = (cache[name] for name in names)
    assert largest(raw[:, 0::2] - raw[:, 1::2]) < EXACT
    assert largest(difference - (1 - weight.transpose(1, 2)) * raw[:, 0::2]) < EXACT


def test_tokens_of_one_type() -> None:
    """NAtS with all tokens global, or local and none global behind the first, is full attention; all sliding, a window."""
    parts: dict[str, Any] = {"position": "rope", "n_key_value_heads": 2}
    ours, full = model(attention(normalise=NatsConfig(3), **parts)), model(attention(**parts))
    window = model(attention(window=4, **parts))
    for two in (full, window):
        two.load_state_dict({name: value for name, value in ours.state_dict().items() if "choose" not in name})
    free = ours(tokens())
    for kind, two in ((0, full), (1, full), (2, window)):

        def force(types: Tensor, hook: object, kind: int = kind) -> Tensor:
            return F.one_hot(torch.full(types.shape[:-1], kind), 3).to(types)

        got = ours.run_with_hooks(tokens(), hooks=[(AT + "normalise.hook_type", force)])
        assert largest(got - two(tokens())) < EXACT < largest(got - free)


def test_one_document_is_a_text() -> None:
    ours, full = model(attention(mask=DocumentsConfig())), model(attention())
    full.load_state_dict(ours.state_dict())
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    assert largest(ours(tokens(), facts={"documents": ids}) - full(tokens())) < EXACT


def test_a_source_that_is_the_text_itself() -> None:
    """Cross-attention to what the queries come from is attention in both directions."""
    cross, both = twins(CrossAttentionConfig(HEADS), BOTH_WAYS)
    x, here = stream(), context()
    here.facts = {"source": Source(x)}
    assert largest(cross((x, x, x), here, None)[0] - out(both, x)) < EXACT


# ------------------------------------------------------------------------------------------------------------- memories


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_infini_with_a_closed_gate_is_attention_within_segments(update: str) -> None:
    """With one segment it is ordinary rotary attention; with an open gate the first segment reads nothing."""
    for segment in (LENGTH, 4):
        ours = model(InfiniConfig(HEADS, segment, update))
        two = model(attention(position="rope", bias=False, mask=RecentSegmentsConfig(segment, 0)))
        weights = {name.replace(".mixer.", ".attn."): value for name, value in ours.state_dict().items()}
        two.load_state_dict({name: value for name, value in weights.items() if not name.endswith("gate")})
        assert largest(ours(tokens()) - two(tokens())) > 1e-3
        ours.blocks[0].mixer.gate.fill_(-1e3)
        assert largest(ours(tokens()) - two(tokens())) < EXACT
        ours.blocks[0].mixer.gate.fill_(1e3)
        assert largest(pattern(ours)[..., : min(4, segment), :]) == 0


EFFECTIVE: dict[str, Any] = {
    "attention": attention(position="rope"),
    "groups": AttentionConfig(HEADS, 2, position="rope"),
    "window": attention(window=3),
    "t5": attention(position=T5BiasConfig(8, 16)),
    "differential": AttentionConfig(HEADS, d_head=4, position="rope", reweight=DifferentialConfig()),
    "importance": attention(reweight=ImportanceConfig()),
    "sink": attention(normalise=SinkConfig()),
    "relu": attention(normalise=ReluConfig()),
    "ngram": attention(project=ValuesOnlyConfig(), score=NGramConfig((0, 1, 1, 2)), normalise=EmptyRowsConfig()),
    "landmark": attention(normalise=LandmarkConfig(2)),
    "combiner": attention(normalise=CombinerConfig(3)),
    "nats": attention(normalise=NatsConfig(2)),
    "routing": attention(mask=RoutingConfig(2)),
    "talking heads": attention(position=TalkingScoresConfig(), reweight=TalkingWeightsConfig()),
    "aligned values": attention(reweight=ValueAlignmentConfig(WIDTH // HEADS)),
    "likeness and closeness": attention(score=ComparisonConfig(), normalise=AsScoredConfig()),
    "transformer_xl": TransformerXLConfig(HEADS, mask=RecentSegmentsConfig(3, 2)),
    "compressed": compressive_mixer(HEADS, segment=2, memory=2, slots=2, rate=2),
    "infini, linear": InfiniConfig(HEADS, 3),
    "infini, delta": InfiniConfig(HEADS, 3, "delta"),
}


@pytest.mark.parametrize("name", EFFECTIVE)
def test_the_pattern_is_what_comes_out_for_values_of_an_identity_matrix(name: str) -> None:
    """Eight tokens whose values are the rows of an identity: z of every head is its pattern, whichever path computed it."""
    ours, text = model(EFFECTIVE[name]), tokens(WIDTH // HEADS, vocabulary=5)
    expected = pattern(ours, text)

    def identity(values: Tensor, hook: object) -> Tensor:
        return torch.eye(*values.shape[1::2]).double()[None, :, None].expand_as(values)

    kept = ours.run_with_cache(text, names="blocks.0.*.hook_z", hooks=[("blocks.0.*.hook_v", identity)])[1]
    assert largest(kept["z", 0].transpose(1, 2)[..., : text.shape[1]] - expected) < EXACT < largest(expected) / 2


# ---------------------------------------------------------------------------------------------------------------- depth

STACK = attention(position="rope", bias=False)


def stacks(wiring: Any, layers: int = 2, **more: Any) -> tuple[Any, Any]:
    """A model of this wiring, and the same blocks one after the other."""
    ours, plain = model(STACK, layers, wiring=wiring, **more), model(STACK, layers, **more)
    plain.load_state_dict({name: value for name, value in ours.state_dict().items() if not name.startswith("wiring.")})
    return ours, plain


def test_a_token_that_halts_at_once_passes_the_blocks_once() -> None:
    """ACT and exits whose first step takes all weight, and exits of the first step alone: the plain stack."""
    ours, plain = stacks(ACTConfig(steps=3, halt_bias=0.0))
    silent = [("wiring.hook_step_embed", lambda x, hook: 0 * x)]
    assert largest(ours.run_with_hooks(tokens(), hooks=silent) - plain(tokens())) > 1e-3
    ours.wiring.halt.weight.zero_()
    ours.wiring.halt.bias.fill_(50.0)
    assert largest(ours.run_with_hooks(tokens(), hooks=silent) - plain(tokens())) < EXACT
    for exit_ in ("average", "quantile"):
        ours, plain = stacks(PonderConfig(steps=3, exit=exit_))
        ours.wiring.score[2].weight.zero_()
        ours.wiring.score[2].bias.fill_(50.0)
        assert largest(ours(tokens()) - plain(tokens())) < EXACT
        ours.wiring.score[2].bias.fill_(-50.0)  # nobody stops before the last step
        looped = model(STACK, 2, loops=3)
        looped.load_state_dict(plain.state_dict())
        assert largest(ours(tokens()) - looped(tokens())) < EXACT


def test_a_loop_that_runs_once_is_a_stack() -> None:
    for inject in ("none", "add"):  # what is added to the first run is zero
        ours, plain = stacks(LoopedConfig(times=1, before=1, after=1, inject=inject), 4)
        assert largest(ours(tokens()) - plain(tokens())) < EXACT
    assert largest(stacks(LoopedConfig(times=2, before=1, after=1), 4)[0](tokens()) - plain(tokens())) > 1e-3


def test_one_cycle_of_one_step_from_zeros_is_a_stack() -> None:
    """low(x), then high of its output: HRM with one run of either level."""
    ours, plain = stacks(HierarchicalConfig(low=1, cycles=1, steps=1), 3, norm="rms", norm_placement="after")
    assert largest(ours(tokens()) - plain(tokens())) > 1e-3
    ours.wiring.start_low.zero_()
    ours.wiring.start_high.zero_()
    assert largest(ours(tokens()) - plain(tokens())) < EXACT
