"""Checkpoints by hub id: the files that are needed, from the local cache or else from the network."""

import fnmatch
from pathlib import Path
from typing import Any

from workbench.lab.checkpoints import CheckpointError

FILES = (
    "config.json", "README.md", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
# models that are known by a name without an owner
SHORT = {
    "gpt2": "openai-community/gpt2",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-large": "openai-community/gpt2-large",
    "gpt2-xl": "openai-community/gpt2-xl",
    "distilgpt2": "distilbert/distilgpt2",
    "bert-base-uncased": "google-bert/bert-base-uncased",
    "bert-base-cased": "google-bert/bert-base-cased",
    "roberta-base": "FacebookAI/roberta-base",
    "distilbert-base-uncased": "distilbert/distilbert-base-uncased",
}


def hub_id(name: str) -> str | None:
    """`owner/name` if `name` is a hub id or one of the well-known short ones; else None."""
    if name in SHORT:
        return SHORT[name]
    owner, slash, rest = name.partition("/")
    usual = all(part and "/" not in part and part[0] not in ".~" and "\\" not in part for part in (owner, rest))
    return name if slash and usual else None


def snapshot(name: str, *, revision: str | None = None, cache_dir: Path | None = None, pickles: bool = False) -> Path:
    """The local folder of a hub id's files: the cache's if it is complete there, else downloaded.

    Args:
        revision: branch, tag or commit. cache_dir: another cache than the default. pickles: take pickled weights too.

    Raises:
        CheckpointError: not in the cache and not to be had, with what to do.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise CheckpointError(
            f"{name!r} is a hub id, and the package huggingface_hub is not installed. Install it, or pass a local folder."
        ) from None
    wanted = [*FILES, *(PICKLED if pickles else ())]
    asked: dict[str, Any] = {"repo_id": name, "revision": revision, "cache_dir": cache_dir, "allow_patterns": wanted}
    try:
        folder = Path(snapshot_download(**asked, local_files_only=True))
        if _has_weights(folder, wanted):
            return folder
    except Exception:  # not in the cache: whatever the library calls that
        pass
    try:
        folder = Path(snapshot_download(**asked))
    except Exception as error:
        raise CheckpointError(
            f"{name!r} is no local folder, is not in the local cache, and could not be downloaded "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Check the id, the network, HF_HUB_OFFLINE and, for "
            f"gated models, your token; or download the folder elsewhere (`hf download {name}`) and pass its path."
        ) from error
    if not _has_weights(folder, wanted):
        there = sorted(path.name for path in folder.iterdir())
        raise CheckpointError(f"{name!r} holds no safetensors weights. It holds: {', '.join(there)}.")
    return folder


def _has_weights(folder: Path, wanted: list[str]) -> bool:
    patterns = [pattern for pattern in wanted if pattern.startswith(("model*", "pytorch_model*"))]
    return any(fnmatch.fnmatch(path.name, pattern) for path in folder.iterdir() for pattern in patterns)
