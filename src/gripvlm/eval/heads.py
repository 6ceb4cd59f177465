"""How much each attention head of the language model's first layer matters: the weights of the pruner `hawk`.

    python -m gripvlm.eval.heads --model lab --tasks jsonl:reading.jsonl jsonl:diagram.jsonl

After HAWK (arXiv 2604.07812), equations 1 to 3. The output of one head at a time is set to zero. d_ht is what the score
of task t loses by it, e_ht = d_ht - min_h d_ht, and the weight w_h = mean_t (e_ht / sum_h e_ht).

1. Heads are turned off in the first layer, where the pruner reads them. In which layers the paper does so we do not
   know: its code has no such step, only the weights that came out for one model.
2. Tasks that lose the same by every head are left out.

Do not measure weights on questions whose scores you report.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from gripvlm.errors import InputError
from gripvlm.eval.runner import evaluate
from gripvlm.models.first_layer import checked_first_layer
from gripvlm.models.hooks.calls import call_hooks
from gripvlm.models.loading import load_model, quiet
from gripvlm.tasks import Task

__all__ = ["head_weights", "importances"]


def head_weights(
    model: PreTrainedModel,
    processor: Any,
    tasks: str | Task | Sequence[str | Task],
    limit: int | None = None,
    batch_size: int = 8,
) -> tuple[float, ...]:
    """[H] weights with sum 1, one for each query head of the first layer. Answers all questions H + 1 times.

    Args:
        tasks, limit, batch_size: as of `gripvlm.evaluate`.

    Raises:
        UnsupportedModelError: a first layer that `hawk` cannot read.
        InputError: no head changes the score of any task.
    """
    attention = checked_first_layer(model, "weights of heads are measured on")
    width = attention.head_dim

    def scores() -> list[float]:
        result = evaluate(model, processor, tasks, [], limit=limit, batch_size=batch_size, blind=False)
        return [row["score"] for row in result["rows"]]

    def without(head: int) -> list[float]:
        def silence(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            outputs = args[0].clone()  # [B, L, H d_h]
            outputs[..., head * width : (head + 1) * width] = 0
            return (outputs, *args[1:]), kwargs

        with call_hooks(before={attention.o_proj: silence}):
            return scores()

    whole = scores()
    heads = attention.o_proj.in_features // width
    losses = [[a - b for a, b in zip(whole, without(head), strict=True)] for head in range(heads)]
    return importances(losses)


def importances(losses: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """[H] weights with sum 1, of what each of H heads costs each of T tasks.

    Raises:
        InputError: all heads cost every task the same.
    """
    shares = []
    for task in zip(*losses, strict=True):
        above = [loss - min(task) for loss in task]
        if sum(above) > 0:
            shares.append([one / sum(above) for one in above])
    if not shares:
        raise InputError("no head changes the score of any task: take more questions, or harder ones")
    return tuple(sum(column) / len(shares) for column in zip(*shares, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the spec of the pruner with the weights that it measured."""
    options = argparse.ArgumentParser(prog="python -m gripvlm.eval.heads", description=(__doc__ or "").split("\n")[0])
    options.add_argument("--model", required=True, help="lab, a folder or a hub id")
    options.add_argument("--tasks", required=True, nargs="+", help="by name; not those whose scores you report")
    options.add_argument("--limit", type=int, help="questions a task; by default all")
    options.add_argument("--batch", type=int, default=8)
    asked = options.parse_args(arguments)
    quiet()
    model, processor = load_model(asked.model)
    found = head_weights(model, processor, asked.tasks, asked.limit, asked.batch)
    print(f"hawk:weights=({','.join(f'{weight:.4f}' for weight in found)})")


if __name__ == "__main__":
    main()
