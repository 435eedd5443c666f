"""LLM-JEPA over bytes: predict the next token, and the embedding of the next step of the answer.

A small decoder learns chats. Beside the usual loss on the assistant's tokens, the state after a few predictor tokens
behind one step of the answer is to point where the next step, read alone, ends up (LLM-JEPA, arXiv 2509.14252). One
packed row holds the chat, the predictors and the steps read alone, so one forward pass at 1.2 to 1.3 times the plain
cost does it all. Without pairs (--regular, or --lbd 0: the same run, bit for bit) it is the plain pass.

  python jepa_lm.py                                                            # laptop, 1 to 2 minutes
  python jepa_lm.py --train_file train.jsonl --eval_file test.jsonl            # your chats, any GPU
  torchrun --nproc_per_node 8 jepa_lm.py --train_file train.jsonl --eval_file test.jsonl     # many GPUs

Without --train_file it learns a built-in world of word problems. The first command's last lines, seed 0:

  Step 700/700, Val Loss: 0.0049 | LM: 0.0049 | Exact: 0.9824
  validation                                    loss   exact  prefix  result
  this model                                  0.0049  0.9824  0.9824  0.9824
  the commonest answer                             -  0.0000       -  0.0527
  the number the story starts with                 -       -       -  0.0625
"""

import argparse
import collections
import copy
import dataclasses
import datetime
import functools
import json
import math
import os
import re
import shlex
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

from data import Bucketed, DataError, Loader, fixed_batches, mix, size_of

# ---- model ----------------------------------------------------------------------------------------------------------

PAD, END, SYSTEM, USER, ASSISTANT, VOCABULARY = range(256, 262)  # after the 256 bytes; END closes a turn
IGNORE = -100  # a label that no loss looks at


@dataclasses.dataclass
class Config:
    """What defines the model."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 8
    expansion: float = 8 / 3  # of the SwiGLU
    rope_theta: float = 10000.0
    predictors: int = 2  # predictor tokens; their ids follow the vocabulary

    def __post_init__(self):
        if self.hidden_size % (2 * self.num_heads):
            heads = f"2 * num_heads = {2 * self.num_heads}"
            raise ValueError(f"hidden_size {self.hidden_size}, expected a multiple of {heads}")


def rms_norm(x):
    """x / rms(x), computed in float32, without a gain. x: [..., D] of any float dtype."""
    x32 = x.float()
    mean_square = x32.norm(dim=-1, keepdim=True).square() / x.shape[-1]  # a third faster than x32.square().mean(-1)
    return (x32 * torch.rsqrt(mean_square + 1e-5)).to(x.dtype)


def rotary(positions, d, theta):
    """RoPE angles of positions [B, T] as cos, signed sin [B, T, 1, 1, d], float32."""
    frequencies = theta ** (-torch.arange(0, d, 2, device=positions.device) / d)
    angles = positions[:, :, None, None, None] * frequencies
    return torch.cat([angles, angles], dim=-1).cos(), torch.cat([-angles, angles], dim=-1).sin()


def rotate(x, cos, sin):
    """Half-split rotation of x [B, T, 2, heads, d], in float32: [x1 cos - x2 sin, x2 cos + x1 sin], signs in sin."""
    x32 = x.float()
    return torch.addcmul(x32 * cos, x32.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def attend(q, k, v, mask=None):
    """Attention of q [B, heads, T, d] to k, v [B, heads, S, d]; mask: bool [B, 1, E, S] for the last E queries.

    The queries before, or without a mask all, are causal: a kernel that knows it does half the work of a masked one.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    n = q.shape[2] - mask.shape[2]
    masked = F.scaled_dot_product_attention(q[:, :, n:], k, v, mask)
    return torch.cat([attend(q[:, :, :n], k[:, :, :n], v[:, :, :n]), masked], dim=2) if n else masked


