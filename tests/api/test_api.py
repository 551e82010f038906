"""The Python API as a notebook uses it: what is imported when, doctests, and a federation in one process."""

from __future__ import annotations

import doctest
import importlib
import runpy
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import edgefed
from edgefed.embedded.silos import load_silo
from edgefed.errors import ConfigError, UnknownMethod
from edgefed.methods.flux import Flux
from edgefed.methods.registry import make_method

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method.py"
OWN_LOSS = EXAMPLE.with_name("own_loss.py")
LOCATION = f"{EXAMPLE}:DecidedExperts"
pytestmark = pytest.mark.usefixtures("registry")


def test_every_public_name_is_there_and_the_import_loads_nothing_heavy():
    assert all(getattr(edgefed, name) is not None for name in edgefed.__all__)
    assert set(edgefed.__all__) <= set(dir(edgefed))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        edgefed.nothing  # noqa: B018
    code = (
        "import sys, edgefed; edgefed.Client; edgefed.Server\n"
        "print([name for name in ('torch', 'transformers', 'numpy', 'httpx', 'click') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_export_reports_a_missing_run_before_it_loads_torch(tmp_path):
    code = (
        "import sys, edgefed\n"
        "try:\n    edgefed.export(sys.argv[1], 'model')\n"
        "except edgefed.errors.StorageError as error:\n    print(error, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == f"no run in state folder {tmp_path} False\n"


@pytest.mark.parametrize("name", ["client", "models", "runs", "server"])
def test_the_examples_in_docstrings_run(name):
    module = importlib.import_module(f"edgefed.api.{name}")
    assert ">>> " in Path(module.__file__).read_text()
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"experts": "150%"}, "invalid `experts`: '150%'"),
        ({"held_out": 1.5}, "invalid `held_out`: 1.5"),
        ({"memory": "2GiB", "device_profile": "rtx-4090"}, "`memory` and `device_profile`"),
        ({"model": "text-cnn"}, "`model=text-cnn` needs `task`"),
        ({"resize": True}, "`resize` needs `task=images`"),
        ({"expert_storage": "int4"}, "invalid `expert_storage`: 'int4'; expected auto, full, int8, nf4"),
        ({"threads": 0}, "invalid `threads`: 0; expected at least 1"),
    ],
)
def test_a_client_is_checked_when_it_is_made(settings, text):
    with pytest.raises(ConfigError, match=text.replace("[", r"\[")):
        edgefed.Client("http://127.0.0.1:1", data="x.jsonl", **settings)


def test_memory_is_a_text_a_number_or_that_of_a_device_profile():
    def memory_bytes(**settings):
        return edgefed.Client("http://127.0.0.1:1", data="x", **settings).memory_bytes

    assert memory_bytes() is None
    assert memory_bytes(memory="2GiB") == memory_bytes(memory=2**31) == 2**31
    assert 2 * 2**30 < memory_bytes(device_profile="jetson-orin-nano-8gb") < 8 * 2**30


def test_a_server_refuses_what_has_no_effect_or_contradicts(tmp_path):
    def serve(**settings):
        edgefed.Server(state=tmp_path / "run", port=0, **settings).serve()

    with pytest.raises(ConfigError, match="`tokenizer=tiny` has no effect with `method=hfedmoe`"):
        serve(tokenizer="tiny")
    with pytest.raises(ConfigError, match="`batch_size` has no effect with fedmoe"):
        serve(method="fedmoe", batch_size=4)
    with pytest.raises(ConfigError, match="`options` are part of a method object"):
        serve(method=Flux(), options={"pace": "own"})
    with pytest.raises(UnknownMethod, match="has no class 'Nothing'"):
        serve(method=f"{EXAMPLE}:Nothing")
    with pytest.raises(UnknownMethod, match="cannot import"):
        serve(method="nowhere.py:Method")
    with pytest.raises(ConfigError, match="`warmup_rounds` is 5, expected fewer than the 5 rounds of the run"):
        serve(warmup_rounds=5)
    with pytest.raises(ConfigError, match="`server_momentum` has no effect without `server_optimizer`"):
        serve(server_momentum=0.5)
    with pytest.raises(ConfigError, match="`server_beta2` has no effect with `server_optimizer=momentum`"):
        serve(server_optimizer="momentum", server_beta2=0.5)
    with pytest.raises(ConfigError, match="`stop_after` cannot be combined with `dp_noise`"):
        serve(stop_after=3, dp_noise=1.0, dp_clip=1.0)
    with pytest.raises(ConfigError, match="`adapter_average=product` cannot be combined with `dp_noise`"):
        serve(adapter_average="product", dp_noise=1.0, dp_clip=1.0)
    with pytest.raises(ConfigError, match="adapter_average is product, which robust=median cannot combine"):
        serve(adapter_average="product", robust="median", train_experts="lora")
    for settings, says in (
        ({"train_experts": "full"}, "has no effect: nothing trains by LoRA"),
        ({"train_experts": "lora", "max_staleness": 2}, "cannot be combined with `max_staleness=2`"),
        ({"train_experts": "lora", "method": "slices"}, "cannot be combined with slices"),
    ):
        with pytest.raises(ConfigError, match=f"`adapter_average=alternate` {says}"):
            serve(adapter_average="alternate", **settings)
    for settings, says in (
        ({"train_experts": "full", "train_router": "full"}, "has no effect: no adapters are exchanged"),
        ({"train_experts": "lora", "method": "local"}, "has no effect: no adapters are exchanged"),
        ({"train_experts": "lora", "method": "slices"}, "cannot be combined with slices"),
        *((lora | {name: value}, f"with `adapter_average=product` cannot be combined with `{name}={value}`")
          for lora in [{"train_experts": "lora", "adapter_average": "product"}]
          for name, value in (("compression", "int8"), ("server_optimizer", "adam"), ("keep_optimizer", True),
                              ("max_staleness", 2), ("download_compression", "topk12"))),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=f"`min_lora_rank=2` {says}"):
            serve(min_lora_rank=2, **settings)
    with pytest.raises(ConfigError, match="`min_lora_rank` is 9, expected at most `lora_rank`, 8"):
        serve(min_lora_rank=9, train_experts="lora")
    with pytest.raises(ConfigError, match="`evaluate_every` is 9, expected at most the 5 rounds"):
        serve(evaluate_every=9)
    with pytest.raises(ConfigError, match="`schedule` has no effect with fedmoe"):
        serve(method="fedmoe", schedule="cosine")
    with pytest.raises(ConfigError, match="`rounds`: 0"):
        edgefed.Server(rounds=0)


