"""Networks that take several tensors: from ``qat.save`` with an example to outputs in onnxruntime and ExecuTorch."""

import logging
import re

import pytest
import torch
from onnx_models import clients
from torch import nn

import qat
from qat.convert import main as convert
from qat.errors import ArtifactError
from qat.formats import native, onnx, onnx_parts
from qat.formats.onnx_trace import LogitsOnly
from qat.inputs import random_input

PER_TENSOR = qat.QuantSpec(bits=8, granularity="tensor")


class Siamese(nn.Module):
    """Two images through one network; its inputs have the names of nodes that torch makes, and its head no bias."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(16, 5, bias=False)

    def forward(self, conv2d, relu):
        left, right = (torch.relu(self.conv(x)).mean((2, 3)) for x in (conv2d, relu))
        return self.head(torch.cat([left, right], 1))


class Contrast(Siamese):
    """Compares each image of a batch with all of another: what one row gives depends on the others."""

    def forward(self, left, right):
        left, right = (torch.relu(self.conv(x)).mean((2, 3)) for x in (left, right))
        made = self.head(torch.cat([left, right], 1))
        return made @ made.flip(1).T


class Reader(nn.Module):
    """An image and a text of any length with its mask; a second text; and an input that is not looked at."""

    def __init__(self):
        super().__init__()
        self.conv, self.embed = nn.Conv2d(3, 8, 3), nn.Embedding(20, 8)
        self.query, self.head = nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, embedding, image, mask=None, unused=None, title=None):
        words = self.query(self.embed(embedding)) * mask[..., None]
        seen = torch.relu(self.conv(image)).mean((2, 3))
        return {"text": self.head(words.mean(1) + seen), "title": self.head(self.embed(title).mean(1))}


class Table(nn.Module):
    """Five columns of categories, and numbers: the second axis of whole numbers is no length."""

    def __init__(self):
        super().__init__()
        self.embed, self.wide, self.head = nn.Embedding(20, 4), nn.Linear(20, 8), nn.Linear(8 + 3, 5)

    def forward(self, categories, numbers):
        return self.head(torch.cat([torch.relu(self.wide(self.embed(categories).flatten(1))), numbers], 1))


class Added(nn.Module):
    """The size of one input decides the other's."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, x, y):
        return self.head(x + y)


class Moves(nn.Module):
    """What may not be chosen is minus infinity."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 5)

    def forward(self, x, legal):
        return self.head(x).masked_fill(~legal, float("-inf"))


class Span(nn.Module):
    """Where something starts and how long it is: together no more than 9."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 5)

    def forward(self, start, length):
        return self.head(self.embed(start + length))


def images(batch=4):
    return torch.rand(batch, 3, 8, 8) * 2 - 1


def text(length=6, batch=4):
    return torch.randint(0, 20, (batch, length))


def reading():
    named = {"image": images(), "embedding": text(), "mask": torch.rand(4, 6) < 0.8, "title": text(9)}
    return {**named, "unused": torch.rand(4)}


CASES = {"siamese": (Siamese, lambda: (images(), images())), "reader": (Reader, reading)}
CASES["contrast"] = Contrast, CASES["siamese"][1]
CASES["table"] = Table, lambda: (text(5), torch.rand(4, 3))


def run(network, inputs):
    return network(**inputs) if isinstance(inputs, dict) else network(*inputs)


def shipped(case, folder, embedding=True):
    """Prepare, train a step, save and load; return the loaded network and its artifact."""
    build, inputs = CASES[case]
    torch.manual_seed(0)
    rules = [{"match": "head", "activation": None}]
    rules += [{"match": "embed", "weight": {"bits": 8}}] if embedding and case in ("reader", "table") else []
    policy = qat.QuantPolicy(weight=qat.QuantSpec(bits=4), activation=PER_TENSOR, rules=rules)
    model = qat.prepare(build(), policy, verbose=False)
    qat.calibrate(model, [inputs()], forward=run)
    assert not qat.check(model, inputs(), run)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    made = run(model, inputs())
    sum(value.square().sum() for value in (made.values() if isinstance(made, dict) else [made])).backward()
    optimizer.step()
    qat.save(qat.freeze(model), folder, example=inputs())
    return qat.load(folder, model=build())


