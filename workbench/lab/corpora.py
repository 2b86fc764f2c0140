"""Text corpora by name, with a held-out split that never overlaps the training split.

`load_corpus("english")` gives the training text of the shipped models, `load_corpus("english", "validation")` its
held-out text. Every corpus knows the sha256 of its exact bytes, its licence and its source. The project ships no
data: `pydoc` comes with every Python installation, `concepts` is generated, the other named corpora are found by `find_data` (set
`WORKBENCH_DATA` to the folder that holds them), and any UTF-8 text file can be given by its path or its http(s)
address.
"""

import hashlib
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from workbench.instrument.errors import suggestion
from workbench.lab.concept_corpus import concept_text
from workbench.lab.wikitext import detokenise_wikitext, wikitext_articles

SPLITS = ("train", "validation", "all")
_REPOSITORY = Path(__file__).resolve().parents[2]
_HELD_OUT = 0.1  # share of the bytes that is held out where a corpus has no split of its own
_DOWNLOAD_LIMIT = 1 << 28  # bytes


class MissingData(FileNotFoundError):
    """A data file that is on none of the places where data is looked for."""


class UnknownCorpus(ValueError):
    """A name that is neither a corpus nor a file."""


@dataclass(frozen=True, repr=False)
class Corpus:
    """One split of a corpus, as the exact bytes that training or evaluation reads."""

    name: str
    split: str
    data: bytes
    licence: str
    source: str
    description: str

    @property
    def text(self) -> str:
        return self.data.decode("utf-8")

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"Corpus({self.name!r}, {self.split!r}, {len(self.data):,} bytes, sha256 {self.sha256[:12]}…)"


@dataclass(frozen=True)
class CorpusRecord:
    """One line of `list_corpora()`. `reason` says why the corpus cannot be read here; it is empty if it can."""

    name: str
    description: str
    licence: str
    source: str
    available: bool
    reason: str


# ----------------------------------------------------------------------------------------------------------------------
# Where data is


def data_folders(folder: str | Path | None = None) -> list[tuple[str, Path]]:
    """The places where data is looked for, first one first, each with the name that error messages use for it.

    `folder` if given, then `$WORKBENCH_DATA` if set, then `../shared/data` beside the repository.
    """
    places = []
    if folder is not None:
        places.append(("the folder given", Path(folder)))
    if os.environ.get("WORKBENCH_DATA"):
        places.append(("$WORKBENCH_DATA", Path(os.environ["WORKBENCH_DATA"])))
    places.append(("../shared/data beside the repository", _REPOSITORY.parent / "shared" / "data"))
    return places


def find_data(relative: str, folder: str | Path | None = None) -> Path:
    """The first existing file or folder called `relative` in `data_folders(folder)`.

    Raises MissingData, naming every place looked at and how to add one.
    """
    places = data_folders(folder)
    for _, place in places:
        if (place / relative).exists():
            return place / relative
    looked = "; ".join(
        f"{label} ({place}{'' if place.is_dir() else ', which does not exist'})" for label, place in places
    )
    unset = "" if os.environ.get("WORKBENCH_DATA") else " (not set now)"
    raise MissingData(
        f"data file {relative!r} not found. Looked in: {looked}. "
        f"Set the environment variable WORKBENCH_DATA{unset} to the folder that holds {relative!r}."
    )


# ----------------------------------------------------------------------------------------------------------------------
# Loading


def load_corpus(name_or_path: str | Path, split: str = "train", folder: str | Path | None = None) -> Corpus:
    """One split of a corpus.

    Parameters
    ----------
    name_or_path
        A name of `list_corpora()`, the path of a UTF-8 text file, or the http(s) address of one.
    split
        `"train"`, `"validation"` or `"all"` (both, training text first). A file of yours is cut once, at the first
        paragraph break (or else line break) after nine tenths of its bytes.
    folder
        A data folder to look into before `$WORKBENCH_DATA` and `../shared/data`.

    Raises
    ------
    UnknownCorpus
        Neither a name nor a file; the message suggests the nearest name.
    MissingData
        A named corpus whose files are not here; the message says where they were looked for.
    ValueError
        An unknown split, text that is not UTF-8, or a file too short to be split.
    """
    if split not in SPLITS:
        raise ValueError(
            f"unknown split {split!r}: expected one of {', '.join(SPLITS)}.{suggestion(str(split), SPLITS)}"
        )
    name = str(name_or_path)
    if name in _BUILDERS:
        builder = _BUILDERS[name]
        for needed in builder.files:
            find_data(needed, folder)
        train, validation = _built(name, tuple(str(place) for _, place in data_folders(folder)))
        licence, source, description = builder.licence, builder.source, builder.description
    else:
        train, validation = _split_text(_read_any(name))
        licence, source, description = "as given by its owner", _shown_source(name), "text given by the user"
        name = Path(name).name
    text = {"train": train, "validation": validation, "all": train + validation}[split]
    return Corpus(name, split, text.encode("utf-8"), licence, source, description)


