"""The activation store: rows are the model's activations, nothing is lost by a stop, and shuffling loses and repeats no row."""

from pathlib import Path
from threading import Event

import pytest
import torch
from torch import Tensor

import models
from workbench import Scale
from workbench.instrument.errors import UnknownHookPoint
from workbench.lab.activation_store import ActivationStore, ActivationStoreError, Site, harvest, sequences_of

RESID, STATE = "blocks.1.hook_resid_post", "blocks.0.mixer.hook_state"


@pytest.fixture(scope="module")
def model() -> models.LanguageModel:
    return models.build("retnet")


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(0, 256, (11, 9), generator=torch.Generator().manual_seed(0))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_rows_are_the_activations(model: models.LanguageModel, tokens: Tensor, tmp_path: Path) -> None:
    sites = [RESID, Site("blocks.0.mixer.hook_z", head=2)]
    store = harvest(model, tokens, sites, tmp_path / "s", batch_size=4, dtype="float32", rows_per_shard=20)
    assert store.complete and len(store) == 11 * 8 and len(store.shards) == 3
    _, cache = model.run_with_cache(tokens, names=[RESID, "blocks.0.mixer.hook_z"])
    assert torch.allclose(store.rows(RESID), cache[RESID][:, 1:].flatten(0, 1), atol=1e-6)
    assert torch.allclose(
        store.rows("blocks.0.mixer.hook_z:2"), cache["blocks.0.mixer.hook_z"][:, 1:, 2].flatten(0, 1), atol=1e-6
    )
    facts = store.facts()
    assert torch.equal(facts["token"], tokens[:, 1:].flatten())
    assert facts["position"].tolist() == list(range(1, 9)) * 11
    assert facts["sequence"].tolist() == [i for i in range(11) for _ in range(8)]
    assert torch.equal(store.rows(RESID, 17, 45), store.rows(RESID)[17:45])  # across a shard's border
    assert store.width(RESID) == 24 and "88 rows" in repr(store)


def test_points_with_heads_before_positions_become_rows_of_tokens(tokens: Tensor, tmp_path: Path) -> None:
    model, point = models.build("bdh"), "blocks.1.hook_y"  # batch head pos neuron
    store = harvest(model, tokens, [point, Site(point, head=1)], tmp_path / "s", batch_size=4, dtype="float32")
    y = model.run_with_cache(tokens, names=[point])[1][point]
    rows = [torch.cat([y[b, 0, t], y[b, 1, t]]) for b in range(11) for t in range(1, 9)]
    assert torch.allclose(store.rows(point), torch.stack(rows), atol=1e-6)
    assert torch.allclose(store.rows(f"{point}:1"), torch.stack(rows)[:, y.shape[-1] :], atol=1e-6)


def test_states_become_rows_at_some_positions(model: models.LanguageModel, tokens: Tensor, tmp_path: Path) -> None:
    store = harvest(
        model, tokens, [Site(STATE, head=1, every=3)], tmp_path / "s", batch_size=5, skip=2, dtype="float32"
    )
    reading = model.states(tokens, positions=[2, 5, 8])
    expected = reading[0][:, :, 1].flatten(2).flatten(0, 1)
    assert torch.allclose(store.rows(f"{STATE}:1"), expected, atol=1e-6)
    assert store.facts()["position"].tolist() == [2, 5, 8] * 11


@pytest.mark.parametrize("how", ["cancelled", "killed"])
def test_a_stopped_harvest_goes_on_and_ends_with_the_same_bytes(
    how: str, model: models.LanguageModel, tokens: Tensor, tmp_path: Path
) -> None:
    options = {"batch_size": 2, "rows_per_shard": 30}
    harvest(model, tokens, [RESID], tmp_path / "whole", **options)
    cancel, calls = Event(), []

    def stop(fraction: float, message: str) -> None:
        calls.append(fraction)
        if len(calls) == 4:
            if how == "killed":
                raise KeyboardInterrupt
            cancel.set()

    folder = tmp_path / "stopped"
    if how == "killed":
        with pytest.raises(KeyboardInterrupt):
            harvest(model, tokens, [RESID], folder, progress=stop, **options)
        (folder / ".shard-00001.safetensors.123.tmp").write_bytes(b"half")
    else:
        assert not harvest(model, tokens, [RESID], folder, progress=stop, cancel=cancel, **options).complete
    assert not ActivationStore(folder).complete and "incomplete" in repr(ActivationStore(folder))
    before = contents(folder)
    store = harvest(model, tokens, [RESID], folder, **options)
    assert store.complete and contents(folder) == contents(tmp_path / "whole")
    kept = [name for name in before if name.startswith("shard")]
    assert kept and all(before[name] == contents(folder)[name] for name in kept)
    assert harvest(model, tokens, [RESID], folder, **options).complete  # nothing left to do


