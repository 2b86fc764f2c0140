"""The run store: what is written is complete and checked, whatever is killed, corrupted or linked."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from workbench.lab.run_format import RUN_ID, STORED_DTYPES, read_array_header
from workbench.lab.runs import Run, RunError, RunNotFoundError, RunStore

ROOT = Path(__file__).parents[2]
MODEL = {"name": "tiny", "provenance": "trained", "architecture": "gpt"}


@pytest.fixture
def store(tmp_path: Path) -> RunStore:
    return RunStore(tmp_path / "runs")


def write(store: RunStore, title: str = "A run", kind: str = "training", **fields: Any) -> str:
    with store.create(kind, title, model=MODEL, **fields) as run:
        run.add_array("loss", np.linspace(3, 1, 5, dtype=np.float32), axes=("step",), unit="nats")
        run.add_array("steps", np.arange(6).reshape(2, 3), axes=("a", "b"))
    return run.id


def trace(store: RunStore, change: Callable[[dict, dict], None] = lambda layer, arrays: None, **fields: Any) -> str:
    """A minimal trace run: one softmax layer, 2 heads in one key group, 4 tokens."""
    layer = {"layer": 0, "kind": "attention", "form": "softmax", "n_heads": 2, "n_key_heads": 1, "n_value_heads": 1,
             "scale": 1.0, "strict": False, "alibi_slopes": None, "window": None, "pattern": {}, "state": None,
             "signals": []}  # fmt: skip
    arrays = {
        "tokens": np.arange(4, dtype=np.int32),
        "layer.0.query": np.zeros((2, 4, 3), np.float32),
        "layer.0.key": np.zeros((1, 4, 3), np.float32),
        "layer.0.value": np.zeros((1, 4, 3), np.float32),
        "layer.0.log_normaliser": np.zeros((2, 4), np.float32),
    }
    change(layer, arrays)
    tokens = {"ids": [0, 1, 2, 3], "strings": ["a", "b", "c", "d"], "tokenizer": "bytes"}
    with store.create("trace", "t", **{"model": MODEL, "tokens": tokens, "layers": [layer], **fields}) as run:
        for name, array in arrays.items():
            run.add_array(name, array, axes=[f"axis{number}" for number in range(array.ndim)])
    return run.id


def edit_manifest(store: RunStore, run_id: str, **changes: Any) -> None:
    path = store.root / run_id / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# ---- writing and reading --------------------------------------------------------------------------------------------


def test_a_run_comes_back_as_it_was_written(store: RunStore) -> None:
    values = (np.arange(24) % 2).reshape(2, 3, 4)
    arrays: dict[str, Any] = {dtype: values.astype(dtype) for dtype in STORED_DTYPES.values()}
    arrays |= {
        "empty": np.zeros((0, 3), np.float32),
        "number": np.float32(2.5),
        "transposed": np.arange(6.0).reshape(2, 3).T,
        "big_endian": np.arange(3, dtype=">f4"),
        "nan": np.array([np.nan, np.inf]),
    }
    with store.create("training", "Größe & <b>", model=MODEL, seed=3) as writer:
        for name, array in arrays.items():
            writer.add_array(name, array, axes=[f"axis{n}" for n in range(np.ndim(array))], unit="nats")
        writer.set(settings={"rate": np.float32(0.5), "sizes": (1, np.int64(2)), "path": Path("x")}, text="hello")
        writer.set(results={"loss": 1.5})
    run = store.open(writer.id)
    assert run.kind == "training" and run.title == "Größe & <b>" and run.model["name"] == "tiny"
    assert run.manifest["settings"] == {"rate": 0.5, "sizes": [1, 2], "path": "x"} and run.manifest["seed"] == 3
    assert run.manifest["results"] == {"loss": 1.5} and run.manifest["text"] == "hello"
    assert run.manifest["seconds"] >= 0 and run.manifest["machine"] and run.manifest["code_version"]
    assert set(run.arrays()) == set(arrays)
    assert run.arrays()["float16"] == {"shape": [2, 3, 4], "dtype": "float16", "axes": ["axis0", "axis1", "axis2"],
                                       "unit": "nats"}  # fmt: skip
    for name, array in arrays.items():
        got = run.array(name)
        np.testing.assert_array_equal(got, array)
        assert got.dtype == np.asarray(array).dtype.newbyteorder("=") and got.shape == np.shape(array)
        with pytest.raises(ValueError, match="read-only"):
            got[...] = 0


def test_the_array_file_is_plain_safetensors(store: RunStore) -> None:
    run = store.open(write(store))
    other = load_file(run.path / "arrays.safetensors")
    assert other.keys() == run.arrays().keys()
    for name, array in other.items():
        np.testing.assert_array_equal(run.array(name), array)
    digest = hashlib.sha256((run.path / "arrays.safetensors").read_bytes()).hexdigest()
    assert run.manifest["arrays_sha256"] == digest == run.verify()


def test_arrays_are_mapped_not_read(store: RunStore) -> None:
    with store.create("big", "b") as writer:
        writer.add_array("small", np.arange(4), axes=("pos",))
        writer.add_array("large", np.zeros((1000, 1000)), axes=("a", "b"))
    run = store.open(writer.id)
    assert run.array("large").base is not None and not run.array("large").flags.owndata
    row = run.array("small")
    store.delete(writer.id)
    np.testing.assert_array_equal(row, np.arange(4))  # a mapped array outlives its folder


def test_an_array_is_copied_when_it_is_added(store: RunStore) -> None:
    values = np.zeros(3)
    with store.create("training", "copy") as writer:
        writer.add_array("values", values, axes=("pos",))
        values[:] = 7
    assert store.open(writer.id).array("values").tolist() == [0, 0, 0]


def test_ids(store: RunStore) -> None:
    first, second = write(store, "A title: Größe!! " + "x" * 90), write(store, "…")
    assert RUN_ID.fullmatch(first) and len(first) <= 64 and "-a-title-gr-e-xxx" in first
    assert RUN_ID.fullmatch(second) and "-training-" in second
    assert len({write(store) for _ in range(20)}) == 20


def test_an_id_that_is_taken_is_drawn_again(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = write(store)[-6:]
    drawn = iter([moment] * 3 + ["aaaaaa"] + ["bbbbbb"] * 9)
    monkeypatch.setattr("workbench.lab.run_writer.secrets.token_hex", lambda size: next(drawn))
    frozen = store.list()[0].created
    monkeypatch.setattr("workbench.lab.run_writer.datetime", type("Frozen", (), {"now": lambda zone: _time(frozen)}))
    assert write(store).endswith("-aaaaaa") and len(store.list()) == 2


def _time(text: str) -> Any:
    from datetime import datetime

    return datetime.fromisoformat(text)


def test_figures(store: RunStore) -> None:
    figure = type("Figure", (), {"to_json": lambda self: '{"data": []}'})()
    with store.create("training", "f") as writer:
        writer.add_figure("map.png", b"\x89PNG")
        writer.add_figure("plot.json", figure)
        writer.add_figure("table.csv", "a,ü\n")
        for bad in ("../x.png", "x.html", "x", ".png", "a/b.png"):
            with pytest.raises(RunError, match="is not a figure name"):
                writer.add_figure(bad, b"")
        with pytest.raises(RunError, match="already has a figure"):
            writer.add_figure("map.png", b"")
        with pytest.raises(RunError, match="is a int, expected bytes, text or an object with to_json"):
            writer.add_figure("x.png", 3)
    run = store.open(writer.id)
    assert run.figures() == ["map.png", "plot.json", "table.csv"]
    assert run.figure("map.png") == b"\x89PNG" and json.loads(run.figure("plot.json")) == {"data": []}
    assert run.figure("table.csv").decode() == "a,ü\n"
    with pytest.raises(RunNotFoundError, match=r"no figure 'mop.png'. Did you mean 'map.png'"):
        run.figure("mop.png")
    run.verify()
    (run.path / "figures" / "table.csv").write_text("changed")
    with pytest.raises(RunError, match=r"figure 'table.csv' .* has changed"):
        run.verify()


def test_modes_and_the_default_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORKBENCH_RUNS", str(tmp_path / "a" / "b"))
    store = RunStore()
    assert store.root == tmp_path / "a" / "b" and stat.S_IMODE(store.root.stat().st_mode) == 0o700
    assert stat.S_IMODE((store.root / write(store)).stat().st_mode) == 0o700
    monkeypatch.delenv("WORKBENCH_RUNS")
    monkeypatch.chdir(tmp_path)
    assert RunStore().root == tmp_path / "runs"
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="is a file, expected a folder"):
        RunStore(tmp_path / "file")


def test_the_notebook_table_is_escaped(store: RunStore) -> None:
    run = store.open(write(store, "<script>alert(1)</script>", text="<img src=x>"))
    table = run._repr_html_()
    assert "<script>" not in table and "<img" not in table and "&lt;script&gt;" in table and "&lt;img" in table
    assert run.id in repr(run) and "2 arrays" in repr(run)


def test_mistakes_while_writing_are_named(store: RunStore) -> None:
    expectations: list[tuple[Callable[[Any], Any], str]] = [
        (lambda run: run.set(seting={}), "no settable manifest field 'seting'. Did you mean 'settings'"),
        (lambda run: run.set(id="x"), "no settable manifest field 'id'"),
        (lambda run: run.set(model={"name": "x", "familly": 1}), "no model field 'familly'. Did you mean 'family'"),
        (lambda run: run.add_array("a b", [1], axes=("x",)), "'a b' is not an array name"),
        (lambda run: run.add_array("a", [[1]], axes=("x",)), r"shape \(1, 1\) needs 2 axis names, got \('x',\)"),
        (lambda run: run.add_array("a", [1], axes="x"), "needs 1 axis names, got 'x'"),
        (lambda run: run.add_array("a", ["s"], axes=("x",)), "has dtype <U1, expected one of float64"),
        (lambda run: run.add_array("a", [None], axes=("x",)), "has dtype object"),
        (lambda run: run.add_array("a", [1j], axes=("x",)), "has dtype complex128"),
    ]
    with store.create("training", "t") as writer:
        for mistake, message in expectations:
            with pytest.raises(RunError, match=message):
                mistake(writer)
        writer.add_array("a", [1], axes=("x",))
        with pytest.raises(RunError, match="already has an array 'a'"):
            writer.add_array("a", [1], axes=("x",))
    with pytest.raises(RunError, match="closed: the run is finished and cannot change"):
        writer.add_array("b", [1], axes=("x",))
    with pytest.raises(RunError, match="closed"):
        writer.__enter__()
    with pytest.raises(RunError, match="new: use it inside its with statement"):
        store.create("training", "t").add_array("a", [1], axes=("x",))
    assert store.open(writer.id).arrays().keys() == {"a"}


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("Bad Kind", {}, "kind 'Bad Kind' is not a word"),
        ("training", {"settings": {"x": float("nan")}}, "field 'settings' cannot be written as JSON"),
        ("training", {"settings": {"x": object()}}, "object is not a JSON value"),
        ("training", {"settings": [1]}, "settings is not a dict"),
        ("training", {"model": {"name": "x"}}, "model.provenance is None, expected one of trained, random, pretrained"),
        ("training", {"model": {"provenance": "random"}}, "model.name is missing"),
        ("training", {"tokens": {"ids": [1], "strings": []}}, "1 ids but 0 strings"),
        ("training", {"tokens": {"ids": [True], "strings": ["a"]}}, "tokens.ids is not a list of whole numbers"),
        ("training", {"hook_points": [{"name": "x"}]}, "a hook point lacks name, role or axes"),
        ("trace", {"model": None}, "model is NoneType"),
    ],
)
def test_a_manifest_that_breaks_the_contract_is_not_written(
    store: RunStore, kind: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(RunError, match=message), store.create(kind, "t", **fields):
        pass
    assert store.list() == [] and not list(store.root.glob(".partial*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer, arrays: arrays.pop("tokens"), "a trace run needs the array 'tokens'"),
        (lambda layer, arrays: arrays.pop("layer.0.key"), "needs the array 'layer.0.key'"),
        (lambda layer, arrays: arrays.pop("layer.0.log_normaliser"), "needs the array 'layer.0.log_normaliser'"),
        (lambda layer, arrays: arrays.update({"loss": np.zeros(3)}), r"'loss' has shape \[3\], expected \[4\]"),
        (lambda layer, arrays: arrays.update({"resid_norm": np.zeros((2, 3))}), r"expected \['any', 4\]"),
        (lambda layer, arrays: arrays.update({"overview.0": np.zeros((2, 3, 3))}), r"expected \[2, 4, 4\]"),
        (lambda layer, arrays: layer.update(form="dense"), "needs the array 'layer.0.pattern'"),
        (lambda layer, arrays: layer.update(form="soft"), "form is 'soft', expected one of softmax"),
        (lambda layer, arrays: layer.update(layer=-1), "has the layer number -1"),
        (lambda layer, arrays: layer.update(layer=1), "needs the array 'layer.1.query'"),
        (lambda layer, arrays: layer.update(n_key_heads=3), "n_key_heads is 3, expected a divisor of n_heads = 2"),
        (lambda layer, arrays: layer.update(alibi_slopes=[1.0]), "alibi_slopes is not null and not a list of 2"),
        (lambda layer, arrays: layer.update(window=0), "window is 0"),
        (lambda layer, arrays: layer.update(scale="1"), "scale is '1', expected a number"),
        (lambda layer, arrays: layer.update(signals=[{"array": "layer.0.kay"}]), "Did you mean 'layer.0.key'"),
    ],
)
def test_a_trace_holds_the_arrays_that_its_layers_promise(
    store: RunStore, change: Callable[[dict, dict], None], message: str
) -> None:
    with pytest.raises(RunError, match=message):
        trace(store, change)
    assert store.list() == []


def test_a_layer_without_a_pattern_needs_no_factors(store: RunStore) -> None:
    def change(layer: dict, arrays: dict) -> None:
        layer["form"] = None
        for name in [name for name in arrays if name.startswith("layer")]:
            del arrays[name]

    run = store.open(trace(store, change))
    assert run.layer(0)["form"] is None
    with pytest.raises(RunNotFoundError, match="no layer 1; layers that it has: 0"):
        run.layer(1)


def test_a_trace_of_some_layers_is_read_by_layer_number(store: RunStore) -> None:
    def change(layer: dict, arrays: dict) -> None:
        layer["layer"] = 5
        for name in [name for name in arrays if name.startswith("layer")]:
            arrays[name.replace("layer.0", "layer.5")] = arrays.pop(name)

    run = store.open(trace(store, change))
    assert run.layer(5) is run.layers[0]
    with pytest.raises(RunNotFoundError, match="no layer 0; layers that it has: 5"):
        run.layer(0)


# ---- finding --------------------------------------------------------------------------------------------------------


def test_list_is_newest_first_and_filters(store: RunStore) -> None:
    ids = [write(store, f"run {number}", kind) for number, kind in enumerate(["training", "analysis", "training"])]
    ids.append(trace(store))
    assert [entry.id for entry in store.list()] == ids[::-1]
    assert [entry.id for entry in store.list(kind="training")] == [ids[2], ids[0]]
    assert store.list(model="tiny") == store.list() and store.list(model="other") == []
    entry = store.list(kind="trace")[0]
    assert (entry.model, entry.architecture, entry.provenance) == ("tiny", "gpt", "trained")
    assert (entry.tokens, entry.layers) == (4, 1)
    files = [store.root / entry.id / name for name in ("manifest.json", "arrays.safetensors")]
    assert entry.bytes == sum(path.stat().st_size for path in files)


def test_a_listing_reads_each_run_once(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [write(store) for _ in range(3)]
    opened: list[str] = []
    original = Run.__init__

    def counting(self: Run, folder: Path) -> None:
        opened.append(Path(folder).name)
        original(self, folder)

    monkeypatch.setattr(Run, "__init__", counting)
    first = store.list()
    assert sorted(opened) == sorted(ids)
    assert store.list() == first and len(opened) == 3
    another = RunStore(store.root)  # a new process: the index on disk
    assert another.list() == first and len(opened) == 3
    newest = write(store)
    assert another.list()[0].id == newest and len(opened) == 4
    (store.root / ids[0] / "arrays.safetensors").write_bytes(b"cut")
    assert ids[0] not in [entry.id for entry in another.list()] and len(opened) == 5
    assert [problem.folder for problem in another.problems()] == [ids[0]] and len(opened) == 5
    (store.root / ".index.json").write_text('{"format": 1, "runs": {"x": 3}}')
    assert len(RunStore(store.root).list()) == 3


def test_not_found_suggests(store: RunStore) -> None:
    run_id = write(store)
    with pytest.raises(RunNotFoundError, match=rf"there is no run '{run_id[:-1]}x'. Did you mean '{run_id}'"):
        store.open(run_id[:-1] + "x")
    with pytest.raises(RunNotFoundError, match=r"no array 'lost'. Did you mean 'loss'"):
        store.open(run_id).array("lost")


@pytest.mark.parametrize("bad", ["", "..", "../x", "A", "a/b", "a" * 65, ".partial-x", "x\n", "\x00", "ü", None, 3])
def test_what_is_not_an_id_is_refused(store: RunStore, bad: Any) -> None:
    for ask in (store.open, store.delete, lambda run_id: store.export_zip(run_id, io.BytesIO())):
        with pytest.raises(RunError, match="is not a run id"):
            ask(bad)


# ---- corruption -----------------------------------------------------------------------------------------------------


def _header(table: dict[str, Any], data: bytes = b"") -> bytes:
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a complete safetensors file"),
        (b"\xff" * 8, "not a complete safetensors file"),
        ((50).to_bytes(8, "little") + b"{}", "not a complete safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "holds a JSON list"),
        ((2).to_bytes(8, "little") + b"{x", "does not hold valid JSON"),
        (_header({"a": {"dtype": "F9", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)), "unknown dtype"),
        (_header({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "malformed"),
        (_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)), "does not fill"),
        (_header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}, bytes(4)), "does not fill"),
        (_header({"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}}, bytes(4)), "does not fill"),
        (_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)), "starts at byte"),
        (
            _header({name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for name in "ab"}, bytes(4)),
            "starts at",
        ),
        (_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(5)), "cut off or has a tail"),
        (_header({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 2**64]}}, bytes(4)), "cut off|tail"),
    ],
)
def test_a_broken_array_file_is_described(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "arrays.safetensors").write_bytes(content)
    with pytest.raises(RunError, match=message):
        read_array_header(tmp_path / "arrays.safetensors")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "has format 2; this program reads format 1"),
        ({"id": "another"}, "holds the manifest of run 'another'"),
        ({"created": "yesterday"}, "'yesterday' is not an ISO 8601 time"),
        ({"created": "2026-01-01T00:00:00"}, "no time zone"),
        ({"arrays_sha256": "x"}, "arrays_sha256 is not a SHA-256"),
        ({"title": 3}, "title is not a text"),
        ({"arrays": {}}, "in the array file only"),
        (
            {"arrays": {"x": {"shape": [1], "dtype": "float32", "axes": ["a"]}}},
            "array '(loss|steps)' is in the array file",
        ),
        ({"arrays": {"x": {"shape": [1], "dtype": "float32", "axes": []}}}, "one axis name per size"),
        ({"arrays": {"x": 3}}, "is not {shape, dtype, axes, unit}"),
        ({"figures": {"../x.png": {"sha256": ""}}}, "figure '../x.png' is not a file name"),
        ({"layers": [3]}, "a layer record is a int, expected an object"),
        (
            {"layers": [{"layer": n, "kind": "x", "n_heads": 1} for n in (1, 0)]},
            r"numbered \[1, 0\], expected increasing",
        ),
    ],
)
def test_a_broken_manifest_is_a_problem_and_never_crashes(store: RunStore, changes: dict, message: str) -> None:
    good, bad = write(store), write(store)
    edit_manifest(store, bad, **changes)
    with pytest.raises(RunError, match=message):
        store.open(bad)
    assert [entry.id for entry in store.list()] == [good]
    [problem] = store.problems()
    assert problem.folder == bad and problem.reason


def test_missing_fields_wrong_shapes_and_foreign_folders(store: RunStore) -> None:
    good = write(store)
    no_title, wrong_shape, deep, no_arrays = (write(store) for _ in range(4))
    manifest = json.loads((store.root / no_title / "manifest.json").read_text())
    del manifest["title"], manifest["model"]
    (store.root / no_title / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"lacks the field\(s\) title, model"):
        store.open(no_title)
    save_file({"loss": np.zeros(5, np.float64), "steps": np.zeros((2, 3), np.int64)},
              store.root / wrong_shape / "arrays.safetensors")  # fmt: skip
    with pytest.raises(RunError, match=r"'loss' is float64 \[5\] in the array file, float32 \[5\] in the manifest"):
        store.open(wrong_shape)
    (store.root / deep / "manifest.json").write_text("[" * 200_000)
    (store.root / no_arrays / "arrays.safetensors").unlink()
    (store.root / "Not A Run").mkdir()
    (store.root / "empty-folder").mkdir()
    (store.root / "a-file").write_text("not a folder")
    assert [entry.id for entry in store.list()] == [good]
    folders = {problem.folder: problem.reason for problem in store.problems()}
    assert folders.keys() == {no_title, wrong_shape, deep, no_arrays, "Not A Run", "empty-folder"}
    assert "valid JSON" in folders[deep] and "missing" in folders[no_arrays] and "the name" in folders["Not A Run"]
    store.delete(deep)
    assert deep not in {problem.folder for problem in store.problems()}


def test_changed_bytes_are_found_by_verify(store: RunStore) -> None:
    run = store.open(write(store))
    path = run.path / "arrays.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(RunError, match="has changed since it was written"):
        store.open(run.id).verify()


def test_links_out_of_the_root_are_refused(store: RunStore, tmp_path: Path) -> None:
    outside = RunStore(tmp_path / "outside")
    stolen = write(outside)
    (store.root / stolen).symlink_to(outside.root / stolen)
    for ask in (store.open, store.delete):
        with pytest.raises(RunError, match="is a link, expected the folder of a run: refused"):
            ask(stolen)
    assert store.list() == [] and [problem.folder for problem in store.problems()] == [stolen]
    assert outside.open(stolen).verify()

    mine = write(store)
    for name in ("manifest.json", "arrays.safetensors"):
        shutil.move(store.root / mine / name, tmp_path / name)
        (store.root / mine / name).symlink_to(tmp_path / name)
        with pytest.raises(RunError, match=f"{name} is a link that leads out of {mine}: refused"):
            store.open(mine)
        (store.root / mine / name).unlink()
        shutil.move(tmp_path / name, store.root / mine / name)
    (store.root / "alias").symlink_to(store.root / mine)
    with pytest.raises(RunError, match="alias is a link"):
        store.delete("alias")
    (store.root / "dangling").symlink_to(tmp_path / "nowhere")
    assert [entry.id for entry in store.list()] == [mine]
    assert {problem.folder for problem in store.problems()} == {stolen, "alias", "dangling"}


# ---- exporting and deleting -----------------------------------------------------------------------------------------


def test_export_unpacks_to_the_same_run(store: RunStore, tmp_path: Path) -> None:
    with store.create("training", "x", model=MODEL) as writer:
        writer.add_array("a", np.arange(1000.0), axes=("pos",))
        writer.add_figure("f.png", b"png")
    buffer = io.BytesIO()
    store.export_zip(writer.id, buffer)
    store.export_zip(writer.id, tmp_path / "out.zip")
    assert buffer.getvalue() == (tmp_path / "out.zip").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.zip", "runs"]
    other = RunStore(tmp_path / "other")
    with zipfile.ZipFile(buffer) as archive:
        assert archive.testzip() is None
        archive.extractall(other.root)
    assert other.open(writer.id).verify() == store.open(writer.id).verify()
    np.testing.assert_array_equal(other.open(writer.id).array("a"), np.arange(1000.0))
    with pytest.raises(RunNotFoundError):
        store.export_zip("nothing", tmp_path / "no.zip")
    assert not (tmp_path / "no.zip").exists()


def archive_of(*members: tuple[str, bytes]) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a name twice
        for name, content in members:
            archive.writestr(name, content)
    return buffer


def exported(store: RunStore) -> tuple[str, dict[str, bytes]]:
    """A run with a figure, and the members of its archive."""
    with store.create("training", "travels", model=MODEL) as writer:
        writer.add_array("a", np.arange(1000.0), axes=("pos",))
        writer.add_figure("f.png", b"png")
    buffer = io.BytesIO()
    store.export_zip(writer.id, buffer)
    with zipfile.ZipFile(buffer) as archive:
        return writer.id, {name: archive.read(name) for name in archive.namelist()}


def test_import_takes_in_what_export_wrote(store: RunStore, tmp_path: Path) -> None:
    run_id, _ = exported(store)
    store.export_zip(run_id, tmp_path / "out.zip")
    other = RunStore(tmp_path / "other")
    run = other.import_zip(tmp_path / "out.zip")
    assert run.path == other.root / run_id and run.manifest == store.open(run_id).manifest
    assert run.verify() == store.open(run_id).verify() and run.figure("f.png") == b"png"
    assert [entry.id for entry in other.list()] == [run_id]
    assert sorted(path.name for path in other.root.iterdir() if not path.name.startswith(".index")) == [".lock", run_id]
    with pytest.raises(RunError, match="here already"):
        other.import_zip(tmp_path / "out.zip")
    other.delete(run_id)
    assert other.import_zip(tmp_path / "out.zip").id == run_id


def test_import_refuses_what_is_not_one_whole_run(store: RunStore, tmp_path: Path) -> None:
    run_id, members = exported(store)
    other = RunStore(tmp_path / "other")
    whole = list(members.items())
    flipped = {name: content[:-1] + bytes([content[-1] ^ 1]) for name, content in members.items()}
    arrays, figure = f"{run_id}/arrays.safetensors", f"{run_id}/figures/f.png"
    broken = archive_of(*whole)
    position = broken.getvalue().index(members[arrays][-64:])
    broken.getbuffer()[position] ^= 1
    locked = bytearray(archive_of(*whole).getvalue())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.index(signature) + offset] |= 1  # says that it is encrypted
    cases = {
        "not a zip archive": io.BytesIO(b"no archive at all"),
        "holds 0 runs": archive_of(),
        "expected the files of one run": archive_of(*whole, ("../../elsewhere.txt", b"x")),
        "holds '/tmp/x'": archive_of(*whole, ("/tmp/x", b"x")),
        "holds 2 runs": archive_of(*whole, ("another/manifest.json", b"{}")),
        "a file twice": archive_of(*whole, (figure, b"png")),
        "is missing": archive_of(*[item for item in whole if item[0] != arrays]),
        "has changed since": archive_of(*[(name, flipped[name] if name == arrays else text) for name, text in whole]),
        "figure 'f.png' of run": archive_of(*[(name, flipped[name] if name == figure else text) for name, text in whole]),
        "figures that the run does not name": archive_of(*whole, (f"{run_id}/figures/g.png", b"png")),
        "holds the manifest of run": archive_of(*[(name.replace(run_id, "renamed"), text) for name, text in whole]),
        "Bad CRC": broken,
        "encrypted": io.BytesIO(bytes(locked)),
    }  # fmt: skip
    for words, file in cases.items():
        with pytest.raises(RunError, match=words):
            other.import_zip(file)
        left = [path.name for path in other.root.iterdir() if not path.name.startswith(".index")]
        assert left in ([], [".lock"]), f"{words}: something is left behind"
    assert other.list() == [] and not (tmp_path / "elsewhere.txt").exists()


def test_import_leaves_room_on_the_disk(store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, members = exported(store)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**28 + 1000))
    with pytest.raises(RunError, match="0 MB to spare"):
        RunStore(tmp_path / "other").import_zip(archive_of(*members.items()))


def test_delete(store: RunStore) -> None:
    first, second = write(store), write(store)
    store.delete(first)
    assert [entry.id for entry in store.list()] == [second]
    assert sorted(path.name for path in store.root.iterdir() if not path.name.startswith(".i")) == [".lock", second]
    with pytest.raises(RunNotFoundError):
        store.delete(first)


# ---- killed and failing writers -------------------------------------------------------------------------------------


def test_an_exception_leaves_nothing(store: RunStore) -> None:
    for failure in (RuntimeError, KeyboardInterrupt, SystemExit):
        with pytest.raises(failure), store.create("training", "x") as writer:
            writer.add_array("a", [1], axes=("pos",))
            assert [path.name for path in store.root.glob(".partial*")] == [f".partial-{writer.id}"]
            raise failure
        assert store.list() == [] and store.problems() == [] and not list(store.root.glob(".partial*"))


def test_a_full_disk_leaves_nothing(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("workbench.lab.run_writer.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(store)
    assert store.list() == [] and not list(store.root.glob(".partial*"))


def test_an_open_writer_is_not_swept_however_old(store: RunStore) -> None:
    with store.create("training", "long") as writer:
        partial = store.root / f".partial-{writer.id}"
        os.utime(partial, (0, 0))
        RunStore(store.root)
        assert partial.exists() and store.list() == []
    assert [entry.id for entry in store.list()] == [writer.id]


def test_abandoned_folders_are_swept(store: RunStore) -> None:
    run_id = write(store)
    for name in (".partial-20200101-000000-x-aaaaaa", ".deleted-20200101-000000-x-aaaaaa-bbb"):
        (store.root / name).mkdir()
        (store.root / name / "arrays.safetensors").write_bytes(b"half")
    assert [entry.id for entry in store.list()] == [run_id] and store.problems() == []
    RunStore(store.root)
    assert sorted(path.name for path in store.root.iterdir()) == [".index.json", ".lock", run_id]


def test_without_locks_age_decides(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workbench.lab.runs.fcntl", None)
    for name, age in ((".partial-old", 7200), (".partial-new", 60)):
        (store.root / name).mkdir()
        os.utime(store.root / name, (time.time() - age,) * 2)
    RunStore(store.root)
    assert [path.name for path in store.root.glob(".partial*")] == [".partial-new"]


# One process that forks children which write runs until they are killed. In the first half of the rounds the child kills
# itself at its n-th file operation, n = 1, 2, 3 …, so every step of writing is hit; in the second half the parent kills it
# at a random moment.
KILLER = """
import os, random, signal, sys, time
import numpy as np
from workbench.lab.runs import RunStore

