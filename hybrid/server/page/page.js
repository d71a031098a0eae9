// The chat page: conversations in this browser, answers from this server.
//
//   props        what the model is: with a chat template it answers, without one it goes on writing
//   stored       conversations and settings, in localStorage
//   markdown     text → DOM nodes, never HTML, so what a model writes cannot do anything
//   show         the DOM follows the current conversation
//   generate     a request and its stream of server-sent events
"use strict";

const $ = (id) => document.getElementById(id);
const STORE = "hybrid.chat.v1";
const OPTIONS = ["temperature", "top_p", "top_k", "min_p", "repeat_penalty", "max_tokens", "seed"];
const STORY_TOKENS = 200; // of a continuation, if the user chooses no limit

let props = null;
let running = null; // the AbortController of the answer that is being generated
const stored = load();

// Stored state

function load() {
  const fresh = { conversations: [], current: null, options: {}, system: "", activity: true, theme: null };
  try {
    return { ...fresh, ...JSON.parse(localStorage.getItem(STORE)) };
  } catch {
    return fresh;
  }
}

function save() {
  for (;;) {
    try {
      localStorage.setItem(STORE, JSON.stringify(stored));
      return;
    } catch {
      // The browser's space is full: the oldest conversation makes room.
      if (stored.conversations.length < 2) return;
      stored.conversations.pop();
    }
  }
}

function conversation() {
  return stored.conversations.find((each) => each.id === stored.current) || null;
}

function begin() {
  const id = Date.now().toString(36) + Math.random().toString(36).slice(2);
  stored.conversations.unshift({ id, title: "", messages: [] });
  stored.current = id;
  return stored.conversations[0];
}

// Markdown

function element(name, text, attributes = {}) {
  const made = document.createElement(name);
  if (text != null) made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

const INLINE = /(`+)(.+?)\1|\*\*(.+?)\*\*|(?<![\w*])\*([^\s*][^*]*?)\*(?![\w*])|\[([^\]]*)\]\(([^)\s]+)\)/s;

function inline(parent, text) {
  for (let match; (match = INLINE.exec(text)); ) {
    parent.append(text.slice(0, match.index));
    const [whole, , code, strong, emphasis, label, address] = match;
    if (code !== undefined) parent.append(element("code", code.trim()));
    else if (strong !== undefined) inline(parent.appendChild(element("strong")), strong);
    else if (emphasis !== undefined) inline(parent.appendChild(element("em")), emphasis);
    else parent.append(link(label, address));
    text = text.slice(match.index + whole.length);
  }
  parent.append(text);
  return parent;
}

function link(label, address) {
  // Only these lead nowhere but to a page: javascript:, data: and the like stay text.
  if (!/^(https?:\/\/|mailto:)/i.test(address)) return document.createTextNode(`${label} (${address})`);
  return element("a", label || address, { href: address, target: "_blank", rel: "noopener noreferrer" });
}

function codeBlock(lines) {
  const block = element("pre");
  block.append(element("code", lines.join("\n")));
  const copy = element("button", "Copy", { type: "button" });
  copy.onclick = () => navigator.clipboard.writeText(lines.join("\n"));
  block.append(copy);
  return block;
}

function markdown(text) {
  const found = document.createDocumentFragment();
  const lines = text.split("\n");
  let list = null, paragraph = null, quote = null;
  const close = () => { list = paragraph = quote = null; };
  for (let i = 0; i < lines.length; i++) {
    const line = lines[i];
    const fence = /^\s*(```+|~~~+)/.exec(line);
    if (fence) {
      const inside = [];
      while (++i < lines.length && !lines[i].trimStart().startsWith(fence[1])) inside.push(lines[i]);
      close();
      found.append(codeBlock(inside));
      continue;
    }
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    const item = /^\s*(?:([-*+])|(\d{1,9})[.)])\s+(.*)$/.exec(line);
    const quoted = /^\s*>\s?(.*)$/.exec(line);
    if (!line.trim()) close();
    else if (heading) {
      close();
      inline(found.appendChild(element(`h${Math.min(heading[1].length + 1, 6)}`)), heading[2]);
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      close();
      found.append(element("hr"));
    } else if (item) {
      const kind = item[1] ? "UL" : "OL";
      if (!list || list.tagName !== kind) {
        close();
        list = found.appendChild(element(kind));
        if (item[2] && item[2] !== "1") list.setAttribute("start", item[2]);
      }
      inline(list.appendChild(element("li")), item[3]);
    } else if (quoted) {
      if (!quote) { close(); quote = found.appendChild(element("blockquote")); }
      inline(quote.appendChild(element("p")), quoted[1]);
    } else if (list) inline(list.lastChild, "\n" + line.trim());
    else {
      if (paragraph) paragraph.append(element("br"));
      else { close(); paragraph = found.appendChild(element("p")); }
      inline(paragraph, line);
    }
  }
  return found;
}

