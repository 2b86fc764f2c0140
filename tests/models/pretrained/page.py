"""`python -m tests.models.pretrained.page` measures every family against transformers and writes docs/pretrained.md."""

import tempfile
from pathlib import Path
from typing import Any

import torch

import models
from tests.models.pretrained import test_encoders
from tests.models.pretrained.reference import CASES, LAYERS, NEW, Case, Pair, batch, largest, pair

PAGE = Path(__file__).parents[3] / "docs" / "pretrained.md"
HEADER = """# Published checkpoints

This page is written by `python -m tests.models.pretrained.page` from measurements.

`models.load` opens a folder in Hugging Face layout (`config.json` and safetensors, also in shards) or a hub id, on our own modules; none
of transformers' modelling code runs. `workbench models PATH` shows type, licence, size and memory without
opening the weights. Everything else works as on every model: hooks, caches, patterns, states, padding, generation, runs.

```
model = models.load("openai-community/gpt2")               # downloaded once; afterwards from the local cache
model = models.load("path/to/folder", dtype="auto")        # the stored dtype; the default is float32
logits, cache = model.run_with_cache("When Mary and John went to the shops", role="pattern")
```

Weights are mapped, converted one by one and put into a model that had no memory before: opening takes at most 1.15 times the memory of the
weights afterwards (a test and `make bench ARGS="--only loading"` measure it). Weights that exist only as pickles are refused, unless
`allow_pickle_conversion=True`; `workbench models FOLDER --convert NEW_FOLDER` writes them as safetensors once. The checkpoint's own
tokenizer comes with it, where there is one, and texts get its special tokens; one that cannot be read is an error, and `tokenizer=False`
opens the model without it. What is wrong with the weights (a shard that is missing, a cut file, pickles) `workbench models NAME`, the
outlook and the dashboard's form say before anything is opened, in the words of the error.

## Three ways in

- **Script**: `models.load(NAME)`; `models.pretrained.outlook.outlook(NAME)` says beforehand what it would take, and `progress=` reports
  while files come and weights are read (what it raises stops the download; whole files stay in the cache).
- **Command line**: wherever a command takes a MODEL, a folder or hub id will do: `workbench models NAME` (type, licence, size, memory,
  nothing opened), `workbench trace NAME "text"`, `workbench probe NAME`, `workbench features NAME ...`.
- **Dashboard**: the form *New run* lists the folders under the models root and takes hub ids ("Another one"). Before anything is opened it
  shows type, licence, parameters, what is to be downloaded and the memory against what is free, and asks when that is tight; opening shows
  its progress and can be cancelled. An opened model is then in every page's list of models.

The models root is a folder of model folders, `$WORKBENCH_MODELS` or `workbench serve --models FOLDER`; a folder in it is known by its name
everywhere (`models.load("my-llama")`). Browsers can name folders under the root and hub ids, never paths.

Without network, a hub id works if it was downloaded before. Else bring the folder: `hf download OWNER/NAME --local-dir FOLDER` on another
computer, then pass its path or put it under the root.
"""
FOOTER = """
## Encoders: with and without a head

```
model = models.load("google-bert/bert-base-uncased")       # holds the head that predicts masked tokens
logits, cache = model.run_with_cache("the capital of france is [MASK].")         # what stands at each position: [batch, pos, vocab]
stream = cache["hook_output"]                                                    # [batch, pos, d_model]
sentence = model.mean_pooled(stream)
```

BERT, RoBERTa, XLM-RoBERTa, CamemBERT and DistilBERT checkpoints (`models.encoder.Encoder`) open with the head for masked tokens where it is
stored (`model.predicts_masked_tokens`), and their logits are its; checkpoints without it (sentence embedders such as MiniLM, `BertModel`)
return the last residual stream instead and have no unembedding. `workbench models NAME` says which it is. Heads for classes, spans and the
next sentence are left out. `pooled(stream)` needs a pooler, which many lack. `facts={"token_types": ...}` names sentences A and B. Runs
keep the patterns in any case and, with the head, what it would put at each position. A `[MASK]` (`<mask>`) in a text is read as that token,
and `workbench trace` says what would stand there.

## T5: a source and a text

```
model = models.load("google/flan-t5-small")
model.generate(source="translate English to German: That is good.", max_new_tokens=12)
logits, cache = model.run_with_cache(model.start_tokens(), facts={"source": "That is good."})
german = model.with_source("translate English to German: That is good.")       # a language model given this source: what probes take
```

A decoder layer is two blocks: `blocks.{2l}` has self-attention, `blocks.{2l + 1}` cross-attention and the MLP, so `model.patterns` gives
the text's own pattern and the one over the source's tokens in turns. The encoder's hook points are `encoder.…`
(`encoder.blocks.0.attn.hook_pattern`), their roles begin with `source_`. A carried state holds the source. T5's encoder alone
(`T5EncoderModel`) opens as an encoder.

`workbench trace NAME "text" --source "text"` and the dashboard's form take both; the run keeps the pattern over the source, which the
Attention page draws, and measurements of that run read its source again. Patterns inside the encoder are not kept in runs.

## HRM-Text: one address per run of a block

`blocks.0.attn.hook_pattern@3` is the pattern of the first block's fourth run; `wiring.hook_low@k` and `wiring.hook_high@k` are what the
stacks give. A prefix that reads itself in both directions is `facts={"prefix_length": n}`.

## BDH: weights of the published code

```
model = models.load("dragon.safetensors", config={"n_layer": 6})                                # the weights tell all but the layers
model = models.load("dragon.pt", config={"n_layer": 6}, allow_pickle_conversion=True)           # a state dict saved by torch
save_official(model, "folder")           # of models.bdh.official: the same layout again, with its settings in config.json
```

A `config.json` beside the file, or in the folder, with the published settings (`n_layer`, `n_embd`, ...) does instead of `config`.

## What is not supported, and says so

- Settings that would make another function of the same weights: Falcon with ALiBi, OPT with norms after or projected embeddings (350M),
  Phi with normalised queries and keys, BLOOM with residuals after norms, Mamba-2 with bounded step sizes, xLSTM with biases.
- Mixtures of experts other than Qwen3-Next's have no converter here. Qwen3-Next's heads for further tokens are left out. Of the
  encoder-decoders there is T5 with its relatives.
- HRM-Text with biases. Its early fast runs carry no gradient in transformers, here all do.
- RecurrentGemma and xLSTM in transformers let padding into their memories. They are compared with its reading of every text by itself.
- Heads of encoders other than that for masked tokens (classes, spans, the next sentence) are left out.
- 16-bit Gemma: √d_model is not rounded to 16 bit here as it is there. 16-bit T5: infinities are not clamped.
- UMT5: what is unembedded is multiplied by d_model^−½ unless config.json has `tie_word_embeddings: false`, as by older versions of
  transformers; version 5 multiplies always. The order of the logits is the same.
"""


