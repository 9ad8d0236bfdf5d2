"""Trains CLIP on pictures with captions.

python trainer.py --demo
python trainer.py
python trainer.py --data-dir my/folder --name mine --epochs 20
python trainer.py --resume runs/clip/last.pt
"""

import ctypes
import importlib.util
import json
import math
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from tokenizers import Tokenizer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from config import DEMO, Config, UserError, one_line_errors, parse, progress
from data import Split, open_picture, prepare_data_dir, read_splits, tokenize, training_loader
from inference import METRICS, RECALLS_AT, describe, evaluate
from models import (
    CLIP,
    Tower,
    build_image_encoder,
    contrastive_loss,
    freeze_unused_parameters,
    load_clip,
    load_text_encoder,
    pack_weights,
    pick_device,
    read_weights,
    text_encoder_from_scratch,
    write_whole,
)

MAY_CHANGE_ON_RESUME = {"data_dir", "download_url", "device", "num_workers", "resume"}
STEPS_BETWEEN_FIGURES = 10
RECALLS = [name for name in METRICS if not name.endswith("medr")]


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    config = parse(Config, argv)
    checkpoint = None
    if config.resume:
        checkpoint = read_weights(config.resume)
        config = resumed_config(argv, checkpoint, config.resume)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        train(config, checkpoint)
    except torch.OutOfMemoryError as error:
        raise UserError(f"out of memory, try a smaller --batch-size: {str(error).splitlines()[0]}") from None
    except KeyboardInterrupt:
        last = Path("runs", config.name, "last.pt")
        sys.exit(f"stopped; to go on: python trainer.py --resume {last}" if last.exists() else "stopped")


def resumed_config(argv: list[str] | None, checkpoint: dict[str, Any], path: str) -> Config:
    """The settings of the checkpoint, with what may differ on another machine taken from the command line."""
    if "optimizer" not in checkpoint:
        raise UserError(f"--resume {path}: holds no training state; resume from a run's last.pt")
    saved = asdict(checkpoint["config"]) | {"resume": path, "download_url": Config.download_url}  # not from a stranger
    config = parse(Config, argv, saved)
    for name, value in asdict(config).items():
        if value != saved[name] and name not in MAY_CHANGE_ON_RESUME:
            raise UserError(f"--{name.replace('_', '-')} {value}: the run to resume has {saved[name]}; leave it out")
    return config


@dataclass
class Run:
    """A training run: all that `last.pt` keeps, and what it works on."""

    config: Config
    folder: Path
    device: torch.device
    model: CLIP
    tokenizer: Tokenizer
    splits: dict[str, Split]
    loader: DataLoader
    optimizer: torch.optim.Optimizer
    schedule: LambdaLR
    scaler: torch.amp.GradScaler
    history: list[dict[str, float]]  # the rows of metrics.csv
    events: Any = None  # TensorBoard's writer, where that is installed


def train(config: Config, checkpoint: dict[str, Any] | None) -> None:
    """Trains from the start, or on from a checkpoint, and scores the best weights on the test split."""
    run = prepare(config, checkpoint)
    announce(run)
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{run.folder}: cannot be made into the run's folder: {error.strerror}") from None
    run.events = open_events(run)
    for half_written in run.folder.glob("*.tmp"):  # by a run that was killed
        half_written.unlink()
    if checkpoint:
        report(run)  # it may have been killed before
    else:
        save_last(run)
        for leftover in ("best.pt", "test.json", "curves.png"):  # of an earlier demo
            (run.folder / leftover).unlink(missing_ok=True)
    for epoch in range(len(run.history), config.epochs):
        started = time.perf_counter()
        loss = train_epoch(run, epoch)
        seconds = time.perf_counter() - started
        metrics = validate(run.model, run, "dev")
        speed, lr = len(run.loader) * config.batch_size / seconds, run.optimizer.param_groups[-1]["lr"]
        row = {"epoch": epoch + 1, "seconds": seconds, "pairs_per_second": speed, "lr": lr, "train_loss": loss}
        run.history.append(row | metrics)
        print(f"epoch {epoch + 1} of {config.epochs}: loss {loss:.3f}, {seconds:.0f} s; dev {describe(metrics)}")
        log_events(run, epoch + 1, {f"dev/{name}": value for name, value in metrics.items()})
        if best_epoch(run.history) == epoch + 1:
            write_whole(run.folder / "best.pt", lambda file: torch.save(weights_of(run), file))
        save_last(run)
    finish(run)


