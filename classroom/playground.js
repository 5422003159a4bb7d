// GPT-2, a prefix and a soft prompt in a browser. Read model.py first: the names here are the same.
//   P virtual tokens   T new positions   S = P + T keys   L layers   H heads   C width   D = C / H
// A matrix (T, C) is a list of T rows, each a Float32Array of C numbers. Heads lie side by side in
// a row, D numbers each. The cache of a layer is {k, v}, two matrices (S, C). There is no batch.

const $ = (id) => document.getElementById(id);
const page = JSON.parse($("numbers").textContent); // playground.py wrote it
const { n_layer: L, n_head: H, n_embd: C, block_size, layer_norm_epsilon: eps } = page.config;
const range = (n) => [...Array(n).keys()];
const D = C / H, layers = range(L), heads = range(H);

// ---- The numbers: base64 -> rows of floats
function half(bits) { // float16: 1 bit is the sign, 5 are the exponent, 10 the fraction
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  return sign * (exponent ? 2 ** (exponent - 25) * (1024 + fraction) : 2 ** -24 * fraction);
}
function matrix({ width, data }) {
  const { buffer } = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const floats = page.bits === 32 ? new Float32Array(buffer)
    : Float32Array.from(new Uint16Array(buffer), half);
  return range(floats.length / width).map((i) => floats.subarray(i * width, (i + 1) * width));
}
const model = {}; // "h.0.attn.c_attn.weight" becomes model.h[0].attn.c_attn.weight
for (const [name, tensor] of Object.entries(page.weights)) {
  const path = name.split("."), last = path.pop();
  path.reduce((part, key) => (part[key] ??= {}), model)[last] = matrix(tensor);
}

// ---- The tokenizer: GPT-2's words, then the pair of lowest rank is merged, until none is left
// GPT-2's pattern, except that JavaScript's \s is not Unicode's white space
const WORD = /'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+/.source +
  /|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+/.source;
const rank = new Map(page.vocab.map((token, id) => [token, id])); // a token is a string of bytes
const END = page.vocab.length - 1; // the end of text
const encode = (text) => text.split(/(<\|endoftext\|>)/).flatMap((part, i) => i % 2 ? END : words(part));
function words(text) {
  return (text.match(RegExp(WORD, "gu")) ?? []).flatMap((word) => {
    const parts = Array.from(new TextEncoder().encode(word), (byte) => String.fromCharCode(byte));
    for (;;) {
      const ranks = parts.slice(1).map((part, i) => rank.get(parts[i] + part) ?? Infinity);
      const lowest = Math.min(...ranks), i = ranks.indexOf(lowest);
      if (lowest === Infinity) return parts.map((part) => rank.get(part));
      parts.splice(i, 2, parts[i] + parts[i + 1]);
    }
  });
}
function decode(ids) {
  const bytes = ids.map((id) => page.vocab[id] ?? "?").join("");
  return new TextDecoder().decode(Uint8Array.from(bytes, (character) => character.charCodeAt(0)));
}

// ---- model.py
function dot(a, b, start = 0, end = a.length) {
  let sum = 0;
  for (let i = start; i < end; i++) sum += a[i] * b[i];
  return sum;
}
const total = (numbers) => numbers.reduce((a, b) => a + b, 0);
const add = (x, y) => x.map((row, t) => row.map((n, i) => n + y[t][i]));
const linear = (x, { weight, bias: [bias] }) =>
  x.map((row) => bias.map((b, i) => b + dot(weight[i], row)));
const gelu = (x) => x.map((row) => row.map((n) =>
  n / 2 * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (n + 0.044715 * n ** 3)))));
const layer_norm = (x, { weight: [weight], bias: [bias] }) => x.map((row) => {
  const mean = total(row) / C, variance = total(row.map((n) => (n - mean) ** 2)) / C;
  return row.map((n, i) => (n - mean) / Math.sqrt(variance + eps) * weight[i] + bias[i]);
});
function softmax(scores) {
  const highest = Math.max(...scores), powers = scores.map((score) => Math.exp(score - highest));
  const sum = total(powers);
  return powers.map((power) => power / sum);
}

