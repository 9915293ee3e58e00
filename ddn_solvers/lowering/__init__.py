"""Graph -> CasADi functions, graph -> CVXPY expressions; neither knows the other."""
