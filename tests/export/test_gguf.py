"""Exported GGUF files: every tensor and key as gguf's reader finds them, and the logits that llama.cpp computes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from edgefed.aggregator.rounds import RoundPolicy
from edgefed.cli.main import main
from edgefed.embedded import tiny_model_directory
from edgefed.errors import ConfigError
from edgefed.formats.gguf import MODEL_FILE, export_gguf
from edgefed.formats.gguf_adapter import ADAPTER_FILE, export_gguf_adapter
from edgefed.moe.units import MemorySource, TrainScope
from edgefed.protocol.messages import RunConfig, TrainingConfig
from edgefed.runs import import_model

gguf = pytest.importorskip("gguf")

VOCABULARY = 2048
WIDE = {"hidden_size": 64, "intermediate_size": 32}
"""Rows of whole blocks."""
SETTINGS = {
    "olmoe": {"num_key_value_heads": 4},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 150000.0}},
}
FAMILIES = ["olmoe", "mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"]


def make(save_toy, family, folder, **settings):
    """A toy model with the tokenizer of the packaged model."""
    toy = save_toy(family, folder, vocab_size=VOCABULARY, **{**SETTINGS.get(family, {}), **settings})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model_directory() / name, folder)
    return toy


def values(tensor):
    return torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))


def key(reader, name):
    return reader.get_field(name).contents()


@pytest.fixture
def wide(save_toy, tmp_path):
    return make(save_toy, "olmoe", tmp_path / "toy", **WIDE)


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        ("auto", 0),
        ("q4_0", 1 / 7),
        pytest.param("q8_0", 1 / 127, marks=pytest.mark.full),
        pytest.param("bfloat16", 2**-8, marks=pytest.mark.full),
        pytest.param("float16", 2**-11, marks=pytest.mark.full),
    ],
)
def test_every_tensor_and_key_reads_back(wide, tmp_path, dtype, tolerance):
    """Of a block's largest value: bfloat16 and float16 round, Q8_0 has 127 steps and Q4_0 seven."""
    units = wide.units()
    export_gguf(MemorySource(units), wide.folder, tmp_path / "out", dtype=dtype, name="toy")
    reader = gguf.GGUFReader(tmp_path / "out" / MODEL_FILE)
    found = {tensor.name: tensor for tensor in reader.tensors}
    experts = [units[f"model.layers.1.mlp.experts.{expert}"] for expert in range(8)]
    up = torch.stack([expert["gate_up_proj"] for expert in experts])
    expected = {
        "token_embd.weight": units["model.embed_tokens.weight"]["value"],
        "output.weight": units["lm_head.weight"]["value"],
        "output_norm.weight": units["model.norm.weight"]["value"],
        "blk.1.ffn_gate_inp.weight": units["model.layers.1.mlp.gate"]["weight"],
        "blk.1.attn_q.weight": units["model.layers.1.self_attn.q_proj.weight"]["value"],
        "blk.1.attn_k_norm.weight": units["model.layers.1.self_attn.k_norm.weight"]["value"],
        "blk.1.ffn_gate_exps.weight": up[:, :32],
        "blk.1.ffn_up_exps.weight": up[:, 32:],
        "blk.1.ffn_down_exps.weight": torch.stack([expert["down_proj"] for expert in experts]),
    }
    for name, tensor in expected.items():
        kept = name.endswith(("_norm.weight", "inp.weight"))
        torch.testing.assert_close(
            values(found[name]), tensor, rtol=0, atol=0 if kept else 1.01 * tolerance * tensor.abs().max().item()
        )
    assert len(found) == 3 + 2 * 12
    types = {found[name].tensor_type.name for name in ("blk.0.ffn_up_exps.weight", "blk.0.attn_v.weight")}
    kind = {"auto": "F32", "bfloat16": "BF16", "float16": "F16"}.get(dtype, dtype.upper())
    assert types == {kind}
    assert found["output.weight"].tensor_type.name == ("Q8_0" if kind == "Q4_0" else kind)
    # The keys that the loader of llama.cpp reads for OLMoE.
    keys = {
        "general.architecture": "olmoe", "general.name": "toy", "olmoe.block_count": 2, "olmoe.context_length": 64,
        "olmoe.embedding_length": 64, "olmoe.feed_forward_length": 32, "olmoe.attention.head_count": 4,
        "olmoe.attention.head_count_kv": 4, "olmoe.attention.layer_norm_rms_epsilon": np.float32(1e-5),
        "olmoe.rope.freq_base": 10000.0, "olmoe.rope.dimension_count": 16, "olmoe.expert_count": 8,
        "olmoe.expert_used_count": 2, "olmoe.vocab_size": VOCABULARY, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip
    assert {name: key(reader, name) for name in keys} == keys
    assert len(key(reader, "tokenizer.ggml.tokens")) == VOCABULARY
    assert key(reader, "tokenizer.ggml.token_type")[:2] == [3, 1]
    assert key(reader, "tokenizer.chat_template")


def test_rows_that_are_not_whole_blocks_are_float16_and_said(save_toy, tmp_path):
    toy = make(save_toy, "olmoe", tmp_path / "toy")
    said = []
    export_gguf(MemorySource(toy.units()), toy.folder, tmp_path / "out", dtype="q8_0", report=said.append)
    reader = gguf.GGUFReader(tmp_path / "out" / MODEL_FILE)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["blk.0.ffn_down_exps.weight"] == "F16"
    assert types["blk.0.ffn_up_exps.weight"] == "Q8_0"
    assert said == [
        "2 of 27 tensors are float16 instead of Q8_0: their rows are not whole blocks of 32 values; the first is "
        "'blk.0.ffn_down_exps.weight' with rows of 16"
    ]


def server_of(path, adapter=None):
    """llama.cpp itself."""
    llama = pytest.importorskip("xllamacpp")
    params = llama.CommonParams()
    params.model.path = str(path)
    params.n_ctx = params.n_batch = params.n_ubatch = 128
    params.n_parallel = 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = params.fit_params = False
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.verbosity = 0
    if adapter is not None:
        lora = llama.CommonAdapterLoraInfo()
        lora.path, lora.scale = str(adapter), 1.0
        params.lora_adapters = [lora]
    return llama.Server(params)


def log_probabilities(server, ids):
    """Of the token behind a prompt (V,). llama.cpp gives none where the token that it draws ends the text."""
    for seed in range(20):
        request = {"prompt": ids, "max_tokens": 1, "logprobs": VOCABULARY, "cache_prompt": False, "seed": seed}
        answer = server.handle_completions({**request, "temperature": 1.0})["choices"][0]["logprobs"]
        if answer:
            found = {entry["id"]: entry["logprob"] for entry in answer["content"][0]["top_logprobs"]}
            return torch.tensor([found[number] for number in range(VOCABULARY)])
    raise AssertionError("no probabilities")


def check_logits(toy, out, tolerance=2e-5):
    server = server_of(out / MODEL_FILE)
    for length in (1, 10):
        expected = toy.logits[0, length - 1].log_softmax(-1)
        found = log_probabilities(server, toy.input_ids[0, :length].tolist())
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_llama_cpp_computes_the_logits_of_olmoe(wide, tmp_path):
    check_logits(wide, export_gguf(MemorySource(wide.units()), wide.folder, tmp_path / "out"))


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "original_max_position_embeddings": 4}
VARIANTS = [
    *((family, {}) for family in FAMILIES),
    ("gpt_oss", {"sliding_window": 4}),
    ("deepseek_v3", {"norm_topk_prob": False}),
    (
        "deepseek_v3",
        {"max_position_embeddings": 160, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
    ),
    ("qwen3_moe", {"max_position_embeddings": 160, "rope_parameters": YARN}),
    ("olmoe", {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}),
]


@pytest.mark.full
@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=[f"{name}-{len(more)}" for name, more in VARIANTS])
def test_llama_cpp_computes_the_logits_of(family, settings, save_toy, tmp_path):
    toy = make(save_toy, family, tmp_path / "toy", **settings)
    check_logits(toy, export_gguf(MemorySource(toy.units()), toy.folder, tmp_path / "out"))


