"use strict";
// The page's state lives in the address, its numbers come from the server: nothing is computed here.

const GIB = 2 ** 30;
const COLOURS = {
  weights: "#4477aa", kv_cache: "#228833", activations: "#ccbb44", logits: "#aa3377", dequantization: "#66ccee",
  graphs: "#ee7733", non_torch: "#997700", context: "#777777", slack: "#bbbbbb",
};
const DEFAULTS = {
  model: "Qwen2.5-72B", bits: 4, group_size: 128, engine: "qwenq", kv_cache_dtype: "auto", context: 8192,
  batch_size: 1, prefill_chunk: 0, rig: [{ gpu: "RTX 3090", count: 2 }],
};
const $ = (id) => document.getElementById(id);
let offered, state, asking, timer, lastAnswer;

const gib = (bytes) => (bytes / GIB).toFixed(2);
const tokens = (n) => n.toLocaleString("en");

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// The slider has 1,024-token steps; a shared link may hold any context.
const toSlider = (context) => Math.max(0, Math.round(context / 1024) - 1);
const fromSlider = (value) => (Number(value) + 1) * 1024;

function readAddress() {
  const asked = new URLSearchParams(location.search);
  const found = structuredClone(DEFAULTS);
  for (const key of ["bits", "group_size", "context", "batch_size", "prefill_chunk"]) {
    const value = Number(asked.get(key));
    if (asked.has(key) && Number.isSafeInteger(value) && value >= 0) found[key] = value;
  }
  for (const key of ["model", "engine", "kv_cache_dtype"]) if (asked.has(key)) found[key] = asked.get(key).slice(0, 80);
  if (asked.has("rig")) {
    found.rig = asked.get("rig").split("+").flatMap((part) => {
      const match = /^\s*(\d{1,2})x\s*(.{1,60}?)\s*$/.exec(part);
      return match && offered.gpus.some((gpu) => gpu.name === match[2]) ? [{ gpu: match[2], count: Number(match[1]) }] : [];
    }).slice(0, 8);
  }
  return found;
}

function writeAddress() {
  const asked = new URLSearchParams();
  for (const key of Object.keys(DEFAULTS)) if (key !== "rig") asked.set(key, state[key]);
  asked.set("rig", state.rig.map((part) => `${part.count}x ${part.gpu}`).join("+"));
  history.replaceState(null, "", `?${asked}`);
}

function fill(select, values, chosen) {
  select.replaceChildren(...values.map(([value, text]) => element("option", text, { value })));
  select.value = String(chosen);
  if (select.value !== String(chosen)) select.selectedIndex = 0;
  return select.value;
}

function showControls() {
  state.model = fill($("model"), offered.models.map((model) => [model.name, model.name]), state.model);
  const limit = offered.models.find((model) => model.name === state.model).context_limit;
  state.engine = fill($("engine"), offered.engines.map((name) => [name, name]), state.engine);
  const kinds = offered.kv_cache_dtypes[state.engine];
  state.kv_cache_dtype = fill($("kv_cache_dtype"), kinds.map((kind) => [kind, kind]), state.kv_cache_dtype);
  state.context = Math.min(Math.max(1, state.context), limit);
  state.batch_size = Math.min(Math.max(1, state.batch_size), 64);
  for (const key of ["bits", "group_size", "prefill_chunk"]) {
    $(key).value = String(state[key]);
    if ($(key).value !== String(state[key])) { $(key).selectedIndex = 0; state[key] = Number($(key).value); }
  }
  $("group_size").disabled = state.bits === 16 || offered.gguf_engines.includes(state.engine);
  $("context").max = limit / 1024 - 1;
  $("context").value = toSlider(state.context);
  $("context").setAttribute("aria-valuetext", `${tokens(state.context)} tokens`);
  $("context_text").textContent = `${tokens(state.context)} tokens`;
  $("batch_size").value = state.batch_size;
  $("batch_text").textContent = state.batch_size;
  $("rig").replaceChildren(...state.rig.map(rigRow));
  const gpus = state.rig.reduce((sum, part) => sum + part.count, 0);
  $("add").disabled = state.rig.length >= 8 || gpus >= offered.max_gpus;
}

