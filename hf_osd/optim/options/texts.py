"""Texts about options that people and editors read: written files, made from the declarations by `make options`.

They are the signature and arguments of `OSD`, the fields of `OSDTrainingArguments` and the table of docs/options.md.
Each stands between two lines of its file; a test fails where it is not what this module makes.
"""

import re
from collections.abc import Iterator
from dataclasses import field
from pathlib import Path
from textwrap import wrap
from typing import Any

from ...declare import Option
from .mode import MODE_OPTIONS
from .preset_table import PRESETS, PUBLISHED
from .presets import KEYS, NAME_OPTIONS
from .table import OPTIONS, rule_default


PACKAGE = Path(__file__).parents[2]
WIDTH = 119
RESULTS = "../examples/benchmarks/results/cpu_2_cores"  # from docs/


def make_texts() -> dict[Path, str]:
    """Every file as it should be, by its path; the page only where there is one, beside the package."""
    osd, arguments = PACKAGE / "optim" / "osd.py", PACKAGE / "trainer" / "arguments.py"
    page = PACKAGE.parent / "docs" / "options.md"
    text = osd.read_text(encoding="utf-8")
    text = _between(text, "        lr (`float`", "        maximize (`bool`", docstring())
    text = _between(text, "        # options: ", "        # end of options", signature())
    found = {osd: text}
    text = arguments.read_text(encoding="utf-8")
    found[arguments] = _between(text, "    # options: ", "    # end of options", training_fields())
    if page.exists():
        text = page.read_text(encoding="utf-8")
        found[page] = _between(text, "<!-- options: ", "<!-- end of options", page_tables())
    return found


def _between(text: str, first: str, last: str, lines: Iterator[str]) -> str:
    """The text with other lines between the only line that starts with `first` and the next that does with `last`."""
    (start,) = [match.end() for match in re.finditer(rf"^{re.escape(first)}.*\n", text, re.MULTILINE)]
    end = re.compile(f"^{re.escape(last)}", re.MULTILINE).search(text, start)
    assert end is not None, last
    return text[:start] + "".join(f"{line}\n" for line in lines) + text[end.start() :]


def signature() -> Iterator[str]:
    """Parameters of `OSD.__init__`."""
    for own in (OPTIONS | MODE_OPTIONS).values():
        yield f"        {own.name}: {_type(own)} = {_literal(own.default)},"


def docstring() -> Iterator[str]:
    """The same in `OSD`'s docstring."""
    for own in (OPTIONS | MODE_OPTIONS).values():
        shown = f"`{_literal(own.default)}`" if isinstance(own.default, (str, bool)) else repr(own.default)
        default = "" if own.default is None else f", defaults to {shown}"
        kind = _type(own).removesuffix(" | None").replace(" | ", "` or `")
        head, help = f"        {own.name} (`{kind}`, *optional*{default}):", _help(own, whole=True)  # noqa: A001
        if len(head) + 1 + len(help) <= WIDTH:
            yield f"{head} {help}"
        else:
            yield head
            yield from wrap(help, WIDTH, initial_indent=12 * " ", subsequent_indent=12 * " ", break_long_words=False)


def training_fields() -> Iterator[str]:
    """Fields of `OSDTrainingArguments`."""
    for key, own in KEYS.items():
        yield f'    osd_{key}: {own.check.flag.__name__} | None = flag("{key}")'


def flag(key: str) -> Any:
    """A dataclass field with the help of an option, for `HfArgumentParser`."""
    return field(default=None, metadata={"help": _help(KEYS[key])})


def page_tables() -> Iterator[str]:
    """The tables of keys, one for each place where they are declared."""
    titles = dict.fromkeys(NAME_OPTIONS, "Presets and single modules")
    titles |= {name: "Of some rules only" if own.owners else "Of all optimizers" for name, own in OPTIONS.items()}
    titles |= dict.fromkeys(MODE_OPTIONS, "How steps are made")
    for title in dict.fromkeys(titles.values()):
        yield from ("", f"### {title}", "", "| key | default | |", "| --- | --- | --- |")
        for key, own in KEYS.items():
            if titles[own.name] == title:
                text = own.help.partition("\n\n")[0].replace("|", "\\|")
                yield f"| `{key}` | {_default(own)} | {_owned(own, text)} |".replace("|  |", "| |")
    yield from ("", "### What presets set", "", *preset_rows(), "")


def preset_rows() -> Iterator[str]:
    """The table of presets: what each sets, and where it comes from."""
    yield from ("| preset | sets | measured in |", "| --- | --- | --- |")
    for preset, own in PRESETS.items():
        for source in dict.fromkeys(where for _, where in own.settings.values()):
            values = (
                f"`{(OPTIONS | NAME_OPTIONS)[name].key}={_code(value).strip('`')}`"
                for name, (value, where) in own.settings.items()
                if where == source
            )
            where = source if source == PUBLISHED else f"[{source}]({RESULTS}/{source}.md)"
            yield f"| `preset={preset}` | {', '.join(values)} | {where} |"


def _help(own: Option, whole: bool = False) -> str:
    """The first paragraph, with the default where the signature has none, or all of it."""
    first, _, rest = own.help.partition("\n\n")
    told = own.default is not None and (whole or own.default is False)  # in the signature; what a flag is for
    default = "" if told else _default(own, whole)
    first = _owned(own, first) + (f" Defaults to {default}." if default else "")
    return f"{first} {rest}".strip() if whole else first.replace("`", "")


def _owned(own: Option, text: str) -> str:
    names = [f"`{name}`" for name in own.owners]
    return f"{text} For {_and(names)}." if names else text


def _default(own: Option, in_code: bool = False) -> str:
    """The default as text, empty where nothing is; `in_code` for the constructor rather than for a run."""
    if own.in_run and not in_code:
        return own.in_run
    if not own.owners:
        return _code(own.default) if own.default is not None else _name(own.unset)
    defaults: dict[str, list[str]] = {}
    for rule in own.owners:
        defaults.setdefault(_code(rule_default(rule, own.name)), []).append(f"`{rule}`")
    if len(defaults) == 1:
        return next(iter(defaults))
    return ", ".join(f"{value} with {_and(rules)}" for value, rules in defaults.items())


def _name(text: str | None) -> str:
    return f"`{text}`" if text and re.fullmatch(r"\w+", text) else text or ""


def _code(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"`{value}`"
    return f"{value:g}" if isinstance(value, float) else repr(value)


def _literal(value: Any) -> str:
    return f'"{value}"' if isinstance(value, str) else repr(value)


def _and(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _type(own: Option) -> str:
    text = own.type.__name__ if isinstance(own.type, type) and not hasattr(own.type, "__args__") else str(own.type)
    return re.sub(r"[\w.]+\.(\w+)", r"\1", text)


def main() -> None:
    """Write what has changed."""
    for path, text in make_texts().items():
        if path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
