"""Build the documentation site in site/: `make docs`.

The pages link to each other, and to files of the repository, by relative paths, so that a git host shows them as they
are. The site is built from copies of the pages in zensical.toml's menu: those of docs/ move to the top, and links are
changed to match. Every tutorial gets a link to itself as a notebook. Warnings are errors, and so is a link of the site
that leads nowhere.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "site-pages"
SITE = ROOT / "site"
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def main() -> int:
    """Build the site; return the exit status."""
    shutil.rmtree(PAGES, ignore_errors=True)
    shutil.rmtree(SITE, ignore_errors=True)
    project = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))["project"]
    for name in names_in(project["nav"]):
        copy_page(page if (page := ROOT / "docs" / name).is_file() else ROOT / name)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}  # where zensical finds `formula`
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    if status := subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode:
        return status
    broken = broken_links(SITE)
    for line in broken:
        print(line, file=sys.stderr)
    return 1 if broken else 0


def names_in(menu: Any) -> list[str]:
    """Return the names of all pages in a menu or in an entry of it."""
    if isinstance(menu, str):
        return [menu]
    entries = menu.values() if isinstance(menu, dict) else menu
    return [name for entry in entries for name in names_in(entry)]


def place(path: Path) -> Path:
    """Return where a file of the repository is in the site, relative to its top."""
    path = path.relative_to(ROOT)
    return path.relative_to("docs") if path.parts[0] == "docs" else path


def copy_page(page: Path) -> None:
    """Copy a page and the files that it links to; adapt its links."""
    target = PAGES / place(page)

    def adapt(link: re.Match[str]) -> str:
        file = (page.parent / link[1]).resolve()
        if file.is_file() and file.suffix != ".md":
            (PAGES / place(file)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, PAGES / place(file))
        return Path(os.path.relpath(PAGES / place(file), target.parent)).as_posix()

    target.parent.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8")
    if target.parent.name == "tutorials" and target.stem != "index":
        notebook = target.with_suffix(".ipynb")
        write_notebook(text, notebook)
        text = text.replace("\n", f"\n\n[This page as a notebook]({notebook.name}){{ download }}\n", 1)
    target.write_text(outside_code(text, lambda prose: LINK.sub(adapt, prose)), encoding="utf-8")


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Return a page with what stands outside its fenced blocks of code changed."""
    pieces = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(piece if index % 2 else change(piece) for index, piece in enumerate(pieces))


def write_notebook(text: str, target: Path) -> None:
    """Write a tutorial as a notebook, which draws its figures itself and has no pages to link to."""
    import jupytext

    text = re.sub(r"^!\[[^]]*\]\([^)]*\)\n", "", text, flags=re.MULTILINE)
    text = outside_code(text, lambda prose: re.sub(r"\[([^]]+)\]\((?!https?:)[^)]*\)", r"\1", prose))
    notebook = jupytext.reads(text, fmt="md")
    notebook.metadata.update(KERNEL)
    target.write_text(jupytext.writes(notebook, fmt="ipynb"), encoding="utf-8")


def formula(source: str, *_: Any, **__: Any) -> str:
    """Return formulas in LaTeX, separated by empty lines, as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    formulas = [convert(each, display="block") for each in re.split(r"\n\s*\n", source.strip())]
    return "".join(f'<div style="overflow-x: auto; margin: 1em 0">{each}</div>' for each in formulas)


class Links(HTMLParser):
    """The links and the anchors of a page of the site.

    Args:
        file: The page.
    """

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.anchors: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the attributes that link, or that can be linked to."""
        for name, value in attrs:
            if value and name in ("href", "src"):
                self.links.add(value)
            elif value and (name == "id" or (tag == "a" and name == "name")):
                self.anchors.add(value)


def broken_links(site: Path) -> list[str]:
    """Return a line for each link of the site to a file or an anchor that does not exist."""
    pages = {file: Links(file) for file in sorted(site.rglob("*.html")) if file.name != "404.html"}
    broken = []
    for page, found in pages.items():
        for link in sorted(found.links):
            url = urlsplit(link)
            if url.scheme or url.netloc:
                continue
            file = (page.parent / unquote(url.path)).resolve() if url.path else page
            file = file / "index.html" if file.is_dir() else file
            anchor = unquote(url.fragment)
            if not file.is_file() or (anchor and file in pages and anchor not in pages[file].anchors):
                broken.append(f"{page.relative_to(ROOT)}: the link {link} leads nowhere")
    return broken


if __name__ == "__main__":
    sys.exit(main())
