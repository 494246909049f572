"""Batches: what counts lands where it should, padding is never seen, and the order follows from the seed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infopt.distil import targets
from infopt.distil.examples import Batch, Example, batches, split
from infopt.distil.losses import Likeliest
from infopt.distil.targets import keep, logits
from infopt.errors import DiskFullError
from infopt.model import load, reference

CPU = torch.device("cpu")
EXAMPLES = [
    Example.of_text(range(5, 25)),
    Example.of_answer(range(40, 52), range(60, 64)),
    Example.of_answer((7, 8, 9), (10, 11), (0.25, 1.75)),
    Example.of_answer(range(90, 130), (3,)),
]


def test_answers_alone_are_learned() -> None:
    made = Example.of_answer((7, 8, 9), (10, 11), (0.25, 1.75))
    assert made.ids == (7, 8, 9, 10, 11)
    assert made.weights == (0.0, 0.0, 0.25, 1.75)  # the prediction after 9 is 10
    assert made.positions == 2
    assert Example.of_text((4, 5, 6)).weights == (1.0, 1.0)


def test_a_batch_says_what_comes_where() -> None:
    batch = Batch.of(EXAMPLES, [2, 1], CPU)
    assert batch.ids.shape == (2, 16)
    assert batch.ids[0].tolist() == [7, 8, 9, 10, 11, *[0] * 11]
    found = list(zip(batch.rows.tolist(), batch.places.tolist(), batch.tokens.tolist(), batch.weights.tolist(), strict=True))
    assert found == [(0, 2, 10, 0.25), (0, 3, 11, 1.75), (1, 11, 60, 1), (1, 12, 61, 1), (1, 13, 62, 1), (1, 14, 63, 1)]
    assert batch.span.tolist() == list(range(2, 15))


def test_logits_are_those_of_each_example_alone() -> None:
    model = load.load(reference.parse("tiny")).model
    batch = Batch.of(EXAMPLES, range(4), CPU)
    with torch.inference_mode():
        found = logits(model, batch)
        alone = [
            model(input_ids=torch.tensor([each.ids])).logits[0, [i for i, weight in enumerate(each.weights) if weight]]
            for each in EXAMPLES
        ]
    torch.testing.assert_close(found, torch.cat(alone), rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(st.integers(1, 200), st.integers(1, 9), st.integers(1, 3), st.integers(0, 5))
def test_every_epoch_holds_every_example_once(count: int, size: int, epochs: int, seed: int) -> None:
    examples = [Example.of_text(range(2 + index * 7 % 30)) for index in range(count)]
    found = list(batches(examples, size, epochs, seed))
    assert found == list(batches(examples, size, epochs, seed))
    assert len(found) % epochs == 0
    assert all(1 <= len(batch) <= size for batch in found)
    share = len(found) // epochs
    for epoch in range(epochs):
        assert sorted(i for batch in found[epoch * share : (epoch + 1) * share] for i in batch) == list(range(count))
    if count > 50:
        assert found != list(batches(examples, size, epochs, seed + 1))


def test_examples_of_like_length_come_together() -> None:
    examples = [Example.of_text(range(2 + index)) for index in range(64)]
    spreads = [max(batch) - min(batch) for batch in batches(examples, 4, 1, 0)]
    assert max(spreads) < 8


@given(st.integers(2, 500), st.floats(0.01, 0.9), st.integers(0, 9))
def test_the_split_leaves_both_sides(count: int, share: float, seed: int) -> None:
    train, held = split(count, share, 1, seed)
    assert sorted([*train, *held]) == list(range(count))
    assert len(held) == min(max(1, round(count * share)), count - 1)
    assert train


def test_a_teacher_is_asked_once(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    teacher = load.load(reference.parse("tiny")).model
    folder = tmp_path_factory.mktemp("kept")
    monkeypatch.setattr(targets, "POSITIONS", 20)  # several runs of the teacher
    kept = keep(teacher, EXAMPLES, 6, folder, CPU)
    batch = Batch.of(EXAMPLES, [3, 0], CPU)
    with torch.inference_mode():
        wanted = Likeliest.of(logits(teacher, batch), 6)
    found = kept.of(batch)
    assert torch.equal(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.log_probabilities, wanted.log_probabilities, rtol=2e-3, atol=2e-3)
    again = keep(None, EXAMPLES, 6, folder, CPU)  # no teacher is needed any more
    assert torch.equal(again.of(batch).tokens, wanted.tokens)


def test_answers_are_to_the_very_same_examples(tmp_path_factory: pytest.TempPathFactory) -> None:
    teacher, folder = load.load(reference.parse("tiny")).model, tmp_path_factory.mktemp("kept")
    keep(teacher, EXAMPLES, 6, folder, CPU)
    other = [Example(tuple(token + 1 for token in each.ids), each.weights) for each in EXAMPLES]
    found = keep(teacher, other, 6, folder, CPU).of(Batch.of(other, [0], CPU))
    with torch.inference_mode():
        assert torch.equal(found.tokens, Likeliest.of(logits(teacher, Batch.of(other, [0], CPU)), 6).tokens)


def test_rows_that_stand_for_no_token_of_the_student_are_left_out(tmp_path_factory: pytest.TempPathFactory) -> None:
    teacher = load.load(reference.parse("tiny")).model
    kept = keep(teacher, EXAMPLES, 500, tmp_path_factory.mktemp("kept"), CPU, temperature=2.0, vocabulary=100)
    batch = Batch.of(EXAMPLES, [0], CPU)
    with torch.inference_mode():
        wanted = Likeliest.of(logits(teacher, batch)[:, :100], 500, 2.0)
    found = kept.of(batch)
    assert torch.equal(found.tokens, wanted.tokens)
    torch.testing.assert_close(found.log_probabilities, wanted.log_probabilities, rtol=2e-3, atol=2e-3)


def test_an_interrupted_teacher_starts_over(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("kept")

    def broken(line: str) -> None:
        raise KeyboardInterrupt

    teacher = load.load(reference.parse("tiny")).model
    with pytest.raises(KeyboardInterrupt):
        keep(teacher, EXAMPLES, 6, folder, CPU, broken)
    assert not list(folder.glob("*/tokens.npy"))
    assert len(keep(teacher, EXAMPLES, 6, folder, CPU).tokens) == sum(each.positions for each in EXAMPLES)


def test_a_full_disk_is_told(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(targets, "_header", full)
    with pytest.raises(DiskFullError):
        keep(load.load(reference.parse("tiny")).model, EXAMPLES, 6, tmp_path_factory.mktemp("kept"), CPU)
