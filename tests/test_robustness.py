"""Training and search survive full disks, dead workers, signals, odd data and odd file names."""

import ctypes
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY, assert_same_tensors, at_step, error_message, script
from PIL import Image

import config
import data
import inference
import trainer
from data import generate_shapes
from inference import Searcher
from inference import main as search
from models import load_checkpoint
from trainer import main as train

SEARCH = ["--num-workers", "0", "--device", "cpu"]
slow = pytest.mark.slow
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def num_epochs(checkpoint: Path) -> int:
    return len(torch.load(checkpoint, weights_only=True)["history"])


def assert_resumes_to_same_model(run_dir: Path, trained: Path) -> None:
    """The stopped run in `run_dir` is resumed and ends with the model of the run `trained`."""
    assert list(run_dir.glob("*.tmp")) == []
    train(["--resume", str(run_dir / "last.pt"), "--num-workers", "0"])
    assert_same_tensors(run_dir / "last.pt", trained / "last.pt")


@pytest.fixture
def dataset(workdir: Path, shapes: Path) -> Path:
    """A copy of the shapes that a test may change: `dataset` in the current directory."""
    return shutil.copytree(shapes, workdir / "dataset")


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """Drops root's capabilities to read and write every file during a test."""
    libc = ctypes.CDLL(None)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    capabilities = (ctypes.c_uint32 * 6)()
    libc.capget(header, capabilities)
    effective = capabilities[0]
    capabilities[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    libc.capset(header, capabilities)
    yield
    capabilities[0] = effective
    libc.capset(header, capabilities)


# ---------------------------------------------------------------- disks and folders


@pytest.fixture
def set_size_limit() -> Iterator[Callable[[int], None]]:
    """Sets the size past which no file of this process can grow, as on a full disk."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@slow
@linux_only
@pytest.mark.parametrize(
    ("file", "limit"),
    [
        pytest.param("best.pt", 100_000, id="best.pt"),  # of 4 MB
        pytest.param("last.pt", 6_000_000, id="last.pt"),  # of 12 MB after the first step
    ],
)
def test_train_full_disk_keeps_earlier_checkpoint(
    file: str,
    limit: int,
    set_size_limit: Callable,
    trained: Path,
    workdir: Path,
    shapes: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The disk is full while a checkpoint is written, and the run can be resumed later."""
    original = trainer.validate

    def fill_disk_and_validate(*args: object) -> dict[str, float]:
        set_size_limit(limit)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "validate", fill_disk_and_validate)
        message = error_message(train, *TINY, "--data-dir", shapes)
    assert f"runs/demo/{file}: could not be written, content unchanged: " in message
    assert num_epochs(Path("runs/demo/last.pt")) == 0
    set_size_limit(resource.RLIM_INFINITY)
    assert_resumes_to_same_model(workdir / "runs/demo", trained)