def broken_loss(logits, labels):
    raise RuntimeError("no loss here")


def test_a_method_and_a_loss_of_ones_own_in_a_federation(tmp_path):
    """Server and client in one process: the example's class is imported by both, and its plan is what is trained."""
    state = tmp_path / "run"
    server = edgefed.Server(
        model="tiny", method=LOCATION, options={"floor": 0.01}, rounds=2, min_clients=1, port=0, state=state,
        local_steps=2, batch_size=2, sequence_length=32, profile_tokens=256, evaluation_tokens=64,
        exit_when_finished=True,
    )  # fmt: skip
    urls: list[str] = []
    ready = threading.Event()

    def on_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    serving = threading.Thread(target=server.serve, args=(on_ready,), daemon=True)
    serving.start()
    assert ready.wait(180)
    events, steps, metrics = [], [], {}
    texts = ({"text": document.text, "path": document.name} for document in load_silo("http").train)
    client = edgefed.Client(
        urls[0], data=texts, memory="4GiB", experts=0.5, state=tmp_path / "me", threads=1, method=LOCATION
    )
    with pytest.raises(ConfigError, match=r"`loss` broken_loss failed: RuntimeError: no loss here \(.*test_api"):
        client.run(loss=broken_loss)
    own = runpy.run_path(str(OWN_LOSS))
    summary = client.run(
        on_event=events.append, loss=own["smoothed"], evaluate=own["certainty"], on_round=metrics.__setitem__,
        on_step=lambda *step: steps.append(step),
    )  # fmt: skip
    serving.join(60)
    assert not serving.is_alive()
    assert summary.rounds == 2
    assert [step[:2] for step in steps] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert steps[0][2] > 3.3, "a smoothed loss is larger than that of the pretrained model"
    assert [0 < metrics[number]["certainty"] < 1 for number in (1, 2)] == [True, True]
    assert {"train", "upload"} <= {event.text for event in events if event.kind == "phase"}
    assert any("plan: 32 of 64 experts" in str(event) for event in events)
    assert client.data == str(tmp_path / "me/spooled-data.jsonl")
    assert make_method("decided", {"floor": 0.01}).floor == 0.01

    folder = edgefed.export(state, tmp_path / "model")
    assert (folder / "config.json").exists()
    with pytest.raises(ConfigError, match="`rounds=3` was asked for, but the run in .* has 2"):
        edgefed.Server(state=state, port=0, rounds=3).serve()
    with pytest.raises(ConfigError, match="`options` floor=0.5 was asked for"):
        edgefed.Server(state=state, port=0, options={"floor": 0.5}).serve()
    with pytest.raises(ConfigError, match="`method=flux` was asked for"):
        edgefed.Server(state=state, port=0, method="flux").serve()


def test_a_method_of_ones_own_in_a_simulation(tmp_path):
    (tmp_path / "fleet.toml").write_text(
        f'''methods = ["{LOCATION}"]
        model = "tiny"
        rounds = 1
        evaluation-tokens = 64
        [training]
        local-steps = 1
        batch-size = 2
        sequence-length = 32
        profile-tokens = 256
        [data]
        sources = ["silo:http"]
        [[fleet]]
        profile = "rtx-4090"
        experts = 0.5
        '''
    )
    result = edgefed.simulate(tmp_path / "fleet.toml", out=tmp_path / "out")
    assert [run.label for run in result.runs] == ["decided"]
    assert len(result.run("decided").rounds) == 1
    with pytest.raises(ConfigError, match="has no method flux; its methods are decided"):
        edgefed.simulate(tmp_path / "fleet.toml", out=tmp_path / "out", methods=["flux"])
