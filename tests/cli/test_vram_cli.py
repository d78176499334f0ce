"""`qwenq vram` and `qwenq plan` from the outside: exact output, exit codes, and what they may not import."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qwenq.planning.questions import Question, spread
from tests.conftest import answer, run

DATA = Path(__file__).parents[1] / "data"
TABLE = DATA / "published" / "qwen25_transformers_memory.csv"


def test_json_says_what_the_library_says() -> None:
    result = run("vram", "Qwen2.5-72B", "--gpu", "2x RTX 3090", "-c", "8k,32k", "--json")
    assert result.exit_code == 0 and result.stderr == ""
    answer = json.loads(result.stdout)
    question = Question(model="Qwen2.5-72B", gpu="2x RTX 3090").resolve()
    assert [e["context"] for e in answer["estimates"]] == [8192, 32768]
    assert answer["estimates"] == [found.to_json() for found in spread(question, [8192, 32768]).estimates]
    first = answer["estimates"][0]
    assert first["kv_bytes_per_token"] == 327_680 and first["fits"] is True and answer["estimates"][1]["fits"] is False
    assert first["weights"]["bytes"] == 41_489_965_056
    provenances = {term["name"]: term["provenance"] for term in first["gpus"][0]["terms"]}
    assert provenances["weights"] == provenances["kv_cache"] == "exact"
    assert provenances["activations"] == "fitted" and provenances["context"] == "reported"


def test_estimate_is_the_default_command() -> None:
    plain, named = run("vram", "Qwen2.5-7B", "--json"), run("vram", "estimate", "Qwen2.5-7B", "--json")
    options_first = run("vram", "--json", "Qwen2.5-7B")
    assert plain.stdout == named.stdout == options_first.stdout and plain.exit_code == 0
    assert "validate" in run("vram", "--help").stdout and "--context" in run("vram", "estimate", "--help").stdout


def test_csv_has_a_line_a_term() -> None:
    result = run("vram", "Qwen2.5-7B", "--gpu", "RTX 3090", "-c", "4k", "--csv")
    rows = list(csv.DictReader(io.StringIO(result.stdout)))
    assert {row["term"] for row in rows} >= {"weights", "kv_cache", "activations", "context", "slack"}
    assert next(row for row in rows if row["term"] == "kv_cache")["bytes"] == str(4096 * 57_344)
    assert list(rows[0]) == [
        "context", "gpu", "name", "term", "bytes", "low_bytes", "high_bytes", "provenance", "source",
    ]  # fmt: skip


def test_text_with_table_and_chart() -> None:
    result = run("vram", "Qwen2.5-72B", "--gpu", "2x RTX 3090", "-c", "8k,32k")
    assert result.exit_code == 0
    assert result.stdout == (DATA / "vram_72b_2x3090.txt").read_text()
    assert "\x1b" not in result.stdout  # no colour outside a terminal


@pytest.mark.parametrize(("engine", "columns"), [("qwenq", 80), ("vllm", 80), ("sglang", 90)])  # of eight terms
def test_table_and_chart_fit_a_terminal(engine: str, columns: int) -> None:
    found = run("vram", "Qwen2.5-72B", "--gpu", "4x RTX 3090", "--engine", engine).stdout
    table, chart = found[found.index("GiB per GPU") : found.index("Where the figures")].strip().split("\n\n")
    assert max(map(len, table.splitlines())) <= columns, table
    assert max(map(len, chart.splitlines())) <= 80, chart


def test_a_plan_is_for_8k_or_as_far_as_the_model_goes(tiny: Path) -> None:
    long, short = answer("plan", "Qwen2.5-7B", "--gpu", "24GB"), answer("plan", tiny, "--gpu", "24GB")
    assert (long["context"], short["context"]) == (8192, 512)
    refused = run("plan", tiny, "--gpu", "24GB", "-c", "8k")
    assert refused.exit_code == 1 and "context is 8192 tokens, tiny-qwen2 allows 512" in refused.stderr
    fitting = run("quantize", tiny, "--fit", "24GB", "--dry-run")
    assert fitting.exit_code == 3 and "512 context" in fitting.stderr


def test_contexts_stop_at_the_models_limit() -> None:
    answer = json.loads(run("vram", "Qwen2.5-0.5B", "--json").stdout)
    assert [e["context"] for e in answer["estimates"]] == [1024, 8192, 32768]


def test_checkpoint_directory() -> None:
    by_option = answer("vram", str(DATA / "tiny-qwen2"), "-c", "64")
    assert by_option["weights"]["source"] == "the checkpoint's own headers"
    files = sum(p.stat().st_size for p in (DATA / "tiny-qwen2").glob("*.safetensors"))
    assert 0 < files - by_option["weights"]["bytes"] < 20_000  # the headers


@pytest.mark.parametrize("engine", ["qwenq", "transformers", "vllm", "llama.cpp"])
def test_every_engine(engine: str) -> None:
    found = answer("vram", "Qwen2.5-7B", "--engine", engine, "--gpu", "2x RTX 3090", "-c", "8k")
    assert found["estimates"][0]["fits"] is True


def test_a_gpu_the_engine_cannot_use_is_warned_of() -> None:
    result = run("vram", "Qwen2.5-7B", "--gpu", "M2 Ultra", "-c", "4k", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["rig"] == "Apple M2 Ultra"
    assert result.stderr == "warning: qwenq does not run on Apple M2 Ultra\n"


def test_engine_version_counts() -> None:
    def total(version: str) -> int:
        args = ("--engine", "transformers", "--engine-version", version, "--bits", "16", "-c", "16k", "--json")
        return int(json.loads(run("vram", "Qwen2-7B", *args).stdout)["estimates"][0]["total_bytes"])

    assert total("4.38.2") - total("4.46.0") > 12 * 2**30  # float32 logits of 16k positions


BAD = [
    (["vram", "Qwen2.5-72B", "--gpu", "RTX 3091"], "error: unknown GPU 'RTX 3091'", "hint: near: RTX 3090"),
    (["vram", "Qwen2.5-72B", "-c", "-5"], "error: not a context length: '-5'", "hint: write tokens"),
    (["vram", "Qwen2.5-72B", "-c", "0"], "error: not a context length: '0'", "hint: write tokens"),
    (
        ["vram", "Qwen2.5-72B", "-c", "256k"],
        "error: context is 262144 tokens, Qwen2.5-72B allows 131072",
        "hint: ask for",
    ),
    (["vram", "Qwen2.5-72C"], "error: Qwen2.5-72C: neither a directory nor a shipped model", "hint: near: Qwen2.5-72B"),
    (["vram", "Qwen2.5-72B", "--bits", "3"], "error: --bits 3: wanted 4, 8, or 16 for not quantized", ""),
    (
        ["vram", "Qwen2.5-72B", "--format", "gptq2"],
        "error: --format gptq2: wanted one of gptq, awq, compressed-tensors, bnb-nf4, bnb-int8, fp8",
        "hint: or a GGUF type, with --engine llama.cpp",
    ),
    (
        ["vram", "Qwen2.5-72B", "--group-size", "7"],
        "error: model.layers.0.self_attn.q_proj: group size 7",
        "hint: sizes",
    ),
    (["vram", "Qwen2.5-72B", "--engine", "tgi"], "error: unknown engine 'tgi'", "hint: one of qwenq"),
    (
        ["vram", "Qwen2.5-72B", "--kv-cache-dtype", "int3"],
        "error: qwenq is not planned with KV cache dtype 'int3'",
        "hint: one of auto",
    ),
    (["vram", "Qwen2.5-72B", "--batch-size", "0"], "error: batch size is 0", ""),
    (["vram", "Qwen2.5-72B", "--json", "--csv"], "error: --json and --csv exclude each other", ""),
    (
        ["vram", "Qwen2.5-72B", "--bits", "4", "--target-size", "47GB"],
        "error: --bits and --target-size exclude each other",
        "hint: give",
    ),
    (
        ["plan", "Qwen2.5-72B", "--gpu", "3090", "--group-size", "64", "--recipe", "r.toml", "--checkpoint", "x"],
        "error: --group-size and --recipe and --checkpoint exclude each other",
        "hint: give",
    ),
    (["vram", "Qwen2.5-72B", "--target-size", "9GB", "--recipe", "r"], "error: --target-size and --recipe ", "hint: g"),
    (["vram", "Qwen2.5-72B", "--reserve", "1GiB"], "error: --reserve needs a rig, and none was given", "hint: name it"),
    (
        ["plan", "Qwen2.5-72B", "--recommend", "--ram", "64GB"],
        "error: --ram needs a rig, and none was given",
        "hint: n",
    ),
    (["quantize", "Qwen2.5-72B", "--dry-run", "--network", "10gbps"], "error: --network is between ranks", "hint: --r"),
    (["vram", "Qwen2.5-72B", "--target-size", ""], "error: not a size: ''", "hint: write for instance 47GB"),
    (["vram", "Qwen2.5-72B", "--recipe", "r.toml"], "error: r.toml: No such file or directory", "hint: qwenq quantize"),
    (
        ["vram", "Qwen2.5-72B", "--recipe", "r.toml", "--engine", "llama.cpp"],
        "error: --recipe is not supported for llama.cpp",
        "hint: a GGUF type (--format Q4_K_M), --bits 4, 8 or 16",
    ),
    (
        ["plan", "Qwen2.5-7B", "--gpu", "3090", "--group-size", "64", "--engine", "llama.cpp"],
        "error: --group-size is not supported for llama.cpp",
        "hint: a GGUF type (--format Q4_K_M), --bits 4, 8 or 16",
    ),
    (
        ["plan", "Qwen2.5-72B", "--gpu", "3090", "--pad-for-tp", "3"],
        "error: --pad-for-tp 3: 64 heads are not divisible by 3",
        "hint: padding the FFN cannot",
    ),
    (
        ["vram", "Qwen2.5-72B", "--checkpoint", str(DATA / "tiny-qwen2"), "--pad-for-tp", "2"],
        "error: --pad-for-tp 2 is for checkpoints that quantize writes, not for existing weights",
        "hint: give --bits 4 or 8",
    ),
    (
        ["vram", str(DATA / "tiny-qwen2"), "--pad-for-tp", "2"],
        "error: --pad-for-tp 2 is for checkpoints",
        "hint: give --bits",
    ),
    (["vram", "Qwen2.5-72B", "--bits", "16", "--pad-for-tp", "2"], "error: --pad-for-tp 2 is for", "hint: give --bits"),
    (
        ["vram", "Qwen2.5-72B-GPTQ-Int4", "--target-size", "47GB"],
        "error: Qwen2.5-72B: already quantized (GPTQ-Int4)",
        "hint: plan from the original",
    ),
    (["vram", "Qwen2.5-72B", "--expect-params", "130B"], "error: the config contradicts itself", "hint: Qwen2.5-72B"),
    (["vram", "Qwen2.5-72B", "--expect-params", "many"], "error: not a number of parameters: 'many'", "hint: write"),
    (
        ["vram", "Qwen2.5-72B", "--engine", "vllm", "--gpu", "2x 3090", "--tensor-parallel-size", "2"],
        "error: tensor parallel size 2 is not possible: FFN width 29568 / 2 = 14784",
        "",
    ),
    (
        ["vram", "Qwen2.5-7B", "--engine", "vllm", "--gpu", "3090", "--tensor-parallel-size", "2"],
        "error: tensor parallel size 2 is not possible: the number of GPUs, 1, is not divisible by 2",
        "",
    ),
    (["vram", "validate", "nowhere.csv"], "error: nowhere.csv: No such file or directory", "hint: wanted a CSV"),
    (["plan", "Qwen2.5-72B"], "error: give one of --gpu, --detect and --recommend", "hint: for instance"),
    (["plan", "Qwen2.5-72B", "--gpu", "3090", "-c", "1k,2k"], "error: wanted one context", "hint: `qwenq vram`"),
    (["plan", "Qwen2.5-72B", "--gpu", ""], "error: not a rig: ''", "hint: write for instance"),
    (["vram", "Qwen2.5-72B", "--gpu", ""], "error: not a rig: ''", "hint: write for instance"),
    (
        ["plan", "Qwen2.5-72B", "--gpu", "3090", "--reserve", "100GiB"],
        "error: --reserve 100.00 GiB leaves nothing of GPU 0",
        "hint: a smaller --reserve",
    ),
    (
        ["plan", "Qwen2.5-7B", "--gpu", "3090", "--batch-size", "9" * 400],
        "error: batch size is a number of 400 digits",
        "",
    ),
    (["plan", "Qwen2.5-72B", "--gpu", "M2 Ultra"], "error: qwenq does not run on Apple M2 Ultra", "hint: --engine"),
]


USAGE = (  # wrong whatever the model
    "error: not a ", "error: unknown GPU", "error: --bits 3", "error: --format gptq2", "error: unknown engine",
    "error: qwenq is not planned", "error: batch size is", "error: --json and --csv", "error: --bits and",
    "error: --group-size and", "error: --target-size and", "error: --recipe is not", "error: --group-size is not",
    "error: give one of", "error: wanted one", "error: --reserve needs", "error: --ram needs",
    "error: --network is between",
)  # fmt: skip


@pytest.mark.parametrize(("args", "error", "hint"), BAD, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_bad_input_is_one_line_and_a_hint(args: list[str], error: str, hint: str) -> None:
    result = run(*args)
    code = 2 if error.startswith(USAGE) else 1
    assert (result.exit_code, result.stdout) == (code, "")
    lines = result.stderr.splitlines()
    assert lines[0].startswith(error) and len(lines) == (2 if hint else 1)
    assert not hint or lines[1].startswith(hint)


def test_directories_that_are_no_checkpoint(tmp_path: Path) -> None:
    result = run("vram", str(tmp_path))
    assert result.exit_code == 1 and result.stderr.splitlines()[0] == f"error: {tmp_path}: no config.json"
    (tmp_path / "config.json").write_text('{"model_type": "qwen2", "hidden_size": 12288}')
    result = run("vram", str(tmp_path))
    assert result.exit_code == 1 and "num_attention_heads is None" in result.stderr
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_moe"}')
    assert "model_type 'qwen2_moe' is not supported" in run("vram", str(tmp_path)).stderr


def test_validate_json_shape() -> None:
    result = run("vram", "validate", str(TABLE), "--json")
    assert result.exit_code == 0 and result.stderr == ""
    answer = json.loads(result.stdout)
    assert set(answer) == {"rows", "mean_abs_error_percent", "max_abs_error_percent"} and len(answer["rows"]) == 60
    assert set(answer["rows"][0]) == {"model", "quant", "input_len", "predicted_gib", "mem_gib"}
    assert answer["rows"][0]["model"] == "Qwen2.5-0.5B-Instruct" and answer["rows"][0]["mem_gib"] == 0.97
    mean = sum(abs(r["predicted_gib"] / r["mem_gib"] - 1) for r in answer["rows"]) / 60 * 100
    assert answer["mean_abs_error_percent"] == pytest.approx(mean, abs=0.01) and mean < 0.3


def test_validate_text() -> None:
    lines = run("vram", "validate", str(TABLE)).stdout.splitlines()
    assert len(lines) == 63 and lines[0].startswith("Qwen2.5-0.5B-Instruct    BF16             1 tokens  predicted")
    assert lines[-2].startswith("prompts of 6,144 tokens and more: 44, mean error 0.")


def test_validate_bad_tables(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"

    def said(text: str) -> str:
        table.write_text(text)
        result = run("vram", "validate", str(table))
        assert result.exit_code == 1 and "Traceback" not in result.stderr
        return result.stderr

    assert "no column input_len, mem_gib" in said("model,quant\n")
    assert "no row that can be predicted" in said("model,quant,input_len,mem_gib\n")
    wanted = "line 2: input_len is 'x', wanted a whole number"
    assert wanted in said("model,quant,input_len,mem_gib\nQwen2.5-7B,AWQ,x,5\n")
    assert "line 2: mem_gib is '0'" in said("model,quant,input_len,mem_gib\nQwen2.5-7B,AWQ,1,0\n")
    row = "Qwen2.5-7B,AWQ,vllm,0.26,RTX 3090,8192,13"
    table.write_text(f"model,quant,engine,version,gpu,max_model_len,mem_gib\n{row}\n")
    assert run("vram", "validate", str(table)).exit_code == 0, "a server's table has no input_len"
    table.write_text("model,quant,input_len,mem_gib\nQwen2.5-7B,AWQ,1,5.39\nGPT-5,AWQ,1,5\n")
    result = run("vram", "validate", str(table))
    assert result.exit_code == 0 and "warning:" in result.stderr and "line 3 left out: GPT-5" in result.stderr


def test_gpus_lists_the_catalogue() -> None:
    assert "RTX 3090" in run("vram", "gpus").stdout
    assert len(answer("vram", "gpus")) >= 35


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "Qwen/Qwen2.5-7B-Instruct-AWQ"),
        ("Qwen2.5-7B-Instruct-AWQ", "CHECKPOINT"),  # of whoever
        ("Qwen/Qwen2.5-7B-Instruct", "CHECKPOINT"),  # to be quantized to 4 bits
    ],
)
def test_commands_name_published_files(name: str, place: str) -> None:
    assert answer("plan", name, "--gpu", "RTX 3090")["flags"]["vllm"].startswith(f"vllm serve {place} ")


def test_plan_exit_codes_and_text() -> None:
    fits = run("plan", "Qwen2.5-72B", "--gpu", "2x RTX 3090", "--context", "8k")
    assert fits.exit_code == 0 and fits.stderr == ""
    assert fits.stdout.splitlines()[0] == (
        "Qwen2.5-72B, 4-bit g128 (41.49 GB), 8k context, batch 1, qwenq, on 2x RTX 3090: fits"
    )
    assert "vllm serve CHECKPOINT" in fits.stdout and "device_map = {" in fits.stdout and "llama-server" in fits.stdout
    short = run("plan", "Qwen2.5-72B", "--gpu", "2x RTX 3090", "--context", "8k", "--target-size", "47GB")
    assert short.exit_code == 3 and "does not fit" in short.stdout and "would fit here:" in short.stdout
    assert "stay in host memory" in short.stdout


def test_plan_json() -> None:
    result = run("plan", "Qwen2.5-72B", "--gpu", "RTX 4090 + 2x RTX 3060 12GB", "--json")
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["fits"] is True and len(answer["placement"]["gpus"]) == 3
    assert set(answer["flags"]) == {"vllm", "transformers", "llama.cpp"}


def test_recommend() -> None:
    text = run("plan", "Qwen2.5-72B", "--recommend", "-c", "16k").stdout
    assert "2x RTX 3090" in text and "$1,400 (used)" in text and "price unknown" in text and "700 W" in text
    counts = [int(line.split("x ")[0]) for line in text.splitlines()[1:]]
    assert counts == sorted(counts)
    rigs = answer("plan", "Qwen2.5-72B", "--recommend")["rigs"]
    assert rigs[0]["count"] == 1 < rigs[-1]["count"] <= 8
    assert all(line.split(" up to ")[1].split(";")[0].endswith("k") for line in text.splitlines()[1:])
    none = run("plan", "Qwen2.5-72B", "--recommend", "--bits", "16", "-c", "128k", "--batch-size", "64")
    assert none.exit_code == 3 and "none of up to 8 equal GPUs" in none.stdout


def test_recommended_contexts_below_a_thousand(tiny: Path) -> None:
    """They were rounded down to 0k."""
    lines = run("plan", tiny, "--recommend", "-c", 512).stdout.splitlines()[1:]
    assert lines and all(" up to 512; " in line for line in lines)


def test_detect_without_a_driver() -> None:
    pynvml = pytest.importorskip("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        result = run("plan", "Qwen2.5-72B", "--detect")
        assert result.exit_code == 1 and result.stderr.startswith("error: no NVIDIA driver responds")
    else:
        pynvml.nvmlShutdown()
        pytest.skip("this machine has an NVIDIA driver")


def test_planning_never_imports_torch() -> None:
    code = """
