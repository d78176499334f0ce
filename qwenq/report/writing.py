"""A document as Markdown: the figures as their tables, without what only opens on demand."""

from __future__ import annotations

from collections.abc import Iterator

from qwenq.escaping import code, markdown, table
from qwenq.report.document import Block, Code, Details, Document, Figure, Items, Paragraph, Small, Table, Text, parts


def to_markdown(document: Document) -> str:
    """The whole text, ending in one newline."""
    lines = [f"# {markdown(document.title)}", "", _text(document.subtitle)]
    for section in document.sections:
        lines += ["", f"## {markdown(section.title)}"]
        for block in section.blocks:
            lines += ["", *_block(block)] if not isinstance(block, Details) else []
    return "\n".join(lines) + "\n"


def _block(block: Block) -> Iterator[str]:
    match block:
        case Paragraph(text):
            yield _text(text)
        case Items(items):
            yield from (f"- {_text(item)}" for item in items)
        case Table():
            yield from _table(block)
        case Figure(_, title, caption, _, alternative):
            if title:
                yield f"### {markdown(title)}"
                yield ""
            yield _text(caption)
            yield ""
            yield from _table(alternative)


def _table(block: Table) -> Iterator[str]:
    yield f"{markdown(block.caption)}:"
    yield ""
    rows = [[_text(cell) for cell in row] for row in block.rows]
    yield from table([_text(cell) for cell in block.head], rows, block.align)


def _text(text: Text) -> str:
    written = []
    for part in parts(text):
        match part:
            case Code(inner):
                written.append(code(inner))
            case Small(inner):
                written.append(f" ({markdown(inner)})")
            case _:
                space = " " if part.startswith(" ") else "", " " if part.endswith(" ") and part.strip() else ""
                written.append(space[0] + markdown(part) + space[1])
    return "".join(written)