class Block(nn.Module):
    """Pre-norm transformer block without biases: h = h + Attention(n(h)); h = h + SwiGLU(n(h)); q and k normed too."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        inner = math.ceil(config.expansion * D / 64) * 64
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.o = nn.Linear(D, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * inner, bias=False)
        self.down = nn.Linear(inner, D, bias=False)

    def forward(self, h, cos, sin, mask=None, cache=None):
        B, T, D = h.shape
        qk, v = self.qkv(rms_norm(h)).split([2 * D, D], dim=-1)
        qk = rotate(rms_norm(qk.view(B, T, 2, self.num_heads, -1)), cos, sin)
        q, k = qk.transpose(1, 3).unbind(2)  # each [B, heads, T, d]
        v = v.view(B, T, self.num_heads, -1).transpose(1, 2)
        if cache is not None:
            if self in cache:
                k, v = (torch.cat(pair, dim=2) for pair in zip(cache[self], (k, v)))
            cache[self] = k, v
        h = h + self.o(attend(q, k, v, mask).transpose(1, 2).reshape(B, T, D))
        gate, up = self.gate_up(rms_norm(h)).chunk(2, dim=-1)
        return h + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """A decoder over bytes and special tokens, with the embedding as its head."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.grad_checkpoint = False
        self.embed = nn.Embedding(VOCABULARY, c.hidden_size)
        self.layers = nn.ModuleList(Block(c) for _ in range(c.num_layers))
        # Apart from the vocabulary, and drawn last: however many there are, the language model is the same.
        self.predictors = nn.Parameter(torch.empty(c.predictors, c.hidden_size))
        for name, p in sorted(self.named_parameters(), key=lambda item: item[0] == "predictors"):
            std = 0.05 if name in ("embed.weight", "predictors") else p.shape[1] ** -0.5
            if name.endswith(("o.weight", "down.weight")):
                std /= (2 * c.num_layers) ** 0.5
            nn.init.normal_(p, std=std)

    def forward(self, tokens, positions=None, mask=None, cache=None):
        """Final states, after the last norm: [B, T, D].

        tokens: int64 [B, T]; predictor k has id VOCABULARY + k. positions: int64 [B, T]; None: 0 .. T - 1. mask: bool
        [B, 1, E, T], True where one of the last E tokens may look at key s; those before, or without a mask all, are
        causal. cache: a dict, empty at first, that keeps the keys and values; the next call's tokens come after those
        in it, with a mask [B, 1, T, all of them so far].
        """
        c = self.config
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        cos, sin = rotary(positions, c.hidden_size // c.num_heads, c.rope_theta)
        # One table in every pass: DistributedDataParallel wants a gradient, if of zeros, for every parameter.
        h = F.embedding(tokens, torch.cat([self.embed.weight, self.predictors]))
        for block in self.layers:
            # Backward needs the last block first: kept, not run twice, it costs no memory.
            if self.grad_checkpoint and torch.is_grad_enabled() and block is not self.layers[-1]:
                h = checkpoint(block, h, cos, sin, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, cos, sin, mask, cache)
        return rms_norm(h)

    def head(self, h):
        """Logits [..., VOCABULARY] of final states [..., D], computed in float32: bfloat16 ones tie now and then."""
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.float(), self.embed.weight.float())


def packed_mask(block, limit):
    """Whom the last E tokens of packed rows may look at, bool [B, 1, E, T]: from int tensors, made on their device.

    block: [B, T]; limit: [B, E]. A token sees the tokens of its own block up to itself, and the first `limit` tokens of
    the row, where the chat stands. Padding is a block of its own: a row of the mask without any True would give NaN.
    """
    at, E = torch.arange(block.shape[1], device=block.device), limit.shape[1]
    own = (block[:, -E:, None] == block[:, None, :]) & (at[-E:, None] >= at)
    return (own | (at < limit[:, :, None]))[:, None]


# ---- the loss: the part people copy ---------------------------------------------------------------------------------


def jepa_loss(predicted, target, kind="cosine", text=None):
    """Mean distance of each prediction from its target, both [P, D] of any float dtype; a float32 scalar, 0 if P = 0.

    kind: "cosine": 1 - cos(p, t), as in the paper; "mse": mean square over P and D; "l2": length of p - t; "infonce":
    cross-entropy of finding one's own target among all P by cosine / 0.07. text: int [P], equal for targets of the
    same text, which are no negatives of each other. The gradient runs through both sides. Raises ValueError for
    another kind.
    """
    if kind not in ("cosine", "mse", "l2", "infonce"):
        raise ValueError(f"unknown loss {kind!r}, expected cosine, mse, l2 or infonce")
    p, t = predicted.float(), target.float()
    if len(p) == 0:
        return p.sum() + t.sum()
    if kind == "cosine":
        return (1 - F.cosine_similarity(p, t, dim=-1)).mean()
    if kind == "mse":
        return F.mse_loss(p, t)
    if kind == "l2":
        return (p - t).norm(dim=-1).mean()
    logits = F.normalize(p, dim=-1) @ F.normalize(t, dim=-1).T / 0.07
    own = torch.arange(len(p), device=p.device)
    if text is not None:
        twin = (text[:, None] == text) & (own[:, None] != own)
        logits = logits.masked_fill(twin, float("-inf"))
    return F.cross_entropy(logits, own)


def sigreg(views, directions):
    """How far views [N, D], of any float dtype, are from an isotropic Gaussian: a float32 scalar, 0 for N = 0.

    directions: float32 [D, M], of length 1, drawn anew for each update. Along each stands the Epps-Pulley test, N times
    the integral of |phi_N - phi|^2 phi over 17 points: phi_N is the views' characteristic function, phi a standard
    Gaussian's. About 1 for Gaussian views, about N where all are one. SIGReg of LeJEPA, arXiv 2511.08544.
    """
    if len(views) == 0:
        return views.float().sum()
    t = torch.linspace(0, 3, 17, device=views.device)  # the integrand is even: the half from 0 on counts twice
    phi = torch.exp(-t.square() / 2)
    angles = (views.float() @ directions)[..., None] * t  # [N, M, 17]
    distance = (angles.cos().mean(0) - phi).square() + angles.sin().mean(0).square()
    return 2 * len(views) * torch.trapezoid(distance * phi, t).mean()


