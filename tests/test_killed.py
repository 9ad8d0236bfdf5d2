"""A run that is killed and resumed many times ends with the same tensors and metrics.

CLIP_KILLS=100 python -m pytest tests/test_killed.py -s
"""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TIMES, TINY, curve
from torch import Tensor

import trainer

KILLS = int(os.environ.get("CLIP_KILLS", "4"))
EPOCHS = 4
FLAGS = [*TINY, "--epochs", str(EPOCHS), "--dropout", "0.3", "--drop-path", "0.3", "--augment"]
# The files that a run writes after an epoch, in this order, and the one at its end.
WRITTEN = ["best.pt", "last.pt", "curves.png", "metrics.csv", "test.json"]
TIMEOUT = 300  # seconds
TRAINER = """
import sys
sys.path.insert(0, {root!r})
import trainer
trainer.SAVE_SECONDS = {save_seconds}
trainer.main()
"""


class Training:
    """A process of `trainer.py` in `folder`. It resumes if there is a checkpoint.

    It saves after each epoch, so that it can be killed while it does.
    """

    def __init__(
        self, folder: Path, shapes: Path, num_workers: int = 0, save_seconds: float = 0
    ) -> None:
        self.run_dir = folder / "runs" / "demo"
        self.log = folder / "log.txt"
        self.resumes = (self.run_dir / "last.pt").exists()
        if self.resumes:
            flags = ["--resume", "runs/demo/last.pt"]
        else:
            flags = [*FLAGS, "--data-dir", os.path.relpath(shapes, folder)]
        flags += ["--num-workers", str(num_workers)]
        program = TRAINER.format(root=str(ROOT), save_seconds=save_seconds)
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", program, *flags],
                cwd=folder,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.deadline = time.monotonic() + TIMEOUT

    def is_running(self) -> bool:
        assert time.monotonic() < self.deadline, self.log.read_text()
        time.sleep(0.0005)  # leaves the core to the process
        return self.process.poll() is None

    def epoch_lines(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("epoch ")]

    def has_started(self) -> bool:
        return "loss at chance" in self.log.read_text()

    def wait_for_epochs(self, count: int) -> None:
        """Waits until the first epoch starts and `count` have ended, or until the process ends."""
        while self.is_running() and not (self.has_started() and len(self.epoch_lines()) >= count):
            pass

    def wait_for_write(self, file: str) -> None:
        """Waits until `file`, or one written after it, is partly written."""
        names = tuple(WRITTEN[WRITTEN.index(file) :])
        while self.is_running() and not any(name.startswith(names) for name in self.partial()):
            pass

    def partial(self) -> list[str]:
        """The names of the files that are partly written."""
        return [path.name for path in self.run_dir.glob("*.tmp")]

    def kill(self) -> bool:
        """Kills the process. Returns False if it had already ended."""
        self.process.kill()
        return self.process.wait() < 0


def history(checkpoint: Path) -> list[dict[str, float]]:
    return torch.load(checkpoint, weights_only=True)["history"]


def rows(run_dir: Path) -> list[list[str]]:
    """The rows of `metrics.csv`; none before the file is first written."""
    if not (run_dir / "metrics.csv").exists():
        return []
    return curve(run_dir).to_numpy().tolist()


