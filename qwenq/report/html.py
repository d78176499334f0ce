"""A document as one HTML file that needs nothing else: style inside, no script, and a policy that forbids both."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources

from qwenq.escaping import html
from qwenq.report.document import (
    Block,
    Code,
    Details,
    Document,
    Figure,
    Items,
    Paragraph,
    Part,
    Section,
    Small,
    Table,
    Text,
    parts,
)

WIDE, NARROW = 736, 358  # pixels of the text column, and of a phone's
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def to_html(document: Document) -> str:
    """The page."""
    style = resources.files("qwenq").joinpath("report/report.css").read_text(encoding="utf-8")
    body = "\n".join(_section(section) for section in document.sections)
    links = "".join(f'<li><a href="#{s.anchor}">{html(s.title)}</a></li>' for s in document.sections)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{html(document.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n"
        f"<header>\n<h1>{html(document.title)}</h1>\n<p>{_text(document.subtitle)}</p>\n"
        f'<nav aria-label="Contents"><ul>{links}</ul></nav>\n</header>\n<main>\n{body}\n</main>\n'
        f'<script type="application/json" id="figures">{_json(document.data)}</script>\n</body>\n</html>\n'
    )


def _json(value: object) -> str:
    """JSON that cannot end its script element."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _section(section: Section) -> str:
    blocks = "\n".join(line for block in section.blocks for line in _block(block))
    return f'<section id="{section.anchor}">\n<h2>{html(section.title)}</h2>\n{blocks}\n</section>'


def _block(block: Block) -> Iterator[str]:
    match block:
        case Paragraph(text):
            yield f"<p>{_text(text)}</p>"
        case Items(items, stressed):
            kind = ' class="stressed"' if stressed else ""
            yield f"<ul{kind}>" + "".join(f"<li>{_text(item)}</li>" for item in items) + "</ul>"
        case Table():
            yield _table(block)
        case Figure(anchor, title, caption, draw, alternative):
            wide, narrow = draw(WIDE, f"{anchor}-w").svg(), draw(NARROW, f"{anchor}-n").svg()
            heading = f"<h3>{html(title)}</h3>\n" if title else ""
            yield (
                f'<figure id="{anchor}">{heading}<div class="wide">{wide}</div>\n'
                f'<div class="narrow">{narrow}</div>\n<figcaption>{_text(caption)}</figcaption>\n'
                f"<details><summary>The same figures as a table</summary>\n{_table(alternative)}</details></figure>"
            )
        case Details(summary, tables):
            inner = "\n".join(map(_table, tables))
            yield f"<details><summary>{html(summary)}</summary>\n{inner}\n</details>"


def _table(block: Table) -> str:
    kinds = {"l": "", "r": ' class="r"'}
    align = [kinds[side] for side in block.align]
    head = "".join(f'<th scope="col"{kind}>{_text(cell)}</th>' for cell, kind in zip(block.head, align, strict=True))
    rows = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(f"<td{kind}>{_text(cell)}</td>" for cell, kind in zip(row[1:], align[1:], strict=True))
        + "</tr>\n"
        for row in block.rows
    )
    caption = html(block.caption)
    return (
        f'<div class="scroll" role="region" aria-label="{caption}" tabindex="0"><table><caption>{caption}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}</tbody></table></div>"
    )


def _text(text: Text) -> str:
    return "".join(map(_part, parts(text)))


def _part(part: Part) -> str:
    match part:
        case Code(inner):
            return f"<code>{html(inner)}</code>"
        case Small(inner):
            return f"<small>{html(inner)}</small>"
        case _:
            return html(part)