@pytest.mark.parametrize("case", CASES)
def test_what_is_loaded_is_what_was_saved(case, tmp_path):
    inputs, model = CASES[case][1](), shipped(case, tmp_path)
    again = qat.load(tmp_path, model=CASES[case][0]())
    first, second = run(model, inputs), run(again, inputs)
    assert str(first) == str(second)


def test_another_network_than_the_one_that_was_saved_is_refused(tmp_path):
    """Of both formats that trace one."""
    shipped("reader", tmp_path)
    made = random_input(native.read(tmp_path).example)
    with pytest.raises(
        ArtifactError, match=r"as image .*, and Siamese.forward\(conv2d, relu\): .* give the --model that"
    ):
        LogitsOnly(Siamese(), made)


@pytest.mark.clients
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("qdq", [False, True])
def test_from_saving_to_onnxruntime(case, qdq, tmp_path, capsys):
    clients()
    model = shipped(case, tmp_path / "artifact")
    words = [
        "--to",
        "onnx",
        "--out",
        str(tmp_path / "out"),
        "--verify",
        "--model",
        f"{__name__}:{CASES[case][0].__name__}",
    ]
    assert convert([str(tmp_path / "artifact"), *words, *(["--qdq"] if qdq else [])]) == 0
    said = capsys.readouterr().out
    named = {
        "siamese": "conv2d [batch, 3, 8, 8], relu [",
        "contrast": "left [batch, 3, 8, 8], right [",
        "reader": "image [batch, 3, 8, 8], embedding [batch, s",
        "table": "categories [batch, 5], numbers [batch, 3]",
    }
    assert f"it takes {named[case]}" in said and said.count("argmax equal") == (4 if case == "reader" else 2)

    session = onnx_parts.session(tmp_path / "out" / onnx.FILE)
    names = ["text", "output.title"] if case == "reader" else ["output"]  # there is an input called title
    assert [one.name for one in session.get_outputs()] == names
    example = native.read(tmp_path / "artifact").example
    assert onnx.read(tmp_path / "out").example == example
    for batch in (1, 7):  # free, as lengths are
        inputs = random_input(example, batch, seed=batch)
        if case == "reader":
            inputs |= {
                "embedding": text(3, batch),
                "mask": torch.ones(batch, 3, dtype=torch.bool),
                "title": text(2, batch),
            }
        expected = run(model, inputs)
        expected = list(expected.values()) if isinstance(expected, dict) else [expected]
        names = [one.name for one in session.get_inputs()]
        given = inputs if isinstance(inputs, dict) else dict(zip(names, inputs, strict=True))
        found = session.run(None, {name: value.numpy() for name, value in given.items()})
        for ours, theirs in zip(expected, found, strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=0, atol=1e-5 * ours.abs().max().item())


@pytest.mark.clients
@pytest.mark.parametrize(
    ("build", "example", "what"),
    [
        (Added, lambda: (torch.rand(4, 8), torch.rand(4, 9)), r"\[2, 9\], and the network takes y \[batch, 8\]"),
        (Table, lambda: (torch.rand(4, 5), torch.rand(4, 3)), "and the network does not run: RuntimeError: Expected"),
        (Siamese, lambda: (images(), images()[:, :2]), r"\[2, 2, 8, 8\], and the network does not run: RuntimeError"),
    ],
)
def test_an_example_that_the_network_does_not_run_on_is_named(build, example, what, tmp_path, capfd, monkeypatch):
    """In one line, where torch prints the traceback too."""
    clients()
    monkeypatch.setattr(logging, "raiseExceptions", False)  # of what other tests' clients log to, closed since
    model = qat.prepare(build(), qat.QuantPolicy(weight=qat.QuantSpec(bits=4)), verbose=False)
    qat.save(qat.freeze(model), tmp_path / "artifact", example=example())
    words = ["--to", "onnx", "--out", str(tmp_path / "out"), "--model", f"{__name__}:{build.__name__}"]
    capfd.readouterr()
    assert convert([str(tmp_path / "artifact"), *words]) == 1
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert re.search(f"error: inputs were recorded as .*{what}.*; save the model again with an example=", said), said


