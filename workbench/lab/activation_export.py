"""Stored activations for other programs: a Hugging Face dataset, or plain safetensors shards.

    export_dataset(store, "rows")          datasets.load_from_disk("rows"): token, position, sequence and one column per site
    export_safetensors(store, "plain")     activations-00000-of-00003.safetensors with the same names, and activations.json

Both hold every row of the store in its order, in float32 or as stored, and appear whole or not at all.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from workbench.lab.activation_store import ActivationStore, ActivationStoreError

ROWS = 4096  # rows in memory at a time


def export_dataset(store: ActivationStore, folder: str | Path) -> Path:
    """Write a dataset that `datasets.load_from_disk` opens, with columns token, position, sequence and, per site, float32 of its width.

    Raises:
        ActivationStoreError: the folder exists, the store is empty or incomplete, or the package `datasets` is missing.
    """
    try:
        import datasets
    except ImportError:
        raise ActivationStoreError(
            "A Hugging Face dataset needs the package datasets: pip install datasets. Expected it, or export_safetensors."
        ) from None
    target, partial = _places(store, folder)
    columns: dict[str, Any] = {name: datasets.Value("int64") for name in ("token", "position", "sequence")}
    columns |= {site: datasets.List(datasets.Value("float32"), length=store.width(site)) for site in store.sites}
    features = datasets.Features(columns)
    partial.mkdir(parents=True)
    try:
        writer = datasets.arrow_writer.ArrowWriter(path=str(partial / "data-00000-of-00001.arrow"), features=features)
        for part in _parts(store):
            writer.write_batch(
                {
                    name: values.numpy() if values.ndim == 1 else list(values.float().numpy())
                    for name, values in part.items()
                }
            )
        writer.finalize()
        whole = datasets.Dataset.from_file(str(partial / "data-00000-of-00001.arrow"))
        whole.info.description = json.dumps(store.manifest)
        whole.save_to_disk(str(partial / "saved"))
        (partial / "saved").replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def export_safetensors(store: ActivationStore, folder: str | Path, rows_per_shard: int = 65536) -> Path:
    """Write plain shards of matrices [row, width] in float32, with token, position and sequence [row], and an index `activations.json`.

    Raises:
        ActivationStoreError: the folder exists, the store is empty or incomplete, or shards of less than one row.
    """
    from safetensors.torch import save_file

    if rows_per_shard < 1:
        raise ActivationStoreError(f"rows_per_shard is {rows_per_shard}; expected at least 1.")
    target, partial = _places(store, folder)
    count = -(-len(store) // rows_per_shard)
    shards = []
    partial.mkdir(parents=True)
    try:
        for number, part in enumerate(_parts(store, rows_per_shard)):
            name = f"activations-{number:05d}-of-{count:05d}.safetensors"
            save_file({key: values.contiguous() for key, values in part.items()}, str(partial / name))
            shards.append({"file": name, "rows": len(part["token"])})
        index = {
            "rows": len(store),
            "sites": {site: store.width(site) for site in store.sites},
            "shards": shards,
            "source": store.manifest,
        }
        (partial / "activations.json").write_text(json.dumps(index, indent=2))
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _places(store: ActivationStore, folder: str | Path) -> tuple[Path, Path]:
    """Where the export goes, and where it is written before it is whole."""
    target = Path(folder)
    if target.exists():
        raise ActivationStoreError(f"{target} is there already. Choose another folder or delete it.")
    if not store.complete:
        raise ActivationStoreError(f"{store.path} is not complete. Finish it with the same call of harvest.")
    partial = target.with_name(f".partial-{target.name}")
    shutil.rmtree(partial, ignore_errors=True)  # of a call that was killed
    return target, partial


def _parts(store: ActivationStore, rows: int = ROWS) -> Iterator[dict[str, Tensor]]:
    """The store in pieces: {token, position, sequence, site: ...}."""
    for start in range(0, len(store), rows):
        stop = min(start + rows, len(store))
        yield store.facts(start, stop) | {site: store.rows(site, start, stop) for site in store.sites}
