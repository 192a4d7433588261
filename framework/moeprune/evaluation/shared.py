"""Log-likelihoods from moeprune's own models, with no work done twice.

Rows of tokens that begin alike become one row: the beginning once, then the ends one after the other, each of which sees the
beginning and itself, at the positions it has alone. Equal rows are one. The output head runs where an answer is asked for and
nowhere else. Rows of like length share a pass.

    alone     the king of | all men      packed     the king of | all men | the sea
              the king of | the sea      position   0   1    2    3   4     3   4
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moeprune.model.transformer import MoETransformer

LEAST_SAVED = 8  # tokens that a row must save to be packed: a mask costs time as well
LEAST_TOKENS = 2048  # of a pass, however short the rows are: below, matrix products of single experts are small
Row = tuple[int, ...]


@dataclass(frozen=True)
class Group:
    """Rows that begin with the same `shared` tokens, none of them equal; packed into one."""

    rows: tuple[Row, ...]
    shared: int

    @property
    def length(self) -> int:
        """Tokens of the packed row."""
        return self.shared + sum(len(row) - self.shared for row in self.rows)

    @property
    def starts(self) -> list[int]:
        """Where each row's own tokens begin in the packed row."""
        ends = np.cumsum([self.shared, *(len(row) - self.shared for row in self.rows)])
        return [int(end) for end in ends[:-1]]


def packed(rows: Sequence[Row], longest: int, share: bool = True) -> list[Group]:
    """Groups that hold every distinct row once, made greedily from the rows in lexical order.

    Args:
        rows: of tokens.
        longest: most tokens of a packed row of several.
        share: whether to pack at all.
    """
    groups: list[Group] = []
    for row in sorted(set(rows)):
        if share and groups:
            last = groups[-1]
            alike = min(last.shared, _alike(last.rows[-1], row))
            joined = Group((*last.rows, row), alike)
            if joined.length + LEAST_SAVED <= last.length + len(row) and joined.length <= longest:
                groups[-1] = joined
                continue
        groups.append(Group((row,), len(row)))
    return groups


def _alike(a: Row, b: Row) -> int:
    """How many tokens two rows have in common at the beginning."""
    for index, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return index
    return min(len(a), len(b))


def passes(groups: Sequence[Group], tokens: int) -> Iterator[list[Group]]:
    """The groups in batches of at most `tokens` tokens, padding included, longest first; packed rows apart from plain ones."""
    batch: list[Group] = []
    for group in sorted(groups, key=lambda group: (len(group.rows) == 1, -group.length)):
        full = batch and (len(batch) + 1) * batch[0].length > tokens
        if batch and (full or (len(group.rows) == 1) != (len(batch[0].rows) == 1)):
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


@torch.inference_mode()
def hidden(model: MoETransformer, batch: Sequence[Group], padding: int) -> Tensor:
    """[B, S, D] before the last norm, of packed rows padded on the right."""
    S = max(group.length for group in batch)
    tokens = np.full((len(batch), S), padding, dtype=np.int64)
    positions = np.zeros((len(batch), S), dtype=np.int64)
    branch = np.full((len(batch), S), -1, dtype=np.int64)  # 0 is the beginning, padding sees itself alone
    for index, group in enumerate(batch):
        n = group.shared
        tokens[index, :n], positions[index, :n], branch[index, :n] = group.rows[0][:n], np.arange(n), 0
        for number, (row, start) in enumerate(zip(group.rows, group.starts, strict=True), 1):
            end = start + len(row) - n
            tokens[index, start:end], branch[index, start:end] = row[n:], number
            positions[index, start:end] = np.arange(n, len(row))
    device = model.device
    mask = torch.from_numpy(branch >= 0).to(device)
    cos, sin, allowed = model.cos[:S], model.sin[:S], None
    if any(len(group.rows) > 1 for group in batch):
        at, of = torch.from_numpy(positions).to(device), torch.from_numpy(branch).to(device)
        cos, sin = model.cos[at][:, None], model.sin[at][:, None]
        before = torch.ones(S, S, dtype=torch.bool, device=device).tril()
        allowed = (before & ((of[:, None, :] == of[:, :, None]) | (of[:, None, :] == 0)))[:, None]
    x: Tensor = model.embedding(torch.from_numpy(tokens).to(device))
    for block in model.blocks:
        x, _ = block(x, cos, sin, mask.flatten(), allowed)
    return x


@torch.inference_mode()
def log_likelihoods(
    model: MoETransformer, asked: Sequence[tuple[Row, Row]], batch_size: int, padding: int, greedy: bool = True
) -> Iterator[tuple[int, float, bool]]:
    """(index, log-likelihood, whether every token is the most probable one) of each request, in some order.

    Args:
        model: in evaluation mode.
        asked: rows of tokens, at most as long as the model takes, and the tokens that should come after the last ones.
        batch_size: a pass takes as many tokens as this many of the longest rows, or `LEAST_TOKENS`.
        padding: a token.
        greedy: whether the third value is wanted; False otherwise.
    """
    if not asked:
        return
    wanted: dict[Row, list[int]] = {}
    for index, (row, _) in enumerate(asked):
        wanted.setdefault(row, []).append(index)
    longest = max(map(len, wanted))
    share = model.config.attention == "standard"  # a local filter looks at the row's neighbours, whoever they are
    groups = packed(list(wanted), max(2 * longest, 64), share)
    for batch in passes(groups, max(LEAST_TOKENS, batch_size * longest)):
        x = hidden(model, batch, padding).flatten(0, 1)
        places: list[NDArray[np.int64]] = []
        indices: list[int] = []
        S = len(x) // len(batch)
        for number, group in enumerate(batch):
            for row, start in zip(group.rows, group.starts, strict=True):
                own = np.arange(len(row))
                where = number * S + np.where(own < group.shared, own, own - group.shared + start)
                for index in wanted[row]:
                    indices.append(index)
                    places.append(where[len(row) - len(asked[index][1]) :])
        rows, inverse = np.unique(np.concatenate(places), return_inverse=True)
        targets = torch.tensor([token for index in indices for token in asked[index][1]], device=x.device)
        at = torch.from_numpy(inverse).to(x.device)
        logits = model.head(model.norm(x.index_select(0, torch.from_numpy(rows).to(x.device))))
        log_probs = logits.float().log_softmax(-1)
        starts = np.cumsum([0, *map(len, places)])[:-1]
        sums = np.add.reduceat(log_probs[at, targets].double().cpu().numpy(), starts)
        hits = np.zeros(len(starts), dtype=bool)
        if greedy:
            hits = np.logical_and.reduceat((log_probs.argmax(-1)[at] == targets).cpu().numpy(), starts)
        yield from zip(indices, sums.tolist(), hits.tolist(), strict=True)
