"""Every setting of training (`Config`) and of searching (`SearchConfig`), the command lines made of them, and the
machine they run on: its device, its processes, its memory, its files.

python trainer.py --help
python inference.py --help
"""

import io
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

FLICKR8K_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k/"
NUM_WORKERS = "processes that read ahead; 0: none; -1: on the CPU 4 to train, 0 to embed, else one a core, 4 to 16"
WORKER = "DataLoader worker"  # so torch calls it in its errors
DEVICE = "auto: cuda where there is one, else mps, else cpu; or a name such as cuda:1"


class UserError(Exception):
    """What the user can put right; `cli_errors` prints it without a traceback."""

    def __init__(self, message: str):
        if message.startswith(
            f"Caught UserError in {WORKER}"
        ):  # inside its traceback, as the last line
            message = message.strip().splitlines()[-1].removeprefix("config.UserError: ")
        super().__init__(" ".join(message.splitlines()))


@dataclass(frozen=True)
class Config:
    """What defines a training run. It travels inside the weights."""

    # data
    data_dir: str = HfArg(
        default="data/flickr8k",
        help="folder with pictures and captions; README shows both layouts. The default one is fetched when absent",
    )
    download_url: str = HfArg(
        default=FLICKR8K_URL, help="where the two Flickr8k archives are fetched from"
    )
    image_size: int = HfArg(
        default=224, help="side of training pictures, in pixels; what the encoders saw before"
    )
    max_length: int = HfArg(
        default=64, help="longer captions are cut, in tokens; Flickr8k's are up to 42 long"
    )
    augment: bool = HfArg(
        default=True, help="crop, mirror and recolour training pictures, so that few go further"
    )
    num_workers: int = HfArg(default=-1, help=NUM_WORKERS)
    # model
    image_encoder: str = HfArg(
        default="resnet50",
        help="a timm model, or local-dir:FOLDER as timm saves one; ResNet-50 as in the paper",
    )
    text_encoder: str = HfArg(
        default="distilbert-base-uncased",
        help="a transformers text encoder, by name or folder; DistilBERT is BERT at half the cost",
    )
    pretrained: bool = HfArg(
        default=True, help="start from pretrained encoders: few pairs cannot teach what they know"
    )
    freeze_image_encoder: float = HfArg(
        default=0.5,
        help="share of a pretrained image encoder, in tensors from the pixels on, that stays, for speed; 1: all",
    )
    freeze_text_encoder: float = HfArg(
        default=0.0, help="the same of a text encoder; 0, as all of it pays (README)"
    )
    text_layers: int = HfArg(
        default=0, help="layers of a text encoder from scratch; 0: as its architecture has"
    )
    text_width: int = HfArg(
        default=0, help="width of a text encoder from scratch; 0: as its architecture has"
    )
    projection_dim: int = HfArg(
        default=256, help="width of the space that pictures and texts share"
    )
    dropout: float = HfArg(
        default=0.3, help="share of the projection heads' activations dropped in training"
    )
    drop_path: float = HfArg(
        default=0.1, help="highest chance to skip an image encoder's block; against overfitting"
    )
    temperature: float = HfArg(
        default=0.07, help="start of the learnt temperature, as in the paper (section 2.4)"
    )
    # optimisation
    epochs: int = HfArg(
        default=28, help="passes over the pictures, each with another caption drawn"
    )
    batch_size: int = HfArg(
        default=128, help="pairs per step, of all processes; each has the others as negatives"
    )
    chunk_size: int = HfArg(
        default=0,
        help="pairs of a process whose activations are in memory at a time, for larger batches; a fifth slower; 0: all",
    )
    image_lr: float = HfArg(
        default=2e-4, help="peak learning rate of the image encoder: pretrained, so slow"
    )
    text_lr: float = HfArg(
        default=1e-4, help="peak learning rate of the text encoder: pretrained, so slow"
    )
    head_lr: float = HfArg(
        default=1e-3, help="peak learning rate of projection heads and temperature: new, so fast"
    )
    weight_decay: float = HfArg(default=0.1, help="AdamW's decay, on matrices only")
    warmup: float = HfArg(
        default=0.1, help="share of the steps over which the rates rise before their cosine decay"
    )
    clip_norm: float = HfArg(
        default=1.0, help="longest gradient; a rare bad batch moves the weights no further"
    )
    # the run
    name: str = HfArg(default="clip", help="the run is kept in runs/NAME")
    seed: int = HfArg(
        default=0, help="start of every random draw: the same seed gives the same run"
    )
    device: str = HfArg(default="auto", help=DEVICE)
    precision: str = HfArg(
        default="auto",
        help="of the encoders in training: float32, or bfloat16, in which some CPUs take half the time (README); "
        "auto: bfloat16 on CUDA, or float16 where that lacks it, else float32",
    )
    demo: bool = HfArg(
        default=False, help="draw a small data set and train small encoders on it: two CPU minutes"
    )
    resume: str = HfArg(
        default="", help="go on from this last.pt, with its settings; may start on another machine"
    )

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
            drop_path=(0.0, 0.9),
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
        if self.precision not in ("auto", "float32", "bfloat16"):
            raise ValueError(
                f"argument --precision: {self.precision!r}, but it is auto, float32 or bfloat16"
            )
        if self.chunk_size == 1:
            raise ValueError(
                "argument --chunk-size: 1, but batch norm needs two pictures at least; or 0 for all"
            )
        if self.name in ("", ".", "..") or "/" in self.name or "\\" in self.name:
            raise ValueError(
                f"argument --name: {self.name!r} is not a folder name; runs/NAME must be a folder of runs"
            )


