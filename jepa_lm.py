"""LLM-JEPA: a language model that predicts the next token, and the embedding of the answer's next step.

A small decoder over bytes, or a published model (Llama, Mistral, Qwen, SmolLM), learns chats. Besides the usual loss on
the assistant's tokens, a few predictor tokens after a step of the answer learn to predict the embedding of the next
step, encoded alone (LLM-JEPA, arXiv 2509.14252). One packed row holds the chat, the predictor tokens and the steps to
encode alone, so a single forward pass computes both losses at about 1.5 times the plain cost (more for chats of
thousands of tokens). Without pairs (--regular or --lbd 0: the same run, bit for bit) it is the plain pass.

  python jepa_lm.py                                                            # laptop, a minute
  python jepa_lm.py --init_from MODEL --train_file train.jsonl --eval_file test.jsonl --view_based_jepa   # any GPU
  torchrun --nproc_per_node 8 jepa_lm.py --train_file train.jsonl --eval_file test.jsonl                  # many GPUs

Without --train_file it learns a synthetic dataset of word problems. The first command's last lines, seed 0, one thread
(the training loss counts SIGReg too):

  Step 600/600, Train Loss: 0.0589 | LM: 0.0067 | Pairs: 2.0000 | JEPA: 0.0048 | Cos: 0.995 paired, -0.002 unpaired
  Step 600/600, Val Loss: 0.0053 | LM: 0.0053 | Exact: 0.9785
  validation                loss   exact  prefix
  this model              0.0053  0.9785  0.9785
  before training         5.8087  0.0000  0.0000
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import datetime
import functools
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
    from data import DataError, expecting, fingerprint, fixed_batches, size_of, training_batches
except ImportError as error:
    sys.exit(f"error: {error}; expected data.py beside this script and no other `data` before it on the path")

# ---- model ----------------------------------------------------------------------------------------------------------

IGNORE = -100  # label of a position without a loss
PAD = -1  # fills rows up


@dataclasses.dataclass
class Config:
    """What defines the model. Raises DataError for sizes that do not fit each other."""

    hidden_size: int = 128
    num_layers: int = 4
    num_heads: int = 8
    predictors: int = 2  # predictor tokens; their ids follow the vocabulary
    # What follows comes from a published model's folder; these are the byte model's.
    vocab_size: int = 256
    num_key_value_heads: int = 0  # 0: num_heads
    head_dim: int = 0  # 0: hidden_size / num_heads
    intermediate_size: int = 0  # 0: 8/3 hidden_size; with SwiGLU's three matrices the size of a plain network's 4
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # the numbers of Llama 3's
    model_type: str = "qwen3"  # has RMSNorm of each query and key; qwen2 has a bias on q, k and v
    attention_bias: bool = False  # on q, k, v and o
    tie_word_embeddings: bool = True  # the head is the embedding table
    sliding_window: int = 0  # attention would reach no further; 0: no limit
    files: dict | None = None  # of that folder: name -> text

    def __post_init__(self):
        D, heads = self.hidden_size, self.num_heads
        if not self.head_dim and D % (2 * heads):
            raise DataError(f"hidden_size is {D}, expected a multiple of 2 * num_heads = {2 * heads}")
        self.head_dim = self.head_dim or D // heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.intermediate_size = self.intermediate_size or math.ceil(8 / 3 * D / 64) * 64


def rotary(positions, config):
    """Cosine and sine of RoPE's angles at positions [B, T], each [B, T, 1, d / 2], float32."""
    d, scaling = config.head_dim, config.rope_scaling
    frequencies = config.rope_theta ** (-torch.arange(0, d, 2, device=positions.device) / d)
    if scaling:  # of Llama 3: what turns seldom within the length of the first training turns more slowly
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        turns = frequencies * scaling["original_max_position_embeddings"] / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling["factor"])
    angles = positions[:, :, None, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Rotate x [B, T, heads, d], the first half against the second."""
    x1, x2 = x.chunk(2, -1)
    return torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)


def linears(**sizes):
    """nn.Linear layers by name; sizes: (inputs, outputs, bias)."""
    return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()})


class Block(nn.Module):
    """The transformer block of Llama, Mistral and Qwen, in their names.

    h = h + o(attention(rope(norm(q(n(h)))), rope(norm(k(n(h)))), v(n(h)))); h = h + down(silu(gate(n(h))) * up(n(h)))
    """

    def __init__(self, config):
        super().__init__()
        D, d, inner, eps = config.hidden_size, config.head_dim, config.intermediate_size, config.rms_norm_eps
        heads, keys = config.num_heads * d, config.num_key_value_heads * d
        bias = config.attention_bias or config.model_type == "qwen2"
        self.input_layernorm = nn.RMSNorm(D, eps)
        self.self_attn = linears(
            q_proj=(D, heads, bias),
            k_proj=(D, keys, bias),
            v_proj=(D, keys, bias),
            o_proj=(heads, D, config.attention_bias),
        )
        for name in ("q_norm", "k_norm"):
            self.self_attn[name] = (nn.RMSNorm if config.model_type == "qwen3" else nn.Identity)(d, eps)
        self.post_attention_layernorm = nn.RMSNorm(D, eps)
        self.mlp = linears(gate_proj=(D, inner, False), up_proj=(D, inner, False), down_proj=(inner, D, False))

    def forward(self, h, cos, sin, mask):
        attn, mlp, x = self.self_attn, self.mlp, self.input_layernorm(h)
        d = 2 * cos.shape[-1]
        q, k, v = (attn[name](x).unflatten(-1, (-1, d)) for name in ("q_proj", "k_proj", "v_proj"))
        q, k = rotate(attn.q_norm(q.float()), cos, sin), rotate(attn.k_norm(k.float()), cos, sin)  # [B, T, heads, d]
        k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))  # queries may share a key
        x = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), mask, is_causal=mask is None)
        h = h + attn.o_proj(x.transpose(1, 2).flatten(2))
        x = self.post_attention_layernorm(h)
        return h + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


class Model(nn.Module):
    """A decoder-only language model."""

    def __init__(self, config):
        super().__init__()
        self.config, self.grad_checkpoint = config, False
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Drawn last, with the predictors in the last rows: the language model is the same for any number of them.
        table = 0.05 * torch.randn(config.vocab_size + config.predictors, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)

    def forward(self, tokens, positions=None, mask=None):
        """Final states, after the last norm: [B, T, D].

        tokens: [B, T] of any integer dtype; predictor k has id vocab_size + k, padding PAD. positions: int64 [B, T];
        None: 0, 1, ... mask: bool [B, 1, T, T], True where a token may attend to another, or the logarithm of that;
        None: causal.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        cos, sin = rotary(positions, self.config)
        h = self.embed_tokens(tokens.long().clamp(0))  # padding, -1, has no row; nobody sees what it gets
        for block in self.layers:
            if self.grad_checkpoint:
                h = checkpoint(block, h, cos, sin, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                h = block(h, cos, sin, mask)
        return self.norm(h)

    def head(self, h):
        """Logits [..., vocab_size] of final states [..., D], in float32: bfloat16 has ties for the best."""
        table = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.float(), table.weight[: self.config.vocab_size].float())


# ---- published models -----------------------------------------------------------------------------------------------

FILES = "config.json generation_config.json tokenizer.json tokenizer_config.json chat_template.jinja"
SUPPORTED = {
    "model_type": ("llama", "mistral", "qwen2", "qwen3"),
    "hidden_act": ("silu",),
    "rope_type": ("default", "llama3"),
    "partial_rotary_factor": (1,),
    "mlp_bias": (False,),
    "quantization_config": (None,),
}


def read_folder(folder):
    """What the folder of a published model says of our Config, as a dict. Raises DataError for what we do not have."""
    files = {path.name: path.read_text("utf-8") for path in folder.iterdir() if path.name in FILES.split()}
    config = {"tie_word_embeddings": False} | json.loads(files["config.json"])
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    config |= {"rope_type": rope.get("type", "default")} | rope
    for name, known in SUPPORTED.items():
        if (value := config.get(name, known[0])) not in known:
            raise DataError(f"{folder}/config.json: {name} is {value!r}, expected one of {known}")
    if config["model_type"] != "mistral" and not config.get("use_sliding_window"):
        config["sliding_window"] = 0
    config |= {
        "num_layers": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "rope_scaling": rope if config["rope_type"] == "llama3" else None,
        # A chat template may ask for the date: chats of a resumed run must not change.
        "files": files | {"date": f"{datetime.date.today()}"},
    }
    return {name: config[name] for name in Config.__dataclass_fields__ if config.get(name) is not None}


def to_our_names(weights, model):
    """The names are ours. Predictors, which a published model lacks, are appended to its table, with its spread."""
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    table, K = weights["embed_tokens.weight"].float(), model.config.predictors
    if len(table) == model.config.vocab_size:
        weights["embed_tokens.weight"] = torch.cat([table, table.std() * torch.randn(K, table.shape[1])])
    return weights


def from_pretrained(folder, predictors=2):
    """The Model in a published folder. Raises DataError."""
    source = load_weights(folder)
    model = Model(Config(**source["config"], predictors=predictors))
    model.load_state_dict(to_our_names(source["weights"], model))
    return model


def export(model, args, tokenizer):
    """Write --export, a folder for transformers, vLLM and --init_from; returns a line to print. Raises DataError."""
    files, folder = model.config.files, Path(args.export)
    if not files:
        raise DataError("--export: the byte model has no published form, expected a run that began with a folder")
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    weights = {"model." * (name != "lm_head.weight") + name: weight for name, weight in model.state_dict().items()}
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][: model.config.vocab_size].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    files["config.json"] = json.dumps(json.loads(files["config.json"]) | {"torch_dtype": "float32", "dtype": "float32"})
    for name in files.keys() & FILES.split():
        (folder / name).write_text(files[name], "utf-8")
    return f"wrote {folder}"


