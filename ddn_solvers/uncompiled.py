"""What ``torch.compile`` has to leave alone.

Dynamo would follow a call into the solver piece by piece, from one graph break to the next, and time and again.
A function that is marked here is not looked into: compiled code breaks around it and it runs in eager as a
whole, with all that eager can do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from ddn_solvers.errors import TraceError

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")
_REASON = (
    "ddn_solvers: what compiled code can hold is the call of a DeclarativeLayer with parameters alone, differentiated "
    "once, in reverse mode. ddn.solve, layer.solve, initial, warm_start, a policy of the call and torch.func or "
    "forward-mode derivatives need eager: call them outside of the compiled function, or leave fullgraph=True out"
)


def uncompiled(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """Keep a function out of compiled graphs.

    The function then raises ``TraceError`` under ``torch.export``; ``torch.compile`` with ``fullgraph=True``
    raises its own ``Unsupported``, which says why.
    """
    disabled: Callable[_Args, _Result] | None = None

    @functools.wraps(function)
    def outside(*args: _Args.args, **kwargs: _Args.kwargs) -> _Result:
        nonlocal disabled
        if torch.compiler.is_exporting():
            raise TraceError("torch.export cannot hold a solve: an exported graph lives without this process")
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(msg=_REASON)
        if disabled is None:  # not before the first call: this loads torch._dynamo
            disabled = torch.compiler.disable(function, reason=_REASON)
        return disabled(*args, **kwargs)

    return outside
