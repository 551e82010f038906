"""A client's own model of text, with its tokenizer: by name, or any transformers checkpoint in a folder or on the hub.

    text-gru, text-cnn           small, untrained (`text_networks`)
    tiny                         the packaged Mixture-of-Experts language model
    FOLDER or hub id             an encoder (BERT ...), a decoder (Llama ...), or the encoder of both (T5 ...)

For classification the extractor is the mean of the model's last hidden states over the real tokens, for decoders too:
their last token alone, the usual choice, is an arbitrary one where a text was cut. The header is a new linear layer;
one that the checkpoint has stays behind. For next-token prediction the extractor is the decoder, one vector per token,
and the header its own language-model head. All weights are float32, and all of them learn.
"""

from __future__ import annotations

import contextlib
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
from edgefed.personal.networks import PersonalModel
from edgefed.personal.text_encoder import masked_mean
from edgefed.personal.text_networks import TEXT_CNN, TEXT_GRU, TEXT_NETWORKS, ByteCnnExtractor, GruExtractor
from edgefed.training.tokenizer import check_vocabulary, load_tokenizer, vocabulary_size

_REMEDY = (
    f"Pass {', '.join(TEXT_NETWORKS)}, {TINY}, the folder of a transformers checkpoint with its tokenizer, or "
    "package.module:function. Where the hub cannot be reached, download elsewhere (`hf download NAME --local-dir "
    "FOLDER`) and copy the folder."
)
_DECODER_REMEDY = (
    "Next-token prediction needs a decoder with its head (Llama, Qwen, GPT ...); or join with `task=text`."
)
_PROBE_LENGTH = 8


class TransformerFeatures(nn.Module):
    """Last hidden states of a transformers model: (B, T, width) ``per_token``, otherwise their mean, (B, width)."""

    def __init__(self, model: nn.Module, per_token: bool):
        super().__init__()
        self.model = model
        self.per_token = per_token

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        mask = inputs["attention_mask"]
        hidden = self.model(input_ids=inputs["input_ids"], attention_mask=mask).last_hidden_state
        return hidden if self.per_token else masked_mean(hidden, mask)


class LanguageModelHead(nn.Module):
    """Hidden states -> logits: the model's output layer, times ``scale``, and cap * tanh(logits / cap) where there is
    a ``cap``.
    """

    def __init__(self, layer: nn.Module, scale: float, cap: float | None):
        super().__init__()
        self.layer, self.scale, self.cap = layer, scale, cap

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.layer(hidden) * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


def load_text_model(
    path_or_name: str, *, num_classes: int | None, task: str, seed: int = 0
) -> tuple[PersonalModel, Any]:
    """(model, tokenizer). ``task``: "text" (``num_classes`` needed) or "next-token". New weights are drawn from
    ``seed``.

    Raises ConfigError (a model that cannot do the task), ModelNotFound, CheckpointError, UnsupportedArchitecture.
    """
    if task not in (TEXT, NEXT_TOKEN) or (task == TEXT and num_classes is None):
        raise ValueError(f"no model of text for task {task!r} with {num_classes} classes")
    per_token = task == NEXT_TOKEN
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if path_or_name in TEXT_NETWORKS:
            extractor, tokenizer = _network(path_or_name, per_token)
            width, outputs = extractor.width, vocabulary_size(tokenizer) if per_token else num_classes
            return PersonalModel(extractor, nn.Linear(width, outputs), width), tokenizer
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
        return PersonalModel(extractor, nn.Linear(width, num_classes), width), tokenizer


@torch.no_grad()
def check_causal(extractor: nn.Module, vocab_size: int, name: str) -> None:
    """Raise ConfigError when what an extractor says of a token depends on later ones: it would only learn to look."""
    extractor.eval()
    ids, mask = _probe(vocab_size)
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % vocab_size
    first, second = (extractor({"input_ids": each, "attention_mask": mask}) for each in (ids, changed))
    if first.dim() != 3 or first.shape[1] != ids.shape[1]:
        raise ConfigError(
            f"{name} gives {tuple(first.shape)} for {tuple(ids.shape)} tokens, not one vector per token",
            remedy=_DECODER_REMEDY,
        )
    if not torch.allclose(first[:, :-1], second[:, :-1], rtol=1e-4, atol=1e-5):
        raise ConfigError(
            f"{name} sees later tokens, so it cannot learn to predict them",
            remedy=_DECODER_REMEDY,
        )


