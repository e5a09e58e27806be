"""Faults in source code by surprisal: prepare Python modules, and rank the lines of modules with an injected fault.

    python experiments/recipes/source_code.py prepare source
    python experiments/recipes/source_code.py report runs/recipes/source_code source --figure source-code.png

`prepare` copies the modules of the standard library of the running Python (or of --modules) to train/, validation/ and
test/, and writes copies of the modules of test/ with one fault each to faults/, which faults.jsonl lists:

- misspelt: a name that occurs at least twice before has two of its letters exchanged, and the result is new;
- operator: an operator becomes its opposite (== and !=, < and >, + and -, `and` and `or`, ...);
- swapped: the first two arguments of a call change places.

`report` scores every such copy. The lines of a module are ranked by bits per byte, as `memformer score --top` does, and
by the most surprising token of each line, with the memory and with the memory erased; for comparison, by the length of
the lines and at random. Lines that hold only white space are not ranked.
"""

import argparse
import ast
import io
import json
import keyword
import random
import tokenize
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from memformer.data.lines import LineReader
from memformer.data.text import locate_standard_library, standard_library
from memformer.evaluation.token_surprisal import token_surprisal
from memformer.training.run_folder import LoadedRun, load_run

KINDS = ("misspelt", "operator", "swapped")
OPPOSITES = {"==": "!=", "<": ">", "<=": ">=", "+": "-", "+=": "-=", "and": "or"}
OPPOSITES |= {new: old for old, new in OPPOSITES.items()}
# Tables of characters and help texts, which are no code.
NO_CODE = ("encodings/", "pydoc_data/", "_sysconfigdata")
MIN_NAME_LENGTH = 5
TOPS = (1, 5, 10, 20)
RANKINGS = {
    "bits/byte": "memory",
    "bits/byte, erased": "memory erased",
    "token": "memory, most surprising token",
    "token, erased": "memory erased, most surprising token",
    "length": "longest line first",
}


class Fault(NamedTuple):
    """A fault: bytes of a line that are replaced. Lines and columns count from 0."""

    line: int
    start: int
    end: int
    replacement: bytes


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    preparing = commands.add_parser("prepare", help="Write the modules, and copies with faults.")
    preparing.add_argument("output", type=Path, help="Folder to write to.")
    preparing.add_argument("--modules", type=Path, help="Folder of modules. Default: the standard library.")
    preparing.add_argument("--num_tested", type=int, default=60, help="Number of modules to test.")
    preparing.add_argument("--num_validation", type=int, default=20, help="Number of modules for validation.")
    preparing.add_argument("--lines", type=int, nargs=2, default=(60, 400), help="Least and most lines to test.")
    preparing.add_argument("--seed", type=int, default=0, help="Seed of the split and of the faults.")
    preparing.set_defaults(action=prepare)
    reporting = commands.add_parser("report", help="Print how often the injected line is among the first.")
    reporting.add_argument("run", type=Path, help="Run folder.")
    reporting.add_argument("folder", type=Path, help="Folder that `prepare` wrote.")
    reporting.add_argument("--figure", type=Path, default=None, help="PNG file for the share found by lines read.")
    reporting.set_defaults(action=lambda options: report(options.run, options.folder, figure=options.figure))
    options = parser.parse_args()
    options.action(options)


def prepare(options: Any) -> None:
    """Write the modules of the three parts, and copies of the tested modules with one fault each."""
    modules = read_modules(options.modules)
    generator = random.Random(options.seed)
    names = sorted(modules)
    generator.shuffle(names)
    least, most = options.lines
    tested = [name for name in names if least <= modules[name].count(b"\n") <= most][: options.num_tested]
    rest = [name for name in names if name not in set(tested)]
    parts = {"test": tested, "validation": rest[: options.num_validation], "train": rest[options.num_validation :]}
    for part, chosen in parts.items():
        for name in chosen:
            write(options.output / part / name, modules[name])
        size = sum(len(modules[name]) for name in chosen)
        print(f"{options.output / part}: {len(chosen)} modules, {size:,} bytes")
    records = []
    for name in tested:
        for kind in KINDS:
            if faults := list(possible_faults(kind, modules[name], generator)):
                fault = generator.choice(faults)
                file = f"faults/{kind}/{name}"
                write(options.output / file, with_fault(modules[name], fault))
                records.append({"file": file, "original": f"test/{name}", "kind": kind, "line": fault.line + 1})
    lines = "".join(f"{json.dumps(record)}\n" for record in records)
    (options.output / "faults.jsonl").write_text(lines, encoding="utf-8")
    print(f"{len(records)} faults: {dict(Counter(record['kind'] for record in records))}")


