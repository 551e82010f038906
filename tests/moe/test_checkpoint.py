"""Checkpoints read in pieces: the same tensors as transformers loads, whatever the files contain."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from edgefed.errors import CheckpointError
from edgefed.kernels.quantization import quantize_experts
from edgefed.moe.checkpoint import Checkpoint
from edgefed.moe.file_tensors import FileTensor, value_of
from edgefed.moe.model import MoeModel
from edgefed.moe.weight_files import WeightFiles


@pytest.fixture
def copy_of(tmp_path):
    """Copy a toy's folder and change its tensors and settings."""

    def copy(toy, change=lambda tensors: None, *, to="copy", **settings):
        folder = tmp_path / to
        shutil.copytree(toy.folder, folder)
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text()) | settings
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return copy


def test_every_unit_is_what_transformers_loads(toy):
    reference = AutoModelForCausalLM.from_pretrained(toy.folder, dtype="auto").state_dict()
    checkpoint = Checkpoint(toy.folder)
    stacks = {layer.ordinal: layer.experts_path for layer in checkpoint.layers}
    keys = set()
    for unit, tensors in checkpoint.iter_units():
        keys.add(unit.key)
        assert {info.name: info.shape for info in unit.tensors} == {n: tuple(t.shape) for n, t in tensors.items()}
        for name, tensor in tensors.items():
            if unit.kind == "expert":
                expected = reference[f"{stacks[unit.layer]}.{name}"][unit.expert]
            else:
                expected = reference[unit.key if unit.kind == "dense" else f"{unit.key}.{name}"]
            assert torch.equal(tensor, expected)
            assert tensor.dtype == expected.dtype
    assert keys == {unit.key for unit in toy.full().unit_infos()}
    for unit, tensors in Checkpoint(toy.folder, in_files=True).iter_units():
        for name, expected in checkpoint.read(unit.key).items():
            assert (tensors[name].shape, tensors[name].dtype) == (expected.shape, expected.dtype)
            assert torch.equal(value_of(tensors[name]), expected)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "qwen3_moe", "deepseek_v3"])
def test_tensors_that_are_only_rearranged_stay_in_their_files(toys, family):
    checkpoint = Checkpoint(toys(family).folder, in_files=True)
    for unit, tensors in checkpoint.iter_units():
        if unit.kind == "expert":
            assert all(isinstance(tensor, FileTensor) and tensor.loaded is None for tensor in tensors.values())


