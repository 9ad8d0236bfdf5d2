"""A run that is killed and resumed, over and over, ends as if it had not been: the same weights, the same figures.

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
import pandas as pd
import pytest
import torch
from conftest import ROOT, TIMES, TINY
from torch import Tensor

from trainer import main

KILLS = int(os.environ.get("CLIP_KILLS", "4"))
EPOCHS = 4
FLAGS = [*TINY, "--epochs", str(EPOCHS), "--dropout", "0.3", "--drop-path", "0.3", "--augment"]
WRITTEN = [
    "best.pt",
    "last.pt",
    "metrics.csv",
    "curves.png",
    "test.json",
]  # after an epoch, in this order
PATIENCE = 300  # seconds


class Training:
    """A process of `trainer.py` in the folder `place`: from the start, or on from the checkpoint that is there."""

    def __init__(self, place: Path, shapes: Path, workers: int = 0) -> None:
        self.run, self.log = place / "runs" / "demo", place / "log.txt"
        self.resumes = (self.run / "last.pt").exists()
        flags = (
            ["--resume", "runs/demo/last.pt"]
            if self.resumes
            else [*FLAGS, "--data-dir", os.path.relpath(shapes, place)]
        )
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-u",
                    str(ROOT / "trainer.py"),
                    *flags,
                    "--num-workers",
                    str(workers),
                ],
                cwd=place,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.deadline = time.monotonic() + PATIENCE

    def lasts(self) -> bool:
        """Whether the process is at work still; the pause leaves the core to it."""
        assert time.monotonic() < self.deadline, self.log.read_text()
        time.sleep(0.0005)
        return self.process.poll() is None

    def epochs(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if line.startswith("epoch ")]

    def wait_for(self, epochs: int) -> None:
        """Returns when so many epochs are done, 0: when the first begins; or when the process has ended."""
        while self.lasts() and (
            "loss at chance" not in self.log.read_text() or len(self.epochs()) < epochs
        ):
            pass

    def wait_for_writing(self, file: str) -> None:
        """Returns while `file`, or one that is written after it, is being written."""
        later = tuple(WRITTEN[WRITTEN.index(file) :])
        while self.lasts() and not any(name.startswith(later) for name in self.half_written()):
            pass

    def half_written(self) -> list[str]:
        return [path.name for path in self.run.glob("*.tmp")]

    def kill(self) -> bool:
        """Whether the process was still there to be killed."""
        self.process.kill()
        return self.process.wait() < 0


def history(weights: Path) -> list[dict[str, float]]:
    return torch.load(weights, weights_only=True)["history"]


def rows(run: Path) -> list[list[str]]:
    """`metrics.csv` to the last digit, without its two columns of times."""
    if not (run / "metrics.csv").exists():  # before the first one was written
        return []
    return pd.read_csv(run / "metrics.csv", dtype=str).drop(columns=TIMES).to_numpy().tolist()


def tensors(value: Any, name: str = "") -> dict[str, Tensor]:
    """Every tensor of a weights file: the model's, the optimiser's, and whatever else there is."""
    if isinstance(value, Tensor):
        return {name: value}
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        else []
    )
    return {
        key: tensor for at, part in inner for key, tensor in tensors(part, f"{name}/{at}").items()
    }


def assert_equal_runs(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    for file in ("last.pt", "best.pt"):
        ours, theirs = (tensors(torch.load(run / file, weights_only=True)) for run in (one, other))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    ours, theirs = (history(run / "last.pt") for run in (one, other))
    assert [row | dict.fromkeys(TIMES) for row in ours] == [
        row | dict.fromkeys(TIMES) for row in theirs
    ]


def assert_whole(run: Path, unbroken: Path) -> int:
    """What a killed run left can all be read, and its figures are those of the unbroken one; returns its epochs."""
    done = len(history(run / "last.pt"))
    for weights in run.glob("*.pt"):
        with zipfile.ZipFile(weights) as archive:
            assert archive.testzip() is None
    assert done == 0 or (run / "best.pt").exists()
    table = rows(run)
    assert table == rows(unbroken)[: len(table)]
    assert (
        done - 1 <= len(table) <= done
    )  # the row comes after the weights, and with the resume if it did not come
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("killed")


@pytest.fixture(scope="module")
def unbroken(place: Path, shapes: Path) -> tuple[Path, float]:
    """The folder of a run that nobody disturbed, and the seconds that one of its epochs took."""
    (place / "unbroken").mkdir()
    training = Training(place / "unbroken", shapes)
    training.wait_for(0)
    started = time.monotonic()
    training.wait_for(EPOCHS)
    seconds = (time.monotonic() - started) / EPOCHS
    assert training.process.wait(PATIENCE) == 0, training.log.read_text()
    return training.run, seconds


def test_a_run_that_is_killed_and_resumed_equals_an_unbroken_one_bit_for_bit(
    place, shapes, unbroken
):
    unbroken, epoch_seconds = unbroken
    draw = np.random.default_rng(0)
    kills = while_writing = resumes = runs = done = 0
    finished = True
    while kills < KILLS or not finished:
        if finished:
            runs, done = runs + 1, 0
            (place / f"run {runs}").mkdir()
        training = Training(place / f"run {runs}", shapes, workers=int(draw.integers(2)))
        resumes += training.resumes
        if kills < KILLS:
            training.wait_for(int(draw.choice([0, 1], p=[0.7, 0.3])))
            if draw.random() < 0.5:
                training.wait_for_writing(str(draw.choice(WRITTEN[:-1])))
            else:
                time.sleep(draw.random() * epoch_seconds)
            killed = training.kill()
        else:
            killed = training.process.wait(PATIENCE) < 0
        finished = not killed
        if training.epochs():
            assert training.epochs()[0].startswith(f"epoch {done + 1} of {EPOCHS}:")
        if finished:
            assert training.process.returncode == 0, training.log.read_text()
            assert training.half_written() == []
            assert_equal_runs(training.run, unbroken)
            continue
        kills += 1
        while_writing += bool(training.half_written())
        if (training.run / "last.pt").exists():
            before, done = done, assert_whole(training.run, unbroken)
            assert done >= before
    print(
        f"\n{kills} kills, {while_writing} while a file was being written, {resumes} resumes, {runs} runs:",
        end=" ",
    )
    print("every tensor and every figure as in the unbroken run")
    assert while_writing >= KILLS // 5


def test_a_run_killed_between_its_last_weights_and_their_row_gets_the_row_with_the_resume(
    trained, workdir, shapes
):
    run = shutil.copytree(trained, workdir / "runs" / "demo")
    lines = (run / "metrics.csv").read_text().splitlines(keepends=True)
    (run / "metrics.csv").write_text("".join(lines[:-1]))
    main(["--resume", "runs/demo/last.pt", "--data-dir", str(shapes)])
    assert rows(run) == rows(trained)
