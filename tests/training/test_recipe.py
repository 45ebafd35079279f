import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import yaml

from eabf_jax.errors import InputError
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.lora import Lora
from eabf_jax.parallel.mesh import MeshConfig
from eabf_jax.rope import compose, scheme
from eabf_jax.rope.schemes import scheme_names
from eabf_jax.training.optimizer import learning_rate_schedule
from eabf_jax.training.recipe import (
    ModelConfig,
    RecipeConfig,
    check_window,
    config_differences,
    dump_config,
    load_config,
    total_steps,
)

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
SHAPES = Path(__file__).parents[2] / "eabf_jax/training/shapes"
MINIMAL = {"output": "runs/x", "window": 64, "rope": {"type": "eabf", "base": 1e5, "pretrained_window": 32}}


@pytest.fixture
def load(tmp_path):
    """Loads a configuration from a mapping or text, and command-line arguments."""

    def load(values=MINIMAL, *arguments):
        path = tmp_path / "config.yaml"
        path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
        return load_config(["--config_path", str(path), *arguments])

    return load


def test_defaults_are_the_papers(load):
    recipe, compute = load().recipe, load().compute
    assert (recipe.objective, recipe.epochs, recipe.steps, recipe.batch_size) == ("extend", 2, None, 32)
    assert (recipe.learning_rate, recipe.warmup_steps, recipe.schedule) == (2e-5, 0, "cosine")
    assert (recipe.beta1, recipe.beta2, recipe.weight_decay, recipe.clip_norm) == (0.9, 0.95, 0.1, 1.0)
    assert (compute.dtype, compute.remat, compute.optimizer_memory) == ("bfloat16", "auto", "auto")