# ---- the losses: the part people copy -------------------------------------------------------------------------------


def jepa_loss(predicted, target, kind="cosine", text=None):
    """Mean distance of each prediction from its target, both [P, D] of any float dtype; a float32 scalar, 0 if P = 0.

    kind: "cosine": 1 - cos(p, t), as in the paper; "mse": mean square over P and D; "l2": length of p - t; "infonce":
    cross-entropy of picking one's own target among all P by cosine / 0.07. text: int [P], equal for targets with the
    same text, which are not negatives of each other. Gradients flow through both sides and stay bounded at zero
    vectors.
    """
    p, t = predicted.float(), target.float()
    p_unit, t_unit = F.normalize(torch.stack([p, t]), dim=-1, eps=1e-3)  # [P, D]; gradient <= 1 / eps
    logits = p_unit @ t_unit.T / 0.07  # [P, P]
    if text is not None:
        logits = logits.masked_fill((text[:, None] == text).fill_diagonal_(False), -math.inf)
    distance = {
        "cosine": 1 - (p_unit * t_unit).sum(-1),
        "mse": (p - t).square().mean(-1),
        "l2": (p - t).norm(dim=-1),
        "infonce": -logits.log_softmax(-1).diagonal(),
    }[kind]
    return distance.sum() / max(len(p), 1)


