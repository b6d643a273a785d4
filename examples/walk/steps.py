"""The walk: the commands of a user who has read only the README, and their expected output."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

TITLE = "A walk, from installation to removal"
INTRODUCTION = (
    "Recorded by `make walk`: each command ran in a shell, against the embedded cluster, and each output is as it "
    "came. Two things were done before: `qlora` was [installed](how-to/command-line.md#install-it), and, because "
    "that cluster reaches no Hub, a base model was put on the claim `models` of the namespace `walk`: one so small "
    "that a CPU trains it in minutes, so its losses and its speed are no guide to yours. `values.yaml` names the "
    "images, and lets pods compute on the CPU: the only node declares two GPUs and has none."
)


@dataclass(frozen=True)
class Step:
    """One command, or several that belong together."""

    chapter: str
    script: str
    """A command a line; a line that ends with a backslash continues in the next."""
    tells: str = ""
    """An introduction to it, as Markdown."""
    shows: tuple[str, ...] = ()
    """Texts that the output must contain."""
    exit_code: int = 0
    """Of the last command; those before it must end with 0."""

    @property
    def commands(self) -> list[str]:
        """The commands as typed."""
        return re.split(r"(?<!\\)\n", self.script)

    def with_values(self, values: Mapping[str, str]) -> "Step":
        """Replace each `{name}` in the step's commands. Raises KeyError without a value."""
        return replace(self, script=self.script.format_map(values))


def _submit(rank: int, *, options: str = "") -> str:
    """The command that submits a job of that rank; the number of steps is filled in."""
    return (
        f"kubectl qlora submit --name rank-{rank} --rank {rank} --alpha {2 * rank} \\\n"
        "  --model pvc://models/base --data configMap://answers/train.jsonl --eval-fraction 0.02 \\\n"
        "  --max-steps {steps} --learning-rate 2e-3 --micro-batch-size 1 --gradient-accumulation-steps 2 \\\n"
        f"  --max-sequence-length 256{options}"
    )


_INSTALL, _TRAIN, _GET, _COMPARE, UNINSTALL = (
    "Install the operator",
    "Train",
    "Get the adapter",
    "Compare two ranks",
    "Uninstall",
)

WALK = (
    Step(
        _INSTALL,
        "kubectl qlora doctor",
        "`doctor` lists what a cluster lacks, with the fix. Here it is everything:",
        shows=("install the operator's chart", "3 problems"),
        exit_code=1,
    ),
    Step(
        _INSTALL,
        "cat values.yaml",
        "The settings of the cluster's administrator. `signingKey` names the Secret that signs published adapters:",
    ),
    Step(
        _INSTALL,
        "helm upgrade --install qlora-operator helm/qlora-operator \\\n"
        "  --namespace qlora-system --create-namespace --wait --values values.yaml",
        shows=("STATUS: deployed",),
    ),
    Step(
        _INSTALL,
        "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out signing.key\n"
        "openssl pkey -in signing.key -pubout -out signing.pub\n"
        "kubectl create secret generic qlora-signing --from-file=signing.key",
        "The key stays in this namespace; `signing.pub` is for all users:",
        shows=("secret/qlora-signing created",),
    ),
    Step(_INSTALL, "kubectl qlora doctor", shows=("Operator", "Definitions")),
    Step(
        _TRAIN,
        "head --lines=2 train.jsonl\nkubectl create configmap answers --from-file=train.jsonl",
        "Each line of the data is a conversation:",
        shows=('"messages"', "configmap/answers created"),
    ),
    Step(_TRAIN, _submit(8), shows=("rank-8 created",)),
    Step(
        _TRAIN,
        "kubectl wait --for=jsonpath='{{.status.progress.loss}}' --timeout=10m qlorajob/rank-8\n"
        "kubectl qlora suspend rank-8\n"
        "kubectl wait --for=jsonpath='{{.status.phase}}'=Suspended --timeout=5m qlorajob/rank-8\n"
        "kubectl qlora list",
        "Once it has trained some steps, suspend it: it saves a checkpoint and frees the GPU.",
        shows=("saves a checkpoint first", "Suspended"),
    ),
    Step(_TRAIN, "kubectl qlora resume rank-8", "It continues from the checkpoint:", shows=("rank-8 is resumed",)),
    Step(
        _TRAIN,
        "kubectl qlora watch rank-8",
        "On a terminal, `watch` draws a bar and the loss curve; into a file, it prints a line for each change. It ends "
        "with the job:",
        shows=("Training", "Succeeded"),
    ),
    Step(_GET, "kubectl qlora report rank-8 --no-open", shows=("rank-8-report.html",)),
    Step(_GET, "kubectl qlora adapter rank-8\nls rank-8", shows=("SHA-256", "adapter_model.safetensors")),
    Step(
        _GET,
        "qlora verify rank-8 --key signing.pub",
        "Its signer, and its inputs:",
        shows=("of the given key", "pvc://models/base"),
    ),
    Step(
        _GET,
        "cp --recursive rank-8 changed\n"
        "printf x >> changed/adapter_model.safetensors\n"
        "qlora verify changed --key signing.pub",
        "One byte more, and it is not what was published:",
        shows=("not verified",),
        exit_code=15,
    ),
    Step(
        _COMPARE,
        _submit(2, options=" --watch"),
        "With `--watch`, `submit` ends when the job has ended, with the exit code of its step:",
        shows=("Succeeded",),
    ),
    Step(_COMPARE, "kubectl qlora list", shows=("rank-2", "rank-8")),
    Step(_COMPARE, "kubectl qlora compare rank-2 rank-8 --picture curves.svg", shows=("A  rank-2", "B  rank-8")),
    Step(
        UNINSTALL,
        "kubectl delete qlorasweeps,qlorajobs --all\n"
        "helm uninstall qlora-operator --namespace qlora-system --wait\n"
        "kubectl delete crd qlorajobs.qlora.dev qlorasweeps.qlora.dev qloraprofiles.qlora.dev",
        shows=('release "qlora-operator" uninstalled',),
    ),
    Step(
        UNINSTALL,
        "kubectl get pvc",
        "The workspaces stay until a user deletes them. They have the checkpoints and the adapters:",
        shows=("rank-2", "rank-8"),
    ),
)
"""All commands in order. `{steps}` is the number of optimizer steps; a brace of a command itself is doubled."""

TERMINALS = {
    "terminal-doctor": "kubectl qlora doctor",
    "terminal-watch": "kubectl qlora watch rank-8",
    "terminal-list": "kubectl qlora list",
    "terminal-compare": "kubectl qlora compare rank-2 rank-8",
}
"""The commands whose terminals are photographed before the removal, by the name of the picture."""
