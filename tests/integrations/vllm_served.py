"""A model in vLLM with the plug-in, beside the same model in transformers pruned by gripvlm."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
import torch._dynamo
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import gripvlm
from gripvlm.integrations.vllm import engine_args

TOKENS = 8
TOLERANCE = 2e-5
"""Of log-probabilities, in float32."""

ONE_PROCESS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 8,
    "limit_mm_per_prompt": {"image": 4},
    "distributed_executor_backend": "uni",
    # The default on CPUs is 128: prompts this short would never be found in the cache.
    "block_size": 32,
}


@dataclass
class Asked:
    """A request: pictures, the user's text, and its options."""

    pictures: list[Image.Image]
    text: str
    options: dict[str, Any] = field(default_factory=dict)


def ask(pictures: list[Image.Image], text: str, **options: Any) -> Asked:
    return Asked(pictures, text, options)


class Served:
    """The model `folder`, in vLLM and in transformers."""

    def __init__(
        self, folder: str, pruner: str | list[str], keep: Any, positions: str = "original", **engine: Any
    ) -> None:
        os.environ.update(ONE_PROCESS)
        # vLLM's sampler compiles some functions, for which g++ takes longer than all the rest.
        torch._dynamo.config.disable = True
        import vllm

        self.pruner, self.keep, self.positions = [pruner] if isinstance(pruner, str) else pruner, keep, positions
        args = engine_args(folder, pruner, keep, positions=positions, **(ENGINE | engine))
        self.folder = args["model"]
        self.settings = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=0, ignore_eos=True)
        self.llm = vllm.LLM(**args)

    @cached_property
    def reference(self) -> tuple[Any, Any]:
        from vllm.config import set_current_vllm_config

        # vLLM's Transformers backend changes classes of transformers, which then ask for this.
        with set_current_vllm_config(self.llm.llm_engine.vllm_config):
            model = AutoModelForImageTextToText.from_pretrained(self.folder, dtype=torch.float32)
        return model.eval(), AutoProcessor.from_pretrained(self.folder)

    @property
    def inner(self) -> Any:
        """Our model class, inside the engine."""
        return self.llm.llm_engine.model_executor.driver_worker.worker.model_runner.get_model()

    def prompt(self, asked: Asked) -> str:
        content = [{"type": "image"}] * len(asked.pictures) + [{"type": "text", "text": asked.text}]
        chat = [{"role": "user", "content": content}]
        return self.reference[1].apply_chat_template(chat, add_generation_prompt=True, tokenize=False)

    def answer(self, *requests: Asked) -> list[Any]:
        prompts = [
            {
                "prompt": self.prompt(asked),
                "multi_modal_data": {"image": asked.pictures},
                "mm_processor_kwargs": asked.options,
            }
            for asked in requests
        ]
        return self.llm.generate(prompts, self.settings, use_tqdm=False)

    def pruned(self, asked: Asked) -> tuple[dict[str, Any], Any]:
        """(inputs, record) of gripvlm for a request, in transformers."""
        model, processor = self.reference
        inputs = processor(text=[self.prompt(asked)], images=asked.pictures, return_tensors="pt")
        words = processor.tokenizer(asked.options.get("question", asked.text), add_special_tokens=False)
        return gripvlm.prune_inputs(
            model,
            inputs,
            asked.options.get("pruner", self.pruner[0]),
            asked.options.get("keep", None if asked.options.get("pruner") == "full" else self.keep),
            positions=self.positions,
            question=[words.input_ids],
            return_record=True,
        )

    def expected(self, asked: Asked) -> tuple[int, list[int], list[float]]:
        """(prompt tokens, tokens, their log-probabilities) as transformers gives them, pruned by gripvlm."""
        model, short = self.reference[0], self.pruned(asked)[0]
        length = short["input_ids"].shape[1]
        # Not `output_scores`, which processors of logits have changed.
        options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True, "output_logits": True}
        with torch.no_grad():
            made = model.generate(**short, max_new_tokens=TOKENS, **options)
        ids = made.sequences[0, length:].tolist()
        rows = [torch.log_softmax(step[0].float(), -1) for step in made.logits]
        return int(short["attention_mask"].sum()), ids, [row[i].item() for row, i in zip(rows, ids, strict=True)]

    def check(self, requests: list[Asked]) -> list[Any]:
        """Answers all in one batch, and compares each with its reference."""
        answers = self.answer(*requests)
        for asked, answer in zip(requests, answers, strict=True):
            length, ids, expected = self.expected(asked)
            got = list(answer.outputs[0].token_ids)
            found = [step[i].logprob for step, i in zip(answer.outputs[0].logprobs, got, strict=True)]
            assert len(answer.prompt_token_ids) == length, asked
            assert got == ids, asked
            assert torch.allclose(torch.tensor(found), torch.tensor(expected), rtol=0, atol=TOLERANCE), asked
        return answers


def serve(*args: Any, **engine: Any) -> Iterator[Served]:
    """For a fixture: the engine, and its end."""
    from vllm.distributed import cleanup_dist_env_and_memory

    try:
        yield Served(*args, **engine)
    finally:
        gc.collect()
        cleanup_dist_env_and_memory()
