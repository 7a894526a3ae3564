"""GGUF: one file that llama.cpp and what is built on it opens, written block by block (see ``gguf_blocks``).

Symmetric weights of up to 4 bits become Q4_0, with a zero point Q4_1, of 5 to 8 bits Q8_0; those of embeddings too.
What is not quantized stays exact: vectors in F32, matrices in F16 or BF16 where that holds every value, else in F32.
Tensors are written one at a time. ``llama-quantize`` would choose new scales; nothing here does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapters import refuse_beside
from ..errors import ArtifactError
from ..numerics import QuantizedTensor
from ..quantized_model import QuantizedLayer, QuantizedModel, shares_embedding
from ..spec import Dynamic
from . import gguf_blocks, gguf_client
from . import huggingface as hf
from .companions import copy_companions
from .gguf_names import (
    ARCHITECTURES,
    ROPE_FREQUENCIES,
    add_hyperparameters,
    gguf_names,
    language_config,
    rope_frequencies,
    row_order,
)
from .gguf_rounding import DTYPES
from .gguf_vocab import add_vocabulary
from .model_card import write_card

FILE = "model.gguf"
QUANTIZED = tuple(gguf_blocks.BYTES)


def write(model: QuantizedModel, folder: Path) -> list[str]:
    """Write ``model.gguf`` into a folder; return notes to print.

    Raises:
        ArtifactError: names the layers that GGUF cannot hold exactly, and the format that can.
        OSError: the disk is full, or cannot be written.
    """
    refuse_beside(model, "GGUF")
    config = language_config(model.architecture)
    # llama.cpp multiplies by the embedding where there is no output matrix
    kinds = {name: kind for name, kind in _block_types(model).items() if not shares_embedding(model, name)}
    dense = {name: name for name in model.dense} | model.tied
    if dense.get("lm_head.weight") == "model.embed_tokens.weight":
        del dense["lm_head.weight"]
    _need_package()
    import gguf

    names = gguf_names(config, [*(f"{name}.weight" for name in kinds), *dense])
    writer = gguf.GGUFWriter(folder / FILE, ARCHITECTURES[config["model_type"]][0])
    add_hyperparameters(writer, config)
    placeholder = add_vocabulary(writer, model.files, config)
    frequencies = rope_frequencies(config)
    if frequencies is not None:
        writer.add_tensor_info(ROPE_FREQUENCIES, frequencies.shape, frequencies.numpy().dtype, 4 * len(frequencies))
    for name, kind in kinds.items():
        rows, inputs = model.layers[name].shape
        shape = (rows, inputs // gguf_blocks.BLOCK * gguf_blocks.BYTES[kind])
        _announce(writer, names[f"{name}.weight"], shape, kind)
    formats = {name: _dense_type(model.dense[owner]) for name, owner in dense.items()}
    for name, owner in dense.items():
        shape = tuple(model.dense[owner].shape)
        size = 4 if formats[name] == "F32" else 2
        _announce(writer, names[name], (*shape[:-1], shape[-1] * size), formats[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    if frequencies is not None:
        writer.write_tensor_data(frequencies.numpy())
    for name, kind in kinds.items():
        writer.write_tensor_data(_blocks(model, config, name, kind).numpy())
    for name, owner in dense.items():
        tensor = _reordered(model.dense[owner], row_order(config, name))
        tensor = tensor.to(DTYPES[formats[name]]).contiguous()
        writer.write_tensor_data(tensor.view(torch.uint8).numpy())
    writer.close()
    copy_companions(model, folder)
    notes = _notes(model, config, kinds, _rounded_products(formats, dense))
    write_card(model, folder, "GGUF", notes[1], f"llama-cli -m {FILE}")
    return [*notes, *([placeholder] if placeholder else [])]


def read(path: Path) -> QuantizedModel:
    """Open a GGUF file, or the folder that holds one; tensors are read when asked for.

    Linear layers in Q4_0, Q4_1 and Q8_0 keep their codes; embeddings, norms and F16, BF16 or F32 matrices are dense.

    Raises:
        ArtifactError: no such file, an architecture without a reader, or a linear layer in another block type.
    """
    file = path if path.is_file() else path / FILE
    if not file.is_file():
        raise ArtifactError(f"there is no GGUF file at {path}")
    _need_package()
    config, tensors = gguf_client.open_file(file)
    names = gguf_client.transformers_names(config, file, tensors)
    quantized = {
        name.removesuffix(".weight"): name for name, other in names.items() if _is_linear(name, tensors[other])
    }

    def tensor(layer: str) -> QuantizedTensor:
        name = quantized[layer]
        stored = tensors[names[name]]
        try:
            value = gguf_blocks.decode(gguf_client.raw(stored), stored.tensor_type.name)
        except ArtifactError as error:
            raise ArtifactError(f"{layer} in {file} {error}") from None
        order = row_order(config, name)
        if order is not None:
            value.codes, value.scale = value.codes[order.argsort()], value.scale[order.argsort()]
            value.zero_point = value.zero_point if value.zero_point is None else value.zero_point[order.argsort()]
        return value

    layers = {
        layer: QuantizedLayer("Linear", list(tensors[names[name]].shape[::-1].tolist()), tensor(layer).spec, None)
        for layer, name in quantized.items()
    }
    dense = _Dense(tensors, {name: other for name, other in names.items() if name not in quantized.values()}, config)
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if config["tie_word_embeddings"] else {}
    return QuantizedModel(
        {"transformers": config},
        layers,
        tensor,
        {}.__getitem__,
        dense,
        tied,
        f"the GGUF file {file}",
        files=file.parent,
    )


def verify(folder: Path, model: QuantizedModel) -> list[tuple[str, str]]:
    """Read ``model.gguf`` back with the clients that are installed; return (what, what was seen) rows.

    Raises:
        ArtifactError: a code, a weight, a dense value or the clients' next token differs.
    """
    config = language_config(model.architecture)
    _need_package()
    rows = gguf_client.compare_tensors(folder / FILE, model, config)
    return [*rows, *gguf_client.compare_outputs(folder / FILE, model, config)]


class _Dense(Mapping[str, Tensor]):
    """The tensors of a GGUF file that are not quantized layers, by transformers' names."""

    def __init__(self, tensors: dict[str, Any], names: dict[str, str], config: dict[str, Any]) -> None:
        self._tensors, self._names, self._config = tensors, names, config

    def __getitem__(self, name: str) -> Tensor:
        value, order = gguf_client.dense(self._tensors[self._names[name]]), row_order(self._config, name)
        return value if order is None else value[order.argsort()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _block_types(model: QuantizedModel) -> dict[str, str]:
    kinds, problems = {}, []
    for name, layer in model.layers.items():
        try:
            if layer.weight is None:
                raise ArtifactError("has a trained activation scale, which llama.cpp has no place for: use --to onnx")
            kinds[name] = gguf_blocks.block_type(layer)
        except ArtifactError as error:
            problems.append(f"{name} {error}")
    if problems:
        raise ArtifactError("GGUF cannot hold these layers exactly:\n  " + "\n  ".join(problems))
    return kinds


def _blocks(model: QuantizedModel, config: dict[str, Any], name: str, kind: str) -> Tensor:
    try:
        blocks = gguf_blocks.encode(model.quantized(model.layers[name].tied or name), kind)
    except ArtifactError as error:
        raise ArtifactError(f"{name} {error}: GGUF stores fp16; train with scale_dtype=bfloat16") from None
    return _reordered(blocks, row_order(config, f"{name}.weight")).contiguous()


def _announce(writer: Any, name: str, byte_shape: tuple[int, ...], kind: str) -> None:
    import gguf
    import numpy

    size = 1
    for axis in byte_shape:
        size *= axis
    writer.add_tensor_info(name, byte_shape, numpy.dtype(numpy.uint8), size, gguf.GGMLQuantizationType[kind])


def _dense_type(tensor: Tensor) -> str:
    """Return the smallest type that holds every value; vectors are F32, as llama.cpp's operators want them."""
    if tensor.dim() < 2:
        return "F32"
    for kind in ("F16", "BF16"):
        if torch.equal(tensor.to(DTYPES[kind]).to(tensor.dtype), tensor):
            return kind
    return "F32"


def _reordered(tensor: Tensor, order: Tensor | None) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor if order is None else tensor[order]


def _is_linear(name: str, stored: Any) -> bool:
    """Return whether a tensor becomes a quantized layer.

    Raises:
        ArtifactError: it is a linear layer inside a block, in a type that has no exact codes here.
    """
    kind, inside = stored.tensor_type.name, name.endswith("_proj.weight")
    if inside and kind not in (*QUANTIZED, *DTYPES):
        raise ArtifactError(
            f"{name} is stored in {kind}: only {', '.join(QUANTIZED)} have codes that can be trained on"
        )
    return kind in QUANTIZED and (inside or name == "lm_head.weight")


def _rounded_products(formats: dict[str, str], dense: dict[str, str]) -> list[str]:
    """Return the types of the matrices of 16-bit floats that inputs are multiplied with, which are rounded to them."""
    embedding = "model.embed_tokens.weight"
    tied = "lm_head.weight" not in dense
    return [kind for name, kind in formats.items() if kind != "F32" and (name != embedding or tied)]


def _notes(model: QuantizedModel, config: dict[str, Any], kinds: dict[str, str], floats: list[str]) -> list[str]:
    products = [layer for layer in model.layers.values() if layer.type == "Linear"]
    trained = sum(layer.activation is Dynamic.q8_0 for layer in products)
    notes = [
        f"{FILE}: "
        + ", ".join(f"{list(kinds.values()).count(kind)} layers in {kind}" for kind in sorted(set(kinds.values()))),
        "llama.cpp rounds the inputs of linear layers to int8 with one fp16 scale per 32 values (Q8_0) at run time: "
        f"{trained} of {len(products)} were trained with exactly that"
        + ("" if trained == len(products) else " (policy: dynamic: q8_0)"),
    ]
    sums = list(kinds.values()).count("Q4_1")
    if sums:
        notes[-1] += f"; in {sums} layers of Q4_1 the sum of the 32 is rounded to fp16 as well"
    if floats:
        types = " and ".join(sorted(set(floats)))
        notes[-1] += f"; those of {len(floats)} unquantized matrices to their own type, {types}"
    small = [name for name in kinds if model.layers[name].weight.bits not in (4, 8)]
    if small:
        notes.append(
            f"{len(small)} layers of other than 4 or 8 bits take the room of 4 or 8: {', '.join(small[:3])}..."
        )
    return notes + hf.window_notes(config, "llama.cpp")


def _need_package() -> None:
    if find_spec("gguf") is None:
        raise ArtifactError("this needs the gguf package: pip install gguf")
