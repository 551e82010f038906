"""Tokenizers for tests: one with a token per byte, and real ones of the tokenizers library, without a download."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

EOS = 256


class ByteTokenizer:
    """One token a byte, so that a mask can be read off the text; pairs listed in `merges` become one token."""

    eos_token_id: int | None = EOS
    special_tokens_map: dict[str, str] = {}

    def __init__(self, merges=(), chat_template=None):
        self.merges = {pair: 257 + index for index, pair in enumerate(merges)}
        self.chat_template = chat_template
        self.calls = []

    def __call__(self, texts, add_special_tokens, verbose):
        assert isinstance(texts, list)
        self.calls.append(sum(map(len, texts)))
        return {"input_ids": [self.encode(text) for text in texts]}

    def get_chat_template(self, tools=None):
        return self.chat_template

    def encode(self, text):
        ids, position = [], 0
        while position < len(text):
            pair = text[position : position + 2]
            if pair in self.merges:
                ids.append(self.merges[pair])
                position += 2
            else:
                ids += text[position].encode()
                position += 1
        return ids

    def text(self, ids):
        pairs = {token: pair for pair, token in self.merges.items()} | {EOS: "$"}
        return "".join(pairs.get(token, chr(token)) for token in ids)


def byte_level(marks, template=None, *, eos=None, bos=None, strips=()):
    """GPT's kind of tokenizer, a token a byte, with `marks` as special tokens; those in `strips` take space behind."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.ByteLevel(trim_offsets=True)
    raw.add_special_tokens([AddedToken(mark, rstrip=mark in strips, special=True) for mark in marks])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=eos or marks[0], bos_token=bos)
    tokenizer.chat_template = template
    return tokenizer


def llama_like(texts, add_eos=False):
    """Llama's and Mixtral's kind: a space is put before the text, spaces are U+2581, <s> goes in front."""
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    raw.decoder = decoders.Metaspace(prepend_scheme="first")
    special = ["<unk>", "<s>", "</s>"]
    raw.train_from_iterator(
        texts * 20, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    )
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if add_eos else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def learned(blocks, tokenizer):
    """Return the text of all tokens and of those in the loss, with `_` where there is no loss and `$` for the end."""
    ids, labels = blocks.input_ids.flatten().tolist(), blocks.labels.flatten().tolist()
    assert all(label in (token, -100) for token, label in zip(ids, labels, strict=True))
    mask = "".join(
        tokenizer.text([token]) if label != -100 else "_" * len(tokenizer.text([token]))
        for token, label in zip(ids, labels, strict=True)
    )
    return tokenizer.text(ids), mask


def bracketed(blocks, tokenizer):
    """Return the text with what is in the loss in ⟦ ⟧."""
    pieces, inside = [], False
    for token, label in zip(blocks.input_ids.flatten().tolist(), blocks.labels.flatten().tolist(), strict=True):
        if (label != -100) != inside:
            pieces.append("⟦" if not inside else "⟧")
            inside = not inside
        pieces.append(tokenizer.decode([token]))
    return "".join(pieces) + ("⟧" if inside else "")
