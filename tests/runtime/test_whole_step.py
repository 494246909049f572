"""One call into C++ gives the logits of transformers' modules, for every class and way of feeding it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from conftest_runtime import SHAPES, VOCABULARY, off, wanted

from infopt.errors import InputError
from infopt.runtime import architecture
from infopt.runtime.decoder import Unfit
from infopt.runtime.pages import PAGE, Budget
from infopt.runtime.steps import Room, Run
from infopt.runtime.whole_step import CHUNK, WholeStep

Make = Callable[..., Any]
IDS = [(11 * i * i + 5 * i) % VOCABULARY for i in range(300)]


def logits(step: WholeStep, sequence: Any, ids: list[int]) -> torch.Tensor:
    found = step.run([Run(sequence, ids, all_logits=True)]).logits
    assert found is not None
    return found.clone()


def opened(model: Any, **settings: Any) -> WholeStep:
    """Of a copy: a step consumes its model."""
    return WholeStep(copy.deepcopy(model), **settings)


def float32(model: Any) -> WholeStep:
    return WholeStep(model, threads=2, weights="float32", head="float32", kv="float32")


@pytest.mark.parametrize("name", SHAPES)
def test_every_class_in_one_go_and_token_by_token(make: Make, name: str) -> None:
    model = make(name)
    expected = wanted(model, IDS[:150])
    for kv, most in (("float32", 1e-4), ("float16", 1e-2)):
        step = opened(model, threads=2, kv=kv)
        sequence = step.open()
        found = [logits(step, sequence, part) for part in (IDS[:70], IDS[70:75], *([token] for token in IDS[75:150]))]
        assert off(torch.cat(found), expected) < most


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_long_prompts_in_chunks_over_several_pages(make: Make, threads: int) -> None:
    model = make()
    step = opened(model, threads=threads, kv="float32")
    sequence = step.open()
    assert len(IDS) > 2 * CHUNK > 3 * PAGE
    found = step.run([Run(sequence, IDS)])
    expected = wanted(model, IDS)[-1]
    assert step.length(sequence) == len(IDS)
    assert found.logits is not None
    assert off(found.logits[0], expected) < 1e-4
    assert found.tokens == [int(expected.argmax())]
    best = expected.topk(2).values
    assert found.margins[0] == pytest.approx(float(best[0] - best[1]), abs=1e-4)


def test_rows_of_unequal_length_do_not_see_each_other(make: Make) -> None:
    model = make("mistral, window")
    step = opened(model, threads=2, kv="float32")
    texts = [IDS[:3], IDS[50:120], IDS[7:8], IDS[30:95]]
    sequences = [step.open() for _ in texts]
    step.run([Run(sequence, text[:-1] or text) for sequence, text in zip(sequences, texts, strict=True)])
    step.cut(sequences[2], 0)
    found = step.run([Run(sequence, text[-1:]) for sequence, text in zip(sequences, texts, strict=True)])
    assert found.logits is not None
    for row, text in enumerate(texts):
        assert off(found.logits[row], wanted(model, text)[-1]) < 1e-4


def test_a_fork_goes_its_own_way(make: Make) -> None:
    model = make()
    step = opened(model, threads=2, kv="float32")
    first = step.open()
    logits(step, first, IDS[:100])
    second = step.fork(first)
    assert step.pages.bytes < 4 * step.pages.page_bytes, "the whole page is shared"
    one, two = logits(step, first, IDS[100:130]), logits(step, second, IDS[200:230])
    assert off(one, wanted(model, IDS[:130])[100:]) < 1e-4
    assert off(two, wanted(model, [*IDS[:100], *IDS[200:230]])[100:]) < 1e-4
    step.close(first)
    again = logits(step, second, IDS[:5])
    assert off(again, wanted(model, [*IDS[:100], *IDS[200:230], *IDS[:5]])[130:]) < 1e-4


def test_a_fork_that_was_cut_into_a_shared_page_writes_to_a_page_of_its_own(make: Make) -> None:
    model = make()
    step = opened(model, threads=2, kv="float32")
    first = step.open()
    logits(step, first, IDS[:130])
    second = step.fork(first)
    step.cut(second, 20)
    logits(step, second, IDS[200:230])
    assert off(logits(step, first, IDS[130:140]), wanted(model, IDS[:140])[130:]) < 1e-4


def test_what_was_cut_is_forgotten(make: Make) -> None:
    model = make()
    step = opened(model, threads=2, kv="float32")
    sequence = step.open()
    logits(step, sequence, IDS[:90])
    step.cut(sequence, 60)
    assert off(logits(step, sequence, IDS[100:110]), wanted(model, [*IDS[:60], *IDS[100:110]])[60:]) < 1e-4


def test_pages_are_used_again(make: Make) -> None:
    step = WholeStep(make(), threads=2)
    for _ in range(3):
        sequence = step.open()
        step.run([Run(sequence, IDS[:100])])
        step.close(sequence)
    assert step.pages.bytes == 2 * step.pages.page_bytes


@pytest.mark.parametrize(("kind", "most"), [("bfloat16", 0.05), ("int8", 0.15), ("int4", 1.5)])
def test_packed_kinds_stay_near(make: Make, kind: Any, most: float) -> None:
    model = make("smollm")
    step = opened(model, threads=2, weights=kind)
    found, expected = logits(step, step.open(), IDS[:40]), wanted(model, IDS[:40])
    assert 0 < float((found - expected).std() / expected.std()) < most
    assert step.weights_bytes < {"bfloat16": 0.55, "int8": 0.32, "int4": 0.25}[kind] * 4 * model.num_parameters()


def last_logits(step: WholeStep, sequence: Any, ids: list[int]) -> torch.Tensor:
    """As a prompt's."""
    found = step.run([Run(sequence, ids)]).logits
    assert found is not None
    return found[0].clone()


