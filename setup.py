"""Builds the engine's native library, where a C++ compiler is found; everything else stands in pyproject.toml.

The library is plain C to Python (loaded with ctypes), so one build serves every Python. No compiler, or one that fails,
leaves it out: the engine then runs through ONNX Runtime, and ``sparing doctor`` says why.
"""

from __future__ import annotations

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError

NATIVE = Path("src/sparing/engine/native")
COMMON = "-std=c++17 -O3 -fPIC -fvisibility=hidden -ffp-contract=off -fno-exceptions -fno-rtti -fno-threadsafe-statics"
COMMON += " -Wno-maybe-uninitialized"  # GCC 12 warns of its own AVX-512 headers
VNNI = "-mavx2 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512"
PATHS = {
    "avx2": "-mavx2",
    "vnni": VNNI,
    "amx": f"{VNNI} -mavx512vbmi2 -mpopcnt -mamx-tile -mamx-int8",
}
"""Instruction path → what only its own object file is compiled with; the choice is made when the engine runs."""


class BuildNative(build_ext):
    """Each instruction path with flags of its own; a path the compiler does not know is left out."""

    def get_ext_filename(self, fullname: str) -> str:
        """No Python's version in the name, since the library knows nothing of Python."""
        return f"{fullname.replace('.', '/')}.so"

    def build_extension(self, ext: Extension) -> None:
        """Compile each path by itself, then link them."""
        common, scratch = COMMON.split(), self.build_temp
        objects, found = [], []
        if platform.machine().lower() in ("x86_64", "amd64"):
            for name, flags in PATHS.items():
                try:
                    objects += self.compiler.compile(
                        [str(NATIVE / f"path_{name}.cpp")], scratch, extra_postargs=common + flags.split()
                    )
                    found.append((f"SPARING_HAS_{name.upper()}", "1"))
                except (BaseError, OSError) as error:
                    self.warn(f"the engine is built without its {name} path: {error}")
        sources = [str(NATIVE / name) for name in ("path_portable.cpp", "entry.cpp")]
        objects += self.compiler.compile(sources, scratch, macros=found, extra_postargs=common)
        target = self.get_ext_fullpath(ext.name)
        self.compiler.link_shared_object(objects, target, target_lang="c++")


class AnyPython(bdist_wheel):
    """The wheel depends on the machine, not on the version of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return ("py3", "none", super().get_tag()[2])


library = Extension(
    "sparing.engine._native",
    [],
    depends=[str(path) for pattern in ("*.cpp", "*.h") for path in sorted(NATIVE.glob(pattern))],
    optional=True,
)
setup(ext_modules=[library], cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython})
