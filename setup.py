"""Builds the compiled kernels where there is a compiler. Without one, or without some instruction set, the package
installs all the same: what the compiler said lies in the package, for the warning at start and `moe-serve doctor`.
"""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, CompileError

HERE = Path("kernels/moe_kernels")
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
PATHS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma"],
    "avx512": AVX512,
    "avx512_bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
"""Flags of each source in native/. A path whose flags the compiler does not know is left out."""
FLAGS = ["-std=c++17", "-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wno-maybe-uninitialized"]


class BuildKernels(build_ext):
    """Each path with flags of its own, all at once."""

    def build_extension(self, ext: Extension) -> None:
        report = Path(self.get_ext_fullpath(ext.name)).with_name("build.txt")
        report.unlink(missing_ok=True)
        self.compiler.spawn = self.compiler.call = _call  # the name before and since setuptools 84
        try:
            with ThreadPoolExecutor(len(PATHS)) as compilers:
                built = dict(zip(PATHS, compilers.map(lambda path: self._objects(ext, path), PATHS), strict=True))
            ext.define_macros += [(f"MOE_HAS_{path.upper()}", "1") for path, objects in built.items() if objects]
            ext.extra_objects = [*ext.extra_objects, *(each for objects in built.values() for each in objects)]
            super().build_extension(ext)
        except (BaseError, CCompilerError, OSError) as error:
            report.parent.mkdir(parents=True, exist_ok=True)
            report.write_text(f"{error}\n", encoding="utf-8")
            self.warn(f"no compiled kernels: {error}")

    def _objects(self, ext: Extension, path: str) -> list[str]:
        source = str(HERE / "native" / f"{path}.cpp")
        try:
            objects: list[str] = self.compiler.compile(
                [source], output_dir=self.build_temp, extra_postargs=[*FLAGS, *PATHS[path]], depends=ext.depends
            )
        except CompileError:
            if path == "generic":
                raise
            return []
        return objects


def _call(command: list[str], **_: object) -> None:
    """Run the compiler; what it says last is what it is remembered by if it fails."""
    try:
        ran = subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")
    except OSError as error:
        raise CompileError(f"{command[0]}: {error.strerror}") from error
    sys.stderr.write(ran.stderr)
    if ran.returncode:
        last = ran.stderr.strip().rpartition("\n")[2]
        raise CompileError(last or f"{command[0]} failed with exit code {ran.returncode}")


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
