"""Started once per process by test_expert_parallel.py: `ep_script.py JOBS`, a JSON list of jobs done one after the other.

A job is {"args": [...]} for `moeprune <args>`, or {"call": ...}, a function of this file. Optional keys: "patch", a function of
this file to call first; "metrics", a file for the metrics at the end; "error", a file (.<rank> is added) for the sentence of
the UserError that is expected.
"""

from __future__ import annotations

import copy
import os
import shutil
import signal
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from ranks import RANK, ending, note_metrics, signal_at_pass, start

from moeprune.model.experts import Experts
from moeprune.parallel.dispatch import AllToAll
from moeprune.parallel.layout import Layout
from moeprune.parallel.rearrange import rearrange
from moeprune.parallel.strategy import shard
from moeprune.training import callbacks, expert_pruning
from moeprune.training.cli import run

UNEVEN = {
    2: [[[0, 1, 2, 3, 4, 5, 6], []], [[6, 1, 3], [5, 0, 4, 2]], [[2], [0, 1, 3, 4, 5, 6]]],
    4: [[[3], [], [0, 5, 6, 1], [4, 2]], [[], [6, 4, 1], [2, 0], [5, 3]], [[0], [1], [2], [3, 4, 5, 6]]],
}


def keep_every_checkpoint() -> None:
    """Besides last.ckpt, step-<n>.ckpt."""
    save = callbacks.save_checkpoint

    def also(trainer: Any, name: str) -> None:
        save(trainer, name)
        if trainer.is_global_zero:
            folder = expert_pruning.run_folder(trainer)
            shutil.copy(folder / name, folder / f"step-{trainer.global_step}.ckpt")

    callbacks.save_checkpoint = also


def another_plan() -> None:
    """Process 1 gets another plan than the others."""
    decide = expert_pruning.decide

    def differently(trainer: Any, make: Callable[[], Any], whole: bool) -> Any:
        plan, target = decide(trainer, make, whole)
        if trainer.global_rank == 1:
            plan = copy.deepcopy(plan)
            plan["kept"][1] = plan["before"][1]
        return plan, target

    expert_pruning.decide = differently


def killed() -> None:
    """Process 1 is killed in the middle of step 7, while the others wait for its tokens."""
    signal_at_pass(14, signal.SIGKILL)


def experts_over_processes() -> None:
    """Outputs and gradients of the experts equal those of one process; a rearrangement changes no bit of either."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=RANK, world_size=int(os.environ["WORLD_SIZE"]))
    world = dist.get_world_size()
    for T, K, D, F in ((37, 2, 8, 12), (0, 2, 8, 12), (1, 3, 5, 7), (900, 4, 16, 12)):
        torch.manual_seed(0)
        whole = Experts(7, D, F, 0.3)
        torch.nn.init.normal_(whole.gate_up, std=0.5)
        weights = torch.rand(world, T, K)
        scores = torch.randn(world, T, 7)
        scores[:, :, 5] = -9  # a dead expert
        indices = scores.topk(K, -1).indices
        x, dy = torch.randn(world, T, D), torch.randn(world, T, D)
        reference = copy.deepcopy(whole)
        xs, ws = x.clone().requires_grad_(), weights.clone().requires_grad_()
        out = reference(xs.flatten(0, 1), indices.flatten(0, 1), ws.flatten(0, 1)).view_as(x)
        out.backward(dy)
        first: dict[str, torch.Tensor] = {}
        experts = copy.deepcopy(whole)
        layouts = [Layout.contiguous(7, world), *map(Layout.of, UNEVEN[world])]
        shard(experts, AllToAll(layouts[0], dist.group.WORLD))
        optimizer = torch.optim.AdamW([{"params": [experts.gate_up]}, {"params": [experts.down]}], fused=True)
        moments = {}
        for layout in layouts:
            rearrange(experts, layout, [optimizer])
            mine = list(layout.ranks[RANK])
            assert experts.dispatcher.layout == layout
            for name in ("gate_up", "down"):
                assert torch.equal(getattr(experts, name), getattr(whole, name)[mine]), (layout, name)
            x1, w1 = x[RANK].clone().requires_grad_(), weights[RANK].clone().requires_grad_()
            y = experts(x1, indices[RANK], w1)
            y.backward(dy[RANK])
            got = {"y": y, "dx": x1.grad, "dw": w1.grad}
            expected = {"y": out[RANK], "dx": xs.grad[RANK], "dw": ws.grad[RANK]}
            for name, value in got.items():
                torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
                same = torch.equal(first.setdefault(name, value.detach()), value)
                assert same or D % 4, (layout, name)  # rows of 16 bytes; at other addresses products round differently
            for name in ("gate_up", "down"):
                parameter = getattr(experts, name)
                torch.testing.assert_close(
                    parameter.grad, getattr(reference, name).grad[mine], rtol=1e-5, atol=1e-5, msg=name
                )
                if not moments:  # one step of size zero: moments, but the same weights
                    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.0
            if not moments:
                optimizer.step()
                for name in ("gate_up", "down"):
                    state = optimizer.state[getattr(experts, name)]
                    moments[name] = experts.dispatcher.gather_everywhere(state["exp_avg"])
            for name in ("gate_up", "down"):
                assert torch.equal(optimizer.state[getattr(experts, name)]["exp_avg"], moments[name][mine])
                assert any(p is getattr(experts, name) for g in optimizer.param_groups for p in g["params"])
        gathered = experts.dispatcher.gather(experts.gate_up)
        assert (gathered is None) == (RANK > 0)
        assert RANK or torch.equal(gathered, whole.gate_up)
        with experts.dispatcher.everywhere(experts):
            assert torch.equal(experts.down, whole.down)
            with torch.no_grad():
                experts.down[3] *= 2
        assert torch.equal(experts.dispatcher.gather_everywhere(experts.down)[3], whole.down[3] * 2)


def main(jobs: list[dict[str, Any]]) -> None:
    original = [callbacks.save_checkpoint, expert_pruning.decide, AllToAll.dispatch]
    for job in jobs:
        callbacks.save_checkpoint, expert_pruning.decide, AllToAll.dispatch = original
        if "patch" in job:
            globals()[job["patch"]]()
        with ending(job):
            if "call" in job:
                globals()[job["call"]]()
            else:
                note_metrics(job, run(job["args"]).trainer)


if __name__ == "__main__":
    start(main)
