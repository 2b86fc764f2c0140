"""Exact decomposition of the state, checked against a run that adds up every write one by one."""

import pytest
import torch
from torch import Tensor

import models
from models.bdh.model import BDH
from probes.bdh.attribution import attribute_state, explained_by_paper, who_wrote, who_wrote_synapse
from probes.bdh.capture import Synapse
from probes.bdh.meaning import neuron_says, row_says, says
from tests.probes.bdh_naive import EXACT, Naive, largest, naive, tiny_model, tiny_tokens
from workbench.instrument.interventions import Steer

AT = 6


@pytest.fixture(scope="module")
def model() -> BDH:
    return tiny_model()


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return tiny_tokens()


def centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)


def naive_part(model: BDH, run: Naive, tokens: Tensor, layer: int, source: int | str, at: int = AT) -> Tensor:
    """Σ_τ k_τ ⊗ (what one source put into v_τ), [head, neuron, d_model]."""
    total = torch.zeros_like(run.state[layer, 0])
    for t in range(at + 1):
        if source == "embedding":
            written = centred(model.W_E[tokens[t]])
        else:
            written = centred(torch.einsum("hn,hnd->d", run.y[int(source), t], model.weights.E))
        total += run.key[layer, t][:, :, None] * (run.scale[layer, t][source] * written).detach()
    return total


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_parts_are_right_and_sum_to_the_state(model: BDH, tokens: Tensor, layer: int) -> None:
    found = attribute_state(model, tokens, layer, at=AT)
    assert found.error < 1e-14
    for row in range(2):
        run = naive(model, tokens[row])
        assert largest(found.state[row] - run.state[layer, AT]) < EXACT
        for source in found.writes.sources:
            part = naive_part(model, run, tokens[row], layer, source)
            assert largest(found.part(source)[row] - part) < EXACT
            assert largest(part) > 1e-2
    assert largest(torch.stack(list(found.shares().values())).sum(0) - 1) < EXACT


def test_without_the_coefficients_it_would_not_sum(model: BDH, tokens: Tensor) -> None:
    """The error is a real check: dropping one scale, or an edit of the stream that the sum cannot know, shows in it."""
    found = attribute_state(model, tokens, 2, at=AT)
    writes = found.writes
    rebuilt = torch.stack([writes.state(AT, source) / writes.coefficients[source].mean() for source in writes.sources])
    assert largest(rebuilt.sum(0) - found.state) > 1e-2
    steered = attribute_state(model, tokens, 2, at=AT, hooks=[Steer("blocks.1.hook_resid_pre", torch.arange(5.0))])
    assert steered.error > 1e-2


def test_padding_does_not_write(model: BDH, tokens: Tensor) -> None:
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), tokens], 1)
    mask = torch.ones_like(padded, dtype=torch.bool)
    mask[:, :3] = False
    found = attribute_state(model, padded, 2, at=AT + 3, mask=mask)
    assert found.error < 1e-14
    assert largest(found.state - attribute_state(model, tokens, 2, at=AT).state) < EXACT


def test_how_much_the_paper_explains(model: BDH, tokens: Tensor) -> None:
    found = attribute_state(model, tokens, 2, at=AT)
    explained = found.explained()
    run = naive(model, tokens[1])
    state = run.state[2, AT]
    raw, normal = torch.zeros_like(state), torch.zeros_like(state)
    for t in range(AT + 1):
        u = torch.einsum("hn,hnd->d", run.y[1, t], model.weights.E).detach()
        raw += run.key[2, t][:, :, None] * centred(u)
        normal += run.key[2, t][:, :, None] * centred(u) / (u.var(correction=0) + 1e-5).sqrt()
    for head in range(2):
        for value, candidate in ((explained.cosine_sigma, raw), (explained.cosine, normal)):
            expected = torch.cosine_similarity(candidate[head].flatten(), state[head].flatten(), dim=0)
            assert abs(float(value[1, head] - expected)) < EXACT
        part = naive_part(model, run, tokens[1], 2, 1)[head]
        assert abs(float(explained.share[1, head] - (part * state[head]).sum() / state[head].square().sum())) < EXACT
    with pytest.raises(ValueError, match="Layer 0 has no synapses"):
        attribute_state(model, tokens, 0, at=AT).explained()


def test_every_layer_with_synapses_is_explained(model: BDH, tokens: Tensor) -> None:
    layers = explained_by_paper(model, tokens, at=AT)
    assert [found.layer for found in layers] == [1, 2]
    assert torch.equal(layers[1].share, attribute_state(model, tokens, 2, at=AT).explained().share)


def test_entry_row_and_column_are_sums_of_their_terms(model: BDH, tokens: Tensor) -> None:
    found = attribute_state(model, tokens, 2, at=AT)
    state, every = found.state[1, 1], 100_000
    entry = who_wrote(found, 1, row=3, column=2, sequence=1, k=every)
    assert entry.total == pytest.approx(float(state[3, 2]), abs=EXACT) and entry.listed == pytest.approx(entry.total)
    row = who_wrote(found, 1, row=3, sequence=1, k=every)
    assert row.total == pytest.approx(float(state[3].norm()), abs=EXACT)
    column = who_wrote(found, 1, column=2, sequence=1, k=every)
    assert column.total == pytest.approx(float(state[:, 2].norm()), abs=EXACT)
    assert sum(write.share for write in row.writes) == pytest.approx(1, abs=1e-9)
    assert [abs(w.value) for w in row.writes] == sorted((abs(w.value) for w in row.writes), reverse=True)


