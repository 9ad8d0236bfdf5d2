"""Training: the README's commands as a user types them, what a run's folder holds, resuming, and how a run stops."""

import json
import shlex
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
import timm
import torch
from conftest import (
    FILES,
    ROOT,
    STEPS,
    TINY,
    assert_same_tensors,
    at_step,
    curve,
    names_in,
    script,
    tensors,
)
from PIL import Image
from torch import Tensor
from transformers import DistilBertConfig, DistilBertModel, PreTrainedTokenizerFast

import trainer
from config import Config, parse
from data import read_splits
from inference import evaluate
from models import build_wordpiece_tokenizer, load_checkpoint, load_clip
from trainer import RECALLS, best_epoch, main, param_groups, warmup_then_cosine

SMALL = [
    "--image-size",
    "32",
    "--batch-size",
    "8",
    "--epochs",
    "1",
    "--num-workers",
    "0",
    "--device",
    "cpu",
]
METRICS = ["t2i_r1", "t2i_r5", "t2i_r10", "t2i_medr", "i2t_r1", "i2t_r5", "i2t_r10", "i2t_medr"]
COLUMNS = ["epoch", "seconds", "pairs_per_second", "lr", "train_loss", *METRICS]


def error_message(*arguments: object) -> str:
    """The one line with which `trainer.py arguments` ends in vain."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, str)
    assert "\n" not in stop.value.code
    return stop.value.code


# ---------------------------------------------------------------- the commands of the README


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess:
    """`python trainer.py --demo` in an empty folder without a network, cut short."""
    folder = tmp_path_factory.mktemp("demo")
    flags = "--epochs 1 --image-size 32 --batch-size 64 --num-workers 0 --device cpu"
    done = script("trainer.py", "--demo", *flags.split(), cwd=folder, network=False)
    assert done.returncode == 0, done.stderr
    done.folder = folder
    return done


def test_the_demo_runs_in_an_empty_folder_and_leaves_only_its_data_and_its_run(demo):
    assert names_in(demo.folder) == ["data", "runs"]
    assert names_in(demo.folder / "data") == ["shapes"]
    assert names_in(demo.folder / "runs") == ["demo"]
    assert names_in(demo.folder / "runs" / "demo") == FILES


def test_the_demo_learns(demo):
    test = json.loads((demo.folder / "runs/demo/test.json").read_text())
    assert test["t2i_r10"] > 50  # chance: 5


def test_the_run_says_once_what_it_works_with(demo):
    for words in ("config: ", "device: cpu", "ln(64) = 4.159"):
        assert demo.stdout.count(words) == 1


def test_the_last_line_of_training_is_a_command_that_works(demo):
    python, *command = shlex.split(demo.stdout.splitlines()[-1])
    assert (python, command[0]) == ("python", "inference.py")
    done = script(*command, cwd=demo.folder, network=False)
    assert done.returncode == 0, done.stderr
    Image.open(demo.folder / "matches.png").verify()


def test_any_weights_file_can_be_asked_with_the_second_line_of_the_readme(demo):
    shutil.copy(demo.folder / "runs/demo/best.pt", demo.folder / "w.pt")
    done = script("inference.py", "--weights", "w.pt", "--n", "8", cwd=demo.folder, network=False)
    assert done.returncode == 0, done.stderr
    hits = [line for line in done.stdout.splitlines() if line.strip()[:1].isdigit()]
    assert len(hits) == 8


def test_without_a_network_or_a_cache_the_first_line_of_the_readme_says_what_to_do(workdir):
    done = script("trainer.py", cwd=workdir, network=False)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for words in ("distilbert-base-uncased", "folder", "--no-pretrained", "--demo"):
        assert words in done.stderr
    assert not (workdir / "data").exists()
    assert not (workdir / "runs").exists()


def test_training_in_bfloat16_learns_on_a_cpu_too(workdir):
    flags = "--image-size 32 --batch-size 64 --epochs 1 --num-workers 0 --device cpu --precision bfloat16"
    depthwise = "mobilenetv3_small_050"  # of which some kernels are computed in float32
    done = script(
        "trainer.py",
        "--demo",
        "--image-encoder",
        depthwise,
        *flags.split(),
        cwd=workdir,
        network=False,
    )
    assert done.returncode == 0, done.stderr
    assert "device: cpu, bfloat16" in done.stdout
    table = pd.read_csv(workdir / "runs/demo/metrics.csv")
    assert table["train_loss"][0] < 4.1  # chance: 4.159
    kinds = {tensor.dtype for tensor in tensors(workdir / "runs/demo/best.pt").values()}
    assert kinds <= {torch.float32, torch.int64}


def test_depthwise_kernels_alone_are_computed_in_float32_then(workdir, shapes):
    flags = [
        "--demo",
        *SMALL,
        "--data-dir",
        str(shapes),
        "--image-encoder",
        "mobilenetv3_small_050",
    ]
    image = trainer.setup(parse(Config, flags), None).model.image
    kinds: dict[bool, set] = {True: set(), False: set()}
    for module in image.modules():
        if isinstance(module, torch.nn.Conv2d):
            depthwise = module.groups == module.in_channels
            module.register_forward_hook(
                lambda _, inputs, output, kind=kinds[depthwise]: kind.add(output.dtype)
            )
    with torch.autocast("cpu", torch.bfloat16):
        image(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert kinds == {True: {torch.float32}, False: {torch.bfloat16}}


# ---------------------------------------------------------------- the folder of a run


def test_a_run_folder_holds_five_files(trained):
    assert names_in(trained) == FILES


def test_the_demo_trains_as_many_epochs_as_it_is_told_one_row_each(trained):
    table = pd.read_csv(trained / "metrics.csv")
    assert list(table.columns) == COLUMNS
    assert list(table["epoch"]) == [1, 2]
    assert table.notna().all(axis=None)


def test_the_test_split_is_scored_under_the_same_names(trained):
    assert list(json.loads((trained / "test.json").read_text())) == METRICS


def test_recalls_are_percentages_and_grow_with_k(trained):
    rows = [
        *pd.read_csv(trained / "metrics.csv").to_dict("records"),
        json.loads((trained / "test.json").read_text()),
    ]
    for row in rows:
        for way in ("t2i", "i2t"):
            assert 0 <= row[f"{way}_r1"] <= row[f"{way}_r5"] <= row[f"{way}_r10"] <= 100
            assert row[f"{way}_medr"] >= 1
    assert max(row["t2i_r10"] for row in rows) > 1  # not shares of one


def test_the_curves_are_a_picture(trained):
    with Image.open(trained / "curves.png") as picture:
        picture.load()
        assert picture.format == "PNG"


@pytest.mark.parametrize("split", ["dev", "test"])
def test_the_best_weights_score_what_was_written_down(trained, shapes, split):
    weights = load_checkpoint(trained / "best.pt")
    model, part, device = load_clip(weights), read_splits(shapes)[split], torch.device("cpu")
    scores = evaluate(
        model.image, model.text, weights["tokenizer"], part, weights["config"], device
    )
    if split == "test":
        written = json.loads((trained / "test.json").read_text())
    else:
        table = pd.read_csv(trained / "metrics.csv")
        written = table.loc[table[RECALLS].sum(axis=1).idxmax(), METRICS].to_dict()
    assert scores == pytest.approx(written)


def test_the_best_weights_are_those_of_the_largest_sum_of_recalls_and_not_the_last(
    workdir, shapes, monkeypatch
):
    scales = []

    def validate(model, run, split):
        scales.append(model.logit_scale.detach().clone())
        number = len(scales)
        recalls = {1: 20.0, 2: 50.0, 3: 45.0}.get(number, 0.0)  # the loss falls all the while
        return dict.fromkeys(METRICS, recalls) | {
            "t2i_medr": 10.0 - number,
            "i2t_medr": 10.0 - number,
        }

    monkeypatch.setattr(trainer, "validate", validate)
    main([*TINY, "--epochs", "3", "--data-dir", str(shapes)])
    assert torch.equal(tensors(Path("runs/demo/best.pt"))["logit_scale"], scales[1])
    assert torch.equal(tensors(Path("runs/demo/last.pt"))["logit_scale"], scales[2])


@pytest.mark.parametrize(
    ("sums", "best"),
    [
        ([10], 1),
        ([10, 20, 15], 2),
        ([20, 20, 10], 1),
        ([5, 20, 20], 2),
        ([0, 0], 1),
        ([1, 2, 3], 3),
    ],
)
def test_the_best_epoch_has_the_largest_sum_of_the_six_recalls_and_is_the_first_of_equals(
    sums, best
):
    def row(number: int, total: int) -> dict[str, float]:
        shares = dict(
            zip(
                RECALLS,
                (0.3, 0.1, 0.1, 0.0, 0.2, 0.3) if number % 2 else (0.1, 0.3, 0.2, 0.3, 0.1, 0.0),
            )
        )
        recalls = {name: round(total * share) for name, share in shares.items()}
        recalls["t2i_r1"] += total - sum(recalls.values())
        return {
            "epoch": number,
            "train_loss": 9.0 - number,
            **recalls,
            "t2i_medr": 99 - total,
            "i2t_medr": total,
        }

    assert len(RECALLS) == 6
    assert best_epoch([row(number, total) for number, total in enumerate(sums, start=1)]) == best


# ---------------------------------------------------------------- resuming

UNEVEN = [*TINY, "--epochs", "3", "--dropout", "0.3", "--drop-path", "0.3", "--augment"]
STOPPED_BY_SIGTERM = """
import os, signal, sys
sys.path.insert(0, {root!r})
import trainer
original, steps = trainer.contrastive_loss, iter(range(1, 100))
def loss(*batch):
    if next(steps) == {step}:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(*batch)
