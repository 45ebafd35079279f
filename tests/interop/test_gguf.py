"""GGUF against the model it was written from, against transformers, and against SmolLM2's real file."""

import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import pre_tokenizers
from transformers.convert_slow_tokenizer import TikTokenConverter

from eabf_jax.errors import InputError
from eabf_jax.interop import gguf as ours
from eabf_jax.interop import gguf_tokenizer
from eabf_jax.interop.gguf import from_gguf
from eabf_jax.interop.gguf_tokenizer import SPLITTINGS, pre_tokenizer
from eabf_jax.interop.huggingface import config_from_hf
from eabf_jax.interop.tokenizer import load_tokenizer
from eabf_jax.rope import scheme

HIDDEN, WIDE, LAYERS, HEADS, KEY_HEADS, HEAD_DIM, VOCABULARY = 64, 96, 2, 4, 2, 16, 1500

PAGE = Path(__file__).parents[2] / "docs" / "gguf.md"

Metadata = dict[str, Any]
Tensors = dict[str, np.ndarray]


def metadata() -> Metadata:
    return {
        "llama.context_length": 4096, "llama.embedding_length": HIDDEN, "llama.feed_forward_length": WIDE,
        "llama.block_count": LAYERS, "llama.attention.head_count": HEADS, "llama.attention.head_count_kv": KEY_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.dimension_count": HEAD_DIM,
        "llama.rope.freq_base": 10_000.0,
    }  # fmt: skip


def model() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, attention_bias=True,
    )  # fmt: skip
    state = transformers.LlamaForCausalLM(config).state_dict()
    return {name: torch.randn_like(value) for name, value in state.items()}


NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


def as_gguf(state: dict[str, torch.Tensor]) -> Tensors:
    """Names and permutes as llama.cpp's convert_hf_to_gguf.py does."""
    out: Tensors = {}
    for name, value in state.items():
        array = value.numpy()
        heads = HEADS if "q_proj" in name else KEY_HEADS if "k_proj" in name else None
        if heads:
            pairs = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
            array = pairs.swapaxes(1, 2).reshape(array.shape)
        for hf, short in NAMES.items():
            name = name.replace(hf, short)
        out[name] = np.ascontiguousarray(array)
    return out


def write(
    path: Path,
    values: Metadata,
    tensors: Tensors,
    kinds: dict[str, Any] | None = None,
    arch: str = "llama",
    **options: Any,
) -> Path:
    writer = gguf.GGUFWriter(path, arch, **options)
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value:  # the writer leaves empty arrays out, and asks for their type
            writer.add_array(key, value)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name)
        data = array if kind is None else gguf.quants.quantize(array, kind)
        writer.add_tensor(name, data, raw_dtype=None if data.dtype == np.float16 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def config_of(directory: Path) -> Any:
    return config_from_hf(json.loads((directory / "config.json").read_text()))


def test_float_file_is_the_model_again(tmp_path: Path) -> None:
    state = model()
    path = write(tmp_path / "m.gguf", metadata(), as_gguf(state))
    done = from_gguf(path, tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert found.keys() == state.keys() and done.tensors == len(state)
    for name, value in state.items():
        assert torch.equal(found[name], value), name
    config = config_of(tmp_path / "hf")
    assert config.attention_bias and not config.tie_word_embeddings and config.rms_norm_eps == 1e-5
    assert config.rope == scheme("default", base=10_000.0) and config.max_position_embeddings == 4096
    assert not (tmp_path / "hf" / "tokenizer_config.json").exists()
    from_gguf(path, tmp_path / "hf", dtype="bfloat16", overwrite=True)
    half = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(half[name], value.bfloat16()) for name, value in state.items())


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_files_hold_what_the_package_dequantises(tmp_path: Path, kind: str) -> None:
    state = {name: value for name, value in model().items() if "bias" not in name and name != "lm_head.weight"}
    tensors = as_gguf(state)
    wanted = getattr(gguf.GGMLQuantizationType, kind)
    kinds = {name: wanted for name, array in tensors.items() if array.ndim == 2}
    from_gguf(write(tmp_path / "m.gguf", metadata(), tensors, kinds), tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    assert config_of(tmp_path / "hf").tie_word_embeddings and found.keys() == state.keys()
    for name, value in state.items():
        # Quantisation works along rows, which the permutation moves whole: it may be done before or after.
        if value.ndim == 2:
            value = torch.tensor(gguf.quants.dequantize(gguf.quants.quantize(value.numpy(), wanted), wanted))
        assert torch.equal(found[name], value.float()), name


LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def llama3_factors() -> np.ndarray:
    """What llama.cpp stores for Llama 3.1: each frequency's divisor, from transformers' own frequencies."""
    settings = {"rope_type": "llama3", "rope_theta": 500_000.0, **LLAMA3}
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, head_dim=HEAD_DIM, rope_parameters=settings
    )
    scaled, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500_000.0 ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    return (plain / scaled.numpy()).astype(np.float32)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"type": "none", "factor": 4.0}, scheme("default", base=10_000.0)),
        ({"type": "linear", "factor": 4.0}, scheme("pi", base=10_000.0, factor=4.0)),
        ({"factor": 2.0, "original_context_length": 2048}, scheme("pi", base=10_000.0, factor=2.0)),
        ({"type": "yarn", "factor": 1.0, "yarn_ext_factor": 0.0}, scheme("default", base=10_000.0)),
    ],
)
def test_rope_scaling(tmp_path: Path, settings: Metadata, expected: object) -> None:
    assert config_of(converted(tmp_path, scaling(settings))).rope == expected


