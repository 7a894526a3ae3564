"""QuantSpec: the bounds of the grid, the fields that contradict each other, and round trips through plain values."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qat import QATError, QuantSpec
from qat.errors import SpecError, did_you_mean

# bits: (lowest signed, highest signed, highest unsigned), by hand
BOUNDS = {
    2: (-2, 1, 3),
    3: (-4, 3, 7),
    4: (-8, 7, 15),
    5: (-16, 15, 31),
    6: (-32, 31, 63),
    7: (-64, 63, 127),
    8: (-128, 127, 255),
}
specs = st.builds(
    QuantSpec,
    bits=st.integers(2, 8),
    group_size=st.one_of(st.none(), st.integers(1, 256)),
    signed=st.sampled_from([None, True, False]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["bfloat16", "float16", "float32"]),
)


@pytest.mark.parametrize("bits", BOUNDS)
def test_bounds(bits):
    low, high, unsigned_high = BOUNDS[bits]
    for signed in (True, None):  # an undetected activation counts as signed
        spec = QuantSpec(bits=bits, signed=signed)
        assert (-spec.q_n, spec.q_p) == (low, high)
    unsigned = QuantSpec(bits=bits, signed=False)
    assert (unsigned.q_n, unsigned.q_p) == (0, unsigned_high)


def test_defaults_are_the_documented_ones():
    spec = QuantSpec()
    assert (spec.bits, spec.granularity, spec.group_size) == (4, "channel", None)
    assert spec.symmetric and spec.scale_dtype == "bfloat16"
    assert QuantSpec(group_size=128).granularity == "group"
    assert QuantSpec(granularity="tensor").granularity == "tensor"


@pytest.mark.parametrize("bits", [1, 9, 0, -4, 4.0, "4", True, None])
def test_bits_out_of_range(bits):
    with pytest.raises(SpecError, match="from 2 to 8"):
        QuantSpec(bits=bits)


@pytest.mark.parametrize("size", [0, -32, 32.0, "32", True])
def test_group_size_must_be_a_positive_whole_number(size):
    with pytest.raises(SpecError, match="positive group_size"):
        QuantSpec(group_size=size)


def test_group_without_a_size():
    with pytest.raises(SpecError, match="positive group_size"):
        QuantSpec(granularity="group")


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_group_size_contradicts_granularity(granularity):
    with pytest.raises(SpecError, match=f"group_size=32 contradicts granularity='{granularity}'"):
        QuantSpec(granularity=granularity, group_size=32)


def test_unknown_words_get_a_suggestion():
    with pytest.raises(SpecError, match=r"granularity='chanel'.*did you mean 'channel'"):
        QuantSpec(granularity="chanel")
    with pytest.raises(SpecError, match=r"scale_dtype='bfloat'.*did you mean 'bfloat16'"):
        QuantSpec(scale_dtype="bfloat")
    with pytest.raises(SpecError, match=r"unknown key 'groupsize'.*did you mean 'group_size'"):
        QuantSpec.from_dict({"groupsize": 32})
    with pytest.raises(SpecError, match=r"unknown key 'bit'.*did you mean 'bits'"):
        QuantSpec().override({"bit": 3})


def test_errors_are_ours_and_value_errors():
    with pytest.raises(QATError) as caught:
        QuantSpec(bits=1)
    assert isinstance(caught.value, ValueError)


@given(specs)
def test_round_trip_through_json(spec):
    assert QuantSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_override_keeps_the_other_fields():
    spec = QuantSpec(bits=3, group_size=64, scale_dtype="float16").override({"bits": 8})
    assert spec == QuantSpec(bits=8, group_size=64, scale_dtype="float16")


def test_override_lets_granularity_and_group_size_follow_each_other():
    grouped, channel = QuantSpec(group_size=64), QuantSpec()
    assert grouped.override({"granularity": "channel"}) == channel
    assert grouped.override({"granularity": "tensor"}) == QuantSpec(granularity="tensor")
    assert grouped.override({"group_size": None}) == channel
    assert grouped.override({"granularity": "group"}) == grouped
    assert channel.override({"group_size": 64}) == grouped
    with pytest.raises(SpecError, match="positive group_size"):
        channel.override({"granularity": "group"})


def test_override_does_not_change_the_original():
    spec = QuantSpec(group_size=64)
    spec.override({"bits": 2, "group_size": 32})
    assert spec == QuantSpec(group_size=64)


def test_text():
    assert str(QuantSpec(bits=4, group_size=128)) == "int4 g128"
    assert str(QuantSpec(bits=8, signed=False, granularity="tensor")) == "uint8 tensor"
    assert str(QuantSpec(symmetric=False)) == "int4 channel asymmetric"


def test_did_you_mean():
    assert did_you_mean("conv1", ["conv2", "head"]) == " (did you mean 'conv2'?)"
    assert did_you_mean("zzz", ["a", "b"]) == " (known: 'a', 'b')"
    assert did_you_mean("zzz", map(str, range(32))).endswith("'28', '29' and 2 more)")
    assert did_you_mean("zzz", []) == ""


def test_configs_are_checked_without_torch():
    code = "import sys, qat; qat.QuantPolicy(weight=qat.QuantSpec(group_size=32)); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
