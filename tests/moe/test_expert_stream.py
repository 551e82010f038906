"""Streamed frozen experts compute the same as resident ones, bit for bit, one layer in memory at a time."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import set_checkpoint_early_stop

from edgefed.costs.memory import StepSetup
from edgefed.expert_records import ExpertPlan, Role
from edgefed.moe.accounting import expert_memory
from edgefed.moe.expert_stream import ExpertStream, StagedCopies
from edgefed.moe.model import MoeModel
from edgefed.moe.offloading import OffloadSpace
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.training.savings import checkpointing, make_optimizer
from edgefed.training.steps import take_step

CPU = torch.device("cpu")
LAYERS = 5
TRAINABLE, FROZEN = [[0, 5]] * LAYERS, [[1, 2, 6, 7]] * LAYERS
"""Five layers: more than the two buffers of a GPU."""


@pytest.fixture(scope="module")
def deep(save_toy, tmp_path_factory):
    return save_toy("olmoe", tmp_path_factory.mktemp("deep"), num_hidden_layers=LAYERS)


def stream_in(folder: Path | None, copies: bool | None, device=CPU) -> ExpertStream:
    return ExpertStream(OffloadSpace(device, folder, copies=copies))


def trained(
    toy, scope, offload, storage=None, kernels="reference", checkpointing=False, steps=3, device=CPU, frozen=FROZEN,
    plan=None,
):  # fmt: skip
    """(model, losses): some steps, each with a pass without gradients before it, as of an evaluation."""
    units = toy.units(scope)
    model, source = MoeModel.skeleton(toy.folder, device=device), MemorySource(units)
    for spec in model.unit_infos():
        if spec.kind != "expert":
            model.load_unit(spec.key, units[spec.key])
    plan = plan or ExpertPlan.of(model.experts_per_layer, TRAINABLE, frozen)
    model.apply_plan(plan, source, scope, storage=storage, offload=offload)
    parameters = model.trainable_parameters()
    optimizer = make_optimizer(parameters, "adamw", learning_rate=0.05, weight_decay=0.1)
    setup = StepSetup(2, 10, "float32", experts=scope.experts, checkpointing=checkpointing, kernels=kernels)
    input_ids = toy.input_ids.to(device)
    losses = []
    for _ in range(steps):
        model.module.eval()
        with torch.no_grad():
            losses.append(float(model.module(input_ids, labels=input_ids).loss))
        model.module.train()
        loss, _ = take_step(model, optimizer, parameters, input_ids, input_ids, setup=setup, max_grad_norm=0.5)
        losses.append(loss)
        optimizer.zero_grad(set_to_none=True)
    return model, losses


def values(model):
    return {(spec.key, name): value.clone() for spec, unit in model.trained_units() for name, value in unit.items()}


PLACES = ("files", "files, copied", "host memory, copied")
BY_DEFAULT = {
    ("files", "lora", "nf4", "native"),
    ("files", "full", None, "reference"),
    ("files, copied", "full", "int8", "native"),
    ("host memory, copied", "lora", "nf4", "reference"),
}
CASES = [
    pytest.param(*case, marks=() if case in BY_DEFAULT else pytest.mark.full)
    for case in itertools.product(PLACES, ("full", "lora"), (None, "nf4", "int8"), ("reference", "native"))
]


@pytest.mark.parametrize(("place", "mode", "storage", "kernels"), CASES)
def test_training_is_bit_for_bit_that_of_resident_experts(deep, tmp_path, monkeypatch, place, mode, storage, kernels):
    """Copies are what a GPU has: two buffers, of which a layer's content changes while the other one computes."""
    monkeypatch.setenv("EDGEFED_KERNELS", kernels)
    scope = TrainScope(experts=mode)
    expected, losses = trained(deep, scope, None, storage, kernels)
    stream = stream_in(tmp_path if "files" in place else None, "copied" in place)
    found, own_losses = trained(deep, scope, stream, storage, kernels)
    assert own_losses == losses
    assert losses[-1] < losses[0]
    first, second = values(expected), values(found)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert found.streamed_layers == LAYERS
    assert not found.offloads


