"""A step that saves memory computes the same: chunked loss, checkpointing, the optimizers, shorter sequences."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

from edgefed.errors import ConfigError
from edgefed.expert_records import ExpertPlan
from edgefed.methods.hfedmoe import HFedMoE
from edgefed.moe.units import TrainScope
from edgefed.protocol.messages import TrainingConfig
from edgefed.training import loss as chunked_module
from edgefed.training import savings
from edgefed.training.encoding import TokenBlocks
from edgefed.training.loss import batch_loss, chunked_loss, chunking_problem, evaluate_loss
from edgefed.training.savings import checkpointing, make_optimizer, problems
from edgefed.training.steps import make_schedule, run_steps, step_setup, take_step

sys.path.insert(0, str(Path(__file__).parent))
from toy_training import KNOWN, batch, build, gradients_of, make_device  # noqa: E402

TRAINABLE, FROZEN = [0, 2, 5, 6], [3, 7]
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Toy batches are smaller than one real chunk."""
    monkeypatch.setattr(chunked_module, "CHUNK_TOKENS", 7)


def close(a: dict, b: dict, tolerance: float = 2e-5) -> None:
    assert a.keys() == b.keys()
    assert a
    for name in a:
        scale = a[name].abs().max().item()
        assert (a[name] - b[name]).abs().max().item() <= tolerance * max(scale, 1e-6), name


