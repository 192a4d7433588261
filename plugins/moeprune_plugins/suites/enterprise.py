"""What companies do with a language model: answer from documents, extract fields, summarise, read tables.

CoQA and SCROLLS would belong here; lm-eval 0.4.13 imports a module for them that transformers 5 no longer has.
"""

from __future__ import annotations

from moeprune.evaluation.suite import Suite, Task


class RAG(Suite):
    """Answers from given text: short passages, then documents of 4,000 to 32,000 tokens; unanswerable questions.

    Answers are as long as the benchmarks allow (32 to 256 tokens). SQuAD v2 is in no average: its F1 runs to 100 and lm-eval
    gives it for the corpus alone. LongBench needs `pip install "lm_eval[longbench]"`.

    Source: SQuAD completion from Based arXiv 2402.18668, SQuAD v2 arXiv 1806.03822, DROP arXiv 1903.00161, LongBench arXiv
    2308.14508.
    """

    def tasks(self) -> list[Task]:
        """Short passages, then long documents."""
        return [
            Task("squad_completion", "contains", "passages", 0, data="hazyresearch/based-squad"),
            Task("drop", "f1", "passages", 0),
            Task("squadv2", "f1", "", 0, data="lighteval/squad_v2"),
            Task("longbench_qasper", "qa_f1_score", "long documents", 0),
            Task("longbench_multifieldqa_en", "qa_f1_score", "long documents", 0),
            Task("longbench_hotpotqa", "qa_f1_score", "long documents", 0),
            Task("longbench_2wikimqa", "qa_f1_score", "long documents", 0),
            Task("longbench_passage_retrieval_en", "retrieval_score", "long documents", 0),
        ]


class Extract(Suite):
    """Fields read out of documents: FDA reports and web pages. Short answers, fit for small models.

    Source: FDA and SWDE as in Based, arXiv 2402.18668, after Evaporate, arXiv 2304.09433.
    """

    def tasks(self) -> list[Task]:
        """Two tasks, one average."""
        return [
            Task("fda", "contains", "extraction", 0, data="hazyresearch/based-fda"),
            Task("swde", "contains", "extraction", 0, data="hazyresearch/based-swde-v2"),
        ]


class Summarise(Suite):
    """Summaries of news, government reports and meetings, by ROUGE-L.

    LongBench needs `pip install "lm_eval[longbench]"`.

    Source: CNN/DailyMail arXiv 1506.03340, LongBench arXiv 2308.14508.
    """

    def tasks(self) -> list[Task]:
        """Four tasks, one average."""
        return [
            Task("cnn_dailymail_abisee", "rougeL", "summaries", 0),
            Task("longbench_gov_report", "rouge_score", "summaries", 0),
            Task("longbench_qmsum", "rouge_score", "summaries", 0),
            Task("longbench_multi_news", "rouge_score", "summaries", 0),
        ]


class Tables(Suite):
    """Questions about tables and financial reports, one set of them Japanese.

    Thin: lm-eval has neither TabFact nor WikiTableQuestions.

    Source: LongBench v2 arXiv 2412.15204, penguins in a table from BIG-bench arXiv 2206.04615, jfinqa
    (github.com/ajtgjmdjp/jfinqa; numbers may be off by 1 %).
    """

    def tasks(self) -> list[Task]:
        """Four tasks, one average."""
        return [
            Task("longbench2_table", "acc", "tables", 0),
            Task("longbench2_fin_single", "acc", "tables", 0),
            Task("bbh_zeroshot_penguins_in_a_table", "exact_match,flexible-extract", "tables", 0),
            Task("jfinqa", "numerical_match", "tables", 0),
        ]
