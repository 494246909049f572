from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from infopt.export import kquants

ENCODE = {"Q5_K": kquants.q5_k, "Q6_K": kquants.q6_k}

#: What ggml's own `quantize_row_q5_K_ref` and `quantize_row_q6_K_ref` (llama.cpp 11434) make of `wave()`.
GOLDEN = {
    "Q5_K": (
        "ea17cf275f93c7ce5f92c8cecc6854ff53d2b2aaac2d4d5d5553d2b2aeac2d4d5d555696b6aeac2d4d5d555696b6aea860e5f082ea450d"
        "3fb950b6c174eb653c5dc84f979355ec846a8bd73f686537edb5b1d51f597f5e19c18a78bb2085b88714924040a132b2f0b02073060887"
        "43ee59b7219ab676fb73394ba831a9c485fb631b3da941c8e293fa540c2faa41d6f0c850c8d385fc652c4dc960d7e284ec551d4ec96fe6"
        "f183ec460e3fc97ff5f093"
    ),
    "Q6_K": (
        "801b80a4c57b6bced32ffd43d767aa98303cb1a54f0a2995e6a4cf91031b8697e3f280dd12b5fec8d894a7e6a17202783e398181406e63"
        "d56d47f615191983d32902d3317667b4a7e83ef6b31e5162c2a7d52af3c2206577c4c8f93ee5a20d51884a5839e42d6ff2ad8a3b3616e1"
        "3b7f227c99dac6e612cc90046f9bfbe5f42086808050693e3f6f9bd5c09054292e2f9c68262363a3eaedecac1806034397fabf6b060100"
        "90e5feffbf5b06000090e53e3f7f9bc6c1c050293e3f7f9bc6c0c0c1342719f00513e3d5c64650a2977580c08f"
    ),
}


def wave() -> np.ndarray:
    return (np.sin(np.arange(256) * 0.7) * np.linspace(-1, 2, 256)).astype(np.float32)


@pytest.mark.parametrize("kind", ENCODE)
def test_blocks_are_ggmls_own(kind: str) -> None:
    assert ENCODE[kind](wave()[None])[0].tobytes().hex() == GOLDEN[kind]


@pytest.mark.parametrize(("kind", "levels"), [("Q5_K", 31), ("Q6_K", 63)])
def test_every_weight_is_within_a_step_of_itself(kind: str, levels: int) -> None:
    weight = np.random.default_rng(0).standard_t(4, (64, 512)).astype(np.float32)
    seen = gguf.dequantize(ENCODE[kind](weight), GGMLQuantizationType[kind])
    group = {"Q5_K": 32, "Q6_K": 16}[kind]
    groups, error = weight.reshape(-1, group), np.abs(seen - weight).reshape(-1, group)
    span = np.maximum(groups.max(-1), 0) - np.minimum(groups.min(-1), 0)
    if kind == "Q6_K":
        span = 2 * np.abs(groups).max(-1)
    # Half a step, and what the shared scale of 256 weights takes from the scales of the groups.
    shared = np.abs(weight).reshape(-1, 256).max(-1).repeat(256 // group)
    assert (error.max(-1) <= 0.75 * span / levels + 0.02 * shared).all()
    assert np.sqrt((error**2).mean()) < 0.4 * span.mean() / levels


@pytest.mark.parametrize("kind", ENCODE)
@pytest.mark.parametrize("value", [0.0, 0.5, -0.5])
def test_constant_blocks(kind: str, value: float) -> None:
    weight = np.full((3, 256), value, np.float32)
    seen = gguf.dequantize(ENCODE[kind](weight), GGMLQuantizationType[kind])
    assert np.allclose(seen, value, rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", ENCODE)
def test_large_matrices_are_encoded_as_their_rows_are(kind: str) -> None:
    weight = np.random.default_rng(1).normal(size=(kquants._CHUNK + 3, 256)).astype(np.float32)
    whole = ENCODE[kind](weight)
    assert whole.shape == (kquants._CHUNK + 3, gguf.GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1])
    assert np.array_equal(whole[-5:], ENCODE[kind](weight[-5:]))
