"""Tiny language models in checkpoint folders with word tokenizers of their own, and labelled text out of Python."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetModel,
)

from edgefed.embedded.silos import load_silo

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
CLASSES = ("asyncio", "topics", "xml", "email")


def labelled_lines(per_class: int, lines: int = 4, classes: tuple[str, ...] = CLASSES, held_out: bool = False):
    """(texts, labels): runs of lines from packages of the standard library, ``per_class`` of each."""
    texts, labels = [], []
    for label, name in enumerate(classes):
        silo, runs = load_silo(name), []
        for document in silo.held_out if held_out else silo.train:
            full_lines = [line for line in document.text.splitlines() if line.strip()]
            runs += ["\n".join(full_lines[start : start + lines]) for start in range(0, len(full_lines) - lines, lines)]
        chosen = np.random.default_rng(label).permutation(len(runs))[:per_class]
        assert len(chosen) == per_class, f"{name} has {len(runs)} runs"
        texts += [runs[index] for index in chosen]
        labels += [label] * per_class
    return tuple(texts), np.array(labels, np.int64)


def word_tokenizer(texts, size: int, specials: bool, end: str | None = None) -> PreTrainedTokenizerFast:
    """The most frequent words of ``texts``; with ``specials`` it puts [CLS] and [SEP] around a text, as BERT's does."""
    words = Counter(word for text in texts for word in re.findall(r"\w+|[^\w\s]+", text))
    vocabulary = [*SPECIALS, *([end] if end else []), *sorted(words, key=lambda word: (-words[word], word))][:size]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    if specials:
        tokenizer.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token=end, model_max_length=10**9
    )


def save(folder: Path, model, tokenizer) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def tiny_bert(folder: Path, tokenizer, with_head: bool = False) -> str:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=40,
    )  # fmt: skip
    return save(folder, BertForMaskedLM(config) if with_head else BertModel(config, add_pooling_layer=False), tokenizer)


def tiny_roberta(folder: Path, tokenizer) -> str:
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=20, pad_token_id=0,
    )  # fmt: skip
    return save(folder, RobertaModel(config, add_pooling_layer=False), tokenizer)


def tiny_xlnet(folder: Path, tokenizer) -> str:
    """Its positions have no end."""
    config = XLNetConfig(vocab_size=len(tokenizer), d_model=16, n_layer=1, n_head=2, d_inner=16)
    return save(folder, XLNetModel(config), tokenizer)


def tiny_t5(folder: Path, tokenizer) -> str:
    config = T5Config(vocab_size=len(tokenizer), d_model=16, d_ff=16, d_kv=8, num_layers=1, num_heads=2)
    return save(folder, T5ForConditionalGeneration(config), tokenizer)


_DECODER = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
    "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip


def tiny_llama(folder: Path, tokenizer, tied: bool = False) -> str:
    torch.manual_seed(1)
    config = LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=tied, **_DECODER)
    return save(folder, LlamaForCausalLM(config), tokenizer)


def tiny_gemma2(folder: Path, tokenizer) -> str:
    """Its logits are capped."""
    config = Gemma2Config(vocab_size=len(tokenizer), final_logit_softcapping=2.0, **_DECODER)
    return save(folder, Gemma2ForCausalLM(config), tokenizer)


def tiny_granite(folder: Path, tokenizer) -> str:
    """Its logits are divided."""
    return save(
        folder, GraniteForCausalLM(GraniteConfig(vocab_size=len(tokenizer), logits_scaling=8.0, **_DECODER)), tokenizer
    )
