// Signs the viewer in, shows the view that the address names, and asks again while it is seen.
import { call, session } from "./api.js";
import { h, problem, swap } from "./dom.js";
import { jobs, oneJob } from "./jobs.js";

const SECONDS = 5;
const VIEWS = { jobs, job: oneJob };
const MENU = [["jobs", "Jobs"]];
const main = document.getElementById("main");
let shown = 0;

function signIn(error) {
  const key = h("input", { id: "key", type: "password", autocomplete: "off", required: true, "aria-describedby": "key-hint" });
  const namespace = h("input", { id: "namespace", autocomplete: "off", "aria-describedby": "namespace-hint", value: session.get()?.namespace ?? "" });
  async function enter(event) {
    event.preventDefault();
    session.set({ key: key.value.trim(), namespace: namespace.value.trim() });
    try {
      const { namespace: found } = await call("GET", "jobs");
      session.set({ key: key.value.trim(), namespace: found });
      show();
    } catch (refusal) {
      signIn(refusal);
    }
  }
  session.clear();
  head();
  document.title = "Sign in – QLoRAJob";
  swap(main, h("h1", {}, "Sign in"), error && problem(error), h("form", { onsubmit: enter },
    h("label", { for: "key" }, "Key"), key,
    h("p", { id: "key-hint", class: "hint" }, "A token of the cluster: ",
      h("code", {}, "kubectl create token SERVICEACCOUNT --namespace NAMESPACE --audience qlora-door"),
      ". This tab keeps it until it is closed."),
    h("label", { for: "namespace" }, "Namespace"), namespace,
    h("p", { id: "namespace-hint", class: "hint" }, "That of the service account if empty."),
    h("button", {}, "Sign in")));
  key.focus();
}

function head(current) {
  const found = session.get();
  swap(document.getElementById("pages"), found ? MENU.map(([view, title]) =>
    h("a", { href: `#${view}`, id: `to-${view}`, "aria-current": view === current ? "page" : null }, title)) : []);
  swap(document.getElementById("viewer"), found ? [h("span", {}, `Namespace ${found.namespace} `),
    h("button", { id: "sign-out", onclick: () => { session.clear(); signIn(); } }, "Sign out")] : []);
}

// A view returns its title, and a function that reads and returns its content; `lasts`: whether to ask again.
async function show() {
  const [view, ...parts] = location.hash.slice(1).split("/").map(decodeURIComponent);
  const turn = ++shown;
  if (!session.get()) return signIn();
  const { title, read, lasts = true } = (VIEWS[view] ?? VIEWS.jobs)(...parts);
  const body = h("div", {}, h("p", {}, "Loading …")), heading = h("h1", { tabindex: -1 }, title);
  head(view || "jobs");
  document.title = `${title} – QLoRAJob`;
  swap(main, heading, body);
  heading.focus();
  while (turn === shown) {
    if (!document.hidden) {
      try {
        const content = await read();
        if (turn === shown) swap(body, content);
      } catch (refusal) {
        if (!("status" in refusal)) throw refusal;
        if (turn !== shown) return;
        if (refusal.status === 401) return signIn(refusal);
        swap(body, problem(refusal));
      }
    }
    if (!lasts) return;
    await new Promise((resolve) => setTimeout(resolve, SECONDS * 1000));
  }
}

document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", show);
show();
