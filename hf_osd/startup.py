"""Registration with transformers at the right moment: together with its Trainer, whoever imports that and when.

What `import hf_osd` promises concerns two modules of transformers that take seconds to import. Where they are imported
already, it is kept at once. Else a finder at the head of `sys.meta_path` has the finders behind it find them, and acts
when the module has been executed and before anybody else sees it:

    transformers.training_args    the names join its enum (`names.py`)
    transformers.trainer          handlers, callbacks and patches, and the names again (`trainer/patches.py`)

The first is imported in the middle of the second, and often without it. Both acts change nothing where they find all
done, and follow an `importlib.reload` too. What they raise fails the import: no run goes on without its optimizer.
They run under the import lock of transformers' module, so another thread waits for them as for the module itself
(threads that import parts of transformers at once can fail in its own circular imports, with us or without). No
module that they import may wait for it in another thread: `trainer/__init__.py` asks for Trainer before it imports
any, and the one that pickles name, `trainer/arguments.py`, is not among them.

A finder of others that puts itself before ours and loads these modules by itself (import hooks of type checkers at run
time do) keeps ours out: call `hf_osd.register()` then.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_in_time() -> None:
    """Register now what can be, and the rest when it is imported. Calling it again changes nothing."""
    if FINDER not in sys.meta_path:
        sys.meta_path.insert(0, FINDER)  # before we look: another thread may be about to import them
    for name in ACTS:
        if name in sys.modules:
            _act(import_module(name))  # which waits for a thread that has not finished importing it


def _add_names(module: ModuleType) -> None:
    from .names import add_names

    add_names(module.OptimizerNames)


def _register(module: ModuleType) -> None:
    from .trainer.patches import register

    register()


ACTS = {"transformers.training_args": _add_names, "transformers.trainer": _register}


def _act(module: ModuleType) -> None:
    try:
        ACTS[module.__name__](module)
    except Exception as error:
        version = getattr(sys.modules.get("transformers"), "__version__", "")
        # No RuntimeError: transformers makes "Could not import module 'Trainer'" of it.
        raise ImportError(f"hf_osd cannot register with transformers {version}: {error!r}") from error


class _Finder(MetaPathFinder):
    """Finds nothing by itself: it adds an act to what the finders behind it find."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in ACTS:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            find_spec = getattr(finder, "find_spec", None)  # Python passes over one without it, too
            spec = find_spec(fullname, path, target) if find_spec is not None else None
            if spec is not None and spec.loader is not None:
                spec.loader = _ThenAct(spec.loader)
                return spec
        return None


class _ThenAct(Loader):
    """Another loader, then our act. The module is left with the other loader alone, as if we had not been there."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _act(module)

    def __getattr__(self, name: str) -> Any:  # `get_code` and the like, of those who ask for a spec only
        return getattr(self._loader, name)


FINDER = _Finder()