def train_epoch(run: Run, epoch: int) -> float:
    """One pass over the training pictures; returns the mean loss of its steps, and raises if one is not finite."""
    training_mode(run.model, run.config)
    torch.manual_seed(run.config.seed * 100_003 + epoch)  # so that a resumed run draws the same dropout
    run.loader.batch_sampler.epoch = epoch
    parameters = [parameter for group in run.optimizer.param_groups for parameter in group["params"]]
    losses: list[float] = []
    unread, rates = [], []  # reading a loss waits for the device, so it is done now and then
    with progress(run.loader, f"epoch {epoch + 1}", unit="step") as bar:
        for pixels, ids, mask in bar:
            pixels, ids, mask = (tensor.to(run.device, non_blocking=True) for tensor in (pixels, ids, mask))
            with autocast(run.device):
                embeddings_and_scale = run.model(pixels, ids, mask)
            loss = contrastive_loss(*embeddings_and_scale)
            run.scaler.scale(loss).backward()
            run.scaler.unscale_(run.optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, run.config.clip_norm)
            run.scaler.step(run.optimizer)
            run.scaler.update()
            run.optimizer.zero_grad()
            unread.append(loss.detach())
            rates.append(run.schedule.get_last_lr()[-1])
            run.schedule.step()
            run.model.clamp_temperature()
            if len(unread) == STEPS_BETWEEN_FIGURES or len(losses) + len(unread) == len(run.loader):
                first_step = epoch * len(run.loader) + len(losses) + 1
                losses += read_losses(unread, first_step)
                for step, (value, lr) in enumerate(zip(losses[-len(unread) :], rates), start=first_step):
                    log_events(run, step, {"train/loss": value, "train/lr": lr})
                speed = len(losses) * run.config.batch_size / max(bar.format_dict["elapsed"], 1e-3)
                bar.set_postfix_str(f"loss {losses[-1]:.3f}, lr {rates[-1]:.1e}, {speed:.0f} pairs/s", refresh=False)
                unread, rates = [], []
    return sum(losses) / len(losses)


def training_mode(model: CLIP, config: Config) -> None:
    """Pretrained batch-norm statistics stay: those of a batch cost 14 of 34 points of recall (README)."""
    model.train()
    model.image.encoder.train(not config.freeze_image_encoder)
    model.text.encoder.train(not config.freeze_text_encoder)
    for module in model.image.modules():
        if config.pretrained and isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.eval()


def read_losses(losses: list[Tensor], first_step: int) -> list[float]:
    values = torch.stack(losses).tolist()
    for step, value in enumerate(values, start=first_step):
        if not math.isfinite(value):
            raise UserError(f"step {step}: the loss is {value}. Try lower rates (--image-lr, --text-lr, --head-lr)")
    return values


# ---------------------------------------------------------------- preparing


def prepare(config: Config, checkpoint: dict[str, Any] | None) -> Run:
    """Everything of a run, ready for its next epoch."""
    folder = Path("runs") / config.name
    if (folder / "last.pt").exists() and not checkpoint and not (config.demo and config.name == DEMO["name"]):
        last = folder / "last.pt"
        raise UserError(f"{last} exists: go on with --resume {last}, or choose another --name")
    keep_freed_memory()
    device = pick_device(config.device)
    torch.manual_seed(config.seed)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32
    model, tokenizer, splits = prepare_model_and_data(config, checkpoint)
    model.to(device, memory_format=torch.channels_last)
    loader = training_loader(splits["train"], tokenizer, config, device)
    optimizer = torch.optim.AdamW(parameter_groups(model, config), fused=True)
    schedule = LambdaLR(optimizer, warmup_then_cosine(config.epochs * len(loader), config.warmup))
    scaler = torch.amp.GradScaler(device.type, enabled=lower_precision(device) is torch.float16)
    run = Run(config, folder, device, model, tokenizer, splits, loader, optimizer, schedule, scaler, [])
    if checkpoint:
        for part in ("optimizer", "schedule", "scaler"):
            getattr(run, part).load_state_dict(checkpoint[part])
        run.history += checkpoint["history"]
        if run.history and not (folder / "best.pt").exists():
            raise UserError(f"{folder / 'best.pt'}: missing; a run is resumed with its whole folder")
    return run