@pytest.mark.parametrize(
    ("samples", "batch_size", "expected"),
    # Paper: two epochs, the last incomplete batch of each dropped; batch 32 below 3.5k samples, 128 there.
    [(32, 32, 2), (100, 32, 6), (1000, 32, 62), (3500, 128, 54), (63, 32, 2), (64, 32, 4)],
)
def test_steps_are_epochs_times_whole_batches(samples, batch_size, expected):
    recipe = RecipeConfig(batch_size=batch_size)
    assert total_steps(recipe, samples // batch_size) == expected
    assert total_steps(dataclasses.replace(recipe, steps=5), samples // batch_size) == 5


@pytest.mark.parametrize(("steps", "warmup"), [(6, 0), (54, 10), (1, 0), (3, 2)])
def test_schedule_is_warmup_then_cosine_to_zero(steps, warmup):
    peak = 2e-5
    schedule = learning_rate_schedule(RecipeConfig(learning_rate=peak, warmup_steps=warmup), steps)

    def expected(step):
        if step < warmup:
            return peak * step / warmup
        return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    found = [float(schedule(step)) for step in range(steps + 1)]
    # Near pi/2, float32's cosine is off by a few roundings of 6e-8 of the peak, which is more relative to the value.
    np.testing.assert_allclose(found, [expected(step) for step in range(steps + 1)], rtol=0, atol=peak * 3e-7)
    assert found[steps] == 0
    assert found[warmup] == np.float32(peak)


def test_constant_schedule_stays_at_the_peak():
    schedule = learning_rate_schedule(RecipeConfig(learning_rate=0.5, warmup_steps=4, schedule="constant"), 9)
    np.testing.assert_allclose([float(schedule(step)) for step in range(9)], [0, 0.125, 0.25, 0.375, *[0.5] * 5])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_fits_its_model(path, monkeypatch):
    monkeypatch.chdir(path.parents[1])
    config = load_config(["--config_path", str(path)])
    # The name is model_scheme_window, with _lora if adapters are trained.
    assert config.output == f"runs/{path.stem}"
    window = f"_{config.window // 1024}k" if config.window >= 1024 else f"_{config.window}"
    assert path.stem.endswith(window if config.lora is None else f"{window}_lora")
    (model,) = (shape for shape in SHAPES.glob("*.yaml") if path.stem.startswith(f"{shape.stem}_"))
    shape = yaml.safe_load(model.read_text())
    base = LlamaConfig.from_fields(shape)
    if config.model.shape is not None:
        assert config.model.shape == shape
    check_window(config, base)
    values = config.scheme.to_dict()
    kinds = {values["type"], *(part["type"] for part in values.values() if isinstance(part, dict))}
    middle = path.stem.removeprefix(f"{model.stem}_").rpartition("_")[0] + "_"
    named = [name for name in scheme_names() if middle.startswith(f"{name}_")]
    assert not named or max(named, key=len) in kinds
    parts = [values, *(part for part in values.values() if isinstance(part, dict))]
    for part in parts:
        assert part.get("pretrained_window", base.max_position_embeddings) == base.max_position_embeddings
        if part["type"] != "dynamic_yarn" and "factor" in part:
            assert part["factor"] == config.window / base.max_position_embeddings


def test_llama2_7b_has_a_config_for_every_scheme_with_the_papers_values():
    # LongRoPE's lists come from a search for each model and window, and `nope` extends nothing.
    for name in {*scheme_names()} - {"longrope", "nope"}:
        (path,) = (path for path in CONFIGS if path.stem == f"llama2_7b_{name}_16k")
        config = load_config(["--config_path", str(path)])
        assert config.scheme.name == name
        assert config.window == 16_384
        recipe = config.recipe
        assert (recipe.batch_size, recipe.epochs, recipe.learning_rate, recipe.warmup_steps) == (32, 2, 2e-5, 0)
        if name in ("abf", "eabf", "eabf_stair"):
            assert config.scheme.to_dict()["base"] == 500_000
    assert config.mesh == MeshConfig(data=1, fsdp=-1, tensor=1)


@pytest.mark.parametrize(
    ("arguments", "read", "expected"),
    [
        (["--rope.base", "20000"], lambda c: c.scheme, scheme("eabf", base=20_000.0, pretrained_window=32)),
        (["--rope.base=2e4"], lambda c: c.scheme, scheme("eabf", base=20_000.0, pretrained_window=32)),
        (["--recipe.learning_rate", "1e-3"], lambda c: c.recipe.learning_rate, 1e-3),
        (["--recipe.steps", "7", "--recipe.steps", "8"], lambda c: c.recipe.steps, 8),
        (["--recipe.steps", "null"], lambda c: c.recipe.steps, None),
        (["--mesh.fsdp", "2", "--mesh.data", "-1"], lambda c: c.mesh, MeshConfig(data=-1, fsdp=2)),
        (["--output", "2024"], lambda c: c.output, "2024"),
        (["--model.path", "null"], lambda c: c.model.path, None),
        (["--model.shape.hidden_size", "64"], lambda c: c.model.shape, {"hidden_size": 64}),
        (["--model.shape", "{hidden_size: 64}"], lambda c: c.model.shape, {"hidden_size": 64}),
        (["--overwrite", "true"], lambda c: c.overwrite, True),
        (["--checkpoint.every_steps", "null"], lambda c: c.checkpoint.every_steps, None),
        (["--window", "128"], lambda c: c.window, 128),
        (["--mesh", "auto"], lambda c: c.mesh, "auto"),
        (["--model.window", "32"], lambda c: c.model.window, 32),
        (["--lora", "null"], lambda c: c.lora, None),
        (
            ["--lora.targets", "[q_proj, up_proj]", "--lora.alpha", "4"],
            lambda c: c.lora,
            Lora(alpha=4.0, targets=("q_proj", "up_proj")),
        ),
    ],
)
def test_command_line_overrides(load, arguments, read, expected):
    found = read(load(MINIMAL, *arguments))
    assert found == expected
    assert type(found) is type(expected)


def test_a_run_can_be_given_on_the_command_line_alone():
    config = load_config(["--output", "x", "--window", "64", "--rope.type", "pi", "--rope.factor", "2"])
    assert config.scheme == scheme("pi", factor=2.0)


def test_lists_on_the_command_line():
    lists = ["--rope.short_factor", "[1, 1.25]", "--rope.long_factor=[2, 2e1]", "--rope.pretrained_window", "32"]
    arguments = ["--output", "x", "--window", "64", "--rope.type", "longrope", "--rope.factor", "2", *lists]
    expected = scheme("longrope", factor=2, short_factor=[1, 1.25], long_factor=[2, 20], pretrained_window=32)
    assert load_config(arguments).scheme == expected
    with pytest.raises(InputError, match=r"'rope.long_factor' is 2; a list of finite numbers is needed"):
        load_config([*arguments, "--rope.long_factor", "2"])


def test_numbers_that_yaml_reads_as_text_are_numbers(load):
    # YAML 1.1 requires a point in 2e-5 and a sign in 1.0e5.
    config = load("{output: x, window: 64, rope: {type: abf, base: 1.0e5}, recipe: {learning_rate: 2e-5}}")
    assert config.recipe.learning_rate == 2e-5
    assert config.scheme.to_dict()["base"] == 100_000.0


@pytest.mark.parametrize(
    "rope",
    [
        {"type": "yarn", "factor": 4, "pretrained_window": 32},
        {"type": "llama3", "factor": 4, "pretrained_window": 32},
        {"type": "longrope", "factor": 4, "pretrained_window": 32, "short_factor": [1, 1.5], "long_factor": [2, 3e1]},
        {"type": "eabf_stair", "pretrained_window": 32},
        {"type": "nope"},
        {
            "type": "compose",
            "frequencies": {"type": "ntk_by_parts", "factor": 4, "pretrained_window": 32},
            "logit_scale": {"type": "entropy_aware", "pretrained_window": 32},
        },
    ],
    ids=lambda rope: rope["type"],
)
def test_what_is_dumped_loads_the_same(load, rope):
    config = load({**MINIMAL, "rope": rope, "model": {"shape": {"rms_norm_eps": 1e-5}}, "recipe": {"steps": 3}})
    assert load(dump_config(config)) == config
    config = dataclasses.replace(config, mesh="auto", lora=Lora(rank=2, targets=("v_proj",), train_norms=True))
    assert load(dump_config(config)) == config


def test_compose_in_yaml_is_compose(load):
    frequencies = {"type": "yarn", "factor": 4, "pretrained_window": 32}
    logits = {"type": "eabf", "pretrained_window": 32, "unscaled_layers": 1}
    config = load({**MINIMAL, "rope": {"type": "compose", "frequencies": frequencies, "logit_scale": logits}})
    assert config.scheme == compose(frequencies=frequencies, logit_scale=logits)


def test_differences_name_the_keys_that_change_the_result(load, tmp_path):
    before = tmp_path / "before.yaml"
    before.write_text(dump_config(load()))
    same = load(
        MINIMAL,
        *("--overwrite", "true", "--checkpoint.keep", "3", "--distributed", "true", "--mesh.tensor", "2"),
        *("--compute.executor", "layerwise", "--compute.remat", "dots", "--compute.microbatch_size", "auto"),
        *("--compute.attention", "chunked", "--compute.loss_chunk", "8", "--compute.optimizer_memory", "host"),
    )
    assert config_differences(before, same) == []
    assert config_differences(before, load(MINIMAL, "--compute.dtype", "float32")) == ["compute.dtype"]
    other = load(MINIMAL, "--rope.base", "7e4", "--window", "128", "--model.shape", "{a: 1}", "--recipe.seed", "5")
    assert config_differences(before, other) == ["model.shape", "recipe.seed", "rope.base", "window"]
    before.write_text("nothing of ours")
    with pytest.raises(InputError, match=r"before\.yaml is not a run's configuration"):
        config_differences(before, same)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipee": {}}, "unknown configuration key 'recipee': did you mean 'recipe'"),
        ({"recipe": {"lerning_rate": 1}}, "'recipe.lerning_rate': did you mean 'recipe.learning_rate'"),
        ({"rope": {"type": "eabf", "bas": 1, "pretrained_window": 32}}, "'rope.bas': did you mean 'rope.base'"),
        ({"rope": {"type": "eabff"}}, "unknown rotary scheme 'eabff': did you mean 'eabf'"),
        ({"rope": {"base": 1}}, "configuration key 'rope.type' is missing; one of abf,"),
        ({"rope": {"type": "yarn", "pretrained_window": 32}}, "'rope.factor' is missing; a finite number is needed"),
        ({"rope": {"type": "eabf"}}, "'rope.pretrained_window' is missing; an integer is needed"),
        ({"rope": "eabf"}, "'rope' is 'eabf'; a mapping of keys is needed"),
        ({"rope": None}, "'rope' is None; a mapping of keys is needed"),
        ({"rope": {"type": "abf", "base": 0.5}}, "base must be more than 1"),
        ({"rope": {"type": "pi", "factor": "four"}}, "'rope.factor' is 'four'; a finite number is needed"),
        ({"rope": {"type": "compose", "frequencies": {"type": "yarrn"}, "logit_scale": {}}}, "did you mean 'yarn'"),
        ({"window": "64"}, "'window' is '64'; an integer is needed"),
        ({"window": True}, "'window' is True; an integer is needed"),
        ({"window": 64.5}, "'window' is 64.5; an integer is needed"),
        ({"window": None}, "'window' is None; an integer is needed"),
        ({"window": -64}, "'window' is -64; a positive number is needed"),
        ({"output": 3}, "'output' is 3; text is needed"),
        ({"overwrite": 1}, "'overwrite' is 1; true or false is needed"),
        ({"recipe": None}, "'recipe' is None; a mapping of keys is needed"),
        ({"recipe": {"learning_rate": "fast"}}, "'recipe.learning_rate' is 'fast'; a finite number is needed"),
        ({"recipe": {"learning_rate": True}}, "'recipe.learning_rate' is True; a finite number is needed"),
        ({"recipe": {"learning_rate": float("inf")}}, "'recipe.learning_rate' is inf; a finite number is needed"),
        ({"recipe": {"learning_rate": None}}, "'recipe.learning_rate' is None; a finite number is needed"),
        ({"recipe": {"learning_rate": 0}}, "'recipe.learning_rate' is 0.0; a positive number"),
        ({"recipe": {"epochs": -1}}, "'recipe.epochs' is -1; a positive number"),
        ({"recipe": {"steps": 0}}, "'recipe.steps' is 0; a positive number"),
        ({"recipe": {"steps": 2**31}}, "'recipe.steps' is 2147483648; a number below 2**31"),
        ({"recipe": {"epochs": 10**300}}, "'recipe.epochs' is 1000"),
        ({"recipe": {"epochs": 10**400}}, "not YAML: a number of 1329 bits; at most 1024 are read"),
        ({"recipe": {"steps": "6"}}, "'recipe.steps' is '6'; an integer or null is needed"),
        ({"recipe": {"warmup_steps": -1}}, "'recipe.warmup_steps' is -1; a number that is not negative"),
        ({"recipe": {"weight_decay": -0.1}}, "'recipe.weight_decay' is -0.1; a number that is not negative"),
        ({"recipe": {"seed": 2**32}}, "'recipe.seed' is 4294967296; a number below"),
        ({"recipe": {"beta2": 1.0}}, r"'recipe.beta2' is 1.0; a number in [0, 1)"),
        ({"recipe": {"objective": "extnd"}}, "unknown value of 'recipe.objective' 'extnd': did you mean 'extend'"),
        ({"compute": {"dtype": "bf16"}}, "known: bfloat16, float16, float32"),
        ({"compute": {"microbatch_size": 0}}, "'compute.microbatch_size' is 0; a positive number"),
        ({"mesh": "atuo"}, "'mesh' is 'atuo'; a mapping of keys or auto is needed"),
        ({"model": {"window": 0}}, "'model.window' is 0; a positive number"),
        ({"mesh": {"fsdp": 0}}, "mesh data=1, fsdp=0, context=1, tensor=1"),
        ({"checkpoint": {"keep": 0}}, "'checkpoint.keep' is 0; a positive number"),
        ({"model": {"shape": [1]}}, "'model.shape' is [1]; a mapping or null is needed"),
        ({"lora": 8}, "'lora' is 8; a mapping of keys or null is needed"),
        ({"lora": {"rnk": 8}}, "unknown configuration key 'lora.rnk': did you mean 'lora.rank'"),
        ({"lora": {"rank": 0}}, "lora.rank is 0; a positive number is needed"),
        ({"lora": {"targets": "q_proj"}}, "'lora.targets' is 'q_proj'; a list of names is needed"),
        ({"lora": {"targets": ["q_porj"]}}, "'q_porj': did you mean 'q_proj'"),
    ],
    ids=str,
)
def test_bad_values_are_named(load, change, message):
    with pytest.raises(InputError) as error:
        load({**MINIMAL, **change})
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe.lerning_rate", "1"], "'recipe.lerning_rate': did you mean 'recipe.learning_rate'"),
        (["--recipee.seed", "1"], "unknown configuration key 'recipee': did you mean 'recipe'"),
        (["--rope.bas", "1"], "'rope.bas': did you mean 'rope.base'"),
        (["--rope.type", "eabff"], "unknown rotary scheme 'eabff': did you mean 'eabf'"),
        (["--window"], "--window has no value"),
        (["--output", "runs/x\udcff"], "runs/x\udcff: the name is not valid UTF-8: name another path"),
        (["--window", "--output", "x"], "--window has no value"),
        (["--window", "long"], "'window' is 'long'; an integer is needed"),
        (["--window", "2.5"], "'window' is 2.5; an integer is needed"),
        (["--window", "null"], "'window' is None; an integer is needed"),
        (["--window", "[64"], "'window' is '[64'; an integer is needed"),
        (["--recipe.learning_rate", "-1"], "'recipe.learning_rate' is -1.0"),
        (
            ["--output.directory", "x"],
            "--output.directory: the configuration's 'output' is 'runs/x', which has no keys",
        ),
        (["config.yaml"], "unexpected argument 'config.yaml'"),
        (["--config_path", "no/such.yaml"], "cannot read the configuration 'no/such.yaml': No such file"),
        (["--config_path", "."], "cannot read the configuration '.': Is a directory"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(load, arguments, message):
    with pytest.raises(InputError) as error:
        load(MINIMAL, *arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("missing", ["output", "window", "rope"])
def test_a_required_key_that_is_missing_is_named(load, missing):
    with pytest.raises(InputError, match=f"configuration key '{missing}' is missing"):
        load({key: value for key, value in MINIMAL.items() if key != missing})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"output: [1\n", "not YAML: while parsing a flow sequence"),
        (b"\xff\xfe\x00", "not YAML: 'utf-8' codec can't decode"),
        (b"window: 2024-02-30\n", "not YAML: day is out of range for month"),
        (b"- 1\n- 2\n", r"holds \[1, 2\]; a mapping of configuration keys is needed"),
        (b"", "holds None; a mapping of configuration keys is needed"),
        (
            b"model: {shape: !include nowhere.yaml}\n",
            r"includes nowhere.yaml, which is neither beside it nor one of the package's own \(shapes/llama2_13b.yaml, "
            r".*\); if model.path is a directory, model.shape can be left out",
        ),
        (b"model: {shape: {a: !include nowhere.yaml}}\n", "includes nowhere.yaml, which is neither"),
        (b"model: {shape: !include broken.yaml}\n", "not YAML: it is nested too deeply"),
    ],
)
def test_a_file_that_is_no_configuration_is_named(tmp_path, content, message):
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        load_config(["--config_path", str(path)])
    assert "broken.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["llama2_7b_eabf_16k", "smollm2_135m_yarn_32k", "tiny_pretrain_512"])
