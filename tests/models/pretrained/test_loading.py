"""Opening checkpoints: layouts on disk, hub ids, tokenizers, memory, and every mistake in words."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from models.architecture_record import UnknownModel
from models.pretrained import hub
from models.pretrained.family import UnsupportedCheckpoint
from models.pretrained.loader import load_folder
from models.pretrained.outlook import outlook
from models.pretrained.pickles import convert_pickles
from models.registry import architecture
from tests.models.pretrained.peak_memory import peak_of_loading, write_large
from tests.models.pretrained.reference import CASES, Case, largest, write
from tests.models.pretrained.test_encoders import CASES as ENCODERS
from workbench.lab.checkpoints import CheckpointError


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    write(CASES["llama-tied-biased"], folder)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    copy = tmp_path / "small"
    copy.mkdir()
    for path in original.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


def tokens() -> torch.Tensor:
    return torch.arange(9)[None]


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def split(folder: Path) -> None:
    """The same checkpoint in two shards with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    half = len(weights) // 2
    places = {}
    for number, names in enumerate((list(weights)[:half], list(weights)[half:]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in names}, folder / shard)
        places |= dict.fromkeys(names, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


# ------------------------------------------------------------------------------------------------------------ layouts


def test_shards_hold_the_same_model(original: Path, folder: Path) -> None:
    split(folder)
    assert torch.equal(models.load(folder)(tokens()), models.load(original)(tokens()))


def test_dtypes(original: Path) -> None:
    assert next(models.load(original).parameters()).dtype == torch.float32
    assert next(models.load(original, dtype="auto").parameters()).dtype == torch.float64, "as stored"
    assert next(models.load(original, dtype=torch.bfloat16).parameters()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype='half'. Expected 'auto' \(as stored\), float32"):
        models.load(original, dtype="half")


def test_stored_weights_are_mapped_and_files_stay_as_they_are(original: Path) -> None:
    """Weights taken as they are lie in the file's mapping; writing to them changes this process's copy alone."""
    before = (original / "model.safetensors").read_bytes()
    model = models.load(original, dtype="auto")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert (original / "model.safetensors").read_bytes() == before
    assert largest(models.load(original, dtype="auto").embed.W_E - model.embed.W_E + 1.0) < 1e-12


def test_what_a_loaded_model_says(original: Path) -> None:
    (original / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# Small\n")
    seen: list[tuple[int, int]] = []
    model = load_folder(original, architecture, progress=lambda done, total: seen.append((done, total)))
    assert model.name == "small" and model.architecture == "llama" and model.origin["provenance"] == "pretrained"
    assert model.card is not None and model.card["licence"] == "apache-2.0" and model.card["model_type"] == "llama"
    assert seen[-1] == (len(list(model.named_parameters())),) * 2
    assert not model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_pickles_only_by_choice(original: Path, folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"only as pickles \(pytorch_model.bin\).*allow_pickle_conversion=True"):
        models.load(folder)
    model = models.load(folder, allow_pickle_conversion=True)
    assert torch.equal(model(tokens()), models.load(original)(tokens()))

    class Unwelcome:
        def __reduce__(self) -> Any:
            return (print, ("code has run",))

    torch.save({"model.embed_tokens.weight": Unwelcome()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"no file of tensors that torch.load\(weights_only=True\) reads"):
        models.load(folder, allow_pickle_conversion=True)
    with pytest.raises(CheckpointError, match="weights_only"):
        convert_pickles(folder, folder.parent / "converted")
    assert not list(folder.parent.glob("*converted*")), "nothing half done is left"


def test_pickles_are_rewritten_as_safetensors(original: Path, folder: Path, tmp_path: Path) -> None:
    """Also in shards, and with names that share a tensor; what lies beside the weights comes along."""
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    names = sorted(weights)
    places = {name: f"pytorch_model-{1 + (i % 2)}-of-2.bin" for i, name in enumerate(names)}
    for file in set(places.values()):
        torch.save({name: weights[name] for name in names if places[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    expected = models.load(folder, allow_pickle_conversion=True)(tokens())
    made = convert_pickles(folder, tmp_path / "made")
    assert sorted(path.name for path in made.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert torch.equal(models.load(made)(tokens()), expected)
    with pytest.raises(CheckpointError, match="exists already"):
        convert_pickles(folder, made)
    with pytest.raises(CheckpointError, match="as safetensors already"):
        convert_pickles(original, tmp_path / "other")
    with pytest.raises(CheckpointError, match="is no folder"):
        convert_pickles(folder / "config.json", tmp_path / "other")


def in_shards(folder: Path, present: int) -> None:
    """The weights in two shards, of which the first `present` are there."""
    weights = load_file(folder / "model.safetensors")
    places = {name: f"model-{1 + i % 2}.safetensors" for i, name in enumerate(sorted(weights))}
    for number in range(1, 1 + present):
        file = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in places if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (folder / "model.safetensors").unlink()


def as_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def cut(folder: Path, length: int) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:length])


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda f: in_shards(f, 1), "the shard 'model-2.safetensors' is missing"),
        (as_pickle, "only as pickles"),
        (lambda f: cut(f, 0), "not a whole safetensors file"),
        (lambda f: cut(f, 3000), "not a whole safetensors file"),
        (lambda f: cut(f, 5), "not a whole safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
        (lambda f: edit_config(f, num_hidden_layers="three"), "a value of another kind than expected"),
    ],
    ids=["missing shard", "pickles", "empty", "cut", "five bytes", "no weights", "text for a number"],
)
def test_damage_is_said_before_and_while_opening(folder: Path, harm: Any, message: str) -> None:
    """`workbench models` and the dashboard's form ask for the outlook, which has the same words as the error."""
    harm(folder)
    assert message in outlook(folder).problem
    with pytest.raises(ValueError, match=message):
        models.load(folder)


def test_whole_shards_have_no_problem(folder: Path) -> None:
    in_shards(folder, 2)
    known = outlook(folder)
    assert known.problem == "" and known.parameters == models.load(folder).n_parameters()


@pytest.mark.parametrize(
    ("file", "content"), [("tokenizer.json", "{}"), ("tokenizer.json", "no"), ("spiece.model", "no")]
)
def test_a_tokenizer_that_cannot_be_read(folder: Path, file: str, content: str) -> None:
    (folder / file).write_text(content)
    with pytest.raises(CheckpointError, match=rf"{file}.*models\.load\(\.\.\., tokenizer=False\)"):
        models.load(folder)
    model = models.load(folder, tokenizer=False)
    assert model.tokenizer is None and model(tokens()).shape == (1, 9, 61)


def test_dtypes_by_name(folder: Path, tmp_path: Path) -> None:
    assert models.load(folder, dtype="bfloat16").W_E.dtype == torch.bfloat16
    assert models.load("gpt2-random", dtype="float64").W_E.dtype == torch.float64
    with pytest.raises(ValueError, match=r"dtype='float3'\. Did you mean 'float32'"):
        models.load(folder, dtype="float3")
    models.save(models.build("gpt2"), tmp_path / "own")
    with pytest.raises(ValueError, match="dtype='auto' is for published checkpoints"):
        models.load(tmp_path / "own", dtype="auto")


def test_paths_that_lead_nowhere(original: Path) -> None:
    for name, message in (
        (f"{original}x/deeper", r"has no 'smallx'. Did you mean 'small'"),
        (str(original / "config.json"), "is no file of tensors. Expected the folder around it"),
        (str(original.parent), "holds no config.json"),
        ("./nothing", r"There is no file or folder './nothing'"),
    ):
        with pytest.raises(ValueError, match=message):
            models.load(name)
    with pytest.raises(UnknownModel, match=r"has no 'smallx'. Did you mean 'small'"):
        outlook(f"{original}x/deeper")


# ----------------------------------------------------------------------------------------------------------- mistakes


def test_an_unknown_type(folder: Path) -> None:
    edit_config(folder, model_type="lama")
    with pytest.raises(UnknownModel, match=r"type 'lama' cannot be opened. Did you mean 'llama'"):
        models.load(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_act": "geglu"}, r"hidden_act = 'geglu' is not supported"),
        ({"num_hidden_layers": None}, r"config.json has no 'num_hidden_layers'"),
        ({"rope_parameters": {"rope_type": "odd", "rope_theta": 1e4}}, r"rope scaling 'odd' is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "odd": 1}}, r"'linear' has 'odd'"),
    ],
)
def test_settings_that_we_lack(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedCheckpoint, match=message):
        models.load(folder)


def test_a_missing_shard(folder: Path) -> None:
    split(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(
        CheckpointError, match=r"shard 'model-00002-of-00002.safetensors' is missing.*model-00001-of-00002"
    ):
        models.load(folder)


def test_a_wrong_shape_names_the_tensor_and_both_shapes(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda weights: weights.update({name: weights[name][:-1].clone()}))
    with pytest.raises(
        CheckpointError, match=r"layers.1.mlp.up_proj.weight gives blocks.1.mlp.inward.weight.*\(47, 32\).*\(48, 32\)"
    ):
        models.load(folder)


def test_missing_and_unexpected_tensors(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"tensor 'model.norm.weight' is missing"):
        models.load(folder)
    edit_weights(folder, lambda weights: weights.update({"model.norn.weight": torch.ones(32)}))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is missing. Did you mean 'model.norn.weight'"):
        models.load(folder)
    edit_weights(folder, lambda weights: weights.update({"model.norm.weight": torch.ones(32)}))
    with pytest.raises(CheckpointError, match=r"1 tensors that its config.json has no place for: model.norn.weight"):
        models.load(folder)


def test_a_damaged_file_and_an_empty_folder(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is not a whole safetensors file"):
        models.load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"has no weights: expected model.safetensors, or shards"):
        models.load(folder)


# ---------------------------------------------------------------------------------------------------------------- hub


def test_a_hub_id_from_the_local_cache(original: Path, tmp_path: Path) -> None:
    """The cache layout of the hub's own library, made by hand."""
    repository = tmp_path / "models--someone--small"
    snapshot = repository / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    for path in original.iterdir():
        (snapshot / path.name).write_bytes(path.read_bytes())
    model = models.load("someone/small", cache_dir=tmp_path)
    assert model.name == "someone/small"
    assert torch.equal(model(tokens()), models.load(original)(tokens()))


def test_without_network_the_message_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'someone/other' is no local folder.*HF_HUB_OFFLINE.*pass its path"):
        models.load("someone/other", cache_dir=tmp_path)


def test_what_is_a_hub_id() -> None:
    assert hub.hub_id("gpt2") == "openai-community/gpt2" and hub.hub_id("a/b") == "a/b"
    for name in ("gtp2", "a/b/c", "/a/b", "./a", "~/a", "a/", "gpt-english"):
        assert hub.hub_id(name) is None
    with pytest.raises(UnknownModel, match="Did you mean 'gpt-english'"):
        models.load("gpt-englsh")


# ---------------------------------------------------------------------------------------------------------- tokenizer


def test_the_checkpoints_own_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE

    symbols = ["<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())][:60]
    merges = [("c", "a"), ("ca", "t"), ("Ġ", "cat")]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    for letter in ("c", "a", "t", "Ġ", "ca", "cat", "Ġcat"):
        vocabulary.setdefault(letter, len(vocabulary))
    backend = Tokenizer(BPE(vocabulary, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    edit_config(folder, vocab_size=len(vocabulary))
    edit_weights(
        folder, lambda weights: weights.update({"model.embed_tokens.weight": torch.randn(len(vocabulary), 32)})
    )
    model = models.load(folder)
    ids = model.to_tokens("cat cat")[0].tolist()
    assert ids == [0, vocabulary["cat"], vocabulary["Ġcat"]]
    assert model.tokenizer.token_strings(ids) == ["<s>", "cat", " cat"]
    assert model.to_single_token(" cat") == vocabulary["Ġcat"], "without special tokens"
    assert model.to_string(torch.tensor(ids[1:])) == "cat cat"
    edit_config(folder, vocab_size=20)
    edit_weights(folder, lambda weights: weights.update({"model.embed_tokens.weight": torch.randn(20, 32)}))
    with pytest.raises(ValueError, match="do not belong together"):
        models.load(folder)


@pytest.mark.parametrize("kind", ["bert-masked", "gpt2", "opt"])
def test_tokenizers_of_older_layouts(tmp_path: Path, kind: str) -> None:
    """`vocab.txt`, or `vocab.json` with `merges.txt`, as many checkpoints have them instead of a `tokenizer.json`."""
    from tokenizers import pre_tokenizers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s"]
    if kind != "bert-masked":
        words = [
            "<pad>",
            "</s>",
            "<unk>",
            "<|endoftext|>",
            *sorted(pre_tokenizers.ByteLevel.alphabet()),
            "th",
            "the",
            "Ġthe",
        ]
    case = {**CASES, **ENCODERS}[kind]
    write(Case(case.model, {**case.settings, "vocab_size": len(words)}), tmp_path / kind)
    if kind == "bert-masked":
        (tmp_path / kind / "vocab.txt").write_text("\n".join(words))
    else:
        (tmp_path / kind / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
        (tmp_path / kind / "merges.txt").write_text("#version: 0.2\nt h\nth e\nĠ the\n")
    model = models.load(tmp_path / kind)
    if kind == "bert-masked":
        assert model.to_tokens("The cats [MASK]").tolist() == [[2, 5, 6, 7, 4, 3]] and model.tokenizer.mask_id == 4
    else:
        assert model.tokenizer.token_strings(model.tokenizer.encode_plain("the the")) == ["the", " the"]
        assert model.tokenizer.mask_id is None


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind, stored", [("gpt2", "float32"), ("llama", "float32"), ("llama", "bfloat16")])
def test_peak_memory_of_loading(tmp_path: Path, kind: str, stored: str) -> None:
    """At most 1.15 × the weights as they are afterwards: GPT-2's are transposed one by one, Llama's stay mapped or are cast one by one."""
    weights = write_large(kind, stored, tmp_path / "big")
    ratio = peak_of_loading(tmp_path / "big") / weights
    assert ratio <= 1.15, f"{ratio:.2f} × the weights"
