"""Two small models of text for clients that have none: a recurrent one over tokens, a convolutional one over bytes.

    text-gru   packaged tokenizer; Embedding(2048, 128), one GRU of 256                   width 256, 558,592 parameters
    text-cnn   bytes; Embedding(259, 64), convolutions over 3, 5 and 7 of them with 100
               filters each, ReLU, the largest of a text (Kim, arXiv 1408.5882)           width 300, 112,876 parameters

Inputs are {"input_ids", "attention_mask"}, (B, T) each, padding last. Both without the header.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from edgefed.personal.text_encoder import masked_mean

TEXT_GRU, TEXT_CNN = "text-gru", "text-cnn"
TEXT_NETWORKS = (TEXT_GRU, TEXT_CNN)


class GruExtractor(nn.Module):
    """-> (B, 256), the mean of the states; ``per_token``: (B, T, 256), the states."""

    width = 256

    def __init__(self, vocab_size: int, per_token: bool):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 128)
        self.gru = nn.GRU(128, self.width, batch_first=True)
        self.per_token = per_token

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        states, _ = self.gru(self.embedding(inputs["input_ids"]))
        return states if self.per_token else masked_mean(states, inputs["attention_mask"])


class ByteCnnExtractor(nn.Module):
    """-> (B, 300): of each filter its largest answer in the text."""

    width = 300

    def __init__(self, vocab_size: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 64)
        self.convolutions = nn.ModuleList(nn.Conv1d(64, 100, size, padding=size // 2) for size in (3, 5, 7))

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        mask = inputs["attention_mask"].unsqueeze(1)  # (B, 1, T)
        vectors = self.embedding(inputs["input_ids"]).transpose(1, 2) * mask
        # ReLU gives nothing below 0, so what is 0 at padding is never the largest by mistake.
        answers = [torch.relu(convolution(vectors)) * mask for convolution in self.convolutions]
        return torch.cat([answer.amax(2) for answer in answers], dim=1)
