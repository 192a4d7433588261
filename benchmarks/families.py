"""Every family of transformers that was tried: what pruning it costs in exactness, measured.

    python benchmarks/families.py [--write docs/transformers.md]

Small random models (tests/families.py): two or three MoE layers, 8 experts, the family's own router in full. Columns: criteria against their
definitions (how many agree, largest relative difference of a score, each expert computed alone, token by token); pruned against masked (largest
absolute difference of logits, fp32); reloaded from disk through stock transformers, equal and unequal counts (the same); layer by
layer against the whole model (largest relative difference of a statistic); uniform view (difference, or no).
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from rich.progress import track

from moeprune import Constraints, create
from moeprune.errors import UserError
from moeprune.interop.checkpoint import export, load
from moeprune.interop.layerwise import record_layerwise
from moeprune.interop.transformers import TransformersModel
from moeprune.pruning.calibration import record
from moeprune.pruning.surgery import apply_plan

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from families import FAMILIES, build
from test_transformers import criteria_error, exactly, masked, tokens

NEEDS = frozenset({"counts", "g0f0", "g1f1", "max_f", "var_f", "leave_one_out", "easy_ep"})
MARK = "<!-- families -->"


@torch.no_grad()
def row(family: str) -> list[str]:
    from transformers import AutoModelForCausalLM

    whole = TransformersModel(build(family))
    n_parameters = sum(p.numel() for p in whole.model.parameters())
    n_criteria, off = criteria_error(whole)
    evidence = record(whole, [tokens()], NEEDS)
    constraints = Constraints().for_router(whole.n_groups, whole.min_experts)
    plan = create("pruner", "reap", ratio=0.4).plan(evidence, constraints)
    with masked(whole, [list(ids) for ids in plan.removed]):
        expected = whole.logits(tokens())
    cut = TransformersModel(copy.deepcopy(whole.model))
    apply_plan(cut, plan)
    errors = [float((cut.logits(tokens()) - expected).abs().max())]
    view = ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for numbers in ([4, 4, 4], [6, 4, 8]):
            model = TransformersModel(copy.deepcopy(whole.model))
            plan = create("pruner", "frequency").plan(evidence, exactly(model, numbers))
            apply_plan(model, plan)
            place = folder / str(numbers[0])
            export(model, place, [plan])
            unequal = len(set(plan.n_kept)) > 1
            stock = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, trust_remote_code=unequal).eval()
            errors.append(float((stock(tokens(), use_cache=False).logits - model.logits(tokens())).abs().max()))
            if unequal:
                expected = model.logits(tokens())
                try:
                    export(model, folder / "view", [plan], uniform_view=True)
                    view = (
                        f"{float((load(folder / 'view', torch.float32).logits(tokens()) - expected).abs().max()):.0e}"
                    )
                except UserError:
                    view = "no"
        whole.model.save_pretrained(folder / "whole")
        slow = record_layerwise(folder / "whole", [tokens()], NEEDS, dtype=torch.float32)
    different = max(
        float(np.abs(a.stats[n] - b.stats[n]).max() / max(np.abs(a.stats[n]).max(), 1e-30))
        for a, b in zip(evidence.layers, slow.layers, strict=True)
        for n in NEEDS
    )
    router = type(whole.moe_layers[0].router).__name__
    groups = f", {whole.n_groups} groups" if whole.n_groups > 1 else ""
    return [
        f"`{family}`",
        f"{router}{groups}",
        f"{n_parameters:,}",
        f"{n_criteria}, {off:.0e}",
        *(f"{e:.0e}" for e in errors),
        f"{different:.0e}",
        view,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="page whose table is replaced, between two marks")
    options = parser.parse_args()
    head = [
        "family",
        "router",
        "parameters",
        "criteria",
        "pruned - masked",
        "reload, equal",
        "reload, unequal",
        "layerwise",
        "uniform view",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(row(family)) + " |" for family in track(FAMILIES, "families", transient=True)]
    table = "\n".join(lines)
    print(table)
    if options.write:
        before, _, rest = options.write.read_text(encoding="utf-8").partition(MARK)
        options.write.write_text(before + MARK + "\n" + table + "\n" + MARK + rest.partition(MARK)[2], encoding="utf-8")


if __name__ == "__main__":
    main()
