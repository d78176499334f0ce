"""Tensor maths: grids, GPTQ, channel scales, metrics. Tensors in, tensors out."""