def prepare_model_and_data(
    config: Config, checkpoint: dict[str, Any] | None
) -> tuple[CLIP, Tokenizer, dict[str, Split]]:
    """Pretrained weights come first: where they cannot be had, that is said before any data is fetched."""
    if config.data_dir not in (Config.data_dir, DEMO["data_dir"]) and not Path(config.data_dir).exists():
        raise UserError(f"--data-dir {config.data_dir}: no such folder")
    encoders = None
    if config.pretrained and not checkpoint:
        print(f"model: loading the pretrained {config.text_encoder} and {config.image_encoder}")
        encoders = *load_text_encoder(config), build_image_encoder(config)
    splits = prepare_data(config)
    if checkpoint:
        model, tokenizer = load_clip(checkpoint), checkpoint["tokenizer"]
    else:
        encoders = encoders or (*text_encoder_from_scratch(config, splits["train"].texts), build_image_encoder(config))
        text, tokenizer, image = encoders
        model = CLIP(Tower(image, config), Tower(text, config), config.temperature)
    model.image.encoder.requires_grad_(not config.freeze_image_encoder)
    model.text.encoder.requires_grad_(not config.freeze_text_encoder)
    pixels = torch.zeros(2, 3, config.image_size, config.image_size, dtype=torch.uint8)
    freeze_unused_parameters(model.image, pixels)
    freeze_unused_parameters(model.text, *tokenize(tokenizer, ["one", "another"]))
    return model, tokenizer, splits


def prepare_data(config: Config) -> dict[str, Split]:
    """The splits, after a look into the header of every picture, so that a broken one shows before the first step."""
    prepare_data_dir(config)
    splits = read_splits(config.data_dir)
    if (pictures := len(splits["train"].paths)) < config.batch_size:
        raise UserError(f"--batch-size {config.batch_size}: the training split holds only {pictures} pictures")
    for path in progress([path for split in splits.values() for path in split.paths], "checking pictures", leave=False):
        with open_picture(path):
            pass
    return splits


def parameter_groups(model: CLIP, config: Config) -> list[dict[str, Any]]:
    """New heads learn fast and pretrained encoders slowly; only matrices decay, not gains, biases or temperature."""
    rates = {"image": config.image_lr, "text": config.text_lr, "head": config.head_lr}  # the last one is shown
    groups: dict[tuple[str, bool], list[Tensor]] = {(part, matrix): [] for part in rates for matrix in (True, False)}
    for name, parameter in model.named_parameters():
        part = "head" if ".head." in name or name == "logit_scale" else name.partition(".")[0]
        if parameter.requires_grad:
            groups[part, parameter.ndim > 1].append(parameter)
    return [
        {"params": parameters, "lr": rates[part], "weight_decay": config.weight_decay if matrix else 0.0}
        for (part, matrix), parameters in groups.items()
        if parameters
    ]


def warmup_then_cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """The factor on every rate at a step: a line up to 1 over the first `warmup` of the steps, then a cosine to 0."""
    rising = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2

    return factor


def lower_precision(device: torch.device) -> torch.dtype | None:
    """bf16 on CUDA that has it in hardware, else fp16; None elsewhere: full precision."""
    if device.type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def autocast(device: torch.device) -> AbstractContextManager:
    dtype = lower_precision(device)
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def keep_freed_memory() -> None:
    """Has glibc keep what a step freed for the next: zeroing fresh pages took half the time of a step on the CPU."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets pages of its own
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: freed pages are not handed back


# ---------------------------------------------------------------- validating and saving


def validate(model: CLIP, run: Run, split: str) -> dict[str, float]:
    """The recalls of a split; of the run's model after an epoch, of its best weights at the end."""
    model.eval()
    return evaluate(model.image, model.text, run.tokenizer, run.splits[split], run.config, run.device)


