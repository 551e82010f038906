"""House rules that a machine can check: who imports whom, Python 3.10, errors and routes that are complete."""

import ast
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import edgefed
from edgefed import errors
from edgefed.cli.main import VERBS
from edgefed.protocol import routes

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "edgefed"
SOURCES = sorted(PACKAGE.rglob("*.py"))
TOP_LEVEL = {"triton_kernels": "edgefed.triton_kernels", "profiles": "edgefed.profiles"}

FLOORS = (
    ("errors", "expert_records"),
    ("config", "disk", "embedded", "hardware", "hub", "isolation", "native", "plots", "progress"),
    ("protocol",),
    ("kernels", "costs", "methods", "tracking"),
    ("moe", "agent", "aggregator"),
    ("training",),
    ("personal", "trainer", "bench", "formats", "doctor"),
    ("join", "runs"),
    ("exporting", "preview"),
    ("simulation",),
    ("api",),
    ("flower",),
    ("cli",),
    ("__main__",),
)
"""Rooms of the package (folders and files) from the ground up. A room imports from itself and from lower floors."""

MODEL_SIDE = ("torch", "transformers")
NEVER_IMPORTED = {
    "errors": ("edgefed", *MODEL_SIDE),
    "expert_records": ("edgefed", *MODEL_SIDE),
    "protocol": MODEL_SIDE,
    "methods": (*MODEL_SIDE, "httpx", "starlette"),
    "agent": (*MODEL_SIDE, "starlette", "uvicorn"),
    "aggregator": (*MODEL_SIDE, "edgefed.agent", "edgefed.kernels.dispatch", "httpx"),
    "training": ("httpx", "starlette"),
    "personal": ("httpx", "starlette", "torchvision"),
    "hardware": ("transformers",),
}
"""Room -> what it does not import at any depth of a function, beside the rooms above it."""


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def calls_of(path: Path) -> tuple[tuple[str, ast.Call], ...]:
    """Every call of a file with the text of what it calls."""
    calls = [node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call)]
    return tuple((ast.unparse(call.func), call) for call in calls)


@functools.cache
def imports_of(path: Path) -> set[str]:
    """Every module that a file imports when it runs, at any depth; what only type checkers see does not count."""
    found = set()
    pending: list[ast.AST] = [tree_of(path)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            pending.extend(node.orelse)
            continue
        pending.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_every_room_has_a_floor():
    rooms = {room_of(path) for path in SOURCES} - {"__init__"}
    assert rooms == {room for floor in FLOORS for room in floor}


@pytest.mark.parametrize("floor", range(len(FLOORS)), ids=lambda floor: "+".join(FLOORS[floor]))
def test_layers_import_only_downwards(floor):
    above = {room for rooms in FLOORS[floor:] for room in rooms}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        if room_of(path) in FLOORS[floor]
        for name in sorted(imports_of(path))
        if name.startswith("edgefed.") and name.split(".")[1] in above - {room_of(path)}
    ]
    assert not wrong


@pytest.mark.parametrize("room", NEVER_IMPORTED)
def test_rooms_stay_free_of(room):
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in SOURCES
        if room_of(path) == room
        for name in sorted(imports_of(path))
        for package in NEVER_IMPORTED[room]
        if within(name, package)
    ]
    assert not wrong


def test_modules_import_each_other_in_no_circle():
    """Imports at module level only: an import inside a function runs when everything is loaded."""
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SOURCES}
    edges = {}
    for name, path in names.items():
        found = set()
        for node in tree_of(path).body:
            if isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Import):
                found.update(alias.name for alias in node.names)
        edges[name] = sorted((found & names.keys()) - {name, "edgefed"})
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail[trail.index(name) :], name))
        if name not in done:
            for other in edges[name]:
                visit(other, (*trail, name))
            done.add(name)

    for name in edges:
        visit(name, ())


def test_only_one_file_of_hardware_asks_torch_and_not_before_it_is_called():
    for path in sorted((PACKAGE / "hardware").glob("*.py")):
        module_level = {
            alias.name
            for node in tree_of(path).body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
        }
        assert not any(within(name, "torch") for name in module_level), path
        if path.name != "cuda.py":
            assert not any(within(name, "torch") for name in imports_of(path)), path


def test_only_one_file_asks_nvml():
    users = {str(path.relative_to(PACKAGE)) for path in SOURCES if "pynvml" in imports_of(path)}
    assert users <= {"hardware/nvml.py"}


