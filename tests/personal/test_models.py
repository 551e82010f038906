"""Models that clients bring: by name, from their own code, taken apart at the last linear layer, or refused by name."""

import copy
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

import edgefed
from edgefed.errors import ConfigError, DataError, ModelError, ModelNotFound
from edgefed.personal.extractors import make_extractor
from edgefed.personal.local_training import cross_entropy
from edgefed.personal.mixture import Gate, LocalMixture
from edgefed.personal.models import load_model
from edgefed.personal.networks import CNNS, PersonalModel
from edgefed.personal.samples import Batch

CLASSES = 7


def images(count: int = 5, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def load(spec: str, sample: torch.Tensor | None = None, seed: int = 0, num_classes: int = CLASSES) -> PersonalModel:
    sample = images() if sample is None else sample
    return load_model(spec, task="images", num_classes=num_classes, seed=seed, sample=sample)


@pytest.fixture
def spec_of(monkeypatch):
    """A function -> the name under which edgefed can import it."""

    def put(function, name: str = "build_model") -> str:
        module = types.ModuleType("somebodys_models")
        setattr(module, name, function)
        monkeypatch.setitem(sys.modules, "somebodys_models", module)
        return f"somebodys_models:{name}"

    return put


@pytest.fixture
def user_file(tmp_path, monkeypatch):
    """Source text -> the name of a module of it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    names = []

    def write(source: str) -> str:
        names.append(f"users_file_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(source)
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn(self.conv(x)))


class ResNetLike(nn.Module):
    """As torchvision's: `fc`."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 7, 4)
        self.bn1 = nn.BatchNorm2d(8)
        self.layer1 = nn.Sequential(Block(8), Block(8))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, num_classes)

    def forward(self, x):
        return self.fc(torch.flatten(self.avgpool(self.layer1(torch.relu(self.bn1(self.conv1(x))))), 1))


class VggLike(nn.Module):
    """`classifier` with dropouts between three linear layers."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 5, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(4))
        self.classifier = nn.Sequential(
            nn.Linear(64, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 12), nn.ReLU(), nn.Dropout(),
            nn.Linear(12, num_classes),
        )  # fmt: skip

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class MobileNetLike(nn.Module):
    """`classifier` of dropout and linear; depthwise convolutions."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 10, 1)
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(10, num_classes))

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class TimmLike(nn.Module):
    """`head` behind methods; a linear layer of the same width as the logits comes earlier."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 8, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.squeeze = nn.Linear(8, num_classes)
        self.fc_norm, self.head_drop = nn.Identity(), nn.Dropout(0.1)
        self.head = nn.Linear(num_classes, num_classes)

    def forward_features(self, x):
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        return self.norm(x + self.attn(x, x, x)[0])

    def forward_head(self, x):
        return self.head(self.head_drop(self.fc_norm(self.squeeze(x.mean(1)))))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


class VitLike(nn.Module):
    """`heads.head`, as torchvision's; the output is an object with logits, as transformers'."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 8, 8), nn.Flatten(2))
        self.heads = nn.Sequential()
        self.heads.add_module("head", nn.Linear(16, num_classes))

    def forward(self, x):
        return types.SimpleNamespace(logits=self.heads(self.features(x).mean(1)), hidden_states=None)


class Shared(nn.Module):
    """The last layer has two names, and its weight normalised."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.body = nn.Sequential(nn.AvgPool2d(8), nn.Flatten(), nn.Linear(48, 9), nn.Tanh())
        self.head = nn.utils.parametrizations.weight_norm(nn.Linear(9, num_classes, bias=False))
        self.heads = nn.ModuleDict({"main": self.head})

    def forward(self, x):
        return self.heads["main"](self.body(x))


ARCHITECTURES = {ResNetLike: 8, VggLike: 12, MobileNetLike: 10, TimmLike: CLASSES, VitLike: 16, Shared: 9}


def built(function, seed: int = 0) -> nn.Module:
    """What `load` calls, before it is taken apart."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return function(num_classes=CLASSES)