/** (T, C) queries, (S, C) keys and values -> (T, C), and who looks at whom: T · H lists. */
function attend(q, k, v) {
  const P = k.length - q.length;
  const y = q.map(() => new Float32Array(C));
  const looks = q.map((query, t) => heads.map((h) => {
    const seen = k.slice(0, P + t + 1), start = h * D, end = h * D + D; // no later keys
    const shares = softmax(seen.map((key) => dot(query, key, start, end) / Math.sqrt(D)));
    shares.forEach((share, s) => {
      for (let i = start; i < end; i++) y[t][i] += share * v[s][i];
    });
    return shares;
  }));
  return [y, looks];
}
function attention({ c_attn, c_proj }, x, past) {
  const qkv = linear(x, c_attn);
  const [q, k, v] = [0, C, 2 * C].map((start) => qkv.map((row) => row.subarray(start, start + C)));
  const kv = { k: [...past.k, ...k], v: [...past.v, ...v] };
  const [y, looks] = attend(q, kv.k, kv.v);
  return [linear(y, c_proj), kv, looks];
}
const mlp = ({ c_fc, c_proj }, x) => linear(gelu(linear(x, c_fc)), c_proj);
const no_past = layers.map(() => ({ k: [], v: [] }));
const n_past = (past_kv) => Math.max(...past_kv.map(({ k }) => k.length)); // a layer may lack it

/** (T, C) token vectors -> hidden states, the cache of past and new ones, and who looks at whom. */
function forward_embeddings(x, past_kv) {
  const P = n_past(past_kv), cache = [], looks = [];
  x = add(x, model.wpe.weight.slice(P));
  layers.forEach((l) => {
    const block = model.h[l];
    const [attended, kv, look] = attention(block.attn, layer_norm(x, block.ln_1), past_kv[l]);
    x = add(x, attended);
    x = add(x, mlp(block.mlp, layer_norm(x, block.ln_2)));
    cache.push(kv);
    looks.push(look);
  });
  return { hidden: layer_norm(x, model.ln_f), cache, looks };
}
function forward(idx, past_kv) {
  const wte = model.wte.weight;
  const { hidden, cache, looks } = forward_embeddings(idx.map((id) => wte[id]), past_kv);
  return { logits: hidden.map((row) => wte.map((vector) => dot(vector, row))), cache, looks };
}
// ---- prefix.py and soft_prompt.py, with the page's knobs
const value = (id) => Number($(id).value);
/** -> which of an adapter's virtual tokens are used, in their order. */
function chosen(adapter) {
  const numbers = range(Math.min(value("kept"), adapter.n_virtual));
  return view.order ? numbers.sort((i, j) => view.order[i] - view.order[j]) : numbers;
}

/** -> a cache with the adapter's virtual tokens behind past_kv, in the layers that get them. */
function adapter_past_kv(adapter, past_kv) {
  const back = $("frame").max - value("frame"); // frames before the last one
  const all = matrix(adapter.frames[Math.max(adapter.frames.length - 1 - back, 0)]);
  const rows = chosen(adapter).map((i) => all[i]), P = rows.length;
  if (P === 0) return past_kv;
  const part = (i) => rows.map((row) => row.subarray(i * C, (i + 1) * C));
  const cache = adapter.kind === "Prefix"
    ? layers.map((l) => ({ k: part(2 * l), v: part(2 * l + 1) })) // learned: (P, L · 2 · C)
    : forward_embeddings(rows, past_kv).cache; // computed from learned inputs: (P, C)
  const times = (x, factor) => x.slice(-P).map((row) => row.map((n) => n * factor));
  return past_kv.map(({ k, v }, l) => $("layers").children[l].checked ? {
    k: [...k, ...times(cache[l].k, value("keys"))],
    v: [...v, ...times(cache[l].v, value("values"))],
  } : { k, v });
}

