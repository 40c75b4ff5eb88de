"""TinyMIM and MAE beside the reference code: networks filled by the rule that the fixtures' README gives."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sparing.distillation.finetuning import layer_decay_groups
from sparing.distillation.pretraining import half_cosine
from sparing.distillation.relations import (
    RELATIONS,
    Objective,
    RelationStudent,
    cls_kl,
    feature_smooth_l1,
    flat_rates,
    freeze,
    relation_kl,
    relation_smooth_l1,
    student_config,
)
from sparing.models.mae import (
    MAE,
    MAEViT,
    ViTConfig,
    ViTEncoder,
    block_feature,
    interpolate_positions,
    mae_loss,
    patchify,
    sincos_2d,
    unpatchify,
)

Arrays = Mapping[str, np.ndarray]
PRE_TRAINING = {"lr": 2.4e-3, "warmup": 15, "epochs": 300}
FINE_TUNING = {"lr": 2e-3, "warmup": 5, "epochs": 100, "floor": 1e-6}
"""Settings of the two schedules and of the sizes below, as the fixtures' README names them: no file holds them."""
DECODER = {"decoder_dim": 512, "decoder_depth": 8, "decoder_heads": 16}
CLASSES = 1000


def close(found: Any, expected: np.ndarray, what: str, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    found = found.detach().numpy() if isinstance(found, Tensor) else np.asarray(found)
    assert found.shape == expected.shape, f"{what}: shape {found.shape}, {expected.shape} in the reference"
    np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol, err_msg=what)


