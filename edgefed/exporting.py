"""The model of a run as a checkpoint or an adapter: from the folder of the run, its server, or a device that took part.

An export comes with `RECORD_FILE` and a model card, which say where it is from. A checkpoint also gets a chat template
if the model has none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import msgspec

from edgefed.errors import ConfigError, NetworkError, NotFound
from edgefed.formats.card import CARD_FILE, RECORD_FILE, ExportRecord, model_card
from edgefed.hardware.memory import set_up_allocator
from edgefed.progress import NullProgress, ProgressSink
from edgefed.protocol.messages import FileInfo, Manifest, RoundStatus, RunConfig, UnitInfo

if TYPE_CHECKING:
    from edgefed.formats.device_part import DevicePart
    from edgefed.protocol.slices import UnitSlice
    from edgefed.runs import BlobCheck

Format = Literal["hf", "peft", "gguf", "gguf-adapter", "onnx", "safetensors-delta"]
"""A Hugging Face checkpoint, a PEFT adapter, a model or an adapter for llama.cpp, ONNX, or what changed."""
FORMATS: tuple[str, ...] = get_args(Format)
Dtype = Literal["auto", "float32", "float16", "bfloat16", "q8_0", "q4_0", "int8"]
"""Data type of the weights; "auto": the model's own. "q8_0" and "q4_0" are of GGUF, "int8" of ONNX."""
DTYPES: tuple[str, ...] = get_args(Dtype)
Wanted = int | Literal["best"] | None
"""The model at the start of a round, that with the smallest held-out loss, or the newest."""
OnnxExperts = Literal["products", "operator"]
"""Experts of ONNX: a product of matrices each, which is fast on a CPU, or onnxruntime's operator MoE."""
ONNX_EXPERTS: tuple[str, ...] = get_args(OnnxExperts)


class _Form(msgspec.Struct, frozen=True):
    """What to write."""

    format: Format
    dtype: Dtype
    onnx_experts: OnnxExperts
    base: str | None


class _Model(msgspec.Struct, frozen=True):
    """A model to export: files of its units by SHA-256, and of the units that replace them by key."""

    record: ExportRecord
    run: RunConfig
    manifest: Manifest
    paths: Mapping[str, Path]
    own: Mapping[str, Path] = {}
    history: tuple[RoundStatus, ...] = ()
    """The rounds that made it; a device does not know them."""
    check: BlobCheck | None = None
    """Checks the files while they are read; None: they were checked when they arrived."""
    private: Path | None = None
    """State folder of the device whose private adapters are exported with the model."""
    part: DevicePart | None = None
    """The part of the model that is exported; None: all."""
    items: tuple[UnitInfo | UnitSlice, ...] | None = None
    """The units and slices that it needs; None: those of the manifest."""


def export_model(
    source: str | Path,
    to: Path,
    server_round: Wanted = None,
    *,
    format: Format = "hf",
    dtype: Dtype = "auto",
    global_model: bool = False,
    token: str | None = None,
    onnx_experts: OnnxExperts = "products",
    base: str | None = None,
    planned: bool = False,
    progress: ProgressSink | None = None,
) -> Path:
    """Write a model in the folder ``to``, and return it. ``format``: see `Format`. ``dtype``: of the weights.

    ``source``: the folder of a run, the address of its server, or the state folder of a device. A device exports what
    it has: its own weights where the method exchanges none, otherwise the global model of its last round, with the
    device's private part if it has one; with ``global_model``, the newest global model, from its server.
    ``server_round``: the model at the start of that round; "best": the one that clients evaluated best. ``base``: of a
    delta. ``planned``: of a device, as ONNX, what it computes with: the experts, slices and merged experts of its plan.

    Raises StorageError, StateCorrupt, ConfigError (round not stored, target not empty, nothing to export, a format that
    cannot hold what the run trained), and, where the server is asked, ServerUnreachable, Unauthorized, NotFound.
    """
    sink = progress or NullProgress()
    _check_dtype(format, dtype)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"cannot export to {str(to)!r}: it exists and is not an empty folder")
    is_device = not is_address(source) and (Path(source) / "journal.json").exists()
    if planned and not (is_device and format == "onnx" and server_round is None and not global_model):
        raise ConfigError(
            "`planned` exports what a device computes with, as ONNX: it needs the state folder of a device and "
            "format=onnx, without `server_round` and `global_model`"
        )
    with contextlib.ExitStack() as stack:
        if is_address(source):
            model = stack.enter_context(_server_model(str(source), server_round, format, token, sink))
        elif is_device:
            found = _device_model(Path(source), server_round, format, global_model, token, sink, planned)
            model = stack.enter_context(found)
        else:
            model = stack.enter_context(_run_model(Path(source), server_round, format, sink))
        set_up_allocator()
        sink.phase("export")
        with tempfile.TemporaryDirectory(prefix="edgefed-export-") as scratch:
            _write(model, Path(scratch), to, _Form(format, dtype, onnx_experts, base), sink)
        sink.done()
        return to