def best_epoch(history: list[dict[str, float]]) -> int:
    """The epoch with the largest sum of the six recalls on the dev split; the first of equals."""
    return max(history, key=lambda row: sum(row[name] for name in RECALLS))["epoch"]


def weights_of(run: Run) -> dict[str, Any]:
    return pack_weights(run.model, run.tokenizer, run.config, example_query=run.splits["test"].captions[0][0])


def save_last(run: Run) -> None:
    """`last.pt`, with everything needed to go on, and the report that is made of it."""
    state = {part: getattr(run, part).state_dict() for part in ("optimizer", "schedule", "scaler")}
    content = {**weights_of(run), **state, "history": run.history}
    write_whole(run.folder / "last.pt", lambda file: torch.save(content, file))
    report(run)


def report(run: Run) -> None:
    """`metrics.csv` with a row an epoch, and `curves.png`."""
    columns = ["epoch", "seconds", "pairs_per_second", "lr", "train_loss", *METRICS]
    table = pd.DataFrame(run.history, columns=columns)
    write_whole(run.folder / "metrics.csv", lambda file: table.to_csv(file, index=False))
    if len(table):
        figure = draw_curves(table, math.log(run.config.batch_size), best_epoch(run.history))
        write_whole(run.folder / "curves.png", lambda file: figure.savefig(file, format="png"))


def open_events(run: Run) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(run.folder / "events", purge_step=len(run.history) * len(run.loader) + 1)


def log_events(run: Run, step: int, values: dict[str, float]) -> None:
    if run.events:
        for name, value in values.items():
            run.events.add_scalar(name, value, step)
        run.events.flush()


def draw_curves(table: pd.DataFrame, chance: float, best: int) -> Figure:
    """The training loss with its chance level, and the recalls on the dev split both ways."""
    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    loss, *ways = figure.subplots(1, 3)
    loss.plot(table["epoch"], table["train_loss"], marker=".", label="training")
    loss.axhline(chance, color="gray", linestyle=":", label="chance, ln(batch)")
    loss.set(title="contrastive loss", ylabel="nats", ylim=(0, None))
    for axes, way, title in zip(ways, ("t2i", "i2t"), ("text to image", "image to text")):
        for k in RECALLS_AT:
            axes.plot(table["epoch"], table[f"{way}_r{k}"], marker=".", label=f"R@{k}")
        axes.set(title=f"{title}, dev split", ylabel="recall, %", ylim=(0, 102))
    for axes in (loss, *ways):
        axes.axvline(best, color="black", linewidth=0.8, linestyle="--", label=f"best epoch, {best}")
        axes.set_xlabel("epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def announce(run: Run) -> None:
    """The settings, the device and the sizes, once."""
    config, model = run.config, run.model
    print("config:", ", ".join(f"{name}={value!r}" for name, value in asdict(config).items()))
    millions = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.image, model.text)]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    print(f"model: {millions[0]:.1f} M image + {millions[1]:.1f} M text parameters, {trained:.1f} M of them trained")
    precision = str(lower_precision(run.device) or torch.float32).removeprefix("torch.")
    print(f"device: {run.device}, {precision}; {len(run.loader)} steps an epoch of {config.batch_size} pairs")
    print(f"loss at chance: ln({config.batch_size}) = {math.log(config.batch_size):.3f}")


def finish(run: Run) -> None:
    """Scores the best weights on the test split, once, and says what to do next."""
    best = read_weights(run.folder / "best.pt")
    metrics = validate(load_clip(best).to(run.device), run, "test")
    write_whole(run.folder / "test.json", lambda file: file.write(json.dumps(metrics, indent=2).encode()))
    print(f"test, with the weights of epoch {best_epoch(run.history)}: {describe(metrics)}")
    print(f"saved in {run.folder}: best.pt, last.pt, metrics.csv, curves.png, test.json")
    print(f"python inference.py --weights {run.folder / 'best.pt'} --n 8 --query {shlex.quote(best['example_query'])}")


if __name__ == "__main__":
    main()