def filled(model: nn.Module, seed: int, names: Iterable[str], shapes: Iterable[str] | None = None) -> nn.Module:
    """Weights by the rule, drawn in the order of ``names``, which is the sorted one."""
    rng, state, names = np.random.default_rng(seed), model.state_dict(), [str(name) for name in names]
    assert names == sorted(names)
    left = set(state) - set(names)
    assert left <= {"pos_embed", "decoder_pos_embed"}, f"not filled: {left}"
    for name in names:
        shape = state[name].shape
        z = rng.standard_normal(tuple(shape))
        if name.endswith("bias"):
            z = 0.1 * z
        elif len(shape) == 1:
            z = 1 + 0.1 * z
        else:
            z = z / math.sqrt(math.prod(shape[1:]))
        state[name].copy_(torch.from_numpy(z.astype(np.float32)))
    if shapes is not None:
        assert ["x".join(map(str, state[name].shape)) for name in names] == [str(shape) for shape in shapes]
    return model.eval()


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def floats(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def norms(model: nn.Module, names: np.ndarray, expected: np.ndarray, what: str) -> None:
    found = gradients(model)
    assert set(found) == {str(name) for name in names}, f"{what}: other parameters have gradients"
    assert names.shape == expected.shape
    close([float(found[str(name)].norm()) for name in names], expected, what, 1e-3, 1e-7)


# --- the masked autoencoder


def autoencoder(arrays: Arrays) -> set[str]:
    config = json.loads(str(arrays["config"]))
    sizes = ViTConfig(
        config["img_size"],
        config["patch_size"],
        config["embed_dim"],
        config["depth"],
        config["num_heads"],
        mlp_ratio=config["mlp_ratio"],
        in_channels=config["in_chans"],
    )
    decoder = (config["decoder_embed_dim"], config["decoder_depth"], config["decoder_num_heads"])
    model = MAE(sizes, *decoder, mask_ratio=config["mask_ratio"])
    filled(model, int(arrays["seed"]), arrays["fill_names"], arrays["fill_shapes"])
    images = floats(normal(int(arrays["x_seed"]), config["batch"], config["in_chans"], *(config["img_size"],) * 2))
    noise = torch.from_numpy(arrays["noise"])
    drawn = np.random.default_rng(int(arrays["noise_seed"])).random(arrays["noise"].shape).astype(np.float32)
    close(drawn, arrays["noise"], "noise", 0, 0)
    keep, mask, restore = model.mask(images, noise)
    close(mask, arrays["mask"], "mask", 0, 0)
    close(restore, arrays["ids_restore"], "ids_restore", 0, 0)
    close(model.pos_embed, arrays["pos_embed"], "pos_embed")
    close(model.decoder_pos_embed, arrays["decoder_pos_embed"], "decoder_pos_embed")
    close(ViTEncoder.forward(model, images, keep), arrays["latent"], "latent")
    pred, _ = model.reconstruct(images, noise)
    patches = patchify(images, sizes.patch_size)
    close(pred, arrays["pred"], "pred")
    close(patches, arrays["patchified"], "patchified", 0, 0)
    close(unpatchify(pred, sizes.patch_size), arrays["unpatchified_pred"], "unpatchified_pred")
    compared = {
        *("config", "seed", "x_seed", "noise_seed", "fill_names", "fill_shapes", "noise", "mask", "ids_restore"),
        *("pos_embed", "decoder_pos_embed", "latent", "pred", "patchified", "unpatchified_pred"),
    }
    for norm_pix in (False, True):
        kind = f"normpix{int(norm_pix)}"
        if f"{kind}.loss" not in arrays:
            continue
        model.zero_grad()
        loss = mae_loss(patches, model.reconstruct(images, noise)[0], mask, norm_pix)
        close(loss, arrays[f"{kind}.loss"], f"{kind}.loss", 1e-5, 0)
        loss.backward()
        norms(model, arrays[f"{kind}.grad_names"], arrays[f"{kind}.grad_norms"], f"{kind}.grad_norms")
        compared |= {f"{kind}.{what}" for what in ("loss", "grad_names", "grad_norms")}
    return compared


# --- distillation


def distillation(arrays: Arrays) -> set[str]:
    said = {who: json.loads(str(arrays[f"{who}_config"])) for who in ("teacher", "student")}
    size, batch, block = int(arrays["img_size"]), int(arrays["batch"]), said["teacher"]["intermediate"]
    sizes = {
        who: ViTConfig(size, c["patch_size"], c["embed_dim"], c["depth"], c["num_heads"], mlp_ratio=c["mlp_ratio"])
        for who, c in said.items()
    }
    own = student_config(sizes["student"], sizes["teacher"], block)
    assert own.heads_of[-1] == said["student"]["last_heads"]
    teacher = ViTEncoder(sizes["teacher"])
    filled(teacher, int(arrays["seed_teacher"]), arrays["fill_names_teacher"])
    student = RelationStudent(own, sizes["teacher"], target_block=block)
    filled(student.encoder, int(arrays["seed_student"]), arrays["fill_names_student"])
    student.eval()
    teacher = freeze(teacher)
    raw = normal(int(arrays["x_teacher_seed"]), batch, 3, size, size)
    x_t = floats(raw)
    x_s = floats(raw + 0.1 * normal(int(arrays["x_student_seed"]), batch, 3, size, size))
    compared = {
        *("teacher_config", "student_config", "img_size", "batch", "seed_teacher", "seed_student"),
        *("x_teacher_seed", "x_student_seed", "fill_names_teacher", "fill_names_student"),
    }

    taught, last = teacher.blocks[block - 1], student.encoder.blocks[-1]
    h_t = teacher.into(teacher.tokens(x_t), block)
    h_s = student.encoder.into(student.encoder.tokens(x_s), own.depth)
    theirs = dict(zip("qkv", taught.attn.split(taught.norm1(h_t)), strict=True))
    mine = dict(zip("qkv", last.attn.split(last.norm1(h_s)), strict=True))
    for who, parts in (("teacher", theirs), ("student", mine)):
        for a, b in ("qk", "vv"):
            scores = parts[a] @ parts[b].mT / math.sqrt(parts[a].shape[-1])
            close(scores.softmax(-1), arrays[f"{who}_{a}{b}"], f"{who}_{a}{b}")
            compared.add(f"{who}_{a}{b}")
    for a, b in ("qk", "vv"):
        loss = relation_kl(theirs[a], theirs[b], mine[a], mine[b])
        close(loss, arrays[f"loss_{a}{b}"], f"loss_{a}{b}", 1e-5, 0)
        compared.add(f"loss_{a}{b}")
    loss = student(teacher, x_t, x_s)
    close(loss, arrays["loss"], "loss", 1e-5, 0)
    loss.backward()
    norms(student.encoder, arrays["params_with_grad"], arrays["grad_norms"], "grad_norms")
    assert set(student.untrained()) == {str(name) for name in arrays["params_without_grad"]}
    compared |= {"loss", "params_with_grad", "params_without_grad", "grad_norms"}
    found = gradients(student.encoder)
    for name in [name for name in arrays if name.startswith("grad.")]:
        expected = arrays[name]
        close(found[name.removeprefix("grad.")], expected, name, 1e-4, 1e-5 * float(np.abs(expected).max()))
        compared.add(name)
    return compared | variants(arrays, teacher, sizes["teacher"], student.encoder, block, x_t, x_s, theirs, mine)


def variants(
    arrays: Arrays,
    teacher: Any,
    teacher_sizes: ViTConfig,
    encoder: ViTEncoder,
    block: int,
    x_t: Tensor,
    x_s: Tensor,
    theirs: Mapping[str, Tensor],
    mine: Mapping[str, Tensor],
) -> set[str]:
    """The other targets of the study: by the functions, and by a student that is made for them."""

    def trained(objective: Objective) -> float:
        model = RelationStudent(encoder.config, teacher_sizes, objective, block)
        model.encoder.load_state_dict(encoder.state_dict())
        if model.projection is not None:
            model.projection.load_state_dict(
                {
                    "weight": torch.from_numpy(arrays["variant.feature_proj_weight"]),
                    "bias": torch.zeros(teacher_sizes.dim),
                }
            )
        return model.eval()(teacher, x_t, x_s).item()

    compared = set()
    for pair in RELATIONS:
        four = (theirs[pair[0]], theirs[pair[1]], mine[pair[0]], mine[pair[1]])
        for kind, function, softmax in (
            ("kl", relation_kl, True),
            ("smoothl1_nosoftmax", relation_smooth_l1, False),
        ):
            name = f"variant.{kind}_{pair}"
            if name in arrays:
                close(function(*four), arrays[name], name, 1e-5, 0)
                close(trained(Objective(relations=(pair,), softmax=softmax)), arrays[name], name, 1e-5, 0)
                compared.add(name)
    with torch.no_grad():
        h_t, h_s = teacher.into(teacher.tokens(x_t), block), encoder.into(encoder.tokens(x_s), encoder.config.depth)
        taught, last = teacher.blocks[block - 1], encoder.blocks[-1]
        made = {
            "block_feature_teacher": block_feature(taught, h_t, "block"),
            "block_feature_student": block_feature(last, h_s, "block"),
            "teacher_attention_feature_nores": block_feature(taught, h_t, "attention"),
            "teacher_ffn_feature_nores": block_feature(taught, h_t, "ffn"),
        }
        for name, value in made.items():
            if f"variant.{name}" in arrays:
                close(value, arrays[f"variant.{name}"], name)
                compared.add(f"variant.{name}")
        if "variant.feature_proj_weight" not in arrays:
            return compared
        projected = made["block_feature_student"] @ torch.from_numpy(arrays["variant.feature_proj_weight"]).T
        taken = made["block_feature_teacher"]
        for name, value, objective in (
            ("feature_smoothl1_beta2", feature_smooth_l1(taken, projected), Objective("features")),
            ("cls_kl_softmax", cls_kl(taken[:, 0], projected[:, 0]), Objective("cls_token")),
        ):
            if f"variant.{name}" in arrays:
                close(value, arrays[f"variant.{name}"], name, 1e-5, 0)
                close(trained(objective), arrays[f"variant.{name}"], name, 1e-5, 0)
                compared.add(f"variant.{name}")
    return compared | {"variant.feature_proj_weight"}


# --- sizes, schedules, tables


def counted(make: Callable[[], nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return make()


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def students(arrays: Arrays) -> set[str]:
    """tinymim_<size>_patch<p>: a student whose last block has another number of heads."""
    compared = set()
    for name in sorted({key.partition(".")[0] for key in arrays if key.startswith("tinymim_")}):
        size, patch = re.fullmatch(r"tinymim_(vit_\w+?)_patch(\d+)", name).groups()  # type: ignore[union-attr]
        heads = arrays[f"{name}.heads"].tolist()
        config = ViTConfig.named(size, patch_size=int(patch), heads=heads[0], last_heads=heads[-1])
        assert list(config.heads_of) == heads
        rates = arrays[f"{name}.drop_path"]
        close(flat_rates(float(rates[0]), len(heads)), rates, f"{name}.drop_path", 1e-6, 0)
        model = counted(lambda config=config: ViTEncoder(config))
        assert [block.attn.heads for block in model.blocks] == heads
        assert parameters(model) == arrays[f"{name}.params_trainable"]
        assert parameters(model) + model.pos_embed.numel() == arrays[f"{name}.params_with_pos_embed"]
        assert list(model.state_dict()) == [str(n) for n in arrays[f"{name}.state_names"]]
        parts = ("heads", "drop_path", "params_trainable", "params_with_pos_embed", "state_names")
        compared |= {f"{name}.{part}" for part in parts}
    return compared


def totals(arrays: Arrays) -> set[str]:
    compared = set()
    for name in [name for name in arrays if re.fullmatch(r"mae_vit_\w+_patch\d+\.params_trainable", name)]:
        size, patch = re.fullmatch(r"mae_(vit_\w+)_patch(\d+)\.params_trainable", name).groups()  # type: ignore[union-attr]
        config = ViTConfig.named(size, patch_size=int(patch))
        whole, encoder = counted(lambda config=config: MAE(config, **DECODER)), counted(lambda c=config: ViTEncoder(c))
        inner = name.replace("params", "encoder")
        assert parameters(whole) == arrays[name]
        assert parameters(encoder) == arrays[inner]
        compared |= {name, inner}
    for name in [name for name in arrays if re.fullmatch(r"finetune_\w+\.params", name)]:
        config = ViTConfig.named(f"vit_{name.removeprefix('finetune_').removesuffix('.params')}")
        model = counted(lambda c=config: MAEViT(3, CLASSES, c.image_size, c.patch_size, c.dim, c.depth, c.heads))
        assert parameters(model) == arrays[name]
        compared.add(name)
    return compared


def fine_tuning(arrays: Arrays) -> set[str]:
    compared = set()
    for key in [key for key in arrays if key.endswith(".config")]:
        name = key.removesuffix(".config")
        numbers = list(map(int, re.findall(r"\d+", str(arrays[key]))))
        size, patch, dim, depth, heads, classes, seed, x_seed, batch = numbers
        model = MAEViT(3, classes, size, patch, dim, depth, heads)
        filled(model, seed, arrays[f"{name}.names"])
        close(model(floats(normal(x_seed, batch, 3, size, size))), arrays[f"{name}.logits"], f"{name}.logits")
        compared |= {key, f"{name}.names", f"{name}.logits"}
        for groups in sorted({k.rpartition(".")[0] for k in arrays if k.startswith("layer_decay_")}):
            decay = float(groups.removeprefix("layer_decay_"))
            made = {n: group for group in layer_decay_groups(model, 0.05, decay) for n in group["names"]}
            names = [str(n) for n in arrays[f"{groups}.names"]]
            assert set(names) == set(made)
            for what in ("lr_scale", "weight_decay"):
                close([made[n][what] for n in names], arrays[f"{groups}.{what}"], f"{groups}.{what}", 1e-9, 0)
                compared.add(f"{groups}.{what}")
            compared.add(f"{groups}.names")
    return compared


def schedules_and_tables(arrays: Arrays) -> set[str]:
    compared = set()
    for kind, settings in (("pretrain_lr", PRE_TRAINING), ("finetune_lr", FINE_TUNING)):
        if f"{kind}.epochs" in arrays:
            found = [half_cosine(epoch, **settings) for epoch in arrays[f"{kind}.epochs"].tolist()]
            close(found, arrays[f"{kind}.values"], kind, 1e-6, 1e-15)
            compared |= {f"{kind}.epochs", f"{kind}.values"}
    outs = [re.fullmatch(r"interp\.out_(\d+)x(\d+)", name) for name in arrays]
    ins = [name for name in arrays if name.startswith("interp.in_")]
    for match in filter(None, outs):
        assert len(ins) == 1
        assert match[1] == match[2]
        close(interpolate_positions(torch.from_numpy(arrays[ins[0]]), int(match[1])), arrays[match[0]], match[0])
        compared |= {match[0], ins[0]}
    for name in [name for name in arrays if name.startswith("sincos_")]:
        dim, grid, token = re.fullmatch(r"sincos_dim(\d+)_grid(\d+)(_cls)?", name).groups()  # type: ignore[union-attr]
        close(sincos_2d(int(dim), int(grid), bool(token)), arrays[name], name)
        compared.add(name)
    return compared


def sizes_and_schedules(arrays: Arrays) -> set[str]:
    return students(arrays) | totals(arrays) | fine_tuning(arrays) | schedules_and_tables(arrays)


# --- all


def opened(file: Path) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def compare(arrays: Arrays) -> set[str]:
    if "teacher_config" in arrays:
        return distillation(arrays)
    return autoencoder(arrays) if "noise" in arrays else sizes_and_schedules(arrays)


def test_every_file_is_understood_and_reproduced(oracles: Callable[[str], list[Path]], record_property: Any) -> None:
    count = 0
    for file in oracles("tinymim"):
        arrays = opened(file)
        compared = compare(arrays)
        assert compared == arrays.keys(), f"{file.name}: missing or not understood: {sorted(arrays.keys() ^ compared)}"
        count += len(compared)
    record_property("arrays", count)
    print(f"TinyMIM: {count} arrays read, all that are outputs compared")


def one_with(files: Iterable[Path], key: str) -> dict[str, np.ndarray]:
    return next(arrays for arrays in map(opened, files) if key in arrays)


def test_other_noise_would_be_noticed(oracles: Callable[[str], list[Path]]) -> None:
    arrays = one_with(oracles("tinymim"), "noise_seed")
    with pytest.raises(AssertionError, match="noise"):
        autoencoder(arrays | {"noise": 1 - arrays["noise"]})


def test_another_image_would_be_noticed(oracles: Callable[[str], list[Path]]) -> None:
    arrays = one_with(oracles("tinymim"), "teacher_config")
    with pytest.raises(AssertionError, match="student_qk"):
        distillation(arrays | {"x_student_seed": arrays["x_student_seed"] + 1})