@torch.no_grad()
def cosines(predicted, target, text):
    """Cosines of predictions with targets and of targets among themselves, [P, P] each, and which are of other texts.

    text: int [P], equal for equal targets. The diagonal of the first is the paired cosine; where the third, a bool
    [P, P], is True stand the unpaired ones. When these are as high as the paired ones, the embedding says nothing.
    """
    p, t = F.normalize(predicted.float(), dim=-1), F.normalize(target.float(), dim=-1)
    return p @ t.T, t @ t.T, text[:, None] != text


# ---- data: chats, the built-in world, packed rows -------------------------------------------------------------------


class Sample(NamedTuple):
    """One chat. labels[i] is the token that position i has to predict, or IGNORE: (labels != IGNORE).sum() counts."""

    tokens: np.ndarray  # int16 [T]
    labels: np.ndarray  # int16 [T]
    steps: list  # [start, end) of each step of the answer in tokens, without the blank lines between them
    seen: bool = False  # an evaluation chat that stands in the training file as well


def encode(messages, unmask_user=False):
    """A chat as a Sample: [system,] user, assistant, each a role token, the bytes of its content and END.

    messages: list of {"role": ..., "content": ...}. The assistant's bytes and its END are supervised; with unmask_user
    every token but the first is. Steps are what two or more line feeds separate. Raises ValueError for what is no chat.
    """
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError("messages is no list of objects, expected [{role, content}, ...]")
    roles = [message.get("role") for message in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise ValueError(f"roles {', '.join(map(repr, roles)) or 'none'}, expected user, assistant (or system first)")
    for role, message in zip(roles, messages):
        if not isinstance(message.get("content"), str):
            raise ValueError(f"content of {role} is {type(message.get('content')).__name__}, expected a string")
    if not messages[-1]["content"].strip():
        raise ValueError("content of assistant is empty, expected an answer")
    tokens = [token for message in messages for token in turn(**message)]
    start = tokens.index(ASSISTANT) + 1
    runs = re.finditer(rb"[^\n]+(?:\n[^\n]+)*", messages[-1]["content"].encode())  # of lines that are not empty
    steps = [(start + run.start(), start + run.end()) for run in runs if run[0].decode().strip()]
    labels = np.array([*tokens[1:], IGNORE], np.int16)
    if not unmask_user:
        labels[: start - 1] = IGNORE
    return Sample(np.array(tokens, np.int16), labels, steps)


def turn(role, content, **_):
    """One turn as a list of tokens. Raises ValueError for half a surrogate pair."""
    try:
        return [{"system": SYSTEM, "user": USER, "assistant": ASSISTANT}[role], *content.encode(), END]
    except UnicodeEncodeError as error:
        raise ValueError(f"content of {role}: {error.reason}, expected Unicode text") from None


def decode(tokens):
    """The text in tokens; special ones say nothing, bytes that are no UTF-8 become U+FFFD."""
    return bytes(int(token) for token in tokens if token < 256).decode(errors="replace")


def answer_start(sample):
    """Where the assistant's text begins in sample.tokens; the prompt is all before it, its role token included."""
    return int(np.argmax(sample.tokens == ASSISTANT)) + 1


def read_chat(line, unmask_user):
    """The Sample in one line of JSON (bytes). Raises ValueError."""
    try:
        chat = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{first_line(error)}, expected JSON {{"messages": [...]}}') from None
    if not isinstance(chat, dict) or "messages" not in chat:
        raise ValueError('no messages, expected {"messages": [...]}')
    return encode(chat["messages"], unmask_user)


def read_chats(path, args, training=True):
    """Samples of a file with {"messages": [...]} on every line. Raises DataError that names the line."""
    samples = []
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    if line.strip():
                        samples.append(read_chat(line, args.unmask_user and training))
                        length = len(samples[-1].tokens)
                        if length > args.max_length and not training:  # evaluation leaves none out
                            raise ValueError(f"{length} tokens, expected at most --max_length {args.max_length}")
                except ValueError as error:
                    raise DataError(f"{path}:{number}: {first_line(error)}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}), expected a file of chats") from None
    if not samples:
        raise DataError(f"{path}: no chats, expected one on each line")
    return samples


PEOPLE = ("Ann", "Bob", "Cid", "Dot", "Eva", "Fay", "Gus", "Hal")
THINGS = ("figs", "nuts", "pens", "eggs", "caps", "keys")


def tell(value, left, doubled=False):
    """Every story that goes on from a value with `left` events and stays within 1 .. 20: lists of (event, step)."""
    if left == 0:
        yield []
        return
    events = [(f"gets {n}", f"+{n}", value + n) for n in range(1, 10)]
    events += [(f"loses {n}", f"-{n}", value - n) for n in range(1, 10)]
    events += [] if doubled else [("doubles", "*2", 2 * value)]
    for event, operation, new in events:
        if 1 <= new <= 20:
            for rest in tell(new, left - 1, doubled or event == "doubles"):
                yield [(event, f"{value}{operation}={new}"), *rest]


@functools.lru_cache
def make_world(seed, unmask_user):
    """Word problems: every start 2 .. 9 and three events, a double at most once; a tenth is held out.

    "Ann has 2 figs, doubles, gets 6, loses 3." -> "2*2=4", "4+6=10", "10-3=7", with a blank line between the steps.
    The seed shuffles the problems and deals out people and things. Lists of samples: training, validation.
    """
    problems = [(start, *zip(*story)) for start in range(2, 10) for story in tell(start, 3)]
    generator, n, samples = np.random.default_rng(seed), len(problems), []
    for i, person, thing in zip(generator.permutation(n), generator.choice(PEOPLE, n), generator.choice(THINGS, n)):
        start, events, steps = problems[i]
        question = f"{person} has {start} {thing}, {', '.join(events)}."
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "\n\n".join(steps)}]
        samples.append(encode(messages, unmask_user))
    held_out = n // 10
    return samples[held_out:], samples[:held_out]


