"""Models and token batches that the tests of lenses and attributions share."""

from typing import Any

import torch
from torch import Tensor

import models
from models.decoder import Decoder
from probes.objectives import LogitDifference
from workbench.lab.tasks import make_task

ARCHITECTURES = ("gpt2", "llama", "retnet", "mamba2", "bdh")


def perturbed(name: str, dtype: torch.dtype = torch.float64, scale: float = 0.05, **changes: object) -> Decoder:
    """A tiny model whose biases, norms and means are none of them zero or one."""
    model = models.build(name, **changes).eval().to(dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


def random_tokens(model: Decoder, batch: int = 3, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(0, model.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def left_padded(tokens: Tensor, pads: int = 2) -> tuple[Tensor, Tensor]:
    """The same sequences after `pads` padding tokens, and their mask."""
    filled = torch.cat([torch.zeros_like(tokens[:, :pads]), tokens], 1)
    mask = torch.ones_like(filled, dtype=torch.bool)
    mask[:, :pads] = False
    return filled, mask


def circuit_prompts(changed: str = "answer") -> tuple[Any, Tensor, Tensor, LogitDifference]:
    """Induction prompts that end where a token must be repeated; in the corrupted ones the earlier copy was followed by another.

    `changed="match"`: there the earlier copy itself is another token, so that nothing matches.
    """
    task = make_task("induction", vocab_size=128, length=41, min_period=10, max_period=16, seed=7)
    batch = task.batch(6, 1, "validation")
    tokens, ends = batch.tokens, []
    clean, corrupted, answers, wrongs = [], [], [], []
    for row, counted in zip(tokens, batch.loss_mask, strict=True):
        end = int(counted.nonzero()[-1])
        query = int(row[end - 1])
        earlier = [i for i in range(end - 1) if int(row[i]) == query and i + 1 < end - 1]
        answer, wrong = int(row[end]), (int(row[end]) + 5) % 128
        other = row[:end].clone()
        other[[i + (changed == "answer") for i in earlier]] = wrong
        clean.append(row[:end])
        corrupted.append(other)
        answers.append(answer)
        wrongs.append(wrong)
        ends.append(end)
    shortest = min(ends)
    cut = [torch.stack([row[-shortest:] for row in rows]) for rows in (clean, corrupted)]
    return (
        models.load("induction-circuit"),
        cut[0],
        cut[1],
        LogitDifference(torch.tensor(answers), torch.tensor(wrongs)),
    )
