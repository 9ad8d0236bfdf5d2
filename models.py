"""CLIP: two encoders with projection heads, the contrastive loss, and checkpoints.

from models import load_checkpoint, load_clip
model = load_clip(load_checkpoint("runs/demo/best.pt"))
model.encode_image(pixels)  # (B, 3, S, S) uint8 -> (B, D), unit length
"""

import base64
import ctypes
import hashlib
import itertools
import json
import math
import os
import pickletools
import platform
import sys
import textwrap
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from config import Config, UserError, printable

# "Clipped to prevent scaling the logits by more than 100" (arXiv 2103.00020, section 2.4).
MAX_LOGIT_SCALE = 100.0
EVAL_SCALE = 9 / 7  # image side in evaluation over that in training (tests/benchmarks/RESULTS.md)
DEFAULT_DROP_PATH = 0.1  # of image encoders that have stochastic depth
CHECKPOINT_FORMAT = "clip weights 1"
TEXT_ENCODERS = {"albert", "bert", "camembert", "data2vec-text", "deberta", "deberta-v2"}
TEXT_ENCODERS |= {"distilbert", "electra", "ernie", "modernbert", "mpnet", "nomic_bert", "rembert"}
TEXT_ENCODERS |= {"roberta", "roberta-prelayernorm", "roformer", "xlm-roberta"}
TokenBatches = list[tuple[Tensor, Tensor]]  # token ids and mask, both (b, T), of part of a batch


# ---------------------------------------------------------------- model


