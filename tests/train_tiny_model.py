"""Train the small Qwen2 model the tests use, and measure it.

    python tests/train_tiny_model.py train                # writes tests/data/tiny-qwen2
    python tests/train_tiny_model.py evaluate             # prints losses and round-to-nearest damage

Needs torch, transformers, tokenizers and safetensors; no network and no GPU.

The training text is what every Python installation carries: the sources of the
standard library and the help topics of ``pydoc``.  Some modules and topics are
held out for evaluation.  A part of the docstrings is also presented as ChatML
conversations, so that the special tokens and the chat template are trained too.

The run is seeded and uses one thread and bfloat16 autocast; it took fifteen
minutes on two busy cores.  The same Python, torch and tokenizers versions on the same kind
of CPU give the same weights; another Python version has other sources and so
gives a slightly different model, which is why the weights are committed.

Two things are done on purpose to make a model of this size behave under
quantization a little like a large one:

* the q/k/v biases start from a normal distribution of standard deviation 0.5
  (zeros are usual), so code that drops a bias produces visibly wrong output;
* four hidden channels start with RMSNorm weights of 4 to 8 in the two norms of
  every layer (ones are usual), so the linear layers see outlier channels.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import math
import os
import random
import sysconfig
import time
import tokenize
from pathlib import Path
from pydoc_data.topics import topics as PYDOC_TOPICS

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

DATA = Path(__file__).resolve().parent / "data"
MODEL_DIR = DATA / "tiny-qwen2"

SEED = 20240607
VOCAB_SIZE = 1024
CONTEXT = 512
TOKENS_PER_STEP = 2048
STEPS = 1200
PEAK_LR = 4e-3
BIAS_STD = 0.5
OUTLIERS = {17: 8.0, 42: 5.0, 77: 6.5, 101: 4.0}  # hidden channel -> initial RMSNorm weight

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SYSTEM_PROMPT = "You are a helpful assistant."

# The split used by the Qwen2 family.
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' -%}"
    "{{- '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- endif -%}"
)

# --------------------------------------------------------------------------
# Text

SKIPPED_PARTS = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib-dynload", "lib2to3",
    "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
MAX_MODULE_CHARS = 60_000

HELD_OUT_MODULES = {
    "bisect.py", "calendar.py", "contextlib.py", "csv.py", "fractions.py", "graphlib.py", "heapq.py",
    "sched.py", "shelve.py", "statistics.py", "string.py", "textwrap.py",
}  # fmt: skip
HELD_OUT_TOPIC_EVERY = 10


def read_modules() -> tuple[dict[str, str], dict[str, str]]:
    """Sources of the standard library: (training modules, held-out modules)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held = {}, {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        # _sysconfigdata_* and config-* record how this interpreter was built.
        if SKIPPED_PARTS & set(name.parts) or any(p.startswith(("_sysconfig", "config-")) for p in name.parts):
            continue
        try:
            with tokenize.open(path) as f:
                text = f.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if len(text) > 200:
            (held if name.as_posix() in HELD_OUT_MODULES else train)[name.as_posix()] = text
    return train, held


def read_topics() -> tuple[list[str], list[str]]:
    """The pydoc help topics: (training topics, held-out topics)."""
    train, held = [], []
    for i, key in enumerate(sorted(PYDOC_TOPICS)):
        (held if i % HELD_OUT_TOPIC_EVERY == 0 else train).append(PYDOC_TOPICS[key])
    return train, held


QUESTIONS = (
    "What does {kind} `{name}` do?",
    "Explain {kind} `{name}` from `{module}`.",
    "Describe {name} in the module {module}.",
    "How is `{name}` used?",
)


def chat(question: str, answer: str) -> str:
    return (
        f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n"
        f"<|im_start|>assistant\n{answer}<|im_end|>\n"
    )


def docstring_chats(modules: dict[str, str], rng: random.Random) -> list[str]:
    """One ChatML conversation for each short docstring."""
    chats = []
    for path, text in modules.items():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            doc = inspect.cleandoc(ast.get_docstring(node) or "")
            if 40 <= len(doc) <= 700:
                kind = "the class" if isinstance(node, ast.ClassDef) else "the function"
                question = rng.choice(QUESTIONS).format(kind=kind, name=node.name, module=module)
                chats.append(chat(question, doc))
    return chats


# --------------------------------------------------------------------------
# Tokenizer


def train_tokenizer(texts: list[str]) -> Tokenizer:
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    tok.add_special_tokens(SPECIAL_TOKENS)  # after the ordinary tokens, as Qwen2 has them
    assert tok.get_vocab_size() == VOCAB_SIZE
    return tok


def save_tokenizer(tok: Tokenizer) -> None:
    tok.save(str(MODEL_DIR / "tokenizer.json"))
    write_json(
        MODEL_DIR / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "added_tokens_decoder": {
                str(tok.token_to_id(t)): {
                    "content": t,
                    "lstrip": False,
                    "normalized": False,
                    "rstrip": False,
                    "single_word": False,
                    "special": True,
                }
                for t in SPECIAL_TOKENS
            },
            "bos_token": None,
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": CONTEXT,
            "pad_token": "<|endoftext|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": None,
        },
    )


