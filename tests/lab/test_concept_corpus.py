"""The `concepts` corpus: labels point at what they say, splits keep apart what they promise, and the text never changes."""

import hashlib
import itertools
import re
from collections import Counter

import pytest

from models.registry import list_models
from workbench.lab.concept_corpus import SPLITS, LabelledSentence, concept_text, concept_words, documents, sentences
from workbench.lab.concept_templates import TEMPLATES
from workbench.lab.concept_words import CONCEPTS, DECOYS, LANGUAGES, WORDS, ConceptWord
from workbench.lab.corpora import load_corpus

SAMPLE = 4000


@pytest.fixture(scope="module")
def drawn() -> dict[str, list[LabelledSentence]]:
    return {split: list(itertools.islice(sentences(split), SAMPLE)) for split in SPLITS}


def spellings(word: ConceptWord, language: str) -> set[str]:
    """Every form in which the word may stand, in lower case."""
    cells = [word.facts[key] for key in (language, f"{language}_plural") if key in word.facts]
    return {form.lower() for cell in cells for form in cell.split("/")}


def all_spellings(language: str) -> set[str]:
    return {form for words in WORDS.values() for word in words for form in spellings(word, language)}


# ---------------------------------------------------------------------------------------------------- size and labels


def test_the_vocabulary_is_as_large_as_promised() -> None:
    assert len(CONCEPTS) >= 8
    for concept in CONCEPTS:
        assert len(concept_words(concept)) >= 15 and len(concept_words(concept, "words")) >= 3, concept
        for language in LANGUAGES:  # a word is one word, and no two of a concept are spelled alike
            assert len({word.facts[language] for word in WORDS[concept]}) == len(WORDS[concept])
    for language in LANGUAGES:
        of_language = [template for template in TEMPLATES if template.language == language]
        assert (
            len([t for t in of_language if not t.held_out]) >= 40 and len([t for t in of_language if t.held_out]) >= 10
        )
        assert {t.concept for t in of_language if t.held_out} == {None, *CONCEPTS}
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES)
    assert len({re.sub(r"\W", "", template.text) for template in TEMPLATES}) == len(TEMPLATES)


@pytest.mark.parametrize("split", SPLITS)
def test_labels_point_at_the_words(drawn: dict[str, list[LabelledSentence]], split: str) -> None:
    """Bytes start:stop of the text are a form of the labelled word, in the labelled language; answers are not empty."""
    known = {(concept, word.key): word for concept, words in WORDS.items() for word in words}
    for sentence in drawn[split]:
        data = sentence.text.encode()
        for occurrence in sentence.occurrences:
            text = data[occurrence.start : occurrence.stop].decode().lower()
            assert text in spellings(known[occurrence.concept, occurrence.key], occurrence.language), sentence
        for decoy in sentence.decoys:
            assert data[decoy.start : decoy.stop].decode().lower() == decoy.key
        if sentence.answer is not None:
            assert data[slice(*sentence.answer)].decode().strip(), sentence
        assert not re.search(r"[{}\[\]|*@]", sentence.text) and "  " not in sentence.text
        assert sentence.text[0] == sentence.text[0].upper()


@pytest.mark.parametrize("split", SPLITS)
def test_no_word_of_a_concept_goes_unlabelled(drawn: dict[str, list[LabelledSentence]], split: str) -> None:
    """Whatever reads as a concept's word in the sentence's language is labelled: contrast sentences are clean."""
    vocabulary = {language: all_spellings(language) for language in LANGUAGES}
    for sentence in drawn[split]:
        labelled = {byte for part in (*sentence.occurrences, *sentence.decoys) for byte in range(part.start, part.stop)}
        for match in re.finditer(r"\w+", sentence.text):
            if match[0].lower() in vocabulary[sentence.language]:
                assert len(sentence.text[: match.start()].encode()) in labelled, (match[0], sentence)


