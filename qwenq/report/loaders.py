"""Which engines read which format: facts from their sources, and what this project has really tried."""

from __future__ import annotations

from dataclasses import dataclass

UNTRIED = "untried"
_CPU = "CPU: logits equal"
_PLAIN = "CPU: logits equal, 8-bit products by plain torch"  # vLLM's CPU build has kernels for 4 bits only
_TESTS = "CPU: in the tests"


@dataclass(frozen=True)
class Loader:
    """One engine and one checkpoint; `reason` says why it does not read it, empty when it does."""

    name: str
    tensor_parallel: bool
    tried: str
    reason: str = ""


def loaders_of(method: str, bits: int, group_size: int, mixed: bool) -> list[Loader]:
    """Engines for a checkpoint of quant_method `method`; `mixed`: several schemes in it."""
    vllm_group = group_size in (-1, 32, 64, 128)
    group_reason = "" if vllm_group else f"groups of {group_size}"

    def engine(name: str, *, parallel: bool = False, tried: str = UNTRIED, reason: str = "") -> Loader:
        return Loader(name, parallel, tried if not reason else UNTRIED, reason)

    def servers(tried: str, reason: str = group_reason) -> list[Loader]:
        return [
            engine("vLLM", parallel=True, tried=tried, reason=reason),
            engine("SGLang", parallel=True, reason=reason),
        ]

    qwenq, gguf = engine("qwenq", tried=_TESTS), engine("llama.cpp", reason="GGUF only")
    packed = _PLAIN if mixed or bits == 8 else _CPU
    if method == "gptq":
        uniform = "mixed bits" if mixed else ""
        return [
            qwenq,
            engine("GPTQModel", tried=_CPU),
            engine("transformers (optimum, GPTQModel)", tried=UNTRIED if group_size == -1 else _CPU, reason=uniform),
            engine("AutoGPTQ 0.7.1", tried=_CPU, reason=uniform),
            *servers(packed),
            engine("ExLlamaV2", reason=uniform or ("" if bits == 4 else "4 bits only")),
            gguf,
        ]
    if method == "gptq_v2":  # zero points stored as they are: asymmetric
        return [
            qwenq,
            engine("GPTQModel", tried=_CPU),
            engine("transformers (optimum, GPTQModel)", reason="mixed bits" if mixed else ""),
            engine("AutoGPTQ 0.7.1", reason="gptq_v2"),
            *servers(UNTRIED, "asymmetric"),
            gguf,
        ]
    if method == "compressed-tensors":
        return [qwenq, engine("transformers (compressed-tensors)", tried=_CPU), *servers(packed), gguf]
    if method == "awq":
        four = "4 bits only" if bits != 4 else ""
        return [
            qwenq,
            engine("GPTQModel", tried=_CPU, reason=four),
            engine("transformers (optimum, GPTQModel)", tried=_CPU, reason=four),
            *servers(_CPU, four or group_reason),
            gguf,
        ]
    if method == "bitsandbytes":
        weights = engine("transformers (bitsandbytes)", tried="CPU: weights equal")
        return [qwenq, weights, engine("vLLM"), gguf]
    return [qwenq, engine("transformers", tried=_CPU), *servers(_CPU, "")]
