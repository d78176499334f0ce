"""Random weights of a model's exact shapes, made on the devices themselves: memory and speed before any download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qwenq.formats.base import Recipe, get_format
from qwenq.model.spec import LinearSpec, ModelSpec
from qwenq.planning.kernels import Choice
from qwenq.runtime.linear import StoredLinear, packed_linear
from qwenq.solver.grid import QTensor


def synthetic_config(spec: ModelSpec) -> dict[str, Any]:
    """A config.json of the shapes; rotary parameters and the like are transformers' defaults."""
    return {
        "model_type": spec.model_type,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_hidden_layers,
        "num_attention_heads": spec.num_attention_heads,
        "num_key_value_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.extended_context,
        "tie_word_embeddings": spec.tie_word_embeddings,
        **{key: key in spec.bias_keys for key in spec.architecture.bias_keys},
    }


class SyntheticWeights:
    """Weights out of thin air: bfloat16 tensors, and random codes under scales that keep activations of size one."""

    def __init__(self, spec: ModelSpec, recipe: Recipe) -> None:
        self.recipe = recipe
        self.shapes = {t.name: t.shape for t in spec.tensors()}

    def tensor(self, name: str, device: torch.device) -> Tensor:
        """A random tensor by its name; norms are ones."""
        shape = self.shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.bfloat16, device=device)
        spread = shape[-1] ** -0.5 if len(shape) > 1 else 0.02
        return torch.randn(shape, dtype=torch.bfloat16, device=device).mul_(spread)

    def table(self, name: str, device: torch.device) -> Tensor:
        """Embedding or head."""
        return self.tensor(name, device)

    def linear(self, lin: LinearSpec, dtype: torch.dtype, device: torch.device) -> tuple[nn.Module, Choice | None]:
        """One linear, packed at once."""
        bias = self.tensor(lin.name + ".bias", device) if lin.bias else None
        scheme = self.recipe.scheme_of(lin)
        if scheme is None:
            weight = self.tensor(lin.name + ".weight", device)
            return StoredLinear(weight if dtype == torch.float32 else weight.to(dtype), bias, dtype), None
        groups = lin.out_features, scheme.groups(lin.in_features)
        spread = lin.in_features**-0.5 / (scheme.levels / 3.5)  # a uniform code's spread is levels / sqrt(12)
        codes = torch.randint(0, scheme.levels, (lin.out_features, lin.in_features), dtype=torch.uint8, device=device)
        scales = torch.full(groups, spread, dtype=torch.float16, device=device)
        zeros = torch.full(groups, scheme.zero, dtype=torch.uint8, device=device)
        shape = get_format(self.recipe.format).packed_shape(scheme, lin)
        assert shape is not None  # codes are integers
        return packed_linear(QTensor(codes, (scales, zeros), scheme.grid()), shape, bias, dtype, device)