def test_file_tensors_compute_what_tensors_compute(tmp_path):
    values = {"a": torch.randn(4, 6, 16), "b": torch.randn(3, 6, 16), "c": torch.randn(4, 6, 8), "d": torch.randn(32)}
    save_file(values, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    operations = [
        (True, lambda a, b, c, d: torch.cat([a, b])),
        (True, lambda a, b, c, d: torch.stack([a[1], b[-1]], dim=1)),
        (True, lambda a, b, c, d: torch.chunk(torch.cat([a, b, a]), 2, dim=1)[1].contiguous()),
        (True, lambda a, b, c, d: torch.split(a, [1, 5], dim=-2)[1][2:4]),
        (True, lambda a, b, c, d: torch.chunk(b, 3)[2].squeeze(0).unsqueeze(1)),
        (True, lambda a, b, c, d: torch.stack([d, d]).detach()),
        (False, lambda a, b, c, d: torch.cat([a, c], dim=-1)),
        (False, lambda a, b, c, d: torch.chunk(a, 2, dim=2)[1]),
        (False, lambda a, b, c, d: torch.stack([d, d], dim=1)),
        (False, lambda a, b, c, d: a.transpose(1, 2).contiguous()),
        (False, lambda a, b, c, d: a.reshape(4, 3, 2, 16).float() + 1),
        (False, lambda a, b, c, d: torch.cat([a, torch.zeros(1, 6, 16)])),
        (False, lambda a, b, c, d: torch.zeros(4, 6, 16).copy_(a)),
    ]
    for stays, operation in operations:
        found = operation(*(files.locate(name) for name in values))
        assert isinstance(found, FileTensor) == stays
        assert torch.equal(value_of(found), operation(*values.values()))


def test_a_file_that_became_shorter_is_an_error(tmp_path):
    save_file({"a": torch.randn(4, 32)}, tmp_path / "model.safetensors")
    tensor = WeightFiles(tmp_path).locate("a")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.truncate((tmp_path / "model.safetensors").stat().st_size - 4)
    with pytest.raises(CheckpointError, match="too short: 4 of 512 bytes"):
        tensor + 1


def test_an_untied_output_embedding_stays_untied_although_the_config_ties_it(olmoe, copy_of):
    folder = copy_of(olmoe, tie_word_embeddings=True)
    model = MoeModel.from_checkpoint(folder)
    assert model.module.lm_head.weight is not model.module.model.embed_tokens.weight
    with torch.no_grad():
        assert torch.equal(model.module(olmoe.input_ids).logits, olmoe.logits)
    assert Checkpoint(folder).settings()["tie_word_embeddings"] is False
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {unit.key for unit in model.unit_infos()}


def test_an_equal_output_embedding_stays_tied(toys, copy_of):
    toy = toys("qwen2_moe")

    def add_head(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    checkpoint = Checkpoint(copy_of(toy, add_head))
    assert checkpoint.changes == {}
    assert "lm_head.weight" not in {unit.key for unit, _ in checkpoint.iter_units()}


def test_prediction_layers_are_left_out_by_name(toys, copy_of):
    def add_layer(tensors):
        tensors["model.layers.3.eh_proj.weight"] = torch.zeros(2, 2)
        tensors["model.layers.3.enorm.weight"] = torch.zeros(2)

    checkpoint = Checkpoint(copy_of(toys("deepseek_v3"), add_layer, num_nextn_predict_layers=1))
    assert len(checkpoint.unused) == 2
    assert "model.layers.3.* (2)" in checkpoint.unused_summary()
    assert checkpoint.settings()["num_nextn_predict_layers"] == 0


def test_buffers_of_old_checkpoints_are_not_reported(olmoe, copy_of):
    folder = copy_of(olmoe, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}))
    assert Checkpoint(folder).unused_summary() == ""


