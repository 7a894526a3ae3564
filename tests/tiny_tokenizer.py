"""A tokenizer of a few words, with or without a chat template."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<unk>", "<eos>", "<user>", "<bot>"]
WORDS = [*SPECIAL, "the", "a", "cat", "dog", "sat", "ran", "on", "mat", "what", "did", "do", "it", "who", "is", "good"]
TEMPLATE = (
    "{% for m in messages %}{{ '<user> ' if m.role == 'user' else '<bot> ' }}{{ m.content }}"
    "{{ ' <eos> ' if m.role != 'user' else ' ' }}{% endfor %}{% if add_generation_prompt %}<bot> {% endif %}"
)


def tiny_tokenizer(template=TEMPLATE):
    """Return it; ids are indices into WORDS."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = template
    return fast
