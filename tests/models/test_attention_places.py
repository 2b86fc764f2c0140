"""Parts that say where tokens stand, against their equations written again: layouts, times, graphs, positions digit by digit. Float64."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models.attention.digit_positions import DigitPositionConfig
from models.attention.graph import GraphDistanceConfig, shortest_paths
from models.attention.layout import LayoutScoreConfig
from models.attention.ngram import ValuesOnlyConfig
from models.attention.site import AttentionConfig
from models.attention.time_rotary import TimeRopeConfig
from tests.models.test_attention_compositions import with_weights_of
from tests.models.test_attention_parts import EXACT, LENGTH, built, largest, seen, text

# ------------------------------------------------------------------------------------------------------- layouts and times


def skim(layers: int = 3) -> Any:
    score = LayoutScoreConfig(coordinates=2, grid=20, width=10)
    return built(AttentionConfig(4, position="none", project=ValuesOnlyConfig(), score=score), layers=layers)


def test_one_map_from_the_layout_serves_all_layers() -> None:
    """By loops; words change no weight, places do; an edit of the first layer's scores reaches every layer."""
    model = skim()
    layout = torch.randint(0, 20, (2, LENGTH, 2), generator=torch.Generator().manual_seed(4))
    patterns = model.patterns(text(), facts={"layout": layout})
    assert [name for name, _ in model.named_parameters() if "tables" in name] == ["blocks.0.attn.score.map.tables"]
    own = model.blocks[0].attn.score.map
    e = own.tables[0][layout[1, :, 0]] + own.tables[1][layout[1, :, 1]]
    q, k = own.query(e).view(LENGTH, 4, 6), own.key(e).view(LENGTH, 4, 6)
    for head, i in ((0, 3), (3, 12)):
        row = torch.stack([q[i, head] @ k[j, head] for j in range(i + 1)]) / math.sqrt(6)
        for layer in range(3):
            assert largest(patterns[layer].values[1, head, i, : i + 1] - row.softmax(0)) < EXACT
    others = model.patterns(text().flip(0), facts={"layout": layout})[1].values
    assert torch.equal(others, patterns[1].values)
    line = torch.stack([torch.arange(LENGTH), torch.zeros(LENGTH, dtype=torch.long)], -1)[None]
    assert largest(model(text()) - model(text(), facts={"layout": line})) == 0
    assert largest(model(text()) - model(text(), facts={"layout": layout})) > 1e-4
    flat = [("blocks.0.attn.score.hook_layout_scores", lambda s, hook: 0 * s)]
    even = model.run_with_cache(text(), names="blocks.2.attn.hook_pattern", hooks=flat)[1]
    assert largest(even["blocks.2.attn.hook_pattern"][:, :, -1] - 1 / LENGTH) < EXACT
    with pytest.raises(ValueError, match=r"facts\['layout'\] has shape \(2, 13, 3\); expected"):
        model(text(), facts={"layout": torch.zeros(2, LENGTH, 3)})
    with pytest.raises(ValueError, match=r"A token stands at 20; expected coordinates from 0 to 19"):
        model(text(), facts={"layout": layout + 1})


