"""What a run will need, before it begins: memory by part and hours.

From the sizes of model and data, and one matrix product that is timed here, or a speed that is given; nothing is
trained. Where a number depends on kernels, the larger one is taken. tests/grip/test_dry_run.py compares the memory with
what a CPU takes, experiments/dry_run the hours.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gripvlm.eval.answering import prompt_text
from gripvlm.grip.scorer import Scorer
from gripvlm.grip.train.config import TrainConfig, parse_shares
from gripvlm.grip.train.data import Question
from gripvlm.grip.train.rollout import PSEUDO_LABEL_TOKENS, tokens_per_forward
from gripvlm.grip.train.run import new_scorer, tower_width

SAMPLED = 16
"""Questions that are tokenised, and whose pictures are read, for the lengths."""

EFFICIENCY = 0.5
"""Share of the speed of a large matrix product that a whole forward reaches."""

PADDING = 1.1
"""Tokens of a forward over those that are not padding: rows of like length run together."""


@dataclass(frozen=True)
class Sizes:
    """What memory and time depend on.

    Attributes:
        itemsize: bytes of a number of the frozen model.
        weights: its parameters.
        language: parameters of the language model's layers.
        tower: those of all before it.
        layers, hidden, inner, heads, vocabulary: of the language model.
        patches: rows in the vision tower, for the pictures of a question.
        tower_inner: width of the tower's MLP.
        visual: visual tokens of a question; the most of those that were looked at.
        text: tokens of question and template, without the answer.
        answer: tokens of the longest answer.
        seconds: to read and preprocess the pictures of a question.
        scorer: parameters of the scorer.
    """

    itemsize: int
    weights: int
    language: int
    tower: int
    layers: int
    hidden: int
    inner: int
    heads: int
    vocabulary: int
    patches: int
    tower_inner: int
    visual: int
    text: int
    answer: int
    seconds: float
    scorer: int

    @classmethod
    def of(cls, model: Any, processor: Any, questions: Sequence[Question], config: TrainConfig) -> Sizes:
        """Of a model, which may be on the device meta, and of some of the questions."""
        text = model.config.get_text_config()
        vision = getattr(model.config, "vision_config", text)
        decoder = model.get_decoder()
        language = _count(decoder.layers)
        table = _count(model.get_input_embeddings())
        head = _count(model.get_output_embeddings()) if model.get_output_embeddings() is not None else table
        shared = table if getattr(text, "tie_word_embeddings", False) else table + head
        tokenizer = getattr(processor, "tokenizer", processor)
        placeholder = getattr(model.config, "image_token_id", getattr(model.config, "image_token_index", None))
        visual, words, answers, patches, began = [1], [1], [1], [1], time.monotonic()
        chosen = questions[:: max(1, len(questions) // SAMPLED)][:SAMPLED]
        for task, sample in chosen:
            images = sample.images
            prompt = prompt_text(processor, task.prompt(sample), len(images))
            made = processor(text=[prompt], images=[images], return_tensors="pt")
            shown = int((made["input_ids"] == placeholder).sum())
            visual.append(shown)
            words.append(made["input_ids"].shape[1] - shown)
            own = config.pseudo_labels or not sample.answer
            known = 0 if own else len(tokenizer(sample.answer, add_special_tokens=False)["input_ids"])
            answers.append(PSEUDO_LABEL_TOKENS if own else known + 1)
            patches.append(_patches(made["pixel_values"], vision))
        inner = getattr(text, "intermediate_size", 4 * text.hidden_size)
        with torch.device("meta"):
            scorer_size = _count(Scorer(new_scorer(config, text.hidden_size, tower_width(config, model))))
        return cls(
            itemsize=model.dtype.itemsize,
            weights=_count(model),
            language=language,
            tower=max(0, _count(model) - language - shared),
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            inner=inner,
            heads=text.num_attention_heads,
            vocabulary=text.vocab_size,
            patches=max(patches),
            tower_inner=getattr(vision, "intermediate_size", 4 * getattr(vision, "hidden_size", text.hidden_size)),
            visual=max(visual),
            text=max(words),
            answer=max(answers),
            seconds=(time.monotonic() - began) / max(1, len(chosen)),
            scorer=scorer_size,
        )

    def row(self, share: float) -> int:
        """Tokens of a prompt and its answer with that share of the visual tokens."""
        return math.ceil(share * self.visual) + self.text + self.answer


def memory(sizes: Sizes, config: TrainConfig, processes: int = 1) -> dict[str, int]:
    """Bytes by part in each of the processes; `peak` says which are there at once.

    Args:
        config: with `max_tokens_per_forward`.
    """
    s, b = sizes, sizes.itemsize
    questions = config.per_device_train_batch_size * config.questions_per_image
    low, high = _shares(config)
    # Rollouts: a part of rows with many tokens, and one of many rows with few.
    rollouts = questions * config.num_generations
    tokens = max(s.row(high), min(config.max_tokens_per_forward, rollouts * s.row(high)))
    rows = max(1, min(config.max_tokens_per_forward // s.row(low), rollouts))
    logits = rows * (s.answer + 1) * s.vocabulary
    # The teacher: every token of the batch, in parts; the rows that a layer begins with, one layer's own, and the bias.
    full, selector = s.row(1), config.stage == "visionselector"
    together = max(1, min(config.max_tokens_per_forward // full, questions))
    held = questions if selector else together  # visionselector's parts have one loss
    scores = together * s.heads * full**2 * b  # of attention, where the kernel stores them
    own = together * full * (6 * s.hidden + 4 * s.inner) * b + scores
    begun = held * full * s.hidden * b
    layers = s.layers * begun + own if config.gradient_checkpointing else s.layers * own * held // together
    bias = together * full**2 * (2 * 4 + 3 * b)
    pictures = config.per_device_train_batch_size
    # As `Rounds`: not more rounds than tokens are kept.
    later = min(config.rounds, max(1, math.floor(high * s.visual + 0.5))) - 1 if config.stage != "distill" else 0
    parts = {
        "weights": weights_held(s, config),
        "optimiser": s.scorer * 4 * (4 + bool(config.ema_decay) + bool(config.beta)),
        # Of all micro-batches that a process has in a step: their rewards have one scale.
        "features": config.gradient_accumulation_steps // processes * (pictures + questions) * s.visual * s.hidden * b,
        "vision tower": pictures * s.patches * (2 * s.tower_inner + s.hidden) * b,
        "rollouts": tokens * (3 * s.hidden + 3 * s.inner) * b + tokens * s.row(high),
        "logits": logits * ((b if b < 4 else 0) + 8),
        # Later rounds have logits of their own for each subset, and a table of how close tokens are; both measured.
        "scorer": questions * s.visual * 4 * (3 * s.hidden + config.blocks * 24 * config.width)
        + later * (questions if selector else rollouts) * s.visual * 48
        + 9 * questions * s.visual**2 * (later > 0),
    }
    if selector:
        del parts["rollouts"], parts["logits"]
        parts["gradients"] = layers + 2 * scores + held * (s.answer + 1) * s.vocabulary * (b + 12)
    elif _backward(config):
        parts["teacher"] = layers + 2 * scores + bias + together * (s.answer + 1) * s.vocabulary * (b + 12)
    elif config.stage != "grpo" and config.distill_steps:
        parts["teacher"] = own
    return parts


def weights_held(sizes: Sizes, config: TrainConfig) -> int:
    """Bytes of the frozen model's weights on the device, at most."""
    everything, layer = (count * sizes.itemsize for count in (sizes.weights, sizes.language // sizes.layers))
    # Layers that a backward pass does not run again stay with it till then.
    if not config.max_memory or (_backward(config) and not config.gradient_checkpointing):
        return everything
    return min(everything, max(int(config.max_memory * 2**30), layer))


def _backward(config: TrainConfig) -> bool:
    """Whether a pass goes back through the frozen model."""
    taught = config.stage != "grpo" and config.distill_steps > 0 and config.teacher.startswith("gradient")
    return taught or config.stage == "visionselector"


ALWAYS = ("weights", "optimiser", "features")
"""Parts that are there all the time."""


def peak(parts: dict[str, int]) -> int:
    """Bytes at once, at most."""
    if "gradients" in parts:  # they go through the model into the scorer
        most = parts["scorer"] + parts["gradients"]
    else:
        # Subsets are drawn and scored before the scorer computes a loss.
        most = max(parts["scorer"], parts["rollouts"], parts["logits"], parts.get("teacher", 0))
    return sum(parts[name] for name in ALWAYS) + max(most, parts["vision tower"])


def operations(sizes: Sizes, config: TrainConfig) -> dict[str, float]:
    """Floating-point operations of each stage and of the validations, in all processes."""
    s = sizes
    pictures = config.per_device_train_batch_size * config.gradient_accumulation_steps
    questions = pictures * config.questions_per_image
    seen = 2.0 * s.tower * s.patches

    def passes(share: float) -> float:
        length = s.row(share) * PADDING
        return 2 * s.language * length + 4 * s.layers * s.hidden * length**2 + 2 * s.answer * s.hidden * s.vocabulary

    trained = 6.0 * s.scorer * s.visual * questions
    stages: dict[str, float] = {}
    # Gradients of the model: a forward, those of the activations, and the forward once more.
    through = 3 if config.gradient_checkpointing else 2
    if config.stage == "visionselector":
        stages[config.stage] = config.max_steps * (pictures * seen + questions * through * passes(1) + trained)
    if config.stage in ("all", "distill"):
        times = through if config.teacher.startswith("gradient") else 1
        stages["distill"] = config.distill_steps * (pictures * seen + questions * times * passes(1) + trained)
    if config.stage in ("all", "grpo"):
        rollouts = questions * config.num_generations * passes(_mean_share(config))
        again = trained * config.num_iterations
        stages["grpo"] = config.max_steps * (pictures * seen + rollouts + again)
    keeps = parse_shares(config.eval_keeps, "eval_keeps")
    once = config.eval_questions * (seen + sum(map(passes, keeps)))
    steps = [config.distill_steps if name == "distill" else config.max_steps for name in stages]
    stages["validation"] = once * sum(1 + math.ceil(count / config.eval_steps) for count in steps)
    return stages


def hours(sizes: Sizes, config: TrainConfig, speed: float, processes: int = 1) -> dict[str, float]:
    """Hours by stage, the processes side by side.

    Args:
        speed: operations a second, of one process.
    """
    of_stage = operations(sizes, config)
    found = {name: count / (speed * EFFICIENCY) / processes / 3600 for name, count in of_stage.items()}
    # Pictures are read in a thread beside the model; where that takes longer, the model waits.
    for name in found:
        if name != "validation":
            steps = config.distill_steps if name == "distill" else config.max_steps
            pictures = config.per_device_train_batch_size * config.gradient_accumulation_steps
            found[name] = max(found[name], steps * pictures * sizes.seconds / processes / 3600)
    return found


def speed_of(device: torch.device, dtype: torch.dtype, width: int, seconds: float = 0.5) -> float:
    """Operations a second of a product of matrices [2048, width] and [width, width] on this machine."""
    a, b = (torch.randn(rows, width, device=device, dtype=dtype) for rows in (2048, width))
    done, began = 0, 0.0
    for _ in range(1000):
        if done == 2:  # the first ones are slower
            began = time.monotonic()
        total = float((a @ b)[0, 0])  # waits for the device
        done += 1
        if done > 3 and time.monotonic() - began > seconds and math.isfinite(total):
            break
    return (done - 2) * 2 * 2048 * width * width / (time.monotonic() - began)


def report(
    sizes: Sizes,
    config: TrainConfig,
    device: torch.device,
    dtype: torch.dtype,
    processes: int = 1,
    given: float | None = None,
) -> str:
    """A text of several lines: memory by part, hours by stage.

    Args:
        given: operations a second of an accelerator that is not here; None: of `device`, which is timed.
    """
    if not config.max_tokens_per_forward:
        config = replace(config, max_tokens_per_forward=tokens_per_forward(device))
    parts = memory(sizes, config, processes)
    lines = [f"a question has {sizes.visual} visual tokens, {sizes.text} of text, an answer of {sizes.answer} at most"]
    place = f"{device}" if given is None else "an accelerator"
    lines += ["", f"memory of each process on {place}, {str(dtype).removeprefix('torch.')}"]
    for name, size in parts.items():
        note = "" if name in ALWAYS else "  (at its time)"
        lines.append(f"  {name:<14}{_bytes(size):>10}{note}")
    lines.append(f"  {'together':<14}{_bytes(peak(parts)):>10}")
    if device.type == "cuda" and given is None:
        total = torch.cuda.get_device_properties(device).total_memory
        lines.append(f"  {'there is':<14}{_bytes(total):>10}")
        if peak(parts) > 0.9 * total:
            lines.append("  it does not fit: lower --max-tokens-per-forward, or --per-device-train-batch-size")
    if weights_held(sizes, config) < (whole := sizes.weights * sizes.itemsize):
        lines.append(f"  of the weights, {_bytes(whole)}, others wait elsewhere; hours do not count their way")
    speed = speed_of(device, dtype, sizes.hidden) if given is None else given
    known = "measured here" if given is None else "as given"
    lines += ["", f"hours at {speed / 1e12:.3g} TFLOP/s, {known}, {processes} processes"]
    times = hours(sizes, config, speed, processes)
    lines += [f"  {name:<14}{value:>10.3g}" for name, value in times.items()]
    lines.append(f"  {'together':<14}{sum(times.values()):>10.3g}")
    return "\n".join(lines)


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def _patches(pixels: Tensor, vision: Any) -> int:
    """Rows that pictures have in the vision tower."""
    if pixels.ndim == 2:  # patches already
        return pixels.shape[0]
    patch = getattr(vision, "patch_size", 14)
    side = patch if isinstance(patch, int) else patch[0]
    return pixels.numel() // (3 * side**2)


def _shares(config: TrainConfig) -> tuple[float, float]:
    """The smallest and the largest share of tokens that is drawn."""
    if config.budgets == "choices":
        choices = parse_shares(config.keep_choices, "keep_choices")
        return min(choices), max(choices)
    return config.keep_low, config.keep_high


def _mean_share(config: TrainConfig) -> float:
    if config.budgets == "choices":
        choices = parse_shares(config.keep_choices, "keep_choices")
        return sum(choices) / len(choices)
    low, high = config.keep_low, config.keep_high
    return low if low == high else (high - low) / math.log(high / low)


def _bytes(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
