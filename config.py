"""Settings of training (`Config`) and search (`SearchConfig`), and their command lines.

python trainer.py --help
python inference.py --help
"""

import errno
import functools
import io
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import tyro
from tqdm import tqdm
from tyro.conf import DisallowNone, UseAppendAction

FLICKR8K_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
OUTPUT_FORMATS = (".png", ".jpg", ".jpeg", ".pdf", ".svg", ".csv")
Precision = Literal["auto", "float32", "bfloat16"]
WORKER = "DataLoader worker"  # how torch's error messages name a worker process
TIMED_OUT = "DataLoader timed out"  # torch's error if the workers deliver nothing
# Errors of the operating system that the user can fix. Others are bugs.
OS_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EMFILE}
OS_ERRORS |= {errno.ENFILE, errno.EAGAIN, errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR}
# Characters that change what a terminal shows: C0, DEL, C1, line separators, text direction; and
# surrogates, which stand for bytes of a file name that are not UTF-8.
CONTROL_CHARACTERS = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


class UserError(Exception):
    """An error that the user can fix. `cli_errors` prints it as one line, without a traceback."""

    def __init__(self, message: str):
        if message.startswith(f"Caught UserError in {WORKER}"):
            # The DataLoader raises a worker's error again in the main process, with the worker's
            # traceback as its message. The last line of that is the original error.
            message = message.strip().splitlines()[-1].removeprefix("config.UserError: ")
        super().__init__(printable(" ".join(message.splitlines())))


def printable(text: object) -> str:
    """The text in one line of UTF-8, with control characters escaped, such as \\x1b.

    For names and texts from files, which anyone may have written, where they are printed.
    """
    return CONTROL_CHARACTERS.sub(
        lambda match: match[0].encode("unicode_escape").decode(), str(text)
    )


# Each field is a flag; the comment after it is the flag's help text.


@dataclass(frozen=True)
class Config:
    """Settings of a training run. They are saved in its checkpoints."""

    # data
    data_dir: str = "data/flickr8k"  # folder of images and captions; the default is downloaded
    download_url: str = FLICKR8K_URL  # where the two Flickr8k archives are downloaded from
    image_size: int = 224  # side of the training images in pixels
    max_length: int = 64  # longer captions are truncated to this number of tokens
    augment: bool = True  # random crop, horizontal flip and color jitter of the training images
    num_workers: int = -1  # DataLoader workers; -1: 4 on the CPU, one per core (4 to 16) on a GPU
    # model
    image_encoder: str = "resnet50"  # name of a timm model, or local-dir:FOLDER
    text_encoder: str = "distilbert-base-uncased"  # name or folder of a transformers text encoder
    pretrained: bool = True  # start from pretrained encoders
    freeze_image_encoder: float = 0.5  # fraction of its pretrained tensors frozen, input first
    freeze_text_encoder: float = 0.0  # fraction of its pretrained tensors frozen, input first
    text_layers: int = 0  # layers of a text encoder from scratch; 0: the architecture's default
    text_width: int = 0  # hidden size of a text encoder from scratch; 0: the default
    projection_dim: int = 256  # embedding dimension
    dropout: float = 0.3  # dropout rate of the projection heads
    drop_path: float = -1.0  # stochastic depth rate of the image encoder; -1: 0.1 if it has any
    temperature: float = 0.07  # initial value of the learned temperature (paper, section 2.4)
    # optimization
    epochs: int = 28  # passes over the images, each with one caption sampled per image
    batch_size: int = 128  # pairs per step, over all processes; more pairs, more negatives
    chunk_size: int = 0  # pairs per forward pass: large batches in less memory, slower; 0: all
    image_lr: float = 2e-4  # peak learning rate of the image encoder
    text_lr: float = 1e-4  # peak learning rate of the text encoder
    head_lr: float = 1e-3  # peak learning rate of the projection heads and the temperature
    weight_decay: float = 0.1  # AdamW's weight decay, applied to matrices only
    warmup: float = 0.1  # fraction of the steps with linear warmup, before the cosine decay
    clip_norm: float = 1.0  # gradient-norm clip
    # run
    name: str = "clip"  # the run is saved in runs/NAME
    seed: int = 0  # the same seed gives the same run on a CPU
    device: str = "auto"  # auto: cuda, mps or cpu, whichever is there; or a name such as cuda:1
    precision: Precision = "auto"  # of the forward pass; auto: 16 bits on CUDA, else float32
    demo: bool = False  # train small encoders on generated shapes, two minutes on a CPU
    resume: str = ""  # resume the run of this last.pt with its settings
    init_from: str = ""  # start a new run from the model of this checkpoint, with its encoders
    allow_changed_data: bool = False  # resume though the images or captions are others than before

    def __post_init__(self) -> None:
        _check_ranges(
            self,
            image_size=(32, 2048),
            max_length=(4, 512),
            num_workers=(-1, 256),
            text_layers=(0, 100),
            text_width=(0, 8192),
            freeze_image_encoder=(0.0, 1.0),
            freeze_text_encoder=(0.0, 1.0),
            projection_dim=(1, 65536),
            dropout=(0.0, 0.9),
            temperature=(0.01, 100.0),  # 0.01 is where the paper clamps
            epochs=(1, 100_000),
            batch_size=(2, 1_000_000),  # a contrastive loss needs a negative
            chunk_size=(0, 1_000_000),
            image_lr=(0.0, 1.0),
            text_lr=(0.0, 1.0),
            head_lr=(0.0, 1.0),
            weight_decay=(0.0, 10.0),
            warmup=(0.0, 1.0),
            clip_norm=(1e-6, 1e6),
            seed=(0, 2**32 - 1),
        )
        if self.precision not in get_args(Precision):
            raise ValueError(f"--precision {self.precision!r}: must be auto, float32 or bfloat16")
        if self.resume and self.init_from:
            raise ValueError("--init-from: starts a new run and cannot be combined with --resume")
        if self.demo and self.init_from:
            raise ValueError("--init-from: keeps its encoders and cannot be combined with --demo")
        if self.drop_path != -1 and not 0 <= self.drop_path <= 0.9:
            raise ValueError(f"--drop-path {self.drop_path}: must be between 0.0 and 0.9, or -1")
        if self.chunk_size == 1:
            raise ValueError("--chunk-size 1: batch norm needs at least 2 images; 0 is all of them")
        if self.name in ("", ".", "..") or "/" in self.name or "\\" in self.name:
            raise ValueError(f"--name {self.name!r}: must be the name of a folder inside runs")


