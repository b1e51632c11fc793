"""Five tokenizers that differ in everything that tokenised conversations depend on."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import trl
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

TEXTS = [
    "What is 3 plus 4? The answer is 7.",
    "Name a colour: blue. Name another: red.",
    "user assistant system you are short",
    "Below is an instruction that describes a task, paired with an input that provides context.",
    "### Instruction: ### Input: ### Response: Write a response that completes the request.",
] * 9

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""Marks the assistant's words; a message ends with a special token and a line break."""

COLONS = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
"""Marks nothing; the prompt ends in a character that tokens may span."""

TEMPLATES = Path(trl.__file__).parent / "chat_templates"


def _fast(model: Tokenizer, template: str | None = None, **special: str) -> Any:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, **special)
    if template:
        tokenizer.chat_template = template
    return tokenizer


def _bytes(special: list[str], *, words: bool = True) -> Tokenizer:
    """A byte-level BPE; without ``words`` its tokens may span blanks and punctuation."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=420,
            show_progress=False,
            special_tokens=special,
            initial_alphabet=alphabet,
        ),
    )
    return model


def _starting(model: Tokenizer, bos: str, pair: str = "$A") -> Tokenizer:
    tokens = {token: model.token_to_id(token) for token in {bos, *pair.split()} - {"$A"}}
    model.post_processor = processors.TemplateProcessing(
        single=f"{bos} {pair}", special_tokens=list(tokens.items())
    )
    return model


def plain() -> Any:
    """Byte-level BPE, no start token, no template; pads with its end token."""
    return _fast(_bytes(["</s>"]), eos_token="</s>", pad_token="</s>")


def chatml() -> Any:
    """Byte-level BPE without a start token; a template with generation blocks."""
    model = _bytes(["<pad>", "</s>", "<|im_start|>", "<|im_end|>"])
    return _fast(model, CHATML, eos_token="</s>", pad_token="<pad>")


def spanning() -> Any:
    """Byte-level BPE with a start token, whose tokens span words; a template of plain words."""
    model = _starting(_bytes(["<s>", "</s>", "<pad>"], words=False), "<s>")
    return _fast(model, COLONS, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def unigram() -> Any:
    """As SentencePiece has it: blanks are characters of tokens; a template that trl has mended."""
    special = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
    text = "▁".join(TEXTS).replace(" ", "▁")
    pieces = {text[i : i + size] for size in (1, 2, 3) for i in range(len(text) - size + 1)}
    # Longer pieces win, and one may end where a prompt does or not.
    scores = [(piece, -8.0 + len(piece)) for piece in sorted(pieces | {"\n"})]
    model = Tokenizer(models.Unigram([*((token, 0.0) for token in special), *scores], 0))
    model.add_special_tokens(special)
    model.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    model.decoder = decoders.Metaspace()
    return _fast(
        _starting(model, "<s>"),
        (TEMPLATES / "qwen2_5.jinja").read_text(),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
    )


def wordpiece() -> Any:
    """As BERT has it: lower case, no template, and a token of its own at either end."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = " ".join(TEXTS).lower().split()
    starts = {word[:size] for word in words for size in (1, 3, 5)}
    rest = {
        f"##{word[i : i + size]}" for word in words for size in (1, 2) for i in range(len(word))
    }
    vocabulary = {token: i for i, token in enumerate([*special, *sorted(starts), *sorted(rest)])}
    model = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    model.add_special_tokens(special)
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _fast(
        _starting(model, "[CLS]", "$A [SEP]"),
        bos_token="[CLS]",
        eos_token="[SEP]",
        unk_token="[UNK]",
        pad_token="[PAD]",
    )


BUILDERS: dict[str, Callable[[], Any]] = {
    build.__name__: build for build in (plain, chatml, spanning, unigram, wordpiece)
}
CHATTING = ("chatml", "spanning", "unigram")
"""Those with a chat template."""


@cache
def built(name: str) -> Any:
    """The tokenizer of that name, built once; not to be changed."""
    return BUILDERS[name]()


def copied(name: str) -> Any:
    """One to change."""
    return deepcopy(built(name))
