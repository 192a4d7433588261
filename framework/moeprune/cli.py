"""`moeprune <command> ...`. Imports a command only when it is called, so that help and planning start at once.

Bad input ends in one sentence on standard error and exit code 2.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

from moeprune import __version__
from moeprune.errors import UserError, suggest

# command -> (module, what it does); each module has a function `run(args)` or `command(...)` whose signature is its help
COMMANDS = {
    "fit": ("moeprune.training.cli", "train; prune while training; go on training"),
    "validate": ("moeprune.training.cli", "loss by domain on the validation split"),
    "test": ("moeprune.training.cli", "loss by domain on the test split"),
    "predict": ("moeprune.training.cli", "log-probabilities of the test split's tokens"),
    "prune": ("moeprune.commands.prune", "prune a checkpoint once and write it"),
    "plan": ("moeprune.commands.plan", "plan from recorded loads alone; no model needed"),
    "evaluate": ("moeprune.commands.evaluate", "score a model with a suite of lm-eval tasks"),
    "compare": ("moeprune.commands.compare", "train, prune and score many variants; one table, plots, a report"),
    "plugins": ("moeprune.commands.plugins", "list what is registered, and from which distribution"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 if part of the work failed, 2 for bad input, 130 if interrupted."""
    args = sys.argv[1:] if argv is None else argv
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if args[0] == "--version":
        print(f"moeprune {__version__}")
        return 0
    try:
        if args[0] not in COMMANDS:
            raise UserError(suggest("command", args[0], list(COMMANDS)))
        module = import_module(COMMANDS[args[0]][0])
        if hasattr(module, "command"):
            code = call(args[0], module.command, args[1:], getattr(module, "KINDS", ()))
            return code if isinstance(code, int) else 0
        module.run(None if argv is None else args)
    except UserError as error:
        print(f"moeprune: error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if error.errno is None or error.filename is None:
            raise
        print(f"moeprune: error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moeprune: interrupted", file=sys.stderr)
        return 130
    return 0


def call(name: str, command: Callable[..., Any], args: list[str], kinds: tuple[str, ...]) -> Any:
    """Parse `args` by the signature and docstring of `command` and call it.

    Args:
        name: of the command.
        command: its options are keyword arguments; strategies are given by short name or class path.
        args: from the command line.
        kinds: kinds of strategies whose short names it takes.

    Raises:
        UserError: whatever is wrong with the arguments, in one sentence.
    """
    from jsonargparse import ActionConfigFile, ArgumentParser  # type: ignore[attr-defined]

    from moeprune import names

    class Parser(ArgumentParser):
        def error(self, message: str, ex: Exception | None = None) -> Any:
            raise UserError(explain(message)) from ex

    for problem in names.install(*kinds):
        print(f"moeprune: left out: {problem}", file=sys.stderr)
    parser = Parser(prog=f"moeprune {name}", description=COMMANDS[name][1])
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file with these options; may be given often")
    parser.add_function_arguments(command, as_group=False, sub_configs=True)
    # The first positional argument may stand for the option of that name (moeprune plugins pruner).
    positional = getattr(command, "positional", None)
    if positional and args and not args[0].startswith("-"):
        args = [f"--{positional}={args[0]}", *args[1:]]
    config = parser.parse_args(args)
    options = parser.instantiate_classes(config).as_dict()
    options.pop("config", None)
    return command(**options)


def explain(message: str) -> str:
    """One sentence out of what jsonargparse says, which is exact but long: innermost cause first, near names added."""
    from moeprune import registry

    text = re.sub(r"\s+", " ", message).strip()
    missing = re.search(
        r"(?:Expected a dot import path string|Problem with given class_path|Import path .*?): ?'?([\w.]+)'?", text
    )
    key = re.search(r"Parser key \"([\w.]+)\"|for key \"([\w.]+)\"", text)
    where = next((g for g in key.groups() if g), "") if key else ""
    if "Unable to load config" in text or "while parsing" in text or "while scanning" in text:
        at = re.search(r'in "([^"]+)", line (\d+)', text)
        return f"{where + ': ' if where else ''}{_yaml(text, at)}"
    if missing and "." not in missing[1]:
        kind = where.rpartition(".")[2].rstrip("s")
        kind = kind if kind in registry.KINDS else next((k for k in registry.KINDS if k in where), "")
        if kind:
            try:
                registry.lookup(kind, missing[1])
            except UserError as reason:
                return f"{where}: {reason}"
    return text


def _yaml(text: str, at: re.Match[str] | None) -> str:
    return f"YAML error in {at[1]}, line {at[2]}" if at else text


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "moeprune: prune the experts of Mixture-of-Experts language models, during training or after it",
        "",
        "usage: moeprune <command> [options]      (moeprune <command> --help for the options)",
        "",
        *(f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