import sys
from typer.testing import CliRunner
from qwenq.cli.main import app
for args in (
    ["vram", "Qwen2.5-72B", "--gpu", "2x RTX 3090"],
    ["vram", "validate", sys.argv[1]],
    ["plan", "Qwen2.5-72B", "--gpu", "2x RTX 3090"],
    ["plan", "Qwen2.5-72B", "--recommend"],
    ["plan", "Qwen2.5-7B", "--gpu", "RTX 3090", "--target-size", "6GB", "--pad-for-tp", "2"],
):
    assert CliRunner().invoke(app, args).exit_code == 0, args
heavy = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub", "plotly", "fastapi"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code, str(TABLE)], check=True)


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("nf4", [], "NF4 g64"),
        ("bnb-nf4", [], "NF4 g64"),
        ("int8", [], "8-bit per channel"),
        ("awq", [], "4-bit g128 asym"),
        ("compressed-tensors", ["--bits", "8"], "8-bit g128"),
        ("fp8", [], "fp8 that qwenq itself does not read"),
        ("Q6_K", ["--engine", "llama.cpp"], "GGUF Q6_K"),
        ("q8_0", ["--engine", "llama.cpp"], "GGUF Q8_0"),
    ],
)
def test_formats_by_name(name: str, more: list[str], says: str) -> None:
    args = ["Qwen2.5-7B", "--format", name, *more, "-c", "4k"]
    weights = answer("vram", *args)["weights"]
    assert weights["label"] == says
    planned = run("plan", *args, "--gpu", "RTX 3090", "--json")
    assert planned.exit_code == 0 and json.loads(planned.stdout)["weights"]["bytes"] == weights["bytes"]