@slow
@linux_only
def test_train_full_file_system_is_one_line_error(workdir: Path, shapes: Path) -> None:
    """The same on a real file system of 20 MB; what was written is complete."""
    (workdir / "runs").mkdir()
    own_mounts = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=20m tmpfs runs"
    if subprocess.run([*own_mounts, mount], cwd=workdir, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    command = " ".join([sys.executable, str(ROOT / "trainer.py"), *TINY, "--data-dir", str(shapes)])
    done = subprocess.run(
        [*own_mounts, f"{mount}; {command}; echo status $?; ls runs/demo; cp runs/demo/*.pt ."],
        cwd=workdir,
        capture_output=True,
        text=True,
    )
    reason = "could not be written, content unchanged: .*No space left on device.*"
    assert re.fullmatch(rf"error: runs/demo/\S+: {reason}\n", done.stderr)
    assert "status 1" in done.stdout
    assert ".tmp" not in done.stdout
    for file in workdir.glob("*.pt"):
        load_checkpoint(file)
    assert num_epochs(workdir / "last.pt") < 2


@pytest.mark.parametrize("name", ["runs", "runs/demo"])
def test_train_rejects_file_in_place_of_run_folder(name: str, workdir: Path, shapes: Path) -> None:
    (workdir / name).parent.mkdir(exist_ok=True)
    (workdir / name).write_text("in the way")
    assert "runs" in error_message(train, *TINY, "--data-dir", shapes)


# ---------------------------------------------------------------- processes and memory


def kill_process(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def exit_process(*_: object) -> None:
    os._exit(1)


@slow
@linux_only
@pytest.mark.parametrize("die", [kill_process, exit_process])
@pytest.mark.parametrize("phase", ["training", "validation"])
def test_train_dead_worker_is_error_and_run_resumes(
    die: Callable,
    phase: str,
    trained: Path,
    workdir: Path,
    shapes: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A DataLoader worker dies in the second epoch; the first epoch is saved."""
    dataset_class = data.ImageCaptionDataset if phase == "training" else inference.ImageDataset
    original = dataset_class.__getitem__
    main_process = os.getpid()

    def load_or_die(self: object, index: int) -> object:
        is_second_epoch = num_epochs(Path("runs/demo/last.pt")) == 1
        if os.getpid() != main_process and is_second_epoch:
            die()
        return original(self, index)

    with monkeypatch.context() as patch:
        patch.setattr(dataset_class, "__getitem__", load_or_die)
        patch.setattr(trainer, "SAVE_SECONDS", 0)
        message = error_message(train, *TINY, "--num-workers", "1", "--data-dir", shapes)
        with suppress(RuntimeError):  # the signal may come after the end of the connection
            time.sleep(0.5)
    assert "died" in message
    assert "--num-workers 0" in message
    assert num_epochs(Path("runs/demo/last.pt")) == 1
    assert_resumes_to_same_model(workdir / "runs/demo", trained)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(ConnectionResetError(104, "reset by peer"), id="reset"),
        pytest.param(ConnectionRefusedError(111, "refused"), id="refused"),
    ],
)
def test_train_lost_worker_connection_is_one_line_error(
    error: ConnectionError, workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker has died before its batch was fetched."""
    monkeypatch.setattr(trainer, "contrastive_loss", at_step(2, error))
    message = error_message(train, *TINY, "--data-dir", shapes)
    assert "died" in message
    assert "--num-workers 0" in message


@linux_only
def test_train_signal_of_dead_worker_during_its_report_is_one_line_error(
    workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is lost first, and the system's signal comes while that is reported."""

    def handle(*_: object) -> None:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    def report(error: Exception, original: Callable = config._known_cause) -> str | None:
        if isinstance(error, ConnectionError):
            signal.raise_signal(signal.SIGCHLD)
        return original(error)

    monkeypatch.setattr(trainer, "contrastive_loss", at_step(2, ConnectionResetError(104, "reset")))
    previous = signal.signal(signal.SIGCHLD, handle)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(config, "_known_cause", report)
            message = error_message(train, *TINY, "--data-dir", shapes)
    finally:
        signal.signal(signal.SIGCHLD, previous)
    assert "died" in message


@linux_only
def test_search_dead_worker_is_one_line_error(
    checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference.ImageDataset, "__getitem__", kill_process)
    flags = ["--num-workers", "1", "--device", "cpu"]
    message = error_message(search, "--weights", checkpoint, "--images", images, *flags)
    assert "died" in message
    assert "--num-workers 0" in message


@slow
@linux_only
def test_train_keyboard_interrupt_prints_resume_command(workdir: Path, shapes: Path) -> None:
    flags = [*TINY, "--epochs", "100", "--num-workers", "2", "--data-dir", str(shapes)]
    with subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "trainer.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # The background jobs of a shell ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        line = ""
        while not line.startswith("epoch 1 of"):
            line = process.stdout.readline()
            assert line, process.stderr.read()
        os.killpg(process.pid, signal.SIGINT)  # to the workers too, as a terminal does
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr == "stopped; resume with: python trainer.py --resume runs/demo/last.pt\n"
    assert "Traceback" not in stdout


def resident_megabytes() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


@slow
@linux_only
def test_train_memory_is_constant_over_50_epochs(
    workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_shapes(workdir / "few", train=8, dev=2, test=2)
    megabytes = []
    original = trainer.save_checkpoint

    def save_and_measure(run: trainer.Run) -> None:
        original(run)
        megabytes.append(resident_megabytes())

    monkeypatch.setattr(trainer, "save_checkpoint", save_and_measure)
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0)
    train([*TINY, "--epochs", "50", "--data-dir", "few"])
    assert len(megabytes) == 51
    assert megabytes[50] - megabytes[10] < 40  # a figure kept from each epoch would be 80


MEASURE_FREED_MEMORY = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from resource import getpagesize
import torch
from models import pick_device

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()

pick_device("cpu")
for size in (2**25, 3 * 2**30):  # the first makes sure that nothing lies above the second
    step = torch.empty(size, dtype=torch.uint8)
    step[: 2**24].fill_(1)  # only these pages are used
    before = resident()
    del step
    freed = before - resident()
print(freed)
"""


@slow
@linux_only
def test_pick_device_cpu_keeps_freed_memory(tmp_path: Path) -> None:
    """Freed gigabytes stay with the process, which would have to zero new pages otherwise."""
    (tmp_path / "step.py").write_text(MEASURE_FREED_MEMORY)
    done = script(str(tmp_path / "step.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**20  # bytes


def raise_out_of_memory(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")


def test_train_out_of_memory_is_one_line_error(
    workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "contrastive_loss", raise_out_of_memory)
    message = error_message(train, *TINY, "--data-dir", shapes)
    assert "--chunk-size 32" in message


def test_search_out_of_memory_is_one_line_error(
    checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference.Tower, "forward", raise_out_of_memory)
    message = error_message(search, "--weights", checkpoint, "--images", images, *SEARCH)
    assert "--device cpu" in message


# ---------------------------------------------------------------- bugs and user errors


def test_train_bug_keeps_traceback(
    workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "contrastive_loss", at_step(1, RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train([*TINY, "--data-dir", str(shapes)])


def test_search_bug_keeps_traceback(
    checkpoint: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "top_matches", None)
    with pytest.raises(TypeError):
        search(["--weights", str(checkpoint), "--images", str(images), *SEARCH])


@slow
def test_search_user_error_is_one_line_on_stderr_with_status_1(workdir: Path) -> None:
    done = script("inference.py", "--weights", "absent.pt", cwd=workdir)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == "error: absent.pt: no such checkpoint file\n"


# ---------------------------------------------------------------- odd and broken data


ODD_NAMES = [
    "with space.png",
    'it\'s "quoted", 100%.png',
    "собака 犬 كلب.png",
    "$x^2$ \\alpha.png",
    "-n.png",
    "#1.png",
]


def rename_images(dataset: Path, new_names: dict[str, str]) -> None:
    """Renames images of a data set, also in its split lists and captions."""
    for old, new in new_names.items():
        (dataset / "Images" / old).rename(dataset / "Images" / new)
    for split in ("train", "test"):
        file = dataset / f"Flickr_8k.{split}Images.txt"
        lines = [new_names.get(line, line) for line in file.read_text().splitlines()]
        file.write_text("\n".join(lines), encoding="utf-8")
    table = pd.read_csv(dataset / "captions.txt", keep_default_na=False)
    table["image"] = table["image"].replace(new_names)
    table.to_csv(dataset / "captions.txt", index=False)


def replace_captions(dataset: Path, name: str, captions: list[str]) -> None:
    table = pd.read_csv(dataset / "captions.txt", keep_default_na=False)
    others = table[table["image"] != name]
    new = pd.DataFrame({"image": name, "caption": captions})
    pd.concat([others, new]).to_csv(dataset / "captions.txt", index=False)


@slow
def test_train_and_search_accept_odd_names_captions_and_images(dataset: Path) -> None:
    # 1. Change names, images and captions of the data set.
    names = sorted(path.name for path in (dataset / "Images").iterdir())
    renamed = [*names[:3], *names[-3:]]  # of the training and the test split
    rename_images(dataset, dict(zip(renamed, ODD_NAMES)))
    Image.new("RGB", (20_000, 20), "red").save(dataset / "Images" / names[4])
    Image.new("RGB", (1, 1), "red").save(dataset / "Images" / names[5])
    captions = ["", "  \t ", "word " * 100_000, "😀🐶🏖️", "a dog", "a dog", "\u200b"]
    replace_captions(dataset, names[6], captions)

    # 2. All captions that contain anything are read.
    train_split = data.read_splits(dataset)["train"]
    index = [path.name for path in train_split.paths].index(names[6])
    assert train_split.captions[index] == [captions[2].strip(), *captions[3:]]

    # 3. Train on it, and find every image.
    train([*TINY, "--epochs", "1", "--augment", "--data-dir", "dataset"])
    flags = ["--weights", "runs/demo/best.pt", *SEARCH]
    search([*flags, "--images", "dataset/Images", "--n", "72", "--output", "m.csv"])
    table = pd.read_csv("m.csv")
    found = sorted(Path(path).name for path in table["path"])
    assert found == sorted(path.name for path in (dataset / "Images").iterdir())
    assert np.isfinite(table["score"]).all()
    search([*flags, "--n", "12"])
    Image.open("matches.png").verify()


@linux_only
@pytest.mark.parametrize("defect", ["unreadable", "dangling link", "link to itself"])
def test_train_names_unreadable_image_before_first_step(
    defect: str, dataset: Path, ordinary_user: None
) -> None:
    image = data.read_splits(dataset)["train"].paths[7]
    if defect == "unreadable":
        image.chmod(0)
    else:
        image.unlink()
        image.symlink_to(image.name if defect == "link to itself" else "nowhere.png")
    message = error_message(train, *TINY, "--data-dir", "dataset")
    assert message.startswith(f"error: dataset/Images/{image.name}: ")
    assert not Path("runs").exists()


@linux_only
def test_search_skips_and_names_unreadable_images(
    checkpoint: Path, images: Path, ordinary_user: None, capsys: pytest.CaptureFixture
) -> None:
    Image.new("RGB", (20_000, 20), "red").save(images / "long.png")
    (images / "unreadable.jpg").write_bytes(b"")
    (images / "unreadable.jpg").chmod(0)
    (images / "gone away.jpg").symlink_to("nowhere.jpg")
    (images / "кольцо.jpg").symlink_to("кольцо.jpg")
    (images / "folder.jpg").mkdir()
    search(["--weights", str(checkpoint), "--images", str(images), "--n", "100", *SEARCH])
    stdout = capsys.readouterr().out
    assert "skipped 3 of 8 images:" in stdout
    for name in ("unreadable.jpg", "gone away.jpg", "кольцо.jpg"):
        assert stdout.count(f"images/{name}: cannot be read as an image") == 1
    assert re.search(r"\d  images/long.png$", stdout, re.MULTILINE)


@linux_only
def test_search_accepts_file_names_that_are_not_utf8(
    checkpoint: Path, images: Path, capsys: pytest.CaptureFixture
) -> None:
    image = next(images.iterdir())
    shutil.copy(image, os.fsencode(images) + b"/caf\xe9.png")  # Latin-1
    folder = os.fsdecode(b"cr\xe8me")
    shutil.copytree(images, folder)
    for _ in range(2):  # encoded, and from the index
        search(["--weights", str(checkpoint), "--images", folder, *SEARCH])
        assert "caf" in capsys.readouterr().out


@linux_only
def test_search_skips_named_pipe(checkpoint: Path, images: Path) -> None:
    """A pipe that is named like an image does not block a search."""
    os.mkfifo(images / "pipe.jpg")

    def fail(*_: object) -> None:
        raise RuntimeError("the search waits for the pipe")

    signal.signal(signal.SIGALRM, fail)
    signal.alarm(20)
    try:
        matches = Searcher(checkpoint, "cpu", 0).search(["a red circle"], images)[0]
    finally:
        signal.alarm(0)
    assert len(matches) == 4


# ---------------------------------------------------------------- queries


@pytest.mark.parametrize(
    "query",
    [
        pytest.param("word " * 10_000, id="many words"),
        pytest.param("w" * 100_000, id="long word"),
        "😀🐶",
        "\u200b",
        "собака",
        "$x^2",
        "--",
        "a\nb",
    ],
)
def test_search_accepts_any_query_and_n_above_image_count(
    query: str, checkpoint: Path, images: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--weights", str(checkpoint), "--images", str(images), *SEARCH]
    search([*flags, "--n", "1000000", f"--query={query}"])
    stdout = capsys.readouterr().out
    assert len(re.findall(r"^ *\d+ +-?\d\.\d{3}  images/", stdout, re.MULTILINE)) == 4
    Image.open("matches.png").verify()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\n \n", id="blank lines"),
        pytest.param(b"caf\xe9\n", id="not UTF-8"),
    ],
)
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # the locale determines it
def test_search_rejects_stdin_without_query(
    content: bytes,
    errors: str,
    checkpoint: Path,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "queries.txt").write_bytes(content)
    flags = ["--weights", checkpoint, "--images", images, "--query", "-", *SEARCH]
    with (tmp_path / "queries.txt").open(encoding="utf-8", errors=errors) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        message = error_message(search, *flags)
    assert "--query" in message


def test_search_rejects_query_that_is_not_utf8(
    checkpoint: Path, images: Path, capsys: pytest.CaptureFixture
) -> None:
    query = os.fsdecode(b"caf\xe9")  # as Python passes such an argument
    with pytest.raises(SystemExit) as stop:
        search(["--weights", str(checkpoint), "--images", str(images), "--query", query, *SEARCH])
    assert stop.value.code == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert "--query: is not UTF-8" in stderr


# ---------------------------------------------------------------- the embedding index


@slow
def test_search_two_processes_build_same_index(
    checkpoint: Path, shapes: Path, workdir: Path
) -> None:
    """Two searches build the index of one folder at the same time, and both are right."""
    command = [sys.executable, str(ROOT / "inference.py"), "--weights", str(checkpoint)]
    command += ["--images", str(shapes), "--n", "72", *SEARCH]
    processes = []
    for output in ("0.csv", "1.csv"):
        process = subprocess.Popen([*command, "--output", output], stdout=subprocess.DEVNULL)
        processes.append(process)
    assert [process.wait(120) for process in processes] == [0, 0]
    assert Path("0.csv").read_text() == Path("1.csv").read_text()
    assert sorted(path.suffix for path in Path("w.index").iterdir()) == [".json", ".npy"]
    searcher = Searcher(checkpoint, "cpu", 0)
    paths, _ = searcher.index_images(shapes)
    assert len(paths) == 72
    assert "image_tower" not in vars(searcher)  # nothing was encoded again


@slow
@linux_only
def test_search_on_read_only_disk_works_without_index(checkpoint: Path, images: Path) -> None:
    Path("disk").mkdir()
    checkpoint.rename("disk/w.pt")
    own_mounts = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount --bind disk disk && mount -o remount,ro,bind disk"
    if subprocess.run([*own_mounts, mount], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    flags = "--weights disk/w.pt --images images --output disk/m.png"
    command = f"{mount} && {sys.executable} {ROOT}/inference.py {flags}"
    done = subprocess.run([*own_mounts, command], capture_output=True, text=True)
    assert done.stdout.count("the index is not saved: ") == 1
    assert len(re.findall(r"\d  images/", done.stdout)) == 4
    assert done.returncode == 1
    assert re.fullmatch(r"error: disk/m\.png: could not be written.*\n", done.stderr)


@linux_only
def test_search_in_unwritable_folder_works_without_index(
    checkpoint: Path, images: Path, ordinary_user: None, capsys: pytest.CaptureFixture
) -> None:
    Path("theirs").mkdir()
    checkpoint.rename("theirs/w.pt")
    Path("theirs").chmod(0o555)
    search(["--weights", "theirs/w.pt", "--images", str(images), *SEARCH])
    assert "the index is not saved: " in capsys.readouterr().out


def test_index_images_rebuilds_index_with_deeply_nested_list(
    checkpoint: Path, images: Path, capsys: pytest.CaptureFixture
) -> None:
    Searcher(checkpoint, "cpu", 0).index_images(images)
    listing = next(Path("w.index").glob("*.json"))
    listing.write_text("[" * 100_000)
    paths, _ = Searcher(checkpoint, "cpu", 0).index_images(images)
    assert len(paths) == 4
    assert "is damaged and built again" in capsys.readouterr().out
