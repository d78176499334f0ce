"use strict";
// The page's state lives in the address, its numbers come from the server: nothing is computed here.

const GIB = 2 ** 30;
const COLOURS = {
  weights: "#4477aa", kv_cache: "#228833", activations: "#ccbb44", logits: "#aa3377", dequantization: "#66ccee",
  graphs: "#ee7733", non_torch: "#997700", context: "#777777", slack: "#bbbbbb",
};
const DEFAULTS = {
  model: "Qwen2.5-72B", bits: 4, group_size: 128, format: "", engine: "qwenq", kv_cache_dtype: "auto", context: 8192,
  batch_size: 1, prefill_chunk: 0, tensor_parallel_size: 0, max_num_seqs: 0, gpu_memory_utilization: 0,
  enforce_eager: false, reserve_gib: 0, ram_gb: 0, rig: [{ gpu: "RTX 3090", count: 2 }],
};
const NUMBERS = {  // whole ones but for two: least, most
  bits: [4, 16], group_size: [32, 128], context: [1, 131072], batch_size: [1, 256], prefill_chunk: [0, 131072],
  tensor_parallel_size: [0, 16], max_num_seqs: [0, 65536], gpu_memory_utilization: [0, 1], reserve_gib: [0, 1024], ram_gb: [0, 65536],
};
const FRACTIONS = ["gpu_memory_utilization", "reserve_gib"];
const RIGS_SHOWN = 12;
const $ = (id) => document.getElementById(id);
let offered, state, asking, timer, lastAnswer, lastRigs, allRigs = false;

const gib = (bytes) => (bytes / GIB).toFixed(2);
const tokens = (n) => n.toLocaleString("en");

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// The slider has eight steps an octave from 1,024 tokens on, in whole multiples of 128; a link may hold any context.
const toSlider = (context) => Math.max(0, Math.round(8 * Math.log2(context / 1024)));
const fromSlider = (value, limit) => Math.min(limit, Math.round((1024 * 2 ** (Number(value) / 8)) / 128) * 128);
const limitOf = (name) => offered.models.find((model) => model.name === name)?.context_limit;

// The state that an address holds, and a line for everything in it that was not understood.
function readAddress() {
  const asked = new URLSearchParams(location.search);
  const found = structuredClone(DEFAULTS);
  const notes = [];
  const refuse = (key, said, instead) => notes.push(`This link says ${key} “${said.slice(0, 60)}”, which is not understood: ${instead} instead.`);
  for (const [key, [least, most]] of Object.entries(NUMBERS)) {
    if (!asked.has(key)) continue;
    const value = Number(asked.get(key));
    const whole = FRACTIONS.includes(key) || Number.isSafeInteger(value);
    const offeredHere = $(key)?.tagName !== "SELECT" || [...$(key).options].some((option) => Number(option.value) === value);
    if (asked.get(key).trim() && whole && value >= least && value <= most && offeredHere) found[key] = value;
    else refuse(key, asked.get(key), found[key]);
  }
  if (asked.has("enforce_eager")) found.enforce_eager = asked.get("enforce_eager") === "true";
  const lists = { model: offered.models.map((model) => model.name), engine: offered.engines };
  for (const [key, known] of Object.entries(lists)) {
    if (!asked.has(key)) continue;
    if (known.includes(asked.get(key))) found[key] = asked.get(key);
    else refuse(key, asked.get(key), found[key]);
  }
  const dependent = { kv_cache_dtype: offered.kv_cache_dtypes[found.engine], format: formatsOf(found.engine).map(([value]) => value) };
  for (const [key, known] of Object.entries(dependent)) {
    if (!asked.has(key)) continue;
    if (known.includes(asked.get(key))) found[key] = asked.get(key);
    else refuse(key, asked.get(key), found[key] || "the bits");
  }
  if (found.context > limitOf(found.model)) {
    notes.push(`This link asks for ${tokens(found.context)} tokens, ${found.model} allows ${tokens(limitOf(found.model))}.`);
    found.context = limitOf(found.model);
  }
  if (asked.has("rig")) {
    found.rig = [];
    let left = offered.max_gpus;
    for (const part of asked.get("rig").split("+").filter((text) => text.trim())) {
      const match = /^\s*(\d{1,2})x\s*(.{1,60}?)\s*$/.exec(part);
      const count = match ? Number(match[1]) : 0;
      if (match && count >= 1 && count <= left && found.rig.length < 8 && offered.gpus.some((gpu) => gpu.name === match[2])) {
        found.rig.push({ gpu: match[2], count });
        left -= count;
      } else refuse("GPUs", part.trim(), "they are left out");
    }
  }
  for (const key of asked.keys()) if (!(key in DEFAULTS)) notes.push(`This link says “${key.slice(0, 40)}”, which this page does not know.`);
  $("link_notes").replaceChildren(...notes.map((note) => element("li", note)));
  return found;
}

