"""The block diagram's data, on every architecture."""

import pytest

import models
from models.diagram import model_blocks

models.list_models()  # registers all


@pytest.mark.parametrize("name", list(models.registry.ARCHITECTURES))
def test_every_layer_is_drawn(name: str) -> None:
    model = models.build(name)
    blocks = model_blocks(model)
    assert {block["layer"] for block in blocks} == {None, *range(model.n_layers)}
    assert all(block["label"] and block["detail"] for block in blocks)


def test_states_are_described_by_their_sizes() -> None:
    def details(name: str) -> list[str]:
        return [block["detail"] for block in model_blocks(models.build(name)) if block["layer"] == 0]

    assert details("kda")[0] == "3 × 6×5"  # heads × key × value
    assert details("mamba") == ["48×5"]  # channels × state
    assert details("gateloop")[0] == "3 × 10×5"  # real and imaginary part of 5 rows


SPECIAL = {
    "diff-transformer": {("Differential", "reweight"), ("Differential norm", "post")},
    "dual-attention": {("Symbol values", "project"), ("Relations", "mix")},
    "cope": {("CoPE", "position")},
    "nats": {("NAtS", "normalise")},
    "neural-attention": {("Pair score", "score")},
    "transformer-xl": {("Key preference", "position"), ("Relative", "position"), ("Recent segments", "mask")},
    "recurrent-memory": {("3 memory slots", "segments of 5")},
    "universal-transformer": {("×3", "passes"), ("Halting (ACT)", "at most 3 steps")},
    "hrm": {("×4", "passes"), ("Two levels", "2 × (2 fast, 1 slow)")},
    "denseformer": {("DenseFormer", "averages of all outputs")},
    "algoformer": {("Loop", "1 before, ×3, 1 after")},
}


@pytest.mark.parametrize("name", list(SPECIAL))
def test_special_stages_are_boxes_of_their_own(name: str) -> None:
    blocks = model_blocks(models.build(name))
    assert {(block["label"], block["detail"]) for block in blocks if block["layer"] in (0, None)} >= SPECIAL[name]
    layers = [block["layer"] for block in blocks if block["layer"] is not None]
    assert layers == sorted(layers)  # every box stands in its layer's column


def test_an_ordinary_model_has_no_special_stage() -> None:
    assert not [block for block in model_blocks(models.build("gpt")) if block["kind"] == "stage"]


def test_how_often_each_layer_runs_is_drawn_where_it_differs() -> None:
    passes = {
        (block["layer"], block["label"]) for block in model_blocks(models.build("hrm")) if block["kind"] == "loop"
    }
    assert passes == {(0, "×4"), (1, "×2"), (2, "×2"), (None, "Two levels")}
    assert [block["layer"] for block in model_blocks(models.build("algoformer")) if block["detail"] == "passes"] == [1]


def test_encoders_end_with_their_head_or_with_the_stream() -> None:
    bare, headed = (model_blocks(models.build("bert", masked_head=head)) for head in (None, "gelu"))
    assert bare[-1]["label"] == "MLP" and not any(part["kind"] in ("norm", "unembed") for part in bare)
    assert [part["label"] for part in headed[len(bare) :]] == ["Head", "Unembedding"] and headed[: len(bare)] == bare
    assert [part["label"] for part in model_blocks(models.build("t5-encoder"))][-1] == "Norm"
