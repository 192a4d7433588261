"""What papers on pruning report: multiple choice, language modelling, generation."""

from __future__ import annotations

from moeprune.evaluation.suite import Suite, Task

LONG_ANSWER = 2048  # tokens; lm-eval's 256 cut off a model that reasons before it answers


class Core(Suite):
    """The eight multiple-choice tasks of expert-pruning papers, zero-shot; MMLU counts as one of them.

    Accuracy by length-normalised log-likelihood (acc_norm) for ARC, HellaSwag and OpenBookQA, plain for the others.

    Source: the choice of tasks is that of Lu et al., arXiv 2402.14800; ARC 1803.05457, BoolQ 1905.10044, HellaSwag 1905.07830,
    MMLU 2009.03300, OpenBookQA 1809.02789, RTE in GLUE 1804.07461, WinoGrande 1907.10641.
    """

    def tasks(self) -> list[Task]:
        """Eight tasks, one average."""
        return [
            Task("arc_challenge", "acc_norm", "core", 0),
            Task("arc_easy", "acc_norm", "core", 0),
            Task("boolq", "acc", "core", 0),
            Task("hellaswag", "acc_norm", "core", 0),
            Task("mmlu", "acc", "core", 0),
            Task("openbookqa", "acc_norm", "core", 0),
            Task("rte", "acc", "core", 0),
            Task("winogrande", "acc", "core", 0),
        ]


class CoreFast(Suite):
    """Multiple choice for models below a billion parameters, zero-shot: no MMLU or RTE, where those are at chance.

    Source: as `core`; PIQA arXiv 1911.11641, SciQ arXiv 1707.06209.
    """

    def tasks(self) -> list[Task]:
        """Eight tasks, one average."""
        return [
            Task("arc_easy", "acc_norm", "core_fast", 0),
            Task("arc_challenge", "acc_norm", "core_fast", 0),
            Task("hellaswag", "acc_norm", "core_fast", 0),
            Task("piqa", "acc", "core_fast", 0),
            Task("sciq", "acc", "core_fast", 0),
            Task("boolq", "acc", "core_fast", 0),
            Task("openbookqa", "acc_norm", "core_fast", 0),
            Task("winogrande", "acc", "core_fast", 0),
        ]


class LanguageModelling(Suite):
    """Bits per byte on web text and Wikipedia, and the last word of LAMBADA.

    Bits per byte compare models with different tokenizers. The Paloma data set asks for a licence and a hub token.

    Source: WikiText arXiv 1609.07843, Paloma arXiv 2312.10523, LAMBADA arXiv 1606.06031.
    """

    def tasks(self) -> list[Task]:
        """Three corpora, and one task."""
        return [
            Task("wikitext", "bits_per_byte", "bits per byte"),
            Task("paloma_c4_en", "bits_per_byte", "bits per byte"),
            Task("paloma_wikitext_103", "bits_per_byte", "bits per byte"),
            Task("lambada_openai", "acc", "LAMBADA", 0),
        ]


class Generative(Suite):
    """Grade-school mathematics, Python and instructions, generated; answers of up to 2048 tokens.

    GSM8K counts the last number of the answer; HumanEval and MBPP run the generated code (--run_unsafe_code).

    Source: GSM8K arXiv 2110.14168 (5 examples), HumanEval arXiv 2107.03374, MBPP arXiv 2108.07732 (3 examples), IFEval arXiv
    2311.07911 (strict, whole prompts).
    """

    def tasks(self) -> list[Task]:
        """Four tasks, code averaged."""
        return [
            Task("gsm8k", "exact_match,flexible-extract", "mathematics", 5, LONG_ANSWER),
            Task("humaneval", "pass@1,create_test", "code", 0, LONG_ANSWER),
            Task("mbpp", "pass_at_1", "code", 3, LONG_ANSWER),
            Task("ifeval", "prompt_level_strict_acc", "instructions", 0, LONG_ANSWER),
        ]


class Long(Suite):
    """Long contexts: needles, variables and word counts that are made for the tokenizer; BABILong; LongBench v2.

    Documents of LongBench v2 that do not fit are cut on the left.

    Args:
        length: tokens of context in RULER and BABILong: 4096, 8192, 16384, 32768, 65536 or 131072.

    Source: RULER arXiv 2404.06654, BABILong arXiv 2406.10149 (its first five tasks), LongBench v2 arXiv 2412.15204.
    """

    def __init__(self, length: int = 4096) -> None:
        self.length = length

    def tasks(self) -> list[Task]:
        """RULER's generated tasks, then the others."""
        names = ("niah_single_1", "niah_multikey_2", "ruler_vt", "ruler_fwe", "ruler_cwe")
        size = {"max_seq_lengths": [self.length]}
        return [
            *(Task(name, str(self.length), "RULER", 0, metadata=size) for name in names),
            Task("babilong_longctx", "acc", "BABILong", 2, metadata={"max_seq_lengths": f"{self.length // 1024}k"}),
            Task("longbench2", "acc", "LongBench v2", 0),
        ]
