"""One method on a simulated fleet: real rounds, one client after the other, and their place on the virtual clock.

    OUT/LABEL/run              the aggregator's state folder
    OUT/LABEL/clients/ID/      see `simulated_client`
    OUT/LABEL/rounds/N.json    the result of round N

A client's round is a transaction: until done.json says that it is trained, a restart takes the state back to where the
round began. So a simulation that was killed at any point continues, and gives the same numbers as one that was not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch

from edgefed.agent.compression import choose_codec, compress_update, resident_keys
from edgefed.costs.shapes import ModelShape
from edgefed.costs.step_setup import DTYPE_BYTES, StepSetup
from edgefed.errors import BudgetTooSmall, EdgefedError, StateCorrupt, TrainingDiverged
from edgefed.expert_records import ExpertPlan
from edgefed.hardware.memory import set_up_allocator
from edgefed.methods.custom import load_method
from edgefed.methods.interface import ExpertMethod
from edgefed.methods.registry import check_alternation, check_ordered, check_ranks, make_expert_method
from edgefed.protocol.messages import ExpertSurvey, Manifest, RunConfig
from edgefed.protocol.trainer import TrainedUpdate
from edgefed.simulation.config import MethodChoice, SimulatedDevice, SimulationConfig
from edgefed.simulation.device_rates import Calibration, CostShape, device_rates, uploaded_bytes
from edgefed.simulation.evaluation import GlobalEvaluator
from edgefed.simulation.in_process import InProcessAggregator, describe_update
from edgefed.simulation.ray_engine import RayEngine, RoundView
from edgefed.simulation.result import ClientRound, MethodRun, RoundResult, SavedRound, mean_loss, round_traffic
from edgefed.simulation.simulated_client import SimulatedClient, TrainedRound
from edgefed.simulation.simulated_device import CountingFetch, CountingProgress, SharedModel, SimulatedCosts
from edgefed.simulation.virtual_clock import (
    ClientTimes,
    CostModel,
    RoundSpan,
    RoundWork,
    VirtualClock,
    expert_counts,
    trainable_pairs,
    transfer_bytes_per_s,
)
from edgefed.training.data import Example

FOLD_BYTES_PER_S = 1.39e9
"""Bytes of updates that the aggregator folds in a second on 2 cores: benchmarks/results/aggregator.json, 32 clients."""

Score = Callable[[Any, Any, Mapping[str, Collection[Example]]], Mapping[str, float]]
"""(transformers model, tokenizer, {client: held-out examples}) -> metrics of the global model."""


class SimulatedRun:
    """One method's run; `play` makes it. See the top of this file."""

    def __init__(
        self, config: SimulationConfig, choice: MethodChoice, folder: Path, model: str, shape: ModelShape,
        charged: CostShape, budgets: Mapping[str, int], data: Mapping[str, str], shared: SharedModel,
        on_event: Callable[..., None], score: Score | None, calibration: Calibration, engine: RayEngine | None = None,
    ):  # fmt: skip
        self.recipe = functools.partial(
            rebuilt, config, choice, folder.resolve(), model, shape, charged, budgets, data, calibration
        )
        """Makes the same run in another process: folder of its model's files -> run."""
        self._engine, self._data = engine, data
        self._config, self._choice, self._folder, self._model_source = config, choice, folder, model
        self._charged, self._budgets, self._shared, self._score = charged, budgets, shared, score
        self._calibration, self._event = calibration, on_event
        self._method: ExpertMethod = make_expert_method(choice.method, choice.options)
        self._top_k = [layer.top_k for layer in shape.moe_layers]
        training = config.training
        if self._method.requirements.train_experts is not None:
            training = msgspec.structs.replace(training, experts=self._method.requirements.train_experts)
        if config.adapter_average == "alternate":
            training = msgspec.structs.replace(training, lora_factors="alternate")
        check_alternation(self._method, training)
        check_ranks(self._method, training)
        self._run = RunConfig(
            run_id=f"simulated-{config.seed}", model=config.model, method=choice.method,
            method_options=dict(choice.options), rounds=config.rounds, seed=config.seed, training=training,
            server_optimizer=config.server_optimizer, compression=config.compression, pace=config.pace,
        )  # fmt: skip
        if config.adapter_average == "product":
            check_ordered(self._run, 0, config.download_compression)
        self._clock = VirtualClock()
        self._made: dict[int, SimulatedClient] = {}

    def _client(self, index: int) -> SimulatedClient:
        """The client of the device with this place in the fleet; reads its data the first time."""
        if index in self._made:
            return self._made[index]
        device = self._config.fleet[index]
        device = dataclasses.replace(device, data=self._data[device.name])
        client_id = f"client-{index:04d}"  # the aggregator takes clients in the order of their ids
        self._made[index] = SimulatedClient(
            device, client_id, self._folder / "clients" / client_id, self._budgets[device.name],
            SimulatedCosts(self._charged, device.profile.kind, functools.partial(self._step_seconds, device)),
            self._shared, self._config.held_out_share,
            self._config.evaluate_devices or self._config.stop_after is not None,
        )  # fmt: skip
        return self._made[index]

    def play(self) -> MethodRun:
        """Play all rounds; those that an earlier process played are read from its files.

        Raises what trainers and aggregator raise, except BudgetTooSmall and TrainingDiverged, which the result reports.
        """
        self._clients = [self._client(index) for index in range(len(self._config.fleet))]
        self._held_out = {client.device.name: client.trainer.corpus.held_out for client in self._clients}
        evaluated = self._run.training, self._config.evaluation_tokens
        self._evaluator = GlobalEvaluator(self._shared, self._held_out, *evaluated)
        refused: dict[str, str] = {}
        rounds: list[RoundResult] = []
        stopped = ""
        with InProcessAggregator(
            self._folder / "run", self._model_source, self._run, [client.client_id for client in self._clients],
            adapter_average=self._config.adapter_average, download_compression=self._config.download_compression,
            stop_after=self._config.stop_after,
        ) as aggregator:  # fmt: skip
            first = self._first(aggregator)
            for server_round in range(1, self._config.rounds + 1):
                if aggregator.finished and server_round >= aggregator.server_round:
                    stopped = aggregator.why_stopped
                    break
                try:
                    result = self._round(aggregator, server_round, refused)
                except TrainingDiverged as error:
                    stopped = f"round {server_round}: {error}"
                    break
                if result is None:
                    stopped = f"round {server_round}: no device of the fleet can take part"
                    break
                rounds.append(result)
                self._event(label=self._choice.label, server_round=server_round, ended=result)
        usage = {client.device.name: found for client in self._clients if (found := client.usage())}
        return MethodRun(self._choice.label, self._choice.method, first, tuple(rounds), refused, usage, stopped)

    # --- rounds -----------------------------------------------------------------------------------------------------

    def _first(self, aggregator: InProcessAggregator) -> RoundResult:
        """The result of the model before the first round."""
        path = self._folder / "rounds" / "0.json"
        if path.exists():
            return SavedRound.read(path).result
        losses, accuracy, metrics = self._evaluate(aggregator, 1)
        result = RoundResult(0, 0.0, 0.0, "", mean_loss(losses), accuracy, losses, metrics, {})
        SavedRound(result, {}, {}).write(path)
        return result

    def _round(self, aggregator: InProcessAggregator, server_round: int, refused: dict[str, str]) -> RoundResult | None:
        """One round; None if nobody can take part. Adds to ``refused`` who left in it."""
        path = self._folder / "rounds" / f"{server_round}.json"
        if path.exists():
            saved = SavedRound.read(path)
            self._clock.round(saved.times, saved.result.aggregation)
            refused.update(saved.refused)
            return saved.result
        if aggregator.server_round == server_round:
            self._train_all(aggregator, server_round)
            aggregator.fold()
        for client in self._clients:
            if not aggregator.joined(client.client_id):
                refused.setdefault(client.device.name, client.refusal)
        done = {client: found for client in self._clients if (found := client.trained(server_round))}
        if not done:
            return None
        span, times = self._pass_time(aggregator, server_round, done)
        losses, accuracy, metrics = self._evaluate(aggregator, server_round + 1)
        known = aggregator.active.store.history()[-1].metrics
        result = RoundResult(
            server_round=server_round, ends=span.ends, aggregation=span.aggregation, slowest=span.slowest,
            loss=mean_loss(losses), accuracy=accuracy, losses=losses, metrics=metrics,
            clients={it.device.name: self._client_round(found, span, it.device.name) for it, found in done.items()},
            traffic=round_traffic([found.work for found in done.values()], self._costs.charged_bytes, known),
        )  # fmt: skip
        SavedRound(result, times, refused).write(path)
        return result

    def _train_side_by_side(self, aggregator: InProcessAggregator, server_round: int) -> dict[int, EdgefedError]:
        """Train the clients of the round with the engine; returns errors by client. Nothing without an engine."""
        if self._engine is None:
            return {}
        left = [
            number
            for number, client in enumerate(self._clients)
            if aggregator.joined(client.client_id) and client.trained(server_round) is None
        ]
        names = [self._clients[number].client_id for number in left]
        view = RoundView.of(aggregator, server_round, names, self._folder / "run")
        return self._engine.train(self, view, left, server_round)

    def _train_all(self, aggregator: InProcessAggregator, server_round: int) -> None:
        failed = self._train_side_by_side(aggregator, server_round)
        for number, client in enumerate(self._clients):
            if not aggregator.joined(client.client_id):
                continue
            self._event(
                label=self._choice.label, server_round=server_round, client=client.device.name,
                clients_done=number, clients=len(self._clients),
            )  # fmt: skip
            done = client.trained(server_round)
            try:
                if number in failed:
                    raise failed[number]
                done = done or self.train(aggregator, number, server_round)
            except BudgetTooSmall as error:
                client.refuse(str(error))
                aggregator.leave(client.client_id, "its budget is too small")
                self._event(label=self._choice.label, server_round=server_round, client=client.device.name,
                            message=f"{client.device.name} takes no part: {error}")  # fmt: skip
                continue
            if aggregator.server_round == server_round and aggregator.assignment(client.client_id) is not None:
                aggregator.deliver(done.meta, client.update_path)
            client.update_path.unlink(missing_ok=True)

    def train(self, aggregator: InProcessAggregator | RoundView, index: int, server_round: int) -> TrainedRound:
        """Let the client with this place in the fleet train a round."""
        client = self._client(index)
        client.begin(server_round)
        trainer, manifest = client.trainer, aggregator.manifest(server_round)
        assignment = aggregator.assignment(client.client_id)
        if assignment is None:
            raise StateCorrupt(f"client {client.client_id} has no part in round {server_round}, but has not trained it")
        resident = client.resident_blobs()
        if server_round == 1 and self._config.preinstalled:
            resident = {unit.sha256 for unit in manifest.units} | {file.sha256 for file in manifest.files}
        before = aggregator.manifest(server_round - 1).units if server_round > 1 and self._compresses else ()
        versions, width = {unit.key: unit.sha256 for unit in before}, DTYPE_BYTES.get(self._charged.dtype or "", 0)
        fetch, progress = CountingFetch(aggregator.blob, resident, versions, width), CountingProgress()
        update = trainer.train_round(self._run, manifest, assignment, fetch, progress, client.update_path)
        plan, step_plan, memory_bytes = trainer.plan, trainer.planner.step_plan, trainer.planner.needs_bytes
        assert plan is not None, "the round has made a plan"
        units = {unit.key: unit for unit in manifest.units}
        metrics = {**update.metrics, **self._compress(client, manifest, update, aggregator.blob, step_plan.setup)}
        meta = describe_update(
            client.client_id, server_round, client.update_path, num_examples=update.num_examples,
            num_tokens=update.num_tokens, experts=update.experts, lora_rank=update.lora_rank,
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
            survey=self._with_rates(client, update.survey),
        )  # fmt: skip
        down = fetch.take()
        # On the clock this comes after the upload. Doing it before gives the same, and a kill loses nothing.
        fetch.resident &= update.keep
        waiting = CountingProgress()
        if server_round < self._config.rounds:
            trainer.between_rounds(fetch, waiting)
        counts = progress.counts
        profiled = progress.stages.get("profile") or waiting.stages.get("profile") or ()
        storage, reads = client.costs.profile_reads(profiled)
        work = RoundWork(
            **expert_counts(plan),
            trainable_pairs=trainable_pairs(plan, update, self._top_k),
            setup=step_plan.setup,
            steps=int(update.metrics["train_steps"]),
            tokens=update.num_tokens,
            profile_tokens=counts.get("profile", 0),
            profile_storage=storage,
            profile_reads=reads,
            waiting_profile_tokens=waiting.counts.get("profile", 0),
            evaluated_tokens=counts.get("evaluate", 0),
            explored_tokens=counts.get("explore", 0) * step_plan.setup.tokens,
            compares="compare experts" in counts,
            offloads=self._method.requirements.offloading,
            down=down,
            up=uploaded_bytes(client.update_path, units, DTYPE_BYTES[self._charged.dtype or step_plan.setup.dtype]),
            waiting_down=fetch.take(),
        )
        merged = tuple(len(plan.groups(layer)) for layer in range(plan.num_layers))
        losses = [update.metrics.get(f"held_out_loss_{when}", math.nan) for when in ("before", "after")]
        evaluated = all(map(math.isfinite, losses))
        done = TrainedRound(
            server_round, meta, work, memory_bytes, merged, update.metrics.get("train_loss"),
            int(update.metrics["peak_expert_bytes"]), (losses[0], losses[1]) if evaluated else None,
        )  # fmt: skip
        client.finish(done, fetch.resident)
        return done

    def _compress(
        self, client: SimulatedClient, manifest: Manifest, update: TrainedUpdate, blob: Callable[[str], Path],
        setup: StepSetup,
    ) -> dict[str, float]:  # fmt: skip
        """Compress the update of a client as its agent would. Its residuals are in its state folder."""
        ratios = self._charged.byte_ratios(manifest.units, self._charged_setup(setup))
        units = {unit.key: unit for unit in manifest.units}
        sizes = uploaded_bytes(client.update_path, units, 1)
        whole_bytes = sum(size * ratios.get(kind, 1.0) for kind, size in sizes.items())
        rate = transfer_bytes_per_s(
            client.device.link.up_mbit, self._config.server_mbit * 1e6 / 8, len(self._config.fleet)
        )
        codec = choose_codec(self._run.compression, round(whole_bytes), rate)
        if codec is None:
            return {}
        old, new = client.state / "residuals", client.state / "residuals.new"
        result = compress_update(
            *(client.update_path, units, lambda unit: blob(unit.sha256), codec),
            *(old if old.exists() else None, new, resident_keys(manifest, update)),
        )
        new.replace(old)
        return result.metrics()

    @property
    def _compresses(self) -> bool:
        return (self._config.compression, self._config.download_compression) != ("none", "none")

    def _charged_setup(self, setup: StepSetup) -> StepSetup:
        """``setup`` with the dtype that bytes are charged in."""
        return dataclasses.replace(setup, dtype=self._charged.dtype or setup.dtype)

    def _step_seconds(self, device: SimulatedDevice, setup: StepSetup, plan: ExpertPlan) -> float:
        """Seconds of a step of ``device`` at most: all routed tokens reach experts that train."""
        costs = CostModel(self._charged, {}, 1.0, 1, self._calibration)
        offloads, pairs = self._method.requirements.offloading, (1.0,) * plan.num_layers
        counts = expert_counts(plan)
        work = RoundWork(**counts, trainable_pairs=pairs, setup=setup, steps=1, tokens=0, offloads=offloads)
        return sum(costs.step_times(work, device_rates(device), self._budgets[device.name]))

    def _with_rates(self, client: SimulatedClient, survey: ExpertSurvey | None) -> ExpertSurvey | None:
        """``survey`` with what a device would have measured of its transfers."""
        if survey is None:
            return None
        link, share = client.device.link, (self._config.server_mbit * 1e6 / 8, len(self._config.fleet))
        return msgspec.structs.replace(
            survey,
            upload_bytes_per_s=transfer_bytes_per_s(link.up_mbit, *share),
            download_bytes_per_s=transfer_bytes_per_s(link.down_mbit, *share),
        )

    def _pass_time(
        self, aggregator: InProcessAggregator, server_round: int, done: Mapping[SimulatedClient, TrainedRound]
    ) -> tuple[RoundSpan, dict[str, ClientTimes]]:
        manifest = aggregator.manifest(server_round + 1)
        some = next(iter(done.values())).work.setup
        costs = CostModel(
            charged=self._charged,
            ratios=self._charged.byte_ratios(manifest.units, self._charged_setup(some)),
            server_bytes_per_s=self._config.server_mbit * 1e6 / 8,
            num_clients=len(done),
            calibration=self._calibration,
        )
        times = {
            client.device.name: costs.client_times(
                found.work, device_rates(client.device), self._budgets[client.device.name]
            )
            for client, found in done.items()
        }
        uploaded: dict[str, int] = {}
        for found in done.values():
            for kind, size in found.work.up.items():
                uploaded[kind] = uploaded.get(kind, 0) + size
        self._costs = costs
        return self._clock.round(times, costs.aggregation_seconds(uploaded, FOLD_BYTES_PER_S)), times

    def _client_round(self, done: TrainedRound, span: RoundSpan, name: str) -> ClientRound:
        mine, work = span.clients[name], done.work
        return ClientRound(
            seconds=mine.parts, late=mine.late, waits=mine.waits, hidden=mine.hidden, resident=work.resident,
            trainable=work.trainable, merged=done.merged, memory_bytes=done.memory_bytes,
            bytes_down=self._costs.charged_bytes(work.down), bytes_up=self._costs.charged_bytes(work.up),
            train_loss=done.train_loss, expert_bytes=done.expert_bytes, device_losses=done.device_losses,
        )  # fmt: skip

    def _evaluate(
        self, aggregator: InProcessAggregator, server_round: int
    ) -> tuple[dict[str, float], float, dict[str, float]]:
        """({client: loss}, accuracy, metrics) of the model at the start of a round; nothing if it is not evaluated."""
        if not (aggregator.finished or self._run.training.evaluates(server_round, self._config.rounds + 1)):
            return {}, math.nan, {}
        self._evaluator.place(aggregator.manifest(server_round), aggregator.blob)
        try:
            losses, accuracy = self._evaluator.losses()
            metrics: dict[str, float] = {}
            if self._score is not None:
                assert self._shared.model is not None, "the evaluator has placed the model"
                metrics = dict(self._score(self._shared.model.module, self._shared.tokenizer, self._held_out))
        finally:
            self._evaluator.release()
        return losses, accuracy, metrics


def rebuilt(
    config: SimulationConfig, choice: MethodChoice, folder: Path, model: str, shape: ModelShape, charged: CostShape,
    budgets: Mapping[str, int], data: Mapping[str, str], calibration: Calibration, own: Path,
) -> SimulatedRun:  # fmt: skip
    """The run in another process, which keeps the files of its model in the folder ``own``."""
    set_up_allocator()
    torch.set_num_threads(config.threads)
    if choice.location:
        load_method(choice.location)
    return SimulatedRun(
        config, choice, folder, model, shape, charged, budgets, data, SharedModel(own), lambda **event: None, None,
        calibration,
    )  # fmt: skip
