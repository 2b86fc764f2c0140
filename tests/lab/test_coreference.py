"""Entity marks of the GUM corpus: mentions at known places, nested, in pieces, over sentences."""

from __future__ import annotations

import pytest

from workbench.lab.coreference import Mention, load_coreference, read_coreference

ROWS = """# newdoc id = one
# sent_id = one-1
# text = The old dog slept.
1\tThe\tthe\tDET\tDT\t_\t3\tdet\t_\tEntity=(7-animal-new-cf1-1-coref
2\told\told\tADJ\tJJ\t_\t3\tamod\t_\t_
3\tdog\tdog\tNOUN\tNN\t_\t4\tnsubj\t_\tEntity=7)
4\tslept\tsleep\tVERB\tVBD\t_\t0\troot\t_\tSpaceAfter=No
5\t.\t.\tPUNCT\t.\t_\t4\tpunct\t_\t_

# sent_id = one-2
# text = Its owner saw it and Rex.
1\tIts\tit\tPRON\tPRP$\t_\t2\tnmod:poss\t_\tDiscourse=x|Entity=(8-person-new-cf2-2-coref(7-animal-giv:act-cf1-1-ana)
2\towner\towner\tNOUN\tNN\t_\t3\tnsubj\t_\tEntity=8)
3\tsaw\tsee\tVERB\tVBD\t_\t0\troot\t_\t_
4\tit\tit\tPRON\tPRP\t_\t3\tobj\t_\tEntity=(7-animal-giv:act-cf1-1-ana)
5\tand\tand\tCCONJ\tCC\t_\t6\tcc\t_\tEntity=(9[1/2]-thing-new-cf3-1-sgl)
6\tRex\tRex\tPROPN\tNNP\t_\t4\tconj\t_\tEntity=(7-animal-giv-cf1-1-coref)|SpaceAfter=No
7\t.\t.\tPUNCT\t.\t_\t3\tpunct\t_\t_

# newdoc id = two
# sent_id = two-1
# text = Nobody came.
1\tNobody\tnobody\tPRON\tNN\t_\t2\tnsubj\t_\tEntity=(7-person-new-cf1-1-sgl)
2\tcame\tcome\tVERB\tVBD\t_\t0\troot\t_\tSpaceAfter=No
3\t.\t.\tPUNCT\t.\t_\t2\tpunct\t_\t_

"""


def test_mentions_are_where_they_are_marked() -> None:
    first, second = read_coreference(ROWS)
    assert "".join(first.words) == "The old dog slept. Its owner saw it and Rex." and first.document == "one"
    assert first.mentions == (
        Mention(0, 3, 2, "7", "nominal"),
        Mention(5, 6, 5, "7", "pronoun"),
        Mention(5, 7, 6, "8", "nominal"),
        Mention(8, 9, 8, "7", "pronoun"),
        Mention(10, 11, 10, "7", "proper"),
    ), "the mention in pieces is left out"
    assert second.mentions == (Mention(0, 1, 0, "7", "pronoun"),), "documents are not joined"


def test_passages_keep_to_their_size() -> None:
    assert [len(passage.words) for passage in read_coreference(ROWS, max_words=6)] == [5, 7, 3]


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="marks no entity"):
        read_coreference(ROWS.replace("Entity=", "Other="))
    with pytest.raises(ValueError, match="entity '8' ends but never began"):
        read_coreference(ROWS.replace("(8-person-new-cf2-2-coref", ""))
    with pytest.raises(ValueError, match=r"unknown split 'tset'.*Did you mean 'test'"):
        load_coreference("tset")
