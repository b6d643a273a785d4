"""How good an adapter is: losses on held-out rows, and answers that a program checks."""
