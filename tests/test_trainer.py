"""Training: the demo, the files of a run, resuming, learning rates, errors and freezing."""

import json
import multiprocessing
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import timm
import torch
from conftest import (
    CONFIG,
    FILES,
    ROOT,
    STEPS,
    TINY,
    assert_same_tensors,
    at_step,
    build,
    curve,
    error_message,
    names_in,
    script,
    tensors,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

import inference
import models
import trainer
from config import Config, UserError, parse
from data import load_image, read_splits
from inference import RECALLS, evaluate
from models import build_wordpiece_tokenizer, load_checkpoint, load_clip
from trainer import best_epoch, main, param_groups, warmup_then_cosine

# Flags of one short epoch, which choose neither the encoders nor the data.
SMALL = ["--image-size", "32", "--batch-size", "8", "--epochs", "1"]
SMALL += ["--num-workers", "0", "--device", "cpu"]
METRICS = ["t2i_r1", "t2i_r5", "t2i_r10", "t2i_medr", "i2t_r1", "i2t_r5", "i2t_r10", "i2t_medr"]
COLUMNS = ["epoch", "seconds", "pairs_per_second", "lr", "train_loss", *METRICS]


# ---------------------------------------------------------------- commands of the README


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess:
    """`python trainer.py --demo` in an empty folder without a network, with fewer steps."""
    folder = tmp_path_factory.mktemp("demo")
    flags = "--epochs 1 --image-size 32 --batch-size 64 --num-workers 0 --device cpu"
    result = script("trainer.py", "--demo", *flags.split(), cwd=folder, network=False)
    assert result.returncode == 0, result.stderr
    result.folder = folder
    return result


@pytest.mark.slow
def test_demo_creates_only_its_data_and_its_run(demo):
    assert names_in(demo.folder) == ["data", "runs"]
    assert names_in(demo.folder / "data") == ["shapes"]
    assert names_in(demo.folder / "runs") == ["demo"]
    assert names_in(demo.folder / "runs" / "demo") == FILES


@pytest.mark.slow
def test_demo_learns(demo):
    metrics = json.loads((demo.folder / "runs/demo/test.json").read_text())
    assert metrics["t2i_r10"] > 50  # at chance: 5


@pytest.mark.slow
def test_print_summary_prints_each_part_once(demo):
    for text in ("config: ", "device: cpu", "loss at chance: 4.159"):
        assert demo.stdout.count(text) == 1


@pytest.mark.slow
def test_test_best_prints_a_search_command_that_works(demo):
    python, *command = shlex.split(demo.stdout.splitlines()[-1])
    assert (python, command[0]) == ("python", "inference.py")
    result = script(*command, cwd=demo.folder, network=False)
    assert result.returncode == 0, result.stderr
    Image.open(demo.folder / "matches.png").verify()


@pytest.mark.slow
def test_test_best_quotes_the_search_command(workdir, shapes, capsys):
    """The command can be pasted into a shell although the run's name contains a space."""
    main([*TINY, "--epochs", "1", "--name", "my run", "--data-dir", str(shapes)])
    line = capsys.readouterr().out.splitlines()[-1]
    example_query = load_checkpoint("runs/my run/best.pt").example_query
    command = ["python", "inference.py", "--weights", "runs/my run/best.pt", "--n", "8"]
    command += ["--data-dir", str(shapes)]  # it is outside of the current folder
    assert shlex.split(line) == [*command, f"--query={example_query}"]
    inference.main(shlex.split(line)[2:])
    Image.open(workdir / "matches.png").verify()


@pytest.mark.slow
def test_main_quotes_the_resume_command(workdir, shapes, monkeypatch):
    """As above, for the command that is printed when a run is stopped."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "contrastive_loss", at_step(1, KeyboardInterrupt()))
        flags = [*TINY, "--epochs", "1", "--name", "my run", "--data-dir", shapes]
        message = error_message(main, *flags)
    command = message.removeprefix("stopped; resume with: ")
    assert command != message
    assert shlex.split(command) == ["python", "trainer.py", "--resume", "runs/my run/last.pt"]
    main(shlex.split(command)[2:])
    assert names_in(workdir / "runs/my run") == FILES


@pytest.mark.slow
def test_inference_searches_with_a_moved_checkpoint(demo):
    """The second command of the README; without --query it searches with the example query."""
    shutil.copy(demo.folder / "runs/demo/best.pt", demo.folder / "w.pt")
    command = ["inference.py", "--weights", "w.pt", "--n", "8"]
    result = script(*command, cwd=demo.folder, network=False)
    assert result.returncode == 0, result.stderr
    matches = [line for line in result.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert len(matches) == 8


@pytest.mark.slow
def test_training_without_network_or_cache_explains_what_to_do(workdir):
    result = script("trainer.py", cwd=workdir, network=False)
    assert result.returncode != 0
    assert len(result.stderr.splitlines()) == 1, result.stderr
    for text in ("distilbert-base-uncased", "folder", "--no-pretrained", "--demo"):
        assert text in result.stderr
    assert not (workdir / "data").exists()
    assert not (workdir / "runs").exists()


@pytest.mark.slow
def test_training_in_bfloat16_learns_on_the_cpu(workdir):
    flags = ["--image-size", "32", "--batch-size", "64", "--epochs", "1", "--num-workers", "0"]
    flags += ["--device", "cpu", "--precision", "bfloat16"]
    flags += ["--image-encoder", "mobilenetv3_small_050"]  # computes some kernels in float32
    result = script("trainer.py", "--demo", *flags, cwd=workdir, network=False)
    assert result.returncode == 0, result.stderr
    assert "device: cpu, bfloat16" in result.stdout
    table = pd.read_csv(workdir / "runs/demo/metrics.csv")
    assert table["train_loss"][0] < 4.1  # at chance: 4.159
    dtypes = {tensor.dtype for tensor in tensors(workdir / "runs/demo/best.pt").values()}
    assert dtypes <= {torch.float32, torch.int64}


def test_setup_keeps_only_depthwise_kernels_in_float32(workdir, shapes):
    flags = ["--demo", *SMALL, "--data-dir", str(shapes)]
    flags += ["--image-encoder", "mobilenetv3_small_050"]
    config = parse(Config, flags)
    image = trainer.setup(config, None, trainer.Distributed.init(config)).model.image
    dtypes: dict[bool, set] = {True: set(), False: set()}  # by whether a kernel is depthwise
    for module in image.modules():
        if isinstance(module, torch.nn.Conv2d):
            is_depthwise = module.groups == module.in_channels
            module.register_forward_hook(
                lambda _, inputs, output, found=dtypes[is_depthwise]: found.add(output.dtype)
            )
    with torch.autocast("cpu", torch.bfloat16):
        image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert dtypes == {True: {torch.float32}, False: {torch.bfloat16}}


# ---------------------------------------------------------------- the folder of a run


def test_run_dir_contains_five_files(trained):
    assert names_in(trained) == FILES


def test_metrics_csv_has_one_row_per_epoch(trained):
    """--epochs replaces the demo's number of epochs."""
    table = pd.read_csv(trained / "metrics.csv")
    assert list(table.columns) == COLUMNS
    assert list(table["epoch"]) == [1, 2]
    assert table.notna().all(axis=None)


def test_test_json_has_the_same_metrics(trained):
    assert list(json.loads((trained / "test.json").read_text())) == METRICS


def test_recalls_are_percentages_that_grow_with_k(trained):
    rows = pd.read_csv(trained / "metrics.csv").to_dict("records")
    rows.append(json.loads((trained / "test.json").read_text()))
    for row in rows:
        for direction in ("t2i", "i2t"):
            recalls = [row[f"{direction}_r{k}"] for k in (1, 5, 10)]
            assert 0 <= recalls[0] <= recalls[1] <= recalls[2] <= 100
            assert row[f"{direction}_medr"] >= 1
    assert max(row["t2i_r10"] for row in rows) > 1  # not fractions


def test_curves_png_is_an_image(trained):
    with Image.open(trained / "curves.png") as image:
        image.load()
        assert image.format == "PNG"


@pytest.mark.parametrize("split", ["dev", "test"])
def test_best_pt_scores_the_written_metrics(trained, shapes, split):
    checkpoint = load_checkpoint(trained / "best.pt")
    metrics = evaluate(
        load_clip(checkpoint),
        checkpoint.tokenizer,
        read_splits(shapes)[split],
        checkpoint.config,
        torch.device("cpu"),
    )
    if split == "test":
        written = json.loads((trained / "test.json").read_text())
    else:
        table = pd.read_csv(trained / "metrics.csv")
        written = table.loc[table[RECALLS].sum(axis=1).idxmax(), METRICS].to_dict()
    assert metrics == pytest.approx(written)


@pytest.mark.slow
def test_best_pt_has_the_largest_sum_of_recalls(workdir, shapes, monkeypatch):
    """It is not the last epoch, although the training loss falls in every epoch."""
    scales = []

    def validate(model, run):
        scales.append(model.logit_scale.detach().clone())
        epoch = len(scales)
        recall = {1: 20.0, 2: 50.0, 3: 45.0}.get(epoch, 0.0)
        median_ranks = {"t2i_medr": 10.0 - epoch, "i2t_medr": 10.0 - epoch}
        return dict.fromkeys(METRICS, recall) | median_ranks

    monkeypatch.setattr(trainer, "validate", validate)
    main([*TINY, "--epochs", "3", "--data-dir", str(shapes)])
    assert torch.equal(tensors(Path("runs/demo/best.pt"))["logit_scale"], scales[1])
    assert torch.equal(tensors(Path("runs/demo/last.pt"))["logit_scale"], scales[2])


@pytest.mark.parametrize(
    ("seconds_per_epoch", "saved"), [(1, [0, 5]), (40, [0, 2, 4, 5]), (60, [0, 1, 2, 3, 4, 5])]
)
def test_checkpoints_are_saved_once_a_minute_and_at_the_end(
    workdir, shapes, monkeypatch, seconds_per_epoch, saved
):
    """Five epochs, by a clock that advances at the end of each."""
    clock = [0.0]
    fake_time = SimpleNamespace(monotonic=lambda: clock[0], perf_counter=time.perf_counter)
    monkeypatch.setattr(trainer, "time", fake_time)
    original_validate = trainer.validate

    def validate(model, run):
        clock[0] += seconds_per_epoch
        return original_validate(model, run)

    monkeypatch.setattr(trainer, "validate", validate)
    epochs = []
    original = trainer.save_checkpoint

    def save(run: trainer.Run) -> None:
        original(run)
        epochs.append(len(load_checkpoint("runs/demo/last.pt").training.history))

    monkeypatch.setattr(trainer, "save_checkpoint", save)
    main([*TINY, "--epochs", "5", "--data-dir", str(shapes)])
    assert epochs == saved
    assert len(curve(workdir / "runs/demo")) == 5


def test_best_pt_is_on_disk_before_last_pt_names_its_epoch(workdir, shapes, monkeypatch):
    written = []
    original = trainer.atomic_write

    def write(path: Path, content: object) -> None:
        written.append(path.name)
        original(path, content)

    monkeypatch.setattr(trainer, "atomic_write", write)
    main([*TINY, "--epochs", "1", "--data-dir", str(shapes)])
    assert written[:2] == ["last.pt", "metrics.csv"]  # before the first step
    assert written[2:4] == ["best.pt", "last.pt"]


@pytest.mark.slow
def test_training_workers_end_before_the_test_and_dev_workers_are_kept(
    workdir, shapes, monkeypatch
):
    """Validation uses the same worker in each epoch."""
    workers = []

    def record(name: str) -> None:
        original = getattr(trainer, name)

        def function(*arguments: object) -> object:
            result = original(*arguments) if name == "validate" else None
            workers.append({process.pid for process in multiprocessing.active_children()})
            return result or original(*arguments)

        monkeypatch.setattr(trainer, name, function)

    record("validate")
    record("test_best")
    main([*TINY, "--num-workers", "1", "--data-dir", str(shapes)])
    first, second, at_end = workers
    assert len(first) == 2
    assert first == second
    assert len(at_end) == 1
    assert at_end < first


@pytest.mark.parametrize(
    ("sums", "best"),
    [
        ([10], 1),
        ([10, 20, 15], 2),
        ([20, 20, 10], 2),
        ([5, 20, 20], 3),
        ([0, 0], 2),
        ([1, 2, 3], 3),
    ],
)
def test_best_epoch_is_the_last_with_the_largest_sum(sums, best):
    """Of the six recalls; neither the loss, a single recall nor a median rank decides."""

    def row(epoch: int, total: int) -> dict[str, float]:
        fractions = (0.1, 0.3, 0.2, 0.3, 0.1, 0.0)
        if epoch % 2:
            fractions = (0.3, 0.1, 0.1, 0.0, 0.2, 0.3)
        recalls = {name: round(total * part) for name, part in zip(RECALLS, fractions)}
        recalls["t2i_r1"] += total - sum(recalls.values())
        median_ranks = {"t2i_medr": 99 - total, "i2t_medr": total}
        return {"epoch": epoch, "train_loss": 9.0 - epoch, **recalls, **median_ranks}

    assert len(RECALLS) == 6
    assert best_epoch([row(epoch, total) for epoch, total in enumerate(sums, start=1)]) == best


def test_tensorboard_gets_loss_and_recalls_by_step(workdir, shapes, monkeypatch):
    """With recalls on the axis of the loss. A run that is stopped closes its file too."""
    scalars, closed = [], []

    class Writer:
        def __init__(self, *_: object, **__: object) -> None:
            self.add_scalar = lambda name, value, step: scalars.append((name, step))
            self.close = lambda: closed.append(True)

    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    module = SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(trainer, "contrastive_loss", at_step(2 * STEPS + 1, KeyboardInterrupt()))
    error_message(main, *TINY, "--epochs", "3", "--data-dir", shapes)
    for name in ("train/loss", "train/lr", "dev/t2i_r1", "dev/i2t_medr"):
        assert [step for logged, step in scalars if logged == name] == [STEPS, 2 * STEPS]
    assert closed == [True]


# ---------------------------------------------------------------- resuming

# Flags of a run with every source of randomness: dropout, stochastic depth, augmentation.
RANDOM = [*TINY, "--epochs", "3", "--dropout", "0.3", "--drop-path", "0.3", "--augment"]
STOPPED_BY_A_SIGNAL = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
sys.path.insert(0, {root!r})
import trainer
trainer.SAVE_SECONDS = 0
original, steps = trainer.contrastive_loss, iter(range(1, 100))
def loss(*batch):
    if next(steps) == {step}:
        os.kill(os.getpid(), signal.{signal})
    return original(*batch)
trainer.contrastive_loss = loss
trainer.main()
"""


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """The folder of a run of three epochs with the flags `RANDOM`."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    result = script("trainer.py", *RANDOM, "--data-dir", str(shapes), cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "runs" / "demo"


@pytest.fixture(scope="module", params=["SIGTERM", "SIGINT"])
def stopped(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shapes: Path
) -> subprocess.CompletedProcess:
    """The same run with two DataLoader workers, stopped by a signal in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    values = {"root": str(ROOT), "step": STEPS + 3, "signal": request.param}
    (folder / "stopped.py").write_text(STOPPED_BY_A_SIGNAL.format(**values))
    flags = [*RANDOM, "--num-workers", "2", "--data-dir", str(shapes)]
    result = script(str(folder / "stopped.py"), *flags, cwd=folder)
    result.folder = folder
    return result


@pytest.mark.slow
def test_a_signal_stops_a_run_with_the_resume_command(stopped):
    assert stopped.returncode == 1
    assert "Traceback" not in stopped.stderr
    assert "python trainer.py --resume runs/demo/last.pt" in stopped.stderr.splitlines()[-1]
    assert list(curve(stopped.folder / "runs" / "demo")["epoch"]) == ["1"]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_run_equals_an_uninterrupted_run(uninterrupted, stopped, workdir, shapes, workers):
    """Bit for bit, with any number of DataLoader workers."""
    shutil.copytree(stopped.folder / "runs", workdir / "runs")
    flags = ["--num-workers", str(workers), "--data-dir", str(shapes)]
    result = script("trainer.py", "--resume", "runs/demo/last.pt", *flags, cwd=workdir)
    assert result.returncode == 0, result.stderr
    resumed = workdir / "runs" / "demo"
    for checkpoint in ("last.pt", "best.pt"):
        assert_same_tensors(resumed / checkpoint, uninterrupted / checkpoint)
    pd.testing.assert_frame_equal(curve(resumed), curve(uninterrupted))
    assert len(curve(resumed)) == 3
    assert (resumed / "test.json").read_text() == (uninterrupted / "test.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, STEPS + 2])
def test_resume_needs_no_other_flag(trained, workdir, shapes, monkeypatch, step):
    """All settings come from the checkpoint, including the run's folder."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "contrastive_loss", at_step(step, KeyboardInterrupt()))
        patch.setattr(trainer, "SAVE_SECONDS", 0)
        message = error_message(main, *TINY, "--name", "mine", "--data-dir", shapes)
    assert "runs/mine/last.pt" in message
    main(["--resume", "runs/mine/last.pt"])
    assert names_in(workdir / "runs") == ["mine"]
    assert names_in(workdir / "runs/mine") == FILES
    assert_same_tensors(workdir / "runs/mine/last.pt", trained / "last.pt")
    pd.testing.assert_frame_equal(curve(workdir / "runs/mine"), curve(trained))


def test_new_best_weights_remove_the_metrics_of_the_former(trained, workdir, shapes, monkeypatch):
    """A run that is resumed with more epochs and stopped has no test.json of another best.pt."""
    shutil.copytree(trained, workdir / "runs/demo")
    monkeypatch.setattr(trainer, "best_epoch", len)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    monkeypatch.setattr(trainer, "contrastive_loss", at_step(STEPS + 1, KeyboardInterrupt()))
    flags = ["--epochs", "4", "--data-dir", shapes]
    error_message(main, "--resume", "runs/demo/last.pt", *flags)
    assert len(load_checkpoint("runs/demo/last.pt").training.history) == 3
    assert names_in(workdir / "runs/demo") == sorted(set(FILES) - {"test.json"})


def test_last_pt_is_complete_before_the_first_step(workdir, shapes, monkeypatch):
    monkeypatch.setattr(trainer, "contrastive_loss", at_step(1, KeyboardInterrupt()))
    error_message(main, *TINY, "--data-dir", shapes)
    content = torch.load("runs/demo/last.pt", weights_only=True)
    assert {"optimizer", "schedule", "scaler", "history"} <= content.keys()
    assert load_checkpoint("runs/demo/last.pt").training.history == []
    assert names_in(workdir / "runs/demo") == ["last.pt", "metrics.csv"]
    assert (workdir / "runs/demo/metrics.csv").read_text().strip() == ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("flags", "given", "saved"),
    [
        (["--batch-size", "4"], "--batch-size 4", "8"),
        (["--seed", "3"], "--seed 3", "0"),
        (["--head-lr", "0.01"], "--head-lr 0.01", "0.001"),
        (["--image-encoder", "resnet18"], "--image-encoder resnet18", "test_resnet"),
        (["--name", "other"], "--name other", "demo"),
        (["--augment"], "--augment", "False"),
    ],
)
def test_resume_rejects_a_contradicting_flag(trained, workdir, flags, given, saved):
    """The error contains both values."""
    message = error_message(main, "--resume", trained / "last.pt", *flags)
    assert f"{given}:" in message
    assert f" {saved};" in message
    assert names_in(workdir) == []


