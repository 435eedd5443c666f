"""Next-embedding prediction on images, with the loss at every layer of the network on demand.

An image is cut into patches, each patch becomes an embedding, and a causal ViT predicts from the patches so far the
embedding of the next one: no pixels are rebuilt, nothing is masked, no second network is needed ("Next-Embedding
Prediction Makes Strong Vision Learners", NEPA, arXiv 2512.16922). Normally the loss sits on the last layer only;
--use_intermediate_loss puts it on every layer before, so that a run can tell whether that converges faster, and whether
what converges faster is also better: both are judged by a probe and by kNN on the frozen features.

  python nepa_deep.py                                                                   # laptop, 1 to 2 minutes
  python nepa_deep.py --use_intermediate_loss
  python nepa_deep.py --data_dir cifar10 --download                                     # CIFAR-10, 10 minutes
  torchrun --nproc_per_node 8 nepa_deep.py --data_dir DIR --use_intermediate_loss       # many GPUs

Without --data_dir it learns a built-in world of textures. The first command's last lines, seed 0:

  Step 400/400, Val Loss: -0.6450 | Final: -0.6450 | Intermediate: -0.4783 | kNN: 0.6630 | Probe: 0.5325
  frozen features                      kNN   probe
  this model                        0.6630  0.5325
  untrained network                 0.4405  0.2515
  raw pixels                        0.3290  0.2060
"""

import argparse
import copy
import dataclasses
import datetime
import functools
import hashlib
import http.client
import itertools
import json
import math
import os
import shlex
import signal
import sys
import tarfile
import tempfile
import time
import traceback
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import Concat, DataError, Loader, fixed_batches, make_batch, mix, permuted, size_of

# ---- model ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """What defines the model; the defaults are the published Base model's."""

    image_size: int = 224
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
    rope_rescale: float = 2.0  # in training all coordinates are multiplied by a number in [1 / it, it]
    norm_eps: float = 1e-12

    def __post_init__(self):
        self.mlp_hidden = self.mlp_hidden or 4 * self.hidden_size
        if self.hidden_size % (4 * self.num_heads):
            needed = f"a multiple of 4 * num_heads = {4 * self.num_heads} (RoPE turns two coordinates in pairs)"
            raise ValueError(f"hidden_size {self.hidden_size}, expected {needed}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size}, expected a multiple of patch_size {self.patch_size}")


class Output(NamedTuple):
    """What a forward pass gives; T = 1 + number of patches, the CLS token first."""

    embedding: torch.Tensor  # [B, T, D] what the first layer reads; its patches are the targets
    hidden_states: list  # [B, T, D] each, the residual stream after layers 1 .. L, without the final norm
    prediction: torch.Tensor  # [B, T, D] the last of them, normed: position t predicts embedding t + 1


