"""Models inside wrappers, with weights elsewhere, copied, saved or handed to a thread while a block is open."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, TextIteratorStreamer
from transformers.modeling_utils import AttentionInterface

import gripvlm
from gripvlm.errors import InputError, UnsupportedModelError
from gripvlm.models.wrapped import device_of, unwrapped
from matrix import needs_of, pruner_of
from tiny_families import TINY, build, make
from tiny_models import hidden_from, llava_inputs, tiny_llava

GREEDY = {"max_new_tokens": 3, "do_sample": False}
SPECS = ("norm", "visionzip", "grip", "tome", "fastv", "sparsevlm")


def pruned(model: Any, inputs: Any, spec: str) -> Any:
    """The block in which a model is pruned by `spec`."""
    pruner = spec if spec == "tome" else pruner_of(spec, "llava")
    keep = 0.75 if spec != "tome" and needs_of(spec)[1] == "llm" else 0.5
    return gripvlm.pruned_run(model, inputs, pruner, keep, proportional_attention=spec == "pumer")


def generated(model: Any, inputs: Any, spec: str) -> torch.Tensor:
    """Three tokens."""
    with torch.no_grad(), pruned(model, inputs, spec) as (arguments, _):
        return model.generate(**arguments, **GREEDY)


def logits(model: Any, run: Any, inputs: Any, spec: str) -> torch.Tensor:
    """Of the prompt; `run` is the model, or the wrapper that runs it."""
    with torch.no_grad(), pruned(model, inputs, spec) as (arguments, _):
        return run(**arguments).logits


@pytest.fixture
def inputs() -> dict[str, Any]:
    return make(TINY["llava"], [1, 2], [7, 9]).inputs


# --- weights elsewhere ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cpu_offload", "disk_offload", "device_map"])
@pytest.mark.parametrize("spec", ["grip", "visionzip", "tome", "fastv"])
def test_offloaded_models_are_pruned(how, spec, inputs, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, place = copy.deepcopy(build("llava")), torch.device("cpu")
    if how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=place)
    elif how == "disk_offload":
        accelerate.disk_offload(model, tmp_path, execution_device=place)
    else:
        where = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk", "lm_head": "cpu"}
        where |= {"model.language_model": "disk"}
        accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert any(weight.is_meta for weight in model.parameters())
    assert torch.equal(generated(model, inputs, spec), generated(build("llava"), inputs, spec))


def test_a_model_without_weights_is_refused(inputs):
    model = copy.deepcopy(build("llava")).to("meta")
    with pytest.raises(gripvlm.GripError, match="on the meta device, which holds no weights"):
        gripvlm.prune_inputs(model, inputs, "norm", 4)


# --- wrappers ---------------------------------------------------------------------------------------------------


def adapted(model: Any, **options: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    return peft.get_peft_model(
        copy.deepcopy(model), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    )


@pytest.mark.parametrize("spec", SPECS)
def test_adapters_are_pruned_and_counted_in(spec, inputs):
    model = adapted(build("llava"))
    expected = generated(model.get_base_model(), inputs, spec)
    assert torch.equal(generated(model, inputs, spec), expected)
    with torch.no_grad():
        plain = gripvlm.prune_inputs(build("llava"), inputs, "norm", 4)
        ours = gripvlm.prune_inputs(model, inputs, "norm", 4)
        assert (model(**ours).logits - build("llava")(**plain).logits).abs().max() > 1e-2
    if needs_of(spec)[1] == "input" if spec != "tome" else False:
        with gripvlm.prune(model, pruner_of(spec, "llava"), 0.5) as record:
            assert torch.equal(model.generate(**inputs, **GREEDY)[:, -3:], expected[:, -3:])
        assert record.calls == 1


@pytest.mark.parametrize("task", [None, "CAUSAL_LM"])
def test_tuning_adapters_while_pruned_equals_tuning_them_masked(task):
    """Loss and gradients of every adapter are those of the full prompt with the dropped keys masked."""
    model, inputs = adapted(tiny_llava(), task_type=task).train(), llava_inputs([1, 2], [7, 9])
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]  # the answers
    arguments, record = gripvlm.prune_inputs(model, inputs | {"labels": labels}, "divprune", 5, return_record=True)
    results = []
    for given in (arguments, hidden_from(model.get_base_model(), inputs, record.selections) | {"labels": labels}):
        model.zero_grad()
        loss = model(**given).loss
        loss.backward()
        grads = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
        results.append((loss.detach(), grads))
    (ours, grads), (expected, masked) = results
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)
    assert grads.keys() == masked.keys()
    assert sum(float(grad.abs().max()) > 1e-4 for grad in grads.values()) > 8
    for name, grad in grads.items():
        if "language_model" in name:  # the tower saw the same images in both
            torch.testing.assert_close(grad, masked[name], atol=2e-4, rtol=2e-4)


def test_learned_prompts_are_refused_by_name(inputs):
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=2, num_layers=4, token_dim=48, num_attention_heads=4
    )
    model = peft.get_peft_model(copy.deepcopy(build("llava")), config)
    with pytest.raises(UnsupportedModelError, match=r"PeftModelForCausalLM puts learned tokens.*peft\.LoraConfig"):
        gripvlm.prune_inputs(model, inputs, "norm", 4)


def test_what_is_not_a_known_wrapper_is_named(inputs):
    model = torch.nn.Module()
    model.module, model.forward = build("llava"), lambda **_: None
    with pytest.raises(UnsupportedModelError, match=r"a Module is around the LlavaForConditionalG.*its \.module"):
        gripvlm.prune_inputs(model, inputs, "norm", 4)
    assert unwrapped(torch.nn.DataParallel(build("llava"))) is build("llava")


def test_replicas_are_refused(inputs):
    """What `nn.DataParallel` makes for each device runs in threads of its own, on modules of its own."""
    model = copy.deepcopy(build("llava"))
    with gripvlm.pruned_run(model, inputs, "fastv", 0.75) as (arguments, _):
        replica = copy.deepcopy(model)
        for module in replica.modules():
            module._is_replica = True
        with pytest.raises(gripvlm.GripError, match="DataParallel copies the model"):
            replica(**arguments)


HOOKED = ("visionzip", "tome", "fastv")


@pytest.mark.parametrize("how", ["wrapper", "in place", "forward"])
def test_compiled_models_run_eagerly_where_a_block_needs_hooks(how, inputs):
    """Compiled code does not notice hooks that come later; it ran first here, on arguments of the same shapes."""
    model = copy.deepcopy(build("llava"))
    expected = {spec: logits(model, model, inputs, spec) for spec in HOOKED}
    compiled = model
    if how == "wrapper":
        compiled = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        model.forward = torch.compile(model.forward, backend="eager")
    whole = gripvlm.prune_inputs(model, inputs, "norm", 1.0)
    with torch.no_grad():
        before = compiled(**whole).logits
    for spec in HOOKED:
        assert torch.equal(logits(compiled, compiled, inputs, spec), expected[spec])
        assert torch.equal(logits(model, compiled, inputs, spec), expected[spec])
    with torch.no_grad():
        assert torch.equal(compiled(**whole).logits, before)


@pytest.mark.parametrize("how", ["wrapper", "in place"])
def test_compiled_models_run_eagerly_in_a_prune_block_and_compiled_on_pruned_inputs(how, inputs):
    ran = []

    def backend(graph, example):
        return lambda *args: ran.append(graph) or graph.forward(*args)

    model = copy.deepcopy(build("llava"))
    compiled = torch.compile(model, backend=backend) if how == "wrapper" else model
    if how == "in place":
        model.compile(backend=backend)
    with torch.no_grad():
        with gripvlm.prune(compiled, "norm", 4):
            eager = compiled(**inputs).logits
        assert not ran
        assert torch.equal(compiled(**gripvlm.prune_inputs(model, inputs, "norm", 4)).logits, eager)
    assert ran


def test_what_is_compiled_inside_a_block_forgets_it(inputs):
    model = copy.deepcopy(build("llava"))
    expected, whole = logits(model, model, inputs, "fastv"), gripvlm.prune_inputs(model, inputs, "norm", 1.0)
    with torch.no_grad():
        plain = model(**whole).logits
        with gripvlm.pruned_run(model, inputs, "fastv", 0.75) as (arguments, _):
            compiled = torch.compile(model, backend="eager")
            assert torch.equal(compiled(**arguments).logits, expected)
        assert torch.equal(compiled(**whole).logits, plain)
    assert torch.equal(logits(model, compiled, inputs, "fastv"), expected)


# --- while a block is open --------------------------------------------------------------------------------------


def copied(model: Any, folder: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any, folder: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any, folder: Any) -> Any:
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, attn_implementation="sdpa").eval()


PAIRS = [("llava", "fastv"), ("llava", "pumer"), ("qwen3_vl", "fastv")]


@pytest.mark.parametrize(
    ("make_copy", "name", "spec"),
    [(how, *pair) for how in (copied, saved) for pair in PAIRS]
    # transformers itself makes a llava that has run, whose features are a hidden layer's, one that cannot be pickled
    + [(pickled, "qwen3_vl", spec) for spec in ("fastv", "pumer")],
)
def test_a_copy_made_inside_a_block_is_in_no_block(make_copy, name, spec, tmp_path):
    model, inputs = copy.deepcopy(build(name)), make(TINY[name], [1, 2], [7, 9]).inputs
    plain, expected = model.generate(**inputs, **GREEDY), generated(model, inputs, spec)
    with pruned(model, inputs, spec) as (arguments, _):
        other = make_copy(model, tmp_path)
        assert torch.equal(other.generate(**inputs, **GREEDY), plain)
        with torch.no_grad():  # a copy has its own weights
            other.get_output_embeddings().weight.neg_()
        inside = model.generate(**arguments, **GREEDY)
    assert torch.equal(inside, expected)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)
    assert not torch.equal(other.generate(**inputs, **GREEDY), plain)
    with torch.no_grad():
        other.get_output_embeddings().weight.neg_()
    assert torch.equal(generated(other, inputs, spec), expected)
    assert not any(module._forward_pre_hooks for module in other.modules())


def test_a_copy_of_a_tower_while_it_is_watched_merges_nothing(inputs):
    """`tome` while another thread copies the model: what stood between the tower's blocks is no part of a copy."""
    model = copy.deepcopy(build("llava"))
    plain, copies = model.generate(**inputs, **GREEDY), []
    block = model.get_encoder("image").encoder.layers[1]
    handle = block.register_forward_pre_hook(lambda *_: copies.append(copy.deepcopy(model)))
    try:
        gripvlm.prune_inputs(model, inputs, "tome", 4)
    finally:
        handle.remove()
    other = copies[0]
    other.get_encoder("image").encoder.layers[1]._forward_pre_hooks.clear()
    assert torch.equal(other.generate(**inputs, **GREEDY), plain)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain)


