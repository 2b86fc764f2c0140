"""Hub ids against a stand-in of the hub on this machine: looking up, downloading with progress, stopping, going on, and every refusal."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import models
from models.architecture_record import UnknownModel
from models.pretrained import hub
from models.pretrained.folders import folders_under
from models.pretrained.outlook import outlook
from tests.models.pretrained.hub_stand_in import hub_of
from tests.models.pretrained.reference import CASES, write
from tests.models.pretrained.test_encoder_decoders import CASES as ENCODER_DECODERS
from tests.models.pretrained.test_encoders import CASES as ENCODERS
from workbench.lab.checkpoints import CheckpointError


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "small"
    write(CASES["llama"], folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A small model\n")
    (folder / "flax_model.msgpack").write_bytes(b"\0" * 100_000)  # files of other frameworks are left alone
    return folder


def in_a_new_process(code: str, address: str, home: Path, **more: str) -> list[object]:
    """What a program prints as JSON lines; the hub's library takes its address from the environment when it is imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        **more,
    }
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr[-2000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


OPEN = """
import json, models, torch
torch.set_grad_enabled(False)
from models.pretrained.outlook import outlook
before = outlook("someone/small")
told, stopped = [], ""
def stop(fraction, words):
    if fraction > 0.4:
        raise InterruptedError("enough")
try:
    models.load("someone/small", progress=stop)
except InterruptedError as error:
    stopped = str(error)
middle = outlook("someone/small")
model = models.load("someone/small", progress=lambda fraction, words: told.append([fraction, words]))
total = float(model(torch.tensor([[1, 2, 3]])).sum())
for value in (before.to_json(), stopped, middle.place, told, outlook("someone/small").to_json(), total, model.name):
    print(json.dumps(value))
try:
    models.load("someone/missing")
except ValueError as error:
    print(json.dumps(str(error)))
"""


def test_look_up_download_stop_and_go_on(published: Path, tmp_path: Path) -> None:
    with hub_of({"someone/small": published}) as (address, asked):
        before, stopped, middle, told, after, total, name, missing = in_a_new_process(OPEN, address, tmp_path)
    size = (published / "model.safetensors").stat().st_size
    assert isinstance(before, dict) and isinstance(after, dict) and isinstance(told, list)
    assert (before["place"], before["licence"], before["architecture"], before["problem"]) == (
        "hub",
        "apache-2.0",
        "llama",
        "",
    )
    assert before["file_bytes"] == size and size < before["download_bytes"] < size + 20_000, (
        "without the other framework's file"
    )
    assert stopped == "enough" and middle == "hub", "a stopped download is not taken for a whole one"
    fractions = [fraction for fraction, _ in told]
    assert fractions == sorted(fractions) and fractions[-1] == 1 and any("downloading" in words for _, words in told)
    assert after["place"] == "cache" and after["download_bytes"] == 0
    here = models.load(published)
    assert after["parameters"] == here.n_parameters() and after["load_bytes"] == 4 * here.n_parameters()
    assert name == "someone/small"
    assert total == pytest.approx(here(torch.tensor([[1, 2, 3]])).sum().item(), rel=1e-4)
    assert isinstance(missing, str) and "does not give 'someone/missing'" in missing
    assert not any("msgpack" in request for request in asked)


def test_what_a_hub_id_gives_and_reads(tmp_path: Path) -> None:
    """Before a download: an encoder's head only its files tell, a source its settings tell; pickles have a way, too."""
    for name, table, kind in (
        ("filler", ENCODERS, "bert-masked"),
        ("translator", ENCODER_DECODERS, "t5"),
        ("old", CASES, "gpt2"),
    ):
        write(table[kind], tmp_path / name)
    torch.save(load_file(tmp_path / "old" / "model.safetensors"), tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "old" / "model.safetensors").unlink()
    code = """
import json, models
from models.pretrained.outlook import outlook
names = ("someone/filler", "someone/translator", "someone/old")
before = [outlook(name).to_json() for name in names]
models.load("someone/filler")
said = []
for arguments in ({}, {"allow_pickle_conversion": True}):
    try:
        said.append(type(models.load("someone/old", **arguments)).__name__)
    except ValueError as error:
        said.append(str(error))
print(json.dumps([before, outlook("someone/filler").gives, said]))
"""
    folders = {f"someone/{name}": tmp_path / name for name in ("filler", "translator", "old")}
    with hub_of(folders) as (address, _):
        ((before, gives, said),) = in_a_new_process(code, address, tmp_path / "home")  # type: ignore[misc]
    filler, translator, old = before
    assert filler["gives"] is None and "masked tokens" in gives and not filler["reads_source"]
    assert translator["reads_source"] and translator["gives"] == "logits of the next token"
    assert "only pickles" in old["problem"] and "--convert NEW_FOLDER" in old["problem"]
    assert "holds no safetensors weights" in said[0] and "--convert NEW_FOLDER" in said[0]
    assert said[1] == "LanguageModel", "with the explicit choice they are downloaded and read"


def test_a_hub_that_does_not_answer(tmp_path: Path) -> None:
    code = """
import json, models
try:
    models.load("someone/small")
except ValueError as error:
    print(json.dumps(str(error)))
"""
    (words,) = in_a_new_process(code, "http://127.0.0.1:9", tmp_path)
    assert isinstance(words, str)
    assert "the hub does not answer" in words and "hf download someone/small" in words and str(tmp_path) in words
    (words,) = in_a_new_process(code, "http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids asking the hub" in str(words)


def test_a_missing_shard_is_not_a_whole_download(published: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--someone--small" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--someone--small" / "refs").mkdir()
    (tmp_path / "models--someone--small" / "refs" / "main").write_text("abc123")
    (snapshot / "config.json").write_bytes((published / "config.json").read_bytes())
    assert hub.cached("someone/small", cache_dir=tmp_path) is None, "no weights yet"
    (snapshot / "model-00001-of-00002.safetensors").write_bytes((published / "model.safetensors").read_bytes())
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert hub.cached("someone/small", cache_dir=tmp_path) is None, "one shard of two"
    (snapshot / "model-00002-of-00002.safetensors").write_bytes((published / "model.safetensors").read_bytes())
    assert hub.cached("someone/small", cache_dir=tmp_path) == snapshot


def test_a_root_of_model_folders(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "models"
    (root / "someone").mkdir(parents=True)
    (root / "someone" / "small").symlink_to(published)
    monkeypatch.setenv("WORKBENCH_MODELS", str(root))
    assert models.load("someone/small").n_parameters() == models.load(published).n_parameters()
    assert outlook("someone/small", dtype="auto").place == "folder"
    assert folders_under(root) == {}, "a link out of the root is not offered to browsers"
    (root / "someone" / "small").unlink()
    models.save(models.build("gpt"), root / "mine")
    assert list(folders_under(root)) == ["mine"]
    assert models.load("mine").architecture == "gpt"
    for name in ("../models/mine", "someone/../../models/mine"):
        with pytest.raises(UnknownModel):
            models.load(name)


def test_a_type_that_we_lack_is_said_before_loading(published: Path, tmp_path: Path) -> None:
    folder = tmp_path / "other"
    folder.mkdir()
    config = json.loads((published / "config.json").read_text())
    (folder / "model.safetensors").write_bytes((published / "model.safetensors").read_bytes())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "lama"}))
    told = outlook(folder)
    assert told.architecture is None and "Did you mean 'llama'" in told.problem
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError):
        outlook(folder)
    with pytest.raises(ValueError, match="dtype='float8'"):
        outlook(published, dtype="float8")
