"""Activations of words: the right tokens of the right sentence, on every architecture; and probing all layers with its baselines."""

import numpy as np
import pytest
import torch

import models
from probes.linear import probe_layers, stream_sites, tree_sentences, word_activations
from workbench.lab.stimuli import Sentence, read_conllu

NAMES = ("gpt2", "llama", "retnet", "mamba2", "bdh")


def sentence(number: int, words: list[str], tags: list[str]) -> Sentence:
    """Words joined by spaces; every word hangs on the one before."""
    rows = [
        f"{i}\t{w}\t{w}\t{t}\t{t}\t_\t{i - 1}\tdep\t_\t_" for i, (w, t) in enumerate(zip(words, tags, strict=True), 1)
    ]
    text = "\n".join(
        [f"# newdoc id = d{number // 3}", f"# sent_id = s{number}", f"# text = {' '.join(words)}", *rows, ""]
    )
    (found,) = read_conllu(text + "\n")
    return found


SENTENCES = [
    sentence(0, ["Tést", "a", "cat"], ["X", "DET", "NOUN"]),
    sentence(1, ["it", "naïvely", "ran", "."], ["P", "A", "V", "PUNCT"]),
]


@pytest.mark.parametrize("name", NAMES)
def test_words_are_the_models_own_activations(name: str) -> None:
    """Each row against a run of that sentence alone, for a word with a two-byte character as well; batching and padding change nothing."""
    model = models.build(name).double()
    site = stream_sites(model)[-1]
    found = {p: word_activations(model, SENTENCES, [site], pooling=p, batch_size=2) for p in ("last", "first", "mean")}
    alone = word_activations(model, SENTENCES, [site], batch_size=1)
    assert np.allclose(found["last"][site], alone[site], atol=1e-6)
    row = 0
    for each in SENTENCES:
        x = model.run_with_cache(each.text, names=site)[1][site][0].detach()
        for start, end in each.spans:
            first, last = len(each.text[:start].encode()), len(each.text[:end].encode()) - 1
            for pooling, expected in (("last", x[last]), ("first", x[first]), ("mean", x[first : last + 1].mean(0))):
                assert np.allclose(found[pooling][site][row], expected.flatten().numpy(), atol=1e-6), (each, pooling)
            row += 1
    words = found["last"]
    assert row == len(words) == 7 and words.facts("upos")[:3] == ["X", "DET", "NOUN"] and words.types[0] == "tést"


class Marked:
    """One token per character, with special tokens 1 before and 2 after every text."""

    def encode_plain(self, text: str) -> list[int]:
        return [ord(character) for character in text]

    def encode(self, text: str) -> list[int]:
        return [1, *self.encode_plain(text), 2]


def test_special_tokens_around_a_text_move_no_word() -> None:
    """An encoder whose tokenizer adds tokens before and after: words are read at their own tokens."""
    model = models.build("bert", seed=1)
    model.tokenizer = Marked()
    each = sentence(0, ["ab", "c", "def"], ["X", "X", "X"])
    for pooling, place in (("first", 0), ("last", 1)):
        found = word_activations(model, [each], ["hook_embed"], pooling=pooling)["hook_embed"]
        letters = [ord(each.text[span[place] - place]) for span in each.spans]
        assert np.abs(found - model.embed.W_E[letters].detach().numpy()).max() < 1e-6  # type: ignore[union-attr, index]


@pytest.mark.parametrize("name", ["retnet", "mamba2", "bdh"])
def test_states_after_words(name: str) -> None:
    model = models.build(name).double()
    site = next(p.name for p in model.hook_points.points.values() if p.role == "state" and p.layer_index == 1)
    found = word_activations(model, SENTENCES, [site])
    at = len(SENTENCES[1].text[: SENTENCES[1].spans[1][1]].encode()) - 1
    expected = model.states(SENTENCES[1].text, [at], layers=1)[1][0, 0].detach().flatten().numpy()
    assert np.allclose(found[site][4], expected, atol=1e-6)
    with pytest.raises(ValueError, match="pooling='last'"):
        word_activations(model, SENTENCES, [site], pooling="mean")


def test_mistakes_are_named() -> None:
    model = models.build("gpt2")
    with pytest.raises(ValueError, match="Did you mean 'last'"):
        word_activations(model, SENTENCES, ["hook_embed"], pooling="lst")
    with pytest.raises(ValueError, match="no sentences"):
        word_activations(model, [], ["hook_embed"])
    with pytest.raises(ValueError, match="position axis"):
        word_activations(model, SENTENCES, ["blocks.0.attn.hook_pattern"])
    words = word_activations(model, SENTENCES, ["hook_embed"])
    with pytest.raises(ValueError, match="Did you mean 'upos'"):
        words.facts("upso")
    with pytest.raises(KeyError, match="hook_embed"):
        words["hook_embde"]


def test_tree_sentences_follow_the_words() -> None:
    model = models.build("retnet")
    words = word_activations(model, SENTENCES, ["hook_embed"])
    first, second = tree_sentences(words, "hook_embed")
    assert np.allclose(np.concatenate([first.vectors, second.vectors]), words["hook_embed"])
    assert first.distances[0].tolist() == [0, 1, 2] and second.counted.tolist() == [True, True, True, False]


def test_layers_are_compared_with_embedding_and_twin() -> None:
    """Planted: the tag of a word is that of the word before it. The embedding cannot know, a layer that reads one token back can."""
    rng = np.random.default_rng(0)
    sentences = []
    for number in range(90):
        words = ["a" if v else "b" for v in rng.integers(0, 2, 8)]
        sentences.append(sentence(number, words, ["none", *(w.upper() for w in words[:-1])]))
    model = models.build("gpt2")
    with torch.no_grad():  # layer 0: every head reads two bytes back (the last byte of the word before) and copies it
        for block in model.blocks:
            for parameter in block.parameters():
                parameter.zero_()
        block = model.blocks[0]
        block.ln1.w.fill_(1.0)
        block.attn.value.weight.copy_(torch.eye(24))
        block.attn.output.weight.copy_(torch.eye(24))

    def two_back(scores: torch.Tensor, hook: object) -> torch.Tensor:
        out = torch.full_like(scores, -1e9)
        length = scores.shape[-1]
        rows = torch.arange(length)
        out[..., rows, (rows - 2).clamp(min=0)] = 0
        return out

    handle = model.add_hook("blocks.0.attn.hook_attn_scores", two_back)
    report = probe_layers(model, sentences, "upos", twin=None)
    handle.remove()
    embed, layer = report.trained["hook_embed"], report.trained["blocks.0.hook_resid_post"]
    assert embed.accuracy < 0.65 and layer.accuracy > 0.97
    with_twin = probe_layers(model, sentences[:30], "upos", seed=1)
    assert set(with_twin.twin) == set(with_twin.trained) == set(stream_sites(model))
    assert "random twin" in repr(with_twin) and with_twin.to_json()["fact"] == "upos"