def test_old_name_of_the_factor(tmp_path: Path) -> None:
    values = {"llama.rope.scale_linear": 4.0}
    assert config_of(converted(tmp_path, values)).rope == scheme("pi", base=10_000.0, factor=4.0)


def scaling(settings: Metadata) -> Metadata:
    return {f"llama.rope.scaling.{key}": value for key, value in settings.items()}


def converted(directory: Path, values: Metadata, tensors: Tensors | None = None) -> Path:
    """The tiny model with other metadata, as Hugging Face directory."""
    directory.mkdir(exist_ok=True)
    path = write(directory / "m.gguf", metadata() | values, as_gguf(model()) if tensors is None else tensors)
    from_gguf(path, directory / "hf")
    return directory / "hf"


def llama_cpp_yarn(factor: float, window: float, fast: float, slow: float, own: float) -> tuple[np.ndarray, float]:
    """Frequencies and magnitude in float64, as ggml's rope_yarn has them and llama_context sets its arguments.

    There freq_scale is 1 / factor, ext_factor 1, and attn_factor is set so that with rope_yarn's own
    1 + 0.1 ln(1 / freq_scale) cos and sin are multiplied by that once, or by 1 where the factor is below 1, times the
    file's attn_factor.
    """
    pair = np.arange(HEAD_DIM // 2)
    extrapolated = 10_000.0 ** (-2.0 * pair / HEAD_DIM)

    def corrected(turns: float) -> float:
        return HEAD_DIM * np.log(window / (turns * 2 * np.pi)) / (2 * np.log(10_000.0))

    low = max(0.0, np.floor(corrected(fast)))
    high = min(HEAD_DIM - 1.0, np.ceil(corrected(slow)))
    mix = 1.0 - np.clip((pair - low) / max(0.001, high - low), 0.0, 1.0)
    return extrapolated / factor * (1.0 - mix) + extrapolated * mix, own * (1.0 + 0.1 * np.log(max(factor, 1.0)))


YARN_WHOLE = float(0.1 * np.log(4.0) + 1.0)


@pytest.mark.parametrize(
    ("settings", "window", "fast", "slow", "own"),
    [
        ({}, 4096, 32.0, 1.0, 1.0),  # llama.cpp's default is the context length as it stands
        ({"original_context_length": 2048}, 2048, 32.0, 1.0, 1.0),
        ({"yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0, "original_context_length": 1024}, 1024, 8.0, 2.0, 1.0),
        ({"attn_factor": 0.5}, 4096, 32.0, 1.0, 0.5),
        ({"factor": 0.5}, 4096, 32.0, 1.0, 1.0),
        ({"factor": 0.5, "attn_factor": 0.75}, 4096, 32.0, 1.0, 0.75),
        ({"yarn_attn_factor": YARN_WHOLE, "yarn_ext_factor": 1.0}, 4096, 32.0, 1.0, 1.0),
        ({"yarn_log_multiplier": 0.0, "finetuned": True, "yarn_ext_factor": -1.0}, 4096, 32.0, 1.0, 1.0),
    ],
)
def test_yarn_is_that_of_llama_cpp(
    tmp_path: Path, settings: Metadata, window: float, fast: float, slow: float, own: float
) -> None:
    settings = {"type": "yarn", "factor": 4.0, **settings}
    found = config_of(converted(tmp_path, scaling(settings))).rope
    frequencies, magnitude = llama_cpp_yarn(settings["factor"], window, fast, slow, own)
    np.testing.assert_allclose(found.inverse_frequencies(HEAD_DIM), frequencies, rtol=2e-7)  # float32
    assert found.rotation_scale() == pytest.approx(magnitude, rel=1e-12)


def test_yarn_logits_are_those_of_the_model_before_conversion(tmp_path: Path) -> None:
    settings = {
        "rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 1024,
        "beta_fast": 8.0, "beta_slow": 2.0,
    }  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDE, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=HEAD_DIM, attention_bias=True,
        max_position_embeddings=4096, rms_norm_eps=1e-5, rope_parameters=settings,
    )  # fmt: skip
    reference = transformers.LlamaForCausalLM(config).eval()
    reference.load_state_dict(model())
    values = scaling(
        {
            "type": "yarn", "factor": 4.0, "original_context_length": 1024, "yarn_beta_fast": 8.0,
            "yarn_beta_slow": 2.0,
        }
    )  # fmt: skip
    found = transformers.AutoModelForCausalLM.from_pretrained(converted(tmp_path, values))
    tokens = torch.arange(64)[None]
    with torch.no_grad():
        expected = reference(tokens).logits
        assert torch.equal(found.eval()(tokens).logits, expected)
        reference.model.rotary_emb.inv_freq = llama_usual_betas(config)
        assert (reference(tokens).logits - expected).abs().max() > 1.0  # else the betas would not be tested


def llama_usual_betas(config: transformers.LlamaConfig) -> torch.Tensor:
    config.rope_parameters |= {"beta_fast": 32.0, "beta_slow": 1.0}
    return transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[0]


def test_llama3_factors(tmp_path: Path) -> None:
    values, tensors = metadata() | {"llama.rope.freq_base": 500_000.0}, as_gguf(model())
    tensors["rope_freqs.weight"] = llama3_factors()
    from_gguf(write(tmp_path / "m.gguf", values, tensors), tmp_path / "hf")
    assert config_of(tmp_path / "hf").rope == scheme("llama3", base=500_000.0, factor=8.0, pretrained_window=8192)
    with pytest.raises(InputError, match=r"rope scaling factor is 2.0 beside rope_freqs.weight; expected one"):
        from_gguf(write(tmp_path / "s.gguf", values | scaling({"factor": 2.0}), tensors), tmp_path / "other")
    tensors["rope_freqs.weight"] = llama3_factors() + np.arange(HEAD_DIM // 2, dtype=np.float32)
    with pytest.raises(InputError, match="holds factors that are not Llama 3's"):
        from_gguf(write(tmp_path / "n.gguf", values, tensors), tmp_path / "other")


def test_sentencepiece_tokenizer_comes_back(tmp_path: Path, sentencepiece_directory: Path, texts: list[str]) -> None:
    source = sentencepiece_directory / "tokenizer.model"
    proto = vars(sentencepiece_model_pb2)["ModelProto"].FromString(source.read_bytes())
    values = metadata() | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.chat_template": "{{ messages }}",
    }  # no ids: llama.cpp takes 1, 2 and 0 then
    from_gguf(write(tmp_path / "m.gguf", values, as_gguf(model())), tmp_path / "hf")
    found = load_tokenizer(tmp_path / "hf")
    library = sentencepiece.SentencePieceProcessor(model_file=str(source))
    for text in [*texts, "日本 🎉", "  two"]:
        assert found.encode(text) == library.encode(text)
    assert (found.bos_id, found.eos_id, found.unk_id, found.pad_id) == (1, 2, 0, None)
    assert found.chat_template == "{{ messages }}"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert theirs.encode("hello there") == [1, *library.encode("hello there")]


def merged(before: str, adds_bos: bool) -> Metadata:
    """A tiny vocabulary: digits, pairs and triples of digits, a special and a user-defined token."""
    pieces = ["<|a|>", *"0123456789", "12", "123", "1234", "<|u|>", "Ċ", "ĊĊ"]
    kinds = [3, *[1] * 13, 4, 1, 1]
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": before, "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": ["1 2", "12 3", "123 4", "Ċ Ċ"],
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": adds_bos,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("smollm", ["1", "2", "3", "4", "ĊĊ", "1"]),  # every digit by itself
        ("llama-bpe", ["123", "4", "ĊĊ", "1"]),  # at most three digits
        ("gpt-2", ["1234", "Ċ", "Ċ", "1"]),  # a run of digits; the last space belongs to what follows
        ("default", ["123", "4", "Ċ", "Ċ", "1"]),  # as gpt-2, then three digits at a time
    ],
)
def test_text_is_cut_as_the_file_says(tmp_path: Path, before: str, expected: list[str]) -> None:
    values = merged(before, adds_bos=before == "llama-bpe")
    directory = converted(tmp_path, values)
    found = load_tokenizer(directory)
    pieces = values["tokenizer.ggml.tokens"]
    assert [pieces[i] for i in found.encode("1234\n\n1")] == expected
    assert found.encode("<|a|><|u|>", special=True) == [0, 14]
    assert found.encode("1<|u|>") == [2, 14]
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs.encode("1") == ([0, 2] if before == "llama-bpe" else [2])


