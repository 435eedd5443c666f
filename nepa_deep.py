"""Next-embedding prediction on images, with a loss at the last layer or at every layer.

An image is cut into patches, each patch becomes an embedding, and a causal ViT predicts each embedding from the patches
before it. No pixels are reconstructed, nothing is masked, and there is no second network ("Next-Embedding Prediction
Makes Strong Vision Learners", NEPA, arXiv 2512.16922). By default only the last layer has a loss;
--use_intermediate_loss adds one at every earlier layer. Whether that converges faster, and to better features, is
measured by a linear probe and kNN on the frozen features.

  python nepa_deep.py                                                                   # laptop, a minute
  python nepa_deep.py --use_intermediate_loss
  python nepa_deep.py --data_dir DIR                                                    # your images.npy
  torchrun --nproc_per_node 8 nepa_deep.py --data_dir DIR --use_intermediate_loss       # many GPUs

Without --data_dir it trains on a synthetic dataset of textures. The first command's last lines, seed 0:

  Step 400/400, Val Loss: -0.6468 | Final: -0.6468 | Intermediate: -0.4841 | kNN: 0.7135 | Probe: 0.5835
  frozen features                      kNN   probe
  this model                        0.7135  0.5835
  before training                   0.4635  0.2590
  raw pixels                        0.2380  0.2140
"""

import argparse
import contextlib
import copy
import dataclasses
import datetime
import functools
import itertools
import json
import math
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

try:
    from data import DataError, expecting, fingerprint, fixed_batches, size_of, subset, training_batches
except ImportError as error:
    sys.exit(f"error: {error}; expected data.py beside this script and no other `data` before it on the path")

# ---- model ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """Defines the model; the defaults are the published Base model. Raises DataError for sizes that do not fit."""

    image_size: int | tuple = 224  # the side, or height and width; always the latter once made
    patch_size: int = 14
    num_channels: int = 3
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    mlp_hidden: int = 0  # width of the MLP; 0: 4 * hidden_size
    gated_mlp: bool = False  # SwiGLU instead of GELU
    qk_norm: bool = True  # LayerNorm on each head's queries and keys
    qk_norm_affine: bool = False
    layerscale_value: float = 1e-5
    rope_theta: float = 100.0
    rope_rescale: float = 2.0  # largest random factor of the coordinates in training; the smallest is 1 over it
    norm_eps: float = 1e-12

    def __post_init__(self):
        self.mlp_hidden = self.mlp_hidden or 4 * self.hidden_size
        if self.hidden_size % (4 * self.num_heads):  # RoPE rotates pairs, half of them by the row, half by the column
            raise DataError(
                f"hidden_size {self.hidden_size}, expected a multiple of 4 * num_heads = {4 * self.num_heads}"
            )
        with expecting("a side, or height and width", f"image_size {self.image_size}"):
            self.image_size = tuple(np.broadcast_to(self.image_size, 2).tolist())
        if any(side < 1 or side % self.patch_size for side in self.image_size):
            raise DataError(
                f"image_size {self.image_size}, expected multiples of patch_size {self.patch_size}, above 0"
            )


class Output(NamedTuple):
    """Result of a forward pass; T = 1 + number of patches, the CLS token first."""

    embedding: torch.Tensor  # [B, T, D] input of the first layer; its patches are the targets
    hidden_states: list  # [B, T, D] each, the residual stream after layers 1 .. L, without the final norm
    prediction: torch.Tensor  # [B, T, D] the last hidden state, normed: position t predicts embedding t + 1


def rotary(rows, columns, d, theta, scale, device):
    """RoPE cosines and sines [T, 1, d/2], float32, for CLS (not rotated) and rows x columns patches.

    Patch centres are in [-1, 1], times scale; the first d/4 angles come from y, the others from x.
    """
    y, x = (scale * ((2 * torch.arange(n, device=device) + 1) / n - 1) for n in (rows, columns))
    frequencies = 2 * math.pi * theta ** (-4 * torch.arange(d // 4, device=device) / d)
    angles = torch.cartesian_prod(y, x)[:, :, None] * frequencies  # [N, 2, d/4]
    angles = F.pad(angles.flatten(1), (0, 0, 1, 0))[:, None]  # [T, 1, d/2]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Half-split rotation of x [B, T, heads, d], computed in and returned as float32."""
    x1, x2 = x.float().chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)


class Block(nn.Module):
    """Pre-norm transformer block: h += scale1 * Attention(LN(h)); h += scale2 * MLP(LN(h)); strictly causal."""

    def __init__(self, c):
        super().__init__()
        D = c.hidden_size
        self.config = c
        self.norm1, self.norm2 = nn.LayerNorm(D, c.norm_eps), nn.LayerNorm(D, c.norm_eps)
        self.qkv = nn.Linear(D, 3 * D)
        self.q_norm, self.k_norm = (
            nn.LayerNorm(D // c.num_heads, c.norm_eps, c.qk_norm_affine) if c.qk_norm else nn.Identity()
            for _ in range(2)
        )
        self.o = nn.Linear(D, D)
        self.up = nn.Linear(D, c.mlp_hidden * (2 if c.gated_mlp else 1))  # gate and up in one
        self.down = nn.Linear(c.mlp_hidden, D)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((D,), c.layerscale_value)) for _ in range(2))

    def forward(self, h, cos, sin):
        B, T, D = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(B, T, 3, self.config.num_heads, -1).unbind(2)  # [B, T, heads, d] each
        q, k = rotate(self.q_norm(q), cos, sin).to(v), rotate(self.k_norm(k), cos, sin).to(v)  # in the dtype of v
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # [B, heads, T, d]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.scale1 * self.o(attended.transpose(1, 2).reshape(B, T, D))
        up = self.up(self.norm2(h))  # [B, T, mlp_hidden], twice as wide when gated
        if self.config.gated_mlp:
            gate, up = up.chunk(2, -1)
            up = F.silu(gate) * up
        else:
            up = F.gelu(up)
        return h + self.scale2 * self.down(up)