def sigreg(views, directions):
    """How far views [N, D], of any float dtype, are from an isotropic Gaussian: a float32 scalar.

    directions: float32 [D, M] of any length, drawn anew for each update. The mean over them of the Epps-Pulley
    statistic: N times the integral of |phi_N - phi|^2 phi over 17 points, phi_N being the characteristic function of
    the projected views and phi that of a standard Gaussian. About 1 for Gaussian views, about N if all views are equal.
    SIGReg of LeJEPA, arXiv 2511.08544.
    """
    t = torch.linspace(0, 3, 17, device=views.device)  # the integrand is even: the half from 0 on counts twice
    phi = torch.exp(-t.square() / 2)
    angles = (views.float() @ F.normalize(directions, dim=0))[..., None] * t  # [N, M, 17]
    distance = (angles.cos().mean(0) - phi).square() + angles.sin().mean(0).square()
    return 2 * len(views) * torch.trapezoid(distance * phi, t).mean()


@torch.no_grad()
def cosines(predicted, target, text):
    """Mean cosines of views [P, D], as (sum, count) pairs; text: int [P], equal for equal targets.

    cos_paired: of each prediction with its own target; cos_unpaired: with the targets of other texts. Collapse: both
    are equally high.
    """
    p, t = F.normalize(torch.stack([predicted, target]).float(), dim=-1)
    other = text[:, None] != text
    return {"cos_paired": ((p * t).sum(), len(p)), "cos_unpaired": ((p @ t.T * other).sum(), other.sum())}


# ---- data: tokens, chats, the synthetic dataset ---------------------------------------------------------------------


class Bytes:
    """The vocabulary without a file: all bytes. The last four, never used by UTF-8, close a turn or open one."""

    roles = {"end": "\udcff", "system": "\udcfe", "user": "\udcfd", "assistant": "\udcfc"}  # bytes, by surrogateescape
    special = re.compile("[\udcfc-\udcff]")

    def render(self, messages, add_generation_prompt=False):
        turns = [self.roles[message["role"]] + message["content"] + self.roles["end"] for message in messages]
        return "".join(turns) + self.roles["assistant"] * add_generation_prompt

    def tokens(self, text):
        """The tokens of text, and where in it each of them begins."""
        characters = [c.encode(errors="surrogateescape") for c in text]
        return list(b"".join(characters)), [at for at, c in enumerate(characters) for _ in c]

    def decode(self, ids, special=False):
        """The text of ids. Invalid UTF-8 and, if asked for, special tokens are shown as U+FFFD."""
        return bytes(i for i in ids if special or i < 252).decode(errors="replace")


class Tokenizer:
    """A published model's tokenizer and chat template. files: see read_folder."""

    def __init__(self, files):
        import tokenizers
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # a template is foreign code

        def refuse(message):
            raise ValueError(f"the chat template: {message}")

        self.inner = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
        self.inner.no_truncation()
        self.inner.no_padding()
        special = [token.content for token in self.inner.get_added_tokens_decoder().values() if token.special]
        # The longest first; without any, a pattern that never matches.
        self.special = re.compile("|".join(map(re.escape, sorted(special, reverse=True))) or "(?!)")
        settings = json.loads(files["tokenizer_config.json"])
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        date = datetime.date.fromisoformat(files["date"])
        environment.globals |= {"raise_exception": refuse, "strftime_now": date.strftime, "tools": None}
        for name in ("bos_token", "eos_token"):
            token = settings.get(name) or ""
            environment.globals[name] = token["content"] if isinstance(token, dict) else token
        template = environment.from_string(files.get("chat_template.jinja") or settings["chat_template"])
        self.render = template.render

    def tokens(self, text):
        found = self.inner.encode(text, add_special_tokens=False)
        return found.ids, [start for start, _ in found.offsets]

    def decode(self, ids, special=False):
        return self.inner.decode(list(ids), skip_special_tokens=not special)