def find_pairs(sample, args):
    """What has to predict what in a chat, as (seen, start, end): from tokens[:seen] the embedding of tokens[start:end].

    --view_based_jepa: the answer from the question. Otherwise each of the first --num_prediction_steps steps and all
    before it predict the next step; a chat of one step has no pair.
    """
    if args.view_based_jepa:
        turn_start = answer_start(sample) - 1
        return [(turn_start, turn_start, len(sample.tokens))]
    steps = sample.steps[: args.num_prediction_steps + 1]
    return [(end, *following) for (_, end), following in zip(steps, steps[1:])]


def packed_length(sample):
    """About how many tokens a chat takes in a packed row. By this, whatever the flags are, batches are put together."""
    copies = sample.steps[1:3] or [(answer_start(sample), len(sample.tokens))]
    return len(sample.tokens) + sum(end - start for start, end in copies)


def pack(chats, pairs, predictors):
    """One row per chat: the chat, then for each pair the predictor tokens and the target once more, by itself.

    chats: int arrays; pairs: for each chat a list from find_pairs; predictors: K. Returns int64 arrays: tokens [B, T];
    if there is a pair at all, positions and block [B, T], limit [B, E] (see packed_mask; before the last E tokens all
    rows hold their chats), ends [P, 2], where in the flattened rows predictions and targets stand, and text [P], equal
    for equal targets.

    A predictor sees the chat up to its pair's `seen`, and goes on counting positions from there; the target sees itself
    and counts from 0. So both states are those of a pass over that text alone (with K = 0, the chat's own state).
    """
    K, ends, texts = predictors, [], {}
    T = max(len(chat) + sum(K + end - start for _, start, end in mine) for chat, mine in zip(chats, pairs))
    shape, count = (len(chats), T), np.arange(T)
    tokens, block = np.full(shape, PAD), np.full(shape, -1)
    positions, limit = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    for row, (chat, mine) in enumerate(zip(chats, pairs)):
        n = len(chat)
        tokens[row, :n], positions[row, :n], block[row, :n] = chat, count[:n], 0
        for i, (seen, start, end) in enumerate(mine):
            target, ahead = chat[start:end], slice(n, n + K)
            tokens[row, ahead], positions[row, ahead] = VOCABULARY + count[:K], seen + count[:K]
            block[row, ahead], limit[row, ahead] = 2 * i + 1, seen
            prediction = n + K - 1 if K else seen - 1
            n += K + len(target)
            alone = slice(n - len(target), n)
            tokens[row, alone], positions[row, alone], block[row, alone] = target, count[: len(target)], 2 * i + 2
            text = texts.setdefault(target.tobytes(), len(texts))
            ends.append((row * T + prediction, row * T + n - 1, text))
    if not ends:
        return {"tokens": tokens}
    ends, limit = np.array(ends), limit[:, min(map(len, chats)) :]
    arrays = {"tokens": tokens, "positions": positions, "block": block, "limit": limit}
    return {**arrays, "ends": ends[:, :2], "text": ends[:, 2]}


def draw_tubes(chats, position, T, seed):
    """--tube: for each chat the flat places of h_0, h_s, h_e, h_n, int64 [B, 4], in rows of T tokens.

    0 .. n runs from the user's turn to the end; s < e is a span in it, not all of it, drawn from position int64 [B].
    """
    first = np.array([np.argmax(chat == USER) for chat in chats])
    last = np.array([len(chat) - 1 for chat in chats])
    s = first + (mix(position, seed + 2) % (last - first).astype(np.uint64)).astype(np.int64)
    e = s + 1 + (mix(position, seed + 3) % (last - s).astype(np.uint64)).astype(np.int64)
    e -= (s == first) & (e == last)
    return np.arange(len(chats))[:, None] * T + np.stack([first, s, e, last], 1)