@pytest.mark.parametrize("copies", [False, True])
def test_checkpointing_runs_a_streamed_layer_again_in_its_backward_pass(deep, tmp_path, copies):
    scope = TrainScope(experts="lora")
    expected, losses = trained(deep, scope, None, "nf4", checkpointing=True)
    found, own_losses = trained(deep, scope, stream_in(tmp_path, copies), "nf4", checkpointing=True)
    assert own_losses == losses
    first, second = values(expected), values(found)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch can use")
@pytest.mark.parametrize("place", ["files", "host memory"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_on_a_gpu_copies_overlap_and_the_losses_are_those_of_resident_experts(deep, tmp_path, place, checkpointing):
    scope, cuda = TrainScope(experts="lora"), torch.device("cuda")
    _, expected = trained(deep, scope, None, "nf4", checkpointing=checkpointing, device=cuda)
    stream = stream_in(tmp_path if place == "files" else None, None, cuda)
    model, found = trained(deep, scope, stream, "nf4", checkpointing=checkpointing, device=cuda)
    assert found == pytest.approx(expected, rel=1e-4)
    assert {buffer.device.type for buffer in model.bank(0).buffers()} == {"cpu", "cuda"}


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_memory_is_that_of_what_trains(deep, tmp_path, mode):
    scope = TrainScope(experts=mode)
    whole, _ = trained(deep, scope, None, "nf4", steps=1)
    streamed, _ = trained(deep, scope, stream_in(tmp_path, copies=False), "nf4", steps=1)
    trainable = sum(p.nbytes for layer in range(LAYERS) for p in streamed.bank(layer).parameters() if p.requires_grad)
    assert expert_memory(streamed.layers).weight_bytes == trainable < expert_memory(whole.layers).weight_bytes
    assert streamed.memory_bytes()["dense"] == whole.memory_bytes()["dense"]
    assert not list(tmp_path.iterdir()), "the files have no name, though they are in use"


def mapped_in(folder):
    """Number of files in a folder that have pages in this process's memory."""
    files, number = set(), ""
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line[0].isupper():
            number = line.split()[4] if f"{folder}/" in line else ""
        elif number and line.startswith("Rss:") and int(line.split()[1]):
            files.add(number)
    return len(files)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("mode", ["lora", "full"])
@pytest.mark.parametrize(("checkpointed", "early_stop"), [(False, True), (True, True), (True, False)])
def test_only_the_layer_that_computes_is_mapped(deep, tmp_path, checkpointed, early_stop, mode):
    scope, stream = TrainScope(experts=mode), stream_in(tmp_path, copies=False)
    model, _ = trained(deep, scope, stream, "nf4", steps=1)
    per_layer = mapped_in(tmp_path)  # of the first layer, which the backward pass used last
    assert 0 < per_layer < 12
    seen = []
    for layer in model.layers:
        layer.experts.register_forward_hook(lambda *_: seen.append(mapped_in(tmp_path)))
    with checkpointing(model.module, checkpointed), set_checkpoint_early_stop(early_stop):  # a measured step does not
        loss = model.module(deep.input_ids, labels=deep.input_ids).loss
        for layer in model.layers:
            layer.router.register_full_backward_hook(lambda *_: seen.append(mapped_in(tmp_path)))
        loss.backward()
    assert max(seen) <= per_layer, seen


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_backward_pass_releases_what_it_reads_of_offloaded_experts(deep, tmp_path, checkpointed):
    scope, space = TrainScope(experts="full"), OffloadSpace(CPU, tmp_path, copies=False)
    model, _ = trained(deep, scope, space, steps=1)
    with checkpointing(model.module, checkpointed):
        model.module(deep.input_ids, labels=deep.input_ids).loss.backward()
    weights = len({value.untyped_storage().data_ptr() for value in model.bank(0).parameters()})
    assert mapped_in(tmp_path) <= weights, "of the first layer, whose input has no gradient, at most"


def test_a_layer_without_frozen_experts_among_streamed_ones(deep, tmp_path):
    scope = TrainScope()
    model, source = deep.device(deep.units(scope))
    frozen = [[]] + FROZEN[1:]
    model.apply_plan(
        ExpertPlan.of(model.experts_per_layer, TRAINABLE, frozen), source, scope, offload=stream_in(tmp_path, False)
    )
    loss = model.module(deep.input_ids, labels=deep.input_ids).loss
    loss.backward()
    assert loss.isfinite()


UNEVEN = [[1, 2, 6, 7], [1], [1, 2, 3, 4, 6, 7], [1, 2], [6, 7]]


def test_some_layers_stream_through_two_buffers_of_the_largest(deep, tmp_path):
    """Layers in between are in memory. With different numbers of frozen experts, layers still share the buffers."""
    scope, layers = TrainScope(), [1, 2, 4]
    expected, losses = trained(deep, scope, None, "nf4", frozen=UNEVEN, checkpointing=True)
    stream = ExpertStream(OffloadSpace(CPU, None, copies=True), layers)
    found, own_losses = trained(deep, scope, stream, "nf4", frozen=UNEVEN, checkpointing=True)
    assert own_losses == losses
    first, second = values(expected), values(found)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert found.streamed_layers == 3
    assert [found.bank(layer).stream is not None for layer in range(LAYERS)] == [False, True, True, False, True]

    def storages(model, layers, near):
        """Bytes by address of what kernels read of frozen matrices: ``near``, or where they are stored."""
        found = {}
        for bank in map(model.bank, layers):
            for slot in range(bank.num_trainable, len(bank)):
                weights = bank.slots()[slot]
                matrices = (weights.up, weights.down) if near else bank.packed(slot).values()
                for tensor in (tensor for matrix in matrices for tensor in (matrix.packed, matrix.absmax)):
                    found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return found

    buffers = sorted(storages(found, layers, near=True).values())
    assert len(buffers) == 2, "the second layer has one; the first and the third share the other"
    one, six, two = (sum(storages(found, [layer], near=False).values()) for layer in layers)
    assert one < two < six
    assert buffers == pytest.approx([two, six], rel=0.2), "tensors begin at multiples of 256 bytes"


@pytest.mark.parametrize(
    ("storage", "copies"), [("nf4", False), (None, True), pytest.param("int8", True, marks=pytest.mark.full)]
)
def test_slices_are_streamed_as_whole_experts_are(deep, tmp_path, storage, copies):
    generator = np.random.default_rng(0)
    masks = [generator.random((8, 16)) < 0.5 for _ in range(LAYERS)]
    roles = tuple(np.where(mask.any(axis=1), Role.TRAINABLE, Role.ABSENT).astype(np.int8) for mask in masks)
    plan, scope = ExpertPlan(roles, neurons=tuple(masks)), TrainScope(experts="lora")
    expected, losses = trained(deep, scope, None, storage, plan=plan)
    found, own_losses = trained(deep, scope, stream_in(tmp_path, copies), storage, plan=plan)
    assert own_losses == losses
    assert losses[-1] < losses[0]
    first, second = values(expected), values(found)
    assert all(torch.equal(first[key], second[key]) for key in first)
    trainable = sum(p.nbytes for layer in range(LAYERS) for p in found.bank(layer).parameters() if p.requires_grad)
    assert expert_memory(found.layers).weight_bytes == trainable < expert_memory(expected.layers).weight_bytes


# --- a bank that is larger than the memory that there is --------------------------------------------------------------

PROCESS = """
    import json, resource, sys
    from pathlib import Path
    import torch
    from transformers import AutoConfig
    from edgefed.costs.step_setup import StepSetup
    from edgefed.errors import first_line
    from edgefed.expert_records import ExpertPlan
    from edgefed.moe.expert_stream import ExpertStream
    from edgefed.moe.model import MoeModel
    from edgefed.moe.offloading import OffloadSpace
    from edgefed.moe.units import TrainScope
    from edgefed.training.calibration import reset_peak_rss
    from edgefed.training.savings import make_optimizer
    from edgefed.training.steps import take_step

    class Source:
        def read(self, key):
            generator = torch.Generator().manual_seed(len(key) * 1000003 + sum(map(ord, key)))
            return {t.name: torch.randn(t.shape, generator=generator) / 30 for t in specs[key].tensors}

    def status(name):
        return int(next(l for l in open("/proc/self/status") if l.startswith(name + ":")).split()[1]) * 1024

    torch.set_num_threads(1)
    config = AutoConfig.for_model("olmoe", vocab_size=96, hidden_size=256, intermediate_size=512, num_experts=16,
        num_hidden_layers=12, num_attention_heads=4, num_key_value_heads=4, num_experts_per_tok=2, pad_token_id=0,
        bos_token_id=1, eos_token_id=2)
    config.save_pretrained(sys.argv[1])
    model, scope = MoeModel.skeleton(sys.argv[1], torch.float32), TrainScope(experts="lora", router="none", lora_rank=2)
    specs = {spec.key: spec for spec in model.unit_infos(scope)}
    for key, spec in specs.items():
        if spec.kind != "expert":
            model.load_unit(key, Source().read(key))
    ids = torch.randint(3, 96, (2, 32), generator=torch.Generator().manual_seed(0))
    start, reset = status("VmRSS"), reset_peak_rss()
    resource.setrlimit(resource.RLIMIT_DATA, (status("VmData") + int(sys.argv[3]) * 2**20, resource.RLIM_INFINITY))
    space = OffloadSpace(torch.device("cpu"), Path(sys.argv[1], "files"))
    stream = ExpertStream(space) if sys.argv[2] == "on" else None
    try:
        model.apply_plan(ExpertPlan.full(model.experts_per_layer), Source(), scope, offload=stream)
        parameters = model.trainable_parameters()
        optimizer = make_optimizer(parameters, "adamw", learning_rate=0.01, weight_decay=0.0)
        setup = StepSetup(2, 32, "float32", experts="lora", checkpointing=True)
        losses = []
        for _ in range(3):
            losses.append(take_step(model, optimizer, parameters, ids, ids, setup=setup, max_grad_norm=1.0)[0])
            optimizer.zero_grad()
        print(json.dumps(dict(losses=losses, grown=status("VmHWM") - start, reset=reset)))
    except (MemoryError, RuntimeError) as error:
        print(json.dumps(dict(error=first_line(error))))
"""
MIB = 2**20
BANK_BYTES = 12 * 16 * 3 * 256 * 512 * 4
"""288 MiB, 24 MiB a layer."""


def in_a_process(folder: Path, streams: str, limit_mib: int) -> dict:
    folder.mkdir()
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROCESS), str(folder), streams, str(limit_mib)], capture_output=True,
        text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds anonymous memory on Linux")