BYTES = Bytes()


def open_tokenizer(folder):
    """The Tokenizer of a published model's folder."""
    return Tokenizer(read_folder(Path(folder))["files"])


class Sample(NamedTuple):
    """One chat. labels[i] is the token to predict at position i, or IGNORE."""

    tokens: np.ndarray  # int32 [T]
    labels: np.ndarray  # int32 [T]
    steps: list  # [start, end) of each step of the last answer in tokens, without the blank lines between them
    answer: int  # where the last answer begins in tokens; everything before is the prompt

    @property
    def length(self):
        """Tokens of the chat alone: batches are sorted by it, and are the same for all flags."""
        return len(self.tokens)


# From the beginning of a line to the last visible character before a blank line or the end.
STEP = re.compile(r"[^\S\n]*\S(?:[^\S\n]*(?:\n[^\S\n]*)?\S)*")


def encode(messages, unmask_user=False, tokenizer=BYTES):
    """A chat as a Sample: [system,] then user and assistant in turn, as the tokenizer renders them.

    messages: list of {"role": ..., "content": ...}; "weight": 0 or "train": false masks an answer. The text and the end
    of every other answer are supervised; with unmask_user, every token but the first and masked answers. What follows
    the last answer to learn is left out. The whole text is tokenized at once, as everybody does; a token across a
    boundary belongs to what it begins in. Raises ValueError for anything else, and for a template that hides where an
    answer begins or ends.
    """
    check_chat(messages)
    # A prompt could not ask for an empty system turn.
    messages = [message for message in messages if message["content"] or message["role"] != "system"]
    while messages and not learns(messages[-1]):
        messages.pop()
    if not messages or not messages[-1]["content"].strip():
        raise ValueError("no answer to learn, or the last one is empty")
    text = tokenizer.render(messages=messages)
    tokens, starts = tokenizer.tokens(text)
    supervised = np.full(len(tokens), unmask_user)
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.render(messages=messages[:i], add_generation_prompt=True)
            # Some templates strip the content, some put a space or an empty thought before it.
            begin, content = len(prompt), message["content"].strip()
            at = text.find(content, begin)
            end = tokenizer.special.search(text, at + len(content))
            if not text.startswith(prompt) or at < 0 or not end or tokenizer.special.search(text[begin:at]):
                raise ValueError(f"the chat template rewrites message {i + 1}, or hides its end")
            answer, after = np.searchsorted(starts, [begin, end.end()]).tolist()
            supervised[answer:after] = learns(message)
    supervised[after:] = False
    labels = np.where(supervised, tokens, IGNORE)[1:]
    line = text.rfind("\n", begin, at) + 1 or begin
    spans = [step.span() for step in STEP.finditer(text, line, at + len(content))]
    steps = [(first, last) for first, last in np.searchsorted(starts, spans).tolist() if first < last]
    return Sample(np.int32(tokens), np.int32([*labels, IGNORE]), steps, answer)


def learns(message):
    """Whether this is an answer to learn."""
    return message["role"] == "assistant" and 0 not in (message.get("weight"), message.get("train"))


HARMLESS = "id name source dataset category language model prompt_id metadata timestamp"


def refuse_unknown(what, fields, *known):
    """Raises ValueError if a row or message has fields that would be dropped without a word, empty ones aside."""
    if unknown := [name for name, value in fields.items() if value and name not in (*HARMLESS.split(), *known)]:
        raise ValueError(f"{what} has {', '.join(unknown)}, which would be dropped")


def check_chat(messages):
    """Raises ValueError unless these are messages of text, [system,] then user and assistant in turn."""
    for number, message in enumerate(messages, 1):
        refuse_unknown(f"message {number}", message, "role", "content", "weight", "train")
        if not isinstance(content := message.get("content"), str):
            raise ValueError(f"message {number} has content of type {type(content).__name__}, expected text")
        if not {message.get("weight"), message.get("train")} <= {None, 0, 1}:
            raise ValueError(f"message {number} has a weight that is not 0 or 1")
        content.encode()  # raises for half a character: some halves are the byte vocabulary's special tokens
    roles = str([message.get("role") for message in messages])
    if not re.fullmatch(r"\[('system', )?('user', 'assistant'(, )?)+\]", roles):
        raise ValueError(f"roles {roles}")


