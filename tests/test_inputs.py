"""What a network is called with: one tensor, a tuple or a dict of them; and examples of these in files."""

import json

import pytest
import torch

import qat
from qat.errors import ArtifactError, StateError
from qat.formats import native
from qat.inputs import by_name, call, example_like, from_names, misfit, random_input, tensors

IMAGE, TOKENS, TIME = torch.rand(4, 3, 8, 8) - 1, torch.randint(2, 9, (4, 12)), torch.tensor([1.0, 5.0, 2.0, 3.0])
MASK = torch.tensor([[True, False], [True, True]] * 2)
EACH = [IMAGE, (IMAGE, TIME), {"image": IMAGE, "input_ids": TOKENS, "mask": MASK}, (IMAGE,)]


@pytest.mark.parametrize("inputs", EACH)
def test_what_is_made_looks_like_what_was_given(inputs):
    example = json.loads(json.dumps(example_like(inputs)))
    made = random_input(example, batch=100)
    assert type(made) is type(inputs) and (not isinstance(inputs, dict) or list(made) == list(inputs))
    for given, found in zip(tensors(inputs), tensors(made), strict=True):
        assert found.dtype == given.dtype and found.shape == (100, *given.shape[1:])
        assert given.min() <= found.min() < found.max() <= given.max()
    assert all(map(torch.equal, tensors(made), tensors(random_input(example, batch=100))))
    assert not torch.equal(tensors(random_input(example, seed=1))[0], tensors(random_input(example))[0])


def test_what_older_files_hold_is_made_as_before():
    """Of one tensor: its example has no name, and its values are those of one generator."""
    example = {"shape": [2, 3], "dtype": "float32", "low": -1, "high": 3}
    expected = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(7)) * 4 - 1
    assert torch.equal(random_input(example, 5, seed=7), expected)
    expected = torch.randint(2, 9, (5, 4), generator=torch.Generator().manual_seed(7))
    assert torch.equal(random_input({"shape": [4], "dtype": "int64", "low": 2, "high": 8}, 5, seed=7), expected)


def test_a_mask_of_ones_stays_one():
    made = random_input(example_like({"x": TOKENS, "mask": torch.ones(4, 12, dtype=torch.bool)}))
    assert made["mask"].dtype == torch.bool and made["mask"].all()


def test_two_inputs_of_one_kind_differ():
    first, second = random_input(example_like((IMAGE, IMAGE)))
    assert not torch.equal(first, second)


def test_a_network_takes_them_by_position_or_by_name():
    def network(a, b=None, c=None):
        return a, b, c

    assert call(network, IMAGE)[0] is IMAGE
    assert call(network, (IMAGE, TIME))[:2] == (IMAGE, TIME) and call(network, [IMAGE, TIME])[:2] == (IMAGE, TIME)
    assert call(network, {"c": TIME, "a": IMAGE}) == (IMAGE, None, TIME)


@pytest.mark.parametrize("inputs", [*EACH, tuple(torch.tensor([number]) for number in range(12))])
def test_names_in_a_file_give_the_same_inputs_back(inputs):
    found = by_name(inputs, "input")
    back = from_names(dict(sorted(found.items())), "input")
    assert type(back) is type(inputs) and len(found) == len(tensors(inputs))
    back = back if not isinstance(inputs, dict) else {name: back[name] for name in inputs}
    assert all(map(torch.equal, tensors(back), tensors(inputs)))


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        ("text", "a str"),
        ([IMAGE, IMAGE], "a list"),
        (torch.tensor(1.0), r"\[\]"),
        (TIME, r"\[4\]"),
        (torch.zeros(0, 3), r"\[0, 3\]"),
        ((), "empty"),
        ({}, "empty"),
        ((IMAGE, None), r"\[4, 3, 8, 8\], a NoneType"),
        ((IMAGE, (IMAGE, TIME)), r"\[4, 3, 8, 8\], a tuple"),
        ({"image": IMAGE, "patches": torch.rand(64, 8)}, r"image \[4, 3, 8, 8\], patches \[64, 8\]"),
        ({"image": IMAGE, 3: TIME}, "a dict of 'image', 3"),
        ({"an image": IMAGE}, "a dict of 'an image'"),
        ({"x": IMAGE, "mask": None}, r"x \[4, 3, 8, 8\], mask a NoneType"),
        ((IMAGE, IMAGE.cfloat()), r"\[4, 3, 8, 8\], \[4, 3, 8, 8\] torch.complex64"),
        (IMAGE.to_sparse(), r"\[4, 3, 8, 8\] torch.sparse_coo"),
        (IMAGE.to("meta"), r"\[4, 3, 8, 8\] on the meta device"),
        (torch.nested.nested_tensor([IMAGE[0], IMAGE[1]]), "a nested tensor"),
    ],
)
def test_what_is_no_batch_is_refused(inputs, what, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    model = qat.freeze(qat.prepare(model, qat.QuantPolicy(weight=qat.QuantSpec(bits=4)), verbose=False))
    assert misfit(inputs) is not None
    with pytest.raises(StateError, match=f"example={what}: give a batch of inputs, a tensor such as") as caught:
        qat.save(model, tmp_path / "out", example=inputs)
    assert ("leave out what is None" in str(caught.value)) == ("NoneType" in what)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn, torch.int8, torch.uint16])
