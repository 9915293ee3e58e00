"""The compiled problem: evaluators over batches, sparsity, problem class, and what it was made from.

Everything below works on flat float64 NumPy arrays: z (B, n), parameters a tuple with one array per
block, (B, size) or (size,) where all samples share it. Constraints are stacked, c = [h; g].
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ddn_solvers.adapter import Feature, ProblemClass, QuadraticForm
from ddn_solvers.agreement import disagreement
from ddn_solvers.arrays import Array
from ddn_solvers.captures import Overrides
from ddn_solvers.errors import ProblemError
from ddn_solvers.evaluators import Coefficients, Evaluators, samples_of
from ddn_solvers.inertia import positive_definite
from ddn_solvers.layout import Block, Layout
from ddn_solvers.pieces import Kink, Pieces, find_pieces, lift
from ddn_solvers.problem import Problem
from ddn_solvers.terms import Substitution, Term, Untraceable, evaluate
from ddn_solvers.trace import Graph, dependent_nodes, operation_name, trace
from ddn_solvers.validation import callable_name

if TYPE_CHECKING:
    from ddn_solvers.lowering.callbacks import CallbackFunctions
    from ddn_solvers.lowering.linear_map import LinearMap
    from ddn_solvers.lowering.symbolic import SymbolicFunctions

_LIFTED = "kink_magnitudes_"  # the variable that a lifted problem has besides its own


class Program(Evaluators):
    """A problem compiled for one state of what its functions capture.

    As evaluators it has the functions as they are declared, which is what backends call.

    Attributes:
        problem: The declaration.
        graph: Its traced functions.
        variables, equality, inequality: Layouts of z, h and g.
        parameters: One block for each declared parameter, then one for each captured tensor.
        refusal: Why the functions are torch callbacks; ``None`` where they are compiled.
        origin: The program that this one is derived from, and how; ``None`` for a declared problem's own.
    """

    origin: tuple[Program, str] | None = None

    def __init__(self, problem: Problem, graph: Graph) -> None:
        self.problem, self.graph = problem, graph
        self.variables = Layout(problem.variables)
        shapes = dict(zip(graph.outputs, graph.shapes, strict=True))
        self.equality = Layout({name: s for (kind, name), s in shapes.items() if kind == "equality"})
        self.inequality = Layout({name: s for (kind, name), s in shapes.items() if kind == "inequality"})
        captured = zip(graph.captures, graph.capture_shapes, strict=True)
        self.parameters: tuple[Block, ...] = (
            *(Block(name, shape, 0) for name, shape in problem.parameters.items()),
            *(Block(accessor.name, shape, 0) for accessor, shape in captured),
        )
        self.refusal: str | None = None
        super().__init__(self._compile(), self.constraints, len(self.parameters))

    # -- compilation ------------------------------------------------------------------------------

    @property
    def traced(self) -> bool:
        """Whether there is a graph (which CVXPY reads), compiled or not."""
        return self.graph.module is not None

    @property
    def compiled(self) -> bool:
        """Whether the functions are compiled expressions rather than torch callbacks."""
        return self.refusal is None

    @property
    def constraints(self) -> int:
        """Number of rows of c = [h; g]."""
        return self.equality.size + self.inequality.size

    def _compile(self) -> SymbolicFunctions | CallbackFunctions:
        from ddn_solvers.lowering.callbacks import CallbackFunctions  # casadi loads on first use
        from ddn_solvers.lowering.symbolic import SymbolicFunctions
        from ddn_solvers.lowering.to_casadi import UnsupportedOperation

        sizes = [block.size for block in self.parameters]
        why = str(self.graph.refusal)
        if self.graph.module is not None:
            try:
                return SymbolicFunctions(self.graph.module, self.graph.outputs, self.variables, sizes)
            except UnsupportedOperation as error:
                why = f"'{error.operation}' at {error.source}" if error.source else f"'{error.operation}'"
        self.refusal = why
        return CallbackFunctions(self.evaluate, self.variables.size, self.constraints, sizes)

    # -- kinks ------------------------------------------------------------------------------------

    @cached_property
    def pieces(self) -> Pieces | None:
        """The smooth pieces of a compiled problem with kinks; ``None`` where it has none that are known."""
        if self.graph.module is None or not self.compiled or not self._functions.kink_terms:
            return None
        with temporarily_clear_interpreter_stack():  # a graph may be made inside a torch.func transform
            return find_pieces(self.graph.module, len(self.variables))

    @cached_property
    def smooth(self) -> Evaluators:
        """The functions on a smooth piece, with rows for the kinks behind c: what the KKT module calls.

        Their parameters are those of the problem and then, where there are pieces, sigma and tau.
        """
        if self.pieces is None:
            return self
        from ddn_solvers.lowering.symbolic import SymbolicFunctions

        kinks = len(self.pieces.kinks)
        sizes = [block.size for block in self.parameters]
        outputs = (*self.graph.outputs, ("kink", ""))
        functions = SymbolicFunctions(
            self.pieces.smooth, outputs, self.variables, [*sizes, kinks, kinks], len(sizes)
        )
        return Evaluators(functions, self.constraints + kinks, len(sizes))

    def pieces_at(self, z: Array, parameters: Sequence[Array]) -> Array:
        """sigma of the pieces on which the points z (B, n) lie, (B, kinks)."""
        pieces = self.pieces
        if pieces is None:
            return np.zeros((len(z), 0))
        sigma = np.ones((len(z), len(pieces.kinks)))
        for _ in pieces.kinks:  # a kink inside another one has to be known first
            _, c = self.smooth.values(z, (*parameters, sigma, np.zeros_like(sigma)))
            found = np.where(self.numbers, np.sign(c[:, self.constraints :]), 1.0)
            if np.array_equal(found, sigma):
                break
            sigma = found
        return sigma

    @cached_property
    def numbers(self) -> Any:
        """Which kinks are those of one number, whose sigma is a sign, (kinks,) bool."""
        return self.pieces.is_number if self.pieces is not None else np.zeros(0, dtype=bool)

    @cached_property
    def lifted(self) -> Program | None:
        """The problem with a variable t >= |r| in place of each known kink; ``None`` without any.

        A solution has t = |r| where every |r| is pushed down (the kinks are convex), and then it is one of
        this problem.
        """
        if self.pieces is None:
            return None
        with temporarily_clear_interpreter_stack():
            module, rows = lift(self.pieces, len(self.variables))
        groups = len(self.pieces.first)
        problem = replace(self.problem, variables={**self.problem.variables, _LIFTED: (groups,)})
        graph = replace(
            self.graph,
            module=module,
            terms=(*self.graph.terms, Term("inequality", _LIFTED, _not_called, ())),
            shapes=(*self.graph.shapes, (rows,)),
        )
        lifted = Program(problem, graph)
        lifted.origin = self, "lifted"
        return lifted

    @cached_property
    def kinks(self) -> tuple[Kink, ...]:
        """The kinks without pieces: one entry for each element of what ``smooth.kink_residuals`` returns."""
        terms = self.smooth.functions.kink_terms
        return tuple(Kink(k.operation, k.source) for k in terms for _ in range(k.residual.numel()))

    def degree(self, kind: str, name: str = "") -> int | None:
        """Polynomial degree of a term in the variables: 0, 1, 2, or ``None`` for anything else."""
        return self.memo(("degree", kind, name), lambda: self._functions.degree(kind, name))

    @cached_property
    def problem_class(self) -> ProblemClass:
        """LP, QP, least squares or NLP, as the graph shows."""
        objective = self.degree("objective")
        if self.affine_constraints and objective in (0, 1):
            return ProblemClass.LP
        if self.affine_constraints and objective == 2:
            return ProblemClass.QP
        return ProblemClass.LEAST_SQUARES if self.sum_of_squares else ProblemClass.NLP

    @property
    def quadratic(self) -> bool:
        """Whether it is an LP or a QP: H and J are the same at every point."""
        return self.problem_class in (ProblemClass.LP, ProblemClass.QP)

    @cached_property
    def affine_constraints(self) -> bool:
        """Whether all of c is affine in the variables."""
        kinds = ("equality", "inequality")
        return all(self.degree(t.kind, t.name) in (0, 1) for t in self.graph.terms if t.kind in kinds)

    @cached_property
    def sum_of_squares(self) -> bool:
        """Whether the graph shows the objective to be a nonnegative combination of squares."""
        return self.graph.module is not None and _is_sum_of_squares(self.graph.module, len(self.variables))

    @cached_property
    def may_be_nonconvex(self) -> bool:
        """False only where an LP or a constant positive semidefinite Hessian rules it out."""
        if self.problem_class is ProblemClass.LP:
            return False
        if self.problem_class is not ProblemClass.QP or not self.compiled:
            return True
        constant = self._functions.constant_hessian()
        if constant is None:
            return True
        pattern, nonzeros = constant
        if self.variables.size <= _DENSE:
            return bool(np.linalg.eigvalsh(pattern.dense(nonzeros[None])[0]).min() < 0)
        import scipy.sparse as sp

        lift = _NEGLIGIBLE * np.abs(nonzeros).max(initial=0.0) * sp.eye_array(self.variables.size)
        return not positive_definite((pattern.matrix(nonzeros) + lift).tocsc())

    @cached_property
    def features(self) -> frozenset[Feature]:
        """What a method must take to solve this problem."""
        kinds = {term.kind for term in self.graph.terms}
        present = {
            Feature.EQUALITY: self.equality.size > 0,
            Feature.INEQUALITY: self.inequality.size > 0,
            Feature.BOUNDS: bool(kinds & {"lower", "upper"}),
            Feature.CALLBACKS: not self.compiled,
            Feature.NONSMOOTH: bool(self._functions.kink_terms),
        }
        return frozenset(feature for feature, there in present.items() if there)

    @property
    def bounded(self) -> bool:
        """Whether any variable has a bound declared."""
        return Feature.BOUNDS in self.features

    # -- evaluation --------------------------------------------------------------------------------

    def coefficients(self, parameters: Sequence[Array], batch: int | None = None) -> Coefficients:
        """As ``Evaluators.coefficients``; H and J of large dense LPs and QPs gathered, or as matrix products in torch."""
        if not self._large_and_dense:
            return super().coefficients(parameters, batch)
        maps = self.memo("probed", self._probed)
        if maps is None and self._map("jacobian_map") is not None and self._map("hessian_map") is not None:
            return super().coefficients(parameters, batch)
        samples = samples_of(parameters, batch or 1)
        f, gradient, c = self.at_zero(parameters, samples)
        if maps is not None:
            jacobian, hessian = (gather(parameters, samples) for gather in maps)
        else:
            rows = ([p if p.ndim == 1 else p[i] for p in parameters] for i in range(samples))
            found = zip(*(self._multiplied(row) for row in rows), strict=True)
            jacobian, hessian = (np.stack(nonzeros) for nonzeros in found)
        return Coefficients(f, gradient, c, jacobian, hessian)

    def _multiplied(self, parameters: Sequence[Array]) -> tuple[Array, Array]:
        """Nonzeros of J and H of one sample of an LP or QP, by torch."""
        with temporarily_clear_interpreter_stack(), torch.inference_mode(False):
            zero = torch.zeros(self.variables.size, dtype=torch.float64)
            p = [torch.tensor(block) for block in parameters]
            slopes = torch.func.grad(lambda z: self.evaluate(z, p)[0])
            J = torch.func.jacrev(lambda z: self.evaluate(z, p)[1])(zero)
            H = torch.func.jacrev(slopes)(zero)
        return self.jacobian_pattern.entries(J), self.hessian_pattern.entries(H)

    def _probed(self) -> tuple[LinearMap, ...] | None:
        """What gathers both from the parameters, where they are of that kind."""
        from ddn_solvers.lowering.linear_map import polynomial, probed_maps

        functions: Any = self._functions
        if not polynomial(functions.slopes):
            return None
        maps = probed_maps(self._multiplied, [block.size for block in self.parameters])
        told = {block for gather in maps or () for block in gather.blocks}
        others = set(range(len(self.parameters))) - told
        return None if any(functions.matrices_depend_on(block) for block in others) else maps

    @cached_property
    def _large_and_dense(self) -> bool:
        """Whether CasADi would multiply large dense matrices of an LP or QP entry by entry."""
        if not self.quadratic or not self.compiled:
            return False
        patterns = [p for p in (self.hessian_pattern, self.jacobian_pattern) if p.nnz]
        nonzeros, entries = sum(p.nnz for p in patterns), sum(p.shape[0] * p.shape[1] for p in patterns)
        return nonzeros >= max(_MULTIPLIED, entries // 2)

    def quadratic_forms(self, parameters: Sequence[Array]) -> list[QuadraticForm]:
        """Coefficients at z = 0, one form a sample; exact for an LP or a QP."""
        found, m = self.coefficients(parameters), self.equality.size
        forms = []
        for i in range(len(found.objective)):
            jacobian = self.jacobian_pattern.matrix(found.jacobian[i]).tocsr()
            forms.append(
                QuadraticForm(
                    P=self.hessian_pattern.matrix(found.hessian[i]),
                    q=found.gradient[i],
                    constant=float(found.objective[i]),
                    A=jacobian[:m].tocsc(),
                    b=-found.constraints[i, :m],
                    G=jacobian[m:].tocsc(),
                    h=-found.constraints[i, m:],
                )
            )
        return forms

    def evaluate(
        self, z: torch.Tensor, parameters: Sequence[torch.Tensor], sigma: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """f (), c, lower, upper of one instance in torch, differentiable to any order; flat inputs.

        With ``sigma``, (kinks,), of that smooth piece, with the rows of the kinks behind c.
        """
        variables = list(self.variables.split(z).values())
        blocks = [p.reshape(block.shape) for p, block in zip(parameters, self.parameters, strict=True)]
        kinks = z.new_zeros(0)
        if sigma is not None and self.pieces is not None:
            *outputs, kinks = self.pieces.smooth(*variables, *blocks, sigma, torch.zeros_like(sigma))
        elif self.graph.module is not None and self.compiled:
            outputs = self.graph.module(*variables, *blocks)
        else:
            outputs = self._call_functions(variables, blocks)
        return self.stacked(z, outputs, kinks)

    def stacked(
        self, z: torch.Tensor, outputs: Sequence[torch.Tensor], kinks: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """f (), c, lower, upper from the values of the terms and, behind c, the rows of the kinks."""
        by_term = dict(zip(self.graph.outputs, outputs, strict=True))
        rows = [v.reshape(-1) for (kind, _), v in by_term.items() if kind in ("equality", "inequality")]
        sides = []
        for side, absent in (("lower", -torch.inf), ("upper", torch.inf)):
            parts = [
                by_term[side, b.name].reshape(-1)
                if (side, b.name) in by_term
                else z.new_full((b.size,), absent)
                for b in self.variables
            ]
            sides.append(torch.cat(parts))
        return by_term["objective", ""], torch.cat([*rows, kinks]), sides[0], sides[1]

    def evaluate_batch(self, z: torch.Tensor, parameters: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """``evaluate`` of points z (B, n); parameters (B, size) or shared (size,)."""
        dims = (0, *(0 if block.dim() == 2 else None for block in parameters))
        found: tuple[torch.Tensor, ...] = self.over_batch(lambda z, *p: self.evaluate(z, p), dims)(
            z, *parameters
        )
        return found

    def over_batch(self, function: Callable[..., Any], dims: Sequence[int | None]) -> Callable[..., Any]:
        """A function made of ``evaluate`` over a batch; a loop where the problem's own cannot be vectorised.

        Args:
            dims: 0 for each argument with a batch dimension, the first among them, ``None`` for each without.
        """
        if self.traced:
            return torch.func.vmap(function, in_dims=tuple(dims))

        def loop(*arguments: torch.Tensor) -> Any:
            rows = [
                function(*(a if d is None else a[i] for a, d in zip(arguments, dims, strict=True)))
                for i in range(len(arguments[0]))
            ]
            if isinstance(rows[0], tuple):
                return tuple(torch.stack(column) for column in zip(*rows, strict=True))
            return torch.stack(rows)

        return loop

    def _call_functions(self, variables: list[torch.Tensor], blocks: list[torch.Tensor]) -> Any:
        """The user's functions themselves, with ``blocks`` in place of what they capture."""
        declared = len(self.problem.parameters)
        names = [*self.problem.variables, *self.problem.parameters]
        inputs = dict(zip(names, [*variables, *blocks[:declared]], strict=True))
        originals = self.graph.read_captures(None)
        stand_ins = {id(t): block for t, block in zip(originals, blocks[declared:], strict=True)}
        values = evaluate(self.graph.terms, inputs, Substitution(stand_ins, tracing=False))
        for term, value, shape in zip(self.graph.terms, values, self.graph.shapes, strict=True):
            if tuple(value.shape) != shape:
                raise ProblemError(
                    f"{term.label}, {callable_name(term.function)}, returns another shape than it did at first",
                    expected=f"{shape} for all values",
                    got=str(tuple(value.shape)),
                )
        return values


