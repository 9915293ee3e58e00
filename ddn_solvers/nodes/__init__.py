"""Declarative nodes with closed-form solutions and derivatives; each names the generic problem that it solves."""

from ddn_solvers.nodes.activations import Softmax, Sparsemax, softmax, sparsemax

__all__ = ["Softmax", "Sparsemax", "softmax", "sparsemax"]
