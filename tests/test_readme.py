"""The README's figures are those of the files that the demo and the benchmarks wrote."""

import dataclasses
import json
import operator
from pathlib import Path

import pytest

from eabf_jax.commands.evaluate.retrieval import figures, read
from eabf_jax.hardware import DEVICES, GIB
from eabf_jax.model.config import LlamaConfig
from eabf_jax.training.plan import choose
from eabf_jax.training.recipe import load_config

pytestmark = pytest.mark.document_check

ROOT = Path(__file__).parents[1]
WHEN = ("trained", "untrained")
METHODS = ("PI", "YaRN", "ABF", "EABF-stair", "EABF")


def one_line(path: str) -> str:
    """Returns a page as one line, so that line breaks inside sentences do not matter."""
    return " ".join((ROOT / path).read_text().split())


def demo(name: str) -> dict[str, list[float]]:
    bands = json.loads((ROOT / f"docs/demo/{name}.json").read_text())["bands"]
    return {label: [band["mean"] for band in row] for label, row in bands.items()}


def test_the_demos_table_has_every_method_before_and_after_training() -> None:
    means = demo("all_methods")
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = {"untouched": [f"{mean:.3f}" for mean in means["untouched"]]}
    for name in METHODS:
        pairs = zip(means[f"{name}, 6 steps"], means[f"{name}, no training"], strict=True)
        rows[name] = [f"{trained:.3f} ({plain:.3f})" for trained, plain in pairs]
    for label, cells in rows.items():
        assert f"| {label} | " + " | ".join(cells) + " |" in lines


def test_what_the_readme_says_of_the_demo_is_in_its_figures() -> None:
    means = demo("all_methods")
    untouched, *trained = (means[name] for name in ("untouched", *(f"{name}, 6 steps" for name in METHODS[1:])))
    yarn, abf, stair, ours = trained
    text = one_line("README.md")
    assert "At 1,024–2,048, YaRN is better than EABF, and EABF better than ABF" in text
    assert yarn[3] < ours[3] < abf[3]
    assert "up to 1,024, EABF and ABF are better than YaRN" in text
    assert all(map(operator.lt, ours[:3], yarn[:3])) and all(map(operator.lt, abf[:3], yarn[:3]))
    assert "EABF-stair, whose multiplier llama.cpp and vLLM compute too ([Serve](#serve)), is within 0.01 nats" in text
    assert all(abs(a - b) < 0.01 for a, b in zip(stair, ours, strict=True))
    prices = {round(a - b, 2) for a, b in zip(ours[:2], untouched[:2], strict=True)}
    assert prices == {0.06} and "a price of 0.06 nats inside the old window for EABF" in text


def test_both_reports_of_the_demo_agree() -> None:
    """Two runs of the same models differ only by rounding."""
    whole, short = demo("all_methods"), demo("loss_by_position")
    for label, row in short.items():
        assert row == pytest.approx(whole[label], abs=1e-3)


def test_what_the_readme_says_of_entropy_is_in_the_demos_file() -> None:
    found = json.loads((ROOT / "docs/demo/entropy.json").read_text())["drift"]
    rises = [[layer["mean"] for layer in found[name]] for name in ("untouched", "ABF, no training", "EABF, 6 steps")]
    text = one_line("README.md")
    assert f"rises by {min(rises[0]):.2f} to {max(rises[0]):.2f} nats in its six layers" in text
    assert len(rises[0]) == 6
    assert (
        f"With ABF, untrained, it rises by {min(rises[1][2:]):.2f} to {max(rises[1][2:]):.2f} nats in the last" in text
    )
    assert max(map(abs, rises[2][2:])) < 0.13 and "EABF after six steps stays within 0.13 nats there" in text


