"""What a network is called with: one tensor, a tuple or a dict of them; and examples of these in files."""

import json

import pytest
import torch

import qat
from qat.errors import StateError
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
    ],
)
def test_what_is_no_batch_is_refused(inputs, what, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    model = qat.freeze(qat.prepare(model, qat.QuantPolicy(weight=qat.QuantSpec(bits=4)), verbose=False))
    assert misfit(inputs) is not None
    with pytest.raises(StateError, match=f"example={what}: give a batch of inputs, a tensor such as"):
        qat.save(model, tmp_path / "out", example=inputs)
    assert not (tmp_path / "out").exists()
