"""The layout in which the int4 kernels read a weight: packed and back, its tiles by hand, and its padding."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int4_problems import DEVICE, make_weight
from qat.kernels.int4_layout import prepack, words_to_packed

from qat.packing import pack, unpack


@settings(max_examples=20)
@given(
    n=st.integers(1, 70),
    groups=st.integers(1, 3),
    group=st.sampled_from([32, 96, 128, 1, 7, 101]),
    zero_dtype=st.sampled_from([None, torch.int8, torch.float32]),
)
def test_the_layout_is_undone_exactly(n, groups, group, zero_dtype):
    k = group * groups if group % 32 == 0 else group
    _, packed, scale = make_weight(n, k, group)
    zero_point = None if zero_dtype is None else torch.randint(-8, 8, scale.shape, device=DEVICE).to(zero_dtype)
    again = prepack(packed, scale, zero_point, k, group).checkpoint()
    for one, other in zip(again, (packed, scale, zero_point), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


def test_the_layout_by_hand():
    # One code of 7 (u = 15) among zeros (u = 8): input 16 j + 8 kh + 2 c + e of output 8 rh + g.
    for j, kh, c, e, rh, g in [(0, 0, 0, 0, 0, 0), (3, 1, 2, 1, 1, 5), (2, 0, 3, 1, 0, 7), (1, 1, 0, 0, 1, 3)]:
        codes = torch.zeros(16, 64, dtype=torch.int8)
        codes[8 * rh + g, 16 * j + 8 * kh + 2 * c + e] = 7
        words = prepack(pack(codes, 4), torch.ones(16, 1), None, 64, 64).words.view(torch.uint32)[0, 0].tolist()
        changed = {index: word for index, word in enumerate(words) if word != 0x88888888}
        assert changed == {(4 * g + c) * 4 + 2 * kh + rh: 0x88888888 + (7 << (4 * j + 16 * e))}


def test_padding_stands_for_weight_zero():
    packed = pack(torch.full((2, 3), 5, dtype=torch.int8), 4)
    for zero_point, codes in ((None, [[0], [0]]), (torch.tensor([[-8], [3]], dtype=torch.int8), [[-8], [3]])):
        words = prepack(packed, torch.ones(2, 1), zero_point, 3, 3).words
        padding = unpack(words_to_packed(words, 2, 64), 4, 64)[:, 3:]
        assert torch.equal(padding, torch.tensor(codes, dtype=torch.int8).expand(2, 61))
