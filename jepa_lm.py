"""LLM-JEPA over bytes: predict the next token, and the embedding of the next step of the answer.

A small decoder learns chats. Beside the usual loss on the assistant's tokens, the state after a few predictor tokens
behind one step of the answer is to point where the next step, read alone, ends up (LLM-JEPA, arXiv 2509.14252). One
packed row holds the chat, the predictors and the steps read alone, so one forward pass at 1.2 to 1.3 times the plain
cost does it all. Without pairs (--regular, or --lbd 0: the same run, bit for bit) it is the plain pass.

  python jepa_lm.py                                                            # laptop, 1 to 2 minutes
  python jepa_lm.py --train_file train.jsonl --eval_file test.jsonl            # your chats, any GPU
  torchrun --nproc_per_node 8 jepa_lm.py --train_file train.jsonl --eval_file test.jsonl     # many GPUs

Without --train_file it learns a built-in world of word problems. The first command's last lines, seed 0:

  Step 700/700, Train Loss: 0.0444 | LM: 0.0018 | JEPA: 0.0082 | Cos: 0.992 paired, -0.008 unpaired
  Step 700/700, Val Loss: 0.0016 | LM: 0.0016 | Exact: 1.0000
  validation                loss   exact  prefix
  this model              0.0016  1.0000  1.0000
  the commonest answer         -  0.0000       -
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
import shlex
import signal
import statistics
import sys
import textwrap
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
    from data import DataError, Loader, fingerprint, fixed_batches, hash64, size_of
except ImportError as error:
    sys.exit(f"error: {error}; expected data.py beside this script and no other `data` before it on the path")

# ---- model ----------------------------------------------------------------------------------------------------------

PAD, END, SYSTEM, USER, ASSISTANT, VOCABULARY = range(256, 262)  # after the 256 bytes; END closes a turn
ROLES = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
IGNORE = -100  # a label that no loss looks at


@dataclasses.dataclass
class Config:
    """What defines the model. Raises DataError for sizes that do not fit each other."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 8
    predictors: int = 2  # predictor tokens; their ids follow the vocabulary

    def __post_init__(self):
        if self.hidden_size % (2 * self.num_heads):
            multiple = f"a multiple of 2 * num_heads = {2 * self.num_heads}"
            raise DataError(f"hidden_size is {self.hidden_size}, expected {multiple}")


def rms_norm(x):
    """x / rms(x), computed in float32, without a gain. x: [..., D] of any float dtype."""
    x32 = x.float()
    mean_square = x32.norm(dim=-1, keepdim=True).square() / x.shape[-1]  # a third faster than x32.square().mean(-1)
    return (x32 * torch.rsqrt(mean_square + 1e-5)).to(x.dtype)


def rotary(positions, d):
    """RoPE angles of positions [B, T] as cos, signed sin [B, T, 1, 1, d], float32."""
    frequencies = 10000.0 ** (-torch.arange(0, d, 2, device=positions.device) / d)
    angles = positions[:, :, None, None, None] * frequencies
    return torch.cat([angles, angles], dim=-1).cos(), torch.cat([-angles, angles], dim=-1).sin()


def rotate(x, cos, sin):
    """Half-split rotation of x [B, T, 2, heads, d], in float32: [x1 cos - x2 sin, x2 cos + x1 sin], signs in sin."""
    x32 = x.float()
    return torch.addcmul(x32 * cos, x32.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)


def attend(q, k, v, mask=None, causal=True):
    """Attention of q [B, heads, T, d] to k, v [B, heads, S, d]; mask: bool [B, 1, E, S] for the last E queries.

    The queries before, or without a mask all, are causal (or, on demand, see everything): a kernel that knows it does
    half the work of a masked one.
    """
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    n = q.shape[2] - mask.shape[2]
    plain = attend(q[:, :, :n], k[:, :, :n], v[:, :, :n])
    return torch.cat([plain, F.scaled_dot_product_attention(q[:, :, n:], k, v, mask)], dim=2)


