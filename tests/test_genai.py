"""What onnxruntime-genai's builder makes of a config: what it leaves out is said, and simulated or not compared."""

import pytest
import torch
from random_families import frozen
from test_gptq_awq import FORMATS, with_tokenizer

from qat.errors import ArtifactError
from qat.formats import genai

GEMMA = {"hidden_size": 128, "head_dim": 64}
SCALE = "multiplies the embedding by 11.31 where this model has"
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}
CASES = [
    ("mistral", {"sliding_window": 8}, "attends beyond the model's sliding window of 8 tokens", ", 8 tokens"),
    ("gemma", GEMMA, f"{SCALE} 11.3137", ", with 11.31 for 11.3137"),
    ("gemma", {**GEMMA, "dtype": torch.bfloat16}, f"{SCALE} 11.3125, and rounds 1 + the", ", with 11.31 for 11.3125"),
    ("olmo", {}, "takes no mean off in this model's norms: use --to onnx there", None),
    ("llama", LINEAR, "does not scale this model's rotation, of rope_type 'linear': use --to onnx there", None),
    ("smollm3", LINEAR, "does not scale this model's rotation, of rope_type 'linear': use --to onnx there", None),
]


def written(method, folder, kind, options):
    """Return a model, its folder and the notes."""
    out = folder / "out"
    out.mkdir()
    model = frozen(kind, **{"max_position_embeddings": 128, **options})
    model.architecture["transformers"].update(bos_token_id=1, eos_token_id=2)
    return with_tokenizer(model, folder / "tokenizer"), out, FORMATS[method].write(model, out)


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize(("kind", "options", "note", "how"), CASES)
def test_what_it_leaves_out_is_said(tmp_path, method, kind, options, note, how):
    _, _, notes = written(method, tmp_path, kind, options)
    assert any(f"onnxruntime-genai {note}" in said.replace("genai 0.18", "genai") for said in notes)


@pytest.mark.clients
@pytest.mark.parametrize(("kind", "options", "note", "how"), CASES)
def test_all_else_is_compared(tmp_path, monkeypatch, kind, options, note, how):
    """And what is left out is: without the simulation the logits are others."""
    pytest.importorskip("onnxruntime_genai")
    model, out, _ = written("gptq", tmp_path, kind, options)
    rows = dict(FORMATS["gptq"].verify(out, model))
    [(row, result)] = [(row, result) for row, result in rows.items() if row.startswith("logits")]
    if how is None:
        assert result.startswith(f"not compared: it {note.partition(':')[0]}")
    else:
        assert row == f"logits, onnxruntime-genai{how}" and result.startswith("differ by at most")
    for name in ("NO_WINDOWS", "GEMMAS", "RMS_NORMS", "UNSCALED"):
        monkeypatch.setattr(genai, name, ())
    with pytest.raises(ArtifactError, match="the logits of onnxruntime-genai differ by"):
        FORMATS["gptq"].verify(out, model)
