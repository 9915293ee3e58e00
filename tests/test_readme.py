"""What README and docs say is run and compared. ``python tests/test_readme.py`` writes the backend table."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from ddn_solvers import backends, quadratic_program, register, registry, solve
from ddn_solvers.adapter import Feature, ProblemClass

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BUILT_IN = ("casadi", "cvxpy", "scipy", "clarabel", "daqp", "highs", "newton")
TABLE = re.compile(r"(<!-- backends: .*? -->\n)(.*?)(<!-- end of backends -->)", re.DOTALL)
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#]+)\)")
PAGES = (
    "README.md",
    "adapters/README.md",
    *(f"docs/{page.name}" for page in sorted((ROOT / "docs").glob("*.md"))),
)


def backend_table() -> str:
    """The README's table of built-in backends, from their ``Capabilities``."""
    lines = [
        "| Solver | Problem classes | Beyond smooth and convex | Constraints | Multipliers | Install |",
        "|---|---|---|---|---|---|",
    ]
    kinds = {Feature.EQUALITY: "equality", Feature.INEQUALITY: "inequality", Feature.BOUNDS: "bounds"}
    beyond = {
        Feature.NONCONVEX: "non-convex",
        Feature.NONSMOOTH: "non-smooth",
        Feature.CALLBACKS: "torch callbacks",
    }
    assert set(kinds) | set(beyond) == set(Feature)
    for name in BUILT_IN:
        capabilities = registry.adapter(name).capabilities
        lines.append(f"| **{name}** | {capabilities.summary} | | | | |")
        for method in capabilities.methods:
            cells = (
                f"`{name}:{method.name}`",
                ", ".join(c.value for c in ProblemClass if c in method.classes),
                ", ".join(text for feature, text in beyond.items() if feature in method.features),
                ", ".join(text for feature, text in kinds.items() if feature in method.features),
                "yes" if method.duals else "computed here",
                f"`{method.pip or capabilities.pip}`",
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def run_blocks(page: str) -> dict[str, Any]:
    """Execute a page's Python blocks one after the other, as a reader would."""
    namespace: dict[str, Any] = {"__name__": "page"}
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block.group(1), str(ROOT / page), "exec"), namespace)
    return namespace


def test_the_readmes_example_runs_and_its_gradient_is_exact() -> None:
    ran = run_blocks("README.md")
    x, layer, y = ran["x"], ran["layer"], ran["y"]
    assert y.shape == (2, 3)
    assert y.sum(dim=1).abs().max() < 1e-6  # on the plane
    assert (y.square().sum(dim=1) <= 1 + 1e-6).all()  # in the ball
    assert (y <= x + 1e-6).all()  # within its bounds
    at, step = x.detach().double(), 1e-5
    r = torch.tensor(1.0, dtype=torch.float64)
    for i in range(3):
        e = torch.zeros(3, dtype=torch.float64)
        e[i] = step
        slope = (layer(at + e, r)[:, 0] - layer(at - e, r)[:, 0]) / (2 * step)
        torch.testing.assert_close(x.grad[:, i].double(), slope, rtol=0, atol=1e-6)
    assert ran["solution"].certificate.ok.all()


@pytest.mark.parametrize(
    "page",
    ["docs/gradients.md", "docs/problems.md", "docs/compile.md", "docs/failures.md", "docs/performance.md"],
)
def test_the_code_in_the_docs_runs(page: str) -> None:
    run_blocks(page)


def test_the_adapter_in_the_adapters_readme_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))  # undone afterwards
    monkeypatch.setattr(registry, "_adapters", dict(registry._adapters))
    ran = run_blocks("adapters/README.md")
    assert ran["checked"]
    suite = ran["TestNumPy"]()
    for name in filter(lambda name: name.startswith("test_"), dir(suite)):
        test = getattr(suite, name)
        arguments = inspect.signature(test).parameters
        if "case" not in arguments:  # those are among the checked
            test(*(["solve"] if arguments else []))
    assert "numpy" in backends()
    with pytest.raises(Exception, match="registered already"):
        register("numpy", registry.adapter("scipy").__class__)

    torch.manual_seed(0)
    root = torch.randn(4, 4, dtype=torch.float64)
    values = {
        "P": root @ root.T + torch.eye(4, dtype=torch.float64),
        "q": torch.randn(2, 4, dtype=torch.float64, requires_grad=True),
        "A": torch.randn(2, 4, dtype=torch.float64),
        "b": torch.randn(2, dtype=torch.float64, requires_grad=True),
    }
    weights = torch.randn(2, 4, dtype=torch.float64)
    results = []
    for solver in ("numpy", "scipy:SLSQP"):
        solution = solve(quadratic_program(4, equalities=2), values, solver=solver)
        loss = (solution["u"] * weights).sum() + solution.dual.equality["equality"].sum()
        results.append((solution["u"], *torch.autograd.grad(loss, (values["q"], values["b"]))))
        assert set(solution.stats.backend) == {solver.partition(":")[0]}
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_the_backend_table_is_up_to_date() -> None:
    found = TABLE.search(README.read_text(encoding="utf-8"))
    assert found is not None
    assert found.group(2) == backend_table(), "run: python tests/test_readme.py"


@pytest.mark.parametrize("page", [*PAGES, "docs/index.md", "CONTRIBUTING.md"])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target in LINK.findall((ROOT / page).read_text(encoding="utf-8")):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    table = backend_table()
    README.write_text(TABLE.sub(lambda m: m.group(1) + table + m.group(3), text), encoding="utf-8")
