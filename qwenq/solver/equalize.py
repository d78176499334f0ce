"""Channel scales folded into a decoder layer before it is quantized: the same function, rounded to better effect.

Scaling an input channel of a linear by c and its source by 1 / c changes nothing until the weights are rounded; then
the channel's error is divided by c, and its weights take c times the room in their group's grid (AWQ, Lin et al. 2023,
equation 4). For plain rounding the sum over channels of E[x**2] / c**2 * sum(c**2 w**2) is least at
c = (E[x**2] / mean(w**2))**(1/4). GPTQ lets other columns answer for an error, so the size of a channel's input says
much less about what its error costs, and its best exponent is a quarter of that: measured on two models, held-out
error against MOMENT_EXPONENT is least near 1/16 and worse than without folding at 1/4.

Sources, in `Stage.folds_into`: the norm before q, k, v and before gate, up; up for down. v for o would be one too (one
scale for all query heads that share a v channel), but gained nothing. q, k and gate are none: rotary embedding and
activation follow them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qwenq.model.architectures import Stage
from qwenq.model.devices import on_device

MOMENT_EXPONENT = 1 / 16
POWER_EXPONENT = 1 / 4
LIMIT = 32.0  # of a channel's scale, either way


def channel_scales(power_I: Tensor, moment_I: Tensor) -> Tensor:
    """Scales [I], geometric mean 1, from mean squares of the weights (`power_I`) and of the inputs by channel.

    Dead channels and zero weights get what very small ones get, within LIMIT. Channels that are both, as padding is,
    get 1 and have no say in the others'.
    """
    live_I = (power_I > 0) | (moment_I > 0)
    if not bool(live_I.any()):
        return torch.ones_like(power_I, dtype=torch.float32)
    log_I = torch.zeros_like(power_I, dtype=torch.float32)
    for x_I, exponent in ((moment_I, MOMENT_EXPONENT), (power_I, -POWER_EXPONENT)):
        x_I = x_I.to(log_I)
        log_I += exponent * x_I.clamp(min=float(x_I[live_I].mean()) * 1e-8 + 1e-30).log()
    return torch.where(live_I, log_I - log_I[live_I].mean(), 0.0).exp().clamp(1 / LIMIT, LIMIT)


class FoldedLayer:
    """A decoder layer's 16-bit tensors by relative name, and the scales folded into them so far.

    Scales that go into a linear are folded before those of its own inputs: its rows decide the scales of its columns.
    Weights are scaled when they are asked for, in float32, to be rounded once, by the quantizer. `kept` holds what is
    not quantized as it will be stored; folding changes norms and biases there. What a norm loses by being stored in 16
    bit is made good in the weights behind it.
    """

    def __init__(
        self, state: Mapping[str, Tensor], kept: Mapping[str, Tensor], device: torch.device | str = "cpu"
    ) -> None:
        self.state = dict(state)
        self.kept = dict(kept)
        self.device = device
        self._columns: dict[str, Tensor] = {}
        self._rows: dict[str, Tensor] = {}

    def weight(self, path: str) -> Tensor:
        """The weight [out, in] of linear `path` (`mlp.down_proj`) with its scales, float32."""
        w_OI = self._tensor(f"{path}.weight")
        if path in self._columns:
            w_OI = w_OI * self._columns[path]
        if path in self._rows:
            w_OI = w_OI * self._rows[path][:, None]
        return w_OI

    def release(self, path: str) -> None:
        """Let go of a weight that is not needed any more."""
        del self.state[f"{path}.weight"]

    def fold(self, stage: Stage, moment_I: Tensor) -> Tensor:
        """Fold scales between a stage and what its channels come from (`folds_into`); returns them [I].

        `moment_I`: mean or sum of squares of the stage's inputs, unfolded. Inputs are divided by what is returned.
        """
        scales_I = self._scales(stage.paths, moment_I)
        fold = self._into_norm if stage.folds_into == stage.norm else self._into_rows
        scales_I = fold(stage, scales_I)
        self._columns |= dict.fromkeys(stage.paths, scales_I)
        return scales_I

    def _into_norm(self, stage: Stage, scales_I: Tensor) -> Tensor:
        """Divide the norm by the scales; the scales that its stored weight makes them, 1 where that is none."""
        name = f"{stage.norm}.weight"
        old_I = self._tensor(name)
        stored_I = self._as_stored(name, old_I / scales_I)
        usable_I = (stored_I != 0) & stored_I.isfinite()
        self.kept[name] = torch.where(usable_I, stored_I, self._as_stored(name, old_I))
        return torch.where(usable_I, old_I / stored_I.float(), 1.0)

    def _into_rows(self, stage: Stage, scales_I: Tensor) -> Tensor:
        """Divide the rows of a linear by the scales."""
        self._rows[stage.folds_into] = 1 / scales_I
        if (name := f"{stage.folds_into}.bias") in self.state:
            self.kept[name] = self._as_stored(name, self._tensor(name) / scales_I)
        return scales_I

    def _scales(self, paths: Sequence[str], moment_I: Tensor) -> Tensor:
        weights = [self.weight(path) for path in paths]
        power_I = torch.stack([w_OI.square().sum(0) for w_OI in weights]).sum(0)
        return channel_scales(power_I / sum(len(w_OI) for w_OI in weights), moment_I)

    def _tensor(self, name: str) -> Tensor:
        return on_device(self.state[name], self.device, torch.float32)

    def _as_stored(self, name: str, value: Tensor) -> Tensor:
        return value.to(self.kept[name].dtype)