trainer.contrastive_loss = loss
trainer.main()
"""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Path:
    """The folder of a run of three epochs, with dropout, blocks that are skipped, and augmentation."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = script("trainer.py", *UNEVEN, "--data-dir", str(shapes), cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "demo"


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> subprocess.CompletedProcess:
    """The same run, with two workers, to which SIGTERM came in the midst of its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "stopped.py").write_text(STOPPED_BY_SIGTERM.format(root=str(ROOT), step=STEPS + 3))
    flags = [*UNEVEN, "--num-workers", "2", "--data-dir", str(shapes)]
    done = script(str(folder / "stopped.py"), *flags, cwd=folder)
    done.folder = folder
    return done


def test_sigterm_ends_a_run_with_one_line_that_says_how_to_go_on(stopped):
    assert stopped.returncode not in (0, -signal.SIGTERM)
    assert "Traceback" not in stopped.stderr
    assert "python trainer.py --resume runs/demo/last.pt" in stopped.stderr.splitlines()[-1]
    assert list(curve(stopped.folder / "runs" / "demo")["epoch"]) == ["1"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    unbroken, stopped, workdir, shapes, workers
):
    shutil.copytree(stopped.folder / "runs", workdir / "runs")
    flags = ["--num-workers", str(workers), "--data-dir", str(shapes)]
    done = script("trainer.py", "--resume", "runs/demo/last.pt", *flags, cwd=workdir)
    assert done.returncode == 0, done.stderr
    resumed = workdir / "runs" / "demo"
    for weights in ("last.pt", "best.pt"):
        assert_same_tensors(resumed / weights, unbroken / weights)
    pd.testing.assert_frame_equal(curve(resumed), curve(unbroken))
    assert len(curve(resumed)) == 3
    assert (resumed / "test.json").read_text() == (unbroken / "test.json").read_text()


@pytest.mark.parametrize("step", [1, STEPS + 2])
def test_resume_alone_takes_everything_from_the_file_its_run_folder_included(
    trained, workdir, shapes, monkeypatch, step
):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "contrastive_loss", at_step(step, KeyboardInterrupt()))
        assert "runs/mine/last.pt" in error_message(*TINY, "--name", "mine", "--data-dir", shapes)
    main(["--resume", "runs/mine/last.pt"])
    assert names_in(workdir / "runs") == ["mine"]
    assert names_in(workdir / "runs/mine") == FILES
    assert_same_tensors(workdir / "runs/mine/last.pt", trained / "last.pt")
    pd.testing.assert_frame_equal(curve(workdir / "runs/mine"), curve(trained))


def test_last_pt_is_there_before_the_first_step_with_everything_to_go_on(
    workdir, shapes, monkeypatch
):
    monkeypatch.setattr(trainer, "contrastive_loss", at_step(1, KeyboardInterrupt()))
    error_message(*TINY, "--data-dir", shapes)
    last = load_checkpoint("runs/demo/last.pt")
    assert {"optimizer", "schedule", "scaler", "history"} <= last.keys()
    assert last["history"] == []
    assert names_in(workdir / "runs/demo") == ["last.pt", "metrics.csv"]
    assert (workdir / "runs/demo/metrics.csv").read_text().strip() == ",".join(COLUMNS)


@pytest.mark.parametrize(
    ("flags", "asked", "saved"),
    [
        (["--epochs", "5"], "--epochs 5", "2"),
        (["--batch-size", "4"], "--batch-size 4", "8"),
        (["--seed", "3"], "--seed 3", "0"),
        (["--head-lr", "0.01"], "--head-lr 0.01", "0.001"),
        (["--image-encoder", "resnet18"], "--image-encoder resnet18", "test_resnet"),
        (["--name", "other"], "--name other", "demo"),
        (["--augment"], "--augment True", "False"),
    ],
)
def test_a_flag_that_contradicts_the_resumed_run_is_refused_with_both_values(
    trained, workdir, flags, asked, saved
):
    message = error_message("--resume", trained / "last.pt", *flags)
    assert f"{asked}:" in message
    assert f" {saved};" in message
    assert names_in(workdir) == []


def test_a_resumed_run_may_have_other_data_folder_device_and_workers(
    trained, workdir, shapes, capsys
):
    shutil.copytree(trained, workdir / "runs/demo")
    moved = shutil.copytree(shapes, workdir / "moved")
    flags = ["--data-dir", "moved", "--device", "cpu", "--num-workers", "1", "--epochs", "2"]
    main(["--resume", "runs/demo/last.pt", *flags])
    printed = capsys.readouterr().out
    assert "data_dir='moved'" in printed
    assert "num_workers=1" in printed
    assert moved.is_dir()
    assert (workdir / "runs/demo/test.json").read_text() == (trained / "test.json").read_text()


def test_a_run_begun_without_a_scaler_goes_on_with_one(stopped, workdir, shapes, monkeypatch):
    shutil.copytree(stopped.folder / "runs", workdir / "runs")
    made, original = [], torch.amp.GradScaler
    monkeypatch.setattr(
        torch.amp, "GradScaler", lambda device, enabled: made.append(original(device)) or made[0]
    )
    main(["--resume", "runs/demo/last.pt", "--data-dir", str(shapes)])
    assert len(curve(workdir / "runs/demo")) == 3
    assert load_checkpoint("runs/demo/last.pt")["scaler"] == made[0].state_dict()


def test_best_pt_is_not_to_be_resumed_from(trained, workdir):
    message = error_message("--resume", trained / "best.pt")
    assert "best.pt" in message
    assert "last.pt" in message


@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_a_file_to_resume_that_is_absent_or_none_of_ours_is_named(workdir, content):
    if content is not None:
        Path("mine.pt").write_bytes(content)
    assert "mine.pt" in error_message("--resume", "mine.pt")


def test_a_run_is_resumed_with_its_whole_folder(trained, workdir, shapes):
    shutil.copytree(trained, workdir / "runs/demo")
    Path("runs/demo/best.pt").unlink()
    assert "best.pt" in error_message("--resume", "runs/demo/last.pt", "--data-dir", shapes)


@pytest.mark.parametrize(
    "flags", [["--name", "mine"], ["--demo", "--name", "mine"], ["--name", "demo"]]
)
def test_a_run_that_can_go_on_is_never_overwritten(workdir, shapes, flags):
    last = workdir / "runs" / flags[-1] / "last.pt"
    last.parent.mkdir(parents=True)
    last.write_bytes(b"precious")
    message = error_message(*flags, "--no-pretrained", "--data-dir", shapes, *SMALL)
    assert "--resume" in message
    assert "--name" in message
    assert last.read_bytes() == b"precious"


def test_the_demo_starts_over_in_its_own_folder(workdir, shapes, monkeypatch):
    folder = workdir / "runs/demo"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(b"of an earlier demo")
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "contrastive_loss", at_step(1, KeyboardInterrupt()))
        error_message(*TINY, "--data-dir", shapes)
    assert b"of an earlier demo" not in {path.read_bytes() for path in folder.iterdir()}


# ---------------------------------------------------------------- seeds, own data, pretrained folders


def test_the_same_seed_gives_the_same_run_and_another_seed_another(trained, workdir, shapes):
    main([*TINY, "--data-dir", str(shapes)])
    pd.testing.assert_frame_equal(curve(workdir / "runs/demo"), curve(trained))
    main([*TINY, "--data-dir", str(shapes), "--seed", "1"])
    assert set(curve(workdir / "runs/demo")["train_loss"]).isdisjoint(curve(trained)["train_loss"])


def test_pictures_with_any_names_and_any_number_of_captions_can_be_trained_on(workdir, shapes):
    pictures = sorted((shapes / "Images").iterdir())[:30]
    rows = []
    for number, picture in enumerate(pictures):
        name = f"holiday 2019/Zoë, no. {number}.PNG" if number % 2 else f"{number}.a.png"
        target = workdir / "my pictures/Images" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
        rows += [(name, f'picture {number}, "seen" {time} times') for time in range(1 + number % 4)]
    pd.DataFrame(rows, columns=["image", "caption"]).to_csv("my pictures/captions.txt", index=False)
    tiny = ["--no-pretrained", "--image-encoder", "test_resnet", "--text-encoder", "distilbert"]
    main(
        [
            *tiny,
            "--text-layers",
            "1",
            "--text-width",
            "64",
            "--data-dir",
            "my pictures",
            "--name",
            "mine",
            *SMALL,
        ]
    )
    assert names_in(workdir / "runs/mine") == FILES


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> Iterator[list[str]]:
    """The flags for a pretrained pair of encoders: a timm folder and a transformers folder, both tiny."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(1)
    image = timm.create_model("test_resnet", num_classes=10)
    for module in image.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2.0)
    timm.models.save_for_hf(image, folder / "image", safe_serialization=True)
    captions = [
        caption for captions in read_splits(shapes)["train"].captions for caption in captions
    ]
    plain = build_wordpiece_tokenizer(captions, 64)
    special = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
    }
    PreTrainedTokenizerFast(tokenizer_object=plain, **special).save_pretrained(folder / "text")
    sizes = {
        "dim": 32,
        "hidden_dim": 64,
        "n_layers": 1,
        "n_heads": 2,
        "vocab_size": plain.get_vocab_size(),
    }
    DistilBertModel(DistilBertConfig(**sizes)).save_pretrained(folder / "text")
    return [
        "--image-encoder",
        f"local-dir:{folder / 'image'}",
        "--text-encoder",
        str(folder / "text"),
    ]


