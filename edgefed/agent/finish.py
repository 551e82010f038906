"""The end of a run on a device: compare the final model with others on the device's own text, and report it."""

from __future__ import annotations

import logging

from edgefed.agent.cache import BlobCache
from edgefed.agent.transport import AggregatorClient
from edgefed.errors import EdgefedError
from edgefed.hardware.memory import format_bytes
from edgefed.progress import ProgressSink
from edgefed.protocol.comparison import COMPARING_PHASE, FREE_DOWNLOAD_BYTES, Comparison
from edgefed.protocol.messages import Heartbeat, RunConfig
from edgefed.protocol.trainer import Fetch, Trainer

logger = logging.getLogger("edgefed.agent")

COMPARISON_PATIENCE_S = 60.0
"""How long a download for the comparison is tried again."""
EVALUATIONS = ("auto", "always", "never")
"""Whether a device evaluates the final model: "auto" unless that downloads more than the whole run did."""


def compare_at_end(
    trainer: Trainer,
    run: RunConfig,
    server_round: int,
    client: AggregatorClient,
    cache: BlobCache,
    fetch: Fetch,
    progress: ProgressSink,
    evaluation: str,
) -> Comparison | None:
    """Compare the models that this device knows, and send the result to the server; None if that is not possible.

    ``server_round`` is the manifest of the final model, ``evaluation`` one of `EVALUATIONS`. Only the comparison can
    fail: every update is delivered. Raises StopRequested.
    """
    if evaluation == "never":
        return None
    try:
        # The server waits for a device in this phase before it ends.
        client.heartbeat(Heartbeat(phase=COMPARING_PHASE, fraction=0.0, server_round=server_round))
        progress.phase(COMPARING_PHASE)
        manifest = client.manifest(server_round)
        missing_bytes = cache.bytes_to_download(manifest.units) if trainer.evaluates_global else 0
        limit_bytes = max(FREE_DOWNLOAD_BYTES, client.bytes_down)
        size, skipped = format_bytes(missing_bytes), ""
        if evaluation == "auto" and missing_bytes > limit_bytes:
            skipped = f"{size} to download, more than the whole run; `final_evaluation=always` does it"
            progress.message(f"the final model is not evaluated: {skipped}")
        elif missing_bytes:
            progress.message(f"downloading the final model to evaluate it on this device's text: {size}")
        comparison = trainer.compare(run, manifest, fetch, progress, skipped)
    except EdgefedError as error:
        progress.message(f"the final model is not compared: {error}")
        comparison = None
    finally:
        progress.done()
    try:
        client.compare(comparison or Comparison(server_round=server_round))
    except EdgefedError as error:
        logger.debug("the comparison is not reported to the server: %s", error)
    return comparison
