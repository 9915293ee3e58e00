"""Declarative nodes with closed-form solutions and derivatives; each names the generic problem that it solves."""

from ddn_solvers.nodes.activations import Softmax, Sparsemax, softmax, sparsemax
from ddn_solvers.nodes.polyhedra import (
    AffineProjection,
    BoxProjection,
    HalfspaceProjection,
    project_affine,
    project_box,
    project_halfspace,
)
from ddn_solvers.nodes.pooling import RobustPool, robust_pool
from ddn_solvers.nodes.projections import (
    BallProjection,
    SimplexProjection,
    SphereProjection,
    project_ball,
    project_simplex,
    project_sphere,
)
from ddn_solvers.nodes.regression import (
    LeastSquares,
    SphereLeastSquares,
    least_squares,
    sphere_least_squares,
)
from ddn_solvers.nodes.transport import EntropicTransport, entropic_transport
from ddn_solvers.nodes.vector_pooling import RobustVectorPool, robust_vector_pool

__all__ = [
    "AffineProjection",
    "BallProjection",
    "BoxProjection",
    "EntropicTransport",
    "HalfspaceProjection",
    "LeastSquares",
    "RobustPool",
    "RobustVectorPool",
    "SimplexProjection",
    "Softmax",
    "Sparsemax",
    "SphereLeastSquares",
    "SphereProjection",
    "entropic_transport",
    "least_squares",
    "project_affine",
    "project_ball",
    "project_box",
    "project_halfspace",
    "project_simplex",
    "project_sphere",
    "robust_pool",
    "robust_vector_pool",
    "softmax",
    "sparsemax",
    "sphere_least_squares",
]