def is_address(source: str | Path) -> bool:
    """Whether ``source`` is the address of a server rather than a folder."""
    return str(source).startswith(("http://", "https://"))


_FLOATS = ("auto", "float32", "float16", "bfloat16")
_DTYPES_OF: dict[str, tuple[str, ...]] = {
    "hf": _FLOATS, "peft": ("auto",), "gguf": (*_FLOATS, "q8_0", "q4_0"), "onnx": ("auto", "float32", "int8"),
    "gguf-adapter": ("auto",), "safetensors-delta": ("auto",),
}  # fmt: skip


def _check_dtype(format: Format, dtype: Dtype) -> None:
    """Raise ConfigError if a format has no such data type, or needs a package that is not installed."""
    if dtype not in _DTYPES_OF[format]:
        known = ", ".join(_DTYPES_OF[format])
        raise ConfigError(f"`dtype` of format={format} must be one of {known}; found {dtype!r}")
    if format.startswith("gguf"):
        from edgefed.formats.gguf import load_gguf

        load_gguf()
    elif format == "onnx":
        from edgefed.formats.onnx import check_packages

        check_packages()


def _write(model: _Model, scratch: Path, to: Path, form: _Form, sink: ProgressSink) -> None:
    # Loads torch: a missing run is reported before that.
    from edgefed.formats.weights import new_folder

    # Formats write a folder of their own, which appears when the check of what they read has ended as well.
    with new_folder(to, "model") as folder, model.check or contextlib.nullcontext():
        _write_format(model, scratch, folder, form, sink)


def _write_format(model: _Model, scratch: Path, to: Path, form: _Form, sink: ProgressSink) -> None:
    from edgefed.formats.adapter import export_adapter
    from edgefed.formats.checkpoint import export_checkpoint
    from edgefed.moe.expert_reading import FileSource
    from edgefed.moe.units import ExpertSource
    from edgefed.trainer.private_part import PrivateSource, load_private
    from edgefed.training.steps import train_scope
    from edgefed.training.tokenizer import write_chat_template

    format, dtype = form.format, form.dtype
    start = model.check.start if model.check else lambda sha256: None
    for file in model.manifest.files:
        start(file.sha256)
        shutil.copyfile(model.paths[file.sha256], scratch / file.name)
    files = FileSource(model.manifest.units if model.items is None else model.items, model.paths, start)
    source: ExpertSource = files
    units = {unit.key: unit for unit in model.manifest.units}
    for key, path in model.own.items():
        files.add([units[key]], {units[key].sha256: path})
    write_chat_template(scratch)
    _write_card(scratch / CARD_FILE, model)
    (scratch / RECORD_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(model.record), indent=2) + b"\n")
    scope = train_scope(model.run.training)
    if model.private and (adapters := load_private(model.private, model.run.run_id)):
        source, scope = PrivateSource(source, adapters), dataclasses.replace(scope, attention="lora")
    base, copied = model.record.model, (CARD_FILE, RECORD_FILE)
    name = base.rstrip("/").rpartition("/")[2]
    if format == "peft":
        export_adapter(source, scratch, to, scope=scope, base=base, copied=copied)
    elif format == "gguf":
        from edgefed.formats.gguf import export_gguf

        export_gguf(source, scratch, to, dtype=dtype, scope=scope, name=name, copied=copied, report=sink.message)
    elif format == "gguf-adapter":
        from edgefed.formats.gguf_adapter import export_gguf_adapter

        export_gguf_adapter(source, scratch, to, scope=scope, name=name, copied=copied)
    elif format == "onnx":
        from edgefed.formats.onnx import export_onnx

        export_onnx(source, scratch, to, dtype=dtype, scope=scope, experts=form.onnx_experts, part=model.part)
    elif format == "safetensors-delta":
        from edgefed.formats.delta import export_delta

        export_delta(source, scratch, to, base=base, base_folder=form.base, scope=scope)
    else:
        export_checkpoint(source, scratch, to, dtype=dtype, scope=scope)