@pytest.mark.full
def test_llama_cpp_rounds_the_range_of_yarn(save_toy, tmp_path):
    """GPT-OSS does not (``truncate`` is False): llama.cpp has no key for it."""
    rope = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}
    rope |= {"original_max_position_embeddings": 4096, "truncate": False}
    toy = make(save_toy, "gpt_oss", tmp_path / "toy", rope_parameters=rope)
    check_logits(toy, export_gguf(MemorySource(toy.units()), toy.folder, tmp_path / "out"), 2e-3)


@pytest.mark.full
@pytest.mark.parametrize(("dtype", "tolerance"), [("q8_0", 0.1), ("q4_0", 1.2), ("bfloat16", 0.05)])
def test_llama_cpp_computes_near_logits_of_quantized_files(wide, tmp_path, dtype, tolerance):
    out = export_gguf(MemorySource(wide.units()), wide.folder, tmp_path / "out", dtype=dtype)
    check_logits(wide, out, tolerance)


def save_sentencepiece(folder):
    """A tokenizer as transformers makes it of SentencePiece: BPE with a byte fallback."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special + [f"<0x{byte:02X}>" for byte in range(256)])
    tokenizer.train_from_iterator(Path(__file__).read_text(encoding="utf-8").split(), trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = [token for token in described["added_tokens"] if token["content"] in special]
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_llama_cpp_gives_the_tokens_of_transformers(kind, wide, tmp_path):
    if kind == "sentencepiece":
        save_sentencepiece(wide.folder)
    server = server_of(export_gguf(MemorySource(wide.units()), wide.folder, tmp_path / "out") / MODEL_FILE)
    tokenizer = AutoTokenizer.from_pretrained(wide.folder)
    for text in ("Hello world, it's 2026!", "def area(x):\n    return x * 31415\n\n", "  naïve café — 你好 🦙  ", "a"):
        request = {"content": text, "add_special": True, "parse_special": True}
        found = httpx.post(f"{server.listening_address}/tokenize", json=request).json()["tokens"]
        assert found == tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        ("olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4}, "norm_topk_prob is True"),
        ("olmoe", {"num_key_value_heads": 2}, "2 key heads for 4 query heads"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, r"its layers \[0\] have no experts"),
        ("mixtral", {"sliding_window": 8}, "sliding_window is 8"),
        ("deepseek_v3", {"q_lora_rank": None}, "q_lora_rank is None in 3 layers"),
        ("dots1", {}, "model type 'dots1' is not one of olmoe"),
    ],
)
def test_what_llama_cpp_computes_differently_is_refused(family, settings, reason, save_toy, tmp_path):
    toy = save_toy(family, tmp_path / "toy", **settings)
    with pytest.raises(ConfigError, match=reason):
        export_gguf(MemorySource(toy.units()), toy.folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(wide, tmp_path):
    path = wide.folder / "tokenizer.json"
    described = json.loads(path.read_text())
    described["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": "x+"}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        ],
    }
    path.write_text(json.dumps(described))
    with pytest.raises(ConfigError, match=r"no such tokenizer: it splits by \['x\+'\]"):
        export_gguf(MemorySource(wide.units()), wide.folder, tmp_path / "out")


def test_the_command_line(wide, tmp_path, capsys):
    training = TrainingConfig(
        local_steps=1, batch_size=2, sequence_length=16, learning_rate=1e-2, experts="lora", lora_rank=2
    )
    run = RunConfig(
        run_id="a-run", model="some/Toy", method="fedavg", method_options={}, rounds=1, seed=0, training=training
    )
    import_model(str(wide.folder), tmp_path / "run", run, RoundPolicy(rounds=1, min_clients=1))
    words = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--to", "gguf", "--dtype", "q8_0"]
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 0
    assert "llama-cli -m" in " ".join(capsys.readouterr().err.split())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {MODEL_FILE, "README.md", "edgefed.json"}
    assert key(gguf.GGUFReader(tmp_path / "out" / MODEL_FILE), "general.name") == "Toy"
    for more, text in (
        (["--to", "hf", "--dtype", "q8_0"], "must be one of auto, float32"),
        (["--to", "peft", "--dtype", "float16"], "must be one of auto; found"),
        (["--to", "gguf-adapter"], "this run trained its router in full"),
    ):
        with pytest.raises(SystemExit) as end:
            main([*words[:2], str(tmp_path / "none"), *more])
        assert end.value.code != 0
        assert text in " ".join(capsys.readouterr().err.split())


def test_adapters_are_merged(wide, tmp_path):
    scope = TrainScope(experts="lora", router="none", lora_rank=2)
    units = wide.units(scope)
    units["model.layers.0.mlp.experts.3:lora"]["down_proj.lora_b"].fill_(0.5)
    export_gguf(MemorySource(units), wide.folder, tmp_path / "out", scope=scope)
    reader = gguf.GGUFReader(tmp_path / "out" / MODEL_FILE)
    (tensor,) = (tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down_exps.weight")
    adapter = units["model.layers.0.mlp.experts.3:lora"]
    update = scope.lora_scale * adapter["down_proj.lora_b"] @ adapter["down_proj.lora_a"]
    torch.testing.assert_close(values(tensor)[3], units["model.layers.0.mlp.experts.3"]["down_proj"] + update)


def check_adapter(toy, tmp_path, scope):
    """llama.cpp computes the same with the base and an adapter as with the merged model."""
    units = toy.units(scope)
    generator = torch.Generator().manual_seed(1)
    for unit, tensors in units.items():
        if unit.endswith(":lora"):
            for tensor in tensors.values():
                tensor.normal_(0, 0.3, generator=generator)
    source = MemorySource(units)
    base = export_gguf(source, toy.folder, tmp_path / "base") / MODEL_FILE
    merged = export_gguf(source, toy.folder, tmp_path / "merged", scope=scope) / MODEL_FILE
    adapter = export_gguf_adapter(source, toy.folder, tmp_path / "adapter", scope=scope) / ADAPTER_FILE
    ids = toy.input_ids[0].tolist()
    without, expected, found = (
        log_probabilities(server_of(*files), ids) for files in ((base,), (merged,), (base, adapter))
    )
    assert (expected - without).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


EVERYTHING = TrainScope(experts="lora", router="lora", attention="lora", lora_rank=4, lora_alpha=6.0)


@pytest.mark.parametrize("scaling", ["standard", "rank_stabilized"])
def test_llama_cpp_adds_an_adapter_to_the_base(wide, tmp_path, scaling):
    check_adapter(wide, tmp_path, dataclasses.replace(EVERYTHING, lora_scaling=scaling))


@pytest.mark.full
@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3", "gpt_oss"])
def test_llama_cpp_adds_an_adapter_to(family, save_toy, tmp_path):
    scope = EVERYTHING
    if family.startswith("deepseek"):
        scope = TrainScope(experts="lora", router="lora", lora_rank=4)
    check_adapter(make(save_toy, family, tmp_path / "toy"), tmp_path, scope)


@pytest.mark.parametrize(
    ("family", "scope", "reason"),
    [
        ("olmoe", {"experts": "full", "router": "none"}, "this run trained its experts in full"),
        ("olmoe", {"experts": "lora", "router": "full"}, "this run trained its router in full"),
        ("deepseek_v3", {"experts": "lora", "router": "none", "attention": "lora"}, "does not adapt '.*kv_b_proj"),
    ],
)
def test_what_a_gguf_adapter_cannot_hold_is_refused(family, scope, reason, toys, tmp_path):
    toy, scope = toys(family), TrainScope(**scope)
    with pytest.raises(ConfigError, match=reason):
        export_gguf_adapter(MemorySource(toy.units(scope)), toy.folder, tmp_path / "out", scope=scope)
    assert not (tmp_path / "out").exists()
