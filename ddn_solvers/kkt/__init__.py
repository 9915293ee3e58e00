"""The KKT system: its one assembly and its linear solvers."""