def rotary(rows, columns, d, theta, scale, device):
    """RoPE angles of CLS and rows x columns patches as cos, signed sin [T, 1, 1, d], float32; CLS is not turned.

    Patch centres lie in [-1, 1], times scale; the first d/4 angles come from y, the others from x.
    """
    y, x = (scale * ((2 * torch.arange(n, device=device) + 1) / n - 1) for n in (rows, columns))
    frequencies = 2 * math.pi * theta ** (-4 * torch.arange(d // 4, device=device) / d)
    y, x = y[:, None, None] * frequencies, x[:, None] * frequencies
    angles = torch.cat([y.expand(-1, columns, -1), x.expand(rows, -1, -1)], dim=-1).flatten(0, 1)
    angles = F.pad(angles, (0, 0, 1, 0))[:, None, None]
    return torch.cat([angles, angles], dim=-1).cos(), torch.cat([-angles, angles], dim=-1).sin()


def rotate(x, cos, sin):
    """Half-split rotation of x [B, T, 2, heads, d], in float32: [x1 cos - x2 sin, x2 cos + x1 sin], signs in sin."""
    x32 = x.float()
    return torch.addcmul(x32 * cos, x32.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


class Block(nn.Module):
    """Pre-norm transformer block: h += scale1 * Attention(LN(h)); h += scale2 * MLP(LN(h)); strictly causal."""

    def __init__(self, c):
        super().__init__()
        D, d = c.hidden_size, c.hidden_size // c.num_heads
        self.num_heads, self.gated, self.qk_norm, self.eps = c.num_heads, c.gated_mlp, c.qk_norm, c.norm_eps
        self.norm1, self.norm2 = nn.LayerNorm(D, c.norm_eps), nn.LayerNorm(D, c.norm_eps)
        self.qkv = nn.Linear(D, 3 * D)
        affine = c.qk_norm and c.qk_norm_affine
        self.q_norm, self.k_norm = (nn.LayerNorm(d, c.norm_eps) if affine else None for _ in range(2))
        self.o = nn.Linear(D, D)
        self.up = nn.Linear(D, c.mlp_hidden * (2 if c.gated_mlp else 1))  # gate and up in one
        self.down = nn.Linear(c.mlp_hidden, D)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((D,), c.layerscale_value)) for _ in range(2))

    def forward(self, h, cos, sin):
        B, T, D = h.shape
        qk, v = self.qkv(self.norm1(h)).split([2 * D, D], dim=-1)
        qk, v = qk.view(B, T, 2, self.num_heads, -1), v.view(B, T, self.num_heads, -1)
        if self.q_norm:
            qk = torch.stack([self.q_norm(qk[:, :, 0]), self.k_norm(qk[:, :, 1])], dim=2)
        elif self.qk_norm:
            qk = F.layer_norm(qk, qk.shape[-1:], eps=self.eps)
        q, k = rotate(qk, cos, sin).to(v.dtype).permute(2, 0, 3, 1, 4)  # [B, heads, T, d] each
        attended = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True)
        h = h + self.scale1 * self.o(attended.transpose(1, 2).reshape(B, T, D))
        up = self.up(self.norm2(h))
        if self.gated:
            gate, up = up.chunk(2, dim=-1)
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
        # A patch of zeros (padding, a grey wall) embeds to the bias, zero at first, where the slope of a LayerNorm is
        # eps^-1/2 = 1e6 and gradients reach 4e7. So what has an rms below 1e-3 is filled up with the CLS token.
        blank = 1 - patches.detach().float().square().mean(-1, keepdim=True).sqrt() / 1e-3
        patches = patches + blank.clamp(min=0) * self.cls_token
        return torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)

    def forward(self, images, rope_scale=None):
        """images: [B, C, H, W] float, H and W multiples of patch_size. rope_scale: factor of the coordinates, a float
        or 0-dimensional tensor (None: drawn in training, 1 otherwise). Returns an Output.
        """
        c = self.config
        rows, columns = (side // c.patch_size for side in images.shape[2:])
        if rope_scale is None:
            rope_scale = c.rope_rescale ** (2 * torch.rand((), device=images.device) - 1) if self.training else 1.0
        cos, sin = rotary(rows, columns, c.hidden_size // c.num_heads, c.rope_theta, rope_scale, images.device)
        embedding = h = self.embed(images)
        hidden_states = []
        for block in self.layers:
            # Keep only the residual stream; backward runs each block a second time. Not the last, which it needs first.
            if self.grad_checkpoint and block is not self.layers[-1]:
                h = checkpoint(block, h, cos, sin, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, cos, sin)
            hidden_states.append(h)
        return Output(embedding, hidden_states, self.norm(h))


# ---- published weights ----------------------------------------------------------------------------------------------


def official_names(config):
    """Our names of the weights -> the published ones, whose tensors stand one below the other in ours."""
    names = {"cls_token": ["embeddings.cls_token"]}
    for kind in ("weight", "bias"):
        names[f"patch.{kind}"] = [f"embeddings.patch_embeddings.projection.{kind}"]
        names[f"norm.{kind}"] = [f"layernorm.{kind}"]
    for i in range(config.num_layers):
        ours, theirs = f"layers.{i}", f"encoder.layer.{i}"
        names[f"{ours}.scale1"] = [f"{theirs}.layer_scale.lambda1"]
        names[f"{ours}.scale2"] = [f"{theirs}.output.layer_scale.lambda1"]
        up = ["gate_proj", "up_proj"] if config.gated_mlp else ["up_proj"]
        for kind in ("weight", "bias"):
            attention = f"{theirs}.attention.attention"
            names[f"{ours}.qkv.{kind}"] = [f"{attention}.{part}.{kind}" for part in ("query", "key", "value")]
            if config.qk_norm and config.qk_norm_affine:
                names |= {f"{ours}.{part}_norm.{kind}": [f"{attention}.{part}_norm.{kind}"] for part in "qk"}
            names[f"{ours}.o.{kind}"] = [f"{theirs}.attention.output.dense.{kind}"]
            names[f"{ours}.up.{kind}"] = [f"{theirs}.intermediate.{part}.{kind}" for part in up]
            names[f"{ours}.down.{kind}"] = [f"{theirs}.output.dense.{kind}"]
            names[f"{ours}.norm1.{kind}"] = [f"{theirs}.layernorm_before.{kind}"]
            names[f"{ours}.norm2.{kind}"] = [f"{theirs}.layernorm_after.{kind}"]
    return names


def load_official(model, weights):
    """Copy published NEPA weights (dict of arrays by their names, with or without `vit_nepa.`) into model, in place.

    A norm of queries and keys may lack its bias; a pooler is left out, as nothing here reads it. Raises ValueError for
    a missing, unknown or misshapen name.
    """
    weights = {name.removeprefix("vit_nepa."): torch.as_tensor(value) for name, value in weights.items()}
    weights = {name: value for name, value in weights.items() if not name.startswith("pooler.")}
    names, state = official_names(model.config), model.state_dict()
    for ours, parts in names.items():
        if missing := [name for name in parts if name not in weights]:
            if ours.endswith(("q_norm.bias", "k_norm.bias")):
                continue
            raise ValueError(f"no weight {missing[0]}, expected one of shape {list(state[ours].shape)}")
        expected = [len(state[ours]) // len(parts), *state[ours].shape[1:]]
        for name in parts:
            if list(weights[name].shape) != expected:
                raise ValueError(f"{name} is {list(weights[name].shape)}, expected {expected}")
        state[ours] = torch.cat([weights.pop(name) for name in parts])
    if weights:
        raise ValueError(f"unknown weight {min(weights)}, expected the names of a model of this config")
    model.load_state_dict(state)


def from_official(config, weights):
    """A Model with the weights of the published NEPA code.

    config: dict in its names (hidden_size, num_hidden_layers, intermediate_size, use_gated_mlp, ...); what only matters
    in training and has no counterpart here (dropout, drop path, jitter of positions) is passed over. weights: see
    load_official. Raises ValueError for a model that is not offered and for weights that do not fit.
    """
    gated = config.get("use_gated_mlp", False)
    expected = {"is_causal": True, "qkv_bias": True, "hidden_act": "silu" if gated else "gelu"}
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"{name} {config[name]!r}, expected {value!r}")
    names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "mlp_hidden": "intermediate_size"}
    names |= {"gated_mlp": "use_gated_mlp", "norm_eps": "layer_norm_eps"}
    fields = {field.name: names.get(field.name, field.name) for field in dataclasses.fields(Config)}
    known = {ours: config[theirs] for ours, theirs in fields.items() if theirs in config}
    model = Model(Config(**known, rope_rescale=config.get("pos_embed_rescale") or 1.0))
    load_official(model, weights)
    return model


def read_weights(path):
    """Dict of tensors by name, from a torch state dict or an .npz (where some names begin with w:, those alone)."""
    try:
        if Path(path).suffix == ".npz":
            with np.load(path) as file:
                marked = [name for name in file.files if name.startswith("w:")]
                return {name.removeprefix("w:"): torch.from_numpy(file[name]) for name in marked or file.files}
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and zip errors come in many types
        expected = "an .npz or a state dict saved by torch.save"
        raise DataError(f"{path}: cannot be read ({first_line(error)}), expected {expected}") from None
    if not isinstance(weights, dict):
        raise DataError(f"{path}: holds {type(weights).__name__}, expected a state dict")
    for name, value in weights.items():
        if not isinstance(name, str) or not torch.is_tensor(value):
            raise DataError(f"{path}: {name!r} is {type(value).__name__}, expected tensors by name")
    return weights


# ---- the loss: the part people copy ---------------------------------------------------------------------------------


def prediction_loss(target, prediction):
    """NEPA's loss: minus the mean cosine between the prediction at t and the embedding at t + 1 (arXiv 2512.16922).

    target, prediction: [B, T, D] of any float dtype; no gradient reaches the target. CLS, at t = 0, predicts the first
    patch. Returns a float32 scalar in [-1, 1].
    """
    target, prediction = target.detach()[:, 1:].float(), prediction[:, :-1].float()
    lengths = target.norm(dim=-1).clamp(min=1e-4) * prediction.norm(dim=-1).clamp(min=1e-4)  # zero has no direction
    return -((target * prediction).sum(-1) / lengths).mean()


def intermediate_loss(embedding, hidden_states, prediction, weight=1.0):
    """The loss at every layer: loss_final + weight * mean of the loss over layers 1 .. L-1.

    embedding, prediction: [B, T, D]; hidden_states: list over layers 1 .. L of [B, T, D], taken from the raw residual
    stream. The last one is left out, since prediction is the same state normed; the embedding is no layer.
    Returns loss, loss_final (with gradient) and the list of the L-1 layers' losses (detached): float32 scalars.
    """
    # Normalised once: a copy of the target per layer would be kept for backward (4 % of all bytes; now .04 %).
    target = F.normalize(embedding.detach()[:, 1:].float(), dim=-1, eps=1e-4)

    def loss(state):
        state = state[:, :-1].float()
        return -((state * target).sum(-1) / state.norm(dim=-1).clamp(min=1e-4)).mean()

    loss_final, losses = loss(prediction), [loss(state) for state in hidden_states[:-1]]
    total = loss_final + weight * sum(losses) / len(losses) if losses else loss_final
    return total, loss_final, [value.detach() for value in losses]


# ---- data: the built-in world, CIFAR-10, and arrays of images -------------------------------------------------------

SIDE = 32  # pixels of the built-in world's and of CIFAR-10's images
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"


def textures(rng, labels):
    """float32 [N, 32, 32]: noise of one orientation and period, scaled to deviation 1.2 and squashed by tanh.

    labels: int [N] from 0 to 9; label % 5 is the orientation (0, 45, 90, 135 degrees, or none), label // 5 the period:
    fine, 5 to 6.5 pixels, or coarse, 1.8 times that.
    """
    n, kind = len(labels), (labels % 5)[:, None, None]
    period = rng.uniform(5, 6.5, n) * np.where(labels < 5, 1, 1.8)
    frequency = (1 / period).astype(np.float32)[:, None, None]
    angle = kind * np.float32(np.pi / 4) + rng.uniform(-0.12, 0.12, (n, 1, 1)).astype(np.float32)
    y0, x0 = frequency * np.sin(angle), frequency * np.cos(angle)
    y, x = np.fft.fftfreq(2 * SIDE)[:, None].astype(np.float32), np.fft.rfftfreq(2 * SIDE).astype(np.float32)
    wave = np.minimum((y - y0) ** 2 + (x - x0) ** 2, (y + y0) ** 2 + (x + x0) ** 2)
    distance = np.where(kind == 4, (np.hypot(y, x) - frequency) ** 2, wave)  # squared, to the frequencies that are kept
    noise = rng.standard_normal((2, *distance.shape), dtype=np.float32)
    spectrum = (noise[0] + 1j * noise[1]) * np.exp(-distance / (2 * 0.05**2))
    texture = np.fft.irfft2(spectrum, axes=(1, 2))[:, :SIDE, :SIDE]
    return np.tanh(1.2 * texture / texture.std(axis=(1, 2), keepdims=True)).astype(np.float32)


def distractors(rng, n):
    """bool [n, 32, 32]: a disc, square, triangle or ring at a random place, of random size and turn."""
    radius, turn = rng.uniform(3, 7, (n, 1, 1)), rng.uniform(0, 2 * np.pi, (n, 1, 1))
    cy, cx = rng.uniform(0, SIDE, (2, n, 1, 1))
    y, x = np.arange(SIDE)[:, None] + 0.5 - cy, np.arange(SIDE) + 0.5 - cx
    y, x, distance = y * np.cos(turn) + x * np.sin(turn), x * np.cos(turn) - y * np.sin(turn), np.hypot(y, x)
    triangle = np.maximum(-y, np.maximum(y + 3**0.5 * x, y - 3**0.5 * x) / 2) < radius / 2
    shapes = [distance < radius, np.maximum(abs(y), abs(x)) < 0.8 * radius, triangle, abs(distance - radius) < 1.2]
    return np.choose(rng.integers(4, size=(n, 1, 1)), shapes)


@functools.lru_cache
def make_world(seed):
    """Datasets train (8,000) and val (2,000) of labelled texture images, uint8 [N, 32, 32, 3], made from the seed.

    What carries the label, the statistics of a texture, is spread over the image and hidden from a linear probe on
    pixels; what catches the eye, colour, shading and a shape in front, says nothing about it.
    """
    rng, images = np.random.default_rng(seed), []
    labels = rng.permutation(np.arange(10_000) % 10)
    for part in np.array_split(labels, 10):
        n = len(part)
        wave = textures(rng, part)[..., None]
        ramp = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)[:, None]
        slope_y, slope_x = rng.uniform(-0.5, 0.5, (2, n, 1, 1, 3)).astype(np.float32)
        direction = rng.standard_normal((n, 1, 1, 3), dtype=np.float32)
        direction *= rng.uniform(0.3, 0.5, (n, 1, 1, 1)) / np.linalg.norm(direction, axis=-1, keepdims=True)
        image = rng.uniform(0.3, 0.7, (n, 1, 1, 3)) + direction * wave + slope_y * ramp[:, None] + slope_x * ramp
        image = np.where(distractors(rng, n)[..., None], rng.uniform(0.05, 0.95, (n, 1, 1, 3)), image)
        image += 0.04 * rng.standard_normal(image.shape, dtype=np.float32)
        images.append((255 * image.clip(0, 1)).round().astype(np.uint8))
    images = np.concatenate(images)
    return {"images": images[:8000], "labels": labels[:8000]}, {"images": images[8000:], "labels": labels[8000:]}