def encode_documents(tok: Tokenizer, documents: list[str]) -> torch.Tensor:
    """All documents as one stream, each followed by <|endoftext|>."""
    end = tok.token_to_id("<|endoftext|>")
    ids: list[int] = []
    for encoding in tok.encode_batch(documents):
        ids += encoding.ids
        ids.append(end)
    return torch.tensor(ids)


# --------------------------------------------------------------------------
# Model


def build_model(tok: Tokenizer) -> Qwen2ForCausalLM:
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCAB_SIZE,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            initializer_range=0.05,
            bos_token_id=tok.token_to_id("<|endoftext|>"),
            eos_token_id=tok.token_to_id("<|im_end|>"),
            pad_token_id=tok.token_to_id("<|endoftext|>"),
            attn_implementation="sdpa",
        )
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("layernorm.weight"):
                for channel, value in OUTLIERS.items():
                    p[channel] = value
            elif name.endswith("proj.bias"):
                p.normal_(std=BIAS_STD)
    return model.float()


def train(steps: int) -> None:
    torch.manual_seed(SEED)
    rng = random.Random(SEED)
    torch.use_deterministic_algorithms(True)

    modules, held_modules = read_modules()
    topics, held_topics = read_topics()
    sources = [text[:MAX_MODULE_CHARS] for text in modules.values()]
    chats = docstring_chats(modules, rng)
    tok = train_tokenizer(sources + topics)

    documents = sources + 2 * topics + chats
    rng.shuffle(documents)
    stream = encode_documents(tok, documents)
    held = encode_documents(tok, list(held_modules.values()) + held_topics)
    print(
        f"{len(sources)} modules, {len(topics)} topics, {len(chats)} chats: {len(stream)} tokens; "
        f"held out {len(held_modules)} modules, {len(held_topics)} topics: {len(held)} tokens",
        flush=True,
    )

    model = build_model(tok)
    # Matrices of the blocks are decayed; embeddings, head, norms and biases are not.
    decayed = [p for n, p in model.named_parameters() if n.endswith("proj.weight")]
    others = [p for n, p in model.named_parameters() if not n.endswith("proj.weight")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=PEAK_LR,
        betas=(0.9, 0.98),
    )
    warmup = 60
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min((s + 1) / warmup, 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * s / steps))),
    )
    generator = torch.Generator().manual_seed(SEED)
    started, running = time.time(), 0.0
    model.train()
    for step in range(steps):
        # Short windows are cheaper; the last sixth of the run sees the whole context.
        length = CONTEXT // 2 if step < steps * 5 // 6 else CONTEXT
        starts = torch.randint(len(stream) - length, (TOKENS_PER_STEP // length,), generator=generator)
        batch = torch.stack([stream[s : s + length] for s in starts.tolist()])
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(batch, use_cache=False).logits
        loss = loss_of(logits.float(), batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running = loss.item() if step == 0 else 0.95 * running + 0.05 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {running:.3f}  {time.time() - started:.0f} s", flush=True)

    MODEL_DIR.mkdir(parents=True, exist_ok=True)
    save_model(model, tok)
    save_tokenizer(tok)


# --------------------------------------------------------------------------
# Files


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_model(model: Qwen2ForCausalLM, tok: Tokenizer) -> None:
    """Write the checkpoint in the layout of the published Qwen2.5 ones, in two shards."""
    for old in MODEL_DIR.glob("*.safetensors"):
        old.unlink()
    state = {n: p.detach().to(torch.float16).contiguous() for n, p in model.state_dict().items()}
    assert all(torch.isfinite(t).all() for t in state.values())
    total = sum(t.numel() * t.element_size() for t in state.values())
    shards: list[dict[str, torch.Tensor]] = [{}, {}]
    written = 0
    for name, tensor in state.items():
        shards[0 if written < total // 2 else 1][name] = tensor
        written += tensor.numel() * tensor.element_size()
    weight_map = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, MODEL_DIR / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
    write_json(
        MODEL_DIR / "model.safetensors.index.json",
        {"metadata": {"format": "pt", "total_size": total}, "weight_map": dict(sorted(weight_map.items()))},
    )

    c = model.config
    write_json(
        MODEL_DIR / "config.json",
        {
            "architectures": ["Qwen2ForCausalLM"],
            "attention_dropout": 0.0,
            "bos_token_id": c.bos_token_id,
            "eos_token_id": c.eos_token_id,
            "hidden_act": "silu",
            "hidden_size": c.hidden_size,
            "initializer_range": c.initializer_range,
            "intermediate_size": c.intermediate_size,
            "max_position_embeddings": c.max_position_embeddings,
            "max_window_layers": c.num_hidden_layers,
            "model_type": "qwen2",
            "num_attention_heads": c.num_attention_heads,
            "num_hidden_layers": c.num_hidden_layers,
            "num_key_value_heads": c.num_key_value_heads,
            "rms_norm_eps": c.rms_norm_eps,
            "rope_theta": 10000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_cache": True,
            "use_sliding_window": False,
            "vocab_size": c.vocab_size,
        },
    )
    write_json(
        MODEL_DIR / "generation_config.json",
        {
            "bos_token_id": c.bos_token_id,
            "do_sample": False,
            "eos_token_id": [c.eos_token_id, tok.token_to_id("<|endoftext|>")],
            "pad_token_id": c.pad_token_id,
        },
    )


# --------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def window_logits(model: Qwen2ForCausalLM, windows: torch.Tensor) -> torch.Tensor:
    return torch.cat([model(w, use_cache=False).logits for w in windows.split(8)])


def windows_of(ids: torch.Tensor, limit: int = 64) -> torch.Tensor:
    count = min(len(ids) // CONTEXT, limit)
    return ids[: count * CONTEXT].view(count, CONTEXT)


def loss_of(logits: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """Mean next-token cross entropy, in nats."""
    return F.cross_entropy(logits[:, :-1].reshape(-1, VOCAB_SIZE), windows[:, 1:].reshape(-1))


def kl_of(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean KL divergence from the reference's next-token distribution, in nats."""
    p, q = F.log_softmax(reference.double(), -1), F.log_softmax(logits.double(), -1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def unigram_entropy(ids: torch.Tensor) -> float:
    p = torch.bincount(ids, minlength=VOCAB_SIZE).double() / len(ids)
    return -(p[p > 0] * p[p > 0].log()).sum().item()


def round_to_nearest(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Asymmetric round-to-nearest in groups along the input dimension."""
    g = weight.reshape(weight.shape[0], -1, group)
    low, high = g.amin(-1, keepdim=True).clamp(max=0), g.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low).clamp(min=1e-8) / (2**bits - 1)
    zero = (-low / scale).round()
    q = (g / scale + zero).round().clamp(0, 2**bits - 1)
    return ((q - zero) * scale).reshape(weight.shape)


def load() -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerFast]:
    model = AutoModelForCausalLM.from_pretrained(MODEL_DIR, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(MODEL_DIR)


def evaluate() -> None:
    model, tokenizer = load()
    encode = tokenizer.backend_tokenizer

    _, held_modules = read_modules()
    _, held_topics = read_topics()
    texts = {"held-out modules and topics": encode_documents(encode, list(held_modules.values()) + held_topics)}
    for name in ("calib.txt", "heldout.txt"):
        if (DATA / name).exists():
            text = (DATA / name).read_text(encoding="utf-8")
            texts[name] = torch.tensor(encode.encode(text).ids)
            print(f"{name}: {len(text)} characters, {len(texts[name])} tokens")
    windows = {name: windows_of(ids) for name, ids in texts.items()}
    reference = {name: window_logits(model, w) for name, w in windows.items()}

    print(f"\nloss in nats per token, windows of {CONTEXT}")
    for name, ids in texts.items():
        loss = loss_of(reference[name], windows[name])
        print(f"  {name:28s} {loss:.4f}   (unigram entropy {unigram_entropy(ids):.3f})")

    print("\nq/k/v biases after training")
    for kind in "qkv":
        b = torch.cat([getattr(layer.self_attn, f"{kind}_proj").bias.detach() for layer in model.model.layers])
        rms = b.square().mean().sqrt()
        print(f"  {kind}: rms {rms:.3f}  mean |b| {b.abs().mean():.3f}  max |b| {b.abs().max():.3f}")

    print("\ninput channels of the linear layers (rms over tokens): largest / median")
    for name, value in outlier_ratios(model, windows["held-out modules and topics"][:8]).items():
        print(f"  {name:40s} {value:.1f}")

    print("\nround-to-nearest of all linear layers of the blocks: loss, KL to the unquantized model")
    linears = [m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    original = [m.weight.detach().clone() for m in linears]
    for bits, group in ((8, 64), (4, 32), (4, 64), (4, 128), (3, 64)):
        for m, w in zip(linears, original, strict=True):
            m.weight.data = round_to_nearest(w, bits, group)
        for name, w in windows.items():
            logits = window_logits(model, w)
            loss, kl = loss_of(logits, w), kl_of(reference[name], logits)
            print(f"  {bits} bits, group {group:3d}  {name:28s} {loss:.4f}  KL {kl:.6f}")
    for m, w in zip(linears, original, strict=True):
        m.weight.data = w
    for layer in model.model.layers:
        for kind in "qkv":
            getattr(layer.self_attn, f"{kind}_proj").bias.data.zero_()
    for name, w in windows.items():
        print(f"  biases dropped       {name:28s} {loss_of(window_logits(model, w), w):.4f}")

    model, tokenizer = load()
    print("\ngreedy continuations")
    question = [{"role": "user", "content": "What does the function `open` do?"}]
    prompts = (
        "def read_lines(path):\n    ",
        tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True),
    )
    for prompt in prompts:
        ids = torch.tensor([encode.encode(prompt).ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=48, do_sample=False)
        print("  " + repr(tokenizer.decode(out[0, ids.shape[1] :])))


@torch.no_grad()
def outlier_ratios(model: Qwen2ForCausalLM, windows: torch.Tensor) -> dict[str, float]:
    ratios, hooks = {}, []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "o_proj", "up_proj", "down_proj")):

            def hook(_, args, name=name):
                rms = args[0].flatten(0, 1).square().mean(0).sqrt()
                ratios[name] = (rms.max() / rms.median()).item()

            hooks.append(module.register_forward_pre_hook(hook))
    model(windows, use_cache=False)
    for h in hooks:
        h.remove()
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "evaluate"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.command == "train":
        train(args.steps)
    else:
        evaluate()


if __name__ == "__main__":
    main()
