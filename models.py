"""CLIP: two encoders, a projection head on each, the contrastive loss, and the file that holds the weights.

from models import load_clip, load_checkpoint
model = load_clip(load_checkpoint("runs/demo/best.pt"))
model.encode_image(pixels)  # (B, 3, S, S) uint8 to (B, D), each of unit length
"""

import ctypes
import hashlib
import math
import os
import platform
import sys
import textwrap
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from config import Config, UserError

MAX_LOGIT_SCALE = 100.0  # section 2.4: "clipped to prevent scaling the logits by more than 100"
EVAL_SCALE = 9 / 7  # side of embedded pictures over that of training's (README, Results)
CHECKPOINT_FORMAT = "clip weights 1"
TokenBatches = list[
    tuple[Tensor, Tensor]
]  # captions some at a time: token ids and mask, both (b, T)
IMAGE_ENCODER_ARGS = {
    "num_classes",
    "in_chans",
    "global_pool",
    "img_size",
    "drop_path_rate",
}  # what weights may ask


class ImageEncoder(nn.Module):
    """A timm model without its classifier: `uint8` pixels (B, 3, S, S) to features (B, width). Mean and standard
    deviation are those of timm's config for the model; they are applied here, on the device."""

    def __init__(
        self, name: str, size: int, pretrained: bool = False, drop_path: float = 0.0, **args: Any
    ) -> None:
        super().__init__()
        import timm  # here, since a search over embedded pictures does without it

        args = {
            "num_classes": 0,
            **args,
            "drop_path_rate": drop_path or None,
        }  # timm passes None over
        self.model = timm.create_model(name, pretrained=pretrained, **args)
        if not drop_path:  # some encoders skip blocks where nothing is said
            for block in (
                module for module in self.modules() if isinstance(module, timm.layers.DropPath)
            ):
                block.drop_prob = 0.0
        for statistic in ("mean", "std"):
            values = 255 * torch.tensor(
                self.model.pretrained_cfg[statistic]
            )  # of pixels from 0 to 255
            self.register_buffer(statistic, values.view(1, 3, 1, 1))
        with torch.no_grad():  # timm's num_features is not always the width of what comes out
            self.feature_dim = self.eval()(torch.zeros(1, 3, size, size, dtype=torch.uint8)).shape[
                -1
            ]
        self.train()

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = (pixels - self.mean) / self.std  # (B, 3, S, S)
        return self.model(pixels.contiguous(memory_format=torch.channels_last))  # (B, width)


class TextEncoder(nn.Module):
    """A transformers encoder: token ids and mask (B, T) to the mean of its last hidden states (B, width)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.feature_dim = model.config.hidden_size

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state  # (B, T, width)
        mask = mask.unsqueeze(-1).to(states.dtype)  # (B, T, 1): padding counts for nothing
        return (states * mask).sum(dim=1) / mask.sum(dim=1)


class ProjectionHead(nn.Module):
    """From an encoder's features (B, width) into the shared space (B, D)."""

    def __init__(self, width: int, projection_dim: int, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Linear(width, projection_dim)
        self.linear = nn.Linear(projection_dim, projection_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(projection_dim)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.projection(features)
        return self.norm(projected + self.dropout(self.linear(F.gelu(projected))))


class Tower(nn.Module):
    """An encoder and its head: pixels, or token ids and mask, to unit vectors (B, D) in float32."""

    def __init__(self, encoder: ImageEncoder | TextEncoder, config: Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = ProjectionHead(encoder.feature_dim, config.projection_dim, config.dropout)

    def forward(self, *inputs: Tensor) -> Tensor:
        return F.normalize(self.head(self.encoder(*inputs)).float(), dim=-1)


def eval_image_size(image: Tower, config: Config) -> int:
    """Side in pixels of pictures to embed: larger, as training crops enlarge what they show (arXiv 1906.06423), and a
    multiple of 32, as most encoders halve it five times."""
    fixed = "img_size" in image.encoder.model._model_args  # made for one size, such as a ViT
    return (
        config.image_size
        if fixed or not config.augment
        else 32 * round(config.image_size * EVAL_SCALE / 32)
    )


class CLIP(nn.Module):
    """The model of arXiv 2103.00020, section 2.3 and figure 3: two towers that meet in a dot product."""

    def __init__(self, image: Tower, text: Tower, temperature: float) -> None:
        super().__init__()
        self.image, self.text = image, text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))

    def encode_image(self, pixels: Tensor) -> Tensor:
        """`uint8` pixels (B, 3, S, S) to unit vectors (B, D)."""
        return self.image(pixels)

    def encode_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids and mask (B, T) to unit vectors (B, D)."""
        return self.text(ids, mask)

    def forward(
        self, pixels: Tensor, texts: TokenBatches, chunk_size: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both embeddings (B, D) and the scale of the logits, 1 / temperature.

        With `chunk_size` the activations of at most so many pictures, or of a group of texts, are in memory at a time:
        they are computed a second time in the backward pass, which needs them (the effect of arXiv 2101.06983).
        """
        encode = checkpointed_encode if chunk_size else lambda tower, *inputs: tower(*inputs)
        # Texts first: transformers waits for the device to see whether a group has padding at all.
        text_embeddings = torch.cat([encode(self.text, *group) for group in texts])
        chunks = pixels.tensor_split(
            math.ceil(len(pixels) / (chunk_size or len(pixels)))
        )  # of even sizes
        image_embeddings = torch.cat([encode(self.image, chunk) for chunk in chunks])
        return image_embeddings, text_embeddings, self.logit_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        self.logit_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))