function rigRow(part, index) {
  const row = element("li");
  const count = element("input", undefined, { type: "number", min: 1, max: offered.max_gpus, "aria-label": `Number of ${part.gpu}` });
  count.value = part.count;
  count.addEventListener("change", () => {
    const others = state.rig.reduce((sum, other, i) => sum + (i === index ? 0 : other.count), 0);
    part.count = Math.min(Math.max(1, Math.round(Number(count.value)) || 1), offered.max_gpus - others);
    changed();
  });
  const kind = element("select", undefined, { "aria-label": `GPU ${index + 1}` });
  fill(kind, offered.gpus.map((gpu) => [gpu.name, gpu.name]), part.gpu);
  kind.addEventListener("change", () => { part.gpu = kind.value; changed(); });
  const remove = element("button", "×", { type: "button", "aria-label": `Remove ${part.gpu}` });
  remove.addEventListener("click", () => { state.rig.splice(index, 1); changed(); $("add").focus(); });
  row.append(count, kind, remove);
  return row;
}

function changed() {
  const focused = document.activeElement;
  const place = focused?.closest?.("#rig li");
  const row = place ? [...$("rig").children].indexOf(place) : -1;
  const column = place ? [...place.children].indexOf(focused) : -1;
  showControls();
  if (row >= 0) $("rig").children[row]?.children[column]?.focus();
  writeAddress();
  clearTimeout(timer);
  timer = setTimeout(ask, 120);
}

async function post(path, signal) {
  const response = await fetch(path, {
    method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(state),
  });
  const body = await response.json();
  if (!response.ok) throw new Error(body.hint ? `${body.error}. ${body.hint}` : body.error);
  return body;
}

async function ask() {
  asking?.abort();
  asking = new AbortController();
  const { signal } = asking;
  $("answer").classList.add("old");
  document.body.dataset.state = "asking";
  delete document.body.dataset.rigs;
  try {
    lastAnswer = await post("api/estimate", signal);
    showAnswer(lastAnswer);
    showError("");
    document.body.dataset.state = "answered";
    showRecommended(await post("api/recommend", signal));
    document.body.dataset.rigs = "listed";
  } catch (problem) {
    if (problem.name === "AbortError") return;
    showError(problem instanceof TypeError ? "The server does not answer; is `qwenq vram serve` still running?" : problem.message);
    document.body.dataset.state = "failed";
  }
}

function showError(text) {
  $("error").hidden = !text;
  $("error").textContent = text;
  if (!text) $("answer").classList.remove("old");
}

function showAnswer(answer) {
  const now = answer.now;
  $("total").textContent = `${gib(now.total_bytes)} GiB`;
  $("range").textContent = `${gib(now.low_bytes)} to ${gib(now.high_bytes)} GiB${now.gpus.length > 1 ? `, over ${now.gpus.length} GPUs` : ""}`;
  const card = $("fit_card");
  card.className = "card";
  if (answer.rig === null) {
    $("fits").textContent = "no rig";
    $("room").textContent = "Add GPUs to see whether it fits.";
    $("largest").textContent = "–";
    $("largest_note").textContent = `the model allows ${tokens(answer.context_limit)}`;
  } else {
    const rooms = now.gpus.map((gpu) => gpu.limit_bytes - gpu.total_bytes);
    const least = rooms.indexOf(Math.min(...rooms));
    card.classList.add(now.certainty === "tight" ? "tight" : now.fits ? "yes" : "no");
    $("fits").textContent = now.fits ? (now.certainty === "tight" ? "fits, tightly" : "fits") : "does not fit";
    $("room").textContent = `GPU ${least} (${now.gpus[least].gpu}): ${gib(Math.abs(rooms[least]))} GiB ${rooms[least] < 0 ? "too much" : "free"}`;
    $("largest").textContent = answer.largest_context ? tokens(answer.largest_context) : "none";
    $("largest_note").textContent = `tokens that fit; the model allows ${tokens(answer.context_limit)} here`;
  }
  $("notes").replaceChildren(...answer.notes.map((note) => element("li", note)));
  $("command").textContent = answer.command;
  showTable(now);
  showCharts(answer);
}

