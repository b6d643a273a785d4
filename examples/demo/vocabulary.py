"""What the demo's data set asks for: the operations, their phrasings, and the names that fill their gaps.

The two vocabularies share no noun, namespace or node, and no phrasing is in both ``train`` and ``held_out``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Operation:
    """A kubectl command with gaps, and the requests that ask for it: some for training, others held out."""

    command: str
    train: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Vocabulary:
    """The names that fill the gaps of a set's requests."""

    nouns: tuple[str, ...]
    namespaces: tuple[str, ...]
    nodes: tuple[str, ...]


TRAIN = Vocabulary(
    nouns=(
        "checkout", "billing", "orders", "search", "auth", "cart", "invoice", "catalog", "inventory", "profile",
        "gateway", "mail", "report", "session", "pricing", "shipping", "review", "media", "chat", "ledger",
        "notify", "upload", "wallet", "ranking", "export", "import", "sync", "quota", "audit", "proxy",
    ),
    namespaces=(
        "production", "staging", "dev", "shop", "platform", "analytics", "research", "finance", "internal", "sandbox",
        "team-a", "team-b", "team-red", "web", "data", "infra", "games", "retail", "logistics", "support",
        "media", "batch", "edge", "canary", "preview", "training", "payments", "identity", "monitoring", "default",
        "legal", "sales", "demo", "backup",
    ),
    nodes=tuple(f"{prefix}-{number}" for prefix in ("node", "worker", "gpu") for number in range(1, 13)),
)  # fmt: skip
HELD_OUT = Vocabulary(
    nouns=(
        "tickets", "weather", "music", "coupon", "feedback", "calendar", "photos", "tracking", "loyalty", "router",
        "forecast", "banner", "survey", "recipes",
    ),
    namespaces=("mobile", "warehouse", "travel", "security", "team-blue", "testing", "catering", "marketing", "lab"),
    nodes=("node-47", "node-58", "worker-36", "worker-91", "edge-2", "edge-5", "gpu-30", "storage-4"),
)  # fmt: skip

SUFFIXES = ("", "-api", "-web", "-worker", "-db", "-cache", "-server", "-backend")
# (as a request says it, in the plural, as kubectl says it, in the plural)
KINDS = (
    ("deployment", "deployments", "deployment", "deployments"),
    ("statefulset", "statefulsets", "statefulset", "statefulsets"),
    ("daemonset", "daemonsets", "daemonset", "daemonsets"),
    ("service", "services", "service", "services"),
    ("config map", "config maps", "configmap", "configmaps"),
    ("secret", "secrets", "secret", "secrets"),
    ("ingress", "ingresses", "ingress", "ingresses"),
    ("cron job", "cron jobs", "cronjob", "cronjobs"),
    ("volume claim", "volume claims", "pvc", "pvc"),
)
LABELS = ("tier=backend", "tier=frontend", "env=prod", "env=test", "owner=alice", "owner=bob", "stage=canary")
COMMANDS = ("env", "date", "df -h", "ps aux", "ls /data", "cat /etc/hosts", "ls /tmp", "cat /etc/resolv.conf")
LOCAL_PORTS = ("8080", "8081", "9000", "9090", "3000", "5000")
REMOTE_PORTS = ("80", "443", "5432", "6379", "8443")

