"""Flower's Grid without its processes: ClientApps are called here, each node in a thread of its own."""

from __future__ import annotations

import concurrent.futures
import secrets

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity


class LoopbackGrid(Grid):
    """``nodes``: {node id: node_config}. ``lost``: types of messages of which the first one gets an error."""

    def __init__(self, client_app, nodes, lost=()):
        TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 0, 0
        self.nodes = {node_id: Context(1, node_id, config, RecordDict(), {}) for node_id, config in nodes.items()}
        self.app, self.lost, self.sent = client_app, set(lost), []
        self._pool = concurrent.futures.ThreadPoolExecutor(len(nodes))
        self._replies = {}

    def set_run(self, run):
        raise NotImplementedError

    run = create_message = property(lambda self: None)

    def get_node_ids(self):
        return list(self.nodes)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            ids.append(secrets.token_hex(8))
            vars(message.metadata)["_message_id"] = ids[-1]
            kind, node_id = message.metadata.message_type, message.metadata.dst_node_id
            self.sent.append((kind, node_id, list(message.content["arrays"])))
            self._replies[ids[-1]] = self._pool.submit(self._answer, kind, message, self.nodes[node_id])
        return ids

    def _answer(self, kind, message, context):
        if kind in self.lost:
            self.lost.discard(kind)
            return Message(Error(3, "node unavailable"), reply_to=message)
        return self.app(message, context)

    def pull_messages(self, message_ids):
        done = [each for each in message_ids if self._replies[each].done()]
        return [self._replies.pop(each).result() for each in done]

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError
