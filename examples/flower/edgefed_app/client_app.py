"""The ClientApp: trains on the SuperNode's own data; in a simulation, on the packaged texts."""

from flwr.app import Context

import edgefed
from edgefed.embedded.silos import SILOS
from edgefed.flower import make_client_app
from edgefed.flower.client_app import settings_of_node


def settings(context: Context) -> edgefed.Client:
    """Settings of a node. A simulated node has nothing but a number."""
    if "data" in context.node_config:
        return settings_of_node(context)
    number = int(context.node_config["partition-id"])
    names = sorted(SILOS)
    return edgefed.Client(
        "", data=f"silo:{names[number % len(names)]}", memory="1GiB", name=f"node-{number}", threads=1,
        state=f"edgefed-flower-{context.run_id}-{number}",
    )  # fmt: skip


app = make_client_app(settings)
