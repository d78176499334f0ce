"""Greedy text of one GPTQ checkpoint by this project's engine and by GPTQModel, token by token.

    GPTQMODEL_CPU_WORKERS=2 python benchmarks/same_text.py CHECKPOINT [--tokens 48]

Run where gptqmodel is installed. Where the two part, the margin is printed: how much more likely, in nats, this
project's logits hold their own choice than the other engine's. A small margin is a tie.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.runtime.chat import Chat
from qwenq.runtime.foreign import GptqModelEngine
from qwenq.runtime.generate import Sampling, Session, Timing
from qwenq.runtime.load import LoadOptions, loaded

PROMPTS = (
    "What is the capital of France?",
    "Write two sentences about the sea.",
    "Name three fruits.",
    "Why is the sky blue?",
    "Explain what a bicycle is to a child.",
    "Translate 'good morning' into Spanish.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=48)
    asked = parser.parse_args()
    checkpoint = open_checkpoint(asked.checkpoint)
    chat = Chat(asked.checkpoint, checkpoint.spec.vocab_size)
    sampling = Sampling(max_new_tokens=asked.tokens)
    prompts = [chat.prompt_ids([{"role": "user", "content": text}]) for text in PROMPTS]
    other = GptqModelEngine(asked.checkpoint)
    theirs = [list(other.generate(ids, sampling, chat.stop_ids, Timing())) for ids in prompts]
    rows = []
    for dtype in ("bfloat16", "float32"):
        with loaded(checkpoint, LoadOptions(max_model_len=512, compute_dtype=dtype)) as found:
            session = Session(found.model, 512, stop_ids=chat.stop_ids)
            for text, ids, wanted in zip(PROMPTS, prompts, theirs, strict=True):
                ours = list(session.generate(ids, sampling))
                same = next((k for k, pair in enumerate(zip(ours, wanted, strict=False)) if pair[0] != pair[1]), -1)
                row = {"dtype": dtype, "prompt": text, "text": "".join(chat.stream(ours)), "tokens": len(ours)}
                if same >= 0:
                    session.release()
                    logits = session.prefill([*ids, *ours[:same]], Timing())
                    assert logits is not None
                    logp = logits.log_softmax(0)
                    row |= {"part_at": same, "margin": float(logp[ours[same]] - logp[wanted[same]])}
                rows.append(row)
    print(json.dumps(rows, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
