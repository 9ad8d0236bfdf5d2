"""Full disks, limits of the system, closed outputs and unusable names are errors of one line."""

import errno
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, TINY, error_message

import data
from config import UserError, cli_errors
from data import generate_shapes, list_files
from inference import main as search
from models import pick_device
from trainer import main as train

LONG = "x" * 300  # no file system takes such a name
OWN_MOUNTS = ["unshare", "--map-root-user", "--mount"]
ALLOCATOR = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 GB"
slow = pytest.mark.slow
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def system_error(number: int, *file_name: str) -> OSError:
    return OSError(number, os.strerror(number), *file_name)


def main_that_raises(error: BaseException) -> Callable[..., None]:
    @cli_errors
    def main(argv: list[str]) -> None:
        raise error

    return main


# ---------------------------------------------------------------- what is an error of the user


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (system_error(errno.ENOSPC, "data/a.png"), "error: data/a.png: No space left on device"),
        (system_error(errno.EDQUOT, "runs"), "error: runs: Disk quota exceeded"),
        (system_error(errno.EROFS, "runs"), "error: runs: Read-only file system"),
        (system_error(errno.EACCES, "runs"), "error: runs: Permission denied"),
        (system_error(errno.EMFILE, "a.png"), "error: a.png: Too many open files"),
        (system_error(errno.ENAMETOOLONG, LONG), f"error: {LONG}: File name too long"),
        (system_error(errno.EISDIR, "best.pt"), "error: best.pt: Is a directory"),
        (system_error(errno.EISDIR, "\x1b\n"), r"error: \x1b\n: Is a directory"),
        (system_error(errno.EAGAIN), "--num-workers 0: [Errno 11] Resource temporarily"),  # fork
        (system_error(errno.EMFILE), "--num-workers 0: [Errno 24] Too many open files"),
        (system_error(errno.EROFS), "--num-workers 0: [Errno 30] Read-only"),  # /dev/shm
        (RuntimeError("can't start new thread"), "--num-workers 0: can't start"),
        (RuntimeError("received 0 items of ancdata"), "--num-workers 0: received"),
        (RuntimeError("Too many open files. Communication"), "--num-workers 0: Too many"),
        (system_error(errno.ENOMEM), "out of memory; try --num-workers 0"),
        (MemoryError(), "out of memory; try --num-workers 0, and --chunk-size 32"),
        (
            RuntimeError("MPS backend out of memory (MPS"),
            "out of memory; try a smaller --batch-size",
        ),
        (RuntimeError(ALLOCATOR + "\nmore"), "DefaultCPUAllocator: can't allocate memory: 9 GB"),
    ],
)
@linux_only
def test_cli_errors_names_what_the_user_can_fix(error: Exception, expected: str) -> None:
    assert expected in error_message(main_that_raises(error))


