"""Recalls of this repository, open_clip's program and the tutorial's recipe: same pictures, encoders, size and minutes.

pip install -r requirements.txt -r tests/benchmarks/requirements.txt
DATA="--data-dir path/to/flickr8k --image-encoder path/to/timm-folder --text-encoder path/to/transformers-folder"
python tests/benchmarks/comparison.py $DATA --minutes 15 --open-clip-lr 1e-4 3e-4 1e-3 --tutorial-times 0.3 1 3
python tests/benchmarks/comparison.py $DATA --minutes 45 --open-clip-lr 3e-4 --tutorial-times 1 --split test
python tests/benchmarks/comparison.py $DATA --weights runs/clip/best.pt --split test

Rates are chosen on the dev split, which is the default. All are scored by `recalls`, which shares nothing with
`inference.py`. Each run has a process of its own. The minutes are of training, without loading, validating and saving;
open_clip's are an estimate from a short try, and each row says what they came to.
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

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
K = (1, 5, 10)
BATCH = 64  # open_clip's default
CONTEXT = (
    48  # tokens; open_clip pads every caption to 77 by default, and Flickr8k's have 42 at most
)


def main() -> None:
    parser = measuring_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "--image-size", type=int, default=224, help="side of the pictures, in pixels"
    )
    parser.add_argument("--minutes", type=float, default=45, help="of training alone")
    parser.add_argument(
        "--split", choices=("dev", "test"), default="dev", help="what is scored, at the end alone"
    )
    parser.add_argument(
        "--open-clip-lr",
        type=float,
        nargs="*",
        default=[],
        help="train with open_clip at each rate",
    )
    parser.add_argument(
        "--tutorial-times",
        type=float,
        nargs="*",
        default=[],
        help="the tutorial's rates times each",
    )
    parser.add_argument(
        "--weights", type=absolute, nargs="*", default=[], help="score weights of trainer.py"
    )
    parser.add_argument(
        "--child", nargs=2, help="(of the program itself) one run: its program and rate"
    )
    options = parser.parse_args()
    if options.child:
        program, setting = options.child
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            result = PROGRAMS[program](options, setting, Path(folder))
        print(json.dumps(result))
        return
    print(
        f"| program | rate | pairs | minutes | {options.split} text→image R@1/5/10 | image→text |"
    )
    print("| --- | --- | --- | --- | --- | --- |", flush=True)
    runs = [("trainer.py", weights) for weights in options.weights]
    runs += [("open_clip", lr) for lr in options.open_clip_lr]
    runs += [("tutorial", times) for times in options.tutorial_times]
    for program, setting in runs:
        command = [sys.executable, *sys.argv, "--child", program, str(setting)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            sys.exit(f"{program} {setting} failed")
        row = json.loads(done.stdout.splitlines()[-1])
        ways = [" / ".join(f"{row[f'{way}_r{k}']:.1f}" for k in K) for way in ("t2i", "i2t")]
        cells = [program, row["rate"], f"{row['pairs']:,}", f"{row['minutes']:.1f}", *ways]
        print(f"| {' | '.join(cells)} |", flush=True)


# ---------------------------------------------------------------- the evaluator


def recalls(images: np.ndarray, texts: np.ndarray, image_of_text: np.ndarray) -> dict[str, float]:
    """Recall@K in percent, both ways, from embeddings (N, D) and (M, D) of any length and each text's picture (M,).

    One query at a time: everything is sorted by cosine, wrong answers before right ones of the same cosine, and the
    first right one must be among the first K (Hodosh et al., 2013; five captions a picture, of which any will do).
    """
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))

    def found(
        queries: Iterable[np.ndarray], answers: np.ndarray, right: Callable[[int], np.ndarray]
    ) -> np.ndarray:
        firsts = []
        for number, query in enumerate(queries):
            is_right = right(number)
            order = np.lexsort((is_right, -(answers @ query)))  # by cosine, then wrong ones first
            firsts.append(np.argmax(is_right[order]))
        return np.array(firsts)

    numbers = np.arange(len(images))
    ways = {
        "t2i": found(texts, images, lambda text: numbers == image_of_text[text]),
        "i2t": found(images, texts, lambda image: image_of_text == image),
    }
    return {
        f"{way}_r{k}": 100 * float(np.mean(first < k)) for way, first in ways.items() for k in K
    }


@torch.inference_mode()
def score(
    encode_images: Callable[[list[Path]], torch.Tensor],
    encode_texts: Callable[[list[str]], torch.Tensor],
    data_dir: str,
    split: str,
) -> dict[str, float]:
    """The recalls of two encoders, which are handed paths or captions a hundred at a time."""
    from data import read_splits

    part = read_splits(data_dir)[split]

    def embed(encode: Callable[[list], torch.Tensor], items: list) -> np.ndarray:
        return torch.cat([encode(items[i : i + 100]) for i in range(0, len(items), 100)]).numpy()

    image_of_text = np.repeat(
        np.arange(len(part.paths)), [len(captions) for captions in part.captions]
    )
    return recalls(embed(encode_images, part.paths), embed(encode_texts, part.texts), image_of_text)


# ---------------------------------------------------------------- the three programs


def trainer_py(options: Namespace, weights_path: str, folder: Path) -> dict:
    """Weights that `trainer.py` has trained, of its best epoch on the dev split, pictures embedded as it does; minutes
    are those of `metrics.csv`."""
    import pandas as pd

    from data import Transform, load_image, stack, tokenize
    from models import eval_image_size, load_checkpoint, load_clip

    weights = load_checkpoint(weights_path)
    config, model = weights["config"], load_clip(weights)
    transform = Transform(eval_image_size(model.image, config))
    if config.image_size != options.image_size:
        sys.exit(
            f"{weights_path}: trained at {config.image_size} px; give --image-size {config.image_size}"
        )
    metrics = score(
        lambda paths: model.encode_image(stack(transform(load_image(path)) for path in paths)),
        lambda texts: model.encode_text(*tokenize(weights["tokenizer"], texts)),
        options.data_dir,
        options.split,
    )
    table = pd.read_csv(Path(weights_path).with_name("metrics.csv"))
    rate = f"{config.image_lr:g} / {config.text_lr:g} / {config.head_lr:g}"
    pairs = round((table.seconds * table.pairs_per_second).sum())
    return {"rate": rate, "pairs": pairs, "minutes": table.seconds.sum() / 60, **metrics}


def open_clip(options: Namespace, lr: str, folder: Path) -> dict:
    """open_clip's own program with its usual batch: AdamW, warmup over a tenth, a cosine to 0, batch norm trained.

    Every caption is a pair of its own. The program makes whole passes over a table, so short tries tell the faster
    precision, and how many rows, from the first again after the last, fill the minutes.
    """
    import open_clip as library
    from baselines import OPEN_CLIP_MODEL, describe_to_open_clip, train_open_clip, write_pairs
    from PIL import Image

    from data import read_splits

    os.chdir(folder)
    split = read_splits(options.data_dir)["train"]
    pairs = [
        (path, caption)
        for path, captions in zip(split.paths, split.captions)
        for caption in captions
    ]
    random.Random(0).shuffle(pairs)
    describe_to_open_clip(
        f"local-dir:{options.image_encoder}", options.text_encoder, options.image_size
    )
    arguments = ["--batch-size", str(BATCH), "--workers", "4", "--pretrained-image"]
    arguments += ["--force-context-length", str(CONTEXT)]
    statistics = pixel_statistics(options)
    for flag, values in zip(("--image-mean", "--image-std"), statistics.values()):
        arguments += [flag, *map(str, values)]
    write_pairs(pairs[: 12 * BATCH], Path("try.csv"))
    speed, precision = max(
        (
            np.median(
                train_open_clip(Path("try.csv"), *arguments, "--precision", each, "--logs", "none")[
                    4:
                ]
            ),
            each,
        )
        for each in ("fp32", "amp_bf16")
    )
    arguments += ["--precision", precision]
    steps = max(10, round(60 * options.minutes * speed / BATCH))
    write_pairs((pairs * (1 + steps * BATCH // len(pairs)))[: steps * BATCH], Path("pairs.csv"))
    rate = ["--lr", lr, "--warmup", str(steps // 10), "--logs", "logs", "--name", "run"]
    speeds = train_open_clip(Path("pairs.csv"), *arguments, *rate)
    model, _, preprocess = library.create_model_and_transforms(
        OPEN_CLIP_MODEL,
        "logs/run/checkpoints/epoch_1.pt",
        image_mean=statistics["mean"],
        image_std=statistics["std"],
    )
    model.eval()
    tokenizer = library.get_tokenizer(OPEN_CLIP_MODEL, context_length=CONTEXT)
    metrics = score(
        lambda paths: model.encode_image(
            torch.stack([preprocess(Image.open(path)) for path in paths])
        ),
        lambda texts: model.encode_text(tokenizer(texts)),
        options.data_dir,
        options.split,
    )
    minutes = sum(BATCH / each for each in speeds) / 60
    return {"rate": f"{lr}, {precision}", "pairs": steps * BATCH, "minutes": minutes, **metrics}


def pixel_statistics(options: Namespace) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of pixels as the image encoder knows them."""
    import timm

    settings = timm.create_model(f"local-dir:{options.image_encoder}").pretrained_cfg
    return {name: settings[name] for name in ("mean", "std")}


