"""Build the documentation site in site/: `make docs`.

The pages link to each other, and to files of the repository, by relative paths, so that a git host shows them as they
are. The site is built from copies: the pages of docs/ move to the top, and links are changed to match. Every page must
be in the navigation of zensical.toml. Warnings are errors, so a missing page or anchor ends the build.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "build" / "site-pages"
SITE = ROOT / "site"
OTHER_PAGES = ("benchmarks/README.md", "experiments/README.md", "experiments/RETENTION.md", "CHANGELOG.md")
LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)#\s]+)")
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}


def main() -> int:
    """Build the site and the notebooks; return the exit status."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for page in sorted((ROOT / "docs").rglob("*.md")) + [ROOT / name for name in OTHER_PAGES]:
        copy_page(page)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}  # the format of formulas is in this module
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
    if status == 0:
        for page in sorted((ROOT / "docs" / "tutorials").glob("*.md")):
            write_notebook(page)
    return status


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
    text = "".join(piece if is_code else LINK.sub(adapt, piece) for is_code, piece in pieces(page.read_text("utf-8")))
    target.write_text(text, encoding="utf-8")


def pieces(text: str) -> Iterator[tuple[bool, str]]:
    """Yield the fenced blocks of code of a page, and what stands between them."""
    for index, piece in enumerate(re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)):
        yield index % 2 == 1, piece


def formula(source: str, *_: Any, **__: Any) -> str:
    """Return a formula in LaTeX as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    lines = [convert(line.strip(), display="block") for line in re.split(r"\n\s*\n", source.strip())]
    return f'<div class="formula">{"".join(lines)}</div>'


def write_notebook(page: Path) -> None:
    """Write a tutorial as a notebook beside its page in the site."""
    import jupytext

    notebook = jupytext.read(page, fmt="md")
    notebook.metadata.update(KERNEL)
    (SITE / place(page).with_suffix(".ipynb")).write_text(json.dumps(notebook, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
