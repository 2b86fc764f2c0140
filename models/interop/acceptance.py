"""Which models can be subjects: transformers models without an encoder-decoder's two halves, and TransformerLens's bridges of them."""

import copy
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

CONVERT = "Open the checkpoint on our own modules instead: models.load(folder)."


class NotASubject(ValueError):
    """A transformers model that the attention interface does not reach, or does not describe."""


def accepted(model: Any) -> Any:
    """The transformers model itself, of a bridge one of the same parameters; raises `NotASubject` for anything else."""
    from transformers import PreTrainedModel

    theirs = model if isinstance(model, PreTrainedModel) else getattr(model, "original_model", model)
    if theirs is not model:
        theirs = unbridged(theirs)
    if not isinstance(theirs, PreTrainedModel):
        raise NotASubject(
            f"{type(model).__name__} is no transformers model. Expected a PreTrainedModel, or a bridge with an original_model."
        )
    if theirs.config.is_encoder_decoder:
        raise NotASubject(f"{type(theirs).__name__} has an encoder and a decoder. {CONVERT}")
    return theirs


def unbridged(theirs: nn.Module) -> nn.Module:
    """The same parameters in the modules that a bridge put its own in place of (they attend themselves). The bridge is left alone."""
    shared = {id(tensor): tensor for tensor in (*theirs.parameters(), *theirs.buffers())}
    made: nn.Module = copy.deepcopy(theirs, shared)  # type: ignore[arg-type]
    pending = [made]
    while pending:
        module = pending.pop()
        for name, part in list(module._modules.items()):
            while part is not None and getattr(part, "original_component", None) is not None:
                part = part.original_component  # type: ignore[assignment]
            module._modules[name] = part
            if part is not None:
                pending.append(part)
    return made


def layer_places(theirs: Any, attending: Sequence[nn.Module]) -> dict[int, str]:
    """The name of every layer's module, by number, from the modules that asked the attention interface in one run.

    Raises:
        NotASubject: nobody asked, a module outside a list of layers did, a layer did more than once, or some of them never did.
    """
    kind = type(theirs).__name__
    if not attending:
        raise NotASubject(
            f"{kind} never asks transformers' attention interface, so that nothing attached there would do anything. {CONVERT}"
        )
    names = {id(module): name for name, module in theirs.named_modules()}
    places: dict[int, str] = {}
    for module in attending:
        name = names[id(module)]
        found = re.match(r"(?:.*?\.)??(?:\w+\.)*?(\d+)\.", name + ".")
        if found is None:
            raise NotASubject(f"{name} of {kind} is no layer of a list. {CONVERT}")
        layer = int(found[1])
        if layer in places:
            raise NotASubject(
                f"Layer {layer} of {kind} asks the attention interface more than once in a run. {CONVERT}"
            )
        places[layer] = name[: found.end(1)]
    stack = theirs.get_submodule(places[min(places)].rsplit(".", 1)[0])
    missing = sorted(set(range(len(stack))) - set(places))
    if missing:
        raise NotASubject(f"Layers {missing} of {kind} have no attention that asks transformers' interface. {CONVERT}")
    return places
