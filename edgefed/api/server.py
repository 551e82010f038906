"""`Server`: imports a model once, then coordinates the rounds of a run."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from edgefed.config import Setting, check_settings
from edgefed.errors import ConfigError

if TYPE_CHECKING:
    from edgefed.aggregator.rounds import RoundPolicy
    from edgefed.methods.interface import Method
    from edgefed.protocol.messages import RunConfig
else:
    Method = object

TrainMode = Literal["full", "lora", "none"]
Option = float | int | str | bool

DEFAULT_METHOD = "hfedmoe"
DEFAULT_EXTRACTOR = "cnn5"
TRAINING = (
    "train_experts", "train_router", "train_attention", "lora_rank", "lora_alpha", "local_steps", "batch_size",
    "sequence_length", "learning_rate", "weight_decay", "balancing", "missing", "profile_tokens",
    "profile_agreement", "evaluation_tokens", "evaluation_share",
)  # fmt: skip
"""Settings of the training of a language model."""


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
    rollback: Annotated[
        float | None,
        Setting("Undo a round that multiplies the held-out loss of most clients by this; 0: never.", default="1.5",
                minimum=0),
    ] = None  # fmt: skip
    max_examples: Annotated[
        int | None,
        Setting("Most examples that a client counts with; default: 10 times the median of the round.", minimum=1),
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
    train_experts: Annotated[TrainMode | None, Setting("How experts are trained.", default="full")] = None
    train_router: Annotated[TrainMode | None, Setting("How routers are trained.", default="full")] = None
    train_attention: Annotated[TrainMode | None, Setting("How attention weights are trained.", default="none")] = None
    lora_rank: Annotated[int | None, Setting("Rank of LoRA adapters.", default="8", minimum=1)] = None
    lora_alpha: Annotated[float | None, Setting("Alpha of LoRA adapters.", default="16", above=0)] = None
    local_steps: Annotated[int | None, Setting("Optimizer steps of a client in a round.", default="20", minimum=1)] = (
        None
    )
    batch_size: Annotated[int | None, Setting("Sequences in a batch.", default="8", minimum=1)] = None
    sequence_length: Annotated[int | None, Setting("Tokens in a sequence.", default="128", minimum=2)] = None
    learning_rate: Annotated[float | None, Setting("Learning rate of clients.", default="0.0005", above=0)] = None
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
    seed: Annotated[int | None, Setting("Seed of the run.", default="0", minimum=0)] = None
    keep_rounds: Annotated[int, Setting("Rounds whose global model stays on disk; 0 keeps all.", minimum=0)] = 2
    exit_when_finished: Annotated[bool, Setting("Exit after the last round instead of serving the final model.")] = (
        False
    )
    ready_file: Annotated[Path | None, Setting("Write the address to this file once connections are accepted.")] = None

    def __post_init__(self) -> None:
        check_settings(self)
        self.state = Path(self.state)
        self.run_config: RunConfig | None = None
        """The run that is served; None before `serve`."""
        self._running: Any = None

    def serve(
        self,
        on_ready: Callable[[str], None] | None = None,
        *,
        on_message: Callable[[str], None] | None = None,
    ) -> None:
        """Serve until the run is over (``exit_when_finished``), `stop` is called, or the process is interrupted.

        ``on_ready`` gets the URL once connections are accepted, ``on_message`` lines about what happens before. Raises
        MissingToken, PortInUse, ConfigError, ModelError, StateLocked, StateCorrupt, StorageError, and KeyboardInterrupt
        once Ctrl-C has ended the server cleanly.
        """
        from edgefed.aggregator.server import AggregatorServer, ServerConfig, bind, check_token
        from edgefed.aggregator.store import has_run
        from edgefed.disk import check_folder

        report = on_message or (lambda text: None)
        check_folder(self.state)
        check_token(self.host, self.token, invite_only=self.invite_only)
        bind(self.host, self.port).close()  # a port in use is reported before the import, which takes long
        if has_run(self.state):
            self.run_config = self._existing_run()
            report(f"continuing the run in {self.state}")
        else:
            self.run_config = self._create_run(report)
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
            policy_changes=self._policy_settings(),
        )
        self._running = AggregatorServer(config, on_ready=on_ready or (lambda url: None))
        self._running.run()
        if self._running.interrupted:
            raise KeyboardInterrupt

    def stop(self) -> None:
        """End a running `serve`; callable from any thread. The run continues when it is served again."""
        if self._running is not None:
            self._running.stop()

    def _method(self) -> tuple[str, dict[str, Option]]:
        """(name, options) of the method; one of the user's own is registered."""
        from edgefed.methods import custom

        options = dict(self.options or {})
        if self.method is None:
            return DEFAULT_METHOD, options
        if isinstance(self.method, str):
            name = custom.load_method(self.method) if custom.is_location(self.method) else self.method
            return name, options
        if options:
            raise ConfigError("`options` are part of a method object", remedy="Set them where the object is made.")
        return custom.name_and_options(self.method)

    def _create_run(self, report: Callable[[str], None]) -> RunConfig:
        from edgefed.api.new_run import check_private, import_watch, privacy_of
        from edgefed.embedded import TINY, resolve_model
        from edgefed.hub import check_source
        from edgefed.methods.registry import check_training, make_method
        from edgefed.progress import Pulse
        from edgefed.protocol.messages import RunConfig
        from edgefed.runs import import_in_subprocess

        model, tokenizer = str(self.model or TINY), ""
        name, options = self._method()
        method = make_method(name, options)
        if method.personal:
            model, tokenizer = self._extractor(name)
            source = model
        else:
            for setting in ("extractor", "tokenizer"):
                if (value := getattr(self, setting)) is not None:
                    raise ConfigError(
                        f"`{setting}={value}` has no effect with `method={name}`",
                        remedy=f"Remove `{setting}`: it is for fedmoe only.",
                    )
            source = resolve_model(self.model or TINY)
        training = self._training()
        check_training(method, training.experts)
        if {training.experts, training.router, training.attention} == {"none"}:
            raise ConfigError("nothing would be trained: experts, router and attention are all none")
        run = RunConfig(
            run_id=secrets.token_hex(8),
            model=model,
            method=name,
            method_options=options,
            rounds=5 if self.rounds is None else self.rounds,
            seed=self.seed or 0,
            training=training,
            tokenizer=tokenizer,
            privacy=privacy_of(self),
        )
        policy = self._policy(run.rounds)
        if run.privacy is not None:
            policy = check_private(self, run.privacy, method, policy)
        if note := "" if method.personal else check_source(source):
            report(note)
        report(f"importing {run.model} into {self.state}")
        neurons = not method.personal and method.requirements.neurons
        with Pulse(import_watch(self.state, run.model, source, report)):
            import_in_subprocess(source, self.state, run, policy, personal=method.personal, neurons=neurons)
        return run

    def _training(self) -> Any:
        from edgefed.protocol.messages import TrainingConfig

        given = {name: getattr(self, name) for name in TRAINING if getattr(self, name) is not None}
        return TrainingConfig(**{name.removeprefix("train_"): value for name, value in given.items()})

    def _policy(self, rounds: int) -> RoundPolicy:
        from edgefed.aggregator.rounds import RoundPolicy

        defaults: dict[str, Any] = {
            "min_clients": 2, "client_timeout_s": 60.0, "deadline_s": 3600.0, "clip": 2.0, "rollback": 1.5,
        }  # fmt: skip
        policy = RoundPolicy(rounds=rounds, **{**defaults, **self._policy_settings()})
        policy.check()
        return policy

    def _policy_settings(self) -> dict[str, Any]:
        """The settings of rounds that were given; they also apply to a run that continues."""
        from edgefed.aggregator.rounds import RoundPolicy

        settings = {"deadline_s": self.deadline, "client_timeout_s": self.client_timeout}
        names = {field.name for field in dataclasses.fields(RoundPolicy)} - {"rounds", *settings}
        settings |= {name: getattr(self, name) for name in names}
        switched_off = ("deadline_s", "clip", "rollback")
        given = {name: value for name, value in settings.items() if value is not None}
        return {name: None if name in switched_off and value == 0 else value for name, value in given.items()}

    def _extractor(self, method: str) -> tuple[str, str]:
        """(extractor, its tokenizer or "") of a run whose clients have models of their own.

        Raises ConfigError for settings that have no effect there.
        """
        from edgefed.embedded import TINY
        from edgefed.methods.fedmoe import TEXT, extractor_task
        from edgefed.methods.registry import method_options

        name = self.extractor or DEFAULT_EXTRACTOR
        reads_text = extractor_task(name) == TEXT
        if self.tokenizer and not reads_text:
            raise ConfigError(
                f"`tokenizer={self.tokenizer}` has no effect with {name}, which takes images",
                remedy="Remove it, or set `extractor=text-small`.",
            )
        for setting in ("model", *TRAINING):
            if getattr(self, setting) is None or (setting == "sequence_length" and reads_text):
                continue
            raise ConfigError(
                f"`{setting}` has no effect with {method}: its clients train models of their own",
                remedy=f"Set options of the method instead: {', '.join(method_options(method))}.",
            )
        return name, (self.tokenizer or TINY) if reads_text else ""

    def _existing_run(self) -> RunConfig:
        """The run in the state folder. Raises ConfigError for a setting that contradicts it."""
        from edgefed.api.new_run import other_privacy
        from edgefed.methods.options import option_values
        from edgefed.methods.registry import make_method
        from edgefed.runs import RunReader

        with RunReader(self.state) as reader:
            run = reader.run
        method, options = self._method() if self.method is not None else (None, dict(self.options or {}))
        wanted: dict[str, object] = {"model": self.model and str(self.model), "extractor": self.extractor}
        wanted |= {"method": method, "tokenizer": self.tokenizer, "rounds": self.rounds, "seed": self.seed}
        wanted |= {name: getattr(self, name) for name in TRAINING}
        for name, value in wanted.items():
            attribute = "model" if name == "extractor" else name.removeprefix("train_")
            found = getattr(run if hasattr(run, attribute) else run.training, attribute)
            if value is not None and value != found:
                raise self._contradiction(f"`{name}={value}`", found)
        if asked := other_privacy(self, run.privacy):
            raise self._contradiction(asked, run.privacy or "no noise")
        if options:
            found, wanted_method = (
                option_values(make_method(run.method, {**run.method_options, **more})) for more in ({}, options)
            )
            if differing := [name for name in options if wanted_method[name] != found[name]]:
                asked, has = (
                    ", ".join(f"{name}={values[name]}" for name in differing) for values in (wanted_method, found)
                )
                raise self._contradiction(f"`options` {asked}", has)
        return run

    def _contradiction(self, asked: str, found: object) -> ConfigError:
        return ConfigError(
            f"{asked} was asked for, but the run in {self.state} has {found}",
            remedy="Remove the setting to continue that run, or start a new one with another `state`.",
        )
