"""The conformance kit: what every adapter is held to, ours and a stranger's.

    from ddn_solvers.testing import AdapterConformance

    class TestMyAdapter(AdapterConformance):
        adapter = MyAdapter()

pytest then runs every method of the adapter on every problem of known answer that it says it takes (``CASES``), and the
rest of the contract of ``adapter.py``. ``check_adapter`` is the check of one method on one case, without pytest.
"""

from ddn_solvers.testing.cases import CASES, Case, case, random_qp
from ddn_solvers.testing.check import check_adapter, make_batch, takes
from ddn_solvers.testing.conformance import AdapterConformance

__all__ = ["CASES", "AdapterConformance", "Case", "case", "check_adapter", "make_batch", "random_qp", "takes"]
