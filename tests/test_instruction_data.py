"""Instructions become rows: tokens by hand, the loss on completions alone, packed examples kept apart."""

import json

import pytest
import torch
from random_quantized import LLAMA
from tiny_tokenizer import TEMPLATE, WORDS, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qat.errors import DataError
from qat.models import build
from qat.training.conversations import read_lines
from qat.training.evaluation import evaluate
from qat.training.instruction_data import InstructionData, encode, pack_rows, require_apart
from qat.training.losses import soft_cross_entropy
from qat.training.metrics import IGNORED, LanguageMetrics, cross_entropy, run


def words(tokens):
    return " ".join(WORDS[token] for token in tokens)


CHAT = {
    "messages": [
        {"role": "user", "content": "what did the cat do"},
        {"role": "assistant", "content": "it sat"},
        {"role": "user", "content": "who ran"},
        {"role": "assistant", "content": "the dog"},
    ]
}


def learned(line, tokenizer, completion_only=True):
    tokens, used = encode(line, tokenizer, completion_only, "here:1")
    return words(tokens), words(token for token, use in zip(tokens, used, strict=True) if use)


def test_a_conversation_by_its_template():
    whole, said = learned(CHAT, tiny_tokenizer())
    assert whole == "<user> what did the cat do <bot> it sat <eos> <user> who ran <bot> the dog <eos>"
    assert said == "it sat <eos> the dog <eos>"
    assert learned(CHAT, tiny_tokenizer(), completion_only=False)[1] == whole


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "who sat", "completion": "the cat"},
        {"instruction": "who sat", "input": "", "output": "the cat"},
        {"instruction": "who", "input": "sat", "output": "the cat"},
    ],
)
def test_other_forms_with_and_without_a_template(line):
    assert learned(line, tiny_tokenizer()) == ("<user> who sat <bot> the cat <eos>", "the cat <eos>")
    assert learned(line, tiny_tokenizer(None)) == ("who sat the cat <eos>", "the cat <eos>")


def test_packing_by_hand():
    examples = [([5, 6, 7], [False, True, True]), ([8, 9, 10, 11, 12], [False] + 4 * [True]), ([13, 14], [False, True])]
    tokens, positions, targets = pack_rows(examples, 8)
    no = IGNORED
    assert tokens.tolist() == [[8, 9, 10, 11, 12, 5, 6, 7], [13, 14, 0, 0, 0, 0, 0, 0]]
    assert positions.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]]
    assert targets.tolist() == [[9, 10, 11, 12, no, 6, 7, no], [14, no, no, no, no, no, no, no]]
    assert len(pack_rows(examples, 8, pack=False)[0]) == 3
    assert pack_rows(examples, 4)[0].tolist() == [[8, 9, 10, 11], [5, 6, 7, 0], [13, 14, 0, 0]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_examples_do_not_see_each_other(attention):
    config = LlamaConfig(**{**LLAMA, "num_hidden_layers": 2}, attn_implementation=attention)
    model = LlamaForCausalLM(config).eval()
    lengths, generator = (9, 6, 5), torch.Generator().manual_seed(0)
    examples = [(torch.randint(0, 512, (n,), generator=generator).tolist(), n * [True]) for n in lengths]
    tokens, positions, _ = pack_rows(examples, 20)
    assert len(tokens) == 1
    with torch.no_grad():
        packed = run(model, {"input_ids": tokens.long(), "position_ids": positions.long()}).logits[0]
        alone = torch.cat([model(torch.tensor([example])).logits[0] for example, _ in examples])
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)


def write(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def test_the_data_module(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    train = write(tmp_path / "train.jsonl", [CHAT, "", {"prompt": "who", "completion": "the cat"}] * 20)
    data = InstructionData(train, str(tmp_path / "tokenizer"), seq_len=32, batch_size=2, val_fraction=0.1)
    inputs, targets = next(iter(data.train_loader("cpu")))
    assert inputs["input_ids"].shape == inputs["position_ids"].shape == targets.shape == (2, 32)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "num_hidden_layers": 1}))
    metrics = evaluate(model, data)
    rows = torch.stack([torch.stack([x.long() for x in row]) for row in zip(*data.val_rows, strict=True)])
    with torch.no_grad():
        logits = model.eval()(input_ids=rows[:, 0], position_ids=rows[:, 1], use_cache=False).logits
    assert metrics["loss"] == pytest.approx(cross_entropy(logits, rows[:, 2]).item(), rel=1e-5)
    assert data.example()["high"] < len(WORDS)