def test_resume_with_data_elsewhere_prints_a_search_command_that_works(
    trained, workdir, shapes, capsys
):
    """The best epoch was before, when the data was in the current folder."""
    shutil.copytree(trained, workdir / "runs/demo")
    main(["--resume", "runs/demo/last.pt", "--data-dir", str(shapes)])
    line = capsys.readouterr().out.splitlines()[-1]
    assert f"--data-dir {shapes}" in line
    inference.main(shlex.split(line)[2:])


def test_resume_accepts_other_data_dir_device_and_workers(trained, workdir, shapes, capsys):
    shutil.copytree(trained, workdir / "runs/demo")
    moved = shutil.copytree(shapes, workdir / "moved")
    flags = ["--data-dir", "moved", "--device", "cpu", "--num-workers", "1", "--epochs", "2"]
    main(["--resume", "runs/demo/last.pt", *flags])
    stdout = capsys.readouterr().out
    assert "data_dir='moved'" in stdout
    assert "num_workers=1" in stdout
    assert moved.is_dir()
    assert (workdir / "runs/demo/test.json").read_text() == (trained / "test.json").read_text()


@pytest.mark.slow
def test_resume_starts_a_new_grad_scaler(stopped, workdir, shapes, monkeypatch):
    """A run that needed no gradient scaler resumes on a device that needs one."""
    shutil.copytree(stopped.folder / "runs", workdir / "runs")
    original = torch.amp.GradScaler
    scalers = []

    def enabled_scaler(device, enabled):
        scalers.append(original(device))
        return scalers[0]

    monkeypatch.setattr(torch.amp, "GradScaler", enabled_scaler)
    main(["--resume", "runs/demo/last.pt", "--data-dir", str(shapes)])
    assert len(curve(workdir / "runs/demo")) == 3
    training = load_checkpoint("runs/demo/last.pt").training
    assert training.scaler == scalers[0].state_dict()


