"""Writes reports/estimator-validation.md. Run: python reports/make_estimator_validation.py (no GPU needed)."""

from __future__ import annotations

import csv
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from qwenq import __version__
from qwenq.model.spec import ModelSpec, family_spec
from qwenq.planning.case import Case, Workload, even_shares, rank_shares
from qwenq.planning.engines.base import get_engine
from qwenq.planning.engines.vllm import VllmEngine
from qwenq.planning.memory import estimate
from qwenq.planning.rig import Rig, find_gpu
from qwenq.planning.speed import SpeedFit, decode_seconds, prefill_seconds
from qwenq.planning.validate import ValidatedRow, errors, read_rows
from qwenq.planning.weights import published_weights
from qwenq.units import GIB

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ROOT / "tests" / "data" / "published"


def model(name: str) -> ModelSpec:
    spec = family_spec(name)
    assert spec is not None
    return spec


def main() -> None:
    """Gather every section and write the report."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows, _ = read_rows(PUBLISHED / "qwen25_transformers_memory.csv")
    parts = [
        "# The estimator against published measurements",
        f"Command: `python reports/make_estimator_validation.py`; qwenq {__version__}, commit {commit.stdout.strip()}, "
        f"Python {platform.python_version()}. Sources of the tables: `tests/data/published/README.md`. "
        "No measurement here is ours: no GPU was used.",
        *transformers_section(rows),
        *formula_section(rows),
        *vllm_section(),
        *speed_section(),
        *known_section(),
    ]
    (ROOT / "reports" / "estimator-validation.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def transformers_section(rows: Sequence[ValidatedRow]) -> list[str]:
    """The table of `qwenq vram validate`."""
    parts = {
        "prompts of 6,144 tokens and more": ([r for r in rows if r.input_len >= 6144], "0.8 / 3"),
        "one-token prompts": ([r for r in rows if r.input_len == 1], "1.5 / 4.5"),
        "all": (list(rows), ""),
        "all but 0.5B (published to 0.01 GiB, there up to 1 %)": ([r for r in rows if "0.5B" not in r.model], ""),
    }
    summary = [(n, len(p), *(f"{e:.2f} %" for e in errors(p)), bar) for n, (p, bar) in parts.items()]
    lines = [
        (r.model, r.quant, r.input_len, f"{r.predicted_gib:.2f}", f"{r.mem_gib:.2f}", f"{r.error_percent:+.2f} %")
        for r in rows
    ]
    return [
        "## transformers 4.46, A100-80GB: sum over GPUs of the allocator's peak",
        "`qwenq vram validate tests/data/published/qwen25_transformers_memory.csv`. No coefficient is fitted to this "
        "table: the terms are the tensors alive at the worst moment (counted in transformers' sources), the kernels' "
        "buffers (AutoGPTQ, AutoAWQ sources) and what torch's allocator hands out for the loaded tensors (its rounding "
        "rules). So there is nothing to refit, and leaving a model size out changes no figure. The table was in view "
        "while the tensors were counted: repeated keys and values, the rounding, and the first GPU's further hidden "
        "state were found in what a plain count left over, then confirmed in the sources. One term is inferred, not "
        "read: AutoAWQ holding a tied head twice while it loads, which decides its one-token rows of tied models.",
        table(("rows", "count", "mean error", "largest", "bar (%)"), summary),
        table(("model", "quant", "prompt", "predicted GiB", "published GiB", "error"), lines),
    ]


def formula_section(rows: Sequence[ValidatedRow]) -> list[str]:
    """The published two-coefficient formula, its refit on all rows and with each size left out."""
    with open(PUBLISHED / "qwen25_transformers_memory.csv", newline="") as file:
        gpus = [int(row["gpu_num"]) for row in csv.DictReader(file)]
    long = [(row, count) for row, count in zip(rows, gpus, strict=True) if row.input_len >= 6144]

    def parts(row: ValidatedRow, count: int) -> tuple[float, float, float]:
        """Fixed GiB, and GiB per unit of I and of H: W + KV(n) + X + G n (a I + b H) 2."""
        spec = model(row.model)
        weights = published_weights(spec, row.quant)
        fixed = weights.total_bytes + spec.kv_bytes_per_token() * row.input_len
        if row.quant == "GPTQ-Int4":
            fixed += count * 2 * weights.widest_linear
        scale = 2 * row.input_len * count / GIB
        return fixed / GIB, scale * weights.intermediate_size, scale * spec.hidden_size

    values = np.array([[*parts(row, count), row.mem_gib] for row, count in long])
    sizes = [row.model for row, _ in long]

    def fit(keep: np.ndarray) -> np.ndarray:
        fixed, i, h, measured = values[keep].T
        return np.linalg.lstsq(np.stack([i, h], 1) / measured[:, None], (measured - fixed) / measured, rcond=None)[0]

    def off(keep: np.ndarray, ab: Sequence[float]) -> np.ndarray:
        fixed, i, h, measured = values[keep].T
        return 100 * np.abs((fixed + ab[0] * i + ab[1] * h) / measured - 1)

    every = np.ones(len(long), dtype=bool)
    lines = []
    for name, ab in (("(3, 4.5), as published", (3.0, 4.5)), ("refit on all rows", fit(every))):
        found = off(every, ab)
        lines.append((name, f"{ab[0]:.2f}, {ab[1]:.2f}", f"{found.mean():.2f} %", f"{found.max():.2f} %"))
    for size in dict.fromkeys(sizes):
        held = np.array([name == size for name in sizes])
        ab = fit(~held)
        found = off(held, ab)
        lines.append((f"{size} left out", f"{ab[0]:.2f}, {ab[1]:.2f}", f"{found.mean():.2f} %", f"{found.max():.2f} %"))
    return [
        "### The published formula, for comparison",
        "`W + KV(n) + G n (a I + b H) 2 + X` with a = 3, b = 4.5 was chosen on the whole published table, so its error "
        "there is not an unseen one. Refit by least squares on relative errors (prompts of 6,144 and more), and refit "
        "with each size left out, errors on the size left out. The estimator does not use it: a = 3 and b = 4 on the "
        "first GPU, 3 on the others, come out of counting, and the rest is repeated KV, buffers and rounding.",
        table(("coefficients", "a, b", "mean error", "largest"), lines),
    ]


def vllm_section() -> list[str]:
    """Components and KV tokens of vLLM 0.19 on H100."""
    lines = []
    with open(PUBLISHED / "vllm019_h100_memory.csv", newline="") as file:
        for row in csv.DictReader(file):
            if row["status"] != "ok":
                continue
            spec = model("Qwen2.5-72B" if "72B" in row["model"] else "Qwen2.5-7B")
            if "Kimi" in row["model"]:
                spec = replace(spec, max_position_embeddings=131072)
            ranks = int(row["tp"])
            work = Workload(
                int(row["max_model_len"]),
                kv_dtype="fp8" if row["kv_cache_dtype"] == "fp8" else "auto",
                gpu_memory_utilization=float(row["gpu_memory_utilization"]),
            )
            rig = Rig((find_gpu("H100 SXM5 80GB"),) * ranks)
            shares = rank_shares(spec, ranks)
            engine = VllmEngine((0, 19))
            found = estimate(Case(spec, published_weights(spec, "BF16"), engine, work, rig), shares)
            gpu, tokens = found.gpus[0], found.kv_capacity_tokens or 0
            pairs = [
                ("weights", "weights_memory_gib"),
                ("activations", "activation_memory_gib"),
                ("non_torch", "non_torch_forward_gib"),
                ("graphs", "cuda_graph_actual_gib"),
                ("context", "init_cuda_memory_gib"),
            ]
            cells = [f"{gpu.term(name) / GIB:.2f} / {float(row[column]):.2f}" for name, column in pairs]
            total, stated = engine.inside_bytes(gpu.terms) / GIB, float(row["total_non_kv_cache_gib"])
            lines.append(
                (
                    row["model"].split("/")[1], ranks, row["max_model_len"], row["kv_cache_dtype"], *cells,
                    f"{total:.2f} / {stated:.2f} ({100 * (total / stated - 1):+.2f} %)",
                    f"{tokens} / {row['kv_cache_tokens']} ({100 * (tokens / int(row['kv_cache_tokens']) - 1):+.2f} %)",
                )
            )  # fmt: skip
    return [
        "## vLLM 0.19, H100: predicted / logged, GiB per GPU",
        "Weights follow from shapes and rounding. Fitted to these very rows (two model sizes, three TP degrees): "
        "0.13 GiB of workspace beside the sampler's 14 bytes a logit, 0.24 / 2.075 / 2.17 GiB of non-torch memory at "
        "TP 1 / 2 / 4, and the CUDA graphs' 0.0173 GiB a layer + 0.386 / TP^(2/3).",
        table(
            (
                "model",
                "TP",
                "max len",
                "KV",
                "weights",
                "activation",
                "non-torch",
                "graphs",
                "at start",
                "non-KV",
                "tokens",
            ),
            lines,
        ),
    ]


def speed_section() -> list[str]:
    """Seconds a token against published runs, by engine and format."""
    a100 = find_gpu("A100 SXM4 80GB")
    groups: dict[tuple[str, str], list[float]] = {}
    fits: dict[tuple[str, str], SpeedFit] = {}
    left_out = 0
    with open(PUBLISHED / "qwen25_speed_a100.csv", newline="") as file:
        for row in csv.DictReader(file):
            spec, ranks, prompt = model(row["model"]), int(row["gpu_num"]), int(row["input_len"])
            weights, vllm = published_weights(spec, row["quant"]), row["engine"] == "vllm"
            if "0.6.2" in row["note"] or (vllm and weights.bits == 4 and "72B" in row["model"] and ranks == 1):
                left_out += 1
                continue
            engine = get_engine("vllm") if vllm else get_engine("transformers", "4.46.0")
            shares = rank_shares(spec, ranks) if vllm else even_shares(spec, ranks)
            case = Case(spec, weights, engine, Workload(min(prompt + 1024, 131072)), Rig((a100,) * ranks))
            decode = decode_seconds(case, shares)
            prefill = prefill_seconds(case.at(prompt), shares)
            assert decode is not None and prefill is not None
            ratio = (decode + prefill / 2048) * float(row["tokens_per_s"])
            groups.setdefault((row["engine"], row["quant"]), []).append(ratio)
            fits[row["engine"], row["quant"]] = engine.speed_fit(weights)
    lines = []
    for (engine_name, quant), ratios in groups.items():
        fit = fits[engine_name, quant]
        mean = 100 * sum(abs(r - 1) for r in ratios) / len(ratios)
        lines.append(
            (
                engine_name, quant, len(ratios), f"{1e3 * fit.layer_s:.3f} + {1e3 * fit.rank_layer_s:.3f}", fit.traffic,
                f"{mean:.1f} %", f"{min(ratios):.2f} to {max(ratios):.2f}",
            )
        )  # fmt: skip
    return [
        "## Speed, A100: predicted time / published time",
        "Seconds a token = overhead x layers + traffic x weight bytes / bandwidth + KV bytes / bandwidth + prefill / "
        "2048, prefill at 40 % of the tensor rate; transformers before 4.48 moves its repeated keys and values 3.9 "
        "times. Least squares on relative errors with non-negative overheads and a traffic of at least 1 (1.05 in "
        "vLLM), per engine and format, rounded; then one prefill rate for all. The constants, and these ranges, are in "
        "`qwenq/planning/engines/`. Other cards and hosts get a range 1.3 times as wide. "
        f"{left_out} rows are left out: vLLM 0.6.2 runs at 129,024 tokens (another sampling set-up) and the 72B "
        "GPTQ-Int4 on one GPU in vLLM, 2.8 times slower than on two.",
        table(("engine", "format", "rows", "ms a layer + with TP", "traffic", "mean error", "ratios"), lines),
    ]


def known_section() -> list[str]:
    """Facts and rigs that must come out right."""
    from qwenq.formats.base import Recipe, Scheme
    from qwenq.planning.budget import sized_recipe
    from qwenq.planning.engines.llamacpp import compute_buffer
    from qwenq.planning.placement import place
    from qwenq.planning.rig import parse_rig
    from qwenq.planning.weights import gguf_weights, recipe_weights

    spec, rig = model("Qwen2.5-72B"), parse_rig("2x RTX 3090")
    uniform = recipe_weights(spec, Recipe(Scheme(4, 128)))
    mixed = recipe_weights(spec, sized_recipe(spec, 47 * 10**9, lambda name: "BF16"))
    buffer = compute_buffer(spec, gguf_weights(spec, "Q4_K_M"), 512, True).n_bytes / (1 << 20)
    lines = [
        ("KV of the 72B, bytes a token at 16 bits", f"{spec.kv_bytes_per_token():,.0f}", "327,680"),
        ("llama.cpp compute buffer, ubatch 512", f"{buffer:.1f} MiB", "313.0 MiB (ollama#5913)"),
        ("FFN width of the official GPTQ and AWQ files", published_weights(spec, "AWQ").intermediate_size, "29,696"),
    ]
    fits: Callable[[bool], str] = lambda yes: "fits" if yes else "does not fit"  # noqa: E731
    for name in ("qwenq", "transformers"):
        engine = get_engine(name)
        for weights, context, wanted in ((uniform, 8192, True), (uniform, 32768, False), (mixed, 8192, False)):
            case = Case(spec, weights, engine, Workload(context, prefill_chunk=1024), rig)
            found, longest = place(case), engine.longest_context(case)
            what = f"{weights.total_bytes / 1e9:.1f} GB at {context} on 2x RTX 3090, {name}, prompts in chunks of 1,024"
            lines.append((what, f"{fits(found.fits)}; largest context {longest}", fits(wanted)))
    return [
        "## Known facts and rigs",
        table(("what", "here", "published or wanted"), lines),
        "The largest contexts are for chunks of 1,024; in chunks of 2,048, the default, they are shorter.",
        "## The page's server under random requests",
        "Run by hand, two connections against `qwenq vram serve`, bodies from `random_body` in `test_page.py` "
        "(seed 20): 10,000 requests, 1,806 answered (200), 8,194 refused (422), nothing else; the server still "
        "answered and had printed no error. An earlier run found one assertion failure (a split of an absurd load), "
        "since fixed and tested.",
    ]


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *lines])


if __name__ == "__main__":
    main()
