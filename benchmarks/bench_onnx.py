"""An exported ONNX model in onnxruntime against transformers on the CPU, with one layer of OLMoE's shape.

    python benchmarks/bench_onnx.py --json benchmarks/results/onnx.json

Tokens per CPU second with one thread each, which other processes disturb less than elapsed time: runs alternate, the
median counts. transformers computes the experts by a loop ("eager") and, for few tokens, by a batched product
("batched_mm"), which copies the 25 MB of an expert for each of its tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy
import onnxruntime
import torch
from provenance import provenance
from transformers import AutoConfig, AutoModelForCausalLM

from edgefed.formats.onnx import MODEL_FILE, export_onnx
from edgefed.moe.model import MoeModel
from edgefed.moe.units import MemorySource

SHAPE = {
    "hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8,
    "num_attention_heads": 16, "num_key_value_heads": 16, "num_hidden_layers": 1, "vocab_size": 256,
}  # fmt: skip
BATCHED_TOKENS = 16
"""More take batched_mm more than 3 GB."""
TARGETS = {"float32": 1.0, "int8": 1.5}
"""Times the tokens per second of transformers eager."""


def run_of(folder: Path) -> Callable[[torch.Tensor], object]:
    """Return a function that computes logits in onnxruntime with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])
    past = {
        value.name: numpy.zeros((1, value.shape[1], 0, value.shape[3]), dtype=numpy.float32)
        for value in session.get_inputs() if value.name.startswith("past")
    }  # fmt: skip

    def run(ids: torch.Tensor) -> object:
        return session.run(None, {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy(), **past})

    return run


def main() -> None:
    """Measure and write the row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="bench-onnx-") as scratch, torch.no_grad():
        folder = Path(scratch)
        AutoModelForCausalLM.from_config(AutoConfig.for_model("olmoe", **SHAPE)).save_pretrained(folder / "model")
        units = {unit.key: tensors for unit, tensors in MoeModel.from_checkpoint(folder / "model").iter_units()}
        runs: dict[str, Callable[[torch.Tensor], object]] = {}
        for dtype in TARGETS:
            export_onnx(MemorySource(units), folder / "model", folder / dtype, dtype=dtype)
            runs[dtype] = run_of(folder / dtype)
        del units
        model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()

        def eager(implementation: str) -> Callable[[torch.Tensor], object]:
            def run(ids: torch.Tensor) -> object:
                model.set_experts_implementation(implementation)
                return model(input_ids=ids, use_cache=False).logits

            return run

        runs |= {name: eager(name) for name in ("eager", "batched_mm")}
        rows = []
        for count in arguments.tokens:
            ids = torch.randint(0, SHAPE["vocab_size"], (1, count))
            chosen = {name: run for name, run in runs.items() if name != "batched_mm" or count <= BATCHED_TOKENS}
            seconds: dict[str, list[float]] = {name: [] for name in chosen}
            for number in range(arguments.runs + 1):
                for name, run in chosen.items():
                    start = time.process_time()
                    run(ids)
                    if number:
                        seconds[name].append(time.process_time() - start)
            rates = {name: count / statistics.median(found) for name, found in seconds.items()}
            ratios = {name: rates[name] / rates["eager"] for name in TARGETS}
            rows.append({"tokens": count, "tokens_per_cpu_s": rates, "times_eager": ratios})
            print(json.dumps(rows[-1]), flush=True)
            result = {"provenance": provenance(), "shape": SHAPE, "targets": TARGETS, "rows": rows}
            if arguments.json:
                arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
