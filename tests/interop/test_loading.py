"""Models from every kind of directory and entry, and what each device and the host hold while they are read."""

import dataclasses
import gc
import json
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from hf_directories import make, tensors

import eabf_jax
from eabf_jax.errors import InputError
from eabf_jax.evaluation.perplexity import position_losses
from eabf_jax.inference import Generator, generate
from eabf_jax.inference.placement import weights_on
from eabf_jax.interop import native
from eabf_jax.interop.adapter import Adapter, digest
from eabf_jax.interop.huggingface import config_from_hf, from_hf, open_leaves, to_hf
from eabf_jax.interop.loading import load_parameters, open_weights, parse_entry, read_config
from eabf_jax.interop.safetensors_stream import StoredTensor
from eabf_jax.model import Llama
from eabf_jax.model.lora import Lora, split_trained
from eabf_jax.model.parameters import flatten, nest, parameters
from eabf_jax.parallel.mesh import MeshConfig, make_mesh
from eabf_jax.rope import scheme

TINY = Path(__file__).parents[2] / "assets/tiny"
SIZES = {
    "vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6,
    "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64, "tie_word_embeddings": True,
    "initializer_range": 0.1,
}  # fmt: skip
LAYERS, KERNEL, WIDE = 6, 4 * 256 * 256, 4 * 256 * 512  # bytes of a square and of a wide kernel of one layer
EMBEDDING = 4 * 1024 * 256
TOTAL = LAYERS * (4 * KERNEL + 3 * WIDE) + EMBEDDING
NORMS = 4 * (2 * LAYERS + 1) * 256  # small, so each device holds all of them
# Rows, positions and the like; far less than one kernel.
SLACK = 40_000
KINDS = ("hf", "native", "adapters")
LORA = Lora(rank=4, alpha=8.0, targets=("q_proj", "down_proj"), train_embeddings=False, train_norms=True)


@pytest.fixture(scope="module", autouse=True)
def little_to_collect() -> None:
    """What other tests have left stays: a collection here looks at this file's objects alone."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model in three forms, and `merged`, the form with adapters as exported for transformers."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).save_pretrained(root / "hf", max_shard_size="3MB")
    from_hf(root / "hf", root / "native")
    (root / "adapters").mkdir()
    config, generator = read_config(root / "hf"), np.random.default_rng(0)
    told = Adapter(LORA, str(root / "hf"), digest(open_leaves(root / "hf")))
    native.write_model_json(root / "adapters", config, adapter=told.to_json())
    shapes = split_trained(Llama.abstract(config, lora=LORA).parameters(), LORA)[0]
    drawn = jax.tree.map(lambda leaf: generator.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
    native.save_params(root / "adapters", drawn)
    to_hf(root / "adapters", root / "merged")
    return root


@pytest.fixture(scope="module")
def logits_of(directories: Path) -> Callable[[str, np.ndarray], np.ndarray]:
    """Returns a function that computes transformers' logits of a model without a cache."""

    def logits(kind: str, tokens: np.ndarray) -> np.ndarray:
        name = "merged" if kind == "adapters" else "hf"
        model = transformers.LlamaForCausalLM.from_pretrained(directories / name, dtype=torch.float32)
        with torch.no_grad():
            return model(torch.tensor(tokens)).logits.numpy()

    return logits


def on_each_device() -> int:
    """Returns the bytes of JAX arrays on the device that holds the most."""
    held = dict.fromkeys(jax.devices(), 0)
    for array in jax.live_arrays():
        # Not from the shards' data, which would become live arrays too.
        size = math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize
        for device in array.sharding.device_set:
            held[device] += size
    return max(held.values())


