"""Task suites of two papers: the harness's task names with their numbers of few-shot examples."""

from __future__ import annotations

Suite = tuple[tuple[str, int], ...]

SUITES: dict[str, Suite] = {
    # LLaMA-MoE, arXiv 2406.16554, table 1.
    "llama-moe": (
        ("sciq", 0),
        ("piqa", 0),
        ("winogrande", 0),
        ("arc_easy", 0),
        ("arc_challenge", 25),
        ("hellaswag", 10),
        ("logiqa", 0),
        ("boolq", 32),
        ("lambada_openai", 0),
        ("nq_open", 32),
        ("mmlu", 5),
    ),
    # Llama 3 Meets MoE, arXiv 2412.09952, table 1.
    "llama3-moe": (
        ("mmlu", 0),
        ("mmlu", 5),
        ("truthfulqa_mc2", 0),
        ("piqa", 0),
        ("sciq", 0),
        ("logiqa", 0),
        ("boolq", 0),
        ("openbookqa", 0),
    ),
}
