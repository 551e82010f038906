"""What setup.py builds with which compilers, by programs that stand in for them; and the built CUDA library itself."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import edgefed
from edgefed.kernels.cuda_library import find_cuda
from edgefed.native import NativeUnavailable

ROOT = Path(__file__).parents[1]
COMPILER = """#!/bin/sh
echo "$0" "$@" >> "{log}"
if [ "$1" = --list-gpu-arch ]; then printf 'compute_75\\ncompute_87\\ncompute_88\\ncompute_90\\n'; exit 0; fi
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then echo built > "$2"; fi; shift; done
exit {status}
"""


class Build:
    """setup.py build_ext in a process of its own, with stand-ins for g++ and nvcc that note how they are called."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "log"
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.stand_in("fake-g++")

    def stand_in(self, name: str, status: int = 0) -> None:
        path = self.bin / name
        path.write_text(COMPILER.format(log=self.log, status=status))
        path.chmod(0o755)

    def run(self, **variables: str) -> subprocess.CompletedProcess:
        self.log.write_text("")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("EDGEFED_")}
        environment = clean | {
            "CXX": str(self.bin / "fake-g++"), "PATH": f"{self.bin}:/usr/bin:/bin", "CUDA_HOME": str(self.folder),
        } | variables  # fmt: skip
        command = [sys.executable, "setup.py", "build_ext", "-b", f"{self.folder}/lib", "-t", f"{self.folder}/temp"]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    def built(self) -> set[str]:
        return {path.name for path in (self.folder / "lib").rglob("*.so")}

    def calls(self, program: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.split()[0].endswith(program)]


@pytest.fixture
def build(tmp_path):
    pytest.importorskip("setuptools.command.bdist_wheel", reason="setup.py needs setuptools 70.1")
    if os.name == "nt" or not (ROOT / "setup.py").is_file() or shutil.which("nvcc", path="/usr/bin:/bin"):
        pytest.skip("needs a checkout, and a shell without nvcc in /usr/bin")
    return Build(tmp_path)


def test_both_parts_are_built_where_both_compilers_are(build):
    build.stand_in("nvcc")
    done = build.run(EDGEFED_CUDA="1")
    assert done.returncode == 0, done.stderr
    assert build.built() == {"_native.so", "_cuda.so"}
    compiled = [call for call in build.calls("nvcc") if " -c " in call]
    assert len(compiled) == len(list((ROOT / "csrc").glob("*.cu")))
    for call in compiled:  # what this nvcc knows of the GPUs that edgefed names, and PTX of the last
        codes = [word.rpartition("=")[2] for word in call.split() if word.startswith("-gencode")]
        assert codes == ["sm_75", "sm_87", "sm_90", "compute_90"]
    (link,) = [call for call in build.calls("nvcc") if " -shared " in call]
    assert "--cudart=static" in link
    assert "--exclude-libs,ALL" in link


def test_without_a_gpu_the_cuda_part_is_left_out_at_once_and_it_is_said(build):
    if shutil.which("nvidia-smi", path="/usr/bin:/bin") or Path("/etc/nv_tegra_release").exists():
        pytest.skip("this machine has a GPU")
    build.stand_in("nvcc")
    done = build.run()
    assert build.built() == {"_native.so"}
    assert "no NVIDIA GPU here, CUDA part left out (EDGEFED_CUDA=1" in done.stdout
    assert not build.calls("nvcc")


def test_with_a_gpu_the_cuda_part_is_built_for_it(build):
    build.stand_in("nvcc")
    smi = build.bin / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '8.7\\n8.7\\n'\n")
    smi.chmod(0o755)
    assert build.run().returncode == 0
    (call, *_) = [call for call in build.calls("nvcc") if " -c " in call]
    assert [word.rpartition("=")[2] for word in call.split() if word.startswith("-gencode")] == ["sm_87", "compute_87"]


def test_the_build_says_what_it_compiles(build):
    out = build.run(EDGEFED_CUDA="0").stdout
    sources = list((ROOT / "csrc").glob("*.cpp"))
    assert f"edgefed: compiling {len(sources)} files with {build.bin / 'fake-g++'}" in out
    assert all(f"edgefed: csrc/{source.name} compiled after " in out for source in sources)


def test_without_nvcc_the_native_part_is_built_and_it_is_said(build):
    done = build.run()
    assert done.returncode == 0
    assert build.built() == {"_native.so"}
    assert "no nvcc, CUDA part left out" in done.stdout