@contextmanager
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Samples `on_each_device` continuously, and whenever an array is put on devices."""
    gc.collect()  # models of earlier tests
    before, found, done = on_each_device(), [0], threading.Event()

    def sample() -> None:
        found[0] = max(found[0], on_each_device() - before)

    def sampled(function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            result = function(*arguments, **options)
            sample()
            return result

        return call

    def go_on() -> None:
        while not done.wait(0.001):
            sample()

    with monkeypatch.context() as patch:
        for name in ("device_put", "make_array_from_callback"):
            patch.setattr(jax, name, sampled(getattr(jax, name)))
        patch.setattr(native, "place_leaf", sampled(native.place_leaf))
        thread = threading.Thread(target=go_on)
        thread.start()
        try:
            yield found
        finally:
            done.set()
            thread.join()
    sample()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_a_device_holds_its_share_and_never_more_than_one_parameter_besides(
    directories: Path, logits_of: Callable, kind: str, sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = make_mesh(MeshConfig(**sizes))
    split = math.prod(sizes.values()) // sizes.get("data", 1)
    share = TOTAL / split + NORMS
    gc.collect()
    before = on_each_device()
    with watched(monkeypatch) as peak:
        model, _ = eabf_jax.load(directories / kind, dtype="float32", mesh=mesh)
    assert share - SLACK <= on_each_device() - before <= share + SLACK
    assert peak[0] <= share + LAYERS * WIDE / split + SLACK
    tokens = np.random.default_rng(1).integers(0, 1024, (8, 24))
    found = jax.jit(lambda model, tokens: model(tokens))(model, tokens)
    np.testing.assert_allclose(found, logits_of(kind, tokens), atol=1e-4)  # the project's promise for float32
    half, _ = eabf_jax.load(directories / kind, mesh=mesh)
    assert {leaf.dtype.name for _, leaf in flatten(half.parameters())} == {"bfloat16"}


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes read that host memory holds now, and their maximum."""
    held = {"now": 0, "most": 0}

    def counted(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        def call(*arguments: object) -> np.ndarray:
            array = function(*arguments)
            memory = array
            while isinstance(memory.base, np.ndarray):
                memory = memory.base
            held["now"] += array.nbytes
            held["most"] = max(held["most"], held["now"])
            weakref.finalize(memory, lambda size=array.nbytes: held.update(now=held["now"] - size))
            return array

        return call

    monkeypatch.setattr(native, "empty_leaf", counted(native.empty_leaf))
    monkeypatch.setattr(native, "read_leaf", counted(native.read_leaf))
    monkeypatch.setattr(StoredTensor, "read", counted(StoredTensor.read))
    return held


def test_the_host_holds_one_parameter_at_a_time(directories: Path, held: dict[str, int]) -> None:
    """The largest is a wide kernel of all layers, filled with one layer's tensor at a time."""
    # On a mesh that splits every large array, no CPU device reuses the host's memory.
    model, _ = eabf_jax.load(directories / "hf", dtype="float32", mesh=make_mesh(MeshConfig()))
    assert LAYERS * WIDE < held["most"] <= (LAYERS + 1) * WIDE + NORMS
    assert held["now"] <= NORMS
    del model


@pytest.mark.parametrize("kind", ["hf", "native"])
def test_decode_weights_are_read_one_layer_of_one_parameter_at_a_time(
    tmp_path: Path, held: dict[str, int], kind: str
) -> None:
    sizes = SIZES | {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 48}
    config, generator = config_from_hf(sizes | {"model_type": "llama"}), np.random.default_rng(4)
    (tmp_path / "native").mkdir()
    native.write_model_json(tmp_path / "native", config)
    drawn = {entry.path: generator.normal(size=entry.shape).astype(np.float32) for entry in parameters(config)}
    native.save_params(tmp_path / "native", nest(drawn))
    to_hf(tmp_path / "native", tmp_path / "hf")
    held["most"] = 0
    weights = weights_on(make_mesh(MeshConfig(fsdp=1, tensor=8)), open_weights(tmp_path / kind, dtype="float32")[0])
    stored = tensors(tmp_path / "hf")
    for index in (0, 31, 47):
        down = weights.layers[index].down
        np.testing.assert_array_equal(down, stored[f"model.layers.{index}.mlp.down_proj.weight"])
    layer = 4 * 64 * 256
    # The gate kernel may remain while up is read, and a Hugging Face tensor exists both as stored and in our layout.
    assert layer <= held["most"] <= 3 * layer


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [None, {"data": 2, "fsdp": 1, "tensor": 4}], ids=str)
def test_generation_holds_its_weights_once(
    directories: Path, logits_of: Callable, kind: str, sizes: dict[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = None if sizes is None else make_mesh(MeshConfig(**sizes))
    split = 1 if mesh is None else 4
    with watched(monkeypatch) as peak:
        generator = Generator(open_weights(directories / kind, dtype="float32")[0], mesh=mesh)
    # For a moment, two kernels of one layer also exist, both separately and joined.
    assert peak[0] <= TOTAL / split + NORMS + 2 * 2 * WIDE / split + SLACK
    prompts = np.random.default_rng(2).integers(0, 1024, (2, 20))
    expected = logits_of(kind, prompts)[:, -1]
    np.testing.assert_allclose(generator.next_token_logits(prompts), expected, atol=1e-4)
    if kind == "hf":
        model, _ = eabf_jax.load(directories / kind, dtype="float32", mesh=mesh)
        assert Generator(model).generate(prompts, 4) == generator.generate(prompts, 4)


def test_the_decode_loop_is_compiled_once_on_a_mesh(directories: Path) -> None:
    """The loop's first call gets the state after the prompt, later calls their own output."""
    generator = Generator(open_weights(directories / "hf")[0], mesh=make_mesh(MeshConfig(2, 2, 2)))
    before = generate._decode._cache_size()
    generator.generate([[1, 2, 3]], 1 + 3 * generate.TOKENS_AT_ONCE)
    shapes = 2  # caches of 32 slots, then of 64
    assert generate._decode._cache_size() == before + shapes


@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_losses_on_a_mesh_are_those_of_transformers(
    directories: Path, logits_of: Callable, sizes: dict[str, int]
) -> None:
    documents = np.random.default_rng(3).integers(0, 1024, (9, 24)).astype(np.int32)
    model, _ = eabf_jax.load(directories / "hf", dtype="float32", mesh=make_mesh(MeshConfig(**sizes)))
    log_probs = torch.tensor(logits_of("hf", documents)).log_softmax(-1).numpy()
    expected = -np.take_along_axis(log_probs[:, :-1], documents[:, 1:, None], axis=2)[..., 0]
    np.testing.assert_allclose(position_losses(model, documents), expected, atol=1e-4)


def test_meshes_that_do_not_fit(directories: Path) -> None:
    with pytest.raises(InputError, match="mesh context=2: only training splits rows"):
        eabf_jax.load(directories / "hf", mesh=make_mesh(MeshConfig(context=2)))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:3]).reshape(1, 3, 1, 1), ("data", "fsdp", "context", "tensor"))
    with pytest.raises(InputError, match=r"dimension of \d+, which the mesh splits 3 ways"):
        eabf_jax.load(directories / "hf", mesh=mesh)