class HeldOut:
    """An array without one entry of every ten, or only those: len() and indexing with int64 arrays, nothing copied.

    Which of the ten is hashed: a fixed one would be a single class where labels come in turn.
    """

    def __init__(self, array, held_out):
        self.array, self.held_out = array, held_out

    def __len__(self):
        return len(self.array) // 10 if self.held_out else len(self.array) - len(self.array) // 10

    def __getitem__(self, index):
        tens = index if self.held_out else index // 9
        out = np.where(tens < len(self.array) // 10, mix(tens, 0) % np.uint64(10), 10).astype(np.int64)
        return self.array[10 * tens + (out if self.held_out else index % 9 + (index % 9 >= out))]


def open_cifar(files):
    """Dataset of CIFAR-10 binary batches: per record a label byte, then 32 x 32 pixels of red, of green, of blue."""
    images, labels = [], []
    for path in files:
        size, record = path.stat().st_size, 1 + 3 * SIDE**2
        if size == 0 or size % record:
            raise DataError(f"{path}: {size} bytes, expected records of {record}: a label and 3 x 32 x 32 pixels")
        records = np.memmap(path, np.uint8, "c").reshape(-1, record)
        labels.append(records[:, 0].astype(np.int64))
        if labels[-1].max() > 9:
            raise DataError(f"{path}: record {labels[-1].argmax()} has label {labels[-1].max()}, expected 0 to 9")
        images.append(torch.from_numpy(records[:, 1:].reshape(-1, 3, SIDE, SIDE)).permute(0, 2, 3, 1))
    return {"images": Concat(images, files), "labels": np.concatenate(labels)}


def open_arrays(folder, prefix=""):
    """Dataset of folder/{prefix}images.npy, uint8 [N, H, W, C], memory-mapped, and {prefix}labels.npy, integers [N]."""
    arrays, right = {}, {"images": (4, np.uint8, "uint8 [N, H, W, C]"), "labels": (1, np.integer, "integers [N]")}
    for name, (ndim, kind, expected) in right.items():
        path = folder / f"{prefix}{name}.npy"
        try:
            array = np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # missing, cut short, or objects
            what = f"cannot be read ({first_line(error)}), expected an array saved by np.save"
            raise DataError(f"{path}: {what}") from None
        if array.ndim != ndim or not np.issubdtype(array.dtype, kind) or 0 in array.shape:
            raise DataError(f"{path}: {array.dtype} {list(array.shape)}, expected {expected} with no empty dimension")
        arrays[name] = array
    arrays["labels"] = labels = arrays["labels"].astype(np.int64)
    if len(labels) != len(arrays["images"]):
        raise DataError(f"{path}: {len(labels)} labels, expected {len(arrays['images'])}, one per image")
    if labels.min() < 0 or labels.max() >= 10_000:
        bad = labels.argmin() if labels.min() < 0 else labels.argmax()
        raise DataError(f"{path}: entry {bad} is {labels[bad]}, expected classes from 0 to at most 9999")
    return arrays


def open_images(folder):
    """Datasets train and val of a folder: images uint8 [N, H, W, C] and labels int64 [N].

    It holds images.npy and labels.npy (and, for validation, val_images.npy and val_labels.npy), or CIFAR-10's
    data_batch_*.bin (and test_batch.bin), these also in a folder cifar-10-batches-bin. Without validation files one
    image of every ten is held out. Raises DataError for a file that is missing, unreadable or holds something else.
    """
    folder = Path(folder)
    if (folder / "images.npy").exists():
        train = open_arrays(folder)
        val = open_arrays(folder, "val_") if list(folder.glob("val_*.npy")) else None
    else:
        folder = folder / "cifar-10-batches-bin" if (folder / "cifar-10-batches-bin").is_dir() else folder
        files = sorted(folder.glob("data_batch_*.bin"))
        if not files:
            raise DataError(f"{folder}: no images, expected images.npy or data_batch_*.bin (see --download)")
        train = open_cifar(files)
        val = open_cifar([folder / "test_batch.bin"]) if (folder / "test_batch.bin").exists() else None
    if val is None:
        if size_of(train) < 10:
            raise DataError(f"{folder}: {size_of(train)} images, expected 10 or more: one of every ten is held out")
        train, val = ({name: HeldOut(array, part) for name, array in train.items()} for part in (False, True))
    shapes = [make_batch(part, np.array([0]), {}, None, pin=False)["images"].shape[1:] for part in (train, val)]
    if shapes[0] != shapes[1]:
        raise DataError(f"{folder}: validation images {list(shapes[1])}, expected {list(shapes[0])} as in training")
    return train, val


def download(url, md5, folder):
    """Fetch url, a tar archive with this md5 (hex), into folder and unpack it there. What is there already stays.

    A download that broke off goes on where it stopped. Raises DataError when it breaks off, when the checksum differs
    (only a bad download is removed) and when the archive would write outside the folder.
    """
    folder = Path(folder)
    archive = folder / url.rsplit("/", 1)[1]
    part = archive.with_name(archive.name + ".part")
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: is a file, expected a folder")
    folder.mkdir(parents=True, exist_ok=True)
    new = not archive.exists()
    if new:
        fetch(url, part)
    found = hashlib.md5()
    with open(part if new else archive, "rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    if found.hexdigest() != md5:
        if new:
            part.unlink()
        what = f"md5 {found.hexdigest()}, expected {md5}"
        raise DataError(f"{url}: {what}; the download was removed" if new else f"{archive}: {what}; it may be removed")
    if new:
        os.replace(part, archive)
    with tempfile.TemporaryDirectory(dir=folder) as unpacked:
        try:
            with tarfile.open(archive) as tar:
                tar.extractall(unpacked, filter="data")  # refuses what would land outside, links and devices
        except tarfile.TarError as error:
            raise DataError(f"{archive}: {first_line(error)}, expected an archive of plain files") from None
        for path in Path(unpacked).rglob("*"):
            target = folder / path.relative_to(unpacked)
            if path.is_file() and not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)


def fetch(url, part):
    """Write what url serves to the file part; what part holds already is not fetched again."""
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            have = have if response.status == 206 else 0  # 200: a server that starts from the beginning
            size = have + int(response.headers.get("Content-Length") or 0)
            with (
                open(part, "ab" if have else "wb") as file,
                tqdm(total=size, initial=have, unit="B", unit_scale=True, desc=part.stem) as bar,
            ):
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        if error.code != 416:  # 416: nothing is left to fetch
            raise DataError(f"{url}: {error}, expected the archive") from None
        return
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{url}: {first_line(error)}; --download again goes on from here") from None
    if part.stat().st_size < size:
        raise DataError(f"{url}: ended after {part.stat().st_size} of {size} bytes; --download again goes on from here")


def crop_boxes(position, height, width, args):
    """Random resized crop and flip, drawn for samples by their position: float32 [n, 5], in pixels.

    Each row is top, left, height, width, flipped (0 or 1). The crop has crop_scale to 1 of the area and an aspect ratio
    of 3:4 to 4:3, log-uniform, or the nearest with which it fits.
    """
    # Salts 8 * seed to 8 * seed + 4, and + 5 for the stretching of positions: no two seeds share one.
    area, ratio, top, left, flip = (mix(position, 8 * args.seed + k) / 2**64 for k in range(5))
    area = height * width * (args.crop_scale + (1 - args.crop_scale) * area)
    ratio = ((4 / 3) ** (2 * ratio - 1)).clip(area / height**2, width**2 / area)
    h, w = np.sqrt(area / ratio), np.sqrt(area * ratio)
    return np.stack([top * (height - h), left * (width - w), h, w, flip < args.flip_prob], 1).astype(np.float32)


def resize_weights(start, length, size_in, size_out):
    """Weights [B, size_out, size_in] of a bilinear, antialiased resampling of `length` pixels from `start` on.

    start, length: float [B]. At the borders of a crop it also reads the pixels beside it.
    """
    step = (length / size_out)[:, None, None]
    centre = start[:, None, None] + (torch.arange(size_out, device=start.device)[:, None] + 0.5) * step
    pixel = torch.arange(size_in, device=start.device) + 0.5
    weights = (1 - (pixel - centre).abs() / step.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(-1, keepdim=True)


def prepare(batch, size):
    """Images uint8 [B, H, W, C] -> float32 [B, C, size, size] in [-1, 1], on their device: one product per axis.

    Cut and flipped as batch["boxes"] says (see crop_boxes), or, without it, to the largest square in the middle.
    """
    images = batch["images"].permute(0, 3, 1, 2).float()
    B, _, H, W = images.shape
    if "boxes" in batch:
        top, left, height, width, flip = batch["boxes"].unbind(1)
    else:
        height = width = torch.full((B,), float(min(H, W)), device=images.device)
        top, left = (H - height) / 2, (W - width) / 2
    vertical, horizontal = resize_weights(top, height, H, size), resize_weights(left, width, W, size)
    if "boxes" in batch:
        horizontal = torch.where(flip[:, None, None] > 0, horizontal.flip(1), horizontal)
    with torch.autocast(images.device.type, enabled=False):
        return vertical[:, None] @ images @ horizontal[:, None].transpose(2, 3) / 127.5 - 1


def make_data(args):
    """The run's datasets and what the shared part needs to know about them (listed there). Raises DataError."""
    if args.download:
        download(CIFAR_URL, CIFAR_MD5, args.data_dir)
    train, val = open_images(args.data_dir) if args.data_dir else make_world(args.seed)
    height, width, channels = make_batch(val, np.array([0]), {}, None, pin=False)["images"].shape[1:]

    def collate(picked, extra):
        if "position" not in extra:
            return picked
        return {"images": picked["images"], "boxes": crop_boxes(extra["position"], height, width, args)}

    size = args.image_size or min(height, width)
    if size % args.patch_size:
        what = f"images are {height} x {width} x {channels}, expected --patch_size {args.patch_size} to divide a side"
        raise DataError(f"{args.data_dir}: {what}; or give --image_size")
    flags = {field.name: getattr(args, field.name) for field in dataclasses.fields(Config) if hasattr(args, field.name)}
    config = dataclasses.asdict(Config(**flags | {"image_size": size, "num_channels": channels}))

    def init(model):
        if args.init_from:
            weights = read_weights(args.init_from)
            try:
                load_official(model, weights)
            except ValueError as error:
                raise DataError(f"{args.init_from}: {error}") from None

    data = {"train": train, "val": val, "collate": collate, "config": config, "init": init}
    return data | {"baselines": lambda: baselines(data, args), "describe": describe, "report": report}


def describe(metrics):
    """One line for the progress bar."""
    titles = {"loss": "Loss", "loss_final": "Final", "loss_intermediate": "Intermediate"}
    titles |= {"knn_acc": "kNN", "probe_acc": "Probe"}
    return " | ".join(f"{title}: {metrics[name]:.4f}" for name, title in titles.items() if name in metrics)


def report(metrics):
    """The closing table: the features beside those that need no training, the loss beside trivial predictions."""
    lines = [f"{'frozen features':32}{'kNN':>8}{'probe':>8}"]
    for title, prefix in {"this model": "", "untrained network": "untrained_", "raw pixels": "raw_"}.items():
        lines.append(f"{title:32}" + "".join(f"{metrics[prefix + name]:8.4f}" for name in ("knn_acc", "probe_acc")))
    lines.append(f"{'prediction of the next patch':32}{'loss':>8}")
    rows = {"this model": "loss_final", "its layers before the last": "loss_intermediate"}
    rows |= {"the best constant": "constant_loss", "the patch before": "copy_loss"}
    lines += [f"{title:32}{metrics[name]:8.4f}" for title, name in rows.items() if name in metrics]
    directions = "target patches: mean cosine {embed_cos:.4f}, effective rank {effective_rank:.1f}".format_map(metrics)
    return "\n".join([*lines, directions, describe(metrics)])


# ---- one update, evaluation -----------------------------------------------------------------------------------------


def compute_loss(model, batch, state, args):
    """The loss of one micro-batch: images cut and flipped on the device, one RoPE scale for the whole update.

    Returns this micro-batch's share of the update's loss, metrics as (sum, count) pairs, and no state.
    """
    c = unwrap(model).config
    draw = 2 * float(mix(np.array([batch["step"]]), 8 * args.seed + 5)[0]) / 2**64 - 1
    scale = torch.full((), c.rope_rescale**draw, device=batch["images"].device)
    output = model(prepare(batch, c.image_size), scale)
    hidden_states = output.hidden_states if args.use_intermediate_loss else []
    loss, loss_final, layers = intermediate_loss(
        output.embedding, hidden_states, output.prediction, args.intermediate_loss_weight
    )
    values = {"loss": loss.detach(), "loss_final": loss_final.detach()} | by_layer(layers)
    return batch["share"] * loss, weigh(values, len(batch["images"])), None


def by_layer(layers):
    """The layers' losses and their mean, as metrics."""
    named = {f"loss_layer_{i}": loss for i, loss in enumerate(layers, start=1)}
    return {"loss_intermediate": sum(layers) / len(layers), **named} if layers else {}


def features(output, args):
    """What the probes see, [B, D] float32 on the CPU: the mean over patches of the output, or of --probe_layer."""
    layer = args.probe_layer
    states = output.prediction if layer is None else [output.embedding, *output.hidden_states][layer]
    return states[:, 1:].float().mean(1).cpu()


def probe_batches(data, args, first=0, every=1):
    """Batches of --probe_samples labelled training images: always the same ones, neither cut nor flipped."""
    size = size_of(data["train"])
    index = np.arange(min(args.probe_samples, size))
    index = np.sort(permuted(index, size, mix(0 * index, 0)))
    for start in range(first * args.batch_size, len(index), every * args.batch_size):
        batch = make_batch(data["train"], index[start : start + args.batch_size], {}, data["collate"], pin=False)
        yield {name: value.to(args.device) for name, value in batch.items()}


@torch.no_grad()
def evaluate(model, data, args):
    """Validation means of the losses, and how good the frozen features are. Draws nothing from torch's generator."""
    size, D = model.config.image_size, model.config.hidden_size
    sums, known, tested = {}, [], []
    mean, moment, count = torch.zeros(D), torch.zeros(D, D, dtype=torch.float64), 0
    split = (rank(), world_size(), args.eval_samples)
    for batch in fixed_batches(data["val"], args.batch_size, args.device, *split, data["collate"]):
        with autocast(args):
            output = model(prepare(batch, size))
        embedding = output.embedding.float()
        loss, loss_final, layers = intermediate_loss(*output, args.intermediate_loss_weight)
        values = {"loss_final": loss_final, "copy_loss": prediction_loss(embedding, embedding)} | by_layer(layers)
        values["loss"] = loss if args.use_intermediate_loss else loss_final
        add(sums, weigh(values, len(embedding)))
        units = F.normalize(embedding[:, 1:].flatten(0, 1), dim=1)
        units = units.cpu() if units.device.type == "mps" else units
        units = units.double()  # rounding in float32 looks like directions that are not there
        mean, moment, count = mean + units.sum(0).cpu(), moment + (units.T @ units).cpu(), count + len(units)
        tested.append((features(output, args), batch["labels"].cpu()))
    for batch in probe_batches(data, args, rank(), world_size()):
        with autocast(args):
            known.append((features(model(prepare(batch, size)), args), batch["labels"].cpu()))
    *totals, known, tested = zip(*gather((mean, moment, count, known, tested)))
    # Batches were dealt out in turn: back in file order, the probes see the same whatever the number of processes.
    pairs = ([batch for turn in itertools.zip_longest(*dealt) for batch in turn if batch] for dealt in (known, tested))
    metrics = means(sums)
    if not math.isfinite(metrics["loss"]):  # the shared part names it and stops
        return metrics
    return metrics | collapse(*map(sum, totals)) | probe(*pairs)


def collapse(mean, moment, count):
    """How far the target patches, as unit vectors u, have collapsed to few directions.

    mean: sum of u, [D]; moment: sum of u u^T, [D, D]; count: their number. Returns the mean cosine of two of them, the
    effective rank (exp of the entropy of the singular values, Roy and Vetterli 2007: from 1, one direction, to D) and
    the loss of the best constant prediction, which is their mean direction.
    """
    length = float(mean.norm())
    singular = torch.linalg.eigvalsh(moment.double()).clamp(min=0).sqrt()
    singular = singular / singular.sum()
    return {
        "embed_cos": (length**2 - count) / (count * max(count - 1, 1)),
        "effective_rank": float(torch.special.entr(singular).sum().exp()),
        "constant_loss": -length / count,
    }


def probe(known, tested):
    """Accuracy on tested of kNN and a ridge probe, both fitted on known: lists of (features [B, D], labels [B])."""
    (x, y), (test_x, test_y) = ([torch.cat(parts) for parts in zip(*pairs)] for pairs in (known, tested))
    mean = x.double().mean(0)
    x, test_x = x.double() - mean, test_x.double() - mean
    return {"knn_acc": knn(x, y, test_x, test_y), "probe_acc": ridge(x, y, test_x, test_y)}


def knn(x, y, test_x, test_y, k=20, size=64):
    """Accuracy of the vote of the k nearest known samples, by the cosine after PCA whitening to size dimensions."""
    with torch.random.fork_rng(devices=[]):  # the randomised SVD must not disturb the training's generator
        torch.default_generator.manual_seed(0)
        _, deviation, axes = torch.svd_lowrank(x, min(size + 32, *x.shape), niter=4)  # 32 more make the last ones exact
    # A mean of LayerNorm's outputs has no variance along its gain: what rounding leaves there is not to be blown up.
    kept = deviation[:size] > 1e-5 * deviation.max()
    axes = (axes / deviation)[:, :size][:, kept]
    near, far = (F.normalize(v @ axes, dim=1) for v in (x, test_x))
    nearest = torch.cat([(part @ near.T).topk(min(k, len(x)), dim=1).indices for part in far.split(1000)])
    return float((y[nearest].mode(dim=1).values == test_y).double().mean())


def ridge(x, y, test_x, test_y):
    """Accuracy of ridge regression to the one-hot labels, the penalty chosen on a fifth of the known samples."""
    std = x.std(0, correction=0)
    std = std.clamp(min=max(1e-6 * float(std.max()), 1e-30))  # a feature that never changes stays zero
    x, test_x, targets = x / std, test_x / std, F.one_hot(y).double()

    def fit(x, targets):
        """penalty -> weights, by the smaller of the two equivalent systems."""
        wide = x.shape[1] > len(x)
        gram, offset = x @ x.T if wide else x.T @ x, targets.mean(0)
        right = targets - offset if wide else x.T @ (targets - offset)

        def solve(penalty):
            eye = torch.eye(len(gram), dtype=gram.dtype)
            solution = torch.cholesky_solve(right, torch.linalg.cholesky(gram + penalty * len(x) * eye))
            return lambda v: v @ (x.T @ solution if wide else solution) + offset

        return solve

    def accuracy(predict, x, y):
        return float((predict(x).argmax(1) == y).double().mean())

    held_out = torch.from_numpy(mix(np.arange(len(x)), 0) % np.uint64(5) == 0)
    solve, best = fit(x[~held_out], targets[~held_out]), (0.0, 1.0)
    for exponent in range(1, -7, -1):
        found = accuracy(solve(10.0**exponent), x[held_out], y[held_out])
        best = max(best, (found, 10.0**exponent))
        if found < best[0] - 0.02:  # past the best; raw pixels make every further one expensive
            break
    return accuracy(fit(x, targets)(best[1]), test_x, test_y)


@torch.no_grad()
def baselines(data, args):
    """kNN and probe accuracy of features that need no training, as final metrics. One process computes them."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)  # the weights a run starts from without --init_from
        model = Model(Config(**data["config"])).to(args.device).eval()
    size = model.config.image_size
    seen = {"untrained_": ([], []), "raw_": ([], [])}
    val = fixed_batches(data["val"], args.batch_size, args.device, limit=args.eval_samples, collate=data["collate"])
    for i, batches in enumerate((probe_batches(data, args), val)):
        for batch in batches:
            labels = batch["labels"].cpu()
            with autocast(args):
                seen["untrained_"][i].append((features(model(prepare(batch, size)), args), labels))
            seen["raw_"][i].append((prepare(batch, min(size, SIDE)).flatten(1).cpu(), labels))
    return {prefix + name: value for prefix, pairs in seen.items() for name, value in probe(*pairs).items()}


# ---- flags ----------------------------------------------------------------------------------------------------------


def add_method_args(parser):
    """Add this script's flags. Returns the flag that brings real data, the demonstration's defaults, the flags that
    --eval_only may be given anew, and check(args, given), which calls parser.error for what makes no sense together
    (given: the names on the command line).
    """
    flag = parser.add_argument_group("data").add_argument
    flag("--data_dir", help="folder of CIFAR-10's .bin files or of images.npy and labels.npy; without it, textures")
    flag("--download", **BOOLEAN, help="fetch CIFAR-10 (162 MB) into --data_dir first")
    flag("--image_size", type=number(1), help="side of the images the model sees (default: the data's shorter side)")
    flag("--crop_scale", type=number(0.01, 1.0), default=0.35, help="smallest part of the area a random crop keeps")
    flag("--flip_prob", type=number(0.0, 1.0), default=0.5, help="part of the images flipped left to right")
    flag = parser.add_argument_group("model").add_argument
    flag("--patch_size", type=number(1), default=4, help="side of a patch")
    flag("--hidden_size", type=number(4), default=96, help="width; 4 * num_heads divides it")
    flag("--num_layers", type=number(1), default=6, help="blocks")
    flag("--num_heads", type=number(1), default=3, help="attention heads")
    flag("--mlp_hidden", type=number(1), help="width of the MLP (default: 4 * hidden_size)")
    flag("--gated_mlp", **BOOLEAN, help="SwiGLU instead of GELU")
    flag("--qk_norm", **{**BOOLEAN, "default": True}, help="LayerNorm on queries and keys")
    flag("--qk_norm_affine", **BOOLEAN, help="with a gain and a shift")
    flag("--layerscale_value", type=number(0.0), default=1.0, help="initial LayerScale; published: 1e-5, for long runs")
    flag("--rope_rescale", type=number(1.0), default=2.0, help="largest random stretching of the positions in training")
    flag("--init_from", help="published weights to start from: an .npz or a torch state dict")
    flag = parser.add_argument_group("deep supervision").add_argument
    flag("--use_intermediate_loss", **BOOLEAN, help="the loss at every layer, not only at the last")
    flag("--intermediate_loss_weight", type=number(0.0), default=1.0, help="weight of the mean over layers 1 .. L-1")
    flag = parser.add_argument_group("probes").add_argument
    flag("--probe_layer", type=number(0), help="features of this layer, 0: the embedding (default: the normed output)")
    flag("--probe_samples", type=number(10), default=4000, help="labelled training images the probes may use")
    parser.set_defaults(
        batch_size=64, max_train_steps=1500, lr=2e-3, weight_decay=0.05, min_lr_ratio=0.0, ema_decay=0.99
    )
    demo = {"hidden_size": 64, "num_layers": 4, "num_heads": 2, "lr": 1e-3, "max_train_steps": 400, "warmup_steps": 20}
    demo |= {"eval_interval": 100}

    def check(args, given):
        args.download = bool(given.get("download"))  # a resumed run has its data
        if args.download and not args.data_dir:
            parser.error("--download needs the --data_dir to download to")
        if args.download and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            parser.error("--download runs in one process: start python nepa_deep.py --download once, then torchrun")
        if args.hidden_size % (4 * args.num_heads):
            parser.error(
                f"--hidden_size {args.hidden_size} must be a multiple of 4 * --num_heads = {4 * args.num_heads}"
            )
        size = args.image_size or (0 if args.data_dir else SIDE)  # 0: known when the data are
        if size % args.patch_size:
            parser.error(f"--image_size {size} must be a multiple of --patch_size {args.patch_size}")
        if args.use_intermediate_loss and args.num_layers < 2:
            parser.error("--use_intermediate_loss needs --num_layers 2 or more; the last layer has its loss anyway")
        if "intermediate_loss_weight" in given and not args.use_intermediate_loss:
            parser.error("--intermediate_loss_weight needs --use_intermediate_loss")
        if args.qk_norm_affine and not args.qk_norm:
            parser.error("--qk_norm_affine needs --qk_norm")
        if args.probe_layer is not None and args.probe_layer > args.num_layers:
            parser.error(f"--probe_layer {args.probe_layer} must be at most --num_layers {args.num_layers}")

    return "data_dir", demo, {"probe_layer", "probe_samples"}, check


# ==== shared: identical in nepa_deep.py, trm_deep.py, jepa_lm.py =====================================================
# Trains whatever stands above. All it uses of it: Config, Model(config), add_method_args(parser),
# compute_loss(model, batch, state, args) -> loss, metrics, state    evaluate(model, data, args) -> means with a "loss"
# make_data(args) -> dict: train, val (datasets as data.py wants them), collate, config (Config's fields), baselines()
# -> metrics of the final line, describe(metrics) -> text for the progress bar, report(metrics) -> text at the end; and,
# where a run may start from other weights than random ones, init(model); where the data of a resumed run must have the
# old one's sizes, split (a dict).


# ---- processes, precision, metrics ----


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """The tensor, summed over the processes in place: CPU tensors travel by gloo, CUDA tensors by nccl."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def unwrap(model):
    """The Model inside torch.compile and DistributedDataParallel."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


def autocast(args):
    """Mixed precision as --dtype says; float32 is none at all."""
    device_type = torch.device(args.device).type
    return torch.autocast(device_type, getattr(torch, args.dtype), enabled=args.dtype != "float32")


def weigh(values, count):
    """Means over count samples (dict of floats or scalar tensors) as (sum, count) pairs; never syncs."""
    return {name: (value * count, count) for name, value in values.items()}


def add(sums, pairs):
    """Add (sum, count) pairs to the running ones, by name."""
    for name, (value, count) in pairs.items():
        total, n = sums.get(name, (0.0, 0.0))
        sums[name] = (total + value, n + count)


def first_line(error):
    """What an exception says, in one line."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def gather(value):
    """value of every process (anything that pickles), as a list in order of rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def means(sums):
    """Means over everything added, on all processes; a metric without samples is left out. A CPU-GPU sync point."""
    totals = {}
    for pairs in gather({name: (float(total), float(count)) for name, (total, count) in sums.items()}):
        add(totals, pairs)
    return {name: total / count for name, (total, count) in totals.items() if count}


# ---- flags ----


def number(low, high=None):
    """An argparse type: a number of low's own type (int or float), from low to high (None: what float32 can count)."""
    limit = high if high is not None else 2**53 if isinstance(low, int) else 1e38

    def parse(text):
        try:
            value = type(low)(text)
        except ValueError:
            value = math.nan
        if not low <= value <= limit:
            kind = "an integer" if isinstance(low, int) else "a number"
            most = "" if high is None else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"{text!r}, expected {kind} of at least {low}{most}")
        return value

    return parse


def true_or_false(text):
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r}, expected True or False")
    return text.lower() == "true"