def test_ignored_targets_do_not_count():
    metrics = LanguageMetrics()
    logits = torch.randn(2, 3, 7)
    targets = torch.tensor([[1, IGNORED, 2], [IGNORED, IGNORED, IGNORED]])
    metrics.update(logits[:1], targets[:1])
    metrics.update(logits[1:], targets[1:])  # a batch without any
    log = logits.log_softmax(-1)
    assert metrics.compute()["loss"].item() == pytest.approx(-(log[0, 0, 1] + log[0, 2, 2]).item() / 2, rel=1e-5)


def test_fewer_examples_than_a_training_batch_are_enough_to_measure_on(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    data = InstructionData(write(tmp_path / "x.jsonl", [CHAT, CHAT]), str(tmp_path / "tokenizer"), 64, batch_size=2)
    assert len(list(data.test_loader("cpu"))) == 1
    with pytest.raises(DataError, match="fill 1 of the 2 rows of a batch: give more"):
        data.train_loader("cpu")


def test_what_is_wrong_is_named(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tiny_tokenizer().save_pretrained(tokenizer)

    def load(*lines, seq_len=16):
        return InstructionData(write(tmp_path / "x.jsonl", lines), str(tokenizer), seq_len=seq_len, batch_size=1)

    with pytest.raises(DataError, match=r"x.jsonl:2 is no JSON"):
        load(CHAT, "{")
    with pytest.raises(DataError, match=r"x.jsonl:1: give messages, conversations, .* not \['question'\]"):
        load({"question": "who"})
    with pytest.raises(DataError, match="last message is not the assistant's"):
        load({"messages": CHAT["messages"][:1]})
    with pytest.raises(DataError, match="fill 0 of the 1 rows of a batch: give more"):
        load(CHAT).train_loader("cpu")
    (tmp_path / "latin.jsonl").write_bytes(b'\xef\xbb\xbf{"prompt": "a",\n\n "completion": "caf\xe9"}')
    with pytest.raises(DataError, match=r"latin.jsonl:3 is no text in UTF-8"):
        InstructionData(str(tmp_path / "latin.jsonl"), str(tokenizer), 8, 1)
    with pytest.raises(DataError, match="no JSONL file"):
        InstructionData(str(tmp_path / "none"), str(tokenizer), 8, 1)
    rewriting = tiny_tokenizer(
        "{{ 'the ' if messages | length > 2 else 'a ' }} {% for m in messages %}{{ m.content }} {% endfor %}"
    )
    with pytest.raises(DataError, match="rewrites earlier turns"):
        encode(CHAT, rewriting, True, "here:1")


@pytest.mark.parametrize("answer", ["\nit sat", "\n\n", "it sat"])
def test_a_token_that_would_span_prompt_and_answer(answer):
    """As ChatML in Qwen's tokenizer, whose prompt ends in a line break: two of them are one token there."""
    vocabulary = {piece: index for index, piece in enumerate([*"\nAUabistw ", "\n\n", "\n\n\n", "it"])}
    merges = [("\n", "\n"), ("\n\n", "\n"), ("i", "t")]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, merges)))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'U' if m.role == 'user' else 'A' }}\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}A\n{% endif %}"
    )
    turns = [{"role": "user", "content": "sit"}, {"role": "assistant", "content": answer}]
    tokens, said = encode({"messages": turns * 2}, tokenizer, True, "here:1")
    asked, answered = tokenizer("U\nsitA\n")["input_ids"], tokenizer(answer)["input_ids"]
    assert tokens == (asked + answered) * 2  # what generation sees, and is to say
    assert said == ([False] * len(asked) + [True] * len(answered)) * 2


def test_a_mark_at_the_beginning_is_no_text(tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps(CHAT), encoding="utf-8-sig")
    assert [line for _, line in read_lines(str(tmp_path / "x.jsonl"))] == [CHAT]


