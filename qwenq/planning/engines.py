"""Facts about inference engines that decide memory, by version: what they keep, copy, round and dequantize.

Read from the sources of transformers 4.38.2, 4.41.2, 4.42.4, 4.43.4, 4.44.2, 4.45.2, 4.46.0, 4.48.3, 4.51.3
and 5.23.0 and of AutoGPTQ and AutoAWQ, and from vLLM 0.19 start-up logs; each fact says which.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from qwenq.errors import UsageError
from qwenq.planning.profile import Profile

ENGINES = ("qwenq", "transformers", "vllm", "llama.cpp")
KV_BYTES = {  # bytes a cached value, scales included; llama.cpp's q8_0 is 34 bytes per 32 values, q4_0 18
    "auto": 2.0,
    "fp16": 2.0,
    "bf16": 2.0,
    "fp8": 1.0,
    "q8_0": 34 / 32,
    "q4_0": 18 / 32,
}
KV_DTYPES = {
    "qwenq": ("auto", "fp16", "bf16", "fp8"),
    "transformers": ("auto", "fp16", "bf16"),
    "vllm": ("auto", "fp16", "bf16", "fp8"),
    "llama.cpp": ("auto", "fp16", "q8_0", "q4_0"),
}
Version = tuple[int, ...]
LATEST: dict[str, Version] = {"qwenq": (0, 1), "transformers": (5, 17), "vllm": (0, 19), "llama.cpp": (0,)}
QWENQ_PREFILL_CHUNK = 2048
LLAMA_CPP_UBATCH = 512
VLLM_BLOCK_TOKENS = 16


def parse_version(text: str) -> Version:
    """(4, 46, 0) of `4.46.0`; what follows the numbers is ignored."""
    match = re.match(r"\d+(\.\d+)*", text.strip().lstrip("vb"))
    if not match:
        raise UsageError(f"not a version: {text!r}", hint="write for instance 4.46.0")
    return tuple(int(part) for part in match[0].split("."))


@dataclass(frozen=True)
class Engine:
    """An engine at a version; `libraries` holds the versions of what it loads (`autogptq`, `gptqmodel`, `autoawq`)."""

    name: str
    version: Version
    libraries: tuple[tuple[str, Version], ...] = field(default=())
    profile: Profile | None = None  # what was measured on the rig, for the torch engines

    @property
    def label(self) -> str:
        """`transformers 4.46.0`; llama.cpp and this project's own engine carry no version here."""
        if self.name in ("llama.cpp", "qwenq"):
            return self.name
        return f"{'vLLM' if self.name == 'vllm' else self.name} {'.'.join(map(str, self.version))}"

    def library(self, name: str) -> Version | None:
        return dict(self.libraries).get(name)

    @property
    def layered(self) -> bool:
        """Layers on different GPUs run one after the other (no tensor parallelism)."""
        return self.name != "vllm"

    @property
    def full_logits(self) -> bool:
        """Logits of every prompt position, then a float32 copy: transformers before 4.45 (#31292)."""
        return self.name == "transformers" and self.version < (4, 45)

    @property
    def rotary_per_layer(self) -> bool:
        """Each layer keeps cosine and sine tables of the model's whole context: transformers before 4.45."""
        return self.name == "transformers" and self.version < (4, 45)

    @property
    def copies_cache(self) -> bool:
        """`generate` holds the previous tuple cache while the next is built: transformers before 4.42."""
        return self.name == "transformers" and self.version < (4, 42)

    @property
    def repeats_kv(self) -> bool:
        """Flash-attention path expands keys and values to all heads: transformers before 4.48."""
        return self.name == "transformers" and self.version < (4, 48)


def get_engine(name: str, version: str = "", libraries: dict[str, str] | None = None) -> Engine:
    """The engine called `name`, at `version` or the newest one the facts were checked for."""
    if name not in ENGINES:
        raise UsageError(f"unknown engine {name!r}", hint=f"one of {', '.join(ENGINES)}")
    found = tuple((lib, parse_version(text)) for lib, text in (libraries or {}).items())
    return Engine(name, parse_version(version) if version else LATEST[name], found)