def compared(weights: Path, backbones: list[str], part: str) -> dict[str, bool]:
    """For each tensor of the pretrained encoder whether the weights hold it unchanged."""
    from safetensors.torch import load_file

    folder = Path(backbones[1 if part == "image" else 3].removeprefix("local-dir:"))
    now, before = tensors(weights), load_file(folder / "model.safetensors")
    prefix = f"{part}.encoder.model."
    held = {
        name.removeprefix(prefix): value for name, value in now.items() if name.startswith(prefix)
    }
    assert held
    return {name: torch.equal(value, before[name]) for name, value in held.items()}


def test_training_moves_both_pretrained_encoders_but_not_batch_norm_statistics(
    workdir, shapes, backbones
):
    whole = ["--freeze-image-encoder", "0", "--freeze-text-encoder", "0"]
    main([*backbones, *whole, "--data-dir", str(shapes), *SMALL])
    image = compared(workdir / "runs/clip/best.pt", backbones, "image")
    statistics = {name for name in image if "running_" in name or "num_batches_tracked" in name}
    assert {"running_mean", "running_var"} <= {name.rpartition(".")[2] for name in statistics}
    assert {name for name, unchanged in image.items() if unchanged} == statistics
    text = compared(workdir / "runs/clip/best.pt", backbones, "text")
    moved = [name for name, unchanged in text.items() if not unchanged]
    assert any("attention" in name for name in moved)
    assert any("word_embeddings" in name for name in moved)


