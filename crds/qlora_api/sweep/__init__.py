"""The QLoRASweep: its spec, its cells and its status."""
