"""Ablations: trains the recipe with one change at a time and scores it on the dev split.

DATA="--data-dir path/to/flickr8k --image-encoder path/to/timm-folder"
DATA="$DATA --text-encoder path/to/transformers-folder"
python tests/benchmarks/ablation.py $DATA
python tests/benchmarks/ablation.py $DATA --only recipe "dropout 0.1" --settings --epochs 6

The flags of trainer.py after `--settings` apply to every run, for example to shorten it. Each run
has a process of its own. RESULTS.md has the results.
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

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from measuring import measuring_parser
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import inference  # noqa: E402
import models  # noqa: E402
import trainer  # noqa: E402
from config import Config, parse  # noqa: E402
from models import CLIP, ImageEncoder, TextEncoder  # noqa: E402


def scaled_lrs(factor: float, *names: str) -> list[str]:
    """Flags that multiply the default learning rates of these names."""
    flags = []
    for name in names:
        flags += [f"--{name.replace('_', '-')}", str(factor * getattr(Config, name))]
    return flags


# Each change is a list of flags, or a function that replaces a part of the program.
CHANGES: dict[str, list[str] | Callable[[], None]] = {
    "recipe": [],
    "none of the image encoder frozen": ["--freeze-image-encoder", "0"],
    "a quarter of the image encoder frozen": ["--freeze-image-encoder", "0.25"],
    "whole image encoder frozen": ["--freeze-image-encoder", "1"],
    "half of the text encoder frozen": ["--freeze-text-encoder", "0.5"],
    "whole text encoder frozen": ["--freeze-text-encoder", "1"],
    "no augmentation": ["--no-augment"],
    "training at 256 px": ["--image-size", "256"],
    "learning rates of the encoders x 2": scaled_lrs(2, "image_lr", "text_lr"),
    "learning rates of the encoders / 2": scaled_lrs(0.5, "image_lr", "text_lr"),
    "batch size 64": ["--batch-size", "64"],
    "batch size 256 and all learning rates x 1.4": [
        "--batch-size",
        "256",
        *scaled_lrs(1.4, "image_lr", "text_lr", "head_lr"),
    ],
    "dropout 0.1": ["--dropout", "0.1"],
    "stochastic depth off": ["--drop-path", "0"],
    "embedding dimension 512": ["--projection-dim", "512"],
    "temperature 0.05": ["--temperature", "0.05"],
    "weight decay 0.01": ["--weight-decay", "0.01"],
}


def change(name: str) -> Callable:
    """Decorates a function that makes a change for which there is no flag."""

    def register(function: Callable[[], None]) -> Callable[[], None]:
        CHANGES[name] = function
        return function

    return register


# ---------------------------------------------------------------- images and captions


@change("crops of 0.6 to 1 of the image")
def large_crops() -> None:
    original_init = data.Transform.__init__

    def init(self: data.Transform, size: int) -> None:
        original_init(self, size)
        self.crop.scale = (0.6, 1.0)

    data.Transform.__init__ = init


@change("RandAugment and random erasing")
def strong_augmentation() -> None:
    """Two of six operations that keep colors, and a gray rectangle in half of the images."""
    original_init = data.Transform.__init__
    original_augment = data.Transform.augment

    def init(self: data.Transform, size: int) -> None:
        original_init(self, size)
        import albumentations as A

        operations = [
            A.Rotate((-15, 15), border_mode=cv2.BORDER_REFLECT, p=1.0),
            A.Affine(shear=(-12, 12), border_mode=cv2.BORDER_REFLECT, p=1.0),
            A.Affine(translate_percent=(-0.1, 0.1), border_mode=cv2.BORDER_REFLECT, p=1.0),
            A.Sharpen(p=1.0),
            A.GaussianBlur(p=1.0),
            A.Perspective(p=1.0),
        ]
        erasing = A.CoarseDropout((1, 1), (0.1, 0.4), (0.1, 0.4), fill=128, p=0.5)
        self.strong = A.Compose([A.SomeOf(operations, n=2, p=1.0), erasing])

    def augment(
        self: data.Transform, pixels: np.ndarray, caption: str, rng: np.random.Generator
    ) -> np.ndarray:
        pixels = original_augment(self, pixels, caption, rng)
        self.strong.set_random_seed(int(rng.integers(2**31)))
        return self.strong(image=pixels)["image"]

    data.Transform.__init__ = init
    data.Transform.augment = augment


@change("encoded at the training size")
def encoded_at_training_size() -> None:
    inference.eval_image_size = lambda image, config: config.image_size


@change("random word masking 0.15")
def random_word_masking() -> None:
    """Replaces each word of a caption by BERT's [MASK] with probability 0.15."""
    original_getitem = data.ImageCaptionDataset.__getitem__

    def getitem(self: data.ImageCaptionDataset, index: int) -> dict[str, Any]:
        item = original_getitem(self, index)
        epoch, i = divmod(index, len(self))
        rng = np.random.default_rng((self.seed, epoch, i, 1))
        words = ["[MASK]" if rng.random() < 0.15 else word for word in item["caption"].split()]
        return {**item, "caption": " ".join(words)}

    data.ImageCaptionDataset.__getitem__ = getitem


