"""The expert layer, forward and backward, against its floor and against transformers, in one process.

    python benchmarks/experts.py [--quick] [--json PATH] [--only A,B,C,experts,memory,ahead] [--rounds N] [--allocator kept|glibc]

Floor: dense matrix products of the same FLOPs into memory that is there: 6 T K D F FLOP forward, 12 T K D F
backward; at A 9.7, B 154.6, C 9.7 GFLOP. Not in the floor, and not to be avoided: weights are read twice and their gradients written
once (at A 25 MB each, float32), tokens gathered and outputs added up (T K D each, three times and twice), the activation and
its derivative (T K F, five times exp or so), sorting T K numbers.

Sizes (T tokens, D, F, E experts, top-K): A 2048, 256, 256, 32, 4; B 4096, 512, 512, 64, 8; C 8192, 256, 128, 64, 2. Routing is
drawn anew for every round, uniform or Zipf (exponent 1); all implementations see the same, in random order, one thread.
CPU time; every figure is a ratio within a round. Peer: Qwen3-MoE's experts of transformers, whichever of its eager and grouped_mm
backends is faster there (--quick: grouped_mm, which it is at these sizes). Its products of half precision slow down once changing
loads have gone through more row counts than oneDNN caches kernels for: under Zipf six rounds come before those that count, and only
there a target for bfloat16 is set. `--allocator kept` (default): freed memory stays with the process (mallopt), for all implementations;
with glibc's own thresholds every large temporary costs page faults, of which the peer has more.

Backends: `blocks` (the default, pure torch), which the targets for float32 are for; `compiled` (needs a C compiler), which those for
bfloat16 are for; `grouped_mm`; `recompute`.

--quick: 2 minutes. Otherwise about 20: transformers' eager backend is slow.
"""

from __future__ import annotations

import ctypes
import itertools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

import torch
from bench import Row, arguments, interleave, ratios, report, row
from torch import Tensor
from torch.profiler import profile

from moeprune.model import blocks, experts
from moeprune.model.experts import find_backend

Sizes = tuple[int, int, int, int, int]  # T, D, F, E, K
Layer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
SIZES: dict[str, Sizes] = {
    "A": (2048, 256, 256, 32, 4),
    "B": (4096, 512, 512, 64, 8),
    "C": (8192, 256, 128, 64, 2),
}
# most times the floor, and most times the peer
FLOOR = {("A", "float32"): 1.18, ("B", "float32"): 1.10, ("C", "float32"): 1.22, ("A", "bfloat16"): 1.45, ("C", "bfloat16"): 1.65}  # fmt: skip
PEER = {("A", "float32"): 0.92, ("B", "float32"): 1.00, ("C", "float32"): 0.84, ("A", "bfloat16"): 0.62, ("C", "bfloat16"): 0.52}  # fmt: skip
LOADS = {"uniform": 0.0, "Zipf": 1.0}


def keep_freed_memory() -> None:
    """Tell glibc never to give memory back."""
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(-4, 0)  # M_MMAP_MAX
    libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: never