def test_splittings_are_those_of_the_libraries(texts: list[str]) -> None:
    """Against pre-tokenizers that were written by others; what llama.cpp's `default` adds to GPT-2's is spelled out."""
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    punctuation = pre_tokenizers.Split(tokenizers.Regex(r"[\p{P}$+<=>^~|]+"), "isolated")
    numbers = pre_tokenizers.Sequence([punctuation, plain])
    for text in texts[:40]:
        for name, expected in (("gpt-2", plain), ("smollm", digits)):
            assert cut(name, text) == [piece for piece, _ in expected.pre_tokenize_str(text)], name
        threes = [
            part
            for piece, _ in numbers.pre_tokenize_str(text)
            for number in re.split(r"([0-9]+)", piece)
            for part in (re.findall(r"[0-9]{1,3}", number) if number.isdecimal() else [number])
            if part
        ]
        assert [piece for piece in cut("default", text) if piece != "Ġ"] == [piece for piece in threes if piece != "Ġ"]
    assert cut("default", "a, 12345") == ["a", ",", "Ġ", "123", "45"]
    pattern = inspect.signature(TikTokenConverter.__init__).parameters["pattern"].default
    assert SPLITTINGS["llama3"].patterns == (pattern,)


def cut(name: str, text: str) -> list[str]:
    return [piece for piece, _ in pre_tokenizer(SPLITTINGS[name]).pre_tokenize_str(text)]


