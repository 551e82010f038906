"""The ServerApp: a run of edgefed whose clients are Flower's nodes."""

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

import edgefed
from edgefed.flower import ExpertStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds; `edgefed export STATE model` then writes the checkpoint."""
    config = context.run_config
    server = edgefed.Server(
        model=config["model"],
        method=config["method"],
        rounds=int(config["rounds"]),
        min_clients=int(config["min-clients"]),
        local_steps=int(config["local-steps"]),
        state=config["state"],
    )
    result = ExpertStrategy(server).start(grid)
    print(f"training losses: {[round(float(m['train_loss']), 3) for m in result.train_metrics_clientapp.values()]}")
    print(f"the run is in {server.state}")