// ---- The page: two readers of one text, without and with adapters, write what is likeliest
const readers = { off: null, on: null };
const changed = new Set(); // the readers that must read anew
const view = { chain: [], order: null, picked: null, layer: L - 1, head: null, playing: true };
const readable = (id) => id === END ? "end of text" : decode([id]).replaceAll("\n", "↵");
const percent = (share) => `${(100 * share).toFixed(share < 0.0995 ? 1 : 0)} %`;
const largest = (numbers) => numbers.indexOf(Math.max(...numbers));
function element(tag, text, share = 0, properties = {}) {
  const made = Object.assign(document.createElement(tag), { textContent: text, ...properties });
  made.style.setProperty("--share", share); // drawn as a bar or a shade, see playground.html
  return made;
}
function read(reader, ids) {
  const { logits, cache, looks } = forward(ids, reader.cache);
  reader.ids.push(...ids);
  reader.logits.push(...logits);
  reader.cache = cache;
  looks.forEach((look, l) => reader.looks[l].push(...look));
}
function new_reader(chain) {
  const ids = [...encode($("text").value), ...encode("\n")]; // an answer begins behind a line break
  const rows = chain.flatMap(chosen);
  const reader = { T: ids.length, rows, ids: [], logits: [], looks: layers.map(() => []), end: "" };
  if (rows.length + ids.length > block_size) return null;
  reader.cache = chain.reduce((past, adapter) => adapter_past_kv(adapter, past), no_past);
  read(reader, ids);
  return reader;
}
function refresh() {
  for (const name of changed) readers[name] = new_reader(name === "on" ? view.chain : []);
  changed.clear();
  $("problem").textContent = readers.off && readers.on ? "" :
    `Virtual tokens and text are more than ${block_size} tokens: shorten the text.`;
  view.picked = null;
  show();
  if (view.playing) view.timer = setTimeout(write_token, 150);
}
function change(...names) {
  clearTimeout(view.timer);
  if (changed.size === 0) requestAnimationFrame(refresh); // however fast a slider moves
  names.forEach((name) => changed.add(name));
}
const writing = () => Object.values(readers).filter((reader) => reader && !reader.end);
function write_token() {
  clearTimeout(view.timer);
  for (const reader of writing()) {
    const next = largest(reader.logits.at(-1));
    if (next === END) reader.end = "■";
    else if (n_past(reader.cache) === block_size) reader.end = "… (no position is left)";
    else read(reader, [next]);
  }
  view.picked = null;
  show();
  if (view.playing && writing().length) view.timer = setTimeout(write_token, 30);
}
function write(playing) {
  view.playing = playing;
  writing().length ? write_token() : change("off", "on"); // at the end: once more
}

