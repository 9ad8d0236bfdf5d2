"""Nothing lost, nothing let in: full disks, dead workers, signals, odd names, and weights files from strangers."""

import ctypes
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pandas as pd
import pytest
import timm
import torch
from conftest import ROOT, TINY, at_step, script
from PIL import Image

import data
import inference
import trainer
from data import generate_shapes
from inference import Searcher
from inference import main as search
from models import load_checkpoint
from trainer import main as train

SEARCH = ["--num-workers", "0", "--device", "cpu"]
linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for it")


def error_message(main: Callable, *arguments: object) -> str:
    """The one line with which `main` ends in vain."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    return stop.value.code


def epochs_in(weights: Path) -> int:
    return len(torch.load(weights, weights_only=True)["history"])


def assert_goes_on_as_if_nothing_had_been(run: Path, trained: Path) -> None:
    assert list(run.glob("*.tmp")) == []
    train(["--resume", str(run / "last.pt"), "--num-workers", "0"])
    ours, theirs = (
        torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (run, trained)
    )
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.fixture
def own(workdir: Path, shapes: Path) -> Path:
    """A copy of the shapes that may be spoilt, `own` in the current directory."""
    return shutil.copytree(shapes, workdir / "own")


@pytest.fixture
def weights(trained: Path, workdir: Path) -> Path:
    """A weights file of one's own, without an index yet, in the current directory."""
    return Path(shutil.copy(trained / "best.pt", workdir / "w.pt")).relative_to(workdir)


@pytest.fixture
def pictures(shapes: Path, workdir: Path) -> Path:
    """A folder of four pictures, `pictures` in the current directory."""
    (workdir / "pictures").mkdir()
    for source in sorted((shapes / "Images").iterdir())[:4]:
        shutil.copy(source, workdir / "pictures")
    return Path("pictures")


