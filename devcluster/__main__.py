"""The command line: `python -m devcluster COMMAND`."""

import argparse
import sys
from pathlib import Path

from devcluster import cleanup, cluster, images, packages, previous, product, toolchain
from devcluster.errors import ClusterError
from devcluster.layout import Layout, from_environment

_NAMES = f"one of {', '.join(toolchain.ALL_TOOLS)} (default: {', '.join(toolchain.TOOLS)})"


def main(argv: list[str] | None = None) -> int:
    """Run one command; 0 if it succeeded, else 1 with a message on standard error."""
    options = _parser().parse_args(argv)
    try:
        return _run(options, from_environment())
    except ClusterError as error:
        print(f"devcluster: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("devcluster: interrupted; the next `up` starts from scratch, `down` removes the rest", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace, layout: Layout) -> int:
    match options.command:
        case "packages":
            packages.ensure(layout, packages.ALL)
            packages.unpack(layout)
        case "prepare":
            _prepare(layout, slow=options.slow)
        case "build":
            for path in toolchain.build(layout, options.names or tuple(toolchain.TOOLS)).values():
                print(path)
        case "path":
            print(toolchain.build(layout, [options.name])[options.name])
        case "up":
            _up(layout, options.gpus, network_policies=options.network_policies, for_tests=options.for_tests)
        case "down":
            _down(layout, for_tests=options.for_tests)
        case "status":
            print(cluster.status(layout))
            return _report(cluster.trouble(layout))
        case "leftovers":
            return _report(cleanup.leftovers(layout))
        case "kubeconfig":
            print(_existing(layout.kubeconfig))
        case "audit-log":
            print(_existing(layout.audit_log))
        case _:
            return _run_image_command(options, layout)
    return 0


def _up(layout: Layout, gpus: int, *, network_policies: bool, for_tests: bool) -> None:
    with cluster.locked(layout):
        cluster.up(layout, gpus, for_tests=for_tests)
        if network_policies:
            cluster.enforce_network_policies(layout)
    print(layout.kubeconfig)


def _down(layout: Layout, *, for_tests: bool) -> None:
    with cluster.locked(layout):
        if not for_tests:
            cleanup.down(layout)
        elif layout.cluster.exists():
            cluster.reject_other(layout, for_tests=True)
            with cluster.used_by_tests(layout):
                cleanup.down(layout)


def _prepare(layout: Layout, *, slow: bool) -> None:
    packages.ensure(layout, packages.ALL)
    packages.unpack(layout)
    toolchain.build(layout, (*toolchain.TOOLS, *(toolchain.SLOW_TOOLS if slow else ())))
    product.build_images(layout)
    if slow:
        previous.build(layout)


def _run_image_command(options: argparse.Namespace, layout: Layout) -> int:
    packages.ensure(layout, packages.IMAGE)
    match options.command:
        case "load":
            with cluster.locked(layout):
                for image in options.images:
                    print(images.load(layout, cluster.ports_of(layout), image))
        case "base-image":
            print(images.base_image(layout))
        case "images":
            built = product.build_images(layout)
            print(built.operator, built.trainer, sep="\n")
        case "image":
            arguments = dict(pair.split("=", 1) for pair in options.build_arg)
            images.build(layout, options.tag, options.file, options.context, arguments)
            print(options.tag)
    return 0


def _report(findings: list[str]) -> int:
    for finding in findings:
        print(finding)
    return 1 if findings else 0


def _existing(path: Path) -> Path:
    if not path.exists():
        raise ClusterError(f"no {path}: start the cluster with `python -m devcluster up`")
    return path


def _build_argument(text: str) -> str:
    if "=" not in text:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=VALUE")
    return text


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number, 0 or more")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="devcluster", description="A real single-node Kubernetes, without Docker.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("packages", help="install the Debian packages that the cluster and the tests need")
    prepare = commands.add_parser(
        "prepare", help="install packages and build programs and images: all that the tests and the demo need"
    )
    prepare.add_argument("--slow", action="store_true", help="also build the programs of the slow tests")
    build = commands.add_parser("build", help="build the programs that the cache lacks and print their paths")
    build.add_argument("names", nargs="*", metavar="NAME", help=_NAMES)
    path = commands.add_parser("path", help="build a program if needed, and print its path")
    path.add_argument("name", metavar="NAME")
    up = commands.add_parser("up", help="start the cluster, or keep a healthy one; prints the kubeconfig's path")
    up.add_argument("--gpus", type=_count, default=cluster.DEFAULT_GPUS, help="simulated GPUs of the node (default: 2)")
    up.add_argument("--network-policies", action="store_true", help="enforce NetworkPolicies")
    up.add_argument("--for-tests", action="store_true", help="a cluster that the cluster tests use, and leave running")
    down = commands.add_parser("down", help="stop the cluster and remove everything that it created, except caches")
    down.add_argument("--for-tests", action="store_true", help="fail if the tests have not started it")
    commands.add_parser("leftovers", help="print leftovers of a cluster on this machine; exit status 1 if any")
    commands.add_parser(
        "status", help="print the programs, their logs and the node's state; exit status 1 if unhealthy"
    )
    commands.add_parser("kubeconfig", help="print the path of the administrator's kubeconfig")
    commands.add_parser("audit-log", help="print the path of the API server's audit log (one JSON line per request)")
    load = commands.add_parser("load", help="load images from buildah's storage into the node")
    load.add_argument("images", nargs="+", metavar="IMAGE")
    commands.add_parser("images", help="build the operator's and the trainer's image and print their names")
    commands.add_parser("base-image", help="make the Debian base image and print its name")
    image = commands.add_parser("image", help="build an image from a Dockerfile with this machine's pip configuration")
    image.add_argument("tag", metavar="TAG")
    image.add_argument("--file", type=Path, required=True, metavar="DOCKERFILE")
    image.add_argument("--context", type=Path, help="folder that COPY reads from (default: the repository's root)")
    image.add_argument("--build-arg", type=_build_argument, action="append", default=[], metavar="NAME=VALUE")
    return parser


if __name__ == "__main__":
    sys.exit(main())
