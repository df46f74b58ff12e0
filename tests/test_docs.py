"""README and the pages of docs/: links, snippets, commands, keys and quoted messages are real, and pages are short."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import Trainer, TrainingArguments

import hf_osd
from hf_osd.optim import DEFAULT_RANK, OPTIM_NAMES, PRESETS
from hf_osd.optim.options.mode import LAYERWISE_SUFFIX
from hf_osd.optim.options.presets import KEYS
from hf_osd.optim.options.table import DEFAULTS
from hf_osd.subzero.options import KEYS as SUBZERO_KEYS
from hf_osd.trainer.optim_args import parse_optim_args
from reference.tiny_models import tiny_llama


ROOT = Path(__file__).parents[1]
PACKAGE = Path(hf_osd.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "model_cards" / "README.md", ROOT / "examples/benchmarks/README.md"]
TEXTS = {path: path.read_text(encoding="utf-8") for path in LINKED}
SNIPPETS = [(path.name, code) for path in PAGES for code in re.findall(r"```python\n(.*?)```", TEXTS[path], re.S)]
OPTIONS = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


@cache
def anchors(path: Path) -> set[str]:
    """Those that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", without_code(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", LINKED, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_and_anchors_resolve(path: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(TEXTS[path])):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        found = (path.parent / file).resolve() if file else path
        assert found.exists(), f"{path.name}: {target}"
        assert not anchor or anchor in anchors(found), f"{path.name}: {target}"


def test_every_page_is_found_and_short():
    index = TEXTS[ROOT / "docs" / "README.md"]
    for path in PAGES:
        lines = TEXTS[path].count("\n")
        assert lines < 250 if path.name == "README.md" else lines <= 300, f"{path.name} has {lines} lines"
        assert path.name == "README.md" or f"({path.name})" in index, f"{path.name} is not in docs/README.md"


def test_pages_and_sections_that_the_code_names_exist():
    sources = [*PACKAGE.rglob("*.py"), *(ROOT / "examples").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    for source in sources:
        text = source.read_text(encoding="utf-8")
        for name, _, section in re.findall(r"docs/(\w+\.md)(, \"([^\"]+)\")?", text):
            if name != "x.md":
                assert (ROOT / "docs" / name).is_file(), f"{source}: {name}"
                assert not section or f"## {section}\n" in TEXTS[ROOT / "docs" / name], f"{source}: {section}"


def test_files_and_experiments_that_pages_name_exist():
    experiments = {file.stem for file in (ROOT / "examples/benchmarks").glob("*.py")}
    experiments |= {file.stem for file in (ROOT / "examples/benchmarks/experiments").glob("*.json")}
    for path in PAGES:
        text = TEXTS[path]
        for file in set(re.findall(r"\b(?:examples|model_cards|tests)/[\w./]+\.(?:py|json|md|png|yaml)", text)):
            assert (ROOT / file).exists(), f"{path.name}: {file}"
        for name in re.findall(r"run\.py (\w+)", text):
            assert name in experiments, f"{path.name}: {name}"


@pytest.mark.parametrize(("page", "snippet"), SNIPPETS)
def test_snippets_are_python(page: str, snippet: str):
    ast.parse(snippet)


def test_names_and_keys_in_snippets_and_commands_exist():
    for path in PAGES:
        text = TEXTS[path]
        for name in re.findall(
            r"\bhf_osd\.([A-Za-z_]+)", "".join(code for page, code in SNIPPETS if page == path.name)
        ):
            assert hasattr(hf_osd, name), f"{path.name}: hf_osd.{name}"
        for name in re.findall(r"optim[= ]\"?((?:osd|rso)_\w+)", text):
            assert name in OPTIM_NAMES, f"{path.name}: {name}"
        given = [*re.findall(r"optim_args=\"([^\"]+)\"", text), *re.findall(r"--optim_args ([\w=.,]+=[\w.]+)", text)]
        for values in given:
            keys = {entry.partition("=")[0] for entry in values.split(",")}
            assert parse_optim_args(values, SUBZERO_KEYS if keys <= SUBZERO_KEYS.keys() else KEYS)
        for key in re.findall(r"--osd_(\w+)", text):
            assert key in KEYS or key == "exclude_modules", f"{path.name}: --osd_{key}"


def test_the_readmes_snippets_train(tmp_path: Path, monkeypatch):
    """As they stand, but for the number of steps and the rank of a model that is tiny."""
    monkeypatch.chdir(tmp_path)
    trainer, loop = [code for page, code in SNIPPETS if page == "README.md"][:2]
    tokens = torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))
    tiny = [("max_steps=10_000", "max_steps=2, use_cpu=True, report_to='none'"), ("rank=128", "rank=4")]
    for old, new in tiny:
        assert old in trainer + loop
        trainer, loop = trainer.replace(old, new), loop.replace(old, new)
    for code in (trainer, loop):
        model = tiny_llama()
        before = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
        rows = [{"input_ids": row, "labels": row} for row in tokens]
        batches = [{"input_ids": tokens, "labels": tokens}]
        names = {"hf_osd": hf_osd, "TrainingArguments": TrainingArguments, "Trainer": Trainer}
        exec(code, names | {"model": model, "dataset": rows, "batches": batches})
        assert not before.equal(model.model.layers[0].self_attn.q_proj.weight)


def test_the_options_table_is_complete_and_right():
    table = OPTIONS.split("<!-- options: ")[1].split("<!-- end of options -->")[0]
    named = set(re.findall(r"^\| `([a-z_]+)` \|", table, flags=re.MULTILINE))
    assert named == KEYS.keys()
    rows = dict(re.findall(r"^\| `([a-z_]+)` \| `?([^|`]+?)`? \|", table, flags=re.MULTILINE))
    assert float(rows["rank"]) == DEFAULT_RANK
    assert [float(rows[key]) for key in ("alpha", "lambda", "scale", "update_interval")] == [5, 0.1, 1, 200]
    assert rows["subspace"] == DEFAULTS["subspace"] and rows["init"] == DEFAULTS["init"]
    assert all(f"`{name}`" in OPTIONS for name in PRESETS)
    assert all(f"`{name}`" in OPTIONS or name.removesuffix(LAYERWISE_SUFFIX) != name for name in OPTIM_NAMES)
    assert f"`{LAYERWISE_SUFFIX}`" in OPTIONS


def test_the_options_of_subzero_are_on_its_page():
    page = TEXTS[ROOT / "docs" / "forward_only.md"]
    rows = dict(re.findall(r"^\| `([a-z_]+)` \|\s?`?([^|`]*)`? \|", page, re.MULTILINE))
    assert rows == {key: "" if own.default is None else str(own.default) for key, own in SUBZERO_KEYS.items()}


def test_messages_in_troubleshooting_are_those_of_the_code():
    said = " ".join("\n".join(map(messages, sorted(PACKAGE.rglob("*.py")))).split())
    page = TEXTS[ROOT / "docs" / "troubleshooting.md"].split("## No message")[0]
    rows = re.findall(r"^\| (?!message \||---)([^|]+) \|[^|]*\|[^|]*\|$", page, re.MULTILINE)
    assert len(rows) > 80
    for row in rows:
        for part in re.split(r"`?…`?", row):
            assert part.strip() in said, row


def messages(path: Path) -> str:
    """All texts of a file, with what is inserted left out."""
    tree, found = ast.parse(path.read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(part.value if isinstance(part, ast.Constant) else "\n" for part in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(re.sub(r"%\w", "\n", node.value))
    return "\n".join(found)
