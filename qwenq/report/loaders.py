"""Which engines read which format: facts from their sources, and what this project has really tried."""

from __future__ import annotations

from dataclasses import dataclass

_UNTRIED = "untried"
_CPU = "CPU: logits equal"


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

    def engine(name: str, *, parallel: bool = False, tried: str = _UNTRIED, reason: str = "") -> Loader:
        return Loader(name, parallel, tried if not reason else _UNTRIED, reason)

    vllm = [engine(name, parallel=True, reason=group_reason) for name in ("vLLM", "SGLang")]
    if method == "gptq":
        uniform = "mixed bits"
        return [
            engine("qwenq", tried="CPU: in the tests"),
            engine("GPTQModel", tried=_CPU),
            engine("transformers (optimum, GPTQModel)", tried=_CPU, reason=uniform if mixed else ""),
            engine("AutoGPTQ 0.7.1", tried=_CPU, reason=uniform if mixed else ""),
            *vllm,
            engine("ExLlamaV2", reason="mixed bits" if mixed else "" if bits == 4 else "4 bits only"),
            engine("llama.cpp", reason="GGUF only"),
        ]
    if method == "gptq_v2":  # zero points stored as they are: asymmetric
        return [
            engine("qwenq", tried="CPU: in the tests"),
            engine("GPTQModel", tried=_CPU),
            engine("transformers (optimum, GPTQModel)", reason="mixed bits" if mixed else ""),
            engine("AutoGPTQ 0.7.1", reason="gptq_v2"),
            *(engine(name, parallel=True, reason="asymmetric") for name in ("vLLM", "SGLang")),
            engine("llama.cpp", reason="GGUF only"),
        ]
    if method == "compressed-tensors":
        return [
            engine("qwenq", tried="CPU: in the tests"),
            engine("transformers (compressed-tensors)", tried=_CPU),
            *vllm,
            engine("llama.cpp", reason="GGUF only"),
        ]
    if method == "awq":
        four = "4 bits only" if bits != 4 else ""
        return [
            engine("qwenq", tried="CPU: in the tests"),
            engine("GPTQModel", tried=_CPU, reason=four),
            engine("transformers (optimum, GPTQModel)", tried=_CPU, reason=four),
            *(engine(name, parallel=True, reason=four or group_reason) for name in ("vLLM", "SGLang")),
            engine("llama.cpp", reason="GGUF only"),
        ]
    if method == "bitsandbytes":
        own = engine("qwenq", tried="CPU: in the tests")
        return [
            own,
            engine("transformers (bitsandbytes)", tried="CPU: weights equal"),
            engine("vLLM"),
            engine("llama.cpp", reason="GGUF only"),
        ]
    return [engine("transformers"), *(engine(name, parallel=True) for name in ("vLLM", "SGLang"))]
