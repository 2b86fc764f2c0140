"""From a finished training to a shipped model: weights, configuration and a card on which every number can be checked.

    python -m models.shipping ship TRAINING_FOLDER NAME --architecture gpt --preset demo --title "..." --description "..."
    python -m models.shipping page                          docs/models.md, from the registry and the cards
    python -m models.shipping refresh                       the cards, where a shared part gained or lost a hook point

`TRAINING_FOLDER` is what `workbench train --out` wrote. The card carries the data with its hash and licence, the command, the loss curve,
and the metrics, among them the n-gram reference that the model has to beat.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from models import registry
from models.decoder import Decoder
from models.diagram import model_blocks
from workbench.lab.checkpoints import CARD, read_json, read_tensors, write_json

LARGEST = 16_000_000  # bytes of a shipped weights file


def training_card(folder: Path, command: str | None = None) -> dict[str, Any]:
    """The part of a card that a training folder knows: data, command, metrics and a thinned loss curve."""
    metrics = read_json(folder / "metrics.json")
    curve = read_json(folder / "curve.json")
    every = max(1, len(curve) // 200)
    thin = [
        {
            "step": point["step"],
            "train_loss": round(point["train_loss"], 4),
            "validation_loss": point["validation_loss"],
        }
        for index, point in enumerate(curve)
        if index % every == every - 1 or point["validation_loss"] is not None
    ]
    facts = {key: metrics[key] for key in metrics if key not in ("curve", "command", "data", "config")}
    return {
        "data": metrics["data"],
        "licence": _licence(metrics["data"]),
        "command": command or metrics["command"],
        "training": metrics["config"],
        "metrics": facts,
        "curve": thin,
    }


def _licence(data: dict[str, Any]) -> str:
    licences = {corpus["licence"] for corpus in data.get("corpora", [])}
    return "; ".join(sorted(licences)) if licences else "generated sequences: nobody's text"


def ship(folder: Path, model: Decoder, name: str, card: dict[str, Any], destination: Path | None = None) -> Path:
    """Write a shipped model. Refuses one whose weights file is larger than 16 MB."""
    target = (destination or registry.SHIPPED) / name
    size = sum(p.numel() * 4 for p in model.state_dict().values())
    if size > LARGEST:
        raise ValueError(
            f"{name} would take {size / 1e6:.1f} MB in float32; shipped models are at most {LARGEST / 1e6:.0f} MB."
        )
    return registry.save(model, target, {**card, **_structure(model), **training_card(folder, card.get("command"))})


def refresh_cards() -> None:
    """Rewrite what the cards say of structure (blocks, hook points): needed when a shared part gains or loses a hook point."""
    for name in registry.shipped_names():
        path = registry.SHIPPED / name / CARD
        model = registry.load(name)
        write_json(path, {**read_json(path), **_structure(model), "hook_points": len(model.hook_dict)})


def _structure(model: Decoder) -> dict[str, Any]:
    """What the lists show of a shipped model without opening it."""
    kind = registry.architecture(model.architecture)
    points = [
        {"name": p.name, "role": p.role, "axes": list(p.axes), "editable": p.editable}
        for p in model.hook_points.points.values()
    ]
    return {"family": kind.family, "paper": kind.paper, "blocks": model_blocks(model), "hook_point_list": points}


def trained_model(folder: Path, architecture: str, preset: str) -> Decoder:
    """The weights of a training's last checkpoint in a freshly built model."""
    model = registry.build(architecture, preset)
    tensors, _ = read_tensors(folder / "checkpoint.safetensors")
    weights = {key.removeprefix("model/"): value for key, value in tensors.items() if key.startswith("model/")}
    model.load_state_dict(weights)
    return model.eval()


