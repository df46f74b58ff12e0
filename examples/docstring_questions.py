"""Questions and answers without a download: what the functions and classes of the installed `torch` package do.

About 1,900 short conversations such as `What does torch.fft.ifft2 do?`, each answered by the first paragraph of the
docstring. A small set to try supervised fine-tuning with, on real text that differs a little with torch's version.
"""

import ast
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from docstrings import cached_json_lines, package_folder


PACKAGES = ("torch",)
ANSWER_CHARACTERS = (40, 500)  # shorter ones say nothing, longer ones are whole sections
MARKUP = re.compile(r"[:*|>{}\\]{2}|\.\. |:\w+:|^\w+\(|[=~-]{4}")  # directives, signatures, tables: no prose

Message = dict[str, str]


def named_docstrings(source: str, module: str) -> Iterator[tuple[str, str, str]]:
    """Yields (kind, qualified name, docstring) of the public classes, functions and methods of a module.

    Args:
        source (`str`):
            The module's source.
        module (`str`):
            Its dotted name.
    """

    def visit(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.ClassDef, ast.FunctionDef)) and not child.name.startswith("_"):
                name = f"{prefix}.{child.name}"
                text = ast.get_docstring(child)
                if text:
                    yield ("class" if isinstance(child, ast.ClassDef) else "function"), name, text
                if isinstance(child, ast.ClassDef):
                    yield from visit(child, name)

    yield from visit(ast.parse(source), module)


def first_paragraph(docstring: str) -> str | None:
    """The first paragraph on one line, or `None` if it is not a text of a few sentences."""
    text = " ".join(docstring.split("\n\n")[0].split())
    shortest, longest = ANSWER_CHARACTERS
    if not shortest <= len(text) <= longest or not text.endswith(".") or MARKUP.search(text):
        return None
    return text.replace("``", "`")


def conversation(kind: str, name: str, answer: str) -> list[Message]:
    """One question and its answer."""
    question = f"What is `{name}` for?" if kind == "class" else f"What does `{name}` do?"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def collect_questions(root: Path, package: str) -> list[list[Message]]:
    """Collects the conversations about a package.

    Args:
        root (`Path`):
            The package's folder. Files are visited in sorted order, so the result depends on the sources only.
        package (`str`):
            Its name.

    Returns:
        `list[list[Message]]`: conversations of two messages, the first of those whose answers are equal.
    """
    distinct: dict[str, list[Message]] = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if any(part.startswith("_") and part != "__init__" for part in parts):
            continue
        module = ".".join([package, *(part for part in parts if part != "__init__")])
        try:
            found = list(named_docstrings(path.read_text(encoding="utf-8"), module))
        except (SyntaxError, UnicodeDecodeError, ValueError):  # templates and files for another Python version
            continue
        for kind, name, docstring in found:
            answer = first_paragraph(docstring)
            if answer is not None:
                distinct.setdefault(answer, conversation(kind, name, answer))
    return list(distinct.values())


def questions_file(packages: Sequence[str] = PACKAGES) -> Path:
    """Returns the JSON lines file (column `messages`) about the packages, written at the first call.

    Args:
        packages (`Sequence[str]`, *optional*, defaults to `PACKAGES`):
            Names of installed packages. The file's name holds their versions.
    """

    def rows() -> Iterator[dict[str, list[Message]]]:
        for package in packages:
            yield from ({"messages": one} for one in collect_questions(package_folder(package), package))

    return cached_json_lines("docstring_questions", packages, rows)
