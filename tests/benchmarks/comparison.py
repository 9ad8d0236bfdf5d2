"""Compares the recalls of trainer.py, open_clip and the tutorial's recipe after the same minutes.

pip install -r requirements.txt -r tests/benchmarks/requirements.txt
DATA="--data-dir path/to/flickr8k --image-encoder path/to/timm-folder"
DATA="$DATA --text-encoder path/to/transformers-folder"
python tests/benchmarks/comparison.py $DATA --minutes 15 --open-clip-lr 5e-4 1e-3
python tests/benchmarks/comparison.py $DATA --minutes 45 --open-clip-lr 1e-3 --split test
python tests/benchmarks/comparison.py $DATA --weights runs/clip/best.pt --split test

All programs have the same images, encoders and image size. Learning rates should be chosen on the
dev split, which is the default. All models are scored by `recalls`, which shares no code with
`inference.py`. Each run has a process of its own. The minutes are of training alone, without
loading, validation and saving. Those of open_clip are estimated from a short trial; each row has
the actual minutes. Each model is scored raw and with hub correction, whose references are the
images of the training split and the first caption of each.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from measuring import absolute, measuring_parser
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
RECALL_KS = (1, 5, 10)
OPEN_CLIP_BATCH = 64  # open_clip's default
TUTORIAL_BATCH = 32  # the tutorial's default
# In tokens. open_clip pads every caption to 77 by default; those of Flickr8k have 42 at most.
CONTEXT_LENGTH = 48


def main() -> None:
    parser = measuring_parser(__doc__.splitlines()[0])
    parser.add_argument("--image-size", type=int, default=224, help="side of the images, in pixels")
    parser.add_argument("--minutes", type=float, default=45, help="minutes of training of each run")
    parser.add_argument(
        "--split", choices=("dev", "test"), default="dev", help="split to score at the end"
    )
    parser.add_argument(
        "--open-clip-lr",
        type=float,
        nargs="*",
        default=[],
        help="train open_clip with each of these learning rates",
    )
    parser.add_argument(
        "--tutorial-times",
        type=float,
        nargs="*",
        default=[],
        help="train the tutorial's recipe with its learning rates times each of these factors",
    )
    parser.add_argument(
        "--weights", type=absolute, nargs="*", default=[], help="score checkpoints of trainer.py"
    )
    parser.add_argument(
        "--child", nargs=2, help="(internal) the one run of this process: program and setting"
    )
    options = parser.parse_args()
    if options.child:
        program, setting = options.child
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            result = PROGRAMS[program](options, setting, Path(folder))
        print(json.dumps(result))
        return
    split = options.split
    print(
        f"| program | learning rate | pairs | minutes | {split} text→image R@1/5/10 | image→text "
        "| corrected text→image | corrected image→text |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    runs = [("trainer.py", checkpoint) for checkpoint in options.weights]
    runs += [("open_clip", lr) for lr in options.open_clip_lr]
    runs += [("tutorial", factor) for factor in options.tutorial_times]
    for program, setting in runs:
        command = [sys.executable, *sys.argv, "--child", program, str(setting)]
        process = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if process.returncode:
            sys.exit(f"{program} {setting} failed")
        result = json.loads(process.stdout.splitlines()[-1])
        cells = [program, result["lr"], f"{result['pairs']:,}", f"{result['minutes']:.1f}"]
        for direction in ("t2i", "i2t", "corrected_t2i", "corrected_i2t"):
            values = [f"{result[f'{direction}_r{k}']:.1f}" for k in RECALL_KS]
            cells.append(" / ".join(values))
        print(f"| {' | '.join(cells)} |", flush=True)


# ---------------------------------------------------------------- the evaluator


def recalls(
    images: np.ndarray,
    texts: np.ndarray,
    image_of_text: np.ndarray,
    image_biases: np.ndarray | float = 0.0,
    text_biases: np.ndarray | float = 0.0,
) -> dict[str, float]:
    """Recall@K in percent in both directions.

    `images` (N, D) and `texts` (M, D) are unit vectors, `image_of_text` (M,) is the index of each
    text's image, and the biases (N,) and (M,) are subtracted from the cosines of the answers. One
    query at a time: all answers are sorted by score, wrong ones before right ones of the same
    score, and the first right one must be among the first K (Hodosh et al., 2013). An image may
    have several captions, of which any is right.
    """
    indices = np.arange(len(images))
    positions = {
        "t2i": first_right_positions(
            texts, images, image_biases, lambda text: indices == image_of_text[text]
        ),
        "i2t": first_right_positions(
            images, texts, text_biases, lambda image: image_of_text == image
        ),
    }
    results = {}
    for direction, first in positions.items():
        for k in RECALL_KS:
            results[f"{direction}_r{k}"] = 100 * float(np.mean(first < k))
    return results


def first_right_positions(
    queries: Iterable[np.ndarray],
    answers: np.ndarray,
    biases: np.ndarray | float,
    right: Callable[[int], np.ndarray],
) -> np.ndarray:
    """Position, from 0, of the first right answer in each query's ranking.

    `right` returns for the index of a query which of the answers are right.
    """
    positions = []
    for index, query in enumerate(queries):
        is_right = right(index)
        scores = answers @ query - biases  # (N, D) @ (D,)
        order = np.lexsort((is_right, -scores))  # by score, then wrong ones first
        positions.append(np.argmax(is_right[order]))
    return np.array(positions)


def hub_biases(candidates: np.ndarray, references: np.ndarray) -> np.ndarray:
    """The bias (N,) of nearest neighbor normalization (arXiv 2410.24114) for unit vectors.

    It is alpha times the mean of the k largest cosines of a candidate and the references.
    """
    from inference import NNN_ALPHA, NNN_K

    cosines = candidates @ references.T  # (N, D) @ (D, R)
    return NNN_ALPHA * np.sort(cosines, axis=1)[:, -NNN_K:].mean(axis=1)


@torch.inference_mode()
def score(
    encode_images: Callable[[list[Path]], Tensor],
    encode_texts: Callable[[list[str]], Tensor],
    data_dir: str,
    split_name: str,
) -> dict[str, float]:
    """The recalls of two encoders, which are called with a hundred paths or captions at a time.

    Those with hub correction have the prefix "corrected_".
    """
    from data import read_splits

    # 1. The split to score.
    splits = read_splits(data_dir)
    split = splits[split_name]
    captions_per_image = [len(captions) for captions in split.captions]
    image_of_text = np.repeat(np.arange(len(split.paths)), captions_per_image)
    images = encode_in_batches(encode_images, split.paths)
    texts = encode_in_batches(encode_texts, split.texts)

    # 2. The references of the hub correction.
    train = splits["train"]
    first_captions = [captions[0] for captions in train.captions]
    image_biases = hub_biases(images, encode_in_batches(encode_texts, first_captions))
    text_biases = hub_biases(texts, encode_in_batches(encode_images, train.paths))

    # 3. Both recalls.
    corrected = recalls(images, texts, image_of_text, image_biases, text_biases)
    results = recalls(images, texts, image_of_text)
    return results | {f"corrected_{name}": value for name, value in corrected.items()}


def encode_in_batches(encode: Callable[[list], Tensor], items: list) -> np.ndarray:
    """Unit vectors (N, D) of paths or captions."""
    batches = [items[start : start + 100] for start in range(0, len(items), 100)]
    embeddings = torch.cat([encode(batch) for batch in batches]).numpy()
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


# ---------------------------------------------------------------- the three programs


def trainer_py(options: Namespace, checkpoint_path: str, folder: Path) -> dict:
    """Scores a best.pt of `trainer.py`, with images encoded at the size that `inference.py` uses.

    The minutes are those of `metrics.csv`.
    """
    import pandas as pd

    from data import Transform, load_image, stack_images, tokenize
    from models import eval_image_size, load_checkpoint, load_clip

    checkpoint = load_checkpoint(checkpoint_path)
    config = checkpoint.config
    if config.image_size != options.image_size:
        sys.exit(
            f"{checkpoint_path}: trained at {config.image_size} px; "
            f"pass --image-size {config.image_size}"
        )
    model = load_clip(checkpoint)
    transform = Transform(eval_image_size(model.image, config))

    def encode_images(paths: list[Path]) -> Tensor:
        return model.encode_image(stack_images(transform(load_image(path)) for path in paths))

    def encode_texts(texts: list[str]) -> Tensor:
        return model.encode_text(*tokenize(checkpoint.tokenizer, texts))

    metrics = score(encode_images, encode_texts, options.data_dir, options.split)
    table = pd.read_csv(Path(checkpoint_path).with_name("metrics.csv"))
    return {
        "lr": f"{config.image_lr:g} / {config.text_lr:g} / {config.head_lr:g}",
        "pairs": round((table.seconds * table.pairs_per_second).sum()),
        "minutes": table.seconds.sum() / 60,
        **metrics,
    }


def open_clip(options: Namespace, lr: str, folder: Path) -> dict:
    """open_clip's own program with its default batch size.

    AdamW, linear warmup over a tenth of the steps, a cosine to 0, batch-norm statistics trained.
    Each caption is a pair of its own. The program only makes whole passes over a table, so a short
    trial determines the faster precision and the number of pairs that fill the minutes. The pairs
    are repeated if there are too few.
    """
    import open_clip as library
    from baselines import OPEN_CLIP_MODEL, add_open_clip_model, train_open_clip, write_pairs
    from PIL import Image

    from data import read_splits

    # 1. The data and the model.
    os.chdir(folder)
    split = read_splits(options.data_dir)["train"]
    pairs = []
    for path, captions in zip(split.paths, split.captions):
        pairs += [(path, caption) for caption in captions]
    random.Random(0).shuffle(pairs)
    image_encoder = f"local-dir:{options.image_encoder}"
    add_open_clip_model(image_encoder, options.text_encoder, options.image_size)
    statistics = pixel_statistics(options)
    arguments = ["--batch-size", str(OPEN_CLIP_BATCH), "--workers", "4", "--pretrained-image"]
    arguments += ["--force-context-length", str(CONTEXT_LENGTH)]
    arguments += ["--image-mean", *map(str, statistics["mean"])]
    arguments += ["--image-std", *map(str, statistics["std"])]

    # 2. The trial.
    write_pairs(pairs[: 12 * OPEN_CLIP_BATCH], Path("trial.csv"))
    speed_of = {}
    for precision in ("fp32", "amp_bf16"):
        trial = [*arguments, "--precision", precision, "--logs", "none"]
        speed_of[precision] = np.median(train_open_clip(Path("trial.csv"), *trial)[4:])
    precision = max(speed_of, key=speed_of.get)
    num_steps = max(10, round(60 * options.minutes * speed_of[precision] / OPEN_CLIP_BATCH))
    num_pairs = num_steps * OPEN_CLIP_BATCH

    # 3. The training.
    repeated = pairs * (1 + num_pairs // len(pairs))
    write_pairs(repeated[:num_pairs], Path("pairs.csv"))
    arguments += ["--precision", precision, "--lr", lr, "--warmup", str(num_steps // 10)]
    arguments += ["--logs", "logs", "--name", "run"]
    speeds = train_open_clip(Path("pairs.csv"), *arguments)

    # 4. The score.
    model, _, preprocess = library.create_model_and_transforms(
        OPEN_CLIP_MODEL,
        "logs/run/checkpoints/epoch_1.pt",
        image_mean=statistics["mean"],
        image_std=statistics["std"],
    )
    model.eval()
    tokenizer = library.get_tokenizer(OPEN_CLIP_MODEL, context_length=CONTEXT_LENGTH)

    def encode_images(paths: list[Path]) -> Tensor:
        return model.encode_image(torch.stack([preprocess(Image.open(path)) for path in paths]))

    def encode_texts(texts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(texts))

    metrics = score(encode_images, encode_texts, options.data_dir, options.split)
    minutes = sum(OPEN_CLIP_BATCH / speed for speed in speeds) / 60
    return {"lr": f"{lr}, {precision}", "pairs": num_pairs, "minutes": minutes, **metrics}


def pixel_statistics(options: Namespace) -> dict[str, tuple[float, ...]]:
    """The mean and standard deviation of pixels that timm gives for the image encoder."""
    import timm

    settings = timm.create_model(f"local-dir:{options.image_encoder}").pretrained_cfg
    return {name: settings[name] for name in ("mean", "std")}


def tutorial(options: Namespace, lr_factor: str, folder: Path) -> dict:
    """The tutorial's recipe.

    Its learning rates are multiplied by 0.8 when the loss on the dev split has not decreased for
    two epochs. The weights with the smallest such loss are scored; it is measured after each epoch
    and at the end of the minutes.
    """
    from baselines import Tutorial, TutorialDataset

    from config import Config
    from data import Split, read_splits, tokenize
    from models import build_clip, pick_device

    pick_device("cpu")
    torch.manual_seed(0)
    config = Config(
        image_size=options.image_size,
        image_encoder=f"local-dir:{options.image_encoder}",
        text_encoder=options.text_encoder,
        dropout=0.1,  # as in the tutorial
        drop_path=0.0,
    )
    model, tokenizer = build_clip(config)
    statistics = pixel_statistics(options)

    def build_dataset(split: Split) -> TutorialDataset:
        paths = []  # of each caption's image
        for path, captions in zip(split.paths, split.captions):
            paths += [path] * len(captions)
        return TutorialDataset(
            paths, split.texts, options.text_encoder, options.image_size, statistics
        )

    splits = read_splits(options.data_dir)
    dev = build_dataset(splits["dev"])
    training = Tutorial(model, build_dataset(splits["train"]), TUTORIAL_BATCH, float(lr_factor))
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(training.optimizer, patience=1, factor=0.8)
    limit = 60 * options.minutes
    seconds = 0.0
    num_pairs = 0
    smallest_loss = float("inf")
    while seconds < limit:
        started = time.perf_counter()
        for _ in training.train_epoch():
            num_pairs += TUTORIAL_BATCH
            if seconds + time.perf_counter() - started >= limit:
                break
        seconds += time.perf_counter() - started
        loss = training.mean_loss(dev)
        plateau.step(loss)
        if loss < smallest_loss:
            smallest_loss = loss
            best = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best)
    model.eval()

    def encode_images(paths: list[Path]) -> Tensor:
        pixels = torch.stack([training.dataset.load_pixels(path) for path in paths])
        return training.encode_image(pixels)

    def encode_texts(texts: list[str]) -> Tensor:
        return training.encode_text(*tokenize(tokenizer, texts))

    metrics = score(encode_images, encode_texts, options.data_dir, options.split)
    lr = f"usual, times {lr_factor}"
    return {"lr": lr, "pairs": num_pairs, "minutes": seconds / 60, **metrics}


PROGRAMS = {"trainer.py": trainer_py, "open_clip": open_clip, "tutorial": tutorial}

if __name__ == "__main__":
    main()
