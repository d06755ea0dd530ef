"""Compiles the loops of `weights/loops.c` when fedgraft is installed or packed.

The compiler comes from PyPI (`ziglang`, Clang in a wheel), so that nothing but Python has to be
there, and everybody has the same one.
"""

import os
import platform
import subprocess
import sys
import sysconfig
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCE = "src/fedgraft/weights/loops.c"
BUILT = "src/fedgraft/weights/loops.so"
LEVEL = "x86_64_v2" if platform.machine().lower() in ("x86_64", "amd64") else "baseline"
"""What processors it runs on: those that numpy's own wheels run on."""


class Compile(BuildHookInterface):  # type: ignore[type-arg]
    """Builds one shared library, called through ctypes: any Python 3 loads it."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:  # noqa: ARG002
        compiler = [sys.executable, "-m", "ziglang", "cc", f"-mcpu={LEVEL}", "-O3", "-std=c11"]
        strict = ["-ffp-contract=off", "-Wall", "-Wno-psabi", "-Werror"]
        with TemporaryDirectory() as cache:
            subprocess.run(
                [*compiler, *strict, "-shared", "-fPIC", "-s", "-o", BUILT, SOURCE],
                cwd=self.root,
                env={**os.environ, "ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache},
                check=True,
            )
        build_data["artifacts"].append(BUILT)
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(
            ".", "_"
        )
