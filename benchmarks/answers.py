"""Greedy answers of several checkpoints of one model beside each other, and how many of their programs pass tests.

    python benchmarks/answers.py CHECKPOINT... -o answers.json [--markdown answers.md] [--tokens 200]

`answers.jsonl` has 30 prompts (code, mathematics, Chinese, JSON, tools) and 20 small problems with tests, written for
this project. Programs are taken from an answer's first fenced block, else from all of it, up to the last line with
which they are Python, and run in a process of their own with limits of time (10 s of the processor's), memory and
files; they are a model's, so run this where that is no harm. The first checkpoint is what the
others are compared with. Answers written before with the same --tokens are kept: a run that was ended goes on.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.runtime.chat import Chat
from qwenq.runtime.generate import Sampling, Session, Timing
from qwenq.runtime.load import LoadOptions, loaded

PROMPTS = Path(__file__).with_name("answers.jsonl")
SYSTEM = "You are a helpful assistant."
_FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def limits() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (10, 10))
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))


def program(answer: str) -> str:
    """An answer's first fenced block, else all of it, up to the last line with which it is Python."""
    found = _FENCE.search(answer)
    lines = (found[1] if found else answer).splitlines()
    while lines:
        with contextlib.suppress(SyntaxError, ValueError):
            ast.parse("\n".join(lines))
            break
        lines.pop()
    return "\n".join(lines)


def fault(answer: str, tests: list[str]) -> str:
    """Why a program does not pass its tests, in a line; empty when it does."""
    checks = "".join(f"\nassert {test}, {test!r}" for test in tests)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory, "program.py")
        file.write_text(program(answer) + "\n" + checks, encoding="utf-8")
        try:
            done = subprocess.run(
                [sys.executable, "-I", str(file)], cwd=directory, env={}, preexec_fn=limits, timeout=60,
                stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return "no end"
    lines = done.stderr.strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1][:200] if lines else f"exit code {done.returncode}")


def answer_all(directory: str, prompts: list[dict[str, Any]], kept: dict[str, Any], tokens: int, save: Any) -> None:
    checkpoint = open_checkpoint(Path(directory))
    chat = Chat(checkpoint.directory, checkpoint.spec.vocab_size)
    with loaded(checkpoint, LoadOptions(max_model_len=1024)) as found:
        session = Session(found.model, 1024, stop_ids=chat.stop_ids)
        for prompt in prompts:
            if kept.get(prompt["name"], {}).get("limit") == tokens:
                continue
            messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": prompt["prompt"]}]
            ids, timing = chat.prompt_ids(messages), Timing()
            text = "".join(chat.stream(session.generate(ids, Sampling(max_new_tokens=tokens), timing), ids))
            kept[prompt["name"]] = {
                "text": text, "tokens": timing.new_tokens, "stopped": timing.stopped, "limit": tokens,
            }  # fmt: skip
            if "tests" in prompt:
                kept[prompt["name"]]["fault"] = fault(text, prompt["tests"])
            save()


def tell(prompts: list[dict[str, Any]], found: dict[str, dict[str, Any]], base: str) -> str:
    """Pass rates, and every answer beside the first checkpoint's."""
    lines = ["| checkpoint | programs that pass | answers equal to the first's | equal words from the start |"]
    lines += ["|---|---:|---:|---:|"]
    for directory, answers in found.items():
        problems = [p for p in prompts if "tests" in p]
        passed = sum(not answers[p["name"]]["fault"] for p in problems)
        pairs = [(answers[p["name"]]["text"].split(), found[base][p["name"]]["text"].split()) for p in prompts]
        same = sum(a == b for a, b in pairs)
        begun = sum(next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
                    for a, b in pairs) / sum(len(b) for _, b in pairs)  # fmt: skip
        shares = f"{passed} of {len(problems)} | {same} of {len(prompts)} | {begun:.2f}"
        lines.append(f"| {Path(directory).name} | {shares} |")
    for prompt in prompts:
        lines += ["", f"## {prompt['name']} ({prompt['kind']})", "", *quoted(prompt["prompt"])]
        for directory, answers in found.items():
            answer, same = answers[prompt["name"]], directory != base
            said = answer["text"] != found[base][prompt["name"]]["text"] or not same
            verdict = "" if "fault" not in answer else f": {answer['fault'] or 'passes'}"
            lines += ["", f"**{Path(directory).name}**{verdict}" + ("" if said else " (the same text)")]
            lines += ["", *quoted(answer["text"])] if said else []
    return "\n".join(lines) + "\n"


def quoted(text: str) -> list[str]:
    return ["> " + line for line in text.strip().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    asked = parser.parse_args()
    prompts = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    found: dict[str, dict[str, Any]] = json.loads(asked.output.read_text()) if asked.output.exists() else {}

    def save() -> None:
        asked.output.write_text(json.dumps(found, ensure_ascii=False, indent=1))

    for directory in asked.checkpoints:
        answer_all(directory, prompts, found.setdefault(directory, {}), asked.tokens, save)
    chosen = {directory: found[directory] for directory in asked.checkpoints}
    table = tell(prompts, chosen, asked.checkpoints[0])
    if asked.markdown:
        asked.markdown.write_text(table, encoding="utf-8")
    print("\n".join(table.splitlines()[: 2 + len(chosen)]))


if __name__ == "__main__":
    main()
