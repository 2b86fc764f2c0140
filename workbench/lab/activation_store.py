"""Activations of a model on disk: written once, resumably, and read in shuffled batches that nobody has to hold in memory.

    store = harvest(model, tokens, ["blocks.2.hook_resid_post"], "activations/gpt-english")
    for rows in store.batches("blocks.2.hook_resid_post", batch_size=1024, seed=0): ...

A store is a folder with `manifest.json` (model, text, sites, settings) and shards `shard-00000.safetensors`, each with one matrix
[row, width] per site and, for every row, its token id, position and sequence. A shard appears whole or not at all, and says where the
text goes on: after a kill the same call continues behind the last shard and ends with the same bytes.

Reading shuffles blocks of rows, then rows within a group of blocks. Disks are far slower at single rows than at blocks, and rows of one
text come one after the other, so that plain reading order would be far from random.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from workbench.instrument.errors import suggestion
from workbench.lab.checkpoints import read_json, write_json, write_tensors

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MANIFEST, ROW_FACTS = "manifest.json", ("token", "position", "sequence")


class ActivationStoreError(ValueError):
    """A folder that is not the activation store it is asked to be, or activations that cannot be stored."""


@dataclass(frozen=True)
class Site:
    """A place whose activations become rows: the axes after batch and position, flattened.

    Args:
        point: name of a hook point. head: only this head (None: all, flattened into one row). every: keep each n-th position;
            states are read at these positions only.
    """

    point: str
    head: int | None = None
    every: int = 1

    @property
    def name(self) -> str:
        """How the store calls it: the hook point, with the head behind a colon."""
        return self.point if self.head is None else f"{self.point}:{self.head}"


def harvest(
    model: Any,
    tokens: Tensor,
    sites: Sequence[Site | str],
    folder: str | Path,
    *,
    batch_size: int = 16,
    skip: int = 1,
    dtype: str = "float16",
    rows_per_shard: int = 65536,
    hooks: Sequence[Any] = (),
    progress: Callable[[float, str], None] | None = None,
    cancel: Event | None = None,
) -> "ActivationStore":
    """Run `model` over sequences and keep the activations of some sites.

    Args:
        model: hooked model. tokens: int64 [sequence, pos]. sites: hook points, or `Site` for one head or fewer positions.
        folder: of the store; the part that an interrupted call left there is kept and continued.
        skip: positions left out at the start of every sequence (the first token's activations are outliers in most models).
        dtype: `"float16"`, `"bfloat16"` or `"float32"`. rows_per_shard: a shard is closed once it has as many.
        hooks: attached while running.

    Returns:
        The store; incomplete (`store.complete` is False) if `cancel` was set.

    Raises:
        ActivationStoreError: the folder holds another store, a site's shape cannot be rows, or a value does not fit the dtype.
        UnknownHookPoint: a site that the model does not have.
    """
    chosen = [Site(site) if isinstance(site, str) else site for site in sites]
    _check(model, tokens, chosen, batch_size, skip, dtype)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    about = {
        "model": getattr(model, "name", type(model).__name__),
        "weights_sha256": weights_sha256(model),
        "tokens_sha256": hashlib.sha256(tokens.cpu().numpy().astype(np.int64).tobytes()).hexdigest(),
        "sequences": tokens.shape[0],
        "length": tokens.shape[1],
        "sites": [asdict(site) for site in chosen],
        "batch_size": batch_size,
        "skip": skip,
        "dtype": dtype,
        "rows_per_shard": rows_per_shard,
        "hooks": [repr(hook) for hook in hooks],
    }
    _agree(folder, about)
    for leftover in folder.glob(".*.tmp"):  # of a call that was killed while it wrote
        leftover.unlink()
    store = ActivationStore(folder)
    done = store.shards[-1].next_sequence if store.shards else 0
    number, pending, pending_rows = len(store.shards), [], 0
    while done < len(tokens):
        if cancel is not None and cancel.is_set():
            return ActivationStore(folder)
        batch = tokens[done : done + batch_size]
        pending.append(_rows(model, batch, chosen, skip, done, DTYPES[dtype], hooks))
        pending_rows += len(next(iter(pending[-1].values())))
        done += len(batch)
        if pending_rows >= rows_per_shard or done == len(tokens):
            shard = {key: torch.cat([piece[key] for piece in pending]) for key in pending[0]}
            write_tensors(folder / _shard_name(number), shard, {"next_sequence": done, "rows": pending_rows})
            number, pending, pending_rows = number + 1, [], 0
        if progress is not None:
            progress(done / len(tokens), f"{done} of {len(tokens)} sequences")
    return ActivationStore(folder)


def site_activations(cache: Any, site: Site) -> Tensor:
    """A site's numbers from `run_with_cache(…, positions=…)`: [batch, pos, width], the axes but those two flattened.

    Raises:
        ActivationStoreError: the site has no such head.
    """
    point = cache.point(site.point)
    tensor = pos_second(cache[site.point], point)
    if site.head is not None:
        axes = ["pos", *(axis for axis in point.axes if axis not in ("batch", "pos"))]
        place = axes.index("head") + 1
        if not 0 <= site.head < tensor.shape[place]:
            raise ActivationStoreError(f"{site.point!r} has heads 0..{tensor.shape[place] - 1}, not {site.head}")
        tensor = tensor.select(place, site.head)
    return tensor.flatten(2) if tensor.ndim > 2 else tensor[..., None]


def pos_second(x: Tensor, point: Any) -> Tensor:
    """A view of a hook point's activation with its position axis after the batch; states at several positions are cached so already."""
    return x.movedim(point.axes.index("pos"), 1) if "pos" in point.axes else x


def sequences_of(text: bytes | Tensor, length: int, limit: int | None = None) -> Tensor:
    """A text cut into sequences of `length` tokens one after the other: int64 [sequence, pos]; a shorter rest is left out.

    Args:
        text: bytes (token = byte value) or token ids [pos]. limit: at most as many sequences, spread evenly over the text.

    Raises:
        ValueError: the text is shorter than one sequence.
    """
    ids = torch.frombuffer(bytearray(text), dtype=torch.uint8) if isinstance(text, bytes) else text
    count = len(ids) // length
    if not count:
        raise ValueError(f"a text of {len(ids)} tokens has no sequence of {length}")
    sequences = ids[: count * length].view(count, length)
    if limit is not None and limit < count:
        sequences = sequences[torch.linspace(0, count - 1, limit).round().long()]
    return sequences.long()


def weights_sha256(model: Any) -> str:
    """Digest of a model's parameters and buffers, by name: tells whether two stores come from the same weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class _Shard:
    path: Path
    rows: int
    next_sequence: int


class ActivationStore:
    """A folder written by `harvest`. Rows are numbered over all shards, from 0.

    Raises:
        ActivationStoreError: the folder is no store, or a shard is missing between others.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        if not (self.path / MANIFEST).is_file():
            raise ActivationStoreError(
                f"{self.path} is no activation store: it has no {MANIFEST}. Make one with harvest."
            )
        self.manifest: dict[str, Any] = read_json(self.path / MANIFEST)
        self.sites = {site.name: site for site in (Site(**record) for record in self.manifest["sites"])}
        names = sorted(path.name for path in self.path.glob("shard-*.safetensors"))
        if names != [_shard_name(number) for number in range(len(names))]:
            raise ActivationStoreError(f"{self.path}: shards are missing; found {', '.join(names)}")
        self.shards: list[_Shard] = []
        for name in names:
            with safe_open(self.path / name, framework="pt") as file:
                about = json.loads(file.metadata()["workbench"])["about"]
            self.shards.append(_Shard(self.path / name, about["rows"], about["next_sequence"]))
        self._files: dict[Path, Any] = {}

    def __len__(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def complete(self) -> bool:
        """Whether all sequences were read."""
        return bool(self.shards) and self.shards[-1].next_sequence == self.manifest["sequences"]

    def width(self, site: str) -> int:
        """Numbers per row."""
        return int(self._slice(self.shards[0].path, self._site(site)).get_shape()[1])

    def rows(self, site: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows in the order of the text: float32 [row, width]."""
        return self._read(self._site(site), start, len(self) if stop is None else stop).float()

    def facts(self, start: int = 0, stop: int | None = None) -> dict[str, Tensor]:
        """`token`, `position` and `sequence` of each row, int64 [row]."""
        stop = len(self) if stop is None else stop
        return {name: self._read(f".{name}", start, stop).long() for name in ROW_FACTS}

    def batches(
        self,
        site: str,
        batch_size: int,
        *,
        seed: int = 0,
        start: int = 0,
        epochs: int | None = 1,
        block: int = 256,
        blocks_at_once: int = 64,
    ) -> Iterator[Tensor]:
        """Shuffled batches, float32 [batch_size, width]; every row once per epoch (the last, smaller batch of an epoch is left out).

        Args:
            start: batches to leave out at the beginning: a resumed reader goes on exactly where it stopped. epochs: None for no end.
            block, blocks_at_once: rows per block, and blocks that are in memory and mixed at a time.
        """
        site = self._site(site)
        per_epoch = len(self) // batch_size
        if not per_epoch:
            raise ActivationStoreError(f"{self.path} has {len(self)} rows, fewer than one batch of {batch_size}")
        epoch, first = divmod(start, per_epoch)
        while epochs is None or epoch < epochs:
            yield from self._epoch(site, batch_size, np.random.default_rng([seed, epoch]), first, block, blocks_at_once)
            epoch, first = epoch + 1, 0

    def sample(self, site: str, count: int, seed: int = 0) -> Tensor:
        """`count` shuffled rows (all, if there are fewer): float32 [row, width]."""
        count = min(count, len(self))
        return next(self.batches(site, count, seed=seed, blocks_at_once=max(64, -(-count // 256))))

    def __repr__(self) -> str:
        state = "" if self.complete else ", incomplete"
        widths = ", ".join(f"{name} [{self.width(name)}]" for name in self.sites) if self.shards else "nothing yet"
        return f"ActivationStore({str(self.path)!r}, {len(self):,} rows of {self.manifest['model']}: {widths}{state})"

    def _epoch(
        self, site: str, batch_size: int, random: Any, first: int, block: int, blocks_at_once: int
    ) -> Iterator[Tensor]:
        """An epoch's order is fixed: blocks shuffled, then rows shuffled within each group of blocks. Batches cut it into pieces."""
        blocks = [
            (begin + offset, min(begin + offset + block, begin + shard.rows))
            for begin, shard in zip(self._begins, self.shards, strict=True)
            for offset in range(0, shard.rows, block)
        ]
        random.shuffle(blocks)
        groups = [blocks[i : i + blocks_at_once] for i in range(0, len(blocks), blocks_at_once)]
        seeds = random.integers(2**63, size=len(groups))
        waiting: list[Tensor] = []
        to_leave_out, held = first * batch_size, 0
        for group, group_seed in zip(groups, seeds, strict=True):
            size = sum(stop - start for start, stop in group)
            if to_leave_out >= size:
                to_leave_out -= size
                continue
            rows = torch.cat([self._read(site, *part) for part in group])
            order = torch.from_numpy(np.random.default_rng(int(group_seed)).permutation(size))
            waiting.append(rows[order][to_leave_out:].float())
            held, to_leave_out = held + size - to_leave_out, 0
            if held >= batch_size:
                joined = torch.cat(waiting)
                whole = held - held % batch_size
                yield from joined[:whole].split(batch_size)
                waiting, held = [joined[whole:]], held - whole

    @cached_property
    def _begins(self) -> list[int]:
        return [0, *np.cumsum([shard.rows for shard in self.shards]).tolist()][:-1]

    def _site(self, name: str) -> str:
        if name not in self.sites:
            raise ActivationStoreError(
                f"{self.path} has no site {name!r}.{suggestion(name, self.sites)} It has: {', '.join(self.sites)}."
            )
        return name

    def _slice(self, path: Path, key: str) -> Any:
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")  # maps the file, reads nothing yet
        return self._files[path].get_slice(key)

    def _read(self, key: str, start: int, stop: int) -> Tensor:
        if not 0 <= start <= stop <= len(self):
            raise ActivationStoreError(f"rows {start} to {stop} are outside 0 … {len(self)}")
        pieces = [
            self._slice(shard.path, key)[max(start - begin, 0) : min(stop - begin, shard.rows)]
            for begin, shard in zip(self._begins, self.shards, strict=True)
            if begin < stop and start < begin + shard.rows
        ]
        return torch.cat(pieces) if pieces else torch.empty(0)


def _shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


def _check(model: Any, tokens: Tensor, sites: Sequence[Site], batch_size: int, skip: int, dtype: str) -> None:
    if tokens.ndim != 2 or tokens.dtype != torch.int64 or not tokens.numel():
        raise ActivationStoreError(f"tokens: expected int64 [sequence, pos], got {tokens.dtype} {list(tokens.shape)}")
    if dtype not in DTYPES:
        raise ActivationStoreError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}.{suggestion(dtype, DTYPES)}")
    if not 0 <= skip < tokens.shape[1]:
        raise ActivationStoreError(f"skip is {skip}; sequences have {tokens.shape[1]} tokens")
    if batch_size < 1 or any(site.every < 1 for site in sites):
        raise ActivationStoreError("batch_size and every must be at least 1")
    if not sites or len({site.name for site in sites}) < len(sites):
        raise ActivationStoreError("expected at least one site, each once")
    for site in sites:
        _, selected = model.hook_points.resolve(site.point)[0]
        axes = selected[0].point.axes
        if len(selected) != 1 or axes[0] != "batch" or not (selected[0].point.per_position or "pos" in axes):
            raise ActivationStoreError(
                f"{site.point!r} has the axes {' '.join(axes)}; a site needs one hook point with a row for every position"
            )
        if site.head is not None and "head" not in axes:
            raise ActivationStoreError(
                f"{site.point!r} has no head axis (it has {' '.join(axes)}), so no head {site.head}"
            )


def _agree(folder: Path, about: dict[str, Any]) -> None:
    if not (folder / MANIFEST).exists():
        write_json(folder / MANIFEST, about)
        return
    before = read_json(folder / MANIFEST)
    differing = [name for name in about if before.get(name) != about[name]]
    if differing:
        told = "; ".join(f"{name} was {before.get(name)!r}, now {about[name]!r}" for name in differing)
        raise ActivationStoreError(f"{folder} holds another store: {told}. Choose another folder or delete it.")


def _rows(
    model: Any, tokens: Tensor, sites: Sequence[Site], skip: int, first: int, dtype: torch.dtype, hooks: Sequence[Any]
) -> dict[str, Tensor]:
    """The rows of one batch of sequences: one matrix per site, and what each row is. Sites with other strides share the coarsest."""
    length = tokens.shape[1]
    every = {site.every for site in sites}
    if len(every) > 1:
        raise ActivationStoreError(f"sites of one store share `every`, since rows are shared; got {sorted(every)}")
    positions = list(range(skip, length, every.pop()))
    with torch.no_grad():
        _, cache = model.run_with_cache(
            tokens, names=[site.point for site in sites], positions=positions, hooks=list(hooks)
        )
    rows: dict[str, Tensor] = {}
    for site in sites:
        flat = site_activations(cache, site).flatten(0, 1)
        stored = flat.to(dtype)
        if not bool(stored.isfinite().all()):
            top = float(flat.abs().max())
            raise ActivationStoreError(
                f"{site.name}: activations up to {top:.3g} do not fit {str(dtype).removeprefix('torch.')}. Choose bfloat16 or float32."
            )
        rows[site.name] = stored
    count = len(tokens)
    rows[".token"] = tokens[:, positions].flatten().int()
    rows[".position"] = torch.tensor(positions, dtype=torch.int32).repeat(count)
    rows[".sequence"] = torch.arange(first, first + count, dtype=torch.int32).repeat_interleave(len(positions))
    return rows
