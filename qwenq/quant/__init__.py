"""Tensor maths of quantization: tensors in, tensors out; no files, no printing."""
