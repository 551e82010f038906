"""A client's own model of text with its tokenizer: by name, or a checkpoint of transformers.

    text-gru, text-cnn           small, untrained (`networks`)
    tiny                         the packaged Mixture-of-Experts language model
    FOLDER or hub id             an encoder (BERT ...), a decoder (Llama ...), or the encoder of both (T5 ...)

For classification the extractor is the mean of the model's last hidden states over the real tokens, also for decoders:
their last token, the usual choice, is arbitrary in a truncated text. The header is a new linear layer; a header of the
checkpoint is not used. For next-token prediction the extractor is the decoder, with one vector per token, and the
header is its language-model head. All weights are float32 and trainable.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, ByT5Tokenizer, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from edgefed.embedded import TINY, resolve_model
from edgefed.errors import CheckpointError, ConfigError, ModelNotFound, UnsupportedArchitecture, first_line
from edgefed.methods.fedmoe import NEXT_TOKEN, TEXT
from edgefed.moe.loading import load_config, without_progress_bars
from edgefed.personal.networks import (
    TEXT_CNN,
    TEXT_GRU,
    TEXT_NETWORKS,
    ByteCnnExtractor,
    GruExtractor,
    PersonalModel,
    masked_mean,
)
from edgefed.training.tokenizer import check_vocabulary, load_tokenizer, vocabulary_size

_REMEDY = (
    f"Pass {', '.join(TEXT_NETWORKS)}, {TINY}, the folder of a transformers checkpoint with its tokenizer, or "
    "package.module:function. Without access to the hub, download on another machine (`hf download NAME --local-dir "
    "FOLDER`) and copy the folder."
)
_DECODER_REMEDY = (
    "Next-token prediction needs a decoder with its head (Llama, Qwen, GPT ...); or join with `task=text`."
)
_PROBE_LENGTH = 8


class TransformerFeatures(nn.Module):
    """Last hidden states of a transformers model, (B, T, width), or without ``per_token`` their mean, (B, width)."""

    def __init__(self, model: nn.Module, per_token: bool):
        super().__init__()
        self.model = model
        self.per_token = per_token

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Features of a text, or of each of its tokens."""
        mask = inputs["attention_mask"]
        hidden: Tensor = self.model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        return hidden if self.per_token else masked_mean(hidden, mask)


