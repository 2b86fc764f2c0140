"""The paper's experiment on surprise (section 6.4, figure 14) and what its models remember.

A stream of letters has period 77: a fixed warm-up of 13 letters, then a random word of 8 letters eight times over. A model trained on
one period must remember: nothing but its state knows the word. So the same models answer three questions: does a first presentation need
more active neurons than a repetition; does recall follow the state when it is edited; and does it survive beyond the trained length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from case_studies.harness.context import Context
from models.bdh.model import BDH, BDHConfig
from probes.bdh import copy_state, freeze_writes, measure_sparsity
from workbench import EditState
from workbench.lab.training import CurvePoint, TrainingConfig, train

LETTERS, WARM_UP, WORD, REPEATS = 26, 13, 8, 8
PERIOD = WARM_UP + WORD * REPEATS
FIRST = range(WARM_UP, WARM_UP + WORD)
LATER = range(WARM_UP + WORD, PERIOD)
EDIT = WARM_UP + 3 * WORD - 1  # the state is edited after the third presentation
PAPER_LAYER = 2  # the layer of figure 14, counted from 0 here; the paper does not say from where it counts
TEST_WORDS = 64


class LetterStream:
    """Periods of the stream as training data: every period has a new word, all have the same warm-up."""

    context = PERIOD - 1

    def __init__(self, seed: int, batch_size: int) -> None:
        self.seed, self.batch_size = seed, batch_size
        self.warm_up = torch.from_numpy(np.random.default_rng([seed, 0]).integers(LETTERS, size=WARM_UP))

    def words(self, purpose: Sequence[int], number: int, presentations: int = 1) -> Tensor:
        """Random words [number, presentations, letter]."""
        drawn = np.random.default_rng([self.seed, *purpose]).integers(LETTERS, size=(number, presentations, WORD))
        return torch.from_numpy(drawn)

    def periods(self, words: Tensor) -> Tensor:
        """Whole periods [batch, pos] from words [batch, 1 or REPEATS, letter]."""
        presented = words.expand(-1, REPEATS, -1).flatten(1)
        return torch.cat([self.warm_up.expand(len(words), -1), presented], 1)

    def next_batch(self, step: int) -> tuple[Tensor, ...]:
        tokens = self.periods(self.words([1, step], self.batch_size))
        return tokens, predicted(tokens)

    def validation_batches(self) -> Sequence[tuple[Tensor, ...]]:
        tokens = self.periods(self.words([2], self.batch_size))
        return [(tokens, predicted(tokens))]

    def describe(self) -> dict[str, Any]:
        return {"kind": "letters", "seed": self.seed, "batch_size": self.batch_size, "period": PERIOD}

    def references(self) -> dict[str, float]:
        return {"chance": float(np.log(LETTERS))}


def predicted(tokens: Tensor) -> Tensor:
    """Every token but the first counts."""
    counted = torch.ones_like(tokens, dtype=torch.bool)
    counted[:, 0] = False
    return counted


def trained_on_letters(context: Context, share: tuple[float, float], decay: float = 0.0) -> tuple[BDH, LetterStream]:
    """A model trained on one period at a time; its seed is the context's."""
    settings = context.settings
    stream = LetterStream(context.seed, settings["letters_batch"])
    model = BDH(
        BDHConfig(
            n_layers=4, d_model=settings["d_model"], n_heads=2, n_neurons=settings["n_neurons"], vocab_size=LETTERS,
            dropout=0.0, seed=context.seed, decay=decay,
        )
    )  # fmt: skip
    what = "letters with decay" if decay else "letters"
    fit(context, model, stream, settings["letters_steps"], 4e-3, share, what)
    return model, stream


