from __future__ import annotations

import pytest
import torch

from infopt.model import load, reference, shapes, tiny


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_a_tiny_model_is_small_seeded_and_generates(kind: str) -> None:
    model, tokenizer = tiny.make(kind)
    count = sum(p.numel() for p in model.parameters())
    assert 80_000 <= count <= 200_000
    again, other = tiny.make(kind)[0], tiny.make(kind, seed=1)[0]
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    assert torch.equal(model(ids).logits, again(ids).logits)
    assert not torch.equal(model(ids).logits, other(ids).logits)
    out = model.generate(ids, max_new_tokens=12, do_sample=False)
    assert out.shape[1] > ids.shape[1]
    assert len(set(out[0, ids.shape[1] :].tolist())) > 1, "a model that repeats one token shows no change of its weights"
    assert 0.5 < model(ids).logits.std() < 2


@pytest.mark.parametrize("kind", tiny.KINDS)
def test_shapes_equal_the_real_model(kind: str) -> None:
    ref = reference.parse(kind)
    found = shapes.shapes(ref)
    model = load.load(ref).model
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.parameters * 4 == shapes.stored_bytes(ref)
    assert all(side % 32 == 0 for pair in found.linear.values() for side in pair if side >= 32)
    assert found.is_head_tied == model.config.tie_word_embeddings
    named = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    named.pop("lm_head")
    assert found.linear == {name: (m.out_features, m.in_features) for name, m in named.items()}
    assert found.kv_bytes_per_token(4) == 2 * found.layers * 2 * 16 * 4


def test_making_one_leaves_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tiny.make()
    assert torch.equal(torch.rand(3), expected)


def test_biases_are_not_zero() -> None:
    model, _ = tiny.make("tiny-qwen2")
    biases = [p for name, p in model.named_parameters() if name.endswith("bias")]
    assert biases
    assert all(bias.abs().max() > 0 for bias in biases)


def test_the_tokenizer_is_bytes_there_and_back() -> None:
    tokenizer = tiny.tokenizer()
    text = "naïve 日本 \n\t <|im_end|>x"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id in ids
    batch = tokenizer(["a", "bcd"], padding=True)
    assert batch["attention_mask"][0] == [0, 0, 1]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False)
    assert chat == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_fingerprints_differ_by_kind_and_need_no_weights() -> None:
    prints = {reference.fingerprint(reference.parse(kind)) for kind in tiny.KINDS}
    assert len(prints) == len(tiny.KINDS)
    assert tiny.spec_hash("tiny", 0) != tiny.spec_hash("tiny", 1)
