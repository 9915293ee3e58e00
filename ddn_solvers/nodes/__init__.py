"""Declarative nodes with closed-form solutions and derivatives; each names the generic problem that it solves."""

from ddn_solvers.nodes.activations import Softmax, Sparsemax, softmax, sparsemax
from ddn_solvers.nodes.pooling import RobustPool, robust_pool
from ddn_solvers.nodes.vector_pooling import RobustVectorPool, robust_vector_pool

__all__ = [
    "RobustPool",
    "RobustVectorPool",
    "Softmax",
    "Sparsemax",
    "robust_pool",
    "robust_vector_pool",
    "softmax",
    "sparsemax",
]
