"""Native directories that are incomplete, damaged, or of another model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import eabf_jax
from eabf_jax.errors import InputError
from eabf_jax.interop.huggingface import from_hf, to_hf
from eabf_jax.interop.loading import load_parameters


def edit_model(**changes: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        values = json.loads((directory / "model.json").read_text())
        (directory / "model.json").write_text(json.dumps({**values, **changes}))

    return edit


def lose_chunks(directory: Path) -> None:
    for path in (directory / "checkpoints" / "0" / "params").rglob("d/*"):
        path.unlink()


BAD_NATIVE = {
    "unknown field": (edit_model(colour=1), "model.json: unknown model field 'colour'"),
    "missing field": (
        edit_model(hidden_size=None),
        "model.json: model field 'hidden_size' is None; an integer is needed",
    ),
    "rope": (edit_model(rope="eabf"), "model field 'rope' is 'eabf'; a mapping of keys is needed"),
    "other shape": (
        edit_model(intermediate_size=50),
        r"parameter layers.mlp.gate_proj.kernel has shape \[3, 32, 48\], expected \[3, 32, 50\]",
    ),
    "missing": (edit_model(attention_bias=True), r"parameter layers.self_attn.q_proj.bias is missing"),
    "extra": (edit_model(tie_word_embeddings=True), r"parameter lm_head.kernel is not part of this model"),
    "no checkpoint": (lambda d: shutil.rmtree(d / "checkpoints"), "no checkpoint there"),
    "no metadata": (lambda d: (d / "checkpoints/0/params/_METADATA").unlink(), "damaged checkpoint"),
    "no data": (lose_chunks, "damaged checkpoint"),
}


@pytest.mark.parametrize("case", BAD_NATIVE)
def test_bad_native_directory(good: Path, tmp_path: Path, case: str) -> None:
    spoil, message = BAD_NATIVE[case]
    from_hf(good, tmp_path / "native")
    spoil(tmp_path / "native")
    for action in (lambda d: to_hf(d, tmp_path / "out" / "hf"), eabf_jax.load):
        with pytest.raises(InputError, match=message) as caught:
            action(tmp_path / "native")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "hf").exists()


def test_truncated_checkpoint(good: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from_hf(good, tmp_path / "native")
    files = (tmp_path / "native" / "checkpoints").rglob("ocdbt.process_0/d/*")
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])
    with pytest.raises(InputError, match="damaged checkpoint"):
        load_parameters(tmp_path / "native")
    assert "Traceback" not in capfd.readouterr().err
