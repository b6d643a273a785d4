// Reads a QLoRAJob.
export const ENDED = ["Succeeded", "Failed"];
const WAITS = ["Pending", "Queued"];

export const nameOf = (job) => job.metadata.name;
export const phaseOf = (job) => job.status.phase ?? "Pending";
export const hasEnded = (job) => ENDED.includes(phaseOf(job));
export const conditionOf = (job, type) => job.status.conditions?.find((each) => each.type === type);
export const reasonOf = (job) =>
  conditionOf(job, phaseOf(job) === "Failed" ? "Failed" : "Succeeded") ?? conditionOf(job, "Suspended");
export const number = (value, digits = 4) => (value == null ? null : value.toFixed(digits));
export const gib = (bytes) => (bytes == null ? null : `${(bytes / 2 ** 30).toFixed(1)} GiB`);
export const adapterName = (job, namespace) => `${namespace}/${nameOf(job)}@sha256:${job.status.adapter.sha256}`;

// The losses of status.history: step, training loss, held-out loss.
export function lossesOf(job) {
  const rows = (job.status.history ?? "").split("\n").slice(1).map((line) => line.split(","));
  const points = (column) => rows.filter((row) => row[column]).map((row) => [Number(row[0]), Number(row[column])]);
  return { name: nameOf(job), training: points(1), heldOut: points(2) };
}

const queueOf = (job) => job.status.queueName ?? job.spec.scheduling?.queueName;
const lineOf = (job) => queueOf(job) ?? `profile ${job.spec.scheduling?.profileName ?? "default"}`;
const since = (job) => job.status.phaseSince ?? job.metadata.creationTimestamp;

// The place among the waiting jobs of this namespace, by how long they wait; null if it does not wait.
export function placeOf(job, jobs) {
  const isWaiting = (each) => WAITS.includes(phaseOf(each)) && !each.spec.suspend && lineOf(each) === lineOf(job);
  if (!isWaiting(job)) return null;
  const waiting = jobs.filter(isWaiting);
  const ahead = waiting.filter((each) => phaseOf(each) === phaseOf(job) && since(each) < since(job)).length;
  const of = waiting.filter((each) => phaseOf(each) === phaseOf(job)).length;
  return `${ahead + 1} of ${of} (${queueOf(job) ? `queue ${queueOf(job)}` : lineOf(job)})`;
}

export function verdictOf(job) {
  const memory = job.status.memory;
  if (!memory) return null;
  const need = memory.estimateBytes ? ` ${gib(memory.estimateBytes)}` : "";
  const room = memory.budgetBytes ? ` of ${gib(memory.budgetBytes)}` : "";
  return `${memory.verdict}:${need || " estimate unknown"}${room}`;
}