def test_resume_restores_the_grad_scaler(trained, workdir, shapes):
    """With the steps that it did not skip, which the settings do not determine."""
    last = Path("runs/demo/last.pt")
    shutil.copytree(trained, last.parent)
    content = torch.load(last, weights_only=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    content["scaler"] = scaler.state_dict() | {"_growth_tracker": 7}
    for state in content["optimizer"]["state"].values():
        state["step"].fill_(5.0)
    torch.save(content, last)
    checkpoint = load_checkpoint(last)
    flags = ["--resume", str(last), "--data-dir", str(shapes)]
    config = trainer.resumed_config(flags, checkpoint, str(last))
    dist = trainer.Distributed(torch.device("cpu"), torch.float16, rank=0, world_size=1)
    run = trainer.setup(config, checkpoint, dist)
    assert run.scaler.state_dict() == content["scaler"]
    steps = {state["step"].item() for state in run.optimizer.state_dict()["state"].values()}
    assert steps == {5.0}


def test_resume_rejects_best_pt(trained, workdir):
    message = error_message(main, "--resume", trained / "best.pt")
    assert "best.pt" in message
    assert "last.pt" in message


@pytest.mark.parametrize("content", [None, b"", b"no weights"], ids=["absent", "empty", "text"])
def test_resume_rejects_a_file_that_is_no_checkpoint(workdir, content):
    if content is not None:
        Path("mine.pt").write_bytes(content)
    assert "mine.pt" in error_message(main, "--resume", "mine.pt")


def test_resume_requires_best_pt(trained, workdir, shapes):
    """A run is resumed with its whole folder."""
    shutil.copytree(trained, workdir / "runs/demo")
    Path("runs/demo/best.pt").unlink()
    message = error_message(main, "--resume", "runs/demo/last.pt", "--data-dir", shapes)
    assert "best.pt" in message


@pytest.mark.parametrize(
    "flags", [["--name", "mine"], ["--demo", "--name", "mine"], ["--name", "demo"]]
)
def test_training_never_overwrites_another_run(workdir, shapes, flags):
    """Nor its `best.pt` alone, if the larger `last.pt` was removed."""
    run_dir = workdir / "runs" / flags[-1]
    run_dir.mkdir(parents=True)
    for name in ("best.pt", "last.pt"):
        (run_dir / name).write_bytes(b"precious")
        message = error_message(main, *flags, "--no-pretrained", "--data-dir", shapes, *SMALL)
        assert f"{name} exists" in message
        assert ("--resume" in message) == (name == "last.pt")
        assert "--name" in message
        assert (run_dir / name).read_bytes() == b"precious"


def test_demo_replaces_an_earlier_demo(workdir, shapes, monkeypatch):
    run_dir = workdir / "runs/demo"
    run_dir.mkdir(parents=True)
    for name in FILES:
        (run_dir / name).write_bytes(b"of an earlier demo")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "contrastive_loss", at_step(1, KeyboardInterrupt()))
        error_message(main, *TINY, "--data-dir", shapes)
    assert b"of an earlier demo" not in {path.read_bytes() for path in run_dir.iterdir()}


