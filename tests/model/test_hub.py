"""Hub errors, made by standing in for huggingface_hub's download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from infopt.errors import InfoptError, InputError
from infopt.model import hub, load, reference, shapes


def _error(kind: type[Exception]) -> Exception:
    """An instance whatever the constructor wants: the versions differ."""
    error = kind.__new__(kind)
    Exception.__init__(error, "first line\nsecond line")
    return error


@pytest.mark.parametrize(
    ("kind", "message", "hint"),
    [
        (errors.GatedRepoError, "a gated model", "hf auth login"),
        (errors.RevisionNotFoundError, "no revision 'v9'", "branch, tag or commit"),
        (errors.RepositoryNotFoundError, "neither a folder here nor a model on the hub", "check the name"),
        (errors.LocalEntryNotFoundError, "cannot be reached", "HF_HUB_OFFLINE"),
        (errors.OfflineModeIsEnabled, "cannot be reached", "HF_HUB_OFFLINE"),
        (errors.HFValidationError, "not a hub id: first line", "owner/name"),
        (ConnectionResetError, "download failed: first line$", "network"),
    ],
)
def test_each_failure_is_one_line(monkeypatch: pytest.MonkeyPatch, kind: type[Exception], message: str, hint: str) -> None:
    def fail(*arguments: Any, **named: Any) -> str:
        raise _error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(InfoptError, match=message) as caught:
        hub.snapshot("org/name", "v9")
    assert hint in str(caught.value.hint)
    assert "\n" not in str(caught.value)


def test_a_hub_model_loads_from_its_snapshot(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    asked: list[dict[str, Any]] = []

    def download(name: str, **named: Any) -> str:
        asked.append({"name": name, **named})
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    ref = reference.parse("org/name", revision="v1")
    assert shapes.shapes(ref).layers == 2
    assert all("*.safetensors" not in call["allow_patterns"] for call in asked), "shapes need no weights"
    assert shapes.stored_bytes(ref) == shapes.stored_bytes(tiny_folder)
    bundle = load.load(ref)
    assert bundle.description == "org/name at v1"
    assert {(call["name"], call["revision"]) for call in asked} == {("org/name", "v1")}
    assert not any("*.bin" in call["allow_patterns"] or "*.py" in call["allow_patterns"] for call in asked)
    assert reference.fingerprint(ref) == reference.content_hash(tiny_folder)


def test_stored_bytes_of_a_hub_model_not_here_come_from_its_shapes(monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> None:
    def download(name: str, *, local_files_only: bool, **named: Any) -> str:
        if local_files_only:
            raise _error(errors.LocalEntryNotFoundError)
        return str(tiny_folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert shapes.stored_bytes(reference.parse("org/name")) == shapes.stored_bytes(tiny_folder)


def test_other_architectures_are_refused_before_their_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": true}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *arguments, **named: str(tmp_path))
    with pytest.raises(InputError, match="org/name: WhisperForConditionalGeneration is an encoder–decoder model"):
        load.load(reference.parse("org/name"))
