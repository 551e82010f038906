"""Builds edgefed, with its native library if there is a C++ compiler, and its CUDA library if there are nvcc and a GPU.

Both are shared libraries with a plain C interface and no link to Python or torch, so one wheel serves every Python and
every torch of a platform. Without a compiler the package is complete but slower, and says so. The CUDA library contains
the CUDA runtime and loads on a machine without a driver. What is compiled is printed; pip shows it with -v.

    EDGEFED_NATIVE=0        build neither
    EDGEFED_NATIVE=1        fail if the native library cannot be built
    EDGEFED_CUDA=0          do not build the CUDA library
    EDGEFED_CUDA=1          build it for all of CUDA_ARCHS that nvcc knows, or fail
    EDGEFED_CUDA_ARCHS=87   build it for these GPUs, as in "80;87"
"""

import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]
# No fused multiply-add where results must equal their numpy or PyTorch specification bit for bit.
FLAGS_OF_FILE = {"fold.cpp": ["-ffp-contract=off"], "quantize.cpp": ["-ffp-contract=off"]}
LINK_FLAGS = ["-shared", *(["-pthread", "-ldl"] if sys.platform == "linux" else [])]

CUDA_SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cu"))
CUDA_ARCHS = (75, 80, 86, 87, 89, 90, 100, 110, 120)
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xfatbin", "-compress-all"]
# Hide the symbols of the CUDA runtime: torch loads another runtime into the process.
CUDA_LINK_FLAGS = ["-shared", "--cudart=static", "-Xlinker", "--exclude-libs,ALL"]


