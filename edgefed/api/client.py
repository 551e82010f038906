"""`Client`: takes part in a federated run with the data and memory of this machine."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from edgefed.api.events import ClientEvent, EventSink
from edgefed.config import Setting, check_settings, parse_share
from edgefed.errors import ConfigError, DataError
from edgefed.tracking import TRACK, check_trackers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from edgefed.agent.summary import RunSummary
    from edgefed.join import JoinConfig
    from edgefed.preview import Preview
    from edgefed.progress import ProgressSink
    from edgefed.training.records import RecordFields

GREETING_S = 3.0
"""Time limit of the first contact, before the device loads."""
StorageChoice = Literal["auto", "full", "int8", "nf4"]


@dataclasses.dataclass
class Client:
    """Take part in a run with this machine and its own data.

    >>> import edgefed
    >>> client = edgefed.Client("http://192.168.1.5:8470", data="my.jsonl", memory="2GiB")
    >>> summary = client.run(on_event=print)                                              # doctest: +SKIP

    ``data`` may also be an iterable of records (dicts): a `datasets.Dataset`, a streaming `datasets.IterableDataset`, a
    generator. `check_data`, `preview` or `run` reads it once, into ``spooled-data.jsonl`` in ``state``, and ``data``
    becomes the path of this file. ``max_records`` and ``max_bytes`` end the reading; without them more than 1 GiB is an
    error.

    Sizes are texts such as "2GiB" or numbers of bytes; shares are texts such as "25%" or numbers up to 1. Raises
    ConfigError when settings are invalid or contradict each other.
    """

    server: Annotated[str, Setting("Address of the server, or a join link.", positional=True)]
    data: Annotated[
        str | Iterable[Mapping[str, Any]],
        Setting("Training data, which stays on this device: a .txt, .jsonl, .json, .csv or .parquet file, a folder of "
                "them, a data set of the Hugging Face hub, or silo:NAME; with `task`, labelled examples."),
    ]  # fmt: skip
    _: dataclasses.KW_ONLY
    prompt_field: Annotated[
        str | None, Setting("Field of a record with the prompt.", default="instruction, prompt, question, ...")
    ] = None
    response_field: Annotated[
        str | None, Setting("Field of a record with the response.", default="response, output, answer, ...")
    ] = None
    text_field: Annotated[str | None, Setting("Field of a record with plain text to continue.", default="text")] = None
    max_records: Annotated[int | None, Setting(hidden=True)] = None
    max_bytes: Annotated[str | int | None, Setting(hidden=True)] = None
    deduplicate: Annotated[bool, Setting("Use each record of the data once.")] = False
    task: Annotated[
        Literal["images", "text", "next-token"] | None,
        Setting("In a run of fedmoe: train a model of your own, on labelled images or texts, or to continue text."),
    ] = None
    model: Annotated[
        str | None,
        Setting("With `task`: cnn1 to cnn5, text-gru, text-cnn, package:function, or a checkpoint folder (text: also a "
                "hub id). It stays on this device."),
    ] = None  # fmt: skip
    resize: Annotated[
        bool, Setting("With `task=images`: scale images that are not 32x32 and crop them at the centre.")
    ] = False
    method: Annotated[
        str | None,
        Setting("Your own method, as file.py:Class or module:Class, where the run uses one. It must be the server's."),
    ] = None
    memory: Annotated[
        str | int | None,
        Setting("Memory limit, e.g. 2GiB; default: measured before each round. On a CPU it limits the process, on a "
                "GPU what torch allocates there."),
    ] = None  # fmt: skip
    device: Annotated[
        str | None, Setting("cpu, cuda, cuda:1, or the UUID of a GPU or MIG instance; default: the best one here.")
    ] = None
    device_profile: Annotated[
        str | None,
        Setting("Plan within the memory of another device, e.g. jetson-orin-nano-8gb.", formerly="profile"),
    ] = None
    experts: Annotated[str | float, Setting("Largest share of the model's experts to keep resident, e.g. 25%.")] = (
        "100%"
    )
    compute: Annotated[str | float, Setting("Share of the resident experts that are trained in one batch.")] = "100%"
    expert_storage: Annotated[
        StorageChoice,
        Setting("Storage of the weights of frozen experts: 4 or 8 bits, unchanged (full), or 4 bits where memory is "
                "short (auto)."),
    ] = "auto"  # fmt: skip
    profile_storage: Annotated[
        StorageChoice,
        Setting("Storage of experts during profiling: 4 or 8 bits, unchanged (full), or unchanged as long as each "
                "expert needs to be read only once (auto)."),
    ] = "auto"  # fmt: skip
    stream_experts: Annotated[
        Literal["auto", "always", "never"],
        Setting("Stream frozen experts that do not fit from files in the state folder (for a GPU, from host memory), a "
                "layer at a time. auto: if a step takes at most twice as long."),
    ] = "auto"  # fmt: skip
    private: Annotated[
        Literal["none", "adapter"],
        Setting("Also train a private part: an adapter of the attention that never leaves this device. Exports of its "
                "`state` include it."),
    ] = "none"  # fmt: skip
    lora_rank: Annotated[
        int | None,
        Setting("Rank of the LoRA adapters on this device, in a run that allows smaller ones than its own.",
                default="the run's, or what memory has room for", minimum=1),
    ] = None  # fmt: skip
    held_out: Annotated[str | float, Setting("Share of the records held out for evaluation, or 0.")] = "10%"
    final_evaluation: Annotated[
        Literal["auto", "always", "never"],
        Setting("Evaluate the final model on this device's held-out text; auto: unless that downloads more than the "
                "whole run did."),
    ] = "auto"  # fmt: skip
    compare_alone: Annotated[
        bool,
        Setting("At the end also train as many steps without the federation, for comparison. Keeps the model of the "
                "first round on disk."),
    ] = False  # fmt: skip
    state: Annotated[Path, Setting("Folder for identity, downloads and pending updates.")] = Path("edgefed-client")
    new_identity: Annotated[
        bool, Setting("Join as a new client: for a state folder that was copied from another device.")
    ] = False
    name: Annotated[str | None, Setting("Name of this device in `edgefed status`.", default="its host name")] = None
    token: Annotated[str | None, Setting("Token of the server.", variable="EDGEFED_TOKEN", secret=True)] = None
    invitation: Annotated[
        str | None,
        Setting("Invitation to join with, ID.SECRET, where SERVER is not a join link.", variable="EDGEFED_INVITATION",
                secret=True),
    ] = None  # fmt: skip
    threads: Annotated[int | None, Setting("CPU threads; default: chosen by torch.", minimum=1)] = None
    track: Annotated[tuple[str, ...], TRACK] = ()

    def __post_init__(self) -> None:
        check_settings(self)
        self._check_source()
        self.state, self.track = Path(self.state), check_trackers(self.track)
        parse_share(self.experts, "experts")
        parse_share(self.compute, "compute")
        parse_share(self.held_out, "held_out", zero=True)
        if self.memory is not None and self.device_profile:
            raise ConfigError("`memory` and `device_profile` both set the memory limit", remedy="Set one of them.")
        if self.model and not self.task:
            raise ConfigError(
                f"`model={self.model}` needs `task`", remedy="Set `task` to images, text or next-token, or remove it."
            )
        if self.compare_alone and self.final_evaluation == "never":
            raise ConfigError("`compare_alone` needs `final_evaluation`", remedy="Set `final_evaluation=auto`.")
        if self.private != "none" and self.task:
            raise ConfigError(
                f"`private` has no effect with `task={self.task}`: the whole model is private",
                remedy="Remove one of them.",
            )
        if self.lora_rank and self.task:
            raise ConfigError(f"`lora_rank` has no effect with `task={self.task}`: no adapters", remedy="Remove it.")
        if self.resize and self.task != "images":
            raise ConfigError("`resize` needs `task=images`", remedy="Set `task=images`, or remove `resize`.")
        if self.fields and self.task in ("images", "text"):
            raise ConfigError(
                f"`prompt_field`, `response_field` and `text_field` have no effect with `task={self.task}`",
                remedy="Remove them; labelled texts have the fields text and label.",
            )

    @property
    def fields(self) -> RecordFields:
        """Names of the fields of the data's records."""
        from edgefed.training.records import RecordFields

        return RecordFields(self.prompt_field, self.response_field, self.text_field, self.deduplicate)

    def _check_source(self) -> None:
        if isinstance(self.data, str) and self.max_records is None and self.max_bytes is None:
            return
        from edgefed.training.spool import check_limits

        check_limits(self.data, self.max_records, self.max_bytes)
        if isinstance(self.data, Path):
            self.data = str(self.data)
        elif self.task in ("images", "text"):
            raise ConfigError(
                f"`task={self.task}` needs the path of labelled examples as `data`, found {type(self.data).__name__}",
                remedy="Write a data set to a file first, such as dataset.to_json('data.jsonl').",
            )

    def check_data(self, progress: ProgressSink | None = None) -> None:
        """Raise DataError if the data is not found, has another format, or its first records cannot be used.

        Loads no torch and reads no further than the first usable record; an iterable of records is read to
        its end or limit and written to the state folder, which ``progress`` shows.
        """
        if not isinstance(self.data, str):
            from edgefed.agent.journal import LOCK_FILE
            from edgefed.disk import FolderLock, make_private
            from edgefed.training.spool import SPOOL_FILE, spool_records

            path = make_private(self.state) / SPOOL_FILE
            lock = FolderLock(self.state, LOCK_FILE)  # another process may train on the file
            try:
                spool_records(self.data, path, self.fields, self.max_records, self.max_bytes, progress)
            finally:
                lock.release()
            self.data, self.max_records, self.max_bytes = str(path), None, None
        elif self.task is None or self.task == "next-token":
            from edgefed.training.data import check_data

            check_data(self.data, self.fields)
        elif self.task == "text":
            from edgefed.personal.labelled_text import check_labelled_texts

            check_labelled_texts(self.data)
        elif not self.data.startswith("glyphs:") and not Path(self.data).expanduser().exists():
            raise DataError(
                f"file not found: {self.data}",
                remedy="Pass a .npz file with images and labels, or a folder with one subfolder of images per class.",
            )

    @property
    def memory_bytes(self) -> int | None:
        """The memory limit in bytes; None: measured before each round. Raises ConfigError, UnknownProfile."""
        from edgefed.hardware.budget import plan_budget
        from edgefed.hardware.memory import parse_bytes
        from edgefed.hardware.profiles import facts_of, find_profile

        if self.device_profile:
            return plan_budget(facts_of(find_profile(self.device_profile))).now_bytes
        return None if self.memory is None else parse_bytes(str(self.memory))

    def run(
        self,
        on_event: Callable[[ClientEvent], None] | None = None,
        *,
        progress: ProgressSink | None = None,
        stop: threading.Event | None = None,
        on_round: Callable[[int, Mapping[str, float]], None] | None = None,
        on_step: Callable[[int, int, float], None] | None = None,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        evaluate: Callable[[PreTrainedModel], Mapping[str, float]] | None = None,
    ) -> RunSummary:
        """Take part until the run is over or ``stop`` is set, and return what was done.

        ``on_event`` gets phases and messages; ``progress`` is a display that gets them instead. ``on_round`` gets
        the number of each round that was trained, and its metrics; its error ends the run. Raises the errors of
        `edgefed.errors`: ConfigError, DataError, BudgetTooSmall, OutOfMemory, DeviceLost, NetworkError, StorageError.

        Three functions take part in the training of the server's model, on this device alone. ``loss(logits, labels)``
        replaces cross-entropy: logits (B, S, V) of the model, labels (B, S), of which label i + 1 belongs to logits i
        and -100 does not count; returns a scalar tensor. ``on_step(server_round, step, loss)`` is called after each
        step. ``evaluate(model)`` returns numbers by name, which join the metrics of the round: the model is a
        `transformers.PreTrainedModel` with this device's resident experts, after the steps of a round. An error of
        ``loss`` or ``on_step`` ends the run as a ConfigError that names the function; the round is trained again when
        the client runs again. One of ``evaluate`` is reported, and training goes on.
        """
        from edgefed.agent.addresses import check_base_url, parse_link
        from edgefed.disk import check_folder

        if self.task is not None and (loss or on_step or evaluate):
            raise ConfigError(
                f"`loss`, `on_step` and `evaluate` have no effect with `task={self.task}`",
                remedy="Put the loss into your own model, or remove them.",
            )
        check_base_url(parse_link(self.server).address)
        check_folder(self.state)
        memory_bytes = self.memory_bytes
        sink = progress or EventSink(on_event)
        self.check_data(sink)
        self._greet(sink)
        config = self.load(memory_bytes, sink)
        from edgefed.join import run_agent

        if on_round is not None:
            config = dataclasses.replace(config, on_round=lambda run, number, metrics: on_round(number, metrics))
        if loss or on_step or evaluate:
            from edgefed.training.user_functions import UserFunctions

            config = dataclasses.replace(config, functions=UserFunctions(loss, on_step, evaluate))
        try:
            return run_agent(config, sink, stop or threading.Event())
        finally:
            sink.done()

    def preview(
        self, on_event: Callable[[ClientEvent], None] | None = None, *, progress: ProgressSink | None = None
    ) -> Preview:
        """Say what this device would do in the run, without registering with the server or training.

        Checks the data, measures memory, the connection and the time of a step with random weights, and plans as
        `run` would. Arguments and errors are those of `run`; a model that does not fit raises BudgetTooSmall.
        """
        from edgefed.agent.addresses import check_base_url, parse_link
        from edgefed.agent.transport import AggregatorClient

        check_base_url(parse_link(self.server).address)
        if self.task is not None:
            raise ConfigError(
                f"a preview has no effect with `task={self.task}`: it plans the experts of the server's model",
                remedy="Remove one of them.",
            )
        memory_bytes = self.memory_bytes
        sink = progress or EventSink(on_event)
        self.check_data(sink)
        with AggregatorClient(self.server, token=self.token, invitation=self.invitation or "") as server:
            status = server.status()
            sink.message(f"connected to {server.base_url}")
            config = self.load(memory_bytes, sink)
            from edgefed.preview import make_preview

            try:
                return make_preview(config, server, status, sink)
            finally:
                sink.done()

    def load(self, memory_bytes: int | None, sink: ProgressSink) -> JoinConfig:
        """Load torch, and return the settings of the device."""
        import platform

        assert isinstance(self.data, str), "`check_data` writes records to a file"
        sink.phase("load")
        from edgefed.hardware.occupancy import AgentRegistry

        # Importing torch takes seconds: register first, so that agents that start together see each other.
        AgentRegistry().enter(limit_bytes=memory_bytes)
        import torch

        from edgefed.join import JoinConfig

        if self.method:
            from edgefed.methods.custom import load_method

            load_method(self.method)
        if self.threads:
            torch.set_num_threads(self.threads)
        config = JoinConfig(
            server=self.server,
            data=self.data,
            state=self.state,
            name=self.name or platform.node() or "device",
            token=self.token,
            invitation=self.invitation or "",
            new_identity=self.new_identity,
            memory_bytes=memory_bytes,
            device=self.device,
            expert_share=parse_share(self.experts, "experts"),
            compute_share=parse_share(self.compute, "compute"),
            expert_storage=self.expert_storage,
            profile_storage=self.profile_storage,
            stream_experts=self.stream_experts,
            private=self.private,
            lora_rank=self.lora_rank,
            held_out_share=parse_share(self.held_out, "held_out", zero=True),
            fields=self.fields,
            task=self.task,
            model=self.model,
            resize=self.resize,
            final_evaluation=self.final_evaluation,
            compare_alone=self.compare_alone,
            track=self.track,
        )
        sink.done()
        return config

    def _greet(self, sink: ProgressSink) -> None:
        """Tell at once whether the server answers: the device then loads for seconds before it joins."""
        from edgefed.agent.transport import AggregatorClient
        from edgefed.errors import EdgefedError

        with AggregatorClient(self.server, token=self.token, connect_s=GREETING_S, read_s=GREETING_S) as client:
            try:
                client.health()
                sink.message(f"connected to {client.base_url}")
            except ConfigError:
                raise
            except EdgefedError as error:
                sink.message(f"{error}; trying again once this device is ready")
