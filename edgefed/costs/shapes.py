"""The sizes of a Mixture-of-Experts model that determine the memory and time of a training step.

`edgefed.moe.model_shape.shape_from_config` counts them for any model of transformers. `KNOWN_SHAPES` are constants, so
that a device knows what fits before anything is downloaded.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType

Matrix = tuple[int, int]
"""(in, out)."""


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One decoder layer. Sizes are numbers of elements, not bytes.

    Attributes:
        mixer_width: Outputs per token of all projections of the attention, or of the Mamba or convolution block that
            replaces it.
        num_heads: Attention heads, 0 without attention.
        linear_parameters: Matrices outside experts and router, which could be quantized.
        other_parameters: Norms, biases, router.
        dense_width: As ``mixer_width``, of a dense MLP and of shared experts, without the down projection.
        attention_matrices: Matrices of the attention that can train or have adapters.
        router_matrices: The same of the router.
        router_vectors: Sizes of the vectors that train with the router.
        num_experts: Experts, 0 in a dense layer.
        top_k: Experts per token.
        expert_matrices: Matrices of one expert, the up projection first.
        expert_biases: Sizes of an expert's biases.
        kept_by_gate: Elements that an expert's activation keeps for its backward pass, per unit of its width, including
            its input: 3 for SwiGLU, 1 without a gate.
        scan_states: State elements per token of a selective scan (Mamba's ``A_log``, inner width by states).
        is_transposed: Matrices of experts are stored (in, out).
    """

    mixer_width: int
    num_heads: int
    linear_parameters: int
    other_parameters: int
    dense_width: int = 0
    attention_matrices: tuple[Matrix, ...] = ()
    router_matrices: tuple[Matrix, ...] = ()
    router_vectors: tuple[int, ...] = ()
    num_experts: int = 0
    top_k: int = 0
    expert_matrices: tuple[Matrix, ...] = ()
    expert_biases: tuple[int, ...] = ()
    kept_by_gate: float = 3.0
    scan_states: int = 0
    is_transposed: bool = False

    @property
    def expert_width(self) -> int:
        """I, the input size of the down projection."""
        return self.expert_matrices[-1][0] if self.expert_matrices else 0

    def sliced(self, share: float) -> LayerShape:
        """The layer with experts that have a ``share`` (0, 1] of their neurons each, rounded up."""
        width = self.expert_width
        if not width or share >= 1:
            return self
        left = max(1, math.ceil(share * width - 1e-9))
        (size_in, size_up), (_, size_out) = self.expert_matrices[0], self.expert_matrices[-1]
        up = size_up // width * left
        biases = (up, *self.expert_biases[1:]) if self.expert_biases else ()
        return dataclasses.replace(self, expert_matrices=((size_in, up), (left, size_out)), expert_biases=biases)

    @property
    def parameters_per_expert(self) -> int:
        """Elements of one expert."""
        return sum(size_in * size_out for size_in, size_out in self.expert_matrices) + sum(self.expert_biases)


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """A model.

    Attributes:
        name: Its name.
        hidden_size: H.
        vocab_size: V.
        layers: All decoder layers.
        embedding_parameters: Input and output embedding, counted once if tied.
        other_parameters: Parameters outside the layers (last norm).
        largest_matrix: Elements of the largest matrix in a layer.
        own_dtype_bytes: Bytes of buffers, and of parameters whose dtype is not the model's.
        scores: How attention keeps a (tokens, sequence) matrix per head: "dtype" in the model's dtype (eager attention
            with sinks), "float32" (torch's on a CPU if values and queries differ in width), "both" (other eager
            attention), "" not at all.
        masks: Attention masks (tokens, sequence) in the model's dtype, one per kind of attention layer.
    """

    name: str
    hidden_size: int
    vocab_size: int
    layers: tuple[LayerShape, ...]
    embedding_parameters: int
    other_parameters: int
    largest_matrix: int
    own_dtype_bytes: int = 0
    scores: str = ""
    masks: int = 0

    @property
    def moe_layers(self) -> tuple[LayerShape, ...]:
        """The layers with experts."""
        return tuple(layer for layer in self.layers if layer.num_experts)

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Experts of each MoE layer."""
        return tuple(layer.num_experts for layer in self.moe_layers)

    def sliced(self, shares: Sequence[float]) -> ModelShape:
        """The model with slices of experts; ``shares`` of their neurons that the experts of each MoE layer have."""
        left = iter(shares)
        layers = tuple(layer.sliced(next(left)) if layer.num_experts else layer for layer in self.layers)
        return dataclasses.replace(self, layers=layers)

    @property
    def num_experts(self) -> int:
        """Of the largest MoE layer."""
        return max(self.experts_per_layer)

    @property
    def top_k(self) -> int:
        """Most experts per token of any layer."""
        return max(layer.top_k for layer in self.moe_layers)

    @property
    def num_parameters(self) -> int:
        """All of them, the experts included."""
        return self.dense_parameters + sum(layer.num_experts * layer.parameters_per_expert for layer in self.layers)

    @property
    def dense_parameters(self) -> int:
        """Everything but the routed experts."""
        layers = sum(layer.linear_parameters + layer.other_parameters for layer in self.layers)
        return self.embedding_parameters + self.other_parameters + layers


def uniform_shape(
    name: str,
    *,
    hidden_size: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    vocab_size: int,
    num_experts: int,
    top_k: int,
    expert_width: int,
    shared_width: int = 0,
    attention_vectors: int = 0,
    router_biases: tuple[int, ...] = (),
    shared_gate: int = 0,
    expert_biases: tuple[int, ...] = (),
    scores: str = "",
    masks: int = 0,
    kept_by_gate: float = 3.0,
    is_transposed: bool = False,
) -> ModelShape:
    """A model of equal layers, each with attention and gated experts, and untied embeddings."""
    heads, kv = num_heads * head_dim, num_kv_heads * head_dim
    attention = ((hidden_size, heads), (hidden_size, kv), (hidden_size, kv), (heads, hidden_size))
    shared = 3 * hidden_size * shared_width
    layer = LayerShape(
        mixer_width=heads + 2 * kv + hidden_size,
        num_heads=num_heads,
        linear_parameters=sum(i * o for i, o in attention) + shared + shared_gate,
        other_parameters=2 * hidden_size + attention_vectors + hidden_size * num_experts + sum(router_biases),
        dense_width=2 * shared_width,
        attention_matrices=attention,
        router_matrices=((hidden_size, num_experts),),
        router_vectors=router_biases,
        num_experts=num_experts,
        top_k=top_k,
        expert_matrices=((hidden_size, 2 * expert_width), (expert_width, hidden_size)),
        expert_biases=expert_biases,
        kept_by_gate=kept_by_gate,
        is_transposed=is_transposed,
    )
    return ModelShape(
        name=name,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        layers=(layer,) * num_layers,
        embedding_parameters=2 * vocab_size * hidden_size,
        other_parameters=hidden_size,
        largest_matrix=max(i * o for i, o in (*layer.expert_matrices, *attention, (hidden_size, shared_width))),
        scores=scores,
        masks=masks,
    )


KNOWN_SHAPES: Mapping[str, ModelShape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            uniform_shape(
                "OLMoE-1B-7B", hidden_size=2048, num_layers=16, num_heads=16, num_kv_heads=16, head_dim=128,
                vocab_size=50304, num_experts=64, top_k=8, expert_width=1024, attention_vectors=2 * 2048,
            ),
            uniform_shape(
                "Qwen1.5-MoE-A2.7B", hidden_size=2048, num_layers=24, num_heads=16, num_kv_heads=16, head_dim=128,
                vocab_size=151936, num_experts=60, top_k=4, expert_width=1408, shared_width=5632,
                attention_vectors=3 * 2048, shared_gate=2048,
            ),
            uniform_shape(
                "gpt-oss-20b", hidden_size=2880, num_layers=24, num_heads=64, num_kv_heads=8, head_dim=64,
                vocab_size=201088, num_experts=32, top_k=4, expert_width=2880,
                attention_vectors=4096 + 2 * 512 + 2880 + 64, router_biases=(32,), expert_biases=(2 * 2880, 2880),
                scores="dtype", masks=2, kept_by_gate=6.0, is_transposed=True,
            ),
            uniform_shape(
                "Qwen3-30B-A3B", hidden_size=2048, num_layers=48, num_heads=32, num_kv_heads=4, head_dim=128,
                vocab_size=151936, num_experts=128, top_k=8, expert_width=768, attention_vectors=2 * 128,
            ),
            uniform_shape(
                "Mixtral-8x7B", hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128,
                vocab_size=32000, num_experts=8, top_k=2, expert_width=14336,
            ),
        )
    }
)  # fmt: skip
"""Well-known models by name, as their configurations on the hub say."""
