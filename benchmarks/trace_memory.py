"""Peak memory against context on GPUs that are not there: `qwenq vram measure --synthetic`'s own code, traced.

The model is loaded and run over fake tensors (tests/fake_gpus.py), so every tensor torch would allocate on a GPU is
counted at its true shape. Of a long prompt the first and the last chunk are run: those between differ from the last
one only in how much of the cache attention reads. Prints a row per context, phase and GPU as JSON lines.

    PYTHONPATH=tests python benchmarks/trace_memory.py Qwen2.5-72B --bits 4 --rig H200 -c 1k,8k,32k,128k
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from fake_gpus import FakeGpus
from gpu_parts import TimedSession

from qwenq.formats.base import Recipe, Scheme
from qwenq.planning.models import load_spec
from qwenq.planning.rig import parse_rig
from qwenq.planning.weights import recipe_weights
from qwenq.runtime.load import LoadOptions, load_from
from qwenq.runtime.measure import measure
from qwenq.runtime.synthetic import SyntheticWeights, synthetic_config
from qwenq.units import GIB, parse_tokens


def trace(model: str, bits: int, group: int, rig: str, contexts: list[int], options: dict[str, Any]) -> list[Any]:
    """Measured rows of the traced run."""
    import qwenq.runtime.measure as module

    TimedSession.whole_up_to = 0  # of a prompt, the first chunk and the last one alone
    module.Session = TimedSession  # type: ignore[misc]
    spec = load_spec(model)
    recipe = Recipe(None if bits == 16 else Scheme(bits, group))
    weights = recipe_weights(spec, recipe)
    with FakeGpus([gpu.name for gpu in parse_rig(rig).gpus]) as gpus:
        source = SyntheticWeights(spec, recipe)
        asked = LoadOptions(max_model_len=max(contexts), **options)
        with load_from(source, weights, synthetic_config(spec), spec, asked) as found:
            for index, allocator in enumerate(gpus.allocators):
                print(json.dumps({"loaded": index, "allocated": allocator.allocated, "peak": allocator.allocated_peak,
                                  "reserved": allocator.reserved}), flush=True)  # fmt: skip
            rows, ended = measure(found, weights, contexts)
            assert not ended, ended
            operators = [allocator.peak_operator for allocator in gpus.allocators]
    print(json.dumps({"largest peaks at": operators}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rig", default="H200")
    parser.add_argument("--kv-cache-dtype", default="auto")
    parser.add_argument("--prefill-chunk", type=int, default=2048)
    parser.add_argument("-c", "--contexts", default="1k,8k,32k,128k")
    args = parser.parse_args()
    contexts = [parse_tokens(part) for part in args.contexts.split(",")]
    options = {"kv_dtype": args.kv_cache_dtype, "prefill_chunk": args.prefill_chunk}
    for row in trace(args.model, args.bits, args.group_size, args.rig, contexts, options):
        predicted = row.exact_bytes + row.working_bytes
        print(json.dumps({
            "context": row.context, "phase": row.phase, "device": row.device,
            "traced_gib": round(row.allocated_bytes / GIB, 3), "predicted_gib": round(predicted / GIB, 3),
            "error_percent": round(100 * (predicted / row.allocated_bytes - 1), 2),
            "reserved_gib": round(row.reserved_bytes / GIB, 3),
        }))  # fmt: skip


if __name__ == "__main__":
    main()
