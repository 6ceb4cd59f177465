"""A report's blocks as one self-contained HTML page, and as Markdown with its figures beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from gripvlm.report.blocks import Block, Commands, Facts, Figures, Heading, Pictures, Sheet, Text

__all__ = ["to_html", "to_markdown"]


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """One page: styles inside, figures as inline SVG, pictures as data, no script, nothing fetched."""
    style = files("gripvlm.report").joinpath("page.css").read_text(encoding="utf-8")
    head = (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
    )
    contents = [block for block in blocks if isinstance(block, Heading) and block.level == 2]
    links = " ".join(f'<a href="#{_anchor(one.text)}">{escape(one.text)}</a>' for one in contents)
    parts = []
    for number, block in enumerate(blocks):
        parts.append(_html(block))
        if number == 0 and len(contents) > 1:
            parts.append(f"<nav>{links}</nav>")
    return head + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f'<h{block.level} id="{_anchor(block.text)}">{_inline(block.text)}</h{block.level}>'
    if isinstance(block, Text):
        return f"<p>{_inline(block.text)}</p>"
    if isinstance(block, Sheet):
        return _table(block)
    if isinstance(block, Figures):
        legend = "".join(f"<li>{mark}<span>{escape(name)}</span></li>" for mark, name in block.legend)
        drawn = "".join(f"<figure>{svg}</figure>" for _, svg in block.drawings)
        above = f'<ul class="legend">{legend}</ul>' if legend else ""
        return f'{above}<div class="figures{" wide" if block.wide else ""}">{drawn}</div>'
    if isinstance(block, Pictures):
        shown = "".join(
            f'<figure class="{"right" if one.right else "wrong"}">'
            f'<img alt="{escape(one.caption, quote=True)}" src="data:image/jpeg;base64,'
            f'{base64.b64encode(one.content).decode()}"><figcaption>{_inline(one.caption)}</figcaption></figure>'
            for one in block.pictures
        )
        return f'<section class="question"><p>{_inline(block.title)}</p><div class="pictures">{shown}</div></section>'
    if isinstance(block, Facts):
        rows = "".join(f"<dt>{_inline(name)}</dt><dd>{_inline(said)}</dd>" for name, said in block.rows)
        return f'<dl class="facts">{rows}</dl>'
    rows = "".join(f"<dt>{_inline(name)}</dt><dd><code>{escape(typed)}</code></dd>" for name, typed in block.rows)
    return f'<dl class="commands">{rows}</dl>'


def _table(sheet: Sheet) -> str:
    head = "".join(f'<th scope="col">{_inline(cell)}</th>' for cell in sheet.head)
    lines = []
    for number, row in enumerate(sheet.rows):
        cells = [
            f'<th scope="row">{_inline(cell)}</th>' if i == 0 else f"<td>{_cell(cell)}</td>"
            for i, cell in enumerate(row)
        ]
        mark = ' class="strong"' if number in sheet.strong else ""
        lines.append(f"<tr{mark}>{''.join(cells)}</tr>")
    body = "".join(lines)
    words = f"words{sheet.named}"
    return (
        f'<div class="sheet"><table class="{words}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(text: str) -> str:
    """A number, its interval in brackets smaller."""
    value, bracket, rest = text.partition(" [")
    return f"{_inline(value)} <small>[{_inline(rest)}</small>" if bracket else _inline(text)


def _inline(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _anchor(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def to_markdown(blocks: Sequence[Block], folder: str) -> str:
    """The same in Markdown; figures and pictures are `folder`'s files (see `write_report`)."""
    lines: list[str] = []
    for block in blocks:
        if isinstance(block, Heading):
            lines += [f"{'#' * block.level} {block.text}", ""]
        elif isinstance(block, Text):
            lines += [block.text, ""]
        elif isinstance(block, Sheet):
            lines += [_line(block.head), _line(["---"] * block.named + ["---:"] * (len(block.head) - block.named))]
            lines += [*(_line(row) for row in block.rows), ""]
        elif isinstance(block, Figures):
            lines += [f"![{name}]({folder}/{name}.svg)" for name, _ in block.drawings]
            lines += ["", "Lines: " + ", ".join(name for _, name in block.legend) + ".", ""] if block.legend else [""]
        elif isinstance(block, Pictures):
            lines += [block.title, "", *(f"![{_alt(one.caption)}]({folder}/{one.name}.jpg)" for one in block.pictures)]
            lines += ["", "; ".join(one.caption for one in block.pictures) + ".", ""]
        elif isinstance(block, Facts):
            lines += [*(f"- {name}: {said}" for name, said in block.rows), ""]
        elif isinstance(block, Commands):
            lines += [_line(["point", "command"]), _line(["---", "---"])]
            lines += [*(_line([name, f"`{typed}`"]) for name, typed in block.rows), ""]
    return "\n".join(lines).rstrip() + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _alt(text: str) -> str:
    return text.replace("`", "").replace("[", "(").replace("]", ")")