function showTable(now) {
  const names = Object.keys(offered.terms).filter((name) => now.gpus.some((gpu) => gpu.terms.some((t) => t.name === name)));
  const head = element("tr");
  head.append(element("th", "Term", { scope: "col" }));
  now.gpus.forEach((gpu, index) => head.append(element("th", `${index} ${gpu.gpu}`, { scope: "col" })));
  head.append(element("th", "Rests on", { scope: "col" }));
  const rows = names.map((name) => {
    const row = element("tr");
    row.append(element("th", offered.terms[name], { scope: "row" }));
    let source = "";
    for (const gpu of now.gpus) {
      const terms = gpu.terms.filter((term) => term.name === name);
      row.append(element("td", terms.length ? gib(terms.reduce((sum, term) => sum + term.bytes, 0)) : "–", { class: "number" }));
      if (!source && terms.length) source = `${terms[0].provenance}: ${terms[0].source}`;
    }
    row.append(element("td", source, { class: "source" }));
    return row;
  });
  const sum = (label, pick) => {
    const row = element("tr");
    row.append(element("th", label, { scope: "row" }));
    for (const gpu of now.gpus) row.append(element("td", pick(gpu), { class: "number" }));
    row.append(element("td", ""));
    return row;
  };
  rows.push(sum("total", (gpu) => gib(gpu.total_bytes)));
  if (now.gpus[0].limit_bytes !== null) rows.push(sum("limit", (gpu) => gib(gpu.limit_bytes)));
  $("table").tHead.replaceChildren(head);
  $("table").tBodies[0].replaceChildren(...rows);
}

// One chart for each kind of GPU, of the fullest card of that kind at each context.
function showCharts(answer) {
  const kinds = [...new Set(answer.now.gpus.filter((gpu) => gpu.terms.length).map((gpu) => gpu.gpu))];
  const holder = $("charts");
  while (holder.children.length > kinds.length) { Plotly.purge(holder.lastChild); holder.lastChild.remove(); }
  while (holder.children.length < kinds.length) holder.append(element("div", undefined, { class: "chart", role: "img" }));
  const style = getComputedStyle(document.documentElement);
  const [ink, line, panel, bad, accent] = ["--ink", "--line", "--panel", "--bad", "--accent"].map((name) => style.getPropertyValue(name).trim());
  kinds.forEach((kind, index) => {
    const points = answer.chart.map((point) => ({
      context: point.context,
      gpu: point.gpus.filter((gpu) => gpu.gpu === kind).reduce((a, b) => (b.total_bytes > a.total_bytes ? b : a)),
    }));
    const names = Object.keys(offered.terms).filter((name) => points.some((point) => point.gpu.terms[name]));
    const x = points.map((point) => point.context);
    const traces = names.map((name) => ({
      x, y: points.map((point) => (point.gpu.terms[name] ?? 0) / GIB), name: offered.terms[name], stackgroup: "memory",
      mode: "none", fillcolor: COLOURS[name], hovertemplate: "%{y:.2f} GiB",
    }));
    const limit = points[0].gpu.limit_bytes;
    const top = Math.max(...points.map((point) => point.gpu.total_bytes), limit ?? 0) / GIB * 1.08;
    const count = answer.now.gpus.filter((gpu) => gpu.gpu === kind).length;
    const title = count > 1 ? `${kind}, the fullest of ${count}` : kind;
    const shapes = [{ type: "line", x0: state.context, x1: state.context, yref: "paper", y0: 0, y1: 1, line: { color: accent, width: 2 } }];
    const annotations = [];
    if (limit !== null) {
      shapes.push({ type: "line", xref: "paper", x0: 0, x1: 1, y0: limit / GIB, y1: limit / GIB, line: { color: bad, width: 2, dash: "dash" } });
      annotations.push({ xref: "paper", x: 0.01, xanchor: "left", y: limit / GIB, yanchor: "bottom", text: `limit ${gib(limit)} GiB`, showarrow: false, font: { color: bad }, bgcolor: panel });
    }
    const ticks = [1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072].filter((tick) => tick <= x[x.length - 1]);
    const narrow = holder.clientWidth < 520;
    Plotly.react(holder.children[index], traces, {
      title: { text: title, font: { size: 15 }, x: 0.02, xanchor: "left" }, height: narrow ? 400 : 352, hovermode: "x unified", shapes, annotations,
      margin: { l: 52, r: 16, t: 44, b: narrow ? 130 : 60 }, paper_bgcolor: panel, plot_bgcolor: panel, font: { color: ink },
      xaxis: { type: "log", title: { text: "context, tokens" }, tickvals: ticks, ticktext: ticks.map((tick) => `${tick / 1024}k`), gridcolor: line },
      yaxis: { title: { text: "GiB" }, range: [0, top], gridcolor: line },
      legend: narrow ? { orientation: "h", y: -0.32 } : {}, hoverlabel: { bgcolor: panel, font: { color: ink } },
    }, { displayModeBar: false, responsive: true });
    const here = points.find((point) => point.context === state.context)?.gpu;
    holder.children[index].setAttribute("aria-label",
      `${title}: ${gib(points[0].gpu.total_bytes)} GiB at ${tokens(x[0])} tokens, ${gib(points[points.length - 1].gpu.total_bytes)} GiB at ${tokens(x[x.length - 1])}` +
      (here ? `, ${gib(here.total_bytes)} GiB at the chosen ${tokens(state.context)}` : "") + (limit === null ? "" : `; limit ${gib(limit)} GiB`));
  });
}

