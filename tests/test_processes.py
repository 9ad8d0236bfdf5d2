"""`torchrun`: several processes train as one does on the whole batch, write one run, and die together.

It starts itself too: as one of the processes that it watches.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import chain
from pathlib import Path

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from conftest import (
    CONFIG,
    FILES,
    STEPS,
    TINY,
    at_step,
    build,
    curve,
    farthest,
    names_in,
    pictures,
    script,
)
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import trainer
from config import Config, UserError, parse
from data import EpochBatchSampler
from inference import main as search
from models import contrastive_loss, load_checkpoint
from trainer import Distributed

CASES = {"gathered": [], "chunked": ["--chunk-size", "3"], "local": []}


def five_steps(*flags: str) -> dict[str, list | dict]:
    """The losses of the whole batches, the gradients before each step, and the weights before and after all five."""
    run = trainer.setup(parse(Config, list(flags)), None)
    trainer.set_train_mode(run.model, run.config)
    for module in run.model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, _BatchNorm):
            module.eval()
            nn.init.ones_(
                module.weight
            )  # timm starts some with nought, before which nothing has a gradient
    parameters, gradients = dict(run.model.named_parameters()), []
    run.optimizer.register_step_pre_hook(
        lambda *_: gradients.append({n: p.grad.clone() for n, p in parameters.items()})
    )
    before = copies(parameters)
    losses = [trainer.train_step(run, *batch) for batch, _ in zip(run.loader, range(5))]
    losses = trainer.reduce_losses(run, losses, first_step=1)
    return {"losses": losses, "gradients": gradients, "before": before, "after": copies(parameters)}


def copies(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def five_steps_of_each(cases: str, *flags: str) -> None:
    """What torchrun starts: all cases after one another, each process's into a file of its own."""
    process = Distributed.init(Config(device="cpu"))
    Distributed.init = lambda _: process
    for case in cases.split():
        if case == "local":  # without what the other processes have, the last of the cases
            Distributed.all_gather = lambda _, rows: rows
            trainer.contrastive_loss = lambda images, texts, scale, _: contrastive_loss(
                images, texts, scale
            )
        torch.save(five_steps(*flags, *CASES[case]), f"{case}-{process.rank}.pt")
    process.close()


def second_dies(step: str, *flags: str) -> None:
    """What torchrun starts: a training in which the second process is killed at a step, counted from 1."""
    rank, steps = os.environ["RANK"], iter(range(1, 1_000_000))
    Path(f"{rank}.pid").write_text(str(os.getpid()))

    def loss(*batch: object) -> Tensor:
        if next(steps) == int(step) and rank == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return contrastive_loss(*batch)

    trainer.contrastive_loss = loss
    trainer.main(list(flags))


def torchrun(processes: int, *command: str, cwd: Path) -> subprocess.CompletedProcess:
    done = script(*command, cwd=cwd, processes=processes)
    assert done.returncode == 0, done.stderr
    return done


# ---------------------------------------------------------------- the same steps

SAME = [(2, "gathered"), (2, "chunked"), (4, "gathered")]


@pytest.fixture(scope="module")
def small(shapes: Path) -> list[str]:
    """The flags of a training without dropout, and with gradients as long as they are."""
    return [*TINY, "--data-dir", str(shapes), "--dropout", "0", "--clip-norm", "1e6"]


@pytest.fixture(scope="module")
def alone(small: list[str]) -> dict[str, list | dict]:
    return five_steps(*small)


@pytest.fixture(scope="module")
def together(
    tmp_path_factory: pytest.TempPathFactory, small: list[str]
) -> dict[tuple[int, str], list[dict]]:
    """What each of two and of four processes saw, in each case."""
    seen = {}
    for count in (2, 4):
        cases, folder = (
            list(CASES) if count == 2 else ["gathered"],
            tmp_path_factory.mktemp(f"{count} processes"),
        )
        torchrun(count, __file__, "five_steps_of_each", " ".join(cases), *small, cwd=folder)
        for case in cases:
            seen[count, case] = [torch.load(folder / f"{case}-{rank}.pt") for rank in range(count)]
    return seen