@pytest.mark.parametrize("kind", ["hf", "native"])
def test_loaded_model_agrees_with_transformers(tmp_path: Path, kind: str) -> None:
    source = make(tmp_path / "hf", shard="20KB", rope_theta=5000.0, attention_bias=True)
    from_hf(source, tmp_path / "native")
    tokens = np.random.default_rng(0).integers(0, 131, (2, 40))
    with torch.no_grad():
        expected = transformers.LlamaForCausalLM.from_pretrained(source)(torch.tensor(tokens)).logits.numpy()
    model, tokenizer = eabf_jax.load(tmp_path / kind, dtype="float32")
    assert tokenizer is None
    np.testing.assert_allclose(np.asarray(model(tokens)), expected, atol=1e-4)  # the project's promise for float32
    half, _ = eabf_jax.load(tmp_path / kind, rope={"type": "pi", "base": 5000.0, "factor": 2.0})
    assert {leaf.dtype for _, leaf in flatten(half.parameters())} == {np.dtype(ml_dtypes.bfloat16)}
    assert half.config.rope == scheme("pi", base=5000.0, factor=2.0)
    again, _ = eabf_jax.load(tmp_path / kind, rope=half.config.rope)
    assert again.config == half.config


def test_load_refuses_other_dtypes_and_places(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dtype is 'int8', expected one of bfloat16"):
        eabf_jax.load(tmp_path, dtype="int8")
    with pytest.raises(InputError, match="no such directory"):
        eabf_jax.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match="directory is None; the path of a model's directory is needed"):
        eabf_jax.load(None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="neither a Hugging Face directory"):
        eabf_jax.load(tmp_path)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = eabf_jax.nothing


def test_params_arrive_sharded_and_cast(tmp_path: Path) -> None:
    source = make(tmp_path / "hf")
    from_hf(source, tmp_path / "native")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("fsdp",))
    one = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    config = native.read_model_json(tmp_path / "native")
    tree = nest({entry.path: one for entry in parameters(config)})
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    tree["layers"]["mlp"]["up_proj"]["kernel"] = split
    for directory in (source, tmp_path / "native"):
        _, params = load_parameters(directory, dtype="bfloat16", shardings=tree)
        kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
        assert kernel.sharding == split and kernel.dtype == ml_dtypes.bfloat16
        expected = tensors(source)["model.layers.2.mlp.up_proj.weight"].to(torch.bfloat16).float().numpy().T
        np.testing.assert_array_equal(np.asarray(kernel[2], np.float32), expected)
    _, plain = load_parameters(source)
    assert plain["norm"]["scale"].dtype == np.float32


def test_entries_are_labelled() -> None:
    pi = {"type": "pi", "factor": 4}
    assert parse_entry("models/a") == ("models/a", "models/a", None, None)
    assert parse_entry("x=models/a@{type: pi, factor: 4}") == ("x", "models/a", pi, None)
    assert parse_entry("x=models/a@{type: pi, factor: 4, window: 64}") == ("x", "models/a", pi, 64)
    longrope = {"type": "longrope", "factor": 2, "short_factor": [1, 1.5], "long_factor": [2, 3]}
    assert parse_entry(f"a@{json.dumps(longrope)}").rope == longrope
    for wrong in ("a@", "a@pi", "a@{factor: 4}", "a@{type: ["):
        with pytest.raises(InputError, match="expected a scheme such as"):
            parse_entry(wrong)
    for wrong in ("0", "-1", "4.5", "true", "long", "null"):
        with pytest.raises(InputError, match="a positive number of tokens is needed"):
            parse_entry(f"a@{{window: {wrong}}}")
    with pytest.raises(InputError, match="has no type; a scheme needs one"):
        parse_entry("a@{window: 64, factor: 4}")


def test_a_model_may_be_taken_for_one_with_a_smaller_window() -> None:
    own, taken = (parse_entry(f"{TINY}{told}").config for told in ("", "@{window: 64}"))
    assert taken == dataclasses.replace(own, max_position_embeddings=64) and own.max_position_embeddings == 512