def test_a_configuration_may_be_copied_elsewhere(tmp_path, monkeypatch, name):
    (path,) = (path for path in CONFIGS if path.stem == name)
    copied = tmp_path / "mine.yaml"
    copied.write_text(path.read_text())
    monkeypatch.chdir(tmp_path)
    assert load_config(["--config_path", "mine.yaml"]) == load_config(["--config_path", str(path)])
    # A shape file beside it takes precedence.
    (tmp_path / "shapes").mkdir()
    for shape in SHAPES.iterdir():
        (tmp_path / "shapes" / shape.name).write_text("hidden_size: 1")
    assert load_config(["--config_path", str(copied)]).model.shape == {"hidden_size": 1}


def test_a_shape_that_is_nowhere_is_the_models_own(load, tmp_path):
    """The directory in `model.path`, set in the file or on the command line, provides the shape."""
    text = "{output: x, window: 64, rope: {type: abf, base: 1.0e5}, model: {shape: !include gone.yaml, path: %s}}"
    assert load(text % "null", "--model.path", str(tmp_path)).model == ModelConfig(path=str(tmp_path))
    assert load(text % tmp_path).model == ModelConfig(path=str(tmp_path))
    assert load(text % "null", "--model.shape", "{hidden_size: 8}").model.shape == {"hidden_size": 8}
    with pytest.raises(InputError, match=r"includes gone\.yaml"):
        load(text % (tmp_path / "nowhere"))