@pytest.mark.parametrize(("count", "case"), SAME)
def test_each_of_five_steps_has_the_loss_and_the_gradients_of_one_process(
    alone: dict, together: dict, count: int, case: str
):
    assert len(alone["losses"]) == len(alone["gradients"]) == 5
    for process in together[count, case]:
        assert process["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for ours, theirs in zip(process["gradients"], alone["gradients"], strict=True):
            assert farthest(ours, theirs) < 1e-3
    for one, other in zip(alone["gradients"], alone["gradients"][1:]):
        assert farthest(one, other) > 0.1  # every step has gradients of its own


@pytest.mark.parametrize(("count", "case"), SAME)
def test_after_five_steps_every_process_has_the_weights_of_one(
    alone: dict, together: dict, count: int, case: str
):
    for process in together[count, case]:
        for name, value in alone["after"].items():
            if not name.endswith(
                "k_lin.bias"
            ):  # which has no gradient but rounding, of which AdamW makes a step
                moved = (value - alone["before"][name]).norm()
                assert moved > 1e-3, name
                assert (process["after"][name] - value).norm() < moved / 100, name


@pytest.mark.parametrize(("count", "case"), SAME)
def test_all_processes_have_the_very_same_weights(together: dict, count: int, case: str):
    first, *others = together[count, case]
    for other in others:
        assert all(
            torch.equal(other["after"][name], value) for name, value in first["after"].items()
        )


def test_with_the_negatives_of_its_own_process_alone_it_would_be_another_training(
    alone: dict, together: dict
):
    for process in together[2, "local"]:
        assert (
            max(
                ours / theirs
                for ours, theirs in zip(process["losses"], alone["losses"], strict=True)
            )
            < 0.8
        )
        for ours, theirs in zip(process["gradients"], alone["gradients"], strict=True):
            assert farthest(ours, theirs) > 0.1


# ---------------------------------------------------------------- whose pairs


def one_of(rank: int, count: int, device: str = "cpu") -> Distributed:
    return Distributed(torch.device(device), torch.float32, rank, count)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 12])