def test_rotations_by_place_and_time() -> None:
    """Scores as Σ over pairs of |q||k| cos(angle) with the angles of the formula; steady clocks give RoPE; only differences matter."""
    times = torch.tensor([0.0, 0.3, 1, 4, 4.5, 9, 9, 10, 30, 31, 31.5, 40, 77]).double()[None].expand(2, -1)
    for split in ("sum", "pairs", "heads"):
        config = TimeRopeConfig(split, share=0.5, base=100.0, time_base=50.0, unit=2.0)
        model = built(AttentionConfig(4, 2, position=config))
        got = seen(model, "hook_q", "hook_k", "hook_attn_scores", facts={"times": times})
        for head, i, j in ((0, 5, 2), (3, 12, 0), (1, 7, 6), (2, 9, 9)):
            q, k = got["hook_q"][1, i, head], got["hook_k"][1, j, head // 2]
            total = 0.0
            steps, clock = i - j, float(times[1, i] - times[1, j]) / 2
            for pair in range(3):
                if split == "sum":
                    angle = steps * 100 ** (-pair / 3) + clock * 50 ** (-pair / 3)
                elif split == "heads":
                    angle = steps * 100 ** (-pair / 3) if head // 2 == 0 else clock * 50 ** (-pair / 3)
                else:  # two pairs by place, one by time
                    angle = steps * 100 ** (-pair / 2) if pair < 2 else clock
                a, b = complex(q[pair], q[pair + 3]), complex(k[pair], k[pair + 3])
                total += (a * b.conjugate() * complex(math.cos(angle), math.sin(angle))).real
            assert float(got["hook_attn_scores"][1, head, i, j]) == pytest.approx(total / math.sqrt(6), abs=1e-9), split
        there = model(text(), facts={"times": times})
        assert largest(model(text(), facts={"times": times + 500}) - there) < 1e-9
        assert largest(model(text(), facts={"times": times * 1.1}) - there) > 1e-5
        first, state = model(text()[:, :6], return_state=True, facts={"times": times[:, :6]})
        rest = model(text()[:, 6:], state=state, facts={"times": times})
        assert largest(torch.cat([first, rest], 1) - there) < EXACT
        with pytest.raises(ValueError, match=r"facts\['times'\] has shape \(2, 5\); expected \[batch or 1, key\]"):
            model(text(), facts={"times": times[:, :5]})
    rope = built(AttentionConfig(4, position="rope"))
    steady = with_weights_of(built(AttentionConfig(4, position=TimeRopeConfig("heads"))), rope)
    assert largest(steady(text()) - rope(text())) < EXACT  # without times a token's time is its place
    for split in ("heads", "pairs"):
        by_place = with_weights_of(built(AttentionConfig(4, position=TimeRopeConfig(split, share=1.0))), rope)
        assert largest(by_place(text(), facts={"times": times}) - rope(text())) < EXACT
    summed = with_weights_of(built(AttentionConfig(4, position=TimeRopeConfig("sum"))), rope)
    assert largest(summed(text(), facts={"times": 0 * times}) - rope(text())) < EXACT
    with pytest.raises(ValueError, match=r"Unknown split 'head'. Did you mean 'heads'"):
        TimeRopeConfig("head")


# ------------------------------------------------------------------------------------------------------------------ graphs


def test_shortest_paths_are_counted_by_walking() -> None:
    """Against a queue that walks a random graph from every node, edges in one direction included."""
    generator = torch.Generator().manual_seed(2)
    edges = torch.rand(3, 9, 9, generator=generator) < 0.15
    got = shortest_paths(edges)
    assert int(got.max()) > 2 and int(got.min()) == -1
    for graph, paths in zip(edges.tolist(), got.tolist(), strict=True):
        for start in range(9):
            walked, queue = {start: 0}, [start]
            for node in queue:
                for other in range(9):
                    if graph[node][other] and other not in walked:
                        walked[other] = walked[node] + 1
                        queue.append(other)
            assert [walked.get(node, -1) for node in range(9)] == paths[start]


def test_graphormer_reads_graphs() -> None:
    """Biases by distance, cell by cell; nodes in another order give the outputs in that order; a chain is what a text is without facts."""
    model = models.build("graphormer").double()
    generator = torch.Generator().manual_seed(6)
    edges = torch.rand(1, LENGTH, LENGTH, generator=generator) < 0.12
    edges = edges | edges.transpose(1, 2)
    facts = {"graph_distances": shortest_paths(edges), "degrees": edges.sum(-1)}
    assert int(facts["graph_distances"].min()) == -1  # some nodes are apart
    name = "blocks.1.attn.bias.graph_distance.hook_bias"
    _, cache = model.run_with_cache(text(), names=[name, "wiring.hook_degree_embed"], facts=facts)
    table = model.blocks[1].attn.bias["graph_distance"].table
    for i, j in ((0, 0), (3, 8), (12, 4)):
        distance = int(facts["graph_distances"][0, i, j])
        row = 10 if distance < 0 else min(distance, 9)
        assert largest(cache[name][1, :, i, j] - table[row]) == 0
    degrees = facts["degrees"][0].clamp(max=5)
    assert largest(cache["wiring.hook_degree_embed"][1] - model.wiring.table[degrees]) == 0
    order = torch.randperm(LENGTH, generator=generator)
    there = {"graph_distances": shortest_paths(edges[:, order][:, :, order]), "degrees": facts["degrees"][:, order]}
    output = model(text(), facts=facts)
    assert largest(model(text()[:, order], facts=there) - output[:, order]) < EXACT
    assert largest(model(text(), facts={**facts, "degrees": 0 * facts["degrees"]}) - output) > 1e-4
    chain = torch.zeros(1, LENGTH, LENGTH, dtype=torch.bool)
    chain[0, torch.arange(12), torch.arange(1, 13)] = True
    chain = chain | chain.transpose(1, 2)
    as_graph = {"graph_distances": shortest_paths(chain), "degrees": torch.full((1, LENGTH), 2)}
    assert largest(model(text(), facts=as_graph) - model(text())) < EXACT
    with pytest.raises(ValueError, match=r"facts\['graph_distances'\] has shape \(1, 13\) and type torch.int64"):
        model(text(), facts={"graph_distances": torch.zeros(1, LENGTH, dtype=torch.long)})
    with pytest.raises(ValueError, match=r"facts\['degrees'\] has shape \(1, 5\)"):
        model(text(), facts={"degrees": torch.zeros(1, 5, dtype=torch.long)})


def test_graph_distances_go_on_from_a_state() -> None:
    """In a causal site a graph's nodes may be read in pieces."""
    model = built(AttentionConfig(4, position=GraphDistanceConfig(5)), layers=2)
    edges = torch.rand(2, LENGTH, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.2
    distances = shortest_paths(edges)
    whole = model(text(), facts={"graph_distances": distances})
    _, state = model(text()[:, :7], return_state=True, facts={"graph_distances": distances[:, :7, :7]})
    rest = model(text()[:, 7:], state=state, facts={"graph_distances": distances})
    assert largest(rest - whole[:, 7:]) < EXACT
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), text()], 1)
    real = (torch.arange(LENGTH + 3) >= 3).expand(2, -1)
    moved = torch.nn.functional.pad(distances, (3, 0, 3, 0))
    assert largest(model(padded, mask=real, facts={"graph_distances": moved})[:, 3:] - whole) < EXACT


