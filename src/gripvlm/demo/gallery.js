"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const keep = document.getElementById("keep"), view = document.getElementById("view");
const percent = (p) => (p < 0.0005 ? "below 0.1" : (100 * p).toFixed(1)) + " %";

function element(name, attributes, ...children) {
  const svg = ["svg", "image", "path", "rect", "clipPath"].includes(name);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Hexadecimal digits to n booleans; digits of leading zeros are not written.
function bits(hex, n) {
  const all = [...hex].map((digit) => parseInt(digit, 16).toString(2).padStart(4, "0")).join("");
  return [...all.padStart(n, "0").slice(-n)].map((bit) => bit === "1");
}

function outline(boxes) {
  return boxes.map(([l, t, r, b]) => `M${l} ${t}H${r}V${b}H${l}Z`).join("");
}

// Rank 1 is the highest score; equal scores in the tokens' order, as pruners break ties.
function ranks(scores) {
  const order = scores.map((_, i) => i).sort((a, b) => scores[b] - scores[a] || a - b);
  const found = [];
  order.forEach((token, place) => { found[token] = place + 1; });
  return found;
}

// The colour over one token: opacity by rank, or blue where it helps and red where it harms.
function colour(answer, token, n) {
  if (view.value === "scores") return `rgba(255,214,10,${(0.85 * (1 - answer.ranks[token] / n) ** 2).toFixed(2)})`;
  const worth = answer.worth[token] / answer.most;
  return `rgba(${worth > 0 ? "40,130,255" : "255,70,40"},${(0.9 * Math.sqrt(Math.abs(worth))).toFixed(2)})`;
}

let drawn = 0;
function picture(part, answer, n) {
  const boxes = data.boxes[part.boxes], [width, height] = part.size;
  const size = { width, height, preserveAspectRatio: "none" };
  const image = () => element("image", { href: data.pictures[part.picture], ...size });
  const svg = element("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" }, image());
  const of = (kept) => boxes.filter((_, i) => answer.mask[part.start + i] === kept);
  const shaded = view.value === "kept" || !answer[view.value]?.length;
  if (answer.kept) {
    svg.append(element("path", { d: outline(of(false)), fill: "#181c24", "fill-opacity": shaded ? 0.72 : 0.5 }));
    if (!shaded) boxes.forEach((box, i) => {
      svg.append(element("path", { d: outline([box]), fill: colour(answer, part.start + i, n) }));
    });
    // The outline of all kept tokens together: a wide line, and what they show over its inner half.
    const id = `kept${drawn++}`, d = outline(of(true));
    const line = { d, fill: "none", stroke: "#ffd60a", "stroke-width": width / 64 };
    if (shaded) svg.append(element("clipPath", { id }, element("path", { d })), element("path", line),
      (() => { const top = image(); top.setAttribute("clip-path", `url(#${id})`); return top; })());
    else svg.append(element("path", { ...line, "stroke-width": width / 200 }));
  }
  const mark = element("rect", { fill: "none", stroke: "#fff", "stroke-width": width / 90, visibility: "hidden" });
  svg.append(mark);
  svg.mark = (token) => {
    const box = boxes[token - part.start];
    mark.setAttribute("visibility", box ? "visible" : "hidden");
    if (box) for (const [key, value] of Object.entries({ x: box[0], y: box[1], width: box[2] - box[0], height: box[3] - box[1] }))
      mark.setAttribute(key, value);
  };
  svg.at = (event) => {
    const frame = svg.getBoundingClientRect();
    const x = (event.clientX - frame.left) / frame.width * width, y = (event.clientY - frame.top) / frame.height * height;
    const found = boxes.findIndex(([l, t, r, b]) => l <= x && x < r && t <= y && y < b);
    return found < 0 ? -1 : part.start + found;
  };
  return svg;
}

function why(name, answer, token, full) {
  const line = [element("b", {}, name)], n = answer.mask.length;
  if (!answer.kept) return [...line, ` sees all ${n} tokens. Tap a method's picture to see why a token stays or goes.`];
  const kept = answer.mask[token];
  line.push(` ${kept ? "kept" : "dropped"} this token. `);
  line.push(answer.scores ? `Score ${answer.scores[token]}, rank ${answer.ranks[token]} of ${n}. ` : "The method has no scores. ");
  if (answer.alone) return [...line, `What it is worth cannot be asked: ${answer.alone}.`];
  if (!answer.worth.length) return [...line, `What it is worth was asked at ${data.keeps[data.start]} only.`];
  // What was asked is the base, from which the token was taken, or to which it was added.
  const change = answer.worth[token] / 1000, base = answer.of_full;
  const other = Math.min(1, Math.max(0, kept ? base - change : base + change));
  line.push(`“${full.text}” has probability ${percent(base)}; ${kept ? "without" : "with"} it ${percent(other)}.`);
  return line;
}

