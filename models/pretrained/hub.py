"""Checkpoints by hub id: the files that are needed, from the local cache or else from the network."""

import fnmatch
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from workbench.instrument.errors import suggestion
from workbench.lab.checkpoints import CheckpointError

Report = Callable[[float, str], None]

FILES = (
    "config.json", "README.md", "model*.safetensors", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json")
CONVERT = "Pickles in a folder are rewritten by `workbench models FOLDER --convert NEW_FOLDER`."
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
    "t5-small": "google-t5/t5-small",
    "t5-base": "google-t5/t5-base",
}


def hub_id(name: str) -> str | None:
    """`owner/name` if `name` is a hub id or one of the well-known short ones; else None."""
    if name in SHORT:
        return SHORT[name]
    owner, slash, rest = name.partition("/")
    usual = all(part and "/" not in part and part[0] not in ".~" and "\\" not in part for part in (owner, rest))
    return name if slash and usual else None


def snapshot(
    name: str,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    pickles: bool = False,
    progress: Report | None = None,
) -> Path:
    """The local folder of a hub id's files: the cache's if it is complete there, else downloaded.

    Args:
        revision: branch, tag or commit. cache_dir: another cache than the default. pickles: take pickled weights too.
        progress: called with (share of bytes, words); what it raises stops the download. Whole files stay in the cache.

    Raises:
        CheckpointError: not in the cache and not to be had, with what to do.
    """
    folder = cached(name, revision=revision, cache_dir=cache_dir, pickles=pickles)
    if folder is not None:
        return folder
    files = listed(name, revision=revision, cache_dir=cache_dir, pickles=pickles)
    bar = _bar(sum(size or 0 for size in files.values()), progress)
    folder = None
    for file in files:
        folder = _file(name, file, revision, cache_dir, bar).parents[file.count("/")]
    if folder is None or not _has_weights(files, pickles):
        raise CheckpointError(f"{name!r} holds no safetensors weights. It holds: {', '.join(sorted(files))}. {CONVERT}")
    return folder


def cached(
    name: str, *, revision: str | None = None, cache_dir: Path | None = None, pickles: bool = False
) -> Path | None:
    """The folder in the local cache that holds a hub id's configuration and weights; None if they are not there. Asks no network."""
    try:
        folder = Path(
            _library(name).snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True)
        )
    except CheckpointError:
        raise
    except Exception:  # not in the cache: whatever the library calls that
        return None
    there = [path.name for path in folder.iterdir()]
    index = folder / "model.safetensors.index.json"
    shards = set(json.loads(index.read_text()).get("weight_map", {}).values()) if index.is_file() else set()
    return folder if "config.json" in there and _has_weights(there, pickles) and shards <= set(there) else None


def listed(
    name: str, *, revision: str | None = None, cache_dir: Path | None = None, pickles: bool = False
) -> dict[str, int | None]:
    """The files that opening a hub id needs, with their sizes in bytes, asked of the hub. CheckpointError if it cannot be asked."""
    wanted = [*FILES, *(PICKLED if pickles else ())]
    ask = _library(name).HfApi().model_info
    found = _try(name, cache_dir, lambda: ask(name, revision=revision, files_metadata=True, timeout=20))
    sizes = {file.rfilename: file.size for file in found.siblings}
    return {file: size for file, size in sizes.items() if any(fnmatch.fnmatch(file, pattern) for pattern in wanted)}


def small_file(name: str, file: str, *, revision: str | None = None, cache_dir: Path | None = None) -> Path:
    """One file of a hub id, from the cache or downloaded."""
    return _file(name, file, revision, cache_dir, _bar(0, None))


def _file(name: str, file: str, revision: str | None, cache_dir: Path | None, bar: type) -> Path:
    asked: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "tqdm_class": bar}
    return Path(_try(name, cache_dir, lambda: _library(name).hf_hub_download(name, file, **asked)))


def _library(name: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointError(
            f"{name!r} is a hub id, and the package huggingface_hub is not installed. Install it, or pass a local folder."
        ) from None
    return huggingface_hub


def _try(name: str, cache_dir: Path | None, call: Callable[[], Any]) -> Any:
    """What the hub's library answers; its own errors, and the network's, become one that says what to do."""
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )  # fmt: skip

    try:
        return call()
    except (GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        why = {
            GatedRepoError: "its owner wants to be asked first: accept the licence on its page, then `hf auth login`",
            RevisionNotFoundError: "it has no such revision",
        }.get(type(error), "there is no such model, or it is private and needs `hf auth login`")
        raise CheckpointError(f"The hub does not give {name!r}: {why}.{suggestion(name, SHORT.values())}") from error
    except Exception as error:
        if not _of_the_network(error):
            raise
        from huggingface_hub import constants

        offline = isinstance(error, OfflineModeIsEnabled) or constants.HF_HUB_OFFLINE
        why = "HF_HUB_OFFLINE forbids asking the hub" if offline else f"the hub does not answer ({_reason(error)})"
        raise CheckpointError(
            f"{name!r} is no local folder and is not in the local cache ({cache_dir or constants.HF_HUB_CACHE}), and {why}. On a computer "
            f"with network, `hf download {name} --local-dir FOLDER`; then bring FOLDER here and pass its path."
        ) from error


def _of_the_network(error: Exception) -> bool:
    """Whether the hub's library or what it talks through failed, and not a caller's progress function that stops the download."""
    package = type(error).__module__.partition(".")[0]
    libraries = ("huggingface_hub", "httpx", "httpx2", "httpcore", "requests", "urllib3", "hf_xet")
    return package in libraries or (isinstance(error, OSError) and not isinstance(error, InterruptedError))


def _reason(error: BaseException) -> str:
    """The first line of the first cause: what went wrong, without how the library came to ask."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


def _bar(total: int, progress: Report | None) -> type:
    """A class in the form that the hub's library wants its progress bars in: all files of a download count towards `total` bytes."""
    done = 0

    class Bar:
        def __init__(self, *_: Any, initial: int = 0, **__: Any) -> None:
            self.total, self.n = 0, 0
            self.update(initial)

        def update(self, n: float | None = 1) -> None:
            nonlocal done
            done += int(n or 0)
            if progress is not None and total:
                progress(min(1.0, done / total), f"downloading: {done / 2**20:,.0f} of {total / 2**20:,.0f} MiB")

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes as they come over the network; `update` counts them again as they are written."""

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: Any) -> None:
            pass

        def __iter__(self) -> Iterator[Any]:
            return iter(())

        def __getattr__(self, _: str) -> Callable[..., None]:
            return lambda *args, **kwargs: None

    return Bar


def _has_weights(names: Iterable[str], pickles: bool) -> bool:
    patterns = [pattern for pattern in (*FILES, *(PICKLED if pickles else ())) if "model*" in pattern]
    return any(fnmatch.fnmatch(name, pattern) for name in names for pattern in patterns)
