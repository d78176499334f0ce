"""On-disk formats of quantized checkpoints, one file each; importing any of them registers all, in this order."""

from qwenq.formats import gptq, awq, compressed_tensors, gguf, bitsandbytes, fp8  # noqa: F401, I001