@pytest.mark.clients
@pytest.mark.parametrize("case", CASES)
def test_from_saving_to_executorch(case, tmp_path, capsys):
    pytest.importorskip("executorch")
    shipped(case, tmp_path / "artifact", embedding=False)
    words = ["--to", "executorch", "--verify", "--model", f"{__name__}:{CASES[case][0].__name__}"]
    assert convert([str(tmp_path / "artifact"), "--out", str(tmp_path / "out"), *words]) == 0
    named = {
        "siamese": "[3, 8, 8], [3, 8, 8]",
        "contrast": "[3, 8, 8], [3, 8, 8]",
        "reader": "image [3, 8, 8], embedding [6], mask [6], title [9], unused []",
        "table": "[5], [3]",
    }
    said = capsys.readouterr().out
    assert f"model.pte takes inputs of shapes {named[case]}" in said and "verified" in said


@pytest.mark.clients
@pytest.mark.parametrize("to", ["onnx", "executorch"])
def test_inputs_that_have_to_fit_each_other(to, tmp_path, capsys):
    """Random ones do not: the outputs are not compared, which is said."""
    clients() if to == "onnx" else pytest.importorskip("executorch")
    model = qat.prepare(Span(), qat.QuantPolicy(weight=qat.QuantSpec(bits=4)), verbose=False)
    start = torch.arange(10)
    qat.save(qat.freeze(model), tmp_path / "artifact", example=(start, 9 - start))
    words = ["--to", to, "--out", str(tmp_path / "out"), "--verify", "--model", f"{__name__}:Span"]
    assert convert([str(tmp_path / "artifact"), *words]) == 0
    said = capsys.readouterr().out
    assert "not compared: the network does not run on random inputs of that range: index out of range" in said


@pytest.mark.clients
@pytest.mark.parametrize("to", ["onnx", "executorch"])
def test_outputs_that_a_mask_makes_infinite(to, tmp_path, capsys):
    """They are equal to their like, in place of NaN away from it."""
    clients() if to == "onnx" else pytest.importorskip("executorch")
    model = qat.prepare(Moves(), qat.QuantPolicy(weight=qat.QuantSpec(bits=4)), verbose=False)
    qat.save(qat.freeze(model), tmp_path / "artifact", example=(torch.rand(4, 8), torch.rand(4, 5) < 0.5))
    words = ["--to", to, "--out", str(tmp_path / "out"), "--verify", "--model", f"{__name__}:Moves"]
    assert convert([str(tmp_path / "artifact"), *words]) == 0
    said = capsys.readouterr().out
    assert "verified" in said and "nan" not in said and "inf" not in said


@pytest.mark.clients
@pytest.mark.parametrize("to", ["onnx", "executorch"])
def test_a_language_model_with_a_mask(to, tmp_path, capsys):
    """Both inputs have any length; the head is quantized and has no bias, and its product is the graph's output."""
    pytest.importorskip("executorch" if to == "executorch" else "onnxruntime")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=40, max_position_embeddings=32, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    qat.prepare(model, qat.QuantPolicy(weight=qat.QuantSpec(bits=4, group_size=32)), verbose=False)
    example = {"input_ids": torch.randint(0, 40, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.int64)}
    qat.save(qat.freeze(model), tmp_path / "artifact", example=example)
    assert convert([str(tmp_path / "artifact"), "--to", to, "--out", str(tmp_path / "out"), "--verify"]) == 0
    said = capsys.readouterr().out
    assert "without a cache" in said and "verified" in said
    if to == "onnx":
        tokens = text(11, 2)
        mask = torch.ones_like(tokens)
        mask[0, :4] = 0
        session = onnx_parts.session(tmp_path / "out" / onnx.FILE)
        (found,) = session.run(["logits"], {"input_ids": tokens.numpy(), "attention_mask": mask.numpy()})
        with torch.no_grad():
            expected = model(input_ids=tokens, attention_mask=mask).logits
        torch.testing.assert_close(torch.from_numpy(found)[:, 4:], expected[:, 4:], rtol=0, atol=1e-5)