function writeAddress() {
  const asked = new URLSearchParams();
  for (const [key, value] of Object.entries(DEFAULTS)) {
    if (key !== "rig" && (state[key] !== value || ["model", "context"].includes(key))) asked.set(key, state[key]);
  }
  asked.set("rig", state.rig.map((part) => `${part.count}x ${part.gpu}`).join("+"));
  history.replaceState(null, "", `?${asked}`);
}

function fill(select, values, chosen) {
  select.replaceChildren(...values.map(([value, text]) => element("option", text, { value })));
  select.value = String(chosen);
  if (select.value !== String(chosen)) select.selectedIndex = 0;
  return select.value;
}

function formatsOf(engine) {
  if (offered.gguf_engines.includes(engine)) return [["", "by the bits"], ...offered.gguf_types.map((name) => [name, `GGUF ${name}`])];
  return [["", "by the bits (GPTQ)"], ...Object.keys(offered.formats).map((name) => [name, name])];
}

function showControls() {
  state.model = fill($("model"), offered.models.map((model) => [model.name, model.name]), state.model);
  const limit = limitOf(state.model);
  state.engine = fill($("engine"), offered.engines.map((name) => [name, name]), state.engine);
  const kinds = offered.kv_cache_dtypes[state.engine];
  state.kv_cache_dtype = fill($("kv_cache_dtype"), kinds.map((kind) => [kind, kind]), state.kv_cache_dtype);
  state.format = fill($("format"), formatsOf(state.engine), state.format);
  const gguf = offered.gguf_engines.includes(state.engine);
  const server = offered.server_engines.includes(state.engine);
  const bits = state.format && !gguf ? offered.formats[state.format] : [];
  const fixed = state.format && !bits.length;
  if (bits.length && !bits.includes(state.bits)) state.bits = bits[0];
  state.context = Math.min(Math.max(1, state.context), limit);
  state.batch_size = Math.min(Math.max(1, state.batch_size), 64);
  if (!server) Object.assign(state, { tensor_parallel_size: 0, max_num_seqs: 0, gpu_memory_utilization: 0, enforce_eager: false });
  for (const key of ["bits", "group_size", "prefill_chunk", "tensor_parallel_size"]) $(key).value = String(state[key]);
  $("bits").disabled = Boolean(fixed) || bits.length === 1;
  $("group_size").disabled = state.bits === 16 || gguf || Boolean(fixed);
  for (const key of ["tensor_parallel_size", "max_num_seqs", "gpu_memory_utilization", "enforce_eager"]) $(key).disabled = !server;
  for (const key of ["reserve_gib", "ram_gb", "max_num_seqs"]) $(key).value = state[key] || "";
  $("gpu_memory_utilization").value = state.gpu_memory_utilization ? Math.round(state.gpu_memory_utilization * 100) : "";
  $("enforce_eager").checked = state.enforce_eager;
  $("context").max = toSlider(limit);
  $("context").value = toSlider(state.context);
  $("context").setAttribute("aria-valuetext", `${tokens(state.context)} tokens`);
  $("context_text").textContent = `${tokens(state.context)} tokens`;
  $("context_exact").max = limit;
  $("context_exact").value = state.context;
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
  timer = setTimeout(ask, 100);
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
    const { plan } = await post("api/plan", signal);
    showPlan(plan, lastAnswer);
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
  card.className = "";
  if (answer.rig === null) {
    $("fits").textContent = "no rig";
    $("room").textContent = "add GPUs to see";
    $("largest").textContent = "–";
    $("largest_note").textContent = `the model allows ${tokens(answer.context_limit)}`;
  } else if (!answer.runs) {
    card.classList.add("no");
    $("fits").textContent = "does not run";
    $("room").textContent = answer.notes[0] ?? "";
    $("largest").textContent = "–";
    $("largest_note").textContent = "";
  } else {
    const rooms = now.gpus.map((gpu) => gpu.limit_bytes - gpu.total_bytes);
    const least = rooms.indexOf(Math.min(...rooms));
    card.classList.add(now.certainty === "tight" ? "tight" : now.fits ? "yes" : "no");
    $("fits").textContent = now.fits ? (now.certainty === "tight" ? "fits, tightly" : "fits") : "does not fit";
    $("room").textContent = `${gib(Math.abs(rooms[least]))} GiB ${rooms[least] < 0 ? "too much" : "free"} on GPU ${least}`;
    $("largest").textContent = answer.largest_context ? tokens(answer.largest_context) : "none";
    $("largest_note").textContent = `of ${tokens(answer.context_limit)} that the model allows`;
  }
  const cache = now.kv_capacity_tokens === null ? [] : [`The server's KV cache would hold ${tokens(now.kv_capacity_tokens)} tokens.`];
  $("notes").replaceChildren(...[...answer.notes, ...cache].map((note) => element("li", note)));
  $("command").textContent = answer.command;
  showTable(now);
  showCharts(answer);
}

