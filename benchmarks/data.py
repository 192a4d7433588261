"""Does training ever wait for its data?

    OMP_NUM_THREADS=1 python benchmarks/data.py [--steps 200] [--quick] [--json PATH]        (60 s; 25 s)

Floor: copying 8 x 129 tokens of two bytes from a memory-mapped file. A run of the quick start's model with Lightning: time in
`TrainBatches.batch` over the time of a step, CPU seconds of one thread, in the training process itself (there are no workers);
median and quartiles over blocks of 20 steps; target 0.02. Below: the first use of a corpus, which trains the tokenizer and encodes
all of it (with --quick one of its five domains), and every later one.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from bench import Spent, arguments, report, row, training

from moeprune.training.data import Corpus, TokenStore, TrainBatches

TARGET, BLOCK = 0.02, 20


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, help="200, or 60 with --quick")
    options = parser.parse_args()
    steps = options.steps or (60 if options.quick else 200)
    fetch = Spent().on(TrainBatches, "batch")
    step_seconds, data_seconds = [], []

    def each(step: int, seconds: float) -> None:
        step_seconds.append(seconds)
        data_seconds.append(fetch.take())

    training(steps, each)
    blocks = [slice(i, i + BLOCK) for i in range(0, steps - BLOCK + 1, BLOCK)]
    shares = [sum(data_seconds[block]) / sum(step_seconds[block]) for block in blocks]
    rows = [row("input / training step", "quick start's model, embedded corpus", shares, TARGET)]
    domains = ["kjv"] if options.quick else None
    corpus = Corpus("embedded", domains)
    made, opened = [], []
    with tempfile.TemporaryDirectory() as folder:
        for seconds in (made, opened, opened, opened):
            began = time.process_time()
            store = TokenStore(corpus, 2048, Path(folder))
            seconds.append(time.process_time() - began)
        tokens = sum(len(store.tokens(domain, "train")) for domain in corpus.domains)
    case = f"{'one domain' if options.quick else 'all domains'}, {tokens / 1e6:.1f} M training tokens"
    rows.append(row("a corpus at its first use, CPU time of all threads", case, made, None, "seconds"))
    rows.append(row("the same later", case, opened, None, "seconds"))
    report(rows, options)


if __name__ == "__main__":
    main()