def transformers_layer(sizes: Sizes, backend: str) -> Layer:
    """Qwen3-MoE's experts, on the weights given."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

    _, D, width, E, K = sizes
    config = Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=width, num_experts=E, num_experts_per_tok=K)
    config._experts_implementation = backend
    with torch.device("meta"):
        module = Qwen3MoeExperts(config)

    def layer(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        module.gate_up_proj, module.down_proj = gate_up, down  # type: ignore[assignment]
        return module(x, indices, weights)  # type: ignore[no-any-return]

    return layer


def dense(sizes: Sizes, dtype: torch.dtype) -> Callable[[], None]:
    """The six matrix products of the floor, outputs allocated beforehand."""
    T, D, width, _, K = sizes
    S = T * K
    x, h, y = torch.randn(S, D, dtype=dtype), torch.randn(S, width, dtype=dtype), torch.randn(S, D, dtype=dtype)
    gu, a, b = (torch.randn(*shape, dtype=dtype) for shape in ((S, 2 * width), (2 * width, D), (D, width)))
    d_a, d_b = torch.empty_like(a), torch.empty_like(b)

    def run() -> None:
        torch.mm(x, a.t(), out=gu)
        torch.mm(h, b.t(), out=y)
        torch.mm(y, b, out=h)
        torch.mm(y.t(), h, out=d_b)
        torch.mm(gu, a, out=x)
        torch.mm(gu.t(), x, out=d_a)

    return run


class Problem:
    """Inputs of a layer; `step(layer)` runs it forward and backward, leaving the gradients behind."""

    def __init__(self, sizes: Sizes, dtype: torch.dtype) -> None:
        T, D, width, E, K = self.sizes = sizes
        g = torch.Generator().manual_seed(0)

        def draw(*shape: int, std: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=g) * std).to(dtype)

        self.x = draw(T, D).requires_grad_()
        self.weights = (torch.rand(T, K, generator=g) / K).to(dtype).requires_grad_()
        self.gate_up = torch.nn.Parameter(draw(E, 2 * width, D, std=D**-0.5))
        self.down = torch.nn.Parameter(draw(E, D, width, std=width**-0.5))
        self.upstream = draw(T, D)

    def routings(self, zipf: float) -> Iterator[Tensor]:
        """[T, K] experts without repetition, drawn with probabilities proportional to rank^-zipf, again and again."""
        T, _, _, E, K = self.sizes
        g = torch.Generator().manual_seed(1)
        weight = torch.arange(1, E + 1).float() ** -zipf
        while True:
            yield torch.multinomial(weight.expand(T, E), K, generator=g)

    def forward(self, layer: Layer, indices: Tensor) -> Tensor:
        """The output, gradients of before forgotten."""
        for tensor in (self.x, self.weights, self.gate_up, self.down):
            tensor.grad = None
        return layer(self.x, indices, self.weights, self.gate_up, self.down)


def interleaved(
    problems: Sequence[Problem],
    layers: Mapping[str, Sequence[Layer]],
    floor: Callable[[], None] | None,
    zipf: float,
    rounds: int,
    warm: int = 1,
) -> dict[str, list[float]]:
    """CPU seconds of each implementation (one layer per problem) in every round; `warm` rounds before do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in (*layers, *(["floor"] if floor else []))}
    routings = [problem.routings(zipf) for problem in problems]
    for turn in range(rounds + warm):
        drawn = [next(routing) for routing in routings]
        for name in random.Random(turn).sample(list(seconds), len(seconds)):
            spent = 0.0
            if name == "floor" and floor:
                began = time.process_time()
                floor()
                spent = time.process_time() - began
            else:
                for problem, layer, indices in zip(problems, layers[name], drawn, strict=True):
                    for tensor in (problem.x, problem.weights, problem.gate_up, problem.down):
                        tensor.grad = None
                    began = time.process_time()
                    problem.forward(layer, indices).backward(problem.upstream)
                    spent += time.process_time() - began
            if turn >= warm:
                seconds[name].append(spent)
    return seconds


def best(seconds: Mapping[str, list[float]]) -> str:
    """The faster backend of transformers."""
    return min((name for name in seconds if name.startswith("transformers")), key=lambda name: median(seconds[name]))


