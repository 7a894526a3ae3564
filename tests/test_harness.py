"""EleutherAI's harness on an artifact, with a task of one's own; where it is not installed, only what is refused."""

import json
import sys

import pytest
import torch
from tiny_tokenizer import WORDS, tiny_tokenizer

import qat
from qat.evaluate import main

transformers = pytest.importorskip("transformers")
QUESTIONS = [("what did the cat do", ["it sat", "it ran on the mat"], 1), ("who is good", ["the dog", "a cat"], 0)]
TASK = """
task: cats
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


@pytest.fixture
def artifact(tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": len(WORDS)}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.5)
    model = transformers.LlamaForCausalLM(config)
    policy = qat.QuantPolicy(weight=qat.QuantSpec(group_size=32), rules=[{"match": "lm_head", "weight": None}])
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    qat.save(qat.freeze(qat.prepare(model, policy, verbose=False)), tmp_path / "out", tmp_path / "tokenizer")
    return tmp_path / "out"


def test_a_task_is_answered_as_the_models_own_probabilities_say(artifact, tmp_path, capsys):
    pytest.importorskip("lm_eval")
    rows = [{"question": q, "choices": choices, "answer": answer} for q, choices, answer in QUESTIONS * 3]
    (tmp_path / "cats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "cats.yaml").write_text(TASK.replace("FILE", str(tmp_path / "cats.jsonl")))
    arguments = [str(artifact), "--tasks", "cats", "--task-folder", str(folder), "--device", "cpu"]
    main([*arguments, "--json", str(tmp_path / "found.json")])
    model, tokenizer, right = qat.load(artifact), tiny_tokenizer(), 0
    for question, choices, answer in QUESTIONS:
        scores = []
        for choice in choices:
            start, whole = (
                tokenizer(text, return_tensors="pt").input_ids for text in (question, f"{question} {choice}")
            )
            with torch.no_grad():
                logs = model(whole).logits.log_softmax(-1)[0, :-1].gather(1, whole[0, 1:, None])
            scores.append(float(logs[start.shape[1] - 1 :].sum()))
        right += scores.index(max(scores)) == answer
    assert json.loads((tmp_path / "found.json").read_text()) == {"cats/acc": right / len(QUESTIONS)}
    assert f"cats/acc {right / len(QUESTIONS):.3}" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([str(artifact), "--tasks", "cat", "--task-folder", str(folder)])
    assert "the harness has no such task (did you mean 'cats'?)" in capsys.readouterr().err


def test_without_the_harness_one_line_says_what_to_install(artifact, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit) as stopped:
        main([str(artifact), "--tasks", "arc_easy"])
    error = capsys.readouterr().err
    assert (
        stopped.value.code == 1
        and "--tasks needs EleutherAI's harness" in error
        and "pip install 'lm-eval[hf]'" in error
    )


def test_something_has_to_be_measured(artifact, capsys):
    with pytest.raises(SystemExit):
        main([str(artifact)])
    assert "say what to measure on: data=NAME, or --tasks NAME" in capsys.readouterr().err
