"""Evaluation: tasks x pruners x budgets into one JSON, resumable, with intervals and times apart."""

from gripvlm.eval.answering import BatchAnswers, answer, make_inputs, prompt_text, question_ids
from gripvlm.eval.environment import environment
from gripvlm.eval.journal import ResumeError, samples_path
from gripvlm.eval.oracle import oracle, oracle_order, spread_order
from gripvlm.eval.results import Results, ResultsError, majority, read_results
from gripvlm.eval.runner import evaluate
from gripvlm.eval.stats import interval
from gripvlm.eval.variants import FULL, ORACLE

__all__ = [
    "FULL",
    "ORACLE",
    "BatchAnswers",
    "Results",
    "ResultsError",
    "ResumeError",
    "answer",
    "environment",
    "evaluate",
    "interval",
    "majority",
    "make_inputs",
    "oracle",
    "oracle_order",
    "prompt_text",
    "question_ids",
    "read_results",
    "samples_path",
    "spread_order",
]
