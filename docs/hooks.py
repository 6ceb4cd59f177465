"""The pages of the site that nobody writes by hand; mkdocs.yml names this file.

Pages that lie elsewhere in the repository (README, CHANGELOG, reports) are shown as they are, notebooks with what they
showed. A page for each pruner and the references are made from docstrings and from the command line's own help.
Links to files that are no pages, such as a source file, lead to a copy of the file in the site.
"""

from __future__ import annotations

import ast
import itertools
import json
import posixpath
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urldefrag

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.main import get_command

from gripvlm.cli import app
from gripvlm.models import coverage

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted(file.stem for file in ROOT.glob("examples/*.ipynb"))
REPORTS = sorted(file.parent.name for file in ROOT.glob("experiments/*/REPORT.md"))
ELSEWHERE = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "AGENTS.md": "agents.md",
    "SECURITY.md": "security.md",
    "src/gripvlm/lab/data/LICENSES.md": "licences.md",
    "experiments/README.md": "results/index.md",
    **{f"experiments/{study}/REPORT.md": f"results/{study}.md" for study in REPORTS},
    **{f"examples/{name}.ipynb": f"tutorials/{name}.md" for name in NOTEBOOKS},
}
"""A page's path in the repository -> its path in the site."""
HERE = {there: here for here, there in ELSEWHERE.items()}
LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s]+)\)")
"""Its text, its target."""
FENCE = re.compile(r"(^ *```.*?^ *```\s*?$)", re.MULTILINE | re.DOTALL)
STAGES = {
    "input": "before the language model",
    "llm": "inside the language model",
    "vision": "inside the vision tower",
    "pixels": "ahead of the vision tower",
}
TABLE = re.compile(r"<table>.*?</table>", re.DOTALL)
CODE = re.compile(r"<code>[^<]*</code>")
PHONE = 56
"""Characters of a table's small type beside one another on a phone, the space between columns included."""
FURTHER = [
    "gripvlm.eval.runner.evaluate",
    "gripvlm.report.build.report",
    "gripvlm.bench.runner.bench",
    "gripvlm.demo.compare.Asker",
    "gripvlm.grip.train.run.train",
    "gripvlm.grip.train.config.TrainConfig",
]
"""What the commands call."""


