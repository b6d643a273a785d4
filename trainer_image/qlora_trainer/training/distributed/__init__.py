"""The ranks of a run: devices, processes, communication, sharding."""
