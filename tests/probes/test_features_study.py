"""One call from a model to features, and the command on top of it."""

import json
from pathlib import Path
from threading import Event
from typing import Any

import pytest

import models
from app.cli import main
from probes.features import FeatureTraining, TopK, load_dictionary
from probes.features.study import find_features
from probes.progress import MeasurementCancelled
from workbench.lab.activation_store import ActivationStore, Site
from workbench.lab.runs import RunStore

TEXT = b"the cat sat on the mat, and the dog sat on the log; then the cat and the dog ran. " * 40
POINT = "blocks.1.hook_resid_post"
QUICK = FeatureTraining(steps=40, batch_size=64, warmup=5, report_every=20)


@pytest.fixture(scope="module")
def model() -> Any:
    return models.build("gpt")


def test_everything_is_measured_on_text_that_was_not_learned_from(model: Any, tmp_path: Path) -> None:
    twin = models.build("gpt", seed=7)
    said: list[str] = []
    found = find_features(
        model, POINT, TEXT, TopK(48, k=4), tmp_path, training=QUICK, random_twin=twin, context=32, sequences=60,
        n_features=6, progress=lambda fraction, message: said.append(message),
    )  # fmt: skip
    assert len(found.store) == 54 * 31 and found.evaluation.rows == 6 * 31 and found.control is not None
    learned, held = (ActivationStore(tmp_path / name).manifest["tokens_sha256"] for name in ("activations", "held-out"))
    assert learned != held
    assert found.recovery is not None and found.recovery.tokens == 6 * 30
    assert 1 <= len(found.features) <= 6 and said[-1] == "done"
    assert all(f.top and f.density > 0 for f in found.features)
    written = json.loads((tmp_path / "features.json").read_text())
    assert written["site"] == POINT and len(written["features"]) == len(found.features)
    best = found.directions_to_tokens[found.features[0].feature][0][0]
    direction = load_dictionary(tmp_path / "dictionary").directions[found.features[0].feature]
    assert best == int((direction @ model.W_U).argmax())


def test_a_cancelled_call_is_continued(model: Any, tmp_path: Path) -> None:
    cancel = Event()

    def stop(fraction: float, message: str) -> None:
        if message.startswith("step"):
            cancel.set()

    options: dict[str, Any] = {"training": QUICK, "context": 32, "sequences": 30}
    with pytest.raises(MeasurementCancelled, match="stays in the folder"):
        find_features(model, POINT, TEXT, TopK(48, k=4), tmp_path, progress=stop, cancel=cancel, **options)
    before = (tmp_path / "activations" / "shard-00000.safetensors").stat().st_mtime_ns
    found = find_features(model, POINT, TEXT, TopK(48, k=4), tmp_path, **options)
    assert found.evaluation.rows > 0 and found.control is None
    assert (tmp_path / "activations" / "shard-00000.safetensors").stat().st_mtime_ns == before


def test_states_have_no_recovery_but_features(tmp_path: Path) -> None:
    site = Site("blocks.0.mixer.hook_state", head=1, every=4)
    found = find_features(
        models.build("retnet"), site, TEXT, TopK(32, k=3), tmp_path, training=QUICK, context=32, sequences=60
    )
    assert found.recovery is None and found.features and found.directions_to_tokens == {}
    with pytest.raises(ValueError, match="at least 10"):
        find_features(models.build("retnet"), site, TEXT[:200], TopK(32, k=3), tmp_path / "b", context=32)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(TEXT.replace(b"; ", b";\n") * 2)
    options = [
        "--features",
        "40",
        "--k",
        "3",
        "--steps",
        "20",
        "--sequences",
        "30",
        "--context",
        "32",
        "--no-control",
        "--show",
        "3",
    ]
    site = ["--site", "blocks.0.hook_resid_post"]
    call = ["features", "induction-circuit", *site, "--corpus", str(text), *options, "--out", str(tmp_path / "o")]
    call += ["--runs", str(tmp_path)]
    assert main([*call, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["model"] == "induction-circuit" and record["control"] is None and record["evaluation"]["l0"] <= 3
    kept = RunStore(tmp_path).open(record["id"])
    assert kept.kind == "features" and kept.manifest["results"]["folder"] == "o" and kept.array("density").shape == (40,)
    assert main(call) == 0
    assert "unexplained variance" in capsys.readouterr().out
    assert main([*call, "--kind", "top"]) == 2 and "Did you mean 'topk'" in capsys.readouterr().err
    assert main([*call, "--features", "41"]) == 1 and "another config" in capsys.readouterr().err
    for words, wrong in ((["--kind", "gated"], "--k does nothing"), (["--sparsity", "0.1"], "--sparsity does nothing")):
        assert main([*call, *words]) == 2 and wrong in capsys.readouterr().err
