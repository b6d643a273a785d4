"""The watches and their store, in the only package that imports kopf."""
