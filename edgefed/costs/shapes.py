"""The sizes of a Mixture-of-Experts model that determine its memory, from its configuration alone.

`shape_from_config` builds the model on the meta device and counts its tensors, so it is right for every model that
transformers can build: dense layers among MoE layers, shared experts, biases, tied embeddings, Mamba and convolution
layers. `KNOWN_SHAPES` are constants, so that a device can find out what fits before anything is downloaded.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from edgefed.moe.architecture import ExpertLayer, ExpertParameter
    from edgefed.moe.units import FixedTensors, TensorPlace

Matrix = tuple[int, int]
"""(in, out)."""


@dataclasses.dataclass(frozen=True)
class LayerShape:
    """One decoder layer. Sizes are numbers of elements, not bytes.

    Attributes:
        mixer_width: Outputs per token of all projections of the attention, or of the Mamba or convolution block that
            replaces it.
        num_heads: Attention heads, 0 without attention.
        linear_parameters: Matrices outside experts and router, which could be quantised.
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


def shape_from_config(config: PretrainedConfig, name: str | None = None) -> ModelShape:
    """The shape of the model that a transformers configuration describes; its tensors take no memory.

    Raises UnsupportedArchitecture when it has no experts that edgefed can take apart.
    """
    from edgefed.moe.architecture import discover_layers
    from edgefed.moe.loading import build_skeleton
    from edgefed.moe.units import find_fixed_tensors

    module = build_skeleton(config)
    experts = discover_layers(module)
    text = module.config.get_text_config()
    main = experts[0].parameters[0].dtype
    counts = {path: _LayerCount(path) for path in decoder_layer_paths(module, experts)}
    for layer in experts:
        found = _layer_of(counts, layer.experts_path)
        assert found is not None, "experts are in a decoder layer"
        found.experts = layer
    get_output: Callable[[], Any] = module.get_output_embeddings
    embeddings = {id(e.weight) for e in (module.get_input_embeddings(), get_output()) if e}
    own_dtype_bytes = sum(buffer.numel() * buffer.element_size() for buffer in module.buffers())
    embedding_parameters, elsewhere = 0, 0
    for unit in find_fixed_tensors(module, experts).values():
        for place in unit.places.values():
            tensor, count = place.get(), _layer_of(counts, place.full_name)
            if place.is_buffer:
                continue
            own_dtype_bytes += tensor.numel() * (tensor.element_size() - main.itemsize)
            if count:
                count.add(unit, place)
            elif id(tensor) in embeddings:
                embedding_parameters += tensor.numel()
            else:
                elsewhere += tensor.numel()
    layers = tuple(count.shape(text) for count in counts.values())
    matrices = [matrix for layer in layers for matrix in layer.expert_matrices]
    matrices += [matrix for count in counts.values() for matrix in count.matrices]
    return ModelShape(
        name=name or text.model_type,
        hidden_size=text.hidden_size,
        vocab_size=text.vocab_size,
        layers=layers,
        embedding_parameters=embedding_parameters,
        other_parameters=elsewhere,
        largest_matrix=max(size_in * size_out for size_in, size_out in matrices),
        own_dtype_bytes=own_dtype_bytes,
        scores=_scores(module, text),
        masks=len(set(getattr(text, "layer_types", None) or ["full_attention"])) if _is_eager(module) else 0,
    )


def _scores(module: nn.Module, config: PretrainedConfig) -> str:
    if _is_eager(module):
        return "dtype" if any(name.endswith(".sinks") for name, _ in module.named_parameters()) else "both"
    value = getattr(config, "v_head_dim", None)
    query = (getattr(config, "qk_nope_head_dim", None) or 0) + (getattr(config, "qk_rope_head_dim", None) or 0)
    return "float32" if value and query and value != query else ""


def _is_eager(module: nn.Module) -> bool:
    return getattr(module.config, "_attn_implementation", None) == "eager"


def decoder_layer_paths(module: nn.Module, experts: Iterable[ExpertLayer]) -> list[str]:
    """Paths of all decoder layers, in order: the members of the lists that MoE blocks are in."""
    paths: dict[str, None] = {}
    for layer in experts:
        parts = layer.block_path.split(".")
        stack = next(".".join(parts[:i]) for i, part in enumerate(parts) if part.isdecimal())
        paths.update(
            (f"{stack}.{index}", None) for index in range(len(cast("nn.ModuleList", module.get_submodule(stack))))
        )
    return list(paths)