def load_two_captions() -> None:
    """Text embeddings become (2B, D): the first captions of all images, then the second ones."""
    original_collate = data.collate

    def getitem(self: data.ImageCaptionDataset, index: int) -> dict[str, Any]:
        epoch, i = divmod(index, len(self))
        rng = np.random.default_rng((self.seed, epoch, i))
        first, second = rng.permutation(self.split.captions[i])[:2].tolist()
        pixels = data.load_image(self.split.paths[i])
        # Both captions must stay true, so "left" or "right" in either of them excludes the flip.
        pixels = self.transform.augment(pixels, f"{first} {second}", rng)
        return {"pixels": pixels, "caption": first, "second_caption": second}

    def collate(
        items: list[dict[str, Any]], tokenizer: Tokenizer, bucket_size: int
    ) -> dict[str, Any]:
        items = sorted(items, key=lambda item: len(item["caption"]))  # the order of the original
        batch = original_collate(items, tokenizer, bucket_size)
        second_captions = [item["second_caption"] for item in items]
        return {**batch, "texts": [*batch["texts"], data.tokenize(tokenizer, second_captions)]}

    data.ImageCaptionDataset.__getitem__ = getitem
    data.collate = collate


@change("two captions per image")
def two_captions() -> None:
    """The mean of two losses over the same images, each with other captions.

    Unlike in the recipe, equal captions of different images are negatives.
    """
    original_loss = models.contrastive_loss

    def loss(
        images: Tensor, texts: Tensor, logit_scale: Tensor, local_slice: slice, *_: Tensor
    ) -> Tensor:
        first_texts, second_texts = texts.chunk(2)  # (B, D) each
        first_loss = original_loss(images, first_texts, logit_scale)
        return (first_loss + original_loss(images, second_texts, logit_scale)) / 2

    load_two_captions()
    trainer.contrastive_loss = loss


@change("text-text term")
def text_text_term() -> None:
    """Adds half of the contrastive loss between two captions of each image.

    In the added term, equal captions of different images are negatives.
    """
    original_loss = models.contrastive_loss

    def loss(
        images: Tensor, texts: Tensor, logit_scale: Tensor, local_slice: slice, ids: Tensor
    ) -> Tensor:
        first_texts, second_texts = texts.chunk(2)  # (B, D) each
        image_text = original_loss(images, first_texts, logit_scale, local_slice, ids)
        return image_text + original_loss(first_texts, second_texts, logit_scale) / 2

    load_two_captions()
    trainer.contrastive_loss = loss


