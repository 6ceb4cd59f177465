"""Evaluation: tasks x pruners x budgets into one JSON, resumable, with intervals and times apart."""

from gripvlm.eval.answering import BatchAnswers, answer, make_inputs, question_ids
from gripvlm.eval.environment import environment
from gripvlm.eval.journal import ResumeError, samples_path
from gripvlm.eval.results import Results, ResultsError, read_results
from gripvlm.eval.runner import evaluate
from gripvlm.eval.stats import interval

__all__ = [
    "BatchAnswers",
    "Results",
    "ResultsError",
    "ResumeError",
    "answer",
    "environment",
    "evaluate",
    "interval",
    "make_inputs",
    "question_ids",
    "read_results",
    "samples_path",
]
