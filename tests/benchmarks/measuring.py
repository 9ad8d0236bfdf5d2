"""What `benchmark.py`, `comparison.py` and `ablation.py` share: the flags that name the data and the encoders."""

from argparse import ArgumentParser
from pathlib import Path


def measuring_parser(description: str) -> ArgumentParser:
    """A parser with the three folders, which become absolute, since each run works in a folder of its own."""
    parser = ArgumentParser(description=description)
    for flag, what in (
        ("--data-dir", "Flickr8k"),
        ("--image-encoder", "timm folder of the pretrained image encoder"),
        ("--text-encoder", "transformers folder of the pretrained text encoder"),
    ):
        parser.add_argument(flag, required=True, type=absolute, help=what)
    return parser


def absolute(path: str) -> str:
    return str(Path(path).absolute())