@pytest.mark.parametrize(
    ("before", "says", "adds"),
    [
        *((name, None, True) for name in ("llama-bpe", "llama3", "llama-v3", "falcon3")),
        ("llama3", False, False),
        *((name, None, False) for name in ("smollm", "gpt-2", "default", None)),
        ("smollm", True, True),
    ],
)
def test_bos_as_llama_cpp_adds_it(tmp_path: Path, before: str | None, says: bool | None, adds: bool) -> None:
    values = merged(before or "", adds_bos=bool(says))
    for name, given in (("add_bos_token", says), ("pre", before)):
        if given is None:
            del values[f"tokenizer.ggml.{name}"]
    directory = converted(tmp_path, values)
    assert load_tokenizer(directory).adds_bos is adds
    assert transformers.AutoTokenizer.from_pretrained(directory).encode("1") == ([0, 2] if adds else [2])


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"eos": 0}, (0,)),
        ({"eos": 0, "eot": 1}, (0, 1)),
        ({"eos": 0, "eot": 1, "eom": 2}, (0, 1, 2)),
        ({"eos": 0, "eot": 0}, (0,)),
        ({"eot": 1}, (1,)),
        ({}, ()),
    ],
)
def test_every_end_of_a_turn_ends_a_generation(
    tmp_path: Path, named: dict[str, int], expected: tuple[int, ...]
) -> None:
    values = merged("gpt-2", adds_bos=False) | {"tokenizer.ggml.token_type": [3] * 17}
    del values["tokenizer.ggml.eos_token_id"]
    values |= {f"tokenizer.ggml.{role}_token_id": i for role, i in named.items()}
    directory = converted(tmp_path, values)
    assert load_tokenizer(directory).eos_ids == expected
    found = config_of(directory).eos_token_id
    assert found == (expected if len(expected) > 1 else expected[0] if expected else None)
    assert load_tokenizer(directory).eos_id == (expected[0] if expected else None)


def test_llama3_files_without_keys_for_the_ends(tmp_path: Path) -> None:
    """Meta's generation_config.json of Llama 3.1 Instruct lists all three; its GGUF files name the last alone."""
    values = merged("llama-bpe", adds_bos=True)
    pieces = [*values["tokenizer.ggml.tokens"], "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>"]
    kinds = [*values["tokenizer.ggml.token_type"], 3, 3, 3, 1]  # the fourth is text like any other
    values |= {
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.eos_token_id": 19,
    }
    directory = converted(tmp_path, values)
    assert load_tokenizer(directory).eos_ids == (19, 17, 18)
    generation = transformers.GenerationConfig.from_pretrained(directory)
    assert generation.eos_token_id == [19, 17, 18] and generation.bos_token_id == 0


