"""Started once per process by test_faults.py, as ep_script.py is: further patches, under which a run meets what goes wrong."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch
from ranks import RANK, signal_at_pass, start

from moeprune.model.transformer import MoETransformer
from moeprune.parallel.dispatch import AllToAll
from moeprune.training import expert_pruning, module
from moeprune.training.data import TextData
from moeprune.training.module import MoELanguageModel

DEAD = 3
ORIGINAL = (TextData.train_dataloader, module.initial_model, MoELanguageModel.training_step, AllToAll.dispatch)


def restore() -> None:
    """No patches."""
    TextData.train_dataloader, module.initial_model, MoELanguageModel.training_step, AllToAll.dispatch = ORIGINAL


def fewer_batches() -> None:
    """Process 1 has 7 training batches, the others 20."""

    def shorter(self: TextData) -> Any:
        batches = ORIGINAL[0](self)
        batches._n_batches = 7 if RANK == 1 else 20
        return batches

    TextData.train_dataloader = shorter


def dead_expert() -> None:
    """The router never chooses expert 3, in any layer."""

    def model(*args: Any) -> MoETransformer:
        made = ORIGINAL[1](*args)
        with torch.no_grad():
            for layer in made.moe_layers:
                layer.router.selection_bias[DEAD] = -2.0
        return made

    module.initial_model = model


def killed_in_a_step() -> None:
    """Process 1 is killed after the forward pass of step 8, while the others wait for its gradients."""

    def step(self: MoELanguageModel, *args: Any) -> Any:
        out = ORIGINAL[2](self, *args)
        if RANK == 1 and self.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return out

    MoELanguageModel.training_step = step


def stops_answering() -> None:
    """Process 1 stops in the middle of step 8, without ending, before it has sent its tokens."""
    signal_at_pass(16, signal.SIGSTOP)


def main(jobs: list[dict[str, Any]]) -> None:
    import ep_script

    decide = expert_pruning.decide
    vars(ep_script).update({f.__name__: f for f in (fewer_batches, dead_expert, killed_in_a_step, stops_answering)})
    for job in jobs:
        ep_script.main([job])
        restore()
        expert_pruning.decide = decide


if __name__ == "__main__":
    start(main)
