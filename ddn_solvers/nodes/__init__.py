"""Declarative nodes with closed-form solutions and derivatives; each names the generic problem that it solves."""

from ddn_solvers.nodes.activations import Softmax, Sparsemax, softmax, sparsemax
from ddn_solvers.nodes.pooling import RobustPool, robust_pool

__all__ = ["RobustPool", "Softmax", "Sparsemax", "robust_pool", "softmax", "sparsemax"]
