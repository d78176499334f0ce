#!/usr/bin/env python3
"""Cut text into the token windows that every tool of a comparison is given.

    make_tokens.py MODEL TEXT OUT.npy --num-samples 64 --sequence-length 512

TEXT is a .jsonl file with a `text` field a line, or plain text, one document. Documents are
tokenized without special tokens, joined by <|endoftext|> and cut into windows without padding; the first
`--num-samples` are saved as int64 [num_samples, sequence_length]. TEXT may also be builtin or heldout, this project's
own sets, cut as `qwenq quantize` cuts them (seed 0 for builtin).
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
from foreign_run import fail
from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
SETS = ("builtin", "heldout")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model directory, for its tokenizer.json")
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--num-samples", type=int, required=True)
    parser.add_argument("--sequence-length", type=int, required=True)
    return parser.parse_args()


def read_documents(path: Path) -> list[str]:
    """The documents of a .jsonl file, or a plain text file as one document."""
    if path.suffix != ".jsonl":
        return [path.read_text(encoding="utf-8")]
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def cut_windows(tokenizer: Tokenizer, documents: list[str], num_samples: int, sequence_length: int) -> np.ndarray:
    """The first windows of the joined documents: int64 [num_samples, sequence_length]."""
    separator = tokenizer.token_to_id(SEPARATOR)
    if separator is None:
        fail(f"the tokenizer has no {SEPARATOR} token to put between documents")
    ids: list[int] = []
    for document in documents:
        if ids:
            ids.append(separator)
        ids += tokenizer.encode(document, add_special_tokens=False).ids
    wanted = num_samples * sequence_length
    if len(ids) < wanted:
        fail(f"the text has {len(ids)} tokens, {num_samples} x {sequence_length} windows need {wanted}")
    return np.array(ids[:wanted], dtype=np.int64).reshape(num_samples, sequence_length)


def windows_of_set(name: str, model: Path, num_samples: int, sequence_length: int) -> np.ndarray:
    """Windows of one of this project's sets, int64 [num_samples, sequence_length]."""
    from qwenq.checkpoint.reader import open_source
    from qwenq.text.calibration import load_windows
    from qwenq.text.tokens import ModelTokenizer

    spec, seed = open_source(model).spec, 0 if name == "builtin" else None
    found = load_windows(name, ModelTokenizer(model), spec, length=sequence_length, count=num_samples, seed=seed)
    return np.ascontiguousarray(found.ids.numpy())


def main() -> None:
    args = parse_args()
    tokenizer_file = args.model / "tokenizer.json"
    if not tokenizer_file.is_file():
        fail(f"{args.model} has no tokenizer.json")
    if str(args.text) in SETS:
        windows = windows_of_set(str(args.text), args.model, args.num_samples, args.sequence_length)
    elif args.text.is_file():
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
        windows = cut_windows(tokenizer, read_documents(args.text), args.num_samples, args.sequence_length)
    else:
        fail(f"{args.text} is neither a file nor one of {', '.join(SETS)}")
    np.save(args.out, windows)
    print(json.dumps({"shape": list(windows.shape), "sha256": hashlib.sha256(args.out.read_bytes()).hexdigest()}))


if __name__ == "__main__":
    main()
