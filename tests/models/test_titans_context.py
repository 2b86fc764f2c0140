"""Titans MAC against a loop over tokens with automatic differentiation; edits inside it, what only reports, and its attention rows."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models.context import Context
from models.recurrent.titans_context import TitansContext, TitansContextConfig
from workbench.instrument.errors import ReadOnlyHookPoint

LENGTH, HEADS, WIDTH = 17, 3, 4
EXACT = 1e-11


def mixer(**changes: Any) -> TitansContext:
    """Segments of 5, blocks of 3, two learned tokens; every parameter random."""
    config = TitansContextConfig(HEADS, every=3, max_step=0.7, segment=5, n_persistent=2)
    made = TitansContext(dataclasses.replace(config, **changes), HEADS * WIDTH, {}).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.6 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def inputs() -> Tensor:
    return torch.randn(1, LENGTH, HEADS * WIDTH, generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def context(length: int) -> Context:
    places = torch.arange(length)[None]
    return Context(places, places, None, None, 0, True)


def answer(weights: list[Tensor], x: Tensor) -> Tensor:
    """x + LN(GELU(x W_1) W_2), or x W for a matrix."""
    if len(weights) == 1:
        return x @ weights[0]
    return x + F.layer_norm(F.gelu(x @ weights[0]) @ weights[1], x.shape[-1:], eps=1e-6)


def unit(u: Tensor) -> Tensor:
    return u / u.norm()


def per_head(layer: Any, u: Tensor) -> Tensor:
    return layer(u).view(HEADS, WIDTH)


def written_out(made: TitansContext, x: Tensor, edits: dict[tuple[str, int], float]) -> tuple[Tensor, Tensor, Tensor]:
    """(output [pos, d_model], y [pos, head, width], final memory [head, row, column]), one token and head at a time.

    edits: {("h" or "y", token): factor}, what is retrieved, or what attention read, at that token times the factor.
    """
    config, memory = made.config, made.memory
    first = memory.first if memory.first is not None else torch.zeros(HEADS, WIDTH, WIDTH, dtype=torch.float64)
    packed = [w.detach() for w in first]
    weights = [[w] if config.depth == 1 else [w[:WIDTH], w[WIDTH:].T] for w in packed]
    momentum = [[torch.zeros_like(part) for part in head] for head in weights]
    start, anchor = weights, weights
    retrieved, read, projected, answers = [], [], [], []
    for t in range(LENGTH):
        begin = t - t % config.segment
        start = weights if t == begin else start
        anchor = weights if t % config.every == 0 else anchor
        asked = F.silu(per_head(made.retrieve, x[t]))
        h = torch.stack([answer(start[n], unit(asked[n])) for n in range(HEADS)]) * edits.get(("h", t), 1.0)
        retrieved.append(h.flatten())
        sources = [*retrieved[begin:], *x[begin : t + 1]]
        y = []
        for n in range(HEADS):
            q = per_head(made.query, x[t])[n]
            keys = torch.stack([*made.persistent_key[:, n], *(per_head(made.key, u)[n] for u in sources)])
            values = torch.stack([*made.persistent_value[:, n], *(per_head(made.value, u)[n] for u in sources)])
            y.append((keys @ q / WIDTH**0.5).softmax(0) @ values)
        read.append(torch.cat(y) * edits.get(("y", t), 1.0))
        projected.append(memory.input(read[-1]))
        taps = config.d_conv
        mixed = sum(memory.conv[:, taps - 1 - i] * projected[t - i] for i in range(min(taps, t + 1)))
        queries, keys, values = F.silu(mixed).view(3, HEADS, WIDTH)
        step = 0.7 * torch.sigmoid(memory.step(read[-1]))
        kept = 1 - torch.sigmoid(memory.decay(read[-1]) + memory.decay_bias)
        onward = torch.sigmoid(memory.momentum(read[-1]))
        after, z = [], []
        for n in range(HEADS):
            at = [part.detach().clone().requires_grad_() for part in anchor[n]]
            with torch.enable_grad():
                error = 0.5 * (answer(at, unit(keys[n]).detach()) - values[n].detach()).square().sum()
                gradient = torch.autograd.grad(error, at)
            momentum[n] = [onward[n] * m - step[n] * g for m, g in zip(momentum[n], gradient, strict=True)]
            after.append([kept[n] * w + m for w, m in zip(weights[n], momentum[n], strict=True)])
            z.append(answer(after[n], unit(queries[n])))
        weights = after
        answers.append(torch.cat(z))
    y = torch.stack(read)
    mixed = made.attention_norm(y) * torch.sigmoid(made.memory_norm(torch.stack(answers)))
    last = torch.stack([w[0] if len(w) == 1 else torch.cat([w[0], w[1].T]) for w in weights])
    return made.output(mixed * F.silu(made.gate(x))), y.view(LENGTH, HEADS, WIDTH), last


@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
def test_the_layer_is_the_loop_over_tokens(depth: int) -> None:
    made, x = mixer(depth=depth), inputs()
    output, slots = made(x, context(LENGTH), None)
    expected, _, last = written_out(made, x[0], {})
    assert (output[0] - expected).abs().max() < EXACT * expected.abs().max()
    assert (slots["state"][0] - last).abs().max() < EXACT * last.abs().max()


@pytest.mark.parametrize("edits", [{("h", 2): 0.3}, {("y", 3): -1.0}, {("h", 6): 0.0, ("y", 9): 2.0, ("y", 16): 0.5}])
@torch.no_grad()
def test_edits_reach_later_segments(edits: dict[tuple[str, int], float]) -> None:
    """As if the number had been another one in the loop: the rest of the segment and what later ones retrieve follow."""
    made = mixer()
    model = models.build("titans-mac", d_model=HEADS * WIDTH, mixer=made.config).double()
    block = model.blocks[1]
    block.mixer.load_state_dict(made.state_dict())
    names = {"h": "blocks.1.mixer.hook_retrieved", "y": "blocks.1.mixer.hook_y"}
    hooks = [(f"{names[what]}[{t}]", lambda u, hook, factor=factor: factor * u) for (what, t), factor in edits.items()]
    tokens = torch.randint(0, 256, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    wanted = ["blocks.1.ln1.hook_normalized", "blocks.1.hook_mixer_out"]
    _, plain = model.run_with_cache(tokens, names=wanted)
    _, cache = model.run_with_cache(tokens, names=[*wanted, f"{names['y']}[*]", f"{names['y']}[-1]"], hooks=hooks)
    expected, y, _ = written_out(block.mixer, cache[wanted[0]][0], edits)
    got = cache[wanted[1]][0]
    assert (got - expected).abs().max() < EXACT * expected.abs().max()
    assert (cache[names["y"]][0] - y).abs().max() < EXACT * y.abs().max()
    assert torch.equal(cache[f"{names['y']}[-1]"], cache[names["y"]][:, -1])
    first = min(t for _, t in edits)
    difference = (got - plain[wanted[1]][0]).abs().amax(-1)
    assert difference[:first].max() == 0 and (difference[first:] > 1e-9).all()


def test_what_is_reported_afterwards_cannot_be_edited() -> None:
    """What the memory made of y holds the whole call, agrees with the run, and refuses edits."""
    model = models.build("titans-mac")
    tokens = torch.randint(0, 256, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    names = [
        f"blocks.1.mixer.hook_{name}" for name in ("k", "unit_k", "v", "write", "log_decay", "surprise", "attention")
    ]
    _, cache = model.run_with_cache(tokens, names=names)
    assert {
        name: cache[name].shape[1 if "attention" not in name and "surprise" not in name else 2] for name in names
    } == (dict.fromkeys(names, LENGTH))
    for name in names:
        with pytest.raises(ReadOnlyHookPoint):
            model.run_with_hooks(tokens, hooks=[(name, lambda u, hook: 0 * u)])
    rows = cache["blocks.1.mixer.hook_attention"]  # two learned tokens, what tokens retrieved, tokens; segments of 6
    assert rows.shape[-1] == 2 + 2 * LENGTH and (rows.sum(-1) - 1).abs().max() < 1e-5
    token = torch.arange(LENGTH)
    readable = (token[None] <= token[:, None]) & (token[None] // 6 == token[:, None] // 6)
    for part in (rows[..., 2 : 2 + LENGTH], rows[..., 2 + LENGTH :]):
        assert torch.equal(part[0, 0] > 0, readable)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="segment is 0; expected at least 1 token"):
        mixer(segment=0)