def test_named_chat_templates_and_eos(tmp_path: Path) -> None:
    values = merged("gpt-2", adds_bos=False) | {
        "tokenizer.chat_template": "a", "tokenizer.chat_templates": ["tool_use"],
        "tokenizer.chat_template.tool_use": "b", "tokenizer.ggml.add_eos_token": True,
    }  # fmt: skip
    directory = converted(tmp_path, values)
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs.chat_template == {"default": "a", "tool_use": "b"}
    assert theirs.encode("1") == [2, 0]
    assert load_tokenizer(directory).chat_template == "a"


def changed(**changes: Any) -> Callable[[Metadata, Tensors], None]:
    def change(values: Metadata, tensors: Tensors) -> None:
        for key, value in changes.items():
            name = key.replace("__", ".")
            values.pop(name, None)
            if value is not None:
                values[name] = value

    return change


def tokenizer_changed(**changes: Any) -> Callable[[Metadata, Tensors], None]:
    """The same over a file that has a tokenizer, by what follows `tokenizer.ggml.` in the key."""

    def change(values: Metadata, tensors: Tensors) -> None:
        values.update(merged("smollm", adds_bos=False))
        changed(**{f"tokenizer__ggml__{key}": value for key, value in changes.items()})(values, tensors)

    return change


def sentencepiece_changed(**changes: Any) -> Callable[[Metadata, Tensors], None]:
    return tokenizer_changed(
        **{"model": "llama", "pre": None, "merges": None, "scores": [0.0] * 17, "unknown_token_id": 0} | changes
    )


def yarn_changed(**changes: Any) -> Callable[[Metadata, Tensors], object]:
    return lambda values, tensors: values.update(scaling({"type": "yarn", "factor": 4.0, **changes}))