# --- chunked loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", KNOWN)
def test_the_chunked_loss_is_the_models_own_with_the_same_gradients(family):
    module = build(family)
    if module is None:
        pytest.skip("not in this transformers")
    module.train()
    ids, labels = batch()
    assert chunking_problem(module, ids, labels) == ""
    found = []
    for chunked in (False, True):
        torch.manual_seed(1)
        module.zero_grad()
        loss = batch_loss(module, ids, labels, chunked=chunked)
        loss.backward()
        found.append((loss.item(), {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    close(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("granitemoe", {"logits_scaling": 3.0, "embedding_multiplier": 2.0}),
        ("gemma4_text", {"final_logit_softcapping": 2.0}),
    ],
)
def test_scaled_and_capped_logits_are_scaled_and_capped_in_chunks(family, changes):
    plain, changed = build(family), build(family, **changes)
    ids, labels = batch()
    own = changed(input_ids=ids, labels=labels).loss
    assert abs(own - plain(input_ids=ids, labels=labels).loss) > 1e-3  # the change does something
    assert chunked_loss(changed, ids, labels).item() == pytest.approx(own.item(), rel=1e-6)
    assert chunking_problem(changed, ids, labels) == ""


def test_a_loss_with_more_terms_is_refused_by_number():
    module = build("mixtral")
    ids, labels = batch()
    own = module.loss_function
    module.loss_function = lambda *args, **kwargs: own(*args, **kwargs) + 0.1
    assert "other terms" in chunking_problem(module, ids, labels)


def test_a_balancing_loss_in_the_configuration_allows_a_chunked_loss():
    module = build("mixtral", output_router_logits=True, router_aux_loss_coef=0.5)
    assert chunking_problem(module, *batch()) == ""
    assert "chunked_loss" not in problems(module, "cpu")


def test_a_forward_that_cannot_be_split_is_a_reason_not_a_traceback():
    module = build("olmoe")
    decoder = module.base_model
    original = type(decoder).forward
    decoder.forward = lambda **kwargs: (original(decoder, **kwargs).last_hidden_state,)  # a tuple, as in old models
    assert "cannot be split" in chunking_problem(module, *batch())
    alone = types.SimpleNamespace()
    alone.base_model = alone
    assert "cannot be separated" in chunked_module.structural_problem(alone)


def test_num_items_and_batches_without_labels():
    module = build("olmoe")
    ids, labels = batch()
    count = int((labels[:, 1:] != -100).sum())
    loss = chunked_loss(module, ids, labels)
    assert chunked_loss(module, ids, labels, 2 * count).item() == pytest.approx(loss.item() / 2, rel=1e-6)
    nothing = chunked_loss(module, ids, torch.full_like(labels, -100))
    nothing.backward()
    assert nothing.item() == 0


def peak_of(run) -> int:
    """Return the peak bytes of the CPU allocator while ``run`` runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def test_a_chunked_loss_needs_the_memory_of_one_chunk_of_logits(monkeypatch):
    monkeypatch.setattr(chunked_module, "CHUNK_TOKENS", 16)
    module = build("olmoe", vocab_size=20_000)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    module.model.embed_tokens.weight.requires_grad_(False)
    module.model.norm.weight.requires_grad_(True)
    ids, labels = batch(20_000, rows=2, length=64)
    all_logits = 2 * 64 * 20_000 * 4
    peaks = [peak_of(lambda c=c: batch_loss(module, ids, labels, chunked=c).backward()) for c in (False, True)]
    assert peaks[0] > 2 * all_logits
    assert peaks[1] < 0.75 * all_logits  # 16 of 128 rows, three times in float32, and the small model


def test_evaluation_in_chunks_and_in_small_batches_is_the_same():
    module = build("qwen2_moe")
    ids, labels = batch(rows=5, length=12)
    blocks = TokenBlocks(ids, labels)
    expected = evaluate_loss(module, blocks, 5)
    for size, chunked in ((1, False), (2, True), (5, True)):
        assert evaluate_loss(module, blocks, size, chunked=chunked) == pytest.approx(expected, rel=1e-5)


# --- checkpointing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["full", "lora"])
@pytest.mark.parametrize("family", KNOWN)
def test_checkpointing_gives_the_same_and_counts_once(family, mode, tmp_path):
    scope = TrainScope(experts=mode, router=mode, attention=mode if mode == "lora" else "none", lora_rank=2)
    model = make_device(family, tmp_path, scope, TRAINABLE, FROZEN)
    if model is None:
        pytest.skip("not in this transformers")
    ids, labels = batch()
    calls = []
    schedule = make_schedule(model.plan, HFedMoE(), 0.5)
    found = []
    for on in (False, True):
        calls.clear()
        model.set_schedule(lambda layer, record: calls.append(layer) or schedule(layer, record))
        torch.manual_seed(1)
        before = sum(model.served_tokens().values())
        with model.record_statistics() as statistics, checkpointing(model.module, on):
            loss = batch_loss(model.module, ids, labels, chunked=on)
            loss.backward()
            record = statistics.take()
        served = sum(model.served_tokens().values()) - before
        found.append((loss.item(), gradients_of(model), record, served, model.experts_with_gradient(), list(calls)))
        model.module.zero_grad(set_to_none=True)
    plain, saved = found
    assert plain[0] == pytest.approx(saved[0], rel=1e-6)
    close(plain[1], saved[1])
    assert plain[3:] == saved[3:]
    assert len(plain[5]) == len(model.layers)
    for a, b in zip(plain[2].layers, saved[2].layers, strict=True):
        assert a.num_tokens == b.num_tokens == ids.numel()
        assert (a.tokens_per_expert == b.tokens_per_expert).all()
    layers = [m for m in model.module.modules() if hasattr(m, "gradient_checkpointing")]
    assert layers
    assert not any(m.gradient_checkpointing for m in layers)
    assert not model.module.get_input_embeddings()._forward_hooks


def test_checkpointing_saves_fewer_bytes_for_the_backward_pass(tmp_path):
    model = make_device("olmoe", tmp_path, TrainScope(), TRAINABLE, num_hidden_layers=6, hidden_size=64)
    ids, labels = batch(rows=2, length=60)
    saved = []
    for on in (False, True):
        storages: dict[int, int] = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        own = {p.untyped_storage().data_ptr() for p in model.module.parameters()}
        with checkpointing(model.module, on), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            batch_loss(model.module, ids, labels, chunked=False)
        saved.append(sum(size for pointer, size in storages.items() if pointer not in own))
    assert saved[1] < 0.4 * saved[0]


def test_a_model_without_checkpointing_is_refused_by_name():
    module = types.SimpleNamespace(supports_gradient_checkpointing=False)
    with pytest.raises(ConfigError, match="SimpleNamespace does not support"), checkpointing(module, True):
        pass
    with checkpointing(module, False):
        pass


# --- optimizers -------------------------------------------------------------------------------------------------------


def test_plain_adamw_is_torchs_without_a_copy_of_all_parameters():
    optimizer = make_optimizer([torch.nn.Parameter(torch.ones(3))], "adamw", learning_rate=0.1, weight_decay=0.2)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["foreach"] is False
    assert optimizer.defaults["weight_decay"] == 0.2


def test_unavailable_optimizers_are_refused_by_name(monkeypatch):
    weight = [torch.nn.Parameter(torch.ones(3))]
    with pytest.raises(ConfigError, match="invalid optimizer 'sgd', expected one of adamw, adamw_8bit"):
        make_optimizer(weight, "sgd", learning_rate=0.1, weight_decay=0)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # importing it fails
    savings.eight_bit_problem.cache_clear()
    try:
        assert "bitsandbytes" in problems(build("olmoe"), "cpu")["adamw_8bit"]
        with pytest.raises(ConfigError, match="8-bit AdamW cannot be used on cpu: bitsandbytes"):
            make_optimizer(weight, "adamw_8bit", learning_rate=0.1, weight_decay=0)
    finally:
        savings.eight_bit_problem.cache_clear()


class _Fails:
    """A bitsandbytes that can be imported but fails at its first kernel, as on a Jetson with the wrong wheel."""

    def __init__(self, step):
        def make(parameters, **kwargs):
            return types.SimpleNamespace(step=lambda: step(parameters[0]), state={parameters[0]: {}})

        self.optim = types.SimpleNamespace(AdamW8bit=make)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (lambda p: (_ for _ in ()).throw(RuntimeError("named symbol not found at line 12")), "named symbol not found"),
        (lambda p: None, "wrong step"),
    ],
)
def test_an_importable_package_is_not_enough(monkeypatch, step, reason):
    monkeypatch.setitem(sys.modules, "bitsandbytes", _Fails(step))
    savings.eight_bit_problem.cache_clear()
    try:
        assert reason in savings.eight_bit_problem("cpu")
    finally:
        savings.eight_bit_problem.cache_clear()


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
def test_8_bit_adamw_follows_adamw_with_a_quarter_of_its_state():
    torch.manual_seed(0)
    start = torch.randn(128, 256)
    weights, states = [], []
    for name in ("adamw", "adamw_8bit"):
        weight = torch.nn.Parameter(start.clone())
        optimizer = make_optimizer([weight], name, learning_rate=1e-2, weight_decay=0.1)
        generator = torch.Generator().manual_seed(1)
        for _ in range(10):
            weight.grad = torch.randn(128, 256, generator=generator)
            optimizer.step()
        weights.append(weight.detach())
        states.append(sum(t.nbytes for t in optimizer.state[weight].values() if torch.is_tensor(t)))
    moved = (weights[0] - start).abs().mean()
    assert (weights[0] - weights[1]).abs().mean() < 0.03 * moved
    assert states[1] < 0.3 * states[0]
    with pytest.raises(ConfigError, match="it moves its state between a GPU and the host"):
        make_optimizer([weight], "paged_adamw_8bit", learning_rate=1e-2, weight_decay=0.1)


# --- shorter sequences, and a setup that changes between steps --------------------------------------------------------


def test_shortened_blocks_keep_every_label():
    ids = torch.arange(24).reshape(2, 12)
    labels = ids.clone()
    labels[0, :6] = -100
    blocks = TokenBlocks(ids, labels)
    half = blocks.shortened(6)
    assert half.input_ids.tolist() == [list(range(6, 12)), list(range(12, 18)), list(range(18, 24))]
    assert blocks.shortened(5).input_ids.shape == (5, 5)  # the last block of each row repeats three tokens
    assert blocks.shortened(12) is blocks
    assert blocks.shortened(99) is blocks
    hidden = TokenBlocks(ids, torch.full_like(ids, -100))
    assert hidden.shortened(6) is hidden  # nothing would be left
    with pytest.raises(ValueError, match="at least 2"):
        blocks.shortened(1)


def steps_with(model, setups, steps=4, compute_share=1.0):
    """Run steps; ``setups[i]`` is the result of `reconsider` after step i."""
    training = TrainingConfig(local_steps=steps, batch_size=2, sequence_length=20, learning_rate=1e-3)
    blocks = TokenBlocks(*batch(rows=8))
    answers = iter(setups(step_setup(model, training)))
    seen = []
    outcome = run_steps(
        model, model.plan, HFedMoE(), blocks, training, compute_share=compute_share, seed=1,
        on_step=seen.append, reconsider=lambda: next(answers, None),
    )  # fmt: skip
    return outcome, seen


def test_savings_switched_on_between_steps_change_nothing_but_memory(tmp_path):
    import dataclasses

    outcomes = []
    for number, saving in enumerate((False, True)):
        model = make_device("olmoe", tmp_path / str(number), TrainScope(), TRAINABLE, FROZEN)

        def setups(setup, saving=saving):
            if saving:
                setup = dataclasses.replace(setup, chunked_loss=True)
                yield setup
                yield None
                yield dataclasses.replace(setup, checkpointing=True)

        outcomes.append((*steps_with(model, setups, compute_share=0.5), {
            spec.key: {n: t.clone() for n, t in tensors.items()} for spec, tensors in model.trained_units()
        }))  # fmt: skip
    (plain, losses, values), (saved, other_losses, other_values) = outcomes
    assert losses == pytest.approx(other_losses, rel=1e-5)
    assert plain.expert_steps == saved.expert_steps
    assert plain.num_tokens == saved.num_tokens
    for key in values:
        for name in values[key]:
            assert torch.allclose(values[key][name], other_values[key][name], atol=2e-5), (key, name)


def test_a_shorter_sequence_applies_from_the_next_step(tmp_path):
    import dataclasses

    model = make_device("olmoe", tmp_path, TrainScope(), TRAINABLE, FROZEN)
    outcome, losses = steps_with(model, lambda setup: iter([dataclasses.replace(setup, sequence_length=10)]))
    assert len(losses) == 4
    assert outcome.num_tokens == 2 * 20 + 3 * 2 * 10
    assert all(record.num_tokens == outcome.num_tokens for record in outcome.record.layers)


def test_the_first_step_can_be_measured_and_is_the_same_step(tmp_path):
    results = []
    for number in range(2):
        model = make_device("olmoe", tmp_path / str(number), TrainScope(), TRAINABLE, FROZEN)
        training = TrainingConfig(local_steps=3, batch_size=2, sequence_length=20)
        seen = []

        def measure(optimizer, step, seen=seen):
            seen.append(type(optimizer).__name__)
            step()
            seen.append("done")

        outcome = run_steps(
            model, model.plan, HFedMoE(), TokenBlocks(*batch(rows=8)), training, compute_share=1.0, seed=1,
            measure=measure if number else None,
        )  # fmt: skip
        results.append(outcome.loss)
        assert seen == (["AdamW", "done"] if number else [])
    assert results[0] == results[1]


def test_a_step_that_diverges_changes_no_weight(tmp_path):
    from edgefed.errors import TrainingDiverged

    model = make_device("olmoe", tmp_path, TrainScope(), TRAINABLE)
    with torch.no_grad():
        model.module.lm_head.weight.fill_(float("nan"))
    parameters = list(model.trainable_parameters())
    before = [parameter.detach().clone() for parameter in parameters]
    training = TrainingConfig(batch_size=2, sequence_length=20)
    optimizer = make_optimizer(parameters, "adamw", learning_rate=1.0, weight_decay=0.0)
    with pytest.raises(TrainingDiverged, match="loss is nan"):
        take_step(model, optimizer, parameters, *batch(), setup=step_setup(model, training), max_grad_norm=1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_the_setup_names_the_device_and_the_dtype(tmp_path):
    model = make_device("olmoe", tmp_path, TrainScope(), TRAINABLE)
    setup = step_setup(model, TrainingConfig(batch_size=3, sequence_length=40, experts="lora"), checkpointing=True)
    assert (setup.device, setup.dtype, setup.batch_size, setup.sequence_length) == ("cpu", "float32", 3, 40)
    assert setup.experts == "lora"
    assert setup.checkpointing
    assert not setup.chunked_loss
    assert ExpertPlan.full(model.experts_per_layer).num_resident == 16
