// Fetches the status of the run and shows it. The token stays in this tab: in sessionStorage, never in an address.

import { Chart, HeatMap, make } from "./charts.js";

const POLL_MS = 2000, FINISHED_POLL_MS = 10000, FIRST_CLIENTS = 25, FIRST_INCIDENTS = 5;
const ORDER = ["training", "done", "waiting", "finished", "lost", "left"];
const STALE_PHASES = ["", "waiting", "train", "upload"];
const $ = (id) => document.getElementById(id);

// --- the token --------------------------------------------------------------------------------------------------

const KEY = "edgefed-token";
if (location.hash.startsWith("#token=")) {
  sessionStorage.setItem(KEY, decodeURIComponent(location.hash.slice("#token=".length)));
  history.replaceState(null, "", location.pathname);
}

class Refused extends Error {}

async function load(path) {
  const token = sessionStorage.getItem(KEY);
  const headers = token ? { authorization: `Bearer ${token}` } : {};
  const response = await fetch(path, { headers, cache: "no-store" });
  if (response.status === 401 || response.status === 429) {
    throw new Refused(!token ? "" : response.status === 401 ? "This is not the token of the run." : "Too many wrong tokens. Try again in a minute.");
  }
  if (!response.ok) throw new Error(`status ${response.status}`);
  return response.json();
}

$("door").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, $("token").value.trim());
  $("token").value = "";
  poll();
});

// --- the loop ---------------------------------------------------------------------------------------------------

let timer = 0, heard = 0, coverage = null, status = null;

async function poll() {
  clearTimeout(timer);
  let wait = POLL_MS;
  try {
    status = await load("v1/status");
    const rounds = status.history.length ? status.history.at(-1).server_round : 0;
    if (!coverage || coverage.server_round < rounds) coverage = await load("v1/coverage");
    heard = Date.now();
    $("door").hidden = true;
    $("run").hidden = false;
    render();
    if (status.state === "finished") wait = FINISHED_POLL_MS;
  } catch (error) {
    if (error instanceof Refused) {
      sessionStorage.removeItem(KEY);
      $("run").hidden = true;
      $("door").hidden = false;
      $("refusal").textContent = error.message;
      $("token").focus();
      return;
    }
    console.debug(error);
  }
  const silent = Date.now() - heard > 3 * POLL_MS;
  document.body.classList.toggle("stale", silent && heard > 0);
  $("silence").hidden = !silent;
  if (silent) {
    $("run").hidden = false;
    const since = heard ? ` since ${new Date(heard).toLocaleTimeString()}` : "";
    $("silence").textContent = `The server has not answered${since}. This page tries again.`;
  }
  if (!document.hidden) timer = setTimeout(poll, wait);
}
document.addEventListener("visibilitychange", () => { if (!document.hidden && $("door").hidden) poll(); });

// --- words ------------------------------------------------------------------------------------------------------

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (value >= 1024 && at < units.length - 1) { value /= 1024; at += 1; }
  return `${at === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${units[at]}`;
}

function seconds(value) {
  if (value === 0) return "0 s";
  if (value < 120) return `${value < 10 ? value.toFixed(1) : Math.round(value)} s`;
  return value < 7200 ? `${(value / 60).toFixed(1)} min` : `${(value / 3600).toFixed(1)} h`;
}

const loss = (value) => value.toFixed(value < 10 ? 3 : 1);
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const count = (number, noun) => `${number} ${noun}${number === 1 ? "" : "s"}`;

// --- the parts of the page --------------------------------------------------------------------------------------

function render() {
  const { run, history, clients } = status;
  const personal = run.method === "fedmoe";
  document.title = `${run.method} on ${run.model}`;
  $("title").textContent = document.title;
  const present = clients.filter(({ state }) => state !== "left" && state !== "lost").length;
  $("facts").textContent = [
    `round ${status.server_round} of ${run.rounds}`, `${present} of ${count(clients.length, "client")} present`,
    `needs ${status.min_clients}`, ...(status.quorum ? [`closes with ${count(status.quorum, "update")}`] : []),
  ].join(" · ");
  $("state").replaceChildren(make("i", { class: `dot ${status.state}` }), status.state);
  const done = status.state === "finished" ? run.rounds : status.server_round - 1;
  $("progress").firstElementChild.style.width = `${(100 * done) / run.rounds}%`;
  for (const [name, value] of [["valuemin", 0], ["valuemax", run.rounds], ["valuenow", done]]) $("progress").setAttribute(`aria-${name}`, value);
  $("now").textContent = now();
  renderRounds(history, personal);
  renderClients(clients, personal);
  renderExperts();
  $("foot").textContent = `run ${run.run_id} · seed ${run.seed} · largest memory of the server ${bytes(status.memory_peak_bytes)}`;
}

