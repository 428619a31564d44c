"""The hot paths of relational distillation, one folder an operation: see README.md."""

from shared.kernels.angle_loss import angle_loss
from shared.kernels.center_distance_loss import center_distance_loss
from shared.kernels.distance_loss import distance_loss
from shared.kernels.nce_scores import nce_scores
from shared.kernels.pairwise_distance import pairwise_distance
from shared.kernels.relation_scores import relation_scores
from shared.kernels.topk_search import topk_search
from shared.kernels.triplet_angles import triplet_angles

__all__ = [
    "angle_loss",
    "center_distance_loss",
    "distance_loss",
    "nce_scores",
    "pairwise_distance",
    "relation_scores",
    "topk_search",
    "triplet_angles",
]
