import contextlib
import json

import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from eabf_jax.errors import InputError
from eabf_jax.model.config import LlamaConfig
from eabf_jax.model.parameters import parameter_count
from eabf_jax.training.recipe import load_config
from eabf_jax.training.tracking import Tracker, flops_per_token


def test_flops_of_llama2_7b_by_hand():
    config = load_config(["--config_path", "configs/llama2_7b_eabf_16k.yaml"])
    model = LlamaConfig.from_fields(config.model.shape)
    assert parameter_count(model) == 6_738_415_616
    # Two for multiplication and addition, times three for forward and backward (twice the forward), for each parameter
    # in a matrix product: all except the 32,000 x 4,096 that are looked up.
    products = 6 * (6_738_415_616 - 32_000 * 4_096)
    # Scores and weighted values each take 2 x hidden for each of the 16,384 / 2 tokens that a query sees on average.
    attention = 3 * 32 * 2 * (2 * 4_096 * 16_384 / 2)
    assert flops_per_token(model, 16_384) == products + attention


def test_a_frozen_model_has_no_gradients_of_its_own():
    """A frozen parameter takes four operations instead of six."""
    config = load_config(["--config_path", "configs/llama2_7b_eabf_16k_lora.yaml"])
    model = LlamaConfig.from_fields(config.model.shape)
    # A and B of q, k, v and o in 32 layers, each 4,096 wide; the embedding is looked up.
    adapters = 32 * 4 * 8 * (4_096 + 4_096)
    expected = flops_per_token(model, 64) - 2 * (6_738_415_616 - 32_000 * 4_096) + 6 * adapters
    assert flops_per_token(model, 64, config.lora) == expected


def test_tied_embeddings_are_a_matrix_product_too(shape):
    tied, untied = (LlamaConfig.from_fields({**shape, "tie_word_embeddings": tied}) for tied in (True, False))
    assert flops_per_token(tied, 64) == flops_per_token(untied, 64)


def metrics(loss, **more):
    return {"loss": loss, "tokens_per_second": 1000.0, "mfu": None, **more}


def events(run):
    """Reads scalars and restarts of TensorBoard files in order; a TFRecord is length, checksum, bytes, checksum."""
    scalars, restarts = [], []
    for path in sorted((run / "tensorboard").iterdir()):
        data = path.read_bytes()
        while data:
            size = int(np.frombuffer(data[:8], "<u8")[0])
            event = event_pb2.Event.FromString(data[12 : 12 + size])
            data = data[16 + size :]
            scalars += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            if event.session_log.status == event_pb2.SessionLog.START:
                restarts.append(event.step)
    return scalars, restarts


def test_records_go_to_json_lines_and_tensorboard(tmp_path, capsys, read_metrics):
    with Tracker(tmp_path, steps=3, start=0) as tracker:
        tracker.compiled()
        tracker.record(1, metrics(2.5, gradient_norm=0.5, compile_seconds=1.5))
        tracker.record(2, metrics(1.25, gradient_norm=0.25))
        # Records are written at once, so a run killed now loses none.
        assert len(read_metrics(tmp_path)) == 2
        assert events(tmp_path)[0][-1] == (2, "gradient_norm", 0.25)
    assert read_metrics(tmp_path) == [
        {
            "step": 1,
            "loss": 2.5,
            "tokens_per_second": 1000.0,
            "mfu": None,
            "gradient_norm": 0.5,
            "compile_seconds": 1.5,
        },
        {"step": 2, "loss": 1.25, "tokens_per_second": 1000.0, "mfu": None, "gradient_norm": 0.25},
    ]
    scalars, restarts = events(tmp_path)
    assert scalars == [
        (1, "loss", 2.5),
        (1, "tokens_per_second", 1000.0),
        (1, "gradient_norm", 0.5),
        (1, "compile_seconds", 1.5),
        (2, "loss", 1.25),
        (2, "tokens_per_second", 1000.0),
        (2, "gradient_norm", 0.25),
    ]
    assert restarts == [1]
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[0] == "compiling the step ..."
    assert shown.err.splitlines()[1].startswith("step 1/3  loss 2.5000  1,000 tokens/s  0:00:0")


def test_time_left_is_reckoned_from_the_steps_of_this_start(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 500.0, 560.0, 680.0])  # opened, compiled, after step 4, after step 5
    monkeypatch.setattr("eabf_jax.training.tracking.time.monotonic", lambda: next(clock))
    with Tracker(tmp_path, steps=10, start=3) as tracker:
        tracker.compiled()
        tracker.record(
            4,
            metrics(
                1.0,
            ),
        )
        tracker.record(5, metrics(1.0, mfu=0.5))
    first, second = capsys.readouterr().err.splitlines()[1:]
    assert first.endswith("0:06:00 left")  # 60 s per step, 6 steps
    assert second.endswith("MFU 50.0%  0:07:30 left")  # 90 s per step on average, 5 steps


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path, read_metrics):
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "lo']))
    with Tracker(tmp_path, steps=5, start=2) as tracker:
        tracker.record(3, metrics(7.0))
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [(1, 1.0), (2, 1.0), (3, 7.0)]
    assert events(tmp_path)[1] == [3]  # TensorBoard drops steps from 3 on
    assert not list(tmp_path.glob("*.partial*"))


def test_a_quiet_process_writes_and_shows_nothing(tmp_path, capsys):
    with Tracker(tmp_path, steps=2, start=0, quiet=True) as tracker:
        tracker.compiled()
        tracker.record(1, metrics(1.0))
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def on_a_full_disk(tmp_path):
    """Yields a tracker whose records go to a device that is always full."""
    tracker = Tracker(tmp_path, steps=100, start=0)
    tracker._file.close()
    with open("/dev/full", "a") as tracker._file:
        yield tracker
        with contextlib.suppress(OSError):
            tracker._file.close()


def test_a_full_disk_is_told(on_a_full_disk):
    # SummaryWriter's thread used to die of it unnoticed, and the run waited for the thread forever.
    with pytest.raises(OSError, match="No space left"), on_a_full_disk as tracker:
        tracker.record(1, metrics(1.0))


def test_a_full_disk_does_not_hide_an_earlier_failure(on_a_full_disk):
    on_a_full_disk._file.write("buffered")
    with pytest.raises(InputError, match="the first failure"), on_a_full_disk:
        raise InputError("the first failure")
