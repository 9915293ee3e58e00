"""Compiled functions over batches of arrays: shared inputs, read-only memory, empty batches."""

from __future__ import annotations

import casadi as ca
import numpy as np
import pytest

from ddn_solvers.lowering.kernel import Kernel


@pytest.fixture
def affine() -> Kernel:
    """(z, p) -> (p1 z + p2, dp): the second output belongs to p and is summed where p is shared."""
    z, p = ca.MX.sym("z", 3), ca.MX.sym("p", 2)
    return Kernel(ca.Function("affine", [z, p], [p[0] * z + p[1], ca.vertcat(ca.sum1(z), 3)]), {1: 1})


@pytest.mark.parametrize("batch", [1, 2, 82])
def test_a_batch_equals_its_samples(affine: Kernel, batch: int) -> None:
    rng = np.random.default_rng(0)
    z, p = rng.normal(size=(batch, 3)), rng.normal(size=(batch, 2))
    value, gradient = affine(z, p)
    np.testing.assert_allclose(value, p[:, :1] * z + p[:, 1:], rtol=1e-15)
    np.testing.assert_allclose(gradient, np.stack([z.sum(1), np.full(batch, 3.0)], 1), rtol=1e-14)


@pytest.mark.parametrize("batch", [1, 5])
def test_what_belongs_to_a_shared_input_is_summed(affine: Kernel, batch: int) -> None:
    z, p = np.random.default_rng(1).normal(size=(batch, 3)), np.array([2.0, -1.0])
    value, gradient = affine(z, p)
    np.testing.assert_allclose(value, 2 * z - 1, rtol=1e-15)
    np.testing.assert_allclose(gradient, [z.sum(), 3.0 * batch], rtol=1e-14)


def test_read_only_arrays_are_held_while_the_function_runs(affine: Kernel) -> None:
    """The copy of a broadcast array was freed before it was read: two samples of 82 got other numbers."""
    z = np.random.default_rng(2).normal(size=(82, 3))
    for _ in range(20):
        value, _ = affine(z, np.broadcast_to(np.array([2.0, -1.0]), (82, 2)))
        np.testing.assert_array_equal(value, 2 * z - 1)


def test_arrays_of_any_layout(affine: Kernel) -> None:
    z, p = np.asfortranarray(np.arange(12.0).reshape(4, 3)), np.ones((8, 2))[::2]
    np.testing.assert_array_equal(affine(z, p)[0], z + 1)


def test_an_empty_batch_is_empty(affine: Kernel) -> None:
    value, gradient = affine(np.zeros((0, 3)), np.ones(2))
    assert value.shape == (0, 3)
    np.testing.assert_array_equal(gradient, np.zeros(2))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_sample_without_a_value_is_nan_and_touches_no_other(batch: int, shared: bool) -> None:
    """CasADi refuses to factor a singular matrix, and its map stops there; the buffer only sets a return code."""
    m, b = ca.MX.sym("m", 4), ca.MX.sym("b", 2)
    x = ca.solve(ca.reshape(m, 2, 2), b)
    kernel = Kernel(ca.Function("solved", [m, b], [x, ca.densify(ca.gradient(ca.sum1(x), b))]), {1: 1})
    matrices = np.random.default_rng(3).normal(size=(batch, 2, 2))
    matrices[-1] = [[1, 2], [2, 4]]
    b = np.array([1.0, -2.0])
    flat = matrices.transpose(0, 2, 1).reshape(batch, 4)
    value, gradient = kernel(flat, b if shared else np.tile(b, (batch, 1)))
    np.testing.assert_allclose(
        value[:-1], np.linalg.solve(matrices[:-1], np.tile(b[:, None], (batch - 1, 1, 1)))[..., 0]
    )
    assert np.isnan(value[-1]).all()
    assert (
        np.isnan(gradient).all()
        if shared
        else np.isnan(gradient).any(axis=1).tolist() == [False] * (batch - 1) + [True]
    )


def test_an_error_of_a_function_written_in_python_is_raised() -> None:
    class Failing(ca.Callback):
        def __init__(self) -> None:
            ca.Callback.__init__(self)
            self.construct("failing", {})

        def get_sparsity_in(self, i: int) -> ca.Sparsity:
            return ca.Sparsity.dense(2, 1)

        def get_sparsity_out(self, i: int) -> ca.Sparsity:
            return ca.Sparsity.dense(2, 1)

        def eval(self, arguments: list[ca.DM]) -> list[ca.DM]:
            raise ValueError("no")

    failing = Failing()
    for z in (np.array([[1.0, 2.0]]), np.ones((3, 2))):
        with pytest.raises(RuntimeError, match="no"):
            Kernel(failing)(z)