def test_a_bank_larger_than_memory_trains_within_it_to_the_same_loss(tmp_path):
    """Resident memory, mapped pages included, stays below a third of the bank; without streaming, it does not fit."""
    streamed = in_a_process(tmp_path / "streamed", "on", limit_mib=80)
    resident = in_a_process(tmp_path / "resident", "off", limit_mib=1024)
    refused = in_a_process(tmp_path / "refused", "off", limit_mib=80)
    assert streamed["losses"] == resident["losses"]
    assert "error" in refused
    if streamed["reset"]:
        assert streamed["grown"] < BANK_BYTES / 3 < BANK_BYTES < resident["grown"]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_staged_copies_arrive_whatever_their_sizes(device):
    if device == "cuda" and not torch.cuda.is_available():
        (pytest.fail if os.environ.get("EDGEFED_REQUIRE_GPU") == "1" else pytest.skip)("torch sees no GPU")
    copy = StagedCopies(torch.device(device))
    generator = torch.Generator().manual_seed(0)
    sizes = [(3, 5), (700, 900), (1,), (0, 4), (900, 700), (2, 2)] * 3
    dtypes = itertools.cycle([torch.float32, torch.uint8, torch.bfloat16, torch.int8])
    values = [torch.randint(0, 100, size, generator=generator).to(next(dtypes)) for size in sizes]
    targets = [torch.empty(value.shape, dtype=value.dtype, device=device) for value in values]
    for target, value in zip(targets, values, strict=True):
        copy(target, value)
    assert all(torch.equal(target.cpu(), value) for target, value in zip(targets, values, strict=True))
