"""The stages of `gpu_session.py`: each one runs in a process of its own and writes rows as it measures them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from gpu_session import append, read_rows

ROOT = Path(__file__).parents[1]


class Stage:
    """What a stage knows: where its rows go, which ones are there, and the device."""

    def __init__(self, name: str, out: Path, rehearse: bool):
        self.name, self.out, self.rehearse = name, out, rehearse
        self.path = out / "rows.jsonl"
        self.device = "cpu" if rehearse else "cuda:0"
        self.imports = ["gpu_rehearsal"] if rehearse else []
        self._known = {row["name"] for row in read_rows(self.path) if row["stage"] == name and "name" in row}

    def has(self, name: str) -> bool:
        """Whether an earlier start of the session has measured this row."""
        return name in self._known

    def row(self, name: str, **values: object) -> None:
        """Write a row."""
        append(self.path, {"stage": self.name, "name": name, **values})

    def prepare(self) -> None:
        """Register the rehearsal's backends in this process."""
        if self.rehearse:
            import gpu_rehearsal  # noqa: F401


def machine(stage: Stage) -> None:
    """Device, versions and commit."""
    from gpu_limits import Stopwatch, device_facts
    from provenance import provenance

    kind = "cpu" if stage.rehearse else "cuda"
    stage.row("provenance", **provenance())
    stage.row("device", **device_facts(kind))
    stage.row("limits", **Stopwatch(kind).limits())


def build(stage: Stage) -> None:
    """The native and the CUDA library, the latter for this GPU only; in a rehearsal for the emulator."""
    started = time.monotonic()
    if stage.rehearse:
        import gpu_rehearsal

        stage.row("emulator", library=gpu_rehearsal.emulated_library().name, seconds=time.monotonic() - started)
        return
    import torch

    major, minor = torch.cuda.get_device_capability()
    variables = {"EDGEFED_CUDA_ARCHS": f"{major}{minor}", "EDGEFED_CUDA": "1", "EDGEFED_NATIVE": "1"}
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    subprocess.run(command, cwd=ROOT, env=os.environ | variables, check=True)
    from edgefed.kernels.dispatch import why_not_cuda, why_not_native, why_not_triton

    reasons = {"native": why_not_native(), "triton": why_not_triton(stage.device), "cuda": why_not_cuda(stage.device)}
    stage.row("libraries", seconds=time.monotonic() - started, **{n: r or "can run" for n, r in reasons.items()})


def doctor(stage: Stage) -> None:
    """`edgefed doctor`, every finding that is not ok."""
    command = [sys.executable, "-m", "edgefed", "doctor", "--json", *(["--quick"] if stage.rehearse else [])]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    findings = json.loads(result.stdout)
    stage.row("summary", status=result.returncode, **findings["counts"])
    for number, finding in enumerate(findings["findings"]):
        if finding["state"] != "ok":
            stage.row(f"{finding['name']} ({number})", state=finding["state"], found=finding["found"][:300])


def _prove(stage: Stage, cases: list, limit_s: float) -> None:
    """Prove cases; each verdict is a row."""
    from edgefed.kernels import proof
    from edgefed.kernels.verdicts import verdicts_of

    stage.prepare()
    deadline = time.monotonic() + limit_s
    for case in cases:
        proof.prove(stage.device, [case], on_message=print, imports=stage.imports, limit_s=deadline - time.monotonic())
        for verdict in verdicts_of(stage.device).all():
            if verdict.case == case and not stage.has(f"{verdict.backend}: {case}"):
                times = {"ms": verdict.ms, "reference": verdict.reference_ms, "grouped_mm": verdict.grouped_mm_ms}
                times = {name: value for name, value in times.items() if value}
                stage.row(f"{verdict.backend}: {case}", state=verdict.state, reason=verdict.reason, **times)
    if time.monotonic() > deadline:
        raise SystemExit("out of time: start the session again to go on")


