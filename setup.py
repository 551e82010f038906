"""Builds edgefed, and its native part where a C++ compiler is there.

The native part is one shared library with a plain C interface and no link to Python or torch, so one wheel serves
every Python and every torch of a platform. Without a compiler the package is complete but slower, and says so.

    EDGEFED_NATIVE=0   do not build it
    EDGEFED_NATIVE=1   fail when it cannot be built
"""

import os
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = sorted(str(path) for path in Path("csrc").glob("*.cpp"))
# No contraction into fused multiply-add: the numpy fallback must give the same bits.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-shared"]


class BuildNative(build_ext):
    """Compile csrc/*.cpp into edgefed/_native.so with the first C++ compiler that works."""

    def get_ext_filename(self, fullname):
        return os.path.join(*fullname.split(".")) + (".dll" if os.name == "nt" else ".so")

    def build_extension(self, ext):
        wish = os.environ.get("EDGEFED_NATIVE", "auto")
        if wish == "0":
            print("edgefed: native part left out (EDGEFED_NATIVE=0)")
            return
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
        try:
            if compiler is None:
                raise OSError("no C++ compiler (g++, c++, clang++) was found")
            subprocess.check_call([*compiler.split(), *FLAGS, *ext.sources, "-o", str(target)])
        except (OSError, subprocess.CalledProcessError) as fault:
            if wish == "1":
                raise SystemExit(
                    f"edgefed: EDGEFED_NATIVE=1, but the native part could not be built: {fault}"
                ) from fault
            self.warn(f"native part not built ({fault}); edgefed works without it, aggregation is slower")

    def get_outputs(self):
        return [path for path in super().get_outputs() if os.path.exists(path)]


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
    package_data={"edgefed.embedded": ["tiny/*"], "edgefed.profiles": ["*.toml"]},
    ext_modules=[Extension("edgefed._native", sources=SOURCES)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