def a_mixture(own: PersonalModel) -> LocalMixture:
    shared = make_extractor("cnn5", seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return LocalMixture(shared, own, Gate(shared.gate_in, 8))


@pytest.mark.parametrize("name", CNNS)
def test_the_papers_models_come_by_name_and_from_a_seed(name):
    state = torch.get_rng_state()
    first, again, other = load(name), load(name), load(name, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert first.width == 500
    assert first(images()).shape == (5, CLASSES)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.header.weight, other.header.weight)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_classifier_is_taken_apart_where_it_ends(architecture, spec_of):
    whole = built(architecture).eval()
    model = load(spec_of(architecture)).eval()
    assert model.width == ARCHITECTURES[architecture]
    assert isinstance(model.header, nn.Linear)
    assert model.header.in_features == model.width
    x = images()
    answer = whole(x)
    assert torch.equal(model(x), getattr(answer, "logits", answer))
    assert model.extractor(x).shape == (5, model.width)
    count = sum(p.numel() for p in whole.parameters())
    assert sum(p.numel() for p in model.parameters()) == count
    assert sum(p.numel() for p in {*model.parameters()} - {*model.header.parameters()}) < count  # and none twice


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trying_a_model_leaves_no_trace_in_it(architecture, spec_of):
    whole, model = built(architecture), load(spec_of(architecture))
    for name, tensor in whole.named_buffers():
        assert torch.equal(model.extractor.model.get_buffer(name), tensor), name
    assert model.training
    assert all(part.training for part in model.modules())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_mixture_of_a_users_model_learns_in_all_parts_and_comes_back_from_its_state(architecture, spec_of):
    spec = spec_of(architecture)
    mixture, again = a_mixture(load(spec)), a_mixture(load(spec, seed=5))
    x = images()
    batch = Batch(x, x, torch.arange(5) % CLASSES)
    optimizer = torch.optim.SGD(mixture.parameters(), 0.1, momentum=0.9)
    for _ in range(2):
        optimizer.zero_grad()
        cross_entropy(mixture.train()(batch)[0], batch.labels).backward()
        optimizer.step()
    for part in (mixture.shared, mixture.projection, mixture.gate, mixture.own.extractor, mixture.own.header):
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in part.parameters())
    state = mixture.state_dict()
    parameters = [name for name, _ in mixture.named_parameters()]
    assert len(parameters) == len({p.data_ptr() for p in mixture.parameters()})
    assert set(parameters) <= state.keys()
    assert list(state) == list(again.state_dict())  # names depend on the architecture alone
    again.load_state_dict(state)
    assert torch.equal(again.eval()(batch)[0], mixture.eval()(batch)[0])
    assert torch.equal(mixture(batch)[0], mixture(batch)[0])  # no dropout in evaluation
    assert torch.equal(copy.deepcopy(mixture)(batch)[0], mixture(batch)[0])


def test_a_last_layer_that_starts_at_zero_is_found_all_the_same(spec_of):
    """Zeros are what a ReLU after it would give as well: values of the model's own prove nothing."""

    def build(num_classes, last):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.Linear(4, num_classes), last)
        nn.init.zeros_(model[2].weight)
        nn.init.zeros_(model[2].bias)
        return model

    assert load(spec_of(lambda num_classes: build(num_classes, nn.Identity()))).width == 4
    with pytest.raises(ModelError, match="no split point"):
        load(spec_of(lambda num_classes: build(num_classes, nn.ReLU())))


def test_lazy_layers_get_their_shapes_and_stay_frozen_or_not(spec_of):
    def build(num_classes):
        return nn.Sequential(
            nn.LazyConv2d(4, 3, 4), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(11), nn.LazyLinear(num_classes)
        )

    model = load(spec_of(build))
    assert model.width == 11
    assert float(next(model.buffers()).abs().sum()) == 0


def test_what_is_frozen_in_the_users_code_stays_frozen(spec_of):
    def build(num_classes):
        model = ResNetLike(num_classes)
        for parameter in [*model.conv1.parameters(), *model.layer1.parameters()]:
            parameter.requires_grad_(False)
        return model

    mixture = a_mixture(load(spec_of(build)))
    frozen = {name for name, p in mixture.own.named_parameters() if not p.requires_grad}
    assert len(frozen) == 8
    assert len(mixture.groups()["model"]) == 4 + 2
    x = images()
    cross_entropy(mixture(Batch(x, x, torch.arange(5)))[0], torch.arange(5)).backward()
    assert all((p.grad is None) == (name in frozen) for name, p in mixture.own.named_parameters())


