"""What a family of checkpoints says about itself, and the registry of families.

    @register_family("gpt2")
    def gpt2(fields: Fields) -> Conversion: ...

A file of `models.pretrained.families` turns a published configuration into one of ours, and lists for every weight of ours which stored
tensors it is made of.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from models.architecture_record import UnknownModel
from models.pretrained.stored import Stored, stored
from workbench.discovery import import_all
from workbench.instrument.errors import suggestion

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


class UnsupportedCheckpoint(ValueError):
    """A checkpoint of a known family with a setting that our modules do not have; the message names the setting."""


class Fields:
    """A published `config.json`, read field by field, and which tensors are stored with it."""

    def __init__(self, record: Mapping[str, Any], names: Iterable[str] = ()) -> None:
        self.record, self.model_type, self.names = record, str(record["model_type"]), frozenset(names)

    def __getitem__(self, name: str) -> Any:
        if self.record.get(name) is None:
            raise UnsupportedCheckpoint(
                f"config.json has no {name!r}.{suggestion(name, self.record)} A {self.model_type} checkpoint needs it."
            )
        return self.record[name]

    def get(self, name: str, default: Any) -> Any:
        """The field, or what the family's configuration class says when it is absent."""
        value = self.record.get(name)
        return default if value is None else value

    def expect(self, name: str, default: Any, *allowed: Any) -> None:
        """Refuse a setting that would make another function of the same weights."""
        value = self.get(name, default)
        if value not in allowed:
            raise UnsupportedCheckpoint(
                f"config.json: {name} = {value!r} is not supported for {self.model_type}. "
                f"Expected {' or '.join(map(repr, allowed))}."
            )

    def activation(self, name: str, default: str) -> str:
        """The activation function under our name."""
        value = self.get(name, default)
        if value not in ACTIVATIONS:
            raise UnsupportedCheckpoint(
                f"config.json: {name} = {value!r} is not supported.{suggestion(str(value), ACTIVATIONS)} "
                f"Known: {', '.join(ACTIVATIONS)}."
            )
        return ACTIVATIONS[value]


@dataclass
class Conversion:
    """A checkpoint in our terms.

    Args:
        architecture: name in our registry whose module is built. config: its configuration.
        prefix: of the base model's tensors, which files of the bare base model lack. ignored: parts of names of stored tensors that carry
            no weight (masks, precomputed frequencies).
        weights: for every weight of ours, what it is made of.
    """

    architecture: str
    config: Any
    prefix: str = ""
    ignored: tuple[str, ...] = ()
    weights: dict[str, Stored] = field(default_factory=dict)

    def __setitem__(self, own: str, source: Stored | str) -> None:
        self.weights[own] = stored(source) if isinstance(source, str) else source

    def linear(self, own: str, theirs: str, transposed: bool = False) -> None:
        """Weight, and bias where both sides have one."""
        weight = stored(f"{theirs}.weight")
        self[f"{own}.weight"] = weight.transposed if transposed else weight
        self[f"{own}.bias"] = f"{theirs}.bias"

    def norm(self, own: str, theirs: str, plus: float = 0.0) -> None:
        """Weight, and bias where both sides have one; `plus`: what is added to the stored weight."""
        weight = stored(f"{theirs}.weight")
        self[f"{own}.w"] = weight.plus(plus) if plus else weight
        self[f"{own}.b"] = f"{theirs}.bias"

    def grouped(self, owns: tuple[str, ...], theirs: str, groups: int, shares: tuple[int, ...], width: int) -> None:
        """Maps stored as rows of one, group by group: in each group `shares[0]` heads of the first map, then those of the next, ...

        width: rows of a head. Groups are heads where every head has its query, key and value; one group stores whole maps in turn.
        """
        each, start = sum(shares), 0
        for own, share in zip(owns, shares, strict=True):
            heads = slice(start, start + share)

            def pick(x: Tensor, heads: slice = heads) -> Tensor:
                return x.reshape(groups, each, width, *x.shape[1:])[:, heads].flatten(0, 2)

            for kind in ("weight", "bias"):
                self[f"{own}.{kind}"] = stored(f"{theirs}.{kind}").then(pick)
            start += share


Converter = Callable[[Fields], Conversion]
Shapes = Mapping[str, tuple[int, ...]]
Recogniser = Callable[[Mapping[str, Any], Shapes], dict[str, Any] | None]
BARE: list[Recogniser] = []
FAMILIES: dict[str, Converter] = {}


def register_family(*model_types: str) -> Callable[[Converter], Converter]:
    """Decorator: what converts checkpoints whose `config.json` says one of these `model_type`s."""

    def register(converter: Converter) -> Converter:
        for name in model_types:
            if name in FAMILIES:
                raise ValueError(f"The model type {name!r} is registered already.")
            FAMILIES[name] = converter
        return converter

    return register


def register_bare(recogniser: Recogniser) -> Recogniser:
    """Decorator: what recognises weights that were published without a `model_type`.

    It is given a configuration (maybe empty) and the shapes of the stored tensors, and returns the fields that a `config.json` would have,
    as far as the shapes tell them and None elsewhere; or None for weights that it does not know.
    """
    BARE.append(recogniser)
    return recogniser


def recognised(record: Mapping[str, Any], shapes: Shapes) -> dict[str, Any] | None:
    """The fields of weights without a `model_type`, or None if nobody knows them."""
    families()
    return next((found for recogniser in BARE if (found := recogniser(record, shapes)) is not None), None)


def families() -> dict[str, Converter]:
    """Every converter by `model_type`."""
    import_all("models.pretrained.families")
    return FAMILIES


def family(model_type: str) -> Converter:
    """The converter of a `model_type`; raises `UnknownModel` with the nearest name."""
    known = families()
    if model_type not in known:
        raise UnknownModel(
            f"Checkpoints of the type {model_type!r} cannot be opened.{suggestion(model_type, known)} Known: {', '.join(sorted(known))}."
        )
    return known[model_type]