DEMO_DEFAULTS = {
    "data_dir": "data/shapes",
    "name": "demo",
    "image_size": 64,
    "augment": False,  # crop, flip and jitter would make captions such as "top left" false
    "image_encoder": "test_resnet",  # 0.3 million parameters
    "text_encoder": "distilbert",
    "pretrained": False,
    "text_layers": 2,
    "text_width": 128,
    "dropout": 0.0,
    "drop_path": 0.0,
    "epochs": 7,
    "image_lr": 1e-3,  # nothing is pretrained, so the encoders learn as fast as the heads
    "text_lr": 1e-3,
    "num_workers": 2,
    "demo": True,
}


@dataclass(frozen=True)
class SearchConfig:
    """Settings of a search with a trained model."""

    weights: Path  # checkpoint of a run: best.pt or last.pt
    n: int = 8  # number of images to show for each query
    query: UseAppendAction[list[str]] = field(default_factory=list)  # text; - reads stdin lines
    images: Path | None = None  # folder of images to search; default: the data set's test images
    data_dir: Path | None = None  # folder of the data set; required if outside the current folder
    like: Path | None = None  # search for images similar to this image file
    image: Path | None = None  # rank the queries, or else the test captions, for this image file
    output: Path = Path("matches.png")  # .png, .jpg, .pdf or .svg for a figure, .csv for a table
    evaluate: bool = False  # print the recalls on the data set's test split
    serve: bool = False  # serve a page to search with in a browser; requires gradio 6 or newer
    host: str = "127.0.0.1"  # address of that page; the default is reachable from this machine only
    port: int = 7860  # port of that page
    nnn: bool = True  # hub correction: subtract the bias of images that are near to every query
    num_workers: int = -1  # DataLoader workers; -1: none on the CPU, 4 to 16 (cores) on a GPU
    device: str = "auto"  # auto: cuda, mps or cpu, whichever is there; or a name such as cuda:1

    def __post_init__(self) -> None:
        _check_ranges(self, n=(1, 1_000_000), num_workers=(-1, 256), port=(1, 65535))
        _check_exclusive(self, "serve", "query", "like", "image", "evaluate")
        _check_exclusive(self, "evaluate", "query", "images", "like", "image")
        _check_exclusive(self, "image", "images", "like")
        _check_exclusive(self, "like", "query")
        _check_exclusive(self, "images", "data_dir")
        if self.output != SearchConfig.output and (self.serve or self.evaluate):
            other = "--serve" if self.serve else "--evaluate"
            raise ValueError(f"--output: has no effect with {other}; leave one of them out")
        if not self.serve and (self.host, self.port) != (SearchConfig.host, SearchConfig.port):
            raise ValueError("--host and --port: have no effect without --serve")
        if not all(query.strip() for query in self.query):
            raise ValueError("--query: is empty, but needs at least one word")
        if "-" in self.query and len(self.query) > 1:
            raise ValueError("--query -: reads all queries from stdin and excludes other queries")
        if re.search("[\ud800-\udfff]", "".join(self.query)):  # undecodable bytes of the argument
            raise ValueError("--query: is not UTF-8")
        if self.output.suffix.lower() not in OUTPUT_FORMATS:
            raise ValueError(f"--output {self.output}: must end in {', '.join(OUTPUT_FORMATS)}")


