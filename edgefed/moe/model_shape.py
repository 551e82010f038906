"""Count the sizes of a model (`edgefed.costs.shapes.ModelShape`) from its configuration alone.

`shape_from_config` builds the model on the meta device and counts its tensors. It therefore covers every model that
transformers can build: dense layers among MoE layers, shared experts, biases, tied embeddings, Mamba and convolution
layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn
from transformers import PretrainedConfig

from edgefed.costs.shapes import LayerShape, Matrix, ModelShape
from edgefed.moe.architecture import ExpertLayer, ExpertParameter, discover_layers
from edgefed.moe.loading import build_skeleton
from edgefed.moe.units import FixedTensors, TensorPlace, find_fixed_tensors


def shape_from_config(config: PretrainedConfig, name: str | None = None) -> ModelShape:
    """The shape of the model that a transformers configuration describes; its tensors take no memory.

    Raises UnsupportedArchitecture when it has no experts that edgefed can take apart.
    """
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
            (f"{stack}.{index}", None) for index in range(len(cast(nn.ModuleList, module.get_submodule(stack))))
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