class ImageEncoder(nn.Module):
    """A timm model without its classifier: pixels (B, 3, S, S) to features (B, feature_dim).

    The `uint8` pixels are normalized here, on the device, with the mean and standard deviation that
    timm gives for the model. `drop_path` is the stochastic depth rate (arXiv 1603.09382).
    """

    def __init__(
        self, name: str, size: int, pretrained: bool = False, drop_path: float = 0.0, **args: Any
    ) -> None:
        super().__init__()
        import timm  # here, because a search over images that are in the index does not need it

        self.drop_path = drop_path
        args = {"num_classes": 0, **args, "drop_path_rate": drop_path or None}  # None: not passed
        self.model = timm.create_model(name, pretrained=pretrained, **args)
        if not drop_path:
            self._disable_drop_path()
        for statistic in ("mean", "std"):
            values = 255 * torch.tensor(self.model.pretrained_cfg[statistic])  # pixels are 0 to 255
            self.register_buffer(statistic, values.view(1, 3, 1, 1))
        self.feature_dim = self._output_dim(size)

    def _disable_drop_path(self) -> None:
        """Some timm models have stochastic depth by default."""
        from timm.layers import DropPath

        for module in self.modules():
            if isinstance(module, DropPath):
                module.drop_prob = 0.0

    @torch.no_grad()
    def _output_dim(self, size: int) -> int:
        """Width of the features. timm's `num_features` is another number for some models."""
        self.eval()  # leaves batch-norm statistics unchanged
        features = self(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        self.train()
        if features.ndim != 2:
            raise ValueError("the image encoder has no pooled features")
        return features.shape[-1]

    def forward(self, pixels: Tensor) -> Tensor:
        pixels = (pixels - self.mean) / self.std  # (B, 3, S, S)
        return self.model(pixels.contiguous(memory_format=torch.channels_last))  # (B, feature_dim)


class TextEncoder(nn.Module):
    """A transformers encoder: token ids and mask (B, T) to the mean of its last hidden states."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.feature_dim = model.config.hidden_size

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        hidden_states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        mask = mask.unsqueeze(-1).to(hidden_states.dtype)  # (B, T, 1); padding is not counted
        return (hidden_states * mask).sum(dim=1) / mask.sum(dim=1)  # (B, feature_dim)


class ProjectionHead(nn.Module):
    """Maps an encoder's features (B, feature_dim) to the shared embedding space (B, D)."""

    def __init__(self, feature_dim: int, projection_dim: int, dropout: float) -> None:
        super().__init__()
        self.projection = nn.Linear(feature_dim, projection_dim)
        self.linear = nn.Linear(projection_dim, projection_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(projection_dim)

    def forward(self, features: Tensor) -> Tensor:
        projected = self.projection(features)
        return self.norm(projected + self.dropout(self.linear(F.gelu(projected))))


class Tower(nn.Module):
    """An encoder and its projection head: encoder inputs to unit vectors (B, D) in float32."""

    def __init__(self, encoder: ImageEncoder | TextEncoder, config: Config) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = ProjectionHead(encoder.feature_dim, config.projection_dim, config.dropout)

    def forward(self, *inputs: Tensor) -> Tensor:
        return F.normalize(self.head(self.encoder(*inputs)).float(), dim=-1)


class CLIP(nn.Module):
    """The model of arXiv 2103.00020, section 2.3 and figure 3."""

    def __init__(self, image: Tower, text: Tower, temperature: float) -> None:
        super().__init__()
        self.image = image
        self.text = text
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
        """Image and text embeddings, both (B, D), and the logit scale, 1 / temperature.

        With `chunk_size` the activations of that number of images, or of one of the token batches,
        are in memory at a time. They are computed a second time in the backward pass, to the same
        effect as GradCache (arXiv 2101.06983).
        """
        encode = checkpointed_encode if chunk_size else Tower.__call__
        num_chunks = math.ceil(len(pixels) / chunk_size) if chunk_size else 1
        # Texts first: transformers waits for the device to see whether a batch has padding.
        text_embeddings = [encode(self.text, ids, mask) for ids, mask in texts]
        image_embeddings = [encode(self.image, chunk) for chunk in pixels.tensor_split(num_chunks)]
        return torch.cat(image_embeddings), torch.cat(text_embeddings), self.logit_scale.exp()

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keeps the temperature between 0.01 (section 2.4) and 100. Call it after each step."""
        limit = math.log(MAX_LOGIT_SCALE)
        self.logit_scale.clamp_(-limit, limit)


def checkpointed_encode(tower: Tower, *inputs: Tensor) -> Tensor:
    """The tower's embeddings without stored activations.

    The backward pass computes the activations again, with the same dropout.
    """

    def encode(_: Tensor, *inputs: Tensor) -> Tensor:
        is_second_pass = torch.is_grad_enabled()
        with frozen_bn_stats(tower) if is_second_pass else nullcontext():
            return tower(*inputs)

    # Reentrant, so that the first pass builds no graph, whose many small allocations among the
    # large ones would fragment the heap (tests/benchmarks/README.md). The embeddings get gradients
    # only if an input has one.
    needs_grad = torch.zeros((), requires_grad=True)
    return activation_checkpoint(encode, needs_grad, *inputs, use_reentrant=True)


@contextmanager
def frozen_bn_stats(tower: Tower) -> Iterator[None]:
    """Keeps the running statistics of batch norm: a batch must not be counted a second time."""
    norms = [m for m in tower.modules() if isinstance(m, _BatchNorm) and m.training]
    saved = [(norm, norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 0.0
        yield
    finally:
        for norm, momentum, num_batches in saved:
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(num_batches)


def eval_image_size(image: Tower, config: Config) -> int:
    """Side in pixels of the images to encode for validation and search.

    About 9/7 of that in training, because training crops enlarge what they show (arXiv 1906.06423),
    and a multiple of 32, because most encoders halve it five times.
    """
    fixed_size = "img_size" in image.encoder.model._model_args  # such as a ViT
    if fixed_size or not config.augment:
        return config.image_size
    return 32 * round(config.image_size * EVAL_SCALE / 32)


# ---------------------------------------------------------------- loss


def contrastive_loss(
    image_embeddings: Tensor,
    text_embeddings: Tensor,
    logit_scale: Tensor,
    local_slice: slice = slice(None),
    caption_ids: Tensor | None = None,
) -> Tensor:
    """The symmetric contrastive loss (section 2.3, figure 3), a scalar in nats.

    `image_embeddings` and `text_embeddings` are unit vectors (B, D) whose i-th rows belong
    together. Each image must find its text among all texts, and each text its image: the loss is
    the mean of the two cross-entropies. With `local_slice` it is the mean over the b pairs of that
    part of the batch, the part of one process, against the whole batch. Pairs with equal numbers
    in `caption_ids` (B,) have the same caption and are not each other's negatives.
    """
    pairs = torch.arange(len(image_embeddings), device=image_embeddings.device)  # (B,)
    labels = pairs[local_slice]  # (b,)
    logits_per_image = logit_scale * image_embeddings[local_slice] @ text_embeddings.T  # (b, B)
    logits_per_text = logit_scale * text_embeddings[local_slice] @ image_embeddings.T  # (b, B)
    if caption_ids is not None:
        same_caption = caption_ids[local_slice, None] == caption_ids  # (b, B)
        excluded = same_caption & (labels[:, None] != pairs)
        logits_per_image = logits_per_image.masked_fill(excluded, -math.inf)
        logits_per_text = logits_per_text.masked_fill(excluded, -math.inf)
    image_loss = F.cross_entropy(logits_per_image, labels)
    text_loss = F.cross_entropy(logits_per_text, labels)
    return (image_loss + text_loss) / 2


def chance_loss(batch_size: int) -> float:
    """The loss of embeddings that are all equal: each of the batch is as likely as the others."""
    return math.log(batch_size)


# ---------------------------------------------------------------- building


def build_clip(config: Config, captions: list[str] | None = None) -> tuple[CLIP, Tokenizer]:
    """A model with new projection heads on the encoders of `config`, and its tokenizer.

    `captions` make the vocabulary of a text encoder from scratch that is given by name, and are
    required for it. Raises `UserError` if an encoder cannot be loaded.
    """
    text, tokenizer = build_text_encoder(config, captions)
    image = build_image_encoder(config)
    return CLIP(Tower(image, config), Tower(text, config), config.temperature), tokenizer


def build_image_encoder(config: Config) -> ImageEncoder:
    """The timm model of `config`, pretrained or from scratch, for images of the configured size.

    With the default `drop_path`, an encoder without stochastic depth is built without it. Raises
    `UserError` if it cannot be loaded, has no stochastic depth where `drop_path` requires it, or
    has arguments that a checkpoint may not contain.
    """
    from timm.models import resolve_model_input_args

    name = config.image_encoder
    drop_path = DEFAULT_DROP_PATH if config.drop_path < 0 else config.drop_path
    try:
        # A model of a fixed size, such as a ViT, must be built for this size.
        size = resolve_model_input_args(name, {"img_size": config.image_size}).get("img_size")
        encoder = ImageEncoder(name, config.image_size, config.pretrained, drop_path, img_size=size)
    except Exception as error:  # a wrong name, a damaged folder, an unreachable hub
        if "drop_path_rate" in str(error) and config.drop_path < 0:
            print(f"model: {printable(name)} has no stochastic depth and is trained without it")
            return build_image_encoder(replace(config, drop_path=0.0))
        if "drop_path_rate" in str(error):
            raise UserError(
                f"--image-encoder {name}: has no stochastic depth; pass --drop-path 0"
            ) from None
        raise _unavailable("--image-encoder", name, error, config.pretrained) from None
    unknown = encoder.model._model_args.keys() - IMAGE_ENCODER_ARGS.keys()
    if unknown:
        raise UserError(f"--image-encoder {name}: is not supported, it needs {sorted(unknown)}")
    return encoder


def build_text_encoder(
    config: Config, captions: list[str] | None = None
) -> tuple[TextEncoder, Tokenizer]:
    """The transformers encoder of `config` and its tokenizer.

    Pretrained, it comes from a hub name or a folder. From scratch it needs no network: a folder
    gives its architecture and tokenizer, a name such as "distilbert" or "bert-base-uncased" the
    default architecture of that kind, with a vocabulary of words of `captions`.

    Raises `UserError` if it cannot be loaded or is not a text encoder.
    """
    if config.pretrained:
        return _pretrained_text_encoder(config)
    return _new_text_encoder(config, captions)


def _pretrained_text_encoder(config: Config) -> tuple[TextEncoder, Tokenizer]:
    from transformers import AutoModel

    if config.text_layers or config.text_width:
        raise UserError(
            "--text-layers and --text-width have no effect on a pretrained text encoder; "
            "leave them out or pass --no-pretrained"
        )
    _quiet_hub()
    _, tokenizer = _text_config_and_tokenizer(config)
    model = _from_pretrained(AutoModel, config)
    return TextEncoder(model.float()), tokenizer  # some are stored in half precision


def _new_text_encoder(config: Config, captions: list[str]) -> tuple[TextEncoder, Tokenizer]:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    name = config.text_encoder
    if Path(name).is_dir():
        model_config, tokenizer = _text_config_and_tokenizer(config)
    else:
        prefix = name.rpartition("/")[2].lower().replace("deberta-v3", "deberta-v2")  # one kind
        kinds = [k for k in CONFIG_MAPPING if prefix.startswith((k, k.replace("_", "-")))]
        if not kinds:
            raise UserError(f"--text-encoder {name}: is no architecture of transformers")
        kind = max(kinds, key=len)
        _check_text_config(name, CONFIG_MAPPING[kind]())
        tokenizer = build_wordpiece_tokenizer(captions, config.max_length)
        vocab_size = tokenizer.get_vocab_size()
        model_config = AutoConfig.for_model(kind, vocab_size=vocab_size, pad_token_id=0)
    if config.text_layers:
        model_config.num_hidden_layers = config.text_layers
        if getattr(model_config, "layer_types", None):  # ModernBERT: global or local attention
            types = itertools.cycle(model_config.layer_types)
            model_config.layer_types = list(itertools.islice(types, config.text_layers))
    if config.text_width:
        _set_width(model_config, config.text_width)
    # A folder may name half precision.
    return TextEncoder(AutoModel.from_config(model_config).float()), tokenizer


def _set_width(model_config: Any, width: int) -> None:
    """Sets the hidden size, with heads of 64 where the width allows it."""
    model_config.hidden_size = width
    model_config.num_attention_heads = math.gcd(width, max(1, width // 64))
    inner = "hidden_dim" if hasattr(model_config, "hidden_dim") else "intermediate_size"
    setattr(model_config, inner, 4 * width)


def _text_config_and_tokenizer(config: Config) -> tuple[Any, Tokenizer]:
    """The config and the tokenizer of a transformers name or folder, checked."""
    from transformers import AutoConfig, AutoTokenizer

    name = config.text_encoder
    model_config = _from_pretrained(AutoConfig, config)
    tokenizer = _from_pretrained(AutoTokenizer, config)
    _check_text_config(name, model_config)
    if not tokenizer.is_fast or tokenizer.pad_token is None:
        raise UserError(f"--text-encoder {name}: its tokenizer is not a fast one with padding")
    fast = tokenizer.backend_tokenizer
    fast.enable_padding(pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token)
    fast.enable_truncation(min(config.max_length, tokenizer.model_max_length))
    return model_config, fast


def _from_pretrained(auto_class: Any, config: Config) -> Any:
    name = config.text_encoder
    try:
        return auto_class.from_pretrained(name)
    except Exception as error:  # a wrong name, a damaged folder, an unreachable hub
        raise _unavailable("--text-encoder", name, error, config.pretrained) from None


def _check_text_config(name: str, model_config: Any) -> None:
    kind = model_config.model_type
    is_text_model = hasattr(model_config, "vocab_size") and not model_config.sub_configs
    if model_config.is_encoder_decoder or not is_text_model:
        raise UserError(f"--text-encoder {name}: a {kind} model is not a text encoder")
    if kind not in TEXT_ENCODERS:
        supported = ", ".join(sorted(TEXT_ENCODERS))
        raise UserError(f"--text-encoder {name}: a {kind} model is not supported, but {supported}")


def build_wordpiece_tokenizer(texts: list[str], max_length: int) -> Tokenizer:
    """A tokenizer of BERT's kind: the 30,000 most frequent words, and letters for all others.

    Not the library's own trainer, whose vocabulary differs from one run to the next.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for text in texts:
        words = pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(text))
        counts.update(word for word, _ in words)
    letters = sorted({letter for word in counts for letter in word})
    frequent = sorted(counts, key=lambda word: (-counts[word], word))[:30_000]

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters]
    pieces += [f"##{letter}" for letter in letters]  # letters inside a word
    pieces += frequent
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    tokenizer.enable_truncation(max_length)
    return tokenizer


