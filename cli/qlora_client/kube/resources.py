"""The requested kinds of objects: their paths, and their names in RBAC rules."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Resource:
    """A kind of object, as paths and RBAC rules name it."""

    group: str
    version: str
    plural: str
    subresource: str = ""
    namespaced: bool = True

    def path(self, namespace: str | None, name: str = "") -> str:
        """Of one object, or of all in the namespace, or in the cluster (None)."""
        parts = ["apis", self.group, self.version] if self.group else ["api", self.version]
        parts += ["namespaces", namespace] if namespace else []
        parts += [self.plural, *([name] if name else []), *([self.subresource] if self.subresource else [])]
        return "/" + "/".join(parts)

    @property
    def in_rules(self) -> str:
        """Its name in the rule of a Role."""
        return f"{self.plural}/{self.subresource}" if self.subresource else self.plural

    def rule(self, *verbs: str) -> str:
        """The rule of a role that allows these verbs, as YAML."""
        allowed = ", ".join(f'"{verb}"' for verb in verbs)
        return f'{{apiGroups: ["{self.group}"], resources: ["{self.in_rules}"], verbs: [{allowed}]}}'


@dataclass(frozen=True)
class Page(Resource):
    """A page of the API server that is about no object; `plural` is its path."""

    def path(self, namespace: str | None, name: str = "") -> str:
        """Its path; neither namespace nor name is part of it."""
        return self.plural

    def rule(self, *verbs: str) -> str:
        """The rule of a role that allows reading it, as YAML."""
        return f'{{nonResourceURLs: ["{self.plural}"], verbs: ["get"]}}'


def page(path: str) -> Page:
    """The page with this path."""
    return Page("", "", path, namespaced=False)


JOBS = Resource("qlora.dev", "v1beta1", "qlorajobs")
SWEEPS = Resource("qlora.dev", "v1beta1", "qlorasweeps")
PROFILES = Resource("qlora.dev", "v1beta1", "qloraprofiles", namespaced=False)
REVISIONS = Resource("apps", "v1", "controllerrevisions")
PODS = Resource("", "v1", "pods")
LOGS = Resource("", "v1", "pods", "log")
EXEC = Resource("", "v1", "pods", "exec")
EVENTS = Resource("", "v1", "events")
CONFIG_MAPS = Resource("", "v1", "configmaps")
ACCESS_REVIEWS = Resource("authorization.k8s.io", "v1", "selfsubjectaccessreviews")


@dataclass(frozen=True)
class Request:
    """A request, in the terms of messages and RBAC rules."""

    verb: str
    resource: Resource
    namespace: str | None
    """None: all of them."""
    name: str = ""

    @property
    def rule(self) -> str:
        """The rule of a role that allows it, as YAML."""
        return self.resource.rule(self.verb)

    @property
    def role(self) -> str:
        """The kind of role that has such rules."""
        return "Role" if self.namespace else "ClusterRole"

    @property
    def place(self) -> str:
        """The scope of the request."""
        if self.namespace:
            return f"in the namespace {self.namespace}"
        return "in all namespaces" if self.resource.namespaced else "in the cluster"
