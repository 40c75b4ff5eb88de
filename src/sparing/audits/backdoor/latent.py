"""Defences that look at a class's features: spectral signatures and activation clustering."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sparing.audits.backdoor.finding import Defence, Finding, Subject, settings
from sparing.audits.backdoor.layers import penultimate_features
from sparing.core.errors import InvalidValue

FEWEST_ROWS = 50
"""Fewer images of a class say nothing about which of them are odd (design choice)."""
COMPONENTS = 10


def spectral_scores(features: Float[Tensor, "n units"]) -> Float[Tensor, " n"]:
    """Squared projections of the centred rows of one class on their top right singular vector (algorithm 1 there)."""
    centred = features - features.mean(dim=0)
    _, _, right = torch.linalg.svd(centred, full_matrices=False)
    return (centred @ right[0]).square()


def spectral_removed(scores: Float[Tensor, " n"], share: float) -> Int[Tensor, " m"]:
    """Rows of the floor(1.5 · share · n) largest scores, ascending; ``share`` is the supposed poisoned share."""
    if not 0 < share < 1:
        raise InvalidValue(f"spectral_signatures: share = {share}; above 0 and below 1 is expected")
    count = min(math.floor(1.5 * share * len(scores)), len(scores))
    return scores.argsort(descending=True, stable=True)[:count].sort().values


@dataclass(frozen=True)
class Clusters:
    """Two clusters of one class's rows."""

    small_share: float
    silhouette: float
    small: Int[Tensor, " m"]
    """Rows of the smaller cluster, ascending."""


def cluster_activations(features: Float[Tensor, "n units"], seed: int = 0) -> Clusters:
    """PCA to 10 components, then 2-means (best of 10 starts); the silhouette is taken in those components."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA
    from sklearn.metrics import silhouette_score

    rows = features.cpu().numpy()
    if (rows == rows[0]).all():
        return Clusters(0.0, 0.0, torch.empty(0, dtype=torch.long))
    reduced = PCA(min(COMPONENTS, *rows.shape), svd_solver="full").fit_transform(rows)
    labels = KMeans(2, n_init=10, random_state=seed).fit_predict(reduced)
    small = int((labels == 1).sum() * 2 < len(labels))
    members = torch.from_numpy(labels == small).nonzero().flatten()
    return Clusters(len(members) / len(rows), float(silhouette_score(reduced, labels)), members)


def rows_of_classes(subject: Subject) -> tuple[dict[int, Tensor], str]:
    """({class: features of its condensed images}, why there are none) for classes of at least 50 images."""
    if subject.condensed is None:
        return {}, "there is no condensed set"
    counts = torch.bincount(subject.condensed.y, minlength=subject.classes)
    enough = [c for c in range(subject.classes) if counts[c] >= FEWEST_ROWS]
    if not enough:
        return {}, f"at most {int(counts.max())} images a class; at least {FEWEST_ROWS} are needed"
    features = penultimate_features(subject.model, subject.condensed.x).double()
    return {c: features[subject.condensed.y == c] for c in enough}, ""


class SpectralSignatures(Defence):
    """Rows of a class that lie far out along the direction in which it varies most.

    The method ranks rows and says which to remove under a supposed poisoned share; it has no threshold of its own. A
    class is pointed at when its top singular value is an outlier among the classes' (design choice).

    Args:
        shares: supposed poisoned shares of a class, for each of which the rows to remove are reported.
        threshold: anomaly index of the top singular value per row.
    """

    name, level = "spectral_signatures", "data"
    source = "Tran, Li and Madry, NeurIPS 2018"

    def __init__(self, shares: tuple[float, ...] = (0.05, 0.1, 0.3), threshold: float = 2.0) -> None:
        settings(
            self.name, {"threshold": (threshold, 0, 1e6)} | {f"shares[{i}]": (s, 1e-9, 1) for i, s in enumerate(shares)}
        )
        self.shares, self.threshold = shares, threshold

    def judge(self, subject: Subject) -> Finding:
        """Strength of each class's direction and the rows that each supposed share would remove."""
        from sparing.audits.backdoor.metrics import mad_outliers

        rows, missing = rows_of_classes(subject)
        if not rows:
            return self.not_applicable(missing)
        scores = {c: spectral_scores(features) for c, features in rows.items()}
        strength = torch.tensor([float(s.mean()) for s in scores.values()]).numpy()
        figures = {
            "mean_score": dict(zip(scores, strength.tolist(), strict=True)),
            "largest_score": {c: float(s.max()) for c, s in scores.items()},
            "removed": {
                str(share): {c: spectral_removed(s, share).tolist() for c, s in scores.items()} for share in self.shares
            },
        }
        outliers = mad_outliers(strength, "upper", self.threshold)
        if outliers is None:
            return self.not_applicable(
                "fewer than five classes, or all alike: no outlier can be named", figures=figures
            )
        places = list(scores)
        suspects = tuple(places[i] for i in outliers.flagged)
        above = strength > outliers.median
        return self.finding(
            "evidence" if suspects else "no evidence",
            score=float(outliers.index[above].max()),
            threshold=self.threshold,
            suspects=suspects,
            figures=figures,
        )


class ActivationClustering(Defence):
    """A class whose features fall into a small and a large cluster, well apart.

    Args:
        small_share: the smaller cluster holds less than this.
        silhouette: and the two are at least so well separated.
    """

    name, level = "activation_clustering", "data"
    source = "Chen et al., SafeAI 2019, arXiv 1811.03728"

    def __init__(self, small_share: float = 0.35, silhouette: float = 0.15) -> None:
        settings(self.name, {"small_share": (small_share, 0, 0.5), "silhouette": (silhouette, -1, 1)})
        self.small_share, self.silhouette = small_share, silhouette

    def judge(self, subject: Subject) -> Finding:
        """Both figures of each class; the score is the largest silhouette of a class with a small cluster."""
        rows, missing = rows_of_classes(subject)
        if not rows:
            return self.not_applicable(missing)
        found = {c: cluster_activations(features, subject.seed) for c, features in rows.items()}
        uneven = {c: one for c, one in found.items() if 0 < one.small_share < self.small_share}
        suspects = tuple(c for c, one in uneven.items() if one.silhouette > self.silhouette)
        return self.finding(
            "evidence" if suspects else "no evidence",
            score=max((one.silhouette for one in uneven.values()), default=None),
            threshold=self.silhouette,
            suspects=suspects,
            figures={
                "small_share": {c: one.small_share for c, one in found.items()},
                "silhouette": {c: one.silhouette for c, one in found.items()},
                "small_members": {c: one.small.tolist() for c, one in found.items()},
            },
        )
