"""Inference engines, one file each; importing the package registers them."""

# In the order they are offered.
from qwenq.planning.engines import torch, vllm, llamacpp, sglang  # noqa: I001, F401