def _quiet_hub() -> None:
    """Silences the Hugging Face Hub, so that only our message tells about missing weights."""
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    hub.logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    hub.enable_progress_bars()  # of downloads, which the line above disables too


def _unavailable(flag: str, name: str, error: Exception, pretrained: bool) -> UserError:
    reason = textwrap.shorten(f"{type(error).__name__}: {error}", 150)
    message = f"{flag} {name}: cannot be loaded ({reason})"
    if pretrained:
        folder = "local-dir:FOLDER" if flag == "--image-encoder" else "a folder"
        message += f". Pass {folder} that contains it, or try --demo; "
        message += "--no-pretrained needs no weights"
    return UserError(message)


# ---------------------------------------------------------------- freezing and precision


def freeze(encoder: nn.Module, fraction: float) -> None:
    """Freezes that fraction of the encoder's parameter tensors, counted from the input."""
    parameters = list(encoder.parameters())  # from the input to the output
    for parameter in parameters[: round(fraction * len(parameters))]:
        parameter.requires_grad_(False)


def keep_depthwise_float32(encoder: nn.Module) -> None:
    """Excludes trained depthwise convolutions from autocast.

    A CPU computes their gradients four times as slowly in bfloat16 (tests/benchmarks/README.md).
    """
    for module in encoder.modules():
        is_depthwise = isinstance(module, nn.Conv2d) and module.groups == module.in_channels
        if is_depthwise and module.weight.requires_grad:
            # Bound to the instance, so that copies of the model use their own weights.
            module.forward = MethodType(_forward_float32, module)


