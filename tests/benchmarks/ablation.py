"""One change to the recipe at a time, trained shortly and scored on the dev split: README's table of what paid.

python tests/benchmarks/ablation.py --data-dir path/to/flickr8k --image-encoder path/to/timm-folder --text-encoder path/to/folder
python tests/benchmarks/ablation.py --data-dir ... --only recipe "mean of weights" --settings --image-size 128 --epochs 6

What stands after `--settings` goes to every run, to shorten them all. Each has a process of its own.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import REMAINDER, Namespace
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import measuring_parser
from tokenizers import Tokenizer
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import inference  # noqa: E402
import models  # noqa: E402
import trainer  # noqa: E402
from config import Config, parse  # noqa: E402


def rates(times: float, *names: str) -> list[str]:
    """Settings that multiply the learning rates of these names."""
    return [
        part
        for name in names
        for part in (f"--{name.replace('_', '-')}", str(times * getattr(Config, name)))
    ]


CHANGES: dict[
    str, list[str] | Callable[[], None]
] = {  # settings, or what replaces a part of the program
    "recipe": [],
    "none of the image encoder frozen": ["--freeze-image-encoder", "0"],
    "a quarter of the image encoder frozen": ["--freeze-image-encoder", "0.25"],
    "image encoder frozen": ["--freeze-image-encoder", "1"],
    "half of the text encoder frozen": ["--freeze-text-encoder", "0.5"],
    "text encoder frozen": ["--freeze-text-encoder", "1"],
    "no augmentation": ["--no-augment"],
    "256 px": ["--image-size", "256"],
    "encoders' rates x 2": rates(2, "image_lr", "text_lr"),
    "encoders' rates / 2": rates(0.5, "image_lr", "text_lr"),
    "batch 64": ["--batch-size", "64"],
    "batch 256, rates x 1.4": [
        "--batch-size",
        "256",
        *rates(1.4, "image_lr", "text_lr", "head_lr"),
    ],
    "dropout 0.1": ["--dropout", "0.1"],
    "no blocks skipped": ["--drop-path", "0"],
    "projection 512": ["--projection-dim", "512"],
    "temperature 0.05": ["--temperature", "0.05"],
    "weight decay 0.01": ["--weight-decay", "0.01"],
}


def change(name: str) -> Callable:
    """Gives a change that no setting makes its name."""

    def keep(function: Callable[[], None]) -> Callable[[], None]:
        CHANGES[name] = function
        return function

    return keep


@change("crops of 0.6 to 1 of a picture")
def large_crops(whole: Callable = data.Transform.__init__) -> None:
    def init(self: data.Transform, size: int) -> None:
        whole(self, size)
        self.augmentation.transforms[0].scale = (0.6, 1.0)

    data.Transform.__init__ = init


@change("embedded at the size of training")
def embedded_no_larger() -> None:
    inference.eval_image_size = lambda image, config: config.image_size


@change("words hidden, 0.15")
def hidden_words() -> None:
    """BERT's [MASK] in the place of a word of the drawn caption, with this chance."""

    class WithHiddenWords(data.ImageCaptionDataset):
        def __getitem__(self, epoch_and_picture: tuple[int, int]) -> tuple[np.ndarray, str]:
            pixels, caption = super().__getitem__(epoch_and_picture)
            rng = np.random.default_rng((self.seed, *epoch_and_picture, 1))
            return pixels, " ".join(
                "[MASK]" if rng.random() < 0.15 else word for word in caption.split()
            )

    data.ImageCaptionDataset = WithHiddenWords


@change("average and maximum pooled")
def both_pooled(whole: Callable = models.ImageEncoder.__init__) -> None:
    def init(self: models.ImageEncoder, *arguments: object, **options: object) -> None:
        whole(self, *arguments, **{**options, "global_pool": "catavgmax"})

    models.ImageEncoder.__init__ = init