def make_data(args):
    """The run's datasets and what the shared part needs to know about them (listed there). Raises DataError."""
    if args.prompt is not None:  # needs no chats, and takes the model's shape from the checkpoint
        return {"config": None, "baselines": dict, "report": "{answer}".format_map}
    limit, source = f"--max_length {args.max_length}", args.train_file or "built-in world"
    chats, val = make_world(args.seed, args.unmask_user) if not args.train_file else (read_chats(source, args), [])
    train = [sample for sample in chats if len(sample.tokens) <= args.max_length]
    left_out = len(chats) - len(train)
    if not train:
        raise DataError(f"{source}: no chat is within {limit}, expected some")
    if args.eval_file:
        val = read_chats(args.eval_file, args, training=False)
    elif not val:
        cut = len(train) - max(1, len(train) // 10)
        if cut == 0:
            raise DataError(f"{source}: one chat in all, expected at least two, one to hold out")
        train, val = train[:cut], train[cut:]
    known = {sample.tokens.tobytes() for sample in train}
    val = [sample._replace(seen=sample.tokens.tobytes() in known) for sample in val]
    has_pairs = args.tube or any(find_pairs(sample, args) for sample in train)
    jepa = not args.regular and (args.lbd > 0 or args.force_pairs)
    if jepa and not has_pairs and args.gamma == 0:
        raise DataError(f"{source}: no answer has two steps, expected some that have, or --gamma above 0")
    if rank() == 0:
        if left_out:
            print(f"left out {left_out} of {len(chats)} training chats: longer than {limit}")
        if jepa and not has_pairs:
            print("warning: no answer has two steps, so there are no pairs: a --regular run; try --view_based_jepa")

    num_rows = args.batch_size * args.grad_accum * world_size()

    def collate(picked, extra):
        training, chats = "position" in extra, [sample.tokens for sample in picked]
        # One draw per update: every process and micro-batch skips, or none; skipping costs a plain pass.
        turn = extra["position"][:1] // num_rows if training else None
        on = training and jepa and mix(turn, args.seed + 1)[0] / 2**64 < args.jepa_ratio
        pairs = [find_pairs(sample, args) if training and jepa and not args.tube else [] for sample in picked]
        batch = pack(chats, pairs if on else [[]] * len(chats), args.predictors)
        B, T = batch["tokens"].shape
        if on and args.tube:
            batch |= {"ends": draw_tubes(chats, extra["position"], T, args.seed), "text": np.arange(B)}
        labels = np.full((B, T), IGNORE)
        starts = [answer_start(sample) for sample in picked]
        for row, sample, start in zip(labels, picked, starts):
            first = 0 if training else start - 1  # validation is always over the answers
            row[first : len(sample.labels)] = sample.labels[first:]
        batch["at"] = np.flatnonzero(labels != IGNORE)
        batch["next"] = labels.flat[batch["at"]]
        if not training:
            seen = [sample.seen for sample in picked]
            return batch | {"start": starts, "length": [len(chat) for chat in chats], "seen": seen}
        num_pairs = len(batch.get("ends", ()))
        skipped = sum(not mine for mine in pairs) if jepa and not args.tube else 0
        return batch | {"counts": np.array([len(batch["at"]), num_pairs], np.float32), "skipped": skipped}

    names = ("hidden_size", "num_layers", "num_heads", "predictors")
    return {
        "train": Bucketed(train, [packed_length(sample) for sample in train]),
        "val": val,
        "shared": any(sample.seen for sample in val),  # then matches on the others are reported too
        "collate": collate,
        "config": {name: getattr(args, name) for name in names},
        "baselines": lambda: baselines(train, val, args),
        "describe": describer(),
        "report": report,
    }


def describer():
    """A function describe(metrics) -> the line for the progress bar. The first time views collapse, it says so."""
    warned = []

    def describe(metrics):
        names = {"loss": "Loss", "llm_loss": "LM", "jepa_loss": "JEPA", "exact_match": "Exact"}
        parts = [f"{title}: {metrics[name]:.4f}" for name, title in names.items() if name in metrics]
        if "cos_unpaired" in metrics:
            paired, unpaired = metrics["cos_paired"], metrics["cos_unpaired"]
            parts.append(f"Cos: {paired:.3f} paired, {unpaired:.3f} unpaired")
            if unpaired > 0.95 and paired - unpaired < 0.02 and not warned:
                warned.append(True)
                tqdm.write(COLLAPSED.format(paired=paired, unpaired=unpaired), file=sys.stdout)
        return " | ".join(parts)

    return describe


COLLAPSED = (
    "warning: the embeddings have collapsed. A prediction is as close to any other target (cosine {unpaired:.3f}) as "
    "to its own ({paired:.3f}), so the JEPA loss is small and teaches nothing. --stop_grad_target slows this, "
    "--sigreg 0.02 and --jepa_loss infonce forbid it, --lbd 0 does without."
)


def report(metrics):
    """The closing table: the model beside answers that need no training."""
    rows = {"this model": "", "the commonest answer": "common_", "the number the story starts with": "copy_"}
    rows["this model, chats not in training"] = "new_"
    lines = [f"{'validation':42}{'loss':>8}{'exact':>8}{'prefix':>8}{'result':>8}"]
    for title, prefix in rows.items():
        cells = [metrics.get(prefix + name) for name in ("loss", "exact_match", "prefix_match", "result_match")]
        if any(cell is not None for cell in cells):
            lines.append(f"{title:42}" + "".join("       -" if cell is None else f"{cell:8.4f}" for cell in cells))
    return "\n".join(lines)


def result_of(text):
    """What an answer of the built-in world ends in: the number after the last "="."""
    return text.rpartition("=")[2]


def baselines(train, val, args):
    """Matches on the validation chats of answers that need no training, as final metrics."""
    val = val[: args.eval_samples or None]
    learned, right = ([decode(each.tokens[answer_start(each) :]) for each in samples] for samples in (train, val))

    def share_of_commonest(learned, right):
        return right.count(collections.Counter(learned).most_common(1)[0][0]) / len(right)

    found = {"common_exact_match": share_of_commonest(learned, right)}
    if in_world(args):
        learned, right = (list(map(result_of, texts)) for texts in (learned, right))
        found["common_result_match"] = share_of_commonest(learned, right)
        starts = [decode(sample.tokens).split()[2] for sample in val]
        found["copy_result_match"] = sum(map(str.__eq__, starts, right)) / len(right)
    return found


def in_world(args):
    return not (args.train_file or args.eval_file)


# ---- one micro-batch, generation, evaluation ------------------------------------------------------------------------


def compute_loss(model, batch, state, args):
    """The losses of one micro-batch: gamma * next token + lbd * JEPA.

    batch: from collate, and the shared part's `step` and `share` float [2], this micro-batch's part of the update's
    supervised tokens and of its pairs. Returns its part of the update's loss, metrics as (sum, count) pairs and None.
    """
    tokens, (token_share, pair_share) = batch["tokens"], batch["share"]
    mask = packed_mask(batch["block"], batch["limit"]) if "block" in batch else None
    h = model(tokens, batch.get("positions"), mask).flatten(0, 1)  # [B * T, D]
    llm_loss = F.cross_entropy(unwrap(model).head(h[batch["at"]]), batch["next"])
    loss, B, num_pairs, similar = args.gamma * token_share * llm_loss, len(tokens), 0, None
    metrics = weigh({"llm_loss": llm_loss.detach()}, len(batch["at"]))  # per token; the next ones per pair
    if "ends" in batch:
        views = h[batch["ends"]].float()  # [P, 2, D], or with --tube [P, 4, D]
        num_pairs = len(views)
        if args.tube:  # arXiv 2602.22617: what happens inside a span against what happens around it
            first, start, end, last = views.unbind(1)
            predicted, target = (last - first) - (end - start), end - start
        else:
            predicted, target = views.unbind(1)
        target = target.detach() if args.stop_grad_target else target
        with torch.autocast(h.device.type, enabled=False):  # cosines of .99 and .98 must differ
            jepa = jepa_loss(predicted, target, args.jepa_loss, batch["text"])
            similar = across, among, apart = cosines(predicted, target, batch["text"])
            metrics |= weigh({"jepa_loss": jepa.detach(), "cos_paired": across.diagonal().mean()}, num_pairs)
            if args.sigreg > 0:  # rms_norm has given the views the length that a Gaussian of variance 1 has
                generator = torch.Generator().manual_seed(int(mix(np.array([batch["step"]]), args.seed + 4)[0]))
                directions = F.normalize(torch.randn(h.shape[-1], 256, generator=generator), dim=0).to(h.device)
                spread = sigreg(views.flatten(0, 1), directions)
                metrics |= weigh({"sigreg_loss": spread.detach()}, num_pairs)
                jepa = jepa + args.sigreg * spread
        loss = loss + args.lbd * pair_share * jepa
        metrics["cos_unpaired"] = (across * apart).sum(), apart.sum()
        metrics["cos_targets"] = (among * apart).sum(), apart.sum()
    metrics["loss"] = loss.detach(), token_share  # the mean of the updates' own losses
    metrics |= weigh({"valid_tokens": len(batch["at"]) / B, "pairs": num_pairs / B, "skipped": batch["skipped"] / B}, B)
    if args.debug and rank() == 0:
        print_debug(batch, llm_loss, similar, args)
    return loss, metrics, None


def print_debug(batch, llm_loss, similar, args):
    """--debug: what this micro-batch holds; from 5 on also how alike its views are. A CPU-GPU sync point."""
    tokens = batch["tokens"]
    forward, (B, T) = int((tokens != PAD).sum()), tokens.shape
    plain = int((batch["block"] == 0).sum()) if "block" in batch else forward
    lines = [
        f"[DEBUG Loss] step={batch['step'] + 1}, input_batch={B}, forward_batch={B}, tokens forward={forward} "
        f"plain={plain} ({forward / plain:.2f}x), padding={1 - forward / (B * T):.1%}",
        f"  valid_tokens={len(batch['next'])}, loss_per_token={llm_loss.item():.4f}, "
        f"pairs={len(batch.get('ends', ()))}, skipped={int(batch['skipped'])}",
    ]
    if args.debug >= 5 and similar:
        across, among, apart = similar
        for name, c in (
            ("cos_paired", across.diagonal()),
            ("cos_unpaired", across[apart]),
            ("cos_targets", among[apart]),
        ):
            if len(c):
                spread = c.std(correction=0)
                lines.append(f"  {name:12} mean={c.mean():.4f} std={spread:.4f} min={c.min():.4f} max={c.max():.4f}")
    tqdm.write("\n".join(lines), file=sys.stdout)


@torch.no_grad()
def generate(model, prompts, limits):
    """Greedy answers of a Model to prompts (lists of tokens), each of at most limits[i] >= 1 tokens, END included.

    Prompts are padded on the left, keys and values are cached, rows that have ended leave the batch: 10 times faster
    than a pass over everything for every token. Returns lists of tokens.
    """
    device, T = model.embed.weight.device, max(map(len, prompts))
    tokens = torch.tensor([[PAD] * (T - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    real = tokens != PAD
    positions = (real.cumsum(1) - 1).clamp(min=0)
    at, cache = torch.arange(T, device=device), {}
    mask = real[:, None] & (at[:, None] >= at) | (at[:, None] == at)  # padding sees itself: no row without any True
    h = model(tokens, positions, mask[:, None], cache)
    answers, rows, positions = [[] for _ in prompts], list(range(len(prompts))), positions[:, -1:]
    while True:
        new = model.head(h[:, -1]).argmax(-1)
        for row, token in zip(rows, new.tolist()):
            answers[row].append(token)
        going = [i for i, row in enumerate(rows) if answers[row][-1] != END and len(answers[row]) < limits[row]]
        if not going:
            return answers
        if len(going) < len(rows):
            kept, rows = torch.tensor(going, device=device), [rows[i] for i in going]
            new, real, positions = new[kept], real[kept], positions[kept]
            cache = {block: (k[kept], v[kept]) for block, (k, v) in cache.items()}
        real, positions = F.pad(real, (0, 1), value=True), positions + 1
        h = model(new[:, None], positions, real[:, None, None], cache)


@torch.no_grad()
def evaluate(model, data, args):
    """Validation means. loss and llm_loss: over the tokens of the answers, whatever was supervised in training.

    exact_match: the greedy answer is the chat's; prefix_match: it begins with it; result_match (built-in world): it
    ends in the same number; new_...: over the chats that are not in the training file, if some are.
    """
    if args.prompt is not None:
        return {"answer": respond(model, args)}
    sums, split = {}, (rank(), world_size(), args.eval_samples)
    for batch in fixed_batches(data["val"], args.batch_size, args.device, *split, data["collate"]):
        chats = [chat[:n] for chat, n in zip(batch["tokens"].tolist(), batch["length"].tolist())]
        starts = batch["start"].tolist()
        with autocast(args):
            h = model(batch["tokens"]).flatten(0, 1)[batch["at"]]
            loss = F.cross_entropy(model.head(h), batch["next"])
            # Longer answers are wrong already, but in the built-in world the result at their end may be right.
            limits = [(1 + in_world(args)) * (len(chat) - start) for chat, start in zip(chats, starts)]
            answers = generate(model, [chat[:start] for chat, start in zip(chats, starts)], limits)
        add(sums, weigh({"loss": loss, "llm_loss": loss}, len(batch["at"])))
        for chat, start, answer, seen in zip(chats, starts, answers, batch["seen"].tolist()):
            right = chat[start:]
            scores = {"exact_match": answer == right, "prefix_match": answer[: len(right) - 1] == right[:-1]}
            if in_world(args):
                scores["result_match"] = answer[-1] == END and result_of(decode(answer)) == result_of(decode(right))
            add(sums, weigh(scores, 1))
            if data["shared"] and not seen:
                add(sums, weigh({f"new_{name}": score for name, score in scores.items()}, 1))
    return means(sums)


def respond(model, args):
    """The answer to --prompt, as text."""
    messages = [{"role": "user", "content": args.prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    try:
        prompt = [token for message in messages for token in turn(**message)] + [ASSISTANT]
    except ValueError as error:
        raise DataError(f"--prompt: {error}") from None
    if len(prompt) >= args.max_length:
        raise DataError(f"--prompt: {len(prompt)} tokens, expected fewer than --max_length {args.max_length}")
    with autocast(args):
        return decode(generate(model, [prompt], [args.max_length - len(prompt)])[0])


# ---- flags ----------------------------------------------------------------------------------------------------------


def add_method_args(parser):
    """Add this script's flags. Returns the flag that brings real data, the demonstration's defaults, the flags that
    --eval_only may be given anew, and check(args, given), which calls parser.error for what makes no sense together
    (given: the names on the command line).
    """
    flag = parser.add_argument_group("data").add_argument
    flag("--train_file", help='{"messages": [...]} on every line; without it, the built-in world of word problems')
    flag("--eval_file", help="the same, to evaluate on (default: the last tenth of --train_file)")
    flag(
        "--max_length",
        type=number(8),
        default=1024,
        help="longer chats are left out of training, refused in --eval_file",
    )
    flag("--unmask_user", **BOOLEAN, help="supervise every token of a training chat, not the answer alone")
    flag = parser.add_argument_group("model").add_argument
    flag("--hidden_size", type=number(2), default=128, help="width of the network")
    flag("--num_layers", type=number(1), default=4, help="blocks of the network")
    flag("--num_heads", type=number(1), default=8, help="attention heads; twice their number divides hidden_size")
    flag = parser.add_argument_group("objective: gamma * next token + lbd * JEPA").add_argument
    flag("--regular", **BOOLEAN, help="the next token alone: the same run as --lbd 0")
    flag("--lbd", type=number(0.0), default=0.5, help="weight of the JEPA loss; 0: none, and no pairs in the rows")
    flag("--gamma", type=number(0.0), default=1.0, help="weight of the next-token loss")
    flag("--num_prediction_steps", type=number(1), default=2, help="pairs per chat: how many steps predict their next")
    flag("--predictors", type=number(0), default=2, help="predictor tokens (K); 0: the step's last token predicts")
    flag("--view_based_jepa", **BOOLEAN, help="one pair per chat: the question predicts the answer")
    flag("--tube", **BOOLEAN, help="no pairs: a random span of the chat points where its surroundings do")
    flag("--jepa_loss", choices=["cosine", "mse", "l2", "infonce"], default="cosine", help="distance of the views")
    flag("--sigreg", type=number(0.0), default=0.0, help="weight of SIGReg beside the distance: no collapse; try 0.02")
    flag("--jepa_ratio", type=number(0.0, 1.0), default=1.0, help="part of the updates that have the JEPA loss")
    flag("--stop_grad_target", **BOOLEAN, help="no gradient through the targets: slows the collapse")
    flag("--force_pairs", **BOOLEAN, help="with --lbd 0: build the pairs all the same, for comparison")
    flag("--debug", type=number(0), default=0, help="1: print what every micro-batch holds; 5: its cosines as well")
    flag = parser.add_argument_group("prediction, with --eval_only --out_dir RUN").add_argument
    flag("--prompt", help="answer one question")
    flag("--system", help="the system prompt before it")
    parser.set_defaults(lr=2e-3, min_lr_ratio=0.0, warmup_steps=50)
    demo = {"num_layers": 2, "batch_size": 16, "lr": 3e-3, "max_train_steps": 700}
    demo |= {"eval_interval": 100, "eval_samples": 512, "log_interval": 50}

    def check(args, given):
        if args.regular:
            names = "lbd num_prediction_steps predictors view_based_jepa tube jepa_loss sigreg jepa_ratio"
            for name in [*names.split(), "stop_grad_target", "force_pairs"]:
                if name in given and given[name]:
                    parser.error(f"--{name} means nothing with --regular, which trains on tokens alone")
        if args.view_based_jepa and (args.tube or "num_prediction_steps" in given):
            parser.error("--view_based_jepa has one pair per chat: no --tube, no --num_prediction_steps beside it")
        for name in ("num_prediction_steps", "predictors", "sigreg", "force_pairs"):
            if args.tube and name in given and given[name] is not False:
                parser.error(f"--{name} means nothing with --tube, which has no pairs")
        if args.force_pairs and args.lbd > 0:
            parser.error("--force_pairs is for --lbd 0; with --lbd above 0 the pairs are built anyway")
        if args.jepa_loss == "infonce" and args.batch_size == 1:
            parser.error(
                "--jepa_loss infonce needs --batch_size 2 or more: a micro-batch's other pairs are its negatives"
            )
        if args.gamma == 0 and (args.regular or args.lbd == 0 or args.jepa_ratio == 0):
            parser.error("--gamma 0 without a JEPA loss leaves nothing to learn")
        if args.eval_file and not args.train_file and not args.eval_only:
            parser.error("--eval_file needs --train_file")
        if args.prompt is not None and not (args.eval_only and args.prompt):
            parser.error("--prompt needs a question, --eval_only and the --out_dir of a run")
        if args.system is not None and args.prompt is None:
            parser.error("--system needs --prompt")
        if args.prompt and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            parser.error("--prompt runs in one process, without torchrun")
        if args.hidden_size % (2 * args.num_heads):
            heads = 2 * args.num_heads
            parser.error(f"--hidden_size {args.hidden_size} must be a multiple of 2 * --num_heads = {heads}")

    return "train_file", demo, {"eval_file", "prompt", "system", "max_length"}, check


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