def _forward_float32(module: nn.Module, inputs: Tensor) -> Tensor:
    with torch.autocast(inputs.device.type, enabled=False):
        return type(module).forward(module, inputs.float())


# ---------------------------------------------------------------- checkpoints

TEXT_SETTINGS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}
TEXT_SETTINGS |= {"chunk_size_feed_forward": 0}  # whatever the pretrained one had


@dataclass
class Checkpoint:
    """A checkpoint file that `load_checkpoint` has read and validated."""

    config: Config
    image_encoder: dict[str, Any]  # name and arguments for timm
    text_encoder: dict[str, Any]  # config of transformers
    tokenizer: Tokenizer
    example_query: str
    model: dict[str, Tensor]  # the state dict of `CLIP`
    fingerprint: str  # hash over the checksums of the file's contents
    references: "References | None"  # only in the best.pt of a finished run
    training: "TrainingState | None"  # only in a last.pt


@dataclass
class References:
    """Unit vectors of training pairs, both (R, D) `float16`, for `inference.hub_bias`."""

    images: Tensor
    texts: Tensor


@dataclass
class TrainingState:
    """What a last.pt contains to resume its run; `trainer.restore` validates it."""

    optimizer: dict[int, dict[str, Tensor]]  # AdamW's state by the index of the parameter
    scaler: dict[str, Any]  # empty if the run's precision needs no scaler
    history: list[dict[str, float]]  # the rows of metrics.csv
    data: dict[str, Any] | None  # `trainer.data_digest` of the splits, None in older files


def make_checkpoint(
    model: CLIP,
    tokenizer: Tokenizer,
    config: Config,
    example_query: str,
    references: References | None = None,
) -> dict[str, Any]:
    """All that a search needs, as tensors and plain values.

    The only path in it is that of the data, relative to the current folder.
    """
    image_model = model.image.encoder.model
    architecture = image_model.pretrained_cfg["architecture"]
    text_config = model.text.encoder.model.config.to_dict()
    text_config.pop("_name_or_path", None)
    image_name, text_name = config.image_encoder, config.text_encoder
    portable_config = replace(
        config,
        data_dir=_portable_path(config.data_dir),
        image_encoder=architecture if ":" in image_name else image_name,
        text_encoder=text_config["model_type"] if Path(text_name).exists() else text_name,
        resume="",
        init_from="",
        allow_changed_data=False,
    )
    content = {
        "format": CHECKPOINT_FORMAT,
        "config": asdict(portable_config),
        "image_encoder": {"name": architecture, "arguments": image_model._model_args},
        "text_encoder": text_config,
        "tokenizer": tokenizer.to_str(),
        "example_query": example_query,
        "model": model.state_dict(),
    }
    if references:
        content["references"] = asdict(references)
    return content


