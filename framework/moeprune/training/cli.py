"""`moeprune fit | validate | test | predict`: LightningCLI with the model, the data and the pruning of this package."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import ActionConfigFile  # type: ignore[attr-defined]
from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import MisconfigurationException  # type: ignore[attr-defined]

from moeprune import names
from moeprune.checkpoints import ENTRY, Checkpoint, differing_fields, read_lightning
from moeprune.cli import Sentences, read_recipe
from moeprune.errors import UserError
from moeprune.interop import native
from moeprune.model.config import MoEConfig
from moeprune.training.callbacks import LastCheckpoint, Predictions, RandomState, RunRecorder
from moeprune.training.data import TextData
from moeprune.training.expert_pruning import ExpertPruning
from moeprune.training.module import MoELanguageModel

KINDS = ("pruner", "criterion", "allocation", "trigger", "balancer", "placement")
SECTIONS = ("data", "model", "pruning", "checkpoint", "trainer")


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` into the run's folder; refuses a folder that holds another run."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Before anything is trained."""
        if stage != "fit" or getattr(trainer, "fast_dev_run", False):
            return
        folder = Path(trainer.default_root_dir)
        start = trainer.ckpt_path or getattr(self.config, "ckpt_path", None)
        own = start is not None and Path(start).resolve().parent == folder.resolve()
        if not own and (folder / "history.jsonl").exists():
            checkpoint = folder / "last.ckpt"
            ways = f"continue it with --ckpt_path={checkpoint}, or " if checkpoint.exists() else "remove it, or "
            raise UserError(
                f"{folder} already holds a run; {ways}choose another folder with --trainer.default_root_dir"
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Once the model is built and its checkpoint read: what is refused before leaves no file."""
        if not getattr(trainer, "fast_dev_run", False):
            self.overwrite = True
            super().setup(trainer, pl_module, "fit")


class AnyForm(TorchCheckpointIO):
    """Reads checkpoints in pieces as well (`moeprune.parallel.pieces`)."""

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any = "cpu",
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """The whole checkpoint, without unpickling anything but tensors and plain data."""
        if Path(path).is_dir():
            return read_lightning(path)
        return super().load_checkpoint(path, map_location, weights_only)


class Parser(Sentences, LightningArgumentParser):
    """Errors as one sentence."""


class CLI(LightningCLI):
    """The training command line. The checkpoint never overrides the command line: see `_parse_ckpt_path`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """`pruning:` and `checkpoint:` as keys of their own; sizes that follow from the data."""
        parser.add_lightning_class_args(ExpertPruning, "pruning")
        parser.add_lightning_class_args(LastCheckpoint, "checkpoint")
        parser.link_arguments("data.vocab_size", "model.config.vocab_size")
        parser.link_arguments("data.seq_len", "model.config.max_seq_len")

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """See `Parser`."""
        parser = Parser(**kwargs)
        parser.add_argument(
            "-c", "--config", action=ActionConfigFile, help="Path to a recipe in YAML; may be given often."
        )
        parser.add_argument("--base", type=str | None, help="In a recipe: the recipe it builds on, relative to it.")
        return parser

    def before_instantiate_classes(self) -> None:
        """Read the checkpoint once before anything is made, and let `model.checkpoint` say the sizes.

        Raises:
            UserError: there is none, it is corrupt, not moeprune's, or holds no training state; see `start_from`.
        """
        config = self.config[self.subcommand] if self.subcommand else self.config
        path = config.get("ckpt_path")
        if config.model.checkpoint is not None:
            start_from(config, self.given)
        elif self.subcommand in ("validate", "test", "predict") and not path:
            print("moeprune: no --ckpt_path given: this is a fresh, untrained model", file=sys.stderr)
        if path and path not in ("best", "last", "hpc"):  # names that Lightning resolves itself
            data = read_lightning(path, weights=not Path(path).is_dir())
            Checkpoint.from_entry(data.get(ENTRY, {}), {}, str(path))
            if "pytorch-lightning_version" not in data:
                raise UserError(
                    f"{path} holds weights but no training state; give a checkpoint that `moeprune fit` wrote"
                )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """As Lightning does; the arguments are kept, to tell what was asked for from what is a default."""
        self.given = [str(arg) for arg in args or ()]
        super().parse_arguments(parser, args)

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """As Lightning does.

        Raises:
            UserError: options that Lightning's Trainer refuses.
        """
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except UserError:
            raise
        except (ValueError, MisconfigurationException) as error:
            raise UserError(f"trainer: {' '.join(str(error).split())}") from error
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = AnyForm()
        return trainer

    def _parse_ckpt_path(self) -> None:
        """LightningCLI would let hyper-parameters stored in the checkpoint override YAML and command line silently."""


def start_from(config: Any, given: list[str]) -> None:
    """Put the sizes of `model.checkpoint` and its tokenizer into a parsed configuration; recipes do not count against them.

    Args:
        config: of a subcommand; changed in place.
        given: the arguments of the command line.

    Raises:
        UserError: the checkpoint cannot be read, holds no tokenizer, or the command line asks for something else.
    """
    path = config.model.checkpoint
    start = native.read(path, weights=False)
    asked = MoEConfig.from_dict(_plain(config.model.config))
    named = {match[1] for arg in given if (match := re.match(r"--model\.config\.(\w+)", arg))}
    if any(re.match(r"--model\.config(=|$)", arg) for arg in given):
        named |= asked.to_dict().keys() - {"vocab_size", "max_seq_len"}
    for name in differing_fields(asked, start.config):
        if name in named:
            raise UserError(
                f"--model.config.{name} asks for {getattr(asked, name)}, but model.checkpoint={path} has "
                f"{getattr(start.config, name)}; leave it out: sizes come from the checkpoint"
            )
    V, S = start.config.vocab_size, start.config.max_seq_len
    if any(re.match(r"--data\.vocab_size(=|$)", arg) for arg in given) and config.data.vocab_size != V:
        raise UserError(
            f"--data.vocab_size asks for {config.data.vocab_size}, but model.checkpoint={path} has {V}; leave it out"
        )
    if config.data.seq_len > S:
        raise UserError(
            f"data.seq_len={config.data.seq_len} is more than the {S} that model.checkpoint={path} takes; lower it"
        )
    if config.data.tokenizer is None:
        if not start.tokenizer:
            raise UserError(
                f"model.checkpoint={path} holds no tokenizer.json, without which no text can be read for it; put the model's "
                f"tokenizer there, or name it with --data.tokenizer"
            )
        config.data.tokenizer = path
    elif start.tokenizer and native.read_tokenizer(config.data.tokenizer)[0] != start.tokenizer:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} is another tokenizer than that of model.checkpoint={path}; leave it out"
        )
    config.data.vocab_size = V
    for name, value in start.config.to_dict().items():
        config.model.config[name] = value