def models_page() -> str:
    """docs/models.md: the architectures of the registry and the shipped models with what their cards say."""
    records = registry.list_models()
    lines = [
        "# Models",
        "",
        "This page is written by `python -m models.shipping page` from the registry and the cards; a test compares it with them.",
        "",
        "## Shipped",
        "",
        "The four English models saw the same bytes in the same number of steps; `bdh-concepts` read generated English and French.",
        "Losses are nats per byte on held-out text; the 3-gram is an interpolated Kneser–Ney model of the same training text, on the",
        "same windows. The circuit model's loss is on its task.",
        "",
        "| name | architecture | parameters | held-out loss | 3-gram | data | licence of the data |",
        "|---|---|---|---|---|---|---|",
    ]
    shipped = [record for record in records if record.provenance == "trained"]
    for record in shipped:
        metrics = record.card["metrics"]
        reference = next((f"{v:.3f}" for k, v in metrics["references"].items() if "windows" in k), "–")
        corpora = record.card["data"].get("corpora")
        data = corpora[0]["name"] if corpora else record.card["data"]["task"]["name"]
        lines.append(
            f"| `{record.name}` | {record.architecture} | {record.parameters:,} | {metrics['validation_loss']:.3f} | {reference} "
            f"| {data} | {record.card['licence']} |"
        )
    for record in shipped:
        lines += ["", f"### {record.name}", "", record.description, "", "```", record.card["command"], "```", ""]
        first = record.card.get("first_phase", {}).get("data", {})
        for corpus in [*first.get("corpora", []), *record.card["data"].get("corpora", [])]:
            lines.append(
                f"- {corpus['name']} ({corpus['split']}): {corpus['bytes']:,} bytes, sha256 `{corpus['sha256']}`"
            )
        metrics = record.card["metrics"]
        lines.append(
            f"- {metrics['tokens']:,} tokens, {metrics['cpu_seconds']:.0f} CPU seconds on one thread of {metrics['machine']}"
        )
        lines.append(f"- weights sha256 `{record.card['weights_sha256']}`")
        evaluated = [point for point in record.card["curve"] if point["validation_loss"] is not None]
        steps = evaluated[:: max(1, len(evaluated) // 6)]
        lines.append("- held-out loss by step: " + ", ".join(f"{p['step']}: {p['validation_loss']:.3f}" for p in steps))
        if "sparsity" in record.card:
            lines.append(_sparsity_line(record.card["sparsity"]["curve"]))
        for name, value in record.card.get("circuit", {}).items():
            lines.append(f"- {name}: {value}")
        if "concepts" in record.card:
            lines += _concept_lines(record.card["concepts"])
    lines += ["", "## Architectures", "", "| name | family | paper | shows | description |", "|---|---|---|---|---|"]
    for kind in registry.ARCHITECTURES.values():
        lines.append(
            f"| `{kind.name}` | {kind.family} | {kind.paper or '–'} | {', '.join(kind.shows)} | {kind.description} |"
        )
    return "\n".join(lines) + "\n"


def _sparsity_line(curve: list[dict[str, Any]]) -> str:
    """Which share of y was not 0 after some steps of the training, mean over layers and heads."""
    shares = {point["step"]: [share for layer in point["active"]["y"] for share in layer] for point in curve}
    shown = [*list(shares)[:-1:3], list(shares)[-1]]
    return "- neurons that fire (y), by step: " + ", ".join(f"{s}: {sum(shares[s]) / len(shares[s]):.1%}" for s in shown)


def _concept_lines(report: dict[str, Any]) -> list[str]:
    """What `models.bdh.concept_report` measured, as a table by split and a line on sparsity."""
    columns = list(next(iter(report["losses"].values())))
    lines = ["", "| fresh text | " + " | ".join(columns) + " | answers right |", "|---" * (len(columns) + 2) + "|"]
    for split, losses in report["losses"].items():
        cells = [f"{losses[column]:.3f}" for column in columns] + [f"{report['answers'][split]['all']:.0%}"]
        lines.append(f"| {split} | " + " | ".join(cells) + " |")
    shares = "; ".join(f"{name} {', '.join(f'{s:.1%}' for s in layers)}" for name, layers in report["active"].items())
    return [*lines, "", f"- neurons that are not 0, by layer: {shares}"]


def main() -> None:
    """Command line of this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="action", required=True)
    page = actions.add_parser("page")
    page.add_argument("--to", type=Path, default=Path(__file__).parent.parent / "docs" / "models.md")
    actions.add_parser("refresh", help="cards follow the models' structure")
    shipping = actions.add_parser("ship")
    shipping.add_argument("training", type=Path)
    shipping.add_argument("name")
    shipping.add_argument("--architecture", required=True)
    shipping.add_argument("--preset", required=True)
    shipping.add_argument("--title", required=True)
    shipping.add_argument("--description", required=True)
    shipping.add_argument("--command", default=None, help="the command that reproduces the training, for the card")
    shipping.add_argument("--order", type=int, default=50, help="place in lists")
    shipping.add_argument("--extra", type=Path, default=None, help="JSON file with further facts for the card")
    arguments = parser.parse_args()
    if arguments.action == "page":
        arguments.to.write_text(models_page())
        return
    if arguments.action == "refresh":
        refresh_cards()
        return
    card = {"title": arguments.title, "description": arguments.description, "order": arguments.order}
    if arguments.command:
        card["command"] = arguments.command
    if arguments.extra:
        card |= json.loads(arguments.extra.read_text())
    model = trained_model(arguments.training, arguments.architecture, arguments.preset)
    print(ship(arguments.training, model, arguments.name, card))


if __name__ == "__main__":
    main()