def _portable_path(path: str) -> str:
    """The path relative to the current folder; unchanged on another drive of Windows."""
    try:
        return Path(os.path.relpath(path)).as_posix()
    except ValueError:
        return path


def load_checkpoint(path: str | Path, mmap: bool = False) -> Checkpoint:
    """Reads and validates a checkpoint file, which may come from anyone: nothing in it is run.

    With `mmap` tensors are read when they are first used. Windows does not allow to replace the
    file as long as they are in use. Raises `UserError` for a file that is damaged or not a complete
    checkpoint of this program, and `MemoryError` or `PermissionError` if it cannot be read.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint file")
    try:
        checksums, num_bytes = _verify_archive(path)
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        _validate_checkpoint(content, num_bytes)
        return _checkpoint_of(content, checksums)
    except (KeyboardInterrupt, SystemExit, MemoryError, PermissionError):
        raise  # the file is not to blame
    except BaseException as error:  # anything; the tokenizers' PanicException is no Exception
        reason = str(error).splitlines()[0][:150] if str(error) else type(error).__name__
        raise UserError(f"{path}: not a complete checkpoint of this program: {reason}") from None


def _checkpoint_of(content: dict[str, Any], checksums: list[tuple[str, int]]) -> Checkpoint:
    """The validated content of a file as a `Checkpoint`."""
    # Checkpoints older than stochastic depth lack the setting and were trained without it.
    config = Config(**{"drop_path": 0.0, **content["config"]})
    references = None
    if "references" in content:
        references = References(**content["references"])
        _validate_references(references, config.projection_dim)
    training = None
    if "optimizer" in content:
        training = TrainingState(
            optimizer=content["optimizer"]["state"],
            scaler=content["scaler"],
            history=content["history"],
            data=content.get("data"),
        )
    return Checkpoint(
        config=config,
        image_encoder=content["image_encoder"],
        text_encoder=content["text_encoder"],
        tokenizer=read_tokenizer(content["tokenizer"]),
        example_query=content["example_query"],
        model=dict(content["model"]),
        fingerprint=hashlib.sha256(repr(checksums).encode()).hexdigest(),
        references=references,
        training=training,
    )


def load_tower(checkpoint: Checkpoint, part: str) -> Tower:
    """The "image" or the "text" tower of a checkpoint, in evaluation mode."""
    prefix = f"{part}."
    state = {
        name.removeprefix(prefix): value
        for name, value in checkpoint.model.items()
        if name.startswith(prefix)
    }
    return _build_and_load(lambda: _build_tower(checkpoint, part), state, f"{part} encoder")


def load_clip(checkpoint: Checkpoint) -> CLIP:
    """The whole model of a checkpoint, in evaluation mode."""

    def build() -> CLIP:
        image, text = _build_tower(checkpoint, "image"), _build_tower(checkpoint, "text")
        return CLIP(image, text, checkpoint.config.temperature)

    return _build_and_load(build, checkpoint.model, "model")


def _build_and_load(build: Callable[[], Any], state: dict[str, Tensor], what: str) -> Any:
    """The module that `build` makes, with every tensor of `state` and in evaluation mode.

    Names and shapes are compared on the meta device first, before memory is allocated. Raises
    `UserError` if they differ or the module cannot be built.
    """
    import torch._dynamo  # some encoders do, which fails on the meta device (torch 2.6)

    try:
        with torch.device("meta"):
            built = build()
    except Exception as error:  # a hostile description can raise anything
        reason = textwrap.shorten(str(error), 150)
        raise UserError(f"the {what} of the checkpoint cannot be built: {reason}") from None
    expected = built.state_dict()
    differing = expected.keys() ^ state.keys()
    for name in expected.keys() & state.keys():
        if expected[name].shape != state[name].shape or expected[name].dtype != state[name].dtype:
            differing.add(name)
    if differing:
        raise UserError(f"the checkpoint's tensors do not fit its {what}: {min(differing)}")
    extra = sum(buffer.numel() for name, buffer in built.named_buffers() if name not in expected)
    if extra > MAX_BUFFER:
        raise UserError(f"the {what} of the checkpoint cannot be built: its buffers are too large")
    module = build()
    module.load_state_dict(state)
    return module.eval()


def _build_tower(checkpoint: Checkpoint, part: str) -> Tower:
    """An untrained tower, from registered architectures and plain numbers of the checkpoint."""
    build = _rebuild_image_encoder if part == "image" else _rebuild_text_encoder
    return Tower(build(checkpoint), checkpoint.config)


def _rebuild_image_encoder(checkpoint: Checkpoint) -> ImageEncoder:
    import timm

    name = checkpoint.image_encoder["name"]
    arguments = checkpoint.image_encoder["arguments"]
    if name not in timm.list_models() or not arguments.keys() <= IMAGE_ENCODER_ARGS.keys():
        raise UserError(f"timm has no image encoder {name!r} with {sorted(arguments)}")
    config = checkpoint.config
    return ImageEncoder(name, config.image_size, drop_path=max(0.0, config.drop_path), **arguments)


def _rebuild_text_encoder(checkpoint: Checkpoint) -> TextEncoder:
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    stored = checkpoint.text_encoder
    kind = stored["model_type"]
    if kind not in TEXT_ENCODERS:
        raise UserError(f"the text encoder {short(kind)} is not supported")
    defaults = CONFIG_MAPPING[kind]().to_dict()
    ignored = {"model_type", "architectures", "id2label", "label2id", "transformers_version"}
    settings = {}
    for name, value in stored.items():
        if name in defaults.keys() - ignored and not name.startswith("_"):
            settings[name] = TEXT_SETTINGS.get(name, value)
    if settings.get("dtype"):
        settings["dtype"] = "float32"  # of the tensors, whatever the pretrained ones were
    model_config = AutoConfig.for_model(kind, **settings)
    _check_text_config(kind, model_config)
    largest_id = max(checkpoint.tokenizer.get_vocab().values())
    too_many_layers = model_config.num_hidden_layers > len(checkpoint.model)
    if largest_id >= model_config.vocab_size or too_many_layers:
        raise UserError("its vocabulary or its layers are not those of its tokenizer and tensors")
    if checkpoint.tokenizer.truncation["max_length"] > model_config.max_position_embeddings:
        raise UserError("its tokenizer gives more tokens than its text encoder has positions")
    return TextEncoder(AutoModel.from_config(model_config, trust_remote_code=False))


# ---------------------------------------------------------------- validation of checkpoints


@dataclass(frozen=True)
class MaxLength:
    """A rule of `check_value`: a text of at most this many characters."""

    characters: int


def check_value(value: Any, rule: Any, name: str) -> None:
    """Raises `ValueError` for a value from a file, called `name`, that does not fit a rule.

    A range or two floats bound a number of that type, a set lists the values, `MaxLength` bounds a
    text, a type is that of the value, and a dict has a rule for each key that may occur. Of a list
    of rules one must fit.
    """
    if isinstance(rule, dict) and type(value) is dict:
        for key, inner in value.items():
            check_value(inner, rule.get(key, set()), f"{name}: {short(key)}")
    elif not _fits(value, rule):
        raise ValueError(f"{name} is {short(value)}, which is not allowed")


def _fits(value: Any, rule: Any) -> bool:
    if isinstance(rule, list):
        return any(_fits(value, one) for one in rule)
    if isinstance(rule, type):
        return type(value) is rule
    if isinstance(rule, set):
        return any(type(value) is type(allowed) and value == allowed for allowed in rule)
    if isinstance(rule, MaxLength):
        return type(value) is str and len(value) <= rule.characters
    if isinstance(rule, range):
        return type(value) is int and value in rule
    if isinstance(rule, tuple):
        return type(value) is float and rule[0] <= value <= rule[1]  # NaN is in no range
    return False


def short(value: Any) -> str:
    """A value for an error message; containers may be too large to print."""
    is_scalar = type(value) in (str, int, float, bool, type(None))
    return repr(value)[:60] if is_scalar else f"a {type(value).__name__}"


# What a checkpoint may contain, as rules for `check_value`.
REQUIRED = {"format", "config", "image_encoder", "text_encoder", "tokenizer", "example_query"}
REQUIRED |= {"model"}
TRAINING = {"optimizer", "schedule", "scaler", "history"}  # required in a last.pt
MAX_PICKLE = 64_000_000  # bytes, of all that is not a tensor
MAX_OPCODES = 2_000_000  # of the pickle, which take at most 500 MB of memory
MAX_REUSES = 16  # of a pickle's containers
MAX_BUFFER = 10_000_000  # elements of an encoder that are not in its state dict
DTYPES = {torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool}
CLASSES = {"collections OrderedDict", "torch._utils _rebuild_tensor_v2", "torch FloatStorage"}
CLASSES |= {f"torch {dtype}Storage" for dtype in ("Half", "BFloat16", "Long", "Int", "Bool")}
IMAGE_ENCODER_ARGS = {  # of timm.create_model
    "num_classes": range(1_000_000),
    "in_chans": {3},
    "global_pool": MaxLength(20),
    "img_size": [{None}, range(1, 2049), list, tuple],
    "drop_path_rate": [{None}, (0.0, 0.9)],
}
SCHEMA = {  # of the values that are not tensors
    "format": {CHECKPOINT_FORMAT},
    "config": {name: type(value) for name, value in asdict(Config()).items()},
    "image_encoder": {"name": MaxLength(200), "arguments": IMAGE_ENCODER_ARGS},
    "text_encoder": dict,
    "tokenizer": MaxLength(20_000_000),
    "example_query": MaxLength(10_000),
    "schedule": dict,  # part of the file format, but never read: it follows from the settings
    "scaler": dict,  # this and the next two are validated in trainer.py
    "history": list,
    "data": dict,
}

TRUNCATION = {"max_length": range(4, 513), "strategy": {"LongestFirst"}, "stride": {0}}
TRUNCATION |= {"direction": {"Left", "Right"}}
PADDING = {"strategy": {"BatchLongest"}, "pad_to_multiple_of": {None}, "pad_type_id": {0}}
PADDING |= {"direction": {"Left", "Right"}, "pad_id": range(1_000_000), "pad_token": MaxLength(100)}
TOKENIZER_PARTS = {  # components, none of which makes a text many times as long
    "normalizer": "BertNormalizer Lowercase NFC NFD NFKC NFKD Nmt Precompiled Replace Strip "
    "StripAccents",
    "pre_tokenizer": "BertPreTokenizer ByteLevel Digits Metaspace Punctuation Whitespace "
    "WhitespaceSplit",
    "post_processor": "BertProcessing ByteLevel RobertaProcessing TemplateProcessing",
    "model": "BPE Unigram WordLevel WordPiece",
}
REPLACED = ({"Regex": " {2,}"}, {"String": "``"}, {"String": "''"})  # by XLM-R and ALBERT
REPLACED += ({"Regex": r"\s{2,}|[\n\r\t]"},)  # by DeBERTa-v2


def _verify_archive(path: str | Path) -> tuple[list[tuple[str, int]], int]:
    """Verifies the checksums of torch's file format, a zip archive with a record per tensor.

    Returns names and checksums of the records, and the total size of the tensors in bytes. Raises
    an exception that names a damaged record, and for a pickle that contains more than tensors and
    plain values.
    """
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(r.compress_type or r.compress_size != r.file_size for r in records):
            raise ValueError("its records are compressed")
        if sum(r.file_size for r in records) > os.path.getsize(path):
            raise ValueError("its records are larger than the file")
        if len({r.filename.lower() for r in records}) < len(records):
            raise ValueError("it has two records of one name")
        damaged = archive.testzip()
        if damaged:
            raise ValueError(f"its record {damaged} is damaged")
        folder = records[0].filename.partition("/")[0]
        if archive.getinfo(f"{folder}/data.pkl").file_size > MAX_PICKLE:
            raise ValueError("its plain values are too large")
        _check_pickle(archive.read(f"{folder}/data.pkl"))
    num_bytes = sum(r.file_size for r in records if r.filename.startswith(f"{folder}/data/"))
    return [(r.filename, r.CRC) for r in records], num_bytes


def _check_pickle(pickle: bytes) -> None:
    """Raises `ValueError` for other classes than those of plain tensors, and for too many values.

    A container may be used again 16 times at most: with more, a small file could contain values
    that are exponentially large when they are walked.
    """
    containers, num_reuses, previous = set(), 0, ""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickle)):
        name = opcode.name
        if name == "GLOBAL" and argument not in CLASSES:
            raise ValueError(f"it contains {short(argument)}, which is not a plain value")
        if name.endswith("PUT") and previous.startswith(("TUPLE", "EMPTY", "REDUCE")):
            containers.add(argument)
        num_reuses += name.endswith("GET") and argument in containers
        if count > MAX_OPCODES or num_reuses > MAX_REUSES:
            raise ValueError("it has too many values")
        previous = name


def _validate_checkpoint(content: dict[str, Any], num_bytes: int) -> None:
    """Raises an exception unless the content has the fields, types and bounds of a checkpoint."""
    if content.get("format") != CHECKPOINT_FORMAT:
        raise ValueError("its format is another one")
    missing = REQUIRED - content.keys()
    if content.keys() & TRAINING:
        missing |= TRAINING - content.keys()
    if missing:
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    fields = dict(content)
    model, references = fields.pop("model"), fields.pop("references", {})
    states = fields.pop("optimizer", {"state": {}})["state"]
    groups = {"model": model, "references": references, **states}
    _check_tensors(groups, num_bytes)
    scale = model["logit_scale"]
    if scale.ndim or not abs(scale.item()) <= math.log(MAX_LOGIT_SCALE) + 1e-4:
        raise ValueError("its logit_scale is not a number within the clamp")
    check_value(fields, SCHEMA, "its content")
    for name, value in fields["text_encoder"].items():
        check_value(value, _text_setting_rule(str(name)), f"its text encoder's {short(name)}")


def _text_setting_rule(name: str) -> list[Any]:
    """The values that `check_value` allows for a setting of a text encoder.

    Numbers of layers and of groups are at most 100, other integers a million, and rates of dropout
    lie in [0, 1]. Texts have at most 100 characters.
    """
    if "layers" in name or "group" in name:
        return [range(101), {None}, MaxLength(100), list, dict]
    largest = 1.0 if "drop" in name else 1e6
    numbers = [range(-100, 1_000_001), (0.0, largest)]
    return [*numbers, {None, True, False}, MaxLength(100), list, dict]


def _check_tensors(groups: dict[Any, dict[str, Any]], num_bytes: int) -> None:
    """Raises `ValueError` unless all are dense, with storages of their own, `num_bytes` in all."""
    owners = set()
    for group, tensors in groups.items():
        for name, tensor in tensors.items():
            if not _is_dense(tensor) or tensor.data_ptr() in owners:
                raise ValueError(
                    f"its {short(group)} {short(name)} is not a dense tensor of its own storage"
                )
            if tensor.numel():
                owners.add(tensor.data_ptr())
                num_bytes -= tensor.untyped_storage().nbytes()
    if num_bytes:
        raise ValueError("its tensors have other sizes than its records")


def _is_dense(tensor: Any) -> bool:
    """Whether it is a tensor of numbers that fills its storage, in any order of dimensions."""
    if type(tensor) is not Tensor or tensor.dtype not in DTYPES or tensor.requires_grad:
        return False
    squeezed = tensor.squeeze()  # of dimensions of one element the stride has no meaning
    order = sorted(range(squeezed.ndim), key=squeezed.stride, reverse=True)  # as channels_last
    num_bytes = tensor.numel() * tensor.element_size()
    fills = num_bytes == tensor.untyped_storage().nbytes()
    return fills and not tensor.is_neg() and squeezed.permute(order).is_contiguous()


def _validate_references(references: References, projection_dim: int) -> None:
    if len(references.images) == 0:
        raise ValueError("it has no references")
    shape = (len(references.images), projection_dim)
    for tensor in (references.images, references.texts):
        if (
            tensor.dtype is not torch.float16
            or tensor.shape != shape
            or not tensor.isfinite().all()
        ):
            raise ValueError("its references are not unit vectors of its embedding dimension")


def read_tokenizer(text: str) -> Tokenizer:
    """A tokenizer of known components, with padding and truncation, from its JSON text.

    Raises an exception if it has other components, or does not pad and truncate.
    """
    parts = json.loads(text)
    for part, rules in (("padding", PADDING), ("truncation", TRUNCATION)):
        if not parts.get(part) or parts[part].keys() != rules.keys():
            raise ValueError(f"its tokenizer has no {part}")
        check_value(parts[part], rules, f"its {part}")
    for part, known in TOKENIZER_PARTS.items():
        _check_components(parts.get(part), known.split())
    tokenizer = Tokenizer.from_str(json.dumps(parts))
    examples = tokenizer.encode_batch(["a", "a large gr\u00fcn \u4e2d \U0001f600 " * 200])
    lengths = {len(example.ids) for example in examples}
    largest_id = max(max(example.ids) for example in examples)
    if len(lengths) > 1 or max(lengths) > parts["truncation"]["max_length"]:
        raise ValueError("its tokenizer does not pad and truncate")
    if largest_id > max(tokenizer.get_vocab().values()) or parts["model"].get("dropout"):
        raise ValueError("its tokenizer gives other ids than those of its vocabulary")
    return tokenizer


def _check_components(component: Any, known: list[str]) -> None:
    """Raises an exception for components that are unknown, repeat, or make a text long."""
    pending, kinds = [component] if component else [], []
    while pending:
        component = pending.pop()
        kind = component["type"]
        if kind == "Sequence":  # its components are its only list
            pending += next(value for value in component.values() if type(value) is list)
            continue
        is_repeated = kind in kinds and kind != "Replace"
        if kind not in known or is_repeated or len(kinds) > 10 or not _is_bounded(component):
            raise ValueError(f"its tokenizer has {short(kind)}, which is not allowed")
        kinds.append(kind)


def _is_bounded(component: dict[str, Any]) -> bool:
    """Whether a component replaces each letter by a few and adds a few tokens."""
    if component["type"] == "Replace":
        return component["pattern"] in REPLACED and len(component["content"]) <= 1
    if component["type"] == "Precompiled":  # size of a trie, the trie, and what replaces letters
        table = base64.b64decode(component["precompiled_charsmap"])
        replacements = table[4 + int.from_bytes(table[:4], "little") :]
        return max(map(len, replacements.split(b"\0"))) <= 64
    if component["type"] == "TemplateProcessing":
        added = [
            piece["SpecialToken"]["id"]
            for piece in component["single"]
            if len(piece) == 1 and "SpecialToken" in piece
        ]
        tokens = component["special_tokens"]
        has_ids = all(len(tokens[name]["ids"]) == 1 for name in added)
        return has_ids and len(added) == len(component["single"]) - 1 <= 8
    return True


# ---------------------------------------------------------------- device


def pick_device(name: str) -> torch.device:
    """The device of that name, ready for use. "auto" is CUDA, else MPS, else the CPU.

    Each of the processes that torchrun starts on a machine takes a GPU of its own. Changes settings
    of the whole process: the current device and TF32 on CUDA, `disable_malloc_trim` on the CPU.
    Raises `UserError` if the device cannot be used.
    """
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=name).item()  # a meta tensor has no value
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}; try auto or cpu") from None
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")  # TF32
    elif device.type == "cpu":
        disable_malloc_trim()
    return device


def disable_malloc_trim() -> None:
    """Makes glibc keep freed memory for the next allocation.

    Otherwise it returns freed memory to the system, and zeroing new pages takes half of the time of
    a training step on the CPU (tests/benchmarks/README.md).
    """
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: allocate from the heap, never by mmap
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap
