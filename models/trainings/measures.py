"""Quantities that experiments compare, each measured on held-out rows."""

from typing import Any

import torch
from torch import nn

from models.trainings.record import Experiment, Measure, answers


def accuracy(module: nn.Module, experiment: Experiment, seed: int) -> float:
    """Share of the answers asked for that are right."""
    tokens, asked, targets, _ = experiment.test_batch(seed)
    right = answers(module, tokens) == targets
    return float(right[asked].double().mean())


def accuracy_beyond(module: nn.Module, experiment: Experiment, seed: int) -> float:
    """The same, of answers at places that the training rows did not have."""
    tokens, asked, targets, _ = experiment.test_batch(seed)
    asked = asked & (torch.arange(tokens.shape[1]) >= experiment.task.length)
    return float((answers(module, tokens) == targets)[asked].double().mean())


def source_share(module: nn.Module, experiment: Experiment, seed: int) -> float:
    """How much of a question's reading falls on the token that holds the answer: the mean over answers of the largest share over layers
    and heads.

    Shares are of absolute weights, so that signed patterns count as much for what they take away as for what they add.
    """
    tokens, _, _, facts = experiment.test_batch(seed)
    row, place = (facts["source"] >= 0).nonzero(as_tuple=True)
    source = facts["source"][row, place]
    best = torch.zeros(len(row))
    with torch.no_grad():
        for pattern in module.eval().patterns(tokens[:, :-1]).values():  # type: ignore[operator]
            read = pattern.values[row, :, place - 1].abs()  # [answer, head, key]
            share = read[torch.arange(len(row)), :, source] / read.sum(-1).clamp(min=1e-12)
            best = torch.maximum(best, share.amax(1))
    return float(best.double().mean())


def loss(module: nn.Module, experiment: Experiment, seed: int) -> float:
    """Mean loss of the answers asked for, in nats."""
    tokens, asked, targets, _ = experiment.test_batch(seed)
    with torch.no_grad():
        logits = module.eval()(tokens[:, :-1])
    return float(nn.functional.cross_entropy(logits[asked[:, 1:]].double(), targets[asked]))


def passes_by_distance(module: nn.Module, experiment: Experiment, seed: int, longest: int = 6) -> list[float]:
    """Mean number of passes that a model with halting takes where the answer is 0, 1, … `longest` tokens away.

    A token's passes are the mean of 1, 2, … under the weights of the states in its output.
    """
    tokens, asked, _, facts = experiment.test_batch(seed)
    steps = range(experiment.ours.config.wiring.steps)
    names = [f"wiring.hook_step_weight@{step}" for step in steps]
    with torch.no_grad():
        _, cache = module.eval().run_with_cache(tokens[:, :-1], names=names)  # type: ignore[operator]
    passes = sum((step + 1) * cache[name] for step, name in zip(steps, names, strict=True))  # [batch, pos]
    distance = torch.arange(tokens.shape[1] - 1) - facts["source"][:, 1:]
    return [float(passes[asked[:, 1:] & (distance == away)].double().mean()) for away in range(longest + 1)]


def weight_for_and_against(module: nn.Module, experiment: Experiment, seed: int) -> tuple[float, float]:
    """Of the absolute weight of a question's row in the first layer: the share that is positive and on the group that counts for, and the
    share that is negative and on the group that counts against; means over questions and heads. The task is `ForAndAgainst`."""
    tokens, asked, _, _ = experiment.test_batch(seed)
    task: Any = experiment.task
    first_question = task.groups * task.symbols
    row, place = asked.nonzero(as_tuple=True)
    question = tokens[row, place - 1] - first_question
    group = torch.where(tokens < first_question, tokens // task.symbols, -1)[row, :-1]  # [question, key]
    with torch.no_grad():
        pattern = module.eval().patterns(tokens[:, :-1])[0].values[row, :, place - 1]  # type: ignore[operator]
    shares = pattern / pattern.abs().sum(-1, keepdim=True)  # [question, head, key]
    favoured, opposed = (
        (group == named[:, None])[:, None] for named in (question // task.groups, question % task.groups)
    )
    gained, lost = (shares.clamp(min=0) * favoured).sum(-1), (-shares.clamp(max=0) * opposed).sum(-1)
    return float(gained.double().mean()), float(lost.double().mean())


ACCURACY = Measure("share of answers that are right", accuracy)
BEYOND = Measure("share of answers that are right beyond the trained length", accuracy_beyond)
SOURCE = Measure("share of a question's reading that falls on its answer, best head", source_share)
LOSS = Measure("loss in nats", loss, less=True)
