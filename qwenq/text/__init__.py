"""Text to windows of token ids: tokenizers and calibration sets."""