def test_terms_one_by_one(model: BDH, tokens: Tensor) -> None:
    found = attribute_state(model, tokens, 2, at=AT)
    run = naive(model, tokens[0])
    for write in who_wrote(found, 0, row=1, column=4, k=60).writes:
        reach = run.key[2, write.position][0, 1] * run.scale[2, write.position][write.source]
        if write.neuron is None:
            expected = reach * centred(model.W_E[tokens[0, write.position]])[4]
        else:
            head, i = write.neuron
            expected = reach * run.y[int(write.source), write.position][head, i] * centred(model.weights.E[head, i])[4]
        assert abs(float(expected.detach()) - write.value) < EXACT
        assert write.token == str(int(tokens[0, write.position]))


def test_planted_author_is_found(model: BDH, tokens: Tensor) -> None:
    """A neuron whose y is made enormous at one token of layer 0 is named as the author of what that layer wrote then."""

    def shout(y: Tensor, hook: object) -> Tensor:
        y[0, 1, 4, 2] = 1e6
        return y

    found = attribute_state(model, tokens, 1, at=AT, hooks=[("blocks.0.hook_y", shout)])
    fired = int(found.writes.keys[0, 0, 4].abs().argmax())
    writes = [w for w in who_wrote(found, 0, row=fired, k=10_000).writes if (w.source, w.position) == (0, 4)]
    assert writes[0].neuron == (1, 2)
    assert abs(writes[0].value) > 1e4 * sum(abs(write.value) for write in writes[1:])


def test_authors_of_a_synapse(model: BDH, tokens: Tensor) -> None:
    found = attribute_state(model, tokens, 2, at=AT)
    run = naive(model, tokens[1])
    for synapse in (Synapse((1, 2), (0, 3), 2), Synapse((0, 1), (1, 0), 2, 0)):
        (a, i), (b, j), k = synapse.source, synapse.target, synapse.source_layer
        terms = [float(run.scale[2, t][k][0] * run.y[k, t][a, i] * run.key[2, t][b, j]) for t in range(AT + 1)]
        authors = who_wrote_synapse(found, synapse, sequence=1)
        assert authors.total == pytest.approx(sum(terms), abs=EXACT)
        assert {w.position for w in authors.writes} == {t for t, term in enumerate(terms) if term}
        for write in authors.writes:
            assert write.value == pytest.approx(terms[write.position], abs=EXACT) and write.neuron == (a, i)
    with pytest.raises(ValueError, match="held by layer 1; this attribution is of layer 2"):
        who_wrote_synapse(found, Synapse((0, 0), (0, 0), 1))


def test_neuron_and_row_say_what_their_weights_say(model: BDH, tokens: Tensor) -> None:
    model = tiny_model()
    with torch.no_grad():  # neuron (1, 2) listens to token 9 and promotes token 20
        stream = centred(model.W_E[9])
        model.weights.D_x[1, :, 2] = stream / stream.norm()
        model.weights.E[1, 2] = model.W_U[:, 20] * 10
    meaning = neuron_says(model, 1, 2, k=3)
    expected = (centred(model.weights.E[1, 2]) @ model.W_U).topk(3)
    assert [token for token, _ in meaning.promotes] == [str(i) for i in expected.indices.tolist()]
    assert meaning.excited_by[0][0] == "9"
    assert meaning.suppresses[0][1] == pytest.approx(float((centred(model.weights.E[1, 2]) @ model.W_U).min().detach()))

    found = attribute_state(model, tokens, 0, at=0)  # after one token every row is that token's stream times x
    fired = int(found.state[0, 1].norm(dim=-1).argmax())
    row = row_says(model, found, 1, fired, k=4)
    token, similarity = row.resembles[0]
    assert token == str(int(tokens[0, 0])) and similarity == pytest.approx(1, abs=1e-9)
    assert row.promotes == says(model, found.state[0, 1, fired], 4)
    gates = centred(found.state[0, 1, fired]) / (found.state[0, 1, fired].var(correction=0) + 1e-5).sqrt()
    assert row.opens[0][1] == pytest.approx(float((gates @ model.weights.D_y[1]).max().detach()))


def test_mistakes_are_named(model: BDH, tokens: Tensor) -> None:
    found = attribute_state(model, tokens, 2, at=AT)
    with pytest.raises(ValueError, match="Give row"):
        who_wrote(found, 0)
    with pytest.raises(ValueError, match=r"row is 6; expected 0\.\.5"):
        who_wrote(found, 0, row=6)
    with pytest.raises(ValueError, match="expected a number or a vector of shape"):
        who_wrote(found, 0, column=torch.zeros(4))
    with pytest.raises(ValueError, match="sequence is 2"):
        who_wrote(found, 0, row=1, sequence=2)
    with pytest.raises(ValueError, match=r"Sources: \['embedding', 0, 1\]"):
        found.part(2)
    with pytest.raises(ValueError, match=r"at is 9; this sequence has positions 0\.\.8"):
        attribute_state(model, tokens, 1, at=9)
    silent = attribute_state(model, tokens, 0, at=0)
    quiet = int((silent.state[0, 0].norm(dim=-1) == 0).nonzero()[0])
    with pytest.raises(ValueError, match="is zero"):
        row_says(model, silent, 0, quiet)


def test_reports() -> None:
    found = attribute_state(models.build("bdh"), "two & two", 2)
    assert "reconstruction error" in repr(found) and "<td>embedding</td>" in found._repr_html_()
    assert "share" in repr(found.explained())
    authors = who_wrote(found, 0, row=3)
    assert "row 3 of head 0, layer 2" in repr(authors) and "&amp;" in authors._repr_html_()