def test_retrieval_is_that_of_the_committed_files() -> None:
    tasks = [json.loads((ROOT / f"docs/retrieval/{task}.json").read_text()) for task in ("passkey", "line_retrieval")]
    table = (ROOT / "docs/evaluation.md").read_text().splitlines()
    for label in tasks[0]["cells"]:
        found = [task["short_and_long"][label][part] for task in tasks for part in ("short", "long")]
        cells = [f"{c['hits'] / c['total']:.0%} ({c['low']:.0%}–{c['high']:.0%})".replace("%", "") for c in found]
        assert " | ".join([f"| {label}", *cells]) + " |" in table
    long = {label: both["long"]["hits"] for label, both in tasks[0]["short_and_long"].items()}
    text = one_line("README.md")
    trained, untrained = ([long[f"{name}, {when}"] for name in ("EABF", "ABF", "YaRN", "PI")] for when in WHEN)
    assert (long["untouched"], trained[3], untrained[3]) == (0, 0, 0)
    assert "it answers 0 of 100 passkey questions untouched" in text
    assert "{} with EABF, {} with ABF, {} with YaRN and {} with PI".format(*trained) in text
    assert "Without any training, the four schemes answer {}, {}, {} and {}.".format(*untrained) in text
    most = max(cell["hits"] for row in tasks[1]["cells"].values() for cell in row)
    assert f"answers at most {most} of 50 questions at any length" in text
    intervals = {
        label: (100 * both["long"]["low"], 100 * both["long"]["high"])
        for label, both in tasks[0]["short_and_long"].items()
    }
    assert intervals["EABF, trained"] == intervals["ABF, trained"]
    ours, yarn, untouched = (
        "{:.0f}–{:.0f} %".format(*intervals[name]) for name in ("EABF, trained", "YaRN, trained", "untouched")
    )
    assert f"intervals are {ours} for EABF and ABF, {yarn} for YaRN, and {untouched} untouched" in text


def test_what_is_said_of_two_bases_is_that_of_the_committed_files() -> None:
    """The base with the lower loss answers fewer passkeys."""
    cells = json.loads((ROOT / "benchmarks/results/smollm2_recipe_h200.json").read_text())["cells"]
    losses = {
        base: [min(x["loss"] for x in cells if (x["scheme"], x["base"]) == (name, base)) for name in ("abf", "eabf")]
        for base in (500_000, 1_000_000)
    }
    page = one_line("docs/evaluation.md")
    told = "({:.3f} and {:.3f} nats per token, against {:.3f} and {:.3f} with 1,000,000)"
    assert told.format(*losses[500_000], *losses[1_000_000]) in page
    then, now = (
        json.loads((ROOT / f"docs/retrieval/{name}.json").read_text())["short_and_long"]
        for name in ("passkey_base_1000000", "passkey")
    )
    ours, abf, yarn = ([x[f"{name}, trained"]["long"]["hits"] for x in (then, now)] for name in ("EABF", "ABF", "YaRN"))
    assert "{} of 100 instead of {} with ABF, and {} instead of {} with EABF".format(*abf, *ours) in page
    assert "answered {} and {}.".format(*yarn) in page
    assert abf[0] == ours[0] and f"with it, EABF and ABF answer {ours[0]}." in one_line("README.md")
    for name in ("pi", "yarn", "abf", "eabf", "ntk_by_parts_entropy"):
        best = min((x for x in cells if x["scheme"] == name), key=operator.itemgetter("loss"))
        config = load_config(["--config_path", str(ROOT / f"configs/smollm2_135m_{name}_32k.yaml")])
        assert config.recipe.learning_rate == best["learning_rate"]
        assert best["base"] in (None, config.scheme.to_dict().get("base"))


def test_committed_retrieval_has_the_intervals_of_its_cells() -> None:
    """The intervals are those that `eabf evaluate redraw` computes."""
    for task in ("passkey", "line_retrieval"):
        report = json.loads((ROOT / f"docs/retrieval/{task}.json").read_text())
        assert report.items() >= figures(read(report)).items()


def test_losses_of_lines_are_those_of_the_committed_file() -> None:
    cells = json.loads((ROOT / "docs/retrieval/line_retrieval.json").read_text())["cells"]
    ends: dict[str, list[float]] = {"ABF, EABF and YaRN": [], "PI": [], "untouched": []}
    for label, row in cells.items():
        kind = next((name for name in ("PI", "untouched") if label.startswith(name)), "ABF, EABF and YaRN")
        ends[kind] += [cell["loss"] for cell in row if cell["length"] > 8192]
    told = [f"{min(losses):.1f} to {max(losses):.1f}" for losses in ends.values()]
    sentence = "{} nats per token for ABF, EABF and YaRN, {} for PI and {} untouched".format(*told)
    assert sentence in one_line("docs/evaluation.md")


def test_the_tiny_models_log_is_what_its_page_says() -> None:
    log = [json.loads(line) for line in (ROOT / "assets/tiny_pretrain_512.jsonl").read_text().splitlines()]
    text = one_line("assets/README.md")
    assert f"{len(log):,} steps of 262,144 tokens ({len(log) * 262_144 / 1e9:.2f} billion)" in text
    assert f"which took {sum(step['seconds'] for step in log):.0f} seconds" in text
    assert f"loss is {sum(step['loss'] for step in log[-100:]) / 100:.2f} nats per token at the end" in text


