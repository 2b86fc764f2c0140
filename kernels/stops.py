"""Running in pieces: stop after chosen tokens, hand out the carried state, and go on with what comes back."""

from collections.abc import Callable, Sequence

from torch import Tensor

OnState = Callable[[int, Tensor], Tensor | None]


def run_in_pieces(
    run: Callable[[int, int, Tensor], tuple[Tensor, Tensor]],
    pos: int,
    stops: Sequence[int],
    state: Tensor,
    on_state: OnState | None,
    check: Callable[[str, object], None],
) -> tuple[list[Tensor], Tensor]:
    """Runs tokens 0 … pos - 1 in the pieces that end at the stops.

    run(start, stop, state) gives (output of tokens start … stop - 1, state after them). on_state(position, state) is
    called once that token is read and written; what it returns, unless None, is checked by check(name, state) and
    carried on instead, so an edit changes later tokens only. Returns (outputs of the pieces, state after all tokens).
    """
    outputs = []
    start = 0
    for end in [*stops, pos - 1]:
        if end < start:  # the last token is itself a stop
            break
        output, state = run(start, end + 1, state)
        outputs.append(output)
        if end in stops and on_state is not None:
            edited = on_state(end, state)
            if edited is not None:
                check(f"on_state at position {end}", edited)
                state = edited
        start = end + 1
    return outputs, state
