"""`optimize` on a tiny model: the artifact is complete and true, or there is none."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from stub_techniques import chosen, register

from infopt import arms, forecast, optimize, pipeline, recipe, techniques
from infopt.arms import ArmSpec
from infopt.artifact import Artifact, is_artifact, read_artifact
from infopt.errors import DiskFullError, Exit, InfoptError, InputError, LoadBackError, MissingNeedError, RecipeError
from infopt.model import load, save
from infopt.model.bundle import Bundle
from infopt.needs import Needs
from infopt.protocols import Context
from infopt.settings import LoadOptions
from infopt.techniques.base import Technique

CPU = LoadOptions(device="cpu")


@pytest.fixture
def add_technique(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Technique]], None]:
    return lambda technique: register(technique, monkeypatch)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact, list[str]]:
    """One rtn artifact for everything that only looks."""
    out = tmp_path_factory.mktemp("optimize") / "new" / "tiny-rtn"
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INFOPT_CACHE", str(out.parent.parent / "cache"))
        document = optimize.optimize("tiny", chosen({"rtn": {"group_size": 32}}), out, replace(CPU, seed=7), lines.append)
    return out, document, lines


def nothing_left(folder: Path) -> bool:
    return not folder.exists() or list(folder.iterdir()) == []


# --- The artifact ----------------------------------------------------------------------------------------------------


def test_the_artifact_is_complete(made: tuple[Path, Artifact, list[str]]) -> None:
    out, document, lines = made
    assert is_artifact(out)
    assert read_artifact(out) == document
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "infopt.json", "recipe.yaml", "README.md"}
    assert [path.name for path in out.parent.iterdir()] == ["tiny-rtn"], "no temporary folder beside it"
    assert recipe.load(str(out / "recipe.yaml"), techniques.find).as_dict() == document.recipe
    assert any(line.startswith("applying rtn") for line in lines)
    assert lines[-2:] != lines[:2]


def test_provenance_says_how_it_came_to_be(made: tuple[Path, Artifact, list[str]]) -> None:
    _, document, _ = made
    assert (document.reference, document.seed, document.revision) == ("tiny", 7, None)
    assert document.reference_description == "tiny, random weights, seed 0"
    assert len(document.reference_hash) == 64
    assert len(str(document.content_hash)) == 64
    (step,) = document.steps
    assert (step.name, step.is_at_load, document.at_load) == ("rtn", False, ())
    assert step.options["group_size"] == 32
    assert step.seconds > 0
    assert (step.peak_bytes or 0) > 1_000_000
    assert document.versions["torch"] == torch.__version__.partition("+")[0] or document.versions["torch"] == torch.__version__
    assert document.calibration_hash is None


def test_bytes_are_those_of_the_files(made: tuple[Path, Artifact, list[str]]) -> None:
    out, document, _ = made
    header = 8 + int.from_bytes((out / "model.safetensors").read_bytes()[:8], "little")
    assert document.bytes_after == (out / "model.safetensors").stat().st_size - header
    assert document.bytes_after < 0.6 * document.bytes_before


def test_it_was_loaded_back_and_loads_again(made: tuple[Path, Artifact, list[str]]) -> None:
    out, document, _ = made
    plain = document.load_back[0]
    assert (plain.tokens, plain.max_abs_logit_difference <= plain.tolerance) == (pipeline.PROBE_TOKENS, True)
    spec = arms.spec(str(out), None, ["engine.name=transformers"])
    opened = pipeline.open_arm(spec, "cpu", CPU)
    assert opened.description == "tiny, random weights, seed 0, optimized by own"
    assert opened.steps == ("rtn",)
    reference = pipeline.open_arm(arms.spec("tiny", "baseline"), "cpu", CPU)
    ids = optimize.probe_ids(reference)
    change = (optimize.probe(opened, ids) - optimize.probe(reference, ids)).abs().max()
    assert 1e-4 < change < 10, "4 bits change the model, and do not ruin it"


def test_the_card_tells_what_was_checked(made: tuple[Path, Artifact, list[str]]) -> None:
    out, document, _ = made
    card = (out / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "# tiny, random weights, seed 0, optimized by `own`" in card
    assert "steps: rtn" in card
    assert card.count("- loaded back by ") == len(document.load_back)
    assert "no file format" not in card


def test_a_step_without_a_file_format_is_repeated_at_load(tmp_path: Path) -> None:
    document = optimize.optimize("tiny", chosen("int8_naive"), tmp_path / "out", CPU)
    assert document.at_load == (0,)
    assert document.steps[0].seconds > 0
    assert document.bytes_after == document.bytes_before, "the weights are those from before the step"
    assert len(document.load_back) == 2
    assert "**`int8_naive` has no file format**" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    opened = pipeline.open_arm(arms.spec(str(tmp_path / "out"), None), "cpu", CPU)
    assert any("dynamic" in type(module).__module__ for module in opened.model.modules())
    plain = load.load(pipeline.resolve(str(tmp_path / "out"), CPU))
    assert not any("dynamic" in type(module).__module__ for module in plain.model.modules())


def test_a_dtype_alone_is_stored(tmp_path: Path) -> None:
    document = optimize.optimize("tiny", chosen(engine={"dtype": "bfloat16"}), tmp_path / "out", CPU)
    assert document.bytes_after * 2 == document.bytes_before
    assert document.steps == ()
    opened = pipeline.open_arm(arms.spec(str(tmp_path / "out"), None), "cpu", CPU)
    assert opened.model.dtype is torch.bfloat16


def test_an_arms_engine_section_holds_for_an_artifact_too(made: tuple[Path, Artifact, list[str]]) -> None:
    out, _, _ = made
    spec = arms.spec(str(out), None, ["engine.attention=eager"], "bfloat16")
    opened = pipeline.open_arm(spec, "cpu", CPU)
    assert opened.model.config._attn_implementation == "eager"
    assert opened.model.dtype is torch.bfloat16
    again = pipeline.open_arm(arms.spec(str(out), None), "cpu", CPU)
    assert again.model.config._attn_implementation == "sdpa"
    assert again.model.dtype is torch.float32


# --- Refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight is a failure."""

    def read(*arguments: Any, **named: Any) -> Any:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(load, "load", read)


