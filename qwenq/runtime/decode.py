"""One token at a time on this project's kernels: on a CPU, or on one GPU and then replayed as a CUDA graph.

On a CPU transformers' modules take as long for a token of a 0.5B model as its matmuls; here all layers and the head are
one call, where the CPU kernels take every linear, and twelve calls a layer where they don't. On a GPU a token of
transformers' modules is some 2,000 launches, which take longer than the 72B's weights do to be read. Here it is about
14 a layer, and none of them by Python once the step has been captured: its shapes do not change, since how much of the
cache is filled is read on the GPU.

Shapes: h, x [1, hidden]; H heads of D values, N heads of keys and values.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qwenq.errors import out_of_memory
from qwenq.machine import has_triton
from qwenq.model.architectures import ARCHITECTURES
from qwenq.runtime import cpu_kernels
from qwenq.runtime.cache import FP8, KvCache
from qwenq.runtime.linear import dequantized_on_host, kernel_linear
from qwenq.runtime.model import RunningModel

WARM_STEPS = 2  # without a graph: they compile the kernels
LINEARS = tuple(lin.path for lin in ARCHITECTURES["qwen2"].linears)  # those that a step multiplies with
FIXED_ROPE = ("default", "linear", "yarn", "llama3")  # frequencies that do not change with the length


def why_not(model: RunningModel, kv_dtype: torch.dtype | None) -> str:
    """Why this model's tokens are computed by transformers' modules; empty when they need not be."""
    why = _why_not_here(model, kv_dtype)
    if why:
        return why
    names, activation = model.spec.architecture, getattr(model.network.config, "hidden_act", "silu")
    if tuple(lin.path for lin in names.linears) != LINEARS or activation != "silu":
        return f"the layers of {names.model_type} with {activation}"
    rope = getattr(model.network.model.rotary_emb, "rope_type", "default")
    return "" if rope in FIXED_ROPE else f"{rope} rotary embeddings"


def _why_not_here(model: RunningModel, kv_dtype: torch.dtype | None) -> str:
    """The reason, if any, why devices, dtypes or heads rule out the kernels for a model."""
    if set(model.device_map.values()) == {"cpu"} and model.device.type == "cpu":
        if model.dtype != torch.bfloat16 or kv_dtype not in (None, torch.bfloat16):
            return "the CPU kernels need activations and a cache in bfloat16"
        if model.spec.head_dim % 16 or model.spec.head_dim > cpu_kernels.MOST_WIDTH:
            return f"heads of {model.spec.head_dim} values"
        return cpu_kernels.refusal()
    if any(not isinstance(place, int) for place in model.device_map.values()):
        return "layers on disk" if model.device.type == "cpu" else "layers outside GPU memory"
    if len(model.devices) > 1:
        return f"layers on {len(model.devices)} GPUs"
    if not has_triton():
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(model.device)
    if capability < (8, 0) or model.dtype != torch.bfloat16:
        return "the kernels need bfloat16 activations and compute capability 8.0"
    if kv_dtype == FP8 and capability < (8, 9):
        return "an fp8 cache needs compute capability 8.9 there"
    if model.spec.head_dim & (model.spec.head_dim - 1) or model.spec.head_dim < 32:
        return f"heads of {model.spec.head_dim} values"
    return ""


def one_call(model: RunningModel, cache: KvCache) -> cpu_kernels.Network | None:
    """The step as the CPU kernels take it in one call; None where a linear is not theirs, and calls stay one a part."""
    inner, layers = model.network.model, list[cpu_kernels.Layer]()
    for index, layer in enumerate(inner.layers):
        found = [kernel_linear(layer.get_submodule(path)) for path in LINEARS]
        linears = [each for each in found if each is not None]
        if len(linears) < len(found):
            return None
        attention = layer.self_attn
        heads = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        norms = (layer.input_layernorm, layer.post_attention_layernorm, *heads)
        weights = [None if norm is None else norm.weight for norm in norms]
        layers.append(cpu_kernels.layer(linears, weights, cache.stored(index)))
    head, norm = kernel_linear(model.network.lm_head), inner.norm
    if head is None:
        return None
    keys, _ = cache.stored(0)
    return cpu_kernels.Network(layers, head, norm.weight, norm.variance_epsilon, attention.scaling, keys)


class DecodeStep:
    """A step on one model and one cache: a token's logits, and its keys and values put into the cache."""

    def __init__(self, model: RunningModel, cache: KvCache, kernels: Any = None) -> None:
        if kernels is None and model.device.type == "cuda":
            from qwenq.runtime import triton_kernels

            kernels = triton_kernels
        self.kernels: Any = kernels or cpu_kernels
        self.model, self.cache = model, cache
        self.graphed, self.reason = self.kernels is not cpu_kernels, ""  # why there is no graph though one could be
        if self.graphed and (kind := dequantized_on_host(model.network)):
            self.graphed, self.reason = False, f"{kind} is dequantized in host memory"
        self.steps = 0
        self.inputs = torch.zeros(2, dtype=torch.int64, device=model.device)  # the token, and its position
        self.network = one_call(model, cache) if self.kernels is cpu_kernels else None  # made once: tensors stay
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None

    @torch.inference_mode()
    def __call__(self, token: int) -> Tensor:
        """Logits behind the token, [vocabulary], in memory that the next step writes again."""
        self.inputs.copy_(torch.tensor([token, self.cache.get_seq_length()]))
        self.cache.make_room()  # a step that fails leaves it to the caller to crop the cache
        self.steps += 1
        if self._graph is None and self.graphed and self.steps > WARM_STEPS:
            self._capture()
        if self._graph is None:
            return self._step()
        self._graph.replay()
        assert self._logits is not None
        return self._logits

    def _capture(self) -> None:
        """Capture the step; steps stay without a graph, with `reason`, when memory for it is not there."""
        with torch.cuda.device(self.model.device):
            stream, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    logits = self._step()
            except RuntimeError as error:
                torch.cuda.set_stream(stream)  # where ending the capture failed, its own is still the current one
                if out_of_memory(error) is None:
                    raise
                del graph
                torch.cuda.empty_cache()
                self.graphed, self.reason = False, "no memory for a CUDA graph"
                return
        self._graph, self._logits = graph, logits

    def _step(self) -> Tensor:
        kernels, inner, spec = self.kernels, self.model.network.model, self.model.spec
        width = spec.head_dim
        length = int(self.inputs[1]) + 1 if kernels is cpu_kernels else (self.inputs[1:] + 1).int()
        h, added = inner.embed_tokens(self.inputs[:1]), None
        cos, sin = inner.rotary_emb(h[None], self.inputs[None, 1:])
        if self.network is not None:
            return self.network(h, cos, sin, self.cache.get_seq_length())
        for index, layer in enumerate(inner.layers):
            attention, mlp, norm = layer.self_attn, layer.mlp, layer.input_layernorm
            h, x = kernels.add_norm(h, added, norm.weight, norm.variance_epsilon)
            q, k, v = (each(x).view(-1, width) for each in (attention.q_proj, attention.k_proj, attention.v_proj))
            head = cpu_kernels.Head(cos, sin)
            if (q_norm := getattr(attention, "q_norm", None)) is not None:
                k_norm = attention.k_norm
                head = cpu_kernels.Head(cos, sin, q_norm.weight, k_norm.weight, q_norm.variance_epsilon)
            kept = self.cache.stored(index)
            q = kernels.turn_and_keep(q, k, v, head, kept, length)
            a = kernels.attend_one(q, kept, length, attention.scaling)
            norm = layer.post_attention_layernorm
            h, x = kernels.add_norm(h, attention.o_proj(a.view(1, -1)), norm.weight, norm.variance_epsilon)
            added = mlp.down_proj(kernels.gate(mlp.gate_proj(x), mlp.up_proj(x)))
        _, x = kernels.add_norm(h, added, inner.norm.weight, inner.norm.variance_epsilon)
        logits: Tensor = self.model.network.lm_head(x)[0]
        return logits