def _network(name: str, per_token: bool) -> tuple[nn.Module, Any]:
    if name == TEXT_GRU:
        tokenizer = load_tokenizer(resolve_model(TINY))
        return GruExtractor(vocabulary_size(tokenizer), per_token), tokenizer
    assert name == TEXT_CNN
    if per_token:
        raise ConfigError(
            f"{name} gives one vector for a whole text and cannot predict its tokens",
            remedy=f"Set `model={TEXT_GRU}`, or a decoder; or join with `task=text`.",
        )
    tokenizer = ByT5Tokenizer(extra_ids=0)
    return ByteCnnExtractor(vocabulary_size(tokenizer)), tokenizer


def _load(source: str, config: PretrainedConfig, per_token: bool) -> PreTrainedModel:
    """The model in float32; code that comes with it is never run."""
    if per_token and config.is_encoder_decoder:
        raise ConfigError(
            f"{source} is an encoder with a decoder ({config.model_type}); next-token prediction here takes a decoder",
            remedy=_DECODER_REMEDY,
        )
    config.return_dict = True
    for name in ("use_cache", "output_router_logits"):
        if hasattr(config, name):
            setattr(config, name, False)
    kind = AutoModelForCausalLM if per_token else AutoModel
    try:
        with without_progress_bars(), _quiet():
            model, info = kind.from_pretrained(
                source, config=config, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
            )
    except (SafetensorError, RuntimeError, KeyError, OSError) as error:
        raise CheckpointError(f"the weights of {source!r} cannot be read: {first_line(error)}") from error
    except (ValueError, ImportError) as error:
        what = "language model" if per_token else "model"
        raise UnsupportedArchitecture(
            f"{source!r} holds a {config.model_type}, which transformers loads as no {what}: {first_line(error)}",
            remedy=_DECODER_REMEDY if per_token else _REMEDY,
        ) from error
    missing = sorted(name for name in info.get("missing_keys") or () if not name.startswith("pooler."))
    if missing:
        raise CheckpointError(
            f"{source!r} lacks {len(missing)} tensors of the model, the first is {missing[0]!r}",
            remedy=_DECODER_REMEDY if per_token else None,
        )
    mismatched = sorted(str(entry) for entry in info.get("mismatched_keys") or ())
    if mismatched:
        raise CheckpointError(f"{source!r} has tensors of another shape than config.json says: {mismatched[0]}")
    if getattr(model, "pooler", None) is not None:
        model.pooler = None  # BERT's: made for the first token, and nothing here would use it
    return model.get_encoder() if config.is_encoder_decoder else model


def _language_model(model: PreTrainedModel, name: str) -> PersonalModel:
    """A decoder and its head, which together must give the model's own logits. Raises ConfigError otherwise."""
    layer, config = model.get_output_embeddings(), model.config
    if layer is None or model.base_model is model:
        raise UnsupportedArchitecture(f"{name} has no language-model head that can be told apart", remedy=_REMEDY)
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
            f"{name} ({config.model_type}) does something to its hidden states between decoder and logits that edgefed "
            "does not know",
            remedy="Use another decoder, or join with `task=text`.",
        )
    return PersonalModel(extractor, header, features.shape[-1])


@torch.no_grad()
def _try(extractor: TransformerFeatures, model: nn.Module, name: str) -> Tensor:
    """What the extractor says of a few tokens. Raises UnsupportedArchitecture when it cannot say anything."""
    extractor.eval()
    ids, mask = _probe(_vocabulary(model))
    try:
        return extractor({"input_ids": ids, "attention_mask": mask})
    except (AttributeError, TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UnsupportedArchitecture(
            f"{name} gives no hidden states for tokens alone: {first_line(error)}", remedy=_REMEDY
        ) from error


def _probe(vocab_size: int) -> tuple[Tensor, Tensor]:
    ids = (torch.arange(2 * _PROBE_LENGTH).view(2, _PROBE_LENGTH) * 7 + 3) % vocab_size
    return ids, torch.ones_like(ids)


def _vocabulary(model: PreTrainedModel) -> int:
    return model.get_input_embeddings().num_embeddings


def _limit_length(tokenizer: Any, model: nn.Module, config: PretrainedConfig) -> None:
    """Tokenizers without a word on it would give learned positions more tokens than there are."""
    limit = getattr(config, "max_position_embeddings", None) or 0
    limit = limit if limit > 0 else tokenizer.model_max_length  # XLNet says -1
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name:
            behind_padding = 0 if module.padding_idx is None else module.padding_idx + 1  # where RoBERTa begins
            limit = min(limit, module.num_embeddings - behind_padding)
    tokenizer.model_max_length = min(tokenizer.model_max_length, limit)


@contextlib.contextmanager
def _own_remedy() -> Iterator[None]:
    """What is loaded need be no mixture of experts: say so where the loader would ask for one."""
    try:
        yield
    except (ModelNotFound, UnsupportedArchitecture) as error:
        raise type(error)(str(error), remedy=_REMEDY) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Transformers reports heads that stay behind, and poolers that are not there; neither matters here."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