class Model(nn.Module):
    """The causal ViT. forward: images [B, C, H, W] float -> Output."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.grad_checkpoint = False
        self.patch = nn.Conv2d(c.num_channels, c.hidden_size, c.patch_size, stride=c.patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, c.hidden_size))
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        self.norm = nn.LayerNorm(c.hidden_size, c.norm_eps)
        nn.init.normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def embed(self, images):
        """[B, C, H, W] float -> [B, T, D]: CLS, then the patches row by row."""
        patches = self.patch(images).flatten(2).transpose(1, 2)  # [B, N, D]
        # A patch of zeros (padding, a grey wall) has the bias as its embedding, which is zero at init. A LayerNorm at
        # zero has slope eps^-1/2 = 1e6, and gradients reach 4e7. So below an rms of 1e-3, mix in the CLS token.
        blank = 1 - patches.detach().float().square().mean(-1, keepdim=True).sqrt() / 1e-3
        patches = patches + blank.clamp(min=0) * self.cls_token
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)

    def forward(self, images, rope_scale=1.0):
        """images: [B, C, H, W] float, H and W multiples of patch_size. rope_scale: factor of the coordinates, a float
        or a 0-dimensional tensor on the images' device; random in training, one for each update. Returns an Output.
        Raises ValueError for other H and W.
        """
        c = self.config
        (rows, below), (columns, beside) = (divmod(side, c.patch_size) for side in images.shape[2:])
        if below or beside:  # the convolution would leave it out
            raise ValueError(f"images {[*images.shape]}, expected H and W to be multiples of {c.patch_size}")
        cos, sin = rotary(rows, columns, c.hidden_size // c.num_heads, c.rope_theta, rope_scale, images.device)
        embedding = h = self.embed(images)
        hidden_states = []
        for block in self.layers:
            # Keep only the residual stream and recompute the block in backward; not the last, which it needs first.
            if self.grad_checkpoint and block is not self.layers[-1]:
                h = checkpoint(block, h, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, cos, sin)
            hidden_states.append(h)
        return Output(embedding, hidden_states, self.norm(h))


# ---- published weights ----------------------------------------------------------------------------------------------

PUBLISHED = {  # patterns of published names -> ours, applied in this order
    r"^(vit_nepa\.)?(embeddings\.)?": "",
    r"^patch_embeddings\.projection": "patch",
    r"^layernorm\.": "norm.",
    r"^encoder\.layer\.": "layers.",
    r"attention\.attention\.(query|key|value)\.": "qkv.",  # concatenated in this order
    r"attention\.attention\.": "",  # q_norm, k_norm
    r"attention\.output\.dense": "o",
    r"intermediate\.(gate|up)_proj": "up",  # concatenated in this order
    r"output\.dense": "down",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"output\.layer_scale\.lambda1": "scale2",
    r"layer_scale\.lambda1": "scale1",
}


def to_our_names(weights, model=None):
    """Rename weights (dict of tensors or arrays) from published NEPA names, with or without `vit_nepa.`, to ours.

    Drops the weights of a classifier and says so. Our own names and unknown ones stay, for load_state_dict to check.
    """
    found, heads = {}, [name for name in weights if re.match(r"(vit_nepa\.)?(classifier|pooler)\.", name)]
    if heads:
        say(f"left out: {', '.join(heads)}")
    # Alphabetical order puts gate before up and key before value; query has to come before both.
    for name in sorted(weights.keys() - heads, key=lambda name: name.replace("query", "")):
        ours = name
        for pattern, replacement in PUBLISHED.items():
            ours = re.sub(pattern, replacement, ours)
        found.setdefault(ours, []).append(torch.as_tensor(weights[name]))
    return {name: torch.cat(parts) for name, parts in found.items()}


def read_folder(folder):
    """What a published folder (config.json, model.safetensors) says of Config, a dict."""
    return read_config(json.loads((folder / "config.json").read_text("utf-8")))


def read_config(config):
    """Our names and values for those of a published configuration, a dict. Raises ValueError for what we do not have.

    Settings of the training that have no counterpart here (dropout, drop path, position jitter) are ignored.
    """
    activation = "silu" if config.get("use_gated_mlp") else "gelu"
    for name, expected in {"is_causal": True, "qkv_bias": True, "hidden_act": activation}.items():
        if config.get(name, expected) != expected:
            raise ValueError(f"{name} {config[name]!r}, expected {expected!r}")
    ours = {
        "num_hidden_layers": "num_layers",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_hidden",
        "use_gated_mlp": "gated_mlp",
        "layer_norm_eps": "norm_eps",
        "pos_embed_rescale": "rope_rescale",
    }
    config = {ours.get(name, name): value for name, value in config.items()}
    config["rope_rescale"] = config.get("rope_rescale") or 1.0  # off by default, unlike ours
    return {name: config[name] for name in Config.__dataclass_fields__ if name in config}


def from_official(config, weights):
    """A Model with the weights of the published NEPA code: see read_config and to_our_names.

    Raises ValueError for an unsupported model, RuntimeError for weights that do not fit.
    """
    model = Model(Config(**read_config(config)))
    model.load_state_dict(to_our_names(weights))
    return model


# ---- the loss: the part people copy ---------------------------------------------------------------------------------


def prediction_loss(target, prediction):
    """NEPA's loss: minus the mean cosine between the prediction at t and the embedding at t + 1 (arXiv 2512.16922).

    target, prediction: [B, T, D] of any float dtype; no gradient reaches the target. CLS, at t = 0, predicts the first
    patch. Returns a float32 scalar in [-1, 1].
    """
    target, prediction = target.detach()[:, 1:].float(), prediction[:, :-1].float()
    return -F.cosine_similarity(target, prediction, dim=-1, eps=1e-4).mean()  # eps: zero has no direction


def intermediate_loss(embedding, hidden_states, prediction, weight=1.0):
    """The loss at every layer: loss_final + weight * mean of the loss over layers 1 .. L-1.

    embedding, prediction: [B, T, D]; hidden_states: list over layers 1 .. L of [B, T, D], from the raw residual stream.
    The last one is not used: prediction is the same state, normed.
    Returns loss, loss_final (with gradient) and the list of the L-1 layers' losses (detached): float32 scalars.
    """
    # Normalized only once: backward would keep a copy of the target for each layer (4 % more memory; now 0.04 %).
    target = F.normalize(embedding.detach()[:, 1:].float(), dim=-1, eps=1e-4)

    def loss(state):
        state = state[:, :-1].float()
        return -((state * target).sum(-1) / state.norm(dim=-1).clamp(min=1e-4)).mean()

    loss_final, losses = loss(prediction), [loss(state) for state in hidden_states[:-1]]
    total = loss_final + weight * sum(losses) / len(losses) if losses else loss_final
    return total, loss_final, [value.detach() for value in losses]


def losses(output, args, every_layer):
    """The loss of an Output and its parts as metrics, detached.

    every_layer: compute the losses of layers 1 .. L-1 too; only --use_intermediate_loss adds them to the loss.
    """
    states = output.hidden_states if every_layer else []
    weight = args.intermediate_loss_weight * args.use_intermediate_loss
    loss, final, layers = intermediate_loss(output.embedding, states, output.prediction, weight)
    metrics = {"loss": loss.detach(), "loss_final": final.detach()}
    if layers:
        metrics["loss_intermediate"] = sum(layers) / len(layers)
    return loss, metrics | {f"loss_layer_{i}": value for i, value in enumerate(layers, start=1)}


# ---- data: a synthetic dataset of textures, or arrays of images -----------------------------------------------------


def textures(rng, labels):
    """float32 [N, 32, 32]: noise of one orientation and period, scaled to standard deviation 1.2, then tanh.

    labels: int [N] from 0 to 9; label % 5 is the orientation (0, 45, 90, 135 degrees, or none), label // 5 the period:
    fine, 5 to 6.5 pixels, or coarse, 1.8 times that.
    """
    labels = labels[:, None, None]
    frequency = np.float32(1 / (rng.uniform(5, 6.5, labels.shape) * np.where(labels < 5, 1, 1.8)))
    angle = np.float32(np.pi / 4 * (labels % 5) + rng.uniform(-0.12, 0.12, labels.shape))
    # The inverse FFT is periodic: make twice the side and crop, so that opposite borders do not match.
    y, x = np.float32(np.fft.fftfreq(64))[:, None], np.float32(np.fft.rfftfreq(64))
    along, across = abs(y * np.sin(angle) + x * np.cos(angle)), y * np.cos(angle) - x * np.sin(angle)
    wave, ring = (along - frequency) ** 2 + across**2, (np.hypot(y, x) - frequency) ** 2
    distance = np.where(labels % 5 == 4, ring, wave)  # squared, to the frequencies that are kept
    noise = rng.standard_normal((2, *distance.shape), dtype=np.float32)
    spectrum = (noise[0] + 1j * noise[1]) * np.exp(-distance / (2 * 0.05**2))  # [N, 64, 33]
    texture = np.fft.irfft2(spectrum, axes=(1, 2))[:, :32, :32]
    return np.float32(np.tanh(1.2 * texture / texture.std(axis=(1, 2), keepdims=True)))


def draw_images(rng, labels):
    """uint8 [N, 32, 32, 3]: coloured textures of these labels, shaded, with a disc in front and noise."""
    n = len(labels)

    def colours(low, high):
        return np.float32(rng.uniform(low, high, (n, 1, 1, 3)))

    contrast = colours(-1, 1)
    contrast *= 0.4 / np.linalg.norm(contrast, axis=-1, keepdims=True)
    ramp = np.linspace(-0.5, 0.5, 32, dtype=np.float32)[:, None]
    image = colours(0.3, 0.7) + contrast * textures(rng, labels)[..., None]
    image += colours(-0.5, 0.5) * ramp[:, None] + colours(-0.5, 0.5) * ramp
    cy, cx, radius = rng.uniform([[0], [0], [3]], [[32], [32], [7]], (3, n))[..., None, None, None]
    pixel = np.arange(32)[:, None] + 0.5
    image = np.where(np.hypot(pixel[:, None] - cy, pixel - cx) < radius, colours(0.05, 0.95), image)
    image += 0.04 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.uint8(255 * image.clip(0, 1) + 0.5)


@functools.lru_cache
def synthetic_dataset(seed):
    """Datasets train (8,000) and val (2,000) of labelled texture images, uint8 [N, 32, 32, 3].

    The label depends only on the texture, which a linear probe on pixels cannot read. Colour, shading and the disc are
    easy to see but independent of the label.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(10_000) % 10)
    images = np.concatenate([draw_images(rng, part) for part in np.array_split(labels, 10)])  # in parts: less memory
    return [{"images": images[part], "labels": labels[part]} for part in (slice(8000), slice(8000, None))]


