"""Test files mirror modules: tests/a/test_b.py tests eabf_jax/a/b.py, and tests/benchmarks tests benchmarks/.

A package's own tests, if there are any, are beside its folder: tests/test_a.py tests eabf_jax/a/__init__.py.
"""

from pathlib import Path

TESTS = Path(__file__).parent
ROOT = TESTS.parent

# Modules without their own test file, and where they are tested.
ELSEWHERE = {
    "__main__": "one call of cli.main: test_cli.py starts it",
    "errors": "the class of every refusal and the sentence on unknown names: each test of a refusal reads both",
    "commands/convert/from_gguf": "a table of options: commands/test_convert.py runs all four",
    "commands/convert/from_hf": "likewise",
    "commands/convert/to_gguf": "likewise",
    "commands/convert/to_hf": "likewise",
    "commands/evaluate/passkey": "one value, the task: commands/evaluate/test_retrieval.py runs both tasks",
    "commands/evaluate/line_retrieval": "likewise",
    "data/template_process": "the program behind chat_template: data/test_chat_template.py renders through it",
    "inference/placement": "inference/test_generate.py compares its models on one device and on eight",
    "model/attention/backend": "model/test_attention.py: the protocol of all backends",
    "model/attention/reference": "model/test_attention.py has it beside chunked, and float64",
    "training/layerwise": "training/test_step.py runs it beside the other executor and transformers",
}

# Test files that test something other than one module.
OF_NO_MODULE = {
    "test_layout": "this file",
    "test_makefile": "the Makefile",
    "test_readme": "pages beside the files that their figures come from",
    "end_to_end/test_main_job": "from ShareGPT to an extended model",
    "interop/export/test_vllm_keys": "config.json: what vLLM reads of our exports",
    "interop/test_config_keys": "config.json: each key of each architecture, as transformers reads it",
    "interop/test_model_directories": "directories as users have them, through every reader of interop",
    "interop/test_smollm2": "a real model's file: converted, tokenized, run",
    "training/test_lora": "training of adapters: steps, checkpoints, export",
    "training/test_multiprocess": "runs of several processes",
    "training/test_user_schemes": "a user's scheme through every command",
}


def files(folder: Path, pattern: str) -> set[Path]:
    return {path.relative_to(folder).with_suffix("") for path in folder.rglob(pattern)}


MODULES = files(ROOT / "eabf_jax", "*.py")
MIRRORED = {path.parent / path.name.removeprefix("test_"): path for path in files(TESTS, "test_*.py")}


def test_every_module_has_its_tests() -> None:
    needed = {path for path in MODULES if path.name != "__init__"}
    without = {str(path) for path in needed - MIRRORED.keys()}
    assert without == ELSEWHERE.keys()


def test_every_test_file_has_its_module() -> None:
    packages = {path.parent for path in MODULES if path.name == "__init__"}
    benchmarks = {"benchmarks" / path for path in files(ROOT / "benchmarks", "*.py")}
    without = {str(test) for module, test in MIRRORED.items() if module not in MODULES | packages | benchmarks}
    assert without == OF_NO_MODULE.keys()
