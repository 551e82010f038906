"""Attention received by tokens, compared with the full attention matrices that transformers returns."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgefed.errors import UnsupportedArchitecture
from edgefed.expert_records import ActivationProfile, LayerProfile
from edgefed.moe import attention_received
from edgefed.moe.architecture import discover_layers
from edgefed.moe.model import MoeModel

sys.path.insert(0, str(Path(__file__).parent))
from toy_models import FAMILIES, MORE_FAMILIES, SINCE  # noqa: E402

LENGTH, WINDOW = 13, 5
# Every kind of attention: plain, grouped, latent, with sinks and windows, with soft caps and norms, behind a mixer.
CASES = {
    **{family: {} for family in FAMILIES},
    "mixtral": {"sliding_window": WINDOW},
    "gpt_oss": {"sliding_window": WINDOW},
    "deepseek_v2": {},
    "granitemoe": {},
    "phimoe": {},
    "ernie4_5_moe": {},
    "hunyuan_v1_moe": {},
    "aria_text": {},
    "gemma4_text": {},
    "afmoe": {"sliding_window": WINDOW},
}


def build(family, **changes):
    import transformers

    if int(transformers.__version__.split(".")[1]) < SINCE.get(family, 0):
        pytest.skip(f"{family} uses the experts interface since transformers 5.{SINCE[family]}")
    torch.manual_seed(0)
    try:
        config = AutoConfig.for_model(family, **{**{**FAMILIES, **MORE_FAMILIES}[family], **changes})
        module = AutoModelForCausalLM.from_config(config).eval()
    except (ValueError, KeyError) as error:
        pytest.skip(f"this transformers has no {family}: {error}")
    return MoeModel(module, discover_layers(module), device=torch.device("cpu"))


def tokens(rows=3, length=LENGTH):
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def brute_force(model, input_ids, mask=None):
    """{layer ordinal: attention_sum (E,)} from full matrices; a query sees the keys whose weights are not zero."""
    module = model.module
    chosen, hooks = {}, []
    for layer in model.layers:
        hooks.append(
            layer.experts.register_forward_pre_hook(
                lambda m, args, layer=layer: chosen.update({layer.ordinal: args[1].clone()})
            )
        )
    before = module.config._attn_implementation
    module.set_attn_implementation("eager")
    attentions = module(input_ids=input_ids, attention_mask=mask, output_attentions=True).attentions
    module.set_attn_implementation(before)
    for hook in hooks:
        hook.remove()
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    sums = {}
    for layer in model.layers:
        index = int(layer.experts_path.split("layers.")[1].split(".")[0])
        expected = np.zeros(layer.num_experts)
        matrix = attentions[index].double().numpy()  # (B, heads, S, S)
        rows, _, length, _ = matrix.shape
        for row in range(rows):
            for token in range(length):
                if not real[row, token]:
                    continue
                column = [matrix[row, :, query, token] for query in range(length) if real[row, query]]
                seen = [weights.mean() for weights in column if weights.any()]
                for expert in chosen[layer.ordinal][row * length + token].tolist():
                    expected[expert] += sum(seen) / len(seen)
        sums[layer.ordinal] = expected
    return sums


def recorded(model, input_ids, mask=None):
    with model.record_statistics(attention=True) as recorder, torch.no_grad():
        logits = model.module(input_ids=input_ids, attention_mask=mask).logits
    return recorder, recorder.take(), logits


@pytest.mark.parametrize("family", CASES)
def test_equals_the_whole_matrix(family):
    model = build(family, **CASES[family])
    expected = brute_force(model, tokens())
    recorder, record, _ = recorded(model, tokens())
    assert not recorder.attention.notes
    for layer, layer_record in zip(model.layers, record.layers, strict=True):
        np.testing.assert_allclose(layer_record.attention_sum, expected[layer.ordinal], rtol=2e-5, atol=1e-7)
        assert layer_record.tokens_per_expert.sum() == 3 * LENGTH * layer.top_k


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("piece_bytes", [1, 4 * 4 * LENGTH * 3, 4 * 4 * LENGTH * LENGTH, 4 * 4 * LENGTH * LENGTH * 2])
def test_pieces_change_nothing_and_stay_small(family, piece_bytes, monkeypatch):
    model = build(family, **CASES[family])
    _, whole, logits = recorded(model, tokens())
    sizes = []
    file = sys.modules[type(model.module).__module__]
    eager = file.eager_attention_forward

    def watched(*args, **kwargs):
        output, weights = eager(*args, **kwargs)
        sizes.append((weights.numel() * 4, weights.shape[2]))
        return output, weights

    monkeypatch.setattr(attention_received, "PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(file, "eager_attention_forward", watched)
    _, record, again = recorded(model, tokens())
    torch.testing.assert_close(again, logits, rtol=1e-5, atol=1e-6)
    assert all(size <= piece_bytes or queries == 1 for size, queries in sizes)
    assert len(sizes) > len(model.layers)
    for a, b in zip(whole.layers, record.layers, strict=True):
        np.testing.assert_allclose(a.attention_sum, b.attention_sum, rtol=1e-5)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_excluded_as_query_and_as_key(family, side):
    model = build(family, **CASES[family])
    mask = torch.ones(3, LENGTH, dtype=torch.int64)
    mask[1, slice(0, 4) if side == "left" else slice(-4, None)] = 0
    expected = brute_force(model, tokens(), mask)
    _, record, _ = recorded(model, tokens(), mask)
    for layer, layer_record in zip(model.layers, record.layers, strict=True):
        np.testing.assert_allclose(layer_record.attention_sum, expected[layer.ordinal], rtol=2e-5, atol=1e-7)


def attention_implementations(model) -> list[str | None]:
    """Attention implementation of each module that has a configuration."""
    configs = [getattr(module, "config", None) for module in model.module.modules()]
    return [config._attn_implementation for config in configs if isinstance(config, PretrainedConfig)]


@pytest.mark.parametrize("family", [*FAMILIES, *MORE_FAMILIES])
def test_outputs_and_settings_of_the_model_do_not_change(family):
    model = build(family)
    implementations = attention_implementations(model)
    with torch.no_grad():
        logits = model.module(tokens()).logits
    _, record, while_recorded = recorded(model, tokens())
    torch.testing.assert_close(while_recorded, logits, rtol=1e-4, atol=1e-5)
    assert attention_implementations(model) == implementations
    assert not any(hasattr(module, "edgefed_attention") for module in model.module.modules())
    assert all(np.isfinite(layer.attention_sum).all() for layer in record.layers)
    with torch.no_grad():
        torch.testing.assert_close(model.module(tokens()).logits, logits)


def test_settings_are_restored_after_an_error():
    model = build("olmoe")
    before = model.module.config._attn_implementation
    with pytest.raises(IndexError), model.record_statistics(attention=True):
        model.module(torch.tensor([[1, 5000]]))
    assert model.module.config._attn_implementation == before
    assert not any(hasattr(module, "edgefed_attention") for module in model.module.modules())


@pytest.mark.parametrize(
    ("family", "words", "uniform"),
    [
        ("jamba", "no attention matrix before model.layers.0.feed_forward.experts", [0]),
        ("qwen3_next", "no attention matrix before model.layers.0.mlp.experts", [0]),
        ("lfm2_moe", "no attention matrix in the decoder layer of", []),
        ("nemotron_h", "no attention matrix in the decoder layer of", []),
    ],
)
def test_layers_without_an_attention_matrix_are_reported(family, words, uniform):
    model = build(family)
    recorder, record, _ = recorded(model, tokens())
    assert [note for note in recorder.attention.notes if words in note]
    for ordinal in uniform:
        np.testing.assert_array_equal(record.layers[ordinal].attention_sum, record.layers[ordinal].tokens_per_expert)
    # A second pass starts fresh: the first layer does not use the attention of the previous pass.
    again, second, _ = recorded(model, tokens())
    np.testing.assert_array_equal(second.layers[0].attention_sum, record.layers[0].attention_sum)


def test_a_custom_attention_is_refused_by_name(monkeypatch):
    model = build("olmoe")
    monkeypatch.delattr(sys.modules[type(model.module).__module__], "eager_attention_forward")
    query = torch.zeros(1, 4, 3, 8)
    attention, module = ALL_ATTENTION_FUNCTIONS, model.module.model.layers[0].self_attn
    with (
        pytest.raises(UnsupportedArchitecture, match="cannot measure the attention of OlmoeAttention"),
        model.record_statistics(attention=True),
    ):
        attention[attention_received.IMPLEMENTATION](module, query, query, query, None)


def test_batches_add_up_and_nothing_is_recorded_unless_requested():
    model = build("olmoe")
    with model.record_statistics(attention=True) as recorder, torch.no_grad():
        for row in tokens():
            model.module(row[None])
    one_by_one = recorder.take()
    _, together, _ = recorded(model, tokens())
    for a, b in zip(one_by_one.layers, together.layers, strict=True):
        np.testing.assert_allclose(a.attention_sum, b.attention_sum, rtol=1e-5)
    with model.record_statistics() as recorder, torch.no_grad():
        model.module(tokens())
    assert all(layer.attention_sum is None for layer in recorder.take().layers)


def layer_record(attention):
    values = np.array([2.0, 0.0, 4.0])
    return LayerProfile(5, values, values, values, -values, -values, values, attention)


def test_records_with_attention_add_and_travel():
    record = layer_record(np.array([0.5, 0.0, 1.0]))
    np.testing.assert_array_equal(record.mean_attention, [0.25, 0.0, 0.25])
    np.testing.assert_array_equal((record + record).attention_sum, [1.0, 0.0, 2.0])
    assert (layer_record(None) + layer_record(None)).attention_sum is None
    assert layer_record(None).mean_attention is None
    with pytest.raises(ValueError, match="cannot add a profile with attention and one without"):
        record + layer_record(None)
    for layer in (record, layer_record(None)):
        saved = ActivationProfile((layer,)).to_dict()
        assert ActivationProfile.from_dict(saved).to_dict() == saved
    old = ActivationProfile((record,)).to_dict()
    del old["layers"][0]["attention_sum"]
    assert ActivationProfile.from_dict(old).layers[0].attention_sum is None
