"""Pure decisions from observed facts to plans, manifests and statuses.

Every module here returns values only; `reconcile` acts on them.
"""
