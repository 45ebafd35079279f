import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open

import eabf_jax
from eabf_jax.errors import InputError
from eabf_jax.interop import native
from eabf_jax.interop.adapter import Adapter, digest, read_adapter
from eabf_jax.interop.gguf import from_gguf
from eabf_jax.interop.gguf_writer import to_gguf
from eabf_jax.interop.huggingface import open_leaves, to_hf
from eabf_jax.model import Llama, LlamaConfig
from eabf_jax.model.lora import Lora, split_trained

CONFIG = LlamaConfig(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=4, max_position_embeddings=32,
)  # fmt: skip
LORA = Lora(rank=3, alpha=1.5, targets=("q_proj", "down_proj"), train_norms=True)


def drawn(lora=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = Llama.abstract(CONFIG, lora=lora).parameters()
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


@pytest.fixture
def base(tmp_path):
    """A native directory in bfloat16, LLaMA's usual dtype."""
    directory = tmp_path / "base"
    directory.mkdir()
    native.write_model_json(directory, CONFIG, "bfloat16")
    native.save_params(directory, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn()))
    return directory


@pytest.fixture
def run(tmp_path, base):
    """A run that has trained adapters and norms on `base`."""
    directory = tmp_path / "run"
    directory.mkdir()
    adapter = Adapter(LORA, str(base), digest(open_leaves(base)))
    native.write_model_json(directory, CONFIG, adapter=adapter.to_json())
    native.save_params(directory, split_trained(drawn(LORA, seed=1), LORA)[0], step=3)
    assert read_adapter(directory) == adapter
    return directory


def test_what_is_changed_is_exported_as_float32_and_the_rest_as_it_was(base, run, tmp_path):
    """Compares the exported weights with float64 NumPy."""
    to_hf(run, tmp_path / "hf")
    before = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), drawn())
    held = drawn(LORA, seed=1)
    with safe_open(tmp_path / "hf/model.safetensors", "np") as file:
        for block, name, adapted in (("self_attn", "q_proj", 1), ("mlp", "down_proj", 1), ("mlp", "up_proj", 0)):
            found = file.get_tensor(f"model.layers.1.{block}.{name}.weight")
            kernel = np.float64(before["layers"][block][name]["kernel"][1])
            if adapted:
                a, b = (np.float64(held["layers"][block][name][leaf][1]) for leaf in ("lora_a", "lora_b"))
                kernel = kernel + a @ b * 0.5
            assert found.dtype == (np.float32 if adapted else jnp.bfloat16)
            # The error of rounding a sum of four numbers of order one to float32.
            np.testing.assert_allclose(np.float64(found), kernel.T, rtol=0, atol=1e-6 if adapted else 0)
        np.testing.assert_array_equal(file.get_tensor("model.norm.weight"), held["norm"]["scale"])
        assert file.get_tensor("model.embed_tokens.weight").dtype == jnp.bfloat16
    to_hf(run, tmp_path / "narrow", dtype="bfloat16")
    with safe_open(tmp_path / "narrow/model.safetensors", "np") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {np.dtype(jnp.bfloat16)}  # noqa: SIM118


def test_loading_is_exporting(run, tmp_path):
    to_hf(run, tmp_path / "hf")
    apart, exported = (eabf_jax.load(path, dtype="float32")[0].parameters() for path in (run, tmp_path / "hf"))
    jax.tree.map(np.testing.assert_array_equal, apart, exported)


def test_a_gguf_file_holds_the_merged_model(run, base, tmp_path):
    moved = base.rename(tmp_path / "moved")
    to_hf(run, tmp_path / "hf", base=moved, step=3)
    to_gguf(run, tmp_path / "m.gguf", base=moved, step=3)
    from_gguf(tmp_path / "m.gguf", tmp_path / "back")
    exported, back = (eabf_jax.load(tmp_path / name, dtype="float32")[0].parameters() for name in ("hf", "back"))
    jax.tree.map(np.testing.assert_array_equal, exported, back)


def test_a_digest_tells_models_apart_and_not_their_formats(base, tmp_path):
    to_hf(base, tmp_path / "hf")
    assert digest(open_leaves(base)) == digest(open_leaves(tmp_path / "hf"))
    other = tmp_path / "other"
    other.mkdir()
    native.write_model_json(other, CONFIG)
    native.save_params(other, drawn(seed=5))
    assert digest(open_leaves(base)) != digest(open_leaves(other))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda told: told.pop("base"), "model.json: key 'adapter.base' is missing; text is needed"),
        (lambda told: told.pop("alpha"), "key 'adapter.alpha' is missing; a finite number is needed"),
        (lambda told: told.update(more=1), "model.json: unknown key 'adapter.more'"),
        (lambda told: told.update(targets=3), "'adapter.targets' is 3; a list of names is needed"),
        (lambda told: told.update(rank="many"), "'adapter.rank' is 'many'; an integer is needed"),
        (lambda told: told.update(targets=["q_porj"]), "did you mean 'q_proj'"),
        (lambda told: told.update(rank=2), r"q_proj\.lora_a has shape \[2, 16, 3\], expected \[2, 16, 2\]"),
        (lambda told: told.update(targets=["q_proj"]), r"layers\.mlp\.down_proj\.lora_a is not part of this model"),
        (lambda told: told.update(base_digest="0" * 16), "expected 0000000000000000"),
    ],
)
def test_a_damaged_description_is_refused_in_one_line(run, change, message):
    path = run / "model.json"
    found = json.loads(path.read_text())
    change(found["adapter"])
    path.write_text(json.dumps(found))
    with pytest.raises(InputError, match=message) as error:
        eabf_jax.load(run)
    assert "\n" not in str(error.value)


def test_a_whole_model_is_no_adapter(base):
    assert read_adapter(base) is None
    with pytest.raises(InputError, match="is a whole model and takes no base"):
        eabf_jax.load(base, base=base)