function showRecommended(rigs) {
  const rows = rigs.map((rig) => {
    const row = element("tr");
    const price = rig.price_usd === null ? "price unknown" : `$${rig.price_usd.toLocaleString("en")} (${rig.price_basis})`;
    const use = element("button", "Use", { type: "button", "aria-label": `Use ${rig.count} ${rig.gpu}` });
    use.addEventListener("click", () => { state.rig = [{ gpu: rig.gpu, count: rig.count }]; changed(); $("results").focus(); });
    const cell = element("td");
    cell.append(use);
    row.append(element("td", `${rig.count}x ${rig.gpu}`), element("td", price), element("td", tokens(rig.largest_context), { class: "number" }), element("td", rig.how), cell);
    return row;
  });
  if (!rows.length) {
    const row = element("tr");
    row.append(element("td", "none of up to 8 equal cards", { colspan: 5 }));
    rows.push(row);
  }
  $("recommended").tBodies[0].replaceChildren(...rows);
}

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  if (lastAnswer) showCharts(lastAnswer);
}

async function start() {
  offered = await (await fetch("api/choices")).json();
  state = readAddress();
  showControls();
  for (const key of ["model", "engine", "kv_cache_dtype"]) $(key).addEventListener("change", () => { state[key] = $(key).value; changed(); });
  for (const key of ["bits", "group_size", "prefill_chunk"]) $(key).addEventListener("change", () => { state[key] = Number($(key).value); changed(); });
  $("batch_size").addEventListener("input", () => { state.batch_size = Number($("batch_size").value); changed(); });
  $("context").addEventListener("input", () => { state.context = fromSlider($("context").value); changed(); });
  $("add").addEventListener("click", () => { state.rig.push({ gpu: state.rig.at(-1)?.gpu ?? "RTX 3090", count: 1 }); changed(); });
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("theme").addEventListener("change", () => setTheme($("theme").value));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTheme($("theme").value));
  $("share").addEventListener("click", async () => {
    writeAddress();
    try {
      await navigator.clipboard.writeText(location.href);
      $("status").textContent = "Link copied";
      $("share").textContent = "Link copied";
    } catch {
      $("share").textContent = "The address bar holds the link";
    }
    setTimeout(() => { $("share").textContent = "Copy link"; }, 2000);
  });
  ask();
}

start().catch(() => showError("The server does not answer; is `qwenq vram serve` still running?"));
