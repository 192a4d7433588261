"""Records evidence: runs the model over some batches and measures what a pruner asks for, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from moeprune import registry
from moeprune.errors import UserError
from moeprune.model.prunable import PrunableLayer, PrunableModel
from moeprune.pruning.evidence import Evidence, LayerEvidence
from moeprune.pruning.statistic import Seen, Statistic

WEIGHTS = frozenset({"w1", "w2", "w_n", "router_w2"})  # from the weights, without data
GRADIENTS = frozenset({"taylor", "fisher"})
TRIALS = frozenset({"ablation", "acceptance"})  # run the model with experts taken out
BUILT_IN = frozenset({"counts", "weights"}) | WEIGHTS | GRADIENTS | TRIALS
ROWS = 8192  # token-expert pairs whose outputs are held at a time
HELD_OUT = 2  # batches that trials run on
Gate = Literal["weight", "topk", "softmax"]
Batch = Tensor | tuple[Tensor, Tensor]


def statistics() -> frozenset[str]:
    """Every name that `needs` may hold."""
    return BUILT_IN | {entry.name for entry in registry.entries("statistic")}


def record(
    model: PrunableModel,
    batches: Iterable[Batch],
    needs: frozenset[str],
    known: Mapping[str, list[NDArray[Any]]] | None = None,
    provenance: Mapping[str, Any] | None = None,
    gate: Gate = "weight",
) -> Evidence:
    """Evidence of `model` for a pruner, from ONE pass over the batches, whatever is asked for.

    Only routed tokens go through experts: memory beyond a forward pass is O(tokens of a block * top_k * width). The model's
    weights, gradients and mode are as before when this returns.

    Args:
        model: not wrapped.
        batches: tokens [B, S + 1], or (tokens, mask) with a mask [B, S + 1] that is False for padding, on the model's device;
            read only if something has to be measured on data.
        needs: statistics that the pruner reads.
        known: statistics measured already, one array per layer: not measured again.
        provenance: kept with the evidence.
        gate: which g: the weight really used to combine, the router's probabilities of the chosen experts renormalised to
            sum to 1 (`topk`), or as they are (`softmax`).

    Raises:
        UserError: a statistic that nobody can record, or no batch where one is needed.
    """
    known = known or {}
    recording = Recording(model, needs - known.keys(), gate)
    held: list[Batch] = []
    if recording.reads_data:
        for batch in batches:
            recording.update(batch)
            if needs & TRIALS and len(held) < HELD_OUT:
                held.append(batch)
        if not recording.seen:
            raise UserError("calibration needs at least one batch of tokens; give data or more calibration batches")
    return recording.evidence(known, provenance, held)


class Recording:
    """Statistics of a model in the making: `update` with batches, then take `evidence`.

    Args:
        model: not wrapped.
        needs: statistics to record.
        gate: see `record`.

    Raises:
        UserError: a statistic that nobody can record, an unknown gate definition.
    """

    def __init__(self, model: PrunableModel, needs: frozenset[str], gate: Gate = "weight") -> None:
        if gate not in ("weight", "topk", "softmax"):
            raise UserError(f"gate must be weight, topk or softmax, got {gate!r}")
        registered = {entry.name for entry in registry.entries("statistic")}
        if unknown := needs - BUILT_IN - registered:
            raise UserError(
                f"no recorder for the statistic {sorted(unknown)[0]!r}; known: {', '.join(sorted(statistics()))}"
            )
        self.model, self.needs, self.gate = model, needs, gate
        self.measured: dict[str, Statistic] = {
            name: registry.create("statistic", name) for name in sorted(needs & registered)
        }
        self.reads: frozenset[str] = frozenset().union(*(statistic.reads for statistic in self.measured.values()))
        self.seen = 0  # batches
        self.tokens = 0
        layers = model.moe_layers
        device = model.device
        self._counts = [torch.zeros(layer.n_experts, dtype=torch.int64, device=device) for layer in layers]
        self._totals: list[dict[str, Tensor]] = [{} for _ in layers]
        self._gradients = bool(needs & GRADIENTS)
        self._parameters = (
            [parameter for layer in layers for parameter in layer.expert_parameters().values()]
            if self._gradients
            else []
        )
        self._sums = [torch.zeros_like(parameter) for parameter, _ in self._parameters]
        self._squares = [
            torch.zeros(parameter.shape[dim], dtype=torch.float64, device=parameter.device)
            for parameter, dim in self._parameters
        ]

    @property
    def reads_data(self) -> bool:
        """Whether anything has to be measured on batches."""
        return bool(self.needs - WEIGHTS - {"weights"})

    def update(self, batch: Batch) -> None:
        """Measure one batch."""
        tokens, mask = batch if isinstance(batch, tuple) else (batch, None)
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        trained = self.model.training
        if trained:
            self.model.train(False)
        try:
            with torch.set_grad_enabled(self._gradients):
                real = None if mask is None else mask[:, :-1].bool()
                with self._watching(None if real is None else real.flatten()):
                    logits = self.model.logits(inputs, real)
                if self._gradients:
                    wanted = targets if mask is None else targets.masked_fill(~mask[:, 1:].bool(), -100)
                    loss = F.cross_entropy(logits.flatten(0, 1).float(), wanted.flatten())
                    # autograd.grad leaves .grad and DDP's hooks alone
                    gradients = torch.autograd.grad(loss, [parameter for parameter, _ in self._parameters])
                    for i, gradient in enumerate(gradients):
                        self._sums[i] += gradient
                        dim = self._parameters[i][1]
                        self._squares[i] += gradient.double().square().movedim(dim, 0).flatten(1).sum(1)
        finally:
            if trained:
                self.model.train(True)
        self.seen += 1
        self.tokens += int(inputs.numel() if real is None else real.sum())

    @contextmanager
    def _watching(self, mask: Tensor | None) -> Iterator[None]:
        with ExitStack() as stack:
            for index in range(len(self.model.moe_layers)):
                stack.enter_context(watch(self, index, mask))
            yield

    def add(self, index: int, seen: Seen) -> None:
        """Sum up what layer `index` did with some tokens."""
        self._counts[index] += seen.counts
        totals = self._totals[index]
        for name, statistic in self.measured.items():
            part = statistic.measure(seen)
            if name not in totals:
                totals[name] = part.clone()  # parts may be shared
            elif statistic.reduce == "sum":
                totals[name] += part
            else:
                torch.maximum(totals[name], part, out=totals[name])

    def state(self) -> dict[str, Tensor]:
        """Everything measured so far, for `load_state` of another process."""
        state = {"seen": torch.tensor(self.seen), "tokens": torch.tensor(self.tokens)}
        for index, (count, totals) in enumerate(zip(self._counts, self._totals, strict=True)):
            state[f"{index}.counts"] = count
            state |= {f"{index}.total.{name}": total for name, total in totals.items()}
        for i, (total, square) in enumerate(zip(self._sums, self._squares, strict=True)):
            state |= {f"gradient.{i}.sum": total, f"gradient.{i}.square": square}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.seen, self.tokens = int(state["seen"]), int(state["tokens"])
        device = self._counts[0].device
        for index in range(len(self._counts)):
            self._counts[index] = state[f"{index}.counts"].to(device)
            prefix = f"{index}.total."
            self._totals[index] = {
                key.removeprefix(prefix): value.to(device) for key, value in state.items() if key.startswith(prefix)
            }
        for i in range(len(self._sums)):
            self._sums[i] = state[f"gradient.{i}.sum"].to(device)
            self._squares[i] = state[f"gradient.{i}.square"].to(device)

    def evidence(
        self,
        known: Mapping[str, list[NDArray[Any]]] | None = None,
        provenance: Mapping[str, Any] | None = None,
        held_out: Iterable[Batch] = (),
    ) -> Evidence:
        """What was measured, as evidence.

        Args:
            known: statistics measured elsewhere, one array per layer.
            provenance: kept with the evidence.
            held_out: batches for statistics that try choices out.
        """
        from moeprune.pruning import trials

        held = list(held_out)
        layers = []
        for index, layer in enumerate(self.model.moe_layers):
            stats: dict[str, NDArray[Any]] = {name: arrays[index] for name, arrays in (known or {}).items()}
            if "counts" in self.needs:
                stats["counts"] = self._counts[index].cpu().numpy()
            for name, statistic in self.measured.items():
                stats[name] = statistic.finish(self._totals[index][name]).cpu().numpy()
            stats |= self.weights_of(index)
            weights = layer.weights() if "weights" in self.needs else {}
            layers.append(
                LayerEvidence(
                    layer.ids,
                    layer.n_original,
                    stats,
                    {name: w.detach() for name, w in weights.items()} if "weights" in self.needs else {},
                )
            )
        if self._gradients:
            layers = [self._with_gradients(layer, index) for index, layer in enumerate(layers)]
        if "ablation" in self.needs:
            growth = trials.ablation(self.model, held, [count.cpu().numpy() for count in self._counts])
            layers = [
                LayerEvidence(layer.ids, layer.n_original, {**layer.stats, "ablation": np.asarray(g)}, layer.weights)
                for layer, g in zip(layers, growth, strict=True)
            ]
        acceptance = trials.Acceptance(self.model, held) if "acceptance" in self.needs else None
        extra = {"gate": self.gate} if self.measured else {}
        return Evidence(tuple(layers), self.model.top_k, {**(provenance or {}), **extra}, acceptance)

    def weights_of(self, index: int) -> dict[str, NDArray[np.float64]]:
        """The statistics of the weights that were asked for, of one layer."""
        wanted = self.needs & WEIGHTS
        weights = self.model.moe_layers[index].weights() if wanted else {}
        return {name: _of_weights(name, weights, index) for name in wanted}

    def _with_gradients(self, layer: LayerEvidence, index: int) -> LayerEvidence:
        per_layer = len(self._parameters) // len(self._counts)
        taylor = np.zeros(len(layer.ids))
        fisher = np.zeros(len(layer.ids))
        for i in range(index * per_layer, (index + 1) * per_layer):
            parameter, dim = self._parameters[i]
            product = (parameter.detach() * self._sums[i] / self.seen).double().abs().movedim(dim, 0)
            taylor += product.flatten(1).sum(1).cpu().numpy()
            fisher += (self._squares[i] / self.seen).cpu().numpy()
        found = {name: value for name, value in (("taylor", taylor), ("fisher", fisher)) if name in self.needs}
        return LayerEvidence(layer.ids, layer.n_original, {**layer.stats, **found}, layer.weights)


def _of_weights(name: str, weights: Mapping[str, Tensor], index: int) -> NDArray[np.float64]:
    """A statistic of the weights alone, see evidence.py."""
    if name == "router_w2":
        rows = weights.get("router")
        if rows is None:
            raise UserError(
                f"the router of layer {index} has no weight with one row per expert, so it has no row norms"
            )
        return np.asarray(rows.detach().double().square().sum(1).cpu())
    columns = []
    for matrix in ("gate", "up", "down"):
        if matrix not in weights:  # experts without a gate
            columns.append(torch.zeros(len(weights["down"]), dtype=torch.float64))
            continue
        w = weights[matrix].detach().flatten(1)
        if name == "w_n":
            columns.append(torch.full((len(w),), float(w.shape[1]), dtype=torch.float64))
        else:
            power = w.abs() if name == "w1" else w.float().square()
            columns.append(power.sum(1, dtype=torch.float64).cpu())
    return np.asarray(torch.stack(columns, 1))


def _combined(weights: Tensor, f: Tensor) -> Tensor:
    """[T, D] sum of outputs f [T, K, D] times weights [T, K]: K passes over f, where a matrix product per token is slow."""
    total: Tensor = weights[:, :1] * f[:, 0]
    for k in range(1, f.shape[1]):
        total.addcmul_(weights[:, k : k + 1], f[:, k])
    return total


@contextmanager
def watch(recording: Recording, index: int, mask: Tensor | None = None) -> Iterator[None]:
    """While the context lasts, what MoE layer `index` does with the tokens that `mask` [T] does not hide is recorded."""
    watching = _Watch(recording, index, recording.model.moe_layers[index], mask)
    try:
        yield
    finally:
        watching.remove()


class _Watch:
    """Stands in for a layer's experts during one forward pass: computes the same output, and hands over what it saw."""

    def __init__(self, recording: Recording, index: int, layer: PrunableLayer, mask: Tensor | None) -> None:
        self._recording, self._index, self._layer, self._mask = recording, index, layer, mask
        self._logits: Tensor | None = None
        self._probs: Tensor | None = None
        self._residual: Tensor | None = None
        self._hooks = []
        if "routing" in recording.reads or recording.gate != "weight":
            self._hooks.append(layer.router.register_forward_hook(self._routed))
        if "residual" in recording.reads:
            self._hooks.append(layer.residual_norm.register_forward_pre_hook(self._entered))
        self._forward = layer.experts.forward
        layer.experts.forward = self.experts

    def remove(self) -> None:
        """Leave the layer as it was."""
        del self._layer.experts.forward
        for hook in self._hooks:
            hook.remove()

    def _routed(self, module: Any, args: Any, routed: Any) -> None:
        self._logits, self._probs = (tensor.detach() for tensor in self._layer.logits_of(routed))

    def _entered(self, module: Any, args: Any) -> None:
        self._residual = args[0].detach().flatten(0, -2)

    def experts(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """[T, D], as the layer's own experts."""
        outputs = "outputs" in self._recording.reads
        with_gradients = torch.is_grad_enabled()
        out: Tensor | None = None if outputs and not with_gradients else self._forward(x, indices, weights)
        with torch.no_grad():
            T, K = indices.shape
            parts: list[Tensor] = []
            step = max(1, ROWS // K)
            for a in range(0, T, step):
                b = min(a + step, T)
                f = self._outputs(x[a:b], indices[a:b]) if outputs else None
                combined = None if f is None else _combined(weights[a:b].to(f.dtype), f)
                if combined is not None:
                    parts.append(combined.to(x.dtype))
                self._hand_over(slice(a, b), x[a:b], indices[a:b], weights[a:b], f, combined)
        if out is not None:
            return out
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _outputs(self, x: Tensor, indices: Tensor) -> Tensor:
        """[T, K, D] of each chosen expert alone, at least float32: by the experts' own `each` where they have one, otherwise by
        the layer's own code with one expert per row and weight 1.
        """
        (T, K), D = indices.shape, x.shape[1]
        f: Tensor
        own: Any = getattr(self._layer.experts, "each", None)
        if own is not None:
            f = own(x, indices)
        else:
            rows = x[:, None].expand(T, K, D).reshape(T * K, D)
            f = self._forward(rows, indices.reshape(-1, 1), x.new_ones(T * K, 1)).view(T, K, D)
        return f.to(torch.promote_types(f.dtype, torch.float32))

    def _hand_over(
        self, rows: slice, x: Tensor, indices: Tensor, weights: Tensor, f: Tensor | None, combined: Tensor | None
    ) -> None:
        keep = None if self._mask is None else self._mask[rows]

        def real(tensor: Tensor) -> Tensor:
            return tensor if keep is None else tensor[keep]

        chosen, used = real(indices), real(weights).detach()
        gates = used
        if self._recording.gate != "weight":
            assert self._probs is not None
            gates = real(self._probs[rows]).gather(1, chosen)
            if self._recording.gate == "topk":
                gates = gates / gates.sum(1, keepdim=True)
        seen = Seen(
            self._layer.n_experts,
            real(x).detach(),
            None if f is None else real(f),
            None if combined is None else real(combined),
            chosen,
            used,
            gates.double(),
            None if self._logits is None else real(self._logits[rows]),
            None if self._residual is None else real(self._residual[rows]),
        )
        self._recording.add(self._index, seen)