def _write_card(path: Path, model: _Model) -> None:
    base_card = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    record = model.record
    hub_name = re.fullmatch(r"[\w.-]+/[\w.-]+", record.model) is not None and not Path(record.model).exists()
    path.write_text(model_card(base_card, record, model.history, hub_name), encoding="utf-8")


def _before(history: Iterable[RoundStatus], server_round: int) -> tuple[RoundStatus, ...]:
    """Return the rounds that made the model at the start of a round."""
    return tuple(done for done in history if done.server_round < server_round)


def _record(
    run: RunConfig, manifest: Manifest, source: Literal["run", "server", "device"], unchanged: bool, own_units: int = 0,
    history: tuple[RoundStatus, ...] = (),
) -> ExportRecord:  # fmt: skip
    return ExportRecord(
        model=run.model, method=run.method, run_id=run.run_id, rounds=run.rounds, server_round=manifest.server_round,
        source=source, own_units=own_units, unchanged=unchanged,
        privacy=history[-1].privacy if history else None,
    )  # fmt: skip


def _round_number(wanted: Wanted, history: Sequence[RoundStatus], run: RunConfig, sink: ProgressSink) -> int | None:
    """The number of the ``wanted`` round; None: the newest. Raises ConfigError if no model was evaluated."""
    if wanted != "best":
        return wanted
    from edgefed.aggregator.stopping import describe_best

    best, note = describe_best(history, private=run.privacy is not None)
    sink.message(note)
    return best


def _check_shared(units: Iterable[UnitInfo], what: str, run: RunConfig) -> None:
    from edgefed.personal.extractors import EXTRACTOR_UNIT

    if any(unit.key == EXTRACTOR_UNIT for unit in units):
        raise ConfigError(
            f"{what} is a run of {run.method}: clients have models of their own, the server has none",
            remedy="Use a client's model with `edgefed predict --state STATE`, or edgefed.load_mixture(STATE).",
        )


def _needed(manifest: Manifest, run: RunConfig, format: Format) -> Manifest:
    """Return a manifest without the units that a format leaves out. Raises ConfigError if it cannot hold the run."""
    if format not in ("peft", "gguf-adapter"):
        return manifest
    from edgefed.formats.adapter import check_scope
    from edgefed.formats.gguf_adapter import check_adapter_scope
    from edgefed.training.steps import train_scope

    (check_scope if format == "peft" else check_adapter_scope)(train_scope(run.training))
    units = tuple(unit for unit in manifest.units if unit.trainable or unit.kind != "expert")
    return msgspec.structs.replace(manifest, units=units)


@contextlib.contextmanager
def _run_model(folder: Path, server_round: Wanted, format: Format, sink: ProgressSink) -> Iterator[_Model]:
    from edgefed.runs import RunReader

    with RunReader(folder) as reader:
        manifest = reader.manifest(_round_number(server_round, reader.history(), reader.run, sink))
        _check_shared(manifest.units, str(folder), reader.run)
        manifest = _needed(manifest, reader.run, format)
        unchanged = reader.is_unchanged(manifest.server_round)
        history = _before(reader.history(), manifest.server_round)
        record = _record(reader.run, manifest, "run", unchanged, history=history)
        check = reader.check(manifest)
        yield _Model(record, reader.run, manifest, check.paths, history=history, check=check)


@contextlib.contextmanager
def _server_model(
    url: str, server_round: Wanted, format: Format, token: str | None, sink: ProgressSink
) -> Iterator[_Model]:
    from edgefed.agent.temporary_cache import TemporaryCache
    from edgefed.runs import changed_before

    with TemporaryCache(url, token, sink) as download:
        status = download.client.status()
        wanted = _round_number(server_round, status.history, status.run, sink)
        manifest = download.client.manifest(wanted or "latest")
        _check_shared(manifest.units, url, status.run)
        manifest = _needed(manifest, status.run, format)
        unchanged = not changed_before(status.history, manifest.server_round, status.run)
        paths = download.fetch([*manifest.files, *manifest.units], {})
        history = _before(status.history, manifest.server_round)
        record = _record(status.run, manifest, "server", unchanged, history=history)
        yield _Model(record, status.run, manifest, paths, history=history)