def of_size(name: str, dtype_name: str, rounds: int, loads: Sequence[str], quick: bool) -> list[Row]:
    """One size and dtype: every backend against floor and peer; the targets are those of `blocks` in float32 and of the fastest below."""
    sizes, dtype = SIZES[name], getattr(torch, dtype_name)
    half = dtype_name == "bfloat16"
    problem = Problem(sizes, dtype)
    rows = []
    for load in loads:
        ours = ["blocks", "compiled", "grouped_mm"] if name != "B" or not quick else ["blocks", "compiled"]
        recompute = name != "B" and not half and load == "uniform"
        layers: dict[str, list[Layer]] = {
            backend: [find_backend(backend)] for backend in [*ours, *(["recompute"] if recompute else [])]
        }
        for backend in ["grouped_mm"] if quick or name == "B" else ["grouped_mm", "eager"]:
            layers[f"transformers {backend}"] = [transformers_layer(sizes, backend)]
        warm = 6 if half and load == "Zipf" else 3
        seconds = interleaved([problem], layers, dense(sizes, dtype), LOADS[load], rounds, warm)
        peer = best(seconds)
        for backend in ours:
            case = f"{name}, {dtype_name}, {load}, {backend}"
            of_floor, of_peer = (ratios(seconds[backend], seconds[other]) for other in ("floor", peer))
            aimed = backend == ("compiled" if half else "blocks")
            against_floor = FLOOR.get((name, dtype_name)) if aimed and load == "uniform" else None
            against_peer = PEER.get((name, dtype_name)) if aimed and (not half or load == "Zipf") else None
            rows.append(row("expert layer / dense products", case, of_floor, against_floor))
            rows.append(row(f"expert layer / {peer}", case, of_peer, against_peer))
        if recompute:
            more = ratios(seconds["recompute"], seconds["blocks"])
            rows.append(row("recompute / blocks", f"{name}, {dtype_name}, {load}", more, 1.2))
    return rows


def numbers_of_experts(rounds: int, quick: bool) -> list[Row]:
    """The same FLOPs over 32 and over 256 experts; layers pruned to different numbers, against transformers' best."""
    T, D, width, _, K = SIZES["A"]
    problems = {E: Problem((T, D, width, E, K), torch.float32) for E in (32, 256)}
    rows = []
    ours = ("blocks", "compiled")
    peer = "transformers grouped_mm"
    found = {}
    for E, problem in problems.items():
        layers: dict[str, list[Layer]] = {backend: [find_backend(backend)] for backend in ours}
        layers[peer] = [transformers_layer(problem.sizes, "grouped_mm")]
        found[E] = interleaved([problem], layers, None, 0.0, rounds, warm=3)
    for who in (*ours, peer):
        more = ratios(found[256][who], found[32][who])
        rows.append(
            row("256 experts / 32 experts", f"A, float32, uniform, {who}", more, 1.5 if who == "blocks" else None)
        )
    rows += [
        row(f"expert layer / {peer}", f"A with 256 experts, float32, {who}", ratios(found[256][who], found[256][peer]))
        for who in ours
    ]
    del problems
    for dtype_name in ("float32", "bfloat16"):
        pruned = [Problem((T, D, width, E, K), getattr(torch, dtype_name)) for E in (27, 21, 11)]
        backends = ["grouped_mm"] if quick else ["grouped_mm", "eager"]
        layers = {f"transformers {b}": [transformers_layer(p.sizes, b) for p in pruned] for b in backends}
        layers.update({backend: [find_backend(backend)] * 3 for backend in ours})
        seconds = interleaved(pruned, layers, None, 1.0, rounds, warm=6 if dtype_name == "bfloat16" else 3)
        peer = best(seconds)
        for who in ours:
            target = PEER["A", dtype_name] if who == ("compiled" if dtype_name == "bfloat16" else "blocks") else None
            case = f"A pruned to 27, 21, 11 experts, {dtype_name}, Zipf, {who}"
            rows.append(row(f"expert layer / {peer}", case, ratios(seconds[who], seconds[peer]), target))
    return rows


def reading_ahead(rounds: int) -> list[Row]:
    """Products of 32 rows with 192 matrices of 512 KB, in turn from memory, read in order just before, and one matrix in cache."""
    T, D, width, E, layers = 32, SIZES["A"][1], 2 * SIZES["A"][2], 32, 6
    matrices = [each for _ in range(layers) for each in torch.randn(E, width, D).unbind(0)]
    x, y = torch.randn(T, D), torch.empty(T, width)

    def products(of: Sequence[Tensor], ahead: bool) -> None:
        for matrix in of:
            if ahead:
                torch.sum(matrix)
            torch.mm(x, matrix.t(), out=y)

    calls = {
        "from memory": lambda: products(matrices, False),
        "read ahead": lambda: products(matrices, True),
        "in cache": lambda: products(matrices[:1] * len(matrices), False),
    }
    seconds = interleave(calls, rounds, warm=3)
    case = f"{len(matrices)} products of {T} x {D} x {width}, float32"
    return [
        row(f"{how} / from memory", case, ratios(seconds[how], seconds["from memory"]))
        for how in ("read ahead", "in cache")
    ]


