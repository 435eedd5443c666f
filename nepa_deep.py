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

  Step 400/400, Val Loss: -0.6479 | Final: -0.6479 | Intermediate: -0.4811 | kNN: 0.6785 | Probe: 0.5650
  frozen features                      kNN   probe
  this model                        0.6785  0.5650
  untrained network                 0.4730  0.2590
  raw pixels                        0.2355  0.2010
"""

import argparse
import contextlib
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
import re
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import textwrap
import time
import traceback
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

try:
    from data import DataError, Loader, Subset, fingerprint, fixed_batches, hash64, permutation, size_of
except ImportError as error:
    sys.exit(f"error: {error}; expected data.py beside this script and no other `data` before it on the path")

# ---- model ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Config:
    """What defines the model; the defaults are the published Base model's. Raises DataError for sizes that misfit."""

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
        if self.hidden_size % (4 * self.num_heads):  # RoPE turns pairs, half of them by the row, half by the column
            expected = f"a multiple of 4 * num_heads = {4 * self.num_heads}"
            raise DataError(f"hidden_size {self.hidden_size}, expected {expected}")
        if self.image_size % self.patch_size:
            raise DataError(f"image_size {self.image_size}, expected a multiple of patch_size {self.patch_size}")


class Output(NamedTuple):
    """What a forward pass gives; T = 1 + number of patches, the CLS token first."""

    embedding: torch.Tensor  # [B, T, D] what the first layer reads; its patches are the targets
    hidden_states: list  # [B, T, D] each, the residual stream after layers 1 .. L, without the final norm
    prediction: torch.Tensor  # [B, T, D] the last of them, normed: position t predicts embedding t + 1