def proof(stage: Stage) -> None:
    """What a user's device proves: the standard cases, at the sizes of OLMoE-1B-7B."""
    from edgefed.kernels.proof import standard_cases

    sizes = {"hidden": 64, "width": 32, "experts": 8, "dtype": "float32"} if stage.rehearse else {}
    cases = list(standard_cases(**sizes))
    _prove(stage, cases[:2] + cases[-2:] if stage.rehearse else cases, 1e4 if stage.rehearse else 115)


def correctness(stage: Stage) -> None:
    """Every operation, format, dtype and form on every backend, at small sizes."""
    from edgefed.kernels.verdicts import ROWS, Case

    def layer(dtype: str, storage: str, rows: int, trains: str, rank: int, form: str) -> Case:
        return Case("masked_experts", dtype, storage, 256, 128, rows, rank, trains, form)

    few, some, many = ROWS
    cases = [
        layer("bfloat16", "dense+nf4", some, "weights", 0, "swiglu"),
        layer("bfloat16", "dense+int8", some, "weights", 4, "swiglu"),
        layer("float16", "nf4", few, "tokens", 0, "swiglu"),
        layer("float32", "dense", many, "weights", 0, "swiglu"),
        layer("bfloat16", "nf4 nested", some, "weights", 8, "swiglu"),
        layer("bfloat16", "dense", some, "weights", 0, "other+transposed+bias"),
        layer("bfloat16", "dense", some, "tokens", 0, "swiglu+finish"),
        layer("bfloat16", "int8", few, "nothing", 0, "swiglu"),
        *(Case("quantize_experts", dtype, form) for dtype in ("float32", "bfloat16") for form in ("nf4", "int8")),
        *(Case("router_statistics", "float32", kind, width=64) for kind in ("probability", "softmax", "sigmoid")),
    ]
    if stage.rehearse:
        small = dataclasses.replace(cases[0], hidden=64, width=32, rows=few, dtype="float32")
        cases = [small, cases[-1]]
    _prove(stage, cases, 1e4 if stage.rehearse else 85)


