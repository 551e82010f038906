"""The ClientApp of a device: it hands messages to the device's warm process, and the process's answers to Flower."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgefed.agent.agent import BLOBS_FOLDER
from edgefed.agent.cache import BlobCache
from edgefed.api.client import Client
from edgefed.errors import ConfigError, EdgefedError
from edgefed.flower import records
from edgefed.flower.device_process import DeviceProcess
from edgefed.flower.tasks import Ended, Introduction, RoundReply, RoundTask, failed
from edgefed.protocol.messages import Message

logger = logging.getLogger("edgefed.flower")

NODE_SETTINGS = ("data", "memory", "name", "state", "device", "threads")
"""Settings of `edgefed.Client` that the default takes from the SuperNode's ``--node-config``."""


def settings_of_node(context: Any) -> Client:
    """The settings in the configuration of a SuperNode, which its owner gives; the server cannot change them.

    Raises ConfigError if it has no ``data``.
    """
    given = {name: context.node_config[name] for name in NODE_SETTINGS if name in context.node_config}
    if "data" not in given:
        raise ConfigError(
            "the SuperNode has no training data",
            remedy="Start flower-supernode with --node-config 'data=\"my.jsonl\"', or pass `settings` to "
            "make_client_app.",
        )
    return Client("", **{"state": Path(f"edgefed-flower-{context.node_id}"), **given})


def make_client_app(
    settings: Callable[[Any], Client] = settings_of_node, *, mods: Sequence[Callable[..., Any]] | None = None
) -> Any:
    """A Flower ClientApp that trains with edgefed on this device.

    Args:
        settings: Returns the settings of the device for Flower's Context. Their server, token and invitation are not
            used. Every device needs a ``state`` of its own.
        mods: Flower mods.

    The model stays loaded in a process of its own between messages, see `edgefed.flower.device_process`. Raises
    ConfigError if flwr is not installed.
    """
    app = records.flower()
    from flwr.clientapp import ClientApp

    client_app = ClientApp(mods=list(mods or []))

    def answer(message: Any, reply: Message, server_round: int = 0) -> Any:
        content = records.pack_reply(reply, server_round) if isinstance(reply, RoundReply) else records.pack(reply)
        return app.Message(content, reply_to=message)

    def process(context: Any) -> tuple[Client, DeviceProcess]:
        client = settings(context)
        client.state = client.state.expanduser().absolute()
        fields = {field.name for field in dataclasses.fields(client)}
        return client, DeviceProcess(client.state, {name: _plain(getattr(client, name)) for name in sorted(fields)})

    def join(message: Any, context: Any) -> Any:
        try:
            return answer(message, process(context)[1].introduce())
        except EdgefedError as error:
            return answer(message, Introduction(error=_refusal(error).error))

    def train(message: Any, context: Any) -> Any:
        server_round = 0
        try:
            task = records.unpack(message.content, RoundTask)
            server_round = task.assignment.server_round
            client, device = process(context)
            records.store_blobs(message.content, BlobCache(client.state / BLOBS_FOLDER, records.NoSource()))
            return answer(message, device.work(task), server_round)
        except EdgefedError as error:
            return answer(message, _refusal(error), server_round)

    def end(message: Any, context: Any) -> Any:
        process(context)[1].end()
        return answer(message, Ended())

    client_app.query("join")(join)
    client_app.train()(train)
    client_app.query("end")(end)
    return client_app


def _refusal(error: EdgefedError) -> RoundReply:
    logger.error("%s %s", error, error.remedy)
    return failed(error)


def _plain(value: object) -> object:
    return str(value) if isinstance(value, Path) else value
