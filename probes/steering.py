"""Steering: adding a direction, and whether it does more than any direction of its length would.

    direction = mean_difference(model, positive_texts, negative_texts, "blocks.2.hook_resid_post")
    curve = steering_curve(model, tokens, direction, metric, coefficients=(-2, -1, 0, 1, 2), controls=20)

The difference of mean activations of two sets of texts (contrastive activation addition, Rimsky et al. 2023). Large added vectors of any
kind change what a model says, so each coefficient is compared with random directions of the same length: drawn from all directions alike,
or (`like="halves"`) as differences between random halves of the same texts, which point where real activations differ.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from probes.progress import Progress
from workbench.instrument.interventions import Steer

Metric = Callable[[Tensor, Tensor], Tensor]  # logits [batch, pos, vocab], tokens [batch, pos] -> [batch]


@dataclass(frozen=True)
class Direction:
    """A direction at a site. vector [width]; positive, negative: activations that it is the mean difference of, [text, width]."""

    point: str
    vector: Tensor
    positive: Tensor
    negative: Tensor

    def at(self, coefficient: float = 1.0, positions: int | Sequence[int] | None = None) -> Steer:
        """An intervention that adds it."""
        return Steer(self.point, direction=self.vector, coefficient=coefficient, positions=positions)

    @property
    def separation(self) -> float:
        """Share of texts on their own side of the midpoint along the direction (of the texts it was made from: optimistic)."""
        middle = (self.positive.mean(0) + self.negative.mean(0)) / 2
        above = torch.cat([(self.positive - middle) @ self.vector > 0, (self.negative - middle) @ self.vector <= 0])
        return float(above.double().mean())

    def random(self, count: int, seed: int = 0, like: str = "uniform") -> Tensor:
        """Random directions of the same length, [count, width]: `"uniform"` on the sphere, or differences of random halves (`"halves"`).

        Raises:
            ValueError: an unknown kind.
        """
        generator = torch.Generator().manual_seed(seed)
        if like == "uniform":
            drawn = torch.randn(count, len(self.vector), generator=generator, dtype=torch.float64)
        elif like == "halves":
            both = torch.cat([self.positive, self.negative]).double()
            orders = [torch.randperm(len(both), generator=generator) for _ in range(count)]
            half = len(self.positive)
            drawn = torch.stack([both[order[:half]].mean(0) - both[order[half:]].mean(0) for order in orders])
        else:
            raise ValueError(f"Unknown kind of random direction {like!r}. Expected 'uniform' or 'halves'.")
        return (drawn / drawn.norm(dim=-1, keepdim=True) * self.vector.double().norm()).to(self.vector)


@dataclass(frozen=True)
class SteeringCurve:
    """Result of `steering_curve`.

    Args:
        coefficients: [coefficient]. metric: with the direction, [coefficient, sequence]. controls: with each random direction, means
            over sequences, [control, coefficient].
    """

    coefficients: tuple[float, ...]
    metric: NDArray[np.float64]
    controls: NDArray[np.float64]

    @property
    def means(self) -> NDArray[np.float64]:
        """Mean over sequences, [coefficient]."""
        return np.asarray(self.metric.mean(1))

    def p(self, coefficient: float, baseline: float = 0.0) -> float:
        """Share of directions, this one among them, that move the mean as far from the `baseline` coefficient's as this one does.

        Either way counts: a random direction has no sign. Both coefficients must have been measured.
        """
        for wanted in (coefficient, baseline):
            if wanted not in self.coefficients:
                raise ValueError(
                    f"The coefficient {wanted} was not measured. Measured: {', '.join(map(str, self.coefficients))}."
                )
        here, zero = self.coefficients.index(coefficient), self.coefficients.index(baseline)
        moved = abs(self.means[here] - self.means[zero])
        others = np.abs(self.controls[:, here] - self.controls[:, zero])
        return float((1 + (others >= moved).sum()) / (1 + len(others)))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "coefficients": list(self.coefficients),
            "means": self.means.tolist(),
            "controls": self.controls.tolist(),
        }

    def __repr__(self) -> str:
        points = ", ".join(f"{c:+g}: {m:.3g}" for c, m in zip(self.coefficients, self.means, strict=True))
        return f"SteeringCurve({points}; {len(self.controls)} random directions)"


@torch.no_grad()
def mean_difference(
    model: Any, positive: Any, negative: Any, point: str, *, position: int | None = -1, batch_size: int = 16
) -> Direction:
    """Mean activation of `positive` texts minus that of `negative` ones.

    Args:
        positive, negative: token ids [text, pos], or a list of texts, of any length each. point: a hook point with axes batch pos width.
        position: at which token of each text (None: the mean over its tokens).

    Raises:
        ValueError: no texts, or a site with other axes.
    """
    (_, selected), *_ = model.hook_points.resolve(point)
    axes = selected[0].point.axes
    if len(selected) != 1 or len(axes) != 3 or axes[:2] != ("batch", "pos"):
        raise ValueError(f"{point!r} has the axes {' '.join(axes)}. Expected one hook point with axes batch pos width.")
    found = [_activations(model, texts, point, position, batch_size) for texts in (positive, negative)]
    return Direction(point, found[0].mean(0) - found[1].mean(0), *found)


def _activations(model: Any, texts: Any, point: str, position: int | None, batch_size: int) -> Tensor:
    """[text, width]. Every text is read on its own length, so that no padding is involved."""
    rows = [model.to_tokens(text)[0] for text in texts]
    if not rows:
        raise ValueError("There are no texts on one side. Expected at least one positive and one negative text.")
    found: dict[int, Tensor] = {}
    by_length: dict[int, list[int]] = {}
    for number, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(number)
    for numbers in by_length.values():
        for start in range(0, len(numbers), batch_size):
            some = numbers[start : start + batch_size]
            _, cache = model.run_with_cache(torch.stack([rows[n] for n in some]), names=point)
            x = cache[point]
            for row, number in enumerate(some):
                found[number] = x[row].mean(0) if position is None else x[row, position]
    return torch.stack([found[number] for number in range(len(rows))])


@torch.no_grad()
def steering_curve(
    model: Any,
    tokens: Any,
    direction: Direction,
    metric: Metric,
    *,
    coefficients: Sequence[float] = (-2.0, -1.0, 0.0, 1.0, 2.0),
    controls: int = 20,
    like: str = "uniform",
    positions: int | Sequence[int] | None = None,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    cancel: Event | None = None,
) -> SteeringCurve:
    """A metric of the model's output under growing amounts of a direction, and of random ones of the same length.

    Args:
        metric: logits [batch, pos, vocab] and tokens [batch, pos] to one number per sequence [batch]. positions: where it is added.

    Raises:
        ValueError: no coefficients. MeasurementCancelled: `cancel` was set.
    """
    if not len(coefficients):
        raise ValueError("There are no coefficients. Expected at least one.")
    tokens = model.to_tokens(tokens)

    def measure(vector: Tensor) -> NDArray[np.float64]:
        rows = []
        for coefficient in coefficients:
            edit = Steer(direction.point, direction=vector, coefficient=float(coefficient), positions=positions)
            rows.append(metric(model.run_with_hooks(tokens, hooks=[edit]), tokens).double().cpu().numpy())
        return np.stack(rows)

    found, others = measure(direction.vector), []
    for number, vector in enumerate(direction.random(controls, seed, like)):
        Progress(progress, cancel)(number / controls, f"random direction {number + 1} of {controls}")
        others.append(measure(vector).mean(1))
    return SteeringCurve(
        tuple(float(c) for c in coefficients), found, np.asarray(others).reshape(len(others), len(coefficients))
    )
