"""Bytes on disk and from the hub: JSON, safetensors, durable writes, downloads."""
