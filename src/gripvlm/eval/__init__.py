"""Evaluation: tasks x pruners x budgets into one JSON, resumable, with intervals and times apart."""

from gripvlm.eval.answering import Outcome, answer, make_inputs, prompt_text, question_ids
from gripvlm.eval.environment import environment
from gripvlm.eval.journal import ResumeError, samples_path
from gripvlm.eval.oracle import oracle, oracle_order, spread_order
from gripvlm.eval.regression import Verdict, compare
from gripvlm.eval.results import Results, read_results
from gripvlm.eval.runner import Interrupted, evaluate
from gripvlm.eval.schema import ResultsError
from gripvlm.eval.shards import merge
from gripvlm.eval.statistics import interval, majority
from gripvlm.eval.variants import FULL, ORACLE

__all__ = [
    "FULL",
    "ORACLE",
    "Interrupted",
    "Outcome",
    "Results",
    "ResultsError",
    "ResumeError",
    "Verdict",
    "answer",
    "compare",
    "environment",
    "evaluate",
    "interval",
    "majority",
    "make_inputs",
    "merge",
    "oracle",
    "oracle_order",
    "prompt_text",
    "question_ids",
    "read_results",
    "samples_path",
    "spread_order",
]