# ---------------------------------------------------------------- seeds, data, pretrained encoders


@pytest.mark.slow
def test_seed_determines_the_run(trained, workdir, shapes):
    """The same seed gives the same curve, and another seed gives another one."""
    main([*TINY, "--data-dir", str(shapes)])
    pd.testing.assert_frame_equal(curve(workdir / "runs/demo"), curve(trained))
    main([*TINY, "--data-dir", str(shapes), "--seed", "1"])
    losses = set(curve(workdir / "runs/demo")["train_loss"])
    assert losses.isdisjoint(curve(trained)["train_loss"])


def test_training_accepts_any_names_and_caption_counts(workdir, shapes):
    rows = []
    for index, path in enumerate(sorted((shapes / "Images").iterdir())[:30]):
        name = f"holiday 2019/Zoë, no. {index}.PNG" if index % 2 else f"{index}.a.png"
        target = workdir / "my images/Images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
        for count in range(1 + index % 4):
            rows.append((name, f'image {index}, "seen" {count} times'))
    table = pd.DataFrame(rows, columns=["image", "caption"])
    table.to_csv("my images/captions.txt", index=False)
    flags = ["--no-pretrained", "--image-encoder", "test_resnet", "--text-encoder", "distilbert"]
    flags += ["--text-layers", "1", "--text-width", "64"]
    main([*flags, "--data-dir", "my images", "--name", "mine", *SMALL])
    assert names_in(workdir / "runs/mine") == FILES


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> dict[str, Path]:
    """The folders of two small pretrained encoders: "image" from timm, "text" from transformers."""
    root = tmp_path_factory.mktemp("backbones")
    folders = {"image": root / "image", "text": root / "text"}
    torch.manual_seed(1)
    image = timm.create_model("test_resnet", num_classes=10)
    for module in image.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    timm.models.save_for_hf(image, folders["image"], safe_serialization=True)

    tokenizer = build_wordpiece_tokenizer(read_splits(shapes)["train"].texts, 64)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
    ).save_pretrained(folders["text"])
    text_config = DistilBertConfig(
        dim=32, hidden_dim=64, n_layers=1, n_heads=2, vocab_size=tokenizer.get_vocab_size()
    )
    DistilBertModel(text_config).save_pretrained(folders["text"])
    return folders