class Block(nn.Module):
    """Pre-norm transformer block without biases: h = h + Attention(n(h)); h = h + SwiGLU(n(h)); q and k normed too."""

    def __init__(self, config):
        super().__init__()
        D = config.hidden_size
        inner = math.ceil(8 / 3 * D / 64) * 64  # SwiGLU has three matrices: as many weights as two of width 4 D
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.o = nn.Linear(D, D, bias=False)
        self.gate_up = nn.Linear(D, 2 * inner, bias=False)
        self.down = nn.Linear(inner, D, bias=False)

    def forward(self, h, cos, sin, mask=None, cache=None):
        B, T, D = h.shape
        qk, v = self.qkv(rms_norm(h)).split([2 * D, D], dim=-1)
        qk = rotate(rms_norm(qk.view(B, T, 2, self.num_heads, -1)), cos, sin)  # [B, T, 2, heads, d]
        q, k = qk.transpose(1, 3).unbind(2)  # each [B, heads, T, d]
        v = v.view(B, T, self.num_heads, -1).transpose(1, 2)  # [B, heads, T, d]
        causal = cache is None or self not in cache  # a single token behind what is cached sees all of it
        if not causal:
            k, v = (torch.cat(pair, dim=2) for pair in zip(cache[self], (k, v)))
        if cache is not None:
            cache[self] = k, v
        h = h + self.o(attend(q, k, v, mask, causal).transpose(1, 2).reshape(B, T, D))  # [B, heads, T, d] -> [B, T, D]
        gate, up = self.gate_up(rms_norm(h)).chunk(2, dim=-1)
        return h + self.down(F.silu(gate) * up)


class Model(nn.Module):
    """A decoder over bytes and special tokens, with the embedding as its head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.grad_checkpoint = False
        self.embed = nn.Embedding(VOCABULARY, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.predictors = nn.Parameter(torch.empty(config.predictors, config.hidden_size))
        # Backwards: the predictors are drawn last, so however many there are, the language model is the same.
        for name, p in reversed(list(self.named_parameters())):
            std = 0.05 if name in ("embed.weight", "predictors") else p.shape[1] ** -0.5
            if name.endswith(("o.weight", "down.weight")):
                std /= (2 * config.num_layers) ** 0.5  # the sum over the layers does not grow with their number
            nn.init.normal_(p, std=std)

    def forward(self, tokens, positions=None, mask=None, cache=None):
        """Final states, after the last norm: [B, T, D].

        tokens: [B, T] of any integer dtype; predictor k has id VOCABULARY + k. positions: int64 [B, T]; None: 0 .. T -
        1. mask: bool [B, 1, E, T], True where one of the last E tokens may look at key s; those before, or without a
        mask all, are causal. cache: a dict, empty at first, that keeps keys and values: the first call reads a prompt,
        each further one a single token with its position.
        """
        config = self.config
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        cos, sin = rotary(positions, config.hidden_size // config.num_heads)
        # One table in every pass: DistributedDataParallel wants a gradient, if of zeros, for every parameter.
        h = F.embedding(tokens.long(), torch.cat([self.embed.weight, self.predictors]))
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


def to_our_names(weights):
    """For --init_from: nobody publishes weights for this model, its own need no other names."""
    return weights


# ---- the losses: the part people copy -------------------------------------------------------------------------------


def jepa_loss(predicted, target, kind="cosine", text=None):
    """Mean distance of each prediction from its target, both [P, D] of any float dtype; a float32 scalar, 0 if P = 0.

    kind: "cosine": 1 - cos(p, t), as in the paper; "mse": mean square over P and D; "l2": length of p - t; "infonce":
    cross-entropy of finding one's own target among all P by cosine / 0.07. text: int [P], equal for targets of the
    same text, which are no negatives of each other. The gradient runs through both sides; it stays bounded where a
    vector is zero. Raises ValueError for another kind.
    """
    p, t = predicted.float(), target.float()
    p_unit, t_unit = F.normalize(p, dim=-1, eps=1e-3), F.normalize(t, dim=-1, eps=1e-3)  # [P, D]; gradient <= 1 / eps
    if kind == "cosine":
        distance = 1 - (p_unit * t_unit).sum(-1)
    elif kind == "mse":
        distance = (p - t).square().mean(-1)
    elif kind == "l2":
        distance = (p - t).norm(dim=-1)
    elif kind == "infonce":
        logits = p_unit @ t_unit.T / 0.07  # [P, P]
        own = torch.arange(len(p), device=p.device)
        if text is not None:
            twin = (text[:, None] == text) & (own[:, None] != own)
            logits = logits.masked_fill(twin, float("-inf"))
        distance = F.cross_entropy(logits, own, reduction="none")
    else:
        raise ValueError(f"unknown loss {kind!r}, expected cosine, mse, l2 or infonce")
    return distance.sum() / max(len(p), 1)


def sigreg(views, directions):
    """How far views [N, D], of any float dtype, are from an isotropic Gaussian: a float32 scalar.

    directions: float32 [D, M], of length 1, drawn anew for each update. Along each stands the Epps-Pulley test, N times
    the integral of |phi_N - phi|^2 phi over 17 points: phi_N is the views' characteristic function, phi a standard
    Gaussian's. About 1 for Gaussian views, about N where all are one. SIGReg of LeJEPA, arXiv 2511.08544.
    """
    t = torch.linspace(0, 3, 17, device=views.device)  # the integrand is even: the half from 0 on counts twice
    phi = torch.exp(-t.square() / 2)
    angles = (views.float() @ directions)[..., None] * t  # [N, M, 17]
    distance = (angles.cos().mean(0) - phi).square() + angles.sin().mean(0).square()
    return 2 * len(views) * torch.trapezoid(distance * phi, t).mean()


@torch.no_grad()
def cosines(predicted, target, text):
    """How alike views are, as name -> (cosines [P, P], bool [P, P], which of them are meant).

    Of a prediction with its own target, with targets of other texts, and of targets of different texts. text: int [P],
    equal for equal targets. When unpaired cosines are as high as paired ones, the embedding says nothing.
    """
    p, t = F.normalize(predicted.float(), dim=-1), F.normalize(target.float(), dim=-1)
    own, other = torch.eye(len(p), dtype=torch.bool, device=p.device), text[:, None] != text
    return {"cos_paired": (p @ t.T, own), "cos_unpaired": (p @ t.T, other), "cos_targets": (t @ t.T, other)}


# ---- data: chats, the built-in world --------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One chat. labels[i] is the token that position i has to predict, or IGNORE: (labels != IGNORE).sum() counts."""

    tokens: np.ndarray  # int16 [T]
    labels: np.ndarray  # int16 [T]
    steps: list  # [start, end) of each step of the last answer in tokens, without the blank lines between them

    @property
    def answer(self):
        """Where the last answer begins in tokens; the prompt is all before it, its role token included."""
        return int(np.flatnonzero(self.tokens == ASSISTANT)[-1]) + 1

    @property
    def length(self):
        """About how many tokens it takes in a packed row. By this, whatever the flags are, batches are put together."""
        copies = self.steps[1:3] or [(self.answer, len(self.tokens))]
        return len(self.tokens) + sum(end - start for start, end in copies)