// What is shown

const isChat = () => props === null || props.has_chat_template;

function show() {
  const current = conversation();
  $("conversations").replaceChildren(...stored.conversations.map((each) => {
    const item = element("li");
    if (each.id === stored.current) item.setAttribute("aria-current", "true");
    const open = element("button", each.title || "New conversation", { type: "button" });
    open.onclick = () => { if (!running) { stored.current = each.id; save(); show(); document.body.classList.remove("menu"); } };
    const remove = element("button", "×", { type: "button", "aria-label": `Delete ${each.title}` });
    remove.onclick = () => drop(each.id);
    item.append(open, remove);
    return item;
  }));
  const messages = current ? current.messages : [];
  $("log").replaceChildren(...messages.map(messageNode));
  if (!messages.length) {
    $("log").append(element("p", isChat() ? "Ask something." : "Write the beginning of a story. The model goes on.", { class: "empty" }));
  }
  $("input").placeholder = isChat() ? "Message" : "Once upon a time";
  $("send").textContent = isChat() ? "Send" : "Go on";
  $("log").scrollTop = $("log").scrollHeight;
}

function messageNode(message, index) {
  const node = element("article", null, { class: `message ${message.role}${isChat() ? "" : " story"}` });
  node.setAttribute("aria-label", message.role === "user" ? "You" : "Model");
  const body = node.appendChild(element("div", null, { class: "body" }));
  fill(body, message);
  const tools = node.appendChild(element("div", null, { class: "tools" }));
  const add = (label, act) => {
    const button = tools.appendChild(element("button", label, { type: "button", class: "quiet" }));
    button.onclick = () => { if (!running) act(); };
  };
  if (message.role === "user") add("Edit", () => edit(body, tools, index));
  else {
    add("Copy", () => navigator.clipboard.writeText(message.content));
    add("Regenerate", () => regenerate(index));
  }
  if (message.error) tools.append(element("output", message.error, { class: "error" }));
  else if (message.note) tools.append(element("output", message.note));
  return node;
}

function fill(body, message) {
  if (message.role === "assistant" && isChat()) body.replaceChildren(markdown(message.content));
  else body.textContent = message.content;
}

function edit(body, tools, index) {
  const message = conversation().messages[index];
  const area = element("textarea", null, { "aria-label": "Edit the message" });
  area.value = message.content;
  body.replaceChildren(area);
  tools.replaceChildren();
  const done = tools.appendChild(element("button", "Send", { type: "button" }));
  const cancel = tools.appendChild(element("button", "Cancel", { type: "button", class: "quiet" }));
  const finish = () => {
    const current = conversation();
    message.content = area.value;
    current.messages.length = index + 1;
    save();
    show();
    generate(current);
  };
  done.onclick = finish;
  cancel.onclick = show;
  area.onkeydown = (event) => {
    if (event.key === "Escape") show();
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); finish(); }
  };
  area.focus();
}

