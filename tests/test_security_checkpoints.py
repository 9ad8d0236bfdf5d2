"""Damaged and hostile checkpoint files are rejected, and nothing in them is run."""

import os
import pickle
import pickletools
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, build
from torch import nn

from config import UserError
from models import CHECKPOINT_FORMAT, Checkpoint, load_checkpoint, load_clip, make_checkpoint


@pytest.fixture(scope="module")
def checkpoint_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small model; never written to."""
    path = tmp_path_factory.mktemp("checkpoint") / "best.pt"
    model, tokenizer = build(CONFIG)
    torch.save(make_checkpoint(model, tokenizer, CONFIG, "a red circle"), path)
    return path


@pytest.fixture
def checkpoint(checkpoint_path: Path) -> Checkpoint:
    """A valid checkpoint, for a test to modify."""
    return load_checkpoint(checkpoint_path)


class Hostile:
    """Unpickled without restrictions, it makes the folder `planted` in the current folder."""

    def __reduce__(self) -> tuple:
        return os.mkdir, ("planted",)


# ---------------------------------------------------------------- reading a file


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda path: None, id="missing"),
        pytest.param(lambda path: path.write_bytes(b""), id="empty"),
        pytest.param(lambda path: path.mkdir(), id="a folder"),
        pytest.param(lambda path: path.write_text("a red circle\n"), id="text"),
        pytest.param(
            lambda path: torch.save(nn.Linear(2, 2).state_dict(), path), id="another state dict"
        ),
        pytest.param(lambda path: torch.save(torch.zeros(3), path), id="a tensor"),
        pytest.param(
            lambda path: torch.save({"format": "clip weights 0"}, path), id="another format"
        ),
        pytest.param(
            lambda path: torch.save({"format": CHECKPOINT_FORMAT}, path), id="only the format"
        ),
        pytest.param(
            lambda path: torch.save({"format": CHECKPOINT_FORMAT, "model": Hostile()}, path),
            id="hostile",
        ),
        pytest.param(lambda path: path.write_bytes(pickle.dumps(Hostile())), id="hostile pickle"),
        pytest.param(
            lambda path: torch.save(Hostile(), path, _use_new_zipfile_serialization=False),
            id="hostile old format",
        ),
    ],
)
def test_load_checkpoint_rejects_other_files_and_runs_nothing(
    write: Callable, workdir: Path
) -> None:
    path = workdir / "w.pt"
    write(path)
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)
    assert not (workdir / "planted").exists()


def test_hostile_pickle_makes_a_folder_if_unpickled(workdir: Path) -> None:
    """Checked without unpickling: the pickle names a call and its argument; this makes the call."""
    operations = [
        (operation.name, argument)
        for operation, argument, _ in pickletools.genops(pickle.dumps(Hostile()))
    ]
    call, arguments = Hostile().__reduce__()
    strings = [argument for name, argument in operations if name == "SHORT_BINUNICODE"]
    assert strings == [call.__module__, call.__name__, *arguments]
    assert "REDUCE" in dict(operations)  # the operation that makes the call
    call(*arguments)
    assert (workdir / "planted").exists()


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.999])
def test_load_checkpoint_rejects_a_truncated_file(
    fraction: float, checkpoint_path: Path, tmp_path: Path
) -> None:
    content = checkpoint_path.read_bytes()
    (tmp_path / "w.pt").write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(UserError, match="not a complete checkpoint"):
        load_checkpoint(tmp_path / "w.pt")


# ---------------------------------------------------------------- building its model


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet50", "local-dir:planted", "no_such_model"])
def test_load_clip_rejects_image_encoder_that_timm_lacks(name: str, checkpoint: Checkpoint) -> None:
    """Names that timm would load from a hub or a folder are rejected too."""
    checkpoint.image_encoder["name"] = name
    with pytest.raises(UserError, match=re.escape(name)):
        load_clip(checkpoint)


@pytest.mark.parametrize("argument", ["checkpoint_path", "pretrained_cfg", "features_only"])
def test_load_clip_rejects_other_timm_arguments(
    argument: str, checkpoint: Checkpoint, checkpoint_path: Path
) -> None:
    checkpoint.image_encoder["arguments"][argument] = str(checkpoint_path)
    with pytest.raises(UserError, match=argument):
        load_clip(checkpoint)


def test_load_clip_rejects_text_encoder_that_transformers_lacks(checkpoint: Checkpoint) -> None:
    checkpoint.text_encoder["model_type"] = "wombat"
    with pytest.raises(UserError, match="wombat"):
        load_clip(checkpoint)


def set_projection_dim(checkpoint: Checkpoint) -> None:
    checkpoint.config = replace(checkpoint.config, projection_dim=65536)


@pytest.mark.parametrize(
    "modify",
    [
        pytest.param(
            lambda checkpoint: checkpoint.image_encoder["arguments"].update(num_classes=10**7),
            id="classes",
        ),
        pytest.param(
            lambda checkpoint: checkpoint.image_encoder.update(name="test_vit"), id="architecture"
        ),
        pytest.param(
            lambda checkpoint: checkpoint.text_encoder.update(vocab_size=10**10), id="vocabulary"
        ),
        pytest.param(lambda checkpoint: checkpoint.text_encoder.update(n_layers=2), id="layers"),
        pytest.param(set_projection_dim, id="projection"),
        pytest.param(lambda checkpoint: checkpoint.model.popitem(), id="a tensor too few"),
        pytest.param(
            lambda checkpoint: checkpoint.model.update({"text.more": torch.zeros(1)}),
            id="a tensor too many",
        ),
    ],
)
def test_load_clip_rejects_sizes_that_do_not_fit_the_tensors(
    modify: Callable, checkpoint: Checkpoint
) -> None:
    """Most of these sizes do not fit in memory: they are rejected before it is allocated."""
    modify(checkpoint)
    with pytest.raises(UserError, match="do not fit"):
        load_clip(checkpoint)
