"""The two programs that this repository is measured against, as `benchmark.py` and `comparison.py` run them.

`train_open_clip` calls open_clip's own training program. `Tutorial` is the recipe of moein-shariatnia/OpenAI-CLIP,
written anew, with three things that help it: the mean over a caption's tokens instead of the first, pixels scaled as
the image encoder knows them instead of always by ImageNet's statistics, and rates that fall with its validation loss.
"""

import csv
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

OPEN_CLIP_MODEL = "measured"  # the name under which open_clip finds the description of our encoders


def write_pairs(pairs: list[tuple[Path, str]], table: Path) -> None:
    """open_clip's CSV, a row for each picture with one caption."""
    with table.open("w", newline="") as file:
        csv.writer(file).writerows(
            [("filepath", "title"), *((path.absolute(), caption) for path, caption in pairs)]
        )


def describe_to_open_clip(image_encoder: str, text_encoder: str, image_size: int) -> None:
    """Makes the two encoders one model of open_clip's, with its linear and two-layer heads."""
    import open_clip

    vision = {
        "timm_model_name": image_encoder,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": image_size,
    }
    text = {"hf_model_name": text_encoder, "hf_tokenizer_name": text_encoder}
    text |= {"hf_proj_type": "mlp", "hf_pooler_type": "mean_pooler"}
    description = {"embed_dim": 256, "vision_cfg": vision, "text_cfg": text}
    Path(f"{OPEN_CLIP_MODEL}.json").write_text(json.dumps(description))
    open_clip.add_model_config(f"{OPEN_CLIP_MODEL}.json")


def train_open_clip(table: Path, *arguments: str) -> list[float]:
    """One pass of open_clip's program over the pairs of `table`; returns the pairs/s that it logged at each step."""
    from open_clip_train.main import main

    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    kept = Kept()
    logging.getLogger().addHandler(kept)
    keys = [
        "--csv-img-key",
        "filepath",
        "--csv-caption-key",
        "title",
        "--csv-separator",
        ",",
        "--dataset-type",
        "csv",
    ]
    options = ["--epochs", "1", "--log-every-n-steps", "1", "--device", "cpu"]
    try:
        main(["--model", OPEN_CLIP_MODEL, "--train-data", str(table), *keys, *options, *arguments])
    finally:
        logging.getLogger().removeHandler(kept)
    return [float(speed) for speed in re.findall(r" ([\d.]+)/s,", "\n".join(lines))]


class TutorialRows(Dataset):
    """Every caption with its picture as an item of its own, all padded to the longest of the whole data set."""

    def __init__(
        self,
        paths: list[Path],
        captions: list[str],
        tokenizer_folder: str,
        image_size: int,
        statistics: dict,
    ) -> None:
        os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
        import albumentations as A
        from transformers import AutoTokenizer

        self.paths = paths
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        self.encoded = tokenizer(
            captions, padding=True, truncation=True, max_length=200, return_tensors="pt"
        )
        self.transform = A.Compose([A.Resize(image_size, image_size), A.Normalize(**statistics)])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        pixels = self.pixels(self.paths[row])
        return pixels, self.encoded["input_ids"][row], self.encoded["attention_mask"][row]

    def pixels(self, path: Path) -> Tensor:
        import cv2

        picture = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        return torch.tensor(self.transform(image=picture)["image"]).permute(2, 0, 1).contiguous()


class Tutorial:
    """Soft targets, embeddings of any length, temperature 1; AdamW with a rate for each encoder and for the heads.

    Its usual rates are multiplied by `times`.
    """

    def __init__(
        self, model: nn.Module, rows: Dataset, batch_size: int, times: float = 1.0
    ) -> None:
        self.model, self.rows = model, rows
        self.loader = DataLoader(rows, batch_size, shuffle=True, num_workers=4)
        heads = [*model.image.head.parameters(), *model.text.head.parameters()]
        parts = (
            (model.image.encoder.parameters(), 1e-4),
            (model.text.encoder.parameters(), 1e-5),
            (heads, 1e-3),
        )
        groups = [{"params": parameters, "lr": times * rate} for parameters, rate in parts]
        groups[-1]["weight_decay"] = 1e-3
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.model.image.head(self.model.image.encoder.model(pixels))  # (B, D)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.text.head(self.model.text.encoder(ids, mask))  # (B, D)

    def loss(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        images, texts = self.encode_image(pixels), self.encode_text(ids, mask)
        logits = texts @ images.T  # (B, D) @ (D, B)
        targets = ((images @ images.T + texts @ texts.T) / 2).softmax(dim=-1)
        text_loss = -(targets * F.log_softmax(logits, dim=-1)).sum(dim=1)
        image_loss = -(targets.T * F.log_softmax(logits.T, dim=-1)).sum(dim=1)
        return (text_loss + image_loss).mean() / 2

    def epoch(self) -> Iterator[float]:
        """The loss of each step, when it has been made."""
        self.model.train()
        for batch in self.loader:
            loss = self.loss(*batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield loss.item()

    @torch.inference_mode()
    def mean_loss(self, rows: Dataset) -> float:
        """Over batches of other rows, in their order and without a step, as its schedule asks for."""
        self.model.eval()
        batches = DataLoader(rows, self.loader.batch_size, num_workers=4)
        losses = [self.loss(*batch).item() for batch in batches]
        return sum(losses) / len(losses)