// Placement, speed, flags: what `qwenq plan` says.
function showPlan(plan, answer) {
  $("decode").textContent = "–";
  $("prefill").textContent = "";
  $("how").textContent = $("flags").textContent = "";
  $("placement").replaceChildren();
  $("instead").replaceChildren();
  if (plan === null) {
    $("how").textContent = answer.rig === null ? "Add GPUs to see what each would hold." : "";
    return;
  }
  const speed = plan.speed_short;
  if (speed.decode) {
    $("decode").textContent = `${speed.decode} tok/s${plan.batch_size > 1 ? " in all" : ""}`;
    $("prefill").textContent = (speed.prefill ? `prompt ${speed.prefill}` : "") + (plan.fits ? "" : ", offloaded");
  } else $("prefill").textContent = plan.fits ? "of such a card unknown" : "";
  $("how").textContent = plan.fits ? (plan.split || plan.how) : plan.offload ? `Does not fit the GPUs. ${plan.offload}.` : (plan.split || "No layout fits.");
  $("speed_card").title = plan.fits ? plan.speed_text : plan.offload_speed_text;
  const used = new Set();
  const cards = plan.memory.map((gpu, index) => cardOf(gpu, plan.gpus[index], index, used));
  if (plan.host && plan.offload) cards.push(hostCard(plan.host));
  $("placement").replaceChildren(...cards, legendOf(used));
  $("instead").replaceChildren(...plan.instead.map((text) => element("li", `would fit: ${text}`)));
  $("flags").replaceChildren(...Object.entries(plan.flags).map(([engine, lines]) => flagBox(engine, lines)));
  $("notes").append(...plan.notes.map((note) => element("li", note)));
  const ways = plan.parallel.map((way) => `${way.tensor_parallel_size} x ${way.pipeline_parallel_size}: ${way.verdict}`);
  $("parallel").querySelector("ul").replaceChildren(...ways.map((text) => element("li", text)));
}

function cardOf(gpu, share, index, used) {
  const over = gpu.fits === false;
  const card = element("li", undefined, over ? { class: "over" } : {});
  const title = element("div", undefined, { class: "title" });
  const room = gpu.limit_bytes === null ? "" : `${gib(gpu.total_bytes)} of ${gib(gpu.limit_bytes)} GiB`;
  title.append(element("span", `${index} ${gpu.gpu}`), element("span", room, { class: "room" }));
  const whole = Math.max(gpu.total_bytes, gpu.limit_bytes ?? 0);
  const stack = element("div", undefined, { class: "stack", role: "img", "aria-label": gpu.terms.map((term) => `${offered.terms[term.name]} ${gib(term.bytes)} GiB`).join(", ") });
  for (const term of gpu.terms) {
    used.add(term.name);
    const part = element("div", undefined, { title: `${offered.terms[term.name]}: ${gib(term.bytes)} GiB` });
    part.style.width = `${(100 * term.bytes) / whole}%`;
    part.style.background = COLOURS[term.name];
    stack.append(part);
  }
  const [from, to] = share.layers;
  const holds = [...(to > from ? [`layers ${from}–${to - 1}`] : []), ...(share.embedding ? ["embedding"] : []), ...(share.head ? ["head"] : [])];
  const free = gpu.limit_bytes - gpu.total_bytes;
  holds.push(over ? `${gib(-free)} GiB too much` : `${gib(free)} GiB free`);
  card.append(title, stack, element("div", gpu.terms.length ? holds.join(", ") : "not used", { class: "holds" }));
  return card;
}

