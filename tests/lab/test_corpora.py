"""Corpora and stimuli. What needs the data folder is skipped, with the reason, where there is none."""

import hashlib
import http.server
import threading
from functools import partial
from pathlib import Path

import pytest

from workbench.lab import corpora
from workbench.lab.corpora import MissingData, UnknownCorpus, find_data, list_corpora, load_corpus, pydoc_documents
from workbench.lab.stimuli import (
    blimp_paradigms,
    load_blimp,
    load_noun_lists,
    load_prompt_pairs,
    load_syntaxgym,
    load_treebank,
    read_conllu,
)
from workbench.lab.wikitext import detokenise_wikitext, wikitext_articles

try:
    find_data("wikitext2/test.txt")
    find_data("en_ewt-ud-test.conllu")
    MISSING = ""
except MissingData as error:
    MISSING = str(error)
needs_data = pytest.mark.skipif(bool(MISSING), reason=MISSING or "data present")


def long_lines(text: str) -> set[str]:
    return {line.strip() for line in text.splitlines() if len(line.strip()) >= 40}


# ----------------------------------------------------------------------------------------------------------------------
# Splits


@pytest.mark.parametrize(
    "name",
    [
        "pydoc",
        "concepts",
        *(pytest.param(name, marks=needs_data) for name in ("english", "wikitext2", "tinyshakespeare", "ewt")),
    ],
)
def test_the_splits_make_up_the_corpus_and_share_no_text(name: str) -> None:
    train, validation, both = (load_corpus(name, split) for split in ("train", "validation", "all"))
    assert both.data == train.data + validation.data
    assert train.sha256 == hashlib.sha256(train.data).hexdigest()
    assert 0.02 < len(validation) / len(both) < 0.55
    assert train.licence and train.source and train.description
    shared = long_lines(train.text) & long_lines(validation.text)
    # a few stock lines recur in any text; a leak would be hundreds
    assert sum(map(len, shared)) < 0.01 * len(validation.text), sorted(shared)[:5]


def test_pydoc_keeps_every_paragraph_once() -> None:
    from pydoc_data.topics import topics

    def paragraphs(texts: list[str]) -> list[str]:
        return [
            " ".join(part.split())
            for text in texts
            for part in text.replace("\n \n", "\n\n").split("\n\n")
            if part.strip()
        ]

    kept, original = paragraphs(pydoc_documents()), paragraphs(list(topics.values()))
    assert len(kept) == len(set(kept)) < len(original)
    assert set(kept) == set(original)


@needs_data
def test_wikitext2_is_the_two_files_cut_before_an_article() -> None:
    whole = find_data("wikitext2/valid.txt").read_bytes() + find_data("wikitext2/test.txt").read_bytes()
    assert load_corpus("wikitext2", "all").data == whole
    held_out = load_corpus("wikitext2", "validation").text
    assert held_out.startswith(" = ") and len(held_out) < 0.11 * find_data("wikitext2/test.txt").stat().st_size


@needs_data
def test_ewt_is_the_raw_text_of_the_treebank() -> None:
    text = " ".join(load_corpus("ewt", "validation").text.split())
    sentences = load_treebank("test")
    position = 0
    for sentence in sentences:  # every sentence, in order
        position = text.index(" ".join(sentence.text.split()), position)
    assert len(text) == pytest.approx(sum(len(" ".join(s.text.split())) + 1 for s in sentences), abs=1)


