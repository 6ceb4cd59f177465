"""The vLLM plug-in on one GPU: the same answers with CUDA graphs as without, and what pruning buys.

    python experiments/gpu/vllm_engine.py --out OUT                                             one GPU of 80 GB or more
    python experiments/gpu/vllm_engine.py --out OUT --shape tiny --requests 12 --engine eager   a try, on the CPU

Not run on a GPU so far. The try is one engine alone, in the environment of `make test-vllm`.

Qwen2.5-VL with random weights; nothing is downloaded. Each engine is a process of its own: eager.json and graphs.json
have answers to a batch of mixed budgets; and for keep 100 %, 25 % and 10 % throughput, the share of vLLM's KV blocks in
use and the requests that run at once. summary.json says whether the answers are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SHAPES: dict[str, dict[str, Any]] = {
    "7b": {
        "text": {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        },
        "tower": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
        "weights": False,
    },
    "tiny": {},
}
PROMPT = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>What is this?<|im_end|>\n<|im_start|>assistant\n"


class Watch(threading.Thread):
    """Reads, every few milliseconds, how full the KV cache is and how many requests run."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__(daemon=True)
        self.scheduler, self.kv, self.running, self.done = scheduler, 0.0, 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.kv = max(self.kv, self.scheduler.kv_cache_manager.usage)
            self.running = max(self.running, len(self.scheduler.running))


def engine(options: argparse.Namespace) -> dict[str, Any]:
    """Measurements of one engine, in this process."""
    os.environ.update(
        VLLM_USE_V2_MODEL_RUNNER="0", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1"
    )
    sys.path.insert(0, str(ROOT / "tests" / "integrations"))
    import torch
    import vllm
    from vllm_models import noise, save_tiny_qwen

    from gripvlm.integrations.vllm import engine_args

    shape, small = SHAPES[options.shape], options.shape == "tiny"
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_qwen(Path(folder), **shape)
        more: dict[str, Any] = {"block_size": 32, "dtype": "float32"} if small else {"dtype": "bfloat16"}
        if not shape.get("weights", True):
            more["load_format"] = "dummy"
        args = engine_args(
            folder,
            "divprune",
            "25%",
            enforce_eager=options.engine == "eager",
            max_model_len=2048,
            max_num_seqs=256,
            limit_mm_per_prompt={"image": 1},
            enable_prefix_caching=False,
            seed=0,
            **more,
        )
        llm = vllm.LLM(**args)
    side = 84 if small else 448

    def prompt(seed: int, keep: Any) -> dict[str, Any]:
        data = {"image": noise(side, side, seed)}
        return {"prompt": PROMPT, "multi_modal_data": data, "mm_processor_kwargs": {"keep": keep}}

    def ask(prompts: list[dict[str, Any]], tokens: int) -> list[Any]:
        settings = vllm.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
        return llm.generate(prompts, settings, use_tqdm=False)

    budgets = [1.0, 0.5, 0.25, 0.1, 1, 3, "<=5", 0.75]
    answers = ask([prompt(seed, keep) for seed, keep in enumerate(budgets)], 16)
    found: dict[str, Any] = {
        "vllm": vllm.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "tokens": [list(answer.outputs[0].token_ids) for answer in answers],
        "keep": {},
    }
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    for keep in (1.0, 0.25, 0.1):
        prompts = [prompt(1000 + seed, keep) for seed in range(options.requests)]
        watch, start = Watch(scheduler), time.perf_counter()
        watch.start()
        made = ask(prompts, 64)
        watch.done.set()
        seconds = time.perf_counter() - start
        found["keep"][f"{keep:.0%}"] = {
            "seconds": seconds,
            "requests_per_second": len(made) / seconds,
            "prompt_tokens": len(made[0].prompt_token_ids),
            "peak_kv": watch.kv,
            "most_running": watch.running,
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--engine", choices=("eager", "graphs"), help="this one alone, without a summary")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.engine is not None:
        (options.out / f"{options.engine}.json").write_text(json.dumps(engine(options), indent=1))
        return 0
    results = {}
    for kind in ("eager", "graphs"):
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--engine", kind], check=True)
        results[kind] = json.loads((options.out / f"{kind}.json").read_text())
    equal = results["eager"]["tokens"] == results["graphs"]["tokens"]
    (options.out / "summary.json").write_text(json.dumps({"answers_equal": equal, **results}, indent=1))
    print(f"answers with CUDA graphs {'equal' if equal else 'DIFFER FROM'} those without")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
