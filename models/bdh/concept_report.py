"""What a model trained on the `concepts` corpus has learned: loss by kind of novelty, facts that it completes, how sparse it became.

    python -m models.bdh.concept_report scratch/bdh-concepts --preset concepts > report.json

For a training folder (or `bdh-concepts`, the shipped model). The report goes onto the card of the shipped model.
"""

import argparse
import json
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models import registry
from models.bdh.model import BDH
from models.decoder import Decoder
from models.shipping import trained_model
from workbench.lab.batches import TextBatches
from workbench.lab.concept_corpus import SPLITS, concept_text, sentences
from workbench.lab.corpora import Corpus, load_corpus
from workbench.lab.ngram import NgramModel
from workbench.lab.training import evaluate

FRESH = 1  # seed of the text, another one than the training corpus has
ORDERS = (3, 6)


@torch.no_grad()
def losses(
    model: Decoder, context: int = 256, windows: int = 32, train: Corpus | None = None
) -> dict[str, dict[str, float]]:
    """Nats per byte on fresh text of every split, beside n-gram models of the training text on the same windows."""
    train = load_corpus("concepts") if train is None else train
    ngrams = {order: NgramModel(order).fit(train.data) for order in ORDERS}
    found = {}
    for split in SPLITS:
        data = concept_text(split, windows * (context + 1), FRESH).encode()
        fresh = Corpus("concepts", split, data, train.licence, train.source, f"fresh paragraphs of split {split}")
        held_out = TextBatches(train, context, 16, validation=fresh, validation_windows=windows).validation_batches()
        found[split] = {"model": evaluate(model, held_out)["loss"]}
        rows = [bytes(row) for tokens, _ in held_out for row in tokens.to(torch.uint8).numpy()]
        for order, ngram in ngrams.items():
            found[split][f"{order}-gram"] = float(np.concatenate([ngram.losses(row)[1:] for row in rows]).mean())
    return found


@torch.no_grad()
def answers(model: Decoder, number: int = 200, batch: int = 50) -> dict[str, dict[str, float]]:
    """Share of sentences whose whole answer is right byte for byte, by split and family, and over all families (`"all"`).

    Every sentence is read alone; each byte of the answer is the most likely one after the right bytes before it.
    """
    found: dict[str, dict[str, float]] = {}
    for split in SPLITS:
        asked = list(islice((s for s in sentences(split, FRESH) if s.answer), number))
        right: dict[str, list[bool]] = defaultdict(list)
        for start in range(0, len(asked), batch):
            part = asked[start : start + batch]
            tokens, mask = model.pad([sentence.text for sentence in part], side="right")
            correct = model(tokens, mask=mask)[:, :-1].argmax(-1) == tokens[:, 1:]  # [sentence, byte − 1]
            for row, sentence in zip(correct, part, strict=True):
                assert sentence.answer is not None
                first, last = sentence.answer
                if first:  # an answer that begins the sentence follows from nothing
                    right[sentence.family].append(bool(row[first - 1 : last - 1].all()))
        found[split] = {family: float(np.mean(shares)) for family, shares in sorted(right.items())}
        found[split]["all"] = float(np.mean([share for shares in right.values() for share in shares]))
    return found


@torch.no_grad()
def active_shares(model: BDH, context: int = 256, windows: int = 16) -> dict[str, list[float]]:
    """Share of neurons that are not 0, for x, gate and y of every layer, on held-out text; the first token left out."""
    held_out = TextBatches("concepts", context, windows, validation_windows=windows).validation_batches()[0][0]
    found: dict[str, list[float]] = {}
    for name in ("x", "gate", "y"):
        names = [f"blocks.{layer}.hook_{name}" for layer in range(model.n_layers)]
        _, cache = model.run_with_cache(held_out[:, :-1], names=names)
        found[name] = [float((cache[point][:, :, 1:] != 0).float().mean()) for point in names]
    return found


def concept_report(model: BDH) -> dict[str, Any]:
    """All of it, rounded to four decimals."""
    report = {"losses": losses(model), "answers": answers(model), "active": active_shares(model)}
    return json.loads(json.dumps(report), parse_float=lambda text: round(float(text), 4))


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="training folder or name of a model")
    parser.add_argument("--preset", default="concepts", help="of the training folder's architecture, bdh")
    options = parser.parse_args()
    folder = Path(options.model)
    model = trained_model(folder, "bdh", options.preset) if folder.is_dir() else registry.load(options.model)
    assert isinstance(model, BDH)
    print(json.dumps({"concepts": concept_report(model)}, indent=1))


if __name__ == "__main__":
    main()
