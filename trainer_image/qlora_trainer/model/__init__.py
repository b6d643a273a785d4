"""The network: may it be trained, load, adapt, compute, merge."""