def tutorial(options: Namespace, times: str, folder: Path) -> dict:
    """The tutorial's recipe; its rates fall by a fifth when the loss on the dev split has not fallen for two epochs.

    The weights with the smallest such loss are scored, of the ends of epochs and of the minutes.
    """
    from baselines import Tutorial, TutorialRows

    from config import Config
    from data import read_splits, tokenize
    from models import CLIP, Tower, build_image_encoder, load_text_encoder, pick_device

    pick_device("cpu")
    torch.manual_seed(0)
    splits = read_splits(options.data_dir)
    encoders = {
        "image_encoder": f"local-dir:{options.image_encoder}",
        "text_encoder": options.text_encoder,
    }
    config = Config(
        image_size=options.image_size, dropout=0.1, drop_path=0.0, **encoders
    )  # dropout as in the tutorial
    text, tokenizer = load_text_encoder(config)
    model = CLIP(Tower(build_image_encoder(config), config), Tower(text, config), 1.0)
    statistics = pixel_statistics(options)

    def rows(split: str) -> TutorialRows:
        paths = [
            path
            for path, captions in zip(splits[split].paths, splits[split].captions)
            for _ in captions
        ]
        return TutorialRows(
            paths, splits[split].texts, options.text_encoder, options.image_size, statistics
        )

    training, dev = Tutorial(model, rows("train"), batch_size=32, times=float(times)), rows("dev")
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(training.optimizer, patience=1, factor=0.8)
    seconds, pairs, smallest = 0.0, 0, float("inf")
    while seconds < 60 * options.minutes:
        started = time.perf_counter()
        for _ in training.epoch():
            pairs += 32
            if seconds + time.perf_counter() - started >= 60 * options.minutes:
                break
        seconds += time.perf_counter() - started
        loss = training.mean_loss(dev)
        plateau.step(loss)
        if loss < smallest:
            smallest, best = (
                loss,
                {name: value.clone() for name, value in model.state_dict().items()},
            )
    model.load_state_dict(best)
    model.eval()
    metrics = score(
        lambda paths: training.encode_image(
            torch.stack([training.rows.pixels(path) for path in paths])
        ),
        lambda texts: training.encode_text(*tokenize(tokenizer, texts)),
        options.data_dir,
        options.split,
    )
    return {"rate": f"usual, times {times}", "pairs": pairs, "minutes": seconds / 60, **metrics}


PROGRAMS = {"trainer.py": trainer_py, "open_clip": open_clip, "tutorial": tutorial}

if __name__ == "__main__":
    main()
