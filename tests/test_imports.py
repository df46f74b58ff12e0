"""Imports go down only, and optional libraries wait until they are needed."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_osd


PACKAGE = Path(hf_osd.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# What each folder may import of the package; `None`: anything.
ALLOWED: dict[str, set[str] | None] = {
    "subspace": {"subspace", "declare"},
    "update_rules": {"update_rules", "declare"},
    "optim": {"optim", "update_rules", "subspace", "declare"},
    "estimate": {"estimate", "optim", "update_rules", "subspace"},
    "rso": {"rso", "optim"},
    "trainer": {"trainer", "rso", "hub", "optim", "update_rules", "subspace", "declare"},
    "hub": {"hub", "optim", "update_rules", "subspace", "version"},
    "interop": {"interop", "hub", "optim", "update_rules", "subspace", "version"},
    "report": {"report", "trainer", "hub", "optim", "update_rules", "subspace", "version"},
    "cli": None,
}
OPTIONAL = {
    "bitsandbytes",
    "peft",
    "huggingface_hub",
    "accelerate",
    "datasets",
    "matplotlib",
    "jinja2",
    "galore_torch",
    "trl",
}


def imports(tree: ast.AST, file: Path) -> Iterator[str]:
    """Absolute names of what a piece of a file imports; `from a import b` gives `a.b`."""
    package = ["hf_osd", *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            yield from (".".join([*base, alias.name]) for alias in node.names)


def at_module_level(tree: ast.Module) -> ast.Module:
    """The file without the bodies of its functions."""

    class Strip(ast.NodeTransformer):
        def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
            return None

        visit_AsyncFunctionDef = visit_FunctionDef  # type: ignore[assignment]

    stripped = Strip().visit(tree)
    assert isinstance(stripped, ast.Module)
    return stripped


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def name_of(file: Path) -> str:
    return str(file.relative_to(PACKAGE))


def test_the_scan_finds_imports():
    file = PACKAGE / "optim" / "example.py"
    text = "import os.path\nfrom . import plan\nfrom ..subspace import svd\nfrom .. import trainer\n"
    text += "def f():\n import peft"
    found = set(imports(ast.parse(text), file))
    assert found == {"os.path", "hf_osd.optim.plan", "hf_osd.subspace.svd", "hf_osd.trainer", "peft"}
    assert "peft" not in set(imports(at_module_level(ast.parse(text)), file))
    assert {file.relative_to(PACKAGE).parts[0] for file in FILES if file.parent != PACKAGE} == ALLOWED.keys()


@pytest.mark.parametrize("file", [file for file in FILES if file.parent != PACKAGE], ids=name_of)
def test_imports_go_down_only(file):
    allowed = ALLOWED[file.relative_to(PACKAGE).parts[0]]
    for name in imports(parse(file), file):
        parts = name.split(".")
        if parts[0] == "hf_osd" and allowed is not None:
            assert len(parts) > 1 and parts[1] in allowed, name


@pytest.mark.parametrize("file", sorted((PACKAGE / "subspace").glob("*.py")), ids=name_of)
def test_subspace_needs_torch_only(file):
    for name in imports(parse(file), file):
        top = name.split(".")[0]
        assert top in {"torch", "hf_osd"} or top in sys.stdlib_module_names, name


def test_declarations_need_the_standard_library_only():
    file = PACKAGE / "declare.py"
    assert {name.split(".")[0] for name in imports(parse(file), file)} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_optional_libraries_are_imported_where_they_are_used(file):
    found = {name.split(".")[0] for name in imports(at_module_level(parse(file)), file)}
    assert not found & OPTIONAL
    # What is always installed with us.
    assert found <= {"hf_osd", "torch", "transformers"} | set(sys.stdlib_module_names)


NEW = """
import sys
import transformers.trainer
before = set(sys.modules)
import hf_osd
new = {name.split(".")[0] for name in set(sys.modules) - before}
print("NEW " + " ".join(sorted(new - {name.split(".")[0] for name in before})))
"""


def test_importing_us_loads_nothing_beyond_the_trainer():
    done = subprocess.run([sys.executable, "-c", NEW], capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("NEW ")]
    loaded = set(line.split()[1:])
    assert "hf_osd" in loaded
    assert loaded - set(sys.stdlib_module_names) == {"hf_osd"}


def test_the_version_is_readable_without_dependencies():
    code = f"import runpy, sys\nprint(runpy.run_path({str(PACKAGE / 'version.py')!r})['__version__'])\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == hf_osd.__version__