def read_modules(folder: Path | None) -> dict[str, bytes]:
    """Return the content of every module that is code, by its relative name."""
    root = standard_library() if folder is None else folder
    files = [file.path for file in locate_standard_library()] if folder is None else sorted(root.rglob("*.py"))
    modules = {}
    for file in files:
        name, content = file.relative_to(root).as_posix(), file.read_bytes()
        try:
            content.decode("utf-8")
            ast.parse(content)
        except (UnicodeDecodeError, SyntaxError):
            continue
        if not name.startswith(NO_CODE):
            modules[name] = content.replace(b"\r\n", b"\n")
    return modules


def write(file: Path, content: bytes) -> None:
    """Write a file, and its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def with_fault(content: bytes, fault: Fault) -> bytes:
    """Return a module with a fault."""
    lines = content.split(b"\n")
    line = lines[fault.line]
    lines[fault.line] = line[: fault.start] + fault.replacement + line[fault.end :]
    return b"\n".join(lines)


def possible_faults(kind: str, content: bytes, generator: random.Random) -> Iterator[Fault]:
    """Yield the faults of one kind that a module can have."""
    if kind == "swapped":
        yield from swapped_arguments(content)
        return
    lines = content.decode("utf-8").split("\n")
    seen = Counter[str]()
    words = Counter(token.string for token in tokens_of(content))
    for token in tokens_of(content):
        (row, start), (_, end) = token.start, token.end
        replacement = None
        if kind == "operator" and token.type in (tokenize.OP, tokenize.NAME):
            replacement = OPPOSITES.get(token.string)
        elif kind == "misspelt" and token.type == tokenize.NAME and seen[token.string] >= 2:
            replacement = misspell(token.string, words, generator)
        seen[token.string] += 1
        if replacement is not None:
            before = len(lines[row - 1][:start].encode())
            yield Fault(row - 1, before, before + len(lines[row - 1][start:end].encode()), replacement.encode())


def tokens_of(content: bytes) -> Iterator[tokenize.TokenInfo]:
    """Yield the tokens of Python's own tokenizer."""
    return tokenize.generate_tokens(io.StringIO(content.decode("utf-8")).readline)


def misspell(name: str, words: Counter[str], generator: random.Random) -> str | None:
    """Return a name with two neighbouring letters exchanged that is not in the module, or None."""
    if len(name) < MIN_NAME_LENGTH or keyword.iskeyword(name) or name.startswith("__"):
        return None
    places = [place for place in range(1, len(name) - 1) if name[place] != name[place + 1]]
    if not places:
        return None
    place = generator.choice(places)
    changed = name[:place] + name[place + 1] + name[place] + name[place + 2 :]
    return None if changed in words else changed


def swapped_arguments(content: bytes) -> Iterator[Fault]:
    """Yield the exchanges of the first two arguments of calls, if both are names, attributes or constants."""
    lines = content.split(b"\n")
    for node in ast.walk(ast.parse(content)):
        if not isinstance(node, ast.Call) or len(node.args) < 2:
            continue
        first, second = node.args[:2]
        simple = all(isinstance(each, ast.Name | ast.Attribute | ast.Constant) for each in (first, second))
        if not simple or first.lineno != second.end_lineno or first.end_col_offset is None:
            continue
        line = lines[first.lineno - 1]
        texts = [line[each.col_offset : each.end_col_offset] for each in (first, second)]
        if texts[0] != texts[1] and second.end_col_offset is not None:
            between = line[first.end_col_offset : second.col_offset]
            swapped = texts[1] + between + texts[0]
            yield Fault(first.lineno - 1, first.col_offset, second.end_col_offset, swapped)


