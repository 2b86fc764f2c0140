"""What comparisons with other libraries share: each holds the tolerance that docs/attention-parity.md says of it."""

from collections.abc import Callable

import pytest
from torch import Tensor

from tests.models import attention_table
from tests.models.attention_sites import largest

Agrees = Callable[[Tensor, Tensor], None]


@pytest.fixture
def agrees(request: pytest.FixtureRequest) -> Agrees:
    """agrees(ours, theirs): of one shape, not zero, and as close, relative to the largest entry above 1, as the table says."""
    tolerance = attention_table.tolerance(request.node.originalname)

    def check(ours: Tensor, theirs: Tensor) -> None:
        assert ours.shape == theirs.shape
        assert largest(theirs) > 1e-3, "not a comparison of zeros"
        assert largest(ours - theirs) <= tolerance * max(1.0, largest(theirs))

    return check