@needs_data
def test_english_is_made_of_the_three_corpora_and_reads_like_english() -> None:
    for split, other in (("train", "train"), ("validation", "validation")):
        english = load_corpus("english", split).text
        for artefact in ("<unk>", "@-@", "@,@", "@.@", " = = "):
            assert artefact not in english
        lines = long_lines(english)
        pydoc, ewt = (long_lines(load_corpus(name, other).text) for name in ("pydoc", "ewt"))
        readable = long_lines(detokenise_wikitext(load_corpus("wikitext2", other).text))
        assert lines <= pydoc | ewt | readable
        assert pydoc <= lines and readable <= lines
        assert split == "validation" or ewt <= lines
    # all three sources in every fifth of the training text
    english = load_corpus("english").text
    ewt, pydoc = (long_lines(load_corpus(name).text) for name in ("ewt", "pydoc"))
    for part in range(5):
        lines = long_lines(english[part * len(english) // 5 : (part + 1) * len(english) // 5])
        assert lines & ewt and lines & pydoc and lines - ewt - pydoc


# ----------------------------------------------------------------------------------------------------------------------
# Finding data


def test_a_file_is_a_corpus_cut_at_a_paragraph(tmp_path: Path) -> None:
    paragraphs = [f"Paragraph {number} of mine.\nIt has two lines: é." for number in range(50)]
    file = tmp_path / "mine.txt"
    file.write_bytes("\n\n".join(paragraphs).encode())
    train, validation = load_corpus(file), load_corpus(str(file), "validation")
    assert train.data + validation.data == file.read_bytes()
    assert validation.text.startswith("Paragraph") and 0.05 < len(validation) / len(file.read_bytes()) <= 0.1
    assert train.name == train.source == "mine.txt"


def test_an_address_is_a_corpus(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("A line of text.\n" * 40)

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    handler = partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/mine.txt"
        corpus = load_corpus(address, "all")
        with pytest.raises(MissingData, match="Download the file yourself"):
            load_corpus(address + ".missing")
        server.shutdown()
    assert corpus.data == b"A line of text.\n" * 40 and corpus.source == address


def test_the_data_folder_is_found_in_the_stated_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, environment, shared = tmp_path / "given", tmp_path / "environment", tmp_path / "shared" / "data"
    for folder in (given, environment, shared):
        (folder / "tinyshakespeare").mkdir(parents=True)
        (folder / "tinyshakespeare" / "input.txt").write_text(f"{folder.name} line\n" * 30)
    monkeypatch.setattr(corpora, "_REPOSITORY", tmp_path / "repository")
    monkeypatch.delenv("WORKBENCH_DATA", raising=False)
    assert load_corpus("tinyshakespeare").text.startswith("data ")
    monkeypatch.setenv("WORKBENCH_DATA", str(environment))
    assert load_corpus("tinyshakespeare").text.startswith("environment ")
    assert load_corpus("tinyshakespeare", folder=given).text.startswith("given ")


def test_missing_data_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_REPOSITORY", tmp_path / "repository")
    monkeypatch.setenv("WORKBENCH_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(MissingData) as caught:
        load_corpus("wikitext2")
    message = str(caught.value)
    assert "'wikitext2/valid.txt' not found" in message and str(tmp_path / "nowhere") in message
    assert "which does not exist" in message and "WORKBENCH_DATA" in message and "../shared/data" in message
    records = {record.name: record for record in list_corpora()}
    assert set(records) == {"english", "pydoc", "wikitext2", "tinyshakespeare", "ewt", "concepts"}
    assert records["pydoc"].available and not records["pydoc"].reason
    assert not records["english"].available and "WORKBENCH_DATA" in records["english"].reason
    with pytest.raises(MissingData, match="blimp"):
        load_blimp("wh_island")


def test_wrong_names_get_the_nearest_right_one(tmp_path: Path) -> None:
    with pytest.raises(UnknownCorpus, match="Did you mean 'wikitext2'"):
        load_corpus("wikitext")
    with pytest.raises(ValueError, match="Did you mean 'validation'"):
        load_corpus("pydoc", "validate")
    with pytest.raises(UnknownCorpus, match="is a folder"):
        load_corpus(tmp_path)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9\n" * 20)
    with pytest.raises(ValueError, match="not UTF-8 text: byte 3"):
        load_corpus(tmp_path / "latin1.txt")
    (tmp_path / "line.txt").write_text("one line only")
    with pytest.raises(ValueError, match="no line break in its last 10%"):
        load_corpus(tmp_path / "line.txt")


# ----------------------------------------------------------------------------------------------------------------------
# WikiText


@pytest.mark.parametrize(
    ("raw", "readable"),
    [
        (" It weighs 0 @.@ 5 kg , or 1 @,@ 000 well @-@ known g . ", "It weighs 0.5 kg, or 1,000 well-known g."),
        (
            ' He said , " It is Tom \'s ( not mine ) . " Then he left . ',
            'He said, "It is Tom\'s (not mine)." Then he left.',
        ),
        (" They don 't know ; we 're sure : yes ! ", "They don't know; we're sure: yes!"),
        (" From 5 – 6 of the James ' houses . ", "From 5–6 of the James' houses."),
        (" The <unk> lobster is an <unk> crab of a <unk> island . ", "The lobster is a crab of an island."),
        (" One ( <unk> ) is known . The <unk> is not . Two are . ", "One is known. Two are."),
        (' He sang " <unk> " . He said " no " . ', 'He said "no".'),
        (
            ' She said , " I left . The <unk> . I am here . " Then , " no " . ',
            'She said, "I left. I am here." Then, "no".',
        ),
        (" = <unk> = \n \n = = Life = = \n Text . \n = = Death = = \n <unk> . \n", "Life\nText."),
    ],
)
def test_wikitext_becomes_readable(raw: str, readable: str) -> None:
    assert detokenise_wikitext(raw) == readable


def test_articles_begin_at_their_titles() -> None:
    text = " \n = One = \n \n Text = 1 \n = = Part = = \n = Two = \n More \n"
    assert wikitext_articles(text) == [" = One = \n \n Text = 1 \n = = Part = = \n", " = Two = \n More \n"]


# ----------------------------------------------------------------------------------------------------------------------
# Stimuli

CONLLU = """# newdoc id = d1
# sent_id = s1
# text = I don't wanna go.
1\tI\tI\tPRON\tPRP\t_\t4\tnsubj\t_\t_
2-3\tdon't\t_\t_\t_\t_\t_\t_\t_\t_
2\tdo\tdo\tAUX\tVBP\t_\t4\taux\t_\t_
3\tn't\tnot\tPART\tRB\t_\t4\tadvmod\t_\t_
4-5\twanna\t_\t_\t_\t_\t_\t_\t_\t_
4\twant\twant\tVERB\tVB\t_\t0\troot\t_\t_
5\tto\tto\tPART\tTO\t_\t6\tmark\t_\t_
6\tgo\tgo\tVERB\tVB\t_\t4\txcomp\t_\t_
6.1\tgone\tgo\tVERB\tVB\t_\t_\t_\t_\t_
7\t.\t.\tPUNCT\t.\t_\t4\tpunct\t_\t_
"""


def test_conllu_is_read_word_by_word() -> None:
    (sentence,) = read_conllu(CONLLU)
    assert (sentence.id, sentence.document) == ("s1", "d1")
    assert sentence.words == ("I", "do", "n't", "want", "to", "go", ".")
    assert sentence.heads == (3, 3, 3, -1, 5, 3, 3)
    shown = [sentence.text[start:end] for start, end in sentence.spans]
    assert shown == ["I", "do", "n't", "wanna", "wanna", "go", "."]
    with pytest.raises(ValueError, match="line 4 is no CoNLL-U"):
        read_conllu(CONLLU.replace("1\tI\tI", "1 I I"))


@needs_data
@pytest.mark.parametrize(("split", "count"), [("dev", 2001), ("test", 2077)])
def test_every_treebank_sentence_is_a_tree_over_its_words(split: str, count: int) -> None:
    sentences = load_treebank(split)
    assert len(sentences) == count
    for sentence in sentences:
        assert sentence.heads.count(-1) == 1 == sentence.relations.count("root")
        for word, (start, end) in zip(sentence.words, sentence.spans, strict=True):
            assert sentence.text[start:end] == word
        for index in range(len(sentence.words)):  # every word reaches the root
            steps = 0
            while index != -1:
                index, steps = sentence.heads[index], steps + 1
                assert steps <= len(sentence.words)


@needs_data
def test_minimal_pairs_share_their_prefix() -> None:
    assert len(blimp_paradigms()) == 10
    for paradigm in blimp_paradigms():
        pairs = load_blimp(paradigm)
        assert len(pairs) == 1000 and {pair.paradigm for pair in pairs} == {paradigm}
        assert all(pair.good != pair.bad for pair in pairs)
        assert all(pair.good.startswith(pair.prefix) and pair.bad.startswith(pair.prefix) for pair in pairs)
    with pytest.raises(ValueError, match="Did you mean 'wh_island'"):
        load_blimp("wh_islands")


@needs_data
def test_prompt_pairs_and_their_answers() -> None:
    import csv

    with open(find_data("pairs/ioi_llama.csv"), encoding="utf-8", newline="") as lines:
        token_ids = [(row["correct_idx"], row["incorrect_idx"]) for row in csv.DictReader(lines)]
    pairs = load_prompt_pairs("ioi")
    assert len(pairs) == len(token_ids) == 499
    id_of: dict[str, set[str]] = {}
    for pair, (right, wrong) in zip(pairs, token_ids, strict=True):
        assert pair.clean.count(pair.answer.strip()) == 1 and pair.corrupted.count(pair.answer.strip()) == 1
        id_of.setdefault(pair.answer, set()).add(right)
        id_of.setdefault(pair.wrong or "", set()).add(wrong)
    assert all(len(ids) == 1 for ids in id_of.values())  # the names read from the prompts are those of the token ids
    years = load_prompt_pairs("greater_than")
    assert len(years) == 1000
    for pair in years:
        assert f"{pair.clean[-2:]}{pair.answer} to the year" in pair.clean and pair.corrupted.count("01 to") == 1
    with pytest.raises(ValueError, match="expected one of ioi, greater_than"):
        load_prompt_pairs("gender")


@needs_data
@pytest.mark.parametrize(("suite", "count"), [("npz_ambig", 24), ("npz_obj", 24), ("mvrr", 28)])
def test_garden_path_items_have_regions_where_they_say(suite: str, count: int) -> None:
    items = load_syntaxgym(suite)
    assert len(items) == count
    for item in items:
        assert len(item.conditions) == 4
        for condition, regions in item.conditions.items():
            assert f"%{condition}%" in item.prediction
            sentence = item.sentence(condition)
            assert "  " not in sentence and " ," not in sentence and len(regions) == len(item.region_names) == 6
            assert tuple(sentence[start:end] for start, end in item.spans(condition)) == regions
    with pytest.raises(ValueError, match="has no condition 'ambig'"):
        items[0].sentence("ambig")


@needs_data
def test_noun_lists() -> None:
    for kind in ("random", "categorized"):
        for size in (3, 5, 7, 10):
            lists = load_noun_lists(kind, size)
            assert len(lists) == 230 and {len(nouns) for nouns in lists} == {size}
    with pytest.raises(ValueError, match="expected 3, 5, 7 or 10"):
        load_noun_lists("random", 4)
