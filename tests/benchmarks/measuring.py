"""The flags that `benchmark.py`, `ablation.py` and `comparison.py` share: data and encoders."""

from argparse import ArgumentParser
from pathlib import Path


def measuring_parser(description: str) -> ArgumentParser:
    """A parser with the flags of the three folders.

    Their paths become absolute, because each run has a working directory of its own.
    """
    parser = ArgumentParser(description=description)
    flags = {
        "--data-dir": "folder of Flickr8k",
        "--image-encoder": "timm folder of the pretrained image encoder",
        "--text-encoder": "transformers folder of the pretrained text encoder",
    }
    for flag, help_text in flags.items():
        parser.add_argument(flag, required=True, type=absolute, help=help_text)
    return parser


def absolute(path: str) -> str:
    return str(Path(path).absolute())
