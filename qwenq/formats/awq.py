"""AWQ's "gemm" layout as AutoAWQ wrote it, which vLLM (Marlin) and GPTQModel read.

`qweight` [in, out / 8] and `qzeros` [groups, out / 8] pack eight outputs an int32, interleaved: nibble n, the lowest
first, of entry w holds output 8 w + ORDER[n]. Zero points are stored as they are; `scales` is [groups, out]. Source:
AutoAWQ's packing for its gemm kernels. The layout always carries zero points, and holds 4 bits and one scheme only;
whole linears may stay in 16 bit.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qwenq.errors import CheckpointError, PlanError, UnreadScheme
from qwenq.escaping import shown
from qwenq.formats.base import (
    CPU_LOGITS,
    ByTransformers,
    Format,
    Loader,
    Quantization,
    Recipe,
    Scheme,
    Solved,
    StoredDtype,
    Variant,
    integer_engines,
    register,
)
from qwenq.formats.config import MAKING, PACKED_BITS, check_count, read_names, read_pattern, read_scheme, refuse_unknown
from qwenq.io.safetensors import TensorSpec
from qwenq.model.spec import LinearSpec, ModelSpec

if TYPE_CHECKING:
    from torch import Tensor

    from qwenq.solver.grid import QTensor

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACE = tuple(ORDER.index(k) for k in range(8))  # of output k in its int32
_MIDDLE = 0x88888888 - (1 << 32)  # an int32 of eight zero points of 8


_FUSING = frozenset({"do_fuse", "fuse_max_seq_len", "lm_head", "modules_to_fuse", "sym"})  # of these nothing is read
_READ = frozenset({
    "backend", "bits", "checkpoint_format", "format", "group_size", "method", "modules_to_not_convert",
    "pack_dtype", "q_group_size", "quant_method", "version", "w_bit", "zero_point",
})  # fmt: skip


class Awq(Format):
    """4 bits with zero points."""

    name = method = "awq"
    tags = ("awq",)
    asymmetric = True
    published = (("AWQ", Scheme(4, 128, sym=False)), ("AWQ-INT4", Scheme(4, 128, sym=False)))

    def check_scheme(self, scheme: Scheme) -> None:
        if scheme.codes != "int" or scheme.bits != 4 or scheme.sym:
            raise PlanError(
                f"format awq cannot hold {scheme.label}",
                hint="AWQ is 4-bit with zero points; gptq and compressed-tensors hold this",
            )

    def held_as(self, scheme: Scheme) -> Scheme:
        """There is no symmetric grid of its own: a symmetric one becomes one whose zero points are all 8."""
        return replace(scheme, sym=False)

    def centred(self, read: Callable[[str], Tensor], lin: LinearSpec) -> bool:
        return bool((read(f"{lin.name}.qzeros") == _MIDDLE).all())

    def tensors(self, scheme: Scheme, lin: LinearSpec, dtype_of: StoredDtype) -> Iterator[TensorSpec]:
        groups, per_word = scheme.groups(lin.in_features), 32 // scheme.bits
        yield TensorSpec(lin.name + ".qweight", "I32", (lin.in_features, lin.out_features // per_word))
        yield TensorSpec(lin.name + ".qzeros", "I32", (groups, lin.out_features // per_word))
        yield TensorSpec(lin.name + ".scales", "F16", (groups, lin.out_features))

    def config(self, recipe: Recipe, spec: ModelSpec, solved: Solved | None = None) -> dict[str, Any]:
        assert recipe.default is not None
        return {
            "quant_method": "awq",
            "version": "gemm",
            "bits": recipe.default.bits,
            "group_size": recipe.default.group_size,
            "zero_point": True,
            "modules_to_not_convert": recipe.left_out(spec),
        }

    def read_config(self, config: Mapping[str, Any], where: str) -> Quantization:
        refuse_unknown(config, _READ | MAKING | _FUSING, where)
        version = str(config.get("version") or config.get("format") or "gemm").lower()
        if version != "gemm":
            raise UnreadScheme(f"{where}: AWQ version is {shown(repr(version), 40)}, wanted 'gemm'")
        for key, wanted in (("backend", "autoawq"), ("pack_dtype", "int32"), ("checkpoint_format", "gemm")):
            if config.get(key) not in (None, "auto", wanted):
                raise UnreadScheme(f"{where}: AWQ {key} is {shown(repr(config[key]), 40)}, wanted {wanted!r}")
        bits = config.get("bits", config.get("w_bit"))
        group_size = config.get("group_size", config.get("q_group_size"))
        if bits != 4:
            raise (UnreadScheme if bits in PACKED_BITS else CheckpointError)(f"{where}: AWQ bits is {bits!r}, wanted 4")
        if config.get("zero_point", True) is not True:
            raise (UnreadScheme if config["zero_point"] is False else CheckpointError)(
                f"{where}: AWQ zero_point is {config.get('zero_point')!r}, wanted true"
            )
        here = f"{where}: modules_to_not_convert"
        kept = read_names(config.get("modules_to_not_convert"), here)
        check_count(kept, here)
        rules = tuple((read_pattern(".*" + re.escape(name), here), None) for name in kept)
        return Quantization("awq", read_scheme(bits, group_size, False, where), rules)

    def pack(self, q: QTensor, version: str = "") -> dict[str, Tensor]:
        return {
            "qweight": _pack(q.codes_OI.T),
            "qzeros": _pack(q.zeros_OG.T),
            "scales": q.scales_OG.T.contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor], scheme: Scheme, lin: LinearSpec, version: str = "") -> QTensor:
        from qwenq.solver.grid import QTensor

        packed, zeros, scales_GO = tensors["qweight"], tensors["qzeros"], tensors["scales"]
        columns, rows, groups = packed.shape[0], packed.shape[1] * 8, scheme.groups(packed.shape[0])
        if zeros.shape != (groups, rows // 8) or scales_GO.shape != (groups, rows) or columns % groups:
            shapes = ", ".join(f"{part} {list(tensors[part].shape)}" for part in ("qweight", "qzeros", "scales"))
            raise CheckpointError(f"{lin.name}: shapes do not fit together in groups of {scheme.group_size}: {shapes}")
        parameters = scales_GO.T.contiguous(), _unpack(zeros).T.contiguous()
        return QTensor(_unpack(packed).T.contiguous(), parameters, scheme.grid())

    def loaders(self, variant: Variant) -> list[Loader]:
        four = "4 bits only" if variant.bits != 4 else ""
        names = ("GPTQModel", "transformers (optimum, GPTQModel)")
        readers = [Loader(name, reason=four) if four else Loader(name, tried=CPU_LOGITS) for name in names]
        return integer_engines(variant, readers, tried=CPU_LOGITS, reason=four)

    def by_transformers(self, recipe: Recipe, schemes: set[Scheme]) -> ByTransformers:
        return ByTransformers("gptqmodel")


def _pack(codes_NO: Tensor) -> Tensor:
    """int32 [N, O / 8] from uint8 codes [N, O]."""
    from qwenq.formats.packing import pack_int32

    rows, columns = codes_NO.shape
    ordered = codes_NO.reshape(rows, columns // 8, 8)[:, :, list(ORDER)].reshape(rows, columns)
    return pack_int32(ordered.T, 4).T.contiguous()


def _unpack(packed_NW: Tensor) -> Tensor:
    """uint8 codes [N, O] from int32 [N, O / 8]."""
    import torch

    from qwenq.formats.packing import unpack_int32

    rows, entries = packed_NW.shape
    stored = unpack_int32(packed_NW.T.contiguous(), 4).T.reshape(rows, entries, 8)
    return torch.index_select(stored, 2, torch.tensor(_PLACE, device=stored.device)).reshape(rows, entries * 8)


AWQ = register(Awq())
