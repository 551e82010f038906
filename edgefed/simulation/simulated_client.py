"""One client of a simulated run on disk: its state, and rounds that are transactions on it.

state/               the trainer's folder, with the hashes of the blobs that the device would hold
before-N/            the same when round N began
done.json            round N is trained: all that is needed to deliver it and to place it on the clock
update.safetensors   its update, until it is delivered
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import msgspec

from edgefed.disk import disk_errors, write_durably
from edgefed.errors import StateCorrupt
from edgefed.protocol.messages import UpdateMeta, decode_message, encode_message
from edgefed.simulation.config import SimulatedDevice
from edgefed.simulation.measure import read_plan
from edgefed.simulation.round_work import RoundWork
from edgefed.simulation.simulated_device import SimulatedTrainer

HELD_FILE, DONE_FILE, UPDATE_FILE, REFUSED_FILE = "held.json", "done.json", "update.safetensors", "refused.txt"


@dataclasses.dataclass(frozen=True)
class Done:
    """A trained round of one client, as done.json keeps it."""

    server_round: int
    meta: UpdateMeta
    work: RoundWork
    memory_bytes: int
    merged: tuple[int, ...]
    train_loss: float | None

    def write(self, path: Path) -> None:
        data = {**dataclasses.asdict(self), "meta": msgspec.to_builtins(self.meta), "work": self.work.to_dict()}
        write_durably(path, json.dumps(data).encode())

    @classmethod
    def read(cls, path: Path) -> Done | None:
        """None where there is none. Raises StateCorrupt."""
        if not path.exists():
            return None
        try:
            data = json.loads(path.read_text())
            meta = decode_message(encode_message(data["meta"]), UpdateMeta)
            changes = {"meta": meta, "work": RoundWork.from_dict(data["work"]), "merged": tuple(data["merged"])}
            return cls(**{**data, **changes})
        except (ValueError, KeyError, TypeError) as error:
            raise StateCorrupt(
                f"{path} is not what was written: {error}", remedy="Delete the `out` folder and start again."
            ) from error


class SimulatedClient:
    """One device of the fleet in one method's run. ``client_id`` orders the clients and names its folder."""

    def __init__(self, device: SimulatedDevice, client_id: str, folder: Path, trainer: SimulatedTrainer):
        self.device, self.client_id, self.trainer, self._folder = device, client_id, trainer, folder

    @property
    def state(self) -> Path:
        return self._folder / "state"

    @property
    def update_path(self) -> Path:
        return self._folder / UPDATE_FILE

    def done(self, server_round: int) -> Done | None:
        """The trained round, if this one was trained."""
        done = Done.read(self._folder / DONE_FILE)
        return done if done is not None and done.server_round == server_round else None

    def begin(self, server_round: int) -> None:
        """Make the state that of the round's beginning, whatever an earlier attempt left of it."""
        kept = self._folder / f"before-{server_round}"
        with disk_errors(self._folder):
            self.state.mkdir(parents=True, exist_ok=True)
            if kept.exists():
                shutil.rmtree(self.state)
                shutil.copytree(kept, self.state)
                return
            copying = self._folder / "copying"
            shutil.rmtree(copying, ignore_errors=True)
            shutil.copytree(self.state, copying)
            copying.rename(kept)
            for old in self._folder.glob("before-*"):
                if old != kept:
                    shutil.rmtree(old)

    def held(self) -> set[str]:
        path = self.state / HELD_FILE
        return set(json.loads(path.read_text())) if path.exists() else set()

    def finish(self, done: Done, held: set[str]) -> None:
        """The round is trained: from here on it is only delivered."""
        write_durably(self.state / HELD_FILE, json.dumps(sorted(held)).encode())
        done.write(self._folder / DONE_FILE)

    def usage(self) -> list[list[float]]:
        """Share of the tokens of the last profile that was routed to each expert, by layer; empty without a profile."""
        try:
            record, _ = read_plan(self.state)
        except FileNotFoundError:
            return []
        return [layer.frequency.tolist() for layer in record.layers] if record else []

    @property
    def refusal(self) -> str:
        """Why the device takes no part in the run; "" when it does."""
        path = self._folder / REFUSED_FILE
        return path.read_text() if path.exists() else ""

    def refuse(self, reason: str) -> None:
        write_durably(self._folder / REFUSED_FILE, reason.encode())