def rotary(rows, columns, d, theta, scale, device):
    """Cosines and sines [T, 1, d/2], float32, of the RoPE angles of CLS and rows x columns patches; CLS is not turned.

    Patch centres lie in [-1, 1], times scale; the first d/4 angles come from y, the others from x.
    """
    y, x = (scale * ((2 * torch.arange(n, device=device) + 1) / n - 1) for n in (rows, columns))
    frequencies = 2 * math.pi * theta ** (-4 * torch.arange(d // 4, device=device) / d)
    angles = torch.cartesian_prod(y, x)[:, :, None] * frequencies  # [N, 2, d/4]
    angles = F.pad(angles.flatten(1), (0, 0, 1, 0))[:, None]  # [T, 1, d/2]
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Half-split rotation of x [B, T, heads, d], computed in and returned as float32."""
    x1, x2 = x.float().chunk(2, dim=-1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block: h += scale1 * Attention(LN(h)); h += scale2 * MLP(LN(h)); strictly causal."""

    def __init__(self, c):
        super().__init__()
        D, d = c.hidden_size, c.hidden_size // c.num_heads

        def head_norm():
            return nn.LayerNorm(d, c.norm_eps, c.qk_norm_affine) if c.qk_norm else nn.Identity()

        self.num_heads, self.gated = c.num_heads, c.gated_mlp
        self.norm1, self.norm2 = nn.LayerNorm(D, c.norm_eps), nn.LayerNorm(D, c.norm_eps)
        self.qkv = nn.Linear(D, 3 * D)
        self.q_norm, self.k_norm = head_norm(), head_norm()
        self.o = nn.Linear(D, D)
        self.up = nn.Linear(D, c.mlp_hidden * (2 if c.gated_mlp else 1))  # gate and up in one
        self.down = nn.Linear(c.mlp_hidden, D)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((D,), c.layerscale_value)) for _ in range(2))

    def forward(self, h, cos, sin):
        B, T, D = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(B, T, 3, self.num_heads, -1).unbind(2)  # [B, T, heads, d] each
        q, k = rotate(self.q_norm(q), cos, sin).to(v.dtype), rotate(self.k_norm(k), cos, sin).to(v.dtype)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # [B, heads, T, d]
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        attended = attended.transpose(1, 2).reshape(B, T, D)  # the heads' parts side by side
        h = h + self.scale1 * self.o(attended)
        up = self.up(self.norm2(h))  # [B, T, mlp_hidden], twice as wide when gated
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

    def forward(self, images, rope_scale=1.0):
        """images: [B, C, H, W] float, H and W multiples of patch_size. rope_scale: factor of the coordinates, a float
        or a 0-dimensional tensor on the images' device; drawn anew for every update in training. Returns an Output.
        """
        c = self.config
        rows, columns = (side // c.patch_size for side in images.shape[2:])
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

PUBLISHED = {  # patterns of published names -> ours, applied in this order
    r"^vit_nepa\.": "",
    r"^embeddings\.(patch_embeddings\.projection|cls_token)": r"\1",
    r"^patch_embeddings\.projection": "patch",
    r"^layernorm\.": "norm.",
    r"^encoder\.layer\.": "layers.",
    r"attention\.attention\.(query|key|value)\.": "qkv.",  # these three stand one below the other in ours
    r"attention\.attention\.": "",  # q_norm, k_norm
    r"attention\.output\.dense": "o",
    r"intermediate\.(gate|up)_proj": "up",  # and so do these two
    r"output\.dense": "down",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"output\.layer_scale\.lambda1": "scale2",
    r"layer_scale\.lambda1": "scale1",
}


def to_our_names(weights):
    """Weights (dict of tensors or arrays) by published NEPA names, with or without `vit_nepa.`, by ours.

    What belongs to a classifier built on the model is left out, and said. Our own names pass through; what fits neither
    stays as it is, for load_state to name.
    """
    found, heads = {}, [name for name in weights if re.match(r"(vit_nepa\.)?(classifier|pooler)\.", name)]
    if heads:
        say(f"left out: {', '.join(heads)}")
    # In alphabetical order gate comes before up, and key before value; query has to come before both.
    for name in sorted(weights.keys() - heads, key=lambda name: name.replace("query", "")):
        ours = name
        for pattern, replacement in PUBLISHED.items():
            ours = re.sub(pattern, replacement, ours)
        found.setdefault(ours, []).append(torch.as_tensor(weights[name]))
    return {name: torch.stack(parts).flatten(0, 1) if len(parts) > 1 else parts[0] for name, parts in found.items()}


def from_official(config, weights):
    """A Model with the weights of the published NEPA code.

    config: dict in its names (hidden_size, num_hidden_layers, intermediate_size, use_gated_mlp, ...); what only matters
    in training and has no counterpart here (dropout, drop path, jitter of positions) is passed over. weights: see
    to_our_names. Raises ValueError for a model that is not offered and for weights that do not fit.
    """
    gated = config.get("use_gated_mlp", False)
    for name, expected in {"is_causal": True, "qkv_bias": True, "hidden_act": "silu" if gated else "gelu"}.items():
        if config.get(name, expected) != expected:
            raise ValueError(f"{name} {config[name]!r}, expected {expected!r}")
    names = {"num_layers": "num_hidden_layers", "num_heads": "num_attention_heads", "mlp_hidden": "intermediate_size"}
    names |= {"gated_mlp": "use_gated_mlp", "norm_eps": "layer_norm_eps"}
    theirs = {name: names.get(name, name) for name in Config.__dataclass_fields__}
    known = {name: config[theirs[name]] for name in theirs if theirs[name] in config}
    # Theirs stretches no positions unless it is told to; ours does.
    model = Model(Config(**known, rope_rescale=config.get("pos_embed_rescale") or 1.0))
    load_state(model, to_our_names(weights))
    return model


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


def losses(output, args, every_layer):
    """The loss of an Output and, by the metrics' names, its parts, detached.

    every_layer: whether to compute the losses of layers 1 .. L-1; they count with --use_intermediate_loss only.
    """
    states = output.hidden_states if every_layer else []
    weight = args.intermediate_loss_weight if args.use_intermediate_loss else 0.0
    loss, loss_final, layers = intermediate_loss(output.embedding, states, output.prediction, weight)
    parts = {"loss": loss.detach(), "loss_final": loss_final.detach()}
    if layers:
        parts["loss_intermediate"] = sum(layers) / len(layers)
    return loss, parts | {f"loss_layer_{i}": value for i, value in enumerate(layers, start=1)}


# ---- data: the built-in world, CIFAR-10, and arrays of images -------------------------------------------------------

SIDE = 32  # pixels of the built-in world's and of CIFAR-10's images
CIFAR_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR_MD5 = "c32a1d4ab5d03f1284b67883e8d87530"
FIXED = 2**32  # a seed that --seed cannot be: what is drawn with it is the same in every run


def textures(rng, labels):
    """float32 [N, 32, 32]: noise of one orientation and period, scaled to deviation 1.2 and squashed by tanh.

    labels: int [N] from 0 to 9; label % 5 is the orientation (0, 45, 90, 135 degrees, or none), label // 5 the period:
    fine, 5 to 6.5 pixels, or coarse, 1.8 times that.
    """
    labels = labels[:, None, None]
    frequency = np.float32(1 / (rng.uniform(5, 6.5, labels.shape) * np.where(labels < 5, 1, 1.8)))
    angle = np.float32(np.pi / 4 * (labels % 5) + rng.uniform(-0.12, 0.12, labels.shape))
    # The spectrum of an area four times as large: its texture would repeat itself, what is cut from it does not.
    y, x = np.float32(np.fft.fftfreq(2 * SIDE))[:, None], np.float32(np.fft.rfftfreq(2 * SIDE))
    along, across = abs(y * np.sin(angle) + x * np.cos(angle)), y * np.cos(angle) - x * np.sin(angle)
    wave, ring = (along - frequency) ** 2 + across**2, (np.hypot(y, x) - frequency) ** 2
    distance = np.where(labels % 5 == 4, ring, wave)  # squared, to the frequencies that are kept
    noise = rng.standard_normal((2, *distance.shape), dtype=np.float32)
    spectrum = (noise[0] + 1j * noise[1]) * np.exp(-distance / (2 * 0.05**2))  # [N, 64, 33]
    texture = np.fft.irfft2(spectrum, axes=(1, 2))[:, :SIDE, :SIDE]
    return np.float32(np.tanh(1.2 * texture / texture.std(axis=(1, 2), keepdims=True)))


def discs(rng, n):
    """bool [n, 32, 32]: a disc of random place and size."""
    cy, cx, radius = rng.uniform([[0], [0], [3]], [[SIDE], [SIDE], [7]], (3, n))[..., None, None]
    pixel = np.arange(SIDE) + 0.5
    return np.hypot(pixel[:, None] - cy, pixel - cx) < radius


def draw_images(rng, labels):
    """uint8 [N, 32, 32, 3]: coloured textures of these labels, shaded, with a disc in front and noise."""
    n = len(labels)

    def colours(low, high):
        return np.float32(rng.uniform(low, high, (n, 1, 1, 3)))

    contrast = colours(-1, 1)
    contrast *= 0.4 / np.linalg.norm(contrast, axis=-1, keepdims=True)
    ramp = np.linspace(-0.5, 0.5, SIDE, dtype=np.float32)[:, None]
    image = colours(0.3, 0.7) + contrast * textures(rng, labels)[..., None]
    image += colours(-0.5, 0.5) * ramp[:, None] + colours(-0.5, 0.5) * ramp
    image = np.where(discs(rng, n)[..., None], colours(0.05, 0.95), image)
    image += 0.04 * rng.standard_normal(image.shape, dtype=np.float32)
    return np.uint8(255 * image.clip(0, 1) + 0.5)


@functools.lru_cache
def make_world(seed):
    """Datasets train (8,000) and val (2,000) of labelled texture images, uint8 [N, 32, 32, 3], made from the seed.

    What carries the label, the statistics of a texture, is spread over the image and hidden from a linear probe on
    pixels; what catches the eye, colour, shading and a disc in front, says nothing about it.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(10_000) % 10)
    images = np.concatenate([draw_images(rng, part) for part in np.array_split(labels, 10)])  # in parts: less memory
    return [{"images": images[part], "labels": labels[part]} for part in (slice(8000), slice(8000, None))]


def open_cifar(files):
    """Dataset of CIFAR-10 binary batches: per record a label byte, then 32 x 32 pixels of red, of green, of blue."""
    record = 1 + 3 * SIDE**2
    for path in files:
        size = path.stat().st_size
        if size == 0 or size % record:
            raise DataError(f"{path}: {size} bytes, expected records of {record}: a label and 3 x 32 x 32 pixels")
    records = np.concatenate([np.fromfile(path, np.uint8) for path in files]).reshape(-1, record)  # 154 MB
    images = records[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return {"images": images, "labels": records[:, 0].astype(np.int64)}


def open_array(path):
    """The array in an .npy file, memory-mapped."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # cut short, no array at all, or one of objects
        raise DataError(f"{path}: cannot be read ({first_line(error)}), expected an array saved by np.save") from None


def open_arrays(images_path, labels_path):
    """Dataset of images, uint8 [N, H, W, C] or [N, H, W], and labels, integers [N]; below 0, or no file: none."""
    images = open_array(images_path)
    found = f"{images_path}: {images.dtype} {list(images.shape)}"
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(f"{found}, expected uint8 [N, H, W, C] or [N, H, W] with no empty dimension")
    if images.ndim == 3:
        images = images[..., None]  # grey
    if images.shape[1] < min(images.shape[2:]):
        raise DataError(f"{found}, expected [N, H, W, C]: save images.transpose(0, 2, 3, 1)")
    labels = open_array(labels_path) if labels_path.exists() else np.full(len(images), -1)
    if labels.shape != (len(images),) or labels.dtype.kind not in "iu":
        found = f"{labels_path}: {labels.dtype} {list(labels.shape)}"
        raise DataError(f"{found}, expected integers [{len(images)}], one per image")
    return {"images": images, "labels": labels.astype(np.int64)}


def open_images(folder):
    """Datasets train and val of a folder: images uint8 [N, H, W, C] and labels int64 [N], -1 where there is none.

    It holds images.npy and labels.npy (and, for validation, val_images.npy and val_labels.npy), or CIFAR-10's
    data_batch_*.bin (and test_batch.bin), these also in a folder cifar-10-batches-bin. Without validation files a tenth
    of the images is held out. Raises DataError for a file that is missing, unreadable or holds something else.
    """
    folder, val = Path(folder), None
    if (folder / "images.npy").exists():
        train = open_arrays(folder / "images.npy", folder / "labels.npy")
        if (folder / "val_images.npy").exists():
            val = open_arrays(folder / "val_images.npy", folder / "val_labels.npy")
    else:
        inside = folder / "cifar-10-batches-bin"
        folder = inside if inside.is_dir() else folder
        files = sorted(folder.glob("data_batch_*.bin"))
        if not files:
            raise DataError(f"{folder}: no images, expected images.npy or data_batch_*.bin (see --download)")
        train = open_cifar(files)
        if (folder / "test_batch.bin").exists():
            val = open_cifar([folder / "test_batch.bin"])
    if val is None:
        tenth = max(1, size_of(train) // 10)
        order = permutation(size_of(train), FIXED, 0)  # by chance, since labels may come in turn
        kept, held_out = np.sort(order[tenth:]), np.sort(order[:tenth])
        images, labels = train.values()
        train, val = ({"images": Subset(images, part), "labels": labels[part]} for part in (kept, held_out))
    return train, val


def download(url, md5, folder):
    """Fetch url, a tar archive with this md5 (hex), and unpack into folder what is not there yet.

    Raises DataError when the download breaks off or is another file; then nothing is left of it, and it starts anew.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile() as file, tempfile.TemporaryDirectory(dir=folder) as unpacked:
        try:
            response = urllib.request.urlopen(url, timeout=60)
            size = int(response.headers.get("Content-Length", 0))
            with tqdm.wrapattr(response, "read", size, desc=folder.name) as stream:
                shutil.copyfileobj(stream, file)
        except (OSError, http.client.HTTPException) as error:
            raise DataError(f"{url}: {first_line(error)}, expected the archive") from None
        file.seek(0)
        found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            raise DataError(f"{url}: {file.tell()} bytes with md5 {found}, expected md5 {md5}; --download starts anew")
        file.seek(0)
        with tarfile.open(fileobj=file) as tar:
            tar.extractall(unpacked, filter="data")  # refuses what would land outside, links and devices
        for path in Path(unpacked).iterdir():
            if not (folder / path.name).exists():
                path.rename(folder / path.name)


def crop_boxes(position, height, width, args):
    """Random resized crop and flip, drawn for samples by their position: float32 [n, 5], in pixels.

    Each row is top, left, height, width, flipped (0 or 1). The crop has crop_scale to 1 of the area and an aspect ratio
    of 3:4 to 4:3, log-uniform, or the nearest with which it fits.
    """
    # Salts 8 * seed to 8 * seed + 4, and + 5 for the stretching of positions: no two seeds share one.
    area, ratio, top, left, flip = (hash64(position, 8 * args.seed + k) / 2**64 for k in range(5))
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
    """Cut, flip and resize a batch's images, uint8 [B, H, W, C], as its boxes [B, 5] say (see crop_boxes).

    Returns float32 [B, C, size, size] in [-1, 1], made on the images' device by one matrix product per axis.
    """
    images = batch["images"].permute(0, 3, 1, 2).float()  # [B, C, H, W]
    top, left, height, width, flip = batch["boxes"].unbind(1)
    vertical = resize_weights(top, height, images.shape[2], size)
    horizontal = resize_weights(left, width, images.shape[3], size)
    horizontal = torch.where(flip[:, None, None] > 0, horizontal.flip(1), horizontal)
    with torch.autocast(images.device.type, enabled=False):
        return vertical[:, None] @ images @ horizontal[:, None].mT / 127.5 - 1


def make_data(args, config=None):
    """The run's datasets and what the shared part needs to know about them (listed there), and `probed`: datasets the
    probes learn from and are tested on, with limits. config: the checkpoint's. Raises DataError for unfit images.
    """
    if args.download:
        there = {path.suffix for path in Path(args.data_dir).glob("**/*")}
        if rank() == 0 and not there & {".bin", ".npy"}:
            download(CIFAR_URL, CIFAR_MD5, Path(args.data_dir))
        all_reduce(torch.zeros(1))  # the others wait
    train, val = open_images(args.data_dir) if args.data_dir else make_world(args.seed)
    height, width, channels = train["images"][np.array([0])].shape[1:]
    if config is None:
        flags = {field.name: getattr(args, field.name, field.default) for field in dataclasses.fields(Config)}
        size = args.image_size or min(height, width)
        config = Config(**flags | {"image_size": size, "num_channels": channels})

    def collate(picked, extra):
        height, width = picked["images"].shape[1:3]
        if "position" in extra:
            boxes = crop_boxes(extra["position"], height, width, args)
        else:  # the largest square in the middle
            side = min(height, width)
            middle = [(height - side) / 2, (width - side) / 2, side, side, 0]
            boxes = np.tile(np.float32(middle), (len(picked["images"]), 1))
        return {**picked, "boxes": boxes}

    # The same ones in every run, in file order: a memory map is read from its beginning to its end.
    labelled = np.flatnonzero(train["labels"] >= 0)
    chosen = np.sort(labelled[permutation(len(labelled), FIXED, 0)[: args.probe_samples]])
    known = {name: Subset(array, chosen) for name, array in train.items()}
    data = {"train": train, "val": val, "collate": collate, "config": config, "describe": describe, "report": report}
    data["probed"] = (known, 0), (val, args.eval_samples)
    return data | {"baselines": lambda: baselines(data, args)}


def describe(metrics):
    """One line for the progress bar."""
    titles = {"loss": "Loss", "loss_final": "Final", "loss_intermediate": "Intermediate"}
    titles |= {"knn_acc": "kNN", "probe_acc": "Probe"}
    return " | ".join(f"{title}: {metrics[name]:.4f}" for name, title in titles.items() if name in metrics)


def report(metrics):
    """The closing table: the features beside those that need no training, the loss beside trivial predictions."""
    lines = ["frozen features: neither kNN nor probe, which need labelled images to learn from and to be tested on"]
    if "knn_acc" in metrics:
        lines = [f"{'frozen features':32}{'kNN':>8}{'probe':>8}"]
        for title, prefix in {"this model": "", "untrained network": "untrained_", "raw pixels": "raw_"}.items():
            lines.append(f"{title:32}{metrics[prefix + 'knn_acc']:8.4f}{metrics[prefix + 'probe_acc']:8.4f}")
    lines.append(f"{'prediction of the next patch':32}{'loss':>8}")
    rows = {"this model": "loss_final", "its layers before the last": "loss_intermediate"}
    rows |= {"the best constant": "constant_loss", "the patch before": "copy_loss"}
    lines += [f"{title:32}{metrics[name]:8.4f}" for title, name in rows.items() if name in metrics]
    lines.append("target patches: mean cosine {embed_cos:.4f}, effective rank {effective_rank:.1f}".format_map(metrics))
    return "\n".join(lines)


# ---- one update, evaluation -----------------------------------------------------------------------------------------


def compute_loss(model, batch, carry, args):
    """The loss of one micro-batch: images cut and flipped on the device, one RoPE scale for the whole update.

    Returns this micro-batch's share of the update's loss, metrics as (sum, count) pairs, and no carry.
    """
    c = unwrap(model).config
    draw = 2 * float(hash64(np.array([batch["step"]]), 8 * args.seed + 5)[0]) / 2**64 - 1  # uniform on [-1, 1)
    scale = torch.full((), c.rope_rescale**draw, device=batch["images"].device)
    loss, parts = losses(model(prepare(batch, c.image_size), scale), args, args.use_intermediate_loss)
    return batch["share"] * loss, to_sums(parts, len(batch["images"])), None


def features(output, args):
    """What the probes see, [B, D] float32 on the CPU: the mean over patches of the output, or of --probe_layer."""
    states = [output.embedding, *output.hidden_states, output.prediction][args.probe_layer]  # -1: the last of these
    return states[:, 1:].float().mean(1).cpu()


def in_file_order(batches):
    """Every process's batches as one list: they were dealt out in turn, and the probes see the same on any number."""
    return [batch for turn in itertools.zip_longest(*gather(batches)) for batch in turn if batch]


@torch.no_grad()
def evaluate(model, data, args):
    """Validation means of the losses, and how good the frozen features are. Draws nothing from torch's generator."""
    # One pass over the images the probes learn from and one over the validation images, which gives the losses too.
    c, sums, pairs = model.config, {}, []
    moment = torch.zeros(c.hidden_size + 1, c.hidden_size + 1, dtype=torch.float64)
    for dataset, limit in data["probed"]:
        mine = []
        for batch in eval_batches(dataset, args, data["collate"], limit):
            with autocast(args):
                output = model(prepare(batch, c.image_size))
            mine.append((features(output, args), batch["labels"].cpu()))
            if dataset is data["val"]:
                _, parts = losses(output, args, every_layer=True)
                parts["copy_loss"] = prediction_loss(output.embedding, output.embedding)
                add_sums(sums, to_sums(parts, len(output.embedding)))
                moment += second_moment(output.embedding)
        pairs.append(in_file_order(mine))
    moment, metrics = all_reduce(moment), means(sums)
    if not math.isfinite(metrics["loss"]):  # the shared part names it and stops
        return metrics
    return metrics | collapse(moment) | probe(*pairs)


def second_moment(embedding):
    """Sum of u u^T over the patches of embedding [B, T, D], as unit vectors with a 1 put behind: float64 [D+1, D+1].

    So the last row holds the sum of u, and the corner their number.
    """
    units = F.normalize(embedding[:, 1:].flatten(0, 1).float(), dim=1)
    units = units.cpu() if units.device.type == "mps" else units  # which has no float64
    units = F.pad(units.double(), (0, 1), value=1.0)  # float64: rounding looks like directions that are not there
    return (units.T @ units).cpu()


def collapse(moment):
    """How far the target patches, as unit vectors, have collapsed to few directions. moment: see second_moment.

    Returns the mean cosine of two of them, the effective rank (exp of the entropy of the singular values, Roy and
    Vetterli 2007: from 1, one direction, to D) and the loss of the best constant prediction, their mean direction.
    """
    count, length = float(moment[-1, -1]), float(moment[-1, :-1].norm())
    singular = torch.linalg.eigvalsh(moment[:-1, :-1]).clamp(min=0).sqrt()
    singular = singular / singular.sum()
    return {
        "embed_cos": (length**2 - count) / (count * max(count - 1, 1)),
        "effective_rank": float(torch.special.entr(singular).sum().exp()),
        "constant_loss": -length / count,
    }


def probe(known, tested):
    """Accuracy on tested of kNN and a ridge probe, both fitted on known: lists of (features [B, D], labels [B]).

    Test images without a label (-1) do not count. Without any labels there is no accuracy: {}.
    """
    if not known:  # no training image is labelled
        return {}
    (x, y), (test_x, test_y) = ([torch.cat(parts) for parts in zip(*pairs)] for pairs in (known, tested))
    labelled, mean = test_y >= 0, x.double().mean(0)
    if not labelled.any():
        return {}
    x, test_x, test_y = x.double() - mean, test_x[labelled].double() - mean, test_y[labelled]
    if len(x) < x.shape[1]:  # directions in which no two known samples differ do not matter, and cost much
        basis = torch.linalg.qr(x.T).Q  # [D, n]
        x, test_x = x @ basis, test_x @ basis
    variance, axes = torch.linalg.eigh(x.T @ x / len(x))  # in ascending order
    inputs = x @ axes, y, test_x @ axes, test_y, variance
    return {"knn_acc": knn(*inputs), "probe_acc": ridge(*inputs)}


def knn(x, y, test_x, test_y, variance, k=20, size=64):
    """Accuracy of the vote of the k nearest known samples, by the cosine of the last `size` whitened components.

    x, test_x: principal components, float64 [n, D] and [m, D]; variance: theirs, [D], ascending; y, test_y: labels.
    """
    # A mean of LayerNorm's outputs has no variance along its gain: what rounding leaves there is not to be blown up.
    kept = variance > 1e-10 * variance[-1]
    near, far = (F.normalize((v / variance.sqrt())[:, kept][:, -size:], dim=1) for v in (x, test_x))
    nearest = torch.cat([(part @ near.T).topk(min(k, len(x)), dim=1).indices for part in far.split(1000)])
    return float((y[nearest].mode(dim=1).values == test_y).double().mean())


def ridge(x, y, test_x, test_y, variance):
    """Accuracy of ridge regression to the one-hot labels; inputs as in knn.

    The penalty is the one with which most known samples are predicted rightly by the fit to all others.
    """
    targets = F.one_hot(y).double()
    offset = targets.mean(0)

    def fit(penalty):
        """That number of samples, and the weights [D, classes]; components make the system diagonal."""
        inverse = 1 / (variance + penalty * variance[-1] + 1e-30)
        weights = inverse[:, None] * (x.T @ targets) / len(x)
        leverage = (1 + x.square() @ inverse) / len(x)  # the part of its own target in a sample's prediction
        others = x @ weights + offset - leverage[:, None] * targets  # times 1 - leverage, which leaves argmax as it is
        return int((others.argmax(1) == y).sum()), weights

    _, weights = max((fit(10.0**exponent) for exponent in range(1, -7, -1)), key=lambda found: found[0])
    return float(((test_x @ weights + offset).argmax(1) == test_y).double().mean())


@torch.no_grad()
def baselines(data, args):
    """kNN and probe accuracy of features that need no training, as final metrics. One process computes them."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)  # the weights a run starts from without --init_from
        model = Model(data["config"]).to(args.device).eval()
    # Raw pixels of larger images are averaged down to 32 x 32: 3,072 numbers, whose eigenvectors take 8 s on one core.
    size, pairs = model.config.image_size, {"untrained_": ([], []), "raw_": ([], [])}
    for i, (dataset, limit) in enumerate(data["probed"]):
        for batch in fixed_batches(dataset, args.batch_size, args.device, limit=limit, collate=data["collate"]):
            labels = batch["labels"].cpu()
            with autocast(args):
                pairs["untrained_"][i].append((features(model(prepare(batch, size)), args), labels))
            pairs["raw_"][i].append((prepare(batch, min(size, SIDE)).flatten(1).cpu(), labels))
    return {prefix + name: value for prefix, both in pairs.items() for name, value in probe(*both).items()}


# ---- flags ----------------------------------------------------------------------------------------------------------


def add_method_args(parser):
    """Add this script's flags. Returns the names of those that bring data, the demonstration's defaults, the flags that
    --eval_only may be given anew, and check(args), which calls parser.error for what would mislead.
    """
    flag = flag_group(parser, "data")
    flag("--data_dir", None, "folder of CIFAR-10's .bin files or of images.npy, labels.npy; without it, textures")
    flag("--download", False, "fetch CIFAR-10 (162 MB) into --data_dir, where it is not there yet")
    flag("--image_size", 0, "side of the images the model sees; 0: the data's shorter side")
    flag("--crop_scale", 0.35, "smallest part of the area that a random crop keeps", 0.01, 1)
    flag("--flip_prob", 0.5, "part of the images flipped left to right", 0, 1)
    flag = flag_group(parser, "model")
    flag("--patch_size", 4, "side of a patch", 1)
    flag("--hidden_size", 96, "width; 4 * num_heads divides it", 1)
    flag("--num_layers", 6, "blocks", 1)
    flag("--num_heads", 3, "attention heads", 1)
    flag("--mlp_hidden", 0, "width of the MLP; 0: 4 * hidden_size")
    flag("--gated_mlp", False, "SwiGLU instead of GELU")
    flag("--qk_norm", True, "LayerNorm on queries and keys")
    flag("--qk_norm_affine", False, "with a gain and a shift")
    flag("--layerscale_value", 1.0, "initial LayerScale; published: 1e-5, for long runs")
    flag("--rope_rescale", 2.0, "largest random stretching of the positions in training", 1)
    flag = flag_group(parser, "deep supervision")
    flag("--use_intermediate_loss", False, "the loss at every layer, not only at the last")
    flag("--intermediate_loss_weight", 1.0, "weight of the mean over layers 1 .. L-1")
    flag = flag_group(parser, "probes")
    flag("--probe_layer", -1, "features of this layer; 0: the embedding, -1: the normed output", -1)
    flag("--probe_samples", 4000, "labelled training images that the probes may use", 10)
    parser.set_defaults(
        batch_size=64, max_train_steps=1500, lr=2e-3, weight_decay=0.05, min_lr_ratio=0.0, ema_decay=0.99
    )
    demo = {"hidden_size": 64, "num_layers": 4, "num_heads": 2, "lr": 1e-3, "max_train_steps": 400, "warmup_steps": 20}
    demo |= {"eval_interval": 100}

    def check(args):
        if args.download and not args.data_dir:
            parser.error("--download needs the --data_dir to download to")
        if args.intermediate_loss_weight != 1 and not args.use_intermediate_loss:
            parser.error("--intermediate_loss_weight needs --use_intermediate_loss")
        if args.probe_layer > args.num_layers:
            parser.error(f"--probe_layer {args.probe_layer} must be at most --num_layers {args.num_layers}")

    return ["data_dir"], demo, ["probe_layer", "probe_samples"], check


# ==== shared: identical in nepa_deep.py, trm_deep.py, jepa_lm.py =====================================================
# Trains whatever stands above. All it uses of it:
#   Config, Model(config), to_our_names(weights), which renames published weights
#   add_method_args(parser) -> see there
#   make_data(args, config) -> dict. config: the checkpoint's Config, None in a new run. Keys: train, val (datasets as
#     data.py wants them), collate, config, describe(metrics) -> text of a log line, report(metrics) -> text at the end,
#     baselines() -> metrics of the final line; where it applies, predict(model) -> text (instead of an evaluation)
#   compute_loss(model, batch, carry, args) -> loss, sums, carry. The batch holds step and share (see train); it may
#     hold counts. carry: None, or what each row takes along: tensors [B, ...], among them `drawn` (how many samples the
#     row has taken before) and `halted` (whether it needs another one)
#   evaluate(model, data, args) -> means, with a "loss"


SCRIPT = Path(__file__).stem


# ---- processes, precision, metrics ----


def rank():
    return int(os.environ.get("RANK", 0)) % world_size()  # torchrun sets both; a lone RANK of a cluster says nothing


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def all_reduce(tensor, op=dist.ReduceOp.SUM):
    """The tensor, summed over the processes in place: CPU tensors travel by gloo, CUDA tensors by nccl."""
    if dist.is_initialized():
        dist.all_reduce(tensor, op)
    return tensor


def gather(value):
    """value of every process (anything that pickles), as a list in order of rank."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def unwrap(model):
    """The Model inside torch.compile and DistributedDataParallel."""
    model = getattr(model, "module", model)
    return getattr(model, "_orig_mod", model)


def autocast(args):
    """Mixed precision as --dtype says; float32 is none at all."""
    device_type = torch.device(args.device).type
    return torch.autocast(device_type, getattr(torch, args.dtype), enabled=args.dtype != "float32")


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
    for mine in gather({name: (float(total), float(count)) for name, (total, count) in sums.items()}):
        add_sums(totals, mine)
    return totals


def means(sums):
    """Means over everything added, on all processes; a metric without samples is left out. A CPU-GPU sync point."""
    return {name: total / count for name, (total, count) in over_processes(sums).items() if count}


def require_finite(step, split, metrics):
    for name, value in metrics.items():
        if not math.isfinite(value):
            raise DataError(f"step {step}: {split} {name} is {value}, expected a finite number; the checkpoint stays")


def first_line(error):
    """What an exception says, in one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" ...")


def say(text):
    """Print on the first process, above the progress bar."""
    if rank() == 0:
        tqdm.write(text)


# ---- signals: the first one ends the run in good order, a second one at once ----

RECEIVED = []


class Stopped(Exception):
    """A signal came while the model was evaluated; its number is the argument."""


def receive(number, _):
    RECEIVED.append(number)
    signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def catch_signals():
    before = {}
    RECEIVED.clear()  # of an earlier run in this process
    with contextlib.suppress(ValueError, AttributeError):  # a thread may set no handlers, Windows has but two of these
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
            number = getattr(signal, name)
            before[number] = signal.signal(number, receive)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def received_signal():
    """The number of a signal that any process has received since the last call, or 0, the same on all of them."""
    number = RECEIVED.pop() if RECEIVED else 0
    return int(all_reduce(torch.tensor(number), dist.ReduceOp.MAX))


def eval_batches(dataset, args, collate, limit=0):
    """This process's share of one pass over a dataset in order (data.fixed_batches), with progress on a terminal.

    limit: only the first so many samples; 0: all. Raises Stopped on every process when one has received a signal.
    """
    batches = fixed_batches(dataset, args.batch_size, args.device, rank(), world_size(), limit, collate)
    for batch in tqdm(batches, "evaluating", leave=False, disable=rank() > 0 or None):  # None: where is no terminal
        if number := received_signal():
            raise Stopped(number)
        if batch:  # in the last round some processes may have none
            yield batch


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
                raise argparse.ArgumentTypeError(f"{text!r}, expected {low} to {high}")
            return value

        if kind is bool:
            more = {"type": boolean, "nargs": "?", "const": True, "metavar": "True|False"}
        elif kind in (int, float):
            more = {"type": number, "metavar": "X"}
        if default is not None and default is not False:
            help += " (default: %(default)s)"
        group.add_argument(*names.split(), default=default, help=help, **more)

    return flag


# What --resume may be given anew; of batch_size and grad_accum only the product with the processes has to stay.
MAY_CHANGE = (
    "batch_size grad_accum max_train_steps eval_interval log_interval save_interval device compile "
    "wandb_mode wandb_project run_name out_dir resume eval_only"
)


def parse_args():
    """The flags in force and, with --resume or --eval_only, the checkpoint. Refuses what makes no sense (exit 2)."""
    parser = argparse.ArgumentParser(
        usage="python %(prog)s [flags]      (--help lists them)",
        description=__doc__,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=36, width=120),
        allow_abbrev=False,
    )
    if rank() > 0:
        parser.error = lambda message: sys.exit(time.sleep(1) or 2)  # the first process says it
    flag = flag_group(parser, "training")
    flag("--batch_size", 32, "samples per micro-batch and process", 1)
    flag("--grad_accum", 1, "micro-batches per update", 1)
    flag("--max_train_steps", 1000, "updates in all", 1)
    flag("--lr --learning_rate", 1e-3, "peak learning rate")
    flag("--min_lr_ratio", 0.1, "end of the cosine, in parts of --lr; 1: constant", 0, 1)
    flag("--warmup_steps", 100, "updates of linear warm-up")
    flag("--weight_decay", 0.1, "AdamW's, on matrices only")
    flag("--beta1", 0.9, "AdamW's", 0, 0.999999)
    flag("--beta2", 0.95, "AdamW's", 0, 0.999999)
    flag("--grad_clip", 1.0, "largest norm of the gradient; 0: no limit")
    flag("--ema_decay", 0.0, "of the averaged weights that are evaluated; 0: none", 0, 0.999999)
    flag("--seed", 0, "of the weights, the order and the built-in world", 0, 2**32 - 1)
    flag("--init_from", None, "start from the weights in this file: a run's best.pt or ckpt.pt, or published ones")
    flag = flag_group(parser, "machine")
    flag("--device", "auto", "auto (CUDA if there), cpu, cuda, mps, ...")
    flag("--dtype", "auto", "auto: bfloat16 on CUDA", choices=["auto", "float32", "bfloat16", "float16"])
    flag("--compile", "auto", "torch.compile; auto: on CUDA", choices=["auto", "on", "off"])
    flag("--grad_checkpoint", False, "recompute in the backward pass: the same gradient, less memory")
    flag = flag_group(parser, "evaluation, output")
    flag("--eval_interval", 500, "updates between evaluations", 1)
    flag("--eval_samples", 0, "validation samples to use; 0: all")
    flag("--log_interval", 100, "updates between lines of metrics.jsonl", 1)
    flag("--save_interval", 500, "updates between checkpoints; 0: with best.pt only")
    flag("--out_dir", None, f"folder of the run (default: a new out/{SCRIPT}-DATE-TIME)")
    flag("--resume", False, "go on with the run in --out_dir, with its flags; start it where there is none")
    flag("--eval_only", False, "evaluate the best checkpoint of the run in --out_dir")
    flag("--wandb_mode", "disabled", "Weights & Biases", choices=["disabled", "offline", "online"])
    flag("--wandb_project", "deep-supervision", "Weights & Biases")
    flag("--run_name", None, "Weights & Biases (default: the folder's name)")
    data_flags, demo, evaluation, check = add_method_args(parser)
    sizes = " ".join(f"--{name} {value}" for name, value in demo.items())
    parser.epilog = f"Without --{data_flags[0]} the demonstration has defaults of its own:\n{sizes}"

    args = parser.parse_args()
    if args.out_dir is None and (args.resume or args.eval_only):
        parser.error("--resume and --eval_only need the --out_dir of a run")
    folder = Path(args.out_dir or f"out/{SCRIPT}-{datetime.datetime.now():%Y%m%d-%H%M%S-%f}")
    latest, best, checkpoint = folder / "ckpt.pt", folder / "best.pt", None
    if args.eval_only or args.resume and latest.exists():
        checkpoint = load_checkpoint(best if args.eval_only and best.exists() else latest)
        parser.set_defaults(**checkpoint["args"])
    elif not args.resume and (folder / "metrics.jsonl").exists():
        parser.error(f"--out_dir {folder} holds a run; --resume continues it, or delete it first")
    elif not getattr(args, data_flags[0]):
        parser.set_defaults(**demo)
    args = parser.parse_args()  # what is on the command line, over what was set above
    if checkpoint:
        free = {*MAY_CHANGE.split(), *data_flags}
        if args.eval_only:
            free |= {*evaluation, "eval_samples", "dtype"}
        for name, value in checkpoint["args"].items():
            if name not in free and value != (now := getattr(args, name)):
                parser.error(f"--{name} {now} conflicts with the run in {folder}, which has {value}")
    for name, value in vars(args).items():
        if value == "":
            parser.error(f"--{name} is empty, expected a value")  # a shell variable that is not set
    check(args)
    args.out_dir = str(folder)
    args.flags = vars(args) | {"resume": False}  # as asked for, before auto is resolved: for the checkpoint and wandb
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    args.device = {"auto": cuda if torch.cuda.is_available() else "cpu", "cuda": cuda}.get(args.device, args.device)
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


# ---- files ----


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
        temporary.unlink(missing_ok=True)  # a full disk keeps no half file
        raise DataError(f"{path}: cannot be written ({first_line(error)}), expected a folder with room") from None


def read_file(path, expected):
    """What torch.save wrote to path, on the CPU. Raises DataError that says what was expected."""
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file  # nothing else needs this package

            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling and zip errors come in many types
        expected = "pip install safetensors" if isinstance(error, ImportError) else expected
        raise DataError(f"{path}: cannot be read ({first_line(error)}), expected {expected}") from None


def load_checkpoint(path):
    """The checkpoint at path: see Run.save; its config is a Config. Raises DataError if it is none of this script's."""
    checkpoint = read_file(path, "the checkpoint of a run")
    try:
        return checkpoint | {"config": Config(**checkpoint["config"])}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: {first_line(error)}, expected a checkpoint of this version of {SCRIPT}.py") from None


def load_state(model, weights):
    """Load weights, a dict of tensors by name. Raises ValueError that names what does not fit or is not finite."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"weight {name} is not finite, expected numbers")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(first_line(error)) from None


def load_weights(model, path):
    """--init_from: the weights of a checkpoint (the averaged ones where there are any), or published ones."""
    weights = read_file(path, "weights saved by torch.save")
    try:
        for wrapper in ("ema", "model", "state_dict"):
            weights = weights.get(wrapper) or weights
        bare = {re.sub(r"^((module|_orig_mod|model)\.)+", "", name): value for name, value in weights.items()}
        load_state(model, to_our_names(bare))
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{path}: {first_line(error)}") from None


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
        {"params": [p for p in params if (p.ndim >= 2) == matrices], "weight_decay": args.weight_decay * matrices}
        for matrices in (True, False)
    ]
    fused = args.device.startswith(("cpu", "cuda")) or None
    return torch.optim.AdamW(groups, lr=args.lr, betas=(args.beta1, args.beta2), fused=fused)


# ---- the run ----


class Run:
    """All that changes during a run, how it is logged and how it is saved."""

    parts = ("model", "ema", "optimizer", "scaler")  # saved as state dicts
    values = ("step", "sizes", "last", "best", "seconds", "sums", "wandb_id")  # saved as they are
    step, seconds, wandb_id = 0, 0.0, None
    last, best = {"step": -1}, {"loss": math.inf}  # metrics of the last and of the best validation

    def __init__(self, args, data, checkpoint):
        self.args, self.data, self.out_dir = args, data, Path(args.out_dir)
        self.num_rows = args.batch_size * args.grad_accum * world_size()  # samples of an update
        self.sizes = {"--batch_size * --grad_accum * processes": self.num_rows}
        self.sizes |= {f"{split} data": fingerprint(data[split], data["collate"]) for split in ("train", "val")}

        torch.manual_seed(args.seed)
        self.model = Model(data["config"]).to(args.device)
        self.model.grad_checkpoint = args.grad_checkpoint
        if args.init_from and not checkpoint:
            load_weights(self.model, args.init_from)
        self.ema = copy.deepcopy(self.model).requires_grad_(False) if args.ema_decay else None
        self.optimizer = make_optimizer(self.model, args)
        self.scaler = torch.amp.GradScaler(torch.device(args.device).type, enabled=args.dtype == "float16")
        self.net = self.model
        if args.compile == "on":
            torch._dynamo.config.optimize_ddp = not args.grad_checkpoint  # torch 2.6 fails where it cuts checkpoints
            self.net = torch.compile(self.model)
        if dist.is_initialized():
            self.net = nn.parallel.DistributedDataParallel(self.net, gradient_as_bucket_view=True)

        self.sums, self.carries = {}, [None] * args.grad_accum  # a carry for each micro-batch
        if checkpoint:
            self.restore(checkpoint)
        self.open_log(checkpoint["log_size"] if checkpoint else 0)
        self.loader = Loader(data["train"], self.num_rows, args.seed, args.device, data["collate"])
        for micro in range(args.grad_accum):
            self.request(micro, self.step)

    def restore(self, checkpoint):
        """Go on where the checkpoint was saved, on any number of processes: bit for bit the run that never stopped."""
        for name, then in checkpoint["sizes"].items():
            if then != (now := self.sizes[name]):
                raise DataError(f"{self.out_dir}: {name} is {now}, expected {then} as in the checkpoint")
        for name in self.parts:
            if part := getattr(self, name):
                part.load_state_dict(checkpoint[name])
        for name in self.values:
            setattr(self, name, checkpoint[name])
        self.sums = self.sums if rank() == 0 else {}
        for micro in range(self.args.grad_accum if checkpoint["carry"] else 0):
            rows = (rank() * self.args.grad_accum + micro) * self.args.batch_size + torch.arange(self.args.batch_size)
            self.carries[micro] = {name: x[rows].to(self.args.device) for name, x in checkpoint["carry"].items()}
        torch.set_rng_state(checkpoint["rng"])

    @torch.no_grad()
    def save(self, name):
        """Write everything to out_dir/name. Raises DataError, and keeps the file, where a number is not finite."""
        sums = over_processes(self.sums)
        lengths = torch._foreach_norm(list(self.model.parameters()))  # one wait for the GPU, not one for each
        totals = {key: total for key, (total, _) in sums.items()}
        require_finite(self.step, "train", totals | {"norm of the weights": float(torch.stack(lengths).sum())})
        mine = {key: torch.cat([carry[key] for carry in self.carries]).cpu() for key in self.carries[0] or ()}
        shards = gather(mine)
        if rank() > 0:
            return
        contents = {
            "script": SCRIPT,
            "config": dataclasses.asdict(self.model.config),
            "args": self.args.flags,
            **{key: part and part.state_dict() for key in self.parts for part in [getattr(self, key)]},
            **{key: getattr(self, key) for key in self.values},
            "sums": sums,
            "carry": {key: torch.cat([shard[key] for shard in shards]) for key in mine},  # all rows in order
            "rng": torch.get_rng_state(),  # nothing here draws on the GPU
            "log_size": self.log_path.stat().st_size,
        }
        write_atomically(self.out_dir / name, lambda file: torch.save(contents, file))

    def request(self, micro, step):
        """Order what a micro-batch of update `step` needs: a sample for every row, or for the rows that halted."""
        args, carry = self.args, self.carries[micro]
        first_row = (rank() * args.grad_accum + micro) * args.batch_size
        drawn = carry["drawn"] if carry else torch.full((args.batch_size,), step)
        self.loader.request(first_row, drawn, carry and carry["halted"])

    @torch.no_grad()
    def average(self):
        """Move the averaged weights towards the weights; at first faster, or the first ones would stay in them."""
        if self.ema:
            decay = min(self.args.ema_decay, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(list(self.ema.parameters()), list(self.model.parameters()), 1 - decay)

    def open_log(self, size):
        """metrics.jsonl, of which size bytes belong to the run so far, Weights & Biases, the progress bar."""
        args, self.log_path, self.wandb = self.args, self.out_dir / "metrics.jsonl", None
        disable = None if rank() == 0 and sys.stdout.isatty() else True  # None: where stderr is no terminal
        self.bar = tqdm(total=args.max_train_steps, initial=self.step, disable=disable, dynamic_ncols=True)
        if rank() > 0:
            return
        self.out_dir.mkdir(parents=True, exist_ok=True)
        with open(self.log_path, "ab") as file:
            file.truncate(min(size, file.tell()))  # what was logged after the checkpoint will be logged again
        if args.wandb_mode != "disabled":
            os.environ["WANDB_MODE"] = args.wandb_mode  # an empty one would be an error
            import wandb

            self.wandb = wandb.init(
                project=args.wandb_project,
                name=args.run_name or self.out_dir.name,
                dir=args.out_dir,
                id=self.wandb_id,
                resume="allow",
                config=args.flags,
            )
            self.wandb.define_metric("*", step_metric="step")  # its own counter would drop what a resumed run logs anew
            self.wandb_id = self.wandb.id

    def log(self, split, metrics):
        """One line: to the file, to wandb under the same names (val/ and final/ before theirs), and for people."""
        require_finite(self.step, split, metrics)
        if rank() > 0:
            return
        try:
            with open(self.log_path, "a") as file:
                file.write(json.dumps({"step": self.step, "split": split, **metrics}) + "\n")
        except OSError as error:
            raise DataError(f"{self.log_path}: cannot be written ({error.strerror}), expected room") from None
        if self.wandb:
            prefix = "" if split == "train" else split + "/"
            self.wandb.log({prefix + name: value for name, value in metrics.items()} | {"step": self.step})
        text = f"Step {self.step}/{self.args.max_train_steps}, {split.capitalize()} {self.data['describe'](metrics)}"
        if split == "train" and not self.bar.disable:
            self.bar.set_description_str(text)
        elif split != "final":
            say(text)

    def validate(self):
        """Evaluate and log. Returns whether the loss is the lowest so far; then best.pt is saved."""
        metrics = evaluate((self.ema or self.model).eval(), self.data, self.args)
        self.model.train()
        self.log("val", metrics)
        self.last = {**metrics, "step": self.step}
        if better := metrics["loss"] < self.best["loss"]:
            self.best = self.last
            self.save("best.pt")
        return better

    def finish(self):
        """The closing line and table."""
        self.bar.close()
        if rank() == 0:
            final = self.last | {f"best_{name}": value for name, value in self.best.items()} | self.data["baselines"]()
            self.log("final", final)
            say(self.data["report"](final))
            say(f"best checkpoint: {self.out_dir}/best.pt, of step {self.best['step']}")


def shares(batches):
    """What part of the update each micro-batch is: an update is one mean over all it holds, in all processes.

    A batch with more tokens weighs more: it says how much it holds (counts: float [k], a number for each part of the
    loss). Batches that say nothing hold the same. DistributedDataParallel divides by the number of processes.
    """
    if "counts" not in batches[0]:
        return [1 / len(batches)] * len(batches)
    counts = [batch.pop("counts") for batch in batches]
    total = all_reduce(sum(counts)).clamp(min=1) / world_size()
    return [count / total for count in counts]


def train(run):
    """The loop. Returns the exit code: 0, or 128 + the number of the signal that ended the run."""
    args, net, optimizer, scaler = run.args, run.net, run.optimizer, run.scaler
    while True:
        # Evaluate, save, leave. A signal ends the run here, after a whole update.
        done, stop, better = run.step >= args.max_train_steps, received_signal(), False
        if run.last["step"] < run.step and (done or run.step % args.eval_interval == 0):
            try:
                better = run.validate()
            except Stopped as stopped:  # half an evaluation is none: the resumed run begins with it
                (stop,) = stopped.args
        if better or done or stop or args.save_interval and run.step % args.save_interval == 0:
            run.save("ckpt.pt")  # with a new best.pt too: the two belong together
        if done and run.last["step"] == run.step:
            run.finish()
            return 0
        if stop:
            run.bar.close()
            launcher = "python" if world_size() == 1 else f"torchrun --nproc_per_node {world_size()}"
            where = shlex.quote(args.out_dir)
            say(f"stopped after step {run.step}; go on with: {launcher} {SCRIPT}.py --resume --out_dir {where}")
            return 128 + stop

        # Fetch and accumulate.
        start = time.perf_counter()
        batches = [run.loader.next() for _ in range(args.grad_accum)]
        lr = learning_rate(run.step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        for micro, (batch, share) in enumerate(zip(batches, shares(batches))):
            net.require_backward_grad_sync = micro == args.grad_accum - 1  # before the forward pass: DDP looks then
            batch |= {"step": run.step, "share": share}
            with autocast(args):
                loss, sums, run.carries[micro] = compute_loss(net, batch, run.carries[micro], args)
            run.request(micro, run.step + 1)  # made in the background during the backward pass
            scaler.scale(loss).backward()
            add_sums(run.sums, sums)

        # Step.
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(run.model.parameters(), args.grad_clip or math.inf)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        run.average()
        run.step += 1
        run.bar.update()

        # Log. A number that is not finite ends the run at the next line, evaluation or save.
        overflow = ~norm.isfinite() & scaler.is_enabled()  # of float16, now and then: the scaler skips that update
        add_sums(run.sums, {"grad_norm": (norm.masked_fill(overflow, 0.0), (~overflow).float())})
        due = run.step == 1 or run.step % args.log_interval == 0 or run.step == args.max_train_steps
        metrics = means(run.sums) if due else {}  # waits for the GPU
        run.seconds += time.perf_counter() - start  # without evaluating and saving
        if due:
            run.log("train", metrics | {"lr": lr, "samples": run.step * run.num_rows, "seconds": run.seconds})
            run.sums = {}


def first_to_fail():
    """Whether no other process has failed before this one: it alone says why."""
    if not dist.is_initialized():
        time.sleep(min(rank(), 1))  # torchrun ends the others when one has ended
        return rank() == 0
    try:
        return dist.distributed_c10d._get_default_store().add("failed", 1) == 1
    except RuntimeError:  # the process that counted is gone
        return False


def launch():
    """Evaluate or train, as the flags say. Returns the exit code."""
    args, checkpoint = parse_args()
    if args.device.startswith("cuda"):
        torch.cuda.set_device(args.device)
        torch.set_float32_matmul_precision("high")  # TF32
    if world_size() > 1:
        dist.init_process_group("cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo")
        dist.barrier()  # nobody writes before everybody has looked whether --out_dir is free
    data = make_data(args, checkpoint and checkpoint["config"])
    if not args.eval_only:
        run = Run(args, data, checkpoint)
        sizes = f"{sum(p.numel() for p in run.model.parameters()):,} parameters, {size_of(data['train']):,} samples"
        say(f"{sizes}, {world_size()} x {args.device} {args.dtype}, from step {run.step} -> {run.out_dir}")
        with catch_signals():
            return train(run)
    model = Model(data["config"]).to(args.device).eval()
    load_state(model, checkpoint["ema"] or checkpoint["model"])
    if "predict" in data:
        say(rank() == 0 and data["predict"](model))
    else:
        metrics = evaluate(model, data, args)
        say(data["describe"](metrics))
        say(rank() == 0 and data["report"](metrics | data["baselines"]()))
    return 0


def main():
    message = None
    try:
        code = launch()
    except KeyboardInterrupt:  # before training has begun; from then on the run ends in good order
        code = 130
    except Exception as error:
        code = 1
        if isinstance(error, (DataError, OSError)):
            message = f"error: {error}"
        elif isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            message = f"error: {first_line(error)}; a smaller --batch_size or --grad_checkpoint needs less memory"
        elif dist.is_initialized():
            message = traceback.format_exc()
        else:
            raise
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish(exit_code=int(message is not None))
    message = message if message and first_to_fail() else None
    if dist.is_initialized():  # no tidying up: freed in the wrong order, gloo and torch wait for each other's threads
        if message:
            print(message, file=sys.stderr)
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(message or code)


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace", line_buffering=True)  # what a terminal cannot show becomes a ?
    main()