def test_without_any_compiler_the_build_succeeds_and_says_so(build):
    done = build.run(CXX="/nowhere/g++")
    assert done.returncode == 0
    assert build.built() == set()
    assert "native part not built" in done.stdout + done.stderr


def test_parts_can_be_left_out(build):
    build.stand_in("nvcc")
    assert build.run(EDGEFED_CUDA="0").returncode == 0
    assert build.built() == {"_native.so"}
    assert not build.calls("nvcc")
    shutil.rmtree(build.folder / "lib")
    assert build.run(EDGEFED_NATIVE="0").returncode == 0
    assert build.built() == set()


def test_a_part_that_must_be_built_and_cannot_fails_by_name(build):
    done = build.run(EDGEFED_CUDA="1")
    assert done.returncode != 0
    assert "EDGEFED_CUDA=1, but no nvcc" in done.stderr
    build.stand_in("nvcc", status=1)
    done = build.run(EDGEFED_CUDA="1")
    assert done.returncode != 0
    assert "EDGEFED_CUDA=1, but the CUDA part could not be built" in done.stderr
    done = build.run(CXX="/nowhere/g++", EDGEFED_NATIVE="1")
    assert done.returncode != 0
    assert "EDGEFED_NATIVE=1" in done.stderr


def test_an_nvcc_that_fails_costs_only_the_cuda_part(build):
    build.stand_in("nvcc", status=1)
    done = build.run(EDGEFED_CUDA_ARCHS="87")
    assert done.returncode == 0
    assert "_native.so" in build.built()
    assert "_cuda.so" not in build.built()
    assert "CUDA part not built" in done.stdout + done.stderr


def test_gpus_can_be_chosen(build):
    build.stand_in("nvcc")
    assert build.run(EDGEFED_CUDA_ARCHS="90;88").returncode == 0
    assert "code=sm_88 " in build.calls("nvcc")[1]
    assert "code=compute_90 " in build.calls("nvcc")[1]
    assert "sm_75" not in build.calls("nvcc")[1]
    done = build.run(EDGEFED_CUDA_ARCHS="87;110")
    assert done.returncode != 0
    assert "EDGEFED_CUDA_ARCHS has 110" in done.stderr


# --- the built library ------------------------------------------------------------------------------------------


@pytest.fixture
def cuda_library():
    try:
        return find_cuda()
    except NativeUnavailable as error:
        pytest.skip(str(error))


def test_the_cuda_library_loads_without_a_driver_and_says_what_is_missing(cuda_library, tmp_path):
    code = (
        "import sys; from edgefed.kernels.cuda_library import load_cuda, why_not_cuda;"
        "load_cuda(); print(why_not_cuda(0)); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,  # the installed package, not the checkout
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "CUDA device 0 cannot run them" in done.stdout
    assert "CUDA error" in done.stdout


def test_the_cuda_library_exports_its_interface_and_nothing_of_the_runtime_in_it(cuda_library):
    tool = shutil.which("nm")
    if tool is None:
        pytest.skip("no nm to list symbols with")
    text = subprocess.run([tool, "-D", "--defined-only", cuda_library], capture_output=True, text=True, check=True)
    names = {line.split()[-1] for line in text.stdout.splitlines()}
    assert "ef_cuda_grouped_matmul" in names
    assert not [name for name in names if not name.startswith("ef_cuda_")]


def test_a_process_of_a_test_runs_the_package_that_the_tests_import():
    """With `-m` python looks in the working directory first: a checkout there would be run instead, without kernels."""
    code = "import edgefed; print(edgefed.__file__)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert found == edgefed.__file__


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux" or not (ROOT / ".ci" / "wheel").is_file(), reason="needs a Linux checkout")
def test_the_wheel_installs_and_loads_its_library_without_a_compiler(tmp_path):
    pytest.importorskip("auditwheel", reason="pip install -e '.[dev]' has it")
    pytest.importorskip("pip")
    command = [ROOT / ".ci" / "wheel", "--packages", sys.executable, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "edgefed: csrc/masked_experts.cpp compiled after " in done.stdout, "a minute of silence"
    assert "manylinux_2_" in done.stdout
    assert edgefed.__version__ in done.stdout.splitlines()[-2]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith(f"edgefed-{edgefed.__version__}-py3-none-linux_")
