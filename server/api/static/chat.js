// A chat over /v1/chat/completions, streamed. All text is put in as text: nothing that a model writes becomes markup.

import { onKeyChange, request } from "./key.js";

const element = (id) => document.getElementById(id);
const log = element("log");
const prompt = element("prompt");
const messages = []; // of the conversation so far, the system prompt apart
let running = null; // the AbortController of the answer under way

/** Adds an empty message to the log; returns where its parts go. */
function addMessage(role) {
  const article = document.createElement("article");
  article.className = role;
  const title = document.createElement("h3");
  title.textContent = role === "user" ? "You" : "Model";
  const text = document.createElement("div");
  text.className = "text";
  article.append(title, text);
  log.append(article);
  return { article, text };
}

function isAtEnd() {
  return log.scrollHeight - log.scrollTop - log.clientHeight < 40;
}

/** Runs `change`, and keeps the end in sight where it was. */
function following(change) {
  const follow = isAtEnd();
  change();
  if (follow) log.scrollTop = log.scrollHeight;
}

/** The events of a server-sent stream, parsed, until [DONE]. */
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

function requestBody() {
  const system = element("system").value.trim();
  const body = {
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
    include_metrics: true,
  };
  // Empty: the server's own default.
  const temperature = element("temperature").valueAsNumber;
  const maxTokens = element("max-tokens").valueAsNumber;
  if (!Number.isNaN(temperature)) body.temperature = temperature;
  if (!Number.isNaN(maxTokens)) body.max_tokens = maxTokens;
  return body;
}

/** Where a model's reasoning goes: folded, above the answer. */
function addReasoning(view) {
  const details = document.createElement("details");
  const summary = document.createElement("summary");
  summary.textContent = "Reasoning";
  const text = document.createElement("div");
  details.append(summary, text);
  view.article.insertBefore(details, view.text);
  return text;
}

function figures({ usage, metrics }, reason) {
  const parts = [`${usage.completion_tokens} tokens`];
  if (metrics?.tokens_per_second) parts.push(`${metrics.tokens_per_second.toFixed(1)} per second`);
  if (metrics?.time_to_first_token_ms) parts.push(`first after ${Math.round(metrics.time_to_first_token_ms)} ms`);
  if (reason === "length") parts.push("cut at the limit");
  return parts.join(" · ");
}

/** Streams one answer into `view`; returns its text. `onText` hears of it as it grows. */
async function answer(view, signal, onText) {
  const response = await request("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(requestBody()),
    signal,
  });
  let reasoning = null;
  let reason = null;
  for await (const event of events(response.body)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    following(() => {
      if (choice?.delta.reasoning_content) {
        reasoning ??= addReasoning(view);
        reasoning.append(choice.delta.reasoning_content);
      }
      if (choice?.delta.content) {
        view.text.append(choice.delta.content);
        onText(choice.delta.content);
      }
      reason = choice?.finish_reason ?? reason;
      if (event.usage) addFigures(view, figures(event, reason));
    });
  }
}

function addFigures(view, text) {
  const line = document.createElement("p");
  line.className = "figures";
  line.textContent = text;
  view.article.append(line);
}

function setRunning(controller) {
  running = controller;
  element("send").disabled = element("clear").disabled = controller !== null;
  element("stop").disabled = controller === null;
  // Screen readers read an answer once it is whole.
  log.setAttribute("aria-busy", String(controller !== null));
}

async function send() {
  const content = prompt.value;
  element("error").textContent = "";
  const question = addMessage("user");
  question.text.textContent = content;
  messages.push({ role: "user", content });
  prompt.value = "";
  const view = addMessage("assistant");
  log.scrollTop = log.scrollHeight;
  const controller = new AbortController();
  setRunning(controller);
  let text = "";
  try {
    await answer(view, controller.signal, (piece) => (text += piece));
  } catch (error) {
    if (controller.signal.aborted) addFigures(view, "stopped");
    else element("error").textContent = error.message;
  } finally {
    setRunning(null);
  }
  if (text) {
    messages.push({ role: "assistant", content: text });
  } else if (element("error").textContent) {
    // Nothing came of it: the message goes back where it can be mended and sent again.
    messages.pop();
    question.article.remove();
    view.article.remove();
    prompt.value ||= content;
  }
  prompt.focus();
}

async function showModel() {
  try {
    const { data } = await (await request("v1/models")).json();
    element("model").textContent = `${data[0].id} · ${data[0].max_model_len} tokens of context`;
    element("max-tokens").max = data[0].max_model_len;
  } catch (error) {
    element("model").textContent = error.message;
  }
}

element("chat").addEventListener("submit", (event) => {
  event.preventDefault();
  const settings = [element("temperature"), element("max-tokens")];
  if (!running && prompt.value.trim() && settings.every((field) => field.reportValidity())) send();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    element("chat").requestSubmit();
  }
});
element("stop").addEventListener("click", () => running?.abort());
element("clear").addEventListener("click", () => {
  messages.length = 0;
  log.replaceChildren();
  element("error").textContent = "";
  prompt.focus();
});
onKeyChange(showModel);
showModel();
