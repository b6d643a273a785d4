"""Attempts, nodes, rejections, deletions and blockers of a step's pods and Jobs."""