@pytest.fixture
def ordinary_user() -> Iterator[None]:
    """Lays down root's right to read and write every file for the length of a test."""
    libc, header, rights = (
        ctypes.CDLL(None),
        (ctypes.c_uint32 * 2)(0x20080522, 0),
        (ctypes.c_uint32 * 6)(),
    )
    libc.capget(header, rights)
    former = rights[0]
    rights[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
    libc.capset(header, rights)
    yield
    rights[0] = former
    libc.capset(header, rights)


# ---------------------------------------------------------------- training survives


@pytest.fixture
def size_limit() -> Iterator[Callable[[int], None]]:
    """Sets the size past which no file of this process can grow: to the writer, the disk is full."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@linux
@pytest.mark.parametrize("file", ["best.pt", "last.pt"])
def test_a_disk_that_is_full_while_weights_are_saved_leaves_the_earlier_ones_whole(
    file: str,
    size_limit: Callable,
    trained: Path,
    workdir: Path,
    shapes: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {
        "best.pt": 100_000,
        "last.pt": 6_000_000,
    }  # best.pt has 4 MB, and last.pt 12 MB after the first step
    original = trainer.validate
    monkeypatch.setattr(trainer, "validate", lambda *a: (size_limit(sizes[file]), original(*a))[1])
    message = error_message(train, *TINY, "--data-dir", shapes)
    assert f"runs/demo/{file}: could not be written, what was there stands: " in message
    assert epochs_in(Path("runs/demo/last.pt")) == 0
    size_limit(resource.RLIM_INFINITY)
    monkeypatch.setattr(trainer, "validate", original)
    assert_goes_on_as_if_nothing_had_been(workdir / "runs/demo", trained)


@linux
def test_a_file_system_that_is_really_full_ends_the_run_with_one_line(
    workdir: Path, shapes: Path
) -> None:
    (workdir / "runs").mkdir()
    small_disk = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=20m tmpfs runs"
    if subprocess.run([*small_disk, mount], cwd=workdir, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    command = " ".join([sys.executable, str(ROOT / "trainer.py"), *TINY, "--data-dir", str(shapes)])
    done = subprocess.run(
        [*small_disk, f"{mount}; {command}; echo status $?; ls runs/demo; cp runs/demo/*.pt ."],
        cwd=workdir,
        capture_output=True,
        text=True,
    )
    assert re.fullmatch(
        r"error: runs/demo/\S+: could not be written, what was there stands: .*No space left on device.*\n",
        done.stderr,
    )
    assert "status 1" in done.stdout
    assert ".tmp" not in done.stdout
    for file in workdir.glob("*.pt"):
        load_checkpoint(file)
    assert epochs_in(workdir / "last.pt") < 2


@pytest.mark.parametrize("name", ["runs", "runs/demo"])
def test_a_file_in_the_place_of_the_run_folder_is_one_line(
    name: str, workdir: Path, shapes: Path
) -> None:
    (workdir / name).parent.mkdir(exist_ok=True)
    (workdir / name).write_text("in the way")
    assert "runs" in error_message(train, *TINY, "--data-dir", shapes)


def dies(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leaves(*_: object) -> None:
    os._exit(1)


@linux
@pytest.mark.parametrize("death", [dies, leaves])
@pytest.mark.parametrize("reading", ["training", "validation"])
def test_a_loader_worker_that_dies_ends_training_with_one_line_and_nothing_lost(
    death: Callable,
    reading: str,
    trained: Path,
    workdir: Path,
    shapes: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = data.ImageCaptionDataset if reading == "training" else inference.ImageDataset
    original = pictures.__getitem__
    started = os.getpid()

    def read(self: object, which: tuple[int, int] | int) -> object:
        second_epoch = epochs_in(Path("runs/demo/last.pt")) == 1
        return death() if os.getpid() != started and second_epoch else original(self, which)

    with monkeypatch.context() as patch:
        patch.setattr(pictures, "__getitem__", read)
        message = error_message(train, *TINY, "--num-workers", "1", "--data-dir", shapes)
    assert "died" in message
    assert "--num-workers 0" in message
    assert epochs_in(Path("runs/demo/last.pt")) == 1
    assert_goes_on_as_if_nothing_had_been(workdir / "runs/demo", trained)


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset by peer"), ConnectionRefusedError(111, "refused")]
)
def test_a_batch_whose_worker_died_before_it_was_fetched_is_one_line(
    error: ConnectionError, workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "contrastive_loss", at_step(2, error))
    message = error_message(train, *TINY, "--data-dir", shapes)
    assert "died" in message
    assert "--num-workers 0" in message


@linux
def test_a_loader_worker_that_dies_ends_a_search_with_one_line(
    weights: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference.ImageDataset, "__getitem__", dies)
    message = error_message(
        search, "--weights", weights, "--images", pictures, "--num-workers", "1", "--device", "cpu"
    )
    assert "died" in message
    assert "--num-workers 0" in message


@linux
def test_an_interrupt_from_the_keyboard_ends_with_one_line_that_says_how_to_go_on(
    workdir: Path, shapes: Path
) -> None:
    flags = [*TINY, "--epochs", "100", "--num-workers", "2", "--data-dir", str(shapes)]
    with subprocess.Popen(
        [sys.executable, "-u", str(ROOT / "trainer.py"), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.SIG_DFL
        ),  # which jobs in a shell's background ignore
    ) as process:
        while not (line := process.stdout.readline()).startswith("epoch 1 of"):
            assert line, process.stderr.read()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
        printed, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said == "stopped; to go on: python trainer.py --resume runs/demo/last.pt\n"
    assert "Traceback" not in printed


def resident_megabytes() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


@linux
def test_memory_is_flat_over_fifty_epochs(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate_shapes(workdir / "few", train=8, dev=2, test=2)
    used, original = [], trainer.save_checkpoint
    monkeypatch.setattr(
        trainer, "save_checkpoint", lambda run: (original(run), used.append(resident_megabytes()))
    )
    train([*TINY, "--epochs", "50", "--data-dir", "few"])
    assert len(used) == 51
    assert used[50] - used[10] < 40  # a figure kept from each epoch alone would be 80


FREED = """
from pathlib import Path
from resource import getpagesize
import torch
from models import pick_device

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * getpagesize()

pick_device("cpu")
for size in (2**25, 3 * 2**30):  # the first alone so that nothing else comes to lie above the second
    step = torch.empty(size, dtype=torch.uint8)
    step[: 2**24].fill_(1)  # the rest costs nothing
    held = resident()
    del step
    freed = held - resident()
print(freed)
"""


@linux
def test_what_a_step_on_the_cpu_frees_is_kept_for_the_next_be_it_gigabytes(tmp_path: Path) -> None:
    (tmp_path / "step.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{FREED}")
    done = script(str(tmp_path / "step.py"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 2**20  # bytes handed back, which the next step would have zeroed anew


def runs_out(*_: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 9 GiB")


def test_out_of_memory_in_training_is_one_line(
    workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "contrastive_loss", runs_out)
    assert "--chunk-size 32" in error_message(train, *TINY, "--data-dir", shapes)


def test_out_of_memory_in_a_search_is_one_line(
    weights: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference.Tower, "forward", runs_out)
    assert "--device cpu" in error_message(
        search, "--weights", weights, "--images", pictures, *SEARCH
    )


# ---------------------------------------------------------------- a bug is a bug


def test_a_bug_in_training_still_shows_its_traceback(
    workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(trainer, "contrastive_loss", bug)
    with pytest.raises(RuntimeError, match="a bug"):
        train([*TINY, "--data-dir", str(shapes)])


def test_a_bug_in_a_search_still_shows_its_traceback(
    weights: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "top_matches", None)
    with pytest.raises(TypeError):
        search(["--weights", str(weights), "--images", str(pictures), *SEARCH])


def test_what_a_user_can_put_right_is_one_line_on_standard_error_and_status_1(
    workdir: Path,
) -> None:
    done = script("inference.py", "--weights", "absent.pt", cwd=workdir)
    assert (done.returncode, done.stdout, done.stderr) == (
        1,
        "",
        "error: absent.pt: no such weights file\n",
    )


# ---------------------------------------------------------------- data that is odd or broken


ODD_NAMES = [
    "with space.png",
    'it\'s "quoted", 100%.png',
    "собака 犬 كلب.png",
    "$x^2$ \\alpha.png",
    "-n.png",
    "#1.png",
]


def test_odd_names_captions_and_pictures_are_trained_on_and_found_again(own: Path) -> None:
    table = pd.read_csv(own / "captions.txt", keep_default_na=False)
    names = sorted(set(table["image"]))
    lists = {split: (own / f"Flickr_8k.{split}Images.txt") for split in ("train", "test")}
    renamed = dict(zip([*names[:3], *names[-3:]], ODD_NAMES))
    for old, new in renamed.items():
        (own / "Images" / old).rename(own / "Images" / new)
    for file in lists.values():
        lines = file.read_text().splitlines()
        file.write_text("\n".join(renamed.get(line, line) for line in lines), encoding="utf-8")
    table["image"] = table["image"].replace(renamed)
    Image.new("RGB", (20_000, 20), "red").save(own / "Images" / names[4])
    Image.new("RGB", (1, 1), "red").save(own / "Images" / names[5])
    captions = ["", "  \t ", "word " * 100_000, "😀🐶🏖️", "a dog", "a dog", "\u200b"]
    odd = pd.DataFrame({"image": names[6], "caption": captions})
    table = pd.concat([table[table["image"] != names[6]], odd])
    table.to_csv(own / "captions.txt", index=False)

    splits = data.read_splits(own)
    read = dict(zip([path.name for path in splits["train"].paths], splits["train"].captions))
    assert read[names[6]] == [captions[2].strip(), *captions[3:]]
    train([*TINY, "--epochs", "1", "--augment", "--data-dir", "own"])
    search(
        [
            "--weights",
            "runs/demo/best.pt",
            "--images",
            "own/Images",
            "--n",
            "72",
            "--output",
            "m.csv",
            *SEARCH,
        ]
    )
    found = pd.read_csv("m.csv")
    assert sorted(Path(path).name for path in found["path"]) == sorted(
        path.name for path in (own / "Images").iterdir()
    )
    assert np.isfinite(found["score"]).all()
    search(["--weights", "runs/demo/best.pt", "--n", "12", *SEARCH])
    Image.open("matches.png").verify()


@linux
@pytest.mark.parametrize("spoil", ["unreadable", "dangling", "a link to itself"])
def test_a_file_that_cannot_be_opened_stops_training_before_the_first_step_by_its_name(
    spoil: str, own: Path, ordinary_user: None
) -> None:
    picture = data.read_splits(own)["train"].paths[7]
    if spoil == "unreadable":
        picture.chmod(0)
    else:
        picture.unlink()
        picture.symlink_to(picture.name if spoil == "a link to itself" else "nowhere.png")
    assert error_message(train, *TINY, "--data-dir", "own").startswith(
        f"error: own/Images/{picture.name}: "
    )
    assert not Path("runs").exists()


@linux
def test_files_that_cannot_be_opened_are_skipped_counted_and_named_in_a_search(
    weights: Path, pictures: Path, ordinary_user: None, capsys: pytest.CaptureFixture
) -> None:
    Image.new("RGB", (20_000, 20), "red").save(pictures / "long.png")
    (pictures / "unreadable.jpg").write_bytes(b"")
    (pictures / "unreadable.jpg").chmod(0)
    (pictures / "gone away.jpg").symlink_to("nowhere.jpg")
    (pictures / "кольцо.jpg").symlink_to("кольцо.jpg")
    (pictures / "folder.jpg").mkdir()
    search(["--weights", str(weights), "--images", str(pictures), "--n", "100", *SEARCH])
    printed = capsys.readouterr().out
    assert "skipped 4 of 9 pictures:" in printed
    for name in ("unreadable.jpg", "gone away.jpg", "кольцо.jpg", "folder.jpg"):
        assert printed.count(f"pictures/{name}: cannot be read as a picture") == 1
    assert re.search(r"\d  pictures/long.png$", printed, re.MULTILINE)


@linux
def test_a_name_that_is_no_text_is_found_and_shown_all_the_same(
    weights: Path, pictures: Path, capsys: pytest.CaptureFixture
) -> None:
    source = next(pictures.iterdir())
    shutil.copy(source, os.fsencode(pictures) + b"/caf\xe9.png")  # Latin-1
    folder = os.fsdecode(b"cr\xe8me")
    shutil.copytree(pictures, folder)
    for _ in range(2):  # embedded, and from the index
        search(["--weights", str(weights), "--images", folder, *SEARCH])
        assert "caf" in capsys.readouterr().out


@linux
def test_a_pipe_that_is_named_like_a_picture_does_not_hold_a_search_up(
    weights: Path, pictures: Path
) -> None:
    os.mkfifo(pictures / "pipe.jpg")

    def too_long(*_: object) -> None:
        raise RuntimeError("a search waits for a pipe")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(20)
    try:
        assert len(Searcher(weights, "cpu", 0).search(["a red circle"], str(pictures))[0]) == 4
    finally:
        signal.alarm(0)


# ---------------------------------------------------------------- searching at the edges


@pytest.mark.parametrize(
    "query", ["word " * 10_000, "w" * 100_000, "😀🐶", "\u200b", "собака", "$x^2", "--", "a\nb"]
)
def test_any_query_is_answered_from_however_few_pictures(
    query: str, weights: Path, pictures: Path, capsys: pytest.CaptureFixture
) -> None:
    search(
        [
            "--weights",
            str(weights),
            "--images",
            str(pictures),
            "--n",
            "1000000",
            f"--query={query}",
            *SEARCH,
        ]
    )
    assert (
        len(re.findall(r"^ *\d+ +-?\d\.\d{3}  pictures/", capsys.readouterr().out, re.MULTILINE))
        == 4
    )
    Image.open("matches.png").verify()


@pytest.mark.parametrize("typed", [b"", b"\n \n", b"caf\xe9\n"])
def test_queries_from_a_pipe_that_holds_none_or_is_not_utf8_are_one_line(
    typed: bytes, weights: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "queries.txt").write_bytes(typed)
    with (tmp_path / "queries.txt").open(encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        message = error_message(
            search, "--weights", weights, "--images", pictures, "--query", "-", *SEARCH
        )
    assert "--query" in message


def test_a_query_that_is_not_utf8_is_one_line(weights: Path, pictures: Path) -> None:
    query = os.fsdecode(b"caf\xe9")  # as Python hands over such an argument
    with pytest.raises(SystemExit) as stop:
        search(["--weights", str(weights), "--images", str(pictures), "--query", query, *SEARCH])
    assert stop.value.code


def test_two_processes_that_build_the_same_index_at_once_are_both_right(
    weights: Path, shapes: Path, workdir: Path
) -> None:
    command = [
        sys.executable,
        str(ROOT / "inference.py"),
        "--weights",
        str(weights),
        "--images",
        str(shapes),
        *SEARCH,
    ]
    processes = [
        subprocess.Popen([*command, "--n", "72", "--output", f"{i}.csv"], stdout=subprocess.DEVNULL)
        for i in range(2)
    ]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert Path("0.csv").read_text() == Path("1.csv").read_text()
    assert sorted(path.suffix for path in Path("w.index").iterdir()) == [".json", ".npy"]
    searcher = Searcher(weights, "cpu", 0)
    assert len(searcher.index_images(str(shapes))[0]) == 72
    assert "image_tower" not in vars(searcher)  # nothing had to be embedded again


@linux
def test_weights_on_a_read_only_disk_are_searched_and_the_index_is_not_kept(
    weights: Path, pictures: Path
) -> None:
    Path("disk").mkdir()
    weights.rename("disk/w.pt")
    own_mounts = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount --bind disk disk && mount -o remount,ro,bind disk"
    if subprocess.run([*own_mounts, mount], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    command = f"{sys.executable} {ROOT}/inference.py --weights disk/w.pt --images pictures --output disk/m.png"
    done = subprocess.run([*own_mounts, f"{mount} && {command}"], capture_output=True, text=True)
    assert done.stdout.count("the index is not kept: ") == 1
    assert len(re.findall(r"\d  pictures/", done.stdout)) == 4
    assert done.returncode == 1
    assert re.fullmatch(r"error: disk/m\.png: could not be written.*\n", done.stderr)


@linux
def test_weights_in_a_folder_of_someone_else_are_searched_and_the_index_is_not_kept(
    weights: Path, pictures: Path, ordinary_user: None, capsys: pytest.CaptureFixture
) -> None:
    Path("theirs").mkdir()
    weights.rename("theirs/w.pt")
    Path("theirs").chmod(0o555)
    search(["--weights", "theirs/w.pt", "--images", str(pictures), *SEARCH])
    assert "the index is not kept: " in capsys.readouterr().out


def test_a_listing_that_is_nested_without_end_is_made_anew(
    weights: Path, pictures: Path, capsys: pytest.CaptureFixture
) -> None:
    Searcher(weights, "cpu", 0).index_images(str(pictures))
    next(Path("w.index").glob("*.json")).write_text("[" * 100_000)
    assert len(Searcher(weights, "cpu", 0).index_images(str(pictures))[0]) == 4
    assert "made anew" in capsys.readouterr().out


# ---------------------------------------------------------------- files from strangers


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list:
    """Whom this process tried to reach, by name or address; it reaches nobody."""
    tried = []

    def refuse(*address: object, **_: object) -> None:
        tried.append(address)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tried


def tampered(weights: Path, where: str, value: object) -> Path:
    """`weights` with `value` in the place `where`, such as "config/image_size"; `...` takes away what is there."""
    content = torch.load(weights, weights_only=True)
    *parents, name = where.split("/")
    part = content
    for parent in parents:
        part[parent] = dict(part[parent])
        part = part[parent]
    if value is ...:
        del part[name]
    else:
        part[name] = value
    torch.save(content, "stranger.pt")
    return Path("stranger.pt")


def test_a_connection_would_be_noticed(connections: list) -> None:
    with pytest.raises(Exception):  # noqa: B017
        timm.create_model("hf-hub:timm/test_resnet.r160_in1k", pretrained=True)
    assert connections


HUB = "nobody/no-such-model"


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("image_encoder/name", f"hf-hub:{HUB}"),
        ("image_encoder/name", f"hf_hub:{HUB}"),
        ("image_encoder/name", "local-dir:planted"),
        ("image_encoder/name", "test_resnet.r160_in1k"),
        ("image_encoder/arguments", {"checkpoint_path": "w.pt"}),
        ("image_encoder/arguments", {"pretrained": True}),
        ("image_encoder/arguments", {"pretrained_cfg": {"hf_hub_id": HUB}}),
        (
            "text_encoder",
            {
                "model_type": "timm_backbone",
                "backbone": f"hf-hub:{HUB}",
                "use_pretrained_backbone": True,
            },
        ),
        ("text_encoder", {"model_type": "timm_wrapper", "architecture": f"hf-hub:{HUB}"}),
        (
            "text_encoder",
            {
                "model_type": "detr",
                "backbone": f"hf-hub:{HUB}",
                "use_timm_backbone": True,
                "vocab_size": 9,
            },
        ),
        ("text_encoder", {"model_type": HUB}),
        ("text_encoder", {"model_type": "t5"}),
    ],
)
def test_a_strangers_weights_that_name_a_model_elsewhere_are_refused_without_a_connection(
    where: str, value: object, weights: Path, pictures: Path, connections: list
) -> None:
    file = tampered(weights, where, value)
    error_message(search, "--weights", file, "--images", pictures, *SEARCH)
    assert connections == []


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("config/image_encoder", f"hf-hub:{HUB}"),
        ("config/text_encoder", HUB),
        ("config/pretrained", True),
        ("config/download_url", "https://example.org"),
        ("text_encoder/_name_or_path", HUB),
        (
            "text_encoder/auto_map",
            {"AutoModel": f"{HUB}--evil.Model", "AutoConfig": f"{HUB}--evil.Config"},
        ),
        ("text_encoder/attn_implementation", "kernels-community/flash-attn"),
        ("text_encoder/_attn_implementation", "kernels-community/flash-attn"),
        ("text_encoder/_attn_implementation_internal", "kernels-community/flash-attn"),
        ("text_encoder/quantization_config", {"quant_method": "awq"}),
        ("text_encoder/trust_remote_code", True),
        ("text_encoder/pretrained_model_name_or_path", HUB),
    ],
)
def test_what_a_strangers_weights_plant_beside_is_not_asked_for(
    where: str, value: object, weights: Path, pictures: Path, connections: list
) -> None:
    expected = Searcher(weights, "cpu", 0).search(["a red circle"], str(pictures))[0]
    file = tampered(weights, where, value)
    try:
        assert Searcher(file, "cpu", 0).search(["a red circle"], str(pictures))[0] == expected
    except trainer.UserError as error:
        assert "\n" not in str(error)  # to refuse is right too
    assert connections == []


NO_PADDING = (
    '{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0,"[UNK]":1},"unk_token":"[UNK]"}}'
)


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("config", ...),
        ("config", []),
        ("config/image_size", "64"),
        ("config/image_size", 10**9),
        ("config/projection_dim", 2.5),
        ("config/evil", 1),
        ("image_encoder", ...),
        ("image_encoder", "test_resnet"),
        ("image_encoder/name", ["test_resnet"]),
        ("image_encoder/arguments", None),
        ("image_encoder/arguments", {"in_chans": 10**12}),
        ("image_encoder/arguments", {"global_pool": "evil"}),
        ("image_encoder/arguments", {"num_classes": "many"}),
        ("text_encoder", ...),
        ("text_encoder", []),
        ("text_encoder/model_type", ...),
        ("text_encoder/model_type", ["distilbert"]),
        ("text_encoder/dim", 65),
        ("text_encoder/dim", "wide"),
        ("text_encoder/n_layers", 10**7),
        ("text_encoder/n_layers", -1),
        ("text_encoder/n_heads", 0),
        ("text_encoder/activation", "evil"),
        ("text_encoder/vocab_size", 2**62),
        ("text_encoder/pad_token_id", 10**6),
        ("tokenizer", ...),
        ("tokenizer", "{}"),
        ("tokenizer", 5),
        ("tokenizer", NO_PADDING.replace('"a":0', '"a":999999')),
        ("example_query", ...),
        ("example_query", 5),
        ("model", ...),
        ("model", []),
        ("model/image.head.linear.weight", None),
    ],
)
def test_weights_that_a_stranger_changed_are_refused_in_one_line(
    where: str, value: object, weights: Path, pictures: Path
) -> None:
    file = tampered(weights, where, value)
    asked = ["--query", "a"] if where == "tokenizer" else []
    error_message(search, "--weights", file, "--images", pictures, *asked, *SEARCH)


def test_weights_without_a_temperature_are_refused_in_one_line(
    weights: Path, pictures: Path
) -> None:
    picture = next(pictures.iterdir())
    file = tampered(weights, "model/logit_scale", ...)
    error_message(
        search, "--weights", file, "--image", picture, "--query", "a", "--query", "b", *SEARCH
    )


def test_a_layer_count_out_of_proportion_is_refused_in_no_time(
    weights: Path, pictures: Path
) -> None:
    file = tampered(weights, "text_encoder/n_layers", 10**7)
    started = time.monotonic()
    error_message(search, "--weights", file, "--images", pictures, *SEARCH)
    assert time.monotonic() - started < 20


def test_a_resumed_run_from_a_stranger_cannot_choose_where_data_comes_from(
    trained: Path, workdir: Path, connections: list
) -> None:
    content = torch.load(trained / "last.pt", weights_only=True)
    content["config"] |= {
        "data_dir": "data/flickr8k",
        "download_url": "http://stranger.example/",
        "demo": False,
    }
    torch.save(content, "stranger.pt")
    error_message(train, "--resume", "stranger.pt")
    assert "stranger.example" not in str(connections)


def test_settings_survive_their_way_through_a_weights_file(trained: Path) -> None:
    config = asdict(load_checkpoint(trained / "best.pt")["config"])
    assert torch.load(trained / "best.pt", weights_only=True)["config"] == config