def test_an_existing_folder_is_refused_before_anything_is_read(tmp_path: Path, no_weights: None) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious", encoding="utf-8")
    with pytest.raises(InputError, match="exists and is not empty"):
        optimize.optimize("tiny", chosen("rtn"), tmp_path / "out", CPU)
    assert (tmp_path / "out" / "mine").read_text(encoding="utf-8") == "precious"


def test_an_artifact_is_not_optimized_again(made: tuple[Path, Artifact, list[str]], tmp_path: Path, no_weights: None) -> None:
    with pytest.raises(InputError, match="is already optimized") as caught:
        optimize.optimize(str(made[0]), chosen("rtn"), tmp_path / "out", CPU)
    assert caught.value.hint == "infopt optimize tiny …"
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        (["int8_naive", "rtn"], RecipeError, r"^steps\[1\]\.rtn: follows int8_naive, which no file format can hold"),
        ([{"rtn": {"group_size": 100}}], RecipeError, r"^steps\[0\]\.rtn\.group_size: .*100"),
        ([{"rtn": {"ignore": ["no_such_layer"]}}], RecipeError, r"^steps\[0\]\.rtn\.ignore"),
    ],
)
def test_impossible_recipes_are_refused_before_a_weight_is_read(
    steps: list[Any], error: type[Exception], message: str, tmp_path: Path, no_weights: None
) -> None:
    with pytest.raises(error, match=message):
        optimize.optimize("tiny", chosen(*steps), tmp_path / "out", CPU)
    with pytest.raises(error, match=message):
        optimize.ensure(ArmSpec("own", "tiny", chosen(*steps)), CPU)
    assert nothing_left(tmp_path)


def test_what_the_machine_lacks_is_refused_before_a_weight_is_read(
    tmp_path: Path, no_weights: None, add_technique: Callable[[type[Technique]], None]
) -> None:
    class Fancy(Technique):
        needs = Needs(modules=("no_such_library",))

    add_technique(Fancy)
    with pytest.raises(MissingNeedError, match=r"^steps\[0\]\.fancy: needs the package no-such-library") as caught:
        optimize.optimize("tiny", chosen("fancy"), tmp_path / "out", CPU)
    assert caught.value.exit_code is Exit.USAGE
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"), [({"device": "tpu"}, "device 'tpu'"), ({"device": "cuda"}, "sees no CUDA device")]
)
def test_devices_that_are_not_there(tmp_path: Path, no_weights: None, options: dict[str, Any], message: str) -> None:
    if options["device"] == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(InputError, match=message):
        optimize.optimize("tiny", chosen("rtn"), tmp_path / "out", LoadOptions(**options))


# --- Failures leave nothing ------------------------------------------------------------------------------------------


class Liar(Technique):
    """Changes what the model answers in a way that no file can hold, and does not say so."""

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        bundle.model.lm_head.register_forward_hook(lambda module, args, output: output + 1)
        return bundle


class Breaker(Technique):
    """Makes the model answer NaN."""

    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        bundle.model.lm_head.weight.data.fill_(float("nan"))
        return bundle


class Interrupted(Technique):
    def apply(self, bundle: Bundle, context: Context) -> Bundle:
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("technique", "error", "message"),
    [
        (Liar, LoadBackError, r"gives logits up to 1\.00 away .*allowed: 0"),
        (Breaker, InfoptError, "the model that was made gives logits that are not finite"),
    ],
)
def test_a_model_that_does_not_reload_as_it_was_made_is_not_published(
    tmp_path: Path,
    technique: type[Technique],
    error: type[InfoptError],
    message: str,
    add_technique: Callable[[type[Technique]], None],
) -> None:
    add_technique(technique)
    with pytest.raises(error, match=message) as caught:
        optimize.optimize("tiny", chosen(technique.__name__.lower()), tmp_path / "out", CPU)
    assert caught.value.exit_code is Exit.FAILED
    assert nothing_left(tmp_path)


