"""What llama.cpp knows of a model: its architectures, their parameters in a GGUF file, and what they cannot compute."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

from edgefed.errors import ConfigError
from edgefed.moe.architecture import ExpertLayer

REMEDY = "Export with `format=hf`."


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A graph of llama.cpp. ``name``: in ``gguf.MODEL_ARCH``.

    ``rotates_neighbours``: rotary embeddings rotate channels 2 i and 2 i + 1, where transformers rotates i and i + D/2.
    ``interleaved``: gate and up rows of transformers are neighbours. ``normalizes``: whether the graph normalizes the
    weights of the selected experts; None: as the file says. ``leading_dense``: the first layers may have no experts.
    ``windows``: it knows sliding windows. ``equal_heads``: it takes as many key heads as query heads.
    """

    name: str
    rotates_neighbours: bool = False
    interleaved: bool = False
    normalizes: bool | None = None
    leading_dense: bool = False
    windows: bool = False
    latent_attention: bool = False
    equal_heads: bool = False

    def rotated_heads(self, full: str, config: Any) -> int:
        """Heads whose rows are reordered in a parameter of transformers; 0: none."""
        if not self.rotates_neighbours or self.latent_attention:
            return 0
        heads = config.num_attention_heads
        for name, count in (("q_proj", heads), ("k_proj", config.num_key_value_heads or heads)):
            if re.search(rf"\.self_attn\.{name}\.(weight|bias)$", full):
                return int(count)
        return 0


ARCHITECTURES = {
    "olmoe": Architecture("OLMOE", normalizes=False, equal_heads=True),
    "mixtral": Architecture("LLAMA", rotates_neighbours=True, normalizes=True),
    "qwen2_moe": Architecture("QWEN2MOE", normalizes=False),
    "qwen3_moe": Architecture("QWEN3MOE", normalizes=True),
    "deepseek_v2": Architecture("DEEPSEEK2", rotates_neighbours=True, leading_dense=True, latent_attention=True),
    "deepseek_v3": Architecture("DEEPSEEK2", rotates_neighbours=True, leading_dense=True, latent_attention=True),
    "gpt_oss": Architecture("GPT_OSS", interleaved=True, windows=True),
}
"""Model type of transformers -> graph of llama.cpp."""
_LITE_LAYERS = (26, 27)
"""Layers by which llama.cpp knows a DeepSeek without a low-rank query projection (V2-Lite)."""


def check_model(config: Any, layers: Sequence[ExpertLayer]) -> Architecture:
    """Return the graph of a model. Raises ConfigError if llama.cpp has none that computes the same."""
    kind = config.model_type
    architecture = ARCHITECTURES.get(kind)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"cannot export GGUF: model type {kind!r} is not one of {known}", remedy=REMEDY)
    get = _getter(config)
    dense = [number for number in range(config.num_hidden_layers) if f".{number}." not in _paths(layers)]
    leading = get("first_k_dense_replace", 0) if architecture.leading_dense else 0
    normalizes = architecture.normalizes
    rope = config.rope_parameters
    reasons = {
        f"its layers {dense} have no experts": dense != list(range(leading)),
        f"norm_topk_prob is {get('norm_topk_prob')}, which its graph does not have": normalizes is not None
        and bool(get("norm_topk_prob", normalizes)) != normalizes,
        f"clip_qkv is {get('clip_qkv')}": get("clip_qkv") is not None,
        f"sliding_window is {get('sliding_window')}": not architecture.windows
        and get("use_sliding_window", True)
        and 0 < (get("sliding_window") or 0) < config.max_position_embeddings,
        f"{config.num_key_value_heads} key heads for {config.num_attention_heads} query heads": architecture.equal_heads
        and config.num_key_value_heads not in (None, config.num_attention_heads),
        f"q_lora_rank is None in {config.num_hidden_layers} layers": architecture.latent_attention
        and config.q_lora_rank is None
        and config.num_hidden_layers not in _LITE_LAYERS,
        f"hidden_act is {config.hidden_act!r}": config.hidden_act != "silu",
        f"topk_method is {get('topk_method')!r}": kind == "deepseek_v2" and get("topk_method", "greedy") != "greedy",
        "rope_interleave is False": kind == "deepseek_v3" and not get("rope_interleave", True),
        f"rope_type is {rope.get('rope_type')!r}": rope.get("rope_type", "default")
        not in ("default", "linear", "yarn"),
        "rotary embeddings cover a part of a head": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    reason = next((text for text, found in reasons.items() if found), None)
    if reason:
        raise ConfigError(f"cannot export GGUF: llama.cpp does not compute this model: {reason}", remedy=REMEDY)
    return architecture


def write_parameters(writer: Any, config: Any, architecture: Architecture, gguf: Any) -> None:
    """Add the model's parameters to a ``gguf.GGUFWriter``."""
    get = _getter(config)
    heads = config.num_attention_heads
    head_size = get("head_dim") or config.hidden_size // heads
    experts = get("num_local_experts") or get("num_experts") or get("n_routed_experts")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_expert_count(experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if architecture.latent_attention:
        _write_latent(writer, config, gguf)
    else:
        writer.add_head_count_kv(config.num_key_value_heads or heads)
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)
        writer.add_rope_dimension_count(head_size)
    if width := get("moe_intermediate_size") or (architecture.windows and config.intermediate_size):
        writer.add_expert_feed_forward_length(width)
    if width := get("shared_expert_intermediate_size"):
        writer.add_expert_shared_feed_forward_length(width)
    if architecture.windows:
        writer.add_sliding_window(config.sliding_window)
    _write_rope(writer, config.rope_parameters, gguf)


def _write_latent(writer: Any, config: Any, gguf: Any) -> None:
    """Multi-head latent attention, whose keys and values are one head of the latent size, and DeepSeek's router."""
    get = _getter(config)
    sigmoid = config.model_type == "deepseek_v3"
    gating = gguf.ExpertGatingFuncType
    writer.add_head_count_kv(1)
    writer.add_leading_dense_block_count(get("first_k_dense_replace", 0))
    if config.q_lora_rank is not None:
        writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(bool(sigmoid and get("norm_topk_prob", False)))
    writer.add_expert_gating_func(gating.SIGMOID if sigmoid else gating.SOFTMAX)
    if sigmoid:
        writer.add_expert_group_count(config.n_group)
        writer.add_expert_group_used_count(config.topk_group)
    if (scale := config.rope_parameters.get("mscale_all_dim")) is not None:
        writer.add_rope_scaling_yarn_log_mul(0.1 * scale)


def _write_rope(writer: Any, rope: dict[str, Any], gguf: Any) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType[kind.upper()])
    writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        fields: dict[str, Callable[[float], None]] = {
            "attention_factor": writer.add_rope_scaling_yarn_attn_factor,
            "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
            "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
        }
        for name, add in fields.items():
            if rope.get(name) is not None:
                add(rope[name])


def _getter(config: Any) -> Callable[..., Any]:
    return lambda name, default=None: getattr(config, name, default)


def _paths(layers: Sequence[ExpertLayer]) -> str:
    return " ".join(layer.experts_path for layer in layers)
