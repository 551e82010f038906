"""The model of a run as a checkpoint or an adapter: from the folder of the run, its server, or a device that took part.

An export comes with `RECORD_FILE` and a model card, which say where it is from. A checkpoint also gets a chat template
if the model has none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import msgspec

from edgefed import __version__
from edgefed.errors import ConfigError, NetworkError, NotFound, StateCorrupt
from edgefed.hardware.memory import set_up_allocator
from edgefed.progress import NullProgress, ProgressSink, counted
from edgefed.protocol.messages import FileInfo, Manifest, RoundStatus, RunConfig, UnitInfo
from edgefed.protocol.privacy import PrivacyStatus

if TYPE_CHECKING:
    from edgefed.runs import BlobCheck

RECORD_FILE, CARD_FILE = "edgefed.json", "README.md"
"""In the folder of an export."""
CONNECT_LIMIT_S = 20.0
Format = Literal["hf", "peft", "gguf"]
"""A Hugging Face checkpoint, a PEFT adapter of the base model, or a file for llama.cpp."""
FORMATS: tuple[str, ...] = get_args(Format)
Dtype = Literal["auto", "float32", "float16", "bfloat16", "q8_0", "q4_0"]
"""Data type of the weights; "auto": the model's own. The last ones are of GGUF."""
DTYPES: tuple[str, ...] = get_args(Dtype)


class ExportRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where an exported model is from. ``server_round``: the model at the start of this round.

    ``source``: a run's folder, its server, or a device. ``own_units``: parts that are the device's own. ``unchanged``:
    no client has changed the model yet. ``privacy``: what the model reveals of a client at most; None: without noise.
    """

    model: str
    method: str
    run_id: str
    rounds: int
    server_round: int
    source: Literal["run", "server", "device"]
    own_units: int = 0
    unchanged: bool = False
    privacy: PrivacyStatus | None = None
    edgefed_version: str = __version__

    def __str__(self) -> str:
        if self.server_round > self.rounds:
            when = f"after all {counted(self.rounds, 'round')}"
        elif self.server_round == 1:
            when = f"before round 1 of {self.rounds}"
        else:
            when = f"after round {self.server_round - 1} of {self.rounds}"
        whose = f"this device's own model ({self.own_units} parts of its own)" if self.own_units else "the global model"
        changed = "; no client has changed it: it is the model that the run began with" if self.unchanged else ""
        return f"{whose} of {self.model} {when}, method {self.method}{changed}"


class _Model(msgspec.Struct, frozen=True):
    """A model to export: files of its units by SHA-256, and of the units that replace them by key."""

    record: ExportRecord
    run: RunConfig
    manifest: Manifest
    paths: Mapping[str, Path]
    own: Mapping[str, Path] = {}
    check: BlobCheck | None = None
    """Checks the files while they are read; None: they were checked when they arrived."""
    private: Path | None = None
    """State folder of the device whose private adapters are exported with the model."""


def export_model(
    source: str | Path,
    to: Path,
    server_round: int | None = None,
    *,
    format: Format = "hf",
    dtype: Dtype = "auto",
    global_model: bool = False,
    token: str | None = None,
    progress: ProgressSink | None = None,
) -> Path:
    """Write a model in the folder ``to``, and return it. ``format``: see `Format`. ``dtype``: of the weights.

    ``source``: the folder of a run, the address of its server, or the state folder of a device. A device exports what
    it has: its own weights where the method exchanges none, otherwise the global model of its last round, with the
    device's private part if it has one; with ``global_model``, the newest global model, from its server.
    ``server_round``: the model at the start of that round.

    Raises StorageError, StateCorrupt, ConfigError (round not stored, target not empty, nothing to export, a format that
    cannot hold what the run trained), and, where the server is asked, ServerUnreachable, Unauthorized, NotFound.
    """
    sink = progress or NullProgress()
    _check_dtype(format, dtype)
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ConfigError(f"cannot export to {str(to)!r}: it exists and is not an empty folder")
    with contextlib.ExitStack() as stack:
        if is_address(source):
            model = stack.enter_context(_server_model(str(source), server_round, format, token, sink))
        elif (Path(source) / "journal.json").exists():
            model = stack.enter_context(_device_model(Path(source), server_round, format, global_model, token, sink))
        else:
            model = stack.enter_context(_run_model(Path(source), server_round, format))
        set_up_allocator()
        sink.phase("export")
        with tempfile.TemporaryDirectory(prefix="edgefed-export-") as scratch:
            _write(model, Path(scratch), to, format, dtype, sink)
        sink.done()
        return to


def read_record(folder: Path) -> ExportRecord | None:
    """Where a checkpoint is from; None if edgefed has not exported it."""
    path = folder / RECORD_FILE
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=ExportRecord)
    except msgspec.DecodeError as error:
        raise StateCorrupt(f"{path} is not a file that edgefed wrote: {error}") from error


def is_address(source: str | Path) -> bool:
    """Whether ``source`` is the address of a server rather than a folder."""
    return str(source).startswith(("http://", "https://"))


def _check_dtype(format: Format, dtype: Dtype) -> None:
    """Raise ConfigError if a format has no such data type, or needs a package that is not installed."""
    if format == "gguf":
        from edgefed.formats.gguf import load_gguf

        load_gguf()
    elif format == "peft" and dtype != "auto":
        raise ConfigError("`dtype` has no effect with format=peft: adapters are float32", remedy="Leave it out.")
    elif dtype.startswith("q"):
        raise ConfigError(f"a checkpoint has no data type {dtype}", remedy="Export with `format=gguf`.")


def _write(model: _Model, scratch: Path, to: Path, format: Format, dtype: Dtype, sink: ProgressSink) -> None:
    # Loads torch: a missing run is reported before that.
    from edgefed.formats.weights import new_folder

    # Formats write a folder of their own, which appears when the check of what they read has ended as well.
    with new_folder(to, "model") as folder, model.check or contextlib.nullcontext():
        _write_format(model, scratch, folder, format, dtype, sink)


def _write_format(model: _Model, scratch: Path, to: Path, format: Format, dtype: Dtype, sink: ProgressSink) -> None:
    from edgefed.formats.adapter import export_adapter
    from edgefed.formats.checkpoint import export_checkpoint
    from edgefed.moe.expert_reading import FileSource
    from edgefed.moe.units import ExpertSource
    from edgefed.trainer.private_part import PrivateSource, load_private
    from edgefed.training.steps import train_scope
    from edgefed.training.tokenizer import write_chat_template

    start = model.check.start if model.check else lambda sha256: None
    for file in model.manifest.files:
        start(file.sha256)
        shutil.copyfile(model.paths[file.sha256], scratch / file.name)
    files = FileSource(model.manifest.units, model.paths, start)
    source: ExpertSource = files
    units = {unit.key: unit for unit in model.manifest.units}
    for key, path in model.own.items():
        files.add([units[key]], {units[key].sha256: path})
    write_chat_template(scratch)
    _add_card(scratch / CARD_FILE, model.record)
    (scratch / RECORD_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(model.record), indent=2) + b"\n")
    scope = train_scope(model.run.training)
    base, copied = model.record.model, (CARD_FILE, RECORD_FILE)
