"""Every method of every built-in adapter on every problem of known answer."""

from __future__ import annotations

import pytest

from ddn_adapters.casadi_ import CasADiAdapter
from ddn_adapters.scipy_ import SciPyAdapter
from ddn_solvers.adapter import Adapter
from ddn_solvers.testing import CASES, Case, check_adapter

ADAPTERS: dict[str, Adapter] = {"scipy": SciPyAdapter(), "casadi": CasADiAdapter()}
METHODS = [(backend, m.name) for backend, adapter in ADAPTERS.items() for m in adapter.capabilities.methods]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize(("backend", "method"), METHODS, ids=[":".join(pair) for pair in METHODS])
def test_solves_what_it_claims_to(backend: str, method: str, case: Case) -> None:
    check_adapter(ADAPTERS[backend], method, case)