@contextlib.contextmanager
def _device_model(
    state: Path, server_round: Wanted, format: Format, global_model: bool, token: str | None, sink: ProgressSink,
    planned: bool,
) -> Iterator[_Model]:  # fmt: skip
    from edgefed.agent.agent import BLOBS_FOLDER
    from edgefed.agent.journal import read_journal
    from edgefed.trainer.last_round import load_last_round, load_own_files
    from edgefed.trainer.private_part import load_private

    server = read_journal(state).server
    if (state / "personal").is_dir():
        raise ConfigError(
            f"{state} is of a device with a model of its own, which is not a checkpoint of transformers",
            remedy="Use it with `edgefed predict --state STATE`, or edgefed.load_mixture(STATE).",
        )
    last = load_last_round(state)
    if last is None and not server:
        raise ConfigError(f"{state} is of a device that has not taken part in a round yet: it has no model")
    if global_model or server_round is not None or last is None:
        with _server_model(server, server_round, format, token, sink) as newest:
            yield newest
        return
    own = load_own_files(state)
    manifest = _needed(last.manifest, last.run, format)
    blobs = {path.name: path for path in (state / BLOBS_FOLDER).iterdir()}
    part = _device_part(state, last.run) if planned else None
    items = None if part is None else _planned_units(manifest, part)
    needed: list[UnitInfo | FileInfo | UnitSlice] = [
        *manifest.files,
        *(unit for unit in (manifest.units if items is None else items) if unit.key not in own),
    ]
    missing = {item.sha256 for item in needed} - blobs.keys()
    private = len(load_private(state, last.run.run_id))
    unchanged = manifest.server_round == 1 and not own and not private
    record = _record(last.run, manifest, "device", unchanged, len(own) + private)
    if part is not None:
        record = msgspec.structs.replace(record, planned_experts=part.plan.num_resident)
    model = _Model(record, last.run, manifest, blobs, own, private=state if private else None, part=part, items=items)
    if not missing:
        yield model
        return
    sink.message(
        f"{len(missing)} of {len(needed)} parts of the model are not on this device: downloading them from {server}"
    )
    from edgefed.agent.temporary_cache import TemporaryCache

    with TemporaryCache(server, token, sink) as download:
        try:
            paths = download.fetch(needed, blobs)
        except (NetworkError, NotFound) as error:
            error.remedy = (
                f"This device has {len(needed) - len(missing)} of {len(needed)} parts of the model of round "
                f"{manifest.server_round}. Start its server again, or export the newest model with `global_model`."
            )
            raise
        yield msgspec.structs.replace(model, paths=paths)


def _device_part(state: Path, run: RunConfig) -> DevicePart:
    """What a device computes with. Raises ConfigError if it has no plan of this run."""
    from edgefed.formats.device_part import DevicePart
    from edgefed.methods.registry import make_expert_method
    from edgefed.trainer.saved_plan import SavedPlan, load_saved_plan

    try:
        run_id, saved = load_saved_plan(state)
    except FileNotFoundError:
        run_id, saved = "", SavedPlan()
    if saved.plan is None or run_id != run.run_id:
        raise ConfigError(f"{state} has no plan of run {run.run_id}: the device has not trained in it")
    method = make_expert_method(run.method, run.method_options)
    return DevicePart(
        saved.plan,
        "skip" if saved.plan.neurons else run.training.missing,
        saved.step.setup.expert_storage if saved.step else None,
        bool(method.merging and method.merging.align),
    )


def _planned_units(manifest: Manifest, part: DevicePart) -> tuple[UnitInfo | UnitSlice, ...]:
    """Return what a device needs of the units: all but experts, and those of its plan, whole or in slices."""
    from edgefed.trainer.reports import resident_parts

    others = (unit for unit in manifest.units if unit.kind != "expert")
    return (*others, *resident_parts(manifest.units, part.plan))
