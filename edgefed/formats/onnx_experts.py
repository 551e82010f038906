"""The experts of a model in ONNX, for onnxruntime: one product of matrices per expert, or one operator per layer.

``products``: the token-expert pairs are sorted by expert and split, each expert multiplies its own rows by ``MatMul``,
or ``MatMulNBits`` in 8 bits, and experts without tokens cost next to nothing. The activation is that of the model.

``operator``: ``com.microsoft::MoE``, or QMoE in 8 bits. The operator takes router logits, applies a softmax and adds up
the outputs of the k largest. For the weights w (K,) of any router, whatever it normalizes or scales, the logits are
log(w / sum w) of the selected experts and a large negative number for the others, and the output is multiplied by
sum w. Gate and up rows are neighbours (``swiglu_fusion=1``).

Both take INT8 as edgefed trains with it: codes and the absmax of each row. QMoE computes with these weights in float32;
MatMulNBits also rounds its input to 8 bits in blocks, which is what makes it fast.

Tracing yields placeholder nodes without weights. `fill_in` replaces them, and the weights are read when they are
written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers.integrations.moe import ExpertsInterface

from edgefed.errors import ConfigError
from edgefed.formats.weights import MergedModel, Routing
from edgefed.kernels.quantization import quantize_experts
from edgefed.moe.architecture import ExpertLayer, expert_activation, expert_finish
from edgefed.moe.file_tensors import value_of

FORMS = ("products", "operator")
_DOMAIN = "com.microsoft"
_PLACEHOLDER = "edgefed"
_NOT_SELECTED = -1e4
_LARGEST_BLOCK = 128
"""Inputs that MatMulNBits rounds together. 256 is a tenth faster and less exact, 32 a tenth slower."""


def prepare(state: MergedModel, form: str) -> None:
    """Let the model be traced with placeholders for its experts. Raises ConfigError if ``form`` cannot compute them."""
    for layer in state.layers:
        experts: Any = layer.experts
        experts.onnx_layer, experts.onnx_slots, experts.onnx_route = layer, state.num_slots(layer), state.routing(layer)
        experts.onnx_widths = {p.name: _sizes(state, layer, p.name)[1] for p in layer.matrices}
        if form == "operator":
            experts.onnx_attributes = _operator_attributes(layer)
        for parameter in layer.parameters:
            traced = len(parameter.shape) == 1 and form == "products"
            full = f"{layer.experts_path}.{parameter.name}"
            slots = [value_of(state.expert(full, slot)) for slot in range(experts.onnx_slots)] if traced else []
            values = torch.stack(slots) if slots else torch.empty(0)
            experts.register_parameter(parameter.name, nn.Parameter(values, requires_grad=False))
    name = f"edgefed_onnx_{form}"
    ExpertsInterface.register(name, _products if form == "products" else _operator)
    state.module.set_experts_implementation(name)


def _sizes(state: MergedModel, layer: ExpertLayer, matrix: str) -> tuple[int, int]:
    """(in, out) of a matrix of a layer's experts."""
    size_in, size_out = layer.matrix_sizes(matrix)
    width, rows = state.num_neurons(layer), size_out // layer.num_neurons
    return (width, size_out) if matrix == "down_proj" else (size_in, rows * width)


def _placeholder(name: str, layer: ExpertLayer, inputs: list[torch.Tensor], width: int, **attributes: Any) -> Any:
    return torch.onnx.ops.symbolic(
        f"{_PLACEHOLDER}::{name}",
        inputs,
        attrs={"layer": layer.ordinal, **attributes},
        dtype=torch.float32,
        shape=(inputs[0].shape[0], width),
        version=1,
    )


