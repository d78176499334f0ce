"""Write the logits of a checkpoint's dequantized weights, for another loader to be compared with.

    reference_logits.py CHECKPOINT REF.npz [--windows 2] [--tokens 64] [--seed 0]

Dequantizes with this project's reader, loads the weights into transformers' own model class in float32 and runs random
token ids. REF.npz holds input_ids int64 [windows, tokens] and logits float32 [windows, tokens, vocabulary].
Runs in this project's environment.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from qwenq.checkpoint.reader import open_checkpoint
from qwenq.model.layer import model_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    checkpoint = open_checkpoint(args.checkpoint)
    spec = checkpoint.spec
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(model_config(checkpoint.config, spec))
    state = {f"model.layers.{k}.{n}": t for k in range(spec.num_hidden_layers)
             for n, t in checkpoint.layer_state(k).items()}  # fmt: skip
    state |= {t.name: checkpoint.read(t.name) for t in spec.outer_tensors()}
    model = model.to_empty(device="cpu").float()
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    if unexpected or [name for name in missing if name != "lm_head.weight" or not spec.tie_word_embeddings]:
        raise SystemExit(f"{args.checkpoint}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(config=model.config)  # its buffers are not in the checkpoint
    model.eval()
    ids = np.random.default_rng(args.seed).integers(0, spec.vocab_size, (args.windows, args.tokens))
    with torch.inference_mode():
        logits = model(torch.from_numpy(ids)).logits.float().numpy()
    np.savez(args.output, input_ids=ids, logits=logits)


if __name__ == "__main__":
    main()
