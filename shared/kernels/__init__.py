"""The hot paths of relational distillation, one folder an operation."""

from shared.kernels.relation_scores import relation_scores

__all__ = ["relation_scores"]
