"""Builds the compiled kernels where there is a compiler. Without one, or without some instruction set, the package
installs all the same: what was not built, and why, is written beside the package for `moe-serve doctor`.
"""

from __future__ import annotations

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

HERE = Path("kernels/moe_kernels")
PATHS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"],
}
"""Flags of each source in native/; those of another processor's kind of instructions are left out."""
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fvisibility=hidden"]


class BuildKernels(build_ext):
    """Each path with flags of its own, as far as the compiler knows them."""

    def build_extension(self, ext: Extension) -> None:
        report = HERE / "native" / "build.txt"
        try:
            ext.extra_objects = [*ext.extra_objects, *self._objects(ext)]
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            report.write_text(f"{error}\n", encoding="utf-8")
            self.warn(f"no compiled kernels: {error}")
            return
        report.unlink(missing_ok=True)

    def _objects(self, ext: Extension) -> list[str]:
        objects: list[str] = []
        for path, flags in PATHS.items():
            source = str(HERE / "native" / f"{path}.cpp")
            try:
                objects += self.compiler.compile(
                    [source], output_dir=self.build_temp, extra_postargs=[*FLAGS, *flags], depends=ext.depends
                )
            except CompileError:
                if path == "generic":
                    raise
                continue
            ext.define_macros.append((f"MOE_HAS_{path.upper()}", "1"))
        return objects


kernels = Extension(
    "moe_kernels.native._native",
    [str(HERE / "native" / "module.cpp")],
    depends=[str(path) for pattern in ("*/*.inl", "*/*.hpp") for path in HERE.glob(pattern)],
    extra_compile_args=FLAGS,
    extra_link_args=["-fopenmp"],
    py_limited_api=True,
    optional=True,
)

setup(
    ext_modules=[kernels],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
