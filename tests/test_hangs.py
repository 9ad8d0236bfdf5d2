"""Little shared memory, blocked DataLoader workers and named pipes do not block a command."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, TINY, error_message

import data
import inference
import trainer
from data import limit_workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


# ---------------------------------------------------------------- shared memory


@pytest.mark.parametrize(
    ("free", "local_world_size", "expected"),
    [(64, 1, 4), (19, 1, 3), (8, 1, 1), (7, 1, 0), (0, 1, 0), (20, 2, 1)],
)
def test_limit_workers_fits_batches_into_half_of_the_shared_memory(
    monkeypatch: pytest.MonkeyPatch, free: int, local_world_size: int, expected: int
) -> None:
    """Four workers of 1 MB batches need 10 MB."""
    limit_workers.cache_clear()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free * 2**20))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_world_size))
    assert limit_workers(4, 2**20) == expected
    limit_workers.cache_clear()


def test_limit_workers_changes_nothing_without_shared_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    limit_workers.cache_clear()
    monkeypatch.setattr(data, "SHARED_MEMORY", tmp_path / "shm")
    assert limit_workers(4, 2**60) == 4
    limit_workers.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("options", ["size=1m", "size=64m,ro"])
def test_little_shared_memory_lowers_the_workers(options: str, workdir: Path, shapes: Path) -> None:
    """With a file system on /dev/shm as containers have, full or read-only."""
    prefix = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    prefix += [f'mount -t tmpfs -o {options} none /dev/shm && exec "$@"', "sh"]
    if not shutil.which("unshare") or subprocess.run([*prefix, "true"]).returncode:
        pytest.skip("cannot mount a file system on /dev/shm")
    workers = ["--num-workers", "2", "--device", "cpu"]
    train = ["trainer.py", "--demo", "--data-dir", shapes, "--epochs", "1", "--batch-size", "48"]
    search = ["inference.py", "--weights", "runs/demo/best.pt", "--images", shapes / "Images"]
    for name, *arguments in (train, search):
        command = [*prefix, sys.executable, ROOT / name, *arguments, *workers]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240)
        assert "0 DataLoader workers instead of 2" in done.stdout
        assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------- blocked workers

STOPPED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import data, inference, trainer
def stop(self, index):
    os.kill(os.getpid(), signal.SIGSTOP)
data.LOADER_TIMEOUT = 1
data.ImageCaptionDataset.__getitem__ = inference.ImageDataset.__getitem__ = stop
(trainer if "--demo" in sys.argv else inference).main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("program", ["train", "search"])
def test_blocked_workers_are_one_line_and_do_not_remain(
    program: str, checkpoint: Path, images: Path, shapes: Path
) -> None:
    """The workers are stopped and do not end on SIGTERM."""
    arguments = [*TINY, "--data-dir", shapes]
    if program == "search":
        arguments = ["--weights", checkpoint, "--images", images]
    command = [sys.executable, "-c", STOPPED, ROOT, *arguments, "--num-workers", "2"]
    # It returns when all processes that have its standard error, the workers too, have ended.
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the DataLoader workers are blocked")
    assert done.stderr.count("\n") == 1


# ---------------------------------------------------------------- named pipes and devices


@pytest.fixture
def time_limit() -> Iterator[None]:
    """A test fails after 20 seconds."""

    def fail(*_: object) -> None:
        raise RuntimeError("the command waits for the pipe")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def link_to_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("make", [os.mkfifo, link_to_device])
@pytest.mark.parametrize(
    "flag", ["--data-dir", "--resume", "--init-from", "--weights", "--like", "--image", "--images"]
)
def test_commands_reject_named_pipes_and_devices(
    flag: str, make: Callable, checkpoint: Path, time_limit: None
) -> None:
    make(Path("pipe"))
    main, arguments = trainer.main, [] if flag == "--init-from" else TINY
    if flag in ("--weights", "--like", "--image", "--images"):
        main, arguments = inference.main, ["--weights", checkpoint, "--query", "a"]
    if flag == "--like":
        arguments = ["--weights", checkpoint]
    assert "pipe: " in error_message(main, *arguments, flag, "pipe")


@pytest.mark.parametrize("make", [os.mkfifo, link_to_device])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("captions.txt", "contains no caption file"),
        ("Flickr_8k.trainImages.txt", "Flickr_8k.trainImages.txt: No such file"),
        ("Images/00000.png", "Images/00000.png: cannot be read as an image: it is not a file"),
    ],
)
def test_training_rejects_named_pipes_and_devices_in_a_data_set(
    name: str, expected: str, make: Callable, workdir: Path, shapes: Path, time_limit: None
) -> None:
    dataset = shutil.copytree(shapes, workdir / "dataset")
    (dataset / name).unlink()
    make(dataset / name)
    assert expected in error_message(trainer.main, *TINY, "--data-dir", dataset)