BOOLEAN = {"type": true_or_false, "nargs": "?", "const": True, "default": False, "metavar": "True|False"}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    def __init__(self, prog, **_):
        super().__init__(prog, max_help_position=36, width=120)  # a line for each flag, as wide as the text above

    def _get_default_metavar_for_optional(self, action):
        return "X"

    def _get_help_string(self, action):
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


# What --resume may be given anew; of batch_size and grad_accum only the product with the processes has to stay.
MAY_CHANGE = {"batch_size", "grad_accum", "max_train_steps", "eval_interval", "log_interval", "save_interval"}
MAY_CHANGE |= {"device", "compile", "wandb_mode", "wandb_project", "run_name", "out_dir", "resume", "overwrite"}
EVALUATION = {"eval_only", "eval_samples", "dtype"}  # and what --eval_only may be given beside those


def parse_args():
    """The flags in force and, with --resume or --eval_only, the checkpoint. Refuses what makes no sense (exit 2)."""
    script = Path(__file__).stem
    usage = "python %(prog)s [flags]      (--help lists them)"
    parser = argparse.ArgumentParser(None, usage, __doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    flag = parser.add_argument_group("training").add_argument
    flag("--batch_size", type=number(1), default=32, help="samples per micro-batch and process")
    flag("--grad_accum", type=number(1), default=1, help="micro-batches per update")
    flag("--max_train_steps", type=number(1), default=1000, help="updates in all")
    flag("--lr", "--learning_rate", type=number(0.0), default=1e-3, help="peak learning rate")
    flag("--min_lr_ratio", type=number(0.0, 1.0), default=0.1, help="end of the cosine, in parts of --lr; 1: constant")
    flag("--warmup_steps", type=number(0), default=100, help="updates of linear warm-up")
    flag("--weight_decay", type=number(0.0), default=0.1, help="AdamW's, on matrices only")
    flag("--beta1", type=number(0.0, 0.999999), default=0.9, help="AdamW's")
    flag("--beta2", type=number(0.0, 0.999999), default=0.95, help="AdamW's")
    flag("--grad_clip", type=number(0.0), default=1.0, help="largest norm of the gradient; 0: no limit")
    flag("--ema_decay", type=number(0.0, 0.999999), default=0.0, help="of the averaged weights to evaluate; 0: none")
    flag("--seed", type=number(0, 2**32 - 1), default=0, help="of the weights, the order and the built-in world")
    flag = parser.add_argument_group("machine").add_argument
    flag("--device", default="auto", help="auto (CUDA if there), cpu, cuda, mps, ...")
    flag("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto", help="auto: bfloat16 on CUDA")
    flag("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile; auto: on CUDA")
    flag("--grad_checkpoint", **BOOLEAN, help="recompute in the backward pass: the same gradient, less memory")
    flag = parser.add_argument_group("evaluation, output").add_argument
    flag("--eval_interval", type=number(1), default=500, help="updates between evaluations")
    flag("--eval_samples", type=number(0), default=0, help="validation samples to use; 0: all")
    flag("--log_interval", type=number(1), default=100, help="updates between lines of metrics.jsonl")
    flag("--save_interval", type=number(0), default=500, help="updates between checkpoints; 0: with best.pt only")
    flag("--out_dir", help=f"folder of the run (default: a new out/{script}-DATE-TIME)")
    flag("--overwrite", **BOOLEAN, help="replace what is already there")
    flag("--resume", **BOOLEAN, help="go on with the run in --out_dir, with its flags")
    flag("--eval_only", **BOOLEAN, help="evaluate the best checkpoint of the run in --out_dir")
    flag("--wandb_mode", choices=["disabled", "offline", "online"], default="disabled", help="Weights & Biases")
    flag("--wandb_project", default="deep-supervision", help="Weights & Biases")
    flag("--run_name", help="Weights & Biases (default: the folder's name)")
    data_flag, demo, evaluation, check = add_method_args(parser)
    sizes = " ".join(f"--{name} {value}" for name, value in demo.items())
    parser.epilog = f"Without --{data_flag} the demonstration has defaults of its own:\n{sizes}"

    defaults = vars(parser.parse_args([]))
    unset = object()
    parsed = vars(parser.parse_args(namespace=argparse.Namespace(**dict.fromkeys(defaults, unset))))
    given = {name: value for name, value in parsed.items() if value is not unset}
    for name in (name for name, value in given.items() if value == ""):
        parser.error(f"--{name} is empty, expected a value")  # a shell variable that is not set
    base, checkpoint = {} if given.get(data_flag) else demo, None
    if given.get("resume") or given.get("eval_only"):
        if "out_dir" not in given or given.get("resume") and (given.get("eval_only") or given.get("overwrite")):
            parser.error(
                "--resume or --eval_only needs the --out_dir of a run; --resume excludes --eval_only, --overwrite"
            )
        folder = Path(given["out_dir"])
        names = ["best.pt", "ckpt.pt"] if given.get("eval_only") else ["ckpt.pt"]
        path = next((folder / name for name in names if (folder / name).exists()), folder / "ckpt.pt")
        checkpoint = load_checkpoint(path, script)
        base = {name: value for name, value in checkpoint["args"].items() if name not in ("resume", "overwrite")}
        free = MAY_CHANGE if given.get("resume") else MAY_CHANGE | evaluation | {data_flag, *EVALUATION}
        for name, value in given.items():
            if given.get("eval_only") and name in evaluation & checkpoint["config"].keys():
                checkpoint["config"][name] = value  # a shape that any weights fit
            if name not in free and value != base.get(name):
                parser.error(f"--{name} {value} conflicts with the run in {folder}, which has {base.get(name)}")
    args = argparse.Namespace(**{**defaults, **base, **given})
    if given.get("resume") and args.max_train_steps < checkpoint["step"]:
        parser.error(f"--max_train_steps {args.max_train_steps} lies before the checkpoint's step {checkpoint['step']}")
    check(args, given)
    if args.out_dir is None:
        args.out_dir = f"out/{script}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}"
    if checkpoint is None and not args.overwrite and any((Path(args.out_dir) / name).exists() for name in RUN_FILES):
        parser.error(f"--out_dir {args.out_dir} holds a run; --resume continues it, --overwrite replaces it")
    args.flags = vars(args).copy()  # as asked for, before auto is resolved: what the checkpoint and wandb keep
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda":
        args.device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # every backend has its own way to say that it is not there
        parser.error(f"--device {args.device}: {first_line(error)}")
    on_cuda = args.device.startswith("cuda")
    if args.dtype == "auto":
        args.dtype = "bfloat16" if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if args.compile == "auto":
        args.compile = "on" if on_cuda else "off"
    return args, checkpoint


# ---- checkpoints ----

RUN_FILES = ("ckpt.pt", "best.pt", "metrics.jsonl")  # in the order in which --overwrite removes them
CHECKPOINT_KEYS = {"script", "step", "config", "args", "model", "ema", "optimizer", "scaler", "rng", "state", "sums"}
CHECKPOINT_KEYS |= {"split", "evaluated", "best", "seconds", "wandb_id"}


def write_atomically(path, write):
    """write(file) into a temporary file beside path, then rename: path holds the old content or the new, never half.

    Raises DataError when that fails, on a full disk for one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except Exception as error:  # torch.save has its own types
        raise DataError(f"{path}: cannot be written ({first_line(error)}), expected a folder with room") from None
    finally:
        temporary.unlink(missing_ok=True)  # a full disk keeps no half file


def load_checkpoint(path, script):
    """The checkpoint at path as a dict on the CPU. Raises DataError if it is none, or another script's."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        written_by = checkpoint["script"]
    except FileNotFoundError:
        raise DataError(f"{path}: no such file, expected the checkpoint of a run") from None
    except Exception as error:  # unpickling and zip errors come in many types
        raise DataError(f"{path}: cannot be read ({first_line(error)}), expected the checkpoint of a run") from None
    if written_by != script:
        raise DataError(f"{path}: written by {written_by}.py, expected a checkpoint of {script}.py")
    if missing := CHECKPOINT_KEYS - checkpoint.keys():
        raise DataError(f"{path}: holds no {', '.join(sorted(missing))}, expected the checkpoint of a run")
    return checkpoint


# ---- optimizer ----


def learning_rate(step, args):
    """Linear warm-up, then a cosine from lr to lr * min_lr_ratio at the last update."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_train_steps - args.warmup_steps)
    return args.lr * (args.min_lr_ratio + (1 - args.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(progress, 1))))


def make_optimizer(model, args):
    """AdamW, weight decay on matrices only; fused (one kernel for all parameters) where torch has it."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    fused = True if args.device.startswith(("cpu", "cuda")) else None
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=fused)


