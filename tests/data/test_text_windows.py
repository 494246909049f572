"""Windows and reading of plain text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infopt.data.texts import read_text, text_path, windows
from infopt.errors import InputError


@given(st.lists(st.integers(0, 50), min_size=2, max_size=200), st.integers(2, 30), st.none() | st.integers(1, 8))
def test_windows_are_the_text_cut_up(ids: list[int], length: int, limit: int | None) -> None:
    if len(ids) < length:
        with pytest.raises(InputError, match=f"{len(ids)} tokens"):
            windows(ids, length, limit)
        return
    found = windows(ids, length, limit)
    assert all(len(window) == length for window in found)
    assert [token for window in found for token in window] == ids[: len(found) * length]
    assert len(found) == min(len(ids) // length, limit or len(ids))


def test_seed_chooses_windows_in_text_order() -> None:
    found = windows(range(1000), 10, 7, seed=3)
    assert found == windows(range(1000), 10, 7, seed=3)
    assert found != windows(range(1000), 10, 7, seed=4)
    starts = [window[0] for window in found]
    assert starts == sorted(set(starts))
    assert all(window == tuple(range(window[0], window[0] + 10)) for window in found)


@pytest.mark.parametrize(("length", "limit"), [(1, None), (0, 1), (4, 0)])
def test_impossible_windows_are_refused(length: int, limit: int | None) -> None:
    with pytest.raises(InputError):
        windows(range(100), length, limit)


def test_a_users_text_is_read_from_its_path(tmp_path: Path) -> None:
    path = tmp_path / "own.txt"
    path.write_bytes("\ufeffNaïve text.\n".encode())
    assert read_text(str(path), "evaluation") == "Naïve text.\n"
    assert text_path("bundled", "calibration").name == "calibration.txt"


def test_bad_texts_are_refused(tmp_path: Path) -> None:
    blank, binary = tmp_path / "blank.txt", tmp_path / "binary.txt"
    blank.write_text(" \n\n")
    binary.write_bytes(b"ab\xff\xfe")
    for path, message in (
        (blank, "empty"),
        (binary, r"not UTF-8 text \(byte 2\)"),
        (tmp_path / "no", "no such file"),
        (tmp_path, "read"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            read_text(str(path), "calibration")
        assert caught.value.hint
