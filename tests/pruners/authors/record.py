"""Writes choices.json: what the authors' published code of twenty-one methods chooses.

    python tests/pruners/authors/record.py FOLDER       FOLDER/OWNER+NAME/repo, FOLDER/NAME or FOLDER/OWNER/NAME: clones
    python tests/pruners/authors/record.py FOLDER --methods scope,holov                 the others stay as they are

Each function is read from a clone at the commit named below and run as it stands, on the tensors of cases.py; none of
it is part of this repository. What stands around it (a model, a tower, a GPU's clock) is replaced by objects that hand
it these tensors. tests/pruners/test_authors_choices.py holds gripvlm's pruners to the result.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Union

import cases
import numpy as np
import torch
import torch.nn.functional as F
from clones import Ascending, Clone, Torch, on_cpu, run_llama
from torch import Tensor

OUT = Path(__file__).parent / "choices.json"
SEEDS = range(4)


# --- the methods ------------------------------------------------------------------------------------


def hiprune(clone: Clone) -> list[dict[str, Any]]:
    encode = clone.take("LLaVA/llava/model/llava_arch.py", "LlavaMetaForCausalLM.encode_images")["encode_images"]
    found = []
    for seed in SEEDS:
        case = cases.hiprune(seed)
        seen = {8: on_cpu(case["middle"][None]), -2: on_cpu(case["deep"][None].clone())}
        for keep in case["keeps"]:
            os.environ |= {"HIPRUNE_RETENTION": str(keep), "HIPRUNE_ALPHA": str(case["alpha"])}
            os.environ["HIPRUNE_OBJECT_LAYER"] = "9"
            tower = lambda images: (torch.zeros(1, cases.N, 4), seen)  # noqa: B023, E731
            model = SimpleNamespace(get_vision_tower=lambda: tower, mm_projector=lambda rows: rows)  # noqa: B023
            asked = SimpleNamespace(get_model=lambda: model, config=SimpleNamespace(mm_vision_select_layer=-2))  # noqa: B023
            mask = encode(asked, None)[1][0]
            found.append({"seed": seed, "keep": keep, "kept": mask.nonzero().flatten().tolist()})
    return found


def _pair(rows: Tensor, pattern: str) -> Tensor:
    """The two patterns of einops that the code uses."""
    return rows.unsqueeze({"b l r -> b l () r": 2, "b l r -> b () l r": 1}[pattern])


def sparsevlm(clone: Clone) -> list[dict[str, Any]]:
    folder = "llava/model/language_model/"
    without_gpu = Torch()
    names = ("batch_index_select", "index_points", "cluster_and_merge")
    space = clone.take(folder + "utils.py", *names, torch=without_gpu, ein=SimpleNamespace(rearrange=_pair))
    space |= {
        name: value
        for name, value in clone.take(folder + "score.py", "attn_postprocess_topk").items()
        if name == "attn_postprocess_topk"
    }
    constants = {}
    for node in ast.parse(clone.text(folder + "score.py")).body:
        if isinstance(node, ast.Assign):
            exec(compile(ast.Module([node], []), "score.py", "exec"), constants)
    space["attn_postprocess_topk"].__globals__.update(constants)
    merged: list[tuple[Tensor, Tensor]] = []
    original = space["cluster_and_merge"]

    def noted(rows: Tensor, clusters: int) -> Tensor:
        """Of equally dense tokens, which its noise decides between, the first in the raster is to win, as in ours."""
        places = torch.tensor([_same(seen[-1], row) for row in rows[0]])
        without_gpu.rand = lambda *_, **__: 0.1 * (len(places) - places.argsort().argsort()[None])
        merged.append((rows[0], original(rows, clusters)[0]))
        return merged[-1][1][None]

    seen: list[Tensor] = []
    raters: list[list[int]] = []
    space = clone.take(
        folder + "modelling_sparse_llama.py",
        "LlamaDynamicvitModel.forward",
        **{**space, "torch": without_gpu, "cluster_and_merge": noted, "print": lambda *_: None},
    )
    found = []
    for seed in SEEDS:
        case = cases.sparsevlm(seed)
        for list_of_last in (merged, seen, raters):
            list_of_last.clear()

        def layer(number: int, hidden: Tensor, **rest: Any) -> Any:
            seen.append(hidden[0])
            if rest.get("sparse_layer"):
                raters.append(rest["t_token_idx"][1].tolist())
                return hidden, None, cases.looks(seed, number, hidden.shape[1])[None]  # noqa: B023
            return (hidden, None)

        asked = {
            "image_shape": case["n"],
            "pre_prompt_length_list": [case["ahead"]],
            "retained_tokens": case["setting"],
        }
        run_llama(space, case["prompt"], layer, 17, pruning_loc=[2, 6, 15], asked=asked)
        assert raters[0] == raters[1] == raters[2]
        cuts = []
        lengths = [len(states) for states in seen]
        for number, (pool, means) in zip((2, 6, 15), merged, strict=True):
            before, after = seen[number], seen[number + 1]
            start, old = case["ahead"], lengths[number] - case["ahead"] - case["text"]
            new = lengths[number + 1] - case["ahead"] - case["text"]
            tokens = before[start : start + old]
            kept = [_same(tokens, row) for row in after[start : start + new - len(means)]]
            places = [_same(tokens, row) for row in pool]
            shares = torch.linalg.lstsq(pool.double().T, means.double().T).solution.T  # rows are independent
            groups = [[places[i] for i in (share > 1e-3).nonzero().flatten().tolist()] for share in shares]
            cuts.append({"before_layer": number + 1, "n": old, "kept": kept, "groups": [sorted(g) for g in groups]})
        found.append({"seed": seed, "raters": raters[0], "cuts": cuts})
    space["cluster_and_merge"], without_gpu.rand = original, torch.rand
    return found + [_cost(space, keep) for keep in (192, 128, 64)]


def _cost(space: dict[str, Any], keep: int) -> dict[str, Any]:
    """Rows of 576 in each of 32 layers, on average: those that layers were given, and as the code counts them."""
    given: list[int] = []
    lines: list[str] = []

    def layer(number: int, hidden: Tensor, **rest: Any) -> Any:
        given.append(hidden.shape[1] - 7)
        looks = torch.rand(1, 1, hidden.shape[1], hidden.shape[1])
        return (hidden, None, looks) if rest.get("sparse_layer") else (hidden, None)

    space["print"] = lines.append
    asked = {"image_shape": 576, "pre_prompt_length_list": [2], "retained_tokens": keep}
    run_llama(space, torch.rand(583, 4), layer, 32, pruning_loc=[2, 6, 15], asked=asked)
    counted = float(lines[-1].split("until now:")[1].split(",")[0])
    return {"setting": keep, "rows": given, "average": sum(given) / 32, "counted": counted}


def _same(rows: Tensor, row: Tensor) -> int:
    (place,) = (rows == row).all(dim=1).nonzero().flatten().tolist()
    return int(place)


def pumer(clone: Clone) -> list[dict[str, Any]]:
    reducer = clone.take(
        "src/pumer/model/reducer.py", "do_nothing", "bipartite_soft_matching", "merge_wavg", Tuple=tuple
    )
    space = clone.take("src/pumer/model/vilt/vit_vilt.py", "Block.forward", **reducer)
    found = []
    for seed in SEEDS:
        case = cases.pumer(seed)
        text, n = case["text"], case["n"]
        states = torch.cat((torch.zeros(text, n), torch.eye(n)))[None]
        shown = (torch.zeros_like(states), case["attention"][None], case["keys"][None], case["keys"][None])
        still = lambda states, **_: torch.zeros_like(states)  # noqa: E731
        block = SimpleNamespace(norm1=lambda x: x, norm2=lambda x: x, mlp=still, drop_path=lambda x: x)
        block.attn = lambda states, mask: shown  # noqa: B023
        prune, merge = case["shares"]
        options = {"text_len": text, "prune_r": prune, "merge_r": merge, "merge_text": 0, "merge_style": "tome"}
        options |= {"sim_method": "mean_head", "text_masks": torch.ones(1, text)}
        left = space["forward"](block, states, **options)[0][0, text:]  # each row: the weights of what went into it
        groups = sorted(sorted(row.nonzero().flatten().tolist()) for row in left)
        pruned = n - sum(map(len, groups))
        found.append({"seed": seed, "pruned": pruned, "merged": n - pruned - len(groups), "groups": groups})
    return found


def dart(clone: Clone) -> list[dict[str, Any]]:
    names = ("DART.forward", "DART.get_retained_image_token")
    found = []
    for seed in SEEDS:
        case = cases.dart(seed)
        states = case["hidden"]
        chosen = []
        for order in (Ascending, set):
            space = clone.take("llava/model/language_model/modeling_llama_self.py", *names, set=order)
            places: list[Tensor] = []

            def layer(number: int, hidden: Tensor, **rest: Any) -> Any:
                places.append(rest["position_ids"][0])  # noqa: B023
                return hidden, None, case["keys"][None], None  # noqa: B023

            setting = {"K": 2, "image_token_start_index": case["ahead"], "image_token_length": case["n"]}
            setting |= {"max_num_trunction": case["keep"] - 4, "reduction_ratio": 0, "pivot_image_token": 4}
            config = {"DART_config": setting | {"pivot_text_token": 4}, "text_length": None}
            norm = lambda states: cases.rms_norm(states, case["scale"])  # noqa: B023, E731
            run_llama(space, states, layer, 3, config=config, norm=norm)
            image = range(case["ahead"], case["ahead"] + case["n"])
            chosen.append([int(place) - case["ahead"] for place in places[2] if int(place) in image])
        common = len({*chosen[0]} & {*chosen[1]})
        found.append({"seed": seed, "keep": len(chosen[0]), "kept": chosen[0], "also_kept_in_set_order": common})
    return found


def vscan_vision(clone: Clone) -> list[dict[str, Any]]:
    nearest: list[Tensor] = []

    def alike(*args: Any, **rest: Any) -> Tensor:
        nearest.append(F.cosine_similarity(*args, **rest))
        return nearest[-1]

    names = [f"LlavaMetaForCausalLM.{name}" for name in ("token_merging", "window_cls_selection", "encode_images")]
    path = "VScan/llava/model/llava_arch.py"
    space = clone.take(path, *names, F=SimpleNamespace(cosine_similarity=alike))
    found = []
    for seed in SEEDS:
        case = cases.vscan(seed)
        for keep in case["keeps"]:
            blocks = torch.zeros(24, 1, 2, cases.N)
            blocks[5, 0], blocks[-2, 0] = case["shallow"], case["deep"]
            tower = lambda images: (case["rows"][None].clone(), blocks)  # noqa: B023, E731
            model = SimpleNamespace(get_vision_tower=lambda: tower, mm_projector=lambda rows: rows)  # noqa: B023
            asked = SimpleNamespace(get_model=lambda: model, get_visual_token_num=lambda: keep)  # noqa: B023
            for name in ("token_merging", "window_cls_selection"):
                setattr(asked, name, lambda *args, _name=name, **rest: space[_name](asked, *args, **rest))  # noqa: B023
            kept = space["encode_images"](asked, None)[1][0].nonzero().flatten().tolist()
            into = [kept[slot] for slot in nearest[-1].argmax(dim=2)[0].tolist()]
            found.append({"seed": seed, "keep": keep, "kept": kept, "into": into})
    return found


def mustdrop_llm(clone: Clone) -> list[dict[str, Any]]:
    path = "llava/model/language_model/modelling_sparse_llama.py"
    names = [f"LlamaDynamicvitModel.{name}" for name in ("forward", "dual_attention_filter")]
    space = clone.take(path, *names, print=lambda *_: None)
    setting = next(
        ast.literal_eval(node.value)
        for node in ast.walk(ast.parse(clone.text(path)))
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "attr", None) == "pruning_layers"
    )
    found = []
    for seed in SEEDS:
        case, seen = cases.mustdrop(seed), []
        length = case["ahead"] + case["n"] + case["text"]

        def layer(number: int, hidden: Tensor, **rest: Any) -> Any:
            seen.append(hidden[0, :, 0].int().tolist())  # noqa: B023
            return hidden, cases.looks(seed, number, hidden.shape[1])[None], None  # noqa: B023

        asked = {"img_seq": case["n"], "key_set": (1, torch.tensor(case["always"]))}
        asked |= {"pre_prompt_length_list": [case["ahead"]], "global_thr": case["g"], "individual_thr": case["i"]}
        prompt = torch.arange(length, dtype=torch.float32)[:, None].expand(-1, 2)
        run_llama(space, prompt, layer, 32, pruning_layers=setting, asked=asked)
        image = range(case["ahead"], case["ahead"] + case["n"])
        cuts = [
            {"before_layer": k, "kept": [one - case["ahead"] for one in seen[k] if one in image]}
            for k in range(1, 32)
            if seen[k] != seen[k - 1]
        ]
        found.append({"seed": seed, "cuts": cuts})
    return found


def vispruner(clone: Clone) -> list[dict[str, Any]]:
    encode = clone.take("llava/model/llava_arch.py", "LlavaMetaForCausalLM.encode_images")["encode_images"]
    found = []
    for seed in SEEDS:
        case = cases.vispruner(seed)
        for keep in case["keeps"]:
            tower = lambda images, output_attentions: (case["rows"][None], case["cls"][None])  # noqa: B023, E731
            model = SimpleNamespace(get_vision_tower=lambda: tower, mm_projector=lambda rows: rows)  # noqa: B023
            asked = SimpleNamespace(get_model=lambda: model, get_important_ratio=lambda: 0.5)  # noqa: B023
            asked.get_visual_token_num = lambda: keep  # noqa: B023
            mask = encode(asked, None)[1][0]
            found.append({"seed": seed, "keep": keep, "kept": mask.nonzero().flatten().tolist()})
    return found


def hired(clone: Clone) -> list[dict[str, Any]]:
    names = [f"LlavaNextForConditionalGeneration.HiRED_{name}" for name in ("sub_img_budgets", "token_selection")]
    path = "transformers/src/transformers/models/llava_next/modeling_llava_next.py"
    space = clone.take(path, *names, get_anyres_image_grid_shape=lambda *_: (2, 2))
    found = []
    for seed in SEEDS:
        case = cases.hired(seed)
        n, config = case["first"].shape[-1], SimpleNamespace(image_grid_pinpoints=None, vision_config=None)
        config.vision_config = SimpleNamespace(image_size=336)
        asked = SimpleNamespace(config=config)
        asked.HiRED_sub_img_budgets = lambda *args: space["HiRED_sub_img_budgets"](asked, *args)  # noqa: B023
        blocks = [case[name][:, :, None] for name in ("first", "last")]
        (mask,) = space["HiRED_token_selection"](asked, *blocks, [5], 0, n, case["share"], case["alpha"], [None])
        found.append({"seed": seed, "kept": [row.nonzero().flatten().tolist() for row in mask]})
    return found


def otprune(clone: Clone) -> list[dict[str, Any]]:
    names = ("greedy_select", "LlavaMetaForCausalLM.OTPrune")
    choose = clone.take("LLaVA/llava/model/llava_arch.py", *names)["OTPrune"]
    found = []
    for seed in SEEDS:
        case = cases.otprune(seed)
        n = len(case["rows"])
        for keep in case["keeps"]:
            kept = choose(None, case["rows"].clone(), n, None, threshold_ratio=keep / n)[0]
            found.append({"seed": seed, "keep": keep, "kept": sorted(kept.tolist())})
    return found


def scope(clone: Clone) -> list[dict[str, Any]]:
    choose = clone.take("scope/clip_encoder.py", "SCOPE")["SCOPE"]
    found = []
    for seed in SEEDS:
        case = cases.scope(seed)
        for keep in case["keeps"]:
            kept = choose(case["rows"][None], keep, case["cls"].sum(dim=0)[None])[0][0]
            found.append({"seed": seed, "keep": keep, "kept": sorted(kept.tolist())})
    return found


def idpruner(clone: Clone) -> list[dict[str, Any]]:
    names = ("_default_similarity_compute", "_default_importance_compute", "_resolve_callable", "idpruner")
    folder = "angelslim/compressor/token_compressor/algorithm/"
    everything = {"Union": Union, "Callable": Callable, "PruningContext": SimpleNamespace}
    everything |= clone.take(folder + "utils/utils.py", "resolve_num_tokens_to_keep")
    found = []
    for seed in SEEDS:
        case = cases.mmr(seed)
        n = len(case["rows"])
        # the picture alone is the prompt, and its trained selector's scores are the case's
        whole = torch.arange(n), torch.empty(0, dtype=torch.long), None, None
        everything["_extract_and_validate_vision_token_info"] = lambda context: whole  # noqa: B023
        everything["get_universal_selector_scores"] = lambda **_: case["scores"][None]  # noqa: B023
        choose = clone.take(folder + "idpruner.py", *names, **everything)
        context = SimpleNamespace(input_ids=torch.zeros(1, n), inputs_embeds=case["rows"][None])
        for balance in case["balances"]:
            for keep in case["keeps"]:
                mask = choose["idpruner"](context, ratio=1 - keep / n, selector_path="", mmr_lambda=balance)[0]
                kept = mask.nonzero().flatten().tolist()
                found.append({"seed": seed, "keep": keep, "balance": balance, "kept": kept})
    return found


def holov(clone: Clone) -> list[dict[str, Any]]:
    choose = clone.take("llava/model/utils.py", "HoloV")["HoloV"]
    found = []
    for seed in SEEDS:
        case = cases.holov(seed)
        for keep in case["keeps"]:
            rows = choose(case["rows"][None], case["cls"].mean(dim=0)[None], 16, keep)[0]
            found.append({"seed": seed, "keep": keep, "kept": sorted(_same(case["rows"], row) for row in rows)})
    return found


def prunesid(clone: Clone) -> list[dict[str, Any]]:
    """With exact principal components, and how much of that their random ones choose too."""
    exact = Torch()
    exact.pca_lowrank = lambda rows, q: (None, None, torch.linalg.svd((rows - rows.mean(dim=0)).double())[2][:q].T)
    exact.argsort = lambda values, **rest: torch.argsort(values, stable=True, **rest)
    names = ("pca_group", "nms", "Qwen2VisionTransformerPretrainedModel_prunesid.forward")
    path = "prunesid/prunesid_qwen/modeling_qwen2_vl.py"
    found = []
    for seed in SEEDS:
        rows = cases.prunesid(seed)["rows"]
        for keep in cases.prunesid(seed)["keeps"]:
            chosen = []
            for library in (exact, torch):
                forward = clone.take(path, *names, np=np, torch=library)["forward"]
                asked = SimpleNamespace(patch_embed=lambda rows: rows, merger=lambda rows: rows, blocks=[])
                asked.rot_pos_emb, asked.need_token_num = lambda grid: None, keep
                chosen.append(sorted(forward(asked, rows, torch.tensor([[1, 24, 24]]))[1].tolist()))
            common = len({*chosen[0]} & {*chosen[1]})
            found.append({"seed": seed, "keep": keep, "kept": chosen[0], "also_kept_with_random_parts": common})
    return found


def apet_input(clone: Clone) -> list[dict[str, Any]]:
    """Basis, the rest of what is kept, and where each row that is dropped goes: by cosines in float32, not float16."""
    drawn, nearest, ranks = Torch(), [], []

    def alike(*rows: Tensor, **rest: Any) -> Tensor:
        nearest.append(F.cosine_similarity(*(one.float() for one in rows), **rest))
        return nearest[-1]

    sample = clone.take("llava/model/utils.py", "fps", torch=drawn)["fps"]
    names = [f"LlavaMetaForCausalLM.{name}" for name in ("token_merging", "encode_images")]

    def sampled(rows: Tensor, count: int) -> Tensor:
        ranks.append(sample(rows, count))
        return ranks[-1]

    around = {"F": SimpleNamespace(cosine_similarity=alike), "fps": sampled}
    space = clone.take("llava/model/llava_arch.py", *names, **around)
    found = []
    for seed in SEEDS:
        case = cases.apet(seed)
        drawn.randint = lambda *_, **__: torch.tensor([case["start"]])  # noqa: B023
        for keep in case["keeps"]:
            rows = torch.cat((torch.zeros(1, 32), case["rows"]))[None]
            tower = lambda images: (rows, None)  # noqa: B023, E731
            model = SimpleNamespace(get_vision_tower=lambda: tower, mm_projector=lambda rows: rows)  # noqa: B023
            asked = SimpleNamespace(get_model=lambda: model, get_visual_token_num=lambda: keep)  # noqa: B023
            asked.model = SimpleNamespace(basis_token_num=case["basis"])

            def merge(features: Tensor, order: Tensor, k: int) -> Tensor:
                ranks.append(order)
                return space["token_merging"](asked, features, order, k)  # noqa: B023

            asked.token_merging = merge
            mask = space["encode_images"](asked, None)[1][0]
            basis, order = (one[0].tolist() for one in ranks[-2:])
            kept = order[: -case["basis"]]
            rest = (~mask).nonzero().flatten().tolist()
            into = [kept[slot] for slot in nearest[-1].argmax(dim=2)[0].tolist()]
            found.append({"seed": seed, "keep": keep, "basis": sorted(basis), "kept": kept, "rest": rest, "into": into})
    return found


def restore(clone: Clone) -> list[dict[str, Any]]:
    """Of the rows that are not kept: the groups that they are merged in, and the place of each."""
    names = ("distinctive_anchor_merging", "merge_source")
    space = clone.take("tokenreduction/tore/merge.py", *names)
    place = clone.take("llava/model/modeling_llama_restore.py", "LlamaModel.reorder_vis_position_ids")
    found = []
    for seed in SEEDS:
        case = cases.restore(seed)
        n = len(case["rows"])
        rest = [i for i in range(n) if i not in case["kept"]]
        merge, _ = space["distinctive_anchor_merging"](case["rows"][rest][None], case["keep"] - len(case["kept"]))
        source = torch.nn.functional.one_hot(torch.tensor(rest), n).float()[None]
        pattern = space["merge_source"](merge, case["rows"][rest][None], source)
        asked = SimpleNamespace(merging_pattern_list=[pattern], size_list=[pattern.sum(dim=-1, keepdim=True)])
        asked.N_sys, asked.N_txt, asked.N_vis, asked.n_vis = 0, 0, n, pattern.shape[1]
        hidden = torch.zeros(1, asked.n_vis, 1)
        _, places = place["reorder_vis_position_ids"](asked, hidden, torch.arange(n)[None], "median")
        groups = [row.nonzero().flatten().tolist() for row in pattern[0]]
        found.append({"seed": seed, "groups": sorted(groups), "places": sorted(places[0].tolist())})
    return found


def _in_stages(space: dict[str, Any], seed: int, length: int, cuts: tuple[int, ...], **attributes: Any) -> list[Any]:
    """What is left of the image before each of some layers, where layers say what `cases.states` has for them."""
    case, seen = cases.stages(seed), {}

    def layer(number: int, hidden: Tensor, **rest: Any) -> Any:
        places = rest["position_ids"][0]
        seen[number] = places
        looks = torch.zeros(1, 2, len(places), len(places))
        if rest.get("output_attentions"):
            looks[0, :, -1] = cases.last_looks(seed, number, len(places))
        return cases.states(seed, number + 1, length)[places][None], looks

    attributes |= {"use_cache": False}
    run_llama(space, cases.states(seed, 0, length), layer, max(cuts) + 1, **attributes)
    image = range(case["ahead"], case["ahead"] + case["n"])
    left = [[int(i) - case["ahead"] for i in seen[cut] if int(i) in image] for cut in cuts]
    return [{"before_layer": cut, "kept": kept} for cut, kept in zip(cuts, left, strict=True)]


def clse(clone: Clone) -> list[dict[str, Any]]:
    folder = "LLaVA1.5/llava/model/language_model/"
    names = ("spatial_spectral_score_2d", "get_evolution_factor", "calculate_evolution_score")
    space = clone.take(folder + "tools.py", *names)
    around = {"DynamicCache": dict, "_prepare_4d_causal_attention_mask": lambda *_: None, **space}
    space = clone.take(folder + "clse_model.py", "CLSELlamaModel.forward", **around)
    case, found = cases.stages(0), []
    length = case["ahead"] + case["n"] + case["text"]
    setting = {"L_list": [0], "K_list": [1, 11, 21], "image_grid_thw": (1, 24, 24), "score_type": "clse_attn"}
    for seed, keep in zip(SEEDS, (64, 128, 192, 64), strict=True):
        given = {**setting, "prune": True, "retain_token": keep, "last_attention": None, "Z_L": None}
        found.append({"seed": seed, "setting": keep, "cuts": _in_stages(space, seed, length, (1, 11, 21), **given)})
    return found


def v2drop(clone: Clone) -> list[dict[str, Any]]:
    space = clone.take("llava/model/language_model/V2Drop.py", "V2DropLlamaModel.forward")
    case = cases.stages(0)
    length = case["ahead"] + case["n"] + case["text"]
    given = {"prev_hidden_states": None, "image_token_amount_after_selection": 0}
    return [{"seed": seed, "cuts": _in_stages(space, seed, length, (3, 17, 22), **given)} for seed in SEEDS]


def priortr(clone: Clone) -> list[dict[str, Any]]:
    path = "image/LLaVA/llava/vtr/strategy/priortr.py"
    score = clone.take(path, "PriorTRStrategy.compute_scores")["compute_scores"]
    found = []
    for seed in SEEDS:
        case = cases.priortr(seed)
        image = (case["ahead"], case["ahead"] + case["n"])
        for query in ("question", "last"):
            config = SimpleNamespace(query_aggregation=query, head_aggregation="mean")
            scores = score(None, case["attention"][None], image, config)
            for keep in case["keeps"]:
                kept = scores.topk(keep).indices.sort().values.tolist()
                found.append({"seed": seed, "keep": keep, "query": query, "kept": kept})
    return found


def vlm_pruner(clone: Clone) -> list[dict[str, Any]]:
    names = [f"VLMPruner.{name}" for name in ("calculate_similarity", "get_spatial_pos", "get_retained_image_token")]
    space = clone.take("llava/model/language_model/modeling_llama_self.py", *names)
    found = []
    for seed in SEEDS:
        case = cases.vlm_pruner(seed)
        ahead, n = case["ahead"], case["n"]
        for keep in case["keeps"]:
            asked = SimpleNamespace()
            for name in ("calculate_similarity", "get_spatial_pos"):
                setattr(asked, name, lambda *args, _name=name: space[_name](asked, *args))  # noqa: B023
            setting = {"image_token_start_index": ahead, "image_token_length": n, "reduction_ratio": 1 - keep / n}
            setting |= {"pivot_image_token": 4, "threshold": 0.8, "token_batch": 16}
            config = SimpleNamespace(VLMPruner_config=setting)
            # With one more channel for each token, what went into a state can be read off it.
            places, states = space["get_retained_image_token"](
                asked, config, _marked(case["hidden"]), case["keys"][None]
            )
            kept = [int(place) - ahead for place in places]
            marks = states[0, places, 320 + ahead :] / MARK
            into = [
                {i: round(float(row[i]), 6) for i in row.nonzero().flatten().tolist() if i != own}
                for own, row in zip(kept, marks, strict=True)
            ]
            found.append({"seed": seed, "keep": keep, "kept": kept, "into": into})
    return found


def ivc_prune(clone: Clone) -> list[dict[str, Any]]:
    """Of two layers the second is entered by what is kept; the code keeps half."""
    path = "transformers/src/transformers/models/qwen2_5_vl/modeling_qwen2_5_vl.py"
    names = ("calculate_avg_similarity_for_subset_einsum", "IVCP_forward_flashattention")
    space = clone.take(path, *(f"Qwen2_5_VLModel.{name}" for name in names), nn=torch.nn, Cache=object)
    found = []
    for seed in SEEDS:
        case, entered = cases.ivc_prune(seed), []

        def layer(hidden: Tensor, **rest: Any) -> Any:
            entered.append(rest["position_ids"][0, 0].tolist())  # noqa: B023
            return hidden, None, case["values"][None].transpose(1, 2)  # noqa: B023

        length = case["values"].shape[1]
        config = {"output_attentions": False, "output_hidden_states": False, "use_cache": True}
        asked = SimpleNamespace(config=SimpleNamespace(**config), gradient_checkpointing=False, training=False)
        asked.device, asked.head_dim, asked.layers = torch.device("cpu"), case["values"].shape[2], [layer, layer]
        asked.rotary_emb = lambda *_: (case["cos"][:, None], case["sin"][:, None])  # noqa: B023
        asked._update_causal_mask = asked.prune_past_key_values = lambda *_: None
        asked.norm = lambda states: states
        asked.calculate_avg_similarity_for_subset_einsum = partial(space[names[0]], asked)
        space[names[1]](
            asked,
            inputs_embeds=torch.zeros(1, length, 1),
            past_key_values=SimpleNamespace(get_seq_length=lambda: 0),
            return_dict=False,
            ivcp_config={"ivcp_k": 1},
            image_token_lengths=[case["n"]],
            image_token_start_indexes=[case["ahead"]],
        )
        image = range(case["ahead"], case["ahead"] + case["n"])
        found.append({"seed": seed, "kept": [place - case["ahead"] for place in entered[1] if place in image]})
    return found


def hawk(clone: Clone) -> list[dict[str, Any]]:
    names = ("repeat_kv", "compute_hawk_scores", "select_keep_indices")
    space = clone.take("src/hawk/pruning.py", *names)
    found = []
    for seed in SEEDS:
        case = cases.hawk(seed)
        n = case["keys"].shape[1]
        keys = space["repeat_kv"](case["keys"][None], len(case["queries"]) // len(case["keys"]))
        scores = space["compute_hawk_scores"](case["queries"][None], keys, case["weights"])
        for keep in case["keeps"]:
            kept = space["select_keep_indices"](torch.arange(n), scores, n, keep / n)[1].tolist()
            found.append({"seed": seed, "keep": keep, "kept": kept})
    return found


MARK = 1e-6


def _marked(rows: Tensor) -> Tensor:
    """[1, m, d + m]: a small number of its own beside each row; too small for it to be compared by."""
    return torch.cat((rows, MARK * torch.eye(len(rows))), dim=1)[None]


SOURCES: dict[str, tuple[str, str, Callable[[Clone], list[dict[str, Any]]]]] = {
    "hiprune": ("Danielement321/HiPrune", "6e83a1240874e99a25df34f54221a29bb24b7bc2", hiprune),
    "sparsevlm": ("Gumpest/SparseVLMs", "d8fa47fb53f6eeda5e06a702104762d8a544e080", sparsevlm),  # v1.5
    "pumer": ("csarron/PuMer", "8a00d85314175a4635d074fb003ae39da171ddc7", pumer),
    "dart": ("xqy1111111/DART", "5a19452fc173017191c247848673e0bde755695a", dart),  # a fork, at its authors' commit
    "vscan_vision": ("Tencent/SelfEvolvingAgent", "a82450e1b5e15070bee79ee8b79f8d9a97cb85f7", vscan_vision),
    "mustdrop_llm": ("liuting20/MustDrop", "909afa538bff22e10c02db2da101aa1870e21912", mustdrop_llm),
    "vispruner": ("Theia-4869/VisPruner", "aefa01adc7c7ce6334e880c88225e90cede760d1", vispruner),
    "hired": ("hasanar1f/HiRED", "502d6dd79a03e87cc808cedba8b8a951d93cb62b", hired),
    "otprune": ("xiwenc1/OTPrune", "3414730f39daa57e0629138d898f98ee682f0b2b", otprune),
    "scope": ("kinredon/SCOPE", "6bf73069e0d61307051cfda8e25925bc7b7afdd9", scope),
    "mmr": ("Tencent/AngelSlim", "67394ce55f6b6cfae702575fbc3c7a05c13fdd74", idpruner),
    "holov": ("obananas/HoloV", "1d2e65e961e698ff0e7d5bb4625489177dd9deba", holov),
    "prunesid": ("ZhengyaoFang/PruneSID", "4ef17d96b390027f31243bc7e1d27bdee77792a5", prunesid),
    "apet_input": ("MaQianKun0/ApET", "70cc01b215f4d74c5661c699919fe3aeda48bed0", apet_input),
    "clse": ("zjubinchen/CLSE", "cfc9710abe4a1bd5480e521f3acd86ded4855ff3", clse),
    "v2drop": ("xuyang-liu16/V2Drop", "219e03ede8cf6a70d1534903fa238b13dd900bbb", v2drop),
    "vlm_pruner": ("Casey-bit/VLMPruner", "556a9142c67dfb4c27420e31bb59e2efe502369a", vlm_pruner),
    "ivc_prune": ("FireRedTeam/IVC-Prune", "03afd9cee41f60bb30b51a4105839f2b5d467814", ivc_prune),
    "hawk": ("peppery77/HAWK", "3af20714738cb339f687fd9d110a39b257418104", hawk),
    "restore": ("cvlab-yonsei/RESTORE", "9b27e687a2b877d6facacae093b8d9686afa5c6f", restore),
    "priortr": ("CodeChildCZJ/PriorTR", "e442a4c14af1b333067a6b8310c9111cad922033", priortr),
}


@torch.no_grad()
def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("folder", type=Path)
    options.add_argument("--out", type=Path, default=OUT)
    options.add_argument("--methods", default=",".join(SOURCES))
    asked = options.parse_args()
    methods = json.loads(OUT.read_text())["methods"] if OUT.exists() else {}
    for name in asked.methods.split(","):
        repository, commit, run = SOURCES[name]
        runs = run(Clone(asked.folder, repository, commit))
        methods[name] = {"repository": repository, "commit": commit, "runs": runs}
        print(f"{name}: {len(runs)}", flush=True)
    text = ",\n".join(
        f" {json.dumps(name)}: {{{json.dumps('repository')}: {json.dumps(one['repository'])}, "
        f'"commit": {json.dumps(one["commit"])}, "runs": [\n  ' + ",\n  ".join(map(json.dumps, one["runs"])) + "]}"
        for name, one in methods.items()
    )
    asked.out.write_text(
        f'{{"schema": "gripvlm.authors_choices/1",\n"torch": "{torch.__version__}",\n"methods": {{\n{text}}}}}\n'
    )
    print(asked.out)


if __name__ == "__main__":
    main()