def measured(both: Pair) -> dict[str, str]:
    """The largest differences over a whole, a left-padded and a right-padded batch in float64; logits in float32; generation."""
    case, found = both.case, {"logits": 0.0, "streams": 0.0, "patterns": 0.0, "states": 0.0}
    for side in (None, "left", "right"):
        tokens, mask, _ = batch(side)
        expected = both.reference(side)
        with torch.no_grad():
            (logits, state), cache = both.ours.run_with_cache(
                tokens, mask=None if side is None else mask, return_state=True
            )
            unwatched = both.ours(tokens, mask=None if side is None else mask)
        for ours in (logits, unwatched):
            found["logits"] = max(found["logits"], largest((ours - expected.logits)[mask]))
        for layer in range(LAYERS):
            gap = largest((cache[case.streams, layer] - expected.hidden_states[layer])[mask])
            found["streams"] = max(found["streams"], gap)
        for layer, theirs in expected.attentions.items():
            gap = largest((cache["pattern", layer] - theirs).transpose(1, 2)[mask])
            found["patterns"] = max(found["patterns"], gap)
        for layer, theirs in expected.states.items() if side != "right" else ():
            gap = largest(theirs - both.state_of_ours(state, layer, theirs))
            found["states"] = max(found["states"], gap)
    compared = (
        {"logits", "streams"} | ({"patterns"} if case.patterns else set()) | ({"states"} if case.states else set())
    )
    row = {name: shown(value) if name in compared else "–" for name, value in found.items()}
    return row | {"float32": f"{single(both):.0e}", "generation": f"{same_tokens(both)} of {NEW}"}