def read_chats(path, args, tokenizer):
    """Samples of a file with {"messages": [...]} on every line. Raises DataError that names the line."""
    chats, bad = [], collections.Counter()
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                if line.strip():
                    row = json.loads(str(line, "utf-8-sig"))
                    refuse_unknown("the row", row, "messages")
                    chats.append(encode(row.get("messages") or [], args.unmask_user, tokenizer))
            except Exception as error:  # of json, of the tokenizer or our own
                reason = " ".join(str(error).split())
                if not args.skip_bad_chats:
                    raise DataError(f"{path}:{number}: no chat: {reason}, expected {CHAT}") from None
                bad[reason] += 1
    for reason, count in bad.most_common():
        say(f"{path}: left out {count} lines that are no chats: {reason}")
    return chats


def short_chats(chats, path, args):
    """Those of at most --max_length tokens. Raises DataError for others in --eval_file."""
    short = [sample for sample in chats if sample.length <= args.max_length]
    if long := len(chats) - len(short):
        what = f"{path}: {long} of {len(chats)} chats are longer than --max_length {args.max_length}"
        longest = max(sample.length for sample in chats)
        if path == args.eval_file:  # leaving them out would raise the scores
            raise DataError(f"{what}, expected --max_length {longest}, the longest, or a file without them")
        say(f"{what} and left out; the longest has {longest} tokens")
    return short


def load_chats(args, tokenizer):
    """Samples to train on and to validate with. Raises DataError."""
    path, eval_path, train = args.train_file, args.eval_file, []
    if not (path or eval_path):
        with expecting("a chat template that renders them", "word problems"):
            return synthetic_dataset(args.seed, args.unmask_user, tokenizer)
    if path and args.eval_only and not Path(path).exists():
        say(f"warning: {path} is gone, so nothing tells which validation chats were trained on")
    elif path:
        train = read_chats(path, args, tokenizer)
    if eval_path:
        val = read_chats(eval_path, args, tokenizer)
    else:  # a random tenth, always the same: files are often sorted
        np.random.default_rng(0).shuffle(train)
        cut = len(train) // 10 or 1
        train, val = train[cut:], train[:cut]
    known = {sample.tokens.tobytes() for sample in train}
    fresh = [sample for sample in val if sample.tokens.tobytes() not in known]
    if train:
        say(f"left out {len(val) - len(fresh)} of {len(val)} validation chats that are in the training data too")
    train, val = short_chats(train, path, args), short_chats(fresh, eval_path or path, args)
    if not val or not (train or args.eval_only):
        what = "chats are left to train on and to evaluate on, expected more"
        raise DataError(f"--train_file {path}, --eval_file {eval_path}: {len(train)} and {len(val)} {what}")
    return train, sorted(val, key=lambda sample: sample.length)  # evaluated in this order, with little padding


CHAT = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}, these two in turn, '
    "with or without a system message before them; --skip_bad_chats leaves other lines out"
)
PEOPLE = "Ann Bob Cid Dot Eva Fay Gus Hal"
THINGS = "figs nuts pens eggs caps keys"


@functools.cache
def synthetic_dataset(seed, unmask_user, tokenizer=BYTES):
    """Word problems: every start in 2 .. 9 with any three events, at most one a doubling, that stay within 1 .. 20.

    "Ann has 2 figs, doubles, gets 6, loses 3." -> "2*2=4", "4+6=10", "10-3=7", with a blank line between the steps. The
    seed shuffles the problems and assigns people and things. Returns lists of samples: training, validation (a tenth).
    """

    def events(value):
        """What may happen: how it is told, how the answer writes it, and the value after it."""
        yield "doubles", "*2", value * 2
        for n in (*range(-9, 0), *range(1, 10)):
            yield f"{'gets' if n > 0 else 'loses'} {abs(n)}", f"{n:+}", value + n

    problems = [(start, f"{{}} has {start} {{}}", []) for start in range(2, 10)]
    for _ in range(3):
        problems = [
            (after, f"{story}, {event}", [*steps, f"{value}{change}={after}"])
            for value, story, steps in problems
            for event, change, after in events(value)
            if 1 <= after <= 20 and (event != "doubles" or event not in story)
        ]
    rng, samples, held_out = np.random.default_rng(seed), [], len(problems) // 10
    rng.shuffle(problems)
    for _, story, steps in problems:
        question = {"role": "user", "content": story.format(*(rng.choice(x.split()) for x in (PEOPLE, THINGS))) + "."}
        answer = {"role": "assistant", "content": "\n\n".join(steps)}
        samples.append(encode([question, answer], unmask_user, tokenizer))
    return samples[held_out:], samples[:held_out]


# ---- data: packed rows ----------------------------------------------------------------------------------------------


def find_pairs(sample, args):
    """The pairs of a chat as (context, start, end): tokens[:context] predict the last state of tokens[start:end].

    --view_based_jepa: the chat up to the last question predicts the answer. Otherwise each of the first
    --num_prediction_steps steps, with all before it, predicts the next one; an answer of one step has no pair.
    """
    if args.view_based_jepa:
        return [(sample.answer - 1, sample.answer - 1, sample.length)]
    steps = sample.steps[: args.num_prediction_steps + 1]
    return [(end, *following) for (_, end), following in zip(steps, steps[1:])]