def open_array(path, fits, expected):
    """The array in an .npy file, memory-mapped. Raises DataError, with what was expected, unless fits(array)."""
    with expecting(expected, path):
        array = np.lib.format.open_memmap(path, mode="r")
        if not fits(array):
            raise ValueError(f"{array.dtype} {list(array.shape)}")
    return array


def open_arrays(folder, prefix):
    """Dataset of PREFIXimages.npy, uint8 [N, H, W, C] or [N, H, W], and PREFIXlabels.npy, integers [N] or absent."""

    def fits(x):  # not [N, C, H, W]
        return x.dtype == np.uint8 and x.size and (x.ndim == 3 or x.ndim == 4 and x.shape[1] >= min(x.shape[2:]))

    images = open_array(
        Path(folder, f"{prefix}images.npy"),
        fits,
        "uint8 [N, H, W, C], the channels last, or [N, H, W], and no empty dimension",
    )
    n = len(images)
    labels = np.full(n, -1)
    if (path := Path(folder, f"{prefix}labels.npy")).exists():
        labels = open_array(path, lambda x: x.shape == (n,) and x.dtype.kind in "iu", f"integers [{n}], one per image")
    return {"images": images if images.ndim == 4 else images[..., None], "labels": labels.astype(np.int64)}


def open_images(folder):
    """Datasets of a folder's images.npy and, if it is there, val_images.npy: images uint8 [N, H, W, C] and labels
    int64 [N], below 0 for no label. Raises DataError for missing, unreadable or unfit files.
    """
    return [open_arrays(folder, prefix) for prefix in ("", "val_")[: 1 + Path(folder, "val_images.npy").exists()]]


def crop_boxes(rng, rows, height, width, args, aspect):
    """Random resized crops and flips for these rows of the update: float32 [n, 5], in pixels.

    Each is top, left, height, width, flipped (0 or 1). A crop has crop_scale to 1 of the area; its width is 3/4 to 4/3,
    log-uniform, of its height times aspect, or the nearest that fits.
    """
    area, ratio, top, left, flip = rng.random((rows[-1] + 1, 5))[rows].T
    area = height * width * (args.crop_scale + (1 - args.crop_scale) * area)
    ratio = (aspect * (4 / 3) ** (2 * ratio - 1)).clip(area / height**2, width**2 / area)
    h, w = np.sqrt(area / ratio), np.sqrt(area * ratio)
    return np.stack([top * (height - h), left * (width - w), h, w, flip < args.flip_prob], 1).astype(np.float32)