@pytest.mark.parametrize(("kind", "most", "apart"), [("bfloat16", 0.05, 1e-4), ("int8", 0.15, 0.1), ("int4", 1.5, 0.1)])
def test_prompts_stay_near_what_their_tokens_give_one_by_one(make: Make, kind: Any, most: float, apart: float) -> None:
    model = make("smollm")
    expected, later = (wanted(model, IDS[:count])[-1] for count in (100, 103))
    step = opened(model, threads=2, weights=kind)
    one_by_one, sequence = logits(step, step.open(), IDS[:100])[-1], step.open()
    found = last_logits(step, sequence, IDS[:100])
    assert float((found - expected).std() / expected.std()) < most
    assert float((found - one_by_one).std() / expected.std()) < apart
    is_tiled = " amx," in step.about
    if is_tiled or kind != "bfloat16":  # whose sums go in another order too where several tokens are multiplied together
        assert torch.equal(found, one_by_one) != is_tiled, "tiles were used where there are some"
    assert float((last_logits(step, sequence, IDS[100:103]) - later).std() / expected.std()) < most


def test_prompts_through_layers_of_several_kinds(make: Make) -> None:
    model = make("smollm")
    model.model.layers[1].mlp.down_proj.bfloat16()
    step = opened(model, threads=2)
    assert len({packed.kind for packed in step.packed}) == 2
    found, one_by_one = last_logits(step, step.open(), IDS[:100]), logits(step, step.open(), IDS[:100])[-1]
    assert off(found, one_by_one) < 1e-4


def test_a_text_does_not_depend_on_its_batch(make: Make) -> None:
    step = opened(make("smollm"), threads=2, weights="int8")
    lengths = (100, 20, 33, 31, 300)
    prompts = [IDS[start : start + length] for start, length in enumerate(lengths)]
    alone = [last_logits(step, step.open(), prompt) for prompt in prompts]
    found = step.run([Run(step.open(), prompt) for prompt in prompts])
    assert found.logits is not None
    assert torch.equal(found.logits, torch.stack(alone))
    assert found.tokens == [int(each.argmax()) for each in alone]