def prefill_chunk(engine: Engine, asked: int, prompt: int) -> int:
    """Prompt tokens an engine computes at once: as asked, or its own; the whole prompt in transformers."""
    own = {"qwenq": QWENQ_PREFILL_CHUNK, "llama.cpp": LLAMA_CPP_UBATCH}
    return min(prompt, asked or own.get(engine.name, prompt))


def kv_bytes_per_value(engine: Engine, kv_dtype: str) -> float:
    """Bytes of one cached value; PlanError when the engine has no such cache."""
    if kv_dtype not in KV_DTYPES[engine.name]:
        raise UsageError(
            f"{engine.name} has no {kv_dtype!r} KV cache", hint=f"one of {', '.join(KV_DTYPES[engine.name])}"
        )
    return KV_BYTES[kv_dtype]


@dataclass(frozen=True)
class Kernel:
    """How an engine multiplies with packed weights; bytes per weight of the widest linear.

    `static`: a buffer kept for good. `peak`: temporaries while dequantizing, before the output exists. `hold`: the
    dequantized matrix kept during the multiplication. Temporaries only from `min_rows` rows on.
    """

    name: str
    static: float = 0.0
    peak: float = 0.0
    hold: float = 0.0
    min_rows: int = 1
    source: str = ""


DENSE = Kernel("16-bit matrix product", source="no dequantization")
EXLLAMA_V1 = Kernel("ExLlama v1", static=2, source="AutoGPTQ autogptq_post_init: temp_dq, fp16")
CUDA_OLD = Kernel(
    "AutoGPTQ cuda_old",
    peak=6,  # int32 shift (4) and its int16 copy (2), then int16, difference, fp16 product (2 + 2 + 2)
    hold=2,
    min_rows=128,
    source="AutoGPTQ qlinear_cuda_old.py, from kernel_switch_threshold = 128 rows on",
)
AWQ_GEMM = Kernel(
    "AutoAWQ gemm", peak=2, hold=2, min_rows=1024, source="AutoAWQ WQLinearMMFunction, from 1,024 rows on"
)
MARLIN = Kernel("Marlin", source="repacked weights, workspace of a few KB")
LLAMA_CPP = Kernel("llama.cpp MMQ", source="int8 products, no 16-bit copy")
STRIPS = Kernel("strips", source="weights written out strip by strip")  # how much: Weights.kept
PER_LINEAR = Kernel("dequantize per linear", peak=2, hold=2, source="one linear in 16 bit at a time, its upper bound")


def kernel_for(engine: Engine, method: str, bits: int) -> Kernel:
    """The kernel an engine takes for weights stored as `method` (`gptq`, `awq`, `none`, ...) in `bits` bits."""
    if method == "gguf" or engine.name == "llama.cpp":
        return LLAMA_CPP
    if method in ("none", "fp8"):
        return DENSE
    if engine.name == "qwenq":
        return STRIPS
    if engine.name == "vllm":
        return MARLIN
    if method == "awq":
        return AWQ_GEMM
    if method in ("bitsandbytes", "compressed-tensors"):
        return PER_LINEAR
    if engine.library("autogptq") is not None:
        return EXLLAMA_V1 if bits == 4 else CUDA_OLD
    return MARLIN  # GPTQModel on Ampere and later


_ENV = re.compile(r"([A-Za-z][A-Za-z._-]*?)[ =_-]*v?(\d+(?:\.\d+)+)")
_ENV_NAMES = {"transformers": "transformers", "vllm": "vllm", "autogptq": "autogptq", "auto_gptq": "autogptq",
              "auto-gptq": "autogptq", "gptqmodel": "gptqmodel", "autoawq": "autoawq"}  # fmt: skip


def parse_environment(text: str) -> dict[str, str]:
    """Library versions out of a free text such as `A100-80GB cu121 transformers4.46.0 AutoGPTQ0.7.1`."""
    return {_ENV_NAMES[m[1].lower()]: m[2] for m in _ENV.finditer(text) if m[1].lower() in _ENV_NAMES}
