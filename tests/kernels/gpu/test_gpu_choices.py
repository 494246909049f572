"""Which way a product takes: by what was timed, kept on disk, and never one that does not run."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from gpu_models import weight as outlined

from infopt.kernels.gpu import ops
from infopt.kernels.gpu.choices import METHOD, Asked, Choice, Table, bucket, candidates, enough, is_too_large, through
from infopt.kernels.gpu.ops import splits_of
from infopt.kernels.gpu.products import Behind, Feed
from infopt.kernels.gpu.weight import Weight, float8, plain
from infopt.kernels.gpu.weight import integers as packed_integers
from infopt.kernels.packed import rounded


def made(kind: str) -> Weight:
    weight = torch.randn(128, 256)
    if kind == "float8":
        return float8(weight)
    return packed_integers(*rounded(weight, 4, 32), None, 4, 32) if kind == "int4" else plain(weight.bfloat16())


def test_the_fastest_is_kept(tmp_path: Path) -> None:
    asked, path = Asked(made("int4"), 1, torch.bfloat16), tmp_path / "of" / "gpu.json"
    table = Table(path)
    tried: list[Choice] = []

    def race(choices: Sequence[Choice]) -> tuple[dict[Choice, float], dict[Choice, str]]:
        tried.extend(choices)
        slices = {each: "OutOfResources: shared memory" for each in choices if each.way == "slices"}
        rest = [each for each in choices if each not in slices]
        return {each: 1e-6 if each.way == "tiles" else 2e-6 for each in rest}, slices

    assert table.find(asked).way == "slices"  # nothing was timed yet
    table.tune(asked, race)
    assert tried == candidates(asked)
    assert table.find(asked).way == "tiles"
    assert [why for _, why in next(iter(table.failed.values()))] == ["OutOfResources: shared memory"] * 4
    again = Table(path)
    assert again.find(asked) == table.find(asked)
    again.tune(asked, lambda choices: pytest.fail("it is known"))
    for other in ({"dtype": torch.float16}, {"feeds_norm": True}, {"activation": 0}, {"rows": 2}):
        assert again.find(replace(asked, **other)).way == "slices"  # other products
    Table(is_timed=False).tune(asked, lambda choices: pytest.fail("it was not asked for"))


@pytest.mark.parametrize("content", ["", "{", json.dumps({"method": METHOD + 1, "chosen": {}}), json.dumps({"method": METHOD})])
def test_a_broken_or_older_file_is_written_anew(tmp_path: Path, content: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(content)
    assert Table(path).chosen == {}


def test_candidates_are_what_the_kind_and_the_rows_allow() -> None:
    for kind in ("bfloat16", "int4", "float8"):
        for rows in (1, 3, 8, 64, 300):
            found = candidates(Asked(made(kind), rows, torch.bfloat16))
            ways = {choice.way for choice in found}
            assert len(set(found)) == len(found) <= 9
            if kind == "float8" and rows >= 32:
                assert ways == {"scaled"}  # whichever is faster: it is another result
                continue
            assert ("vector" in ways) == (rows == 1 and kind != "int4")
            assert ("slices" in ways) == (rows <= 16)
            assert "scaled" not in ways
            assert "library" in ways
            for choice in found:
                assert choice.ways % choice.warps == 0 or choice.way != "slices"  # or warps would do the same
                assert not choice.block or len(made(kind).data) % choice.block == 0


def test_float8_means_the_same_for_all_rows_that_share_a_choice() -> None:
    for rows in range(17, 33):
        assert candidates(Asked(made("float8"), rows, torch.bfloat16)) == [Choice("scaled")]
    assert candidates(Asked(made("float8"), 16, torch.bfloat16)) != [Choice("scaled")]


def test_the_likeliest_reads_few_activations_and_keeps_a_gpu_busy() -> None:
    def first(rows: int, count: int, inner: int = 4096) -> Choice:
        weight = outlined(rows, inner, "int4", 128)
        return candidates(Asked(weight, count, torch.bfloat16))[0]

    assert first(4096, 1).block == 16  # few programs
    assert first(28672, 8).block == 128  # many: what counts is how often eight rows of x are read
    assert (first(28672, 64).block, first(28672, 64).splits) == (256, 1)
    assert first(4096, 64).splits > 1
    weight = outlined(4096, 4096, "int4", 128)
    read = [through(weight, 8, Choice("slices", block, 8)) / weight.nbytes for block in (16, 64)]
    assert read == pytest.approx(
        [1 + 16 / 8.25, 1 + 16 / 33], rel=1e-3
    )  # bytes of x beside those of 16 or 64 rows of W, an input


def test_rows_stand_for_those_up_to_a_power_of_two() -> None:
    assert [bucket(rows) for rows in (1, 2, 3, 9, 64, 65, 100_000)] == [1, 2, 4, 16, 64, 128, 512]
    weight = made("int4")
    keys = [Asked(weight, rows, torch.bfloat16).key for rows in (9, 16, 17)]
    assert keys[0] == keys[1] != keys[2]


def test_positions_are_split_until_a_gpu_is_busy() -> None:
    assert splits_of(8, 132) == 32
    assert splits_of(64, 132) == 16
    assert splits_of(512, 132) == 2
    assert splits_of(1024, 132) == 1


def test_what_a_gpu_lacks_is_told_from_a_mistake() -> None:
    for text in ("OutOfResources: shared memory", "CUBLAS_STATUS_NOT_SUPPORTED", "CUDA out of memory"):
        assert is_too_large(RuntimeError(text))
    assert not is_too_large(RuntimeError("an illegal memory access was encountered"))


def test_weights_to_go_round_are_more_than_a_cache_holds() -> None:
    weights = [made("bfloat16")] * 40
    assert len(enough(weights, 10 * weights[0].nbytes)) == 21
    assert len(enough(weights[:2], 10**9)) == 2
    assert len(enough(weights, 0)) == 3


def test_a_way_that_has_no_room_here_gives_place_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller GPUs have less shared memory than what is timed on a large one takes."""
    weight, feed, table = made("int4"), Feed(torch.randn(20, 256)), Table(is_timed=False)
    tried: list[Choice] = []

    def multiply(choice: Choice, feed: Feed, weight: Weight, behind: Behind) -> tuple[torch.Tensor, Feed]:
        tried.append(choice)
        if len(tried) < 2:
            raise RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376")
        return feed.x, feed

    monkeypatch.setattr(ops, "multiply", multiply)
    product = ops.kernels(table, 8).product
    product(feed, weight)
    product(feed, weight)
    assert len(tried) == 3
    assert tried[0] != tried[1] == tried[2]
    assert "Hardware limit" in next(iter(table.failed.values()))[0][1]
    assert not table.chosen  # nothing was timed: it is not kept on disk

    def broken(*given: object) -> tuple[torch.Tensor, Feed]:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(ops, "multiply", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        product(feed, weight)

    def full(*given: object) -> tuple[torch.Tensor, Feed]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ops, "multiply", full)
    with pytest.raises(torch.OutOfMemoryError):  # of a long prompt; another way would have no more room
        product(feed, weight)