def test_each_picture_of_a_batch_is_taken_by_one_process_alone(count: int):
    whole = EpochBatchSampler(50, 12, seed=3, rows=slice(None))
    shares = [
        EpochBatchSampler(50, 12, seed=3, rows=one_of(rank, count).local_slice(12))
        for rank in range(count)
    ]
    for epoch in range(3):
        for batches in (whole, *shares):
            batches.set_epoch(epoch)
        taken = [list(share) for share in shares]
        assert [list(chain(*batch)) for batch in zip(*taken, strict=True)] == list(whole)
        assert {len(batch) for share in taken for batch in share} == {12 // count}
        pairs = [pair for share in taken for batch in share for pair in batch]
        assert len(pairs) == len(set(pairs)) == 48
    assert {len(share) for share in shares} == {len(whole)} == {4}


@pytest.mark.parametrize(("batch_size", "count"), [(9, 2), (8, 3), (2, 4)])
def test_a_batch_that_cannot_be_shared_evenly_names_the_flag_and_the_number_of_processes(
    batch_size: int, count: int
):
    for rank in range(count):
        with pytest.raises(
            UserError, match=rf"--batch-size {batch_size}: .*\b{count} processes"
        ) as error:
            one_of(rank, count).local_slice(batch_size)
        assert "\n" not in str(error.value)


def test_synchronised_batch_norm_keeps_the_names_and_values_of_the_weights(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(trainer, "DistributedDataParallel", lambda model, **_: model)
    model, _ = build(CONFIG)
    held = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        before = model.encode_image(pictures(CONFIG))
        assert one_of(0, 2, "cuda").wrap_ddp(model) is model
        assert torch.equal(model.encode_image(pictures(CONFIG)), before)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    assert norms
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)
    assert list(model.state_dict()) == list(held)
    assert all(torch.equal(value, held[name]) for name, value in model.state_dict().items())


# ---------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory, shapes: Path) -> subprocess.CompletedProcess:
    """`torchrun --nproc_per_node=2 trainer.py`, as the run `trained` of one process but for skipped blocks."""
    folder = tmp_path_factory.mktemp("of two")
    chance = ["--dropout", "0.3", "--drop-path", "0.3"]
    done = torchrun(2, "trainer.py", *TINY, *chance, "--data-dir", str(shapes), cwd=folder)
    done.folder = folder
    return done


def test_two_processes_leave_one_run_with_the_files_and_columns_of_any_other(of_two, trained: Path):
    assert names_in(of_two.folder) == ["runs"]
    assert names_in(of_two.folder / "runs") == ["demo"]
    run = of_two.folder / "runs/demo"
    assert names_in(run) == names_in(trained) == FILES
    table = pd.read_csv(run / "metrics.csv")
    assert list(table.columns) == list(pd.read_csv(trained / "metrics.csv").columns)
    assert list(table["epoch"]) == [1, 2]
    assert table.notna().all(axis=None)
    assert torch.isfinite(torch.tensor(table.to_numpy())).all()


def test_two_processes_say_each_line_once(of_two):
    lines = of_two.stdout.splitlines()
    assert {line: times for line, times in Counter(lines).items() if times > 1} == {}
    for words in (
        "config: ",
        "device: cpu, float32, 2 processes",
        "epoch 1 of 2",
        "epoch 2 of 2",
        "test, with the",
    ):
        assert len([line for line in lines if line.startswith(words)]) == 1, words
    assert of_two.stderr == ""


def test_the_weights_of_two_processes_are_asked_like_any_others(
    of_two, workdir: Path, capsys: pytest.CaptureFixture
):
    weights = of_two.folder / "runs/demo/best.pt"
    search(["--weights", str(weights), "--n", "3", "--num-workers", "0", "--device", "cpu"])
    assert capsys.readouterr().out.count(".png") > 3


def test_a_batch_that_two_processes_cannot_share_is_one_line_before_anything_is_read(
    workdir: Path, shapes: Path
):
    done = script(
        "trainer.py",
        *TINY,
        "--batch-size",
        "9",
        "--data-dir",
        str(shapes),
        cwd=workdir,
        processes=2,
    )
    assert done.returncode != 0
    said = {
        line for line in done.stderr.splitlines() if line.startswith("error: ")
    }  # each process says so
    assert len(said) == 1, done.stderr
    assert re.search(r"--batch-size 9: .*\b2 processes", said.pop())
    assert done.stdout == ""
    assert names_in(workdir) == []


def test_a_run_begun_by_one_process_is_finished_by_two(
    workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(trainer, "contrastive_loss", at_step(STEPS + 1, KeyboardInterrupt()))
        trainer.main([*TINY, "--data-dir", str(shapes)])
    begun = curve(Path("runs/demo"))
    assert list(begun["epoch"]) == ["1"]
    torchrun(2, "trainer.py", "--resume", "runs/demo/last.pt", cwd=workdir)
    assert_finished(Path("runs/demo"), begun)


def assert_finished(run: Path, begun: pd.DataFrame) -> None:
    assert names_in(run) == FILES
    table = curve(run)
    assert list(table["epoch"]) == ["1", "2"]
    assert table[:1].equals(begun)


# ---------------------------------------------------------------- when one dies


@pytest.fixture
def died(workdir: Path, shapes: Path) -> subprocess.CompletedProcess:
    """A training of two processes of which the second was killed in the midst of the second epoch."""
    flags = [*TINY, "--data-dir", str(shapes)]
    started = time.monotonic()
    done = script(__file__, "second_dies", str(STEPS + 3), *flags, cwd=workdir, processes=2)
    done.seconds = time.monotonic() - started
    return done


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="asks Linux for it")
def test_when_one_process_is_killed_all_end_and_one_goes_on_from_the_last_whole_epoch(died):
    assert died.returncode != 0
    assert died.seconds < 60
    for rank in range(2):
        assert not Path("/proc", Path(f"{rank}.pid").read_text()).exists()
    assert len(load_checkpoint("runs/demo/last.pt")["history"]) == 1
    begun = curve(Path("runs/demo"))
    trainer.main(["--resume", "runs/demo/last.pt"])
    assert_finished(Path("runs/demo"), begun)


# ---------------------------------------------------------------- one process


def test_a_plain_training_makes_no_group_and_trains_the_model_itself(
    workdir: Path, shapes: Path, monkeypatch: pytest.MonkeyPatch
):
    seen, original = [], trainer.train_step

    def step(run: trainer.Run, *batch: object) -> Tensor:
        seen.append(
            (dist.is_initialized(), run.ddp_model is run.model, run.dist.rank, run.dist.world_size)
        )
        return original(run, *batch)

    monkeypatch.setattr(trainer, "train_step", step)
    trainer.main([*TINY, "--epochs", "1", "--data-dir", str(shapes)])
    assert seen == [(False, True, 0, 1)] * STEPS
    assert not dist.is_initialized()


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
