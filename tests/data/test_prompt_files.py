"""The user's prompts and multiple-choice files: what is read, and what is refused with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from infopt.data.choices import read_choices
from infopt.data.prompts import Message, Prompt, encode, read_prompts
from infopt.errors import InputError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def write(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_prompts_are_read(tmp_path: Path) -> None:
    first, second, third = read_prompts(
        write(
            tmp_path,
            '{"prompt": "Hi", "expect": {"contains": "x", "max_tokens": 3}, "max_tokens": 9}',
            "",
            '{"id": "chat", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]}',
            '{"prompt": "Once\u2028 upon", "raw": true}',
        )
    )
    assert (first.id, first.text, first.max_tokens, first.is_raw) == ("row-1", "Hi", 9, False)
    assert first.expect is not None
    assert (first.expect.contains, first.expect.max_tokens) == (("x",), 3)
    assert second.messages == (Message("system", "Be brief."), Message("user", "Hi"))
    assert (second.id, second.expect, second.where[-2:]) == ("chat", None, ":3")
    assert (third.id, third.is_raw) == ("row-3", True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r":2: broken JSON \(.*column 2\)"),
        ("[" * 100_000, ":2: broken JSON"),
        ("[]", ":2: found a list"),
        ('{"max_tokens": 1' + "0" * 5000 + "}", ":2: a number with too many digits"),
        ('{"prompt": "\\ud800"}', ":2: half a surrogate pair"),
        ('{"prompt": "a", "prompt": "b"}', ":2: the key 'prompt' is given twice"),
        ("null", ":2: found null"),
        ('{"promt": "Hi"}', ":2: unknown key 'promt'; did you mean 'prompt'"),
        ("{}", "found neither"),
        ('{"prompt": "a", "messages": []}', "found both"),
        ('{"prompt": 3}', r"prompt is a number \(3\)"),
        ('{"prompt": "  "}', "not blank"),
        ('{"prompt": "a", "raw": "yes"}', "raw is a string"),
        ('{"messages": [{"role": "user", "content": "a"}], "raw": true}', "only beside prompt"),
        ('{"prompt": "a", "max_tokens": 0}', "max_tokens is a number"),
        ('{"prompt": "a", "max_tokens": 1.5}', "max_tokens is a number"),
        ('{"prompt": "a", "expect": {"exakt": "b"}}', ":2: expect: unknown key 'exakt'"),
        ('{"prompt": "a", "max_tokens": 8, "expect": {"max_tokens": 8}}', "can never fail"),
        ('{"prompt": "a", "id": 7}', "id is a number"),
        ('{"prompt": "a", "id": "one"}', "'one' was used at .*:1"),
        ('{"messages": {}}', "messages is an object"),
        ('{"messages": ["Hi"]}', r"messages\[0\] is a string"),
        ('{"messages": [{"role": "usr", "content": "a"}]}', "did you mean 'user'"),
        ('{"messages": [{"role": "user"}]}', "'content' is missing"),
        ('{"messages": [{"role": "user", "text": "a"}]}', "unknown key 'text'"),
        ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}', "nothing is left to answer"),
    ],
)
def test_bad_prompts_are_refused_with_their_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, '{"id": "one", "prompt": "Hi"}', line)
    with pytest.raises(InputError, match=message) as caught:
        read_prompts(path)
    assert str(caught.value).startswith(f"{path}:2")
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_an_empty_or_missing_prompts_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the file is empty"):
        read_prompts(write(tmp_path, "", " "))
    with pytest.raises(InputError, match="no such file"):
        read_prompts(tmp_path / "gone.jsonl")


def test_prompts_are_wrapped_where_there_is_a_template(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    def text(prompt: Prompt) -> str:
        return str(byte_tokenizer.decode(encode(prompt, byte_tokenizer)))

    chat = Prompt("c", messages=(Message("system", "S"), Message("user", "U")), where="f:4")
    assert text(Prompt("p", text="Hi")) == "Hi"
    with pytest.raises(InputError, match="f:4: messages need a chat template"):
        encode(chat, byte_tokenizer)
    byte_tokenizer.chat_template = TEMPLATE
    assert text(Prompt("p", text="Hi")) == "<user>Hi<assistant>"
    assert text(Prompt("p", text="Hi", is_raw=True)) == "Hi"
    assert text(chat) == "<system>S<user>U<assistant>"
    with pytest.raises(InputError, match="f:5: the model's chat template refuses these messages: no tools"):
        encode(Prompt("t", messages=(Message("tool", "x"),), where="f:5"), byte_tokenizer)


def test_a_prompt_without_tokens_is_refused(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    byte_tokenizer.chat_template = "{{ '' }}"
    with pytest.raises(InputError, match="f:2: the prompt 'p' has no tokens"):
        encode(Prompt("p", text="Hi", where="f:2"), byte_tokenizer)


def test_choices_are_read(tmp_path: Path) -> None:
    (item,) = read_choices(write(tmp_path, '{"question": "Q", "choices": ["a", "b"], "answer": 1}'))
    assert (item.id, item.question, item.choices, item.answer, item.source) == ("row-1", "Q", ("a", "b"), 1, "rows")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"choices": ["a", "b"], "answer": 0}', "'question' is missing"),
        ('{"answer": 1' + "0" * 5000 + "}", "a number with too many digits"),
        ('{"question": "Q", "choices": ["a"], "answer": 0}', "two or more strings"),
        ('{"question": "Q", "choices": ["a", " "], "answer": 0}', "two or more strings"),
        ('{"question": "Q", "answer": 0}', "choices is null"),
        ('{"question": "Q", "choices": ["a", "a"], "answer": 0}', "given twice"),
        ('{"question": "Q", "choices": ["a", "b"], "answer": 2}', "index from 0 to 1"),
        ('{"question": "Q", "choices": ["a", "b"], "answer": true}', "answer is a boolean"),
        ('{"question": "Q", "choices": ["a", "b"], "answer": "A"}', "answer is a string"),
        ('{"question": "Q", "choices": ["a", "b"], "anser": 1}', "did you mean 'answer'"),
        ('{"id": "one", "question": "Q", "choices": ["a", "b"], "answer": 1}', "two items have the id 'one'"),
    ],
)
def test_bad_choices_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, '{"id": "one", "question": "Q", "choices": ["a", "b"], "answer": 0}', line)
    with pytest.raises(InputError, match=message) as caught:
        read_choices(path)
    assert caught.value.hint
