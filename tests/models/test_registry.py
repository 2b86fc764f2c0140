"""The registry: building, describing, saving and opening models, mistakes in words, and what the card of a shipped model promises."""

import hashlib
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import models
from models import registry
from models.architecture_record import ARCHITECTURES, Architecture, register_architecture
from models.attention.site import AttentionConfig
from models.bdh.model import BDHConfig
from models.configs import config_from_json, config_to_json
from models.language_model import LanguageModelConfig
from models.parts.channel_mixers import MLPConfig
from models.registry import UnknownModel
from workbench.lab.checkpoints import CheckpointError
from workbench.lab.concept_corpus import concept_text

models.architecture("bdh")  # registers all
TOKENS = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
LARGEST_FILE = 16 * 2**20
MARGIN = 0.05  # nats by which a shipped text model must beat the 3-gram on the same windows


# ------------------------------------------------------------------------------------------------------- listing, building


def test_the_list_holds_shipped_models_then_every_architecture() -> None:
    records = models.list_models()
    names = [record.name for record in records]
    shipped = registry.shipped_names()
    assert names == [*shipped, *(f"{name}-random" for name in ARCHITECTURES)]
    assert len(set(names)) == len(names) and len(ARCHITECTURES) >= 9
    for record in records:
        assert record.provenance == ("trained" if record.name in shipped else "random")
        assert record.title and record.description and record.capabilities
        assert record.parameters > 0 and record.hook_points > 0
        assert record.fidelity in ("faithful", "reconstructed")
        json.dumps(record.card)
        assert models.describe(record.name) == record


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_random_models_are_what_their_record_says(name: str) -> None:
    record, model = models.describe(f"{name}-random"), models.load(f"{name}-random")
    assert model.name == record.name and model.architecture == record.architecture == name
    assert model.n_parameters() == record.parameters
    assert len(model.hook_dict) == record.hook_points
    assert not model.training and model.origin["provenance"] == "random"
    assert set(record.capabilities) >= {"pattern"}
    assert ("state" in record.capabilities) == ("state" in model.hook_points.roles)
    assert model(TOKENS).isfinite().all()


@pytest.mark.parametrize(
    ("name", "preset"), [(name, preset) for name, kind in ARCHITECTURES.items() for preset in kind.presets]
)
def test_every_preset_survives_json(name: str, preset: str) -> None:
    """Configuration → JSON text → configuration is the identity, and an own configuration class is given back."""
    kind = ARCHITECTURES[name]
    config = kind.presets[preset]
    again: Any = config_from_json(kind.config, json.loads(json.dumps(config_to_json(config))))
    assert again == config and type(again) is type(config)


def test_building_with_changes() -> None:
    model = models.build("gpt2", n_layers=1, d_model=32, seed=5)
    assert (model.n_layers, model.d_model, model.config.seed) == (1, 32, 5)
    assert ARCHITECTURES["gpt2"].presets["tiny"].n_layers == 3  # the preset is not changed
    own = LanguageModelConfig(2, 16, 50, 8, AttentionConfig(2), MLPConfig(20))
    assert models.build("gpt2", config=own).config == own
    assert models.build("gpt2", config=own, n_layers=1).config == replace(own, n_layers=1)
    assert models.build("bdh", "demo", n_neurons=64).config == replace(
        ARCHITECTURES["bdh"].presets["demo"], n_neurons=64
    )


def test_building_refuses_in_words() -> None:
    with pytest.raises(UnknownModel, match=r"Unknown architecture 'gtp2'. Did you mean 'gpt2'"):
        models.build("gtp2")
    with pytest.raises(
        UnknownModel, match=r"'bdh' has no preset 'dem'. Did you mean 'demo'.* It has: tiny, demo, concepts, published"
    ):
        models.build("bdh", "dem")
    with pytest.raises(ValueError, match=r"LanguageModelConfig has no field 'n_layer'. Did you mean 'n_layers'"):
        models.build("gpt2", n_layer=2)
    with pytest.raises(ValueError, match=r"'bdh' is built from a BDHConfig, got LanguageModelConfig"):
        models.build("bdh", config=LanguageModelConfig(1, 8))
    with pytest.raises(UnknownModel, match=r"Unknown model 'bdh-randon'. Did you mean 'bdh-random'"):
        models.describe("bdh-randon")