def list_corpora(folder: str | Path | None = None) -> list[CorpusRecord]:
    """Every named corpus, whether it can be read here, and why not if not."""
    records = []
    for name, builder in _BUILDERS.items():
        reason = ""
        try:
            for needed in builder.files:
                find_data(needed, folder)
        except MissingData as error:
            reason = str(error)
        records.append(CorpusRecord(name, builder.description, builder.licence, builder.source, not reason, reason))
    return records


def _read_any(address: str) -> str:
    """The text of a file or an http(s) address that is not a corpus name."""
    if re.match(r"https?://", address):
        try:
            with urlopen(address, timeout=60) as reply:
                data = reply.read(_DOWNLOAD_LIMIT + 1)
        except (URLError, OSError) as error:
            raise MissingData(
                f"could not read {address}: {error}. Download the file yourself and give its path."
            ) from error
        if len(data) > _DOWNLOAD_LIMIT:
            raise ValueError(
                f"{address} is larger than {_DOWNLOAD_LIMIT >> 20} MiB; download the file and give its path"
            )
    elif Path(address).is_file():
        data = Path(address).read_bytes()
    elif Path(address).is_dir():
        raise UnknownCorpus(
            f"{address} is a folder; a corpus is one UTF-8 text file, or one of: {', '.join(_BUILDERS)}"
        )
    else:
        raise UnknownCorpus(
            f"unknown corpus {address!r}: neither a name nor an existing file. "
            f"Names: {', '.join(_BUILDERS)}.{suggestion(address, _BUILDERS)}"
        )
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{address} is not UTF-8 text: byte {error.start} cannot be decoded") from None


def _shown_source(address: str) -> str:
    """An address as it is; of a path only the file name, since records travel to other machines."""
    return address if re.match(r"https?://", address) else Path(address).name


def _split_text(text: str, held_out: float = _HELD_OUT) -> tuple[str, str]:
    """Cut a text once, at the first paragraph break (or else line break) after the training share."""
    target = int(len(text) * (1 - held_out))
    for mark in ("\n\n", "\n"):
        cut = text.find(mark, target)
        if cut != -1 and text[cut:].strip():
            cut += len(mark)
            return text[:cut], text[cut:]
    raise ValueError(
        f"the text ({len(text)} characters) has no line break in its last {held_out:.0%}, so no held-out part can be cut"
    )


def _split_documents(documents: Sequence[str], held_out: float = _HELD_OUT) -> tuple[list[str], list[str]]:
    """Training documents and held-out documents: a prefix and the rest, cut where the prefix reaches its share."""
    target = sum(map(len, documents)) * (1 - held_out)
    size = 0
    for index, document in enumerate(documents):
        size += len(document)
        if size >= target:
            return list(documents[: index + 1]), list(documents[index + 1 :])
    raise ValueError("no documents to split")


def _joined(documents: Sequence[str]) -> str:
    return "".join(document.strip("\n") + "\n\n" for document in documents)


# ----------------------------------------------------------------------------------------------------------------------
# The named corpora