def test_a_broken_arm_leaves_nothing_in_the_cache(
    add_technique: Callable[[type[Technique]], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add_technique(Liar)
    monkeypatch.setenv("INFOPT_CACHE", str(tmp_path))
    with pytest.raises(LoadBackError):
        optimize.ensure(ArmSpec("own", "tiny", chosen("liar")), CPU)
    assert [path.name for path in (tmp_path / "artifacts").iterdir() if not path.name.endswith(".lock")] == []


def test_an_interrupt_in_a_step_leaves_nothing(tmp_path: Path, add_technique: Callable[[type[Technique]], None]) -> None:
    add_technique(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimize.optimize("tiny", chosen("interrupted"), tmp_path / "out", CPU)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize("line", ["saving", "loading back"])
def test_an_interrupt_after_the_steps_leaves_nothing(tmp_path: Path, line: str) -> None:
    def progress(found: str) -> None:
        if found == line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimize.optimize("tiny", chosen("rtn"), tmp_path / "out", CPU, progress)
    assert nothing_left(tmp_path)


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EIO, InfoptError)]
)
def test_a_disk_that_runs_full_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[InfoptError]
) -> None:
    def write(self: Path, *arguments: Any, **named: Any) -> int:
        if self.name == "infopt.json":
            raise OSError(number, "no more")
        return original(self, *arguments, **named)

    original = Path.write_text
    monkeypatch.setattr(Path, "write_text", write)
    with pytest.raises(kind) as caught:
        optimize.optimize("tiny", chosen("rtn"), tmp_path / "out", CPU)
    assert type(caught.value) is kind
    assert caught.value.exit_code is Exit.FAILED
    assert nothing_left(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("is_told", [True, False])
def test_a_real_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool) -> None:
    """Told by the free space beforehand, or met while writing."""
    if not is_told:
        monkeypatch.setattr("infopt.model.atomic.free_bytes", lambda path: 10**12)
        (small_disk / "ballast").write_bytes(bytes(900_000))
    before = sorted(small_disk.iterdir())
    with pytest.raises(DiskFullError, match="no space left") as caught:
        optimize.optimize("tiny", chosen({"rtn": {"group_size": 32}}), small_disk / "out", CPU)
    assert caught.value.exit_code is Exit.FAILED
    assert sorted(small_disk.iterdir()) == before


# --- Dry run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def only_tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A forecast may open the tiny model to learn what opening costs, and no other."""
    original = load.load

    def read(reference: Any, *arguments: Any, **named: Any) -> Any:
        assert reference.text == "tiny", "a weight was read"
        return original(reference, *arguments, **named)

    monkeypatch.setattr(load, "load", read)


def test_a_forecast_reads_no_weight_and_leaves_nothing(tmp_path: Path, tiny_folder: Path, only_tiny: None) -> None:
    found = forecast.forecast(str(tiny_folder), chosen({"rtn": {"group_size": 32}}), tmp_path / "deep" / "out", CPU)
    assert nothing_left(tmp_path)
    names = [name for name, _ in found.steps]
    assert names[0].startswith("load")
    assert "rtn" in names
    assert found.seconds is not None
    assert found.peak_bytes >= found.stored_bytes
    assert found.free_disk_bytes > found.disk_bytes > 0


def test_a_forecast_refuses_what_optimize_refuses(tmp_path: Path, tiny_folder: Path, only_tiny: None) -> None:
    for steps in (["int8_naive", "rtn"], [{"rtn": {"group_size": 100}}]):
        with pytest.raises(RecipeError):
            forecast.forecast(str(tiny_folder), chosen(*steps), tmp_path / "out", CPU)
    with pytest.raises(InputError):
        forecast.forecast(str(tmp_path / "gone"), chosen("rtn"), tmp_path / "out", CPU)


def test_the_forecast_of_stored_bytes_is_close(made: tuple[Path, Artifact, list[str]], tmp_path: Path) -> None:
    found = forecast.forecast("tiny", chosen({"rtn": {"group_size": 32}}), tmp_path / "out", CPU)
    assert found.stored_bytes == made[1].bytes_before
    weights = dict(found.steps)["rtn"].weights_bytes
    assert weights == pytest.approx(made[1].bytes_after, rel=0.05)


def test_saving_over_a_folder_that_appeared_meanwhile_is_refused(tmp_path: Path) -> None:
    def progress(line: str) -> None:
        if line == "loading back":
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "theirs").write_text("", encoding="utf-8")

    with pytest.raises(InfoptError, match="out"):
        optimize.optimize("tiny", chosen({"rtn": {"group_size": 32}}), tmp_path / "out", CPU, progress)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["theirs"]
    with pytest.raises(InputError):
        save.require_free_target(tmp_path / "out")
