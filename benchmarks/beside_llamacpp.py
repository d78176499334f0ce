"""`qwenq run`'s engine beside llama-bench on one machine, in turns: prompts of 64 and 512 tokens, and 32 new ones.

    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/beside_llamacpp.py MODEL.gguf CHECKPOINT... [--turns 7]
        [--llama-bench PATH]

MODEL.gguf runs in llama-bench; each CHECKPOINT (the same file among them, if named) in qwenq. Prints one JSON object:
for each checkpoint and test both sides' tokens a second, and ratios turn by turn, qwenq's by llama.cpp's, with their
median and its 95 % interval (bootstrap over turns): of wall time, and of the processor's time, which says the same on
an idle machine and more on a busy one. llama-bench's processor time is that of three repetitions less that of one.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import torch
from decode_speed import interval

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.runtime.generate import Sampling, Session, Timing
from qwenq.runtime.load import LoadOptions, loaded

TESTS = {"prompt 64": (64, 1), "prompt 512": (512, 1), "decode 32": (64, 33)}  # prompt, new tokens; the first is its
Speeds = tuple[float, float]  # tokens a second of wall time and of processor time


def llama_speeds(program: str, model: str, test: str) -> Speeds:
    kind, count = test.split()
    what = ["-p", count, "-n", "0"] if kind == "prompt" else ["-p", "0", "-n", count]
    words = [program, "-m", model, "-t", str(torch.get_num_threads()), *what, "-o", "json"]
    spent, wall = list[float](), 0.0
    for repetitions in (1, 3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([*words, "-r", str(repetitions)], check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        wall = statistics.median(json.loads(done.stdout)[0]["samples_ts"])
    return wall, 2 * int(count) / (spent[1] - spent[0])


def own_speeds(session: Session, ids: list[int], test: str) -> Speeds:
    prompt, new = TESTS[test]
    walls, spent = list[float](), list[float]()
    for repetition in range(3):
        session.release()
        timing, clock = Timing(), time.process_time()
        for _ in session.generate(ids[:prompt], Sampling(max_new_tokens=new, ignore_eos=True), timing):
            if test.startswith("decode") and timing.new_tokens == 1:
                clock = time.process_time()
        if repetition:  # the first warms up, as llama-bench does
            walls.append(timing.prefill_speed if new == 1 else timing.decode_speed)
            spent.append((prompt if new == 1 else new - 1) / (time.process_time() - clock))
    return statistics.median(walls), statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("checkpoints", nargs="+")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--llama-bench", default="llama-bench")
    asked = parser.parse_args()
    torch.manual_seed(0)
    ids = torch.randint(0, 1000, (512,)).tolist()
    found: dict[str, dict[str, list[tuple[Speeds, Speeds]]]] = {
        directory: {test: [] for test in TESTS} for directory in asked.checkpoints
    }
    with ExitStack() as stack:
        sessions = {}
        for directory in asked.checkpoints:
            model = stack.enter_context(loaded(open_checkpoint(Path(directory)), LoadOptions(max_model_len=1024))).model
            sessions[directory] = Session(model, 1024)
        for _ in range(asked.turns):
            for test in TESTS:
                other = llama_speeds(asked.llama_bench, asked.model, test)
                for directory, session in sessions.items():
                    found[directory][test].append((own_speeds(session, ids, test), other))
    report: dict[str, object] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "model": asked.model}
    for directory, tests in found.items():
        for test, turns in tests.items():
            line: dict[str, object] = {}
            for at, clock in enumerate(("wall", "processor")):
                ratios = [own[at] / other[at] for own, other in turns]
                line[clock] = {
                    "qwenq": round(statistics.median(own[at] for own, _ in turns), 1),
                    "llama.cpp": round(statistics.median(other[at] for _, other in turns), 1),
                    "ratio": round(statistics.median(ratios), 3),
                    "interval": [round(end, 3) for end in interval(ratios)],
                    "turns": [round(ratio, 3) for ratio in ratios],
                }
            report[f"{Path(directory).name}, {test}"] = line
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
