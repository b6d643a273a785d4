// The list of jobs, and one of them.
import { call, jobPath, session } from "./api.js";
import { curves } from "./curves.js";
import { facts, h, link, table } from "./dom.js";
import { adapterName, conditionOf, gib, hasEnded, lossesOf, nameOf, number, phaseOf, placeOf, reasonOf, verdictOf } from "./job.js";

const badge = (job) => h("span", { class: `phase ${phaseOf(job)}` }, phaseOf(job));

function waitOf(job, all) {
  if (hasEnded(job)) return phaseOf(job) === "Failed" ? (reasonOf(job)?.reason ?? "") : "";
  const place = placeOf(job, all);
  return [place, reasonOf(job)?.reason].filter(Boolean).join(", ");
}

export function jobs() {
  const read = async () => {
    const { items, total } = await call("GET", "jobs");
    if (!total) return [h("p", {}, "No QLoRAJob in this namespace.")];
    const rows = items.map((job) => [
      link(`#job/${encodeURIComponent(nameOf(job))}`, nameOf(job)),
      badge(job),
      job.status.progress?.summary ?? "",
      number(job.status.progress?.evalLoss ?? job.status.progress?.loss) ?? "",
      verdictOf(job) ?? "",
      waitOf(job, items),
    ]);
    return [
      table("Jobs, the newest first", ["Name", "Phase", "Progress", "Loss", "GPU memory", "Place or reason"], rows),
      total > items.length && h("p", {}, `The newest ${items.length} of ${total} are shown.`),
    ];
  };
  return { title: "Jobs", read };
}

export function oneJob(name) {
  const read = async () => {
    const job = await call("GET", jobPath(name));
    job.status ??= {};
    const waits = !hasEnded(job) && ["Pending", "Queued"].includes(phaseOf(job));
    const all = waits ? (await call("GET", "jobs")).items : [];
    const { progress, memory, adapter, gate, settings } = job.status, reason = reasonOf(job);
    return [
      h("p", { role: "status" }, badge(job), reason && ` ${reason.reason}: ${reason.message}`),
      facts([
        ["Model", job.spec.model.source],
        ["Place in the queue", placeOf(job, all)],
        ["Progress", progress?.summary],
        ["Time left", progress?.remaining],
        ["Training loss", number(progress?.loss)],
        ["Held-out loss", number(progress?.evalLoss)],
        ["Speed", progress?.tokensPerSecond && `${Math.round(progress.tokensPerSecond)} tokens/s`],
        ["GPU memory", verdictOf(job)],
        ["Peak of GPU memory", gib(memory?.peakBytes)],
        ["Memory", memory?.message],
        ["Gate", gate && (gate.passed ? "passed" : "not passed")],
        ["Prepared", conditionOf(job, "Prepared")?.message],
        ["Adapter", adapter && h("code", {}, adapterName(job, session.get().namespace))],
        ["Address", adapter && h("code", {}, adapter.uri)],
      ]),
      h("h2", {}, "Losses"),
      curves([lossesOf(job)]),
      settings && [h("h2", {}, "Settings that prepare chose"),
        table("Settings", ["Setting", "Value", "Why"], settings.map((each) => [each.setting, each.value, each.reason ?? ""]))],
    ];
  };
  return { title: name, read };
}
