"""What mkdocs does not do by itself: folders in the navigation, formulas as MathML, roles in docstrings as code.

Formulas are converted while the site is built, so that its pages need no script and no network to show them.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.DOTALL)
_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\(((?!\w+:)[^)#\s]+)\)")
_FETCHED = re.compile(r'(?:\bsrc=|<link[^>]* href=)"((?:https?:)?//[^"]+)"')
_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):<code>~?(.*?)</code>")


def _mathml(found: re.Match[str]) -> str:
    inline, block = found.group(2), found.group(3)
    source = html.unescape(inline if block is None else block).strip()
    shown = convert(source, display="inline" if block is None else "block")
    if unknown := re.findall(r"\\[A-Za-z]+", shown):
        raise ValueError(f"{unknown[0]} has no MathML, in the formula {source}")
    return shown


def on_config(config: Any) -> Any:
    """A folder named in the navigation stands for its pages: README first, then dated pages from the newest."""
    for section in config["nav"]:
        for title, value in section.items():
            if isinstance(value, str) and (folder := Path(config["docs_dir"]) / value).is_dir():
                names = sorted(path.name for path in folder.glob("*.md"))
                dated = [name for name in names if name[:4].isdigit() and name[4] == "-" and name[5:7].isdigit()]
                others = [name for name in names if name not in dated]  # README first, decisions by their number
                section[title] = [f"{value}/{name}" for name in others + dated[::-1]]
    return config


def on_page_content(content: str, **_: Any) -> str:
    """The page's HTML, with formulas as MathML."""
    return _ROLE.sub(r"<code>\1</code>", _FORMULA.sub(_mathml, content))


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """The finished page. Raises ValueError where it would fetch something from the network."""
    if fetched := _FETCHED.search(output):
        raise ValueError(f"{page.file.src_uri} would fetch {fetched.group(1)}: bundle it")
    return output


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """CONTRIBUTING.md on the page of that name; links out of the site, into the repository, become their text."""
    docs = Path(config["docs_dir"]).resolve()
    if page.file.src_uri == "contributing.md":
        return (docs.parent / "CONTRIBUTING.md").read_text().replace("](docs/", "](")
    here = (docs / page.file.src_uri).parent

    def kept(found: re.Match[str]) -> str:
        target = (here / found.group(2)).resolve()
        return found.group(1) if target.exists() and docs not in target.parents else found.group(0)

    return _LINK.sub(kept, markdown)