def report(run_folder: Path, folder: Path, *, figure: Path | None) -> None:
    """Print how often the line with the fault is among the first lines of its module."""
    run = load_run(run_folder)
    records = [json.loads(line) for line in (folder / "faults.jsonl").read_text(encoding="utf-8").splitlines()]
    originals = {name: scores_of(run, folder / name) for name in {record["original"] for record in records}}
    for record in records:
        found = scores_of(run, folder / record["file"])
        is_ranked, place = found.pop("is ranked"), record["line"] - 1
        original = originals[record["original"]]
        record["lines"] = int(is_ranked.sum())
        record["ranks"] = {name: rank(scores, is_ranked, place) for name, scores in found.items()}
        record["rises"] = {name: bool(scores[place] > original[name][place]) for name, scores in found.items()}
    for kind in KINDS:
        print_kind(kind, [record for record in records if record["kind"] == kind])
    if figure is not None:
        draw(records, figure)


def scores_of(run: LoadedRun, file: Path) -> dict[str, np.ndarray]:
    """Return for each line of a file whether it is ranked, and its score by each ranking."""
    content = file.read_bytes()
    texts = content.split(b"\n")
    ids, lines, before = [], [], 0
    for part in LineReader(run.tokenizer, io.BytesIO(content), name=str(file)).parts():
        ids.append(part.token_ids)
        lines.append(part.lines + before)
        before += part.content.count(b"\n")
    line_of = np.concatenate(lines)
    sizes = np.array([len(text) + 1 for text in texts])
    scores = {"is ranked": np.array([bool(text.strip()) for text in texts]), "length": sizes.astype(float)}
    for nll, suffix in zip(token_surprisal(run.model, ids), ("", ", erased"), strict=True):
        sums = np.bincount(line_of, weights=nll, minlength=len(texts))
        most = np.zeros(len(texts))
        np.maximum.at(most, line_of, nll)
        scores[f"bits/byte{suffix}"] = sums / np.log(2) / sizes
        scores[f"token{suffix}"] = most
    return scores


def rank(scores: np.ndarray, is_ranked: np.ndarray, place: int) -> float:
    """Return the rank of a line, from 1; lines with equal scores share the mean of their ranks."""
    others = scores[is_ranked]
    return float((others > scores[place]).sum() + ((others == scores[place]).sum() + 1) / 2)


def print_kind(kind: str, records: list[dict[str, Any]]) -> None:
    """Print a table for one kind of faults."""
    if not records:
        return
    lines = np.array([record["lines"] for record in records])
    print(f"\n{kind}: {len(records)} modules of {np.median(lines):.0f} lines (median)")
    columns = (*(f"in the first {top}" for top in TOPS), "median rank", "more than the original")
    print("| ranked by | " + " | ".join(columns) + " |\n|" + "---|" * (len(columns) + 1))
    for name, title in RANKINGS.items():
        ranks = np.array([record["ranks"][name] for record in records])
        cells = [str(int((ranks <= top).sum())) for top in TOPS]
        rises = sum(record["rises"][name] for record in records)
        cells += [f"{np.median(ranks):.1f}", "" if name == "length" else str(rises)]
        print(f"| {title} | " + " | ".join(cells) + " |")
    expected = [f"{np.minimum(top / lines, 1).sum():.1f}" for top in TOPS]
    print("| at random (expected) | " + " | ".join([*expected, f"{(np.median(lines) + 1) / 2:.1f}", ""]) + " |")


def draw(records: list[dict[str, Any]], file: Path) -> None:
    """Draw the share of faults found by the share of lines read, one panel for each kind."""
    canvas = Figure(figsize=(9, 3.6), layout="constrained")
    read = np.linspace(0, 1, 201)
    for axes, kind in zip(canvas.subplots(1, len(KINDS), sharey=True), KINDS, strict=True):
        chosen = [record for record in records if record["kind"] == kind]
        for (name, title), style in zip(RANKINGS.items(), ("C0", "C0--", "C1", "C1--", "0.5"), strict=True):
            shares = np.array([record["ranks"][name] / record["lines"] for record in chosen])
            axes.plot(read, [(shares <= share).mean() if len(shares) else 0 for share in read], style, label=title)
        axes.plot(read, read, "k:", linewidth=0.8, label="at random")
        axes.set(title=f"{kind} ({len(chosen)})", xlabel="share of the lines read", xlim=(0, 0.5), ylim=(0, 1))
    canvas.axes[0].set_ylabel("share of the faults found")
    handles, labels = canvas.axes[0].get_legend_handles_labels()
    canvas.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8)
    canvas.savefig(file, dpi=80)


if __name__ == "__main__":
    main()