@change("text rates x 0.8 a layer, from the last to the first")
def rates_by_layer(whole: Callable = trainer.param_groups) -> None:
    def groups(model: models.CLIP, config: Config) -> list[dict[str, Any]]:
        below = {}  # how many layers a tensor of the text encoder has above it
        for name, tensor in model.text.encoder.named_parameters():
            layer = re.search(r"layer\.(\d+)\.", name)
            below[tensor] = model.text.encoder.model.config.num_hidden_layers - (
                int(layer[1]) + 1 if layer else 0
            )
        return [
            {**group, "params": [tensor], "lr": group["lr"] * 0.8 ** below.get(tensor, 0)}
            for group in whole(model, config)
            for tensor in group["params"]
        ]

    trainer.param_groups = groups


@change("linear heads")
def linear_heads() -> None:
    class Head(nn.Module):
        def __init__(self, width: int, projection_dim: int, dropout: float) -> None:
            super().__init__()
            self.projection = nn.Linear(width, projection_dim)

        def forward(self, features: Tensor) -> Tensor:
            return self.projection(features)

    models.ProjectionHead = Head


@change("first token instead of mean")
def first_token() -> None:
    def forward(self: models.TextEncoder, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]

    models.TextEncoder.forward = forward


@change("batch statistics trained")
def batch_statistics() -> None:
    trainer.set_train_mode = lambda model, config: model.train()


@change("two captions a picture")
def two_captions(
    loss: Callable = models.contrastive_loss, collate: Callable = data.collate
) -> None:
    """The mean of two losses over the same pixels: texts come as (2B, D), first captions before second ones."""

    def draw(
        self: data.ImageCaptionDataset, epoch_and_picture: tuple[int, int]
    ) -> tuple[np.ndarray, list[str]]:
        epoch, picture = epoch_and_picture
        rng = np.random.default_rng((self.seed, epoch, picture))
        captions = rng.permutation(self.split.captions[picture])[:2].tolist()
        pixels = data.load_image(self.split.paths[picture])
        # A caption with "left" or "right" forbids the mirror, here to both.
        return self.transform.augment(pixels, " ".join(captions), rng), captions

    def collate_both(
        items: list[tuple[np.ndarray, list[str]]], tokenizer: Tokenizer, group_size: int
    ) -> tuple:
        items = sorted(
            items, key=lambda item: len(item[1][0])
        )  # as `collate` orders the first captions
        batch, groups = collate(
            [(pixels, first) for pixels, (first, _) in items], tokenizer, group_size
        )
        return batch, [*groups, data.tokenize(tokenizer, [second for _, (_, second) in items])]

    def mean_loss(
        images: Tensor, texts: Tensor, logit_scale: Tensor, rows: slice = slice(None)
    ) -> Tensor:
        return sum(loss(images, captions, logit_scale) for captions in texts.chunk(2)) / 2

    data.ImageCaptionDataset.__getitem__, data.collate = draw, collate_both
    trainer.contrastive_loss = mean_loss


@change("half of the targets soft")
def soft_targets() -> None:
    """The tutorial's idea, for half of a target: who resembles a picture or its caption is right in part."""

    def loss(
        images: Tensor, texts: Tensor, logit_scale: Tensor, rows: slice = slice(None)
    ) -> Tensor:
        logits = logit_scale * images @ texts.T  # (B, D) @ (D, B)
        alike = (images @ images.T + texts @ texts.T).detach() / 2  # (B, D) @ (D, B)
        targets = (
            (logit_scale.detach() * alike).softmax(dim=1)
            + torch.eye(len(images), device=images.device)
        ) / 2
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    trainer.contrastive_loss = loss


@change("label smoothing 0.1")
def label_smoothing() -> None:
    def loss(
        images: Tensor, texts: Tensor, logit_scale: Tensor, rows: slice = slice(None)
    ) -> Tensor:
        logits = logit_scale * images @ texts.T  # (B, D) @ (D, B)
        matches = torch.arange(len(images), device=images.device)
        return (
            sum(F.cross_entropy(each, matches, label_smoothing=0.1) for each in (logits, logits.T))
            / 2
        )

    trainer.contrastive_loss = loss