def test_formats_that_do_not_go_together() -> None:
    for args, says in (
        (["--format", "nf4", "--bits", "8"], "--bits is 8, --format bnb-nf4 has 4"),
        (["--format", "Q6_K"], "--format Q6_K is GGUF"),
        (["--format", "awq", "--engine", "llama.cpp"], "is not a GGUF type"),
        (["--format", "gptq", "--target-size", "5GB"], "--format and --target-size exclude each other"),
        (["--format", "fp8", "--group-size", "64"], "--format fp8 has no --group-size"),
        (["--format", "exl2"], "--format exl2: wanted one of"),
        (["--enforce-eager"], "--enforce-eager is for servers"),
        (["--max-num-seqs", "4"], "--max-num-seqs is for servers, and qwenq is not one"),
        (["--gpu-memory-utilization", "0.9", "--engine", "llama.cpp"], "--gpu-memory-utilization is for servers"),
        (["--gpu", "3090", "--reserve", "1"], "not a size: '1' has no unit"),
    ):
        result = run("vram", "Qwen2.5-7B", *args)
        assert result.exit_code == 2 and says in result.stderr, (args, result.stderr)


def test_host_memory_is_compared() -> None:
    asked = ("plan", "Qwen2.5-72B", "--gpu", "RTX 4090", "-c", "8k")
    enough, short, unsaid = (
        json.loads(run(*asked, *ram, "--json").stdout)["host"] for ram in (("--ram", "64GB"), ("--ram", "16GB"), ())
    )
    assert (enough["fits"], short["fits"], unsaid["fits"]) == (True, False, None)
    assert enough["limit_bytes"] == 64 << 30 and enough["weights_bytes"] == 20_366_807_040
    assert "of 16.00 GiB: does not fit" in run(*asked, "--ram", "16GB").stdout
    assert "speed then" not in run(*asked, "--ram", "16GB").stdout and "speed then" in run(*asked).stdout
    wrong = run(*asked, "--ram", "much")
    assert wrong.exit_code == 2 and "--ram is 'much', wanted a size" in wrong.stderr