function now() {
  const received = count(status.updates_received, "update");
  const deadline = status.deadline_s === null ? "" : `, closes in ${seconds(status.deadline_s)} at the latest`;
  return {
    waiting: `Waits for ${count(status.min_clients, "client")}.`,
    training: `Round ${status.server_round}: ${received} received${deadline}.`,
    aggregating: `Round ${status.server_round}: aggregating ${received}.`,
    finished: "The run is finished.",
  }[status.state] ?? "";
}

const charts = [];
let drawn = "";

function renderRounds(history, personal) {
  $("no-rounds").hidden = history.length > 0;
  const key = JSON.stringify([history.length, history.at(-1)?.server_round, personal]);
  if (key === drawn || !history.length) return;
  drawn = key;
  const metric = (name) => history.map(({ metrics }) => metrics[name] ?? null);
  const specs = [
    { title: "Train loss", format: loss, series: [{ name: "train", values: metric("train_loss") }] },
    { title: "Held-out loss", format: loss, series: [
      { name: "global model", values: metric("held_out_loss_before") },
      { name: "after local training", values: metric("held_out_loss_after") },
    ] },
    personal
      ? { title: "Held-out accuracy", format: percent, series: [
          { name: "before", values: metric("held_out_accuracy_before") },
          { name: "after local training", values: metric("held_out_accuracy_after") },
        ] }
      : { title: "Updates", bars: true, format: String, series: [{ values: history.map(({ updates }) => updates) }] },
    { title: "Time of a round", bars: true, format: seconds, series: [{ values: history.map((done) => done.seconds) }] },
    { title: "Received from clients", bars: true, format: bytes, series: [{ values: history.map((done) => done.uploaded_bytes) }] },
    { title: "Sent to clients", bars: true, format: bytes, series: [{ values: history.map((done) => done.downloaded_bytes ?? 0) }] },
  ];
  const known = (name) => history.some(({ metrics }) => metrics[name] !== undefined);
  const share = (part, whole) => history.map(({ metrics }) => (metrics[whole] ? (metrics[part] ?? 0) / metrics[whole] : null));
  if (known("upload_ratio")) {
    specs.push({ title: "Bytes of whole updates per byte received", format: (value) => `${value.toFixed(1)}×`, series: [{ values: metric("upload_ratio") }] });
  }
  if (known("residual_norm") || known("model_residual_norm")) {
    specs.push({ title: "Left for later rounds (share of the L2 norm)", format: percent, series: [
      { name: "updates", values: share("residual_norm", "change_norm") },
      { name: "model", values: share("model_residual_norm", "model_step_norm") },
    ] });
  }
  while (charts.length < specs.length) {
    charts.push(new Chart((at) => charts.forEach((chart) => chart.hover(at))));
    $("charts").append(charts.at(-1).element);
  }
  const rounds = history.map(({ server_round }) => server_round);
  charts.forEach((chart, at) => chart.show(specs[at], rounds));
  const incidents = history.flatMap((done) => [
    ...(done.metrics.restored_round === undefined ? [] : [`Round ${done.server_round}: the held-out loss no longer improved, the run ended with the model of round ${done.metrics.restored_round}.`]),
    ...(done.undone === null ? [] : [`Round ${done.server_round}: the held-out loss jumped, ${done.undone < done.server_round - 1 ? `rounds ${done.undone} to ${done.server_round - 1} were` : `round ${done.undone} was`} undone.`]),
    ...(done.damaged?.length ? [`Round ${done.server_round}: ${count(done.damaged.length, "part")} of the model stayed as before, because the disk of the server had damaged ${done.damaged.length === 1 ? "it" : "them"}.`] : []),
    ...done.set_aside.map(({ name, reason }) => `Round ${done.server_round}: the update of ${name} was set aside: ${reason}`),
  ]);
  const shown = firstOf(incidents.reverse(), "incidents", FIRST_INCIDENTS);
  $("incidents").replaceChildren(...shown.map((text) => make("li", {}, text)));
}

