"""A client with a loss, a callback and an evaluation of its own: ``python own_loss.py SERVER DATA``.

The functions stay on this device. The server and the other clients need not know of them.
"""

import sys

import torch
from torch.nn import functional as F

import edgefed


def smoothed(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with label smoothing: logits (B, S, V), labels (B, S), where -100 does not count."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), label_smoothing=0.1)


def show(server_round: int, step: int, loss: float) -> None:
    """Print the loss of a step."""
    print(f"round {server_round} step {step}: {loss:.3f}")


def certainty(model: torch.nn.Module) -> dict[str, float]:
    """How sure the model is of its next token after a prompt of one token, on average."""
    probabilities = model(input_ids=torch.arange(8, device=model.device)[:, None]).logits.softmax(-1)
    return {"certainty": probabilities.amax(-1).mean().item()}


if __name__ == "__main__":
    server, data = sys.argv[1:]
    client = edgefed.Client(server, data=data, memory="4GiB", final_evaluation="never")
    client.run(loss=smoothed, on_step=show, evaluate=certainty, on_round=lambda number, metrics: print(metrics))