@pytest.mark.parametrize("still", ["image", "text"])
def test_an_encoder_whose_rate_is_nought_stays_as_its_folder_has_it(
    workdir, shapes, backbones, still
):
    main([*backbones, f"--{still}-lr", "0", "--data-dir", str(shapes), *SMALL])
    for part in ("image", "text"):
        unchanged = compared(workdir / "runs/clip/best.pt", backbones, part).values()
        assert all(unchanged) == (part == still)


def test_batch_norm_statistics_move_when_training_from_scratch(trained):
    weights = tensors(trained / "last.pt")
    means = [value for name, value in weights.items() if name.endswith("running_mean")]
    assert means
    assert all(mean.abs().max() > 0 for mean in means)


# ---------------------------------------------------------------- rates


def test_heads_and_encoders_have_rates_of_their_own_and_only_matrices_decay(trained):
    model = load_clip(load_checkpoint(trained / "best.pt"))
    frozen = next(model.text.encoder.parameters()).requires_grad_(False)
    rates = {"image": 0.1, "text": 0.2, "head": 0.3}
    config = Config(image_lr=0.1, text_lr=0.2, head_lr=0.3, weight_decay=0.4)
    groups = param_groups(model, config)
    found = [
        (id(p), group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
    ]

    parts = {"image": model.image.encoder, "text": model.text.encoder}
    expected = [
        (id(p), rates[part], 0.4 if p.ndim > 1 else 0.0)
        for part, encoder in parts.items()
        for p in encoder.parameters()
        if p is not frozen
    ]
    heads = [*model.image.head.parameters(), *model.text.head.parameters(), model.logit_scale]
    expected += [(id(p), 0.3, 0.4 if p.ndim > 1 else 0.0) for p in heads]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize(
    ("steps", "warmup"), [(100, 0.1), (100, 0.0), (37, 0.5), (5, 1.0), (1, 0.1)]
)
def test_rates_rise_in_a_line_to_their_peak_and_fall_to_nought(steps, warmup):
    factor = warmup_then_cosine(steps, warmup)
    rising = max(1, round(steps * warmup))
    factors = [factor(step) for step in range(steps + 1)]
    assert factors[:rising] == pytest.approx([(step + 1) / rising for step in range(rising)])
    falling = factors[rising:]
    assert falling == sorted(falling, reverse=True)
    assert factors[max(rising, steps)] == pytest.approx(0 if rising < steps else 1)
    assert all(0 <= value <= 1 for value in factors)


def test_halfway_down_the_cosine_a_rate_is_half_its_peak():
    assert warmup_then_cosine(100, 0.2)(60) == pytest.approx(0.5)


# ---------------------------------------------------------------- how a run stops


@pytest.mark.parametrize(("step", "value"), [(2, "nan"), (STEPS + 3, "inf")])
def test_a_loss_that_is_no_number_stops_the_run_and_leaves_the_state_before(
    trained, workdir, shapes, monkeypatch, step, value
):
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "contrastive_loss", at_step(step, float(value)))
        assert f"step {step}:" in error_message(*TINY, "--data-dir", shapes)
    assert len(load_checkpoint("runs/demo/last.pt")["history"]) == step // STEPS
    main(["--resume", "runs/demo/last.pt"])
    assert_same_tensors(workdir / "runs/demo/last.pt", trained / "last.pt")


