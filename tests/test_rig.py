"""GPUs and rigs as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenq.errors import PlanError
from qwenq.planning.rig import Gpu, Rig, catalogue, find_gpu, parse_rig
from qwenq.units import GIB


def test_every_row_has_a_source_and_sane_figures() -> None:
    assert len(catalogue()) >= 35
    for gpu in catalogue():
        assert gpu.source and gpu.vendor in ("nvidia", "amd", "intel", "apple")
        assert gpu.usable_gib is None or 0.9 * gpu.memory_gib <= gpu.usable_gib <= gpu.memory_gib
        assert (gpu.price_usd is None) == (gpu.price_basis == "")


def test_known_figures_and_unknown_ones() -> None:
    gpu = find_gpu("RTX 3090")
    assert (gpu.memory_gib, gpu.usable_gib, gpu.bandwidth_gb_s, gpu.tensor_tflops) == (24, 23.58, 936.2, 71)
    assert (gpu.nvlink_gb_s, gpu.price_usd, gpu.price_basis, gpu.limit_source) == (
        112.5,
        1499,
        "launch price",
        "published",
    )
    p40 = find_gpu("P40")
    assert p40.tensor_tflops is None and p40.price_usd is None and p40.nvlink_gb_s is None and p40.usable_gib is None
    assert p40.limit_bytes == round(24 * 0.98 * GIB) and p40.limit_source.startswith("assumed")
    assert find_gpu("A6000").price_basis == "approximate price"


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("2x RTX 3090", "2x RTX 3090"),
        ("RTX 4090 + 2x RTX 3060 12GB", "RTX 4090 + 2x RTX 3060 12GB"),
        ("3090, 3090", "2x RTX 3090"),
        ("rtx3090*2", "2x RTX 3090"),
        ("RTX 3090 x2", "2x RTX 3090"),
        ("4 × GeForce RTX 4060Ti 16 GB", "4x RTX 4060 Ti 16GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM4 80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM5 80GB"),
        ("H100 PCIe", "H100 PCIe 80GB"),
        ("h200", "H200 SXM 141GB"),
        ("7900xtx", "RX 7900 XTX"),
        ("3090 + 4090 + 3090", "RTX 3090 + RTX 4090 + RTX 3090"),
    ],
)
def test_spellings(text: str, label: str) -> None:
    assert parse_rig(text).label == label


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("RTX 3099", "unknown GPU 'RTX 3099'", "near: RTX 3090"),
        ("RTX 4000", "unknown GPU 'RTX 4000'", "near: RTX A4000"),
        ("Voodoo2", "unknown GPU 'Voodoo2'", "qwenq vram gpus"),
        ("A100", "GPU 'A100' could be several", "A100 PCIe 40GB, A100 SXM4 80GB, A100 PCIe 80GB"),
        ("", "not a rig: ''", "2x RTX 3090"),
        ("RTX 4090 +", "not a rig", "2x RTX 3090"),
        ("0x RTX 3090", "0 GPUs of a kind", ""),
        ("65x RTX 3090", "65 GPUs of a kind", ""),
        ("40x 3090 + 40x 4090", "80 GPUs in", ""),
        ("2x RTX 3090 x2", "not a rig", ""),
    ],
)
def test_bad_rigs(text: str, message: str, hint: str) -> None:
    with pytest.raises(PlanError, match=message) as caught:
        parse_rig(text)
    assert hint in caught.value.hint and "\n" not in caught.value.message


def test_limits_measured_and_reserved() -> None:
    rig = parse_rig("2x RTX 3090")
    assert rig.limits == (round(23.58 * GIB),) * 2
    assert Rig(rig.gpus, (10 * GIB, 20 * GIB), GIB).limits == (9 * GIB, 19 * GIB)
    assert Rig(rig.gpus[:1], (GIB // 2,), GIB).limits == (0,)


@given(st.sampled_from(catalogue()), st.integers(1, 8))
def test_own_names_are_understood(gpu: Gpu, count: int) -> None:
    assert parse_rig(f"{count}x {gpu.name}").gpus == (gpu,) * count


@given(st.text(max_size=40))
def test_any_text_is_a_rig_or_one_line(text: str) -> None:
    try:
        assert parse_rig(text).gpus
    except PlanError as error:
        assert error.message
