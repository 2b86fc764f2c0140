"""Several probes at once: the results are those of the probes alone, survive storing, and a probe without an answer says so."""

from pathlib import Path

import numpy as np
import pytest

import models
from probes.battery import NoAnswer, pieces, run_probes, store_probes
from probes.sinks import find_sinks
from workbench.lab.runs import RunStore

TEXT = "the cat sat on the mat, and the cat sat on the hat, and then the cat sat on the dog."


def test_results_are_those_of_the_probes_and_survive_storing(tmp_path: Path) -> None:
    model = models.load("induction-circuit")
    results = run_probes(model, ["induction", "sinks", "retrieval"], length=64, sequences=8, vocab=128)
    assert {name: type(result).__name__ for name, result in results.items()} == {
        "induction": "HeadScores",
        "sinks": "SinkReport",
        "retrieval": "RetrievalScores",
    }
    assert results["induction"].best("induction", 1)[0][0] == 1 == results["retrieval"].best(1)[0][0]
    run = store_probes(RunStore(tmp_path), model, results, settings={"length": 64})
    again = RunStore(tmp_path).open(run.id)
    assert again.kind == "probe" and again.manifest["model"]["name"] == "induction-circuit"
    assert np.allclose(again.array("induction.induction"), results["induction"]["induction"])
    assert np.allclose(again.array("retrieval.score"), results["retrieval"].scores)
    assert again.manifest["results"]["sinks"]["kind"] == "SinkReport"


def test_what_has_no_answer_says_so_and_stops_nobody() -> None:
    results = run_probes(models.build("lstm"), ["sinks"], length=32, sequences=2)
    assert isinstance(results["sinks"], NoAnswer) and results["sinks"].reason
    results = run_probes(models.build("gpt"), ["retrieval", "sinks"], text=TEXT)
    assert isinstance(results["retrieval"], NoAnswer) and "nothing is retrieved" in results["retrieval"].reason
    alone = find_sinks(models.build("gpt"), TEXT)
    assert np.array_equal(results["sinks"].first_mass, alone.first_mass)


def test_pieces_of_a_text_file(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Paragraph {number} of many." for number in range(200)))
    model = models.build("gpt")
    tokens = pieces(model, str(file), 40, 5)
    assert tokens.shape == (5, 40)
    assert "aragraph" in bytes(tokens[0].tolist()).decode()
    with pytest.raises(ValueError, match="fewer than one piece"):
        pieces(model, str(file), 5000, 5)


def test_mistakes_are_named() -> None:
    model = models.build("gpt")
    with pytest.raises(ValueError, match=r"Unknown probe 'sink'. Did you mean 'sinks'"):
        run_probes(model, ["sink"])
    with pytest.raises(ValueError, match="not both"):
        run_probes(model, ["sinks"], text="a", corpus="b")