def test_a_whole_template_may_rewrite_earlier_turns():
    rewriting = tiny_tokenizer("{{ 'the ' if messages | length > 2 else 'a ' }}{{ messages[-1].content }}")
    assert learned(CHAT, rewriting, completion_only=False) == ("the the dog", "the the dog")


def test_turns_without_a_template_are_kept_apart():
    """A prompt is followed by its completion as they are; turns by a blank line."""
    from transformers import AddedToken

    tokenizer = tiny_tokenizer(None)
    tokenizer.add_tokens(AddedToken("\n\n", normalized=False))
    between = tokenizer.convert_tokens_to_ids("\n\n")
    tokens, _ = encode(CHAT, tokenizer, True, "here:1")
    assert tokens.count(between) == 3
    asked = encode({"instruction": "who", "output": "it"}, tokenizer, True, "here:1")
    assert asked == ([WORDS.index("who"), between, WORDS.index("it"), 2], [False, False, True, True])
    plain = encode({"prompt": "who ", "completion": "it"}, tokenizer, True, "here:1")
    assert plain == ([WORDS.index("who"), WORDS.index("it"), 2], [False, True, True])


def test_the_first_token_that_a_tokenizer_adds_comes_first():
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer(None)
    tokenizer.add_special_tokens({"bos_token": "<user>"})
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<user> $A", special_tokens=[("<user>", 3)])
    assert learned({"prompt": "who", "completion": "it"}, tokenizer) == ("<user> who it <eos>", "it <eos>")


PAIR = {"prompt": "who sat", "completion": "the cat"}


@pytest.mark.parametrize("form", ["sharegpt", "list"])
def test_files_that_other_tools_write(tmp_path, form):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    turns = [{"from": "human", "value": "who sat"}, {"from": "gpt", "value": "the cat"}]
    path = tmp_path / "x.json"
    path.write_text(json.dumps([PAIR] * 9, indent=1) if form == "list" else json.dumps({"conversations": turns}))
    data = InstructionData(str(path), str(tmp_path / "tokenizer"), 16, 1, val=str(path), pack=False)
    assert words(data.train_rows[0][0, :7].tolist()) == "<user> who sat <bot> the cat <eos>"


def test_validation_examples_alone(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    options = {"tokenizer": str(tmp_path / "tokenizer"), "seq_len": 16, "batch_size": 2}
    data = InstructionData(None, val=write(tmp_path / "x.jsonl", [PAIR]), **options)
    assert len(list(data.test_loader("cpu"))) == 1 and data.example()["high"] == WORDS.index("who")
    with pytest.raises(DataError, match="fill 0 of the 2 rows of a batch: give more in"):
        data.train_loader("cpu")
    with pytest.raises(DataError, match=r"needs data\.train or data\.val"):
        InstructionData(None, **options)


@pytest.mark.parametrize(
    "line, match",
    [
        ({"messages": "hello"}, r"x.jsonl:2: 'messages' is a list of objects"),
        ({"messages": ["hello"]}, "'messages' is a list of objects"),
        (
            {"messages": [{"role": "user"}, {"role": "assistant", "content": "it"}]},
            r'both text, unlike {"role": "user"}',
        ),
        ({"prompt": None, "completion": "it"}, 'both text, unlike {"role": "user", "content": null}'),
        ({"conversations": [{"value": "it"}]}, "'conversations' is a list of objects"),
        ({"conversations": [{"from": ["human"], "value": "it"}]}, "of objects with 'from' and 'value', both text"),
        ({"prompt": "a \ud83d", "completion": "it"}, r"x.jsonl:2: a message holds \\ud83d, half of a character"),
        ({"messages": CHAT["messages"][1:]}, "its first message is the assistant's, which answers nothing"),
        ([1], "no JSON object"),
    ],
)
def test_malformed_lines_are_named(tmp_path, line, match):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(DataError, match=match):
        InstructionData(write(tmp_path / "x.jsonl", [PAIR, line]), str(tmp_path / "tokenizer"), 16, 1)


def test_a_template_that_refuses_is_named(tmp_path):
    refusing = tiny_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match="here:1: the tokenizer's chat template refuses it: roles must alternate"):
        encode(CHAT, refusing, True, "here:1")


