"""Calibration text from every kind of source: what is drawn, hashed and packed, and what is refused before a model is read."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from infopt.data import calibration
from infopt.data.calibration import Source, parse_hub, read, windows
from infopt.data.overlap import Fingerprint, Piece, Words, shares
from infopt.data.texts import content_hash, read_text
from infopt.errors import InputError, MissingNeedError
from infopt.sections import Calibration

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def section(text: Any, samples: int = 2, tokens: int = 16, seed: int = 0) -> Calibration:
    return Calibration(text=str(text), samples=samples, tokens=tokens, seed=seed)


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


def chat(user: str, assistant: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]}


def texts_of(source: Source) -> list[str]:
    return [document.text for document in source.documents]


def test_bundled_and_plain_text_are_one_document(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    bundled = read(Calibration())
    assert texts_of(bundled) == [read_text("bundled", "calibration")]
    assert bundled.hash == content_hash(read_text("bundled", "calibration"))
    source = read(section(write(tmp_path / "a.txt", "x" * 200)))
    found = windows(source, section("a", samples=5, tokens=16), byte_tokenizer)
    assert [len(ids) for ids in found] == [16] * 5
    assert byte_tokenizer.eos_token_id not in found[-1]


def test_the_bundled_text_fills_the_default_windows_with_any_tokenizer() -> None:
    """At 8 characters a token, which no tokenizer reaches on English."""
    default = Calibration()
    assert len(read_text("bundled", "calibration")) >= default.samples * default.tokens * 8


def test_rows_are_packed_with_end_of_text_between(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": f"row {number} {'x' * number}", "meta": 1} for number in range(10)))
    found = read(section(path, samples=3, tokens=16))
    (first, second, third) = windows(found, section(path, samples=3, tokens=16), byte_tokenizer)
    joined = byte_tokenizer.decode([*first, *second, *third])
    assert joined == "".join(f"{text}</s>" for text in texts_of(found))[: len(joined)]


def test_the_seed_chooses_the_rows_and_nothing_else_does(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", *({"text": f"row number {number} " * 8} for number in range(200)))
    drawn = {seed: read(section(path, seed=seed)) for seed in (0, 0, 1)}
    assert drawn[0] == read(section(path, seed=0))
    assert texts_of(drawn[0]) != texts_of(drawn[1])
    assert drawn[0].hash == drawn[1].hash == content_hash(path.read_text(encoding="utf-8")), "of the whole file"
    assert len(drawn[0].documents) < 10, "no more than the windows can need"
    assert windows(drawn[0], section(path), byte_tokenizer) == windows(drawn[0], section(path), byte_tokenizer)


def test_chats_go_through_the_chat_template(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    byte_tokenizer.chat_template = TEMPLATE
    path = write(tmp_path / "a.jsonl", chat("Hello", "Hi."), {"prompt": "How?", "response": "So."})
    found = windows(read(section(path, samples=3)), section(path, samples=3), byte_tokenizer)
    text = "".join(byte_tokenizer.decode(ids) for ids in found)
    one, other = "<user>Hello<assistant>Hi.", "<user>How?<assistant>So."
    assert text in ((one + other)[:48], (other + one)[:48])


def test_chats_without_a_chat_template_are_refused(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    path = write(tmp_path / "a.jsonl", chat("Hello", "Hi."))
    with pytest.raises(InputError, match=r"a\.jsonl:1: messages need a chat template") as caught:
        windows(read(section(path)), section(path), byte_tokenizer)
    assert caught.value.hint


def test_the_fingerprint_holds_what_chats_say(tmp_path: Path) -> None:
    words = [f"word{number}" for number in range(40)]
    path = write(tmp_path / "a.jsonl", {"messages": [
        {"role": "system", "content": " ".join(f"s{word}" for word in words)},
        {"role": "user", "content": " ".join(words[:20])}, {"role": "assistant", "content": " ".join(words[20:])}]})  # fmt: skip
    known = Fingerprint.whole(read(section(path)).words())

    def leaks(text: str) -> bool:
        return bool(shares(Words.of([Piece(0, 0, text)]), known))

    assert leaks(" ".join(words[3:17]))
    assert leaks(" ".join(words[21:36]))
    assert leaks(" ".join(words[10:25])), "from the question to its answer"
    assert not leaks(" ".join(f"s{word}" for word in words)), "a system message is no content"


@pytest.mark.parametrize("name", ["a.JSONL", "a.ndjson"])
def test_rows_are_read_from_files_of_other_names(tmp_path: Path, name: str) -> None:
    assert texts_of(read(section(write(tmp_path / name, {"text": "one"})))) == ["one"]


def test_a_long_text_is_drawn_from_all_over_it(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast) -> None:
    whole = "".join(f"{number:7d}." for number in range(10_000))
    path = write(tmp_path / "a.txt", whole)
    source = read(section(path, samples=20))
    (text,) = texts_of(source)
    spans = text.split("\n")
    assert [len(span) for span in spans] == [16 * 16] * 20
    assert all(whole.index(span) % (16 * 16) == 0 for span in spans)
    assert whole.index(spans[0]) < 20_000 < 60_000 < whole.index(spans[-1])
    assert texts_of(read(section(path, samples=20))) == [text] != texts_of(read(section(path, samples=20, seed=1)))
    assert source.hash == content_hash(f"{whole}\n"), "of the whole file"
    assert len(windows(source, section(path, samples=20), byte_tokenizer)) == 20
    assert texts_of(read(section(path, samples=400))) == [f"{whole}\n"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.txt", b" \n", "a.txt: the file is empty"),
        ("a.txt", b"\x89PNG\r\n\xff", r"a.txt: not UTF-8 text \(byte 0\)"),
        ("a.txt", b"abc\0def", "a.txt: a binary file"),
        ("a.jsonl", b"\n", "a.jsonl: the file is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a.jsonl:2: broken JSON"),
        ("a.jsonl", b'{"text": "a"}\n["a"]\n', r"a.jsonl:2: found a list"),
        ("a.jsonl", b'{"txt": "a"}\n', r"a.jsonl:1: found txt; text or a chat is wanted"),
        ("a.jsonl", b'{"text": " "}\n', r"a.jsonl:1: text is a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a.jsonl:1: half a surrogate pair"),
        ("a.jsonl", b'{"messages": [{"role": "usr", "content": "a"}]}\n', r"a.jsonl:1: messages\[0\]: unknown role 'usr'"),
        ("a.jsonl", b'{"prompt": "a", "response": 3}\n', r"a.jsonl:1: response is a number"),
        ("a.json", b'[\n {"text": "a"}\n]', "a.json: JSON, which would be read as prose"),
        ("a", b'{"text": "a"}\n{"text": "b"}\n', "a: JSON, which would be read as prose"),
        ("a.ndjson", b'{"text": \n', r"a.ndjson:1: broken JSON"),
        ("a.JSONL", b'{"text": 1' + b"0" * 5000 + b"}", r"a.JSONL:1: a number with too many digits"),
        ("gone.txt", None, "gone.txt: no such file"),
    ],
)
def test_bad_files_are_refused_without_a_model(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read(section(tmp_path / name))
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("characters", "message", "hint"),
    [
        (10, "has 10 tokens, which fill 0 windows of 16; calibration.samples asks for 4", "give more text, or lower tokens"),
        (63, "has 63 tokens, which fill 3 windows of 16; calibration.samples asks for 4", "calibration: {samples: 3}"),
    ],
)
def test_too_short_is_refused_with_the_number_that_fits(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, characters: int, message: str, hint: str
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("x" * characters, encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        windows(read(section(path, samples=4)), section(path, samples=4), byte_tokenizer)
    assert str(caught.value.hint).startswith(hint)
    if characters > 16:
        assert len(windows(read(section(path, samples=3)), section(path, samples=3), byte_tokenizer)) == 3


# --- The hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:squad", ("squad", None, "train", None)),
        ("hub:owner/name", ("owner/name", None, "train", None)),
        ("hub:owner/name/config:test", ("owner/name", "config", "test", None)),
        ("hub:owner/name:validation:body", ("owner/name", None, "validation", "body")),
    ],
)
def test_hub_names(text: str, expected: tuple[Any, ...]) -> None:
    assert parse_hub(text) == expected


@pytest.mark.parametrize("text", ["hub:", "hub:/name", "hub:a/b/c/d", "hub:a:", "hub:a:b:c:d", "hub:a::b"])
def test_hub_names_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="allowed: hub:NAME") as caught:
        read(section(text))
    assert caught.value.hint == "e.g. hub:owner/name:train:text"


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a package `datasets` in place whose `load_dataset` is the given body."""

    def make(body: str) -> None:
        (tmp_path / "datasets.py").write_text(
            "import random\n"
            "class Rows(list):\n"
            "    def shuffle(self, seed, buffer_size):\n"
            "        return Rows(random.Random(seed).sample(self, len(self)))\n"
            f"def load_dataset(name, configuration, split, streaming):\n    {body}\n",
            encoding="utf-8",
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "datasets", raising=False)

    calibration._read_hub.cache_clear()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield make
    sys.modules.pop("datasets", None)
    calibration._read_hub.cache_clear()