def encode(messages, unmask_user=False):
    """A chat as a Sample: [system,] then user and assistant in turn, each a role token, its bytes and END.

    messages: list of {"role": ..., "content": ...}. The bytes and END of every assistant turn are supervised; with
    unmask_user every token but the first is. Raises ValueError, TypeError or LookupError for what is no chat.
    """
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"roles {', '.join(map(repr, roles)) or 'none'}")
    tokens, targets = [], []
    for role, message in zip(roles, messages):
        start, text = len(tokens) + 1, bytes(message["content"], "utf-8")
        tokens += [ROLES[role], *text, END]
        targets += [IGNORE, *text, END] if role == "assistant" else [IGNORE] * (len(text) + 2)
    steps = find_steps(text, start)
    if not steps:
        raise ValueError("the last answer is empty")
    labels = [*(tokens if unmask_user else targets)[1:], IGNORE]
    return Sample(np.array(tokens, np.int16), np.array(labels, np.int16), steps)


def find_steps(text, at):
    """[start, end) of each step of an answer (bytes), counted from `at`: what lines of nothing but white space part."""
    steps, parted = [], True  # parted: whether the line before is blank
    for line in text.splitlines(keepends=True):
        if line.decode().strip():
            start = at if parted else steps.pop()[0]
            steps.append((start, at + len(line.rstrip(b"\r\n"))))
        parted = not line.decode().strip()
        at += len(line)
    return steps


def decode(tokens):
    """The text in tokens; special ones say nothing, bytes that are no UTF-8 become U+FFFD."""
    return bytes(int(token) for token in tokens if token < 256).decode(errors="replace")