def _constant(file: str, name: str) -> Any:
    """A literal of a source file, which is not imported: PyTorch takes seconds."""
    for node in ast.parse((ROOT / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            return ast.literal_eval(node.value)
    raise LookupError(f"{file} has no {name}")


PRUNERS: dict[str, str] = _constant("src/gripvlm/pruners/registry.py", "_BUILT_IN")
MEASURED: dict[str, dict[str, Any]] = json.loads((ROOT / "src/gripvlm/cli/measured.json").read_text())["pruners"]


def _method(name: str) -> str:
    """A pruner's page: what `gripvlm list` shows of it, then its docstring."""
    row, place = MEASURED[name], PRUNERS[name].replace(":", ".")
    facts = [
        f"- **Drops** {STAGES[row['stage']]}",
        f"- **Source**: {row['source']}",
        f"- **Options**: {', '.join(f'`{option}`' for option in row['options']) or 'none'}",
    ]
    if "score" in row:
        facts.append(
            f"- **On the lab**: {100 * row['score']:.1f} % right "
            f"[{100 * row['ci_low']:.0f}-{100 * row['ci_high']:.0f}] at {100 * row['keep']:g} % of the tokens, "
            f"measured as `{row['measured_as']}`"
        )
    return f"# {name}\n\n" + "\n".join(facts) + f"\n\n[All methods](../methods.md)\n\n::: {place}\n"


def _python() -> str:
    """The public names, from the list that the package itself reads: functions, then classes."""
    stub = (ROOT / "src/gripvlm/__init__.pyi").read_text(encoding="utf-8")
    names = re.findall(r"^from (\S+) import (\w+) as \w+$", stub, re.MULTILINE)
    names.sort(key=lambda entry: (entry[1] != "prune", not entry[1].islower()))  # what is called first, then classes
    entries = [f"{module}.{name}" for module, name in names] + FURTHER
    return "# Python\n\n" + "\n".join(f"::: {entry}\n    options: {{heading_level: 2}}\n" for entry in entries)


def _options(command: Any) -> str:
    lines = ["| option | default | what it does |", "|---|---|---|"]
    for option in command.params:
        names = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
        value = option.default
        shown = "" if value is None or value is False or value in ("", ()) else f"`{value}`"
        text = " ".join((getattr(option, "help", None) or "").split()).replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {names} | {'required' if option.required else shown} | {text} |")
    return "\n".join(lines)


def _command_line() -> str:
    """Each command with its options, from its own help."""
    parts = ["# Command line", "`gripvlm COMMAND --help` shows the same; `--debug` after any command the traceback."]
    for name, command in get_command(app).commands.items():
        parts += [f"## gripvlm {name}", (command.help or "").replace("<", "&lt;"), _options(command)]
    return "\n\n".join(parts) + "\n"


def _cell(cell: dict[str, Any]) -> Iterator[str]:
    """A notebook's cell in Markdown: its text, or its code and what it showed."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    for output in cell["outputs"]:
        if "text" in output:
            lines = "".join(output["text"]).rstrip().splitlines()
            text = "\n".join(textwrap.fill(line, 112, drop_whitespace=False) for line in lines)
            yield f"```text\n{text}\n```"
        elif "image/png" in output["data"]:
            yield f'<img alt="picture" src="data:image/png;base64,{output["data"]["image/png"]}">'
        else:
            yield f"```text\n{''.join(output['data']['text/plain'])}\n```"


def _page(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if not path.endswith(".ipynb"):
        return text
    parts = [part for cell in json.loads(text)["cells"] for part in _cell(cell)]
    parts.insert(1, f"This page is the notebook `{path}` of the repository, with what it showed.")
    return "\n\n".join(parts) + "\n"


def _generated() -> dict[str, str]:
    pages = {there: _page(here) for here, there in ELSEWHERE.items()}
    pages |= {f"methods/{name}.md": _method(name) for name in PRUNERS}
    pages["model-types.md"] = coverage.page()
    return pages | {"reference/python.md": _python(), "reference/command-line.md": _command_line()}


def _leads_to(target: str, page: str) -> str | None:
    """The repository's path of what a page of the site links to; None for another host, and within the page."""
    name = urldefrag(target)[0]
    if not name or "://" in name or name.startswith("mailto:"):
        return None
    folder = posixpath.dirname(HERE.get(page, f"docs/{page}"))
    return posixpath.normpath(posixpath.join(folder, name))


def _in_site(path: str) -> str | None:
    """Where a file of the repository is in the site; None for a folder, which has no page."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"files/{path}" if (ROOT / path).is_file() else None


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Lists the methods and the reports in the navigation."""
    reports = ["results/index.md", *(f"results/{study}.md" for study in REPORTS)]
    filled = {"Methods": [f"methods/{name}.md" for name in PRUNERS], "Results": reports}
    (section,) = [entry["Background"] for entry in config.nav if "Background" in entry]
    for entry in section:
        for title in filled.keys() & entry.keys():
            entry[title] = filled[title]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the generated pages, and the files that pages link to."""
    pages = _generated()
    for there, text in pages.items():
        files.append(File.generated(config, there, content=text))
    texts = {file.src_uri: file.content_string for file in files.documentation_pages()}
    linked = {_leads_to(target, page) for page, text in texts.items() for _, target in LINK.findall(text)}
    for path in sorted(filter(None, linked)):
        there = _in_site(path)
        if there and there.startswith("files/"):
            files.append(File.generated(config, there, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    here = page.file.src_uri
    if here not in HERE and not (ROOT / "docs" / here).exists():
        return markdown  # made above, with links of the site

    def one(match: re.Match[str]) -> str:
        path = _leads_to(match[2], here)
        if path is None or not (ROOT / path).exists():
            return match[0]  # if it leads nowhere, mkdocs will complain of it
        there = _in_site(path)
        if there is None:
            return match[1]
        fragment = urldefrag(match[2])[1]
        relative = posixpath.relpath(there, posixpath.dirname(here) or ".")
        return f"[{match[1]}]({relative}{'#' + fragment if fragment else ''})"

    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(one, part) for part in parts[::2]]
    text = "".join(parts)
    if here == "methods.md":
        text = re.sub(r"^\| `(\w+)` \|", r"| [`\1`](methods/\1.md) |", text, flags=re.MULTILINE)
    return text


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Makes tables fit: lists in their cells may break at commas, and those too wide for a phone are marked."""
    return TABLE.sub(lambda match: CODE.sub(lambda code: code[0].replace(",", ",<wbr>"), _for_phones(match[0])), html)


def _for_phones(table: str) -> str:
    """A wide table with each cell's column beside it: site.css shows its rows below one another on a phone."""
    titles = [_words(title) for title in re.findall(r"<th\b[^>]*>(.*?)</th>", table, re.DOTALL)]
    whole = CODE.sub(lambda code: code[0].replace(" ", "_"), table)  # code stays on one line
    cells = [_words(cell) for cell in re.findall(r"<td\b[^>]*>(.*?)</td>", whole, re.DOTALL)]
    columns = [[title, *cells[i :: len(titles)]] for i, title in enumerate(titles)]
    if sum(2 + _narrowest(column) for column in columns) <= PHONE:
        return table
    names = itertools.cycle(titles)
    cells_named = re.sub(r"<td\b", lambda _: f'<td data-column="{next(names)}"', table)
    return cells_named.replace("<table>", "<table data-wide>", 1)


def _words(cell: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", cell).split()).replace('"', "&quot;")


def _narrowest(column: list[str]) -> int:
    """The characters that a column needs: its longest word, and two or three words a line."""
    words = [len(word) for cell in column for word in cell.split()]
    return max([*words, min(14, max(map(len, column)))])