def test_without_the_package_the_hub_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infopt.needs._is_installed", lambda module: module != "datasets")
    with pytest.raises(MissingNeedError, match="hub:owner/name needs the package datasets, which is not installed") as caught:
        read(section("hub:owner/name"))
    assert str(caught.value.hint).startswith("pip install datasets")


def test_a_hub_data_set(fake_hub: Callable[[str], None], byte_tokenizer: PreTrainedTokenizerFast) -> None:
    fake_hub('return Rows({"text": f"{name} {configuration} {split} {n}", "n": n} for n in range(100))')
    found = read(section("hub:owner/name/config:test"))
    assert texts_of(found)[0].startswith("owner/name config test ")
    assert len(found.documents) < 30
    assert found.hash != read(section("hub:owner/name/config:test", seed=1)).hash
    assert found.hash == read(section("hub:owner/name/config:test")).hash
    assert len(windows(found, section("x"), byte_tokenizer)) == 2


def test_a_hub_data_set_of_chats(fake_hub: Callable[[str], None]) -> None:
    fake_hub('return Rows({"talk": [{"role": "user", "content": str(n)}], "text": None} for n in range(3))')
    assert {message.content for document in read(section("hub:a:train:talk")).documents for message in document.messages} == set(
        "012"
    )


@pytest.mark.parametrize(
    ("text", "body", "message"),
    [
        ("hub:a", 'raise ConnectionError("offline\\nvery long")', "hub:a cannot be read: offline"),
        ("hub:a", "raise TimeoutError", "hub:a cannot be read: TimeoutError"),
        ("hub:a", "return Rows()", "hub:a has no rows"),
        ("hub:a", 'return Rows([{"body": "x"}])', "hub:a, row 1 as drawn: found body; text or a chat is wanted"),
        ("hub:a:train:text", 'return Rows([{"body": "x"}])', "hub:a:train:text has no field 'text'"),
        ("hub:a:train:n", 'return Rows([{"n": 3}])', r"n is a number \(3\); text or a list of messages"),
        ("hub:a:train:n", 'return Rows([{"n": " "}])', "n is a string"),
    ],
)
def test_what_the_hub_cannot_give(fake_hub: Callable[[str], None], text: str, body: str, message: str) -> None:
    fake_hub(body)
    with pytest.raises(InputError, match=message) as caught:
        read(section(text))
    assert caught.value.hint
    assert "\n" not in str(caught.value)