@pytest.mark.parametrize(
    "error",
    [
        system_error(errno.ENOENT, "a.png"),
        system_error(errno.EBADF),
        OSError("Caught OSError in DataLoader worker process 0."),
        RuntimeError(""),
        ValueError("a bug"),
    ],
)
def test_cli_errors_keeps_the_traceback_of_a_bug(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        main_that_raises(error)([])
    assert caught.value is error


@pytest.mark.parametrize("name", ["meta", "hpu", "privateuseone", "xla", "mps", "banana", ""])
def test_pick_device_rejects_what_torch_cannot_use(name: str) -> None:
    with pytest.raises(UserError, match=f"^--device {name}: .*; try auto or cpu$"):
        pick_device(name)


@linux_only
@pytest.mark.parametrize(
    "flag", ["--name", "--data-dir", "--resume", "--init-from", "--text-encoder"]
)
def test_trainer_reports_a_name_of_300_letters(flag: str, workdir: Path, shapes: Path) -> None:
    settings = [] if flag == "--init-from" else TINY
    message = error_message(train, *settings, "--data-dir", shapes, flag, LONG)
    assert message.endswith(f"{LONG}: File name too long") or "cannot be created" in message


@linux_only
@pytest.mark.parametrize("flag", ["--weights", "--images", "--data-dir", "--like", "--output"])
def test_search_reports_a_name_of_300_letters(flag: str, checkpoint: Path, images: Path) -> None:
    folder = [] if flag in ("--data-dir", "--images") else ["--images", images]
    name = f"{LONG}.png" if flag == "--output" else LONG
    message = error_message(search, "--weights", checkpoint, *folder, flag, name)
    assert LONG in message
    assert "File name too long" in message


def test_trainer_reports_a_folder_named_best_pt(workdir: Path, shapes: Path) -> None:
    Path("runs/mine/best.pt").mkdir(parents=True)
    message = error_message(train, *TINY, "--name", "mine", "--data-dir", shapes)
    assert message.startswith("error: runs/mine/best.pt exists")


def test_search_reports_a_folder_named_best_pt(workdir: Path) -> None:
    Path("best.pt").mkdir()
    message = error_message(search, "--weights", "best.pt")
    assert message == "error: best.pt: no such checkpoint file"


@linux_only
def test_list_files_accepts_folders_1000_deep(workdir: Path) -> None:
    """Those whose path is longer than the system allows are named as unreadable."""
    for letters in ("d", "d" * 8):
        os.mkdir(workdir / f"{letters}0")
        os.chdir(workdir / f"{letters}0")
        for _ in range(1000):
            Path("a.png").touch()
            os.mkdir(letters)
            os.chdir(letters)
    os.chdir(workdir)
    try:
        files, errors = list_files(Path("d0"))
        many_files, many_errors = list_files(Path("dddddddd0"))
    finally:
        subprocess.run(["rm", "-rf", "d0", "dddddddd0"], check=True)  # too deep for pytest
    assert len(files) == 1000
    assert errors == []
    assert 400 < len(many_files) < 1000
    assert len(many_errors) == 1
    assert many_errors[0].endswith(": File name too long")


# ---------------------------------------------------------------- generated folders


def test_generate_shapes_full_disk_leaves_nothing(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise system_error(errno.ENOSPC)

    monkeypatch.setattr(data, "_render_scene", fail)
    with pytest.raises(UserError, match=r"^data/shapes: cannot be created: No space left"):
        generate_shapes(Path("data/shapes"), train=8, dev=1, test=1)
    assert list(Path("data").iterdir()) == []


def test_generate_shapes_keeps_the_folder_of_a_faster_process(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process generates the same folder meanwhile, and is interrupted by nothing."""
    original = data._render_scene
    other = subprocess.Popen(["sleep", "60"])  # its process id

    def generate_in_other_process(*arguments: object) -> object:
        monkeypatch.setattr(data, "_render_scene", original)
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", lambda: other.pid)
            generate_shapes(Path("data/shapes"), train=8, dev=1, test=1)
        Path("data/shapes/theirs").touch()
        return original(*arguments)

    monkeypatch.setattr(data, "_render_scene", generate_in_other_process)
    try:
        generate_shapes(Path("data/shapes"), train=8, dev=1, test=1)
    finally:
        other.kill()
        other.wait()
    assert os.listdir("data") == ["shapes"]
    assert Path("data/shapes/theirs").exists()


def test_generate_shapes_removes_leftovers_of_killed_processes(workdir: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for pid in (ended.pid, os.getpid()):
        leftover = workdir / f"data/shapes.{platform.node()}.{pid}.tmp"
        (leftover / "Images").mkdir(parents=True)
    (workdir / "data/other.1.tmp").mkdir()
    generate_shapes(Path("data/shapes"), train=8, dev=1, test=1)
    assert sorted(os.listdir("data")) == ["other.1.tmp", "shapes"]


# ---------------------------------------------------------------- real command lines


def shell(command: str, *prefix: str) -> subprocess.CompletedProcess:
    """Runs a shell command in which TRAIN and SEARCH stand for the two programs."""
    for name, program in (("TRAIN", "trainer.py"), ("SEARCH", "inference.py")):
        command = command.replace(name, f"{sys.executable} {ROOT / program}")
    return subprocess.run(
        [*prefix, "bash", "-c", f"set -o pipefail; {command}"],
        capture_output=True,
        text=True,
        timeout=200,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )


def assert_one_line(done: subprocess.CompletedProcess, expected: str) -> None:
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr


def needs_mounts() -> None:
    if subprocess.run([*OWN_MOUNTS, "true"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")


@slow
@linux_only
@pytest.mark.parametrize("program", ["TRAIN", "SEARCH"])
@pytest.mark.parametrize(
    ("redirection", "reason"),
    [("> /dev/full", "No space left on device"), ("| true", "Broken pipe")],
)
def test_failed_standard_output_is_one_line_error(
    program: str, redirection: str, reason: str, workdir: Path
) -> None:
    """Help is printed in the same way as results."""
    done = shell(f"{program} --help {redirection}")
    assert_one_line(done, f"standard output: {reason}")


@slow
@linux_only
def test_train_and_search_run_with_closed_streams(workdir: Path, shapes: Path) -> None:
    flags = "--device cpu --num-workers 0"
    done = shell(f"TRAIN {' '.join(TINY)} --epochs 1 --data-dir {shapes} >&- 2>&- <&-")
    assert done.returncode == 0
    assert Path("runs/demo/test.json").exists()
    search_shapes = f"SEARCH --weights runs/demo/best.pt {flags} --images {shapes}"
    assert shell(f"{search_shapes} >&- 2>&-").returncode == 0
    assert Path("matches.png").exists()
    assert_one_line(shell(f"{search_shapes} --query - <&-"), "standard input contains no line")
    assert shell("TRAIN --help >&-").returncode == 0


@slow
@linux_only
@pytest.mark.parametrize(
    ("mount", "expected"),
    [
        pytest.param(
            "mount -t tmpfs -o size=1m tmpfs .",
            "data/shapes: cannot be created: No space left",
            id="full",
        ),
        pytest.param(
            "mount --bind . . && mount -o remount,ro,bind $PWD",
            "runs/demo: cannot be created: Read-only",
            id="read-only",
        ),
    ],
)
def test_demo_in_a_folder_without_space_or_permission_is_one_line_error(
    mount: str, expected: str, workdir: Path
) -> None:
    needs_mounts()
    command = f"{mount} && cd $PWD && TRAIN --demo --device cpu"
    assert_one_line(shell(command, *OWN_MOUNTS), expected)


@slow
@linux_only
def test_train_without_writable_shared_memory_starts_no_worker(workdir: Path, shapes: Path) -> None:
    needs_mounts()
    flags = f"{' '.join(TINY)} --num-workers 2 --data-dir {shapes}"
    command = f"mount -o remount,ro,bind /dev/shm && TRAIN {flags}"
    done = shell(command, *OWN_MOUNTS)
    assert done.returncode == 0, done.stderr
    assert "0 DataLoader workers instead of 2" in done.stdout


@slow
@linux_only
def test_train_out_of_cpu_memory_names_the_flag(workdir: Path, shapes: Path) -> None:
    flags = f"{' '.join(TINY)} --image-size 2048 --batch-size 48 --data-dir {shapes}"
    assert_one_line(shell(f"ulimit -v 6000000; TRAIN {flags}"), "out of memory; try")


REFUSE_FORK = """
import errno, os, sys
fork, left = os.fork, [int(sys.argv[1])]

def refuse():
    left[0] -= 1
    if left[0] < 0:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
    return fork()

os.fork = refuse
import trainer
trainer.main(sys.argv[2:])
"""


@slow
@linux_only
@pytest.mark.parametrize("allowed", [0, 1])
def test_train_refused_fork_names_the_flag(allowed: int, workdir: Path, shapes: Path) -> None:
    """The first or the second DataLoader worker cannot be started."""
    done = subprocess.run(
        [sys.executable, "-c", REFUSE_FORK, str(allowed), *TINY, "--num-workers", "2"]
        + ["--data-dir", str(shapes)],
        capture_output=True,
        text=True,
        timeout=200,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert_one_line(done, "--num-workers 0: [Errno 11]")


@slow
def test_two_processes_may_generate_the_shapes_at_once(workdir: Path, shapes: Path) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from pathlib import Path\n"
    code += "from data import generate_shapes\n"
    code += "generate_shapes(Path('data/shapes'), train=600, dev=12, test=12)"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert os.listdir("data") == ["shapes"]
    assert len(os.listdir("data/shapes/Images")) == 624
