"use strict";
// The page is a client of /v1/chat/completions like any other. `turns` is the conversation in the form that the API
// takes: a content is a text, or the parts that the answer came with (the calculator's calls and what it said).

const at = (id) => document.getElementById(id);
const make = (tag, kind, text) => {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  if (text !== undefined) element.textContent = text;
  return element;
};

let settings = {};
let turns = [];
let running = null; // the AbortController of the answer that comes

function partsOf(content) {
  return typeof content === "string" ? [{ type: "text", text: content }] : content;
}

function textOf(content) {
  return partsOf(content).filter((part) => part.type === "text").map((part) => part.text).join("");
}

function fill(box, content) {
  const open = [...box.querySelectorAll("details")].map((call) => call.open);
  box.replaceChildren();
  const parts = partsOf(content);
  parts.forEach((part, i) => {
    if (part.type === "text") return box.append(part.text);
    if (part.type === "python_output" && i && parts[i - 1].type === "python") return;
    const call = make("details", "call");
    const output = part.type === "python" && parts[i + 1]?.type === "python_output" ? parts[i + 1].text : null;
    call.append(make("summary", "", output === null ? "calculator" : `= ${output}`));
    call.append(make("pre", "", output === null ? part.text : `${part.text}\n→ ${output}`));
    call.open = open[box.querySelectorAll("details").length] ?? false;
    box.append(call);
  });
}

function button(text, action) {
  const made = make("button", "", text);
  made.type = "button";
  made.addEventListener("click", action);
  return made;
}

function entry(turn, index) {
  const item = make("li", turn.role);
  const box = make("div", "said");
  fill(box, turn.content);
  const tools = make("div", "tools");
  if (turn.note) tools.append(make("span", "note", turn.note));
  if (!running) {
    if (turn.role === "user") tools.append(button("Edit", () => edit(index)));
    else tools.append(button("Copy", () => navigator.clipboard?.writeText(textOf(turn.content))));
    if (turn.role === "assistant" && index === turns.length - 1) tools.append(button("Retry", retry));
  }
  item.append(box, tools);
  return item;
}

function show() {
  at("welcome").hidden = turns.length > 0;
  at("turns").replaceChildren(...turns.map(entry));
  at("send").hidden = running !== null;
  at("stop").hidden = running === null;
  scroll();
}

function scroll() {
  const main = document.querySelector("main");
  main.scrollTop = main.scrollHeight;
}

function complain(text) {
  at("error").textContent = text;
  at("error").hidden = !text;
}

function edit(index) {
  at("text").value = textOf(turns[index].content);
  turns = turns.slice(0, index);
  show();
  at("text").focus();
}

function retry() {
  turns.pop();
  answer();
}

function number(id) {
  const value = at(id).valueAsNumber;
  return Number.isFinite(value) ? value : undefined;
}

function body() {
  const limit = number("max_tokens");
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  return JSON.stringify({
    model: settings.model,
    messages: [...system, ...turns.map(({ role, content }) => ({ role, content }))],
    temperature: number("temperature"),
    top_k: number("top_k"),
    top_p: settings.top_p,
    max_tokens: limit === settings.max_new_tokens ? undefined : limit, // left out, the server fits it into what is free
    stream: true,
    stream_options: { include_usage: true },
  });
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

function add(turn, delta) {
  const parts = turn.parts;
  for (const part of delta.parts ?? []) parts.push(part);
  if (delta.content) {
    if (parts.at(-1)?.type === "text") parts.at(-1).text += delta.content;
    else parts.push({ type: "text", text: delta.content });
  }
  turn.content = parts.every((part) => part.type === "text") ? textOf(parts) : parts;
}

async function answer() {
  complain("");
  running = new AbortController();
  const asked = body();
  const turn = { role: "assistant", content: "", parts: [], note: "" };
  turns.push(turn);
  show();
  const box = at("turns").lastElementChild.firstElementChild;
  let begun = 0, tokens = 0, reason = "";
  try {
    const headers = { "content-type": "application/json" };
    if (at("key").value) headers.authorization = `Bearer ${at("key").value}`;
    const response = await fetch("v1/chat/completions", { method: "POST", headers, body: asked, signal: running.signal });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      const choice = event.choices[0];
      if (event.usage) tokens = event.usage.completion_tokens;
      if (!choice) continue;
      begun ||= performance.now();
      reason = choice.finish_reason ?? reason;
      add(turn, choice.delta);
      fill(box, turn.content);
      scroll();
    }
    const rate = tokens / ((performance.now() - begun) / 1000);
    const shown = Number.isFinite(rate) && tokens ? `, ${rate.toFixed(rate < 10 ? 1 : 0)}/s` : "";
    turn.note = `${tokens} tokens${shown}${reason === "length" ? ", cut at the limit" : ""}`;
  } catch (error) {
    if (error.name === "AbortError") turn.note = "stopped";
    else {
      complain(error.message);
      turn.note = turn.parts.length ? "failed" : "";
    }
  }
  if (!turn.note) turns.pop();
  running = null;
  show();
  at("text").focus();
}

function ask(text) {
  if (running || !text.trim()) return;
  turns.push({ role: "user", content: text });
  at("text").value = "";
  answer();
}

function save() {
  if (!turns.length) return complain("nothing was said yet");
  const system = settings.system ? [{ role: "system", content: settings.system }] : [];
  const messages = [...system, ...turns.map(({ role, content }) => ({ role, content }))];
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([`${JSON.stringify({ messages })}\n`], { type: "application/jsonl" }));
  link.download = "conversation.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
}

function dark() {
  const now = document.documentElement.dataset.theme;
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = (now ?? system) === "dark" ? "light" : "dark";
}

async function begin() {
  settings = await (await fetch("settings")).json();
  at("model").textContent = document.title = settings.model;
  at("about").textContent = settings.about ?? "";
  at("examples").replaceChildren(...(settings.examples ?? []).map((text) => button(text, () => ask(text))));
  at("temperature").value = settings.temperature ?? 0;
  at("top_k").value = settings.top_k ?? 50;
  at("max_tokens").value = settings.max_new_tokens ?? 256;
  at("key-field").hidden = !settings.key;
  at("options").open = settings.key;
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(at("text").value);
});
at("text").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask(at("text").value);
});
addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
at("new").addEventListener("click", () => {
  running?.abort();
  turns = [];
  complain("");
  show();
  at("text").focus();
});
at("share").addEventListener("click", save);
at("theme").addEventListener("click", dark);
begin().catch((error) => complain(error.message));
