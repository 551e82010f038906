"""One measured step corrects the memory model: for other plans it then predicts 1.0 to 1.1 times the measured peak.

The measurement is compared with saved tensors, and with sizes counted tensor by tensor.
"""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from edgefed.costs.activations import static_bytes
from edgefed.costs.memory import Correction, StepSetup, training_memory
from edgefed.costs.shapes import ModelShape
from edgefed.expert_records import ExpertPlan
from edgefed.moe.architecture import discover_layers
from edgefed.moe.model import MoeModel
from edgefed.moe.model_shape import shape_from_config
from edgefed.moe.offloading import OffloadSpace
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.training import calibration
from edgefed.training.calibration import StepMeasurement, correction_from, measure_step
from edgefed.training.savings import make_optimizer
from edgefed.training.steps import take_step

COMMON = dict(
    vocab_size=2048, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
FAMILIES = {
    "mixtral": dict(head_dim=32, intermediate_size=384, num_local_experts=8, num_experts_per_tok=2),
    "deepseek_v3": dict(
        num_key_value_heads=4, intermediate_size=256, moe_intermediate_size=96, n_routed_experts=8, n_shared_experts=1,
        num_experts_per_tok=2, q_lora_rank=48, kv_lora_rank=32, qk_rope_head_dim=16, qk_nope_head_dim=32, v_head_dim=32,
        first_k_dense_replace=1, n_group=2, topk_group=1,
    ),
    "gpt_oss": dict(head_dim=32, intermediate_size=160, num_local_experts=8, num_experts_per_tok=2),
}  # fmt: skip


@dataclasses.dataclass
class Bench:
    """A random model whose plans are trained and measured."""

    model: MoeModel
    shape: ModelShape
    source: MemorySource
    scope: TrainScope
    dtype: str
    offload: OffloadSpace | None = None

    @classmethod
    def of(cls, family: str, dtype: str = "float32", mode: str = "full", device: str = "cpu") -> Bench:
        torch.manual_seed(0)
        config = AutoConfig.for_model(family, **{**COMMON, **FAMILIES[family]})
        module = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        with torch.no_grad():
            module.get_input_embeddings().weight.normal_()  # tokens differ, so that every expert has some
        module.to(device)
        model = MoeModel(module, discover_layers(module), device=torch.device(device))
        scope = TrainScope(experts=mode, lora_rank=4)
        units = {
            unit.key: {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
            for unit, tensors in model.iter_units(scope)
        }
        config.dtype = getattr(torch, dtype)
        return cls(model, shape_from_config(config), MemorySource(units), scope, dtype)

    def setup(self, batch_size: int = 2, sequence_length: int = 128, **how: object) -> StepSetup:
        return StepSetup(
            batch_size,
            sequence_length,
            self.dtype,
            experts=self.scope.experts,
            lora_rank=self.scope.lora_rank,
            **{"kernels": self.model.training_kernels(), **how},
        )

    def apply(self, resident: list[int], trainable: list[int]) -> None:
        plan = ExpertPlan.of(
            self.model.experts_per_layer,
            [range(count) for count in trainable],
            [range(few, many) for few, many in zip(trainable, resident, strict=True)],
        )
        self.model.apply_plan(plan, self.source, self.scope, offload=self.offload)

    def measure(
        self, setup: StepSetup, resident: list[int], trainable: list[int], steps: int = 2
    ) -> list[StepMeasurement]:
        self.apply(resident, trainable)
        parameters = list(self.model.trainable_parameters())
        optimizer = make_optimizer(parameters, "adamw", learning_rate=1e-4, weight_decay=0.0)
        generator = torch.Generator().manual_seed(1)
        shape = (setup.batch_size, setup.sequence_length)
        ids = torch.randint(3, self.shape.vocab_size, shape, generator=generator)
        self.model.module.train()
        found = []
        for _ in range(steps):
            found.append(
                measure_step(
                    self.model,
                    optimizer,
                    lambda: take_step(self.model, optimizer, parameters, ids, ids, setup=setup, max_grad_norm=1.0),
                )
            )
            optimizer.zero_grad(set_to_none=True)
        return found


@pytest.mark.parametrize(
    ("family", "dtype", "mode", "kernels"),
    [
        pytest.param("mixtral", "float32", "full", "auto", marks=pytest.mark.full),
        ("deepseek_v3", "bfloat16", "full", "auto"),
        ("gpt_oss", "float32", "lora", "auto"),
        ("mixtral", "float32", "full", "reference"),
    ],
)
def test_one_step_of_one_plan_corrects_all_plans(family, dtype, mode, kernels, monkeypatch):
    monkeypatch.setenv("EDGEFED_KERNELS", kernels)
    bench = Bench.of(family, dtype, mode)
    layers = len(bench.model.layers)
    reference = bench.setup()
    [first] = bench.measure(reference, [4] * layers, [2] * layers, steps=1)
    correction = correction_from(first, bench.shape, reference)
    assert correction.kernels == reference.kernels == bench.model.training_kernels()
    uneven = ([8, 2, 5][:layers], [3, 1, 5][:layers])
    cases = [
        (reference, [4] * layers, [2] * layers),
        (reference, [8] * layers, [8] * layers),
        (reference, *uneven),
        (bench.setup(1, 256), [2] * layers, [1] * layers),
        (bench.setup(checkpointing=True), [8] * layers, [2] * layers),
        (bench.setup(chunked_loss=True, checkpointing=True), [8] * layers, [8] * layers),
    ]
    for setup, resident, trainable in cases:
        measured = bench.measure(setup, resident, trainable)[-1]
        predicted = training_memory(bench.shape, setup, resident, trainable, correction)
        share = predicted.total_bytes / measured.peak_bytes
        assert 1.0 <= share <= 1.1, (setup, resident, trainable, share)


@pytest.mark.parametrize(("mode", "kernels"), [("full", "auto"), ("full", "reference"), ("lora", "auto")])
def test_a_measured_step_of_offloaded_experts_predicts_other_steps(tmp_path, mode, kernels, monkeypatch):
    """The estimate counts one layer's weights, which are pages of files; the allocator sees the rest."""
    monkeypatch.setenv("EDGEFED_KERNELS", kernels)
    bench = Bench.of("mixtral", mode=mode)
    bench.offload = OffloadSpace(torch.device("cpu"), tmp_path)
    reference, everything = bench.setup(offload=True), [8] * 3
    [first] = bench.measure(reference, everything, everything, steps=1)
    assert first.state_bytes == 0
    assert first.weight_bytes < 0.2 * 3 * 8 * 3 * 128 * 384 * 4
    correction = correction_from(first, bench.shape, reference)
    for how in ({}, {"checkpointing": True}, {"checkpointing": True, "chunked_loss": True}):
        setup = bench.setup(offload=True, **how)
        measured = bench.measure(setup, everything, everything)[-1]
        static = static_bytes(bench.shape, setup, everything, everything)
        layer = static["resident experts"] + static["trainable experts"]
        predicted = training_memory(bench.shape, setup, everything, everything, correction).total_bytes
        assert 1.0 <= predicted / (measured.peak_bytes + layer) <= 1.1, how
        resident = dataclasses.replace(setup, offload=False)
        assert predicted < training_memory(bench.shape, resident, everything, everything, correction).total_bytes


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_measured_bytes_for_backward_are_those_that_autograd_saves(kernels, monkeypatch):
    """The allocator's count, compared with saved-tensor hooks; the difference is below 3 %."""
    monkeypatch.setenv("EDGEFED_KERNELS", kernels)
    bench = Bench.of("mixtral")
    setup = bench.setup()
    [measured] = bench.measure(setup, [8] * 3, [8] * 3, steps=1)
    model = bench.model
    owned = {t.untyped_storage().data_ptr() for t in (*model.module.parameters(), *model.module.buffers())}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.randint(3, 2048, (2, 128), generator=torch.Generator().manual_seed(1))
    model.module.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.module.base_model(input_ids=ids, use_cache=False).last_hidden_state
    expected = sum(saved.values()) + hidden.nbytes
    assert measured.saved_bytes == pytest.approx(expected, rel=0.03)


def test_measured_parts_are_the_counted_ones():
    bench = Bench.of("mixtral")
    first, second = bench.measure(bench.setup(), [4] * 3, [2] * 3)
    expert = 3 * 128 * 384 * 4
    assert first.state_bytes == 0
    assert (first.resident, first.trainable) == ((4, 4, 4), (2, 2, 2))
    router = 128 * 8 * 4
    assert sum(first.gradient_bytes.values()) == 3 * (2 * expert + router)
    assert second.state_bytes == 2 * 3 * (2 * expert + router) + 4 * 3 * (2 * 2 + 1)
    assert all(0 < share < 1 for share in first.trainable_share)
    assert all(0.5 <= share <= 1 for share in first.busier_share)
    assert [layer for layer, _, _ in first.backward] == [2, 1, 0]
    assert first.peak_bytes == max(first.phases.values()) == first.phases["loss"]
    assert second.phases["forward"] > first.phases["forward"], "now with optimizer state"


def test_measuring_changes_nothing():
    """Same losses and same weights as a model that was not measured, and no hook is left."""

    def weights_after(measured: bool) -> list[torch.Tensor]:
        bench = Bench.of("gpt_oss")
        bench.apply([4] * 3, [4] * 3)
        parameters = list(bench.model.trainable_parameters())
        optimizer = make_optimizer(parameters, "adamw", learning_rate=1e-3, weight_decay=0.0)
        ids = torch.arange(3, 131).reshape(1, 128)
        setup = bench.setup(1, 128, checkpointing=True)
        bench.model.module.train()

        def step() -> None:
            take_step(bench.model, optimizer, parameters, ids, ids, setup=setup, max_grad_norm=1.0)

        hooks = _count_hooks(bench.model.module)
        if measured:
            measure_step(bench.model, optimizer, step)
            assert _count_hooks(bench.model.module) == hooks
            assert not optimizer._optimizer_step_pre_hooks
        else:
            step()
        return parameters

    for one, other in zip(weights_after(True), weights_after(False), strict=True):
        assert torch.equal(one, other)


def test_a_step_that_fails_leaves_no_hook():
    bench = Bench.of("mixtral")
    bench.apply([2] * 3, [1] * 3)
    parameters = list(bench.model.trainable_parameters())
    optimizer = make_optimizer(parameters, "adamw", learning_rate=1e-3, weight_decay=0.0)
    hooks = _count_hooks(bench.model.module)

    def step() -> None:
        bench.model.module(input_ids=torch.arange(3, 35).reshape(1, 32), use_cache=False)
        raise MemoryError("the allocator said no")

    with pytest.raises(MemoryError, match="the allocator said no"):
        measure_step(bench.model, optimizer, step)
    assert _count_hooks(bench.model.module) == hooks
    bench.measure(bench.setup(), [2] * 3, [1] * 3, steps=1)  # the next step can be measured


def test_nothing_is_written_to_the_terminal(capfd):
    Bench.of("mixtral").measure(StepSetup(1, 32, "float32"), [2] * 3, [1] * 3, steps=1)
    written = capfd.readouterr()
    assert written.out == ""
    assert "USDT" not in written.err
    assert "profil" not in written.err


def test_a_process_that_cannot_reset_its_peak_says_so(monkeypatch):
    monkeypatch.setattr(calibration, "reset_peak_rss", lambda: False)
    [measured] = Bench.of("mixtral").measure(StepSetup(1, 32, "float32"), [2] * 3, [1] * 3, steps=1)
    assert measured.process_bytes is None
    assert "clear_refs" in measured.process_note
    correction = correction_from(measured, Bench.of("mixtral").shape, StepSetup(1, 32, "float32"))
    assert correction.process_bytes == 0


def test_a_correction_survives_json():
    correction = Correction(0.9, 0, "a test", expert_scale=1.1, trainable_tokens=1.4, process_bytes=7)
    assert msgspec.json.decode(msgspec.json.encode(correction), type=Correction) == correction


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_reads_its_own_allocator():
    bench = Bench.of("mixtral", device="cuda")
    [first] = bench.measure(bench.setup(device="cuda"), [4] * 3, [2] * 3, steps=1)
    assert first.device.startswith("cuda")
    assert first.process_bytes is None
    assert 0 < first.weight_bytes < first.peak_bytes


def _count_hooks(module: torch.nn.Module) -> int:
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())
