"""On-disk formats of quantized checkpoints: what config.json says and how tensors are laid out."""