def test_commands_and_headline_follow_host_memory() -> None:
    """41 GB on 24 GiB: too much for 16 GiB of host memory, not for 64 GiB; the exit code is of the GPUs alone."""
    asked = ("plan", "Qwen2.5-72B", "--gpu", "RTX 3090")
    short, enough, unsaid = (run(*asked, *ram) for ram in (("--ram", "16GB"), ("--ram", "64GB"), ()))
    assert (short.exit_code, enough.exit_code, unsaid.exit_code) == (3, 3, 3)
    headlines = [found.stdout.splitlines()[0].split("on RTX 3090: ")[1] for found in (short, enough, unsaid)]
    assert headlines[0] == headlines[2] == "does not fit"
    assert headlines[1] == "does not fit on the GPU; fits with 45 of 80 layers in host memory"
    above: dict[str, list[bool]] = {}  # the line above each command, and what it says of host memory
    for found in (short, enough, unsaid):
        for line, command in itertools.pairwise(found.stdout.splitlines()):
            if command.startswith(("llama-server", "max_memory")):
                above.setdefault(command.split()[0], []).append("of 16.00 GiB: does not fit" in line)
    assert above == {"max_memory": [True, False, False], "llama-server": [True, False, False]}
    kept = run(*asked, "--ram", "16GB", "--engine", "llama.cpp", "--format", "Q2_K").stdout
    assert "# host memory" not in kept, "a smaller file leaves less to the host"


