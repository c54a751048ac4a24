// The server's own figures, from /metrics, once a second while the page is in sight.

import { request } from "./key.js";

const GAUGE = "num_requests_running"; // tells by its name which prefix the server's metrics have
const SECONDS = 60; // of history
const samples = []; // {time, values}, the oldest first
const rates = []; // tokens per second between one sample and the next

const show = (id, text) => (document.getElementById(id).textContent = text);

/** Sums by name, over labels, of a page in Prometheus's text format; buckets of histograms are left out. */
function parse(page) {
  const values = {};
  const prefix = new RegExp(`^([\\w:]*)${GAUGE}\\{`, "m").exec(page)?.[1] ?? "";
  for (const line of page.split("\n")) {
    const match = /^([\w:]+)(?:\{.*\})? (\S+)$/.exec(line);
    if (!match || !match[1].startsWith(prefix) || match[1].endsWith("_bucket")) continue;
    const name = match[1].slice(prefix.length);
    values[name] = (values[name] ?? 0) + Number(match[2]);
  }
  return values;
}

/** How much a counter grew between two samples; a server that started anew counts from 0. */
function growth(from, to, name) {
  const before = from.values[name] ?? 0;
  const after = to.values[name] ?? 0;
  return after < before ? after : after - before;
}

function draw() {
  const highest = Math.max(...rates, 1);
  const start = SECONDS - rates.length;
  const points = rates.map((rate, index) => `${start + index},${19 - (18 * rate) / highest}`);
  document.querySelector("#history polyline").setAttribute("points", points.join(" "));
}

function update(sample) {
  const { values } = sample;
  const last = samples.at(-1);
  samples.push(sample);
  if (samples.length > SECONDS) samples.shift();
  show("running", values.num_requests_running);
  show("waiting", values.num_requests_waiting);
  show("kv", `${(100 * values.kv_cache_usage_perc).toFixed(1)} %`);
  document.getElementById("kv-meter").value = values.kv_cache_usage_perc;
  if (!last) return;
  const rate = growth(last, sample, "generation_tokens_total") / ((sample.time - last.time) / 1000);
  rates.push(rate);
  if (rates.length > SECONDS) rates.shift();
  show("tokens-per-second", rate.toFixed(1));
  const answered = growth(samples[0], sample, "time_to_first_token_seconds_count");
  const seconds = growth(samples[0], sample, "time_to_first_token_seconds_sum");
  show("ttft", answered ? `${Math.round((1000 * seconds) / answered)} ms` : "–");
  draw();
}

async function poll() {
  if (!document.hidden) {
    try {
      const page = await (await request("metrics")).text();
      update({ time: performance.now(), values: parse(page) });
      show("watch-error", "");
    } catch (error) {
      show("watch-error", `No figures: ${error.message}`);
    }
  }
  setTimeout(poll, 1000);
}

poll();