// -> the token that is looked at: the one picked, or the last; after the end, the line break
const at = ({ ids, T, end }) => Math.min(view.picked ?? (end ? T - 1 : Infinity), ids.length - 1);
// -> what token t reads: the shares of virtual tokens, if its layer has any, and of the text
function look_of(t, layer = view.layer, head = view.head) {
  const by_head = readers.on.looks[layer][t], n = by_head[0].length - t - 1;
  const mean = by_head[0].map((_, s) => total(by_head.map((shares) => shares[s])) / H);
  const shares = head === null ? mean : by_head[head];
  return [shares.slice(0, n), shares.slice(n)];
}
function likeliest(reader) {
  const t = at(reader), p = softmax(reader.logits[t]);
  const best = [...p.keys()].sort((i, j) => p[j] - p[i]).slice(0, 10);
  return [element("p", `after «${readable(reader.ids[t])}»`), ...best.map((id) =>
    element("div", readable(id), p[id], { className: "bar", title: percent(p[id]) }))];
}
function show() {
  for (const [name, reader] of Object.entries(readers)) {
    $(`answer-${name}`).textContent = reader ? decode(reader.ids.slice(reader.T)) + reader.end : "";
    $(`next-${name}`).replaceChildren(...(reader ? likeliest(reader) : []));
  }
  for (const id of ["kept", "keys", "values"]) $(`${id}-is`).textContent = $(id).value;
  $("frame-is").textContent = view.chain[0].steps[value("frame")];
  if (readers.on) show_attention(readers.on);
}
function show_attention({ ids, T, rows, end }) {
  const here = at({ ids, T, end }), [virtual, text] = look_of(here), most = largest(text);
  const of = view.head === null ? "all heads" : `head ${view.head + 1}`;
  $("reading").textContent = `«${readable(ids[here])}» in layer ${view.layer + 1}, ${of}: ` +
    `a₀, the share of the virtual tokens, is ${percent(total(virtual))}. ` +
    `Of the text, «${readable(ids[most])}» gets most, ${percent(text[most])}.`;
  const shade = (share) => Math.sqrt(share ?? 0); // so that small shares show too
  const kind = (t) => `${t < T ? "text" : "written"} ${t === here ? "picked" : ""}`;
  $("tokens").replaceChildren(
    ...rows.map((row, s) => element("span", row + 1, shade(virtual[s]), { className: "virtual" })),
    ...ids.map((id, t) =>
      element("span", readable(id), shade(text[t]), { className: kind(t), value: t })));
  // The table of a₀, layers by heads: the mean over the text, without the answer
  $("shares").style.setProperty("--heads", H);
  $("shares").replaceChildren(...layers.flatMap((layer) => [null, ...heads].map((head) => {
    const a0 = total(range(T).map((t) => total(look_of(t, layer, head)[0]))) / T;
    const ariaPressed = layer === view.layer && head === view.head;
    const onclick = () => { Object.assign(view, { layer, head }); show(); };
    const name = head === null ? `layer ${layer + 1}: ` : "";
    return element("button", name + percent(a0), shade(a0), { ariaPressed, onclick });
  })));
  // The map: a pixel for each pair of tokens, and an empty column between virtual tokens and text
  const map = $("map"), canvas = map.getContext("2d"), P = rows.length + 1;
  const colours = getComputedStyle(map);
  Object.assign(map, { width: P + ids.length, height: ids.length });
  const paint = (x, y, width, share, colour) => {
    canvas.globalAlpha = shade(share);
    canvas.fillStyle = colour;
    canvas.fillRect(x, y, width, 1);
  };
  paint(0, here, map.width, 0.05, "gray");
  for (const t of ids.keys()) {
    const [virtual, text] = look_of(t);
    virtual.forEach((share, s) => paint(s, t, 1, share, colours.getPropertyValue("--on")));
    text.forEach((share, s) => paint(P + s, t, 1, share, colours.getPropertyValue("--text")));
  }
}
function pick(t) {
  if (t === view.picked) return; // what is drawn anew comes under the pointer anew
  view.picked = t;
  show();
}
function choose(first, second = page.adapters[first].partner ?? -1) { // partners in a stack
  $("first").value = first;
  $("second").value = second;
  view.chain = [first, second].filter((i) => i >= 0).map((i) => page.adapters[i]);
  const last = { frame: view.chain[0].frames.length - 1,
    kept: Math.max(...view.chain.map((adapter) => adapter.n_virtual)) };
  for (const id in last) Object.assign($(id), { max: last[id], defaultValue: last[id] });
  $("film").hidden = last.frame === 0;
  $("knobs").reset();
}
$("about").textContent += `${page.n_base.toLocaleString("en")} numbers.`;
const box = (l) => ({ type: "checkbox", defaultChecked: true, ariaLabel: `layer ${l + 1}` });
$("layers").append(...layers.flatMap((l) => [element("input", "", 0, box(l)), `${l + 1} `]));
for (const id of ["first", "second"])
  $(id).append(...page.adapters.map(({ name }, i) => element("option", name, 0, { value: i })));
$("first").onchange = () => choose(value("first"));
$("second").onchange = () => choose(value("first"), value("second"));
$("swap").onclick = () => value("second") < 0 || choose(value("second"), value("first"));
$("examples").append(...page.examples.map(({ text, adapter }) => {
  const onclick = () => { $("text").value = text; choose(adapter); change("off"); };
  return element("button", `${page.adapters[adapter].name}: ${text}`, 0, { onclick });
}));
$("text").oninput = () => change("off", "on");
$("film").oninput = $("knobs").oninput = () => change("on");
$("shuffle").onclick = () => { view.order = page.vocab.map(Math.random); change("on"); };
$("knobs").onreset = () => { view.order = null; change("on"); };
$("write").onclick = () => write(true);
$("step").onclick = () => write(false);
$("stop").onclick = () => { view.playing = false; clearTimeout(view.timer); };
$("tokens").onpointerover = ({ target }) => target.value === undefined || pick(target.value);
$("map").onpointermove = ({ offsetY, target }) =>
  pick(Math.floor(offsetY / target.clientHeight * target.height));
$("examples").firstChild.click();
