"""One client of a simulated run on disk: its state, and rounds that are transactions on it.

state/               the trainer's folder, with the hashes of the blobs that the device would have
before-N/            the same when round N began
done.json            round N is trained: all that is needed to deliver it and to place it on the clock
update.safetensors   its update, until it is delivered
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TypeVar

import msgspec

from edgefed.disk import disk_errors, write_durably
from edgefed.errors import ConfigError, StateCorrupt
from edgefed.protocol.messages import UpdateMeta
from edgefed.simulation.config import SimulatedDevice
from edgefed.simulation.simulated_device import SharedModel, SimulatedCosts, simulated_trainer
from edgefed.simulation.virtual_clock import RoundWork
from edgefed.trainer.saved_plan import load_plan

BLOBS_FILE, DONE_FILE, UPDATE_FILE, REFUSED_FILE = "held.json", "done.json", "update.safetensors", "refused.txt"


class TrainedRound(msgspec.Struct, frozen=True):
    """A trained round of one client, as done.json keeps it."""

    server_round: int
    meta: UpdateMeta
    work: RoundWork
    memory_bytes: int
    merged: tuple[int, ...]
    train_loss: float | None
    expert_bytes: int = 0
    device_losses: tuple[float, float] | None = None


class SimulatedClient:
    """One device of the fleet in one method's run.

    ``client_id`` orders the clients and names its ``folder``. ``costs`` are those of `SimulatedCosts` for it.
    ``evaluates``: it measures the held-out loss of what it holds.

    Raises:
        DataError: The device's data cannot be used.
    """

    def __init__(
        self,
        device: SimulatedDevice,
        client_id: str,
        folder: Path,
        usable_bytes: int,
        costs: SimulatedCosts,
        shared: SharedModel,
        held_out_share: float,
        evaluates: bool = False,
    ):
        self.device, self.client_id, self.costs, self._folder = device, client_id, costs, folder
        self.trainer = simulated_trainer(device, self.state, usable_bytes, costs, shared, held_out_share, evaluates)

    @property
    def state(self) -> Path:
        """The trainer's folder."""
        return self._folder / "state"

    @property
    def update_path(self) -> Path:
        """Where the update is until it is delivered."""
        return self._folder / UPDATE_FILE

    def trained(self, server_round: int) -> TrainedRound | None:
        """What is known of the round, if it is trained. Raises StateCorrupt."""
        path = self._folder / DONE_FILE
        if not path.exists():
            return None
        done = _decode(path, TrainedRound)
        return done if done.server_round == server_round else None

    def begin(self, server_round: int) -> None:
        """Make the state that of the round's beginning, whatever an earlier attempt left of it."""
        backup = self._folder / f"before-{server_round}"
        with disk_errors(self._folder):
            self.state.mkdir(parents=True, exist_ok=True)
            if backup.exists():
                shutil.rmtree(self.state)
                shutil.copytree(backup, self.state)
                return
            copying = self._folder / "copying"
            shutil.rmtree(copying, ignore_errors=True)
            shutil.copytree(self.state, copying)
            copying.rename(backup)
            for old in self._folder.glob("before-*"):
                if old != backup:
                    shutil.rmtree(old)

    def resident_blobs(self) -> set[str]:
        """Hashes of the blobs on the device."""
        path = self.state / BLOBS_FILE
        return set(_decode(path, list[str])) if path.exists() else set()

    def finish(self, done: TrainedRound, resident_blobs: set[str]) -> None:
        """The round is trained; from now on it is only delivered."""
        write_durably(self.state / BLOBS_FILE, msgspec.json.encode(sorted(resident_blobs)))
        write_durably(self._folder / DONE_FILE, msgspec.json.encode(done))

    def usage(self) -> list[list[float]]:
        """Share of the tokens of the last profile that was routed to each expert, by layer; empty without a profile."""
        try:
            profile, _ = load_plan(self.state)
        except FileNotFoundError:
            return []
        return [layer.frequency.tolist() for layer in profile.layers] if profile else []

    @property
    def refusal(self) -> str:
        """Why the device takes no part in the run; "" if it does."""
        path = self._folder / REFUSED_FILE
        return path.read_text() if path.exists() else ""

    def refuse(self, reason: str) -> None:
        """The device takes no part in the run, for ``reason``."""
        write_durably(self._folder / REFUSED_FILE, reason.encode())


T = TypeVar("T")


def _decode(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (msgspec.DecodeError, ConfigError) as error:
        raise StateCorrupt(
            f"{path} is not a file that edgefed wrote: {error}", remedy="Delete the `out` folder and start again."
        ) from error
