"""A real aggregator process over a toy run: ``serve_toy.py '{"state_folder": ..., "die": "after:Store.record_fold"}'``.

``die`` kills the process with SIGKILL before or after a call of one function (the first, or ``...:N``, the N-th), so a
crash can be put between any two steps without a hook in the product. ``stop:...`` sends SIGTERM before the call.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import signal
import sys
import time
from pathlib import Path

import toy_run

from edgefed.aggregator import aggregation, blobs, bucket, server, store, uploads

PLACES = {
    "UploadFolder.promote": (uploads.UploadFolder, "promote"),
    "Store.record_update": (store.Store, "record_update"),
    "fold_round": (aggregation, "fold_round"),
    "Bucket.collect": (bucket.Bucket, "collect"),
    "Bucket.publish": (bucket.Bucket, "publish"),
    "BlobBatch.flush": (blobs.BlobBatch, "flush"),
    "Store.record_fold": (store.Store, "record_fold"),
    "Store.prune": (store.Store, "prune"),
}


def die_at(place: str) -> None:
    when, name, *number = place.split(":")
    calls = itertools.count(1)
    fatal = int(number[0]) if number else 1
    owner, attribute = PLACES[name]
    function = getattr(owner, attribute)

    @functools.wraps(function)
    def deadly(*args, **options):
        if next(calls) < fatal:
            return function(*args, **options)
        if when == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1.0)  # the server shuts down meanwhile
            return function(*args, **options)
        if when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **options)
        os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, attribute, deadly)


def main() -> None:
    options = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.DEBUG, format="%(levelname)s %(name)s %(message)s")
    if place := options.pop("die", None):
        die_at(place)
    bucket.PIECE_BYTES = options.pop("piece_bytes", bucket.PIECE_BYTES)
    for name in ("state_folder", "ready_file"):
        options[name] = Path(options[name])
    server.run_server(server.ServerConfig(port=0, **options), make_method=toy_run.make_method)


if __name__ == "__main__":
    main()
