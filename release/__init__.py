"""Makes a release that can be verified: images, chart, SBOMs, provenance, signatures (docs/release.md)."""