// The answer's probability and, where it differs, that of the answer with all tokens.
function lines(answer, full) {
  const texts = [`probability ${percent(answer.probability)}`];
  if (answer.text !== full.text) texts.push(`“${full.text}”: ${percent(answer.of_full)}`);
  return texts.flatMap((text) => [text, element("br", {})]);
}

function card(name, answer, example, tell) {
  const made = element("div", { class: "card" });
  if (answer.refused) {
    made.append(element("div", { class: "text" }, element("div", { class: "method" }, name), element("div", { class: "facts" }, answer.refused)));
    return made;
  }
  const n = answer.mask.length, right = answer.score >= 1;
  const verdict = right ? "right" : answer.score > 0 ? `partly right, ${answer.score}` : "wrong";
  const pictures = example.parts.map((part) => picture(part, answer, n));
  made.append(...pictures, element("div", { class: "text" },
    element("div", { class: "method" }, name),
    element("div", { class: "answer" }, answer.text || "(nothing)", " ", element("b", right ? { class: "right" } : {}, verdict)),
    element("div", { class: "facts" }, ...lines(answer, example.full), `${answer.tokens} of ${n} tokens${answer.ms === null ? "" : `, ${answer.ms} ms`}`)));
  pictures.forEach((svg) => svg.addEventListener("click", (event) => tell(name, answer, svg.at(event))));
  made.mark = (token) => pictures.forEach((svg) => svg.mark(token));
  return made;
}

function ready(example) {
  const n = example.parts.reduce((sum, part) => sum + data.boxes[part.boxes].length, 0);
  for (const answer of [example.full, ...example.settings.flat()].filter((one) => !one.refused)) {
    answer.mask = answer.kept ? bits(answer.kept, n) : Array(n).fill(true);
    answer.ranks = answer.scores && ranks(answer.scores);
    answer.most = Math.max(1, ...answer.worth.map(Math.abs));
  }
}

let last = "";
data.examples.forEach((example) => {
  ready(example);
  const place = document.getElementById("examples");
  if (example.case !== last) place.append(element("h2", {}, example.case[0].toUpperCase() + example.case.slice(1)));
  last = example.case;
  const cards = element("div", { class: "cards" }), line = element("p", { class: "why", "aria-live": "polite" });
  let shown = null;
  const tell = (name, answer, token) => {
    if (token < 0) return;
    shown = { name, token };
    line.replaceChildren(...why(name, answer, token, example.full));
    line.classList.add("told");
    [...cards.children].forEach((one) => one.mark?.(token));
  };
  example.draw = () => {
    const row = [["all tokens", example.full], ...data.methods.map((name, i) => [name, example.settings[keep.value][i]])];
    cards.replaceChildren(...row.map(([name, answer]) => card(name, answer, example, tell)));
    const same = shown && row.find(([name, answer]) => name === shown.name && !answer.refused);
    if (same) tell(same[0], same[1], shown.token);
    else {
      line.replaceChildren("Tap a patch of a picture.");
      line.classList.remove("told");
    }
  };
  place.append(element("section", {}, element("h3", {}, example.question),
    element("p", { class: "about" }, `The right answer is “${example.right}”. (${example.task})`), cards, line));
});

const legends = {
  kept: ["#ffd60a", "kept, the others are dark"],
  scores: ["#ffd60a", "high rank", "#fff0", "outlined: kept; some methods have no scores"],
  worth: ["#2882ff", "the answer needs it", "#ff4628", "better without it"],
};
function draw() {
  document.getElementById("budget").textContent = data.keeps[keep.value];
  const legend = legends[view.value];
  const marks = legend.flatMap((text, i) => i % 2 ? [text] : text === "#fff0" ? [" · "] : [element("i", { style: `background:${text}` })]);
  document.getElementById("legend").replaceChildren(...marks);
  data.examples.forEach((example) => example.draw());
}
keep.addEventListener("input", draw);
view.addEventListener("change", draw);
draw();
