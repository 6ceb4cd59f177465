"""Evaluation: tasks x pruners x budgets into one JSON, resumable, with intervals and times apart."""

from gripvlm.evaluate.answering import Outcome, answer, make_inputs, prompt_text, question_ids
from gripvlm.evaluate.arms import FULL, ORACLE
from gripvlm.evaluate.environment import environment
from gripvlm.evaluate.journal import ResumeError, samples_path
from gripvlm.evaluate.oracle import oracle, oracle_order, spread_order
from gripvlm.evaluate.regression import Verdict, compare
from gripvlm.evaluate.results import Results, read_results
from gripvlm.evaluate.runner import Interrupted, evaluate
from gripvlm.evaluate.schema import ResultsError
from gripvlm.evaluate.shards import merge
from gripvlm.evaluate.statistics import interval, majority

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
