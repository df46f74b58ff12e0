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
# What each folder, and each file beside them, may import of the package; `None`: anything.
ALLOWED: dict[str, set[str] | None] = {
    "subspace": {"subspace", "declare"},
    "layers": {"layers", "subspace"},
    "update_rules": {"update_rules", "declare"},
    "optim": {"optim", "layers", "update_rules", "subspace", "declare", "text"},
    "subzero": {"subzero", "hub", "optim", "subspace", "declare", "text", "version"},
    "estimate": {"estimate", "subzero", "optim", "layers", "update_rules", "subspace"},
    "trainer": {
        "trainer",
        "subzero",
        "hub",
        "layers",
        "optim",
        "update_rules",
        "subspace",
        "declare",
        "names",
        "text",
    },
    "hub": {"hub", "optim", "update_rules", "subspace", "text", "version"},
    "interop": {"interop", "hub", "optim", "update_rules", "subspace", "text", "version"},
    "report": {"report", "trainer", "hub", "optim", "update_rules", "subspace", "text", "version"},
    "cli": None,
    "version": set(),
    "text": set(),
    "declare": set(),
    "names": {"optim", "subzero"},
    "startup": {"names", "trainer"},
    "__init__": None,
    "__main__": None,
}
# The floors of `optim`, from the ground up: a file may import those of its own floor and of lower ones.
FLOORS = [
    {"options", "selection"},
    {"step"},
    {"arrival", "differences", "fitting", "groups", "loading", "statistics"},
    {"saving"},
    {"osd"},
    {"memory"},
    {"summary"},
    {"factory"},
]
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


def place_of(file: Path) -> str:
    """The folder, or a file beside the folders."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_the_scan_finds_imports():
    file = PACKAGE / "optim" / "example.py"
    text = "import os.path\nfrom . import plan\nfrom ..subspace import svd\nfrom .. import trainer\n"
    text += "def f():\n import peft"
    found = set(imports(ast.parse(text), file))
    assert found == {"os.path", "hf_osd.optim.plan", "hf_osd.subspace.svd", "hf_osd.trainer", "peft"}
    assert "peft" not in set(imports(at_module_level(ast.parse(text)), file))
    assert {place_of(file) for file in FILES} == ALLOWED.keys()


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_go_down_only(file):
    allowed = ALLOWED[place_of(file)]
    for name in imports(parse(file), file):
        parts = name.split(".")
        if parts[0] == "hf_osd" and allowed is not None:
            assert len(parts) > 1 and parts[1] in allowed, name


def room_of(file: Path) -> str:
    """Folder or file directly in `optim`."""
    return file.relative_to(PACKAGE / "optim").parts[0].removesuffix(".py")


def test_every_room_of_optim_has_a_floor():
    rooms = {room_of(file) for file in (PACKAGE / "optim").rglob("*.py")} - {"__init__"}
    assert rooms == set().union(*FLOORS)


@pytest.mark.parametrize(
    "file", sorted((PACKAGE / "optim").glob("*/*.py")) + sorted((PACKAGE / "optim").glob("[!_]*.py")), ids=name_of
)
def test_floors_of_optim(file):
    (floor,) = [number for number, rooms in enumerate(FLOORS) if room_of(file) in rooms]
    below = set().union(*FLOORS[: floor + 1])
    for name in imports(parse(file), file):
        parts = name.split(".")
        if parts[:2] == ["hf_osd", "optim"]:
            assert parts[2] in below, name


def module_graph() -> dict[str, set[str]]:
    """Module -> modules that it imports anywhere: for type checkers alone and inside functions, too."""
    names = {}
    for file in FILES:
        parts = ["hf_osd", *file.relative_to(PACKAGE).with_suffix("").parts]
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    graph: dict[str, set[str]] = {}
    for module, file in names.items():
        found = set()
        for name in imports(parse(file), file):
            while name and name not in names:
                name = name.rpartition(".")[0]
            found.add(name)
        graph[module] = found - {"", module}
    return graph


def test_there_are_no_circles():
    """Of knowledge: what is imported for types only, or late, is known all the same."""
    graph = module_graph()
    assert sum(map(len, graph.values())) > 300
    while free := {module for module, found in graph.items() if not found & graph.keys()}:
        graph = {module: found for module, found in graph.items() if module not in free}
    assert not graph, sorted(graph)


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
{before}
before = {{name.split(".")[0] for name in sys.modules}}
{ours}
print("NEW", *{{name.split(".")[0] for name in sys.modules}} - before - set(sys.stdlib_module_names))
"""


def libraries(ours: str, before: str = "") -> set[str]:
    """What a line of ours imports, by its first name, beside the standard library."""
    code = NEW.format(before=before, ours=ours)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("NEW")]
    return set(line.split()[1:])


def test_importing_us_loads_no_library():
    assert libraries("import hf_osd") == {"hf_osd"}


def test_our_part_of_a_trainer_loads_nothing_beyond_it():
    assert libraries("import hf_osd; hf_osd.OSDTrainer", before="import transformers.trainer") == {"hf_osd"}


def test_a_loop_without_trainer_needs_torch_only():
    ours = "from hf_osd import OSD, ProjectionState, SubspaceRule, create_osd_optimizer"
    assert libraries(ours, before="import torch") == {"hf_osd"}


def test_type_checkers_find_every_name_where_it_comes_from():
    block = next(node for node in parse(PACKAGE / "__init__.py").body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {name.removeprefix("hf_osd.") for name in imports(block, PACKAGE / "__init__.py")}
    assert seen == {f"{home}.{name}" for name, home in hf_osd._HOMES.items()}
    assert hf_osd._HOMES.keys() | {"__version__"} == set(hf_osd.__all__)
    folders = {place_of(file) for file in FILES if file.parent != PACKAGE}
    assert set(hf_osd._PACKAGES) == folders - {"cli"}


def test_names_are_found_when_asked_for():
    for name in (*hf_osd.__all__, *hf_osd._PACKAGES):
        assert getattr(hf_osd, name) is not None and name in dir(hf_osd)
    assert hf_osd.OSD is hf_osd.optim.OSD
    with pytest.raises(AttributeError, match="module 'hf_osd' has no attribute 'OSDD'"):
        hf_osd.OSDD  # noqa: B018


def test_the_version_is_readable_without_dependencies():
    code = f"import runpy, sys\nprint(runpy.run_path({str(PACKAGE / 'version.py')!r})['__version__'])\n"
    done = subprocess.run(
        [sys.executable, "-c", code + "assert 'torch' not in sys.modules"], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == hf_osd.__version__