def test_what_has_another_dtype_looks_like_the_nearest(dtype):
    made = random_input(example_like((IMAGE, torch.tensor([[1.0], [3.0]] * 2).to(dtype))), batch=50)[1]
    assert made.dtype == (torch.float32 if dtype.is_floating_point else torch.int64)
    assert made.shape == (50, 1) and made.min() >= 1 and made.max() <= 3


def test_a_mask_of_infinities_has_a_finite_range():
    mask = torch.tensor([[0.0, -torch.inf], [-2.0, torch.nan]])
    assert example_like(mask) == {"shape": [2], "dtype": "float32", "low": -2.0, "high": 0.0}
    assert random_input(example_like(mask)).isfinite().all()
    assert not random_input(example_like(torch.full((2, 3), -torch.inf))).any()


def test_the_largest_integer_is_no_end_that_overflows():
    assert random_input(example_like(torch.tensor([[5], [2**63 - 1]]))).min() >= 5
    assert random_input(example_like(torch.full((2, 3), 2**63 - 1))).min() >= 2**63 - 2


class Masked(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 4)

    def forward(self, x, mask=None, *, scale):
        return self.layer(x)


class Anything(Masked):
    def forward(self, *inputs, **named):
        return self.layer(inputs[0] if inputs else named["x"])


X = torch.rand(4, 8)


def frozen(build):
    return qat.freeze(qat.prepare(build(), qat.QuantPolicy(weight=qat.QuantSpec(bits=4)), verbose=False))


@pytest.mark.parametrize(
    ("inputs", "what"),
    [
        (X, "missing a required .*argument: 'scale'"),
        ((X, X, X), "too many positional arguments"),
        ({"x": X, "scale": X, "text": X}, "got an unexpected keyword argument 'text'"),
        ({"self": X, "x": X, "scale": X}, "got an unexpected keyword argument 'self'"),
    ],
)
def test_what_the_forward_does_not_take_is_refused(inputs, what, tmp_path):
    said = r"\[4, 8\].*: Masked.forward\(x, mask=None, \*, scale\): " + what + "; give its arguments in their order"
    with pytest.raises(StateError, match=said):
        qat.save(frozen(Masked), tmp_path / "out", example=inputs)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("build", "inputs"),
    [(Masked, {"scale": X, "x": X}), (Anything, X), (Anything, (X, X)), (Anything, {"x": X, "class": X})],
)
def test_what_the_forward_takes_is_kept(build, inputs, tmp_path):
    qat.save(frozen(build), tmp_path / "out", example=inputs)
    assert native.read(tmp_path / "out").example == example_like(inputs)


def test_a_hook_may_make_the_arguments(tmp_path):
    model = frozen(Masked)
    model.register_forward_pre_hook(lambda module, given, named: (given, {"scale": X}), with_kwargs=True)
    qat.save(model, tmp_path / "out", example=X)


ONE = {"shape": [3, 8], "dtype": "float32", "low": -1.0, "high": 1.0}


@pytest.mark.parametrize(
    ("example", "what"),
    [
        ([ONE], "where shape, dtype, low and high are"),
        ({"shape": [3]}, "where shape, dtype, low and high are"),
        ({"inputs": []}, r"\[\], where a list of inputs is"),
        ({"inputs": "x"}, "'x', where a list of inputs is"),
        ({"inputs": [ONE, 3]}, "of the input 1, 3, where shape"),
        ({"inputs": {"an image": ONE}}, "an input is called 'an image', which no argument is"),
        ({"inputs": {"x": ONE | {"dtype": "float31"}}}, r"of the input 'x', a dtype 'float31' \(known: float32, int64"),
        (ONE | {"dtype": ["float32"]}, "a dtype "),
        (ONE | {"shape": [3, -8]}, r"a shape of \[3, -8\]"),
        (ONE | {"shape": [3, 8.0]}, r"a shape of \[3, 8.0\]"),
        (ONE | {"shape": 3}, "a shape of 3"),
        (ONE | {"shape": [2**20, 2**20]}, "more than 2,147,483,648 numbers a row"),
        (ONE | {"low": 2}, "a range from 2 to 1.0 of float32"),
        (ONE | {"high": float("nan")}, "a range from -1.0 to nan"),
        (ONE | {"high": "1"}, "a range from -1.0 to '1'"),
        (ONE | {"dtype": "uint8"}, "a range from -1.0 to 1.0 of uint8"),
        (ONE | {"dtype": "bool", "low": 0, "high": 2}, "a range from 0 to 2 of bool"),
    ],
)
def test_an_example_that_was_changed_by_hand_is_refused(example, what):
    with pytest.raises(ArtifactError, match=f"what inputs look like is damaged: .*{what}.*; convert the checkpoint"):
        random_input(example)
