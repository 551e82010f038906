"""Toy checkpoints of many MoE families, made once per session."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from edgefed.moe.model import MoeModel
from edgefed.moe.units import MemorySource, TrainScope


def _load_toy_models():
    spec = importlib.util.spec_from_file_location("edgefed_toy_models", Path(__file__).with_name("toy_models.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toy_models = _load_toy_models()
ALL_CONFIGS = {**toy_models.FAMILIES, **toy_models.MORE_FAMILIES, **toy_models.REFUSED}


@dataclasses.dataclass(frozen=True)
class Toy:
    """A toy checkpoint: its folder, some token ids, and the logits that transformers computes from them."""

    family: str
    folder: Path
    input_ids: torch.Tensor  # (2, 10)
    logits: torch.Tensor  # (2, 10, V)

    def full(self) -> MoeModel:
        return MoeModel.from_checkpoint(self.folder)

    def units(self, scope: TrainScope | None = None) -> dict[str, dict[str, torch.Tensor]]:
        """Copies of all units, so that a test may change them."""
        units = self.full().iter_units(scope, seed=7)
        return {spec.key: {name: t.clone() for name, t in tensors.items()} for spec, tensors in units}

    def device(self, units: dict) -> tuple[MoeModel, MemorySource]:
        """A skeleton with its dense part and routers loaded, as a client has it, and the source of its experts."""
        model = MoeModel.skeleton(self.folder)
        for spec in model.unit_infos():
            if spec.kind != "expert":
                model.load_unit(spec.key, units[spec.key])
        return model, MemorySource(units)


def skip_before_its_time(family: str) -> None:
    """Skip a family whose experts interface the installed transformers does not have yet."""
    needed = toy_models.SINCE.get(family, 0)
    if int(transformers.__version__.split(".")[1]) < needed:
        pytest.skip(f"{family} uses the experts interface since transformers 5.{needed}")


def build(family: str, dtype: torch.dtype = torch.float32, **settings):
    """A random toy model of a family, with biases that matter. ``settings`` replace those of its configuration."""
    skip_before_its_time(family)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**ALL_CONFIGS[family], **settings})
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "bias" in name:
                tensor.uniform_(0, 0.3)
    return model


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, **settings) -> Toy:
    model = build(family, dtype, **settings)
    model.save_pretrained(folder)
    input_ids = torch.randint(3, 96, (2, 10), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return Toy(family, folder, input_ids, model(input_ids).logits)


@pytest.fixture(scope="session", autouse=True)
def quiet_and_single_threaded():
    """Toy matrices are slower with threads; progress bars hide what a test says."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def toys(tmp_path_factory):
    """Toy checkpoint of a family by name, created on first use."""
    made: dict[str, Toy] = {}

    def get(family: str) -> Toy:
        skip_before_its_time(family)
        if family not in made:
            made[family] = save(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(params=list(toy_models.FAMILIES))
def toy(request, toys) -> Toy:
    """Each of the six families that the project guarantees."""
    return toys(request.param)


@pytest.fixture
def olmoe(toys) -> Toy:
    """One family, for tests that do not depend on the family."""
    return toys("olmoe")


@pytest.fixture
def build_model():
    return build


@pytest.fixture(scope="session")
def save_toy():
    return save


@pytest.fixture(scope="session")
def toy_configs():
    return toy_models
