"""Import layers: a package may import only packages from earlier lines of ORDER."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import memformer

PACKAGE = Path(memformer.__file__).parent
# Packages and modules in the same line do not import each other.
ORDER = (
    {"errors", "shapes"},
    {"utils"},
    {"rollout"},
    {"nn"},
    {"models"},
    {"data", "generation"},
    {"evaluation"},
    {"training"},
    {"reproduction", "hf", "lm_eval"},
    {"cli"},
)
RANKS = {name: rank for rank, names in enumerate(ORDER) for name in names}
MODULES = sorted(file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE or file.stem in RANKS)


def imported_by(file):
    """Yield the top-level packages and modules of memformer that a module imports, also inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        yield from (name.split(".")[1] for name in names if name.split(".")[0] == "memformer")


@pytest.mark.parametrize("file", MODULES, ids=[file.relative_to(PACKAGE).as_posix() for file in MODULES])
def test_a_module_imports_only_earlier_layers(file):
    own = file.relative_to(PACKAGE).with_suffix("").parts[0]
    wrong = [name for name in imported_by(file) if name != own and RANKS.get(name, len(ORDER)) >= RANKS[own]]
    assert wrong == []


@pytest.mark.parametrize("package", ["transformers", "accelerate", "lm_eval"])
def test_only_the_adapters_import_the_packages_that_they_adapt_to(package):
    importing = [
        file.relative_to(PACKAGE).parts[0]
        for file in MODULES
        if package in modules_of(file.read_text(encoding="utf-8"))
    ]
    assert set(importing) <= {"hf", "lm_eval"}


def modules_of(code):
    """Return the top-level packages that a module imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            names.add(str(node.module).split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


def test_the_top_level_has_no_other_modules():
    modules = {file.stem for file in PACKAGE.glob("*.py")}
    assert modules == {"__init__", "__main__", "errors", "shapes", "rollout"}
    packages = {file.parent.name for file in PACKAGE.glob("*/__init__.py")}
    assert packages == RANKS.keys() - modules


def test_no_file_is_over_400_lines():
    root = Path(__file__).parents[1]
    files = [file for folder in ("src", "tests", "benchmarks", "experiments") for file in (root / folder).rglob("*.py")]
    assert len(files) > 200
    assert [file for file in files if len(file.read_text(encoding="utf-8").splitlines()) > 400] == []


ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "experiments").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: str(script.relative_to(ROOT)))
def test_what_a_script_imports_from_the_package_exists(script):
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "memformer":
            module = importlib.import_module(node.module)
            missing = [
                name.name
                for name in node.names
                if not hasattr(module, name.name) and importlib.util.find_spec(f"{node.module}.{name.name}") is None
            ]
            assert missing == [], f"from {node.module}"


def test_the_command_starts_without_modules_that_are_slow_to_import():
    """Only what needs one imports it."""
    slow = ("torch.distributed.tensor", "torch._dynamo", "sympy", "matplotlib", "tensorboard", "transformers")
    code = f"import sys, memformer.cli.main; print([name for name in {slow} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.PIPE, text=True)
    assert done.stdout.strip() == "[]"
