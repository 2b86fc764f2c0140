"""A memory that must be used: pairs in the first segment, noise in the second, questions in the third."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention.transformer_xl import RecentSegmentsConfig, TransformerXLConfig
from models.language_model import LanguageModel, LanguageModelConfig
from models.parts.channel_mixers import MLPConfig

SEGMENT = 8


def questions(count: int, generator: torch.Generator) -> Tensor:
    """Four key–value pairs, a segment of noise, the same pairs in another order. [batch, 3 · SEGMENT]."""
    keys = torch.stack([torch.randperm(6, generator=generator)[:4] for _ in range(count)])
    values = torch.randint(6, 12, (count, 4), generator=generator)
    noise = torch.randint(12, 15, (count, SEGMENT), generator=generator)
    order = torch.stack([torch.randperm(4, generator=generator) for _ in range(count)])
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    return torch.cat([torch.stack([keys, values], -1).flatten(1), noise, asked], 1)


def right(logits: Tensor, tokens: Tensor) -> float:
    """Share of answers that are the most likely token; logits of the third segment."""
    answers = tokens[:, 2 * SEGMENT + 1 :: 2]
    return float((logits[:, :-1:2].argmax(-1) == answers).double().mean())


@pytest.mark.slow
def test_transformer_xl_answers_from_its_memory_alone() -> None:
    """Trained, it answers what was said two segments ago; with its memory erased it guesses (one value in six)."""
    mixer = TransformerXLConfig(n_heads=4, mask=RecentSegmentsConfig(SEGMENT, 2 * SEGMENT))
    config = LanguageModelConfig(2, 48, vocab_size=16, mixer=mixer, mlp=MLPConfig(96), norm="rms", init_std=0.1)
    model, generator = LanguageModel(config), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(400):
        tokens = questions(64, generator)
        logits = model(tokens)
        answers = F.cross_entropy(logits[:, 16:-1:2].flatten(0, 1), tokens[:, 17::2].flatten())
        everything = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        (answers + 0.2 * everything).backward()
        optimizer.step()
    fresh = questions(256, torch.Generator().manual_seed(99))
    with torch.no_grad():
        _, state = model(fresh[:, : 2 * SEGMENT], return_state=True)
        kept = right(model(fresh[:, 2 * SEGMENT :], state=state), fresh)
        for layer in range(2):
            state = state.replaced(layer, hidden=torch.zeros_like(state.slot(layer, "hidden")))
        erased = right(model(fresh[:, 2 * SEGMENT :], state=state), fresh)
    assert kept > 0.98 and erased < 0.35