@change("hardest negatives, margin 0.2, added")
def hardest_negatives(original: Callable = models.contrastive_loss) -> None:
    """VSE++ (arXiv 1707.05612) on top of the contrastive loss."""

    def loss(
        images: Tensor, texts: Tensor, logit_scale: Tensor, rows: slice = slice(None)
    ) -> Tensor:
        cosine_similarity = images @ texts.T  # (B, D) @ (D, B)
        right, wrong = (
            cosine_similarity.diag(),
            cosine_similarity
            - 2 * torch.eye(len(cosine_similarity), device=cosine_similarity.device),
        )
        hinges = [(0.2 + wrong.amax(dim) - right).relu().mean() for dim in (0, 1)]
        return original(images, texts, logit_scale) + sum(hinges)

    trainer.contrastive_loss = loss


@change("mean of weights")
def mean_of_weights(decay: float = 0.99) -> None:
    """An exponential mean of the weights over the steps is scored in their place."""
    means: dict[str, Tensor] = {}
    step, validate = trainer.train_step, trainer.validate

    def train_step(run: trainer.Run, *batch: object) -> Tensor:
        loss = step(run, *batch)
        for name, value in run.model.state_dict().items():
            if value.is_floating_point():
                if name not in means:
                    means[name] = value.clone()
                means[name].lerp_(value, 1 - decay)
        return loss

    def validate_means(model: models.CLIP, run: trainer.Run, split: str) -> dict[str, float]:
        model.load_state_dict(means, strict=False)
        return validate(model, run, split)

    trainer.train_step, trainer.validate = train_step, validate_means


def main() -> None:
    parser = measuring_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=list(CHANGES), choices=CHANGES, help="some rows alone"
    )
    parser.add_argument("--child", choices=CHANGES, help="(of the program itself) one run")
    parser.add_argument(
        "--settings",
        nargs=REMAINDER,
        default=[],
        help="flags of trainer.py for every run; the last",
    )
    options = parser.parse_args()
    if options.child:
        with redirect_stdout(sys.stderr):
            row = run(options)
        print(json.dumps(row))
        return
    print(
        "| change | pairs | minutes | last loss | dev text→image R@1/5/10 | image→text | mean of six |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name in options.only:
        command = [sys.executable, sys.argv[0], "--child", name, *sys.argv[1:]]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{name}: failed")
        print(f"| {' | '.join([name, *json.loads(done.stdout.splitlines()[-1])])} |", flush=True)


def run(options: Namespace) -> list[str]:
    """The row of one change: a training run that is validated once, at its end."""
    own = CHANGES[options.child]
    flags = [*options.settings, *(own if isinstance(own, list) else [])]
    if callable(own):
        own()
    encoders = [
        "--image-encoder",
        f"local-dir:{options.image_encoder}",
        "--text-encoder",
        options.text_encoder,
    ]
    config = parse(Config, ["--data-dir", options.data_dir, *encoders, *flags])
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        training = trainer.setup(config, None)
        started = time.perf_counter()
        for epoch in range(config.epochs):
            loss = trainer.train_epoch(training, epoch)
        minutes = (time.perf_counter() - started) / 60
        metrics = trainer.validate(training.model, training, "dev")
    ways = [
        " / ".join(f"{metrics[f'{way}_r{k}']:.1f}" for k in inference.RECALLS_AT)
        for way in ("t2i", "i2t")
    ]
    mean = sum(metrics[name] for name in trainer.RECALLS) / len(trainer.RECALLS)
    pairs = config.epochs * len(training.loader) * config.batch_size
    return [f"{pairs:,}", f"{minutes:.1f}", f"{loss:.2f}", *ways, f"{mean:.1f}"]


if __name__ == "__main__":
    main()