def test_every_template_and_every_word_occurs(drawn: dict[str, list[LabelledSentence]]) -> None:
    seen = {sentence.template for split in ("train", "templates") for sentence in drawn[split]}
    assert seen == {template.name for template in TEMPLATES}
    for split in ("train", "words"):
        used = {(part.concept, part.key) for sentence in drawn[split] for part in sentence.occurrences}
        wanted = {(word.concept, word.key) for concept in CONCEPTS for word in concept_words(concept, split)}
        assert wanted <= used
    shares = Counter((sentence.language, concept) for sentence in drawn["train"] for concept in sentence.concepts)
    assert all(shares[language, concept] > SAMPLE / 60 for language in LANGUAGES for concept in CONCEPTS)


def test_decoys_share_letters_with_what_they_imitate_and_are_no_words_of_it() -> None:
    for language in LANGUAGES:
        vocabulary = all_spellings(language)
        for decoy in DECOYS[language]:
            assert decoy.text not in vocabulary
            near = {form for word in WORDS[decoy.imitates] for form in spellings(word, language)}
            pieces = {form[start : start + 3] for form in near for start in range(len(form) - 2)}
            assert any(piece in decoy.text for piece in pieces), decoy
            assert language == "en" or decoy.gender in ("m", "f"), decoy


# ----------------------------------------------------------------------------------------------------------- grammar


def test_some_sentences_by_hand(drawn: dict[str, list[LabelledSentence]]) -> None:
    """Articles, contractions, elisions and agreement in places where they differ."""
    text = (
        " ".join(sentence.text for split in SPLITS for sentence in drawn[split]) + load_corpus("concepts", "all").text
    )
    for correct in (
        "La capitale du Japon est Tokyo.", "La capitale de l'Italie est Rome.", "La capitale de la Suède est Stockholm.",
        "Le mot anglais pour chat est « cat ».", "En anglais, l'orgue se dit « the organ ».", "In French, bread is called « le pain ».",
        "The capital of Japan is Tokyo.", "an elephant", "an actor", "a cook", "les chevaux", "l'éléphant", "du fromage", "de l'ail",
        "de la moutarde", "à l'épaule", "au genou", "à la jambe", "in Poland", "en Pologne", "au Japon",
        "une robe verte", "un chapeau vert",
    ):  # fmt: skip
        assert correct.lower() in text.lower(), correct
    wrong_english = (r"\ba [aio]", r"\ban [^aeiou]", r"\bthe the\b", r"\b[Tt]he (France|Japan|Italy)\b")
    wrong_french = (
        r"\bde les?\b", r"\bà le\b", r"\bde du\b", r"\bau (la|le)\b", r"\b[dlDL]e [aiouéèœ]", r"\b[Ll]a [aeiouéèœ]",
        r"\b[Uu]ne (chat|pain|chapeau)\b", r"\b[Uu]n (vache|jambe|robe)\b", r"\b[dlDL]'[^aeiouéèœAEIOUÉh]",
    )  # fmt: skip
    for sentence in itertools.chain.from_iterable(drawn.values()):
        for wrong in wrong_english if sentence.language == "en" else wrong_french:
            if sentence.family != "translation":
                assert not re.search(wrong, sentence.text), (wrong, sentence.text)


def test_answers_follow_from_the_word(drawn: dict[str, list[LabelledSentence]]) -> None:
    """The answer to a capital is the capital of the country in the same sentence, and so on for every fact."""
    facts = {
        "capital": "capital", "language": "language", "habitat": "home", "workplace": "workplace", "likeness": "like",
        "use": "use", "season": "season", "material": "material", "section": "section",
    }  # fmt: skip
    checked = Counter()
    for sentence in drawn["train"] + drawn["words"]:
        if sentence.family not in facts or sentence.answer is None:
            continue
        subject = next(part for part in sentence.occurrences if part.concept == sentence_concept(sentence))
        word = next(word for word in WORDS[subject.concept] if word.key == subject.key)
        answer = sentence.text.encode()[slice(*sentence.answer)].decode()
        assert answer == word.facts[f"{sentence.language}_{facts[sentence.family]}"]
        checked[sentence.family] += 1
    assert set(checked) == set(facts) and min(checked.values()) > 20


def sentence_concept(sentence: LabelledSentence) -> str:
    concept = next(template.concept for template in TEMPLATES if template.name == sentence.template)
    assert concept is not None
    return concept


# ------------------------------------------------------------------------------------------------------------ splits


