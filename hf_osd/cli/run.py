"""`hf-osd run`: run a script that knows nothing of hf_osd with the optimizer's names registered."""

import argparse
import io
import os
import runpy
import sys
import types


SUMMARY = "register the osd_ optimizers with transformers, then run a script or module as __main__"
USAGE = f"""usage: hf-osd run (script.py | -m module) [arguments ...]

{SUMMARY}

  hf-osd run train.py --optim osd_adamw8bit --output_dir out
  hf-osd run run_glue.py --optim osd_adamw8bit --optim_args rank=8 --optim_target_modules all-linear ...
  hf-osd run -m trl.scripts.sft --optim osd_adamw8bit ...
  hf-osd run -m trl.cli.main sft --optim osd_adamw8bit ...
  accelerate launch -m hf_osd run -m trl.scripts.sft --optim osd_adamw8bit ...
  torchrun --nproc_per_node 2 -m hf_osd run train.py --optim osd_adamw8bit ...

Python processes that it starts know the names, too: torch.multiprocessing.spawn, accelerate launch, torchrun."""

CHILDREN = os.path.join(os.path.dirname(os.path.abspath(__file__)), "children")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Name the sub-command in the help of `hf-osd`; `main` hands its arguments to `run` as they are."""
    commands.add_parser("run", help=SUMMARY)


def run(command: list[str]) -> None:
    """Run `command` as `python command` would."""
    if not command or command[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if command else 2)
    if command[0] in ("-m", "--module"):
        if len(command) == 1:
            raise SystemExit("hf-osd run: -m needs the name of a module.")
        _register_and_set(command[1:], os.getcwd())
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        return
    script = os.path.abspath(command[0])
    if not os.path.isfile(script):
        raise SystemExit(f"hf-osd run: there is no script {command[0]!r}. Use -m for a module.")
    _register_and_set(command, os.path.dirname(os.path.realpath(script)))  # Python's choice for a symbolic link
    _run_script(script)


def _run_script(path: str) -> None:
    """What `python path` does. `runpy.run_path` would replace the script's argv[0] by the absolute path."""
    main = types.ModuleType("__main__")
    main.__file__ = path
    sys.modules["__main__"] = main
    with io.open_code(path) as file:
        exec(compile(file.read(), path, "exec"), vars(main))


def _register_and_set(argv: list[str], folder: str) -> None:
    import hf_osd  # noqa: F401 - registers the names

    # Python processes that the script starts look here first and find `sitecustomize.py`.
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [CHILDREN, os.environ.get("PYTHONPATH")]))
    sys.argv = argv
    sys.path.insert(0, folder)