class BuildNative(build_ext):
    """Compile csrc/*.cpp into edgefed/_native.so with the first C++ compiler that works, csrc/*.cu into _cuda.so."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + (".dll" if os.name == "nt" else ".so")

    def build_extension(self, ext):
        requested = os.environ.get("EDGEFED_NATIVE", "auto")
        if requested == "0":
            print(f"edgefed: {ext.name} left out (EDGEFED_NATIVE=0)")
            return None
        if ext.name == "edgefed._cuda":
            return self.build_cuda(ext)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
        try:
            if compiler is None:
                raise OSError("no C++ compiler (g++, c++, clang++) was found")
            self.compile(compiler.split(), ext.sources, target)
        except (OSError, subprocess.CalledProcessError) as error:
            if requested == "1":
                raise SystemExit(
                    f"edgefed: EDGEFED_NATIVE=1, but the native part could not be built: {error}"
                ) from error
            self.warn(f"native part not built ({error}); edgefed works without it, aggregation is slower")

    def compile(self, compiler, sources, target):
        """Compile one object per file, as many in parallel as there are cores, then link the library."""
        folder = Path(self.build_temp) / "csrc"
        folder.mkdir(parents=True, exist_ok=True)

        def build(source):
            result = folder / (Path(source).stem + ".o")
            flags = [*FLAGS, *FLAGS_OF_FILE.get(Path(source).name, [])]
            subprocess.check_call([*compiler, *flags, "-c", source, "-o", str(result)])
            return str(result)

        objects = compile_all(build, sources, f"with {compiler[0]}, about a minute on two cores")
        subprocess.check_call([*compiler, *objects, *LINK_FLAGS, "-o", str(target)])

    def build_cuda(self, ext):
        """Compile csrc/*.cu for every GPU that nvcc knows, and PTX of the last for later GPUs."""
        requested = os.environ.get("EDGEFED_CUDA", "auto")
        if requested == "0":
            print("edgefed: CUDA part left out (EDGEFED_CUDA=0)")
            return
        nvcc = find_nvcc()
        if nvcc is None:
            if requested == "1":
                raise SystemExit("edgefed: EDGEFED_CUDA=1, but no nvcc was found in PATH, CUDA_HOME or /usr/local/cuda")
            print("edgefed: no nvcc, CUDA part left out")
            return
        wanted = os.environ.get("EDGEFED_CUDA_ARCHS")
        if not wanted and requested != "1":
            wanted = gpus_here()
            if not wanted:
                print("edgefed: no NVIDIA GPU here, CUDA part left out (EDGEFED_CUDA=1 builds it for all GPUs)")
                return
        try:
            archs = choose_archs(nvcc, wanted)
            target = Path(self.get_ext_fullpath(ext.name))
            folder = Path(self.build_temp) / "csrc"
            for place in (target.parent, folder):
                place.mkdir(parents=True, exist_ok=True)
            code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
            code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
            cores = os.cpu_count() or 1
            threads = ["--threads", str(max(1, cores // len(ext.sources)))]

            def build(source):
                result = folder / (Path(source).stem + ".cu.o")
                subprocess.check_call([nvcc, *CUDA_FLAGS, *code, *threads, "-c", source, "-o", str(result)])
                return str(result)

            objects = compile_all(build, ext.sources, f"with nvcc for {len(archs)} kinds of GPU")
            subprocess.check_call([nvcc, *CUDA_LINK_FLAGS, *objects, "-o", str(target)])
        except (OSError, subprocess.CalledProcessError) as error:
            if requested == "1":
                raise SystemExit(f"edgefed: EDGEFED_CUDA=1, but the CUDA part could not be built: {error}") from error
            self.warn(f"CUDA part not built ({error}); edgefed works without it")

    def get_outputs(self):
        return [path for path in super().get_outputs() if os.path.exists(path)]


def compile_all(build, sources, how):
    """Build each source, as many in parallel as there are cores; print what goes on. Returns the objects in order."""
    started = time.monotonic()
    print(f"edgefed: compiling {len(sources)} files {how}", flush=True)

    def timed(source):
        result = build(source)
        print(f"edgefed: {source} compiled after {time.monotonic() - started:.0f} s", flush=True)
        return result

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(timed, sources))


def gpus_here():
    """Return the compute capabilities of this machine's GPUs, as in "86;89"; "all" if unknown, "" without a GPU."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        listed = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.split()
        found = {capability.replace(".", "") for capability in listed if capability.replace(".", "").isdigit()}
        return ";".join(sorted(found, key=int))
    except (OSError, subprocess.SubprocessError):
        return "all" if os.path.exists("/etc/nv_tegra_release") else ""  # a Jetson may lack nvidia-smi


def find_nvcc():
    """Return the path of nvcc, or None; always None on Windows, where the flags differ."""
    if os.name == "nt":
        return None
    home = os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    return shutil.which("nvcc") or shutil.which(os.path.join(home, "bin", "nvcc"))


def choose_archs(nvcc, requested):
    """Return the compute capabilities to compile for, ascending: the requested ones, else all that this nvcc knows."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    known = [arch for arch in CUDA_ARCHS if f"compute_{arch}" in listed]
    if not requested or requested == "all":
        return known
    chosen = requested.replace(",", ";").split(";")
    unknown = [arch for arch in chosen if f"compute_{arch}" not in listed]
    if unknown:
        raise SystemExit(f"edgefed: EDGEFED_CUDA_ARCHS has {', '.join(unknown)}, this nvcc knows {', '.join(listed)}")
    return sorted(map(int, chosen))


class PlatformWheel(bdist_wheel):
    """The library depends on the platform but on no Python version: tag py3-none-PLATFORM."""

    def get_tag(self):
        return ("py3", "none", super().get_tag()[2])


def packages():
    found = ["edgefed"]
    for folder in sorted(Path("edgefed").rglob("__init__.py")):
        name = ".".join(folder.parent.parts)
        if name != "edgefed":
            found.append(name)
    return [*found, "edgefed.triton_kernels", "edgefed.profiles"]


setup(
    packages=packages(),
    package_dir={
        "edgefed": "edgefed",
        # Top-level folders, but never top-level modules: `triton_kernels` is another project's import name.
        "edgefed.triton_kernels": "triton_kernels",
        "edgefed.profiles": "profiles",
    },
    package_data={
        "edgefed": ["py.typed"],
        "edgefed.aggregator": ["static/*"],
        "edgefed.embedded": ["tiny/*"],
        "edgefed.profiles": ["*.toml"],
    },
    ext_modules=[
        Extension("edgefed._native", sources=SOURCES, optional=True),
        Extension("edgefed._cuda", sources=CUDA_SOURCES, optional=True),
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