@pytest.fixture(scope="module")
def pretrained_flags(backbones: dict[str, Path]) -> list[str]:
    """The flags of a run that starts from the encoders of `backbones`."""
    flags = ["--image-encoder", f"local-dir:{backbones['image']}"]
    return [*flags, "--text-encoder", str(backbones["text"])]


def unchanged_tensors(checkpoint: Path, backbones: dict[str, Path], part: str) -> dict[str, bool]:
    """For each tensor of an encoder whether the checkpoint has it as its pretrained folder does."""
    before = load_file(backbones[part] / "model.safetensors")
    prefix = f"{part}.encoder.model."
    unchanged = {}
    for name, value in tensors(checkpoint).items():
        if name.startswith(prefix):
            name = name.removeprefix(prefix)
            unchanged[name] = torch.equal(value, before[name])
    assert unchanged
    return unchanged


def test_training_updates_encoders_but_not_bn_stats(workdir, shapes, backbones, pretrained_flags):
    """Pretrained encoders: all parameters change and the batch-norm statistics do not."""
    flags = ["--freeze-image-encoder", "0", "--freeze-text-encoder", "0"]
    main([*pretrained_flags, *flags, "--data-dir", str(shapes), *SMALL])
    best = workdir / "runs/clip/best.pt"
    image = unchanged_tensors(best, backbones, "image")
    statistics = {name for name in image if "running_" in name or "num_batches_tracked" in name}
    assert {"running_mean", "running_var"} <= {name.rpartition(".")[2] for name in statistics}
    assert {name for name, unchanged in image.items() if unchanged} == statistics
    text = unchanged_tensors(best, backbones, "text")
    changed = [name for name, unchanged in text.items() if not unchanged]
    assert any("attention" in name for name in changed)
    assert any("word_embeddings" in name for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("constant", ["image", "text"])
def test_zero_lr_keeps_a_pretrained_encoder_unchanged(
    workdir, shapes, backbones, pretrained_flags, constant
):
    main([*pretrained_flags, f"--{constant}-lr", "0", "--data-dir", str(shapes), *SMALL])
    for part in ("image", "text"):
        unchanged = unchanged_tensors(workdir / "runs/clip/best.pt", backbones, part).values()
        assert all(unchanged) == (part == constant)


def test_training_from_scratch_updates_bn_stats(trained):
    state = tensors(trained / "last.pt")
    means = [value for name, value in state.items() if name.endswith("running_mean")]
    assert means
    assert all(mean.abs().max() > 0 for mean in means)


# ---------------------------------------------------------------- learning rates


def test_param_groups_set_lr_and_weight_decay(trained):
    """Encoders and heads have their own learning rates; only matrices decay."""
    model = load_clip(load_checkpoint(trained / "best.pt"))
    frozen = next(model.text.encoder.parameters()).requires_grad_(False)
    config = Config(image_lr=0.1, text_lr=0.2, head_lr=0.3, weight_decay=0.4)
    found = []
    for group in param_groups(model, config):
        for parameter in group["params"]:
            found.append((id(parameter), group["lr"], group["weight_decay"]))

    heads = [*model.image.head.parameters(), *model.text.head.parameters(), model.logit_scale]
    parts = [
        (model.image.encoder.parameters(), 0.1),
        (model.text.encoder.parameters(), 0.2),
        (heads, 0.3),
    ]
    expected = []
    for parameters, lr in parts:
        for parameter in parameters:
            if parameter is not frozen:
                expected.append((id(parameter), lr, 0.4 if parameter.ndim > 1 else 0.0))
    assert sorted(found) == sorted(expected)


def test_param_groups_use_encoder_lr_for_its_own_head():
    """timm's ConvNeXt has a module `head` of its own, which is not the projection head."""
    config = replace(CONFIG, image_encoder="convnext_atto", image_lr=0.1, text_lr=0.2, head_lr=0.3)
    model, _ = build(config)
    lr_of = {}
    for group in param_groups(model, config):
        lr_of |= {id(parameter): group["lr"] for parameter in group["params"]}
    encoder_lrs = {
        name: lr_of[id(parameter)] for name, parameter in model.image.encoder.named_parameters()
    }
    assert "model.head.norm.weight" in encoder_lrs
    assert set(encoder_lrs.values()) == {0.1}
    assert {lr_of[id(parameter)] for parameter in model.image.head.parameters()} == {0.3}


@pytest.mark.parametrize(
    ("steps", "warmup"), [(100, 0.1), (100, 0.0), (37, 0.5), (5, 1.0), (1, 0.1)]
)
def test_warmup_then_cosine_rises_linearly_and_falls_to_zero(steps, warmup):
    factor = warmup_then_cosine(steps, warmup)
    warmup_steps = max(1, round(steps * warmup))
    factors = [factor(step) for step in range(steps + 1)]
    rising = [(step + 1) / warmup_steps for step in range(warmup_steps)]
    assert factors[:warmup_steps] == pytest.approx(rising)
    falling = factors[warmup_steps:]
    assert falling == sorted(falling, reverse=True)
    assert factors[max(warmup_steps, steps)] == pytest.approx(0 if warmup_steps < steps else 1)
    assert all(0 <= value <= 1 for value in factors)


def test_warmup_then_cosine_is_half_in_the_middle_of_the_decay():
    assert warmup_then_cosine(100, 0.2)(60) == pytest.approx(0.5)


# ---------------------------------------------------------------- the training step


def test_train_step_takes_no_equal_captions_as_negatives(workdir, shapes):
    """Pairs that all have one caption have no negatives, and so no loss."""
    config = parse(Config, [*TINY, "--data-dir", str(shapes)])
    run = trainer.setup(config, None, trainer.Distributed.init(config))
    batch = next(iter(run.loader))
    batch["caption_ids"] = torch.zeros_like(batch["caption_ids"])
    assert trainer.train_step(run, batch).item() == 0


@pytest.mark.parametrize(
    ("device", "has_bfloat16", "expected"),
    [("cuda", True, torch.bfloat16), ("cuda", False, torch.float16), ("cpu", True, torch.float32)],
)
def test_auto_precision_is_what_the_device_supports(device, has_bfloat16, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bfloat16)
    assert trainer._training_precision(Config(), torch.device(device)) is expected


@pytest.mark.parametrize("precision", [torch.float32, torch.float16])
def test_train_step_clips_the_gradients_and_clamps_the_logit_scale(workdir, shapes, precision):
    """In float16 the norm is that of the gradients without the scaler's factor."""
    config = parse(Config, [*TINY, "--data-dir", str(shapes), "--clip-norm", "0.01"])
    dist = trainer.Distributed(torch.device("cpu"), precision, rank=0, world_size=1)
    run = trainer.setup(config, None, dist)
    assert run.scaler.is_enabled() == (precision is torch.float16)
    run.scaler.load_state_dict(run.scaler.state_dict() | {"scale": 64.0})  # without overflow
    run.model.logit_scale.data.fill_(4.7)  # more than log(100)
    norms = []

    def record_norm(*_: object) -> None:
        gradients = [parameter.grad.flatten() for parameter in run.model.parameters()]
        norms.append(torch.cat(gradients).norm().item())

    run.optimizer.register_step_post_hook(record_norm)
    trainer.train_step(run, next(iter(run.loader)))
    assert norms == [pytest.approx(0.01, rel=1e-3)]
    assert run.model.logit_scale.exp().item() == pytest.approx(100)


def test_train_epoch_returns_the_mean_loss_of_all_steps(workdir, shapes, monkeypatch):
    """Each counted once, although losses are read every few steps."""
    monkeypatch.setattr(trainer, "LOG_EVERY", 2)
    config = parse(Config, [*TINY, "--data-dir", str(shapes)])
    run = trainer.setup(config, None, trainer.Distributed.init(config))
    losses = iter(torch.arange(STEPS).square().float())
    monkeypatch.setattr(trainer, "train_step", lambda *_: next(losses))
    mean = trainer.train_epoch(run, 0, iter(run.loader))
    assert mean == pytest.approx(sum(i**2 for i in range(STEPS)) / STEPS)


# ---------------------------------------------------------------- errors


@pytest.mark.slow
@pytest.mark.parametrize(("step", "value"), [(2, "nan"), (STEPS + 3, "inf")])
def test_reduce_losses_stops_at_a_loss_that_is_not_finite(
    trained, workdir, shapes, monkeypatch, step, value
):
    """`last.pt` stays that of the epoch before, from which the run can be resumed."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "contrastive_loss", at_step(step, float(value)))
        patch.setattr(trainer, "SAVE_SECONDS", 0)
        assert f"step {step}:" in error_message(main, *TINY, "--data-dir", shapes)
    assert len(load_checkpoint("runs/demo/last.pt").training.history) == step // STEPS
    main(["--resume", "runs/demo/last.pt"])
    assert_same_tensors(workdir / "runs/demo/last.pt", trained / "last.pt")


def test_load_splits_rejects_fewer_images_than_a_batch(workdir, shapes):
    message = error_message(main, *TINY, "--batch-size", "49", "--data-dir", shapes)
    assert "--batch-size 49" in message
    assert "48" in message
    assert names_in(workdir) == []


@pytest.mark.parametrize("flags", [["--demo"], ["--no-pretrained"], ["--demo", "--no-pretrained"]])
def test_check_data_dir_rejects_an_absent_folder(workdir, flags):
    """Nothing is created for it."""
    message = error_message(main, *flags, "--data-dir", "data/flickr8", *SMALL)
    assert "data/flickr8" in message
    assert names_in(workdir) == []


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--image-encoder", "hf-hub:nobody/no-such-model"),
        ("--text-encoder", "nobody/no-such-model"),
    ],
)
def test_unavailable_encoder_stops_before_data_is_read(
    workdir, pretrained_flags, flag, name, capsys
):
    message = error_message(main, *pretrained_flags, flag, name, *SMALL)
    for text in (name, "folder", "--no-pretrained", "--demo"):
        assert text in message.replace("FOLDER", "folder")
    assert "data:" not in capsys.readouterr().out
    assert names_in(workdir) == []


@pytest.fixture
def own_shapes(workdir: Path, shapes: Path) -> Path:
    """A copy of the shapes that a test may damage."""
    return shutil.copytree(shapes, workdir / "own")


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_load_splits_rejects_an_image_with_a_broken_header(workdir, own_shapes, split):
    """Before the first step: the run has no folder yet."""
    path = read_splits(own_shapes)[split].paths[-1]
    path.write_bytes(b"not an image" * 20)
    assert str(path.relative_to(workdir)) in error_message(main, *TINY, "--data-dir", "own")
    assert names_in(workdir) == ["own"]


def test_resume_reads_no_headers_of_the_images_that_the_run_started_with(
    trained, workdir, own_shapes, capsys
):
    """A million of them take a minute. Other data, which must be allowed, is checked."""
    shutil.copytree(trained, workdir / "runs/demo")
    flags = ["--resume", "runs/demo/last.pt", "--data-dir", "own"]
    path = read_splits(own_shapes)["train"].paths[-1]
    path.write_bytes(b"not an image" * 20)
    main(flags)
    assert "all 2 epochs are done" in capsys.readouterr().out
    assert str(path.relative_to(workdir)) in error_message(main, *flags, "--allow-changed-data")


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image_stops_training_with_its_path(workdir, own_shapes, workers):
    """Its header is intact, so that it is found when it is loaded."""
    path = read_splits(own_shapes)["train"].paths[20]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    message = error_message(main, *TINY, "--num-workers", workers, "--data-dir", "own")
    assert str(path.relative_to(workdir)) in message
    assert "Traceback" not in message


def test_train_rejects_encoders_that_cannot_be_restored(workdir, shapes, monkeypatch):
    """Before the first step, and a run of the same name may start afterwards."""
    monkeypatch.setitem(models.TOKENIZER_PARTS, "pre_tokenizer", "")
    message = error_message(main, *TINY, "--data-dir", shapes)
    assert "--text-encoder distilbert" in message
    assert "BertPreTokenizer" in message
    assert names_in(workdir) == []


def test_setup_rejects_chunks_on_mps():
    dist = trainer.Distributed(torch.device("mps"), torch.float32, rank=0, world_size=1)
    with pytest.raises(UserError, match="--chunk-size"):
        trainer.setup(replace(CONFIG, chunk_size=4), None, dist)


@pytest.mark.parametrize("split", ["dev", "test"])
def test_truncated_image_of_another_split_stops_training_early(
    workdir, own_shapes, monkeypatch, split
):
    """Not when all epochs are over. One of dev is found by the first validation."""
    path = read_splits(own_shapes)[split].paths[-1]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    monkeypatch.setattr(trainer, "contrastive_loss", at_step(STEPS + 1, AssertionError("late")))
    assert str(path.relative_to(workdir)) in error_message(main, *TINY, "--data-dir", "own")


def test_test_images_are_checked_as_they_are_scored(workdir, own_shapes):
    """This one is readable at full size, but not at the reduced size of evaluation."""
    path = read_splits(own_shapes)["test"].paths[-1]
    Image.new("RGB", (1800, 1400), "red").save(path, "JPEG")
    jpeg = path.read_bytes()
    path.write_bytes(jpeg[: len(jpeg) // 2] + jpeg)
    assert load_image(path).shape == (1400, 1800, 3)
    assert str(path.relative_to(workdir)) in error_message(main, *TINY, "--data-dir", "own")
    assert names_in(workdir) == ["own"]


# ---------------------------------------------------------------- frozen encoders


@pytest.mark.slow
@pytest.mark.parametrize("frozen_part", ["image", "text"])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 1.0])
def test_freeze_keeps_the_fraction_nearest_to_the_input(
    workdir, shapes, backbones, pretrained_flags, frozen_part, fraction
):
    """Counted in tensors. All others are trained, except for batch-norm statistics."""
    fractions = {"image": 0.0, "text": 0.0} | {frozen_part: fraction}
    flags = ["--freeze-image-encoder", str(fractions["image"])]
    flags += ["--freeze-text-encoder", str(fractions["text"])]
    main([*pretrained_flags, *flags, "--data-dir", str(shapes), *SMALL])
    best = workdir / "runs/clip/best.pt"
    model = load_clip(load_checkpoint(best))
    for part, part_fraction in fractions.items():
        unchanged = unchanged_tensors(best, backbones, part)
        encoder = getattr(model, part).encoder.model
        names = [name for name, _ in encoder.named_parameters()]  # from the input to the output
        num_frozen = round(part_fraction * len(names))
        assert all(unchanged[name] for name in names[:num_frozen])
        assert not any(unchanged[name] for name in names[num_frozen:])
        assert all(unchanged[name] for name, _ in encoder.named_buffers() if name in unchanged)


@pytest.mark.slow
def test_setup_freezes_nothing_from_scratch(workdir, shapes):
    flags = ["--freeze-image-encoder", "1", "--freeze-text-encoder", "1"]
    main([*TINY, "--data-dir", str(shapes), *flags])
    before = tensors_before_training(workdir, shapes)
    after = tensors(workdir / "runs/demo/last.pt")
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert not [name for name in unchanged if ".encoder.model." in name and name.endswith("weight")]


def tensors_before_training(workdir: Path, shapes: Path) -> dict[str, Tensor]:
    """The model of the same run before its first step."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(trainer, "contrastive_loss", at_step(1, KeyboardInterrupt()))
        main([*TINY, "--data-dir", str(shapes), "--name", "first"])
    return tensors(workdir / "runs/first/last.pt")


def test_frozen_encoder_is_not_in_train_mode():
    """So that its dropout is off, while the head that is trained has its own."""
    model, _ = build(CONFIG)
    models.freeze(model.text.encoder, 1.0)
    trainer.set_train_mode(model, CONFIG)
    assert not model.text.encoder.training
    assert model.text.head.training and model.image.encoder.training


# ---------------------------------------------------------------- fine-tuning and training longer


def test_init_from_starts_a_new_run_from_the_model(trained, workdir, shapes, monkeypatch):
    """Before its first step the new run has the model of the checkpoint, and its architecture."""
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "contrastive_loss", at_step(1, KeyboardInterrupt()))
        flags = [
            "--init-from",
            trained / "best.pt",
            "--name",
            "tuned",
            "--data-dir",
            shapes,
            *SMALL,
        ]
        error_message(main, *flags, "--num-workers", "0", "--device", "cpu")
    assert_same_tensors(workdir / "runs/tuned/last.pt", trained / "best.pt")
    config = load_checkpoint("runs/tuned/last.pt").config
    assert (config.image_encoder, config.text_width) == ("test_resnet", 128)
    assert config.pretrained  # so that batch-norm statistics are kept and layers can be frozen
    assert config.init_from == ""
    assert load_checkpoint("runs/tuned/last.pt").training.history == []