def test_files_that_the_readme_links_to_exist() -> None:
    text = (ROOT / "README.md").read_text()
    links = [part.partition(")")[0] for part in text.split("](")[1:]]
    local = [link for link in links if not link.startswith("http")]
    assert len(local) > 5
    assert [link for link in local if not (ROOT / link.partition("#")[0]).exists()] == []


def test_what_is_said_of_speed_is_that_of_the_committed_runs() -> None:
    short, long = (
        json.loads((ROOT / f"benchmarks/results/llama2_7b_{length}_h100.json").read_text()) for length in ("16k", "64k")
    )
    rates = {name: peer["tokens_per_second"] for name, peer in short["peers"].items() if peer["microbatches"] == 2}
    page = " ".join((ROOT / "docs/performance.md").read_text().split())
    assert f"lie up to {max(rates.values()) / min(rates.values()):.2f} × apart" in page
    flash = [rates[name] / rates[name.replace("default", "flash")] for name in rates if name.startswith("default/")]
    assert f"{min(flash) - 1:.0%}".removesuffix("%") + f" to {max(flash) - 1:.0%}".replace("%", " %") in page
    good = [rate for name, rate in rates.items() if "flash" not in name and ("compiled" in name or "liger" in name)]
    assert max(good) / min(good) < 1.01
    assert f"ours is {long['ratio_to_strongest_peer']:.2f} ×" in page
    newer, older, titan = (
        json.loads((ROOT / f"benchmarks/results/llama2_7b_16k_{name}.json").read_text())
        for name in ("h200", "h200_checkpointed", "torchtitan_h200")
    )
    assert f"ours is {newer['ratio_to_strongest_peer']:.2f} × as fast as transformers" in page
    other = newer["tokens_per_second"] / titan["modes"]["none"]["tokens_per_second"]
    assert f"is {other:.2f} × as fast as torchtitan" in page
    assert f"has to checkpoint, and ours is {newer['ratio_to_strongest_float32_peer']:.2f} ×" in page
    masters = [run["peers"][run["strongest_float32_peer"]] for run in (newer, older)]
    assert masters[0]["microbatches"] == masters[1]["microbatches"]
    slower = 1 - masters[0]["tokens_per_second"] / masters[1]["tokens_per_second"]
    assert f"transformers was {slower:.1%}".replace("%", " % slower") in page
    config = load_config(["--config_path", str(ROOT / "configs/llama2_7b_eabf_16k.yaml")])
    model = dataclasses.replace(LlamaConfig.from_fields(config.model.shape), rope=config.scheme)
    found = choose(config, model, {"data": 1, "fsdp": 1, "context": 1, "tensor": 1}, DEVICES["h100"])
    planned, took = sum(found.host.values()) / GIB, short["host_gib"]
    assert f"predicts {planned:.1f} GiB of host memory" in page and f"took {took:.1f} GiB in all" in page
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"the plan predicts {planned:.0f} GiB of host memory, and the process took {took:.0f} GiB" in readme
    assert long["ratio_to_strongest_peer"] < 1 and "At 65,536 tokens on one H100 the peer is faster." in readme
    whole = json.loads((ROOT / "benchmarks/results/llama2_7b_16k_whole_run_h200.json").read_text())
    assert f"takes {whole['total_seconds'] / 60:.1f} minutes on one H200" in readme
    assert f"takes {whole['total_seconds']:.0f} s on one H200, of which {whole['steps_seconds']:.0f} s" in page
    first, *others = whole["step_seconds"]
    assert f"first step takes {first - sum(others) / len(others):.0f} s longer" in page
    assert f"Saving takes {whole['after_last_step_seconds']:.0f} s" in page
    assert f"export, a separate program, {whole['export_seconds']:.0f} s" in page
    plain, small = (
        json.loads((ROOT / f"benchmarks/results/llama2_7b_generate{name}_h200.json").read_text())["runs"]
        for name in ("", "_int8")
    )
    gain = {run: small[run]["tokens_per_second"] / plain[run]["tokens_per_second"] for run in plain}
    assert f"{gain['long']:.2f} × as fast for one row of 16,384" in page
    assert f"{gain['batch']:.2f} × as fast for 16 rows of 2,048" in page
    assert gain["batch"] > 1 > max(gain[run] for run in ("short", "long", "one_row"))
    assert "It is faster for 16 rows and slower for one." in readme
