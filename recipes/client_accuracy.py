"""Accuracy of an exported vision model, measured by the runtime that it was exported for, on the CPU.

    python recipes/client_accuracy.py CLIENT FOLDER data=cifar10 data.train=FILE data.test=FILE

CLIENT is one of the names in CLIENTS; FOLDER is what ``python -m qat.convert`` wrote for it; the data is given as to
``python -m qat.evaluate``. The last line printed is JSON: accuracy, cross-entropy, images, and milliseconds an image.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from hydra import compose, initialize_config_module
from torch import Tensor, nn

import qat
from qat.broken_pipe import ends_quietly
from qat.training.evaluation import evaluate
from qat.training.instantiation import make

Outputs = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> logits (B, classes)


def qat_load(folder: Path) -> Outputs:
    """Our own runtime."""
    return qat.load(folder).float()


def onnxruntime(folder: Path) -> Outputs:
    """Of an ONNX file."""
    import onnxruntime

    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"input": images.numpy()})[0])


def openvino(folder: Path) -> Outputs:
    """Of an ONNX file; without the hint ACCURACY it would round the inputs of 4-bit products to int8."""
    import openvino

    hints = {"EXECUTION_MODE_HINT": "ACCURACY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(folder / "model.onnx", "CPU", hints)
    return lambda images: torch.from_numpy(compiled([images.numpy()])[0].copy())


def executorch(folder: Path) -> Outputs:
    """Of a program, which takes one image at a time."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(folder / "model.pte").load_method("forward")
    return lambda images: torch.cat([method.execute([image])[0].clone() for image in images.split(1)])


CLIENTS = {client.__name__: client for client in (qat_load, onnxruntime, openvino, executorch)}


class Client(nn.Module):
    """A runtime in the place of a model, with a watch."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.outputs, self.images, self.seconds = outputs, 0, 0.0

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits."""
        start = time.perf_counter()
        logits = self.outputs(images.contiguous())
        self.seconds, self.images = self.seconds + time.perf_counter() - start, self.images + len(images)
        return logits


@ends_quietly()
def main() -> None:
    """Measure, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("client", choices=CLIENTS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("overrides", nargs="+", metavar="data=NAME")
    arguments = parser.parse_args()
    with initialize_config_module("qat.conf", version_base="1.3"):
        config = compose("evaluate", overrides=arguments.overrides)
    client = Client(CLIENTS[arguments.client](arguments.folder))
    metrics = evaluate(client, make(config.data))
    print(json.dumps({**metrics, "images": client.images, "milliseconds": 1000 * client.seconds / client.images}))


if __name__ == "__main__":
    main()