def _plain(config: Any) -> dict[str, Any]:
    """A parsed MoEConfig as plain data."""
    plain: dict[str, Any] = config.as_dict() if hasattr(config, "as_dict") else config.to_dict()
    return plain


def with_bases(args: list[str]) -> list[str]:
    """The arguments with every `--config X` preceded by the recipes that X names under `base:`, oldest first.

    Raises:
        UserError: a recipe that does not exist, is no YAML mapping, or is its own base.
    """
    out: list[str] = []
    queue = list(args)
    while queue:
        arg = queue.pop(0)
        flag, equals, value = arg.partition("=")
        if flag not in ("-c", "--config"):
            out.append(arg)
            continue
        if not equals:
            if not queue:
                raise UserError(f"{flag} needs the path of a recipe")
            value = queue.pop(0)
        out += [f"--config={path}" for path in lineage(Path(value))]
    return out


def lineage(path: Path, heirs: tuple[Path, ...] = ()) -> list[Path]:
    """The recipe at `path` and all it builds on, oldest first; see `with_bases`."""
    if path.resolve() in heirs:
        raise UserError(f"the recipe {path} is its own base; remove the line `base:` from one of them")
    recipe = read_recipe(path)
    for section in SECTIONS:
        if not isinstance(recipe.get(section) or {}, dict):
            raise UserError(
                f"{section}: {recipe[section]!r} in the recipe {path} is no mapping of options; indent them"
            )
    base = recipe.get("base")
    if base is None:
        return [path]
    if not isinstance(base, str):
        raise UserError(f"base: {base!r} in the recipe {path} is no path; give the recipe it builds on")
    return [*lineage(path.parent / base, (*heirs, path.resolve())), path]


def run(args: list[str] | None = None, execute: bool = True) -> CLI:
    """Run `moeprune <args>`, args[0] being fit, validate, test or predict; None for the process's own arguments.

    Args:
        args: the arguments; with `execute=False` without the subcommand.
        execute: False only builds model, data and trainer.

    Raises:
        UserError: bad input, in one sentence.
    """
    quiet()
    for problem in names.install(*KINDS):
        print(f"moeprune: left out: {problem}", file=sys.stderr)
    if args is not None:
        sys.argv[1:] = args  # Lightning starts further processes of a run with these
    return CLI(
        MoELanguageModel,
        TextData,
        args=with_bases(sys.argv[1:]),
        run=execute,
        save_config_callback=SaveConfig,
        seed_everything_default=0,
        trainer_defaults={
            "logger": False,
            "default_root_dir": "runs/unnamed",
            "num_sanity_val_steps": 0,
            "callbacks": [RunRecorder(), RandomState(), Predictions()],
        },
    )


def quiet() -> None:
    """Silence messages that tell a user of this package nothing."""
    for pattern in (
        ".*LeafSpec.*",
        ".*LightningCLI's args parameter.*",
        ".*does not have many workers.*",
        ".*compute.. method of metric.*was called before the ..update.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*Found .* module.* in eval mode at the start of training.*",
        ".*lr_scheduler.step.*before.*optimizer.step.*",
        ".*sync_dist=True.*",
        ".*FSDP2-wrapped module .* returned a view tensor.*",  # nothing adds to logits in place
    ):
        warnings.filterwarnings("ignore", pattern)

    def wanted(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        return not any(
            part in text
            for part in ("Tip:", "litlogger", "TPU available", "`weights_only` was not set", "was configured so")
        )

    for name in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.trainer.connectors.checkpoint_connector"):
        logging.getLogger(name).addFilter(wanted)