def _peak(found: profile) -> tuple[int, int]:
    """Highest sum of the bytes allocated and freed in the order of time, and the last."""
    changes = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    sums = list(itertools.accumulate((e.nbytes() for e in sorted(changes, key=lambda e: e.start_ns())), initial=0))
    return max(sums), sums[-1]


def memory_of(problem: Problem, layer: Layer) -> tuple[int, int]:
    """Bytes: peak of a step beyond arguments and the gradients of the weights; kept for the backward pass.

    The peak counts the gradients of x and of the combine weights, the output, and the scratch of `blocks`.
    """
    indices = next(problem.routings(0.0))
    problem.forward(layer, indices).backward(problem.upstream)
    problem.forward(layer, indices)
    blocks.scratch.kept.clear()
    with profile(profile_memory=True) as forward:
        out = problem.forward(layer, indices)
    with profile(profile_memory=True) as backward:  # the weights' gradients are left out
        found = torch.autograd.grad(out, [problem.x, problem.weights], problem.upstream)
    peak, kept = _peak(forward)
    in_backward = kept + _peak(backward)[0]
    if layer in experts.BACKENDS.values():  # one autograd function: it made them nevertheless
        in_backward -= sum(p.numel() * p.element_size() for p in (problem.gate_up, problem.down))
    peak = max(peak, in_backward)
    del found
    saved: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = problem.forward(layer, indices)
    own = {t.untyped_storage().data_ptr() for t in (problem.x, indices, problem.weights, problem.gate_up, problem.down)}
    return peak, sum(n for at, n in saved.items() if at not in own)


def memory(names: Sequence[str]) -> list[Row]:
    """Peak and saved bytes over those of transformers' grouped_mm."""
    rows = []
    for name in names:
        problem = Problem(SIZES[name], torch.float32)
        peer = memory_of(problem, transformers_layer(SIZES[name], "grouped_mm"))
        for backend, targets in (("blocks", ({"A": 0.2, "B": 0.4}[name], 1 / 3)), ("recompute", (None, 0.01))):
            ours = memory_of(problem, experts.BACKENDS[backend])
            for what, mine, its, target in zip(("peak memory", "saved for backward"), ours, peer, targets, strict=True):
                case = f"{name}, float32, {backend}: {mine / 2**20:.1f} of {its / 2**20:.1f} MiB"
                rows.append(row(f"{what} / transformers grouped_mm", case, [mine / its], target))
    return rows


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default="A,B,C,experts,memory,ahead", help="parts, with commas")
    parser.add_argument("--rounds", type=int, help="of the sizes A and C; B runs a third of them")
    parser.add_argument("--allocator", choices=("kept", "glibc"), default="kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.allocator == "kept":
        keep_freed_memory()
    rounds = options.rounds or (7 if options.quick else 21)
    only = options.only.split(",")
    rows = []
    if "memory" in only:
        rows += memory(["A"] if options.quick else ["A", "B"])
    for name in "AC":
        if name in only:
            for dtype_name in ("float32", "bfloat16"):
                rows += of_size(name, dtype_name, rounds, list(LOADS), options.quick)
    if "experts" in only:
        rows += numbers_of_experts(max(5, rounds // 2), options.quick)
    if "ahead" in only:
        rows += reading_ahead(5 * rounds)
    if "B" in only:
        loads = ["uniform"] if options.quick else list(LOADS)
        rows += of_size("B", "float32", max(3, rounds // 3), loads, options.quick)
        if not options.quick:
            rows += of_size("B", "bfloat16", rounds // 3, list(LOADS), options.quick)
    report(rows, options)


if __name__ == "__main__":
    main()
