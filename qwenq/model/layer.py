"""The network, one decoder layer at a time: transformers' own modules on the meta device, filled from shards.

A layer is used in two ways that give the same numbers: whole (`forward`), and stage by stage (`normed`, `within`,
`add`), so that each linear can be replaced before what follows it runs. The stages are those of the architecture.
Shapes: h [B, T, hidden]; x [B, T, in], the input of a stage's linears.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from qwenq.errors import CheckpointError, out_of_memory
from qwenq.io.json import shown
from qwenq.model.architectures import Stage
from qwenq.model.attention import WINDOWS, register
from qwenq.model.devices import on_device
from qwenq.model.spec import ModelSpec

_SHAPES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def model_config(config: Mapping[str, Any], spec: ModelSpec) -> Any:
    """transformers' configuration object of a config.json, without its quantization, in the shapes of `spec`.

    A window that config.json alone makes slide is left out: those shorter than what the model reads are refused.
    """
    entry = spec.architecture
    configuration = importlib.import_module(entry.modules[0])
    plain = {k: v for k, v in config.items() if k not in ("quantization_config", "torch_dtype", "dtype")}
    plain |= {name: getattr(spec, name) for name in _SHAPES}
    if not entry.window.switch:
        plain[entry.window.key] = None
    with refused_by_transformers():
        made = getattr(configuration, entry.classes + "Config").from_dict(plain)
    _refuse_beyond_stages(made)
    return made


# Settings that change the network in ways no entry says, and the value that changes nothing beside null: they act on
# the embedding, the sum after a block, the head, scores within attention, or on some layers alone.
_BEYOND_STAGES = {"embedding_multiplier": 1, "residual_multiplier": 1, "logits_scaling": 1, "logit_scale": 1,
                  "final_logit_softcapping": None, "attn_logit_softcapping": None, "no_rope_layers": 1}  # fmt: skip


def _refuse_beyond_stages(settings: Any) -> None:
    """CheckpointError for such a setting, as config.json has it or by transformers' default.

    Only those that the family's own class knows: transformers reads no others.
    """
    for key, neutral in _BEYOND_STAGES.items():
        value = getattr(settings, key, None) if hasattr(type(settings), key) else None
        if any(part not in (None, neutral) for part in (value if isinstance(value, list) else [value])):
            raise CheckpointError(
                f"config.json: {key} is {shown(repr(value), 40)}, wanted {neutral or 'null'}: "
                f"the entry of {settings.model_type} cannot express it",
                hint="docs/adding-an-architecture.md lists what an entry cannot express",
            )


@cache
def scales_by_weight(norm: Any) -> bool:
    """Whether a class of norms multiplies by its weight alone, as folding takes it; Gemma's adds 1 to it."""
    probe = norm(1, eps=1.0).requires_grad_(False)
    probe.weight.zero_()
    return not bool(probe(torch.ones(1, 1)).any())


@contextmanager
def refused_by_transformers() -> Iterator[None]:
    """A value of config.json that transformers does not expect is the checkpoint's fault, whatever is raised."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        reason = shown(" ".join(str(error).split()) or type(error).__name__, 200)
        raise CheckpointError(
            f"config.json: transformers cannot build a layer from it ({reason})",
            hint="compare it with the publisher's own",
        ) from error


class _Reached(Exception):
    """The forward pass of a block has come to a linear; `x` is what enters it."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x = x


def _stop(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    raise _Reached(inputs[0])


class Network:
    """One decoder layer at a time of the model that `config` (a config.json) describes."""

    def __init__(
        self, config: Mapping[str, Any], spec: ModelSpec, *, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        entry = spec.architecture
        modeling = importlib.import_module(entry.modules[1])
        self.config = model_config(config, spec)
        register()
        self.config._attn_implementation = WINDOWS
        self.spec = spec
        self.dtype = dtype
        self.device = torch.device(device)
        with refused_by_transformers():
            norm = getattr(modeling, entry.classes + "RMSNorm")
            foldable = scales_by_weight(norm)
        if not foldable:
            raise CheckpointError(
                f"{norm.__name__} does not multiply by its weight alone: the entry of {entry.model_type} cannot "
                "express it",
                hint="docs/adding-an-architecture.md lists what an entry cannot express",
            )
        with refused_by_transformers(), torch.device("meta"):
            self._layer = getattr(modeling, entry.classes + "DecoderLayer")(self.config, 0)
            self._norm = norm(spec.hidden_size, eps=self.config.rms_norm_eps)
        with refused_by_transformers():
            rotary = getattr(modeling, entry.classes + "RotaryEmbedding")(config=self.config)
        self._layer.eval().requires_grad_(False)
        self._norm.eval().requires_grad_(False)
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
        converted = {name: on_device(t, self.device, self.dtype) for name, t in state.items()}
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
        self._layer.get_parameter(path).data = on_device(value, self.device, self.dtype)

    # ------------------------------------------------------------------ the whole layer

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """h -> h after this layer, causal attention within each window.

        States wider than the compute dtype stay so: what each block makes of them is added as they are.
        """
        if h.dtype != self.dtype:
            for stage in self.spec.architecture.stages:
                if stage.adds:
                    h = self.add(stage, h, self.within(stage, self.normed(stage, h)))
            return h
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

    def normed(self, stage: Stage, h: torch.Tensor) -> torch.Tensor:
        """h entering the block of `stage` -> input of the block in the compute dtype, x of its first stage."""
        x: torch.Tensor = self._layer.get_submodule(self.spec.architecture.first_of_block(stage).norm)(h)
        return x.to(self.dtype)

    def within(self, stage: Stage, x: torch.Tensor) -> torch.Tensor:
        """Input of the block of `stage` -> x of that stage: the block runs up to the stage's first linear."""
        if stage.norm:
            return x
        block, attention = self._layer.get_submodule(stage.block), self.spec.architecture.attention
        positions = {"attention_mask": None, "position_embeddings": self._position_embeddings(x.shape[1])}
        handle = self._layer.get_submodule(stage.paths[0]).register_forward_pre_hook(_stop)
        try:
            block(x, **(positions if stage.block == attention else {}))
        except _Reached as reached:
            return reached.x
        finally:
            handle.remove()
        raise CheckpointError(f"{stage.block} does not run {stage.paths[0]}: not the network of its architecture")

    def entering(self, stage: Stage, h: torch.Tensor) -> torch.Tensor:
        """h entering the layer -> x of `stage`."""
        for earlier in self.spec.architecture.stages:
            if earlier == stage:
                break
            if earlier.adds:
                h = self.add(earlier, h, self.within(earlier, self.normed(earlier, h)))
        x = self.normed(stage, h)
        del h  # while the block runs, its own tensors have the memory
        return self.within(stage, x)

    def add(self, stage: Stage, h: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """h entering the block, and x of its last stage -> h after the block."""
        out: torch.Tensor = h + self._layer.get_submodule(stage.paths[0])(x)
        return out

    # ------------------------------------------------------------------ after the last layer

    def final_norm(self, h: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The model's last normalisation with `weight` [hidden], in the dtype of h."""
        self._norm.load_state_dict({"weight": weight.to(device=self.device, dtype=h.dtype)}, strict=True, assign=True)
        self._norm.requires_grad_(False)
        return self._norm(h)
