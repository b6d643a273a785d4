"""The command line: `python -m release COMMAND`."""

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from devcluster import packages, toolchain
from devcluster.errors import ClusterError
from devcluster.layout import Layout, from_environment
from release import chart, checks, image_build, pipeline, project, verification, workflows
from release.project import CHART, ROOT, ReleaseError
from release.provenance import LOCAL_BUILDER, builder, workflow_identity
from release.signing import Cosign, Identity, Keyless, PublicKey, Signer, Verifier

_TARGET = ROOT / "dist" / "release"
# The variable that cosign reads.
_PASSWORD = "COSIGN_PASSWORD"


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 if it succeeded, else 1 with a message on standard error."""
    options = _parser().parse_args(argv)
    layout = from_environment()
    try:
        match options.command:
            case "make":
                return _make(layout, options)
            case "verify":
                return _verify(layout, options)
            case "check":
                return _check(layout, options.tag)
            case _:
                readme = ROOT / CHART / "README.md"
                readme.write_text(chart.readme(_program(layout, "helm-docs"), ROOT / CHART))
                return 0
    except (ReleaseError, ClusterError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 1


def _make(layout: Layout, options: argparse.Namespace) -> int:
    if _check(layout, options.tag):
        return 1
    source = project.committed_source()
    packages.ensure(layout, packages.IMAGE if options.registry else packages.ALL)
    programs = pipeline.Programs(
        Cosign(_program(layout, "cosign")), _program(layout, "helm"), _program(layout, "helm-docs")
    )
    signer = _signer(programs.cosign, options)
    maker = builder(os.environ)
    with _registry(layout, options.registry) as address:
        base = options.base or (None if options.registry else image_build.local_base(layout, address))
        pipeline.make(layout, programs, source, address, signer, maker, options.target, base)
        verified = verification.verify(
            programs.cosign, programs.helm, address, source.version, signer.verifier, maker.id, source.repository
        )
    for artifact in verified.artifacts:
        print(artifact.reference)
    print(f"made of commit {verified.revision}, signed and verified; see {options.target}")
    return 0


def _verify(layout: Layout, options: argparse.Namespace) -> int:
    verifier: Verifier = PublicKey(options.key) if options.key else Identity(options.identity)
    maker = LOCAL_BUILDER if options.key else options.identity
    verified = verification.verify(
        Cosign(_program(layout, "cosign")),
        _program(layout, "helm"),
        options.registry,
        options.version,
        verifier,
        maker,
        project.repository(),
    )
    for artifact in verified.artifacts:
        print(artifact.reference)
    print(f"made of commit {verified.revision}")
    return 0


def _check(layout: Layout, tag: str | None) -> int:
    found = checks.findings(tag=tag)
    found += checks.readme_findings(_program(layout, "helm-docs"))
    found += workflows.lint(_program(layout, "actionlint"))
    for finding in found:
        print(finding, file=sys.stderr)
    return 1 if found else 0


def _signer(cosign: Cosign, options: argparse.Namespace) -> Signer:
    if options.keyless:
        return Keyless(Identity(workflow_identity(os.environ)))
    return cosign.key_pair(options.target, os.environ.get(_PASSWORD, ""), options.registry)


@contextmanager
def _registry(layout: Layout, address: str | None) -> Iterator[str]:
    """Yield the named registry, or a local one that shares the cluster's blobs."""
    if address:
        yield address
        return
    with image_build.local_registry(layout.registry) as local:
        yield local


def _program(layout: Layout, name: str) -> Path:
    return toolchain.build(layout, [name])[name]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="release", description="Makes a release that can be verified.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    make = commands.add_parser("make", help="build, list, sign, push and verify images and chart")
    make.add_argument("--registry", help="HOST/PATH to push to (default: a temporary one on this machine)")
    make.add_argument("--keyless", action="store_true", help="sign as this workflow on GitHub, not with a key")
    make.add_argument("--base", help="NAME@sha256:DIGEST to build on instead of what the Dockerfiles pin")
    make.add_argument("--tag", help="the tag that is released; its changelog must be closed")
    make.add_argument("--target", type=Path, default=_TARGET, help="where a key, SBOMs and statements are written")
    verify = commands.add_parser("verify", help="verify a release as its users do")
    verify.add_argument("--registry", required=True, help="HOST/PATH that it was pushed to")
    verify.add_argument("--version", required=True, help="as in 0.1.0")
    who = verify.add_mutually_exclusive_group(required=True)
    who.add_argument("--key", type=Path, help="public key of who signed it")
    who.add_argument("--identity", help="workflow that signed it: https://github.com/…/release.yaml@refs/tags/v0.1.0")
    check = commands.add_parser("check", help="print what is missing or stale; exit status 1 if anything")
    check.add_argument("--tag", help="the tag of the release, as in v0.1.0")
    commands.add_parser("readme", help="write the chart's README with helm-docs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
