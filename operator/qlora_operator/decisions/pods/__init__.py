"""What the pods and Jobs of a step show: attempts, nodes, rejections, deletions, blockers."""