DEMO_DEFAULTS = {
    "data_dir": "data/shapes",
    "name": "demo",
    "image_size": 64,
    "augment": False,  # a crop, a mirror or another hue would make the captions of coloured shapes false
    "image_encoder": "test_resnet",  # a third of a million parameters
    "text_encoder": "distilbert",
    "pretrained": False,
    "text_layers": 2,
    "text_width": 128,
    "dropout": 0.0,
    "drop_path": 0.0,
    "epochs": 7,
    "image_lr": 1e-3,  # nothing is pretrained here, so nothing needs to be slow
    "text_lr": 1e-3,
    "num_workers": 2,
}


@dataclass(frozen=True)
class SearchConfig:
    """What is asked of trained weights."""

    weights: str = HfArg(help="best.pt or last.pt of a run")
    n: int = HfArg(
        default=8, help="pictures to show for each query; eight fill two rows of the grid"
    )
    query: list[str] = HfArg(
        default_factory=list,
        metadata={"action": "extend"},
        help="what to look for; may be repeated; - reads a line each from standard input. Without one: a caption that "
        "the weights carry as their example",
    )
    images: str = HfArg(
        default="",
        help="folder of pictures to rank; without one: the test pictures of the data set",
    )
    image: str = HfArg(
        default="", help="the other way round: which --query, or else which caption, fits this file"
    )
    output: str = HfArg(
        default="matches.png",
        help="by its ending a picture (.png, .jpg, .pdf, .svg) or a table (.csv)",
    )
    evaluate: bool = HfArg(
        default=False, help="print the recalls on the data set's test split instead"
    )
    num_workers: int = HfArg(default=-1, help=NUM_WORKERS)
    device: str = HfArg(default="auto", help=DEVICE)

    def __post_init__(self) -> None:
        _check_ranges(self, n=(1, 1_000_000), num_workers=(-1, 256))
        if not all(query.strip() for query in self.query):
            raise ValueError("argument --query: empty, but some words are needed")
        if "-" in self.query and len(self.query) > 1:
            raise ValueError(
                "argument --query: - reads all queries from standard input, so it stands alone"
            )
        if any("\ud800" <= letter <= "\udfff" for letter in "".join(self.query)):
            raise ValueError("argument --query: not UTF-8")
        if Path(self.output).suffix.lower() not in (
            ".png",
            ".jpg",
            ".jpeg",
            ".pdf",
            ".svg",
            ".csv",
        ):
            raise ValueError(
                f"argument --output: {self.output}, but it must end in .png, .jpg, .pdf, .svg or .csv"
            )


def _check_ranges(settings: Any, **ranges: tuple[float, float]) -> None:
    """Refuses, by its flag, a setting outside [low, high]; not-a-number is outside of all."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if not low <= value <= high:
            raise ValueError(
                f"argument --{name.replace('_', '-')}: {value}, but {low} to {high} is allowed"
            )


class _Parser(HfArgumentParser):
    def error(self, message: str) -> None:
        """argparse's own error without the usage, which here is longer than a screen."""
        self.exit(2, f"{self.prog}: error: {message}\n")


Settings = TypeVar("Settings", Config, SearchConfig)


def parse(
    settings: type[Settings],
    argv: list[str] | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Settings:
    """Turns a command line (default: `sys.argv`) into `settings`.

    `defaults` replace those of the class (a resumed run's, the demo's), never a flag that was given.
    Ends the process with status 2 and one line for an unknown flag or an impossible value.
    """
    parser = _Parser(settings, description=settings.__doc__, allow_abbrev=False)
    parser.set_defaults(**(defaults or {}))
    try:
        parsed, rest = parser.parse_args_into_dataclasses(
            args=argv, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        parser.error(str(error))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)} (--help lists what is allowed)")
    if settings is Config and parsed.demo and defaults is None:
        return parse(settings, argv, DEMO_DEFAULTS)
    return parsed


def cli_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Ends a script with one line and status 1 on a `UserError`; a bug still shows its traceback."""

    def script(argv: list[str] | None = None) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(
                    errors="backslashreplace"
                )  # a file may have a name that no terminal can show
        try:
            main(argv)
        except UserError as error:
            sys.exit(f"error: {error}")
        except torch.OutOfMemoryError as error:
            advice = "try --chunk-size 32 in training, --device cpu in search"
            sys.exit(f"error: out of memory, {advice}: {str(error).splitlines()[0]}")
        except (RuntimeError, ConnectionResetError, ConnectionRefusedError) as error:
            if dist.is_initialized() and re.search("gloo|NCCL", str(error)):
                sys.exit(
                    f"error: this process cannot go on without the others: {str(error).splitlines()[0]}"
                )
            if WORKER not in str(error) and not isinstance(
                error, ConnectionError
            ):  # to a dead reader
                raise
            sys.exit(
                f"error: a process that reads pictures died, try --num-workers 0: {' '.join(str(error).split())}"
            )
        except (KeyboardInterrupt, EOFError):
            sys.exit("stopped")
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    return script


def progress(items: Iterable, what: str, **options: Any) -> tqdm:
    """A bar for what takes more than a second; in a log file or a pipe, a line now and then."""
    seconds = 0.1 if sys.stderr.isatty() else 30
    options |= {"mininterval": seconds, "maxinterval": seconds, "delay": 1, "dynamic_ncols": True}
    return tqdm(items, what, disable=dist.is_initialized() and dist.get_rank() > 0, **options)
