"""The DOORPING fixtures: neurons, updates of the trigger, stamped images, rates."""

from __future__ import annotations

import numpy as np
import torch
from dd_backdoor_arrays import Arrays, channels_first, close, near_largest, weights_of
from dd_unroll import network_of

from sparing.audits.backdoor.attack import poisoned_count
from sparing.audits.backdoor.layers import linear_layer
from sparing.audits.backdoor.metrics import backdoor_rates
from sparing.audits.backdoor.pixels import PixelSpace
from sparing.audits.backdoor.triggers import PatchTrigger, activations, rank_units, update_trigger

LONG, FIRST_STEPS, CLOSE, FAR = 1000, 20, 1e-3, 2e-2


def doorping(arrays: Arrays) -> set[str]:
    """Names of the arrays compared or used."""
    names = {"cfg", "alpha", "layer", "mean", "std", "poison_n", "poison_portion", "images_uint8"}
    channels, size, width, depth, side, topk = (int(value) for value in arrays["cfg"])
    weights = weights_of(arrays)
    model = network_of(weights, size)
    convolutions = [array for array in weights.values() if array.ndim == 4]
    assert len(convolutions) == depth
    assert {len(array) for array in convolutions} == {width}
    names |= {f"w/{name}" for name in weights}
    space = PixelSpace(tuple(arrays["mean"].tolist()), tuple(arrays["std"].tolist()))
    layer, alpha = int(arrays["layer"]), float(arrays["alpha"])

    trigger = PatchTrigger((channels, size, size), space, side, value=arrays["patch_uint8"].transpose(2, 0, 1))
    np.testing.assert_array_equal([trigger.row, trigger.row + side], arrays["patch_rows"])
    np.testing.assert_array_equal([trigger.column, trigger.column + side], arrays["patch_rows"])
    np.testing.assert_array_equal(trigger.mask, arrays["mask"])
    np.testing.assert_array_equal(trigger.to_uint8().numpy().transpose(1, 2, 0), arrays["patch_uint8"])
    close(trigger.image[None], arrays["trigger_init"], "trigger_init")
    names |= {"patch_rows", "mask", "patch_uint8", "trigger_init"}

    start = torch.tensor(arrays["trigger_init"])
    linear = linear_layer(model, start, layer)
    ranked = rank_units(linear.weight).numpy()
    for name in (name for name in arrays if name.startswith("neurons_top")):
        np.testing.assert_array_equal(ranked[: int(name.removeprefix("neurons_top"))], arrays[name], name)
        names.add(name)
    close(
        activations(model, linear, start),
        arrays["penultimate_activation_of_trigger"],
        "penultimate_activation_of_trigger",
    )
    names.add("penultimate_activation_of_trigger")

    evaluations = int(arrays["n_loss_evals"])
    done = update_trigger(model, start[0], trigger.mask, layer, topk, alpha, LONG)
    np.testing.assert_array_equal(done.units, arrays["neuron"])
    close(np.array([done.start]), arrays["init_activation"], "init_activation")
    close(np.array(done.losses), arrays["losses"], "losses", atol=0)
    assert len(done.losses) == evaluations
    near_largest(
        done.image[None], arrays["trigger_final"], "trigger_final", CLOSE if done.steps <= FIRST_STEPS else FAR
    )
    names |= {"n_loss_evals", "neuron", "init_activation", "losses", "trigger_final"}
    for name in (name for name in arrays if name.startswith("trigger_before_eval_")):
        steps = int(name.removeprefix("trigger_before_eval_"))
        before = update_trigger(model, start[0], trigger.mask, layer, topk, alpha, steps)
        near_largest(before.image[None], arrays[name], name, CLOSE if steps <= FIRST_STEPS else FAR)
        names.add(name)

    with torch.no_grad():
        linear.bias -= 1000
        dead = update_trigger(model, start[0], trigger.mask, layer, topk, alpha, LONG)
        linear.bias += 1000
    assert dead.moved is not bool(arrays["dead_neuron_leaves_trigger_unchanged"])
    names.add("dead_neuron_leaves_trigger_unchanged")

    images = space.from_uint8(channels_first(arrays["images_uint8"]))
    white = PatchTrigger((channels, size, size), space, side)
    stamped = space.to_uint8(white.apply(images))
    np.testing.assert_array_equal(stamped, channels_first(arrays["stamped_naive_uint8"]))
    trigger.image = torch.tensor(arrays["trigger_final"])[0]
    close(trigger.apply(images), arrays["stamped_optimised"], "stamped_optimised")
    assert poisoned_count(int(arrays["poison_n"]), float(arrays["poison_portion"])) == arrays["poison_count"]
    names |= {"stamped_naive_uint8", "stamped_optimised", "poison_count"}

    given = [torch.tensor(arrays[name]) for name in ("logits_clean", "logits_triggered", "labels")]
    rates = backdoor_rates(*given, target=0)
    expected = {
        "cta": rates.cta,
        "asr_all_images": rates.asr_all,
        "asr_excluding_target_class": rates.asr,
        "false_target_rate_clean": rates.null,
    }
    for name, rate in expected.items():
        close(rate.value, arrays[name], name, rtol=1e-12, atol=0)
    return names | {"logits_clean", "logits_triggered", "labels", *expected}