OPERATIONS = (
    Operation(
        "kubectl get {kinds} -n {namespace}",
        (
            "List the {spoken_kinds} in namespace {namespace}.",
            "Show me all {spoken_kinds} in {namespace}.",
            "Which {spoken_kinds} exist in the {namespace} namespace?",
            "Print every {spoken_kind} of namespace {namespace}.",
            "Are there any {spoken_kinds} in {namespace}?",
            "Get the {spoken_kinds} of {namespace} for me.",
        ),
        ("What {spoken_kinds} do we have in {namespace}?", "Give me the list of {spoken_kinds} in {namespace}."),
    ),
    Operation(
        "kubectl get {kinds} -l app={name} --all-namespaces",
        (
            "List the {spoken_kinds} labelled app={name} in all namespaces.",
            "Find every {spoken_kind} with label app={name} across the cluster.",
            "Show the {spoken_kinds} whose app label is {name}, in any namespace.",
            "Which {spoken_kinds} carry the label app={name}, whatever the namespace?",
            "Look in all namespaces for {spoken_kinds} with app={name}.",
            "I am looking for {spoken_kinds} labelled app={name} in every namespace.",
        ),
        ("Search all namespaces for {spoken_kinds} with the label app={name}.",),
    ),
    Operation(
        "kubectl get pods -n {namespace} -o wide",
        (
            "Show the pods in {namespace} with the nodes they run on.",
            "On which nodes do the pods of namespace {namespace} run?",
            "List pods in {namespace} together with their node and IP.",
            "Print the pods of {namespace} including node names.",
            "Where do the pods of {namespace} run? Show their nodes.",
            "For each pod in namespace {namespace}, which node is it on?",
        ),
        ("Which node does each pod in {namespace} run on?",),
    ),
    Operation(
        "kubectl get {kind} {name} -n {namespace} -o yaml",
        (
            "Print the {spoken_kind} {name} in {namespace} as YAML.",
            "Show the YAML of {spoken_kind} {name} in namespace {namespace}.",
            "I need the YAML manifest of the {name} {spoken_kind} from {namespace}.",
            "Dump {spoken_kind} {name} of {namespace} in YAML.",
            "Give me {spoken_kind} {name} in {namespace} in YAML format.",
            "Can I get the YAML of the {spoken_kind} named {name}, namespace {namespace}?",
        ),
        ("Get me the YAML for the {spoken_kind} called {name} in {namespace}.",),
    ),
    Operation(
        "kubectl describe {kind} {name} -n {namespace}",
        (
            "Describe the {spoken_kind} {name} in {namespace}.",
            "Show details and events of {spoken_kind} {name} in namespace {namespace}.",
            "Tell me everything about the {name} {spoken_kind} in {namespace}.",
            "What is wrong with {spoken_kind} {name} in {namespace}? Describe it.",
            "Give me a description of {spoken_kind} {name} in {namespace}.",
            "I need all details of the {spoken_kind} {name}, namespace {namespace}.",
        ),
        ("I want a full description of the {spoken_kind} {name} from {namespace}.",),
    ),
    Operation(
        "kubectl logs {pod} -n {namespace} --tail={count}",
        (
            "Show the last {count} log lines of pod {pod} in {namespace}.",
            "Print the final {count} lines that {pod} in namespace {namespace} logged.",
            "Tail {count} lines of the logs of {pod} in {namespace}.",
            "Give me the newest {count} log lines from pod {pod}, namespace {namespace}.",
            "I want to read the last {count} lines that pod {pod} in {namespace} wrote to its log.",
            "What were the most recent {count} lines logged by {pod} in {namespace}?",
        ),
        ("What are the latest {count} lines in the log of pod {pod} in {namespace}?",),
    ),
    Operation(
        "kubectl logs {pod} -n {namespace} --previous",
        (
            "Pod {pod} in {namespace} crashed; show the logs from before the restart.",
            "Print the logs of the previous container of {pod} in {namespace}.",
            "What did pod {pod} in namespace {namespace} log before it restarted?",
            "Show logs of the last crashed run of {pod} in {namespace}.",
            "Why did {pod} in {namespace} crash? Get the log of its previous run.",
            "Get me the old log of {pod}, namespace {namespace}, before it crashed.",
        ),
        ("I need the log that {pod} in {namespace} wrote before its crash.",),
    ),
    Operation(
        "kubectl logs {pod} -n {namespace} --since={count}m",
        (
            "Show what pod {pod} in {namespace} logged in the last {count} minutes.",
            "Print {count} minutes of logs from {pod} in {namespace}.",
            "Logs of pod {pod} in namespace {namespace} since {count} minutes ago, please.",
            "Fetch the past {count} minutes of log output of {pod}, namespace {namespace}.",
            "What has {pod} in {namespace} logged over the last {count} minutes?",
            "I want the log messages of pod {pod} in {namespace} from the last {count} minutes.",
        ),
        ("Which messages did {pod} in {namespace} log during the last {count} minutes?",),
    ),
    Operation(
        "kubectl scale deployment {name} -n {namespace} --replicas={replicas}",
        (
            "Scale {name} in {namespace} to {replicas} replicas.",
            "Run {replicas} copies of deployment {name} in namespace {namespace}.",
            "Set the replica count of {name} in {namespace} to {replicas}.",
            "Change deployment {name} in {namespace} to {replicas} replicas.",
            "I want {replicas} replicas of {name} in {namespace}.",
            "Deployment {name} in {namespace} should have {replicas} replicas.",
        ),
        ("Make the {name} deployment in {namespace} have {replicas} replicas.",),
    ),
    Operation(
        "kubectl autoscale deployment {name} -n {namespace} --min={replicas} --max={maximum}",
        (
            "Autoscale {name} in {namespace} between {replicas} and {maximum} replicas.",
            "Let deployment {name} in namespace {namespace} autoscale from {replicas} to {maximum} pods.",
            "Add autoscaling to {name} in {namespace}: minimum {replicas}, maximum {maximum}.",
            "Create an autoscaler for deployment {name} in {namespace} with {replicas} to {maximum} replicas.",
            "Deployment {name} in {namespace} should autoscale, with at least {replicas} and at most {maximum} pods.",
            "Enable autoscaling of {name} in {namespace}, {replicas} replicas at least, {maximum} at most.",
        ),
        ("Set up autoscaling for {name} in {namespace}, at least {replicas} and at most {maximum} replicas.",),
    ),
    Operation(
        "kubectl rollout restart deployment {name} -n {namespace}",
        (
            "Restart the deployment {name} in {namespace}.",
            "Restart all pods of {name} in namespace {namespace}, one after the other.",
            "Do a rolling restart of {name} in {namespace}.",
            "Please restart {name} in the {namespace} namespace.",
            "The deployment {name} in {namespace} must be restarted.",
            "Trigger a restart of deployment {name}, namespace {namespace}.",
        ),
        ("Deployment {name} in {namespace} needs a restart.",),
    ),
    Operation(
        "kubectl rollout status deployment {name} -n {namespace}",
        (
            "Is the rollout of {name} in {namespace} finished?",
            "Watch the rollout of deployment {name} in namespace {namespace}.",
            "Show the rollout status of {name} in {namespace}.",
            "How far is the rollout of the {name} deployment in {namespace}?",
            "Check whether {name} in {namespace} has rolled out.",
            "What is the status of the rollout of {name} in namespace {namespace}?",
        ),
        ("Check the status of the {name} rollout in {namespace}.",),
    ),
    Operation(
        "kubectl rollout undo deployment {name} -n {namespace} --to-revision={replicas}",
        (
            "Roll {name} in {namespace} back to revision {replicas}.",
            "Undo the rollout of deployment {name} in namespace {namespace} to revision {replicas}.",
            "Return {name} in {namespace} to its revision {replicas}.",
            "Go back to revision {replicas} of deployment {name} in {namespace}.",
            "Take the deployment {name} in {namespace} back to revision {replicas}.",
            "I want revision {replicas} of {name} in {namespace} again.",
        ),
        ("Revert the deployment {name} in {namespace} to revision {replicas}.",),
    ),
    Operation(
        "kubectl delete {kind} {name} -n {namespace}",
        (
            "Delete the {spoken_kind} {name} in {namespace}.",
            "Remove {spoken_kind} {name} from namespace {namespace}.",
            "Get rid of the {name} {spoken_kind} in {namespace}.",
            "The {spoken_kind} {name} in {namespace} is obsolete, delete it.",
            "Delete {name} in {namespace}, it is a {spoken_kind}.",
            "Please remove the {spoken_kind} called {name} in {namespace}.",
        ),
        ("Please delete {name}, a {spoken_kind} in {namespace}.",),
    ),
    Operation(
        "kubectl top pods -n {namespace} --sort-by={measure}",
        (
            "Show the {measure} usage of the pods in {namespace}, highest first.",
            "Which pods in {namespace} use the most {measure}?",
            "Sort the pods of namespace {namespace} by {measure} usage.",
            "List pods in {namespace} by how much {measure} they consume.",
            "Order the pods in {namespace} by {measure}.",
            "What is the {measure} consumption of the pods in {namespace}? Sort them.",
        ),
        ("Rank the pods in {namespace} by {measure} consumption.",),
    ),
    Operation(
        "kubectl label {kind} {name} -n {namespace} {label}",
        (
            "Label the {spoken_kind} {name} in {namespace} with {label}.",
            "Add the label {label} to {spoken_kind} {name} in namespace {namespace}.",
            "Set label {label} on the {name} {spoken_kind} in {namespace}.",
            "Give {spoken_kind} {name} in {namespace} the label {label}.",
            "The {spoken_kind} {name} in {namespace} should have the label {label}.",
            "Attach {label} to {spoken_kind} {name} in {namespace} as a label.",
        ),
        ("Put {label} as a label on the {spoken_kind} {name} in {namespace}.",),
    ),
    Operation(
        "kubectl set image deployment {name} app=registry/{name}:{version} -n {namespace}",
        (
            "Update the app container of {name} in {namespace} to image registry/{name}:{version}.",
            "Set the image of container app in deployment {name}, namespace {namespace}, to registry/{name}:{version}.",
            "Deploy registry/{name}:{version} as the app container of {name} in {namespace}.",
            "Change the image of {name} in {namespace} (container app) to registry/{name}:{version}.",
            "Container app of deployment {name} in {namespace} should use registry/{name}:{version}.",
            "Switch the app container of {name}, namespace {namespace}, to registry/{name}:{version}.",
        ),
        ("Use registry/{name}:{version} for the app container of deployment {name} in {namespace}.",),
    ),
    Operation(
        "kubectl exec {pod} -n {namespace} -- {shell}",
        (
            "Run {shell} in pod {pod} in {namespace}.",
            "Execute {shell} inside {pod}, namespace {namespace}.",
            "Run the command {shell} in the pod {pod} of {namespace}.",
            "In pod {pod} of namespace {namespace}, execute {shell}.",
            "What is the output of {shell} in the pod {pod} in {namespace}?",
            "Show me what {shell} prints in {pod}, namespace {namespace}.",
        ),
        ("What does {shell} print inside the pod {pod} in {namespace}?",),
    ),
    Operation(
        "kubectl port-forward service/{name} {local_port}:{remote_port} -n {namespace}",
        (
            "Forward local port {local_port} to port {remote_port} of service {name} in {namespace}.",
            "Make port {remote_port} of service {name} in {namespace} available on my port {local_port}.",
            "Port-forward {local_port} to {remote_port} on the {name} service in namespace {namespace}.",
            "Connect my port {local_port} to port {remote_port} of the service {name} in {namespace}.",
            "I want to reach port {remote_port} of service {name} in {namespace} on local port {local_port}.",
            "Open local port {local_port} for port {remote_port} of {name}, a service in {namespace}.",
        ),
        ("I want port {local_port} here to reach port {remote_port} of service {name} in {namespace}.",),
    ),
    Operation(
        "kubectl cordon {node}",
        (
            "Mark node {node} as unschedulable.",
            "Stop scheduling new pods on {node}.",
            "Cordon {node}.",
            "No new pods on node {node}, please.",
            "Node {node} should get no new pods.",
            "Prevent new pods from landing on {node}.",
        ),
        ("Keep new pods off the node {node}.",),
    ),
    Operation(
        "kubectl drain {node} --ignore-daemonsets",
        (
            "Drain node {node} but ignore daemonsets.",
            "Evict all pods from {node} except those of daemonsets.",
            "Empty the node {node} for maintenance, leaving daemonsets.",
            "Move everything off {node}; daemonsets may stay.",
            "Node {node} needs a repair: drain it, but leave daemonsets alone.",
            "Take all pods away from {node} and ignore daemonsets.",
        ),
        ("Drain {node} for a repair and leave the daemonsets alone.",),
    ),
    Operation(
        "kubectl create configmap {name} -n {namespace} --from-literal={setting}={count}",
        (
            "Create a config map {name} in {namespace} with {setting} set to {count}.",
            "Make a config map named {name} in namespace {namespace} holding {setting}={count}.",
            "Add config map {name} to {namespace}, with the value {count} for {setting}.",
            "In {namespace}, create the config map {name} where {setting} is {count}.",
            "I want a config map {name} in {namespace} with {setting}={count}.",
            "Put {setting}={count} into a new config map {name} in namespace {namespace}.",
        ),
        ("I need a new config map {name} in {namespace} that says {setting} is {count}.",),
    ),
)