def pack(samples, pairs, predictors, whole):
    """One row per chat: the chat, then for each pair the predictor tokens and a copy of the target to encode alone.

                 chat, causal                pair 1                    pair 2                    up to the longest row
        tokens   question, a, blank, b, ...  P0 P1      | b            P0 P1      | c            PAD
        position 0 1 2 ...                   on from a  | 0 1 2 ...    on from b  | 0 1 2 ...    any: nobody sees it
        sees     all before                  chat to a  | itself       chat to b  | itself       all before

    pairs: for each sample a list from find_pairs; predictors: the ids of the predictor tokens, int [K]; whole: whether
    all labels count, or only the last answer's. Returns arrays, int64 where nothing else is said: tokens, positions,
    and start and limit (see packed_mask), [B, T]; ends [P, 2], the places of predictions and targets in the flattened
    rows, and text [P], equal for equal targets; at [N], the places that learn a next token, and next [N], these tokens;
    counts, float32: N and P; skipped: rows without a pair. Both states of a pair equal those of a pass over that text
    alone; with K = 0 the chat's own state predicts.
    """
    K, ends, texts = len(predictors), [], {}
    T = max(sample.length + sum(K + end - begin for _, begin, end in mine) for sample, mine in zip(samples, pairs))
    tokens, labels, start, limit = packed = np.zeros((4, len(samples), T), np.int64)
    tokens[:], labels[:] = PAD, IGNORE
    for row, (sample, mine) in enumerate(zip(samples, pairs)):
        first, at = 0 if whole else sample.answer - 1, sample.length
        tokens[row, :at] = sample.tokens
        labels[row, first:at] = sample.labels[first:]
        for context, begin, end in mine:
            target, predicts = sample.tokens[begin:end], at + K if K else context
            for piece, seen in ((predictors, context), (target, 0)):
                packed[:, row, at : at + len(piece)] = np.broadcast_arrays(piece, IGNORE, at, seen)
                at += len(piece)
            ends.append((row * T + predicts - 1, row * T + at - 1, texts.setdefault(target.tobytes(), len(texts))))
    found, learned = np.array(ends, np.int64).reshape(-1, 3), np.flatnonzero(labels != IGNORE)
    return {
        "tokens": tokens,
        "positions": limit + np.arange(T) - start,
        "start": start,
        "limit": limit,
        "ends": found[:, :2],
        "text": found[:, 2],
        "at": learned,
        "next": labels.flat[learned],
        "counts": np.array([len(learned), len(ends)], np.float32),
        "skipped": sum(not mine for mine in pairs),
    }


def packed_mask(start, limit):
    """What the tokens of packed rows may attend to: bool [B, 1, T, T]. Built on the device of its inputs.

    start, limit: int [B, T]. A token sees its own piece, from `start` up to itself, and the first `limit` tokens of the
    row, which belong to the chat. Padding, with zeros for both, is causal: a mask row without any True would give NaN.
    """
    at = torch.arange(start.shape[1], device=start.device)
    own = (at >= start[..., None]) & (at <= at[:, None])  # [B, T, T]
    return (own | (at < limit[..., None]))[:, None]


def make_data(args, config):
    """The run's datasets and what the shared part needs to know about them (listed there). Raises DataError."""
    flags = {name: value for name, value in vars(args).items() if name in Config.__dataclass_fields__}
    config, tokenizer = Config(**flags | config), BYTES
    if config.files:
        with expecting("the tokenizer of an -Instruct model (pip install safetensors tokenizers)", "tokenizer files"):
            tokenizer = Tokenizer(config.files)
    if 0 < config.sliding_window < args.max_length:
        raise DataError(f"--max_length {args.max_length}, expected at most sliding_window = {config.sliding_window}")
    if args.export or args.prompt:  # needs no chats to learn
        predict = functools.partial(export if args.export else respond, args=args, tokenizer=tokenizer)
        return {"config": config, "predict": predict}
    train, val = load_chats(args, tokenizer)
    jepa = args.lbd > 0 and not args.regular

    def collate(picked, rng=None, rows=None):
        # Every process and micro-batch of an update draws the same. Validation (without rng): the last answers alone.
        on = rng and jepa and rng.random() < args.jepa_ratio
        pairs = [find_pairs(sample, args) if on else [] for sample in picked]
        batch = pack(picked, pairs, config.vocab_size + np.arange(config.predictors), whole=rng)
        if on and args.sigreg:
            batch["directions"] = rng.standard_normal((config.hidden_size, 256), np.float32)
        return batch

    return {"train": train, "val": val, "collate": collate, "config": config}


# ---- one micro-batch, evaluation, generation ------------------------------------------------------------------------


