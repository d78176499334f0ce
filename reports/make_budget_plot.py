#!/usr/bin/env python3
"""Draw reports/budget.svg: predicted KL of the best recipe of each size, and what was measured of two of them.

    python reports/make_budget_plot.py

Reads reports/demo-sensitivity.json, the demo model's table. Measured points are those of reports/budget.md.
"""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

from qwenq.formats.base import Scheme
from qwenq.model.spec import spec_from_config
from qwenq.planning.budget import choose_for_bits, describe_choice
from qwenq.planning.sensitivity import fused_groups, read_sensitivity
from qwenq.report.drawing import Drawing, Scale, draw_axes

HERE = Path(__file__).parent
MEASURED = {"uniform 4-bit g64": (4.3125, 0.1117), "best recipe, 5.5 bits": (5.4997, 0.0522)}
DEMO = {
    "model_type": "qwen2", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "max_position_embeddings": 8192,
}  # fmt: skip
STYLE = (
    "<style>text{font:13px sans-serif;fill:#222}.grid{stroke:#ddd}.axis{stroke:#666}.line{stroke:#1f5fa8;fill:none;"
    "stroke-width:2}.seen{fill:#b3431e}.hollow{fill:none;stroke:#1f5fa8;stroke-width:1.5}</style>"
)


def main() -> None:
    """Write the drawing."""
    spec = spec_from_config(DEMO, name="demo")
    table = read_sensitivity(HERE / "demo-sensitivity.json")

    def stored(name: str) -> str:
        return "F16"

    curve = []
    for bits in (Fraction(n, 4) for n in range(18, 33)):
        found = choose_for_bits(spec, table, bits, stored)
        curve.append((found.bits_per_linear_weight, found.predicted_kl))
    uniform = describe_choice(spec, table, dict.fromkeys(fused_groups(spec), Scheme(4, 64)), stored)
    drawing = Drawing(
        760, 420, "budget", "KL against bits, demo model",
        "Predicted KL of the best recipe falls from 0.17 at 4.5 bits to 0.004 at 8; measured points lie below it.",
    )  # fmt: skip
    x, y = Scale(4.2, 8.1, 64, 740), Scale(0.003, 0.4, 370, 50, log=True)
    ticks = [(float(bits), str(bits)) for bits in (4.5, 5, 5.5, 6, 6.5, 7, 7.5, 8)]
    draw_axes(drawing, x, y, x_ticks=ticks, y_ticks=y.ticks(6), x_title="stored bits per linear weight",
              y_title="KL from the 16-bit model, nats a token (log scale)")  # fmt: skip
    drawing.curve([(x(bits), y(kl)) for bits, kl in curve], "line")
    drawing.text(x(6.6), y(0.045), "predicted, best recipe of each size")
    drawing.mark("square", x(uniform.bits_per_linear_weight), y(uniform.predicted_kl), "hollow")
    drawing.text(x(4.3125) + 12, y(uniform.predicted_kl) - 6, "predicted, uniform 4-bit g64")
    for label, (bits, kl) in MEASURED.items():
        drawing.mark("circle", x(bits), y(kl), "seen")
        drawing.text(x(bits) + 8, y(kl) + 20, f"measured: {label}")
    (HERE / "budget.svg").write_text(drawing.svg().replace("<title", STYLE + "<title", 1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
