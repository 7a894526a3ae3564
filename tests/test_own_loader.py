"""The loader of a user's own data from a position on: the same batches as without a stop."""

import random

import numpy
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

from qat.errors import DataError
from qat.training.own_loader import OwnLoader, checked_loader

NUMBERS = TensorDataset(torch.arange(10))


class Stateful:
    """Knows its own position, as torchdata's loader does."""

    def __init__(self):
        self.at = 0

    def __len__(self):
        return 5

    def __iter__(self):
        while self.at < 5:
            self.at += 1
            yield [torch.tensor([self.at])]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class ByNumpy(torch.utils.data.Sampler):
    def __len__(self):
        return 10

    def __iter__(self):
        order = numpy.random.permutation(10).tolist()
        random.shuffle(order)
        return iter(order)


def generator():
    return torch.Generator().manual_seed(5)


LOADERS = {
    "shuffled": lambda: DataLoader(NUMBERS, 2, shuffle=True),
    "by a generator": lambda: DataLoader(NUMBERS, 2, shuffle=True, generator=generator()),
    "by a sampler's generator": lambda: DataLoader(NUMBERS, 2, sampler=RandomSampler(NUMBERS, generator=generator())),
    "by numpy and random": lambda: DataLoader(NUMBERS, 2, sampler=ByNumpy()),
    "in order": lambda: DataLoader(NUMBERS, 2),
    "stateful": Stateful,
}


def epoch(loader, number):
    loader.set_epoch(number)
    return [batch[0].tolist() for batch in loader]


def seed(value):
    random.seed(value)
    numpy.random.seed(value)
    torch.manual_seed(value)


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS.keys())
@pytest.mark.parametrize("stop", [(0, 2), (1, 3), (1, 5)], ids=str)
def test_it_goes_on_where_it_was(make, stop):
    last, handed_out = stop
    seed(0)
    loader = OwnLoader(make())
    whole = [epoch(loader, number) for number in range(last)]
    loader.set_epoch(last)
    batches = iter(loader)
    whole.append([next(batches)[0].tolist() for _ in range(handed_out)])
    state = loader.state_dict()
    whole[last] += [batch[0].tolist() for batch in batches]
    after = torch.get_rng_state(), numpy.random.get_state(), random.getstate()
    whole.append(epoch(loader, last + 1))

    seed(1)  # another process, whose own random numbers stay as they are
    resumed, here = OwnLoader(make()), torch.get_rng_state()
    resumed.load_state_dict(state)
    resumed.set_epoch(last)
    assert [batch[0].tolist() for batch in resumed] == whole[last][handed_out:]
    assert torch.equal(torch.get_rng_state(), here) and random.random() == random.Random(1).random()
    torch.set_rng_state(after[0])  # as a run restores them
    numpy.random.set_state(after[1])
    random.setstate(after[2])
    assert epoch(resumed, last + 1) == whole[last + 1]


def test_an_epoch_that_was_not_begun_starts_with_the_loaders_own_numbers():
    loader = OwnLoader(LOADERS["by a generator"]())
    epochs = [epoch(loader, 0), epoch(loader, 1)]
    state = loader.state_dict()
    resumed = OwnLoader(LOADERS["by a generator"]())
    resumed.load_state_dict(state)
    assert epoch(resumed, 2) == epoch(loader, 2) and epochs[0] != epochs[1]


def test_the_state_is_plain_values(tmp_path):
    loader = OwnLoader(LOADERS["shuffled"]())
    next(iter(loader))
    torch.save(loader.state_dict(), tmp_path / "state")
    assert torch.load(tmp_path / "state", weights_only=True)["batches"] == 1


def test_a_position_in_other_data_is_left_alone():
    loader = OwnLoader(LOADERS["in order"]())
    loader.load_state_dict({"epoch": 0, "batches": 3})
    assert len(epoch(loader, 0)) == 5


def test_what_is_asked_of_the_loader_is_answered_by_it():
    loader = OwnLoader(DataLoader(NUMBERS, 2))
    assert loader.dataset is NUMBERS and loader.batch_size == 2 and len(loader) == 5
    assert not hasattr(loader, "state_of_matter")


@pytest.mark.parametrize(
    ("loader", "said"),
    [
        (None, "here gives None: give a loader"),
        ([DataLoader(NUMBERS)], "here gives a list: give one loader"),
        ({"a": DataLoader(NUMBERS)}, "here gives a dict: give one loader"),
        (DataLoader(NUMBERS, 20, drop_last=True), "here has no batch"),
    ],
    ids=["none", "list", "dict", "empty"],
)
def test_what_gives_no_batches_is_refused(loader, said):
    with pytest.raises(DataError, match=said):
        checked_loader(loader, "here")
