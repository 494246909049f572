"""Only wheels with kernel libraries in them need this file: `make wheel` sets INFOPT_WHEEL to a kind of processor.

Their libraries need nothing but glibc, and the wheel's tag names the version. Without INFOPT_WHEEL nothing is compiled, here
or when a source distribution is installed: infopt builds its library where it is first used.
"""

import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KIND = os.environ.get("INFOPT_WHEEL", "")
LINK = ("-static-libstdc++", "-static-libgcc", "-Wl,--gc-sections", "-s")
EXPORTS = "{ global: infopt_*; local: *; };"


class Platform(Distribution):
    def has_ext_modules(self) -> bool:
        return True


class WithLibraries(build_py):
    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)  # a wheel takes all that lies there, another run's files too
        super().run()
        sys.path.insert(0, str(Path(__file__).parent))
        from infopt.kernels import build

        folder = Path(self.build_lib) / "infopt" / "kernels" / "prebuilt"
        folder.mkdir()
        exports = Path(self.build_lib).parent / "exports.map"
        exports.write_text(EXPORTS, encoding="ascii")
        compiler = None if build.machine() == KIND else f"{KIND}-linux-gnu-g++"
        for isa in build.sets(KIND):
            target = folder / build.file_name(isa, KIND)
            build.build(isa, target, KIND, compiler, (*LINK, f"-Wl,--version-script={exports}"))


class Manylinux(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        libraries = Path(self.bdist_dir).rglob("infopt-*.so")
        needed = {(int(a), int(b)) for path in libraries for a, b in re.findall(rb"GLIBC_(\d+)\.(\d+)", path.read_bytes())}
        return "py3", "none", "manylinux_{}_{}_{}".format(*max(needed), KIND)


if KIND:
    setup(
        distclass=Platform,
        cmdclass={"build_py": WithLibraries, "bdist_wheel": Manylinux},
        options={"build": {"build_base": f"build/wheel-{KIND}"}},
    )
else:
    setup()