function regenerate(index) {
  const current = conversation();
  current.messages.length = index;
  save();
  show();
  generate(current);
}

function drop(id) {
  if (running) return;
  stored.conversations = stored.conversations.filter((each) => each.id !== id);
  if (stored.current === id) stored.current = stored.conversations[0]?.id ?? null;
  save();
  show();
}

function showActivity(shares) {
  const strip = $("strip");
  while (strip.childElementCount < shares.length) strip.append(element("span"));
  while (strip.childElementCount > shares.length) strip.lastChild.remove();
  const most = Math.max(0.15, ...shares);
  shares.forEach((share, i) => {
    strip.children[i].style.height = `${Math.max(4, (100 * share) / most)}%`;
    strip.children[i].title = `layer ${i + 1}: ${(100 * share).toFixed(1)} %`;
  });
  $("share").textContent = `${((100 * shares.reduce((sum, share) => sum + share, 0)) / shares.length).toFixed(1)} %`;
}

// Generating

function headers() {
  const key = sessionStorage.getItem(STORE);
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function request(current) {
  const options = Object.fromEntries(Object.entries(stored.options).filter(([, value]) => value !== null));
  const common = { stream: true, stream_options: { include_usage: true }, layer_activity: stored.activity, ...options };
  if (!isChat()) {
    const prompt = current.messages.map((message) => message.content).join("");
    return ["v1/completions", { max_tokens: STORY_TOKENS, ...common, prompt }];
  }
  const messages = current.messages.map(({ role, content }) => ({ role, content }));
  if (stored.system.trim()) messages.unshift({ role: "system", content: stored.system });
  return ["v1/chat/completions", { ...common, messages }];
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    for (let end; (end = text.indexOf("\n\n")) >= 0; text = text.slice(end + 2)) {
      const data = text.slice(0, end).split("\n").filter((line) => line.startsWith("data: "));
      for (const line of data) if (line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function generate(current) {
  const message = { role: "assistant", content: "" };
  const [path, body] = request(current);
  current.messages.push(message);
  show();
  running = new AbortController();
  busy(true);
  const node = $("log").lastElementChild.querySelector(".body");
  let drawn = 0;
  const draw = () => {
    drawn = 0;
    const log = $("log"), isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 80;
    fill(node, message);
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  };
  let first = 0, n = 0;
  try {
    const response = await fetch(path, { method: "POST", headers: headers(), body: JSON.stringify(body), signal: running.signal });
    if (!response.ok) throw new Error(await problem(response));
    for await (const chunk of events(response)) {
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.layer_activity) showActivity(chunk.layer_activity);
      const choice = chunk.choices?.[0];
      const piece = choice?.delta?.content ?? choice?.text ?? "";
      if (piece) {
        message.content += piece;
        n += 1;
        first ||= performance.now();
        const seconds = (performance.now() - first) / 1000;
        $("status").textContent = n > 1 ? `${((n - 1) / seconds).toFixed(1)} tok/s` : "";
        drawn ||= requestAnimationFrame(draw);
      } else if (!first) $("status").textContent = "reading the prompt …";
      if (choice?.finish_reason === "length") message.note = "cut off: the limit of tokens is reached";
      if (chunk.timings && chunk.usage) message.note = [summary(chunk), message.note].filter(Boolean).join(" · ");
    }
  } catch (error) {
    if (error.name === "AbortError") message.note = "stopped";
    else message.error = error instanceof TypeError ? "the server cannot be reached" : error.message;
  }
  cancelAnimationFrame(drawn);
  running = null;
  current.title ||= title(current.messages[0].content);
  save();
  show();
  busy(false);
}

function summary({ usage, timings }) {
  const speed = timings.predicted_per_second;
  return `${usage.completion_tokens} tokens${speed ? `, ${speed.toFixed(1)} tok/s` : ""}`;
}

async function problem(response) {
  try {
    const { error } = await response.json();
    if (response.status === 401) return `${error.message} (Settings)`;
    return error.message;
  } catch {
    return `the server answers with status ${response.status}`;
  }
}

function title(text) {
  const line = text.trim().split("\n")[0];
  return line.length > 60 ? `${line.slice(0, 57)}…` : line || "Untitled";
}

function busy(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  document.body.setAttribute("aria-busy", is);
  if (!is) { $("status").textContent = ""; $("input").focus(); }
}

function send() {
  const text = $("input").value;
  const current = conversation() || begin();
  // A story may go on without a word of the user's.
  if (running || (!text.trim() && (isChat() || !current.messages.length))) return;
  if (text.trim()) current.messages.push({ role: "user", content: isChat() ? text.trim() : text });
  $("input").value = "";
  grow();
  save();
  generate(current);
}

function grow() {
  const area = $("input");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

// Settings

function openSettings() {
  $("system").value = stored.system;
  $("system").disabled = !isChat();
  $("show-activity").checked = stored.activity;
  $("key").value = sessionStorage.getItem(STORE) || "";
  for (const name of OPTIONS) {
    const field = $("settings").querySelector(`[name=${name}]`);
    field.value = stored.options[name] ?? "";
    const own = props?.default_generation_settings.params[name];
    field.placeholder = own ?? (name === "seed" ? "random" : "");
  }
  $("settings").showModal();
}

function closeSettings() {
  stored.system = $("system").value;
  stored.activity = $("show-activity").checked;
  for (const name of OPTIONS) {
    const field = $("settings").querySelector(`[name=${name}]`);
    stored.options[name] = field.value === "" || !field.checkValidity() ? null : Number(field.value);
  }
  sessionStorage.setItem(STORE, $("key").value); // kept until the tab is closed, never longer
  save();
  activityIsOn();
  if (props === null) connect();
}

function activityIsOn() {
  $("activity").hidden = !(stored.activity && props?.is_sparse);
  if (props && !$("strip").childElementCount) showActivity(new Array(props.n_layers).fill(0));
}

function useTheme() {
  if (stored.theme) document.documentElement.dataset.theme = stored.theme;
}

async function connect() {
  for (;;) {
    try {
      const response = await fetch("props", { headers: headers() });
      if (response.ok) { props = await response.json(); break; }
      $("facts").textContent = await problem(response);
      if (response.status !== 503) return; // a key is missing
    } catch {
      $("facts").textContent = "the server cannot be reached";
    }
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
  document.title = `${props.model} · hybrid`;
  $("model").textContent = props.model;
  const random = props.is_synthetic ? "random weights: its text is noise · " : "";
  $("facts").textContent = `${random}${props.quant}, ${props.threads} threads, ${props.default_generation_settings.n_ctx} tokens of context`;
  activityIsOn();
  if (!running) show();
}

// Events

$("composer").onsubmit = (event) => { event.preventDefault(); send(); };
$("input").oninput = grow;
$("input").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
};
$("stop").onclick = () => running?.abort();
$("new").onclick = () => {
  if (running) return;
  if (conversation()?.messages.length !== 0) begin();
  save();
  show();
  document.body.classList.remove("menu");
  $("input").focus();
};
$("clear").onclick = () => {
  if (running || !confirm("Delete all conversations in this browser?")) return;
  stored.conversations = [];
  stored.current = null;
  save();
  show();
};
$("menu").onclick = () => {
  const is = document.body.classList.toggle("menu");
  $("menu").setAttribute("aria-expanded", is);
};
$("theme").onclick = () => {
  const isDark = document.documentElement.dataset.theme
    ? document.documentElement.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  stored.theme = isDark ? "light" : "dark";
  save();
  useTheme();
};
$("open-settings").onclick = openSettings;
$("settings").onclose = closeSettings;
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && running && !$("settings").open) running.abort();
  if (event.ctrlKey && event.altKey && event.key.toLowerCase() === "n") $("new").click();
});

useTheme();
show();
connect();