def test_mxfp4_is_dequantized(toys, save_toy, copy_of, tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    toy = save_toy("gpt_oss", tmp_path / "toy", torch.bfloat16)
    packed = {}

    def quantize(tensors):
        for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, columns, rows = tensors.pop(name).shape
            groups = max(columns // 32, 1)
            if columns % 32:
                pytest.skip("the toy is too small for a group of 32")
            blocks = torch.randint(0, 256, (experts, rows, groups, 16), dtype=torch.uint8)
            scales = torch.full((experts, rows, groups), 121, dtype=torch.uint8)
            packed[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
            tensors[name + "_blocks"], tensors[name + "_scales"] = blocks, scales

    from transformers import AutoConfig

    config = AutoConfig.for_model("gpt_oss", **{**_gpt_oss(toys), "hidden_size": 64, "intermediate_size": 32})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(toy.folder)
    folder = copy_of(toy, quantize, quantization_config={"quant_method": "mxfp4"})
    checkpoint = Checkpoint(folder)
    for layer in checkpoint.layers:
        for expert in range(layer.num_experts):
            for name, tensor in checkpoint.expert(layer, expert).items():
                expected = packed.get(f"{layer.experts_path}.{name}")
                if expected is not None:
                    assert torch.equal(tensor, expected[expert])
    assert "quantization_config" not in checkpoint.settings()
    whole = MoeModel.from_checkpoint(folder)
    for name, expected in packed.items():
        assert torch.equal(whole.module.state_dict()[name], expected)


def _gpt_oss(toys):
    config = json.loads((toys("gpt_oss").folder / "config.json").read_text())
    return {key: value for key, value in config.items() if key not in ("model_type", "architectures", "dtype")}


def test_fp8_is_dequantized(save_toy, copy_of, tmp_path):
    toy = save_toy("deepseek_v3", tmp_path / "toy", torch.bfloat16)
    expected = {}

    def quantize(tensors):
        for name in [name for name in tensors if name.endswith("proj.weight") and "layers" in name]:
            weight = tensors[name].float()
            scale = weight.abs().max() / 448
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[name + "_scale_inv"] = scale.reshape(1, 1)
            expected[name] = (tensors[name].float() * scale).to(torch.bfloat16)

    settings = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    checkpoint = Checkpoint(copy_of(toy, quantize, quantization_config=settings))
    layer = checkpoint.layers[0]
    path = layer.experts_path
    for expert in range(layer.num_experts):
        tensors = checkpoint.expert(layer, expert)
        parts = [expected[f"{path}.{expert}.{name}.weight"] for name in ("gate_proj", "up_proj")]
        assert torch.equal(tensors["gate_up_proj"], torch.cat(parts))
        assert torch.equal(tensors["down_proj"], expected[f"{path}.{expert}.down_proj.weight"])
    name = "model.layers.0.self_attn.o_proj.weight"
    assert torch.equal(checkpoint.tensor(name), expected[name])
    assert checkpoint.unused == []


def _packed(weight, *, nested=False, blocksize=64):
    """The tensors of a 4-bit weight as bitsandbytes saves them, with random codes, and the weight that they mean."""
    draw = torch.Generator().manual_seed(weight.numel())
    size, blocks = weight.numel(), -(-weight.numel() // blocksize)
    codes = torch.randint(0, 16, (size,), generator=draw)
    table = torch.randn(16, generator=draw)
    absmax = torch.rand(blocks, generator=draw) + 0.5
    state = {"quant_type": "nf4", "blocksize": blocksize, "dtype": "float32", "shape": list(weight.shape)}
    parts = {"": (codes[::2] * 16 + codes[1::2]).to(torch.uint8)[:, None], ".quant_map": table}
    if nested:
        code, scales = torch.randn(256, generator=draw), torch.rand(-(-blocks // 4), generator=draw)
        quantized = torch.randint(0, 256, (blocks,), generator=draw)
        absmax = code[quantized] * scales[torch.arange(blocks) // 4] + 0.75
        parts |= {".absmax": quantized.to(torch.uint8), ".nested_absmax": scales, ".nested_quant_map": code}
        state |= {"nested_blocksize": 4, "nested_dtype": "float32", "nested_offset": 0.75}
    else:
        parts[".absmax"] = absmax
    parts[".quant_state.bitsandbytes__nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return parts, (table[codes] * absmax.repeat_interleave(blocksize)[:size]).reshape(weight.shape)


BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])  # a tensor for each expert, and stacks of experts
def test_a_base_of_bitsandbytes_is_dequantized(family, toys, copy_of):
    expected = {}

    def quantize(tensors):
        names = [name for name in tensors if name.endswith(("proj.weight", "up_proj", "down_proj"))]
        for kind, name in enumerate(names):
            if kind % 4 == 3 and tensors[name].ndim == 2:
                weight = tensors[name]
                scale = weight.abs().amax(dim=1)
                tensors[name] = (weight * (127 / scale[:, None])).round().to(torch.int8)
                tensors[name.removesuffix("weight") + "SCB"] = scale
                tensors[name + "_format"] = torch.tensor(0, dtype=torch.uint8)
                expected[name] = tensors[name] * scale[:, None] / 127
            else:  # a block may be longer than a row of the stack
                options = {"nested": kind % 2 == 1, "blocksize": 4096 if kind % 4 == 2 else 64}
                parts, expected[name] = _packed(tensors.pop(name), **options)
                tensors.update((name + part, tensor) for part, tensor in parts.items())

    folder = copy_of(toys(family), quantize, quantization_config=BNB)
    checkpoint = Checkpoint(folder, in_files=family == "olmoe")
    assert checkpoint.unused == []
    assert "quantization_config" not in checkpoint.settings()
    for unit, tensors in Checkpoint(copy_of(toys(family), lambda t: t.update(expected), to="plain")).iter_units():
        found = checkpoint.read(unit.key)
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(value_of(found[name]), tensor, rtol=1e-6, atol=0)


def test_a_damaged_base_of_bitsandbytes_is_refused_by_name(olmoe, copy_of):
    name = "model.layers.0.self_attn.o_proj.weight"
    state = name + ".quant_state.bitsandbytes__nf4"

    def damage(number, change):
        def quantize(tensors):
            tensors.update((name + part, tensor) for part, tensor in _packed(tensors.pop(name))[0].items())
            change(tensors)

        with pytest.raises(CheckpointError) as caught:
            Checkpoint(copy_of(olmoe, quantize, to=str(number), quantization_config=BNB))
        return str(caught.value)

    text = lambda value: torch.tensor(list(value.encode()), dtype=torch.uint8)  # noqa: E731
    assert "lacks" in damage(0, lambda t: t.pop(name + ".absmax"))
    assert "must have 64 bytes" in damage(1, lambda t: t.update({name + ".absmax": torch.zeros(3)}))
    assert "must have 64 bytes" in damage(2, lambda t: t.update({name + ".absmax": torch.zeros(8).double()}))
    assert "cannot be read" in damage(3, lambda t: t.update({state: text("{")}))
    huge = '{"blocksize": 64, "dtype": "float32", "shape": [4096, 4096]}'
    assert "must have 8388608 bytes" in damage(4, lambda t: t.update({state: text(huge)}))
    zero = '{"blocksize": 0, "dtype": "float32", "shape": [32, 32]}'
    assert "invalid" in damage(5, lambda t: t.update({state: text(zero)}))

    def for_one_gpu(tensors):
        scale, layout = name.removesuffix("weight") + "SCB", torch.tensor(2, dtype=torch.uint8)
        tensors.update({name: torch.zeros(32, 32, dtype=torch.int8), scale: torch.ones(32), name + "_format": layout})

    with pytest.raises(CheckpointError, match="order of one GPU's tensor cores"):
        Checkpoint(copy_of(olmoe, for_one_gpu, to="gpu", quantization_config=BNB))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8"])
def test_what_bitsandbytes_dequantizes_bit_for_bit(quant_type, save_toy, copy_of, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        functional = pytest.importorskip("bitsandbytes.functional")
    expected, packed = {}, {}

    def quantize(tensors):
        for name in [name for name in tensors if name.endswith("proj.weight")]:
            weight = tensors.pop(name)
            if quant_type == "int8":
                codes, scale, _ = functional.int8_vectorwise_quant(weight.half())
                tensors |= {name: codes, name.removesuffix("weight") + "SCB": scale}
                expected[name] = functional.int8_vectorwise_dequant(codes, scale).to(weight.dtype)
            else:
                codes, state = functional.quantize_4bit(weight, quant_type=quant_type, compress_statistics=True)
                tensors[name] = packed[name] = codes
                tensors.update((f"{name}.{part}", tensor) for part, tensor in state.as_dict(packed=True).items())
                expected[name] = functional.dequantize_4bit(codes, state)

    toy = save_toy("olmoe", tmp_path / "toy", torch.bfloat16, hidden_size=64, intermediate_size=64)
    quantized = Checkpoint(copy_of(toy, quantize, quantization_config=BNB))
    plain = Checkpoint(copy_of(toy, lambda tensors: tensors.update(expected), to="plain"))
    for unit, tensors in plain.iter_units():
        found = quantized.read(unit.key)
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items()), unit.key
        if quant_type == "nf4" and unit.kind == "expert":  # stored in NF4 again, the codes are the same
            codes = packed[f"{unit.key}.down_proj.weight"].view(-1)
            assert torch.equal(quantize_experts(found["down_proj"], "nf4").packed.view(-1), codes)


@pytest.mark.parametrize("method", ["gptq", "new"])
def test_an_unsupported_quantization_is_refused_by_name(method, olmoe, copy_of):
    folder = copy_of(olmoe, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(CheckpointError, match=f"quantized with '{method}'"):
        Checkpoint(folder)


def test_shapes_that_do_not_fit_are_refused_before_anything_is_read(olmoe, copy_of):
    folder = copy_of(olmoe, lambda t: t.update({"model.norm.weight": torch.zeros(5)}))
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' must have shape \(32,\); found \(5,\)"):
        Checkpoint(folder)


def test_pytorch_files_are_read_as_well(olmoe, copy_of):
    folder = copy_of(olmoe)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with torch.no_grad():
        assert torch.equal(MoeModel.from_checkpoint(folder).module(olmoe.input_ids).logits, olmoe.logits)