class LanguageModelHead(nn.Module):
    """Hidden states -> logits: the output layer times ``scale``, then cap * tanh(logits / cap) if ``cap`` is given."""

    def __init__(self, layer: nn.Module, scale: float, cap: float | None):
        super().__init__()
        self.layer, self.scale, self.cap = layer, scale, cap

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits (B, T, vocabulary)."""
        logits: Tensor = self.layer(hidden) * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def load_text_model(
    path_or_name: str, *, num_classes: int | None, task: str, seed: int = 0
) -> tuple[PersonalModel, Any]:
    """(model, tokenizer) for the task "text", which needs ``num_classes``, or "next-token".

    New weights are drawn from ``seed``. Raises ConfigError for a model that does not support the task, ModelNotFound,
    CheckpointError, UnsupportedArchitecture.
    """
    if task not in (TEXT, NEXT_TOKEN) or (task == TEXT and num_classes is None):
        raise ValueError(f"invalid task {task!r} with {num_classes} classes for a model of text")
    per_token = task == NEXT_TOKEN
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if path_or_name in TEXT_NETWORKS:
            network, tokenizer = _network(path_or_name, per_token)
            outputs = vocabulary_size(tokenizer) if per_token or num_classes is None else num_classes
            return PersonalModel(network, nn.Linear(network.width, outputs), network.width), tokenizer
        source = resolve_model(path_or_name)
        with _own_remedy():
            config = load_config(source)
            tokenizer = load_tokenizer(source)
        model = _load(source, config, per_token)
        check_vocabulary(tokenizer, _vocabulary(model), path_or_name)
        _limit_length(tokenizer, model, config)
        if per_token:
            return _language_model(model, path_or_name), tokenizer
        extractor = TransformerFeatures(model, per_token=False)
        width = _try(extractor, model, path_or_name).shape[-1]
        assert num_classes is not None, "checked above"
        return PersonalModel(extractor, nn.Linear(width, num_classes), width), tokenizer


@torch.no_grad()
def check_causal(extractor: nn.Module, vocab_size: int, name: str) -> None:
    """Raise ConfigError if the features of a token depend on later tokens, which would reveal the answer."""
    extractor.eval()
    ids, mask = _probe(vocab_size)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % vocab_size
    first, second = (extractor({"input_ids": each, "attention_mask": mask}) for each in (ids, changed))
    if first.dim() != 3 or first.shape[1] != ids.shape[1]:
        raise ConfigError(
            f"{name} returns {tuple(first.shape)} for {tuple(ids.shape)} tokens, not one vector per token",
            remedy=_DECODER_REMEDY,
        )
    if not torch.allclose(first[:, :-1], second[:, :-1], rtol=1e-4, atol=1e-5):
        raise ConfigError(
            f"{name} attends to later tokens, so it cannot be trained to predict them",
            remedy=_DECODER_REMEDY,
        )


def _network(name: str, per_token: bool) -> tuple[GruExtractor | ByteCnnExtractor, Any]:
    if name == TEXT_GRU:
        tokenizer = load_tokenizer(resolve_model(TINY))
        return GruExtractor(vocabulary_size(tokenizer), per_token), tokenizer
    assert name == TEXT_CNN
    if per_token:
        raise ConfigError(
            f"{name} returns one vector per text and cannot predict its tokens",
            remedy=f"Set `model={TEXT_GRU}`, or a decoder; or join with `task=text`.",
        )
    tokenizer = ByT5Tokenizer(extra_ids=0)
    return ByteCnnExtractor(vocabulary_size(tokenizer)), tokenizer


def _load(source: str, config: PretrainedConfig, per_token: bool) -> PreTrainedModel:
    """The model in float32; code in the checkpoint is never run."""
    if per_token and config.is_encoder_decoder:
        raise ConfigError(
            f"{source} is an encoder with a decoder ({config.model_type}); next-token prediction needs a decoder alone",
            remedy=_DECODER_REMEDY,
        )
    config.return_dict = True
    for name in ("use_cache", "output_router_logits"):
        if hasattr(config, name):
            setattr(config, name, False)
    kind = AutoModelForCausalLM if per_token else AutoModel
    try:
        with without_progress_bars(), _quiet():
            loaded: Any = kind.from_pretrained(
                source, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
            model: PreTrainedModel = loaded[0]
            info: dict[str, Any] = loaded[1]
    except (SafetensorError, RuntimeError, KeyError, OSError) as error:
        raise CheckpointError(f"cannot read the weights of {source!r}: {first_line(error)}") from error
    except (ValueError, ImportError) as error:
        what = "language model" if per_token else "model"
        raise UnsupportedArchitecture(
            f"{source!r} is a {config.model_type}, which transformers cannot load as a {what}: {first_line(error)}",
            remedy=_DECODER_REMEDY if per_token else _REMEDY,
        ) from error
    missing = sorted(name for name in info.get("missing_keys") or () if not name.startswith("pooler."))
    if missing:
        raise CheckpointError(
            f"missing tensors in {source!r}: {len(missing)}, the first is {missing[0]!r}",
            remedy=_DECODER_REMEDY if per_token else None,
        )
    mismatched = sorted(str(entry) for entry in info.get("mismatched_keys") or ())
    if mismatched:
        raise CheckpointError(f"tensors of {source!r} do not have the shapes of its config.json: {mismatched[0]}")
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # type: ignore[assignment]  # that of BERT reads the first token and is not used here
    encoder: PreTrainedModel = model.get_encoder() if config.is_encoder_decoder else model
    return encoder


def _language_model(model: PreTrainedModel, name: str) -> PersonalModel:
    """A decoder and its head. Raises UnsupportedArchitecture unless they reproduce the model's logits."""
    layer: nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    config = model.config
    if layer is None or model.base_model is model:
        raise UnsupportedArchitecture(f"{name} has no separate language-model head", remedy=_REMEDY)
    extractor = TransformerFeatures(model.base_model, per_token=True)
    features = _try(extractor, model, name)
    check_causal(extractor, _vocabulary(model), name)
    scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)
    header = LanguageModelHead(layer, scale, getattr(config, "final_logit_softcapping", None))
    ids, mask = _probe(_vocabulary(model))
    with torch.no_grad():
        wanted, found = model(input_ids=ids, attention_mask=mask).logits, header(features)
    if wanted.shape != found.shape or not torch.allclose(wanted, found, rtol=1e-3, atol=1e-3):
        raise UnsupportedArchitecture(
            f"unsupported operation between the decoder and the logits of {name} ({config.model_type})",
            remedy="Use another decoder, or join with `task=text`.",
        )
    return PersonalModel(extractor, header, features.shape[-1])


@torch.no_grad()
def _try(extractor: TransformerFeatures, model: PreTrainedModel, name: str) -> Tensor:
    """The features of a few tokens. Raises UnsupportedArchitecture if the model fails on them."""
    extractor.eval()
    ids, mask = _probe(_vocabulary(model))
    try:
        features: Tensor = extractor({"input_ids": ids, "attention_mask": mask})
        return features
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UnsupportedArchitecture(
            f"{name} returns no hidden states for token ids alone: {first_line(error)}", remedy=_REMEDY
        ) from error


def _probe(vocab_size: int) -> tuple[Tensor, Tensor]:
    ids = (torch.arange(2 * _PROBE_LENGTH).view(2, _PROBE_LENGTH) * 7 + 3) % vocab_size
    return ids, torch.ones_like(ids)


def _vocabulary(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)


def _limit_length(tokenizer: Any, model: nn.Module, config: PretrainedConfig) -> None:
    """Lower the maximum length of a tokenizer to the number of learned positions of the model."""
    limit = getattr(config, "max_position_embeddings", None) or 0
    limit = limit if limit > 0 else tokenizer.model_max_length  # -1 in XLNet
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name:
            first = 0 if module.padding_idx is None else module.padding_idx + 1  # RoBERTa starts after the padding
            limit = min(limit, module.num_embeddings - first)
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)


@contextlib.contextmanager
def _own_remedy() -> Iterator[None]:
    """Replace the loader's remedy, which asks for a Mixture-of-Experts model."""
    try:
        yield
    except (ModelNotFound, UnsupportedArchitecture) as error:
        raise type(error)(str(error), remedy=_REMEDY) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the reports of transformers about unused heads and missing poolers."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