@pytest.mark.slow
def test_init_from_trains_on_other_data(trained, workdir, shapes):
    main(
        [
            "--init-from",
            str(trained / "best.pt"),
            "--name",
            "tuned",
            "--data-dir",
            str(shapes),
            *SMALL,
        ]
    )
    assert names_in(workdir / "runs/tuned") == FILES
    assert not torch.equal(
        tensors(workdir / "runs/tuned/last.pt")["image.head.linear.weight"],
        tensors(trained / "best.pt")["image.head.linear.weight"],
    )


def test_init_from_has_the_dropout_of_the_new_run(trained, workdir, shapes):
    """And saves it, so that a resumed run has the same."""
    argv = ["--init-from", str(trained / "best.pt"), "--data-dir", str(shapes), *SMALL]
    argv += ["--dropout", "0.2", "--drop-path", "0.3"]
    checkpoint = load_checkpoint(trained / "best.pt")
    config = trainer.initialized_config(argv, checkpoint, str(trained / "best.pt"))
    run = trainer.setup(config, checkpoint, trainer.Distributed.init(config))
    assert (run.config.dropout, run.config.drop_path) == (0.2, 0.3)
    assert run.model.image.head.dropout.p == run.model.text.head.dropout.p == 0.2
    assert run.model.image.encoder.drop_path == 0.3