def test_registering_twice_or_without_a_tiny_preset_is_refused() -> None:
    known = ARCHITECTURES["bdh"]
    with pytest.raises(ValueError, match=r"named 'bdh' is registered already"):
        register_architecture(known)
    with pytest.raises(ValueError, match=r"'untested' has no 'tiny' preset"):
        register_architecture(replace(known, name="untested", presets={"demo": BDHConfig()}))
    assert "untested" not in ARCHITECTURES


def test_a_new_architecture_needs_one_call(tmp_path: Path) -> None:
    """Registered, it is listed, built, saved and opened like the others."""
    own = Architecture(
        name="two-heads",
        title="Two heads",
        paper=None,
        family="attention",
        config=LanguageModelConfig,
        module=ARCHITECTURES["gpt2"].module,
        presets={"tiny": LanguageModelConfig(1, 8, 256, 16, AttentionConfig(2))},
        description="For this test.",
    )
    register_architecture(own)
    try:
        assert models.describe("two-heads-random").hook_points > 0
        models.save(models.build("two-heads"), tmp_path / "saved")
        assert models.load(tmp_path / "saved").architecture == "two-heads"
    finally:
        del ARCHITECTURES["two-heads"]
    with pytest.raises(UnknownModel, match=r"Unknown architecture 'two-heads'"):
        models.load(tmp_path / "saved")