def sanitizer(stage: Stage) -> None:
    """compute-sanitizer on one call of the CUDA kernels: accesses out of bounds, and races in shared memory."""
    tool = shutil.which("compute-sanitizer")
    if stage.rehearse or tool is None:
        stage.row("compute-sanitizer", state="left out", reason="rehearsal" if stage.rehearse else "not installed")
        return
    case = {
        "operation": "masked_experts", "dtype": "bfloat16", "storage": "dense+nf4", "hidden": 128, "width": 64,
        "rows": 1, "trains": "weights", "form": "swiglu",
    }  # fmt: skip
    code = (
        "from edgefed.kernels import proof_runs as r; r.start('cuda:0', []); "
        f"print(r.prove('cuda:0', {case!r}, 'cuda')['state'])"
    )
    for kind in ("memcheck", "racecheck"):
        if stage.has(kind):
            continue
        command = [tool, "--tool", kind, "--error-exitcode", "9", sys.executable, "-c", code]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        said = [line for line in result.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        stage.row(kind, status=result.returncode, said=" ".join(said)[:300])


def speed(stage: Stage) -> None:
    """Wall times beside reference, grouped_mm and bitsandbytes: an OLMoE layer, and one of 128 experts."""
    import gpu_experts
    from gpu_limits import Stopwatch

    stage.prepare()
    kind = "cpu" if stage.rehearse else "cuda"
    watch = Stopwatch(kind)
    limits = watch.limits()
    repetitions = 1 if stage.rehearse else 5
    olmoe = gpu_experts.SMALL if stage.rehearse else gpu_experts.Size(forward_tokens=(1, 16, 512, 4096))
    qwen3 = dataclasses.replace(olmoe, experts=2 * olmoe.experts, width=olmoe.width * 3 // 4)
    for model, size, wanted in (("olmoe", olmoe, ("nf4", "train", "bf16")), ("128 experts", qwen3, ("nf4",))):
        layer = gpu_experts.Layer(size, kind)
        cases = dict(gpu_experts.cases(layer, watch, limits, repetitions))
        for form in wanted:
            for name, run in cases.items():
                if name.startswith(form) and not stage.has(f"{model} {name}"):
                    stage.row(f"{model} {name}", **run())
        del layer
        watch.release()


def profile(stage: Stage) -> None:
    """A profile with NF4 experts, attention and energies of neurons, on each backend: no layer makes the host wait."""
    import torch
    from gpu_limits import Stopwatch

    from edgefed.bench.models import build_model, find_model, random_blocks
    from edgefed.kernels.dispatch import provable_backends
    from edgefed.kernels.masked_experts import IMPLEMENTATIONS
    from edgefed.moe.units import TrainScope

    stage.prepare()
    model = find_model("tiny" if stage.rehearse else "OLMoE-1B-7B")
    moe, _, source = build_model(model, 4, 1, 1, TrainScope(), torch.device(stage.device))
    moe.drop_experts()
    vocabulary, length = moe.config.get_text_config().vocab_size, 24 if stage.rehearse else 2048
    ids = random_blocks(vocabulary, 1, length).input_ids.to(stage.device)
    watch = Stopwatch("cpu" if stage.rehearse else "cuda")
    here = provable_backends("masked_experts", stage.device)
    for backend in ("reference", *(name for name in ("triton", "cuda") if name in here)):
        if stage.has(backend):
            continue
        os.environ["EDGEFED_KERNELS"] = backend
        neurons = backend == "reference" or "neuron_energy" in IMPLEMENTATIONS[backend][1]
        with (
            moe.streaming(source, residency="all", storage="nf4"),
            moe.record_statistics(attention=True, neurons=neurons) as recorder,
        ):

            def run() -> None:
                moe.module.base_model(input_ids=ids, use_cache=False)

            run()  # loads the experts, compiles
            waits = watch.host_waits(run)
            seconds = watch.wall_times({"": run}, 1 if stage.rehearse else 5)[""]
            recorder.take()
        stage.row(backend, host_waits=waits, tokens_per_s=round(length / seconds), energies=neurons)
        if backend != "reference" and waits >= len(moe.layers):
            raise SystemExit(f"{backend}: the host waited {waits} times in {len(moe.layers)} layers of a profile")
    os.environ.pop("EDGEFED_KERNELS", None)


def a_round(stage: Stage) -> None:
    """A federation of two devices on the GPU: serve, two joins, two rounds, by their commands."""
    folder = stage.out / "round"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for device in ("a", "b"):
        lines = [json.dumps({"text": text[start : start + 1500]}) for start in range(0, len(text) - 1500, 500)]
        (folder / f"{device}.jsonl").write_text("\n".join(lines * 3) + "\n", encoding="utf-8")
    edgefed = [sys.executable, "-m", "edgefed"]
    steps = ["--local-steps", "3", "--batch-size", "2", "--sequence-length", "128"]
    serve = [
        *edgefed,
        "serve",
        "--model",
        "tiny",
        "--rounds",
        "2",
        "--min-clients",
        "2",
        "--state",
        "run",
        "--port",
        "0",
    ]
    started = time.monotonic()
    log = (folder / "serve.log").open("w+")
    server = subprocess.Popen([*serve, *steps], cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    clients = []
    try:
        address = _wait_for_address(folder / "serve.log", server)
        for device in ("a", "b"):
            join = [*edgefed, "join", address, "--data", f"{device}.jsonl", "--state", f"state-{device}"]
            output = (folder / f"{device}.log").open("w")
            join += ["--device", stage.device]
            clients.append(subprocess.Popen(join, cwd=folder, stdout=output, stderr=subprocess.STDOUT))
        states = [client.wait(timeout=600) for client in clients]
    finally:
        for process in (server, *clients):
            if process.poll() is None:
                process.kill()
        log.close()
    proofs = [line for line in (folder / "a.log").read_text(errors="replace").splitlines() if "kernels:" in line]
    stage.row("two devices, two rounds", status=states, seconds=time.monotonic() - started, proofs=len(proofs))
    if any(states):
        raise SystemExit((folder / "a.log").read_text(errors="replace")[-500:])


def _wait_for_address(log: Path, server: subprocess.Popen) -> str:
    for _ in range(600):
        for word in log.read_text(errors="replace").split():
            if word.startswith("http://"):
                return word.strip(".,;\"'()")
        if server.poll() is not None:
            break
        time.sleep(0.2)
    raise SystemExit(f"the server did not start: {log.read_text(errors='replace')[-500:]}")


def large_step(stage: Stage) -> None:
    """A training step of all 16 layers of OLMoE-1B-7B: 2 trainable and 62 frozen NF4 experts a layer, under a cap."""
    import torch

    from edgefed.bench.models import build_model, find_model, random_blocks
    from edgefed.moe.units import TrainScope
    from edgefed.protocol.messages import TrainingConfig
    from edgefed.training.savings import make_optimizer
    from edgefed.training.steps import step_setup, take_step

    device = torch.device(stage.device)
    model = find_model("tiny" if stage.rehearse else "OLMoE-1B-7B")
    layers, experts = len(model.shape.layers), model.shape.num_experts
    scope = TrainScope()
    moe, plan, source = build_model(model, layers, 1, 1, scope, device)
    for cap_gib, trainable in ((8, 2), (6, 1)):
        name = f"{cap_gib} GiB, {trainable} trainable, {experts - trainable} frozen"
        if stage.has(name):
            continue
        moe.drop_experts()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(
                cap_gib * 2**30 / torch.cuda.get_device_properties(0).total_memory
            )
        plan = type(plan).of(moe.experts_per_layer, [range(trainable)] * layers, [range(trainable, experts)] * layers)
        moe.apply_plan(plan, source, scope, storage="nf4")
        setup = step_setup(moe, TrainingConfig(local_steps=1, batch_size=1, sequence_length=512))
        setup = dataclasses.replace(setup, checkpointing=True, chunked_loss=True)
        parameters = list(moe.trainable_parameters())
        optimizer = make_optimizer(parameters, "adamw", learning_rate=1e-6, weight_decay=0.0)
        blocks = random_blocks(moe.config.get_text_config().vocab_size, 1, 64 if stage.rehearse else 512)
        ids, labels = blocks.input_ids.to(device), blocks.labels.to(device)
        moe.module.train()
        seconds = []
        for _ in range(2 if stage.rehearse else 4):
            begin = time.perf_counter()
            take_step(moe, optimizer, parameters, ids, labels, setup=setup, max_grad_norm=1.0)
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(round(time.perf_counter() - begin, 3))
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
        stage.row(name, seconds=min(seconds), all_seconds=seconds, peak_gib=round(peak, 2), kernels=setup.kernels)
        del parameters, optimizer


def pretraining(stage: Stage) -> None:
    """Tokens per second of pretraining a small OLMoE in bfloat16: transformers' own experts and edgefed's."""
    import torch
    from transformers import OlmoeConfig, OlmoeForCausalLM

    import edgefed

    edgefed.register_experts()
    stage.prepare()
    small = stage.rehearse
    config = OlmoeConfig(
        vocab_size=256 if small else 8192, hidden_size=64 if small else 768, intermediate_size=32 if small else 384,
        num_hidden_layers=2 if small else 8, num_attention_heads=4 if small else 12, num_experts=4 if small else 32,
        num_experts_per_tok=2 if small else 4, pad_token_id=0,
    )  # fmt: skip
    batch, length = (2, 32) if small else (16, 512)
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config).to(stage.device, torch.float32 if small else torch.bfloat16)
    ids = torch.randint(3, config.vocab_size, (batch, length), device=stage.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for name in ("grouped_mm", "edgefed"):
        if stage.has(name):
            continue
        model.set_experts_implementation(name)
        times = []
        for _ in range(2 if small else 8):
            begin = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if stage.device != "cpu":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        stage.row(name, tokens_per_s=round(batch * length / min(times)))


RUN: dict[str, Callable[[Stage], None]] = {
    "machine": machine, "build": build, "doctor": doctor, "proof": proof, "correctness": correctness,
    "sanitizer": sanitizer, "speed": speed, "profile": profile, "round": a_round, "large-step": large_step,
    "pretraining": pretraining,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=RUN)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    print(f"== {options.stage}", flush=True)
    RUN[options.stage](Stage(options.stage, options.out, options.rehearse))


if __name__ == "__main__":
    main()
