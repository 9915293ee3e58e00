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


def test_a_function_that_fails_raises_and_returns_no_uninitialised_memory() -> None:
    """CasADi's buffer only sets a return code."""
    z = ca.MX.sym("z", 2)

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
    kernel = Kernel(ca.Function("wrapped", [z], [failing(z)]))
    with pytest.raises(RuntimeError):
        kernel(np.array([[1.0, 2.0]]))