@pytest.mark.parametrize("name", ["smollm", "mistral, window"])
@pytest.mark.parametrize(("kind", "most"), [("int8", 0.0), ("int4", 0.0), ("float32", 1e-5)])
def test_a_token_has_the_same_logits_however_many_are_verified_with_it(make: Make, name: str, kind: Any, most: float) -> None:
    """Bit for bit where inputs are rounded to integers: else a draft could change which of two near tokens is taken."""
    model = make(name)
    step, other = (opened(model, threads=threads, weights=kind) for threads in (2, 3))
    for before in (63, 100, 120, 125, 126, 127, 128, 143, 255, 256):
        found = []
        for count in (1, 2, 3, 5, 31):
            sequence = step.open()
            step.run([Run(sequence, IDS[:before])])
            found.append(logits(step, sequence, IDS[before : before + count])[0])
            step.close(sequence)
        sequences = [step.open(), step.open()]
        step.run([Run(sequences[0], IDS[:before])])
        beside = step.run([Run(sequences[0], IDS[before : before + 1]), Run(sequences[1], IDS[:30])]).logits
        elsewhere = other.open()
        other.run([Run(elsewhere, IDS[:before])])
        found += [beside[0].clone(), logits(other, elsewhere, IDS[before : before + 1])[0]]
        assert max(off(each, found[0]) for each in found) <= most, f"{before} tokens before"
        for each in sequences:
            step.close(each)
        other.close(elsewhere)


def test_too_much_is_refused_before_anything_is_computed(make: Make) -> None:
    step = WholeStep(make(), threads=2, budget=Budget(300_000))
    with pytest.raises(InputError, match=r"8 × 400 tokens take .* MB; .* kB are left"):
        step.require([Room(400, 8)])
    sequence = step.open()
    with pytest.raises(InputError, match="the model's context allows 512"):
        step.run([Run(sequence, IDS * 2, all_logits=True)])


def test_a_nan_names_its_layer(make: Make) -> None:
    model = make()
    model.model.layers[1].mlp.down_proj.weight.data[3, 5] = torch.nan
    step = opened(model, threads=2)
    with pytest.raises(InputError, match="not finite; layer 1 is where"):
        step.run([Run(step.open(), IDS[:4])])
    model = make("llama, biases, own head")
    model.lm_head.weight.data[7] = torch.inf
    with pytest.raises(InputError, match="the output head"):
        opened(model, threads=2).run([Run(opened(model, threads=2).open(), IDS[:4])])


@pytest.mark.parametrize("name", SHAPES)
def test_classes_are_checked_on_a_small_model(make: Make, name: str) -> None:
    architecture.check(make(name), float32)


def test_a_class_that_computes_something_else_is_found_out(make: Make) -> None:
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *given: Any, **named: Any) -> Any:
            found = super().forward(*given, **named)
            found.logits = found.logits + found.logits.flip(-1)
            return found

    with pytest.raises(Unfit, match="of their spread off"):
        architecture.check(Doubled(make().config), float32)


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts": ("MixtralConfig", {"num_local_experts": 2}, "has no mlp|has .*"),
    "caps": ("Gemma2Config", {"head_dim": 16}, "caps its logits"),
    "layer norms": ("StableLmConfig", {}, "is no RMSNorm|has "),
    "activation": ("LlamaConfig", {"hidden_act": "relu"}, "its activation is 'relu'"),
    "dynamic positions": (
        "LlamaConfig", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}, "they change with",
    ),
    "another family": ("GPT2Config", {"n_embd": 96, "n_layer": 2, "n_head": 6}, "has no layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_with_the_reason(name: str) -> None:
    kind, own, reason = REFUSED[name]
    base = {} if kind == "GPT2Config" else {"hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
                                           "num_key_value_heads": 2, "intermediate_size": 64, "vocab_size": 99}  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, kind)(**base, **own))
    with pytest.raises(Unfit, match=reason):
        architecture.check(model, float32)