def _check_ranges(settings: Any, **ranges: tuple[float, float]) -> None:
    """Raises `ValueError` for a setting outside [low, high]; NaN is outside every range."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {value}: must be between {low} and {high}")


def _check_exclusive(settings: Any, name: str, *others: str) -> None:
    """Raises `ValueError` if a flag is given together with one that has no effect beside it."""
    for other in others:
        if getattr(settings, name) and getattr(settings, other):
            flags = [f"--{each.replace('_', '-')}" for each in (name, other)]
            raise ValueError(f"{flags[1]}: has no effect with {flags[0]}; leave one of them out")


Settings = TypeVar("Settings", Config, SearchConfig)


def parse(
    settings: type[Settings], argv: list[str] | None = None, default: Settings | None = None
) -> Settings:
    """Parses a command line (`sys.argv` if None) into `settings`.

    The fields of `default`, such as the settings of a resumed run, replace the defaults of the
    class, but never a flag that is given. Exits with status 2 and a message on an unknown flag,
    with the nearest known one, and on an invalid value.
    """
    if argv is None and "ipykernel" in sys.modules:
        argv = []  # in a notebook, sys.argv contains the arguments of the kernel
    given = sys.argv[1:] if argv is None else argv
    if settings is Config and default is None and "--demo" in given:
        default = Config(**DEMO_DEFAULTS)
    options = {} if default is None else {"default": default}
    return tyro.cli(settings, args=argv, config=(DisallowNone,), **options)


def cli_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Decorates a script's `main`: an error the user can fix is one line, with exit status 1.

    Any other exception is a bug and keeps its traceback.
    """

    @functools.wraps(main)
    def script(argv: list[str] | None = None) -> None:
        sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  (None if it is closed)
        sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                # Some file names are not UTF-8. A log file shows each line when it is printed.
                stream.reconfigure(errors="backslashreplace", line_buffering=True)
        try:
            main(argv)
        except UserError as error:
            sys.exit(f"error: {error}")
        except (RuntimeError, OSError, MemoryError) as error:
            try:
                cause = _known_cause(error)
            except RuntimeError as signaled:  # torch raises for a dead worker wherever Python is
                cause = _known_cause(signaled)
            if cause is None:
                raise
            if str(error).startswith(TIMED_OUT):
                _kill_workers()
            sys.unraisablehook = lambda _: None  # a half-built DataLoader would print another error
            sys.exit(f"error: {cause}")
        except (KeyboardInterrupt, EOFError):  # EOF: a stopped worker has closed its pipe
            sys.exit("stopped")

    return script


def _known_cause(error: Exception) -> str | None:
    """What the user can do about an error of torch or the system; None if it is a bug."""
    if isinstance(error, OSError) and _discard_failed_output():
        return f"standard output: {error.strerror}"
    message = str(error)
    line = printable(message.partition("\n")[0])
    number = getattr(error, "errno", None)
    if type(error).__name__ == "OutOfMemoryError":  # compared by name: torch is not imported here
        return f"out of memory; try --chunk-size 32 in training, --device cpu in search: {line}"
    if "MPS backend out of memory" in message:  # where --chunk-size is not supported
        return f"out of memory; try a smaller --batch-size, or --device cpu: {line}"
    if isinstance(error, MemoryError) or number == errno.ENOMEM or "CPUAllocator" in message:
        return f"out of memory; try --num-workers 0, and --chunk-size 32 in training: {line}"
    if "TORCHELASTIC_RUN_ID" in os.environ and re.search("gloo|NCCL", message):
        return f"another process of this run has stopped: {line}"
    if message.startswith(TIMED_OUT):
        return f"the DataLoader workers are blocked; does their file system answer? {line}"
    # A worker that died. An exception raised in a worker ("Caught ... in DataLoader worker") is a
    # bug. ConnectionErrors come from the connection to a worker.
    if f"{WORKER} (pid" in message or isinstance(error, ConnectionError):
        return f"a DataLoader worker died; try --num-workers 0: {line}"
    if number in OS_ERRORS and error.filename:
        return f"{printable(error.filename)}: {error.strerror}"
    limits = "Too many open files|received 0 items of ancdata|can't start new thread"
    if number in OS_ERRORS or re.search(limits, message):
        return f"a limit of the system was reached; try --num-workers 0: {line}"
    return None


def _kill_workers() -> None:
    """Python waits for its processes when it exits, but a stopped one does not end on SIGTERM."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a killed worker
    for worker in multiprocessing.active_children():
        worker.kill()


def _discard_failed_output() -> bool:
    """Whether standard output cannot be written, as on a full disk or a closed pipe.

    What is still to be written is then discarded, which Python would try once more at its exit.
    """
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def progress(items: Iterable | None, description: str, **options: Any) -> tqdm:
    """A progress bar that appears after one second; in a log file it prints a line now and then."""
    interval = 0.1 if sys.stderr.isatty() else 30  # seconds
    return tqdm(
        items,
        description,
        mininterval=interval,
        maxinterval=interval,
        delay=1,
        dynamic_ncols=True,
        disable=os.environ.get("RANK", "0") != "0",  # torchrun: only the main process shows it
        **options,
    )
