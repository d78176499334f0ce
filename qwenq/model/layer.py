"""The network, one decoder layer at a time: transformers' own modules on the meta device, filled from shards.

A layer is used in two ways that give the same numbers: whole (`forward`), and stage by stage (`attend`,
`add_attention`, `mlp_input`, `gate`, `add_mlp`), so that each linear can be replaced before what follows it runs.
Shapes: h, x [B, T, hidden]; a [B, T, q_size]; m [B, T, intermediate].
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from qwenq.errors import CheckpointError
from qwenq.io.json import shown
from qwenq.model.attention import WINDOWS, register
from qwenq.model.spec import ModelSpec

# model_type -> (module of transformers, class prefix)
MODULES = {
    "qwen2": ("transformers.models.qwen2", "Qwen2"),
    "qwen3": ("transformers.models.qwen3", "Qwen3"),
    "llama": ("transformers.models.llama", "Llama"),
}
_SHAPES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def model_config(config: Mapping[str, Any], spec: ModelSpec) -> Any:
    """transformers' configuration object of a config.json, without its quantization, in the shapes of `spec`."""
    package, prefix = MODULES[spec.model_type]
    configuration = importlib.import_module(f"{package}.configuration_{spec.model_type}")
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype", "dtype")}
    plain |= {name: getattr(spec, name) for name in _SHAPES}
    with _refused_by_transformers():
        return getattr(configuration, prefix + "Config").from_dict(plain)


@contextmanager
def _refused_by_transformers() -> Iterator[None]:
    """A value of config.json that transformers does not expect is the checkpoint's fault, whatever is raised."""
    try:
        yield
    except Exception as error:
        reason = shown(" ".join(str(error).split()) or type(error).__name__, 200)
        raise CheckpointError(
            f"config.json: transformers makes no layer of it ({reason})", hint="compare it with the publisher's own"
        ) from error


class Network:
    """One decoder layer at a time of the model that `config` (a config.json) describes."""

    def __init__(
        self, config: Mapping[str, Any], spec: ModelSpec, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        package, prefix = MODULES[spec.model_type]
        modeling = importlib.import_module(f"{package}.modeling_{spec.model_type}")
        self.config = model_config(config, spec)
        register()
        self.config._attn_implementation = WINDOWS
        self.spec = spec
        self.dtype = dtype
        self.device = torch.device(device)
        with _refused_by_transformers(), torch.device("meta"):
            self._layer = getattr(modeling, prefix + "DecoderLayer")(self.config, 0)
            self._norm = getattr(modeling, prefix + "RMSNorm")(spec.hidden_size, eps=self.config.rms_norm_eps)
        with _refused_by_transformers():
            rotary = getattr(modeling, prefix + "RotaryEmbedding")(config=self.config)
        self._layer.eval().requires_grad_(False)
        self._norm.eval().requires_grad_(False)
        self._identity = nn.Identity()
        self._o_proj = self._layer.self_attn.o_proj
        self._rotary = rotary.to(self.device)
        self._positions: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def _position_embeddings(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        if tokens not in self._positions:
            probe = torch.empty(0, dtype=self.dtype, device=self.device)
            self._positions = {tokens: self._rotary(probe, torch.arange(tokens, device=self.device)[None])}
        return self._positions[tokens]

    # ------------------------------------------------------------------ parameters

    def fill(self, state: Mapping[str, torch.Tensor]) -> None:
        """Put one layer's parameters in place, converted to the compute dtype; the former layer's are let go."""
        converted = {name: t.to(device=self.device, dtype=self.dtype) for name, t in state.items()}
        self._layer.load_state_dict(converted, strict=True, assign=True)
        self._layer.requires_grad_(False)

    def release(self) -> None:
        """Let go of the layer's parameters."""
        self._layer.to("meta")

    def parameters(self) -> dict[str, torch.Tensor]:
        """The layer's parameters as they stand, by relative name."""
        return dict(self._layer.named_parameters())

    def weight(self, path: str) -> torch.Tensor:
        """The weight [out, in] of linear `path` (`mlp.down_proj`) as it stands, in the compute dtype."""
        weight: torch.Tensor = self._layer.get_submodule(path).weight
        return weight

    def set_parameter(self, path: str, value: torch.Tensor) -> None:
        """Replace a parameter of the layer by its relative name."""
        self._layer.get_parameter(path).data = value.to(device=self.device, dtype=self.dtype)

    # ------------------------------------------------------------------ the whole layer

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h -> h after this layer, causal attention within each window."""
        out: torch.Tensor = self._layer(
            h, attention_mask=None, position_embeddings=self._position_embeddings(h.shape[1])
        )
        return out

    @contextmanager
    def recorded(self, paths: Iterable[str]) -> Iterator[dict[str, tuple[torch.Tensor, torch.Tensor]]]:
        """Input and output of the linears `paths`, by path, of the forward pass made inside the block."""
        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def keep(path: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                found[path] = (inputs[0], output)

            return self._layer.get_submodule(path).register_forward_hook(hook)

        handles = [keep(path) for path in paths]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

    # ------------------------------------------------------------------ stage by stage

    def attention_input(self, h: torch.Tensor) -> torch.Tensor:
        """h -> input of q, k and v."""
        return self._layer.input_layernorm(h)

    def attend(self, x: torch.Tensor) -> torch.Tensor:
        """Input of q, k and v -> input of o_proj."""
        attention = self._layer.self_attn
        attention.o_proj = self._identity
        try:
            a: torch.Tensor = attention(
                hidden_states=x,
                attention_mask=None,
                position_embeddings=self._position_embeddings(x.shape[1]),
            )[0]
        finally:
            attention.o_proj = self._o_proj
        return a

    def add_attention(self, h: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """h and the input of o_proj -> h after attention."""
        return h + self._o_proj(a)

    def mlp_input(self, h: torch.Tensor) -> torch.Tensor:
        """h after attention -> input of gate and up."""
        return self._layer.post_attention_layernorm(h)

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        """Input of gate and up -> input of down."""
        mlp = self._layer.mlp
        return mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)

    def add_mlp(self, h: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        """h after attention and the input of down -> h after this layer."""
        return h + self._layer.mlp.down_proj(m)

    # ------------------------------------------------------------------ after the last layer

    def final_norm(self, h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The model's last normalisation with `weight` [hidden], in the dtype of h."""
        self._norm.load_state_dict({"weight": weight.to(device=self.device, dtype=h.dtype)}, strict=True, assign=True)
        self._norm.requires_grad_(False)
        return self._norm(h)
