"""GPUs and rigs as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwenq.errors import PlanError
from qwenq.planning.rig import _UNLISTED, Gpu, Rig, catalogue, find_gpu, parse_rig, reserved
from qwenq.units import GIB


def test_every_row_has_a_source_and_sane_figures() -> None:
    assert len(catalogue()) >= 35
    for gpu in catalogue():
        assert gpu.source and gpu.vendor in ("nvidia", "amd", "intel", "apple")
        least = 2 / 3 - 1e-5 if gpu.vendor == "apple" else 0.9
        assert gpu.usable_gib is None or least * gpu.memory_gib <= gpu.usable_gib <= gpu.memory_gib
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
        ("RTX 3060 12 GB", "RTX 3060 12GB"),  # not the 3060 Ti
        ("2x RTX 4090 24GB", "2x RTX 4090"),
        ("RX 7900 XTX 24GB", "RX 7900 XTX"),
        ("7900xt", "RX 7900 XT"),
        ("Tesla T4 16GB", "Tesla T4"),
        ("RTX 5060 Ti 16GB", "RTX 5060 Ti 16GB"),
        ("A100 SXM 80GB", "A100 SXM4 80GB"),
        ("RTX 6000 48GB", "RTX 6000 Ada"),
        ("3090 ti", "RTX 3090 Ti"),
        ("Tesla V100-SXM2-16GB", "V100 SXM2 16GB"),
        ("Quadro RTX 6000", "Quadro RTX 6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell"),
        ("2x 24GB", "2x 24GB"),
        ("2 RTX 3090 + 1 Tesla P40", "2x RTX 3090 + Tesla P40"),
        ("24 GB", "24 GB"),
        ("RTX 3090 + 16 GiB", "RTX 3090 + 16 GiB"),
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
        ("9999999x RTX 3090", "9999999 GPUs of a kind in .*, wanted 1 to 64", ""),
        ("RTX 3090 x" + "9" * 5000, "GPUs of a kind in .*, wanted 1 to 64", ""),
        ("RTX 6000", "GPU 'RTX 6000' is ambiguous", "RTX 6000 Ada, RTX PRO 6000 Blackwell, Quadro RTX 6000"),
        ("RTX 4060 Ti", "is ambiguous", "RTX 4060 Ti 16GB, RTX 4060 Ti 8GB"),
        ("2000GB", "a GPU of '2000GB'", ""),
        ("A100", "GPU 'A100' is ambiguous", "A100 PCIe 40GB, A100 SXM4 80GB, A100 PCIe 80GB"),
        ("A100 80GB", "GPU 'A100 80GB' is ambiguous", "A100 SXM4 80GB, A100 PCIe 80GB"),
        ("RTX 3060", "GPU 'RTX 3060' is ambiguous", "RTX 3060 12GB, RTX 3060 8GB"),
        ("RTX 5060 Ti", "GPU 'RTX 5060 Ti' is ambiguous", "RTX 5060 Ti 8GB"),
        ("RTX 4090 48GB", "unknown GPU 'RTX 4090 48GB'", 'give its memory, for instance "48GB"'),
        ("2x 24", "GPU '24' has no unit", '"24GB"'),
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


@pytest.mark.parametrize("name", ["RTX 5060", "RTX 2080", "GTX 1080", "RX 7900", "RX 9070", "M2", "RTX 4090 D", "A10G"])
def test_a_card_is_never_taken_for_another_of_its_series(name: str) -> None:
    """The card that is named, where the catalogue has it; else unknown, whatever has a Ti, an XT or a letter more."""
    try:
        assert find_gpu(name).name.removeprefix("Apple ").removesuffix(" 8GB") == name
    except PlanError as error:
        assert f"unknown GPU '{name}'" in error.message or "is ambiguous" in error.message, error


def test_versions_that_the_catalogue_lacks_are_not_in_it() -> None:
    names = {gpu.name for gpu in catalogue()}
    assert set(_UNLISTED) <= names and not {other for others in _UNLISTED.values() for other in others} & names


@given(st.sampled_from(catalogue()))
def test_a_memory_size_chooses_among_versions(gpu: Gpu) -> None:
    """The name with its size means it, and with another size never means it."""
    plain = gpu.name.removesuffix(f" {gpu.memory_gib:g}GB")
    try:
        assert find_gpu(f"{plain} {gpu.memory_gib:g}GB") == gpu
    except PlanError as error:  # two forms of one size: A100
        assert gpu.name in error.hint
    with pytest.raises(PlanError):
        find_gpu(f"{plain} 7GB")


def test_a_gpu_by_its_memory_alone() -> None:
    gpu = find_gpu("24GB")
    assert (
        gpu.limit_bytes == round(24 * 0.98 * GIB) and gpu.note == "not in the catalogue: only its memory size is known"
    )
    assert gpu.bandwidth_gb_s is None and gpu.tensor_tflops is None and gpu.price_usd is None


# NVIDIA's own table, developer.nvidia.com/cuda-gpus
@pytest.mark.parametrize(
    ("capability", "names"),
    [
        ((6, 0), ["P100 16GB"]),
        ((6, 1), ["P40", "GTX 1080 Ti"]),
        ((7, 0), ["Tesla V100-SXM2-16GB", "V100 PCIe 32GB"]),
        ((7, 5), ["T4", "RTX 2080 Ti", "TITAN RTX", "Quadro RTX 6000", "Quadro RTX 8000"]),
        ((8, 0), ["A100 SXM4 80GB", "A30"]),
        ((8, 6), ["RTX 3090", "A10", "A40", "RTX A6000", "RTX 3060 12GB"]),
        ((8, 9), ["RTX 4090", "L4", "L40S", "RTX 6000 Ada"]),
        ((9, 0), ["H100 PCIe", "H200"]),
        ((12, 0), ["RTX 5090", "RTX PRO 6000 Blackwell"]),
    ],
)
def test_compute_capabilities(capability: tuple[int, int], names: list[str]) -> None:
    assert [find_gpu(name).compute_capability for name in names] == [capability] * len(names)


@pytest.mark.parametrize(
    ("name", "gib"),
    [  # torch's own totals; ECC takes a sixteenth of the first four
        ("A40", 44.45), ("A10", 22.07), ("A10G", 22.30), ("Tesla T4", 14.56), ("L4", 22.03), ("RTX 3060 12GB", 11.63),
        ("DGX Spark (GB10)", 121.6), ("V100 SXM2 32GB", 31.73),
    ],
)  # fmt: skip
def test_cards_have_less_than_their_boxes_say(name: str, gib: float) -> None:
    gpu = find_gpu(name)
    assert gpu.limit_bytes == round(gib * GIB) and gpu.limit_range == (gpu.limit_bytes,) * 2 and gpu.usable_note


def test_an_assumed_limit_is_a_range_and_says_so() -> None:
    gpu = find_gpu("RTX 4080")
    low, high = gpu.limit_range
    assert low < gpu.limit_bytes < high < 16 * GIB and gpu.limit_bytes == round(15.6 * GIB)
    assert low <= 15.48 * GIB and high >= 15.6 * GIB  # totals that torch has of cards of 16 GB
    assert "assumed" in gpu.limit_source and "15.36 to 15.80 GiB" in gpu.limit_source
    assert Rig((gpu,), free_bytes=(GIB,)).limit_slack == ((0, 0),)


@pytest.mark.parametrize(
    ("name", "megabytes", "recent"),
    [  # recommendedMaxWorkingSetSize in llama.cpp's logs, in bytes / 1e6; the second with a recent macOS
        ("Apple M4 16GB", 11453.25, 12713.12),
        ("Apple M2 24GB", 17179.87, 19069),
        ("Apple M4 32GB", 22906.50, None),
        ("Apple M3 Pro 36GB", 28991.03, None),
        ("Mac 64GB", 51539.61, None),
    ],
)
def test_a_mac_has_metals_share(name: str, megabytes: float, recent: float | None) -> None:
    gpu = find_gpu(name)
    assert gpu.limit_bytes / 1e6 == pytest.approx(megabytes, rel=1e-4) and gpu.unified
    assert recent is None or gpu.limit_range[1] / 1e6 == pytest.approx(recent, rel=3e-3)
    assert "Metal" in gpu.limit_source


def test_macs_of_today() -> None:
    macs = {gpu.name for gpu in catalogue() if gpu.vendor == "apple"}
    assert {"Apple M4 Pro 48GB", "Apple M4 Max 128GB", "Apple M3 Ultra 256GB", "Apple M5 32GB"} <= macs
    assert find_gpu("M2 Ultra").limit_bytes == 144 * GIB and find_gpu("128GB Mac").limit_bytes == 96 * GIB
    for name in ("Mac Studio 64GB", "MacBook Pro 64GB", "64GB mac mini", "MacBook Air 64 GB"):
        assert find_gpu(name).limit_bytes == 48 * GIB, name
    with pytest.raises(PlanError, match="a Mac of 4GB"):
        find_gpu("Mac 4GB")


def test_every_nvidia_gpu_has_a_compute_capability_and_no_other_has() -> None:
    assert all((gpu.compute_capability is not None) == (gpu.vendor == "nvidia") for gpu in catalogue())


def test_a_reserve_that_leaves_nothing() -> None:
    rig = parse_rig("RTX 3090 + RTX 3060 12GB")
    assert reserved(rig, GIB).limits == (round(22.58 * GIB), round(11.63 * GIB) - GIB)
    with pytest.raises(PlanError, match=r"--reserve 12\.00 GiB leaves nothing of GPU 1 RTX 3060 12GB") as caught:
        reserved(rig, 12 * GIB)
    assert caught.value.hint == "a smaller --reserve"


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