BAD: dict[str, tuple[Callable[[Metadata, Tensors], object], str]] = {
    "missing key": (changed(llama__block_count=None), "metadata has no llama.block_count; expected a whole number"),
    "key of another type": (
        changed(llama__context_length="4096"), "llama.context_length is '4096', expected a whole number above 0"
    ),
    "no heads": (changed(llama__attention__head_count=0), "head_count is 0, expected a whole number above 0"),
    "heads that do not share": (
        changed(llama__attention__head_count_kv=3),
        "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    "no epsilon": (
        changed(llama__attention__layer_norm_rms_epsilon=0.0),
        "layer_norm_rms_epsilon is 0.0, expected a number above 0",
    ),
    "more layers than tensors": (changed(llama__block_count=10**9), "expected no more than there are tensors, 29"),
    "head counts that differ": (
        changed(llama__attention__head_count=[4, 2]),
        r"head_count is \[4, 2\], expected one whole number above 0, the same for all 2 layers",
    ),
    "key head counts that differ": (
        changed(llama__attention__head_count_kv=[2, 4]), r"head_count_kv is \[2, 4\], expected one"
    ),
    "widths that differ": (
        changed(llama__feed_forward_length=[96, 64]), r"feed_forward_length is \[96, 64\], expected one"
    ),
    "too many widths": (changed(llama__feed_forward_length=[96] * 3), r"is \[96, 96, 96\], expected one .* 2 layers"),
    "experts": (changed(llama__expert_count=8), "llama.expert_count is 8, expected 0: a dense model"),
    "partial rotation": (
        changed(llama__rope__dimension_count=8), "dimension_count is 8, expected 16: the whole head is rotated"
    ),
    "rope kind": (
        changed(llama__rope__scaling__type="longrope"),
        "rope scaling type is 'longrope', expected one of none, linear, yarn",
    ),
    "unknown rope key": (
        changed(llama__rope__scaling__low_freq_factor=1.0),
        r"key llama.rope.scaling.low_freq_factor \(value 1.0\) is not understood; .* docs/gguf.md",
    ),
    "unknown attention key": (changed(llama__attention__temperature_scale=0.1), "temperature_scale .* not understood"),
    "unknown key of the model": (changed(llama__ssm__state_size=4), "llama.ssm.state_size .* not understood"),
    "negative factor": (changed(llama__rope__scaling__factor=-2.0), "factor is -2.0, expected a number above 0"),
    "magnitude without YaRN": (
        changed(llama__rope__scaling__attn_factor=0.5), "attn_factor is 0.5, expected 1.0: YaRN alone"
    ),
    "YaRN's magnitude of unclear meaning": (
        yarn_changed(yarn_attn_factor=1.0), r"yarn_attn_factor is 1.0, expected none or 1.138629,"
    ),
    "half a ramp": (yarn_changed(yarn_ext_factor=0.5), "yarn_ext_factor is 0.5, expected 1.0 with YaRN and 0.0"),
    "ramp without YaRN": (changed(llama__rope__scaling__yarn_ext_factor=1.0), "yarn_ext_factor is 1.0, expected 1.0 w"),
    "betas in the wrong order": (
        yarn_changed(yarn_beta_fast=1.0, yarn_beta_slow=2.0), "beta_fast must be more than beta_slow"
    ),
    "adapter": (changed(general__type="adapter"), "general.type is 'adapter', expected 'model'"),
    "old blocks": (changed(general__quantization_version=1), "general.quantization_version is 1, expected 2"),
    "tokenizer kind": (tokenizer_changed(model="bert"), "tokenizer model is 'bert', expected 'gpt2'"),
    "tokenizer of no kind": (tokenizer_changed(model=None), "metadata has no tokenizer.ggml.model; expected a string"),
    "pre-tokenizer": (tokenizer_changed(pre="smolm"), "unknown pre-tokenizer .* 'smolm': did you mean 'smollm'"),
    "no tokens": (tokenizer_changed(tokens=None), "metadata has no tokenizer.ggml.tokens; expected an array of str"),
    "no token types": (tokenizer_changed(token_type=None), "metadata has no tokenizer.ggml.token_type"),
    "no merges": (tokenizer_changed(merges=None), "metadata has no tokenizer.ggml.merges"),
    "no scores": (sentencepiece_changed(scores=None), "metadata has no tokenizer.ggml.scores"),
    "few token types": (
        tokenizer_changed(token_type=[1]), "token_type has 1 entries, expected one for each of the 17 tokens"
    ),
    "few scores": (sentencepiece_changed(scores=[0.0]), "scores has 1 entries, expected one for each"),
    "strange token type": (tokenizer_changed(token_type=[7] * 17), "token_type has 7, expected 1 to 6"),
    "strange merges": (tokenizer_changed(merges=["1 no"]), "tokenizer.ggml.merges makes no tokenizer: .*no"),
    "a token twice": (tokenizer_changed(tokens=["a"] * 17), "tokens has 'a' at 0 and at 1; expected each token once"),
    "no unknown piece": (sentencepiece_changed(), "tokens makes no SentencePiece model: .*unk"),
    "id out of range": (tokenizer_changed(eos_token_id=17), "eos_token_id is 17, expected one of the 17 tokens"),
    "end of turn out of range": (tokenizer_changed(eot_token_id=99), "eot_token_id is 99, expected one of the 17"),
    "BOS asked for without an id": (
        tokenizer_changed(add_bos_token=True, bos_token_id=None),
        "metadata has no tokenizer.ggml.bos_token_id, and texts get that token by tokenizer.ggml.add_bos_token true",
    ),
    "BOS by default without an id": (
        tokenizer_changed(add_bos_token=None, bos_token_id=None, pre="llama-bpe"),
        "no tokenizer.ggml.bos_token_id, and texts get that token by tokenizer.ggml.pre 'llama-bpe'",
    ),
    "unknown tokenizer key": (tokenizer_changed(byte_order="up"), "tokenizer.ggml.byte_order .* is not understood"),
    "other spaces": (tokenizer_changed(remove_extra_whitespaces=True), "whitespaces is True, expected false: LLaMA's"),
    "more tokens than rows": (
        lambda values, tensors: (
            tokenizer_changed()(values, tensors),
            tensors.update({"token_embd.weight": np.ones((16, HIDDEN), np.float32)}),
        ),
        "the tokenizer has 17 tokens, expected at most 16",
    ),
    "another vocabulary": (changed(llama__vocab_size=99), "vocab_size is 99, expected 1500, the rows of token_embd"),
    "missing tensor": (
        lambda values, tensors: tensors.pop("blk.1.ffn_up.weight"),
        r"tensor blk.1.ffn_up.weight is missing; expected shape \[96, 64\]",
    ),
    "no embedding": (lambda values, tensors: tensors.pop("token_embd.weight"), "token_embd.weight is missing"),
    "no tensors": (lambda values, tensors: tensors.clear(), r"token_embd.weight is missing, .* \(0 tensors\)"),
    "flat embedding": (
        lambda values, tensors: tensors.update({"token_embd.weight": np.ones(32, np.float32)}),
        r"token_embd.weight has shape \[32\], expected \[tokens, 64\]",
    ),
    "mis-shaped tensor": (
        lambda values, tensors: tensors.update({"output_norm.weight": np.ones(32, np.float32)}),
        r"tensor output_norm.weight has shape \[32\], expected \[64\]",
    ),
    "extra tensor": (
        lambda values, tensors: tensors.update({"blk.0.more": np.ones(32, np.float32)}),
        r"tensor blk.0.more is not part of this model \(1 such\)",
    ),
    "tensor of experts": (
        lambda values, tensors: tensors.update({"blk.0.ffn_gate_exps.weight": np.ones((2, 96, 64), np.float32)}),
        "tensor blk.0.ffn_gate_exps.weight is not part of this model",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_files(tmp_path: Path, case: str) -> None:
    spoil, message = BAD[case]
    values, tensors = metadata(), as_gguf(model())
    spoil(values, tensors)
    path = write(tmp_path / "m.gguf", values, tensors)
    with pytest.raises(InputError, match=message) as caught:
        from_gguf(path, tmp_path / "out" / "hf")
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert not (tmp_path / "out" / "hf").exists()


def asks_for_nothing() -> Metadata:
    """Every key that is harmless, or that has one value with which the model is LLaMA's."""
    zero = ("expert_count", "expert_used_count", "attention.sliding_window")
    off = ("attention.clamp_kqv", "attention.max_alibi_bias", "attn_logit_softcapping", "final_logit_softcapping")
    one = ("logit_scale", "residual_scale", "embedding_scale")
    scaled = ("alpha", "yarn_log_multiplier", "yarn_ext_factor")
    return {
        **{f"llama.{key}": 0 for key in zero},
        **{f"llama.{key}": 0.0 for key in off},
        **{f"llama.{key}": 1.0 for key in one},
        **scaling(dict.fromkeys(scaled, 0.0) | {"finetuned": True}),
        "llama.vocab_size": VOCABULARY, "llama.attention.value_length": HEAD_DIM, "llama.attention.causal": True,
        "llama.attention.scale": HEAD_DIM**-0.5, "llama.tensor_data_layout": "Meta AI original pth",
        "llama.use_parallel_residual": False, "llama.attention.key_length": HEAD_DIM,
        "general.type": "model", "general.quantization_version": 2, "general.name": "anything",
        "tokenizer.ggml.fim_pre_token_id": 1, "tokenizer.ggml.mask_token_id": 1, "tokenizer.huggingface.json": "{}",
        "tokenizer.ggml.add_sep_token": False, "other.rope.key": 3,
    }  # fmt: skip


def test_keys_that_ask_for_nothing(tmp_path: Path) -> None:
    values = asks_for_nothing()
    fixed = {f"llama.{key}" for key in (*ours.FIXED, *ours.HARMLESS)}
    assert fixed - {"llama.rope.dimension_count"} <= values.keys()
    plain = config_of(converted(tmp_path / "plain", merged("smollm", adds_bos=False)))
    assert config_of(converted(tmp_path / "more", merged("smollm", adds_bos=False) | values)) == plain


def test_sizes_once_a_layer(tmp_path: Path) -> None:
    values = {
        "llama.attention.head_count": [HEADS] * LAYERS, "llama.attention.head_count_kv": [KEY_HEADS] * LAYERS,
        "llama.feed_forward_length": [WIDE] * LAYERS,
    }  # fmt: skip
    found = config_of(converted(tmp_path, values))
    assert (found.num_attention_heads, found.num_key_value_heads) == (HEADS, KEY_HEADS)
    assert found.intermediate_size == WIDE


def test_big_endian_files(tmp_path: Path) -> None:
    state, big = model(), gguf.GGUFEndian.BIG
    tensors, half = as_gguf(state), gguf.GGMLQuantizationType.F16
    tensors |= {name: array.astype(np.float16) for name, array in tensors.items() if "attn_v.weight" in name}
    values = metadata() | merged("smollm", adds_bos=False)
    from_gguf(write(tmp_path / "b.gguf", values, tensors, endianess=big), tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for name, value in state.items():
        assert torch.equal(found[name], value.half().float() if "v_proj.weight" in name else value), name
    assert load_tokenizer(tmp_path / "hf").encode("12") == [2, 3] and half.name == "F16"
    kinds = {"token_embd.weight": gguf.GGMLQuantizationType.Q8_0}
    path = write(tmp_path / "q.gguf", values, as_gguf(state), kinds, endianess=big)
    with pytest.raises(
        InputError, match=r"big-endian file whose tensor token_embd.weight is Q8_0; expected F32 or F16"
    ):
        from_gguf(path, tmp_path / "other")


def test_split_files(tmp_path: Path) -> None:
    state, values = model(), metadata() | merged("smollm", adds_bos=False)
    write(tmp_path / "m.gguf", values, as_gguf(state), split_max_tensors=12)
    parts = sorted(tmp_path.glob("m-*.gguf"))
    assert [part.name for part in parts] == [f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    for part in (parts[0], parts[2]):
        from_gguf(part, tmp_path / "hf", overwrite=True)
        found = load_file(tmp_path / "hf" / "model.safetensors")
        assert all(torch.equal(found[name], value) for name, value in state.items()) and len(found) == len(state)
    assert load_tokenizer(tmp_path / "hf").encode("12") == [2, 3]
    elsewhere = shutil.copy(parts[1], tmp_path / "second.gguf")
    with pytest.raises(InputError, match=r"one of 3 parts .* not named NAME-00001-of-00003.gguf; .*--merge"):
        from_gguf(elsewhere, tmp_path / "other")
    shutil.copy(parts[1], parts[2])
    with pytest.raises(InputError, match=r"00003-of-00003.gguf: split.no is 1 and split.count 3, expected 2 and 3"):
        from_gguf(parts[0], tmp_path / "other")
    parts[2].unlink()
    with pytest.raises(InputError, match=r"m-00003-of-00003.gguf: no such file"):
        from_gguf(parts[0], tmp_path / "other")


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "m.gguf", metadata(), as_gguf(model()), arch="qwen2")
    with pytest.raises(InputError, match="architecture is 'qwen2', expected 'llama'"):
        from_gguf(path, tmp_path / "hf")
    with pytest.raises(InputError, match="dtype is 'int8', expected one of float32"):
        from_gguf(path, tmp_path / "hf", dtype="int8")
    with pytest.raises(InputError, match="no such file"):
        from_gguf(tmp_path / "none.gguf", tmp_path / "hf")
    with pytest.raises(InputError, match=r"a directory; expected a \.gguf file"):
        from_gguf(tmp_path, tmp_path / "hf")
    path = write(tmp_path / "m.gguf", metadata() | merged("smollm", adds_bos=False), as_gguf(model()))
    whole = path.read_bytes()
    (tmp_path / "bad.gguf").write_bytes(b"GGML" + whole[4:])
    with pytest.raises(InputError, match="not a whole GGUF file: GGUF magic invalid"):
        from_gguf(tmp_path / "bad.gguf", tmp_path / "hf")
    types = whole.index(b"tokenizer.ggml.token_type") + len(b"tokenizer.ggml.token_type")
    for length in (0, 3, 20, 1000, types + 20, len(whole) // 2, len(whole) - 1):
        (tmp_path / "bad.gguf").write_bytes(whole[:length])
        with pytest.raises(InputError, match="not a whole GGUF file"):
            from_gguf(tmp_path / "bad.gguf", tmp_path / "hf")
    # An array that claims more entries than any file has: the package's reader would count them all.
    (tmp_path / "bad.gguf").write_bytes(whole[: types + 8] + b"\x7f" * 8 + whole[types + 16 : types + 99])
    with pytest.raises(InputError, match=r"not a whole GGUF file: it ends at byte [\d,]+, before"):
        from_gguf(tmp_path / "bad.gguf", tmp_path / "hf")

    def unknown(*arguments: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(gguf.quants, "dequantize", unknown)
    with pytest.raises(InputError, match=r"is quantised as F32, which the gguf package does not dequantise"):
        from_gguf(path, tmp_path / "hf")
    assert not (tmp_path / "hf").exists() and not list(tmp_path.glob(".*"))


def test_the_page_names_every_key() -> None:
    """docs/gguf.md says of each key what is done with it: the tables in the code, word for word."""
    rows = re.findall(r"^\| (`.*`) \| (read|harmless|one value) ", PAGE.read_text(), re.MULTILINE)
    found = {key: status for keys, status in rows for key in re.findall(r"`([^`]+)`", keys)}
    expected = {f"llama.{key}": "read" for key in ours.KEYS}
    expected |= {f"llama.{key}": "harmless" for key in ours.HARMLESS}
    expected |= {f"llama.{key}": "one value" for key in ours.FIXED} | dict.fromkeys(ours.GENERAL, "one value")
    expected |= dict.fromkeys(gguf_tokenizer.READ, "read") | dict.fromkeys(gguf_tokenizer.HARMLESS, "harmless")
    expected |= dict.fromkeys(gguf_tokenizer.FIXED, "one value")
    extra = {"general.architecture", "split.no", "split.count", "split.tensors.count", "tokenizer.chat_template.NAME"}
    assert found == expected | dict.fromkeys(extra, "read")