# ---- log ----


class Log:
    """metrics.jsonl, Weights & Biases and the terminal. Only the first process writes."""

    def __init__(self, args, describe, checkpoint):
        self.args, self.describe, self.wandb = args, describe, None
        self.wandb_id = checkpoint["wandb_id"] if checkpoint else None
        if rank() > 0:
            return
        self.path = Path(args.out_dir) / "metrics.jsonl"
        if checkpoint and self.path.exists():
            lines = self.older_lines(checkpoint)
            write_atomically(self.path, lambda file: file.write("".join(line + "\n" for line in lines).encode()))
        if args.wandb_mode != "disabled":
            try:
                import wandb

                self.wandb = wandb.init(
                    project=args.wandb_project,
                    name=args.run_name or Path(args.out_dir).name,
                    dir=args.out_dir,
                    id=self.wandb_id,
                    resume="allow",
                    mode=args.wandb_mode,
                    config=args.flags,
                )
            except Exception as error:
                raise DataError(f"--wandb_mode {args.wandb_mode}: {first_line(error)}") from None
            self.wandb_id = self.wandb.id
        terminal = sys.stdout.isatty() and sys.stderr.isatty()
        start = checkpoint["step"] if checkpoint else 0
        self.bar = tqdm(total=args.max_train_steps, initial=start, disable=not terminal, dynamic_ncols=True)

    def older_lines(self, checkpoint):
        """The lines up to the checkpoint: what was logged after it will be logged again."""
        newest, lines = {"train": checkpoint["step"], "val": checkpoint["evaluated"]}, []
        for n, line in enumerate(whole := self.path.read_text(errors="replace").splitlines(), 1):
            try:
                record = json.loads(line)
                if record["step"] <= newest.get(record["split"], -1):
                    lines.append(line)
            except (ValueError, TypeError, KeyError, RecursionError):
                if n < len(whole):  # the last one may be half: the process died while it wrote it
                    raise DataError(f"{self.path}:{n}: cannot be read, expected JSON with step and split") from None
        return lines

    def write(self, step, split, metrics):
        """One line: to the file, to wandb under the same names (val/ and final/ before theirs), and for people."""
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise DataError(f"step {step}: {split} {name} is {value}, expected a finite number")
        if rank() > 0:
            return
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps({"step": step, "split": split, **metrics}) + "\n")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror}), expected room for a line") from None
        if self.wandb:
            prefix = "" if split == "train" else split + "/"
            self.wandb.log({prefix + name: value for name, value in metrics.items()}, step=step)
        if split != "final":
            text = f"Step {step}/{self.args.max_train_steps}, {split.capitalize()} {self.describe(metrics)}"
            if self.bar.disable or split == "val":
                self.say(text)
            else:
                self.bar.set_description_str(text)

    def say(self, text):
        if rank() == 0:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def advance(self):
        if rank() == 0:
            self.bar.update()

    def close(self):
        if rank() == 0:
            self.bar.close()
        if self.wandb:
            self.wandb.finish()