def test_every_row_comes_once_per_epoch_in_an_order_that_the_seed_decides(
    model: models.LanguageModel, tokens: Tensor, tmp_path: Path
) -> None:
    store = harvest(model, tokens, [RESID], tmp_path / "s", batch_size=3, dtype="float32", rows_per_shard=25)
    options = {"block": 5, "blocks_at_once": 4}

    def order(batches: list[Tensor]) -> list[int]:
        """Which stored row each row is."""
        return torch.cdist(torch.cat(batches), store.rows(RESID)).argmin(1).tolist()

    one = list(store.batches(RESID, 8, seed=1, **options))
    assert [len(batch) for batch in one] == [8] * 11 and sorted(order(one)) == list(range(88))
    again, other = list(store.batches(RESID, 8, seed=1, **options)), list(store.batches(RESID, 8, seed=2, **options))
    assert order(again) == order(one) != order(other) and order(one) != sorted(order(one))
    two = list(store.batches(RESID, 7, seed=1, epochs=2, **options))  # 88 = 12 · 7 + 4
    assert len(two) == 24 and order(two[:12]) != order(two[12:]) and len(set(order(two[:12]))) == 84
    for start in (0, 3, 11, 12, 17):
        resumed = list(store.batches(RESID, 7, seed=1, epochs=2, start=start, **options))
        assert len(resumed) == 24 - start
        assert all(torch.equal(a, b) for a, b in zip(resumed, two[start:], strict=True))
    neighbours = [abs(a - b) == 1 for a, b in zip(order(one), order(one)[1:], strict=False)]
    assert sum(neighbours) < 30
    assert len(store.sample(RESID, 50)) == 50 and len(store.sample(RESID, 10**6)) == 88


def test_hooks_are_applied_and_belong_to_the_store(model: models.LanguageModel, tokens: Tensor, tmp_path: Path) -> None:
    scaled = Scale("blocks.0.hook_mixer_out", 0.0)
    store = harvest(model, tokens, [RESID], tmp_path / "s", hooks=[scaled], dtype="float32")
    plain = harvest(model, tokens, [RESID], tmp_path / "p", dtype="float32")
    assert not torch.allclose(store.rows(RESID), plain.rows(RESID))
    with pytest.raises(ActivationStoreError, match="hooks was"):
        harvest(model, tokens, [RESID], tmp_path / "s", dtype="float32")


def test_sequences_of_a_text() -> None:
    assert sequences_of(b"abcdefgh", 3).tolist() == [[97, 98, 99], [100, 101, 102]]
    assert sequences_of(torch.arange(100), 10, limit=3)[:, 0].tolist() == [0, 40, 90]
    with pytest.raises(ValueError, match="2 tokens has no sequence of 3"):
        sequences_of(b"ab", 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.zeros(3)}, r"int64 \[sequence, pos\]"),
        ({"dtype": "float8"}, "expected one of float16"),
        ({"skip": 9}, "sequences have 9 tokens"),
        ({"sites": []}, "at least one site"),
        ({"sites": [RESID, RESID]}, "each once"),
        ({"sites": [Site(RESID, head=1)]}, "no head axis"),
        ({"sites": [Site("blocks.0.mixer.hook_z", head=3)]}, r"heads 0\.\.2, not 3"),
        ({"sites": ["blocks.0.mixer.hook_pattern"]}, "a row for every position"),
        ({"sites": [RESID, Site("blocks.0.hook_resid_post", every=2)]}, "share `every`"),
    ],
)
def test_mistakes_are_named(
    change: dict, message: str, model: models.LanguageModel, tokens: Tensor, tmp_path: Path
) -> None:
    arguments = {"tokens": tokens, "sites": [RESID], "folder": tmp_path / "s", **change}
    with pytest.raises(ActivationStoreError, match=message):
        harvest(model, **arguments)


def test_mistakes_of_folders_and_values(model: models.LanguageModel, tokens: Tensor, tmp_path: Path) -> None:
    with pytest.raises(UnknownHookPoint, match="hook_resid_post"):
        harvest(model, tokens, ["blocks.1.hook_resid_pots"], tmp_path / "a")
    with pytest.raises(ActivationStoreError, match="do not fit float16"):
        harvest(model, tokens, [RESID], tmp_path / "b", hooks=[Scale("hook_embed", 1e7)])
    store = harvest(model, tokens, [RESID], tmp_path / "c", batch_size=2, rows_per_shard=30)
    with pytest.raises(ActivationStoreError, match="batch_size was 2, now 3"):
        harvest(model, tokens, [RESID], tmp_path / "c", batch_size=3, rows_per_shard=30)
    with pytest.raises(ActivationStoreError, match=r"Did you mean 'blocks\.1\.hook_resid_post'"):
        store.rows("blocks.1.hook_resid")
    with pytest.raises(ActivationStoreError, match="fewer than one batch of 1000"):
        next(store.batches(RESID, 1000))
    with pytest.raises(ActivationStoreError, match="outside 0 … 88"):
        store.rows(RESID, 80, 90)
    (tmp_path / "c" / "shard-00001.safetensors").unlink()
    with pytest.raises(ActivationStoreError, match="shards are missing"):
        ActivationStore(tmp_path / "c")
    with pytest.raises(ActivationStoreError, match="no activation store"):
        ActivationStore(tmp_path)
