"""A run's folder has one writer, is never lost to another run, and keeps its data set."""

import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import FILES, ROOT, TINY, assert_same_tensors, at_step, error_message, names_in

import trainer
from config import UserError
from trainer import LOCK, lock_run_dir, main

HOLDER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from trainer import lock_run_dir
with lock_run_dir(Path("runs/demo")):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(workdir: Path) -> subprocess.Popen:
    """Another process that has locked `runs/demo`."""
    command = [sys.executable, "-c", HOLDER, str(ROOT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "locked\n"
        yield process
        process.kill()


@pytest.fixture
def stopped(shapes: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`runs/demo` in the current directory, stopped in its second epoch."""
    data = shutil.copytree(shapes, workdir / "data")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "contrastive_loss", at_step(8, KeyboardInterrupt()))
        patch.setattr(trainer, "SAVE_SECONDS", 0)
        error_message(main, *TINY, "--data-dir", data)
    return Path("runs/demo")


# ---------------------------------------------------------------- the lock


@pytest.mark.slow
def test_lock_run_dir_names_the_process_that_has_it(
    holder: subprocess.Popen, workdir: Path, shapes: Path
) -> None:
    message = error_message(main, *TINY, "--data-dir", shapes)
    assert f"process {holder.pid} " in message
    assert names_in(workdir / "runs/demo") == [LOCK]


@pytest.mark.slow
def test_lock_run_dir_is_released_by_kill_9(holder: subprocess.Popen) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    assert Path("runs/demo", LOCK).exists()
    with lock_run_dir(Path("runs/demo")):
        assert Path("runs/demo", LOCK).read_text() == str(os.getpid())


def test_lock_run_dir_leaves_no_file_behind(workdir: Path) -> None:
    with pytest.raises(UserError), lock_run_dir(Path("runs/demo")):
        raise UserError("in the set-up")
    assert names_in(workdir) == []


@pytest.mark.slow
def test_two_trainers_of_one_name_do_not_meet(workdir: Path, shapes: Path) -> None:
    """One of them trains; the other ends with one line."""
    command = [sys.executable, str(ROOT / "trainer.py"), *TINY, "--data-dir", str(shapes)]
    trainers = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    stderr = [process.communicate(timeout=300)[1] for process in trainers]
    assert sorted(process.returncode for process in trainers) == [0, 1]
    loser = next(text for text, process in zip(stderr, trainers) if process.returncode)
    assert loser.startswith("error: runs/demo: process ")
    assert loser.count("\n") == 1
    assert names_in(workdir / "runs/demo") == FILES


def test_run_ends_well_where_an_open_file_cannot_be_removed(
    workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows, of the lock that the run holds."""
    original = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == LOCK:
            raise PermissionError(13, "used by another process")
        original(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    main([*TINY, "--epochs", "1", "--data-dir", str(shapes)])
    assert names_in(workdir / "runs/demo") == [LOCK, *FILES]


# ---------------------------------------------------------------- another run's folder


def test_resume_from_elsewhere_leaves_an_existing_run_alone(
    trained: Path, shapes: Path, workdir: Path
) -> None:
    """A stranger's last.pt has the name of a run of the user."""
    shutil.copytree(trained, "runs/demo")
    (workdir / "runs/demo/best.pt.1.tmp").touch()
    before = {path: path.read_bytes() for path in Path("runs/demo").iterdir()}
    content = torch.load(trained / "last.pt", weights_only=True)
    content["history"] = []
    torch.save(content, "stranger.pt")
    message = error_message(main, "--resume", "stranger.pt", "--data-dir", shapes)
    assert "another run, runs/demo" in message
    assert "copy the folder" in message
    assert {path: path.read_bytes() for path in Path("runs/demo").iterdir()} == before


def test_resume_of_a_copied_folder_writes_into_the_copy(
    trained: Path, shapes: Path, workdir: Path
) -> None:
    """The way out that the error names."""
    shutil.copytree(trained, "runs/demo")
    shutil.copytree(trained, "runs/copy")
    (workdir / "runs/copy/test.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in Path("runs/demo").iterdir()}
    main(["--resume", "runs/copy/last.pt", "--data-dir", str(shapes)])
    assert (workdir / "runs/copy/test.json").exists()
    assert {path: path.stat().st_mtime_ns for path in Path("runs/demo").iterdir()} == before


def test_trainer_removes_temporary_files_of_dead_processes_only(
    trained: Path, shapes: Path, workdir: Path
) -> None:
    run_dir = Path(shutil.copytree(trained, "runs/demo"))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (run_dir / f"last.pt.{platform.node()}.{dead.pid}.tmp").touch()
    kept = {
        run_dir / f"last.pt.{platform.node()}.{os.getppid()}.tmp",
        run_dir / f"last.pt.another-machine.{dead.pid}.tmp",
    }
    for path in kept:
        path.touch()
    main(["--resume", "runs/demo/last.pt", "--data-dir", str(shapes)])
    assert set(run_dir.glob("*.tmp")) == kept


# ---------------------------------------------------------------- a changed data set


def captions_of(data: Path) -> pd.DataFrame:
    return pd.read_csv(data / "captions.txt")


def edit_captions(data: Path) -> None:
    table = captions_of(data)
    table["caption"] = table["caption"] + " again"
    table.to_csv(data / "captions.txt", index=False)


def remove_training_images(data: Path) -> None:
    lists = data / "Flickr_8k.trainImages.txt"
    lists.write_text("\n".join(lists.read_text().split()[16:]))


def swap_two_images(data: Path) -> None:
    lists = data / "Flickr_8k.trainImages.txt"
    dev = data / "Flickr_8k.devImages.txt"
    one, other = lists.read_text().split(), dev.read_text().split()
    one[0], other[0] = other[0], one[0]
    lists.write_text("\n".join(one))
    dev.write_text("\n".join(other))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (edit_captions, "train has other captions, dev has other captions"),
        (remove_training_images, "train has 32 images, not 48"),
        (swap_two_images, "train has other images"),
    ],
)
def test_resume_says_what_changed_in_the_data_set(
    change: object, expected: str, stopped: Path
) -> None:
    change(Path("data"))
    message = error_message(main, "--resume", stopped / "last.pt")
    assert expected in message
    assert "--allow-changed-data" in message
    main(["--resume", str(stopped / "last.pt"), "--allow-changed-data"])
    assert len(pd.read_csv(stopped / "metrics.csv")) == 2
    # The new data set is the run's from then on, and the flag is not kept.
    main(["--resume", str(stopped / "last.pt")])
    edit_captions(Path("data"))
    assert "--allow-changed-data" in error_message(main, "--resume", stopped / "last.pt")


@pytest.mark.slow
def test_resume_of_an_older_checkpoint_compares_no_data(stopped: Path, trained: Path) -> None:
    content = torch.load(stopped / "last.pt", weights_only=True)
    del content["data"]
    del content["config"]["allow_changed_data"]
    torch.save(content, stopped / "last.pt")
    main(["--resume", str(stopped / "last.pt")])
    assert_same_tensors(stopped / "last.pt", trained / "last.pt")


def test_data_digest_ignores_the_folder(shapes: Path, workdir: Path) -> None:
    moved = shutil.copytree(shapes, workdir / "moved")
    ours = trainer.data_digest(trainer.read_splits(moved))
    assert ours == trainer.data_digest(trainer.read_splits(shapes))