def test_an_extension_has_to_extend(load, model_config):
    with pytest.raises(InputError, match="window 32 is not larger than the model's own window 32"):
        check_window(load({**MINIMAL, "window": 32}), model_config)
    with pytest.raises(InputError, match=r"rope.pretrained_window 64 is larger than the model's own window 32"):
        check_window(load(MINIMAL, "--rope.pretrained_window", "64"), model_config)
    composed = {
        "type": "compose",
        "frequencies": {"type": "abf"},
        "logit_scale": {"type": "entropy_aware", "pretrained_window": 64},
    }
    with pytest.raises(InputError, match=r"rope.pretrained_window 64 is larger than the model's own window 32"):
        check_window(load({**MINIMAL, "rope": composed}), model_config)
    check_window(load(MINIMAL), model_config)
    check_window(load({**MINIMAL, "window": 32, "recipe": {"objective": "pretrain"}}), model_config)


def test_help_names_every_key_and_nothing_else(capsys):
    with pytest.raises(SystemExit) as stop:
        load_config(["--help"], prog="train.py")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for key in ("--config_path", "--output", "--rope.type", "--recipe.learning_rate", "--model.shape", "--mesh.fsdp"):
        assert key in text
    assert "--lora.targets" in text
    assert "Optional" not in text and "Union" not in text and "--mesh auto" in text
    assert "peak; paper" in text
    # draccus would also accept a file for each section; we do not.
    assert "Config file for" not in text and "--recipe str" not in text


def test_a_misspelt_type_is_named() -> None:
    with pytest.raises(InputError, match=r"unknown configuration key 'rope\.typ': did you mean 'rope\.type'"):
        load_config(["--output", "x", "--window", "64", "--rope.typ", "pi", "--rope.type", "pi", "--rope.factor", "2"])
