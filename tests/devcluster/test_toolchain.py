"""The programs that `make test` builds share modules of one version, which are compiled once."""

import re
from collections import defaultdict

from devcluster import toolchain


def test_each_shared_module_of_the_cluster_s_programs_has_one_version() -> None:
    versions: dict[str, dict[str, str]] = defaultdict(dict)
    for module in {tool.module for tool in toolchain.TOOLS.values()}:
        text = (toolchain.MODULES / module / "go.mod").read_text()
        for path, version in re.findall(r"^(?:require |\t)(\S+) (v\S+)", text, re.MULTILINE):
            versions[path][module] = version
    differing = {path: found for path, found in versions.items() if len(set(found.values())) > 1}
    assert not differing, "raise the lower ones with `go get MODULE@VERSION` and `go mod tidy`"
    assert len(versions["k8s.io/client-go"]) > 1


def test_no_program_of_the_cluster_replaces_a_module() -> None:
    # A replaced module is compiled again, although there is one of the same version.
    modules = {tool.module for tool in toolchain.TOOLS.values()}
    assert not [module for module in modules if "replace" in (toolchain.MODULES / module / "go.mod").read_text()]


def test_one_command_builds_the_programs_of_a_module_that_go_names() -> None:
    assert toolchain.together(["etcd", "kubectl", "helm", "kubelet"]) == [["etcd"], ["kubectl", "kubelet"], ["helm"]]