def fit(
    context: Context, model: BDH, data: Any, steps: int, rate: float, share: tuple[float, float], what: str,
    watch: Callable[[CurvePoint, int], None] | None = None,
) -> list[CurvePoint]:  # fmt: skip
    """Train with the workbench's trainer; progress and cancelling go through the context. `watch` is called at every step too."""

    def report(point: CurvePoint, total: int) -> None:
        if watch is not None:
            watch(point, total)
        done = share[0] + (share[1] - share[0]) * point.step / total
        context.progress(done, f"{what}: step {point.step} of {total}, {point.train_loss:.2f} nats")

    config = TrainingConfig(
        steps=steps, learning_rate=rate, warmup=min(30, steps // 4), seed=context.seed, eval_every=steps,
        checkpoint_every=steps,
    )  # fmt: skip
    folder = context.folder / what.replace(" ", "-")
    curve = train(model, data, config, folder, resume=False, progress=report, command=f"case study bdh, {what}").curve
    model.eval()
    return curve


# ---- surprise --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def surprise(model: BDH, stream: LetterStream) -> dict[str, Any]:
    """Active y on the first presentation over active y on repetitions, per layer and octile.

    The control has the same positions with a new word every time: what position alone does to activity.
    """
    repeated = measure_sparsity(model, stream.periods(stream.words([3], TEST_WORDS)))
    fresh = measure_sparsity(model, stream.periods(stream.words([4], TEST_WORDS, REPEATS)))
    ratios, control = presentation_ratio(repeated.of("y").mean(2)), presentation_ratio(fresh.of("y").mean(2))
    octiles = presentation_ratio(repeated.by_octile["y"])  # [layer, octile]
    nats = repeated.surprisal.mean(0)
    return {
        "surprise_ratio": ratios[PAPER_LAYER],
        "surprise_ratio_all_layers": ratios.mean(),
        "surprise_over_control": ratios[PAPER_LAYER] / control[PAPER_LAYER],
        "slow_over_fast": octiles[PAPER_LAYER, 4:].mean() - octiles[PAPER_LAYER, :4].mean(),
        "first_nats": nats[list(FIRST)].mean(),
        "repeat_nats": nats[list(LATER)].mean(),
        "ratios": ratios,
        "control_ratios": control,
        "octile_ratios": octiles,
        "active_by_position": repeated.of("y").mean((0, 2)),
        "fresh_by_position": fresh.of("y").mean((0, 2)),
    }


def presentation_ratio(active: Tensor) -> Tensor:
    """active [batch, layer, …, pos] -> mean over first-presentation tokens / mean over later ones, [layer, …]."""
    mean = active.double().mean(0)
    return mean[..., list(FIRST)].mean(-1) / mean[..., list(LATER)].mean(-1).clamp(min=1e-9)


# ---- edits of the state ----------------------------------------------------------------------------------------------


@torch.no_grad()
def recall_under_edits(model: BDH, stream: LetterStream) -> dict[str, float]:
    """Log probability (nats per letter) of what recall should bring, under an edit minus under its matched control.

    copy     the state after three presentations of word A becomes that of word B; control: that of a third word C.
             The text goes on with B, its first letter given.
    reset    the state becomes zero; control: it becomes that of a text with other letters before the same word A.
    freeze   nothing is written from the word's first presentation on; control: from its second on.
    """
    a, b, c = (stream.periods(stream.words([5, number], TEST_WORDS)) for number in range(3))
    asked = range(EDIT + 2, EDIT + 1 + WORD)  # an edit after EDIT changes what is predicted from EDIT + 2 on

    def state_of(text: Tensor) -> list[EditState]:
        return copy_state(model, text[:, : EDIT + 1], source_after=EDIT, after=EDIT)

    onwards = torch.cat([a[:, : EDIT + 1], b[:, EDIT + 1 : EDIT + 1 + WORD]], 1)
    same = a[:, : EDIT + 1 + WORD]
    other_start = same.clone()
    other_start[:, :WARM_UP] = torch.from_numpy(
        np.random.default_rng([stream.seed, 6]).integers(LETTERS, size=(TEST_WORDS, WARM_UP))
    )
    zero = [EditState(layer=layer, after=EDIT, value=0.0) for layer in range(model.n_layers)]
    length = same.shape[1]

    def frozen(since: int) -> list[Any]:
        return [freeze_writes(model, since=since, length=length)]

    copied, other = nats(model, onwards, asked, state_of(b)), nats(model, onwards, asked, state_of(c))
    plain = nats(model, onwards, asked, [])
    recall, kept = nats(model, same, asked, []), nats(model, same, asked, state_of(other_start))
    return {
        "copy_effect": copied - other,
        "copy_over_plain": copied - plain,
        "reset_effect": kept - nats(model, same, asked, zero),
        "freeze_effect": nats(model, same, asked, frozen(FIRST.stop)) - nats(model, same, asked, frozen(FIRST.start)),
        "recall": recall,
        "recall_after_copy": copied,
    }


@torch.no_grad()
def nats(model: BDH, tokens: Tensor, asked: Sequence[int], hooks: list[Any]) -> float:
    """Mean log p of the tokens at positions `asked`."""
    log_p = model.run_with_hooks(tokens, hooks=hooks).log_softmax(-1)
    at = torch.tensor(list(asked))
    return float(log_p[:, at - 1].gather(-1, tokens[:, at, None]).mean())


# ---- length ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def beyond_training(model: BDH, stream: LetterStream) -> float:
    """How much more a repeated letter costs in the period after the trained length than within it, in nats."""
    words = stream.words([7], 2 * TEST_WORDS)
    tokens = torch.cat([stream.periods(words[:TEST_WORDS]), stream.periods(words[TEST_WORDS:])], 1)
    later = np.array(LATER)
    return nats(model, tokens, later.tolist(), []) - nats(model, tokens, (later + PERIOD).tolist(), [])


# ---- one seed --------------------------------------------------------------------------------------------------------


def letters(context: Context) -> dict[str, Any]:
    """Train on letters and ask everything; a model whose state fades is trained for the first seeds only (else None)."""
    with_decay = context.seeds.index(context.seed) < context.settings["decay_seeds"]
    model, stream = trained_on_letters(context, (0.0, 0.45 if with_decay else 0.9))
    rise = beyond_training(model, stream)
    found: dict[str, Any] = {**surprise(model, stream), **recall_under_edits(model, stream), "length_cost": rise}
    found |= {"length_cost_decay": None, "decay_advantage": None, "decay_repeat_nats": None}
    if with_decay:
        fading, _ = trained_on_letters(context, (0.45, 0.9), decay=1.0)
        found["length_cost_decay"] = beyond_training(fading, stream)
        found["decay_advantage"] = rise - found["length_cost_decay"]
        found["decay_repeat_nats"] = float(surprise(fading, stream)["repeat_nats"])
    return found