def checkpointed_encode(tower: Tower, *inputs: Tensor) -> Tensor:
    """The tower's embeddings, without its activations: the backward pass computes those anew, with the same dropout."""
    return checkpoint(
        tower,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), frozen_bn_stats(tower)),
    )


@contextmanager
def frozen_bn_stats(tower: Tower) -> Iterator[None]:
    """Batch norm in training mode does not count the same batch in its running statistics a second time."""
    norms = [
        module for module in tower.modules() if isinstance(module, _BatchNorm) and module.training
    ]
    before = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum, batches in before:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)


def contrastive_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    logit_scale: Tensor,
    rows: slice = slice(None),
) -> Tensor:
    """The symmetric contrastive loss (section 2.3, figure 3): each picture finds its text, each text its picture.

    Takes unit vectors (B, D), of which the i-th of each belong together, and returns the mean of the two
    cross-entropies over the batch, in nats; with `rows` over those R pairs of it alone, the share of one process.
    """
    matches = torch.arange(len(image_embeddings), device=image_embeddings.device)[rows]  # (R,)
    image_logits = logit_scale * image_embeddings[rows] @ text_embeddings.T  # (R, D) @ (D, B)
    text_logits = logit_scale * text_embeddings[rows] @ image_embeddings.T  # (R, D) @ (D, B)
    return (F.cross_entropy(image_logits, matches) + F.cross_entropy(text_logits, matches)) / 2


# ---------------------------------------------------------------- building


def build_image_encoder(config: Config) -> ImageEncoder:
    """Any timm model at the configured size, with its pretrained weights or without."""
    from timm.models import resolve_model_input_args

    name = config.image_encoder
    try:
        # A model made for one size, such as a ViT, must be told of another.
        size = resolve_model_input_args(name, {"img_size": config.image_size}).get("img_size")
        encoder = ImageEncoder(
            name, config.image_size, config.pretrained, config.drop_path, img_size=size
        )
    except (
        Exception
    ) as error:  # whatever a wrong name, a damaged folder or an unreachable hub brings about
        if "drop_path_rate" in str(error):
            raise UserError(
                f"--image-encoder {name}: cannot skip blocks; add --drop-path 0"
            ) from None
        raise _unavailable("--image-encoder", name, "local-dir:FOLDER", error) from None
    if unknown := encoder.model._model_args.keys() - IMAGE_ENCODER_ARGS:
        raise UserError(
            f"--image-encoder {name}: cannot be rebuilt from weights, it needs {unknown}"
        )
    return encoder