def test_a_training_split_smaller_than_a_batch_names_the_flag(workdir, shapes):
    message = error_message(*TINY, "--batch-size", "49", "--data-dir", shapes)
    assert "--batch-size 49" in message
    assert "48" in message
    assert names_in(workdir) == []


@pytest.mark.parametrize("flags", [["--demo"], ["--no-pretrained"], ["--demo", "--no-pretrained"]])
def test_a_data_folder_that_was_given_and_is_absent_is_an_error_and_nothing_is_created(
    workdir, flags
):
    message = error_message(*flags, "--data-dir", "data/flickr8", *SMALL)
    assert "data/flickr8" in message
    assert names_in(workdir) == []


@pytest.mark.parametrize("flag", ["--image-encoder", "--text-encoder"])
def test_pretrained_weights_that_cannot_be_fetched_stop_before_data_is_read(
    workdir, backbones, flag, capsys
):
    absent = {
        "--image-encoder": "hf-hub:nobody/no-such-model",
        "--text-encoder": "nobody/no-such-model",
    }[flag]
    message = error_message(*backbones, flag, absent, *SMALL)
    for words in (absent, "folder", "--no-pretrained", "--demo"):
        assert words in message.replace("FOLDER", "folder")
    assert "data:" not in capsys.readouterr().out
    assert names_in(workdir) == []