def test_unified_memory_is_one_pool() -> None:
    """GPU and host share 32 GiB: the layers of a 47 GB file fit in no division of them."""
    asked = ("plan", "Qwen2.5-72B", "--engine", "llama.cpp", "--gpu")
    for ram in ((), ("--ram", "32GB")):
        plan = run(*asked, "Mac 32GB", *ram)
        assert "GiB that the GPU leaves of 32.00 GiB: does not fit" in plan.stdout, plan.stdout
        host = json.loads(run(*asked, "Mac 32GB", *ram, "--json").stdout)["host"]
        held = (32 << 30) - host["limit_bytes"]
        assert 18 << 30 < held < 32 * 2 / 3 * 2**30  # what Metal allows, filled to less than a layer
        assert host["fits"] is False and host["weights_bytes"] + held > 47.41e9
    larger = run(*asked, "Mac 64GB", "-c", "32k")
    assert "GiB that the GPU leaves of 64.00 GiB: fits" in larger.stdout and "--ram" not in larger.stdout
    more = run(*asked, "Mac 32GB", "--ram", "64GB")
    assert more.exit_code == 2
    assert more.stderr.startswith("error: --ram is 64GB, but Mac 32GB has 32.00 GiB, shared with its GPU\n")


def test_speeds_have_three_digits() -> None:
    for gpu in ("2x RTX 3090", "A100 SXM4 80GB", "8x H100 SXM5 80GB"):
        for engine in ("qwenq", "vllm", "llama.cpp"):
            text = run("plan", "Qwen2.5-7B", "--gpu", gpu, "--engine", engine).stdout
            line = next(line for line in text.splitlines() if line.startswith("speed"))
            assert not re.search(r"\de[+-]\d", line), line
            for low, high in re.findall(r"([\d.,]+) to ([\d.,]+) tokens", line):
                assert float(high.replace(",", "")) <= 2.25 * float(low.replace(",", "")), line


def test_no_server_fits_where_it_does_not_run() -> None:
    result = run("vram", "Qwen2.5-7B", "--gpu", "M2 Ultra", "--engine", "vllm", "--json")
    assert result.exit_code == 1 and "vLLM cannot use Apple M2 Ultra" in result.stderr
    plan = run("plan", "Qwen2.5-72B", "--gpu", "Mac 64GB", "-c", "32k", "--engine", "llama.cpp")
    assert plan.exit_code == 3 and "shared with the system" in plan.stdout
    assert "vLLM does not run on Mac 64GB" in plan.stdout and "Metal's share" in plan.stdout


def test_versions_nobody_checked_are_said() -> None:
    text = run("vram", "Qwen2.5-7B", "--engine", "vllm", "--engine-version", "0.99", "-c", "4k").stdout
    assert "vLLM 0.99 has not been checked: counted as 0.26" in text
    asked = ("plan", "Qwen2.5-7B", "--engine", "vllm", "--engine-version", "0.99", "--gpu", "L4")
    plan = answer(*asked)
    assert "vLLM 0.99 has not been checked: counted as 0.26" in plan["notes"]
