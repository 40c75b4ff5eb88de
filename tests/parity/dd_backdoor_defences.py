"""The fixtures of defences: formulas worked out on given numbers."""

from __future__ import annotations

import re

import numpy as np
import torch
from dd_backdoor_arrays import Arrays, channels_first, close, near_largest, weights_of
from dd_unroll import network_of
from torch import nn

from sparing.audits.backdoor.latent import cluster_activations, spectral_removed, spectral_scores
from sparing.audits.backdoor.layers import block_ends, block_outputs
from sparing.audits.backdoor.metrics import mad_outliers
from sparing.audits.backdoor.neural_cleanse import MaskWeight, cleanse_loss
from sparing.audits.backdoor.pixels import PixelSpace
from sparing.audits.backdoor.repair import attention_loss, attention_map, channel_means, prune_order
from sparing.audits.backdoor.strip import blend, blend_entropy, entropy_threshold

SPACES = {
    1: PixelSpace((0.2861,), (0.3530,)),
    3: PixelSpace((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
}
"""By number of channels, as the fixtures' description has it."""
GRADIENTS = 1e-3


def neural_cleanse(arrays: Arrays, model: nn.Module) -> set[str]:
    x = torch.tensor(arrays["x"])
    space, target = SPACES[x.shape[1]], int(arrays["target"])
    close(space.from_uint8(channels_first(arrays["images_uint8"])), arrays["x"], "x")
    names = {"x", "target", "images_uint8"}
    cases = sorted({found[1] for found in (re.fullmatch(r"nc_(\d+)_mask_raw", name) for name in arrays) if found})
    assert cases, "no case of Neural Cleanse"
    for case in cases:
        mask, pattern = (
            torch.tensor(arrays[f"nc_{case}_{which}_raw"], requires_grad=True) for which in ("mask", "pattern")
        )
        loss = cleanse_loss(model, x, target, mask, pattern, float(arrays[f"nc_{case}_lambda"]), space)
        found = {"logits": loss.logits, "ce": loss.cross_entropy, "mask_l1": loss.mask_l1, "loss": loss.total}
        for name, value in found.items():
            close(value, arrays[f"nc_{case}_{name}"], f"nc_{case}_{name}")
        gradients = dict(zip(("mask", "pattern"), torch.autograd.grad(loss.total, (mask, pattern)), strict=True))
        for name, value in gradients.items():
            near_largest(value, arrays[f"nc_{case}_grad_{name}"], f"nc_{case}_grad_{name}", GRADIENTS)
        names |= {f"nc_{case}_{name}" for name in ("mask_raw", "pattern_raw", "lambda", *found)}
        names |= {f"nc_{case}_grad_{name}" for name in gradients}
    sets = [name.removeprefix("nc_norms_") for name in arrays if name.startswith("nc_norms_")]
    assert sets, "no norms of masks"
    for case in sets:
        outliers = mad_outliers(arrays[f"nc_norms_{case}"], "lower")
        assert outliers is not None
        close(outliers.deviation, arrays[f"nc_mad_{case}"], f"nc_mad_{case}")
        close(outliers.index, arrays[f"nc_anomaly_index_{case}"], f"nc_anomaly_index_{case}")
        np.testing.assert_array_equal(outliers.flagged, arrays[f"nc_flagged_{case}"])
        names |= {f"nc_{name}_{case}" for name in ("norms", "mad", "anomaly_index", "flagged")}
    weight = MaskWeight()
    close(
        [weight.update(float(success)) for success in arrays["nc_success"]],
        arrays["nc_lambda_seq"],
        "nc_lambda_seq",
        atol=0,
    )
    return names | {"nc_success", "nc_lambda_seq"}


def strip(arrays: Arrays) -> set[str]:
    names = {"strip_frr"}
    entropies = {}
    for kind in ("clean", "trig"):
        entropies[kind] = blend_entropy(torch.tensor(arrays[f"strip_probs_{kind}"]))
        close(entropies[kind], arrays[f"strip_entropy_{kind}"], f"strip_entropy_{kind}")
        names |= {f"strip_probs_{kind}", f"strip_entropy_{kind}"}
    threshold = entropy_threshold(entropies["clean"], float(arrays["strip_frr"]))
    detection = float((entropies["trig"] < threshold).double().mean())
    for name, value in {"threshold": threshold, "detection": detection, "far": 1 - detection}.items():
        close(value, arrays[f"strip_{name}"], f"strip_{name}")
        names.add(f"strip_{name}")
    images = channels_first(arrays["images_uint8"])
    for how in ("add", "half"):
        expected = channels_first(arrays[f"strip_blend_{how}"])
        count = len(expected)
        mixed = blend(images[:count], images[count : 2 * count], how)
        np.testing.assert_array_equal(mixed, expected, f"strip_blend_{how}")
        names.add(f"strip_blend_{how}")
    return names


def data_set(arrays: Arrays) -> set[str]:
    rows = torch.tensor(arrays["spec_reps"])
    scores = spectral_scores(rows)
    close(scores, arrays["spec_scores"], "spec_scores")
    np.testing.assert_array_equal(spectral_removed(scores, float(arrays["spec_eps"])), arrays["spec_removed"])
    clusters = cluster_activations(rows)
    close(clusters.small_share, arrays["ac_small_fraction"], "ac_small_fraction")
    close(clusters.silhouette, arrays["ac_silhouette"], "ac_silhouette")
    np.testing.assert_array_equal(clusters.small, arrays["ac_small_members"])
    return {
        "spec_reps", "spec_eps", "spec_scores", "spec_removed",
        "ac_small_fraction", "ac_silhouette", "ac_small_members",
    }  # fmt: skip


def repairs(arrays: Arrays, model: nn.Module) -> set[str]:
    x = torch.tensor(arrays["x"])
    with torch.no_grad():
        last = block_outputs(model, x, block_ends(model, x[:1]))[1][-1]
    close(last, arrays["features_last"], "features_last")
    means = channel_means(last)
    close(means, arrays["fp_channel_mean"], "fp_channel_mean")
    np.testing.assert_array_equal(prune_order(means), arrays["fp_prune_order"])
    student, teacher = (torch.tensor(arrays[f"nad_{which}"]) for which in ("student", "teacher"))
    close(attention_map(student), arrays["nad_map_student"], "nad_map_student")
    close(attention_loss(student, teacher), arrays["nad_loss"], "nad_loss")
    used = {"nad_student", "nad_teacher", "nad_map_student", "nad_loss"}
    return used | {"features_last", "fp_channel_mean", "fp_prune_order"}


def defences(arrays: Arrays) -> set[str]:
    """Names of the arrays compared or used."""
    weights = weights_of(arrays)
    model = network_of(weights, arrays["x"].shape[-1])
    names = {f"w/{name}" for name in weights}
    return names | neural_cleanse(arrays, model) | strip(arrays) | data_set(arrays) | repairs(arrays, model)