def test_nobody_imports_the_command_line():
    outside = [path for path in SOURCES if PACKAGE / "cli" not in path.parents and path.name != "__main__.py"]
    assert not [path for path in outside if any(within(name, "edgefed.cli") for name in imports_of(path))]


def test_only_the_command_line_prints():
    allowed = {PACKAGE / "embedded" / "pretrain.py"}  # a script of its own
    wrong = []
    for path in SOURCES:
        if PACKAGE / "cli" in path.parents or path in allowed:
            continue
        tree = tree_of(path)
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
        wrong += [f"{path.relative_to(ROOT)}:{call.lineno}" for call in calls if call.func.id == "print"]
    assert not wrong


@pytest.mark.parametrize("word", ["pickle", "torch.load", "eval", "exec", "marshal", "shelve"])
def test_nothing_reads_code_from_data(word):
    """One exception: a user's own PyTorch checkpoint, read by torch with `weights_only`, which refuses code."""
    checkpoints = PACKAGE / "moe" / "weight_files.py"
    for path in SOURCES:
        names = imports_of(path)
        assert not any(within(name, word) for name in names) or (path == checkpoints and word == "pickle"), path
        for called, node in calls_of(path):
            assert not within(called, "pickle"), f"{path}:{node.lineno}"
            safe = path == checkpoints and any(
                keyword.arg == "weights_only"
                and isinstance(keyword.value, ast.Constant)
                and keyword.value.value is True
                for keyword in node.keywords
            )
            assert called != word or safe, f"{path}:{node.lineno}"


def test_sources_are_python_3_10():
    wrong = []
    for path in SOURCES:
        try:
            ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, 10))
        except SyntaxError as error:
            wrong.append(f"{path.relative_to(ROOT)}:{error.lineno}: {error.msg}")
    assert not wrong


def test_files_can_be_read_in_one_sitting():
    long = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in SOURCES}
    assert not {path: lines for path, lines in long.items() if lines > 400}


def test_importing_the_package_imports_nothing_heavy():
    code = "import edgefed, sys; print([m for m in ('torch', 'transformers', 'httpx', 'numpy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("module", ["edgefed.aggregator.server", "edgefed.cli.main", "edgefed.agent.agent"])
def test_what_needs_no_model_does_not_load_torch(module):
    code = f"import {module}, sys; print('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_top_level_folders_are_installed_inside_the_package(tmp_path):
    code = "import importlib.util as u; print([u.find_spec(n) is None for n in %r])"
    for name, installed in TOP_LEVEL.items():
        assert importlib.util.find_spec(installed) is not None
        bare = subprocess.run(
            [sys.executable, "-c", code % ([name],)], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert bare.stdout == "[True]\n", f"{name} must not be importable by its bare name"


def test_a_checkout_runs_without_being_installed(tmp_path):
    """`python -m edgefed` in a checkout takes the checkout: the demo starts its agents so."""
    for name in ("edgefed", *TOP_LEVEL, "setup.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    code = (
        "import edgefed.profiles, edgefed.triton_kernels; from edgefed.hardware.profiles import load_profiles as l; l()"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.pathsep.join(sys.path)}"}
    subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, env=environment, check=True)


def test_every_error_is_complete_and_in_the_tree_that_is_drawn():
    tree = errors.all_errors()
    defined = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, errors.EdgefedError)]
    own = {kind.code: kind for kind in defined}
    assert len(own) == len(defined), "two errors share a code"
    for code, kind in own.items():
        assert tree[code] is kind
        assert kind.default_remedy
        assert kind.__name__ in errors.__doc__
        assert 0 < kind.exit_status < 128
        assert 400 <= kind.http_status < 600


def test_the_readme_names_every_verb():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert not [verb for verb in VERBS if f"`{verb}`" not in readme]
    assert len(readme.splitlines()) <= 80, "the README fits one screen; the rest belongs into docs/"


def test_routes_are_distinct_and_documented():
    paths = [value for name, value in vars(routes).items() if isinstance(value, str) and value.startswith("/v1/")]
    assert len(paths) == len(set(paths)) == 14
    assert routes.path_for(routes.BLOB, sha256="a/../b") == "/v1/blobs/a%2F..%2Fb"


def test_version_is_written_once():
    assert edgefed.__version__ not in (ROOT / "pyproject.toml").read_text()
    assert f"## {edgefed.__version__}" in (ROOT / "CHANGELOG.md").read_text()
