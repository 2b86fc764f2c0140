"""How much memory opening a published checkpoint takes at its highest, beside its weights as they are afterwards.

    python -m tests.benchmarks --only loading

Checkpoints of width 768 with random weights, in transformers' layout; each is opened in a fresh process and the highest resident memory
above what the process held before is read from the system. GPT-2's maps are stored transposed, Llama's as we have them; of a file in
float32 tensors stay mapped, one in bfloat16 is cast tensor by tensor. transformers' own loading of the same files stands beside.
"""

import tempfile
from pathlib import Path

from tests.benchmarks import Row
from tests.models.pretrained.peak_memory import THEIRS, peak_of_loading, write_large

LIMIT = 1.15
# name, kind, stored as, opened as, largest shard
CASES = (
    ("GPT-2, transposed", "gpt2", "float32", "float32", "10GB"),
    ("Llama, mapped", "llama", "float32", "float32", "10GB"),
    ("Llama in shards", "llama", "float32", "float32", "60MB"),
    ("Llama, bfloat16 to float32", "llama", "bfloat16", "float32", "10GB"),
    ("Llama, bfloat16 as stored", "llama", "bfloat16", "auto", "10GB"),
)


def run() -> list[Row]:
    """Peak over weights of every case."""
    rows = []
    for name, kind, stored, dtype, shard in CASES:
        with tempfile.TemporaryDirectory() as above:
            folder = Path(above) / "big"
            weights = write_large(kind, stored, folder, layers=8, shard=shard) // (
                2 if dtype == "auto" and stored == "bfloat16" else 1
            )
            ours, theirs = (peak_of_loading(folder, dtype, *load) for load in ((), (THEIRS,)))
        note = f"{ours / 1e6:.0f} MB and {weights / 1e6:.0f} MB of weights; transformers {theirs / weights:.2f}"
        rows.append(Row(f"peak of opening / weights, {name}", ours / weights, LIMIT, "bytes", note))
    return rows
