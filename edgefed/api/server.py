"""`Server`: imports a model once, then coordinates the rounds of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from edgefed.api.new_run import DEFAULT_EXTRACTOR, DEFAULT_METHOD, Option, continued_run, create_run, policy_settings
from edgefed.config import Setting, check_settings
from edgefed.tracking import TRACK, RoundTrackers, check_trackers

if TYPE_CHECKING:
    from edgefed.aggregator.active_run import ActiveRun
    from edgefed.methods.interface import Method
    from edgefed.protocol.messages import RoundStatus, RunConfig
else:
    Method = object

TrainMode = Literal["full", "lora", "none"]


@dataclasses.dataclass(kw_only=True)
class Server:
    """Coordinate a run: distribute the global model, collect trained updates, aggregate them, repeat.

    >>> import edgefed
    >>> from edgefed.methods.flux import Flux
    >>> server = edgefed.Server(model="tiny", method=Flux(pace="own"), rounds=3, port=0)
    >>> server.serve(on_ready=print)                                                      # doctest: +SKIP

    A setting that is None has its default in a new run, and the run's value in one that continues: `state` names the
    folder of the run. What a run is made of cannot change; when rounds start and
    close can. Raises ConfigError when settings are invalid or contradict each other.
    """

    model: Annotated[
        str | Path | None,
        Setting("`tiny`, a Hugging Face checkpoint folder, or a hub id.", default="tiny, or the run in `state`"),
    ] = None
    method: Annotated[
        str | Method | None,
        Setting("hfedmoe, flux, fedmoe, a baseline, or a class of your own as file.py:Class or module:Class.",
                default=DEFAULT_METHOD),
    ] = None  # fmt: skip
    extractor: Annotated[
        str | None,
        Setting("With fedmoe: the small network that clients share, cnn1 to cnn5 or text-small.",
                default=DEFAULT_EXTRACTOR),
    ] = None  # fmt: skip
    tokenizer: Annotated[
        str | None,
        Setting("With `extractor=text-small`: its tokenizer, `tiny`, a checkpoint folder, or a hub id.",
                default="tiny"),
    ] = None  # fmt: skip
    options: Annotated[
        Mapping[str, Option] | None,
        Setting("A hyper-parameter of the method; repeatable.", flag="option", metavar="NAME=VALUE"),
    ] = None
    rounds: Annotated[int | None, Setting("Number of rounds.", default="5", minimum=1)] = None
    min_clients: Annotated[
        int | None, Setting("Clients that must be present before a round starts.", default="2", minimum=1)
    ] = None
    clients_per_round: Annotated[int | None, Setting("Clients drawn for each round; default: all.", minimum=1)] = None
    quorum: Annotated[
        int | None, Setting("Updates that close a round; default: those of all participants.", minimum=1)
    ] = None
    max_staleness: Annotated[
        int | None,
        Setting("Rounds by which an update may be late and still count, with less weight; 0 drops late ones.",
                default="0", minimum=0),
    ] = None  # fmt: skip
    deadline: Annotated[
        float | None,
        Setting("Close a round after this time with the updates received so far; 0: never.", default="3600",
                minimum=0, metavar="SECONDS"),
    ] = None  # fmt: skip
    client_timeout: Annotated[
        float | None,
        Setting("Time after which a silent client counts as lost.", default="60", minimum=1, metavar="SECONDS"),
    ] = None
    clip: Annotated[
        float | None,
        Setting("Most that a client may change the model, in multiples of the round's median; 0: no limit.",
                default="2", minimum=0),
    ] = None  # fmt: skip
    robust: Annotated[
        Literal["mean", "trimmed-mean", "median"] | None,
        Setting("How updates are combined; the two others ignore the weights of clients, and need three of them.",
                default="mean"),
    ] = None  # fmt: skip
    stop_after: Annotated[
        int | None,
        Setting("End the run after so many rounds without a better held-out loss, with the best model; 0: never.",
                default="0", minimum=0),
    ] = None  # fmt: skip
    server_optimizer: Annotated[
        Literal["none", "momentum", "adam"] | None,
        Setting("What makes the next model from the aggregated change of a round: the change itself, Nesterov's "
                "momentum (DiLoCo) or FedAdam.", default="none"),
    ] = None  # fmt: skip
    server_learning_rate: Annotated[
        float | None, Setting("With `server_optimizer`: its rate.", default="0.7 of momentum, 0.01 of adam", above=0)
    ] = None
    server_momentum: Annotated[
        float | None, Setting("With `server_optimizer`: decay of its first moment.", default="0.9", minimum=0)
    ] = None
    server_beta2: Annotated[
        float | None, Setting("With `server_optimizer=adam`: decay of its second moment.", default="0.99", minimum=0)
    ] = None
    server_epsilon: Annotated[
        float | None,
        Setting("With `server_optimizer=adam`: added to the root of its second moment.", default="0.001", above=0),
    ] = None
    adapter_average: Annotated[
        Literal["product", "factors", "alternate"] | None,
        Setting("What is averaged of LoRA adapters: what they add to the weights, their two factors, or one factor, "
                "which alone trains and is sent, by turns (RoLoRA).", default="factors"),
    ] = None  # fmt: skip
    rollback: Annotated[
        float | None,
        Setting("Undo a round that multiplies the held-out loss of most clients by this; 0: never.", default="1.5",
                minimum=0),
    ] = None  # fmt: skip
    max_examples: Annotated[
        int | None,
        Setting(
            "Largest number of examples by which a client is weighted. Default: that of the client with the next most "
            "examples, and at most 10 times the median of the round.",
            minimum=1,
        ),
    ] = None
    dp_noise: Annotated[
        float | None,
        Setting("Differential privacy of clients: standard deviation of the noise on a round's sum, in multiples of "
                "`dp_clip`; needs `pip install 'edgefed[privacy]'`.", default="no noise", above=0),
    ] = None  # fmt: skip
    dp_clip: Annotated[
        float | None,
        Setting("With `dp_noise`: longest change of a client, as the L2 norm over all that it trains.", above=0),
    ] = None  # fmt: skip
    dp_delta: Annotated[
        float | None, Setting("With `dp_noise`: delta at which epsilon is reported.", default="1e-05", above=0)
    ] = None
    compression: Annotated[
        Literal["none", "int8", "int4", "int2", "topk12", "topk6", "topk3", "topk", "auto"] | None,
        Setting("How updates are sent: whole, as changes of 8, 4 or 2 bits, as the largest 12, 6, 3 or "
                "1.6 percent of the changes, or as each client's uplink allows. What is left out is added to a later "
                "update.",
                default="auto"),
    ] = None  # fmt: skip
    download_compression: Annotated[
        Literal["none", "int8", "int4", "int3", "topk12", "topk6", "topk3", "topk"] | None,
        Setting("How the model moves in a round: whole, in steps of 8 to 3 bits, or in the largest 12, 6, 3 or 1.6 "
                "percent of its changes. What is left out is added in a later round. Devices that have an earlier "
                "model download only what changed.", default="none"),
    ] = None  # fmt: skip
    pace: Annotated[
        float | None,
        Setting("Limits the experts that a device trains to those that it can exchange in this multiple of the fleet's "
                "usual time; 0: no limit. Not for flux, which has method options for it.",
                default="0", minimum=0, maximum=1000),
    ] = None  # fmt: skip
    max_clients: Annotated[
        int | None, Setting("Clients that may be registered at once.", default="4096", minimum=1)
    ] = None
    state: Annotated[Path, Setting("Folder of the run; an existing run continues.")] = Path("edgefed-run")
    host: Annotated[str, Setting("Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Setting("Port to listen on; 0 takes any free one.", minimum=0, maximum=65535)] = 8470
    token: Annotated[
        str | None,
        Setting(
            "Secret that every client must present; required unless `host` is local.",
            variable="EDGEFED_TOKEN",
            secret=True,
        ),
    ] = None  # fmt: skip
    certificate: Annotated[
        Path | None,
        Setting("PEM file of the server's certificate chain; default: a self-signed one, unless `host` is local."),
    ] = None
    certificate_key: Annotated[Path | None, Setting("PEM file with the key of `certificate`.")] = None
    plain_http: Annotated[bool, Setting("Serve other machines without TLS.")] = False
    invite_only: Annotated[bool, Setting("Admit new clients by invitation only (`edgefed invite`).")] = False
    train_experts: Annotated[
        TrainMode | None, Setting("How experts are trained.", default="full up to 256 MiB, else lora")
    ] = None
    train_router: Annotated[TrainMode | None, Setting("How routers are trained.", default="full")] = None
    train_attention: Annotated[TrainMode | None, Setting("How attention weights are trained.", default="none")] = None
    lora_rank: Annotated[int | None, Setting("Rank of LoRA adapters.", default="8", minimum=1)] = None
    min_lora_rank: Annotated[
        int | None,
        Setting("Smallest rank that a device may have, by its `lora_rank` or where memory is short.",
                default="all have `lora_rank`", minimum=1),
    ] = None  # fmt: skip
    lora_alpha: Annotated[float | None, Setting("Alpha of LoRA adapters.", default="16", above=0)] = None
    lora_scaling: Annotated[
        Literal["standard", "rank_stabilized"] | None,
        Setting("Factor of a LoRA adapter: alpha / rank, or alpha / sqrt(rank), which suits large ranks.",
                default="standard"),
    ] = None  # fmt: skip
    local_steps: Annotated[int | None, Setting("Optimizer steps of a client in a round.", default="20", minimum=1)] = (
        None
    )
    round_seconds: Annotated[
        float | None,
        Setting("Time for the steps of a round on a device: one that does not manage `local_steps` of them in it takes "
                "fewer, at least one; 0: no limit.", default="0", minimum=0),
    ] = None  # fmt: skip
    batch_size: Annotated[int | None, Setting("Sequences in a batch.", default="8", minimum=1)] = None
    sequence_length: Annotated[int | None, Setting("Tokens in a sequence.", default="128", minimum=2)] = None
    learning_rate: Annotated[float | None, Setting("Learning rate of clients.", default="0.0005", above=0)] = None
    schedule: Annotated[
        Literal["constant", "cosine", "linear"] | None,
        Setting("How the learning rate changes over the run: not, or down to 0 by a cosine or a line.",
                default="constant"),
    ] = None  # fmt: skip
    warmup_rounds: Annotated[
        int | None, Setting("Rounds over which the learning rate first rises from 0.", default="0", minimum=0)
    ] = None
    max_grad_norm: Annotated[
        float | None,
        Setting("Longest gradient of a step, as the L2 norm over all that is trained; 0: no limit.", default="1",
                minimum=0),
    ] = None  # fmt: skip
    weight_decay: Annotated[float | None, Setting("Weight decay of clients.", default="0", minimum=0)] = None
    balancing: Annotated[
        float | None,
        Setting("Coefficient of the router's load-balancing loss, over resident experts; by default what the model's "
                "configuration asks for (`router_aux_loss_coef`, if `output_router_logits`).", minimum=0),
    ] = None  # fmt: skip
    missing: Annotated[
        Literal["renormalize", "skip"] | None,
        Setting("What happens to tokens routed to an expert that is not resident on a client: the next best resident "
                "expert, or none.", default="renormalize"),
    ] = None  # fmt: skip
    profile_tokens: Annotated[
        int | None,
        Setting("Most tokens of its training text that a client profiles; 0 means all.", default="16384", minimum=0),
    ] = None
    profile_agreement: Annotated[
        float | None,
        Setting("A profile ends as soon as the plan made from it agrees so far with the plan of all its tokens, as "
                "estimated from random parts; 1 profiles all tokens.", default="0.95", above=0, maximum=1),
    ] = None  # fmt: skip
    evaluation_tokens: Annotated[
        int | None,
        Setting("Most tokens of its held-out text that a client evaluates; 0 means all.", default="4096", minimum=0),
    ] = None
    evaluation_share: Annotated[
        float | None,
        Setting("Most tokens of an evaluation as a share of those that a client trains on in a round, but at least a "
                "batch; 1 sets no limit.", default="0.05", above=0, maximum=1),
    ] = None  # fmt: skip
    evaluate_every: Annotated[
        int | None,
        Setting("Clients evaluate in every so many rounds, from the first on, and in the last one.", default="1",
                minimum=1),
    ] = None  # fmt: skip
    keep_optimizer: Annotated[
        bool | None,
        Setting("Devices keep the moments of their optimizer on disk from round to round, instead of beginning anew."),
    ] = None
    seed: Annotated[int | None, Setting("Seed of the run.", default="0", minimum=0)] = None
    blobs: Annotated[
        str | None,
        Setting("Object storage through which clients get the model and send updates, s3://BUCKET/PREFIX; default: "
                "this server.", metavar="URL"),
    ] = None  # fmt: skip
    keep_rounds: Annotated[int, Setting("Rounds whose global model stays on disk; 0 keeps all.", minimum=0)] = 2
    exit_when_finished: Annotated[bool, Setting("Exit after the last round instead of serving the final model.")] = (
        False
    )
    ready_file: Annotated[Path | None, Setting("Write the address to this file once connections are accepted.")] = None
    track: Annotated[tuple[str, ...], TRACK] = ()

    def __post_init__(self) -> None:
        check_settings(self)
        self.state, self.track = Path(self.state), check_trackers(self.track)
        self.run_config: RunConfig | None = None
        """The run that is served; None before `serve`."""
        self._running: Any = None

    def serve(
        self,
        on_ready: Callable[[str], None] | None = None,
        *,
        on_message: Callable[[str], None] | None = None,
        on_round: Callable[[RoundStatus], None] | None = None,
    ) -> None:
        """Serve until the run is over (``exit_when_finished``), `stop` is called, or the process is interrupted.

        ``on_ready`` gets the URL once connections are accepted, ``on_message`` lines about what happens before, and
        ``on_round`` each round that was aggregated; its error ends the server. Raises MissingToken, PortInUse,
        ConfigError, ModelError, StateLocked, StateCorrupt, StorageError, and KeyboardInterrupt once Ctrl-C has ended
        the server cleanly.
        """
        from edgefed.aggregator.bucket import check_url
        from edgefed.aggregator.server import AggregatorServer, ServerConfig, bind, check_token
        from edgefed.disk import check_folder

        report = on_message or (lambda text: None)
        check_folder(self.state)
        check_token(self.host, self.token, invite_only=self.invite_only)
        if self.blobs is not None:
            check_url(self.blobs)
        bind(self.host, self.port).close()  # a port in use is reported before the import, which takes long
        self._prepare(report)
        trackers = RoundTrackers(self.track, "server", report)
        config = ServerConfig(
            state_folder=self.state,
            host=self.host,
            port=self.port,
            token=self.token,
            certificate=self.certificate,
            certificate_key=self.certificate_key,
            plain_http=self.plain_http,
            invite_only=self.invite_only,
            ready_file=self.ready_file,
            exit_when_finished=self.exit_when_finished,
            keep_rounds=self.keep_rounds,
            blobs=self.blobs,
            policy_changes=policy_settings(self),
            on_round=trackers.listener(on_round),
        )
        with trackers:
            self._running = AggregatorServer(config, on_ready=on_ready or (lambda url: None))
            self._running.run()
        if self._running.interrupted:
            raise KeyboardInterrupt

    def open_run(
        self,
        on_message: Callable[[str], None] | None = None,
        *,
        on_round: Callable[[RunConfig, RoundStatus], None] = lambda run, status: None,
        tick_s: float | None = None,
    ) -> ActiveRun:
        """Open the run without serving it over HTTP, for a caller that brings the clients' requests by other means.

        ``tick_s``: how often the caller promises to call `ActiveRun.tick`. Raises as `serve` does; close the result.
        """
        from edgefed.aggregator.active_run import ActiveRun
        from edgefed.disk import check_folder
        from edgefed.methods.registry import make_method

        check_folder(self.state)
        self._prepare(on_message or (lambda text: None))
        return ActiveRun(
            self.state, make_method, keep_rounds=self.keep_rounds, tick_s=tick_s, policy_changes=policy_settings(self),
            on_round=on_round,
        )  # fmt: skip

    def _prepare(self, report: Callable[[str], None]) -> None:
        from edgefed.aggregator.store import has_run

        if has_run(self.state):
            self.run_config = continued_run(self)
            report(f"continuing the run in {self.state}")
        else:
            self.run_config = create_run(self, report)

    def stop(self) -> None:
        """End a running `serve`; callable from any thread. The run continues when it is served again."""
        if self._running is not None:
            self._running.stop()
