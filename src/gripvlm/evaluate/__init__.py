"""Evaluation: tasks x pruners x budgets into one JSON, resumable, with intervals and times apart."""

from gripvlm.evaluate.answering import Outcome, answer, make_inputs, prompt_text, question_ids
from gripvlm.evaluate.arms import FULL, ORACLE
from gripvlm.evaluate.environment import environment
from gripvlm.evaluate.journal import ResumeError, samples_path
from gripvlm.evaluate.oracle import oracle, oracle_order, spread_order
from gripvlm.evaluate.runner import Interrupted, evaluate
from gripvlm.evaluate.statistics import interval, majority

__all__ = [
    "FULL",
    "ORACLE",
    "Interrupted",
    "Outcome",
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
    "samples_path",
    "spread_order",
]
