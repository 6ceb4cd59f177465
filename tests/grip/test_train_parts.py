"""Parts of a training run: reading ahead, teachers, validation, rewards, callbacks, trackers, the model's dtype."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import replace

import accelerate
import pytest
import torch
from accelerate import Accelerator
from accelerate.hooks import AlignDevicesHook

from gripvlm.errors import GripError, TrainError
from gripvlm.eval import make_inputs
from gripvlm.grip.train import Callback, Evaluator, train
from gripvlm.grip.train.distill import get_teacher, masked_forward
from gripvlm.grip.train.evaluator import fallen
from gripvlm.grip.train.grpo import Grpo
from gripvlm.grip.train.reading import ReadAhead, Reader
from gripvlm.grip.train.rewards import Rewards, get_reward, scores_of
from gripvlm.tasks import TaskError
from tiny_train import Asked, Counted, asked, drawn, pairs, tiny_config, tiny_scorer, tiny_vlm


@pytest.fixture(scope="module")
def vlm():
    return tiny_vlm()


def run(vlm, folder, *args, stage="grpo", max_steps=2, **changes):
    """A short run of GRPO; what is not a setting comes last."""
    told = {name: changes.pop(name) for name in ("callbacks", "reward_funcs") if name in changes}
    settings = {"stage": stage, "max_steps": max_steps, "output_dir": str(folder), **changes}
    return train(tiny_config(**settings), *vlm, *(args or (asked(8),)), **told)


# --- reading ------------------------------------------------------------------------------------------------------


class Several(Asked):
    """Questions about two pictures each."""

    def __init__(self) -> None:
        super().__init__([replace(one, pictures=one.pictures * 2) for one in asked(2, each=2).samples])


@pytest.mark.parametrize("task", [asked(pictures=3, each=3), Several()])
def test_the_image_processor_sees_a_picture_once(engine, task, monkeypatch):
    seen = []
    real = type(engine.processor.image_processor).__call__

    def counted(self, images, *args, **kwargs):
        seen.append(len(images))
        return real(self, images, *args, **kwargs)

    monkeypatch.setattr(type(engine.processor.image_processor), "__call__", counted)
    batch = engine.prepare(pairs(task))
    distinct = {sample.id.split("-")[0] for sample in task.samples}
    assert seen == [len(distinct) * len(task.samples[0].pictures)]
    texts, images = [s.question for s in task.samples], [s.images for s in task.samples]
    plain = make_inputs(engine.model, engine.processor, texts, images)
    assert torch.equal(batch.prompts["input_ids"], plain["input_ids"])
    assert torch.equal(batch.prompts["attention_mask"], plain["attention_mask"])


def test_a_processor_that_rearranges_the_prompt_is_asked_about_every_question(engine, monkeypatch):
    """As where text is put behind the question."""
    reading = engine.reader.processor
    real = type(reading).__call__

    def rearranged(self, text, images, **kwargs):
        return real(self, text=[one + " yes" for one in text], images=images, **kwargs)

    monkeypatch.setattr(type(reading), "__call__", rearranged)
    batch = engine.prepare(pairs(asked(pictures=2, each=2)))
    yes = engine.tokenizer("yes", add_special_tokens=False)["input_ids"][-1]
    assert batch.prompts["input_ids"][:, -1].tolist() == [yes] * 4


def test_the_next_questions_are_read_while_the_model_works(vlm, tmp_path, monkeypatch):
    reads, second = [], threading.Event()
    real_read, real_losses = Reader.read, Grpo.losses

    def read(self, questions, **options):
        reads.append(threading.current_thread() is threading.main_thread())
        if len(reads) >= 3:  # the validation's, the first batch, the second
            second.set()
        return real_read(self, questions, **options)

    def losses(self, *args):
        assert second.wait(30)
        return real_losses(self, *args)

    monkeypatch.setattr(Reader, "read", read)
    monkeypatch.setattr(Grpo, "losses", losses)
    run(vlm, tmp_path, eval_questions=1)
    assert len(reads) == 3  # two steps: each batch once, and none after the last
    assert not any(reads)


def test_other_questions_than_were_begun_are_read_again(engine):
    ahead, (first, second) = ReadAhead(engine.reader), (pairs(asked(1)), pairs(asked(2)))
    ahead.begin(first, whole_prompt=True)
    assert ahead.take(first, whole_prompt=True).question is None
    ahead.begin(first)
    assert len(ahead.take(second).questions) == 4
    broken = [(first[0][0], replace(first[0][1], pictures=(lambda: 1 / 0,)))]
    ahead.begin(broken)
    with pytest.raises((TaskError, ZeroDivisionError)):
        ahead.take(broken)


# --- teachers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("teacher", ["gradient", "gradient_at_k", "attention"])
def test_teachers_make_logits_at_the_answer_alone(engine, batch, teacher):
    made = []
    hook = engine.model.lm_head.register_forward_hook(lambda module, args, out: made.append(out.shape[1]))
    get_teacher(teacher)(engine, batch, torch.tensor([4] * 4), drawn())
    hook.remove()
    assert made == [1 if teacher == "attention" else batch.longest + 1]


@pytest.mark.parametrize("teacher", ["gradient", "gradient_at_k", "attention"])
def test_a_teacher_in_parts_gives_what_it_gives_at_once(engine, batch, teacher, monkeypatch):
    look = get_teacher(teacher)
    whole = look(engine, batch, torch.tensor([4] * 4), drawn())
    monkeypatch.setattr(engine, "max_tokens_per_forward", 80)
    sizes = []
    hook = engine.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["inputs_embeds"].shape[0]), with_kwargs=True
    )
    parts = look(engine, batch, torch.tensor([4] * 4), drawn())
    hook.remove()
    assert sizes == [2, 2]
    assert all(torch.allclose(one, other, atol=1e-5) for one, other in zip(whole, parts, strict=True))


def test_checkpointing_stores_less_and_changes_no_gradient(engine, batch, monkeypatch):
    def backward(checkpointing):
        monkeypatch.setattr(engine, "gradient_checkpointing", checkpointing)
        biases, stored = [torch.zeros(16, requires_grad=True) for _ in range(4)], []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (stored.append(t.nbytes), t)[1], lambda t: t):
            found = masked_forward(engine, batch, biases)
        found.sum().backward()
        return sum(stored), [bias.grad for bias in biases]

    (less, mine), (more, plain) = backward(True), backward(False)
    assert less < more / 2
    assert all(torch.equal(one, other) for one, other in zip(mine, plain, strict=True))
    assert "forward" not in vars(engine.model.get_decoder().layers[0])


# --- validation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [{}, {"joint": True, "rounds": 2}], ids=["one round", "joint"])
def test_shards_of_the_validation_are_the_whole(engine, own):
    scorer = tiny_scorer(engine.model, **own)
    whole, parts = (
        Evaluator(engine, pairs(asked(5)), get_reward("probability"), tiny_config(), batch_size=3) for _ in range(2)
    )
    first, second = parts.scores(scorer, (0, 2)), parts.scores(scorer, (1, 2))
    assert not first.keys() & second.keys()
    assert first | second == whole.scores(scorer)
    assert parts.means(second | first) == whole.evaluate(scorer)


def test_the_pictures_of_the_validation_are_kept_on_a_cpu_alone(engine):
    scorer = tiny_scorer(engine.model)
    for keeps, passes in ((True, 2), (False, 4)):
        evaluator = Evaluator(engine, pairs(asked(2)), get_reward("probability"), tiny_config())
        assert evaluator.keeps_batches
        evaluator.keeps_batches = keeps
        with Counted(engine.model) as counted:
            assert evaluator.evaluate(scorer) == evaluator.evaluate(scorer)
        assert counted.pictures == passes


def test_a_fall_is_told_from_chance(vlm, tmp_path, monkeypatch):
    before = dict(enumerate([0.5, 0.7, 0.2, 0.9]))
    assert not fallen(before, before)
    assert not fallen(before, dict(enumerate([0.7, 0.5, 0.1, 0.9])))
    assert fallen(before, {k: v - 0.1 * (1 + k / 10) for k, v in before.items()}).startswith(
        "its objective has fallen by"
    )
    real, falls = Evaluator.scores, iter([0.0, 0.5, 0.6])

    def scores(self, *args):
        fall = next(falls)
        return {q: {k: v - fall * (1 + q / 9) for k, v in of.items()} for q, of in real(self, *args).items()}

    monkeypatch.setattr(Evaluator, "scores", scores)
    run(vlm, tmp_path, eval_steps=1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    told = [line.get("warning", "") for line in lines if "eval" in line]
    assert [text.startswith("the scorer is worse than before grpo") for text in told] == [False, True, True]


# --- rewards ------------------------------------------------------------------------------------------------------


def length(completions, answer, **others):
    """As TRL has it."""
    assert {"prompts", "question", "choices", "id"} <= set(others)
    return [len(text) + 10.0 * len(known) for text, known in zip(completions, answer, strict=True)]


def short(completions):
    return [1] * len(completions)


def test_rewards_are_added_with_their_weights(engine, batch, monkeypatch):
    kept = [[torch.tensor([row, 9])] for row in range(4)]
    rollout = engine.run(batch, range(4), kept, logits=False)
    decoded, real = [], engine.decode
    monkeypatch.setattr(engine, "decode", lambda *args: decoded.append(1) or real(*args))
    both = Rewards(["probability", length, short], "1,-0.5,2")
    total, each = scores_of(both, rollout)
    texts = real(batch, range(4), kept)
    by_hand = [len(text) + 10.0 * len(sample.answer) for text, sample in zip(texts, batch.samples, strict=True)]
    assert each["length"].tolist() == by_hand
    assert torch.allclose(total, each["probability"] - 0.5 * torch.tensor(by_hand) + 2)
    assert decoded == [1]  # once for both functions
    assert not both.needs  # no logits
    for weights, said in (("1", "one number for each of 3"), ("1,2,x", "one number"), ("1,2,inf", "one number")):
        with pytest.raises(TrainError, match=said):
            Rewards(["probability", length, short], weights)
    with pytest.raises(TrainError, match="has log_prob twice"):
        Rewards.named("log_prob,log_prob")
    with pytest.raises(TrainError, match="name at least one"):
        Rewards.named(" ")


def test_a_run_maximises_several_rewards_and_logs_each(vlm, tmp_path):
    run(vlm, tmp_path / "a", reward_funcs=["probability", length], reward_weights="1,0.1")
    named = f"probability,{__name__}:length"
    train(
        tiny_config(
            output_dir=str(tmp_path / "b"), stage="grpo", max_steps=2, reward_funcs=named, reward_weights="1,0.1"
        ),
        *vlm,
        asked(8),
    )
    first, second = (
        [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()] for folder in "ab"
    )
    step = next(line for line in first if "loss" in line)
    weighted = step["rewards/probability/mean"] + 0.1 * step["rewards/length/mean"]
    assert step["reward"] == pytest.approx(weighted, rel=1e-4)
    assert any(name.startswith("reward/keep_") for name in step)
    assert step["num_tokens"] > 0
    assert [line["reward"] for line in second if "loss" in line] == [line["reward"] for line in first if "loss" in line]
    with pytest.raises(TrainError, match=r"holds another run .reward_funcs was"):
        run(vlm, tmp_path / "a", reward_funcs=["probability", short], reward_weights="1,0.1")


# --- what surrounds a run -----------------------------------------------------------------------------------------


def test_the_model_is_given_back_as_it_was(tmp_path):
    model, processor = tiny_vlm()
    model.train()
    model.model.vision_tower.eval()
    model.lm_head.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    run((model, processor), tmp_path)
    assert [module.training for module in model.modules()] == modes
    assert [weight.requires_grad for weight in model.parameters()].count(False) == 1


class Noted(Callback):
    def __init__(self) -> None:
        self.heard = []

    def on_step_end(self, stage, step, metrics):
        self.heard.append(("step", stage, step, "loss" in metrics))

    def on_evaluate(self, stage, step, metrics):
        self.heard.append(("evaluate", stage, step, "objective" in metrics))

    def on_save(self, stage, step, checkpoint):
        self.heard.append(("save", stage, step, checkpoint.exists()))


def test_callbacks_hear_of_steps_validations_and_checkpoints(vlm, tmp_path):
    noted = Noted()
    run(vlm, tmp_path, callbacks=[Callback(), noted], save_steps=1)
    assert noted.heard == [
        ("evaluate", "grpo", 0, True),
        ("step", "grpo", 1, True),
        ("save", "grpo", 1, True),
        ("step", "grpo", 2, True),
        ("evaluate", "grpo", 2, True),
        ("save", "grpo", 2, True),
    ]


def test_trackers_get_one_count_of_steps_the_settings_and_a_name(vlm, tmp_path, monkeypatch):
    begun, logged = [], []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, *args, **kw: begun.append((args, kw)))
    monkeypatch.setattr(Accelerator, "log", lambda self, numbers, step: logged.append((step, set(numbers))))
    monkeypatch.setattr(Accelerator, "__init__", without_tracker(Accelerator.__init__))
    monkeypatch.setattr(Accelerator, "trackers", ["one"], raising=False)
    monkeypatch.setattr(Accelerator, "end_training", lambda self: None)
    run(vlm, tmp_path / "my run", stage="all", distill_steps=2, report_to="wandb", eval_steps=10)
    ((args, told),) = begun
    assert args == ("gripvlm",)
    assert told["init_kwargs"]["wandb"] == told["init_kwargs"]["trackio"] == {"name": "my run"}
    assert told["config"]["distill_steps"] == 2
    assert [step for step, _ in logged] == sorted(step for step, _ in logged)
    assert [step for step, names in logged if "distill/loss" in names] == [1, 2]
    assert [step for step, names in logged if "grpo/loss" in names] == [3, 4]


def without_tracker(real):
    """accelerate refuses trackers that are not installed; they are not needed to see what they are told."""

    def init(self, *args, log_with=None, **kwargs):
        real(self, *args, **kwargs)
        if "trackers" in vars(self):
            del self.trackers

    return init


def test_settings_that_the_model_contradicts_are_refused(vlm, tmp_path):
    for wrong, said in (
        ({"dtype": "bfloat16"}, "dtype = 'bfloat16', but the model is float32"),
        ({"attn_implementation": "eager"}, "attn_implementation = 'eager', but the model has 'sdpa'"),
    ):
        with pytest.raises(TrainError, match=said):
            run(vlm, tmp_path, **wrong)
    with pytest.raises(TrainError, match="float16 is too small for the gradients"):
        run(vlm, tmp_path, stage="distill", dtype="float16")
    with pytest.raises(TrainError, match="float16 is too small for the gradients"):
        run((copy.deepcopy(vlm[0]).half(), vlm[1]), tmp_path, stage="distill")
    half = copy.deepcopy(vlm[0]).to(torch.bfloat16)
    with pytest.raises(TrainError, match="bf16 is for models in float32, and this one is bfloat16"):
        run((half, vlm[1]), tmp_path, bf16=True)
    half.model.vision_tower.to("meta")
    with pytest.raises(GripError, match="on the meta device, which holds no weights"):
        run((half, vlm[1]), tmp_path)
    spread = copy.deepcopy(vlm[0])
    spread.lm_head.to("meta")._hf_hook = AlignDevicesHook(execution_device="cuda:1")
    with pytest.raises(TrainError, match="computes on cpu, cuda:1: training needs it on one device"):
        run((spread, vlm[1]), tmp_path)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_model_whose_layers_wait_elsewhere_is_trained_for_alike(vlm, tmp_path, checkpointing):
    """Rewards and the teacher's backward pass through accelerate's hooks, recomputed or not, are those without them."""
    options = {"stage": "all", "distill_steps": 2, "max_steps": 2, "teacher": "gradient"}
    options["gradient_checkpointing"] = checkpointing
    expected = run(vlm, tmp_path / "whole", **options).module.state_dict()
    where = {"model.vision_tower": "cpu", "model.multi_modal_projector": "disk", "lm_head": "cpu"}
    where |= {"model.language_model": "disk"}
    for how in ("all in memory", "some on disk"):
        model = copy.deepcopy(vlm[0]).requires_grad_(True)
        if how == "all in memory":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.dispatch_model(model, where, main_device="cpu", offload_dir=tmp_path / "disk", force_hooks=True)
        given = {name: weight.is_meta for name, weight in model.named_parameters()}
        assert any(given.values())
        found = run((model, vlm[1]), tmp_path / how, **options).module.state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert {name: weight.is_meta for name, weight in model.named_parameters()} == given
        assert all(weight.requires_grad for weight in model.parameters())


def test_a_model_in_bfloat16_is_trained_for(vlm, tmp_path):
    half = copy.deepcopy(vlm[0]).to(torch.bfloat16)
    run((half, vlm[1]), tmp_path, stage="all", distill_steps=1, dtype="bfloat16")
    assert "grpo" in (tmp_path / "metrics.jsonl").read_text()
