"""The tuned lens where its optimum is known, resumed, cancelled, and held out."""

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from probes.lenses import logit_lens
from probes.tuned_lens import TunedLens, divergences_by_depth, train_tuned_lens
from tests.probes.attribution_cases import perturbed, random_tokens
from workbench.lab.checkpoints import CheckpointError


class RandomBatches:
    """Random tokens; held-out ones are others."""

    batch_size, context = 8, 11

    def __init__(self, vocab: int, seed: int = 0) -> None:
        self.vocab, self.seed = vocab, seed

    def _batch(self, seed: int) -> tuple[Tensor, Tensor]:
        tokens = torch.randint(0, self.vocab, (8, 12), generator=torch.Generator().manual_seed(seed))
        return tokens, torch.ones_like(tokens, dtype=torch.bool)

    def next_batch(self, step: int) -> tuple[Tensor, ...]:
        return self._batch(1000 * self.seed + step)

    def validation_batches(self) -> list[tuple[Tensor, ...]]:
        return [self._batch(10**6), self._batch(10**6 + 1)]

    def describe(self) -> dict[str, Any]:
        return {"vocab": self.vocab, "seed": self.seed}

    def references(self) -> dict[str, float]:
        return {}


def shifted() -> Any:
    """A model whose one layer adds a constant and nothing else: the logit lens misses it, b = that constant is exact."""
    model = perturbed("gpt2", scale=0.3, n_layers=1)
    with torch.no_grad():
        model.blocks[0].attn.output.weight.zero_()
        model.blocks[0].attn.output.bias.copy_(
            2 * torch.randn(model.d_model, generator=torch.Generator().manual_seed(0))
        )
        model.blocks[0].mlp.outward.weight.zero_()
        model.blocks[0].mlp.outward.bias.zero_()
    return model


def test_an_untrained_lens_is_the_logit_lens() -> None:
    model = perturbed("retnet")
    tokens = random_tokens(model)
    lens = TunedLens(model.n_layers, model.d_model).double()
    one, other = lens.read(model, tokens), logit_lens(model, tokens)
    torch.testing.assert_close(one.divergence, other.divergence)
    torch.testing.assert_close(divergences_by_depth(model, lens, tokens), other.mean("divergence")[:-1])


def test_it_finds_a_planted_translation(tmp_path: Path) -> None:
    """The one layer adds a constant: b = that constant is exact, and held-out KL falls to almost nothing."""
    model = shifted()
    result = train_tuned_lens(model, RandomBatches(model.vocab_size), tmp_path, steps=150, learning_rate=0.05)
    assert result.logit_lens[0] > 0.05 and result.held_out[0] < 0.02 * result.logit_lens[0]
    reading = result.lens.read(model, random_tokens(model, seed=99))
    assert reading.mean("divergence")[0] < 0.05 * logit_lens(model, random_tokens(model, seed=99)).mean("divergence")[0]
    assert all(p.grad is None for p in model.parameters())  # the model was only read
    again = TunedLens.load(tmp_path)
    assert torch.equal(again.A, result.lens.A) and torch.equal(again.b, result.lens.b)
    assert json.loads((tmp_path / "lens.json").read_text())["held_out"] == list(result.held_out)


@pytest.mark.parametrize("name", ["llama", "mamba2", "bdh"])
def test_it_reads_more_than_the_logit_lens(name: str, tmp_path: Path) -> None:
    model = perturbed(name, torch.float32, scale=0.2)
    result = train_tuned_lens(model, RandomBatches(model.vocab_size), tmp_path, steps=60, learning_rate=5e-3)
    assert all(after < before for before, after in zip(result.logit_lens, result.held_out, strict=True))
    assert len(result.depths) == model.n_layers and result.completed


def test_a_cancelled_run_goes_on_to_the_same_lens(tmp_path: Path) -> None:
    model = perturbed("llama", torch.float32)
    data, options = RandomBatches(model.vocab_size), {"steps": 12, "checkpoint_every": 5}
    whole = train_tuned_lens(model, data, tmp_path / "whole", **options)
    stop = threading.Event()
    told: list[float] = []

    def report(fraction: float, message: str) -> None:
        told.append(fraction)
        if len(told) == 6:
            stop.set()

    part = train_tuned_lens(model, data, tmp_path / "parts", progress=report, cancel=stop, **options)
    assert not part.completed and part.steps == 7 and not (tmp_path / "parts" / "lens.json").exists()
    rest = train_tuned_lens(model, data, tmp_path / "parts", **options)
    assert rest.completed and torch.equal(rest.lens.A, whole.lens.A) and rest.held_out == whole.held_out


def test_mistakes_are_named(tmp_path: Path) -> None:
    model = perturbed("llama", torch.float32)
    train_tuned_lens(model, RandomBatches(model.vocab_size), tmp_path, steps=1)
    with pytest.raises(CheckpointError):
        train_tuned_lens(model, RandomBatches(model.vocab_size, seed=3), tmp_path, steps=1)
    with pytest.raises(CheckpointError, match="no file"):
        TunedLens.load(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="This lens has 2 depths of width 5"):
        TunedLens(2, 5).read(model, random_tokens(model))
    with pytest.raises(ValueError, match="steps is 0"):
        train_tuned_lens(model, RandomBatches(model.vocab_size), tmp_path, steps=0)