class Parts(nn.Module):
    """The contract."""

    def __init__(self, width: int | None = 6, features: int = 6, classes: int = CLASSES):
        super().__init__()
        self.extractor = nn.Sequential(nn.Flatten(), nn.Linear(3072, features), nn.BatchNorm1d(features))
        self.header = nn.Sequential(nn.Linear(features, 5), nn.ReLU(), nn.Linear(5, classes))
        if width is not None:
            self.width = width


@pytest.mark.parametrize("width", [6, None])
def test_a_model_that_names_its_parts_is_taken_as_it_is(width, spec_of):
    whole = built(lambda num_classes: Parts(width)).eval()
    model = load(spec_of(lambda: Parts(width))).eval()
    assert model.width == 6
    assert isinstance(model.header, nn.Sequential)
    assert torch.equal(model(images()), whole.header(whole.extractor(images())))


def with_(attribute: str, value):
    def build():
        model = Parts()
        setattr(model, attribute, value)
        return model

    return build


class Functional(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.extractor_ = nn.Linear(3072, 4)
        self.prototypes = nn.Parameter(torch.randn(num_classes, 4))

    def forward(self, x):
        return -torch.cdist(self.extractor_(x.flatten(1)), self.prototypes)


class Twice(nn.Module):
    """Calls its last layer two times: taken out, both calls would be gone."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.first = nn.Linear(3072, num_classes)
        self.again = nn.Linear(num_classes, num_classes)

    def forward(self, x):
        return self.again(self.again(self.first(x.flatten(1))))


class HardCodedBatch(nn.Module):
    def __init__(self, num_classes: int):
        super().__init__()
        self.extractor = nn.Sequential(nn.Unflatten(0, (4, 1)), nn.Flatten(), nn.Linear(3072, 4))
        self.header = nn.Linear(4, num_classes)


class WithWords(nn.Linear):
    def get_extra_state(self):
        return "words"


class KeepsWords(Parts):
    def __init__(self):
        super().__init__()
        self.header = WithWords(6, CLASSES)


def ends_in(*last):
    return lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(3072, 4), nn.Linear(4, num_classes), *last)


BAD = {
    "a softmax": (ends_in(nn.Softmax(-1)), "ends in a softmax", "Remove what follows"),
    "a log-softmax": (ends_in(nn.LogSoftmax(-1)), "ends in a log-softmax", "Remove what"),
    "a sigmoid": (ends_in(nn.Sigmoid()), "ends in a sigmoid", "Remove what"),
    "a dropout at the end": (ends_in(nn.Dropout()), "acts only in training", "before the layer"),
    "scaled logits": (ends_in(nn.Hardtanh()), "no split point", "`extractor` and `header`"),
    "no linear layer at the end": (Functional, r"no split point: .* returns its output \(4, 7\)", "`extractor`"),
    "a last layer called twice": (Twice, "no split point", "`extractor`"),
    "a tuple": (lambda: nn.LSTM(32, 4), "rejects 4 images of 3x32x32", "Change the model to accept such a batch"),
    "another size": (lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes)),
                     "rejects 4 images of 3x32x32 in float32: RuntimeError", "3x32x32"),
    "double precision": (lambda num_classes: ends_in()(num_classes).double(), "float32", "convert it"),
    "a fixed batch size": (HardCodedBatch, "rejects 3 images", "3 images"),
    "another number of classes": (lambda: ResNetLike(1000), "has 1000 outputs, but the data has 7", "num_classes"),
    "a header of another number": (lambda: Parts(classes=3), "has 3 outputs, but the data has 7", "num_classes"),
    "a wrong width": (lambda: Parts(width=9), "is 9, but its extractor returns 6", "Set width to 6"),
    "a width that is not a number": (lambda: Parts(width="six"), "must be an integer, found 'six'", "Remove it"),
    "features that are maps": (with_("extractor", nn.Conv2d(3, 6, 3)), r"\(4, 6, 30, 30\) .* not features \(4, width\)",
                               "Pool or flatten"),
    "a header that refuses the features": (with_("header", nn.Linear(9, CLASSES)), "header rejects", "Change"),
    "a header that gives numbers": (with_("header", nn.Flatten(0)), r"returns \(24,\)", "`header`"),
    "a header with a softmax": (with_("header", nn.Sequential(nn.Linear(6, CLASSES), nn.Softmax(-1))),
                                "returns probabilities", "softmax"),
    "a header with a log-softmax": (with_("header", nn.Sequential(nn.Linear(6, CLASSES), nn.LogSoftmax(-1))),
                                    "returns log-probabilities", "softmax"),
    "parameters outside": (with_("temperature", nn.Parameter(torch.ones(1))), "'temperature'", "only extractor and"),
    "a state that is not a tensor": (KeepsWords, "not a tensor", "Make it a tensor"),
    "nothing": (lambda: None, "returned None, not a torch.nn.Module", "Return the model"),
    "a class": (lambda: ResNetLike, "returned a type", "Return the model"),
    "no weights": (lambda: nn.Linear(4, 4, device="meta"), "uninitialised parameters", "initialised"),
    "arguments": (lambda depth, num_classes: None, "requires depth; edgefed passes only num_classes", "default values"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_unusable_models_are_refused_by_name(what, spec_of):
    function, message, remedy = BAD[what]
    with pytest.raises(ModelError, match=message) as error:
        load(spec_of(function))
    assert "somebodys_models:build_model" in str(error.value)
    assert remedy in error.value.remedy


def test_a_module_that_returns_a_tuple_gets_a_remedy(spec_of):
    class Pair(nn.Module):
        def forward(self, x):
            return x.flatten(1), None

    with pytest.raises(ModelError, match="returned a tuple, not logits"):
        load(spec_of(Pair))


@pytest.mark.parametrize("spec", ["cnn9", "./missing", "a/b", "cnn1:", "a b:c", "os.path:join():x"])
def test_a_name_of_nothing_lists_what_there_is(spec, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFound, match="neither a folder nor a package.module:function") as error:
        load(spec)
    assert "cnn1" in error.value.remedy
    assert "package.module:function" in error.value.remedy


def test_code_lies_in_the_working_directory_and_knows_its_neighbours(user_file, tmp_path):
    (tmp_path / "users_package").mkdir()
    (tmp_path / "users_package" / "parts.py").write_text("from torch import nn\nhead = nn.Linear\n")
    name = user_file(
        "from torch import nn\n"
        "class Net:\n"
        "    @staticmethod\n"
        "    def build(seed, num_classes, *, hidden=8, **others):\n"
        "        from users_package.parts import head\n"  # imported when it is called
        "        assert not others and seed == 0\n"
        "        return nn.Sequential(nn.Flatten(), head(3072, hidden), head(hidden, num_classes))\n"
    )
    before = list(sys.path)
    assert load(f"{name}:Net.build").width == 8
    assert sys.path == before


def test_errors_of_the_users_code_are_reported_with_their_place(user_file, tmp_path):
    name = user_file(
        "import torch\n\ndef build_model():\n    return helper()\n\ndef helper():\n    torch.ones(2) @ torch.ones(3)\n"
    )
    with pytest.raises(ModelError, match=rf"{name}:build_model failed: RuntimeError: .*{name}.py, line 7\)"):
        load(f"{name}:build_model")
    name = user_file(
        "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return x.nothing\n"
    )
    with pytest.raises(ModelError, match=rf"rejects .* AttributeError: .*{name}.py, line 4\)"):
        load(f"{name}:Net")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def build_model(:\n", r"cannot import .*: SyntaxError: .*users_file_0.py, line 1\)"),
        ("import not_there_at_all\n", r"cannot import .*: ModuleNotFoundError: .*users_file_0.py, line 1\)"),
        ("\nraise SystemExit('no')\n", r"cannot import .*: SystemExit: no .*users_file_0.py, line 2\)"),
        ("1 / 0\n", r"cannot import .*: ZeroDivisionError: .*users_file_0.py, line 1\)"),
        ("build_model = 4\n", r"users_file_0:build_model is a int, not a function"),
        ("def build(): pass\nfrom os import path\n", r"not found in users_file_0; it defines build"),
    ],
)  # fmt: skip
def test_a_module_that_cannot_be_used_says_why(user_file, source, message):
    with pytest.raises(ModelError, match=message):
        load(f"{user_file(source)}:build_model")


def test_a_module_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch, user_file):
    for spec in ("not_there_at_all:build", "edgefed.not_there:build", "torch.not.there:build"):
        with pytest.raises(ModelNotFound, match="module .* not found in .* installed"):
            load(spec)
    name = user_file("def build(): pass\n")
    with pytest.raises(ModelNotFound) as error:
        load(f"{name}.py:build")
    assert f"{name}:build" in error.value.remedy


def test_a_sample_may_be_one_example_but_not_none():
    assert load("cnn1", images(1)).width == 500
    assert load_model("cnn1", task="images", num_classes=2, seed=0).header.out_features == 2
    with pytest.raises(DataError, match="no example"):
        load("cnn1", images(0))
    with pytest.raises(ModelError, match="cnn1's extractor rejects 4 images of 3x28x28"):
        load("cnn1", images(2, 28))


class TextModel(nn.Module):
    """Called with what a tokenizer gives, by name; one answer per token; its header is tied to its embedding."""

    def __init__(self, num_classes: int, vocab_size: int = 20):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, 6)
        self.mix = nn.GRU(6, 6, batch_first=True)
        self.lm_head = nn.Linear(6, num_classes, bias=False)
        if num_classes == vocab_size:
            self.lm_head.weight = self.embedding.weight

    def forward(self, input_ids, attention_mask):
        return {"logits": self.lm_head(self.mix(self.embedding(input_ids) * attention_mask.unsqueeze(-1))[0])}


def test_a_text_model_gets_its_inputs_by_name_and_keeps_what_is_tied(spec_of):
    ids = torch.randint(0, 20, (3, 9), generator=torch.Generator().manual_seed(0))
    sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = load_model(spec_of(TextModel), task="text", num_classes=20, seed=0, sample=sample, vocab_size=20)
    assert model.width == 6
    assert model(sample).shape == (3, 9, 20)
    assert model.header.weight is model.extractor.model.embedding.weight
    assert len([*model.parameters()]) == 1 + 4
    with pytest.raises(ConfigError, match="for text"):
        load_model("cnn1", task="text", num_classes=20, seed=0, sample=sample)


def test_the_parts_of_a_text_model_get_them_by_name_too(spec_of):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.extractor = nn.Module()
            self.extractor.table = nn.Embedding(20, 5)
            self.extractor.forward = lambda input_ids, attention_mask: self.extractor.table(input_ids).mean(1)
            self.header = nn.Linear(5, 3)

    sample = {"input_ids": torch.zeros(2, 4, dtype=torch.long), "attention_mask": torch.ones(2, 4)}
    assert load_model(spec_of(Pooled), task="text", num_classes=3, seed=0, sample=sample).width == 5


def test_what_a_server_says_is_never_imported(user_file):
    """The one name in a run that a client builds something from is the extractor's."""
    name = user_file("raise RuntimeError('imported')\n")
    for extractor in (f"{name}:build_model", name, f"{name}.build_model"):
        with pytest.raises(ConfigError, match="extractor"):
            make_extractor(extractor, seed=0)
    assert name not in sys.modules
    package = Path(edgefed.__file__).parent
    users = {
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        if "edgefed.personal.user_code import" in path.read_text(encoding="utf-8")
    }
    assert users >= {"personal/models.py", "personal/splitting.py"}
    assert all(user.startswith("personal/") for user in users)


def test_the_tutorials_example_runs_as_it_is_written(user_file):
    tutorial = (Path(__file__).parents[2] / "docs/pages/tutorials/fedmoe.md").read_text(encoding="utf-8")
    example = tutorial.split("```python\n# mine.py")[1].split("```")[0]
    model = load(f"{user_file('#' + example)}:build_model")
    assert model.width == 512
    assert model(images()).shape == (5, CLASSES)
