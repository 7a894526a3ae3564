"""How far outputs are from each other, where some are infinite."""

import math

import pytest
import torch

from qat.formats.outputs import difference, gap

INF, NAN = math.inf, math.nan


@pytest.mark.parametrize(
    ("found", "expected", "off", "largest"),
    [
        ([1.0, -4.0], [1.5, -3.0], 1.0, 3.0),
        ([1.0, -INF, INF], [1.25, -INF, INF], 0.25, 1.25),
        ([-INF], [-INF], 0.0, 0.0),
        ([2.0, 3.0], [2.0, -INF], INF, 2.0),
        ([2.0, INF], [2.0, -INF], INF, 2.0),
        ([INF, 3.0], [5.0, 3.0], INF, 5.0),
        ([], [], 0.0, 0.0),
    ],
)
def test_equal_infinities_do_not_differ_and_all_others_do(found, expected, off, largest):
    assert gap(torch.tensor(found), torch.tensor(expected)) == (off, largest)


@pytest.mark.parametrize(("found", "expected"), [(NAN, 1.0), (1.0, NAN), (NAN, NAN), (NAN, INF)])
def test_what_is_no_number_equals_nothing(found, expected):
    assert math.isnan(gap(torch.tensor([0.0, found]), torch.tensor([0.0, expected]))[0])
    assert difference(torch.tensor([found]), torch.tensor([expected])).isnan().all()