def load_text_encoder(config: Config) -> tuple[TextEncoder, Tokenizer]:
    """A pretrained transformers encoder, by name or folder, and its tokeniser."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer

    _quiet_hub()
    name = config.text_encoder
    model_config, tokenizer = _from_pretrained(name, AutoConfig, AutoTokenizer)
    _check_text_config(name, model_config)
    (model,) = _from_pretrained(name, AutoModel, dtype=torch.float32)
    return TextEncoder(model), _plain_tokenizer(name, tokenizer, config.max_length)


def text_encoder_from_scratch(config: Config, captions: list[str]) -> tuple[TextEncoder, Tokenizer]:
    """An untrained encoder of the named architecture; needs no network.

    With a folder, its config and tokeniser are used. With a name, such as "distilbert" or "bert-base-uncased", the
    architecture's default config, and word pieces taken from `captions`.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, AutoTokenizer

    name = config.text_encoder
    if Path(name).is_dir():
        model_config, tokenizer = _from_pretrained(name, AutoConfig, AutoTokenizer)
        _check_text_config(name, model_config)
        tokenizer = _plain_tokenizer(name, tokenizer, config.max_length)
    else:
        kinds = [
            kind for kind in CONFIG_MAPPING if name.rpartition("/")[2].lower().startswith(kind)
        ]
        if not kinds:
            raise UserError(
                f"--text-encoder {name}: begins with no architecture that transformers knows"
            )
        kind = max(kinds, key=len)
        _check_text_config(name, CONFIG_MAPPING[kind]())
        tokenizer = build_wordpiece_tokenizer(captions, config.max_length)
        model_config = AutoConfig.for_model(
            kind, vocab_size=tokenizer.get_vocab_size(), pad_token_id=0
        )
    if config.text_layers:
        model_config.num_hidden_layers = config.text_layers
    if config.text_width:
        model_config.hidden_size = config.text_width
        model_config.num_attention_heads = math.gcd(
            config.text_width, max(1, config.text_width // 64)
        )
        inner = "hidden_dim" if hasattr(model_config, "hidden_dim") else "intermediate_size"
        setattr(model_config, inner, 4 * config.text_width)
    return TextEncoder(AutoModel.from_config(model_config)), tokenizer


def build_wordpiece_tokenizer(texts: list[str], max_length: int) -> Tokenizer:
    """BERT's kind of tokeniser for `texts`: their 30,000 most frequent words, and single letters for all others. Not
    the library's trainer, which gives another vocabulary each time."""
    normalizer, splitter = (
        normalizers.BertNormalizer(lowercase=True),
        pre_tokenizers.BertPreTokenizer(),
    )
    words = Counter(
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    letters = sorted({letter for word in words for letter in word})
    frequent = sorted(words, key=lambda word: (-words[word], word))[:30_000]
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        *letters,
        *(f"##{letter}" for letter in letters),
        *frequent,
    ]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(max_length)
    return tokenizer


def _from_pretrained(name: str, *makers: Any, **options: Any) -> list[Any]:
    """What each of transformers' `makers` finds under a name or in a folder."""
    try:
        return [maker.from_pretrained(name, **options) for maker in makers]
    except Exception as error:  # as in `build_image_encoder`
        raise _unavailable("--text-encoder", name, "a folder", error) from None


def _check_text_config(name: str, config: Any) -> None:
    if config.is_encoder_decoder or config.sub_configs or not hasattr(config, "vocab_size"):
        raise UserError(f"--text-encoder {name}: a {config.model_type} model is not a text encoder")


def _plain_tokenizer(name: str, tokenizer: Any, max_length: int) -> Tokenizer:
    """The fast tokeniser inside transformers' own, padding to the longest text it is given."""
    if not tokenizer.is_fast or tokenizer.pad_token is None:
        raise UserError(
            f"--text-encoder {name}: its tokeniser is not a fast one with a padding token"
        )
    plain = tokenizer.backend_tokenizer
    plain.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    plain.enable_truncation(min(max_length, tokenizer.model_max_length))
    return plain


def _quiet_hub() -> None:
    """Leaves the one message about weights that cannot be fetched to us."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    hub.logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.enable_progress_bars()  # of downloads, which the line before puts out too


def _unavailable(flag: str, name: str, folder: str, error: Exception) -> UserError:
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 150)
    way_out = f"Point to {folder} that holds it, or try --demo; --no-pretrained needs no weights"
    return UserError(f"{flag} {name}: cannot be loaded ({reason}). {way_out}")


# ---------------------------------------------------------------- weights


def make_checkpoint(
    model: CLIP, tokenizer: Tokenizer, config: Config, example_query: str
) -> dict[str, Any]:
    """All that search needs, as tensors and plain values; of paths only that of the data, relative to where we are."""
    image_model, text_config = model.image.encoder.model, model.text.encoder.model.config.to_dict()
    text_config.pop("_name_or_path", None)
    architecture = image_model.pretrained_cfg["architecture"]
    portable = replace(
        config,
        data_dir=Path(os.path.relpath(config.data_dir)).as_posix(),
        image_encoder=architecture if ":" in config.image_encoder else config.image_encoder,
        text_encoder=text_config["model_type"]
        if Path(config.text_encoder).exists()
        else config.text_encoder,
        resume="",
    )
    return {
        "format": CHECKPOINT_FORMAT,
        "config": asdict(portable),
        "image_encoder": {"name": architecture, "arguments": image_model._model_args},
        "text_encoder": text_config,
        "tokenizer": tokenizer.to_str(),
        "example_query": example_query,
        "model": model.state_dict(),
    }


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a weights file; its "config" a `Config`, its "tokenizer" a `Tokenizer`, and its "fingerprint".

    The file may come from anywhere: nothing in it is run. Raises `UserError` for one that is not ours.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such weights file")
    try:
        with zipfile.ZipFile(
            path
        ) as archive:  # torch's format; it keeps a checksum of every tensor
            checksums = repr([(member.filename, member.CRC) for member in archive.infolist()])
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if weights.get("format") != CHECKPOINT_FORMAT:
            raise ValueError("it does not say that it is one")
        if lacking := {"image_encoder", "text_encoder", "example_query", "model"} - weights.keys():
            raise ValueError(f"it lacks {', '.join(lacking)}")
        kinds = {name: type(value) for name, value in asdict(Config()).items()}
        if wrong := [
            name for name, value in weights["config"].items() if type(value) is not kinds.get(name)
        ]:
            raise ValueError(f"its config has {', '.join(map(str, wrong))}")
        if not isinstance(weights["example_query"], str) or weights["model"]["logit_scale"].ndim:
            raise ValueError("its parts are not what they should be")
        if not all(isinstance(value, Tensor) for value in weights["model"].values()):
            raise ValueError("its model holds more than tensors")
        weights["config"] = Config(
            **{"drop_path": 0.0, **weights["config"]}
        )  # weights from before it lack it
        weights["tokenizer"] = Tokenizer.from_str(weights["tokenizer"])
        weights["fingerprint"] = hashlib.sha256(checksums.encode()).hexdigest()
    except Exception as error:  # whatever a hostile or damaged file can bring about
        reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a whole weights file of this program: {reason}") from None
    return weights


def load_tower(weights: dict[str, Any], which: str) -> Tower:
    """The "image" or the "text" tower of `weights`, in evaluation mode, rebuilt from what they hold alone."""
    state = {
        name.partition(".")[2]: value
        for name, value in weights["model"].items()
        if name.startswith(f"{which}.")
    }
    encoder = _image_encoder if which == "image" else _text_encoder
    try:
        with torch.device("meta"):  # sizes are held against the tensors before memory is taken
            empty = Tower(encoder(weights), weights["config"]).state_dict()
    except Exception as error:  # whatever a hostile description can bring about
        raise UserError(
            f"the {which} encoder that the weights describe cannot be built: {error}"
        ) from None
    if {name: value.shape for name, value in empty.items()} != {
        name: value.shape for name, value in state.items()
    }:
        raise UserError(
            f"the weights of the {which} encoder do not fit the model that their file describes"
        )
    tower = Tower(encoder(weights), weights["config"])
    tower.load_state_dict(state)
    return tower.eval()


def load_clip(weights: dict[str, Any]) -> CLIP:
    """The whole model, in evaluation mode."""
    model = CLIP(
        load_tower(weights, "image"), load_tower(weights, "text"), weights["config"].temperature
    )
    model.logit_scale.data.copy_(weights["model"]["logit_scale"])
    return model.eval()


def _image_encoder(weights: dict[str, Any]) -> ImageEncoder:
    import timm

    name, arguments = weights["image_encoder"]["name"], weights["image_encoder"]["arguments"]
    if name not in timm.list_models() or not arguments.keys() <= IMAGE_ENCODER_ARGS:
        raise UserError(
            f"weights: {name!r} with {sorted(arguments)} is not an image encoder that timm has"
        )
    return ImageEncoder(
        name, weights["config"].image_size, drop_path=weights["config"].drop_path, **arguments
    )


def _text_encoder(weights: dict[str, Any]) -> TextEncoder:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    stored = weights["text_encoder"]
    kind = stored["model_type"]
    if kind not in CONFIG_MAPPING:
        raise UserError(f"weights: {kind!r} is not a text encoder that transformers has")
    known = {key for key in CONFIG_MAPPING[kind]().to_dict() if not key.startswith("_")} - {
        "model_type"
    }
    config = AutoConfig.for_model(
        kind, **{key: value for key, value in stored.items() if key in known}
    )
    _check_text_config(kind, config)
    largest = max(weights["tokenizer"].get_vocab().values())
    if largest >= config.vocab_size or config.num_hidden_layers > len(weights["model"]):
        raise UserError(
            "weights: the text encoder has not the vocabulary or the layers that it declares"
        )
    return TextEncoder(AutoModel.from_config(config, trust_remote_code=False))


# ---------------------------------------------------------------- device


def pick_device(name: str) -> torch.device:
    """The device that is asked for, made ready; with "auto" CUDA where there is one, else MPS, else the CPU.

    Of the processes that torchrun starts on a machine, each takes a GPU of its own.
    """
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; try auto or cpu") from None
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    elif device.type == "cpu":
        disable_malloc_trim()
    return device


def disable_malloc_trim() -> None:
    """Has glibc keep what a step freed for the next: zeroing fresh pages took half the time of a step on the CPU."""
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no allocation gets pages of its own
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: freed pages are never handed back
