import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from workbench.lab.checkpoints import (
    CheckpointError,
    load_card,
    load_config,
    load_weights,
    read_json,
    read_tensors,
    save_model,
    write_json,
    write_tensors,
)


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    table = torch.randn(5, 3)
    return {
        "embed": table,
        "head": table,  # tied
        "transposed": table.T,  # same memory, another view: stored as its own
        "bias": torch.randn(4, dtype=torch.float64),
        "steps": torch.tensor(7),
        "empty": torch.zeros(0, 2),
        "also_empty": torch.zeros(0, 2),
    }


def test_tensors_and_record_come_back_and_ties_stay_ties(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", weights(), {"step": 3})
    tensors, about = read_tensors(tmp_path / "a.safetensors")
    assert about == {"step": 3} and tensors.keys() == weights().keys()
    for name, tensor in weights().items():
        assert torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype
    assert tensors["head"] is tensors["embed"] and tensors["transposed"] is not tensors["embed"]
    assert set(load_file(tmp_path / "a.safetensors")) == weights().keys() - {"head"}  # stored once
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("float64", 0.0), ("float32", 2**-24), ("float16", 2**-11), ("bfloat16", 2**-8)]
)
def test_a_finished_model_comes_back_in_its_own_dtypes(dtype: str, tolerance: float, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    digest = save_model(folder, weights(), {"width": 3}, {"paper": "x"}, dtype=dtype)
    assert digest == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert load_config(folder) == {"width": 3}
    assert load_card(folder) == {"paper": "x", "weights_sha256": digest, "storage_dtype": dtype, "stored_values": 35}
    loaded = load_weights(folder)
    for name, tensor in weights().items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert bool(((loaded[name] - tensor).abs() <= tolerance * tensor.abs()).all())
    assert loaded["head"] is loaded["embed"]
    stored = load_file(folder / "model.safetensors")
    assert stored["embed"].dtype == getattr(torch, dtype) and stored["steps"].dtype == torch.int64
    assert sorted(os.listdir(tmp_path)) == ["model"]


def test_the_same_weights_give_the_same_file(tmp_path: Path) -> None:
    digests = {save_model(tmp_path / str(n), weights(), {}, {}) for n in range(6)}
    assert len(digests) == 1
    changed = weights()
    changed["bias"][0] += 1
    assert save_model(tmp_path / "changed", changed, {}, {}) not in digests


def test_overwriting_is_asked_for_and_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "model"
    save_model(folder, weights(), {"n": 1}, {})
    with pytest.raises(CheckpointError, match="exists; pass overwrite=True"):
        save_model(folder, weights(), {"n": 2}, {})
    with pytest.raises(TypeError):  # a config that is no JSON: the model of before stays
        save_model(folder, weights(), {"n": object()}, {}, overwrite=True)
    assert load_config(folder) == {"n": 1} and os.listdir(tmp_path) == ["model"]
    save_model(folder, weights(), {"n": 3}, {}, overwrite=True)
    assert load_config(folder) == {"n": 3} and os.listdir(tmp_path) == ["model"]


def test_weights_that_cannot_be_stored_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'w' reaches 7e\+04, too large for torch\.float16; use bfloat16"):
        save_model(tmp_path / "m", {"w": torch.tensor([7e4])}, {}, {}, dtype="float16")
    with pytest.raises(CheckpointError, match="'w' has values that are not finite"):
        save_model(tmp_path / "m", {"w": torch.tensor([float("nan")])}, {}, {})
    with pytest.raises(CheckpointError, match="unknown storage dtype 'int8'"):
        save_model(tmp_path / "m", weights(), {}, {}, dtype="int8")
    with pytest.raises(CheckpointError, match="state dict is empty"):
        save_model(tmp_path / "m", {}, {}, {})
    with pytest.raises(CheckpointError, match="card already has the entry 'weights_sha256'"):
        save_model(tmp_path / "m", weights(), {}, {"weights_sha256": "0"})
    assert not (tmp_path / "m").exists()


def test_changed_weights_are_noticed(tmp_path: Path) -> None:
    save_model(tmp_path / "m", weights(), {}, {})
    path = tmp_path / "m" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="but its card says"):
        load_weights(tmp_path / "m")


class _Trap:
    def __reduce__(self):
        return (os._exit, (1,))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.PTH", "a.ckpt", "b.pkl"])
def test_pickles_are_refused_in_words(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(_Trap()))  # would end the process if it were opened
    for load in (lambda: load_weights(tmp_path), lambda: read_tensors(tmp_path / name)):
        with pytest.raises(CheckpointError, match=r"is a pickle, .* never opened here.*safetensors"):
            load()


def test_missing_and_damaged_files_are_explained(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere has no model\.safetensors"):
        load_weights(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no file"):
        read_tensors(tmp_path / "x.safetensors")
    write_tensors(tmp_path / "x.safetensors", weights())
    whole = (tmp_path / "x.safetensors").read_bytes()
    for cut in (0, 4, 100, len(whole) - 1):
        (tmp_path / "x.safetensors").write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
            read_tensors(tmp_path / "x.safetensors")
    (tmp_path / "card.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not valid JSON"):
        load_card(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_config(tmp_path)


def test_json_is_replaced_whole_and_holds_no_nan(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"é": [1, 2.5]})
    assert read_json(tmp_path / "a.json") == json.loads((tmp_path / "a.json").read_text("utf-8")) == {"é": [1, 2.5]}
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert read_json(tmp_path / "a.json") == {"é": [1, 2.5]} and os.listdir(tmp_path) == ["a.json"]