def compute_loss(model, batch, carry, args):
    """The losses of one micro-batch: gamma * next token + lbd * JEPA.

    batch: from collate, with `step` and `share` (float [2]: this micro-batch's part of the update's supervised tokens
    and of its pairs) from the shared part. Returns its part of the update's loss, metrics as (sum, count) pairs, {}.
    """
    tokens, at, ends = batch["tokens"], batch["at"], batch["ends"]
    B, N, P = len(tokens), len(at), len(ends)
    token_share, pair_share = batch["share"]
    # 0 and -inf in the dtype of the products: of a bool mask, backward would keep a copy for every layer.
    mask = packed_mask(batch["start"], batch["limit"]).to(getattr(torch, args.dtype)).log() if P else None
    h = model(tokens, batch["positions"], mask).flatten(0, 1)  # [B * T, D]
    llm_loss = F.cross_entropy(unwrap(model).head(h[at]), batch["next"])
    loss = args.gamma * token_share * llm_loss
    sums = {
        "llm_loss": (llm_loss.detach() * N, N),
        "valid_tokens": (N, B),
        "pairs": (P, B),
        "skipped": (batch["skipped"], B),
    }
    if P:
        views = h[ends].float()  # [P, 2, D]
        predicted, target = views.unbind(1)
        target = target.detach() if args.stop_grad_target else target
        with torch.autocast(h.device.type, enabled=False):  # bfloat16 could not tell cosines of .99 and .98 apart
            jepa = jepa_loss(predicted, target, args.jepa_loss, batch["text"])
            sums["jepa_loss"] = jepa.detach() * P, P
            # Scaled to the length of unit-variance Gaussian vectors. All views of the micro-batch are tested together,
            # so the value depends on how an update is split, as with infonce's negatives.
            if args.sigreg:
                spread = sigreg(F.rms_norm(views.flatten(0, 1), views.shape[-1:]), batch["directions"])
                sums["sigreg_loss"] = spread.detach() * P, P
                jepa = jepa + args.sigreg * spread
            sums |= cosines(predicted, target, batch["text"])
        loss = loss + args.lbd * pair_share * jepa
    sums["loss"] = loss.detach(), token_share  # the mean of the updates' own losses
    if args.debug:  # a CPU-GPU sync point
        real = tokens != PAD
        say(
            f"[DEBUG Loss] step={batch['step'] + 1}, input_batch={B}, forward_batch={B}, tokens forward={real.sum()} "
            f"plain={(real & (batch['start'] == 0)).sum()}\n"
            f"  valid_tokens={N}, loss_per_token={llm_loss:.4f}, pairs={P}, skipped={batch['skipped']}"
        )
    return loss, sums, {}


@torch.no_grad()
def evaluate(model, data, args):
    """Validation means. loss and llm_loss: over the tokens of the last answers, also with --unmask_user.

    exact_match: the greedy answer is the chat's; prefix_match: it begins with it. Neither needs generation: if every
    token is the most likely one given the right ones before it, greedy decoding gives exactly these.
    """
    sums = {}
    for batch in eval_batches(data["val"], args, data["collate"], args.eval_samples):
        tokens, at = batch["tokens"], batch["at"]
        with autocast(args):
            states = model(tokens).flatten(0, 1)[at]  # [tokens of the answers, D]
        loss, wrong = 0.0, []
        for h, right in zip(states.split(512), batch["next"].split(512)):  # 128k words: 3 GB for 32 answers of 200
            logits = model.head(h)
            loss += F.cross_entropy(logits, right, reduction="sum")
            wrong.append(logits.argmax(-1) != right)
        add_sums(sums, dict.fromkeys(("loss", "llm_loss"), (loss, len(at))))
        row, wrong, B = at // tokens.shape[1], torch.cat(wrong), len(tokens)
        # The end of a prefix does not count: a longer answer begins with the right one.
        inside = F.pad(row[1:] == row[:-1], (0, 1))
        for name, missed in {"exact_match": wrong, "prefix_match": wrong & inside}.items():
            add_sums(sums, {name: (B - len(row[missed].unique()), B)})
    return means(sums)


@torch.no_grad()
def generate(model, tokens, max_length, end):
    """A Model's greedy continuation of tokens (ints [T]) up to end or max_length tokens, as a list of all of them."""
    tokens = list(tokens)
    while len(tokens) < max_length and tokens[-1] != end:  # without a cache: answers are short
        states = model(torch.tensor([tokens], device=model.norm.weight.device))
        tokens.append(model.head(states[:, -1]).argmax().item())
    return tokens


def respond(model, args, tokenizer):
    """The answer to --prompt, as text. Raises DataError."""
    roles = {"system": args.system or "", "user": args.prompt, "assistant": "?"}
    with expecting("text in UTF-8", "--prompt or --system"):
        sample = encode([{"role": role, "content": text} for role, text in roles.items()], tokenizer=tokenizer)
    end = sample.labels[sample.labels != IGNORE][-1]
    with autocast(args):
        said = generate(model, sample.tokens[: sample.answer], args.max_length, end)
    if said[-1] != end:
        print(f"warning: cut at --max_length {args.max_length}; the prompt has {sample.answer} tokens", file=sys.stderr)
    return tokenizer.decode(said[sample.answer :])