def test_room_is_counted_by_row_and_shared_prompts_once(make: Make) -> None:
    step = WholeStep(make(), threads=1)
    page = step.pages.page_bytes
    limited = WholeStep(make(), threads=1, budget=Budget(10 * page))
    limited.require([Room(400), Room(64), Room(100)])  # 7 + 1 + 2 pages, where 3 × 400 tokens would take 21
    limited.require([Room(200, sequences=7, shared=192)])  # 3 pages together and one of each
    with pytest.raises(InputError, match=r"1 × 400 and 2 × 100 tokens take"):
        limited.require([Room(400), Room(100), Room(100)])
    with pytest.raises(InputError, match=r"7 × 200 tokens take"):
        limited.require([Room(200, sequences=7, shared=191)])


def test_prompts_of_a_batch_go_in_chunks_too(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    step = float32(make())
    runs = [(step.open(), IDS[start : start + count]) for start, count in ((0, 70), (5, 3), (9, 100), (20, 40), (2, 1), (30, 60))]
    together: list[int] = []
    inner = step._step

    def counted(chosen: Any, *given: Any, **named: Any) -> Any:
        together.append(sum(len(run.ids) for run in chosen))
        return inner(chosen, *given, **named)

    monkeypatch.setattr(step, "_step", counted)
    found = step.run([Run(sequence, ids) for sequence, ids in runs])
    assert together == [70, 100, 100, 4], "prompts of 40 and 60 go together, those of 3 and 1 by themselves"
    assert found.logits is not None
    for index, (row, (_, ids)) in enumerate(zip(found.logits, runs, strict=True)):
        alone = step.run([Run(step.open(), ids)])
        assert found.tokens[index] == alone.tokens[0]
        assert found.margins[index] == pytest.approx(alone.margins[0], rel=1e-4)
        assert alone.logits is not None
        assert off(row, alone.logits[0]) < 1e-5, "but for rounding, no prompt depends on those beside it"


def test_shapes_that_buffers_are_not_made_for_are_refused(make: Make) -> None:
    with pytest.raises(Unfit, match="its heads have 576 numbers; the kernels hold 512 at most"):
        float32(make(hidden_size=576, head_dim=576, num_attention_heads=1, num_key_value_heads=1))
    model = make()
    wide = model.model.layers[2].mlp
    for name, shape in (("gate_proj", (96, 144)), ("up_proj", (96, 144)), ("down_proj", (144, 96))):
        setattr(wide, name, torch.nn.Linear(*shape, bias=False))
    with pytest.raises(Unfit, match=r"layer 2 has products of \(160, 96, 288, 144\), where the configuration says"):
        float32(model)


def test_what_keeps_a_small_model_from_running_is_a_reason(make: Make) -> None:
    def fails(model: Any) -> Any:
        raise RuntimeError("shape [1, 40, 4, 0, 16] is invalid")

    with pytest.raises(Unfit, match="a small model of its class does not run: RuntimeError: shape"):
        architecture.check(make(), fails)


def test_a_table_is_whole_after_memory_ran_out(make: Make) -> None:
    model = make()
    page = WholeStep(make(), threads=1).pages.page_bytes
    step = WholeStep(model, threads=1, budget=Budget(2 * page))
    sequence = step.open()
    with pytest.raises(InputError, match="which is all that is allowed"):
        step.pages.reserve(sequence, 3 * PAGE)
    assert sequence.table is not None
    assert len(sequence.table) == len(sequence.pages) == 2
    step.close(sequence)
    assert step.run([Run(step.open(), IDS[: 2 * PAGE])]).tokens


def test_a_budget_is_shared_with_early_layers(make: Make) -> None:
    whole = WholeStep(make(), threads=1, budget=Budget(7 * WholeStep(make(), threads=1).pages.page_bytes))
    early = whole.first_layers(1)
    rooms = [Room(6 * PAGE)]
    early.require(rooms, beside=whole.require(rooms[:0]))
    with pytest.raises(InputError, match=r"1 × 384 tokens take .*; .* are left"):
        early.require(rooms, beside=whole.require(rooms))
    whole.run([Run(whole.open(), IDS[:128])], want_logits=False)
    with pytest.raises(InputError, match="are left"):
        whole.require(rooms)
