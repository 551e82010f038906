"""``edgefed export``: the model of a run in a format that other tools load."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from edgefed.cli.options import command
from edgefed.config import Setting
from edgefed.errors import ConfigError


@dataclasses.dataclass
class ExportSettings:
    """What `edgefed export` takes."""

    places: Annotated[
        tuple[str, ...],
        Setting("The source, unless --state names it, and the folder to write to.", positional=True,
                metavar="[SOURCE] TARGET"),
    ]  # fmt: skip
    state: Annotated[
        Path | None,
        Setting("Folder of the run, or state folder of a device.", default="edgefed-run, if no SOURCE is given"),
    ] = None
    format: Annotated[
        Literal["hf", "peft", "gguf", "gguf-adapter", "onnx", "safetensors-delta"],
        Setting("A Hugging Face checkpoint, a PEFT adapter of the base model, GGUF for llama.cpp (the model or a LoRA "
                "adapter), ONNX, or the tensors that differ from the base checkpoint.", flag="to"),
    ] = "hf"  # fmt: skip
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16", "q8_0", "q4_0", "int8"],
        Setting("Data type of the weights; q8_0 and q4_0 are of GGUF, int8 is of ONNX.", default="the model's own"),
    ] = "auto"
    onnx_experts: Annotated[
        Literal["products", "operator"],
        Setting("Experts of ONNX: a product of matrices each, which is fast on a CPU, or the operator MoE."),
    ] = "products"
    planned: Annotated[
        bool,
        Setting("Of a device, to ONNX: only the experts of its plan, with slices and merged experts."),
    ] = False
    base: Annotated[
        str | None,
        Setting("Base checkpoint of a delta, a folder or a name on the hub.", default="the model of the run"),
    ] = None
    push_to_hub: Annotated[
        str | None, Setting("Also upload the folder to this repository of the Hugging Face hub.", metavar="OWNER/NAME")
    ] = None
    server_round: Annotated[
        str | None,
        Setting("The model at the start of this round; `best`: the one with the smallest held-out loss.",
                default="the newest", flag="round", metavar="NUMBER|best"),
    ] = None  # fmt: skip
    global_model: Annotated[bool, Setting("Of a device: the newest global model, from its server.", flag="global")] = (
        False
    )
    token: Annotated[str | None, Setting("Token of the server.", variable="EDGEFED_TOKEN", secret=True)] = None
    json: Annotated[bool, Setting("Print path, size and origin as JSON.")] = False


@command("export", ExportSettings)
def export_command(settings: ExportSettings) -> None:
    """Write the model of a run in a format that other tools load.

    SOURCE is the address of a server (http://host:port), the folder of a run, or the state folder of a device. A device
    exports what it has. The folder of a delta, as SOURCE, becomes the checkpoint again. The folder TARGET must not
    exist or be empty; other tools load it without edgefed.
    """
    import msgspec

    from edgefed.api.runs import comparisons, export
    from edgefed.cli.output import TerminalProgress, print_json, print_note, stdout_console
    from edgefed.cli.tables import print_comparisons
    from edgefed.formats.card import read_record
    from edgefed.hardware.memory import format_bytes

    source, target = _source_and_target(settings)
    folder = export(
        source, target, format=settings.format, dtype=settings.dtype, server_round=_round_number(settings.server_round),
        global_model=settings.global_model, token=settings.token, onnx_experts=settings.onnx_experts,
        base=settings.base, planned=settings.planned, push_to_hub=settings.push_to_hub, progress=TerminalProgress(),
    )  # fmt: skip
    size, record = sum(path.stat().st_size for path in folder.iterdir()), read_record(folder)
    found = comparisons(source, token=settings.token)
    if settings.json:
        origin, compared = msgspec.to_builtins(record), msgspec.to_builtins(found)
        print_json({
            "path": str(folder), "form": settings.format, "size_bytes": size, "origin": origin, "comparisons": compared,
        })  # fmt: skip
        return
    print_comparisons(stdout_console(), found, own="this device" in found)
    print_note(f"{record}")
    written = f"wrote {folder} ({format_bytes(size)})"
    if settings.push_to_hub:
        print_note(f"pushed to {settings.push_to_hub}")
    if settings.format == "peft":
        base = f"AutoModelForCausalLM.from_pretrained({record.model if record else 'BASE'!r})"
        print_note(f"{written}: PeftModel.from_pretrained({base}, {str(folder)!r})")
        return
    if settings.format == "gguf":
        print_note(f"{written}: llama-cli -m {folder / 'model.gguf'}")
        return
    if settings.format == "gguf-adapter":
        print_note(f"{written}: llama-cli -m BASE.gguf --lora {folder / 'adapter.gguf'}")
        return
    if settings.format == "safetensors-delta":
        print_note(f"{written}: edgefed export {folder} TARGET makes the checkpoint of it")
        return
    if settings.format == "onnx":
        print_note(f"{written}: onnxruntime.InferenceSession({str(folder / 'model.onnx')!r})")
        return
    print_note(f"{written}: AutoModelForCausalLM.from_pretrained({str(folder)!r})")
    print_note(f"talk to it: edgefed chat {folder}")


def _round_number(text: str | None) -> int | Literal["best"] | None:
    if text is None:
        return None
    if text == "best":
        return "best"
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise ConfigError(f"invalid `server_round`: {text!r}; expected the number of a round, from 1, or best")
    return int(text)


def _source_and_target(settings: ExportSettings) -> tuple[str, str]:
    """(source, target) of the arguments. Raises ConfigError."""
    if len(settings.places) > 2:
        raise ConfigError(f"export takes a source and a target, found {len(settings.places)} arguments")
    *sources, target = settings.places
    if sources and settings.state is not None:
        raise ConfigError(
            f"two sources are given: {sources[0]} and `state={settings.state}`", remedy="Leave one of them out."
        )
    return sources[0] if sources else str(settings.state or "edgefed-run"), target