function hostCard(host) {
  const card = element("li", undefined, host.fits === false ? { class: "over" } : {});
  const title = element("div", undefined, { class: "title" });
  const room = host.limit_bytes === null ? `${gib(host.total_bytes)} GiB` : `${gib(host.total_bytes)} of ${gib(host.limit_bytes)} GiB`;
  title.append(element("span", "host memory"), element("span", room, { class: "room" }));
  const verdict = host.fits === null ? "say how much there is under Rig" : host.fits ? "fits" : "does not fit";
  card.append(title, element("div", `${gib(host.weights_bytes)} GiB of weights, and the process; ${verdict}`, { class: "holds" }));
  return card;
}

function legendOf(used) {
  const legend = element("li", undefined, { class: "legend", "aria-hidden": "true" });
  for (const name of Object.keys(COLOURS).filter((key) => used.has(key))) {
    const mark = element("i");
    mark.style.background = COLOURS[name];
    const item = element("span");
    item.append(mark, offered.terms[name]);
    legend.append(item);
  }
  return legend;
}

function flagBox(engine, lines) {
  const box = element("div", undefined, { class: "flag" });
  const head = element("div");
  const copy = element("button", "Copy", { type: "button", "aria-label": `Copy the flags of ${engine}` });
  copy.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(lines); copy.textContent = "Copied"; } catch { copy.textContent = "Select and copy"; }
    $("status").textContent = copy.textContent;
    setTimeout(() => { copy.textContent = "Copy"; }, 2000);
  });
  head.append(element("span", engine), copy);
  box.append(head, element("pre", lines, { tabindex: 0, "aria-label": `Flags of ${engine}` }));
  return box;
}

function showTable(now) {
  const names = Object.keys(offered.terms).filter((name) => now.gpus.some((gpu) => gpu.terms.some((t) => t.name === name)));
  const head = element("tr");
  head.append(element("th", "Term", { scope: "col" }));
  now.gpus.forEach((gpu, index) => head.append(element("th", `${index} ${gpu.gpu}`, { scope: "col" })));
  const sources = [];
  const rows = names.map((name) => {
    const row = element("tr");
    row.append(element("th", offered.terms[name], { scope: "row" }));
    let source = "";
    for (const gpu of now.gpus) {
      const terms = gpu.terms.filter((term) => term.name === name);
      row.append(element("td", terms.length ? gib(terms.reduce((sum, term) => sum + term.bytes, 0)) : "–", { class: "number" }));
      if (!source && terms.length) source = `${terms[0].provenance}: ${terms[0].source}`;
    }
    sources.push(element("dt", offered.terms[name]), element("dd", source));
    return row;
  });
  const sum = (label, pick) => {
    const row = element("tr");
    row.append(element("th", label, { scope: "row" }));
    for (const gpu of now.gpus) row.append(element("td", pick(gpu), { class: "number" }));
    return row;
  };
  rows.push(sum("total", (gpu) => gib(gpu.total_bytes)));
  if (now.gpus[0].limit_bytes !== null) rows.push(sum("limit", (gpu) => gib(gpu.limit_bytes)));
  for (const limit of lastAnswer?.limits ?? []) sources.push(element("dt", "limit"), element("dd", limit));
  $("table").tHead.replaceChildren(head);
  $("table").tBodies[0].replaceChildren(...rows);
  $("sources").querySelector("dl").replaceChildren(...sources);
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
      margin: { l: 56, r: 16, t: 44, b: narrow ? 130 : 64 }, paper_bgcolor: panel, plot_bgcolor: panel, font: { color: ink },
      xaxis: { type: "log", ticklabelstandoff: 8, ticks: "outside", title: { text: "context, tokens" }, tickvals: ticks, ticktext: ticks.map((tick) => `${tick / 1024}k`), gridcolor: line },
      yaxis: { ticklabelstandoff: 8, title: { text: "GiB" }, range: [0, top], gridcolor: line },
      legend: narrow ? { orientation: "h", y: -0.32 } : {}, hoverlabel: { bgcolor: panel, font: { color: ink } },
    }, { displayModeBar: false, responsive: true });
    const here = points.find((point) => point.context === state.context)?.gpu;
    holder.children[index].setAttribute("aria-label",
      `${title}: ${gib(points[0].gpu.total_bytes)} GiB at ${tokens(x[0])} tokens, ${gib(points[points.length - 1].gpu.total_bytes)} GiB at ${tokens(x[x.length - 1])}` +
      (here ? `, ${gib(here.total_bytes)} GiB at the chosen ${tokens(state.context)}` : "") + (limit === null ? "" : `; limit ${gib(limit)} GiB`));
  });
}