def describe(metrics):
    """Text of a log line."""
    names = {"loss": "Loss", "llm_loss": "LM", "pairs": "Pairs", "jepa_loss": "JEPA", "exact_match": "Exact"}
    parts = [f"{title}: {metrics[name]:.4f}" for name, title in names.items() if name in metrics]
    if "cos_unpaired" in metrics:
        paired, unpaired = metrics["cos_paired"], metrics["cos_unpaired"]
        remedy = ": collapsed, try --sigreg 0.02" if unpaired > 0.95 and paired - unpaired < 0.02 else ""
        parts.append(f"Cos: {paired:.3f} paired, {unpaired:.3f} unpaired{remedy}")
    return " | ".join(parts)


def report(metrics):
    """The closing table."""
    lines = [f"{'validation':22}{'loss':>8}{'exact':>8}{'prefix':>8}"]
    for title, prefix in {"this model": "", "before training": "first_"}.items():
        if prefix + "loss" in metrics:
            numbers = (metrics[prefix + name] for name in ("loss", "exact_match", "prefix_match"))
            lines.append(f"{title:22}" + "".join(f"{number:8.4f}" for number in numbers))
    return "\n".join(lines)


# ---- flags ----------------------------------------------------------------------------------------------------------

DATA_FLAGS = ("train_file", "eval_file")
EVAL_FLAGS = ("prompt", "system", "export", "max_length", "skip_bad_chats")
DEMO = {
    "num_layers": 2, "sigreg": 0.02, "batch_size": 16, "lr": 3e-3, "max_train_steps": 600,
    "eval_interval": 100, "eval_samples": 512, "log_interval": 50,
}  # fmt: skip
FINE_TUNING = {"lr": 3e-4, "warmup_steps": 20, "weight_decay": 0.0}


def add_method_args(parser):
    flag = flag_group(parser, "data")
    flag("--train_file", None, '{"messages": [...]} on every line; without it, a synthetic dataset of word problems')
    flag("--eval_file", None, "the same, to evaluate on (default: a random tenth of --train_file)")
    flag("--max_length", 1024, "longer chats are left out of training, refused in --eval_file", 8)
    flag("--skip_bad_chats", False, "leave out lines that are no chats, and count them (default: refuse)")
    flag("--unmask_user", False, "supervise every token of a training chat, not only the answers")
    flag = flag_group(parser, f"model; a published folder brings its own, and the defaults {FINE_TUNING}")
    flag("--hidden_size", 128, "width of the network", 2)
    flag("--num_layers", 4, "blocks of the network", 1)
    flag("--num_heads", 8, "attention heads; twice their number divides hidden_size", 1)
    flag = flag_group(parser, "objective: gamma * next token + lbd * JEPA")
    flag("--regular", False, "the next-token loss alone: the same run as --lbd 0")
    flag("--lbd", 0.5, "weight of the JEPA loss; 0: none, and no pairs in the rows")
    flag("--gamma", 1.0, "weight of the next-token loss")
    flag("--num_prediction_steps", 2, "pairs per chat: how many steps predict the next one", 1)
    flag("--predictors", 2, "predictor tokens (K); 0: the step's last token predicts")
    flag("--view_based_jepa", False, "one pair per chat: the question predicts the answer")
    flag("--jepa_loss", "cosine", "distance of the views", choices=["cosine", "mse", "l2", "infonce"])
    flag("--sigreg", 0.0, "weight of SIGReg, added to the distance: prevents collapse; try 0.02; 0: none")
    flag("--jepa_ratio", 1.0, "fraction of the updates that have the JEPA loss", 0, 1)
    flag("--stop_grad_target", False, "no gradient through the targets: slows the collapse")
    flag("--debug", 0, "above 0: print what every micro-batch holds")
    flag = flag_group(parser, "prediction, with --eval_only --out_dir RUN")
    flag("--prompt", None, "a question to answer")
    flag("--system", None, "the system prompt before the question")
    flag("--export", None, "folder to make: a fine-tuned published model, for transformers and vLLM")
    parser.set_defaults(lr=2e-3, min_lr_ratio=0.0, warmup_steps=50)


def check(args, given, error):
    """Refuse flags that make no sense together. given: those of the command line alone."""
    wrong = given.eval_file or not args.eval_only or args.prompt and args.export
    if wrong and (args.prompt or args.export) or args.system and not args.prompt:
        error(
            "--prompt or --export, not both, needs --eval_only --out_dir RUN, no --eval_file; --system needs --prompt"
        )
    for name in DATA_FLAGS:
        if path := getattr(args, name):
            setattr(args, name, os.path.abspath(path))  # found from another working directory, too


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
