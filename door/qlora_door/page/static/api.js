// Sends requests to the door with the viewer's key, which this tab alone keeps.
const KEY = "qlora";

export const session = {
  get: () => JSON.parse(sessionStorage.getItem(KEY) ?? "null"),
  set: (found) => sessionStorage.setItem(KEY, JSON.stringify(found)),
  clear: () => sessionStorage.removeItem(KEY),
};

export class Refusal extends Error {
  constructor(status, { message, param }) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export async function call(method, path, body) {
  const { key, namespace } = session.get() ?? {};
  const headers = { Authorization: `Bearer ${key}` };
  if (namespace) headers["OpenAI-Project"] = namespace;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let answer;
  try {
    answer = await fetch(`page/${path}`, { method, headers, body: body === undefined ? body : JSON.stringify(body) });
  } catch {
    throw new Refusal(0, { message: "The door does not answer." });
  }
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Refusal(answer.status, content.error ?? { message: `The door answers with ${answer.status}.` });
  return content;
}

export const jobPath = (name) => `jobs/${encodeURIComponent(name)}`;
