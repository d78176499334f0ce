#!/usr/bin/env python3
"""Load a checkpoint in vLLM, on a CPU, and compare its logits with ours.

    check_vllm.py CHECKPOINT --logits REF.npz [--dtype float16] [--plain-kernel]

Runs inside the environment of requirements-vllm.txt. REF.npz holds `input_ids` [B, T] int64 and `logits` [B, T, V]
float32, the logits of this project's own dequantization run in float32. vLLM's offline engine computes them in this
process, all V of them at all T positions: the first T - 1 come as scores of the prompt, the last as those of the token
sampled after it, so both of its ways out are seen. An unquantized checkpoint serves as the control.

vLLM's CPU kernel for packed weights knows 4 bits only. With `--plain-kernel`, layers it refuses are computed by a few
lines of torch in this file: configuration, loading and merging of q, k, v and gate, up are still vLLM's, the product
is not, and `kernels` in the output says which layers that concerns.

Prints one JSON object; exit code 1 when the logits differ by more than the tolerance, or vLLM refuses the checkpoint.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import numpy as np

# All read when vllm is imported.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine in this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by default it takes half of the memory
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # stay off particular cores: others use them too
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from compare_logits import check, command_line, compare, fail, read_reference, versions

DTYPES = ("float16", "bfloat16", "float32")  # the last for unquantized models only


def parse_args() -> argparse.Namespace:
    parser = command_line(__doc__.splitlines()[0])
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="dtype vLLM computes in")
    parser.add_argument("--plain-kernel", action="store_true", help="plain torch for layers vLLM has no kernel for")
    return parser.parse_args()


def register_plain_kernel() -> None:
    """Put a kernel of plain torch behind vLLM's own ones, which stay first choice where they can."""
    import torch
    from vllm.model_executor.kernels.linear import MPLinearKernel, register_linear_kernel
    from vllm.model_executor.layers.quantization import auto_gptq
    from vllm.platforms import PlatformEnum

    # On a CPU this refuses 8-bit GPTQ before any kernel is asked.
    auto_gptq.verify_marlin_supported = lambda **_: None

    def unpack(words: Any, bits: int, dim: int) -> Any:
        """int32 words to integers along `dim`, the lowest bits first."""
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        values = (words.movedim(dim, -1).unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
        return values.flatten(-2).movedim(-1, dim)

    class PlainKernel(MPLinearKernel):
        """x @ w.T with w dequantized once, in the dtype of the scales."""

        @classmethod
        def get_min_capability(cls) -> int:
            return -1

        @classmethod
        def can_implement(cls, c: Any) -> tuple[bool, str | None]:
            return c.weight_type.size_bits in (4, 8), "4 and 8 bits only"

        def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
            packed, scale, zero = self._get_weight_params(layer)
            bits = self.config.weight_type.size_bits
            codes_OI = unpack(packed.data, bits, packed.packed_dim)
            if packed.output_dim == 1:
                codes_OI = codes_OI.t()
            scale_OG = scale.data if scale.output_dim == 0 else scale.data.t()
            if self.config.zero_points:
                zero_OG = unpack(zero.data, bits, zero.packed_dim)
                zero_OG = zero_OG if zero.output_dim == 0 else zero_OG.t()
            else:
                zero_OG = torch.full_like(scale_OG, self.config.weight_type.bias)
            size = codes_OI.shape[1] // scale_OG.shape[1]
            grown = [t.float().repeat_interleave(size, dim=1) for t in (scale_OG, zero_OG)]
            layer.plain_weight = ((codes_OI.float() - grown[1]) * grown[0]).to(scale.dtype)

        def apply_weights(self, layer: torch.nn.Module, x: torch.Tensor, bias: Any = None) -> torch.Tensor:
            return torch.nn.functional.linear(x, layer.plain_weight, bias)

    register_linear_kernel(PlainKernel, PlatformEnum.CPU, "mp")


def linear_kernels(model: Any) -> dict[str, int]:
    """Class name -> count of what computes the decoder's linears: a kernel, or vLLM's method where it has none."""
    from vllm.model_executor.layers.linear import LinearBase

    counts: dict[str, int] = {}
    for module in model.modules():
        if isinstance(module, LinearBase):
            method = getattr(module, "scheme", None) or module.quant_method
            name = type(getattr(method, "kernel", method)).__name__
            counts[name] = counts.get(name, 0) + 1
    return counts


def row_of_scores(flat: Any, position: int, vocabulary: int) -> np.ndarray:
    """One position of vLLM's FlatLogprobs as [V] float32, ordered by token id; NaN where it gave nothing."""
    span = slice(flat.start_indices[position], flat.end_indices[position])
    row = np.full(vocabulary, np.nan, dtype=np.float32)
    row[flat.token_ids[span]] = flat.logprobs[span]
    return row


def run(args: argparse.Namespace) -> dict[str, Any]:
    """vLLM's logits next to the reference's, as the JSON object."""
    input_ids, reference = read_reference(args.logits)
    vocabulary = reference.shape[-1]
    from vllm import LLM, SamplingParams

    if args.plain_kernel:
        register_plain_kernel()
    length = input_ids.shape[1]
    model = LLM(
        model=str(args.checkpoint),
        dtype=args.dtype,
        enforce_eager=True,
        max_model_len=length + 1,
        max_num_seqs=1,
        max_logprobs=-1,
        logprobs_mode="raw_logits",
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )
    kernels = model.apply_model(linear_kernels)[0]
    stored = json.loads((args.checkpoint / "config.json").read_text()).get("quantization_config")
    if stored and set(kernels) <= {"UnquantizedLinearMethod"}:
        fail(f"{args.checkpoint}: vLLM made no quantized linear; it read the checkpoint as an ordinary one")
    wanted = SamplingParams(
        max_tokens=1, temperature=0, prompt_logprobs=-1, logprobs=-1, flat_logprobs=True, detokenize=False
    )
    rows = []
    for ids in input_ids:
        done = model.generate({"prompt_token_ids": ids.tolist()}, wanted, use_tqdm=False)[0]
        scores = [row_of_scores(done.prompt_logprobs, at, vocabulary) for at in range(1, length)]  # 0 has no scores
        rows.append(np.stack([*scores, row_of_scores(done.outputs[0].logprobs, 0, vocabulary)]))
    return {
        "checkpoint": args.checkpoint.name,
        "loader": "vllm",
        "dtype": args.dtype,
        "kernels": kernels,
        **compare(rows, reference, args.dtype),
        "versions": versions("vllm-cpu", "torch", "transformers", "compressed-tensors"),
    }


if __name__ == "__main__":
    check(parse_args(), run)