def read_chats(path, args, training=True):
    """Samples of a file with {"messages": [...]} on every line. Raises DataError that names the line."""
    chats, bad = [], 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                if line.strip():
                    chats.append(encode(json.loads(line)["messages"], args.unmask_user and training))
            except (ValueError, TypeError, LookupError, RecursionError) as error:
                bad += 1
                if not args.skip_bad_chats:
                    raise DataError(f"{path}:{number}: no chat ({first_line(error)}), expected {CHAT}") from None
    short = [sample for sample in chats if len(sample.tokens) <= args.max_length]
    if bad:
        say(f"{path}: left out {bad} lines that are no chats")
    if len(short) < len(chats):
        longest = max(len(sample.tokens) for sample in chats)
        what = f"{path}: {len(chats) - len(short)} of {len(chats)} chats are longer than --max_length {args.max_length}"
        if not training:  # the scores would be those of easier chats
            raise DataError(f"{what}, expected --max_length {longest}, the longest, or a file without them")
        say(f"{what} and left out; the longest has {longest} tokens")
    if not short:
        raise DataError(f"{path}: no chats, expected one on each line")
    return short


CHAT = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, these two in turn, a '
    "system message before them or none; --skip_bad_chats leaves out what is no chat"
)
PEOPLE = ("Ann", "Bob", "Cid", "Dot", "Eva", "Fay", "Gus", "Hal")
THINGS = ("figs", "nuts", "pens", "eggs", "caps", "keys")