def test_moving_a_model_inside_a_block(inputs):
    model, expected = copy.deepcopy(build("llava")), generated(build("llava"), inputs, "fastv")
    with gripvlm.pruned_run(model, inputs, "fastv", 0.75) as (arguments, _):
        model.to(torch.float64).to(torch.float32)
        assert torch.equal(model.generate(**arguments, **GREEDY), expected)


class Letters:
    """A tokenizer that says a token as its number."""

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"{int(token)} " for token in ids)


@pytest.mark.parametrize("spec", ["fastv", "pumer", "norm"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=str)
def test_a_thread_that_is_handed_the_arguments_is_served(spec, options):
    """A streamer's thread has no block of its own; an unrelated thread beside it stays as it is."""
    model, batch = build("llava"), make(TINY["llava"], [1], [7]).inputs
    plain = model.generate(**batch, **GREEDY)
    keep, sizes = (0.5, False) if spec == "norm" else (0.75, spec == "pumer")

    def answer(run: Any) -> tuple[torch.Tensor, Any]:
        with gripvlm.pruned_run(model, batch, spec, keep, proportional_attention=sizes) as (arguments, record):
            out = run(lambda: model.generate(**arguments, **GREEDY, **options))
        return out, [selection.counts for selection in record.selections[0]] if record.selections[0][0].layers else None

    def handed(generate: Any) -> torch.Tensor:
        with ThreadPoolExecutor(2) as pool:
            served = pool.submit(generate)
            other = pool.submit(model.generate, **batch, **GREEDY)
            assert torch.equal(other.result(), plain)
            again = pool.submit(model.generate, **batch, **GREEDY)  # by a worker that may have served the block
            assert torch.equal(again.result(), plain)
            return served.result()

    ours, expected = answer(handed), answer(lambda generate: generate())
    assert torch.equal(ours[0], expected[0])
    assert ours[1] == expected[1]


def test_a_streamer_in_a_thread():
    model, batch = build("llava"), make(TINY["llava"], [1], [7]).inputs
    expected = generated(model, batch, "fastv")[0, -3:]
    streamer = TextIteratorStreamer(Letters(), skip_prompt=True)
    with gripvlm.pruned_run(model, batch, "fastv", 0.75) as (arguments, _):
        thread = threading.Thread(target=model.generate, kwargs={**arguments, **GREEDY, "streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
    assert [int(token) for token in text.split()] == expected.tolist()


def test_blocks_leave_in_any_order():
    """Blocks of two models, the first to open the first to close; nothing is left on either."""
    models, batch = [copy.deepcopy(build("llava")) for _ in range(2)], make(TINY["llava"], [1], [7]).inputs
    interface = AttentionInterface.get_interface
    blocks = [gripvlm.pruned_run(model, batch, "fastv", 0.75) for model in models]
    arguments = [block.__enter__()[0] for block in blocks]
    blocks[0].__exit__(None, None, None)
    ours = models[1].generate(**arguments[1], **GREEDY)
    blocks[1].__exit__(None, None, None)
    assert torch.equal(ours, generated(models[1], batch, "fastv"))
    assert AttentionInterface.get_interface is interface
    assert not any(module._forward_pre_hooks for model in models for module in model.modules())


# --- quantised -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_models_quantised_by_torchao_are_pruned(config, inputs):
    """Dropping equals masking; a scorer belongs to the quantised form of its model."""
    quantization = pytest.importorskip("torchao.quantization")
    model = copy.deepcopy(build("llava"))
    quantization.quantize_(model, getattr(quantization, config)())
    for spec in SPECS:
        assert generated(model, inputs, spec).shape[0] == 2
    with torch.no_grad():
        whole = gripvlm.prune_inputs(model, inputs, "norm", 1.0)
        assert torch.equal(model.generate(**whole, **GREEDY), model.generate(**inputs, **GREEDY))
        arguments, record = gripvlm.prune_inputs(model, inputs, "norm", 5, return_record=True)
        masked = model(**hidden_from(model, inputs, record.selections)).logits[:, -3:]
        if "Dynamic" not in config:  # activations are quantised over the tokens that there are
            torch.testing.assert_close(model(**arguments).logits[:, -3:], masked, atol=3e-5, rtol=3e-5)


def test_models_quantised_by_bitsandbytes_are_pruned(inputs, tmp_path):
    pytest.importorskip("bitsandbytes")
    build("llava").save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)  # 4 bits want larger matrices than a tiny model has
    model = type(build("llava")).from_pretrained(tmp_path, quantization_config=config, device_map="cpu").eval()
    for spec in SPECS:
        assert generated(model, inputs, spec).shape[0] == 2
    whole = gripvlm.prune_inputs(model, inputs, "norm", 1.0)
    assert torch.equal(model.generate(**whole, **GREEDY)[:, -3:], model.generate(**inputs, **GREEDY)[:, -3:])


def test_a_module_without_weights_computes_on_the_cpu():
    assert device_of(torch.nn.ReLU()) == torch.device("cpu")
    with pytest.raises(InputError, match=r"on the meta device, which holds no weights: load it with from_pretrained"):
        device_of(torch.nn.Linear(1, 1, device="meta"))