def shown(value: float) -> str:
    """A difference, to one digit."""
    return f"{value:.0e}" if value else "0"


def single(both: Pair) -> float:
    """The largest difference of logits in float32, over their largest."""
    tokens, _, _ = batch(None)
    with torch.no_grad():
        expected = both.single()(tokens).logits
        return largest(models.load(both.folder)(tokens) - expected) / max(1.0, largest(expected))


def same_tokens(both: Pair) -> int:
    """How many greedy tokens of a left-padded batch are the same, before the first that differs."""
    tokens, mask, _ = batch("left")
    equal = (both.ours.generate(tokens, NEW, mask=mask)[:, -NEW:] == both.generated()).all(0)
    return NEW if bool(equal.all()) else int((~equal).int().argmax())


def encoder_row(both: Pair) -> dict[str, str]:
    """The same for an encoder: logits of its head or else its output, streams and patterns."""
    tokens, mask = test_encoders.padded(both.theirs.config.pad_token_id)
    with torch.no_grad():
        expected: Any = both.theirs(
            tokens, attention_mask=mask.long(), output_hidden_states=True, output_attentions=True
        )
        logits, cache = both.ours.run_with_cache(tokens, mask=mask)
    layers = range(LAYERS)
    streams = max(largest((cache["resid_pre", i] - expected.hidden_states[i])[mask]) for i in layers)
    patterns = max(largest((cache["pattern", i] - expected.attentions[i]).transpose(1, 2)[mask]) for i in layers)
    head = both.ours.predicts_masked_tokens
    out = largest((logits - (expected.logits if head else expected.hidden_states[-1]))[mask])
    return {
        "logits": f"{shown(out)} ({'masked tokens' if head else 'output'})",
        "streams": shown(streams),
        "patterns": shown(patterns),
    }


def main() -> None:
    """Measure and write."""
    import transformers

    from tests.models.pretrained import test_bdh_checkpoints, test_encoder_decoders, test_hrm_text

    torch.set_num_threads(1)
    columns = ("logits", "streams", "patterns", "states", "float32", "generation")
    lines = [
        HEADER,
        "## Parity\n",
        f"Largest absolute difference from transformers {transformers.__version__} on small checkpoints with random weights that it wrote "
        "(3 layers, batches whole, padded left and right), in float64 with its casts to float32 going to float64; `float32`: of the logits "
        "as they come, over the largest logit; `generation`: greedy tokens of a padded batch with a cache, in float64.\n",
        f"| checkpoint | class | {' | '.join(columns)} |",
        "|---" * (len(columns) + 2) + "|",
    ]
    cases: list[tuple[str, Case, Any]] = [(name, case, measured) for name, case in CASES.items()]
    cases += [(name, case, encoder_row) for name, case in test_encoders.CASES.items()]
    cases += [(name, case, test_hrm_text.row) for name, case in test_hrm_text.CASES.items()]

    def add(name: str, reference: str, row: dict[str, str]) -> None:
        lines.append(f"| {name} | {reference} | {' | '.join(row.get(column, '–') for column in columns)} |")
        print(lines[-1], flush=True)

    for name, case, measure in cases:
        with tempfile.TemporaryDirectory() as folder:
            add(name, case.model, measure(pair(case, Path(folder) / name)))
    for name, case in test_encoder_decoders.CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            both = test_encoder_decoders.opened(name, Path(folder) / name)
            add(name, case.model, test_encoder_decoders.row(both))
    with tempfile.TemporaryDirectory() as folder:
        add("bdh", "published equations, restated", test_bdh_checkpoints.row(Path(folder)))
    PAGE.write_text("\n".join(lines) + "\n" + FOOTER)


if __name__ == "__main__":
    main()