def pydoc_documents() -> list[str]:
    """The topics of Python's own help system, in order of their names, every paragraph once.

    A fifth of the text is repeated in other topics ("specialnames" holds most of "customization", for instance). A
    repeated paragraph is kept only where it comes first; otherwise a quarter of the held-out text would also be
    training text.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    documents = []
    for topic in sorted(topics):
        kept = []
        for paragraph in re.split(r"\n\s*\n", topics[topic].strip()):
            key = " ".join(paragraph.split())
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        if kept:
            documents.append("\n\n".join(kept))
    return documents


def ewt_documents(path: Path) -> list[str]:
    """The documents of a CoNLL-U treebank as running text: sentences joined by a space, paragraphs by a line break."""
    documents: list[list[list[str]]] = []
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("# newdoc"):
            documents.append([])
        elif line.startswith("# newpar") or (line.startswith("# text = ") and not documents[-1]):
            documents[-1].append([])
        if line.startswith("# text = "):
            documents[-1][-1].append(line.removeprefix("# text = "))
    return ["\n".join(" ".join(paragraph) for paragraph in paragraphs) for paragraphs in documents]


def _wikitext2(folders: tuple[str, ...]) -> tuple[str, str]:
    """valid.txt and the first articles of test.txt for training; the articles of its last tenth held out."""
    valid, test = (_read(f"wikitext2/{part}.txt", folders) for part in ("valid", "test"))
    _, held_out = _split_documents(wikitext_articles(test))
    cut = len(test) - sum(map(len, held_out))
    return valid + test[:cut], test[cut:]


def _tinyshakespeare(folders: tuple[str, ...]) -> tuple[str, str]:
    return _split_text(_read("tinyshakespeare/input.txt", folders))


def _pydoc(folders: tuple[str, ...]) -> tuple[str, str]:
    train, validation = _split_documents(pydoc_documents())
    return _joined(train), _joined(validation)


def _ewt(folders: tuple[str, ...]) -> tuple[str, str]:
    dev, test = (ewt_documents(_located(f"en_ewt-ud-{part}.conllu", folders)) for part in ("dev", "test"))
    return _joined(dev), _joined(test)


def _english(folders: tuple[str, ...]) -> tuple[str, str]:
    """Readable WikiText, the Web Treebank and pydoc, document by document, each source spread evenly over the whole.

    Held out are the articles, documents and topics that the three corpora hold out; of the treebank's test file only
    as many documents as make a tenth of its training part, so that the held-out mix resembles the training mix.
    """
    wiki_train, wiki_held_out = _wikitext2(folders)
    wiki = [
        list(filter(None, map(detokenise_wikitext, wikitext_articles(text)))) for text in (wiki_train, wiki_held_out)
    ]
    dev, test = (ewt_documents(_located(f"en_ewt-ud-{part}.conllu", folders)) for part in ("dev", "test"))
    size, ewt_held_out = 0, []
    for document in test:
        if size >= _HELD_OUT * sum(map(len, dev)):
            break
        ewt_held_out.append(document)
        size += len(document)
    pydoc_train, pydoc_held_out = _split_documents(pydoc_documents())
    train = _interleaved([wiki[0], dev, pydoc_train])
    validation = _interleaved([wiki[1], ewt_held_out, pydoc_held_out])
    return _joined(train), _joined(validation)


def _interleaved(sources: Sequence[Sequence[str]]) -> list[str]:
    """All documents of all sources, each source in its own order and spread evenly (by characters) over the whole."""
    placed = []
    for rank, documents in enumerate(sources):
        total, position = sum(map(len, documents)), 0
        for document in documents:
            placed.append(((position + len(document) / 2) / total, rank, document))
            position += len(document)
    return [document for _, _, document in sorted(placed, key=lambda item: item[:2])]


def _concepts(folders: tuple[str, ...]) -> tuple[str, str]:
    """Generated paragraphs, and paragraphs of the combinations of template and word that are never generated for training."""
    return concept_text("train", 4_000_000), concept_text("combinations", 200_000)


def _located(relative: str, folders: tuple[str, ...]) -> Path:
    return next(Path(folder) / relative for folder in folders if (Path(folder) / relative).exists())


def _read(relative: str, folders: tuple[str, ...]) -> str:
    # bytes first: read_text would turn any line ending into \n, and the sha256 is of the exact bytes
    return _located(relative, folders).read_bytes().decode("utf-8")


@dataclass(frozen=True)
class _Builder:
    build: Callable[[tuple[str, ...]], tuple[str, str]]  # data folders -> (train, validation)
    files: tuple[str, ...]
    licence: str
    source: str
    description: str


_WIKI_FILES = ("wikitext2/valid.txt", "wikitext2/test.txt")
_EWT_FILES = ("en_ewt-ud-dev.conllu", "en_ewt-ud-test.conllu")
_PYDOC_SOURCE = f"pydoc_data.topics of Python {platform.python_version()}"  # the text differs between Python versions

_BUILDERS = {
    "english": _Builder(
        _english, _WIKI_FILES + _EWT_FILES, "CC BY-SA 3.0 and 4.0, PSF",
        f"pytorch/examples (WikiText-2), UniversalDependencies/UD_English-EWT, {_PYDOC_SOURCE}",
        "the shipped models' training mix: readable WikiText-2, English Web Treebank, Python's help topics",
    ),
    "pydoc": _Builder(_pydoc, (), "PSF", _PYDOC_SOURCE, "Python's help topics, every paragraph once; always here"),
    "wikitext2": _Builder(
        _wikitext2, _WIKI_FILES, "CC BY-SA 3.0", "pytorch/examples",
        "Wikipedia articles as WikiText-2 spells them: valid.txt and test.txt, the last tenth of test.txt held out",
    ),
    "tinyshakespeare": _Builder(
        _tinyshakespeare, ("tinyshakespeare/input.txt",), "public-domain text", "karpathy/char-rnn",
        "Shakespeare's plays, 1.1 MB; the last tenth held out",
    ),
    "ewt": _Builder(
        _ewt, _EWT_FILES, "CC BY-SA 4.0", "UniversalDependencies/UD_English-EWT",
        "running text of the English Web Treebank: its dev documents, its test documents held out",
    ),
    "concepts": _Builder(
        _concepts, (), "MIT", "generated by workbench.lab.concept_corpus",
        "English and French sentences about labelled concepts, 4 MB; unseen combinations of template and word held out",
    ),
}  # fmt: skip


@lru_cache(maxsize=8)
def _built(name: str, folders: tuple[str, ...]) -> tuple[str, str]:
    return _BUILDERS[name].build(folders)