def resize_weights(start, length, size_in, size_out):
    """Weights [B, size_out, size_in] of a bilinear, antialiased resampling of `length` pixels from `start` on.

    start, length: float [B]. At the borders of a crop it also reads the pixels next to it.
    """
    step = (length / size_out)[:, None, None]
    centre = start[:, None, None] + (torch.arange(size_out, device=start.device)[:, None] + 0.5) * step
    pixel = torch.arange(size_in, device=start.device) + 0.5
    weights = (1 - (pixel - centre).abs() / step.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


def prepare(batch, size):
    """Crop, flip and resize a batch's images, uint8 [B, H, W, C], to its boxes [B, 5] (see crop_boxes).

    size: (height, width). Returns float32 [B, C, *size] in [-1, 1]: one matrix product per axis, on the images' device.
    """
    images = batch["images"].permute(0, 3, 1, 2).float()  # [B, C, H, W]
    top, left, height, width, flip = batch["boxes"].unbind(1)
    vertical = resize_weights(top, height, images.shape[2], size[0])
    horizontal = resize_weights(left, width, images.shape[3], size[1])
    horizontal = torch.where(flip[:, None, None] > 0, horizontal.flip(1), horizontal)
    with torch.autocast(images.device.type, enabled=False):
        return vertical[:, None] @ images @ horizontal[:, None].mT / 127.5 - 1


def middle(height, width, aspect):
    """The box (see crop_boxes) of the largest part in the middle whose width is its height times aspect, rounded."""
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    return [(height - h) / 2, (width - w) / 2, h, w, 0]


def make_data(args, given):
    """What the shared part asks for (listed there), and `known`: the labelled images that the probes learn from.

    given: what a checkpoint says of Config, a dict. Raises DataError for unfit images.
    """
    datasets = open_images(args.data_dir) if args.data_dir else synthetic_dataset(args.seed)
    flags = {name: getattr(args, name) for name in Config.__dataclass_fields__ if name in args}
    for *shape, channels in dict.fromkeys(dataset["images"].shape[1:] for dataset in datasets):
        size = args.image_size or [side - side % args.patch_size for side in shape]
        given = {"image_size": size, "num_channels": channels} | given  # validation as training
        config = Config(**flags | given)
        if channels != config.num_channels:
            raise DataError(f"{args.data_dir}: images of {channels} channels, expected {config.num_channels}")
        aspect = config.image_size[1] / config.image_size[0]
        say(f"images of {shape} pixels, {channels} channels; evaluation sees the middle {middle(*shape, aspect)[2:4]}")

    def collate(picked, rng=None, rows=None):
        n, *shape, _ = picked["images"].shape
        if rng:
            return picked | {
                "rope_scale": np.float32(config.rope_rescale ** rng.uniform(-1, 1)),  # of the whole update, drawn first
                "boxes": crop_boxes(rng, rows, *shape, args, aspect),
            }
        return picked | {"boxes": np.full((n, 5), middle(*shape, aspect), np.float32)}

    if args.features:
        return {"config": config, "predict": functools.partial(write_features, datasets, collate, args)}
    if len(datasets) == 1:  # hold out a random tenth, since files are often sorted by label
        order = np.random.default_rng(0).permutation(size_of(*datasets))
        if len(order) < 2:
            raise DataError(f"{args.data_dir}: one image, expected two, or val_images.npy")
        datasets = [subset(*datasets, np.sort(part)) for part in np.split(order, [len(order) // 10 or 1])[::-1]]
    train, val = datasets
    # The same in every run, and in file order: a memory map is read from beginning to end.
    labelled = np.random.default_rng(0).permutation(np.flatnonzero(train["labels"][:] >= 0))
    return {
        "train": train,
        "val": val,
        "known": subset(train, np.sort(labelled[: args.probe_samples])),
        "collate": collate,
        "config": config,
    }


def describe(metrics):
    """The text of a log line."""
    titles = {
        "loss": "Loss",
        "loss_final": "Final",
        "loss_intermediate": "Intermediate",
        "knn_acc": "kNN",
        "probe_acc": "Probe",
    }
    return " | ".join(f"{title}: {metrics[name]:.4f}" for name, title in titles.items() if name in metrics)


def report(metrics):
    """The closing table: the features next to those that need no training, the loss next to trivial predictions."""
    lines = ["frozen features: no kNN and no probe, which need labels of training and validation images"]
    if "knn_acc" in metrics:
        lines = [f"{'frozen features':32}{'kNN':>8}{'probe':>8}"]
    for title, prefix in {"this model": "", "before training": "first_", "raw pixels": "raw_"}.items():
        if f"{prefix}knn_acc" in metrics:
            lines.append(f"{title:32}{metrics[prefix + 'knn_acc']:8.4f}{metrics[prefix + 'probe_acc']:8.4f}")
    lines.append(f"{'prediction of the next patch':32}{'loss':>8}")
    rows = {
        "this model": "loss_final",
        "its layers before the last": "loss_intermediate",
        "the best constant": "constant_loss",
        "the patch before": "copy_loss",
    }
    lines += [f"{title:32}{metrics[name]:8.4f}" for title, name in rows.items() if name in metrics]
    lines.append("target patches: mean cosine {embed_cos:.4f}, effective rank {effective_rank:.1f}".format_map(metrics))
    return "\n".join(lines)


# ---- one update, evaluation -----------------------------------------------------------------------------------------


def compute_loss(model, batch, carry, args):
    """This micro-batch's share of the update's loss, metrics as (sum, count) pairs, and no carry."""
    images = prepare(batch, unwrap(model).config.image_size)
    loss, metrics = losses(model(images, batch["rope_scale"]), args, args.use_intermediate_loss)
    return batch["share"] * loss, to_sums(metrics, len(images)), {}


def features(output, args):
    """What the probes get, float32 [B, D]: the mean over the patches of the output, or of --probe_layer."""
    states = [output.embedding, *output.hidden_states, output.prediction][args.probe_layer]  # -1: the prediction
    return states[:, 1:].float().mean(1).nan_to_num()  # eigh raises at NaN; the loss is NaN too, and its error names it


@torch.no_grad()
def evaluate(model, data, args):
    """Validation means of the losses and of the collapse metrics; accuracies of the probes on the frozen features and,
    as raw_..., on the pixels of the images at 16 x 16 or less (at 32 x 32 the probes would take 10 s).
    """
    size, sums, probed = model.config.image_size, {}, []
    for dataset, limit in (data["known"], 0), (data["val"], args.eval_samples):
        mine = []
        for batch in eval_batches(dataset, args, data["collate"], limit):
            with autocast(args):
                output = model(prepare(batch, size))
            pixels = prepare(batch, np.minimum(size, 16)).flatten(1)
            mine.append([x.cpu() for x in (batch["labels"], features(output, args), pixels)])
            if dataset is data["val"]:
                _, metrics = losses(output, args, every_layer=True)
                metrics["copy_loss"] = prediction_loss(output.embedding, output.embedding)
                add_sums(sums, to_sums(metrics | collapse(output.embedding), len(pixels)))
        # In file order (batches are dealt out in turn), so that the probes do not depend on the number of processes.
        batches = [batch for turn in itertools.zip_longest(*gather(mine)) for batch in turn if batch]
        probed.append([torch.cat(parts) for parts in zip(*batches)])
    metrics = means(sums)
    if all(probed):  # else no training image is labelled
        (y, x, pixels), (test_y, test_x, test_pixels) = probed
        raw = probe(pixels, y, test_pixels, test_y)
        metrics |= probe(x, y, test_x, test_y) | {f"raw_{name}": value for name, value in raw.items()}
    return metrics


@torch.no_grad()
def write_features(datasets, collate, args, model):
    """--features OUT: float32 [N, D] of all images in file order, those of images.npy first. Returns this in words."""
    found = []
    # Opened first: what is no new file in a folder that exists is said before computing.
    with open(args.features, "xb") as file:
        for dataset in datasets:
            for batch in tqdm(fixed_batches(dataset, collate, args.device, args.batch_size), disable=None):
                with autocast(args):
                    output = model(prepare(batch, model.config.image_size))
                found.append(features(output, args).cpu())
        np.save(file, torch.cat(found).numpy())
    return f"{args.features}: features of {[*map(size_of, datasets)]} images, those of images.npy first"


def collapse(embedding):
    """How much the target patches of embedding [B, T, D], as unit vectors, have collapsed to few directions.

    Returns the mean cosine between two of them, the effective rank (exp of the entropy of the normalized singular
    values: 1 for one direction, at most D; Roy and Vetterli 2007), and the loss of predicting their mean direction.
    All within one batch: with fewer than 16 images, cosines are noticeably higher and the rank is lower.
    """
    patches = embedding[:, 1:].flatten(0, 1)
    patches = patches.cpu() if patches.device.type == "mps" else patches  # MPS has no float64
    units = F.normalize(patches.double())  # in float32, rounding would count as further directions
    n, length = len(units), units.sum(0).norm()
    singular = torch.linalg.eigvalsh((units.T @ units).nan_to_num()).clamp(min=0).sqrt()
    rank = torch.special.entr(F.normalize(singular, p=1, dim=0)).sum().exp()
    cosine = (length**2 - n) / (n * max(n - 1, 1))  # without the n cosines of a patch with itself
    return {"embed_cos": cosine, "effective_rank": rank, "constant_loss": -length / n}


def probe(x, y, test_x, test_y):
    """Accuracy on test_x of kNN and ridge regression, fitted to x: float [n, D] each, with int64 labels y, test_y [n].

    kNN: majority of the 20 nearest by cosine of the 64 largest whitened components. Ridge: to one-hot labels, with the
    penalty that predicts most samples of x right when each is left out of the fit. Test samples with a label below 0
    are ignored; returns {} if none is left.
    """
    test_x, test_y = test_x[test_y >= 0], test_y[test_y >= 0]
    if not len(test_y):
        return {}
    classes, y = y.unique(return_inverse=True)  # labels may be ids or dates
    mean, targets = x.double().mean(0), F.one_hot(y).double()
    x, test_x = x - mean, test_x - mean
    variance, axes = torch.linalg.eigh(x.T @ x / len(x))  # ascending
    relative = variance / variance[-1]
    # The mean of LayerNorm outputs does not vary along its gain: whitening must not amplify the rounding left there.
    kept = relative > 1e-10
    relative, axes = relative[kept], axes[:, kept] / variance[kept].sqrt()
    x, test_x = x @ axes, test_x @ axes  # now x.T @ x = len(x) * identity

    near = F.normalize(x[:, -64:])
    parts = test_x[:, -64:].split(1000)  # bounds the memory
    nearest = torch.cat([(part @ near.T).topk(min(20, len(x))).indices for part in parts])

    weights, offset = x.T @ targets / len(x), targets.mean(0)  # least squares; a penalty shrinks each component

    def ridge(penalty):
        """How many samples of x are predicted right by the fit to all others; the weights [D, classes]."""
        shrinkage = relative / (relative + penalty)
        shrunk = shrinkage[:, None] * weights
        leverage = (1 + x.square() @ shrinkage) / len(x)  # weight of a sample's own target in its prediction
        others = x @ shrunk + offset - leverage[:, None] * targets  # times 1 - leverage: same argmax
        return int((others.argmax(1) == y).sum()), shrunk

    _, weights = max((ridge(10.0**exponent) for exponent in range(1, -7, -1)), key=lambda found: found[0])
    predicted = {"knn_acc": y[nearest].mode(1).values, "probe_acc": (test_x @ weights + offset).argmax(1)}
    return {name: float((classes[found] == test_y).double().mean()) for name, found in predicted.items()}


# ---- flags ----------------------------------------------------------------------------------------------------------

DATA_FLAGS = ("data_dir",)
EVAL_FLAGS = ("probe_layer", "probe_samples", "features")
FINE_TUNING = {}
DEMO = {
    "hidden_size": 64,
    "num_layers": 4,
    "num_heads": 2,
    "lr": 1e-3,
    "max_train_steps": 400,
    "warmup_steps": 20,
    "eval_interval": 100,
}


def add_method_args(parser):
    """Add this script's flags, and its defaults of the shared ones."""
    flag = flag_group(parser, "data")
    flag("--data_dir", None, "folder of images.npy and labels.npy; without it, a synthetic dataset of textures")
    flag("--image_size", None, "side, or height and width (default: the data's)", type=int, nargs="+", metavar="X")
    flag("--crop_scale", 0.35, "smallest part of the area that a random crop keeps", 0.01, 1)
    flag("--flip_prob", 0.5, "probability of a left-right flip", 0, 1)
    flag = flag_group(parser, "model")
    flag("--patch_size", 4, "side of a patch", 1)
    flag("--hidden_size", 96, "width, a multiple of 4 * num_heads", 1)
    flag("--num_layers", 6, "blocks", 1)
    flag("--num_heads", 3, "attention heads", 1)
    flag("--mlp_hidden", 0, "width of the MLP; 0: 4 * hidden_size")
    flag("--gated_mlp", False, "SwiGLU instead of GELU")
    flag("--qk_norm", True, "LayerNorm on queries and keys")
    flag("--qk_norm_affine", False, "with gain and bias")
    flag("--layerscale_value", 1.0, "initial LayerScale; published: 1e-5, for long runs")
    flag("--rope_rescale", 2.0, "largest random factor of the positions in training", 1)
    flag = flag_group(parser, "deep supervision")
    flag("--use_intermediate_loss", False, "the loss at every layer, not only at the last")
    flag("--intermediate_loss_weight", 1.0, "weight of the mean over layers 1 .. L-1")
    flag = flag_group(parser, "probes")
    flag("--probe_layer", -1, "features of this layer; 0: the embedding, -1: the normed output", -1)
    flag("--probe_samples", 4000, "labelled training images that the probes may use", 10)
    flag("--features", None, "with --eval_only: write the images' features [N, D] to this new .npy instead")
    parser.set_defaults(
        batch_size=64, max_train_steps=1500, lr=2e-3, weight_decay=0.05, min_lr_ratio=0.0, ema_decay=0.99
    )


def check(args, given, error):
    """Refuse flags that contradict each other."""
    if args.intermediate_loss_weight != 1 and not args.use_intermediate_loss:
        error("--intermediate_loss_weight needs --use_intermediate_loss")
    if args.features and not args.eval_only:
        error("--features needs --eval_only and the --out_dir of a run")
    if args.probe_layer > args.num_layers:
        error(f"--probe_layer {args.probe_layer} must be at most --num_layers {args.num_layers}")


# ==== shared: identical in nepa_deep.py, trm_deep.py, jepa_lm.py =====================================================
# Trains whatever stands above. All it uses of it:
#   Config; Model(config); to_our_names(weights, model), which renames published weights; read_folder(folder), what the
#     folder of a published model says of Config, a dict; FINE_TUNING: defaults of flags with its "files"
#   DATA_FLAGS: the flags that name data; without the first of them the demonstration runs, with the defaults in DEMO
#   EVAL_FLAGS: what --eval_only may change; add_method_args(parser); check(args, given, error), see there
#   make_data(args, config) -> dict of train and val (datasets as in data.py), collate and config; or of config and
#     predict(model) -> text, which replaces the evaluation. The argument config: a dict, what a
#     checkpoint or --init_from says of Config; empty in a new run
#   compute_loss(model, batch, carry, args) -> loss, sums (see add_sums), carry. The batch holds step and share (see
#     train). carry: {} at first, then what each row takes along to the next update, tensors [B, ...]
#   evaluate(model, data, args) -> means, with a "loss"; describe(metrics) -> text of a log line
#   report(metrics) -> closing text on the last validation; best_... and first_... (untrained) metrics stand beside it

SCRIPT = Path(__file__).stem
# Both set by torchrun; RANK is ignored without WORLD_SIZE. Tasks of srun without torchrun are refused in launch.
WORLD = int(os.environ.get("WORLD_SIZE", os.environ.get("SLURM_STEP_NUM_TASKS", 1)))
RANK = int(os.environ.get("RANK", 0)) % WORLD


# ---- processes, precision, metrics ----


def all_reduce(tensor):
    """The tensor, summed over the processes in place: CPU tensors by gloo, CUDA tensors by nccl."""
    if WORLD > 1:
        dist.all_reduce(tensor)
    return tensor


def gather(value):
    """value of every process (anything that pickles), as a list in order of rank."""
    values = [value] * WORLD
    if WORLD > 1:
        dist.all_gather_object(values, value)
    return values


def unwrap(model):
    """The Model inside torch.compile and DistributedDataParallel."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


def autocast(args):
    """Mixed precision as --dtype says; none for float32."""
    return torch.autocast(args.device.type, getattr(torch, args.dtype), enabled=args.dtype != "float32")


def to_sums(values, count):
    """Means over count samples (dict of floats or scalar tensors) as (sum, count) pairs; never syncs."""
    return {name: (value * count, count) for name, value in values.items()}


def add_sums(sums, more):
    """Add (sum, count) pairs to the running ones, by name."""
    for name, (value, count) in more.items():
        total, n = sums.get(name, (0.0, 0.0))
        sums[name] = (total + value, n + count)


def over_processes(sums):
    """The sums of all processes together, as floats. A CPU-GPU sync point."""
    totals = {}
    for part in gather({name: (float(total), float(count)) for name, (total, count) in sums.items()}):
        add_sums(totals, part)
    return totals


def means(sums):
    """Means over everything added, on all processes; a metric without samples is left out. A CPU-GPU sync point."""
    return {name: total / count for name, (total, count) in over_processes(sums).items() if count}


def say(text):
    """Print on the first process, above the progress bar."""
    if RANK == 0:
        try:
            tqdm.write(text)
        except Exception:  # no stdout, or none any more (| head): the run goes on without
            sys.stdout = None


# ---- signals: the first ends the run cleanly, a Ctrl-C after it at once ----

RECEIVED = []


def receive(number, _):
    RECEIVED.append(number)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def catch_signals():
    """While the body runs; the handlers before are restored at its end."""
    RECEIVED.clear()  # of an earlier run in this process
    with contextlib.ExitStack() as restore:
        with contextlib.suppress(ValueError, AttributeError):  # only the main thread may; Windows lacks the last two
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
                number = getattr(signal, name)
                restore.callback(signal.signal, number, signal.signal(number, receive))
        yield


def received_signals():
    """How many signals the processes have received; the same on all of them."""
    return all_reduce(torch.tensor(len(RECEIVED)))


def eval_batches(dataset, args, collate, limit=0):
    """This process's share of one pass over a dataset (see data.fixed_batches), with progress on a terminal.

    A signal cuts the pass short; validate discards the result.
    """
    batches = fixed_batches(dataset, collate, args.device, args.batch_size, RANK, WORLD, limit)
    for batch in tqdm(batches, "evaluating", leave=False, disable=RANK > 0 or None):  # None: off without a terminal
        yield batch
        if RECEIVED:
            return


# ---- flags ----


def boolean(text):
    return ("false", "true").index(text.lower()) == 1


def flag_group(parser, title):
    """A function flag(names, default, help) that adds flags under this title; a flag has the type of its default.

    A default of None: text. Numbers must lie in low .. high.
    """
    group = parser.add_argument_group(title)

    def flag(names, default, help, low=0, high=1e38, **more):
        kind = type(default)

        def number(text):
            value = kind(text)
            if not low <= value <= high:
                raise argparse.ArgumentTypeError(f"{text!r}, expected at least {low} and at most {high}")
            return value

        if kind is bool:
            more = {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}
        elif kind in (int, float):
            more = {"type": number, "metavar": "X"}
        if default is not None and default is not False:
            help += " (default: %(default)s)"
        group.add_argument(*names.split(), default=default, help=help, **more)

    return flag


# What --resume may change; of batch_size and grad_accum only the product with the number of processes must stay.
MAY_CHANGE = (
    "batch_size grad_accum max_train_steps eval_interval log_interval device compile "
    "wandb_mode wandb_project run_name out_dir resume eval_only"
)


def parse_args(argv):
    """The flags in force, and what the run starts from. Refuses flags that make no sense (exit 2)."""
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [flags]      (--help lists them)",
        description=__doc__,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=120),
        allow_abbrev=False,
    )
    flag = flag_group(parser, "training")
    flag("--batch_size", 32, "samples per micro-batch and process", 1)
    flag("--grad_accum", 1, "micro-batches per update", 1)
    flag("--max_train_steps", 1000, "updates in all", 1)
    flag("--lr --learning_rate", 1e-3, "peak learning rate")
    flag("--min_lr_ratio", 0.1, "final learning rate as a fraction of --lr; 1: constant", 0, 1)
    flag("--warmup_steps", 100, "updates of linear warm-up")
    flag("--weight_decay", 0.1, "AdamW's, on matrices only")
    flag("--beta1", 0.9, "AdamW's", 0, 0.999999)
    flag("--beta2", 0.95, "AdamW's", 0, 0.999999)
    flag("--grad_clip", 1.0, "largest gradient norm; 0: no limit")
    flag("--ema_decay", 0.0, "of the averaged weights, which are then the ones evaluated; 0: none", 0, 0.999999)
    flag("--seed", 0, "of the weights, the order and the synthetic dataset", 0, 2**32 - 1)
    flag("--init_from", None, "start from the weights of a run's best.pt or ckpt.pt, or a published file or folder")
    flag = flag_group(parser, "machine")
    flag("--device", "auto", "auto (CUDA if there), cpu, cuda, mps, ...")
    flag("--dtype", "auto", "auto: bfloat16 on CUDA", choices=["auto", "float32", "bfloat16", "float16"])
    flag("--compile", "auto", "torch.compile; auto: on CUDA", choices=["auto", "on", "off"])
    flag("--grad_checkpoint", False, "recompute activations in the backward pass: same gradient, less memory")
    flag = flag_group(parser, "evaluation, output")
    flag("--eval_interval", 500, "updates between evaluations, each of which saves a checkpoint", 1)
    flag("--eval_samples", 0, "validation samples to use; 0: all")
    flag("--log_interval", 100, "updates between lines of metrics.jsonl", 1)
    flag("--out_dir", None, f"folder of the run (default: a new out/{SCRIPT}-DATE-TIME)")
    flag("--resume", False, "continue the run in --out_dir, with its flags; start it if there is none")
    flag("--eval_only", False, "evaluate the best checkpoint of the run in --out_dir")
    flag("--wandb_mode", "disabled", "Weights & Biases", choices=["disabled", "offline", "online"])
    flag("--wandb_project", "deep-supervision", "Weights & Biases")
    flag("--run_name", None, "Weights & Biases (default: the folder's name)")
    add_method_args(parser)
    parser.epilog = f"Without --{DATA_FLAGS[0]} the demonstration has defaults of its own:\n{DEMO}"

    args, start = parser.parse_args(argv), {"config": {}}
    origin = args.init_from
    if not args.out_dir and (args.resume or args.eval_only):
        parser.error("--resume and --eval_only need the --out_dir of a run")
    # expanduser: a shell leaves the ~ of --out_dir=~/x
    folder = Path(args.out_dir or f"out/{SCRIPT}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}").expanduser()
    path = folder / ("best.pt" if args.eval_only else "ckpt.pt")
    if args.eval_only or args.resume and path.exists():
        with expecting(f"a checkpoint of this version of {SCRIPT}.py", path):
            start = torch.load(path, map_location="cpu", weights_only=True)
            Config(**start["config"])
        origin = folder
    else:
        if not args.resume and (folder / "metrics.jsonl").exists():
            parser.error(f"--out_dir {folder} holds a run: --resume continues it, --eval_only uses it")
        if not getattr(args, DATA_FLAGS[0]):
            parser.set_defaults(**DEMO)
        if origin:
            start = load_weights(origin)
            if start["config"].get("files"):
                parser.set_defaults(**FINE_TUNING)
    stored = {name: value for name, value in start.get("args", start["config"]).items() if name in vars(args)}
    parser.set_defaults(**stored)
    given, args = args, parser.parse_args(argv)  # now the command line overrides the defaults set above
    free = {*MAY_CHANGE.split(), *DATA_FLAGS}
    if args.eval_only or not args.resume:
        free |= {"eval_samples", "dtype", *EVAL_FLAGS}
    for name, value in vars(args).items():
        if value == "":
            parser.error(f"--{name} is empty, expected a value")  # an unset shell variable
        if name not in free and value != stored.get(name, value):
            parser.error(f"--{name} {value} conflicts with {origin}, which has {stored[name]}")
    check(args, given, parser.error)
    args.out_dir = str(folder)
    args.flags = dict(vars(args))  # with auto unresolved: for the checkpoint and wandb
    device = args.device.replace("auto", "cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    with expecting("a device of this machine", f"--device {device}"):
        args.device = torch.zeros(1, device=device).device
    if args.dtype == "auto":
        bfloat16 = args.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        args.dtype = "bfloat16" if bfloat16 else "float32"
    return args, start


# ---- files ----


def load_weights(path):
    """For --init_from: {"weights": ..., "config": what comes with them, a dict}. Raises DataError.

    path: a run's checkpoint, whose averaged weights count if there are any, a published model's folder, or a file of
    published weights, with which no config comes.
    """
    path, found = Path(path), {}
    with expecting("a checkpoint or published weights (.safetensors: pip install safetensors)", path):
        for file in sorted(path.glob("model*.safetensors")) or [path]:
            if file.suffix == ".safetensors":
                from safetensors.torch import load_file

                found |= load_file(file)
            else:
                found = torch.load(file, map_location="cpu", weights_only=True)
        config = read_folder(path) if path.is_dir() else found.get("config", {})
        Config(**config)  # of this script, or an error
        for wrapper in ("ema", "model", "state_dict"):
            found = found.get(wrapper) or found
        return {
            "config": config,
            "weights": {re.sub(r"^((module|_orig_mod|model)\.)+", "", name): x for name, x in found.items()},
        }


# ---- optimizer ----


def learning_rate(step, args):
    """Linear warm-up, then a cosine from lr to lr * min_lr_ratio at the last update."""
    warmup = args.warmup_steps
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / (args.max_train_steps - warmup)
    return args.lr * (args.min_lr_ratio + (1 - args.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2)


def make_optimizer(model, args):
    """AdamW, weight decay on matrices only; fused: one kernel for all parameters."""
    groups = [
        {
            "params": [p for p in model.parameters() if (p.ndim >= 2) == matrices],
            "weight_decay": args.weight_decay * matrices,
        }
        for matrices in (True, False)
    ]
    return torch.optim.AdamW(groups, betas=(args.beta1, args.beta2), fused=True)


# ---- the run ----


class Run:
    """All that changes during a run, how it is logged and how it is saved."""

    def __init__(self, args, data, start):
        self.args, self.data, self.out_dir = args, data, Path(args.out_dir)
        self.num_rows = args.batch_size * args.grad_accum * WORLD  # samples of an update
        # The rows of an update that each micro-batch of this process takes: int64 [grad_accum, batch_size].
        self.parts = np.arange(self.num_rows).reshape(WORLD, args.grad_accum, -1)[RANK]
        self.must_match = {"--batch_size * --grad_accum * processes": self.num_rows} | fingerprint(data)

        torch.manual_seed(args.seed)
        self.model = self.net = Model(data["config"]).to(args.device)
        self.model.grad_checkpoint = args.grad_checkpoint
        if "weights" in start:
            with expecting("weights of this model", args.init_from):
                self.model.load_state_dict(to_our_names(start["weights"], self.model))
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if args.ema_decay else None
        self.optimizer = make_optimizer(self.model, args)
        self.scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == "float16")
        self.saved = {"model": self.model, "ema": self.ema, "optimizer": self.optimizer, "scaler": self.scaler}
        if args.compile == "on" or args.compile == "auto" and args.device.type == "cuda":
            torch._dynamo.config.recompile_limit = 64  # a curriculum over depth has a graph for each
            try:  # a tiny function first: not every machine has a compiler
                with expecting("a working compiler or --compile off", "torch.compile"):
                    torch.compile(torch.ones)(1, device=args.device)
                self.net = torch.compile(self.model)
            except DataError as error:
                if args.compile == "on":
                    raise
                say(f"not compiled: {error}")
        if WORLD > 1:  # waits for all: nobody writes before everybody has looked whether --out_dir is free
            self.net = nn.parallel.DistributedDataParallel(self.net, gradient_as_bucket_view=True)

        self.step, self.sums, self.carries = 0, {}, [{}] * args.grad_accum  # a carry for each micro-batch
        # first, last, best: the metrics of validations
        self.state = {
            "first": {},
            "last": {},
            "best": {"loss": math.inf},
            "seconds": 0.0,
            "log_size": 0,
            "wandb_id": None,
        }
        if "step" in start:
            self.restore(start)
        self.batches = training_batches(
            data["train"], data["collate"], args.device, args.seed, self.num_rows, self.parts, self.step
        )

    def restore(self, checkpoint):
        """Continue from the checkpoint, on any number of processes: bit for bit the uninterrupted run."""
        for name, then in checkpoint["must_match"].items():
            if self.must_match[name] != then:
                raise DataError(
                    f"{self.out_dir}: {name}: {self.must_match[name]}, expected {then}, as in the checkpoint"
                )
        for name, part in self.saved.items():
            if part:
                part.load_state_dict(checkpoint[name])
        self.step, self.state = checkpoint["step"], checkpoint["state"]
        if RANK == 0:
            self.sums = checkpoint["sums"]
        carry = checkpoint["carry"].items()
        self.carries = [{name: x[rows].to(self.args.device) for name, x in carry} for rows in self.parts]
        torch.set_rng_state(checkpoint["rng"])

    def require_finite(self, name, value):
        if not math.isfinite(value):
            raise DataError(f"step {self.step}: {name} is {value}, expected a finite number; the checkpoint stays")

    def save(self, name, **contents):
        """Write contents, and what both checkpoints hold, to out_dir/name on the first process.

        Raises DataError, and keeps the old file, if a weight is not finite.
        """
        self.require_finite("norm of the weights", nn.utils.get_total_norm(self.model.parameters()))
        if RANK > 0:
            return
        contents |= {
            "script": SCRIPT,
            "step": self.step,
            "args": self.args.flags,
            "config": dataclasses.asdict(self.model.config),
        }
        # Written beside it, then renamed: the file holds the old content or the new, never half.
        path, temporary = self.out_dir / name, self.out_dir / f"{name}.tmp"
        with expecting("a folder with room", path):
            try:
                with open(temporary, "wb") as file:
                    torch.save(contents, file)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

    def save_latest(self):
        """ckpt.pt: everything that --resume needs."""
        carries = sum(gather([{name: x.cpu() for name, x in carry.items()} for carry in self.carries]), [])
        self.save(
            "ckpt.pt",
            **{name: part and part.state_dict() for name, part in self.saved.items()},
            must_match=self.must_match,
            state=self.state,
            sums=over_processes(self.sums),
            # All rows in order, so that another number of processes can take them over.
            carry={name: torch.cat([carry[name] for carry in carries]) for name in carries[0]},
            rng=torch.get_rng_state(),  # nothing here draws on the GPU
        )

    @torch.no_grad()
    def average(self):
        """Move the averaged weights towards the weights; faster at first, to forget the initial ones."""
        if self.ema:
            decay = min(self.args.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    @contextlib.contextmanager
    def open_log(self):
        """For the body: metrics.jsonl, of which log_size bytes belong to the run so far, wandb, the progress bar.

        Until it ends, or the process, however that ends, another process that opens the log is refused.
        """
        args, self.log_path, self.wandb = self.args, self.out_dir / "metrics.jsonl", None
        # disable=None: off if stderr is no terminal
        self.bar = tqdm(total=args.max_train_steps, initial=self.step, disable=RANK > 0 or None)
        if RANK > 0:
            return (yield)
        self.out_dir.mkdir(parents=True, exist_ok=True)
        owner = self.out_dir / ".owner"
        with open(self.log_path, "ab") as file:
            try:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                owner.write_text(f"{os.uname().nodename}, {os.getpid()}")
            except BlockingIOError:
                raise DataError(f"another process ({owner.read_text()}) is training in {self.out_dir}") from None
            except (ImportError, OSError):  # Windows; a file system without locks
                pass
            file.truncate(min(self.state["log_size"], file.tell()))  # later lines will be logged again
            if args.wandb_mode != "disabled":
                os.environ["WANDB_MODE"] = args.wandb_mode  # an empty one would be an error
                import wandb

                self.wandb = wandb.init(
                    project=args.wandb_project,
                    name=args.run_name or self.out_dir.name,
                    dir=self.out_dir,
                    id=self.state["wandb_id"],
                    resume="allow",
                    config=args.flags,
                )
                # Its own counter would drop what a resumed run repeats.
                self.wandb.define_metric("*", step_metric="step")
                self.state["wandb_id"] = self.wandb.id
            yield

    def log(self, split, metrics):
        """One line: to the file, to wandb under the same names (val/ and final/ before theirs), and for people."""
        for name, value in metrics.items():
            self.require_finite(f"{split} {name}", value)
        if RANK > 0:
            return
        with expecting("room", self.log_path), open(self.log_path, "a") as file:
            file.write(json.dumps({"step": self.step, "split": split, **metrics}) + "\n")
            self.state["log_size"] = file.tell()
        if self.wandb:
            prefix = "" if split == "train" else f"{split}/"
            self.wandb.log({f"{prefix}{name}": value for name, value in metrics.items()} | {"step": self.step})
        if split != "final":
            say(f"Step {self.step}/{self.args.max_train_steps}, {split.capitalize()} {describe(metrics)}")

    def validate(self):
        """Evaluate, log and save, unless a signal cut the evaluation short."""
        model = self.ema or self.model
        metrics = evaluate(model.eval(), self.data, self.args) | {"step": self.step}
        self.model.train()
        if received_signals():
            return
        self.log("val", metrics)
        self.state |= {"last": metrics, "first": self.state["first"] or metrics}
        if metrics["loss"] < self.state["best"]["loss"]:
            self.state["best"] = metrics
            self.save("best.pt", model=model.state_dict(), metrics=metrics)
        self.save_latest()

    def finish(self):
        """The closing line and table."""
        self.bar.close()
        final = dict(self.state["last"])
        for which in ("first", "best"):
            final |= {f"{which}_{name}": value for name, value in self.state[which].items()}
        self.log("final", final)
        say(f"{report(final)}\nbest checkpoint: {self.out_dir}/best.pt, of step {final['best_step']}")


def train(run):
    """The loop. Returns the exit code: 0, or 128 + the number of the signal that ended the run."""
    args, optimizer, scaler = run.args, run.optimizer, run.scaler
    while True:
        # Evaluate, save, leave. A signal ends the run here, after a whole update.
        done = run.step >= args.max_train_steps
        if run.state["last"].get("step") != run.step and (done or run.step % args.eval_interval == 0):
            run.validate()
        if received_signals():
            run.save_latest()
            say(f"stopped after step {run.step}; to continue: --resume --out_dir {args.out_dir!r}")
            return 128 + max(RECEIVED, default=15)  # 15: only others received one
        if done:
            run.finish()
            return 0

        # Fetch and accumulate.
        start = time.perf_counter()
        batches = [next(run.batches) for _ in range(args.grad_accum)]
        lr = learning_rate(run.step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        # The loss is one mean over the micro-batches of all processes. counts (float [k], a number for each part of the
        # loss): how many tokens, say, a batch holds, and so how much it weighs; without them, all weigh the same.
        counts = [batch.pop("counts", torch.ones(())) for batch in batches]
        total = all_reduce(sum(counts)).clamp(min=1)
        for micro, (batch, count) in enumerate(zip(batches, counts)):
            run.net.require_backward_grad_sync = micro == args.grad_accum - 1  # before the forward pass: DDP looks then
            batch |= {"step": run.step, "share": count / total}
            with autocast(args):
                loss, sums, run.carries[micro] = compute_loss(run.net, batch, run.carries[micro], args)
            scaler.scale(loss * WORLD).backward()  # DDP divides the gradient by it
            add_sums(run.sums, sums)

        # Step.
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), args.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        run.average()
        run.step += 1
        run.bar.update()

        # Log. A number that is not finite ends the run at the next line, evaluation or save.
        finite = norm.isfinite()  # not always in float16; the scaler skips that update
        add_sums(run.sums, {"grad_norm": (norm.masked_fill(~finite, 0) / WORLD, finite / WORLD)})  # equal on all ranks
        if due := run.step % args.log_interval == 0 or run.step in (1, args.max_train_steps):
            metrics = means(run.sums)  # waits for the GPU
        run.state["seconds"] += time.perf_counter() - start  # without evaluating and saving
        if due:
            run.log("train", metrics | {"lr": lr, "samples": run.step * run.num_rows, "seconds": run.state["seconds"]})
            run.sums = {}


def launch(argv):
    """Evaluate or train, as the flags say. Returns the exit code."""
    args, start = parse_args(argv)
    if args.device.type == "cuda":
        torch.cuda.set_device(args.device)
        torch.set_float32_matmul_precision("high")  # TF32
    if WORLD > 1:
        with expecting("processes started by torchrun", f"{WORLD} processes"):
            dist.init_process_group(f"cpu:gloo{',cuda:nccl' * (args.device.type == 'cuda')}")
    data = make_data(args, start["config"])
    if not args.eval_only:
        run = Run(args, data, start)
        with run.open_log(), catch_signals():
            say(
                f"{sum(p.numel() for p in run.model.parameters()):,} parameters, {size_of(data['train']):,} samples, "
                f"{WORLD} x {args.device} {args.dtype}, from step {run.step} -> {run.out_dir}"
            )
            return train(run)
    model = Model(data["config"]).to(args.device).eval()
    model.load_state_dict(start["model"])
    if RANK == 0:  # not on stdout, where an answer may stand
        step = start["step"] or "0, before training (warning: no later evaluation was better)"
        print(f"{args.out_dir}/best.pt of step {step}", file=sys.stderr)
    if "predict" not in data:
        metrics = evaluate(model, data, args)
        say(f"{describe(metrics)}\n{report(metrics)}")
    elif RANK == 0:
        say(data["predict"](model))
    return 0


def main(argv=None):
    """Run with these flags (a list of words; None: the command line's). Raises SystemExit where it does not succeed.

    Bad flags, data and files are one line, anything else is a traceback.
    """
    with contextlib.suppress(AttributeError):  # a notebook has another stdout, or there is none
        sys.stdout.reconfigure(errors="replace", line_buffering=True)  # what a terminal cannot show becomes a ?
    code, message = 1, None
    try:
        code = launch(argv)
    except (DataError, OSError) as error:
        message = f"error: {error}"
    except Exception:
        if WORLD == 1:
            raise
        message = traceback.format_exc()
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(exit_code=1 if message else 0)
    if WORLD > 1:
        if message:
            time.sleep(min(RANK, 1))  # torchrun ends the others when one has ended: mostly the first alone says it
            print(f"[rank {RANK}] {message}", file=sys.stderr)
        os._exit(code)  # no cleaning up: freed in the wrong order, gloo and torch wait for each other's threads
    if code:
        sys.exit(message or code)


if __name__ == "__main__":
    main()
