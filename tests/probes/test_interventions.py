"""Interventions in words: the language, the executor against hooks made by hand, matched random twins, and what is measured."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import models
from probes import bdh
from probes.features import TopK, ablate_features, build_dictionary
from probes.interventions import (
    KINDS,
    Executor,
    InterventionError,
    NoTwin,
    Operation,
    in_python,
    intervene,
    offered_operations,
    parse,
    parse_line,
    store_effects,
    twins_of,
)
from probes.interventions.executor import MAKERS
from probes.positions import move, rotation_base, stream
from probes.reading_edits import (
    CalibrateSinks,
    KeepTopScores,
    ReadOnly,
    parallel_contexts,
    parallel_positions,
    star,
    streaming,
)
from probes.state_tools_edits import (
    clamp_gate,
    cut_edges,
    erase_key,
    freeze,
    implant,
    patch_state,
    reset,
    scale_write,
)
from workbench import Ablate, EditState, Patch, Project, Scale, Steer
from workbench.instrument.errors import HookError
from workbench.lab.runs import RunStore

TEXT, OTHER = "abcd bcab dabc", "dcba cbda abcd"
N = len(TEXT)


@pytest.fixture(scope="module")
def opened() -> Callable[[str], Any]:
    kept: dict[str, Any] = {}

    def load(name: str) -> Any:
        if name not in kept:
            kept[name] = models.build(name).double().eval()
        return kept[name]

    return load


def cached(model: Any, text: str, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.run_with_cache(text, names=name)[1][name]


# ---- language --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_read_written_and_made(kind: str) -> None:
    spec = KINDS[kind]
    operation = parse_line(f"{spec.verb}   {spec.example} ")
    assert operation.kind == kind and kind in MAKERS
    assert str(operation).split() == f"{spec.verb} {spec.example}".replace("3.0", "3").split()
    record = operation.to_json()
    assert Operation.from_json(record) == operation
    assert Operation.from_json({name: value for name, value in record.items() if name != "line"}) == operation
    assert set(spec.required) <= set(spec.fields)


def test_what_is_read() -> None:
    zero, steer, cut = parse(
        "zero head 1.3,5 at 4,8:10,-1\n\nsteer resid 0 by -1.5e2 from: a  b || from: c\ncut layer 2 keys :3"
    )
    assert (zero.place, zero.layer, zero.units, zero.at) == ("head", 1, (3, 5), (4, (8, 10), -1))
    assert steer.by == -150 and steer.texts == ("a  b", "from: c")
    assert cut.keys == ((0, 3),) and cut.queries == () and str(cut) == "cut layer 2 keys :3"
    spaced = Operation("steer", place="resid", layer=0, by=1.0, texts=(' a "b" ', "c || d\n"))
    assert parse_line(str(spaced)) == spaced and str(spaced).endswith(r'from: " a \"b\" " || "c || d\n"')
    written = "zero blocks.0.attn.hook_k:1,2 at 3:"
    point = parse_line(written)
    assert (point.place, point.units, point.at) == ("blocks.0.attn.hook_k", (1, 2), ((3, None),)) and str(
        point
    ) == written


@pytest.mark.parametrize("lines,words", [
    ("", "0 edits"), ("zero mlp 1\n" * 25, "25 edits"), ("zer head 1.1", "Did you mean 'zero'"), ("zero head 1", "names no head"),
    ("zero head", "is not understood.*zero head 1.3"), ("steer resid 1 by 2 from: one", "needs two texts"),
    ("patch resid 1", "for example"),
    ("patch resid 1 from: a || b", "takes one text"), ('patch resid 1 from: "a\\q"', "no text in quotes"),
    ("mean mlp 1 from: a ||", "texts is empty"), ("mute 2.0.1-1.0.1", "no synapse"),
    ("zero mlp 1 at 20", "no token 20"), ("zero mlp 1 at 5:3", "holds none"), ("reset state 1 after 13", "too late"),
    ("reset state 1 after -1", "too late"), ("freeze at 3", "freeze since 40"),
])  # fmt: skip
def test_mistakes_in_lines_are_named(lines: str, words: str) -> None:
    with pytest.raises(InterventionError, match=f"(?s){words}"):
        parse(lines, N)


@pytest.mark.parametrize("record,words", [
    ({"line": "zero mlp 1", "layer": 2}, "contradicts"), ({"lines": "x"}, "no field 'lines'"), ({"kind": "zer"}, "Did you mean 'zero'"),
    ({"layer": 1}, "a line or a kind"),
])  # fmt: skip
def test_mistakes_in_records_are_named(record: dict[str, Any], words: str) -> None:
    with pytest.raises(InterventionError, match=words):
        Operation.from_json(record)


def test_the_language_needs_no_torch() -> None:
    code = "import sys, probes.interventions.offers, probes.interventions.language; print('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        == "False"
    )


def test_its_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    exec(in_python("induction-circuit", parse("zero head 0.1"), "abcabc"), {})
    assert "zero head 0.1" in capsys.readouterr().out


# ---- executor --------------------------------------------------------------------------------------------------------


def by_hand(model: Any, line: str) -> list[Any]:
    """The hooks of a line, made from the instrument and the probes directly."""
    resid = "blocks.1.hook_resid_post"
    difference = cached(model, "abab", resid)[0].mean(0) - cached(model, "ccdc", resid)[0].mean(0)
    site = "blocks.1.attn" if "blocks.1.attn.hook_z" in model.hook_dict else "blocks.1.mixer"
    mlp = cached(model, TEXT, "blocks.1.hook_mlp_out")
    makers: dict[str, Callable[[], list[Any]]] = {
        "zero head 1.1,2": lambda: [Ablate(f"{site}.hook_z", heads=[1, 2])],
        "zero mlp 1 at 3:5": lambda: [Ablate("blocks.1.hook_mlp_out", positions=[3, 4])],
        "zero neuron 1.3,5 at -1": lambda: [Ablate("blocks.1.mlp.hook_post", at={"d_mlp": [3, 5]}, positions=[N - 1])],
        f"zero {site}.hook_v:1": lambda: [Ablate(f"{site}.hook_v", heads=[1])],
        "mean mlp 1": lambda: [Ablate("blocks.1.hook_mlp_out", value=mlp.mean((0, 1), keepdim=True))],
        "mean mlp 1 from: abc || ddddd": lambda: [Ablate("blocks.1.hook_mlp_out", value=torch.cat(
            [cached(model, text, "blocks.1.hook_mlp_out")[0] for text in ("abc", "ddddd")]).mean(0))],
        "scale mixer 1 by 0.5": lambda: [Scale(f"blocks.1.hook_{site.rsplit('.', 1)[-1]}_out", factor=0.5)],
        f"patch resid_post 1 at 2,-1 from: {OTHER}": lambda: [Patch(resid, value=cached(model, OTHER, resid), positions=[2, N - 1])],
        "patch head 1.0 at 2 from: dcba": lambda: [Patch(f"{site}.hook_z", heads=[0], positions=[2],
                                                            value=cached(model, "dcba", f"{site}.hook_z")[:, 2:3])],
        f"resample mlp 1 from: {OTHER}xx": lambda: [Patch("blocks.1.hook_mlp_out", value=cached(model, OTHER, "blocks.1.hook_mlp_out"))],
        "steer resid_post 1 by 3 at 4: from: abab || ccdc": lambda: [Steer(resid, direction=difference, coefficient=3.0,
                                                                           positions=list(range(4, N)))],
        "erase resid_post 1 from: abab || ccdc": lambda: [Project(resid, directions=difference)],
        "cut head 1.1 queries 5:9 keys 2": lambda: cut_edges(model, 1, queries=[5, 6, 7, 8], keys=[2], heads=[1]),
        "calibrate head 1.1 by 0.4": lambda: [CalibrateSinks(layer=1, heads=[1], beta=0.4)],
        "keep layer 1 top 2": lambda: [KeepTopScores(layer=1, k=2)],
        "window layer 1 sinks 1 last 3": lambda: [ReadOnly(layer=1, allowed=streaming(N, 1, 3))],
        "star layer 1 block 3 after 8": lambda: [ReadOnly(layer=1, allowed=star(N, 3, 9))],
        "separate head 1.1 contexts 2:6,6:11": lambda: [ReadOnly(layer=1, heads=[1], allowed=parallel_contexts(N, [(2, 6), (6, 11)]))],
        "renumber contexts 2:6,6:11": lambda: move(model, parallel_positions(N, [(2, 6), (6, 11)])[0]),
        "stream head 1.1 sinks 2 last 3": lambda: stream(model, layer=1, heads=[1], sinks=2, window=3),
        "base layer 1 to 50": lambda: rotation_base(model, 50.0, layer=1),
        "forget state 1.1 key 3 after 8": lambda: erase_key(
            model, 1, cached(model, TEXT, "blocks.1.mixer.hook_k")[0, 3], after=8, heads=[1]),
        "implant state 1 key 3 value 5 after 8": lambda: implant(
            model, 1, cached(model, TEXT, "blocks.1.mixer.hook_k")[0, 3], cached(model, TEXT, "blocks.1.mixer.hook_v")[0, 5], after=8),
        "freeze state 1 at 4:8": lambda: freeze(model, 1, [4, 5, 6, 7]),
        "reset state 1.1 after 6": lambda: reset(model, 1, after=6, heads=[1]),
        "scale state 1 by 0.3 after 6": lambda: [EditState(layer=1, after=6, operation="scale", value=0.3)],
        f"patch state 1 after 6 from: {OTHER}": lambda: patch_state(model, 1, model.states(OTHER, 6, layers=1)[1][:, 0], after=6),
        "hold decay 1 to 0.7 at 3:9": lambda: clamp_gate(model, 1, 0.7, positions=list(range(3, 9))),
        "write 1 by 0 at 3": lambda: scale_write(model, 1, 0.0, positions=[3]),
        "modes 1.0,2": lambda: [Ablate(f"{site}.hook_q", at={model.mixers[1].factor_points["query"].axes[-1]: [0, 2]})],
    }  # fmt: skip
    return makers[line]()


ANYWHERE = [
    "zero head 1.1,2", "zero mlp 1 at 3:5", "zero neuron 1.3,5 at -1", "mean mlp 1", "mean mlp 1 from: abc || ddddd",
    "scale mixer 1 by 0.5", f"patch resid_post 1 at 2,-1 from: {OTHER}", "patch head 1.0 at 2 from: dcba",
    f"resample mlp 1 from: {OTHER}xx", "steer resid_post 1 by 3 at 4: from: abab || ccdc", "erase resid_post 1 from: abab || ccdc",
    "cut head 1.1 queries 5:9 keys 2",
]  # fmt: skip
CASES = [
    *(("gpt2", line) for line in [*ANYWHERE, "zero blocks.1.attn.hook_v:1", "calibrate head 1.1 by 0.4", "keep layer 1 top 2",
                                  "window layer 1 sinks 1 last 3", "star layer 1 block 3 after 8", "renumber contexts 2:6,6:11"]),
    *(("gpt", line) for line in ["separate head 1.1 contexts 2:6,6:11", "renumber contexts 2:6,6:11", "stream head 1.1 sinks 2 last 3",
                                 "base layer 1 to 50"]),
    *(("gla", line) for line in [*ANYWHERE, "zero blocks.1.mixer.hook_v:1", "freeze state 1 at 4:8", "reset state 1.1 after 6",
                                 "scale state 1 by 0.3 after 6", f"patch state 1 after 6 from: {OTHER}", "hold decay 1 to 0.7 at 3:9",
                                 "write 1 by 0 at 3", "modes 1.0,2", "forget state 1.1 key 3 after 8",
                                 "implant state 1 key 3 value 5 after 8"]),
]  # fmt: skip


@pytest.mark.parametrize("name,line", CASES)
def test_a_line_does_what_hooks_made_by_hand_do(name: str, line: str, opened: Callable[[str], Any]) -> None:
    model = opened(name)
    with torch.no_grad():
        plain = model(TEXT)
        expected = model.run_with_hooks(TEXT, hooks=by_hand(model, line))
        found = model.run_with_hooks(TEXT, hooks=Executor(model, [TEXT]).hooks(parse(line, N), 0))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    # CalibrateSinks moves nothing where this random head has no sink
    assert not torch.equal(found, plain) or line.startswith("calibrate")


@pytest.mark.parametrize("name,line,words", [
    ("gpt2", "stream layer 1 sinks 1 last 3", "adds positions at the embedding"), ("gpt", "stream layer 1 sinks 1 last 0", "window 0"),
    ("gpt", "separate layer 1 contexts 2:6", "two contexts or more"), ("gpt", "separate layer 1 contexts 2:6,4:8", "one after the other"),
    ("gpt", "renumber contexts 2:6,8:10", "tokens between the contexts"), ("gpt2", "base layer 1 to 50", "no rotary positions"),
    ("gpt", "star layer 1 block 0 after 8", "block is 0"), ("gla", "forget state 1 key 2:4 after 8", "expected one token as key"),
    ("gru", "forget state 1 key 2 after 8", "has no key of a token"),
    ("gpt", "implant state 1 key 2 value 3 after 8", "no recurrent state"),
])  # fmt: skip
def test_what_a_reading_or_a_memory_lacks_is_said(
    name: str, line: str, words: str, opened: Callable[[str], Any]
) -> None:
    with pytest.raises((InterventionError, HookError), match=words):
        Executor(opened(name), [TEXT]).hooks(parse(line, N), 0)


def test_a_memory_answers_as_it_was_told(opened: Callable[[str], Any]) -> None:
    """After `forget` a state answers the key with nothing; after `implant` with the other token's value."""
    model = opened("gla")
    key = cached(model, TEXT, "blocks.1.mixer.hook_k")[0, 3]
    value = cached(model, TEXT, "blocks.1.mixer.hook_v")[0, 5]
    for line, expected in (
        ("forget state 1 key 3 after 8", 0 * value),
        ("implant state 1 key 3 value 5 after 8", value),
    ):
        hooks = Executor(model, [TEXT]).hooks(parse(line, N), 0)
        with torch.no_grad(), model.hooks(hooks):
            _, cache = model.run_with_cache(TEXT, names="blocks.1.mixer.hook_state[8]")
        (state,) = cache.values()
        answer = torch.einsum("hk,hkv->hv", key, state[0])
        torch.testing.assert_close(answer, expected, rtol=0, atol=1e-10)


def test_lines_act_together_and_in_order(opened: Callable[[str], Any]) -> None:
    model = opened("gpt2")
    lines = ["scale mlp 1 by 2", "steer mlp_out 1 by 1 from: a || b"]
    logits = []
    for order in (lines, lines[::-1]):
        direction = (
            cached(model, "a", "blocks.1.hook_mlp_out")[0, 0] - cached(model, "b", "blocks.1.hook_mlp_out")[0, 0]
        )
        factor = 1.0 if order is lines else 2.0
        own = [("blocks.1.hook_mlp_out", lambda x, hook, by=factor, d=direction: 2 * x + by * d)]
        with torch.no_grad():
            logits.append(model.run_with_hooks(TEXT, hooks=Executor(model, [TEXT]).hooks(parse(order, N), 0)))
            torch.testing.assert_close(logits[-1], model.run_with_hooks(TEXT, hooks=own), rtol=0, atol=1e-12)
    assert not torch.allclose(*logits)


def test_bdh_lines(opened: Callable[[str], Any]) -> None:
    model = opened("bdh")
    width = int(model.weights.E.shape[1])
    synapse = bdh.Synapse(source=(0, 3), target=(1, 2), target_layer=1, source_layer=0)
    cases: dict[str, Callable[[], list[Any]]] = {
        "ablate 0.0.3-1.1.2 after 5": lambda: [bdh.ablate_synapse(model, TEXT, synapse, after=5)],
        "clamp 0.0.3-1.1.2 to 2 after 5": lambda: [bdh.clamp_synapse(model, TEXT, synapse, 2.0, after=5)],
        "copy 0.0.3-1.1.2 after 5 from: bcd": lambda: [
            bdh.copy_synapse(model, TEXT, synapse, after=5, source_tokens="bcd", source_after=-1)
        ],
        "mute 0.0.3-1.1.2": lambda: bdh.mute_synapse(model, synapse),
        "neurons 0.3 1.2": lambda: bdh.ablate_neurons(model, [(0, 3), (1, 2)]),
        "freeze since 5": lambda: [bdh.freeze_writes(model, since=5, length=N)],
        "block 5 6": lambda: [bdh.block_reads(model, positions=[5, 6])],
        "scale layer 1 by 0.5 after 5": lambda: [EditState(layer=1, after=5, value=0.5)],
        "state layer 1 after 5 from: bcd": lambda: bdh.copy_state(model, "bcd", source_after=-1, after=5, layer=1),
        "zero neuron 1.20": lambda: [Ablate("blocks.1.hook_y", at={"head": [20 // width], "neuron": [20 % width]})],
    }  # fmt: skip
    for line, made in cases.items():
        with torch.no_grad():
            expected = model.run_with_hooks(TEXT, hooks=made())
            found = model.run_with_hooks(TEXT, hooks=Executor(model, [TEXT]).hooks(parse(line, N), 0))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12, msg=line)


def test_features_of_a_dictionary(opened: Callable[[str], Any]) -> None:
    model, point = opened("gpt2"), "blocks.1.hook_resid_post"
    dictionary = build_dictionary(TopK(n_features=24, k=6), model.d_model)
    job = Executor(model, [TEXT], dictionaries={"mine": (dictionary, point, None)})
    on = dictionary.encode(cached(model, TEXT, point))[0].sum(0).argmax().item()
    with torch.no_grad():
        expected = model.run_with_hooks(TEXT, hooks=[ablate_features(dictionary, point, [on])])
        found = model.run_with_hooks(TEXT, hooks=job.hooks(parse(f"feature mine {on} to 0", N), 0))
        added = model.run_with_hooks(TEXT, hooks=job.hooks(parse(f"feature mine {on} add 2", N), 0))
        steered = model.run_with_hooks(TEXT, hooks=[Steer(point, direction=2 * dictionary.directions[on])])
    assert torch.equal(found, expected) and not torch.equal(found, model(TEXT)) and torch.equal(added, steered)
    with pytest.raises(InterventionError, match="Did you mean 'mine'"):
        job.hooks(parse("feature min 1 to 0", N), 0)
    ((twin,),) = twins_of(job, parse(f"feature mine {on} to 0"), 1)
    assert twin.units != (on,) and twin.change(units=(on,)) == parse_line(f"feature mine {on} to 0")


@pytest.mark.parametrize("name,line,words", [
    ("gpt2", "zero head 7.0", "no layer 7"), ("gpt2", "zero hed 1.1", "Did you mean 'head'"), ("gpt2", "zero head 1.9", "out of range"),
    ("gpt2", "zero neuron 1.99999", "no neuron 99999"), ("gpt2", "reset state 1 after 3", "no recurrent state"),
    ("gpt2", "write 1 by 0", "no recurrent state"), ("gpt2", "freeze state 1 at 3", "no recurrent state"), 
    ("gla", "zero state 1", "stands after tokens"),
    ("gpt2", "patch resid 1 from: abc", "14 tokens and the other text 3"), ("gpt2", "patch resid 1 at 5 from: abc", "that both have"),
    ("gpt2", "resample mlp 1", "no other prompt"), ("gpt2", "feature x 1 to 0", "no dictionary"), ("gla", "keep layer 1 top 2", "scores"),
    ("gpt2", "zero blocks.1.attn.hook_zz", "Did you mean"), ("gpt2", "neurons 0.1", "BDH"), 
    ("gla", "patch state 1 after 6 from: abc", "no state after token 6"),
    ("gpt2", "steer head 1.1 by 1 from: a || b", "Name no heads"), ("mamba", "zero mlp 1", "layer 1 has no 'mlp'. It has"),
])  # fmt: skip
def test_refusals(name: str, line: str, words: str, opened: Callable[[str], Any]) -> None:
    model = opened(name)
    with pytest.raises((InterventionError, HookError, ValueError), match=words):
        model.run_with_hooks(TEXT, hooks=Executor(model, [TEXT]).hooks(parse(line, N), 0))


LINES = {
    "zero": "{} 1", "mean": "{} 1", "scale": "{} 1 by 0.5", "patch": "{} 1 at 3 from: dcba", "resample": f"{{}} 1 from: {OTHER}", 
    "steer": "resid 1 by 1 from: a || b", "erase": "resid 1 from: a || b", "cut": "layer 1 keys 3", "calibrate": "layer 1 by 0.5",
    "keep": "layer 1 top 2",
    "window": "layer 1 sinks 1 last 2", "reset": "state 1 after 3", "scale-state": "state 1 by 0 after 3",
    "patch-state": "state 1 after 3 from: dcbaabcd", "write": "1 by 0", "modes": "1.0", "levels": "1.1", "freeze": "since 4",
    "block": "4", "neurons": "0.1", "scale-layer": "layer 1 by 0.5 after 4", "state": "layer 1 after 4 from: abc",
}  # fmt: skip


@pytest.mark.parametrize("name", ["gpt2", "gla", "gated-deltanet", "loglinear-mamba2", "bdh", "mamba"])
def test_what_is_offered_runs_and_what_is_not_is_refused(name: str, opened: Callable[[str], Any]) -> None:
    model = opened(name)
    found = offered_operations([point.describe() for point in model.hook_points.points.values()], architecture=name)
    assert set(found) == set(KINDS) and found["zero"].offered
    for kind, example in LINES.items():
        offer = found[kind]
        assert len(set(offer.places)) == len(offer.places)
        parts = ("head", "neuron", "mlp", "mixer", "resid", "resid_post", "key", "value") if "{}" in example else ("",)
        for part in parts:
            place = f"{part} 1.0" if part in ("head", "neuron") else f"{part} 1"
            line = f"{KINDS[kind].verb} {example.replace('{} 1', place)}"
            offered = offer.offered and (not part or part in offer.places)
            try:
                with torch.no_grad():
                    logits = model.run_with_hooks(TEXT, hooks=Executor(model, [TEXT]).hooks(parse(line, N), 0))
                assert offered, line
                assert torch.isfinite(logits).all()
            except (HookError, ValueError) as error:
                constant = (name, kind) == (
                    "mamba",
                    "modes",
                )  # its B and C are no factors of the memory: known when it is run
                assert not offered or constant, f"{line}: {error}"
    assert (
        offered_operations([], dictionaries=["mine"])["feature"].places == ("mine",)
        and "only a BDH" in offered_operations([])["mute"].reason
    )


# ---- twins -----------------------------------------------------------------------------------------------------------


def test_twins_are_of_the_same_kind_and_never_what_the_basket_names(opened: Callable[[str], Any]) -> None:
    model = opened("gpt2")
    job = Executor(model, [TEXT])
    heads = int(model.mixers[1].describe()["n_heads"])
    basket = parse("zero head 1.1\nscale head 1.2 by 0.5\nzero neuron 1.3,5\nzero mlp 1 at 3:5\nmean mlp 1", N)
    for twin in twins_of(job, basket, 6, seed=1):
        assert [each.kind for each in twin] == [each.kind for each in basket]
        assert not {1, 2} & set(twin[0].units) and len(twin[0].units) == 1 and max(twin[0].units) < heads
        assert not {3, 5} & set(twin[2].units) and len(set(twin[2].units)) == 2
        assert len(twin[3].at) == 2 and not {3, 4} & set(twin[3].at)
        assert twin[4].layer != 1 and twin[4].place == "mlp"
    assert len(set(twins_of(job, basket, 6, seed=1))) == 6
    only = twins_of(job, parse("zero head 1.1"), 50)
    assert sorted(twin[0].units[0] for twin in only) == [
        head for head in range(heads) if head != 1
    ]  # no draw counts twice


def test_random_directions_have_the_true_ones_length(opened: Callable[[str], Any]) -> None:
    model = opened("gpt2")
    job = Executor(model, [TEXT])
    (line,) = parse("steer resid_post 1 by 2 from: abab || ccdc")
    for (twin,) in twins_of(job, [line], 3):
        own, other = (job.hooks([each], 0)[0].direction for each in (line, twin))
        torch.testing.assert_close(other.norm(), own.norm(), rtol=1e-12, atol=0)
        assert abs(torch.cosine_similarity(own, other, dim=0)) < 0.9 and parse_line(str(twin)) == twin


def test_twins_of_neurons_are_about_as_active(opened: Callable[[str], Any]) -> None:
    model = opened("bdh")
    job = Executor(model, [TEXT])
    (line,) = parse("neurons 0.3 1.2")
    x = torch.stack([cached(model, TEXT, f"blocks.{layer}.hook_x") for layer in range(model.n_layers)]).sum((0, 1, 3))
    for (twin,) in twins_of(job, [line], 4):
        for (head, neuron), (same, other) in zip(line.neurons, twin.neurons, strict=True):
            assert same == head and other != neuron
            rank = (x[head] - x[head, neuron]).abs().argsort().tolist()
            assert rank.index(other) <= 9
    ((state,),) = twins_of(job, parse("state layer 1 after 5 from: abcde"), 1)
    assert sorted(state.texts[0]) == list("abcde")


def test_where_no_twin_is_left_the_reason_is_given() -> None:
    model = models.build("gpt2", n_layers=1).double().eval()
    with pytest.raises(NoTwin, match="no other layer"):
        twins_of(Executor(model, [TEXT]), parse("zero mlp 0"), 2)
    effects = intervene(model, TEXT, "zero mlp 0")
    assert "no other layer" in effects.no_control and not effects.controls and effects.change("loss").p is None


# ---- effects ---------------------------------------------------------------------------------------------------------


def test_effects_are_what_two_runs_differ_by(opened: Callable[[str], Any], tmp_path: Path) -> None:
    model = opened("gla")
    prompts, seen = [TEXT, "bcd dab"], []
    effects = intervene(
        model,
        prompts,
        "zero head 1.1",
        target="a",
        wrong="b",
        controls=2,
        seed=3,
        progress=lambda f, m: seen.append((f, m)),
    )
    hook, runs = Ablate("blocks.1.mixer.hook_z", heads=[1]), []
    with torch.no_grad():
        for text in prompts:
            runs.append([model(text)[0], model.run_with_hooks(text, hooks=[hook])[0]])
    gap = [[float(logits[-1, ord("a")] - logits[-1, ord("b")]) for logits in pair] for pair in runs]
    np.testing.assert_allclose(effects.values("target"), [now - before for before, now in gap], atol=1e-12)
    losses, tops = [], []
    for text, (before, now) in zip(prompts, runs, strict=True):
        ids = model.to_tokens(text)[0, 1:, None]
        losses.append(-(now.log_softmax(-1) - before.log_softmax(-1))[:-1].gather(1, ids)[:, 0].numpy())
        most = before.argmax(-1, keepdim=True)
        tops.append((now - before).gather(1, most)[:, 0].numpy())
    np.testing.assert_allclose(
        effects.values("loss")[np.isfinite(effects.values("loss"))], np.concatenate(losses), atol=1e-12
    )
    assert np.isnan(effects.values("loss")[[0, N]]).all()
    np.testing.assert_allclose(effects.change("loss").value, np.concatenate(losses).mean(), atol=1e-12)
    np.testing.assert_allclose(effects.change("top").value, np.concatenate(tops).mean(), atol=1e-12)
    assert effects.change("target").interval is not None and len(effects.change("loss").controls) == 2
    token, before, after = effects.top(0)[0]
    assert before == pytest.approx(float(runs[0][0][-1].softmax(-1)[token])) and after == pytest.approx(
        float(runs[0][1][-1].softmax(-1)[token])
    )
    assert seen[-1] == (1.0, "done") and [f for f, _ in seen] == sorted(f for f, _ in seen)
    run = store_effects(RunStore(tmp_path), model, effects, settings={"controls": 2})
    assert run.kind == "intervention" and run.manifest["interventions"][0]["line"] == "zero head 1.1"
    np.testing.assert_array_equal(
        run.array("controls.target"), [effects.values("target", each) for each in effects.controls]
    )
    assert run.manifest["results"]["changes"]["loss"]["value"] == effects.change("loss").value


def test_p_counts_baskets_that_change_as_much(opened: Callable[[str], Any]) -> None:
    effects = intervene(opened("gpt2"), TEXT, "zero head 1.1", controls=9)
    found = effects.change("loss")
    values = [np.nanmean(effects.values("loss", reading)) for reading in effects.controls]
    np.testing.assert_allclose(found.controls, values, atol=1e-12)
    assert found.p == (1 + sum(abs(value) >= abs(found.value) for value in values)) / (1 + len(values))
    assert effects.change("target").interval is None  # one prompt, one number
    assert effects.targets[0] == int(opened("gpt2")(TEXT)[0, -1].argmax())


@pytest.mark.parametrize("given,words", [
    ({"target": "ab"}, "is 2 tokens"), ({"target": ["a", "b"]}, "2 tokens for 1 prompts"), ({"at": 20}, "no token 20"),
    ({"target": 999999}, "Expected exactly one"),
])  # fmt: skip
def test_mistakes_in_what_is_asked_are_named(given: dict[str, Any], words: str, opened: Callable[[str], Any]) -> None:
    with pytest.raises(InterventionError, match=words):
        intervene(opened("gpt2"), TEXT, "zero mlp 1", **given)
    with pytest.raises(InterventionError, match="fewer than two tokens"):
        intervene(opened("gpt2"), "a", "zero mlp 1")


def test_cancelling_keeps_nothing(opened: Callable[[str], Any]) -> None:
    import threading

    from probes.progress import MeasurementCancelled

    stop = threading.Event()
    with pytest.raises(MeasurementCancelled):
        intervene(
            opened("gpt2"),
            TEXT,
            "zero mlp 1 at 3",
            controls=5,
            progress=lambda f, m: stop.set() if f > 0.1 else None,
            cancel=stop,
        )


def test_a_seed_draws_the_same_twins(opened: Callable[[str], Any]) -> None:
    drawn = [twins_of(Executor(opened("gpt2"), [TEXT]), parse("zero mlp 1 at 3:5"), 4, seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2] and random.Random(0).random() > 0


def test_encoders() -> None:
    """Without a head there is no logit; with one, the loss is that of every token itself, also of the first."""
    with pytest.raises(InterventionError, match="bert-random has no head that predicts tokens"):
        intervene(models.build("bert"), "a cat sat", "zero head 0.1", controls=0)
    model = models.build("bert", masked_head="gelu", init_std=0.5).double()
    found = intervene(model, "a cat sat", "zero head 0.1", controls=0)
    ids = model.to_tokens("a cat sat")
    before = model(ids).log_softmax(-1)[0].gather(1, ids[0, :, None])[:, 0]
    after = (
        model.run_with_hooks(ids, hooks=[Ablate("blocks.0.attn.hook_z", heads=[1])])
        .log_softmax(-1)[0]
        .gather(1, ids[0, :, None])[:, 0]
    )
    np.testing.assert_allclose(found.values("loss"), (before - after).detach().numpy(), atol=1e-12)
    assert np.abs(found.values("loss")).max() > 1e-3 and np.isfinite(found.values("loss")).all()