function priceOf(rig) {
  if (rig.used_price_usd !== null) return `$${rig.used_price_usd.toLocaleString("en")} (used)`;
  return rig.price_usd === null ? "unknown" : `$${rig.price_usd.toLocaleString("en")} (${rig.price_basis})`;
}

function showRecommended(rigs) {
  lastRigs = rigs;
  const rows = (allRigs ? rigs : rigs.slice(0, RIGS_SHOWN)).map((rig) => {
    const row = element("tr");
    const use = element("button", "Use", { type: "button", "aria-label": `Use ${rig.count} ${rig.gpu}` });
    use.addEventListener("click", () => { state.rig = [{ gpu: rig.gpu, count: rig.count }]; changed(); $("results").focus(); });
    const cell = element("td");
    cell.append(use);
    row.append(
      element("td", `${rig.count}x ${rig.gpu}`), element("td", priceOf(rig), { "data-name": "price" }),
      element("td", rig.power_w === null ? "unknown" : `${rig.power_w.toLocaleString("en")} W`, { "data-name": "power" }),
      element("td", tokens(rig.largest_context), { class: "number", "data-name": "context up to" }), element("td", rig.how), cell,
    );
    return row;
  });
  if (!rows.length) {
    const row = element("tr");
    row.append(element("td", "none of up to 8 equal cards", { colspan: 6 }));
    rows.push(row);
  }
  $("recommended").tBodies[0].replaceChildren(...rows);
  $("more").hidden = rigs.length <= RIGS_SHOWN;
  $("more").textContent = allRigs ? `Show the first ${RIGS_SHOWN}` : `Show all ${rigs.length}`;
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
  for (const key of ["model", "engine", "kv_cache_dtype", "format"]) $(key).addEventListener("change", () => { state[key] = $(key).value; changed(); });
  for (const key of ["bits", "group_size", "prefill_chunk", "tensor_parallel_size"]) $(key).addEventListener("change", () => { state[key] = Number($(key).value); changed(); });
  const typed = (key, id, read) => $(id).addEventListener("change", () => {
    const [least, most] = NUMBERS[key];
    state[key] = Math.min(most, Math.max(least, read(Number($(id).value) || least)));
    changed();
  });
  typed("context", "context_exact", Math.round);
  typed("max_num_seqs", "max_num_seqs", Math.round);
  typed("ram_gb", "ram_gb", Math.round);
  typed("reserve_gib", "reserve_gib", (value) => value);
  typed("gpu_memory_utilization", "gpu_memory_utilization", (value) => value / 100);
  $("enforce_eager").addEventListener("change", () => { state.enforce_eager = $("enforce_eager").checked; changed(); });
  $("batch_size").addEventListener("input", () => { state.batch_size = Number($("batch_size").value); changed(); });
  $("context").addEventListener("input", () => { state.context = fromSlider($("context").value, limitOf(state.model)); changed(); });
  $("more").addEventListener("click", () => { allRigs = !allRigs; showRecommended(lastRigs); });
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