# ------------------------------------------------------------------------------------------------------------------ digits


def code_by_hand(encoder: Any, position: int) -> Tensor:
    """The digits of a number without its leading zeros, then [CLS], through GPT-2-like blocks written out for one sequence."""
    base, count, heads = encoder.config.base, encoder.config.digits, encoder.config.heads
    digits = []
    while position or not digits:
        digits.insert(0, position % base)
        position //= base
    places = range(count - len(digits), count)
    x = torch.stack(
        [encoder.digit[d] + encoder.place[n] for d, n in zip(digits, places, strict=True)] + [encoder.last[0]]
    )
    length, width = x.shape
    for block in encoder.blocks:
        norm = torch.nn.functional.layer_norm(x, (width,), block.norm1.weight, block.norm1.bias)
        both = norm @ block.self_attn.in_proj_weight.T + block.self_attn.in_proj_bias
        q, k, v = (part.view(length, heads, -1).transpose(0, 1) for part in both.chunk(3, dim=-1))
        scores = q @ k.transpose(1, 2) / math.sqrt(width // heads)
        weights = scores.masked_fill(~torch.ones(length, length).tril().bool(), -math.inf).softmax(-1)
        out = block.self_attn.out_proj
        x = x + (weights @ v).transpose(0, 1).reshape(length, width) @ out.weight.T + out.bias
        norm = torch.nn.functional.layer_norm(x, (width,), block.norm2.weight, block.norm2.bias)
        inner = norm @ block.linear1.weight.T + block.linear1.bias
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        x = x + inner @ block.linear2.weight.T + block.linear2.bias
    return encoder.out(x[-1])


def test_positions_are_read_digit_by_digit() -> None:
    """Codes by hand, at positions that a text reaches and far beyond; the term is the match of two codes; layers share one transformer."""
    model = built(AttentionConfig(4, position=DigitPositionConfig(3, 5, width=10, heads=2)), layers=2)
    assert {name.split(".")[1] for name, _ in model.named_parameters() if "encoder" in name} == {"0"}
    first, second = (block.attn.bias["digit_positions"] for block in model.blocks)
    places = torch.tensor([[0, 1, 4, 5, 7, 24, 25, 26, 60, 99, 100, 123, 124]])
    codes = first.encoder(places)
    for number, place in enumerate(places[0].tolist()):
        assert largest(codes[0, number] - code_by_hand(first.encoder, place)) < EXACT, place
    names = ["blocks.0.attn.bias.digit_positions.hook_code", "blocks.1.attn.bias.digit_positions.hook_bias"]
    _, cache = model.run_with_cache(text(), names=names, facts={"positions": places})
    assert largest(cache[names[0]] - codes) < EXACT
    q, k = second.query(codes[0]).view(LENGTH, 4, 6), second.key(codes[0]).view(LENGTH, 4, 6)
    for head, i, j in ((0, 3, 1), (3, 12, 12)):
        expected = float(q[i, head] @ k[j, head]) / math.sqrt(6)
        assert float(cache[names[1]][1, head, i, j]) == pytest.approx(expected, abs=1e-9)
    with pytest.raises(ValueError, match=r"Positions reach from 0 to 125; 3 digits of base 5 tell 0 to 124 apart"):
        model(text(), facts={"positions": places + (places == 124)})
    with pytest.raises(ValueError, match="got fractional facts"):
        model(text(), facts={"positions": places * 0.5})