def _products(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute a layer's experts by one product per expert. ``hidden_states``: (T, H); the others: (T, K)."""
    layer: ExpertLayer = self.onnx_layer
    if not self.onnx_slots:
        return torch.zeros_like(hidden_states)
    route: Routing = self.onnx_route
    slots, weights = route(top_k_index, top_k_weights)
    tokens, top_k = slots.shape
    experts, order = torch.sort(slots.flatten())  # (P,), P = T K pairs
    counts = (experts.unsqueeze(1) == torch.arange(self.onnx_slots)).sum(0)  # (S,)
    rows = hidden_states[order // top_k]  # (P, H)
    for name in (layer.up_name, "down_proj"):
        rows = _placeholder("Products", layer, [rows, counts], self.onnx_widths[name], matrix=name)
        if layer.has_bias:
            rows = rows + getattr(self, f"{name}_bias")[experts]
        if name == layer.up_name:
            rows = expert_activation(self)(rows)
    finish = expert_finish(self)
    if finish is not None:
        rows = finish(rows)
    rows = rows * weights.flatten()[order].unsqueeze(1).to(rows.dtype)
    output = torch.zeros_like(rows).index_put((order,), rows)
    return output.view(tokens, top_k, rows.shape[1]).sum(1)


def _operator(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Compute a layer's experts by the operator; see the top of the file. ``hidden_states``: (T, H)."""
    layer: ExpertLayer = self.onnx_layer
    if not self.onnx_slots:
        return torch.zeros_like(hidden_states)
    route: Routing = self.onnx_route
    slots, weights = route(top_k_index, top_k_weights)
    total = weights.sum(-1, keepdim=True)
    tiny = torch.finfo(torch.float32).tiny
    of_slot = torch.zeros(hidden_states.shape[0], self.onnx_slots, dtype=weights.dtype)
    of_slot = of_slot.scatter_add(1, slots, weights / total.clamp_min(tiny))  # experts that were merged share a slot
    logits = torch.where(of_slot > 0, of_slot.clamp_min(tiny).log(), _NOT_SELECTED).to(hidden_states.dtype)
    inputs = [hidden_states, logits]
    attributes = {**self.onnx_attributes, "k": min(slots.shape[1], self.onnx_slots)}
    output: torch.Tensor = _placeholder("Operator", layer, inputs, hidden_states.shape[1], **attributes)
    return output * total.to(output.dtype)


def _operator_attributes(layer: ExpertLayer) -> dict[str, Any]:
    """Attributes of the operator's gating g sigmoid(alpha g) (u + beta), clamped. Raises ConfigError if it differs."""
    experts: Any = layer.experts
    found: dict[str, float] = {"activation_alpha": 1.0, "activation_beta": 0.0}
    if hasattr(experts, "alpha") and hasattr(experts, "limit"):
        found = {"activation_alpha": float(experts.alpha), "activation_beta": 1.0, "swiglu_limit": float(experts.limit)}
    if layer.has_gate and not layer.has_post_expert_norm:
        limit = found.get("swiglu_limit", float("inf"))
        gate, up = torch.linspace(-9, 9, 19), torch.linspace(8, -10, 19)
        joined = torch.stack([gate, up], dim=-1).flatten() if layer.is_interleaved else torch.cat([gate, up])
        with torch.no_grad():
            output = expert_activation(layer.experts)(joined.unsqueeze(0))[0]
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        expected = gate * torch.sigmoid(found["activation_alpha"] * gate) * (up + found["activation_beta"])
        if torch.allclose(output, expected, rtol=1e-5, atol=1e-5):
            fixed = {"activation_type": "swiglu", "swiglu_fusion": 1, "normalize_routing_weights": 0}
            return {**found, **fixed}
    raise ConfigError(
        f"cannot export ONNX: the operator MoE does not compute the activation of {layer.experts_path!r}",
        remedy="Export with products of matrices, which take any activation.",
    )


def fill_in(model: Any, state: MergedModel, *, int8: bool) -> None:
    """Replace the placeholders in ``model`` (`onnx_ir.Model`) by operators with weights, which are read when needed."""
    import onnx_ir as ir

    graph = model.graph
    for node in [node for node in graph if node.domain == _PLACEHOLDER]:
        attributes = {name: attribute.value for name, attribute in node.attributes.items()}
        layer = state.layers[attributes.pop("layer")]
        weights = _Weights(graph, state, layer, int8)
        if node.op_type == "Products":
            nodes = _product_nodes(node, weights, attributes["matrix"])
        else:
            nodes = [_operator_node(node, weights, attributes)]
        output = nodes[-1].outputs[0]
        output.shape, output.dtype = node.outputs[0].shape, node.outputs[0].dtype
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, node.outputs, [output])
    model.opset_imports.pop(_PLACEHOLDER, None)
    model.opset_imports[_DOMAIN] = 1


@dataclasses.dataclass(frozen=True)
class _Weights:
    """Adds the weights of a layer to a graph, unread."""

    graph: Any
    state: MergedModel
    layer: ExpertLayer
    int8: bool

    def rows(self, matrix: str, expert: int, *, interleave: bool = False) -> torch.Tensor:
        """(out, in) float32; with ``interleave``, gate and up rows are neighbours."""
        weight = value_of(self.state.expert(f"{self.layer.experts_path}.{matrix}", expert)).float()
        weight = weight.T if self.layer.is_transposed and weight.ndim == 2 else weight
        if interleave and matrix.startswith(self.layer.up_name) and not self.layer.is_interleaved:
            weight = torch.stack(weight.chunk(2), dim=1).flatten(0, 1)
        return weight.contiguous()

    def codes(self, matrix: str, expert: int, *, interleave: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """(out, in) uint8, of which 128 is zero, and the scale of each row (out,)."""
        quantized = quantize_experts(self.rows(matrix, expert, interleave=interleave).unsqueeze(0), "int8")
        if quantized.absmax is None:
            raise AssertionError("int8 has an absmax of each row")
        return (quantized.packed[0].int() + 128).to(torch.uint8), quantized.absmax[0] / 127

    @property
    def count(self) -> int:
        """Number of experts in the graph."""
        return self.state.num_slots(self.layer)

    def size(self, matrix: str) -> tuple[int, int]:
        """(in, out)."""
        return _sizes(self.state, self.layer, matrix)

    def add(self, name: str, read: Callable[[], torch.Tensor], shape: Sequence[int], dtype: str = "FLOAT") -> Any:
        """Return a new initializer, whose values ``read`` returns."""
        import onnx_ir as ir

        full = f"{self.layer.experts_path}.{name}"
        kind, size = ir.DataType[dtype], ir.Shape(shape)

        def tensor() -> Any:
            values: npt.NDArray[Any] = np.ascontiguousarray(read().numpy())
            return ir.tensor(values, name=full)

        lazy = ir.LazyTensor(tensor, kind, size, name=full)
        value = ir.Value(name=full, shape=size, type=ir.TensorType(kind), const_value=lazy)
        self.graph.register_initializer(value)
        return value


def _product_nodes(node: Any, weights: _Weights, matrix: str) -> list[Any]:
    """Split the rows by expert, multiply, join."""
    import onnx_ir as ir

    count = weights.count
    size_in, size_out = weights.size(matrix)
    split = ir.node("Split", list(node.inputs), {"axis": 0}, num_outputs=count)
    block = min(_LARGEST_BLOCK, max(16, 1 << (size_in - 1).bit_length()))
    blocks = -(-size_in // block)
    attributes = {"K": size_in, "N": size_out, "bits": 8, "block_size": block, "accuracy_level": 4}
    products = []
    for expert in range(count):
        name = f"{expert}.{matrix}"

        def codes(expert: int = expert) -> torch.Tensor:
            found, _ = weights.codes(matrix, expert)
            padded = nn.functional.pad(found, (0, blocks * block - size_in), value=128)
            return padded.view(size_out, blocks, block)

        def scales(expert: int = expert) -> torch.Tensor:
            return weights.codes(matrix, expert)[1].unsqueeze(1).expand(size_out, blocks)

        def columns(expert: int = expert) -> torch.Tensor:
            return weights.rows(matrix, expert).T

        rows = split.outputs[expert]
        if weights.int8:
            inputs = [
                rows,
                weights.add(name, codes, (size_out, blocks, block), "UINT8"),
                weights.add(f"{name}_scales", scales, (size_out, blocks)),
            ]
            products.append(ir.node("MatMulNBits", inputs, attributes, domain=_DOMAIN, version=1))
        else:
            products.append(ir.node("MatMul", [rows, weights.add(name, columns, (size_in, size_out))]))
    return [split, *products, ir.node("Concat", [product.outputs[0] for product in products], {"axis": 0})]


def _operator_node(node: Any, weights: _Weights, attributes: dict[str, Any]) -> Any:
    """MoE or QMoE with the stacks of a layer."""
    import onnx_ir as ir

    layer, inputs = weights.layer, list(node.inputs)
    for matrix in (layer.up_name, "down_proj"):
        size_in, size_out = weights.size(matrix)

        def stack(part: Callable[[int], torch.Tensor]) -> torch.Tensor:
            return torch.stack([part(expert) for expert in range(weights.count)])

        def rows(matrix: str = matrix) -> torch.Tensor:
            return stack(lambda expert: weights.rows(matrix, expert, interleave=True))

        def codes(matrix: str = matrix) -> torch.Tensor:
            return stack(lambda expert: weights.codes(matrix, expert, interleave=True)[0])

        def scales(matrix: str = matrix) -> torch.Tensor:
            return stack(lambda expert: weights.codes(matrix, expert, interleave=True)[1])

        shape = (weights.count, size_out, size_in)
        if weights.int8:
            inputs += [weights.add(matrix, codes, shape, "UINT8"), weights.add(f"{matrix}_scales", scales, shape[:2])]
        else:
            inputs.append(weights.add(matrix, rows, shape))

        def biases(bias: str = f"{matrix}_bias") -> torch.Tensor:
            return rows(bias)

        inputs.append(weights.add(f"{matrix}_bias", biases, shape[:2]) if layer.has_bias else None)
    while inputs[-1] is None:
        inputs.pop()
    kind, bits = ("QMoE", {"expert_weight_bits": 8}) if weights.int8 else ("MoE", {})
    return ir.node(kind, inputs, {**attributes, **bits}, domain=_DOMAIN, version=1)
