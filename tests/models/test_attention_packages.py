"""Parts of the attention site and ways through the blocks against packages of single papers (dependency group `parity`), in float64.

The dual attention package is its authors'. The others are by others, and differ from their papers where a test says so.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models.attention.infini import InfiniConfig
from models.attention.relations import RelationsConfig, SymbolValuesConfig
from models.attention.routing import RoutingConfig
from models.attention.site import AttentionConfig
from models.depth.hierarchical import HierarchicalConfig
from models.mixers import build_mixer
from tests.models.attention_sites import (
    HEADS,
    VOCABULARY,
    WIDTH,
    context,
    heads_first,
    lively,
    model,
    out,
    site,
    stream,
    tokens,
)
from tests.models.conftest import Agrees

D_HEAD = WIDTH // HEADS


def installed(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed (dependency group 'parity')")


# ---------------------------------------------------------------------------------------------------------- dual attention


@pytest.mark.parametrize("symmetric", [False, True])
def test_dual_attention_is_its_authors(symmetric: bool, agrees: Agrees) -> None:
    """Two ordinary and two relational heads, four relations. Theirs have an output projection each, ours one of two blocks."""
    module = installed("dual_attention.dual_attention")
    symbolic = installed("dual_attention.symbol_retrieval")
    parts: dict[str, Any] = {
        "project": SymbolValuesConfig(heads=2, symbols=7, symbol_heads=2),
        "mix": RelationsConfig(heads=2, relations=4, d_relation=4, symmetric=symmetric),
    }
    layer = site(AttentionConfig(HEADS, position="none", bias=False, **parts))
    options = {"n_relations": 4, "symmetric_rels": symmetric}
    theirs = module.DualAttention(WIDTH, 2, 2, dropout=0.0, ra_kwargs=options).double().requires_grad_(False)
    symbols = symbolic.SymbolicAttention(WIDTH, n_heads=2, n_symbols=7).double().requires_grad_(False)
    value, mix = layer.value, layer.mix["relations"]
    symbols.q_proj.load_state_dict(value.look_up.state_dict())
    symbols.template_features.copy_(value.templates)
    symbols.symbol_library.copy_(value.library)
    half, sensory, relational = WIDTH // 2, theirs.self_attention, theirs.relational_attention
    for own, first, second in (
        (layer.query, sensory.wq, relational.wq_attn),
        (layer.key, sensory.wk, relational.wk_attn),
        (layer.value, sensory.wv, relational.wv),
    ):
        first.weight.copy_(own.weight[:half])
        second.weight.copy_(own.weight[half:])
    relational.wq_rel.weight.copy_(mix.query.weight)
    relational.wk_rel.weight.copy_((mix.key or mix.query).weight)
    relational.wr.copy_(mix.combine.transpose(1, 2))
    layer.output.weight[:half, half:] = 0
    layer.output.weight[half:, :half] = 0
    sensory.wo.weight.copy_(layer.output.weight[:half, :half])
    relational.wo.weight.copy_(layer.output.weight[half:, half:])
    x = stream()
    agrees(out(layer, x), theirs(x, symbols(x), is_causal=True)[0])


# ---------------------------------------------------------------------------------------------------------------- Infini


@pytest.mark.parametrize("update", ["linear", "delta"])
def test_infini_but_for_its_gate(update: str, agrees: Agrees) -> None:
    """Four segments. Their gate is the share of the segment, ours (and the paper's) of the memory; with no memory yet, theirs is not used.
    Their rotation turns neighbours, so queries' and keys' entries change places."""
    module = installed("infini_transformer_pytorch.infini_transformer")
    layer: Any = lively(build_mixer(InfiniConfig(HEADS, segment=5, update=update), WIDTH, {}))
    theirs = module.CausalAttention(WIDTH, dim_head=D_HEAD, heads=HEADS, use_mem_delta_rule=update == "delta").double()
    theirs.requires_grad_(False)
    theirs.norm = nn.Identity()
    theirs.rotary_emb.freqs.copy_(10000.0 ** (-torch.arange(0, D_HEAD, 2).double() / D_HEAD))
    neighbours = torch.arange(D_HEAD).view(2, -1).T.flatten()
    moved = [
        linear.weight.unflatten(0, (HEADS, -1))[:, neighbours].flatten(0, 1) for linear in (layer.query, layer.key)
    ]
    theirs.to_qkv.weight.copy_(torch.cat([*moved, layer.value.weight]))
    for linear in (layer.output, theirs.to_out):  # heads stay apart
        linear.weight.copy_(torch.eye(WIDTH))
    theirs.fastweight_mem.head_gates.copy_(-layer.gate)
    x, memory, pieces = stream(20), None, []
    for segment in x.split(5, dim=1):
        piece, _, memory = theirs(segment, past_memories=memory, return_new_memories=True)
        pieces.append(piece)
    pieces[0] = (pieces[0].unflatten(-1, (HEADS, -1)) * (1 - layer.gate.sigmoid())[:, None]).flatten(-2)
    agrees(layer(x, context(20), None)[0], torch.cat(pieces, dim=1))


# --------------------------------------------------------------------------------------------------------------- Routing


def clustered(decay: float, same: bool) -> tuple[Any, Tensor]:
    """A routing layer and a stream of 12 tokens, 4 near each of its 3 centroids; keys as queries if they are the `same`."""
    layer = site(AttentionConfig(HEADS, position="none", bias=False, causal=False, mask=RoutingConfig(3, decay)))
    mask: Any = layer.mask
    layer.query.weight.copy_(torch.eye(WIDTH))
    layer.key.weight.copy_(torch.eye(WIDTH) + (not same) * 0.03 * layer.key.weight)
    near = torch.stack([mask.centroids[:, (step + shift) % 3] for step in range(12) for shift in (0, 1)])
    x = 2 * near.view(12, 2, HEADS, D_HEAD).transpose(0, 1).flatten(-2) + 0.05 * stream(12)
    return layer, x


def test_clusters_of_equal_size_are_routed_alike(agrees: Agrees) -> None:
    """Theirs gives each centroid the 4 nearest tokens, ours each token the nearest centroid: the same where both fit. Theirs divides by
    a count of 1 + 10⁻⁵."""
    module = installed("routing_transformer.routing_transformer")
    layer, x = clustered(0.999, same=False)
    theirs = module.KmeansAttention(3, 4, HEADS, D_HEAD, causal=False, shared_qk=False).double().eval()
    theirs.kmeans.means.copy_(layer.mask.centroids)
    theirs.kmeans.initted.fill_(True)
    z = theirs(*heads_first(layer, x))[0] * (1 + 1e-5)
    agrees(out(layer, x), layer.output(z.transpose(1, 2).flatten(2)))


def test_centroids_become_the_means_of_their_members(agrees: Agrees) -> None:
    """Without memory of older means; with it, theirs averages unit vectors and keeps the result as it is, ours makes it one again."""
    module = installed("routing_transformer.routing_transformer")
    layer, x = clustered(0.0, same=True)
    theirs = module.Kmeans(HEADS, D_HEAD, 3, ema_decay=0.0).double()
    theirs.means.copy_(layer.mask.centroids)
    theirs.initted.fill_(True)
    q, k, _ = heads_first(layer, x)
    theirs(torch.cat([q, k], dim=2), update_means=True)
    theirs.update()
    out(layer.train(), x)
    agrees(layer.mask.centroids, theirs.means)


# -------------------------------------------------------------------------------------------------------------------- HRM


class Run(nn.Module):
    """Some blocks of a model as a network of theirs."""

    def __init__(self, model_: Any, layers: range) -> None:
        super().__init__()
        self.run = [model_.blocks[layer] for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        for block in self.run:
            x, _ = block(x, context(x.shape[1]), None)
        return x


class Sum(nn.Module):
    """The sum of what a network reads, as in the paper; theirs joins and projects."""

    def forward(self, hidden: Any, index: int) -> Tensor:
        return sum(hidden[index:])  # type: ignore[return-value]


@pytest.mark.parametrize("gradient", ["full", "last"])
def test_two_levels_take_turns(gradient: str, agrees: Agrees) -> None:
    """Two cycles of three fast runs and a slow one, output and gradients. Theirs starts from zeros, as ours is made to."""
    module = installed("HRM.hrm")
    settings: dict[str, Any] = {"norm": "rms", "norm_placement": "after"}
    wiring = HierarchicalConfig(low=1, cycles=2, steps=3, gradient=gradient)
    ours = model(AttentionConfig(HEADS, position="rope", bias=False), 3, wiring=wiring, **settings)
    ours.wiring.start_low.zero_()
    ours.wiring.start_high.zero_()
    networks = [Run(ours, range(1)), Run(ours, range(1, 3))]
    theirs = module.HRM(networks, dim=WIDTH, num_tokens=VOCABULARY, reasoning_steps=2, relative_period=3).double()
    theirs.hidden_combiners = nn.ModuleList([Sum(), Sum()])
    theirs.requires_grad_(False)
    theirs.to_input_embed.weight.copy_(ours.W_E)
    theirs.to_pred.weight.copy_(ours.unembed.weight)
    weights = [ours.blocks[layer].attn.query.weight.requires_grad_() for layer in (0, 2)]
    expected, got = theirs(tokens(), one_step_grad=gradient == "last")[0], ours(tokens())
    agrees(got, expected)
    for a, b in zip(*(torch.autograd.grad(y.square().mean(), weights) for y in (got, expected)), strict=True):
        agrees(a, b)
