"use strict";
// Everything from the corpus is put into the page with textContent: it is text, whatever it looks like.
const data = JSON.parse(document.getElementById("data").textContent);
const at = (id) => document.getElementById(id);
const names = Object.keys(data.rules).sort((a, b) => data.rules[b].rejected - data.rules[a].rejected);
const SHOWN = 60;
let name = names[0];
let low = 0; // indices into the edges: a score passes when edges[low] <= score < edges[high]
let high = 0;

function make(tag, properties, ...children) {
  const node = document.createElement(tag);
  Object.assign(node, properties);
  node.append(...children);
  return node;
}

const edgesOf = (rule) => rule.edges.map((edge, i) => (i === 0 ? -Infinity : edge));

function built(rule) {
  const edges = edgesOf(rule);
  let from = 0;
  let to = edges.length;
  if (rule.min !== null) from = edges.findIndex((edge) => edge >= Math.fround(rule.min));
  if (rule.max !== null) to = edges.findIndex((edge) => edge > Math.fround(rule.max));
  return [from < 0 ? edges.length : from, to < 0 ? edges.length : to];
}

function inside(rule, score, from, to) {
  if (score === null) return true;
  const edges = edgesOf(rule);
  return score >= edges[from] && (to === edges.length || score < edges[to]);
}

function moved() {
  const [from, to] = built(data.rules[name]);
  return from !== low || to !== high;
}

function keptNow(document_) {
  if (!moved()) return document_.keep;
  if (document_.reasons.some((reason) => reason !== name)) return false;
  if (!data.applies[document_.source].includes(name)) return document_.keep;
  return inside(data.rules[name], document_.scores[name], low, high);
}

const shown = (value) => Number(value.toPrecision(5)).toString();

function countKept() {
  const rule = data.rules[name];
  if (!moved()) return data.totals.kept;
  return rule.unjudged_kept + rule.decided.slice(low, high).reduce((sum, count) => sum + count, 0);
}

function drawHistogram() {
  const rule = data.rules[name];
  const svg = at("histogram");
  svg.replaceChildren();
  const totals = rule.decided.map((count, i) => count + rule.others[i]);
  const top = Math.max(...totals.map(Math.sqrt), 1); // square roots: rare scores stay visible
  const width = 1000 / totals.length;
  totals.forEach((total, i) => {
    if (!total) return;
    const height = (150 * Math.sqrt(total)) / top;
    const part = (height * rule.decided[i]) / total;
    for (const [kind, y, h] of [["decided", 160 - part, part], ["others", 160 - height, height - part]]) {
      if (!h) continue;
      const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
      bar.setAttribute("x", i * width);
      bar.setAttribute("width", width * 0.92);
      bar.setAttribute("y", y);
      bar.setAttribute("height", h);
      bar.setAttribute("class", i >= low && i < high ? kind : `${kind} outside`);
      svg.append(bar);
    }
  });
}

function card(document_, changed) {
  const score = document_.scores[name];
  const pre = make("pre", { textContent: document_.text });
  const more = make("button", { type: "button", textContent: "Whole sample" });
  more.addEventListener("click", () => pre.classList.toggle("open"));
  const facts = [`${name} ${score === null ? "-" : shown(score)}`, document_.source, document_.license, document_.url];
  const article = make(
    "article",
    { className: changed ? "changed" : "" },
    make("p", { textContent: `${document_.id.slice(0, 12)}  ${facts.filter(Boolean).join("  ·  ")}` }),
    pre,
    make("p", { className: "reasons", textContent: document_.reasons.join(", ") + (document_.like ? ` (${document_.like})` : "") }),
    more,
  );
  if (changed) article.prepend(make("p", { textContent: document_.keep ? "would be rejected" : "would be kept" }));
  if (document_.chars > document_.text.length) {
    article.append(make("p", { textContent: `${document_.text.length} of ${document_.chars} characters shown` }));
  }
  article.dataset.id = document_.id;
  return article;
}

function border(document_) {
  const rule = data.rules[name];
  const edges = edgesOf(rule);
  const score = document_.scores[name];
  if (score === null) return Infinity;
  const marks = [edges[low], edges[high]].filter((edge) => Number.isFinite(edge));
  return Math.min(...marks.map((mark) => Math.abs(mark - score)), Infinity);
}

function draw() {
  const rule = data.rules[name];
  const edges = edgesOf(rule);
  at("about").textContent = rule.about;
  const original = built(rule);
  at("min-value").textContent = low === 0 ? "no bound" : shown(low === original[0] && rule.min !== null ? rule.min : (edges[low] ?? edges[edges.length - 1]));
  at("max-value").textContent = high === edges.length ? "no bound" : shown(high === original[1] && rule.max !== null ? rule.max : edges[high]);
  drawHistogram();
  const kept = countKept();
  const change = kept - data.totals.kept;
  at("effect").textContent =
    `${kept} of ${data.totals.kept + data.totals.rejected} documents kept` +
    (moved() ? ` (${change > 0 ? "+" : ""}${change} against the corpus as built)` : " (as built)");
  const source = at("source").value;
  const words = at("find").value.toLowerCase();
  const columns = { kept: [], rejected: [] };
  for (const document_ of data.documents) {
    if (source && document_.source !== source) continue;
    if (words && !`${document_.id} ${document_.url} ${document_.text}`.toLowerCase().includes(words)) continue;
    columns[keptNow(document_) ? "kept" : "rejected"].push(document_);
  }
  for (const [side, documents] of Object.entries(columns)) {
    const order = documents
      .map((document_) => [keptNow(document_) !== document_.keep, border(document_), document_])
      .sort((a, b) => Number(b[0]) - Number(a[0]) || (a[1] === b[1] ? 0 : a[1] - b[1]));
    at(side).replaceChildren(...order.slice(0, SHOWN).map(([changed, , document_]) => card(document_, changed)));
    at(`${side}-title`).textContent =
      `${side === "kept" ? "Kept" : "Rejected"}: ${documents.length} in the sample, nearest to the threshold first`;
  }
}

function choose(rule) {
  name = rule;
  [low, high] = built(data.rules[name]);
  const last = data.rules[name].edges.length;
  for (const [id, value] of [["min", low], ["max", high]]) {
    at(id).min = 0;
    at(id).max = last;
    at(id).value = value;
  }
  draw();
}

function start() {
  document.title = data.title;
  at("title").textContent = data.title;
  const failures = Object.entries(data.failures).map(([reason, count]) => `${count} × ${reason}`);
  at("totals").textContent =
    `${data.totals.kept} kept, ${data.totals.rejected} rejected, ${data.failed} failed` +
    (failures.length ? `: ${failures.join("; ")}` : "");
  for (const rule of names) {
    at("rule").append(make("option", { value: rule, textContent: `${rule} (${data.rules[rule].rejected} rejected)` }));
  }
  at("source").append(make("option", { value: "", textContent: "all" }));
  for (const source of Object.keys(data.applies)) at("source").append(make("option", { value: source, textContent: source }));
  at("rule").addEventListener("change", () => choose(at("rule").value));
  at("source").addEventListener("change", draw);
  at("find").addEventListener("input", draw);
  at("reset").addEventListener("click", () => choose(name));
  at("min").addEventListener("input", () => {
    low = Number(at("min").value);
    draw();
  });
  at("max").addEventListener("input", () => {
    high = Number(at("max").value);
    draw();
  });
  choose(name);
}

start();
