"""`moeprune <command> ...`. Imports a command only when it is called, so that help and planning start at once.

Bad input ends in one sentence on standard error and exit code 2.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, get_args

from moeprune import __version__, registry
from moeprune.errors import UserError, suggest

LITERALS = "[({'\""  # what quoted or bracketed values begin with

# command -> (module, what it does); each module has a function `run(args)` or `command(...)` whose signature is its help
COMMANDS = {
    "fit": ("moeprune.training.cli", "train; prune while training; go on training"),
    "validate": ("moeprune.training.cli", "loss by domain on the validation split"),
    "test": ("moeprune.training.cli", "loss by domain on the test split"),
    "predict": ("moeprune.training.cli", "log-probabilities of the test split's tokens"),
    "prune": ("moeprune.commands.prune", "prune a checkpoint once and write it"),
    "calibrate": ("moeprune.commands.calibrate", "measure a model once and save the evidence, for any number of plans"),
    "plan": (
        "moeprune.commands.plan",
        "plan from recorded loads or saved evidence, or compare many plans; no model needed",
    ),
    "simulate": ("moeprune.commands.simulate", "predict step time and memory on many devices from recorded loads"),
    "export": (
        "moeprune.commands.export",
        "write moeprune's own model for transformers, or a transformers model as its own",
    ),
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
    except BrokenPipeError:  # whoever reads has seen enough: moeprune plugins | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
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

    class Parser(Sentences, ArgumentParser):
        pass

    for problem in names.install(*kinds):
        print(f"moeprune: left out: {problem}", file=sys.stderr)
    parser = Parser(prog=f"moeprune {name}", description=COMMANDS[name][1])
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file with these options; may be given often")
    parser.add_function_arguments(command, as_group=False, sub_configs=True)
    # The first positional argument may stand for the option of that name (moeprune plugins pruner).
    positional = getattr(command, "positional", None)
    if positional and args and not args[0].startswith("-"):
        args = [f"--{positional}={args[0]}", *args[1:]]
    # A switch needs no value: --check is --check=true.
    switches = {f"--{p.name}" for p in inspect.signature(command).parameters.values() if isinstance(p.default, bool)}
    args = [
        f"{arg}=true" if arg in switches and (not following or following.startswith("-")) else arg
        for arg, following in zip(args, [*args, ""][1:], strict=True)
    ]
    for path in configs(args):
        read_recipe(path)
    config = parser.parse_args(args)
    plain = getattr(command, "plain", False)  # its YAML describes classes that somebody else makes
    options = config.as_dict() if plain else parser.instantiate_classes(config).as_dict()
    options.pop("config", None)
    return command(**options)


class ArgumentError(UserError):
    """What is wrong with one argument: the reason, and its dotted key ('' if there is none)."""

    def __init__(self, reason: str, key: str = "") -> None:
        super().__init__(f"{key}: {reason}" if key else reason)
        self.key, self.reason = key, reason


class Sentences:
    """Mixed into an ArgumentParser: errors are one sentence each, raised instead of printed with the usage."""

    def error(self, message: str, ex: BaseException | None = None) -> NoReturn:
        """Raise `message` as a sentence.

        Raises:
            ArgumentError: always.
        """
        raise explain(self, message, ex) from ex

    def instantiate_classes(self, *args: Any, **kwargs: Any) -> Any:
        """As jsonargparse does; what a constructor has to say is not wrapped in jsonargparse's own text.

        Raises:
            UserError: an argument that a constructor refuses.
        """
        try:
            return super().instantiate_classes(*args, **kwargs)  # type: ignore[misc]
        except ValueError as error:
            for cause in _causes(error):
                if isinstance(cause, UserError):
                    raise cause from None
            raise


def explain(parser: Any, message: str, error: BaseException | None) -> ArgumentError:
    """What jsonargparse says, which is exact but long, as one sentence.

    Its errors are chained: each names the key that it adds, a union's cause is what its first member said, and the last
    is the reason. A nested parser (of a class's options) has explained its own error before, with its own options.
    """
    keys: list[str] = []
    union = ""
    leaf = message
    for cause in _causes(error):
        if str(cause).startswith("\n- Expected a path but"):
            continue  # a copy of its cause, with this in front
        if isinstance(cause, ArgumentError):
            return ArgumentError(cause.reason, ".".join(filter(None, [*keys, cause.key])))
        if isinstance(cause, UserError):
            return ArgumentError(str(cause), ".".join(keys))
        leaf = str(cause)
        parser = getattr(cause, "subcommand_parser", parser)
        if key := re.match(r'Parser key "([^"]+)"', leaf):
            keys.append(key[1])
            leaf = leaf.partition(":")[2].strip()
        elif leaf.startswith("Does not validate against any of the Union"):
            union = leaf
        elif leaf.startswith("Problem with given class_path"):
            break  # what an import had to say is in it
    key_path = ".".join(keys)
    return ArgumentError(_reason(parser, key_path, leaf, union), key_path)


def _reason(parser: Any, key: str, leaf: str, union: str) -> str:
    """The reason in our words where jsonargparse's are hard to read; its own first line otherwise."""
    if match := re.match(r"unrecognized arguments: (\S+)", leaf):
        option = match[1].partition("=")[0]
        if not option.startswith("-"):
            return f"unexpected argument {option!r}; options are written --name=value"
        return _unknown(option, [o for action in parser._actions for o in action.option_strings if o.startswith("--")])
    if match := re.match(r"(?:Subcommand|Group|Option) '([^']+)'.*?(?:accept option '([^']+)'|is not accepted)", leaf):
        option = match[2] or match[1]
        prefix = f"{match[1]}." if leaf.startswith("Group") else ""
        dests = [action.dest for action in parser._actions]
        return _unknown(prefix + option, [d for d in dests if not re.fullmatch(r"(.*\.)?help|print_shtab", d)])
    if match := re.match(r"(?:the following arguments are required|Key \S+ is required).*?: (.*)", leaf):
        return f"missing: {match[1]}; give a value"
    if kind := _kind(parser, key):
        given = re.match(
            r"(?:Expected a dot import path string: |Problem with given class_path '|Import path )([^\s']*)", leaf
        )
        if given and re.fullmatch(r"\w+", given[1]):
            try:
                registry.lookup(kind, given[1]).load()
            except UserError as problem:
                return str(problem)
        known = ", ".join(sorted({entry.name for entry in registry.entries(kind)}))
        if given and leaf.startswith("Problem"):
            return f"cannot import {given[1]!r} ({_last_line(leaf)}); known: {known}, or the path of a class"
        if given and leaf.startswith("Import path"):
            return f"{given[1]!r} does not derive from {registry.KINDS[kind].replace(':', '.')}; known: {known}"
        if not leaf.startswith("Expected a <"):
            return f"give the name of a {kind} (known: {known}), or class_path and init_args"
    if match := re.match(r"Expected a (.+?)(?:\. Got value: (.*))?$", leaf, re.DOTALL):
        types, value = match[1], match[2]
        if union:
            types = re.sub(r", <class 'NoneType'>", "", re.search(r"Subtypes: \[(.*)\]\nErrors", union)[1])  # type: ignore[index]
            value = union.rpartition("\nGiven value: ")[2]
        nested = re.match(r"NestedArg\(key='[^']*', val=(.*)\)$", value or "")
        value = nested[1] if nested else value
        return f"expected {_types(types)}, got {value if value and value[0] in LITERALS else repr(value)}"
    return " ".join(leaf.partition("\nSubclass types expect")[0].split())


def _unknown(option: str, known: list[str]) -> str:
    near = difflib.get_close_matches(option, known, n=3, cutoff=0.6)
    names = " or ".join(near) if near else ", ".join(known if len(known) < 20 else [])
    hint = f"did you mean {names}?" if near else f"known: {names}" if names else "see --help"
    return f"there is no option {option}; {hint}"


def _types(text: str) -> str:
    """Types as a person writes them: int, list[float], 'per_layer' or 'uniform'."""
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>|(?:\w+\.)+(\w+)", lambda m: m[1] or m[2], text)
    text = re.sub(r"Literal\[(.*?)\]", r"\1", text)
    return " or ".join(re.split(r", (?![^\[]*\])", text))


def _kind(parser: Any, key: str) -> str:
    """The kind of strategy that the argument `key` of `parser` takes; '' if it takes something else."""
    for action in getattr(parser, "_actions", ()):
        if action.dest == key:
            hints = [getattr(action, "_typehint", None)]
            while hints:
                hint = hints.pop()
                contract = f"{getattr(hint, '__module__', '')}:{getattr(hint, '__qualname__', '')}"
                for kind, value in registry.KINDS.items():
                    if value == contract:
                        return kind
                hints += get_args(hint)
    return ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1].strip()


def configs(args: list[str]) -> list[Path]:
    """The files that `args` give as --config."""
    return [
        Path(arg.partition("=")[2] if "=" in arg else following)
        for arg, following in zip(args, [*args, ""][1:], strict=True)
        if arg.startswith("--config=") or (arg == "--config" and following)
    ]


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe as plain data.

    Raises:
        UserError: no such file, or no YAML mapping; file and line are named.
    """
    import yaml

    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"there is no recipe at {path}; check the path") from error
    except OSError as error:
        raise UserError(f"cannot read the recipe {path}: {error.strerror}; give a YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        at = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise UserError(f"YAML error in {path}{at}: {getattr(error, 'problem', None) or 'not UTF-8 text'}") from error
    if not isinstance(data, dict):
        raise UserError(f"the recipe {path} is no YAML mapping of options; write lines of the form `option: value`")
    return data


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