@functools.lru_cache
def make_world(seed, unmask_user):
    """Word problems: every start 2 .. 9 and three events, a double at most once; a tenth is held out.

    "Ann has 2 figs, doubles, gets 6, loses 3." -> "2*2=4", "4+6=10", "10-3=7", with a blank line between the steps. No
    value leaves 1 .. 20. The seed shuffles the problems and deals out people and things. Lists of samples: training,
    validation.
    """
    events = [(f"gets {n}", f"+{n}", 1, n) for n in range(1, 10)]  # told, written, times, plus
    events += [(f"loses {n}", f"-{n}", 1, -n) for n in range(1, 10)]
    events += [("doubles", "*2", 2, 0)]
    problems = []
    for start, *story in itertools.product(range(2, 10), events, events, events):
        values = [start]
        for _, _, times, plus in story:
            values.append(values[-1] * times + plus)
        if min(values) >= 1 and max(values) <= 20 and story.count(events[-1]) <= 1:
            steps = [f"{value}{event[1]}={new}" for value, event, new in zip(values, story, values[1:])]
            problems.append((start, ", ".join(event[0] for event in story), "\n\n".join(steps)))
    generator, n, samples = np.random.default_rng(seed), len(problems), []
    for i, person, thing in zip(generator.permutation(n), generator.choice(PEOPLE, n), generator.choice(THINGS, n)):
        start, story, answer = problems[i]
        question = {"role": "user", "content": f"{person} has {start} {thing}, {story}."}
        samples.append(encode([question, {"role": "assistant", "content": answer}], unmask_user))
    return samples[n // 10 :], samples[: n // 10]


# ---- data: packed rows ----------------------------------------------------------------------------------------------


def find_pairs(sample, args):
    """What has to predict what in a chat, as (context, start, end): tokens[:context] the state of tokens[start:end].

    --view_based_jepa: the last question, and all before it, predicts its answer. Otherwise each of the first
    --num_prediction_steps steps, and all before it, predicts the next one; an answer of one step has no pair.
    """
    if args.view_based_jepa:
        return [(sample.answer - 1, sample.answer - 1, len(sample.tokens))]
    steps = sample.steps[: args.num_prediction_steps + 1]
    return [(end, *following) for (_, end), following in zip(steps, steps[1:])]


def pack(chats, pairs, predictors):
    """One row per chat: the chat, then for each pair the predictor tokens and the target once more, by itself.

                 chat, causal                  pair 1                    pair 2
        tokens   question, a, blank, b, ...    P0 P1      | b            P0 P1      | c           PAD
        position 0 1 2 ...                     on from a  | 0 1 2 ...    on from b  | 0 1 2 ...   0
        segment  0                             1          | 2            3          | 4           -1
        sees     chat                          chat to a  | itself       chat to b  | itself      itself

    chats: int arrays; pairs: for each chat a list from find_pairs; predictors: K. Returns int64 arrays: tokens [B, T];
    if there is a pair at all, positions and segment [B, T], limit [B, E] (see packed_mask; before the last E tokens all
    rows hold their chats), ends [P, 2], where in the flattened rows predictions and targets stand, and text [P], equal
    for equal targets. Both states are those of a pass over that text alone (with K = 0, the chat's own state predicts).
    """
    K, ends, texts = predictors, [], {}
    T = max(len(chat) + sum(K + end - start for _, start, end in mine) for chat, mine in zip(chats, pairs))
    count, shape = np.arange(T), (len(chats), T)
    tokens, segments = np.full(shape, PAD), np.full(shape, -1)
    positions, limits = np.zeros(shape, np.int64), np.zeros(shape, np.int64)

    def put(row, at, piece, position, segment, limit):
        stop = at + len(piece)
        tokens[row, at:stop], positions[row, at:stop] = piece, position + count[: len(piece)]
        segments[row, at:stop], limits[row, at:stop] = segment, limit
        return stop

    for row, (chat, mine) in enumerate(zip(chats, pairs)):
        at = put(row, 0, chat, 0, 0, 0)
        for i, (context, start, end) in enumerate(mine):
            at = put(row, at, VOCABULARY + count[:K], context, 2 * i + 1, context)
            prediction, target = at - 1 if K else context - 1, chat[start:end]
            at = put(row, at, target, 0, 2 * i + 2, 0)
            text = texts.setdefault(target.tobytes(), len(texts))  # a number for each text
            ends.append((row * T + prediction, row * T + at - 1, text))
    if not ends:
        return {"tokens": tokens}
    ends, limits = np.array(ends), limits[:, min(map(len, chats)) :]
    arrays = {"tokens": tokens, "positions": positions, "segment": segments, "limit": limits}
    return {**arrays, "ends": ends[:, :2], "text": ends[:, 2]}


def packed_mask(segment, limit):
    """Whom the last E tokens of packed rows may look at, bool [B, 1, E, T]: from int tensors, made on their device.

    segment: [B, T]; limit: [B, E]. A token sees those of its own segment up to itself, and the first `limit` tokens of
    the row, where the chat stands. Padding is a segment of its own: a row of the mask without any True would give NaN.
    """
    at, E = torch.arange(segment.shape[1], device=segment.device), limit.shape[1]
    own = (segment[:, -E:, None] == segment[:, None, :]) & (at[-E:, None] >= at)  # [B, E, T]
    return (own | (at < limit[:, :, None]))[:, None]


def load_chats(args):
    """Samples to train on and to validate with. Raises DataError."""
    if not (args.train_file or args.eval_file):
        return make_world(args.seed, args.unmask_user)
    optional = args.eval_only and args.eval_file  # an evaluation does without the training file when it is gone
    train = []
    if args.train_file and not (optional and not Path(args.train_file).exists()):
        train = read_chats(args.train_file, args)
    if args.eval_file:
        val = read_chats(args.eval_file, args, training=False)
    else:
        cut = len(train) // 10 or 1
        train, val = train[:-cut], train[-cut:]
    known = {sample.tokens.tobytes() for sample in train}
    fresh = [sample for sample in val if sample.tokens.tobytes() not in known]
    if len(fresh) < len(val):
        say(f"left out {len(val) - len(fresh)} of {len(val)} chats of validation: they stand in training as well")
    if not fresh or not (train or optional):
        raise DataError(f"{args.eval_file or args.train_file}: no chat is left to train or evaluate on, expected more")
    return train, fresh


def make_data(args, config=None):
    """The run's datasets and what the shared part needs to know about them (listed there). Raises DataError."""
    config = config or Config(args.hidden_size, args.num_layers, args.num_heads, args.predictors)
    if args.prompt:  # needs no chats
        return {"config": config, "predict": lambda model: respond(model, args)}
    train, val = load_chats(args)
    jepa = not args.regular and (args.lbd > 0 or args.force_pairs)
    if jepa and not args.eval_only:
        paired = sum(bool(find_pairs(sample, args)) for sample in train)
        hint = "; warning: the others learn the next token alone; --view_based_jepa has a pair in each"
        say(f"pairs in {paired:,} of {len(train):,} chats{hint if 2 * paired < len(train) else ''}")
    num_rows = args.batch_size * args.grad_accum * world_size()

    def collate(picked, extra):
        training, chats = "position" in extra, [sample.tokens for sample in picked]
        pairs = [find_pairs(sample, args) if training and jepa else [] for sample in picked]
        skipped = jepa * sum(not mine for mine in pairs)
        if training:
            # A number for each update: every process and micro-batch skips the pairs, or none, with equal directions.
            draw = int(hash64(extra["position"][:1] // num_rows, args.seed + 1)[0])
            if draw / 2**64 >= args.jepa_ratio:  # skipping costs a plain pass
                pairs = [[] for _ in picked]
        batch = pack(chats, pairs, config.predictors)
        if "ends" in batch and args.sigreg:
            directions = np.random.default_rng(draw).standard_normal((config.hidden_size, 256), np.float32)
            batch["directions"] = directions / np.linalg.norm(directions, axis=0)
        labels = np.full(batch["tokens"].shape, IGNORE)  # [B, T]
        for row, sample in zip(labels, picked):
            first = 0 if training else sample.answer - 1  # validation is always over the last answers
            row[first : len(sample.labels)] = sample.labels[first:]
        at = np.flatnonzero(labels != IGNORE)  # places in the flattened rows
        counts = np.array([len(at), len(batch.get("ends", ()))], np.float32)
        return batch | {"at": at, "next": labels.flat[at], "counts": counts, "skipped": skipped}

    def baselines():
        learned, right = ([each.tokens[each.answer :].tobytes() for each in chats] for chats in (train, val))
        right = right[: args.eval_samples or None]
        return {"common_exact_match": right.count(statistics.mode(learned)) / len(right)} if train else {}

    warn = functools.cache(say)  # each text once in a run
    return {
        "train": train,
        "val": val,
        "collate": collate,
        "config": config,
        "baselines": baselines,
        "describe": lambda metrics: describe(metrics, warn),
        "report": report,
    }


def describe(metrics, warn):
    """The text of a log line. warn(text) is called where the views have collapsed."""
    names = {"loss": "Loss", "llm_loss": "LM", "jepa_loss": "JEPA", "exact_match": "Exact"}
    parts = [f"{title}: {metrics[name]:.4f}" for name, title in names.items() if name in metrics]
    if "cos_unpaired" in metrics:
        paired, unpaired = metrics["cos_paired"], metrics["cos_unpaired"]
        parts.append(f"Cos: {paired:.3f} paired, {unpaired:.3f} unpaired")
        if unpaired > 0.95 and paired - unpaired < 0.02:
            warn(
                "warning: the embeddings have collapsed: a prediction is as close to any other target as to its own, "
                "so the JEPA loss is small and teaches nothing. --stop_grad_target slows this, --sigreg 0.02 and "
                "--jepa_loss infonce forbid it, --lbd 0 does without."
            )
    return " | ".join(parts)


def report(metrics):
    """The closing table: the model beside an answer that needs no training."""
    lines = [f"{'validation':22}{'loss':>8}{'exact':>8}{'prefix':>8}"]
    lines.append(f"{'this model':22}{metrics['loss']:8.4f}{metrics['exact_match']:8.4f}{metrics['prefix_match']:8.4f}")
    if "common_exact_match" in metrics:
        lines.append(f"{'the commonest answer':22}{'-':>8}{metrics['common_exact_match']:8.4f}{'-':>8}")
    return "\n".join(lines)


# ---- one micro-batch, evaluation, generation ------------------------------------------------------------------------


def compute_loss(model, batch, carry, args):
    """The losses of one micro-batch: gamma * next token + lbd * JEPA.

    batch: from collate, and the shared part's `step` and `share` float [2], this micro-batch's part of the update's
    supervised tokens and of its pairs. Returns its part of the update's loss, metrics as (sum, count) pairs and None.
    """
    tokens, at = batch["tokens"], batch["at"]
    token_share, pair_share = batch["share"]
    mask = packed_mask(batch["segment"], batch["limit"]) if "segment" in batch else None
    h = model(tokens, batch.get("positions"), mask).flatten(0, 1)  # [B * T, D]
    llm_loss = F.cross_entropy(unwrap(model).head(h[at]), batch["next"])
    loss, B, num_pairs, similar = args.gamma * token_share * llm_loss, len(tokens), len(batch.get("ends", ())), {}
    sums = to_sums({"llm_loss": llm_loss.detach()}, len(at))  # per token; the JEPA ones per pair
    if num_pairs:
        views = h[batch["ends"]].float()  # [P, 2, D]
        predicted, target = views.unbind(1)
        target = target.detach() if args.stop_grad_target else target
        with torch.autocast(h.device.type, enabled=False):  # cosines of .99 and .98 must differ
            jepa = jepa_loss(predicted, target, args.jepa_loss, batch["text"])
            sums |= to_sums({"jepa_loss": jepa.detach()}, num_pairs)
            # rms_norm has given the views the length that a Gaussian of variance 1 has. The test is on all views of the
            # micro-batch together, so (as with infonce's negatives) it depends on how an update is split.
            if "directions" in batch:
                spread = sigreg(views.flatten(0, 1), batch["directions"])
                sums |= to_sums({"sigreg_loss": spread.detach()}, num_pairs)
                jepa = jepa + args.sigreg * spread
            similar = cosines(predicted, target, batch["text"])
        loss = loss + args.lbd * pair_share * jepa
        sums |= {name: ((cosine * meant).sum(), meant.sum()) for name, (cosine, meant) in similar.items()}
    sums["loss"] = loss.detach(), token_share  # the mean of the updates' own losses
    sums |= to_sums({"valid_tokens": len(at) / B, "pairs": num_pairs / B, "skipped": batch["skipped"] / B}, B)
    if args.debug:
        print_debug(batch, llm_loss, similar, args)
    return loss, sums, None


def print_debug(batch, llm_loss, similar, args):
    """--debug: what this micro-batch holds; from 5 on also how alike its views are. A CPU-GPU sync point."""
    tokens, num_pairs, skipped = batch["tokens"], len(batch.get("ends", ())), int(batch["skipped"])
    B, used = len(tokens), int((tokens != PAD).sum())
    plain = int((batch["segment"] == 0).sum()) if "segment" in batch else used
    say(
        f"[DEBUG Loss] step={batch['step'] + 1}, input_batch={B}, forward_batch={B}, tokens forward={used} "
        f"plain={plain} ({used / plain:.2f}x), padding={1 - used / tokens.numel():.1%}\n"
        f"  valid_tokens={len(batch['at'])}, loss_per_token={llm_loss:.4f}, pairs={num_pairs}, skipped={skipped}"
    )
    for name, (cosine, meant) in similar.items() if args.debug >= 5 else ():
        if len(c := cosine[meant]):
            spread = c.std(correction=0)
            say(f"  {name:12} mean={c.mean():.4f} std={spread:.4f} min={c.min():.4f} max={c.max():.4f}")


@torch.no_grad()
def evaluate(model, data, args):
    """Validation means. loss and llm_loss: over the tokens of the last answers, whatever was supervised in training.

    exact_match: the greedy answer is the chat's; prefix_match: it begins with it. Neither needs generating: if every
    token is the likeliest one given the right ones before it, greedy generation is right.
    """
    sums = {}
    for batch in eval_batches(data["val"], args, data["collate"], args.eval_samples):
        tokens, at, right = batch["tokens"], batch["at"], batch["next"]
        with autocast(args):
            logits = model.head(model(tokens).flatten(0, 1)[at])  # [tokens of the answers, VOCABULARY]
        loss = F.cross_entropy(logits, right)
        hit = torch.ones_like(tokens, dtype=torch.bool)  # [B, T]; what nobody asks for is right
        hit.view(-1)[at] = logits.argmax(-1) == right
        exact = hit.all(1).float().mean()
        hit.view(-1)[at] |= right == END  # a longer answer begins with the right one
        add_sums(sums, to_sums({"loss": loss, "llm_loss": loss}, len(at)))
        add_sums(sums, to_sums({"exact_match": exact, "prefix_match": hit.all(1).float().mean()}, len(tokens)))
    return means(sums)


@torch.no_grad()
def generate(model, prompt, limit):
    """A Model's greedy answer to a prompt (ints [T]): a list of at most `limit` tokens, END included."""
    new = torch.as_tensor(prompt, device=model.embed.weight.device)[None]
    answer, position, cache = [], None, {}
    while len(answer) < limit and END not in answer[-1:]:
        new = model.head(model(new, position, cache=cache)[:, -1:]).argmax(-1)  # [1, 1]
        position = torch.full_like(new, len(prompt) + len(answer))
        answer.append(int(new))
    return answer


def respond(model, args):
    """The answer to --prompt, as text."""
    messages = [{"role": "user", "content": args.prompt}, {"role": "assistant", "content": "?"}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    sample = encode(messages)
    if sample.answer >= args.max_length:
        raise DataError(f"--prompt: {sample.answer} tokens, expected fewer than --max_length {args.max_length}")
    with autocast(args):
        return decode(generate(model, sample.tokens[: sample.answer], args.max_length - sample.answer))


# ---- flags ----------------------------------------------------------------------------------------------------------


def add_method_args(parser):
    """Add this script's flags. Returns the flags that name data (the first brings real data), the demonstration's
    defaults, the flags --eval_only may be given anew, and check(args), which calls parser.error for what would be wrong
    or mislead.
    """
    flag = flag_group(parser, "data")
    flag("--train_file", None, '{"messages": [...]} on every line; without it, the built-in world of word problems')
    flag("--eval_file", None, "the same, to evaluate on (default: the last tenth of --train_file)")
    flag("--max_length", 1024, "longer chats are left out of training, refused in --eval_file", 8)
    flag("--skip_bad_chats", False, "leave out lines that are no chats, and count them (default: refuse)")
    flag("--unmask_user", False, "supervise every token of a training chat, not the answers alone")
    flag = flag_group(parser, "model")
    flag("--hidden_size", 128, "width of the network", 2)
    flag("--num_layers", 4, "blocks of the network", 1)
    flag("--num_heads", 8, "attention heads; twice their number divides hidden_size", 1)
    flag = flag_group(parser, "objective: gamma * next token + lbd * JEPA")
    flag("--regular", False, "the next token alone, whatever the flags below say: the same run as --lbd 0")
    flag("--lbd", 0.5, "weight of the JEPA loss; 0: none, and no pairs in the rows")
    flag("--gamma", 1.0, "weight of the next-token loss")
    flag("--num_prediction_steps", 2, "pairs per chat: how many steps predict their next", 1)
    flag("--predictors", 2, "predictor tokens (K); 0: the step's last token predicts")
    flag("--view_based_jepa", False, "one pair per chat: the question predicts the answer")
    flag("--jepa_loss", "cosine", "distance of the views", choices=["cosine", "mse", "l2", "infonce"])
    flag("--sigreg", 0.0, "weight of SIGReg beside the distance: no collapse; try 0.02; 0: none")
    flag("--jepa_ratio", 1.0, "part of the updates that have the JEPA loss", 0, 1)
    flag("--stop_grad_target", False, "no gradient through the targets: slows the collapse")
    flag("--force_pairs", False, "with --lbd 0: build the pairs all the same, for comparison")
    flag("--debug", 0, "1: print what every micro-batch holds; 5: its cosines as well")
    flag = flag_group(parser, "prediction, with --eval_only --out_dir RUN")
    flag("--prompt", None, "answer one question")
    flag("--system", None, "the system prompt before it")
    parser.set_defaults(lr=2e-3, min_lr_ratio=0.0, warmup_steps=50)
    demo = {"num_layers": 2, "sigreg": 0.02, "batch_size": 16, "lr": 3e-3, "max_train_steps": 700}
    demo |= {"eval_interval": 100, "eval_samples": 512, "log_interval": 50}

    def check(args):
        if args.jepa_loss == "infonce" and args.batch_size == 1:
            parser.error("--jepa_loss infonce needs --batch_size 2 or more: other pairs of a micro-batch are negatives")
        if args.gamma == 0 and (args.regular or args.lbd == 0):
            parser.error("--gamma 0 without a JEPA loss leaves nothing to learn")
        if args.eval_file and not (args.train_file or args.eval_only):
            parser.error("--eval_file needs --train_file")
        if (args.prompt or args.system) and not (args.prompt and args.eval_only):
            parser.error("--prompt, and --system before it, need --eval_only and the --out_dir of a run")

    return ("train_file", "eval_file"), demo, {"prompt", "system", "max_length", "skip_bad_chats"}, check


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