// Long lists show their first entries, and all of them once the button below is pressed. What few people look at would
// otherwise cost every refresh the time to lay it out.

const whole = new Set();

function firstOf(items, list, most) {
  const button = $(`more-${list}`);
  button.hidden = items.length <= most;
  button.textContent = whole.has(list) ? `Show ${most} ${list} only` : `Show all ${items.length} ${list}`;
  button.setAttribute("aria-expanded", whole.has(list));
  button.setAttribute("aria-controls", list);
  return whole.has(list) ? items : items.slice(0, most);
}

for (const list of ["clients", "incidents"]) {
  $(`more-${list}`).addEventListener("click", () => {
    if (!whole.delete(list)) whole.add(list);
    drawn = "";
    render();
  });
}

function renderClients(clients, personal) {
  $("no-clients").hidden = clients.length > 0;
  $("clients").hidden = !clients.length;
  const columns = ["Client", "State", "Memory", personal ? "Accuracy" : "Experts", "Held-out loss", "Rounds", "Received", "Sent", "Seen"];
  const numbers = new Set(["Memory", "Accuracy", "Experts", "Held-out loss", "Rounds", "Received", "Sent", "Seen"]);
  const style = (name) => (numbers.has(name) ? { class: "number" } : {});
  $("clients").tHead.replaceChildren(make("tr", {}, ...columns.map((name) => make("th", { scope: "col", ...style(name) }, name))));
  const rank = ({ state }) => (ORDER.includes(state) ? ORDER.indexOf(state) : ORDER.length);
  const shown = [...clients].sort((a, b) => rank(a) - rank(b) || a.name.localeCompare(b.name) || (a.client_id < b.client_id ? -1 : 1));
  const rows = firstOf(shown, "clients", FIRST_CLIENTS).map((client) => {
    const cells = clientCells(client, personal);
    return make("tr", {}, ...columns.map((name, at) => make("td", { "data-label": name, ...style(name) }, ...cells[at])));
  });
  $("clients").tBodies[0].replaceChildren(...rows);
}

const small = (text) => make("small", {}, text);

function meter(share) {
  const bar = make("i");
  bar.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
  return make("span", { class: "meter" }, bar);
}

function clientCells(client, personal) {
  const { metrics, device } = client, rounds = Math.max(status.history.length, client.rounds_done);
  const doing = client.state === "training" || (["done", "waiting", "finished"].includes(client.state) && !STALE_PHASES.includes(client.phase));
  const before = metrics.held_out_loss_before, after = metrics.held_out_loss_after;
  const accuracy = metrics.held_out_accuracy_after;
  const budget = device?.ideal_budget_bytes ? [small(`${bytes(device.ideal_budget_bytes)} if idle`)] : [];
  return [
    [make("span", { class: "name" }, client.name), small([client.client_id.slice(0, 8), device?.name, device?.trains_on].filter(Boolean).join(" · "))],
    [make("span", { class: "state-cell" }, make("i", { class: `dot ${client.state}` }), client.state), ...(doing ? [small(client.phase || "starting"), meter(client.fraction)] : [])],
    [bytes(client.memory_bytes), ...budget],
    personal ? [accuracy === undefined ? "–" : percent(accuracy)] : expertCell(client),
    [after === undefined ? "–" : loss(after), ...(before === undefined ? [] : [small(`from ${loss(before)}`)])],
    [`${client.rounds_done} of ${rounds}`, ...(rounds ? [meter(client.rounds_done / rounds)] : [])],
    [bytes(client.uploaded_bytes)],
    [bytes(client.downloaded_bytes)],
    [`${seconds(client.last_seen_s)} ago`],
  ];
}

function expertCell(client) {
  const held = coverage.clients[client.client_id];
  if (!held) return [`${Math.round(100 * client.expert_share)} %`, small("of its first plan")];
  const total = coverage.experts_per_layer.reduce((sum, size) => sum + size, 0);
  const resident = held.resident.flat().length, trained = held.trained.flat().filter(Boolean).length;
  return [`${resident} of ${total}`, small(`${trained} trained`)];
}