# ---------------------------------------------------------------------------------------------------------- save, open


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved tiny GPT-2."""
    return models.save(models.build("gpt2", seed=3), tmp_path / "mine", {"title": "Mine", "data": {"kind": "none"}})


def test_a_saved_model_comes_back(folder: Path) -> None:
    original, loaded = models.build("gpt2", seed=3), models.load(folder)
    assert torch.equal(loaded(TOKENS), original(TOKENS))
    assert loaded.name == "mine" and loaded.origin["provenance"] == "trained" and not loaded.training
    assert loaded.card is not None and loaded.card["title"] == "Mine" and loaded.card["data"] == {"kind": "none"}
    assert loaded.card["parameters"] == loaded.n_parameters()
    assert loaded.card["hook_points"] == len(loaded.hook_dict)
    assert loaded.card["weights_sha256"] == hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert loaded.weights_sha256() == original.weights_sha256()
    assert sorted(path.name for path in folder.iterdir()) == ["card.json", "config.json", "model.safetensors"]
    double = models.load(str(folder), dtype=torch.float64, device="cpu")
    assert next(double.parameters()).dtype == torch.float64
    with pytest.raises(CheckpointError, match=r"mine exists"):
        models.save(original, folder)


def test_storing_in_sixteen_bits_halves_the_file(tmp_path: Path) -> None:
    model = models.build("bdh", "demo", n_neurons=512)
    whole = models.save(model, tmp_path / "whole") / "model.safetensors"
    half = models.save(model, tmp_path / "half", dtype=torch.float16) / "model.safetensors"
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    loaded = models.load(tmp_path / "half")
    assert next(loaded.parameters()).dtype == torch.float32
    error = (loaded(TOKENS) - models.load(tmp_path / "whole")(TOKENS)).abs().max()
    assert 0 < float(error.detach()) < 0.05 * float(model(TOKENS).detach().std())


@pytest.mark.parametrize("name", ["bdh-english-2", "gpt2-randon"])
def test_unknown_names_are_answered_with_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownModel, match=rf"Unknown model '{name}'.*Known: .*<architecture>-random"):
        models.load(name)


def test_a_missing_architecture_behind_random(tmp_path: Path) -> None:
    with pytest.raises(UnknownModel, match=r"Unknown architecture 'retnett'. Did you mean 'retnet'"):
        models.load("retnett-random")
    with pytest.raises(UnknownModel, match=r"holds no config.json. Expected a folder written by models.save"):
        models.load(tmp_path)
    models.save(models.build("gpt2"), tmp_path / "mine" / "one")
    with pytest.raises(UnknownModel, match=r"mine' holds no config.json. Did you mean '.*mine/one'"):
        models.load(str(tmp_path / "mine"))


def change(folder: Path, edit: Any) -> Path:
    """Rewrite config.json after `edit` changed its content."""
    record = json.loads((folder / "config.json").read_text())
    edit(record)
    (folder / "config.json").write_text(json.dumps(record))
    return folder


def test_foreign_folders_are_explained(folder: Path) -> None:
    """A folder of another library has a config.json too; each thing that does not fit is named."""
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(json.dumps({"layers": 12}))
    with pytest.raises(ValueError, match=r"config.json has no 'architecture'.* written by models.save"):
        models.load(folder)
    (folder / "config.json").write_text('{"architecture": "gpt2", "config": ')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        models.load(folder)
    (folder / "config.json").write_text(json.dumps({"architecture": "gtp2", "config": {}}))
    with pytest.raises(UnknownModel, match=r"Unknown architecture 'gtp2'. Did you mean 'gpt2'"):
        models.load(folder)
    (folder / "config.json").write_text(text)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model.safetensors"):
        models.load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(CheckpointError, match=r"is a pickle"):
        models.load(folder)


def test_configurations_that_do_not_fit_are_named(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    cases: list[tuple[Any, str]] = [
        (
            lambda r: r["config"].update(n_layer=3),
            r"LanguageModelConfig has no field 'n_layer'. Did you mean 'n_layers'",
        ),
        (
            lambda r: r["config"]["mixer"].update(kind="retenion"),
            r"Unknown mixer kind 'retenion'. Did you mean 'retention'",
        ),
        (
            lambda r: r["config"]["mixer"].update(window_size=3),
            r"AttentionConfig has no field 'window_size'. Did you mean 'window'",
        ),
        (lambda r: r["config"]["mlp"].update(width=3), r"MLPConfig has no field 'width'"),
        (lambda r: r["config"].pop("d_model"), r"LanguageModelConfig lacks the field 'd_model'"),
        (lambda r: r["config"].update(mixer=5), r"LanguageModelConfig: mixer is int, expected an object"),
        (
            lambda r: r["config"].update(d_model=48),
            r"embed.W_E is \(256, 24\), its configuration says \(256, 48\)",
        ),
        (lambda r: r["config"].update(n_layers=4), r"weights do not fit gpt2: missing \['blocks.3"),
        (lambda r: r["config"].update(n_layers=2), r"unexpected \['blocks.2"),
    ]
    for edit, message in cases:
        (folder / "config.json").write_text(text)
        change(folder, edit)
        with pytest.raises(ValueError, match=message):
            models.load(folder)
    (folder / "config.json").write_text(text)
    assert models.load(folder).n_layers == 3


# ------------------------------------------------------------------------------------------------------- shipped models


@pytest.fixture(scope="module", params=registry.shipped_names())
def shipped(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    name = request.param
    return name, json.loads((registry.SHIPPED / name / "card.json").read_text())


def test_every_folder_of_shipped_models_is_listed() -> None:
    folders = (
        sorted(path.name for path in registry.SHIPPED.iterdir() if path.is_dir()) if registry.SHIPPED.exists() else []
    )
    assert sorted(registry.shipped_names()) == folders


def test_cards_are_complete(shipped: tuple[str, dict[str, Any]]) -> None:
    name, card = shipped
    for key in (
        "parameters",
        "hook_points",
        "architecture",
        "title",
        "description",
        "data",
        "licence",
        "command",
        "metrics",
        "curve",
        "weights_sha256",
    ):
        assert card.get(key), key
    assert card["name"] == name and card["architecture"] in ARCHITECTURES
    assert card["command"].startswith(("workbench train ", "python -m models."))
    assert card["command"].startswith("python") or f"--model {card['architecture']}" in card["command"]
    assert all(len(corpus["sha256"]) == 64 and corpus["licence"] for corpus in card["data"].get("corpora", []))


def test_weights_are_those_of_the_card(shipped: tuple[str, dict[str, Any]]) -> None:
    name, card = shipped
    file = registry.SHIPPED / name / "model.safetensors"
    assert file.stat().st_size <= LARGEST_FILE
    assert hashlib.sha256(file.read_bytes()).hexdigest() == card["weights_sha256"]
    model = models.load(name)
    assert model.n_parameters() == card["parameters"] and len(model.hook_dict) == card["hook_points"]
    assert model.origin["provenance"] == "trained" and model.name == name
    logits = model(TOKENS)
    assert logits.shape == (1, 12, model.vocab_size) and logits.isfinite().all()
    assert {field.name for field in fields(model.config)} == set(config_to_json(model.config))


def test_losses_on_the_card_hang_together(shipped: tuple[str, dict[str, Any]]) -> None:
    """The last point of the curve is the final loss; a model of text beats the 3-gram, a model of a task beats chance by half."""
    _, card = shipped
    metrics, curve = card["metrics"], card["curve"]
    final = metrics["validation_loss"]
    assert math.isfinite(final) and metrics["unit"] == "nats per token"
    steps = [point["step"] for point in curve]
    assert steps == sorted(set(steps)) and steps[-1] == metrics["steps"]
    evaluated = [point["validation_loss"] for point in curve if point["validation_loss"] is not None]
    assert evaluated[-1] == pytest.approx(final) and max(evaluated) > final
    references = metrics["references"]
    assert references
    if card["data"]["kind"] == "text":
        trigrams = [loss for name, loss in references.items() if "trigram" in name]
        assert trigrams and final < min(trigrams) - MARGIN
    else:
        assert final < 0.5 * min(references.values())


def test_a_shipped_text_model_really_has_that_loss(shipped: tuple[str, dict[str, Any]]) -> None:
    """Fresh text of its kind is predicted about as well as the card says, and far better than by a model at random weights."""
    name, card = shipped
    if card["data"]["kind"] != "text":
        task_loss_is_real(name, card)
        return
    prose = (
        "The river ran through the valley, and on both sides of it there were fields of wheat. In the morning the men "
        "went out to work, and the children walked along the road to the school in the next village. "
    )
    if card["data"]["corpora"][0]["name"] == "concepts":
        prose = concept_text("combinations", 400, seed=5)
    loss = float(models.load(name)(prose, return_type="loss").detach())
    assert loss < card["metrics"]["validation_loss"] + 0.6
    assert loss < 0.5 * math.log(256)


def task_loss_is_real(name: str, card: dict[str, Any]) -> None:
    """The loss on a fresh validation batch of the card's task, at the planted positions."""
    from workbench.lab.tasks import make_task

    task = make_task(**card["data"]["task"])
    batch = task.batch(8, step=10_000, split="validation")
    per_token = models.load(name)(batch.tokens, return_type="loss", loss_per_token=True).detach()
    loss = float(per_token[batch.loss_mask[:, 1:]].mean())
    assert loss < 1.5 * card["metrics"]["validation_loss"] + 0.1


def test_the_models_page_is_what_registry_and_cards_say() -> None:
    """docs/models.md is up to date; `python -m models.shipping page` writes it."""
    from pathlib import Path

    from models.shipping import models_page

    assert (Path(__file__).parents[2] / "docs" / "models.md").read_text() == models_page()
