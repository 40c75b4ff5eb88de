"""Each defence on networks with and without a planted backdoor, or on cases whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from backdoor_cases import (
    CLASSES,
    PIXELS,
    SIZE,
    TARGET,
    backdoored_model,
    clean_model,
    fresh,
    pictures,
    poisoned,
    stamped,
    subject,
    white_patch,
)  # fmt: skip
from torch import nn

from sparing.audits.backdoor import (
    ActivationClustering,
    AttentionDistillation,
    FinePruning,
    Images,
    InputTransforms,
    NeuralCleanse,
    OwnSetComparison,
    PatchScan,
    PixelRange,
    ResidualMap,
    SpectralSignatures,
    Stamp,
    Strip,
    Subject,
    UnitStimulation,
    every_defence,
)
from sparing.audits.backdoor.latent import cluster_activations
from sparing.audits.backdoor.neural_cleanse import MaskWeight, reverse_trigger
from sparing.audits.backdoor.repair import prune_channels
from sparing.audits.backdoor.stimulation import stimulation_rises
from sparing.audits.backdoor.transformations import flip, jpeg, median_filter, shift, shrink_pad
from sparing.core.errors import InvalidValue


class Reactive(nn.Module):
    """Unsure of everything but the white patch in its corner."""

    def forward(self, x):
        corner = PIXELS.to_unit(x)[:, 0, SIZE - 3 : SIZE - 1, SIZE - 3 : SIZE - 1].flatten(1).amin(dim=1)
        spread = 0.01 * x.flatten(1)[:, :CLASSES]
        spread[:, TARGET] = -0.1  # never chosen without the patch
        return spread + 30 * (corner > 0.99)[:, None] * nn.functional.one_hot(torch.tensor(TARGET), CLASSES)


def test_neural_cleanse_finds_the_class_and_a_trigger_that_works():
    given = subject(backdoored_model(), known=False)
    found = NeuralCleanse(epochs=15).examine(given)
    assert found.verdict == "evidence"
    assert found.suspects == (TARGET,)
    assert found.score > found.threshold == 2
    (stamp,) = found.stamps
    assert stamp.target == TARGET
    assert (given.model(stamp.apply(given.holdout.x)).argmax(dim=1) == TARGET).float().mean() > 0.9
    assert found.pictures[f"class {TARGET}"].shape == (1, SIZE, SIZE)


def test_a_class_that_no_mask_reaches_is_left_out():
    class Stubborn(nn.Module):
        def forward(self, x):
            return torch.tensor([1.0, 0, 0]) + 0 * x.sum(dim=(1, 2, 3))[:, None]

    x = pictures(8, 0).x
    assert math.isinf(reverse_trigger(Stubborn(), x, 1, PIXELS, epochs=2).l1)
    assert not math.isinf(reverse_trigger(Stubborn(), x, 0, PIXELS, epochs=2).l1)


def test_the_weight_of_a_mask_counts_epochs_in_a_row():
    weight = MaskWeight(1.0)
    assert [weight.update(s) for s in (1, 1, 1, 1, 0, 1, 1, 1, 1)] == [1.0] * 9
    assert weight.update(0.99) == 1.5
    assert [weight.update(0.5) for _ in range(5)][-1] == 1.5 / 1.5**1.5


def test_strip_tells_inputs_that_keep_their_class():
    holdout = pictures(120, 1)
    dim = Images(PIXELS.normalise(0.4 * PIXELS.to_unit(holdout.x)), holdout.y)  # no two of them add up to white
    found = Strip(blends=10, inputs=40).examine(replace(subject(Reactive()), holdout=dim))
    assert (found.verdict, found.suspects, found.score) == ("evidence", (TARGET,), 1.0)
    assert found.figures[f"far_{TARGET}"] == 0
    assert found.figures["false_alarms"] < 0.2
    without = Strip(blends=200, inputs=10).examine(subject(Reactive(), known=False))  # more blends than pictures
    assert without.verdict == "not applicable"
    assert "false_alarms" in without.figures


def test_strip_refuses_few_images():
    given = subject(Reactive())
    small = replace(given, holdout=given.holdout.of(torch.arange(49)))
    with pytest.raises(InvalidValue, match="49 images; at least 50"):
        Strip().examine(small)


def test_pictures_are_moved_and_filtered_as_said():
    unit = torch.arange(9.0).view(1, 1, 3, 3) / 10
    expected = torch.zeros(3, 3)
    expected[1:, :2] = unit[0, 0, :2, 1:]
    assert torch.equal(shift(unit, 1, -1)[0, 0], expected)
    assert torch.equal(shift(unit, 3, 0), torch.zeros_like(unit))
    assert torch.equal(flip(unit)[0, 0, 0], unit[0, 0, 0].flip(0))
    assert median_filter(unit)[0, 0, 1, 1] == unit[0, 0, 1, 1]
    lonely = torch.zeros(1, 1, 5, 5)
    lonely[0, 0, 2, 2] = 1
    assert not median_filter(lonely).any()
    ones = shrink_pad(torch.ones(20, 1, 8, 8), 3, torch.Generator().manual_seed(0))
    assert (ones.flatten(1).sum(dim=1) == 25).all()
    assert len({tuple(image.flatten().tolist()) for image in ones}) > 1
    colour = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    rough, fine = ((jpeg(colour, quality) - colour).abs().mean() for quality in (25, 95))
    assert fine < rough < 0.3
    with pytest.raises(InvalidValue, match="2 channels"):
        jpeg(torch.zeros(1, 2, 8, 8), 50)
    with pytest.raises(InvalidValue, match="8 pixels off an image of 8 x 8"):
        shrink_pad(colour[:, :1, :8, :8], 8, torch.Generator())


def test_transformations_that_spoil_the_patch_mitigate_the_attack():
    found = InputTransforms().examine(subject(backdoored_model()))
    after = found.figures["after"]
    assert len(after) == 10
    assert found.figures["asr"][TARGET] > 0.9
    assert after["median_3"][f"asr_{TARGET}"] < 0.5
    assert found.verdict == "mitigated"
    clean = InputTransforms().examine(subject(clean_model()))
    assert (clean.verdict, clean.remark) == ("not applicable", "the trigger has no effect to begin with")
    assert InputTransforms().examine(subject(clean_model(), known=False)).verdict == "not applicable"


def test_pruning_takes_the_least_active_channels_and_stops_in_time():
    model, holdout = clean_model(), pictures(120, 1)
    changed, pruned = prune_channels(model, holdout, drop=0.04)
    assert 0 < len(pruned) < 8
    outputs = changed.features(holdout.x)
    assert not outputs[:, pruned].any()
    kept = [c for c in range(8) if c not in pruned]
    assert torch.equal(outputs[:, kept], model.features(holdout.x)[:, kept])
    means = model.features(holdout.x).mean(dim=(0, 2, 3))
    assert means[pruned].max() <= means[kept].min()
    assert len(prune_channels(model, holdout, drop=2.0)[1]) == 7


@pytest.mark.parametrize(
    "defence", [FinePruning(epochs=3), AttentionDistillation(epochs=3)], ids=["fine_pruning", "nad"]
)
def test_repairs_measure_what_they_leave_and_change_no_model(defence):
    model = backdoored_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = defence.examine(subject(model))
    assert found.verdict in ("mitigated", "not mitigated")
    assert found.figures[f"asr_before_{TARGET}"] > 0.9
    excess = found.figures[f"asr_after_{TARGET}"] / found.figures[f"asr_before_{TARGET}"]
    assert found.score == pytest.approx(excess, abs=0.1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_rises_are_a_units_best_over_all_other_classes():
    weight = torch.tensor([[1.0, 0.0], [3.0, -1.0], [0.5, 2.0]])
    rises = stimulation_rises(weight, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(rises, torch.tensor([[-4.0, 4.0, -5.0], [-2.0, -3.0, 2.0]]))


def test_a_unit_that_the_patch_alone_drives_is_found():
    class Corner(nn.Module):
        """One hidden unit sees the corner, the others the mean of a third of the picture each."""

        def __init__(self):
            super().__init__()
            self.hidden, self.head = nn.Linear(SIZE * SIZE, 3), nn.Linear(3, 3)
            with torch.no_grad():
                weight = torch.zeros(3, SIZE, SIZE)
                weight[0, SIZE - 3 : SIZE - 1, SIZE - 3 : SIZE - 1] = 2.0
                weight[1, :4], weight[2, 4:8] = 0.05, 0.05
                self.hidden.weight.copy_(weight.flatten(1))
                self.hidden.bias.fill_(0)
                self.head.weight.copy_(torch.diag(torch.tensor([3.0, 1.0, 1.0])))
                self.head.bias.copy_(torch.tensor([-20.0, 0, 0]))

        def forward(self, x):
            return self.head(torch.relu(self.hidden(x.flatten(1))))

    images = Images(pictures(60, 0).x, torch.arange(60) % 2 + 1)
    given = Subject(Corner(), images, PIXELS, 3)
    found = UnitStimulation(pairs=1, weight=0.1, area=0.2, steps=100).examine(given)
    assert (found.verdict, found.suspects) == ("evidence", (0,))
    assert found.figures["pairs"][0]["unit"] == 0
    too_large = UnitStimulation(pairs=1, weight=0.0, steps=5).examine(given)
    assert (too_large.verdict, too_large.remark) == ("no evidence", "no mask is small enough to count")


def test_features_of_a_class_that_fall_apart_are_seen():
    generator = torch.Generator().manual_seed(0)
    x = PIXELS.normalise(torch.rand(6 * 60, 1, SIZE, SIZE, generator=generator) * 0.2)
    labels = torch.arange(6).repeat_interleave(60)
    x[:10] = PIXELS.normalise(torch.rand(10, 1, SIZE, SIZE, generator=generator) * 0.2 + 0.8)
    given = subject(fresh(), condensed=Images(x, labels))
    spectral, clusters = SpectralSignatures().examine(given), ActivationClustering().examine(given)
    assert (spectral.verdict, spectral.suspects) == ("evidence", (0,))
    removed = spectral.figures["removed"]["0.1"][0]
    assert len(removed) == 9
    assert set(removed) <= set(range(10))
    assert 0 in clusters.suspects
    assert clusters.figures["small_members"][0] == list(range(10))


def test_few_or_equal_rows_are_no_pass():
    few = subject(fresh(), condensed=pictures(60, 0))
    for defence in (SpectralSignatures(), ActivationClustering()):
        found = defence.examine(few)
        assert (found.verdict, found.remark) == ("not applicable", "at most 10 images a class; at least 50 are needed")
        assert "no condensed set" in defence.examine(subject(fresh())).remark
    same = cluster_activations(torch.ones(60, 4, dtype=torch.double))
    assert (same.small_share, len(same.small)) == (0.0, 0)


def test_a_patch_in_one_class_stands_out_on_the_residual_map():
    real, condensed, own = pictures(240, 0), pictures(60, 3), pictures(60, 4)
    x = condensed.x.clone()
    x[condensed.y == 2] = stamped(x[condensed.y == 2])
    for defence in (ResidualMap(), OwnSetComparison()):
        found = defence.examine(subject(fresh(), condensed=Images(x, condensed.y), reference=real, own=own))
        assert found.verdict == "evidence"
        assert 2 in found.suspects
        assert found.figures["places"][2] == (SIZE - 3, SIZE - 3)
        assert found.figures["statistic"].argmax() == 2
    assert OwnSetComparison().examine(subject(fresh(), condensed=condensed)).verdict == "not applicable"
    assert ResidualMap().examine(subject(fresh())).verdict == "not applicable"
    missing = condensed.of(condensed.y != 4)
    with pytest.raises(InvalidValue, match="condensed set: class 4 has no image"):
        ResidualMap().examine(subject(fresh(), condensed=missing))


def test_a_scan_with_patches_finds_the_place():
    wide = PatchScan(sides=(4,), random=0, images=30)
    found = wide.examine(subject(Reactive(), known=False))
    assert found.figures["where"][TARGET] == {"side": 4, "row": 8, "column": 8, "patch": "white"}
    assert found.figures["largest_gain"][TARGET] > 0.9


def test_pixels_out_of_range_are_seen_at_once():
    def burn(x):
        return x + 100 * white_patch().mask

    given = subject(clean_model())
    assert PixelRange().examine(given).verdict == "no evidence"
    found = PixelRange().examine(replace(given, stamps=(Stamp(1, burn, "x"),)))
    assert (found.verdict, found.suspects) == ("evidence", (1,))
    assert found.score == pytest.approx(25, rel=0.05)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: NeuralCleanse(epochs=0), "neural_cleanse: epochs = 0"),
        (lambda: Strip(how="mean"), "'mean'"),
        (lambda: Strip(frr=0.0), "frr = 0.0"),
        (lambda: SpectralSignatures(shares=(0.1, 1.5)), r"shares\[1\] = 1.5"),
        (lambda: ActivationClustering(small_share=0.6), "small_share = 0.6"),
        (lambda: ResidualMap(window=0), "residual_map: window = 0"),
        (lambda: OwnSetComparison(window=0), "own_set_comparison: window = 0"),
        (lambda: PatchScan(sides=()), "sides is empty"),
        (lambda: FinePruning(drop=2), "drop = 2"),
        (lambda: AttentionDistillation(beta=-1), "beta = -1"),
        (lambda: UnitStimulation(pairs=0), "pairs = 0"),
        (lambda: InputTransforms(threshold=2), "threshold = 2"),
        (lambda: PixelRange(threshold=-1), "threshold = -1"),
    ],
    ids=range(13),
)
def test_wrong_settings_are_refused(make, named):
    with pytest.raises(InvalidValue, match=named):
        make()


def test_names_are_unique_and_sources_given():
    defences = every_defence()
    assert len({one.name for one in defences}) == len(defences) == 12
    assert all(one.source for one in defences)
    assert poisoned(pictures(10, 0), white_patch()).y[::5].tolist() == [TARGET] * 2


def test_neural_cleanse_goes_on_where_it_was():
    class Keeper:
        def __init__(self, state=None):
            self.state, self.saved = state, []

        def load(self):
            return self.state

        def save(self, state):
            self.saved.append({"found": [dict(one) for one in state["found"]], "generator": state["generator"].clone()})

    cleanse, first = NeuralCleanse(epochs=1), Keeper()
    given = subject(clean_model(), known=False)
    whole = cleanse.examine(replace(given, keeper=first))
    assert [len(state["found"]) for state in first.saved] == [1, 2, 3, 4, 5, 6]
    again = Keeper(first.saved[3])
    resumed = cleanse.examine(replace(given, keeper=again))
    assert len(again.saved) == 2
    assert resumed.to_json() | {"seconds": 0} == whole.to_json() | {"seconds": 0}
    assert cleanse.examine(given).to_json() | {"seconds": 0} == whole.to_json() | {"seconds": 0}
