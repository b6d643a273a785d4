"""The manifest of a small adapter, for the tests of every destination."""

from qlora_trainer.stores.contents import Manifest

MANIFEST = Manifest(
    job_uid="one",
    job_name="tiny",
    fingerprint="a" * 64,
    spec_sha256="b" * 64,
    base_model="hf://acme/tiny",
    base_revision="c0ffee",
    libraries={},
    files={},
)
