"""qwenq: quantize Qwen2.5-72B-class models block by block, and say what it cost."""

__version__ = "0.1.0"
