"""A status of a run to draw."""

from __future__ import annotations

from edgefed.protocol.messages import ClientStatus, DeviceInfo, RoundStatus, RunConfig, Status, TrainingConfig

METRICS = {
    "train_loss": 4.738, "held_out_loss_before": 2.0, "held_out_loss_after": 1.5, "held_out_accuracy_after": 0.625,
}  # fmt: skip
DEVICE = DeviceInfo(
    name="Intel Core i5", kind="cpu", trains_on="cpu", total_bytes=16 << 30, budget_bytes=1 << 30,
    ideal_budget_bytes=12 << 30, budget_origin="1.0 GiB of 16.0",
)  # fmt: skip


def client_of(name: str, number: int = 1, **values) -> ClientStatus:
    given = {
        "state": "training", "phase": "train", "fraction": 0.5, "memory_bytes": 1 << 30, "expert_share": 0.25,
        "rounds_done": 1, "uploaded_bytes": 1 << 20, "downloaded_bytes": 1 << 21, "last_seen_s": 1.0,
        "metrics": METRICS, **values,
    }  # fmt: skip
    return ClientStatus(client_id=f"c{number}", name=name, **given)


def status_of(method: str, clients: list[ClientStatus], rounds: int = 1, state: str = "training") -> Status:
    history = tuple(
        RoundStatus(
            server_round=number, participants=2, updates=1, seconds=3.0, uploaded_bytes=1 << 20, experts_changed=77,
            metrics=METRICS,
        )
        for number in range(1, rounds + 1)
    )  # fmt: skip
    run = RunConfig(
        run_id="r", model="m", method=method, method_options={}, rounds=3, seed=0, training=TrainingConfig()
    )  # fmt: skip
    return Status(
        run=run, state=state, server_round=2, min_clients=1, quorum=1, deadline_s=None, updates_received=0,
        clients=tuple(clients), history=history, memory_peak_bytes=50 << 20,
    )  # fmt: skip
