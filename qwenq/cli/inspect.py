"""`qwenq inspect`: what a model is made of, and whether its files agree."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from qwenq import api
from qwenq.cli.console import out, warn
from qwenq.cli.options import FollowLinks, JsonFlag, warn_of_shipped
from qwenq.cli.plain import print_json
from qwenq.errors import HonestNo
from qwenq.units import format_gb


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="A directory, a GGUF file, a hub name, or a family name such as Qwen2.5-72B."
        ),
    ],
    expect_params: Annotated[
        str | None, typer.Option(metavar="COUNT", help="Total the model card states, e.g. 72.7B.")
    ] = None,
    follow_links: FollowLinks = False,
    json: JsonFlag = False,
) -> None:
    """Print shapes, parameters, bytes by part and KV bytes per token; check config, headers and stated totals.

    Reads only headers, not weights. For a family name, or the hub name of one, it uses the shapes shipped with qwenq
    and says so. Exits with 3 if something disagrees.
    """
    from qwenq.planning.questions import parse_parameters

    expected = parse_parameters(expect_params) if expect_params is not None else None
    found = api.inspect(model, expected)
    spec, result = found.spec, found.audit
    if found.shipped:
        warn_of_shipped(model)
    for line in found.notes:
        warn(line)
    yarn = spec.extended_context > spec.max_position_embeddings
    if json:
        print_json(result.to_json())
    else:
        shape = Table(title=f"{spec.name or model}: {spec.model_type}, {result.scheme}", caption=result.source)
        shape.add_column("shape")
        shape.add_column("", justify="right")
        for label, value in (
            ("layers", spec.num_hidden_layers),
            ("hidden size", spec.hidden_size),
            ("attention heads (query, key-value)", f"{spec.num_attention_heads}, {spec.num_key_value_heads}"),
            ("head size", spec.head_dim),
            ("FFN size", spec.intermediate_size),
            ("vocabulary", spec.vocab_size),
            ("head tied to the embedding", "yes" if spec.tie_word_embeddings else "no"),
            ("context in tokens", spec.max_position_embeddings),
            *([("context with YaRN", spec.extended_context)] if yarn else []),
            ("KV cache per token (16-bit)", f"{result.kv_bytes_per_token:,.0f} bytes"),
        ):
            shape.add_row(label, f"{value:,}" if isinstance(value, int) else str(value))
        alike: dict[str, list[str]] = {}
        for ranks, reason in result.tensor_parallel.items():
            alike.setdefault(reason, []).append(ranks)
        for reason, sizes in alike.items():
            shape.add_row(f"tensor parallel {', '.join(sizes)}", reason or "yes")
        out.print(shape)
        parts = Table(title="parameters and bytes")
        parts.add_column("part")
        parts.add_column("parameters", justify="right")
        parts.add_column("bytes", justify="right")
        for part in result.parts:
            parts.add_row(part.name, f"{part.parameters:,}", format_gb(part.stored_bytes))
        parts.add_row("total", f"{result.parameters:,}", format_gb(sum(p.stored_bytes for p in result.parts)))
        out.print(parts)
        if expected is not None and not any(line.startswith("parameters: ") for line in result.disagreements):
            out.print(f"parameters: {spec.parameters:,}, as expected ({expect_params})", soft_wrap=True)
        for line in result.disagreements[:20]:
            out.print(f"disagrees: {line}", soft_wrap=True)
    if result.disagreements:
        more = f", and {len(result.disagreements) - 1} more" if len(result.disagreements) > 1 else ""
        stated = result.disagreements[0].startswith("parameters: ")
        hint = "is it another model's card?" if stated else "take config and weights from the same repository"
        raise HonestNo(f"{model}: {result.disagreements[0]}{more}", hint=hint)