def all_tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a checkpoint: of the model, of the optimizer, and any other."""
    if isinstance(value, Tensor):
        return {name: value}
    if isinstance(value, dict):
        parts = list(value.items())
    elif isinstance(value, list | tuple):
        parts = list(enumerate(value))
    else:
        parts = []
    found = {}
    for key, part in parts:
        found |= all_tensors(part, f"{name}/{key}")
    return found


def assert_equal_runs(one: Path, other: Path) -> None:
    """Asserts that two runs have the same rows, tensors and history, apart from times."""
    assert rows(one) == rows(other)
    for file in ("last.pt", "best.pt"):
        ours = all_tensors(torch.load(one / file, weights_only=True))
        theirs = all_tensors(torch.load(other / file, weights_only=True))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    no_times = dict.fromkeys(TIMES)
    our_history = [row | no_times for row in history(one / "last.pt")]
    their_history = [row | no_times for row in history(other / "last.pt")]
    assert our_history == their_history


def assert_intact(run_dir: Path, uninterrupted: Path) -> int:
    """Asserts that all files of a killed run are whole and its metrics right.

    Returns the number of its finished epochs.
    """
    finished = len(history(run_dir / "last.pt"))
    for checkpoint in run_dir.glob("*.pt"):
        with zipfile.ZipFile(checkpoint) as archive:
            assert archive.testzip() is None
    assert finished == 0 or (run_dir / "best.pt").exists()
    table = rows(run_dir)
    assert table == rows(uninterrupted)[: len(table)]
    # A row is written after the checkpoint, or at the latest when the run is resumed.
    assert finished - 1 <= len(table) <= finished
    return finished


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, shapes: Path) -> tuple[Path, float]:
    """The folder of a run that was never killed, and the seconds that one of its epochs took."""
    (folder / "uninterrupted").mkdir()
    training = Training(folder / "uninterrupted", shapes)
    training.wait_for_epochs(0)
    started = time.monotonic()
    training.wait_for_epochs(EPOCHS)
    seconds = (time.monotonic() - started) / EPOCHS
    assert training.process.wait(TIMEOUT) == 0, training.log.read_text()
    return training.run_dir, seconds


def kill_at_random(training: Training, epoch_seconds: float, rng: np.random.Generator) -> bool:
    """Kills it in an epoch or during a write. Returns False if it had already ended."""
    training.wait_for_epochs(int(rng.choice([0, 1], p=[0.7, 0.3])))
    if rng.random() < 0.5:
        training.wait_for_write(str(rng.choice(WRITTEN[:-1])))
    else:
        time.sleep(rng.random() * epoch_seconds)
    return training.kill()


@pytest.mark.slow
def test_killed_run_resumes_bit_for_bit(
    folder: Path, shapes: Path, uninterrupted: tuple[Path, float]
):
    """It is killed in epochs and during writes, and resumed until it ends, again and again."""
    expected, epoch_seconds = uninterrupted
    rng = np.random.default_rng(0)
    kills = 0
    kills_during_write = 0
    resumes = 0
    runs = 0
    epochs = 0  # finished ones of the current run
    finished = True
    while kills < KILLS or not finished:
        if finished:
            runs += 1
            epochs = 0
            (folder / f"run {runs}").mkdir()
        training = Training(folder / f"run {runs}", shapes, num_workers=int(rng.integers(2)))
        resumes += training.resumes
        if kills < KILLS:
            killed = kill_at_random(training, epoch_seconds, rng)
        else:
            killed = training.process.wait(TIMEOUT) < 0
        finished = not killed
        if training.epoch_lines():
            assert training.epoch_lines()[0].startswith(f"epoch {epochs + 1} of {EPOCHS}:")
        if finished:
            assert training.process.returncode == 0, training.log.read_text()
            assert training.partial() == []
            assert_equal_runs(training.run_dir, expected)
            continue
        kills += 1
        kills_during_write += bool(training.partial())
        if (training.run_dir / "last.pt").exists():
            epochs_before = epochs
            epochs = assert_intact(training.run_dir, expected)
            assert epochs >= epochs_before
    print(f"\n{kills} kills, {kills_during_write} of them during a write,", end=" ")
    print(f"{resumes} resumes, {runs} runs: all tensors and metrics as in the uninterrupted run")
    assert kills_during_write >= KILLS // 5


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
def test_killed_run_resumes_from_its_last_save(
    folder: Path, shapes: Path, uninterrupted: tuple[Path, float], num_workers: int
):
    """By default its three finished epochs, of less than a minute, are in `metrics.csv` alone."""
    expected, _ = uninterrupted
    killed = folder / f"default {num_workers}"
    killed.mkdir()
    training = Training(killed, shapes, num_workers, trainer.SAVE_SECONDS)
    training.wait_for_epochs(3)
    assert training.kill()
    assert len(rows(training.run_dir)) in (2, 3)
    assert history(training.run_dir / "last.pt") == []
    assert not (training.run_dir / "best.pt").exists()
    training = Training(killed, shapes, num_workers, trainer.SAVE_SECONDS)
    assert training.process.wait(TIMEOUT) == 0, training.log.read_text()
    assert_equal_runs(training.run_dir, expected)


def test_resume_writes_the_row_missing_from_metrics(trained: Path, workdir: Path, shapes: Path):
    """Such as that of a run killed between its last checkpoint and `metrics.csv`."""
    run_dir = shutil.copytree(trained, workdir / "runs" / "demo")
    lines = (run_dir / "metrics.csv").read_text().splitlines(keepends=True)
    (run_dir / "metrics.csv").write_text("".join(lines[:-1]))
    trainer.main(["--resume", "runs/demo/last.pt", "--data-dir", str(shapes)])
    assert rows(run_dir) == rows(trained)
