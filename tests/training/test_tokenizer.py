"""Tokenizers that are missing, empty or larger than the model."""

from __future__ import annotations

import json
import shutil

import pytest

from edgefed.embedded import tiny_model_directory
from edgefed.errors import CheckpointError, ModelNotFound
from edgefed.training.tokenizer import check_vocabulary, load_tokenizer, vocabulary_size


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(tiny_model_directory(), tmp_path / "model")


def test_packaged_tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert vocabulary_size(tokenizer) <= rows
    check_vocabulary(tokenizer, rows, "tiny")


@pytest.mark.parametrize("left", [(), ("tokenizer_config.json",)])
def test_checkpoint_without_tokenizer_files_is_refused(folder, left):
    for path in folder.glob("tokenizer*"):
        if path.name not in left:
            path.unlink()
    with pytest.raises(ModelNotFound, match="tokenizer") as caught:
        load_tokenizer(folder)
    assert str(folder) in str(caught.value)
    assert "tokenizer.json" in caught.value.remedy


def test_damaged_tokenizer_file_is_refused(folder):
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ModelNotFound, match="tokenizer"):
        load_tokenizer(folder)


def test_tokenizer_larger_than_the_embedding_is_refused_with_both_sizes(folder):
    tokenizer = load_tokenizer(folder)
    rows = vocabulary_size(tokenizer)
    check_vocabulary(tokenizer, rows, "a model")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    with pytest.raises(
        CheckpointError, match=rf"tokenizer of a model has {rows + 2} tokens, its embedding only {rows}"
    ):
        check_vocabulary(tokenizer, rows, "a model")