# ---- the run ----


def fit(now, then, source):
    """Raise DataError unless what the data and flags say (now, a dict) is what the checkpoint says (then)."""
    for name, value in now.items():
        if value != then.get(name):
            raise DataError(f"{source}: {name} is {value!r}, expected {then.get(name)!r} as in the checkpoint")


def train(args, checkpoint):
    """Train, evaluate, save: the whole loop in sight. Returns the exit code, 128 + the number of a signal after one."""
    data, out_dir, accum = make_data(args), Path(args.out_dir), args.grad_accum
    num_rows, size = args.batch_size * accum * world_size(), size_of(data["train"])
    split = {"--batch_size * --grad_accum * processes": num_rows, "number of training samples": size}
    split |= data.get("split", {})
    if num_rows > size:
        raise DataError(f"--batch_size * --grad_accum * processes is {num_rows}, expected at most {size}, all samples")
    torch.manual_seed(args.seed)
    model = Model(Config(**data["config"])).to(args.device)
    if "init" in data and not checkpoint:
        data["init"](model)
    model.grad_checkpoint = args.grad_checkpoint
    ema = copy.deepcopy(model).requires_grad_(False) if args.ema_decay else None
    optimizer = make_optimizer(model, args)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.dtype == "float16")
    net = torch.compile(model) if args.compile == "on" else model
    if dist.is_initialized():
        net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)

    # All that changes during a run: the checkpoint holds it, so the resumed run is the one that was never interrupted.
    step, evaluated, best, sums, states, seconds = 0, -1, {"loss": math.inf}, {}, [None] * accum, 0.0
    if checkpoint:
        fit(data["config"], checkpoint["config"], out_dir)
        fit(split, checkpoint["split"], out_dir)
        try:
            model.load_state_dict(checkpoint["model"])
            if ema:
                ema.load_state_dict(checkpoint["ema"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            scaler.load_state_dict(checkpoint["scaler"])
        except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(f"{out_dir}: the checkpoint has other contents ({first_line(error)})") from None
        step, evaluated, best, seconds = (checkpoint[name] for name in ("step", "evaluated", "best", "seconds"))
        if len(checkpoint["sums"]) == world_size():  # with another number of processes the next line's means start anew
            sums = checkpoint["sums"][rank()]
        if checkpoint["state"]:
            mine = {name: value.split(args.batch_size) for name, value in checkpoint["state"].items()}
            for micro in range(accum):
                states[micro] = {name: rows[rank() * accum + micro].to(args.device) for name, rows in mine.items()}
        on_cpu, on_cuda = checkpoint["rng"][rank() % len(checkpoint["rng"])]
        torch.set_rng_state(on_cpu)
        if on_cuda is not None and args.device.startswith("cuda"):
            torch.cuda.set_rng_state(on_cuda)
    if rank() == 0:
        out_dir.mkdir(parents=True, exist_ok=True)
        for name in RUN_FILES:
            (out_dir / (name + ".tmp")).unlink(missing_ok=True)  # of a process killed while it wrote
            if args.overwrite and not checkpoint:
                (out_dir / name).unlink(missing_ok=True)
    log = Log(args, data["describe"], checkpoint)
    count = f"{sum(p.numel() for p in model.parameters()):,} parameters, {size:,} training samples"
    log.say(f"{Path(__file__).stem}: {count}, {world_size()} x {args.device} {args.dtype} -> {out_dir}")

    first_bad = torch.full((2,), -1, device=args.device)  # first update whose loss, gradient norm was not finite

    def stop_if_broken():
        for name, bad in zip(("loss", "grad_norm"), first_bad.tolist()):
            if bad >= 0:
                raise DataError(f"step {bad + 1}: train {name} is not finite, expected a number; the checkpoint stays")
        if scaler.is_enabled() and scaler.get_scale() < 1:  # it has been halved at every update for a long time
            raise DataError(f"step {step}: train grad_norm overflows float16, expected finite; try --dtype bfloat16")

    def save(name):
        stop_if_broken()
        if not all(p.isfinite().all() for p in params):  # the last update's doing: its own loss was still a number
            raise DataError(f"step {step}: train weights are not finite, expected numbers; the checkpoint stays")
        on_cpu = [state and {key: value.cpu() for key, value in state.items()} for state in states]
        rng = [torch.get_rng_state(), torch.cuda.get_rng_state() if args.device.startswith("cuda") else None]
        mine = ({key: (float(total), float(n)) for key, (total, n) in sums.items()}, on_cpu, rng)
        kept = [mine] * world_size()
        if dist.is_initialized():
            dist.gather_object(mine, kept if rank() == 0 else None)
        if rank() > 0:
            return
        in_order = [state for _, states, _ in kept for state in states]  # by rows, however they are split
        contents = {
            "script": Path(__file__).stem,
            "step": step,
            "config": dataclasses.asdict(model.config),
            "args": args.flags,
            "model": model.state_dict(),
            "ema": ema.state_dict() if ema else None,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
            "rng": [rng for _, _, rng in kept],
            "state": in_order[0] and {key: torch.cat([state[key] for state in in_order]) for key in in_order[0]},
            "sums": [sums for sums, _, _ in kept],
            "split": split,
            "evaluated": evaluated,
            "best": best,
            "seconds": seconds,
            "wandb_id": log.wandb_id,
        }
        write_atomically(out_dir / name, lambda file: torch.save(contents, file))

    loader = Loader(data["train"], num_rows, args.seed, args.device, data["collate"])

    def request(micro, step):
        """Order what a micro-batch of update `step` needs: a sample for every row, or for the rows that halted."""
        first, state = (rank() * accum + micro) * args.batch_size, states[micro]
        turns = torch.full((args.batch_size,), step) if state is None else state["turn"]
        loader.request(first, turns, None if state is None else state["halted"])

    for micro in range(accum):
        request(micro, step)
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one ends the run in good order, a second one at once
        signal.signal(number, lambda number, _: (received.append(number), signal.signal(number, signal.SIG_DFL)))
    start, metrics, clock = step, None, time.perf_counter() - seconds
    while True:
        seconds = time.perf_counter() - clock  # of training, without evaluating and saving
        done = step == args.max_train_steps
        stop = int(all_reduce(torch.tensor(received[-1] if received else 0), dist.ReduceOp.MAX))
        better = False
        if evaluated < step and (done or step % args.eval_interval == 0 and not stop):
            stop_if_broken()
            metrics = evaluate((ema or model).eval(), data, args)
            model.train()
            log.write(step, "val", metrics)
            evaluated = step
            better = metrics["loss"] < best["loss"]
            if better:
                best = {**metrics, "step": step}
                save("best.pt")
        if better or done or stop or (args.save_interval and step % args.save_interval == 0 and step > start):
            save("ckpt.pt")  # with a new best.pt too: the two belong together
        if done or stop:
            break
        clock = time.perf_counter() - seconds

        batches = [loader.next() for _ in range(accum)]
        # An update is a mean over all it holds, so a micro-batch with more tokens weighs more. Data that do not say how
        # much they hold (counts: float [k], a number for each part of the loss) hold the same in every micro-batch.
        counts = [batch.pop("counts") for batch in batches if "counts" in batch]
        total = all_reduce(sum(counts)).clamp(min=1) / world_size() if counts else accum  # DDP divides by the processes
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args)
        update_loss = 0.0
        for micro, batch in enumerate(batches):
            net.require_backward_grad_sync = micro == accum - 1  # before the forward pass: that is when DDP looks
            batch |= {"step": step, "share": counts[micro] / total if counts else 1 / total}
            with autocast(args):
                loss, pairs, states[micro] = compute_loss(net, batch, states[micro], args)
            request(micro, step + 1)  # made in the background during the backward pass
            scaler.scale(loss).backward()
            update_loss = update_loss + loss.detach()
            add(sums, pairs)
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(params, args.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if ema:  # younger averages forget faster, or the first weights would stay in them
            decay = min(args.ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(ema.parameters()), [p.detach() for p in model.parameters()], 1 - decay)
        finite = torch.stack([update_loss, norm]).isfinite()
        finite[1] |= scaler.is_enabled()  # float16 gradients overflow now and then: the scaler skips that update
        first_bad = torch.where(finite | (first_bad >= 0), first_bad, step)
        add(sums, {"grad_norm": (norm.nan_to_num(0.0, 0.0, 0.0), norm.isfinite().float())})
        step += 1
        log.advance()
        if step == 1 or step % args.log_interval == 0 or step == args.max_train_steps:
            stop_if_broken()
            line = {"lr": learning_rate(step - 1, args), "samples": step * num_rows}
            log.write(step, "train", means(sums) | line | {"seconds": time.perf_counter() - clock})
            sums = {}

    if stop and not done:
        launcher = "python" if world_size() == 1 else f"torchrun --nproc_per_node {world_size()}"
        command = f"{launcher} {Path(__file__).name} --resume --out_dir {shlex.quote(str(out_dir))}"
        log.say(f"stopped after step {step}; go on with: {command}")
        log.close()
        return 128 + stop
    final = metrics or evaluate((ema or model).eval(), data, args)
    if rank() == 0:
        final |= {f"best_{name}": value for name, value in best.items()} | data["baselines"]()
        log.write(step, "final", final)
        log.say(data["report"](final))
        log.say(f"best checkpoint: {out_dir}/best.pt, of step {best['step']}")
    log.close()
    return 0


def main():
    message, code = None, 0
    try:
        args, checkpoint = parse_args()
        if args.device.startswith("cuda"):
            torch.cuda.set_device(args.device)
            torch.set_float32_matmul_precision("high")  # TF32
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # started by torchrun
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo")
            except ValueError as error:
                raise DataError(f"WORLD_SIZE is set: {first_line(error)}; expected torchrun to set them all") from None
            dist.barrier()  # nobody writes before everybody has looked whether --out_dir is free
        if args.eval_only:
            data = make_data(args)
            model = Model(Config(**checkpoint["config"])).to(args.device).eval()
            if data["config"]:
                fit(data["config"], checkpoint["config"], args.out_dir)
            model.load_state_dict(checkpoint["ema"] or checkpoint["model"])
            metrics = evaluate(model, data, args)
            if rank() == 0:
                print(data["report"](metrics | data["baselines"]()))
        else:
            code = train(args, checkpoint)
    except KeyboardInterrupt:  # before training has begun; from then on the run ends in good order
        code = 130
    except Exception as error:
        code = 1
        if isinstance(error, (DataError, OSError)):
            message = f"error: {error}"
        elif "gloo" in str(error) or "NCCL" in str(error):
            message = f"error: process {rank()} lost another one, which says why: {first_line(error)}"
        elif isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            message = f"error: {first_line(error)}; a smaller --batch_size or --grad_checkpoint needs less memory"
        elif dist.is_initialized():
            message = traceback.format_exc()
        else:
            raise
    if dist.is_initialized():  # no tidying up: freed in the wrong order, gloo and torch wait for each other's threads
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(message or code)


if __name__ == "__main__":
    main()