def test_init_from_keeps_drop_path_and_image_size_of_the_checkpoint(trained):
    """Unless others are passed; -1 is no other rate."""
    checkpoint = load_checkpoint(trained / "best.pt")
    checkpoint.config = replace(checkpoint.config, drop_path=0.3)
    argv = ["--init-from", str(trained / "best.pt"), "--drop-path", "-1"]
    config = trainer.initialized_config(argv, checkpoint, str(trained / "best.pt"))
    assert (config.drop_path, config.image_size) == (0.3, checkpoint.config.image_size)


@pytest.mark.parametrize(
    ("flag", "saved"), [("--projection-dim 64", 256), ("--temperature 0.2", 0.07)]
)
def test_init_from_rejects_another_architecture(flag, saved, trained, workdir):
    message = error_message(main, "--init-from", trained / "best.pt", *flag.split())
    assert f"{flag}: the checkpoint has {saved}" in message


@pytest.mark.slow
def test_resume_trains_longer_with_the_new_schedule(trained, workdir, shapes, capsys):
    shutil.copytree(trained, workdir / "runs/demo")
    main(["--resume", "runs/demo/last.pt", "--data-dir", str(shapes), "--epochs", "4"])
    assert "2 epochs become 4" in capsys.readouterr().out
    table = pd.read_csv("runs/demo/metrics.csv")
    assert list(table["epoch"]) == [1, 2, 3, 4]
    factor = warmup_then_cosine(4 * STEPS, 0.1)
    peak = load_checkpoint("runs/demo/last.pt").config.head_lr
    for epoch in (3, 4):
        assert table["lr"][epoch - 1] == pytest.approx(peak * factor(epoch * STEPS))
    assert load_checkpoint("runs/demo/last.pt").config.epochs == 4


