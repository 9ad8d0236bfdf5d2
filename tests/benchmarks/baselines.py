"""The two baselines that `benchmark.py` and `comparison.py` run.

`train_open_clip` calls open_clip's own training program. `Tutorial` reimplements the recipe of
moein-shariatnia/OpenAI-CLIP, with three changes in its favor: the mean over the tokens of a caption
instead of the first token, pixels normalized with the image encoder's own statistics instead of
ImageNet's, and learning rates that decay with the validation loss.
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

OPEN_CLIP_MODEL = "measured"  # the name under which open_clip finds the config of the encoders

# ---------------------------------------------------------------- open_clip


def write_pairs(pairs: list[tuple[Path, str]], table: Path) -> None:
    """Writes open_clip's CSV file, one row per pair of an image and a caption."""
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title"])
        for path, caption in pairs:
            writer.writerow([path.absolute(), caption])


def add_open_clip_model(image_encoder: str, text_encoder: str, image_size: int) -> None:
    """Registers the two encoders as a model of open_clip, with its linear and two-layer heads."""
    import open_clip

    vision = {
        "timm_model_name": image_encoder,
        "timm_pool": "",
        "timm_proj": "linear",
        "image_size": image_size,
    }
    text = {
        "hf_model_name": text_encoder,
        "hf_tokenizer_name": text_encoder,
        "hf_proj_type": "mlp",
        "hf_pooler_type": "mean_pooler",
    }
    config = {"embed_dim": 256, "vision_cfg": vision, "text_cfg": text}
    Path(f"{OPEN_CLIP_MODEL}.json").write_text(json.dumps(config))
    open_clip.add_model_config(f"{OPEN_CLIP_MODEL}.json")


def train_open_clip(table: Path, *arguments: str) -> list[float]:
    """One pass of open_clip's program over the pairs of `table`.

    Returns the pairs/s that it logged at each step.
    """
    from open_clip_train.main import main

    messages: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    recorder = Recorder()
    command = ["--model", OPEN_CLIP_MODEL, "--train-data", str(table), "--dataset-type", "csv"]
    command += ["--csv-img-key", "filepath", "--csv-caption-key", "title", "--csv-separator", ","]
    command += ["--epochs", "1", "--log-every-n-steps", "1", "--device", "cpu", *arguments]
    logging.getLogger().addHandler(recorder)
    try:
        main(command)
    finally:
        logging.getLogger().removeHandler(recorder)
    return [float(speed) for speed in re.findall(r" ([\d.]+)/s,", "\n".join(messages))]


# ---------------------------------------------------------------- the tutorial


class TutorialDataset(Dataset):
    """One item per caption, with its image: pixels (3, S, S), token ids (T,) and mask (T,).

    All captions are padded to the longest one of the data set.
    """

    def __init__(
        self,
        paths: list[Path],
        captions: list[str],
        tokenizer_folder: str,
        image_size: int,
        statistics: dict,
    ) -> None:
        """`paths[i]` is the image of `captions[i]`; `statistics` are arguments of A.Normalize."""
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

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        pixels = self.load_pixels(self.paths[index])
        return pixels, self.encoded["input_ids"][index], self.encoded["attention_mask"][index]

    def load_pixels(self, path: Path) -> Tensor:
        import cv2

        image = cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB)
        return torch.tensor(self.transform(image=image)["image"]).permute(2, 0, 1).contiguous()


class Tutorial:
    """The training loop of the tutorial.

    Soft targets, embeddings that are not normalized, temperature 1. AdamW with one learning rate
    for each encoder and one for the heads, each multiplied by `lr_factor`.
    """

    def __init__(
        self, model: nn.Module, dataset: Dataset, batch_size: int, lr_factor: float = 1.0
    ) -> None:
        self.model = model
        self.dataset = dataset
        self.loader = DataLoader(dataset, batch_size, shuffle=True, num_workers=4)
        heads = [*model.image.head.parameters(), *model.text.head.parameters()]
        parts = (
            (model.image.encoder.parameters(), 1e-4),
            (model.text.encoder.parameters(), 1e-5),
            (heads, 1e-3),
        )
        groups = [{"params": parameters, "lr": lr_factor * lr} for parameters, lr in parts]
        groups[-1]["weight_decay"] = 1e-3
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    def encode_image(self, pixels: Tensor) -> Tensor:
        """Normalized pixels (B, 3, S, S) to embeddings (B, D)."""
        return self.model.image.head(self.model.image.encoder.model(pixels))

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask (B, T) to embeddings (B, D)."""
        return self.model.text.head(self.model.text.encoder(ids, mask))

    def loss(self, pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        images = self.encode_image(pixels)
        texts = self.encode_text(ids, mask)
        logits = texts @ images.T  # (B, D) @ (D, B)
        targets = ((images @ images.T + texts @ texts.T) / 2).softmax(dim=-1)  # (B, B)
        text_loss = -(targets * F.log_softmax(logits, dim=-1)).sum(dim=1)
        image_loss = -(targets.T * F.log_softmax(logits.T, dim=-1)).sum(dim=1)
        return (text_loss + image_loss).mean() / 2

    def train_epoch(self) -> Iterator[float]:
        """Yields the loss of each step after the step."""
        self.model.train()
        for batch in self.loader:
            loss = self.loss(*batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield loss.item()

    @torch.inference_mode()
    def mean_loss(self, dataset: Dataset) -> float:
        """The mean loss over batches of a validation set, for the learning-rate schedule."""
        self.model.eval()
        loader = DataLoader(dataset, self.loader.batch_size, num_workers=4)
        losses = [self.loss(*batch).item() for batch in loader]
        return sum(losses) / len(losses)
