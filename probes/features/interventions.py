"""Using features to change a run: each function returns what `model.hooks([...])` takes.

A feature's part of an activation is f_i d_i (code times direction). Changing features adds the difference of those parts and leaves the
rest of the activation, the part that the dictionary does not explain included, exactly as it was.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from probes.features.dictionaries import Dictionary
from workbench.instrument.interventions import Steer
from workbench.instrument.pieces import by_position
from workbench.lab.activation_store import pos_second

Hook = tuple[str, Callable[[Tensor, Any], Tensor]]


def reconstruct(dictionary: Dictionary, point: str, *, head: int | None = None, skip: int = 0) -> Hook:
    """Replace the site by its reconstruction, from position `skip` on."""
    _check_one_site(dictionary)
    return point, _at_site(dictionary, head, skip, dictionary)


def ablate_features(
    dictionary: Dictionary, point: str, features: Sequence[int], *, head: int | None = None, skip: int = 0
) -> Hook:
    """Take the features' parts out of the activation."""
    return clamp_features(dictionary, point, dict.fromkeys(features, 0.0), head=head, skip=skip)


def clamp_features(
    dictionary: Dictionary, point: str, values: dict[int, float], *, head: int | None = None, skip: int = 0
) -> Hook:
    """Hold the codes of some features at given values wherever the site is computed.

    Raises:
        ValueError: a feature that the dictionary does not have, no feature, or a transcoder (its parts are of another site).
    """
    _check_one_site(dictionary)
    chosen = torch.tensor(checked_features(dictionary, list(values)))
    wanted = torch.tensor([float(value) for value in values.values()])

    def edit(x: Tensor) -> Tensor:
        codes = dictionary.encode(x)[..., chosen]
        return x + ((wanted.to(codes) - codes) @ dictionary.directions[chosen]).to(x.dtype)

    return point, _at_site(dictionary, head, skip, edit)


def steer_feature(dictionary: Dictionary, point: str, feature: int, amount: float) -> Steer:
    """Add `amount` units of a feature's code to every row of the site: an ordinary, serialisable intervention."""
    _check_one_site(dictionary)
    (index,) = checked_features(dictionary, [feature])
    return Steer(point, direction=(amount * dictionary.directions[index]).detach().clone())


def checked_features(dictionary: Dictionary, features: Sequence[int]) -> list[int]:
    """The features as a list; raises `ValueError` for none, or one that does not exist."""
    if not len(features):
        raise ValueError("Expected at least one feature.")
    for feature in features:
        if not 0 <= feature < dictionary.n_features:
            raise ValueError(
                f"There is no feature {feature}: this dictionary has features 0..{dictionary.n_features - 1}."
            )
    return [int(feature) for feature in features]


def _check_one_site(dictionary: Dictionary) -> None:
    if dictionary.config.d_out is not None:
        raise ValueError("A transcoder reads one site and writes another; expected a dictionary of one site.")


def _at_site(
    dictionary: Dictionary, head: int | None, skip: int, edit: Callable[[Tensor], Tensor]
) -> Callable[[Tensor, Any], Tensor]:
    """A hook function that edits rows of width d_in: the axes beside batch and position, flattened, or those of one head."""

    @by_position
    def function(x: Tensor, hook: Any) -> Tensor:
        def part_of(activation: Tensor) -> Tensor:
            placed = pos_second(activation, hook)
            return placed[:, skip:] if head is None else placed[:, skip:, head]

        part = part_of(x)
        rows = part.flatten(2) if part.dim() > 3 else part
        if rows.shape[-1] != dictionary.d_in:
            raise ValueError(
                f"{hook.name} has rows of {rows.shape[-1]} numbers here; the dictionary reads {dictionary.d_in}."
            )
        out = x.clone()
        part_of(out)[...] = edit(rows).reshape(part.shape).to(x.dtype)
        return out

    return function