@pytest.mark.parametrize("completion_only", [True, False])
def test_a_message_that_a_template_leaves_out_is_named(completion_only):
    tokenizer = tiny_tokenizer(TEMPLATE.replace("for m in messages", "for m in messages if m.role in known"))
    tokenizer.chat_template = "{% set known = ['user', 'assistant', 'tool'] %}" + tokenizer.chat_template
    question, answer = CHAT["messages"][:2]
    for role, said in (("tool", True), ("Assistant", False), ("narrator", False), ("system", False)):
        line = {"messages": [question, {"role": role, "content": "the dog ran"}, answer]}
        if said:
            assert "the dog ran" in learned(line, tokenizer, completion_only)[0]
        else:
            with pytest.raises(DataError, match=rf"here:1: .* leaves out the message of the role '{role}'"):
                encode(line, tokenizer, completion_only, "here:1")
    line = {"messages": [{"role": "system", "content": ""}, question, answer]}
    assert learned(line, tokenizer, completion_only)[0] == "<user> what did the cat do <bot> it sat <eos>"


def test_what_does_not_fit_a_row_is_counted_and_what_teaches_nothing_left_out(tmp_path, capsys):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    long, cut = {**PAIR, "prompt": "who " * 20}, {**PAIR, "completion": "the cat " * 20}

    def load(lines):
        path = write(tmp_path / "x.jsonl", lines)
        return InstructionData(path, str(tmp_path / "tokenizer"), seq_len=16, batch_size=1, pack=False)

    data = load([long] * 3 + [cut] * 2 + [PAIR] * 5)
    said = capsys.readouterr().out
    assert "5 of 10 examples are longer than data.seq_len=16 and are cut; 3 have nothing left to learn" in said
    assert len(data.train_rows[0]) + len(data.val_rows[0]) == 7
    assert (data.train_rows[2] != IGNORED).any(1).all()
    with pytest.raises(DataError, match=r"raise data.seq_len, or set data.completion_only=false"):
        load([long] * 3)


@pytest.mark.parametrize("name, apart", [("Llama", True), ("Gemma3Text", True), ("OPT", False), ("Bloom", False)])
def test_architectures_that_mix_packed_examples_are_refused(name, apart):
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64, "head_dim": 16}
    more = {"Llama": {"intermediate_size": 32}, "Gemma3Text": {"intermediate_size": 32, "num_key_value_heads": 2}}
    more["OPT"] = {"ffn_dim": 32, "word_embed_proj_dim": 32}
    more["Bloom"] = {"n_layer": 2, "n_head": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, **more[name])
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    if apart:
        require_apart(model, "cpu")
    else:
        with pytest.raises(DataError, match=f"{name}ForCausalLM lets packed examples attend .* data.pack=false"):
            require_apart(model, "cpu")
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_a_tokenizer_may_be_a_file_alone_which_names_no_end(tmp_path, capsys):
    file, rows = tmp_path / "tokenizer.json", tmp_path / "rows.jsonl"
    tiny_tokenizer().backend_tokenizer.save(str(file))
    rows.write_text('{"prompt": "the cat", "completion": " sat"}\n' * 4)
    data = InstructionData(str(rows), str(file), 8, 2)
    assert data.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert "names no eos_token: no answer is taught to end" in capsys.readouterr().out
    for path, said in (
        (rows, "is no tokenizer.json, or damaged"),
        (tmp_path / "none", "there is nothing at that path"),
    ):
        with pytest.raises(DataError, match=said):
            InstructionData(str(rows), str(path), 8, 2)


def test_a_network_of_ours_is_told_whose_these_data_are():
    with pytest.raises(DataError, match=r"GPT is no model of transformers, .* give model=hf or model=hf_frozen"):
        require_apart(build({"builder": "gpt", "args": {"width": 8, "depth": 1, "heads": 1}}), "cpu")


def test_a_teacher_is_not_followed_where_nothing_is_learned():
    logits, taught = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    targets = torch.tensor([[1, IGNORED, 2], [IGNORED, 3, IGNORED]])
    counted = targets != IGNORED
    expected = torch.nn.functional.cross_entropy(logits[counted], taught[counted].softmax(-1))
    torch.testing.assert_close(soft_cross_entropy(logits, taught, targets), expected)
