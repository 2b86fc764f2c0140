"""Moneta, Yaad and Memora in a model: their memories against loops with automatic differentiation, and what their choices mean."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models.decoder import Decoder
from models.recurrent.miras import MirasConfig


def tokens(length: int = 11) -> Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(0))


def built(name: str) -> Decoder:
    model = models.build(name).double()
    with torch.no_grad():
        for block in model.blocks:
            block.mixer.memory.input.weight.mul_(10)
    return model


def weights_of(name: str, layers: list[Tensor]) -> list[Tensor]:
    """The papers' links, for one head: W_1 [in, hidden], W_2 [hidden, out]."""
    if name == "moneta":
        return [w / w.pow(4).sum().sqrt() for w in layers]
    return [w.exp() / w.exp().sum(0, keepdim=True) for w in layers] if name == "memora" else layers


def loop(name: str, f: dict[str, Tensor], first: Tensor, every: int) -> Tensor:
    """One head, token by token. f: q, k, v [pos, 8]; write, decay, threshold [pos]; first [16, hidden] packed."""
    layers = [first[:8], first[8:].T]
    out = []

    def answer(w: list[Tensor], x: Tensor) -> Tensor:
        return x + F.layer_norm(F.gelu(x @ w[0]) @ w[1], (8,), eps=1e-6)

    for t in range(len(f["k"])):
        if t % every == 0:
            anchor = [w.detach() for w in weights_of(name, layers)]
        leaves = [w.clone().requires_grad_() for w in anchor]
        e = answer(leaves, f["k"][t]) - f["v"][t]
        if name == "moneta":
            slope = 3 * torch.tanh(10 * e.detach()) * (e.detach().square() + 1e-6)
        elif name == "yaad" and e.detach().norm() > f["threshold"][t]:
            slope = f["threshold"][t] * e.detach().sign()
        else:
            slope = e.detach()
        gradients = torch.autograd.grad(e, leaves, slope)
        layers = [f["decay"][t] * w - f["write"][t] * g for w, g in zip(layers, gradients, strict=True)]
        out.append(answer(weights_of(name, layers), f["q"][t]))
    return torch.stack(out).detach()


@pytest.mark.parametrize("name", ["moneta", "yaad", "memora"])
def test_memories_are_the_papers_recurrences(name: str) -> None:
    model = built(name)
    signals: dict[str, str] = {"q": "unit_q", "k": "unit_k", "v": "v", "write": "write", "decay": "log_decay"}
    if name == "yaad":
        signals["threshold"] = "threshold"
    prefix = "blocks.1.mixer.hook_"
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens(), names=[prefix + s for s in (*signals.values(), "z")])
    memory: Any = model.blocks[1].mixer.memory
    for head in range(3):
        f = {short: cache[prefix + long][0, :, head] for short, long in signals.items()}
        f["decay"] = f["decay"].exp()
        expected = loop(name, f, memory.first[head].detach(), memory.config.every)
        assert (cache[prefix + "z"][0, :, head] - expected).abs().max() < 1e-10


def test_memora_stays_on_the_simplex_and_yaad_bounds_its_writes() -> None:
    model = built("memora")
    memory: Any = model.blocks[0].mixer.memory
    state = model.states(tokens(), [10], layers=0)[0][:, 0]
    for w in memory.core.memory.unpack(memory.core.link.weights(state, memory.core.memory)):
        assert (w > 0).all() and (w.sum(-2) - 1).abs().max() < 1e-12
    model = built("yaad")
    hooks = [("blocks.0.mixer.hook_threshold", lambda d, hook: torch.full_like(d, 1e-9))]
    _, calm = model.run_with_cache(tokens(), names="blocks.0.mixer.hook_surprise", hooks=hooks)
    _, usual = model.run_with_cache(tokens(), names="blocks.0.mixer.hook_surprise")
    assert calm["surprise", 0].max() < 1e-6 < usual["surprise", 0].min()


def test_both_links_of_moneta_can_be_asked_for() -> None:
    printed, mirror = (MirasConfig.moneta(3, link=link) for link in ("lq_printed", "lq_mirror"))
    logits = [models.build("moneta", mixer=config).double()(tokens()) for config in (printed, mirror)]
    assert (logits[0] - logits[1]).abs().max() > 1e-9