@pytest.fixture
def own_shapes(workdir: Path, shapes: Path) -> Path:
    """A copy of the shapes that may be spoilt."""
    return shutil.copytree(shapes, workdir / "own")


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_picture_without_a_sound_header_stops_training_before_the_first_step(
    workdir, own_shapes, split
):
    picture = read_splits(own_shapes)[split].paths[-1]
    picture.write_bytes(b"not a picture" * 20)
    assert str(picture.relative_to(workdir)) in error_message(*TINY, "--data-dir", "own")
    assert names_in(workdir) == ["own"]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_picture_stops_training_when_it_is_read(workdir, own_shapes, workers):
    picture = read_splits(own_shapes)["train"].paths[20]
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    message = error_message(*TINY, "--num-workers", workers, "--data-dir", "own")
    assert str(picture.relative_to(workdir)) in message
    assert "Traceback" not in message


# ---------------------------------------------------------------- frozen encoders


@pytest.mark.parametrize("which", ["image", "text"])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_frozen_share_of_an_encoder_stays_as_its_folder_has_it(
    workdir, shapes, backbones, which, share
):
    """Counted in tensors from the input; all the rest learns, but for batch-norm statistics."""
    shares = {"image": 0.0, "text": 0.0} | {which: share}
    flags = [
        word for part, of_it in shares.items() for word in (f"--freeze-{part}-encoder", str(of_it))
    ]
    main([*backbones, *flags, "--data-dir", str(shapes), *SMALL])
    for part, of_it in shares.items():
        unchanged = compared(workdir / "runs/clip/best.pt", backbones, part)
        encoder = getattr(
            load_clip(load_checkpoint(workdir / "runs/clip/best.pt")), part
        ).encoder.model
        in_order = [name for name, _ in encoder.named_parameters()]
        frozen = round(of_it * len(in_order))
        assert all(unchanged[name] for name in in_order[:frozen])
        assert not any(unchanged[name] for name in in_order[frozen:])
        assert all(unchanged[name] for name, _ in encoder.named_buffers() if name in unchanged)


def test_an_encoder_from_scratch_learns_whole(workdir, shapes):
    main(
        [
            *TINY,
            "--data-dir",
            str(shapes),
            "--freeze-image-encoder",
            "1",
            "--freeze-text-encoder",
            "1",
        ]
    )
    first, last = weights_before(workdir, shapes), tensors(workdir / "runs/demo/last.pt")
    still = {name for name in first if torch.equal(first[name], last[name])}
    assert not [name for name in still if ".encoder.model." in name and name.endswith("weight")]


def weights_before(workdir: Path, shapes: Path) -> dict[str, Tensor]:
    """The weights before the first step of the same run."""
    at_once = at_step(1, KeyboardInterrupt())
    with pytest.MonkeyPatch.context() as patched, pytest.raises(SystemExit):
        patched.setattr(trainer, "contrastive_loss", at_once)
        main([*TINY, "--data-dir", str(shapes), "--name", "first"])
    return tensors(workdir / "runs/first/last.pt")