def _not_called(**_: torch.Tensor) -> torch.Tensor:
    """Stands where a term is defined by the graph alone."""
    raise AssertionError("a lifted problem has a graph")


def compile_program(problem: Problem, overrides: Overrides | None = None) -> Program:
    """The program of ``problem`` for what its functions capture now; cached, at most a few a problem."""
    with _LOCK:
        programs: list[Program] = problem.__dict__.setdefault("_programs", [])
        for program in programs:
            if program.graph.holds(overrides):
                return program
        program = Program(problem, trace(problem))
        wrong = disagreement(program) if program.compiled else ""
        if wrong:
            graph = replace(program.graph, module=None, refusal=Untraceable(wrong, ""))
            program = Program(problem, graph)
        programs.insert(0, program)
        del programs[_MAX_PROGRAMS:]
        return program


_LOCK = threading.RLock()
_MULTIPLIED = 50_000  # nonzeros of H and J from which torch's matrix products save more than its calls cost
_DENSE = 500  # variables up to which all eigenvalues of a constant Hessian are computed
_NEGLIGIBLE = 1e-8  # relative size of an eigenvalue that is no negative curvature, see kkt/curvature.py
_MAX_PROGRAMS = 8  # states of captured values (train and eval mode, ...) kept for one problem


_SQUARES = ("square", "mse_loss")
_LINEAR_IN_SQUARES = ("sum", "mean", "add", "mul", "div", "to", "view", "reshape", "squeeze")


def _is_sum_of_squares(module: fx.GraphModule, variables: int) -> bool:
    """Whether the objective is a nonnegative combination of squares, going back from the output."""
    on_variables = dependent_nodes(module, 0, variables)

    def squared(node: Any) -> bool:
        if not isinstance(node, fx.Node) or node not in on_variables:
            return True  # a constant term moves nothing
        name = operation_name(node)
        if name in _SQUARES or (name == "pow" and node.args[1] == 2):
            return True
        if name in ("dot", "mul") and node.args[0] is node.args[1]:
            return True
        if name == "mul":
            constants = [a for a in node.args if not (isinstance(a, fx.Node) and a in on_variables)]
            positive = all(isinstance(a, (int, float)) and a >= 0 for a in constants)
            return bool(constants) and positive and all(squared(a) for a in node.args)
        return name in _LINEAR_IN_SQUARES and all(squared(a) for a in node.all_input_nodes)

    output = module.graph.output_node().args[0][0]  # type: ignore[index]  # only where there is a graph
    return isinstance(output, fx.Node) and output in on_variables and squared(output)
