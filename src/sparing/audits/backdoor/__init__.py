"""How exposed a condensed set, or a network trained on one, is to a backdoor (dd_backdoor).

For evaluating one's own pipeline: the attacks are a simulator to measure defences with.
"""

from sparing.audits.backdoor.attack import CondensationBackdoor
from sparing.audits.backdoor.audit import AuditReport, BackdoorAudit, every_defence
from sparing.audits.backdoor.condensed import OwnSetComparison, PatchScan, PixelRange, ResidualMap
from sparing.audits.backdoor.finding import Defence, Finding, Images, Stamp, Subject
from sparing.audits.backdoor.latent import ActivationClustering, SpectralSignatures
from sparing.audits.backdoor.metrics import BackdoorRates, Rate, backdoor_rates
from sparing.audits.backdoor.neural_cleanse import NeuralCleanse
from sparing.audits.backdoor.pixels import PixelSpace
from sparing.audits.backdoor.repair import AttentionDistillation, FinePruning
from sparing.audits.backdoor.stimulation import UnitStimulation
from sparing.audits.backdoor.strip import Strip
from sparing.audits.backdoor.subgraphs import OptimisedSubgraph, SubgraphTrigger, graph_rates, node_rates
from sparing.audits.backdoor.transformations import InputTransforms
from sparing.audits.backdoor.triggers import OptimisedTrigger, PatchTrigger

__all__ = [
    "ActivationClustering",
    "AttentionDistillation",
    "AuditReport",
    "BackdoorAudit",
    "BackdoorRates",
    "CondensationBackdoor",
    "Defence",
    "Finding",
    "FinePruning",
    "Images",
    "InputTransforms",
    "NeuralCleanse",
    "OptimisedSubgraph",
    "OptimisedTrigger",
    "OwnSetComparison",
    "PatchScan",
    "PatchTrigger",
    "PixelRange",
    "PixelSpace",
    "Rate",
    "ResidualMap",
    "SpectralSignatures",
    "Stamp",
    "Strip",
    "SubgraphTrigger",
    "Subject",
    "UnitStimulation",
    "backdoor_rates",
    "every_defence",
    "graph_rates",
    "node_rates",
]