_MIXER = re.compile("attn|attention|mamba|conv|ssm|mixer|delta|lightning", re.IGNORECASE)


class _LayerCount:
    """Adds up the tensors of one decoder layer."""

    def __init__(self, path: str):
        self.path = path
        self.experts: ExpertLayer | None = None
        self.matrices: list[Matrix] = []
        self._mixer_width = self._dense_width = self._other = self._scan_states = 0
        self._router_vectors: list[int] = []
        self._attention: list[Matrix] = []
        self._router: list[Matrix] = []

    def add(self, fixed: FixedTensors, place: TensorPlace) -> None:
        tensor = place.get()
        if fixed.unit.kind == "router":
            self._other += tensor.numel()
            if place.learnable and tensor.ndim == 2:
                self._router.append((tensor.shape[1], tensor.shape[0]))
            elif place.learnable:
                self._router_vectors.append(tensor.numel())
        elif tensor.ndim != 2:
            self._other += tensor.numel()
        else:
            size_out, size_in = tensor.shape
            if place.full_name.endswith(".A_log"):
                self._scan_states += tensor.numel()
            self.matrices.append((size_in, size_out))
            if fixed.is_attention:
                self._attention.append((size_in, size_out))
            if self._is_mixer(place.full_name):
                self._mixer_width += size_out
            elif "down" not in place.full_name.rpartition(".")[0].rpartition(".")[2]:
                self._dense_width += size_out

    def _is_mixer(self, full_name: str) -> bool:
        """Whether a matrix belongs to attention or what stands for it.

        A MoE block may itself be called a mixer, and a whole decoder layer may be a MoE block.
        """
        block = self.experts.block_path if self.experts else self.path
        if block != self.path and full_name.startswith(f"{block}."):
            return False
        return any(_MIXER.search(part) for part in full_name[len(self.path) + 1 :].split(".")[:-1])

    def shape(self, config: PretrainedConfig) -> LayerShape:
        experts = self.experts
        biases: tuple[int, ...] = ()
        matrices: tuple[Matrix, ...] = ()
        if experts:
            matrices = tuple(experts.input_output_sizes(parameter) for parameter in _up_first(experts))
            biases = tuple(parameter.shape[0] for parameter in experts.parameters if len(parameter.shape) == 1)
        return LayerShape(
            mixer_width=self._mixer_width,
            num_heads=(getattr(config, "num_attention_heads", None) or 0) if self._attention else 0,
            linear_parameters=sum(size_in * size_out for size_in, size_out in self.matrices),
            other_parameters=self._other,
            dense_width=self._dense_width,
            attention_matrices=tuple(self._attention),
            router_matrices=tuple(self._router),
            router_vectors=tuple(self._router_vectors),
            num_experts=experts.num_experts if experts else 0,
            top_k=experts.top_k if experts else 0,
            expert_matrices=matrices,
            expert_biases=biases,
            kept_by_gate=_kept_by_gate(experts, matrices) if experts else 3.0,
            scan_states=self._scan_states,
            is_transposed=experts.is_transposed if experts else False,
        )


def _kept_by_gate(layer: ExpertLayer, matrices: Sequence[Matrix]) -> float:
    """Measured on a stand-in: what autograd saves of one activation, each storage once."""
    import torch

    rows, (_, size), (width, _) = 8, *matrices
    up = torch.zeros(rows, size, requires_grad=True)
    saved = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), torch.enable_grad():
        experts = cast(Any, layer.experts)
        kept = (experts._apply_gate if layer.has_gate else experts.act_fn)(up)  # noqa: F841 (it references the graph)
    return sum(saved.values()) / (4 * rows * width)


def _up_first(layer: ExpertLayer) -> list[ExpertParameter]:
    return sorted(layer.matrices, key=lambda parameter: parameter.name != layer.up_name)


def _layer_of(counts: Mapping[str, _LayerCount], full_name: str) -> _LayerCount | None:
    return next((count for path, count in counts.items() if full_name.startswith(f"{path}.")), None)