def test_resume_rejects_fewer_epochs_than_are_done(trained, workdir, shapes):
    shutil.copytree(trained, workdir / "runs/demo")
    message = error_message(main, "--resume", "runs/demo/last.pt", "--epochs", "1")
    assert "--epochs 1: runs/demo/last.pt has 2 epochs already" in message


def test_resume_says_that_a_run_is_finished(trained, workdir, shapes, capsys):
    shutil.copytree(trained, workdir / "runs/demo")
    main(["--resume", "runs/demo/last.pt", "--data-dir", str(shapes)])
    assert "all 2 epochs are done" in capsys.readouterr().out


# ---------------------------------------------------------------- references


@pytest.mark.slow
def test_best_pt_gets_references_of_the_best_model(workdir, shapes, monkeypatch):
    monkeypatch.setattr("inference.MIN_REFERENCES", 40)
    main([*TINY, "--epochs", "1", "--data-dir", str(shapes)])
    checkpoint = load_checkpoint("runs/demo/best.pt")
    model, split = load_clip(checkpoint), read_splits(shapes)["train"]
    expected, _ = inference.encode_images(
        model.image, split.paths, checkpoint.config, torch.device("cpu")
    )
    torch.testing.assert_close(checkpoint.references.images, expected.half(), rtol=0, atol=1e-3)
    assert checkpoint.references.texts.shape == expected.shape
    test = json.loads(Path("runs/demo/test.json").read_text())
    assert list(test) == [*METRICS, *(f"{name}_nnn" for name in METRICS)]
    assert load_checkpoint("runs/demo/last.pt").references is None


def test_small_training_split_has_no_references(trained):
    assert load_checkpoint(trained / "best.pt").references is None
