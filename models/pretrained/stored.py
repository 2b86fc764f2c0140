"""The tensors of a checkpoint on disk: found by name over all shards, read one at a time, mapped into memory and not copied.

A `Stored` says how one of our weights is made of stored tensors (as it is, transposed, some rows of it, ...). Nothing is read until `read`.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from workbench.instrument.errors import suggestion
from workbench.lab.checkpoints import CheckpointError, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")

_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


@dataclass(frozen=True)
class Stored:
    """A weight as a function of stored tensors: `make(*tensors of these names)`; None: the one tensor as it is."""

    names: tuple[str, ...]
    make: Callable[..., Tensor] | None = None

    def then(self, step: Callable[[Tensor], Tensor]) -> "Stored":
        """The same, changed by one more step."""
        make = self.make
        return Stored(self.names, step if make is None else lambda *tensors: step(make(*tensors)))

    @property
    def transposed(self) -> "Stored":
        """The transpose of a matrix."""
        return self.then(lambda x: x.T)

    def rows(self, start: int, stop: int) -> "Stored":
        """Rows start ≤ row < stop; a contiguous part of the file, so still not copied."""
        return self.then(lambda x: x[start:stop])

    def columns(self, start: int, stop: int) -> "Stored":
        """Columns start ≤ column < stop of a matrix."""
        return self.then(lambda x: x[:, start:stop])

    def plus(self, number: float) -> "Stored":
        """Every entry larger by a number (norms that store w − 1)."""
        return self.then(lambda x: x + number)


def stored(name: str) -> Stored:
    """One stored tensor as it is."""
    return Stored((name,))


class Checkpoint:
    """The safetensors files of a folder in Hugging Face layout, or one file of tensors.

    Args:
        folder: holds `model.safetensors`, or shards and their index; or a file. allow_pickle_conversion: read `pytorch_model.bin`, or a
            file that is no safetensors file, with torch's restricted unpickler where there is nothing else.

    Raises:
        CheckpointError: no weights, a shard that the index names is missing, weights only as pickles, a damaged file.
    """

    def __init__(self, folder: Path, allow_pickle_conversion: bool = False) -> None:
        self.folder = folder
        self.files: dict[str, Path] = {}  # by tensor
        self.unpickled: dict[str, Tensor] = {}
        self.read_names: set[str] = set()
        self._handles: dict[Path, Any] = {}
        if folder.is_file():
            self._open_file(folder, allow_pickle_conversion)
        elif (folder / SINGLE).is_file():
            self.files = dict.fromkeys(self._names(folder / SINGLE), folder / SINGLE)
        elif (folder / INDEX).is_file():
            self._open_shards()
        elif any((folder / name).is_file() for name in PICKLES):
            if not allow_pickle_conversion:
                self._refuse_pickles(", ".join(name for name in PICKLES if (folder / name).is_file()))
            self._unpickle()
        else:
            raise CheckpointError(f"{folder} has no weights: expected {SINGLE}, or shards with {INDEX}.")

    def _refuse_pickles(self, names: str) -> None:
        raise CheckpointError(
            f"{self.folder} has its weights only as pickles ({names}), which can run code when they are read. Expected safetensors. If you "
            f"trust the files, write them as safetensors once (`workbench models {self.folder} --convert NEW_FOLDER`) or pass "
            "allow_pickle_conversion=True: both read them with torch.load(weights_only=True), which refuses everything but tensors."
        )

    def _open_file(self, path: Path, allow_pickle_conversion: bool) -> None:
        if path.suffix == ".safetensors":
            self.files = dict.fromkeys(self._names(path), path)
            return
        if path.suffix in (".json", ".md", ".txt"):
            raise CheckpointError(
                f"{path} is no file of tensors. Expected the folder around it, {path.parent}, or weights."
            )
        if not allow_pickle_conversion:
            self._refuse_pickles(path.name)
        self.unpickled = _tensors_of(path)

    def _open_shards(self) -> None:
        places = read_json(self.folder / INDEX).get("weight_map", {})
        for shard in sorted(set(places.values())):
            path = self.folder / shard
            if not path.is_file():
                here = sorted(p.name for p in self.folder.glob("*.safetensors"))
                raise CheckpointError(
                    f"{self.folder}: the shard {shard!r} is missing; {INDEX} names it. Here are: {', '.join(here) or 'none'}. "
                    "Expected all of them: download the rest."
                )
            for name in self._names(path):
                if name in places:
                    self.files[name] = path
        gone = sorted(set(places) - set(self.files))
        if gone:
            raise CheckpointError(f"{self.folder}: {INDEX} names {gone[0]!r} in {places[gone[0]]!r}, which lacks it.")

    def _unpickle(self) -> None:
        index = self.folder / PICKLES[1]
        names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [PICKLES[0]]
        for name in names:
            if not (self.folder / name).is_file():
                raise CheckpointError(f"{self.folder}: the shard {name!r} is missing; {PICKLES[1]} names it.")
            self.unpickled |= _tensors_of(self.folder / name)

    def _names(self, path: Path) -> list[str]:
        return list(self._handle(path).keys())

    def _handle(self, path: Path, handles: dict[Path, Any] | None = None) -> Any:
        """The open file, from the checkpoint's own handles or others."""
        handles = self._handles if handles is None else handles
        if path not in handles:
            handles[path] = self._opened(path)
        return handles[path]

    @staticmethod
    def _opened(path: Path) -> Any:
        try:
            return safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a whole safetensors file: {error}") from None

    @property
    def names(self) -> Iterable[str]:
        """Every stored tensor."""
        return self.files.keys() or self.unpickled.keys()

    def has(self, name: str) -> bool:
        """Whether a tensor of this name is stored."""
        return name in self.files or name in self.unpickled

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every stored tensor."""
        mapped = {name: tuple(self._handle(path).get_slice(name).get_shape()) for name, path in self.files.items()}
        return mapped or {name: tuple(tensor.shape) for name, tensor in self.unpickled.items()}

    def size(self) -> int:
        """Bytes of all tensor files."""
        return sum(path.stat().st_size for path in set(self.files.values()))

    def read(self, source: Stored, dtype: torch.dtype | None) -> Tensor:
        """The tensor that `source` describes, in `dtype` (None: as stored).

        Unchanged tensors are views of the mapped file. Those that change are read through a mapping of their own, which goes with them, so
        that a file and its converted copy never lie in memory together.
        """
        self.read_names.update(source.names)
        handles = self._handles if source.make is None and self._is(source.names[0], dtype) else {}
        raw = [self._tensor(name, handles) for name in source.names]
        tensor = raw[0] if source.make is None else source.make(*raw)
        wanted = tensor.dtype if dtype is None or not tensor.is_floating_point() else dtype
        return tensor.to(wanted).contiguous()

    def _is(self, name: str, dtype: torch.dtype | None) -> bool:
        """Whether a tensor is stored in this dtype already."""
        path = self.files.get(name)
        return dtype is None or path is None or self._handle(path).get_slice(name).get_dtype() == _CODES.get(dtype)

    def _tensor(self, name: str, handles: dict[Path, Any]) -> Tensor:
        if name in self.unpickled:
            return self.unpickled[name]
        if name not in self.files:
            raise CheckpointError(
                f"{self.folder}: the tensor {name!r} is missing.{suggestion(name, self.files)} "
                f"The checkpoint holds {len(self.files)} tensors."
            )
        return self._handle(self.files[name], handles).get_tensor(name)


def _tensors_of(path: Path) -> dict[str, Tensor]:
    """The tensors of a pickled state dict, by name; CheckpointError for a file that holds anything else."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, OSError) as error:
        raise CheckpointError(
            f"{path} is no file of tensors that torch.load(weights_only=True) reads: {str(error).splitlines()[0]} "
            "Expected a state dict."
        ) from None
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        held = ", ".join(map(repr, found)) if isinstance(found, dict) else type(found).__name__
        raise CheckpointError(
            f"{path} holds {held}. Expected tensors by name, as torch.save(model.state_dict(), path) writes them."
        )
    return found


def shapes(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and safetensors dtype of every tensor stored in a folder, or a file, read from the headers alone (`workbench models` shows
    sizes before loading)."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]:
        if path.suffix != ".safetensors":
            continue
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > path.stat().st_size:
                raise CheckpointError(f"{path} is not a whole safetensors file.")
            try:
                header = json.loads(file.read(length))
            except ValueError:
                raise CheckpointError(f"{path} is not a whole safetensors file: it has no header.") from None
        found |= {name: (tuple(r["shape"]), r["dtype"]) for name, r in header.items() if name != "__metadata__"}
    return found
