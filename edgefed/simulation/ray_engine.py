"""The clients of a simulated round side by side in processes of Ray; the result is that of the built-in engine.

A client's round is a transaction on its folder (`simulated_client`), which is all that a process needs and all that it
leaves. The aggregator, the virtual clock and the evaluation stay in the process that simulates. Machines of a Ray
cluster must share the folder of the results.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgefed.aggregator.blobs import BlobStore
from edgefed.errors import ConfigError, EdgefedError, ProcessFailed, all_errors, first_line
from edgefed.progress import counted
from edgefed.protocol.messages import Assignment, Manifest

if TYPE_CHECKING:
    from edgefed.simulation.in_process import InProcessAggregator
    from edgefed.simulation.simulated_run import SimulatedRun


@dataclasses.dataclass(frozen=True)
class RoundView:
    """What clients ask of the aggregator in a round."""

    manifests: Mapping[int, Manifest]
    assignments: Mapping[str, Assignment | None]
    blobs: BlobStore

    @classmethod
    def of(
        cls, aggregator: InProcessAggregator, server_round: int, client_ids: Sequence[str], run_folder: Path
    ) -> RoundView:
        """What these clients ask in this round. They may ask for the model of the round before."""
        rounds = range(max(1, server_round - 1), server_round + 1)
        assignments = {client_id: aggregator.assignment(client_id) for client_id in client_ids}
        manifests = {each: aggregator.manifest(each) for each in rounds}
        return cls(manifests, assignments, BlobStore(run_folder.resolve()))

    def manifest(self, server_round: int) -> Manifest:
        """The global model at the start of a round."""
        return self.manifests[server_round]

    def assignment(self, client_id: str) -> Assignment | None:
        """What a client is to do."""
        return self.assignments[client_id]

    def blob(self, sha256: str) -> Path:
        """The file of a unit or file."""
        return self.blobs.path(sha256)


class RayEngine:
    """Processes that train clients. A context: leaving it ends them.

    ``workers`` None: as many as the cluster has room for, at most one for each client. Joins the cluster of RAY_ADDRESS
    if that is set. Raises ConfigError if ray is not installed.
    """

    def __init__(self, folder: Path, threads: int, workers: int | None = None):
        try:
            import ray
        except ImportError as error:
            raise ConfigError("`engine=ray` needs ray", remedy="pip install 'edgefed[ray]'") from error
        self._ray, self._folder, self._threads, self._workers = ray, folder.resolve(), threads, workers
        self._pool: list[Any] = []
        self._made_for: object = None

    def __enter__(self) -> RayEngine:
        address = os.environ.get("RAY_ADDRESS")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # processes see the devices that this one sees
        alone: dict[str, Any] = {} if address else {"include_dashboard": False, "num_cpus": os.cpu_count()}
        try:
            self._ray.init(address=address, log_to_driver=False, logging_level="warning", **alone)
        except Exception as error:
            self._ray.shutdown()
            raise ProcessFailed(f"ray does not start: {first_line(error)[:300]}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def train(
        self, run: SimulatedRun, view: RoundView, clients: list[int], server_round: int
    ) -> dict[int, EdgefedError]:
        """Train ``clients``, by their place in the fleet, and return the errors of those that failed."""
        if not clients:
            return {}
        pool, shared = self._processes(run, len(clients)), self._ray.put(view)
        from ray.util import ActorPool

        def train(process: Any, index: int) -> Any:
            return process.train.remote(shared, index, server_round)

        try:
            outcomes = list(ActorPool(pool).map_unordered(train, clients))
        except self._ray.exceptions.RayError as error:
            raise ProcessFailed(f"a process of ray failed: {first_line(error)[:300]}") from error
        return {index: all_errors()[code](text, remedy=remedy) for index, code, text, remedy in outcomes if code}

    def _processes(self, run: SimulatedRun, most: int) -> list[Any]:
        """The processes, with the models of this run; no more than ``most`` clients need. Raises ConfigError."""
        cpus = int(self._ray.cluster_resources().get("CPU", 1))
        room, wanted = cpus // self._threads, self._workers or 1
        if room < wanted:  # Ray would wait for ever
            raise ConfigError(
                f"{counted(wanted, 'worker')} of {counted(self._threads, 'thread')} need "
                f"{counted(wanted * self._threads, 'CPU')}, Ray has {cpus}",
                remedy="Lower `workers`, or `threads` of the simulation.",
            )
        if self._made_for is not run:
            for process in self._pool:
                self._ray.kill(process)
            self._pool, self._made_for = [], run
        kind = self._ray.remote(num_cpus=self._threads)(_Process)
        for number in range(len(self._pool), min(most, self._workers or room)):
            self._pool.append(kind.remote(run.recipe, self._folder / "workers" / str(number)))
        return self._pool


class _Process:
    """One process of Ray, with one model."""

    def __init__(self, recipe: Callable[[Path], SimulatedRun], folder: Path):
        self._run = recipe(folder)

    def train(self, view: RoundView, index: int, server_round: int) -> tuple[int, str, str, str]:
        """Train a client; (index, code of the error or "", its text, its remedy)."""
        try:
            self._run.train(view, index, server_round)
        except EdgefedError as error:
            return index, error.code, str(error), error.remedy
        return index, "", "", ""