def test_splits_never_share_a_sentence() -> None:
    """Compared as texts, and in longer samples: what one split says no other split says."""
    texts = {split: {s.text for s in itertools.islice(sentences(split, seed=7), 3 * SAMPLE)} for split in SPLITS}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not texts[one] & texts[other], (one, other)
        assert len(texts[one]) > 500


def test_held_out_words_are_in_no_training_text() -> None:
    """Neither as a word of its own language nor of the other one, whatever the case, in the whole training corpus."""
    used = set(re.findall(r"[^\W\d_]+", load_corpus("concepts").text.lower()))
    for concept in CONCEPTS:
        for word in concept_words(concept, "words"):
            for language in LANGUAGES:
                assert not spellings(word, language) & used, word.key
        assert all(spellings(word, "en") & used for word in concept_words(concept))


def test_held_out_templates_and_combinations_are_in_no_training_sentence() -> None:
    held_out = {template.name for template in TEMPLATES if template.held_out}
    pairs: dict[str, set[tuple[str, str]]] = {}
    for split in SPLITS:
        pairs[split] = set()
        for sentence in itertools.islice(sentences(split, seed=1), SAMPLE):
            assert (sentence.template in held_out) == (split == "templates")
            parts = sentence.occurrences + sentence.decoys
            if len({part.key for part in parts}) == 1:
                pairs[split].add((sentence.template, parts[0].key))
    assert not pairs["train"] & pairs["combinations"] and pairs["combinations"]


# ----------------------------------------------------------------------------------------- documents, text, arguments


def test_paragraphs_stay_with_their_topic() -> None:
    repeated = 0
    for document in itertools.islice(documents(seed=2), 1500):
        assert len({sentence.language for sentence in document.sentences}) == 1 and 1 <= len(document.sentences) <= 4
        data = document.text.encode()
        words = []
        for start, sentence in zip(document.starts, document.sentences, strict=True):
            assert data[start : start + len(sentence.text.encode())].decode() == sentence.text
            assert document.topic in sentence.concepts or sentence.family == "decoy"
            words += [part.key for part in sentence.occurrences[:1] if part.concept == document.topic]
        repeated += len(set(words)) < len(words)
    assert 0.25 < repeated / 1500 < 0.75


def test_the_text_is_the_same_everywhere() -> None:
    """Bit for bit, whatever the Python version: trained models refer to this hash."""
    digest = hashlib.sha256(concept_text("train", 100_000).encode()).hexdigest()
    assert digest == "3cb274fa1bf3b43f3af2b842d29e54b64bdba40ece5baa92d030cb8581ac27f1"
    assert concept_text("train", 100_000).startswith(concept_text("train", 20_000))
    assert concept_text("train", 20_000, seed=1) != concept_text("train", 20_000)
    shipped = [record.card for record in list_models() if record.name == "bdh-concepts"]
    for card in shipped:
        for part in card["data"]["corpora"]:  # type: ignore[index]
            assert load_corpus("concepts", part["split"]).sha256 == part["sha256"]


def test_the_choice_can_be_narrowed() -> None:
    for sentence in itertools.islice(sentences("words", language="fr", concept="animal", family="habitat"), 50):
        assert sentence.language == "fr" and sentence.family == "habitat" and "animal" in sentence.concepts
    again = [list(itertools.islice(sentences(seed=4, concept="food"), 20)) for _ in range(2)]
    assert again[0] == again[1]


def test_choices_that_do_not_exist() -> None:
    """Refused at the call, not at the first sentence."""
    with pytest.raises(ValueError, match=r"unknown concept 'currencies'.*Did you mean 'currency'"):
        sentences(concept="currencies")
    with pytest.raises(ValueError, match=r"unknown language 'english': expected one of en, fr"):
        documents(language="english")
    with pytest.raises(ValueError, match=r"unknown split 'word'.*Did you mean 'words'"):
        concept_text("word", 10)
    with pytest.raises(ValueError, match=r"unknown family 'capitol'.*Did you mean 'capital'"):
        sentences(family="capitol")
    with pytest.raises(ValueError, match="No sentence of split 'words' is of family 'decoy'"):
        sentences("words", family="decoy")
    with pytest.raises(ValueError, match="seed is -1"):
        sentences(seed=-1)
