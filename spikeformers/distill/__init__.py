"""Learning from another network's attention."""

from spikeformers.distill.cost import Cost, cost
from spikeformers.distill.fgd import RULES, FineGrainedDistillation, Rule, fgd_loss, similarity
from spikeformers.distill.teachers import AttentionOperands, Caformer, Teacher, Twin, listen, teacher_of

__all__ = [
    "RULES",
    "AttentionOperands",
    "Caformer",
    "Cost",
    "FineGrainedDistillation",
    "Rule",
    "Teacher",
    "Twin",
    "cost",
    "fgd_loss",
    "listen",
    "similarity",
    "teacher_of",
]