@change("MixGen on a quarter of the pairs")
def mixgen() -> None:
    """Replaces a quarter of a batch by mixed pairs (arXiv 2206.08358).

    A mixed pair is the mean of two images of the batch, with both of their captions.
    """
    original_collate = data.collate

    def mix(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
        pixels = (one["pixels"].astype(np.uint16) + other["pixels"]) // 2
        caption = f"{one['caption']} {other['caption']}"
        return {"pixels": pixels.astype(np.uint8), "caption": caption}

    def collate(
        items: list[dict[str, Any]], tokenizer: Tokenizer, bucket_size: int
    ) -> dict[str, Any]:
        quarter = len(items) // 4
        mixed = [mix(*pair) for pair in zip(items[:quarter], items[quarter : 2 * quarter])]
        return original_collate(mixed + items[quarter:], tokenizer, bucket_size)

    data.collate = collate


# ---------------------------------------------------------------- model


class GeneralizedPooling(nn.Module):
    """The pooling of VSE-infinity (arXiv 2011.04305): (B, C, H, W) to (B, C).

    Each channel's values are sorted and summed with learned weights, one per rank, which a GRU
    gives for any number of values. In training, 20 % of the values are left out at random.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.gru = nn.GRU(width, width, batch_first=True, bidirectional=True)
        self.score = nn.Linear(width, 1, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        values = features.float().flatten(2)  # (B, C, H * W)
        if self.training:
            kept = torch.randperm(values.shape[2])[: round(0.8 * values.shape[2])]
            values = values[..., kept]
        ranked = values.sort(dim=2, descending=True).values  # (B, C, K)
        num_ranks = ranked.shape[2]
        ranks = torch.arange(num_ranks, device=values.device)[:, None]  # (K, 1)
        exponents = torch.arange(0, self.width, 2, device=values.device) / self.width
        angles = ranks / 10_000**exponents  # (K, width / 2)
        encodings = torch.cat([angles.sin(), angles.cos()], dim=1)  # (K, width)
        states, _ = self.gru(encodings[None])  # (1, K, 2 * width)
        forward, backward = states.chunk(2, dim=2)
        weights = self.score((forward + backward) / 2).flatten().softmax(dim=0)  # (K,)
        return ranked @ weights  # (B, C, K) @ (K,)


def replace_pooling(build: Callable[[ImageEncoder], nn.Module]) -> None:
    """Pools the feature map (B, C, H, W) of the image encoder by a module of its own.

    Its tensors count where half of the encoder's tensors are frozen, but stay trained.
    """
    original_init = ImageEncoder.__init__
    original_groups = trainer.param_groups

    def init(self: ImageEncoder, *args: Any, **options: Any) -> None:
        original_init(self, *args, **options)
        self.model.global_pool = build(self)

    def param_groups(model: CLIP, config: Config) -> list[dict[str, Any]]:
        """The pooling is new, so it has the learning rate of the heads."""
        pooling = list(model.image.encoder.model.global_pool.parameters())
        for parameter in pooling:
            parameter.requires_grad = False  # left out of the encoder's groups
        groups = original_groups(model, config)
        for parameter in pooling:
            parameter.requires_grad = True
        return [{"params": pooling, "lr": config.head_lr, "weight_decay": 0.0}, *groups]

    ImageEncoder.__init__ = init
    trainer.param_groups = param_groups


@change("generalized pooling")
def generalized_pooling() -> None:
    replace_pooling(lambda encoder: GeneralizedPooling())


@change("attention pooling")
def attention_pooling() -> None:
    """That of CLIP's ResNets (section 2.4), whose query is the mean of the features."""
    from timm.layers import AttentionPool2d

    replace_pooling(lambda encoder: AttentionPool2d(encoder.feature_dim, feat_size=7))


@change("average and max pooling")
def average_and_max_pooling() -> None:
    original_init = ImageEncoder.__init__

    def init(self: ImageEncoder, *args: Any, **options: Any) -> None:
        original_init(self, *args, **{**options, "global_pool": "catavgmax"})

    ImageEncoder.__init__ = init


@change("linear projection heads")
def linear_heads() -> None:
    class LinearHead(nn.Module):
        def __init__(self, feature_dim: int, projection_dim: int, dropout: float) -> None:
            super().__init__()
            self.projection = nn.Linear(feature_dim, projection_dim)

        def forward(self, features: Tensor) -> Tensor:
            return self.projection(features)

    models.ProjectionHead = LinearHead


@change("first token instead of mean pooling")
def first_token() -> None:
    def forward(self: TextEncoder, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0]

    TextEncoder.forward = forward


# ---------------------------------------------------------------- optimization


@change("layer-wise learning-rate decay 0.8 (text)")
def layerwise_lr_decay() -> None:
    """Multiplies the learning rate of each text layer by 0.8 per layer above it."""
    original_groups = trainer.param_groups

    def param_groups(model: CLIP, config: Config) -> list[dict[str, Any]]:
        num_layers = model.text.encoder.model.config.num_hidden_layers
        layers_above = {}
        for name, parameter in model.text.encoder.named_parameters():
            layer = re.search(r"layer\.(\d+)\.", name)
            layers_above[parameter] = num_layers - (int(layer[1]) + 1 if layer else 0)
        groups = []
        for group in original_groups(model, config):
            for parameter in group["params"]:
                lr = group["lr"] * 0.8 ** layers_above.get(parameter, 0)
                groups.append({**group, "params": [parameter], "lr": lr})
        return groups

    trainer.param_groups = param_groups


@change("batch-norm statistics of the batch")
def batch_statistics() -> None:
    trainer.set_train_mode = lambda model, config: model.train()


@change("EMA of the weights 0.99")
def ema_of_weights() -> None:
    """Scores the exponential moving average of the weights over the steps."""
    original_setup = trainer.setup
    original_step = trainer.train_step
    original_validate = trainer.validate
    averages: list[AveragedModel] = []

    def setup(*arguments: Any) -> trainer.Run:
        run = original_setup(*arguments)
        averages.append(AveragedModel(run.model, multi_avg_fn=get_ema_multi_avg_fn(0.99)))
        return run

    def train_step(run: trainer.Run, batch: dict[str, Any]) -> Tensor:
        loss = original_step(run, batch)
        averages[0].update_parameters(run.model)
        return loss

    def validate(model: CLIP, run: trainer.Run) -> dict[str, float]:
        return original_validate(averages[0].module, run)

    trainer.setup = setup
    trainer.train_step = train_step
    trainer.validate = validate


# ---------------------------------------------------------------- loss


@change("half of the targets soft")
def soft_targets() -> None:
    """Half of each target is one-hot, the other half the tutorial's soft target.

    The soft target is the softmax of the similarities among the images and among the captions.
    Unlike in the recipe, equal captions of different images are negatives.
    """

    def loss(
        images: Tensor, texts: Tensor, logit_scale: Tensor, local_slice: slice, *_: Tensor
    ) -> Tensor:
        logits = logit_scale * images @ texts.T  # (B, D) @ (D, B)
        similarities = (images @ images.T + texts @ texts.T).detach() / 2  # (B, D) @ (D, B)
        soft = (logit_scale.detach() * similarities).softmax(dim=1)
        targets = (soft + torch.eye(len(images), device=images.device)) / 2
        return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2

    trainer.contrastive_loss = loss


@change("label smoothing 0.1")
def label_smoothing() -> None:
    """Unlike in the recipe, equal captions of different images are negatives."""

    def loss(
        images: Tensor, texts: Tensor, logit_scale: Tensor, local_slice: slice, *_: Tensor
    ) -> Tensor:
        logits = logit_scale * images @ texts.T  # (B, D) @ (D, B)
        labels = torch.arange(len(images), device=images.device)
        image_loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
        text_loss = F.cross_entropy(logits.T, labels, label_smoothing=0.1)
        return (image_loss + text_loss) / 2

    trainer.contrastive_loss = loss


@change("hard negatives (VSE++), margin 0.2")
def hard_negatives() -> None:
    """Adds the hinge loss of VSE++ (arXiv 1707.05612) to the contrastive loss."""
    original_loss = models.contrastive_loss

    def loss(
        images: Tensor, texts: Tensor, logit_scale: Tensor, local_slice: slice, ids: Tensor
    ) -> Tensor:
        contrastive = original_loss(images, texts, logit_scale, local_slice, ids)
        cosines = images @ texts.T  # (B, D) @ (D, B)
        positives = cosines.diag()
        negatives = cosines - 2 * torch.eye(len(cosines), device=cosines.device)
        # The hardest negative image of each text, and the hardest negative text of each image.
        text_hinge = (0.2 + negatives.amax(dim=0) - positives).relu().mean()
        image_hinge = (0.2 + negatives.amax(dim=1) - positives).relu().mean()
        return contrastive + text_hinge + image_hinge

    trainer.contrastive_loss = loss


@change("sigmoid loss")
def sigmoid_loss() -> None:
    """The loss of SigLIP (arXiv 2303.15343): each of the B x B pairs is matched or not.

    Unlike in the recipe, equal captions of different images are negatives.
    """
    original_groups = trainer.param_groups
    biases: list[nn.Parameter] = []

    def param_groups(model: CLIP, config: Config) -> list[dict[str, Any]]:
        biases.append(nn.Parameter(torch.tensor(-10.0, device=model.logit_scale.device)))
        bias_group = {"params": biases, "lr": config.head_lr, "weight_decay": 0.0}
        return [bias_group, *original_groups(model, config)]

    def loss(
        images: Tensor, texts: Tensor, logit_scale: Tensor, local_slice: slice, *_: Tensor
    ) -> Tensor:
        logits = logit_scale * images @ texts.T + biases[0]  # (B, D) @ (D, B)
        signs = 2 * torch.eye(len(images), device=images.device) - 1  # 1 for matching pairs
        return -F.logsigmoid(signs * logits).sum() / len(images)

    trainer.param_groups = param_groups
    trainer.contrastive_loss = loss


# ---------------------------------------------------------------- command line


def main() -> None:
    parser = measuring_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--only", nargs="+", default=list(CHANGES), choices=CHANGES, help="run only these changes"
    )
    parser.add_argument("--child", choices=CHANGES, help="(internal) the one run of this process")
    parser.add_argument(
        "--settings",
        nargs=REMAINDER,
        default=[],
        help="flags of trainer.py for every run; must come last",
    )
    options = parser.parse_args()
    if options.child:
        with redirect_stdout(sys.stderr):
            row = train_with_change(options)
        print(json.dumps(row))
        return
    print(
        "| change | pairs | minutes | last loss "
        "| dev text→image R@1/5/10 | image→text | mean of six |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for name in options.only:
        command = [sys.executable, sys.argv[0], "--child", name, *sys.argv[1:]]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if process.returncode:
            sys.exit(f"{name}: failed")
        row = json.loads(process.stdout.splitlines()[-1])
        print(f"| {' | '.join([name, *row])} |", flush=True)


def train_with_change(options: Namespace) -> list[str]:
    """Trains with one change, validates once at the end, and returns the cells of its row."""
    changed = CHANGES[options.child]
    flags = ["--data-dir", options.data_dir]
    flags += ["--image-encoder", f"local-dir:{options.image_encoder}"]
    flags += ["--text-encoder", options.text_encoder, *options.settings]
    if callable(changed):
        changed()
    else:
        flags += changed
    config = parse(Config, flags)
    # Windows does not delete the current folder.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.chdir(folder)
        run = trainer.setup(config, None, trainer.Distributed.init(config))
        started = time.perf_counter()
        batches = iter(run.loader)
        for epoch in range(config.epochs):
            loss = trainer.train_epoch(run, epoch, batches)
        minutes = (time.perf_counter() - started) / 60
        metrics = trainer.validate(run.model, run)
    num_pairs = len(run.loader) * config.batch_size
    row = [f"{num_pairs:,}", f"{minutes:.1f}", f"{loss:.2f}"]
    for direction in ("t2i", "i2t"):
        recalls = [f"{metrics[f'{direction}_r{k}']:.1f}" for k in inference.RECALL_KS]
        row.append(" / ".join(recalls))
    mean = sum(metrics[name] for name in inference.RECALLS) / len(inference.RECALLS)
    return [*row, f"{mean:.1f}"]


if __name__ == "__main__":
    main()
