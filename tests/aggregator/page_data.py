"""A large run as the page gets it: 200 clients of different devices and states, 50 rounds, 16 layers of 64 experts."""

import random

from edgefed.protocol.coverage import ClientExperts, ExpertCoverage
from edgefed.protocol.messages import (
    ClientStatus,
    DeviceInfo,
    RoundStatus,
    RunConfig,
    SetAside,
    Status,
    TrainingConfig,
    encode_message,
)

CLIENTS, ROUNDS, LAYERS, EXPERTS = 200, 50, 16, 64
NAMES = ("kitchen-laptop", "Jetson Orin Nano of the lab on the second floor", "x" * 64, "büro-pc 7", "工作站")
STATES = ("training", "done", "waiting", "lost", "left")


def large_run(server_round: int = ROUNDS + 1) -> tuple[bytes, bytes]:
    """The encoded `Status` and `ExpertCoverage` of the run in ``server_round``."""
    draw = random.Random(7)
    run = RunConfig(
        run_id="0123456789abcdef", model="allenai/OLMoE-1B-7B-0924", method="hfedmoe", method_options={}, rounds=100,
        seed=1, training=TrainingConfig(),
    )  # fmt: skip
    clients = tuple(
        ClientStatus(
            client_id=f"{number:032x}"[::-1],
            name=f"{NAMES[number % len(NAMES)]} {number}"[:64],
            state=STATES[number % 5] if number % 3 else "training",
            phase="train",
            fraction=draw.random(),
            memory_bytes=draw.randrange(2**30, 2**36),
            expert_share=0.25,
            rounds_done=draw.randrange(ROUNDS),
            uploaded_bytes=draw.randrange(2**41),
            downloaded_bytes=draw.randrange(2**41),
            last_seen_s=draw.random() * 10 ** draw.randrange(6),
            metrics={
                "held_out_loss_before": 3.1,
                "held_out_loss_after": 2.9,
            },
            device=DeviceInfo(
                name="NVIDIA GeForce RTX 4070 Ti SUPER",
                kind="discrete",
                trains_on="cuda",
                ideal_budget_bytes=2**34,
            ),
        )
        for number in range(CLIENTS)
    )
    history = tuple(
        RoundStatus(
            server_round=number,
            participants=CLIENTS,
            updates=draw.randrange(150, CLIENTS),
            seconds=draw.random() * 5000,
            uploaded_bytes=draw.randrange(2**38),
            downloaded_bytes=draw.randrange(2**39),
            experts_changed=1000,
            metrics={
                "train_loss": 4 - number / 40,
                "held_out_loss_before": 4 - number / 50,
                "held_out_loss_after": 3.9 - number / 50,
            },
            set_aside=(
                SetAside(
                    client_id="f", name="x" * 64, reason="it changes 'model.layers.0.mlp.gate' by 6.9e+04 per element"
                ),
            ),
        )
        for number in range(1, server_round)
    )
    status = Status(
        run=run, state="training", server_round=server_round, min_clients=100, quorum=150, deadline_s=3000.0,
        updates_received=97, clients=clients, history=history, memory_peak_bytes=2**28,
    )  # fmt: skip

    def table(value):
        return tuple(tuple(value() for _ in range(EXPERTS)) for _ in range(LAYERS))

    resident = tuple(tuple(range(0, EXPERTS, 4)) for _ in range(LAYERS))
    held = ClientExperts(
        server_round=server_round - 1, resident=resident, trained=tuple(tuple(1.0 for _ in row) for row in resident)
    )
    coverage = ExpertCoverage(
        server_round=server_round - 1, experts_per_layer=(EXPERTS,) * LAYERS,
        updates=table(lambda: draw.randrange(60)), neurons=table(lambda: 1.0),
        trained_in=table(lambda: draw.randrange(ROUNDS)), clients={client.client_id: held for client in clients},
    )  # fmt: skip
    return encode_message(status), encode_message(coverage)
