// OpenAI's client for Node: every call that the door answers.
import assert from "node:assert";
import fs from "node:fs";
import {createRequire} from "node:module";

const [, , rows, model, modules] = process.argv;
const {OpenAI, NotFoundError} = createRequire(`${modules}/`)("openai");
const client = new OpenAI();
const file = await client.files.create({file: fs.createReadStream(rows), purpose: "fine-tune"});
assert.equal(await (await client.files.content(file.id)).text(), fs.readFileSync(rows, "utf-8"));
assert.equal((await client.files.retrieve(file.id)).filename, "train.jsonl");
let job = await client.fineTuning.jobs.create({model, training_file: file.id, suffix: "node",
  method: {type: "supervised", supervised: {hyperparameters: {n_epochs: 2}}}});
while (job.status !== "succeeded") {
  await new Promise((resolve) => setTimeout(resolve, 500));
  job = await client.fineTuning.jobs.retrieve(job.id);
}
const events = [];
for await (const event of client.fineTuning.jobs.listEvents(job.id, {limit: 2})) events.push(event.id);
assert(events.length > 3);
const jobs = [];
for await (const each of client.fineTuning.jobs.list({limit: 1})) jobs.push(each.id);
assert(jobs.includes(job.id));
assert.equal((await client.fineTuning.jobs.checkpoints.list(job.id)).data.length, 1);
assert.equal((await client.models.retrieve(job.fine_tuned_model)).id, job.fine_tuned_model);
const second = await client.fineTuning.jobs.create({model, training_file: file.id});
assert.equal((await client.fineTuning.jobs.pause(second.id)).status, "paused");
assert.equal((await client.fineTuning.jobs.resume(second.id)).status, "validating_files");
assert.equal((await client.fineTuning.jobs.cancel(second.id)).status, "cancelled");
await assert.rejects(client.fineTuning.jobs.retrieve("ftjob-none"), NotFoundError);
assert((await client.models.delete(job.fine_tuned_model)).deleted);
assert((await client.files.delete(file.id)).deleted);
console.log(job.fine_tuned_model);