// --- the heat map -----------------------------------------------------------------------------------------------

const map = new HeatMap($("map"), $("cell"));
for (const id of ["map-client", "map-kind"]) $(id).addEventListener("change", renderExperts);

function options(select, pairs) {
  const before = select.value, key = JSON.stringify(pairs);
  if (select.dataset.key === key) return;
  select.dataset.key = key;
  select.replaceChildren(...pairs.map(([value, text]) => make("option", { value }, text)));
  if (pairs.some(([value]) => value === before)) select.value = before;
}

function renderExperts() {
  const { experts_per_layer: sizes, server_round: last } = coverage;
  $("experts").hidden = !sizes.length || !last;
  if ($("experts").hidden) return;
  const names = Object.fromEntries(status.clients.map(({ client_id, name }) => [client_id, name]));
  const known = Object.keys(coverage.clients).filter((id) => id in names).sort((a, b) => names[a].localeCompare(names[b]));
  options($("map-client"), [["", "all clients"], ...known.map((id) => [id, `${names[id]} (${id.slice(0, 8)})`])]);
  const client = $("map-client").value, sliced = coverage.neurons.flat().some((share) => share > 0 && share < 1);
  options($("map-kind"), client ? [["held", "what it holds"]] : [
    ["updates", "updates of the last round"], ["idle", "rounds since it was trained"],
    ...(sliced ? [["neurons", "share of neurons trained"]] : []),
  ]);
  const view = client ? clientView(coverage.clients[client], sizes) : { updates: updatesView, idle: idleView, neurons: neuronsView }[$("map-kind").value](last);
  $("legend-low").textContent = view.low;
  $("legend-high").textContent = view.high;
  map.show(view.shades, view.texts, `${view.summary} Layers are rows, experts are columns.`);
  $("map-summary").textContent = view.summary;
}

const each = (table, change) => table.map((row, layer) => row.map((value, expert) => change(value, layer, expert)));

function updatesView(last) {
  const most = Math.max(1, ...coverage.updates.flat()), total = coverage.updates.flat().length;
  const trained = coverage.updates.flat().filter(Boolean).length;
  return {
    shades: each(coverage.updates, (value) => value / most), texts: each(coverage.updates, (value) => count(value, "update")),
    low: "1 update", high: count(most, "update"), summary: `Round ${last} trained ${trained} of ${count(total, "expert")}.`,
  };
}

function idleView(last) {
  const idle = each(coverage.trained_in, (round) => (round ? last - round : null));
  const most = Math.max(1, ...idle.flat().filter((value) => value !== null)), never = idle.flat().filter((value) => value === null).length;
  return {
    shades: each(idle, (value) => (value === null ? 0 : 1 - value / (most + 1))),
    texts: each(idle, (value) => (value === null ? "never trained" : value ? `trained ${count(value, "round")} ago` : "trained in the last round")),
    low: `${count(most, "round")} ago`, high: "last round",
    summary: never ? `${count(never, "expert")} ${never === 1 ? "has" : "have"} never been trained.` : "Every expert has been trained.",
  };
}

function neuronsView(last) {
  const all = coverage.neurons.flat(), mean = all.reduce((sum, share) => sum + share, 0) / Math.max(1, all.length);
  return {
    shades: coverage.neurons, texts: each(coverage.neurons, (share) => `${percent(share)} of its neurons`),
    low: "few neurons", high: "all", summary: `Round ${last} trained ${percent(mean)} of all neurons of experts.`,
  };
}

function clientView(held, sizes) {
  const shades = sizes.map((size) => Array(size).fill(0)), texts = sizes.map((size) => Array(size).fill("not on this device"));
  held.resident.forEach((experts, layer) => experts.forEach((expert, at) => {
    const share = held.trained[layer][at];
    shades[layer][expert] = share ? 0.4 + 0.6 * share : 0.1;
    texts[layer][expert] = share === 1 ? "trained" : share ? `${percent(share)} of its neurons trained` : "held, not trained";
  }));
  const resident = held.resident.flat().length, trained = held.trained.flat().filter(Boolean).length;
  return { shades, texts, low: "held", high: "trained", summary: `In round ${held.server_round} it held ${count(resident, "expert")} and trained ${trained} of them.` };
}

poll();
