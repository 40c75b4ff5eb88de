"""The whole audit: with and without the trigger, on sets and on networks, and what its report says."""

from __future__ import annotations

import json

import pytest
import torch
from backdoor_cases import (
    CLASSES,
    PIXELS,
    SIZE,
    TARGET,
    backdoored_model,
    clean_model,
    factory,
    fresh,
    pictures,
    poisoned,
    white_patch,
)  # fmt: skip

from sparing.audits.backdoor import (
    BackdoorAudit,
    Defence,
    Finding,
    OptimisedTrigger,
    PixelRange,
    ResidualMap,
    SpectralSignatures,
    Stamp,
    Strip,
)
from sparing.core.errors import InvalidValue
from sparing.core.files import canonical_json

FEW = {"epochs": 2, "batch_size": 32}
DATA_LEVEL = [ResidualMap(), SpectralSignatures()]


class Reconstructing(Defence):
    """Says that it has found the white patch."""

    name, level, source, reconstructs = "reconstructing", "model", "test", True

    def judge(self, subject):
        stamp = Stamp(TARGET, white_patch().apply, self.name)
        return self.finding("evidence", score=3.0, threshold=2.0, suspects=(TARGET,), stamps=(stamp,))


def test_a_backdoor_is_measured_beside_its_control():
    clean, bad = pictures(120, 0), poisoned(pictures(120, 0), white_patch())
    report = BackdoorAudit([PixelRange()]).run(
        bad, factory, pictures(60, 1), 2, pixels=PIXELS, trigger=white_patch(), target=TARGET, control=clean,
        recipe={"epochs": 40, "batch_size": 32, "lr": 0.05}, provenance={"note": "made for a test"},
    )  # fmt: skip
    assert len(report.victims) == len(report.control) == 2
    assert min(report.rates("asr")) > 0.5
    assert max(report.rates("asr", report.control)) < 0.2
    assert max(report.rates("null")) < 0.2
    written = json.loads(canonical_json(report.to_json()))
    assert written["summary"]["victims"]["asr"]["mean"] == sum(report.rates("asr")) / 2
    assert written["trigger"]["size"] == 2
    assert written["bytes"] == 120 * (SIZE * SIZE * 4 + 8)
    first = written["victims"][0]["asr"]
    assert first["interval95"][0] < first["value"] <= first["interval95"][1]
    page = report.to_markdown()
    assert f"leads {sum(report.rates('asr')) / 2:.1%} of images of other classes to class 0" in page
    assert "On networks trained on the clean set it leads" in page
    assert "made for a test" in page
    assert "| pixel_range | input | no evidence |" in page


def test_without_the_trigger_defences_use_what_was_reconstructed():
    audit = BackdoorAudit([Strip(blends=5, inputs=20), Reconstructing(), PixelRange()])
    report = audit.run(None, None, pictures(60, 1), models=[backdoored_model()], pixels=PIXELS)
    assert [one.defence for one in report.findings] == ["strip", "reconstructing", "pixel_range"]
    assert f"detection_{TARGET}" in report.findings[0].figures
    assert report.findings[2].verdict == "no evidence"
    assert report.rates("asr") == []
    assert report.verdict.startswith("Evidence of a backdoor: reconstructing (class 0).")
    known = audit.run(
        None, None, pictures(60, 1), models=[backdoored_model()], pixels=PIXELS, trigger=lambda x: x, target=3
    )
    assert "detection_3" in known.findings[0].figures  # the attacker's own goes first
    assert f"detection_{TARGET}" not in known.findings[0].figures


def test_no_evidence_is_never_called_safe():
    report = BackdoorAudit([PixelRange(), *DATA_LEVEL]).run(
        pictures(12, 0), factory, pictures(60, 1), [7], pixels=PIXELS, recipe=FEW
    )
    assert "Not applicable: pixel_range, spectral_signatures" in report.verdict
    assert "That does not mean it is safe." in report.verdict or "Evidence" in report.verdict
    assert (
        BackdoorAudit([PixelRange()])
        .run(None, None, pictures(60, 1), models=[clean_model()], pixels=PIXELS)
        .verdict.startswith("No detector could judge. That does not mean it is safe.")
    )


def test_a_trigger_that_is_no_picture_is_named():
    trigger = OptimisedTrigger((1, SIZE, SIZE), PIXELS, 4, clip=None, alpha=1000, max_steps=40)
    trigger.update(fresh())
    report = BackdoorAudit([PixelRange()]).run(
        None, None, pictures(60, 1), models=[clean_model()], pixels=PIXELS, trigger=trigger, target=1
    )
    assert "no 8-bit image can carry it" in report.verdict
    assert report.evidence == {"pixel_range": (1,)}


def test_the_same_seeds_give_the_same_report_and_the_callers_chance_is_left_alone():
    before = torch.random.get_rng_state()
    once, again = (
        BackdoorAudit(DATA_LEVEL).run(pictures(12, 0), factory, pictures(60, 1), [3], pixels=PIXELS, recipe=FEW)
        for _ in range(2)
    )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert once.victims == again.victims
    assert [one.score for one in once.findings] == [one.score for one in again.findings]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"condensed": None}, "or give models"),
        ({"model_factory": None}, "or give models"),
        ({"seeds": 0}, "or give models"),
        ({"trigger": white_patch()}, "go together"),
        ({"target": 1}, "go together"),
        ({"trigger": white_patch(), "target": CLASSES}, "target = 6 is no class; 0 to 5"),
        ({"clean_holdout": pictures(49, 1), "defences": [Strip()]}, "strip: a hold-out of 49 images; 50 are needed"),
        ({"clean_holdout": (pictures(60, 1).x + 9, pictures(60, 1).y)}, "hold-out: image 0"),
        ({"clean_holdout": (pictures(60, 1).x, pictures(60, 1).y + 1)}, "hold-out: class 6"),
        ({"condensed": pictures(5, 0)}, "condensed: 5 classes; the networks have 6"),
        ({"condensed": (pictures(12, 0).x, pictures(12, 0).y.clamp(max=4) * 2)}, "no image of class 1"),
        ({"own": (torch.zeros(6, 1, 8, 8), torch.arange(6))}, r"own: images of \(1, 8, 8\)"),
    ],
    ids=range(12),
)
def test_what_does_not_fit_together_is_refused(change, named):
    given = {"condensed": pictures(12, 0), "model_factory": factory, "clean_holdout": pictures(60, 1), "seeds": 1}
    given |= {"pixels": PIXELS, "recipe": {"epochs": 1}} | change
    with pytest.raises(InvalidValue, match=named):
        BackdoorAudit(given.pop("defences", [PixelRange()])).run(**given)


def test_findings_become_plain_json():
    finding = Finding(
        "x", "model", "evidence", float("inf"), figures={"a": torch.tensor([1.0, torch.nan]), 2: (1, "b")}
    )
    written = json.loads(canonical_json(finding.to_json()))
    assert written["score"] is None
    assert written["figures"] == {"a": [1.0, None], "2": [1, "b"]}
