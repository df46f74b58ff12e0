import json

from docstrings import collect_docstrings, docstrings_file, docstrings_of_source


LONG = "Explains at some length what the function does, which is more than eighty characters take. "


def write_package(folder):
    (folder / "sub").mkdir(parents=True)
    (folder / "b.py").write_text(f'"""{LONG}module b"""\nclass C:\n    """{LONG}class"""\n    def f(self): "short"\n')
    (folder / "a.py").write_text(f'def f():\n    """{LONG}function\n\n    Indented."""\n    return "\\d"\n')
    (folder / "sub" / "copy.py").write_text(f'"""{LONG} \n  module   b"""\n')
    (folder / "template.py").write_text("def {{name}}(:\n")
    return folder


def test_docstrings_of_modules_classes_functions():
    source = '"""M"""\nclass C:\n    """C"""\n    async def f(self):\n        """F"""\n        x = "not one"\n'
    assert list(docstrings_of_source(source)) == ["M", "C", "F"]


def test_collection_is_sorted_distinct_and_skips_short_and_broken(tmp_path):
    package = write_package(tmp_path / "package")
    collected = collect_docstrings([package])
    assert collected == [LONG + "function\n\nIndented.", LONG + "module b", LONG + "class"]
    assert collect_docstrings([package]) == collected


def test_file_is_written_once_and_named_by_version():
    path = docstrings_file(("tokenizers",))
    first = path.read_bytes()
    texts = [json.loads(line)["text"] for line in first.decode().splitlines()]
    assert path.name.startswith("tokenizers-") and len(texts) > 10 and len(texts) == len(set(texts))
    path.write_bytes(b"kept")
    assert docstrings_file(("tokenizers",)).read_bytes() == b"kept"
    path.unlink()
    assert docstrings_file(("tokenizers",)).read_bytes() == first
    assert [file.name for file in path.parent.iterdir()] == [path.name]
