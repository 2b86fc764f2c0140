"""WikiText: its articles, and its peculiar spelling turned into text that reads like English."""

import re
from collections.abc import Sequence
from itertools import cycle

# Words that cannot be what a dropped modifier modified: if one follows `<unk>`, the unknown word was the noun or the
# verb itself.
_FUNCTION_WORDS = frozenset(
    """a about after against all also although among an and any are as at be because been before being between both
    but by can could did do does down during each for from had has have he her here him his how i if in into is it its
    just may might more most must nor not of off on only onto or other our out over shall she should since so some
    such than that the their them then there these they this those through to under until up us was we were what when
    where which while who whom whose why will with within without would yet you""".split()  # noqa: SIM905
)
# Words after which an unknown word can only begin or continue a noun phrase.
_BEFORE_A_MODIFIER = frozenset(
    """a an and any as at by for from her his in into its many of on or other our several some such that the their
    these this those to under various with""".split()  # noqa: SIM905
)
_NO_SPACE_BEFORE = frozenset([",", ".", ";", ":", "!", "?", "%", ")", "]", "°", "...", "’", "”", "″", "′"])
_NO_SPACE_AFTER = frozenset(["(", "[", "$", "£", "¥", "€", "#", "“", "‘"])
_CONTRACTED = re.compile(r"'(s|t|ve|re|m|ll|d|S|T)$")


def wikitext_articles(text: str) -> list[str]:
    """The articles of a WikiText file, each beginning with its ` = Title = ` line."""
    starts = [match.start() for match in re.finditer(r"^ = [^=\n].* = $", text, re.MULTILINE)]
    return [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]


def detokenise_wikitext(text: str) -> str:
    """WikiText made to read like English. Light and lossy: the raw text is the corpus `wikitext2`.

    Words split at ` @-@ `, ` @.@ `, ` @,@ ` are joined again; punctuation, brackets, contractions and straight quotes
    lose the spaces that WikiText puts around them; ` = Title = ` becomes the bare title on a line of its own. The
    unknown word `<unk>` goes, by three rules: a parenthesis that holds one is deleted; one that plainly modifies the
    next word ("the <unk> lobster") is deleted alone; any other sentence or title that holds one is deleted whole.
    """
    paragraphs = []
    for line in text.split("\n"):
        line = line.strip()
        title = re.fullmatch(r"((?:= )+)(.*?)((?: =)+)", line)
        if title:
            if "<unk>" not in title[2]:
                paragraphs.append((True, _joined_tokens(title[2].split())))
            continue
        # opening and closing quotes are told apart by counting, so it must happen before any sentence goes
        marks = cycle(("``", "''"))
        words = [next(marks) if word == '"' else word for word in line.split()]
        sentences = map(_without_unknown, re.split(r"(?<= [.!?]) (?!'' )|(?<= [.!?] '') (?=[A-Z`])", " ".join(words)))
        readable = _joined_tokens(" ".join(filter(None, sentences)).split())
        if readable:
            paragraphs.append((False, readable))
    # a title whose whole section went is a title of nothing
    kept = [
        content for index, (is_title, content) in enumerate(paragraphs)
        if not is_title or (index + 1 < len(paragraphs) and not paragraphs[index + 1][0])
    ]  # fmt: skip
    return "\n".join(kept)


def _without_unknown(sentence: str) -> str:
    """The sentence without its `<unk>` tokens, or an empty string if it cannot do without them."""
    sentence = re.sub(r" \( [^()]*<unk>[^()]* \)", "", sentence)
    if "<unk>" not in sentence:
        return sentence
    words = sentence.split()
    kept: list[str] = []
    for word, following in zip(words, [*words[1:], "."], strict=True):
        if word != "<unk>":
            kept.append(word)
            continue
        modifies = following.isalpha() and following.lower() not in _FUNCTION_WORDS and not following.endswith("ed")
        if not kept or kept[-1].lower() not in _BEFORE_A_MODIFIER or not modifies:
            return ""
        if kept[-1] in ("a", "an"):
            kept[-1] = "an" if following[0].lower() in "aeio" else "a"
    return " ".join(kept)


def _joined_tokens(words: Sequence[str]) -> str:
    """Tokens written as running text; `` and '' are an opening and a closing straight quote."""
    text, glue, apostrophe_open = "", True, False
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else ""
        glue_after = False
        if word in ("@-@", "@.@", "@,@", "/", "⁄", "‑"):
            word, glue, glue_after = word.strip("@"), True, True
        elif word == "–" and text[-1:].isdigit() and following[:1].isdigit():
            glue, glue_after = True, True
        elif word == "``":
            word, glue_after = '"', True
        elif word == "''":
            word, glue = '"', True
        elif word == "'":
            possessive = not apostrophe_open and text.endswith("s") and not glue
            decade = following[:1].isdigit()
            glue, glue_after = (
                glue or possessive or (apostrophe_open and not decade),
                not possessive and not apostrophe_open,
            )
            if not possessive and not decade:
                apostrophe_open = not apostrophe_open
        elif word in _NO_SPACE_BEFORE or _CONTRACTED.fullmatch(word):
            glue = True
        elif word in _NO_SPACE_AFTER:
            glue_after = True
        text += word if glue else " " + word
        glue = glue_after
    return text
