"""What a model is given to read: a text, and for an encoder-decoder the source that its encoder reads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def reading(model: Any, source: str | None, text: str) -> tuple[Any, str | Tensor]:
    """The model bound to a source, and the text behind the token that begins every text; models that read no source as they are.

    Raises:
        ValueError: a source for a model that reads none, or none for one that has no source of its own.
    """
    if not hasattr(model, "with_source"):
        if source is not None:
            raise ValueError(f"{model.name} has no encoder that would read a source. Leave the source out.")
        return model, text
    if source is None and model.config.source is None:
        raise ValueError(f"{model.name} is an encoder-decoder: say which source its encoder reads.")
    import torch

    bound = model if source is None else model.with_source(source)
    return bound, torch.cat([model.start_tokens(1), model.to_tokens(text)], dim=1)


def again(model: Any, manifest: dict[str, Any]) -> Any:
    """The model that made a run, bound to the source that the run read; other models as they are.

    Raises:
        ValueError: a run whose source was given as what an encoder made of it, so that its tokens are not known.
    """
    source = manifest.get("source")
    if not source or not hasattr(model, "with_source"):
        return model
    if min(source["ids"]) < 0:
        raise ValueError(f"The run does not know the tokens of its source, so {model.name} cannot read it again.")
    import torch

    return model.with_source(torch.tensor(source["ids"])[None])