root, steps, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def write_run(store, seed):
    generator = np.random.default_rng(seed)
    with store.create("training", "killed", settings={"seed": seed}) as run:
        for number in range(3):
            run.add_array(f"a{number}", generator.random((100, 100 + seed)), axes=("x", "y"))
        run.add_figure("figure.csv", str(seed))

def child(step, seed):
    store = RunStore(root)
    if step is not None:
        count = 0
        def die(event, arguments):
            nonlocal count
            if event.split(".")[0] in ("open", "os", "shutil", "fcntl", "mmap"):
                count += 1
                if count == step:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(die)
        write_run(store, seed)
        os._exit(0)
    while True:
        write_run(store, seed)

write_run(RunStore(root), 200)  # loads and caches what the children would otherwise each do anew
started = time.monotonic()
write_run(RunStore(root), 200)
duration = time.monotonic() - started
random.seed(0)
survived = []
for number in range(steps + rounds):
    step = number + 1 if number < steps else None
    pid = os.fork()
    if pid == 0:
        try:
            child(step, number)
        finally:
            os._exit(1)
    if step is None:
        time.sleep(random.uniform(0.0, 4 * duration))
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFEXITED(status):
        assert os.WEXITSTATUS(status) == 0, status
        survived.append(number)
# The last of the counted steps must lie beyond the last file operation of a run, or some step was never hit.
assert survived and survived == list(range(survived[0], steps)), survived
print(survived[0])
"""


def test_no_moment_of_being_killed_leaves_an_incomplete_run(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-c", KILLER, str(root), "30", "40"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10  # file operations of one run that Python announces, each of them a place of death

    leftovers = list(root.glob(".partial*"))
    store = RunStore(root)
    assert store.problems() == [] and not list(root.glob(".partial*")) and len(leftovers) <= 1
    entries = store.list()
    assert {entry.id for entry in entries} == {path.name for path in root.iterdir() if not path.name.startswith(".")}
    seeds = set()
    for entry in entries:
        run = store.open(entry.id)
        run.verify()
        seed = run.manifest["settings"]["seed"]
        generator = np.random.default_rng(seed)
        assert list(run.arrays()) == ["a0", "a1", "a2"] and run.figure("figure.csv") == str(seed).encode()
        for number in range(3):
            np.testing.assert_array_equal(run.array(f"a{number}"), generator.random((100, 100 + seed)))
        seeds.add(seed)
    assert any(30 <= seed < 70 for seed in seeds) and any(seed < 30 for seed in seeds)


def test_writers_in_threads_and_sweepers_do_not_disturb_each_other(store: RunStore) -> None:
    ids: list[str] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                ids.append(write(store))
                RunStore(store.root).list()
                store.list()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and sorted(entry.id for entry in store.list()) == sorted(ids) and len(ids) == 20
