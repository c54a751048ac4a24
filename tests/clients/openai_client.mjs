// The official JavaScript client against the server whose URL is the first argument.
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ apiKey: "none", baseURL: process.argv[2] + "/v1", maxRetries: 0 });
const messages = [{ role: "user", content: "Name a colour." }];
const brief = { model: "demo", messages, temperature: 0, max_tokens: 16 };
const weather = {
  type: "function",
  function: {
    name: "weather",
    strict: true,
    parameters: {
      type: "object",
      properties: { city: { type: "string", maxLength: 20 } },
      required: ["city"],
      additionalProperties: false,
    },
  },
};

async function chat() {
  const answer = await client.chat.completions.create(brief);
  const text = answer.choices[0].message.content;
  assert.ok(text.length > 0 && answer.usage.completion_tokens <= 16);
  let streamed = "";
  let usage = null;
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create({ ...brief, ...options })) {
    streamed += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(streamed, text);
  assert.equal(usage.completion_tokens, answer.usage.completion_tokens);
  const runner = client.chat.completions.stream(brief);
  assert.equal(await runner.finalContent(), text);
  const told = await client.chat.completions.create({ ...brief, logprobs: true, top_logprobs: 2, n: 2 });
  assert.equal(told.choices[1].logprobs.content[0].top_logprobs.length, 2);
}

async function structured() {
  const schema = {
    type: "object", properties: { n: { type: "integer", minimum: 0, maximum: 9999 } }, required: ["n"], additionalProperties: false,
  };
  const response_format = { type: "json_schema", json_schema: { name: "number", schema, strict: true } };
  const answer = await client.chat.completions.parse({ ...brief, max_tokens: 200, temperature: 1, seed: 1, response_format });
  assert.ok(Number.isInteger(JSON.parse(answer.choices[0].message.content).n));
}

async function tools() {
  const fields = { ...brief, max_tokens: 200, tools: [weather], tool_choice: "required" };
  const answer = await client.chat.completions.create(fields);
  const [call] = answer.choices[0].message.tool_calls;
  assert.equal(call.function.name, "weather");
  assert.equal(answer.choices[0].finish_reason, "tool_calls");
  const whole = await client.chat.completions.stream(fields).finalChatCompletion();
  assert.equal(whole.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
  let asked = null;
  const run = (parsed) => {
    asked = parsed.city;
    return "sunny";
  };
  const runner = client.chat.completions.runTools({
    ...fields,
    tool_choice: { type: "function", function: { name: "weather" } },
    tools: [{ ...weather, function: { ...weather.function, function: run, parse: JSON.parse } }],
  }, { maxChatCompletions: 2 });
  await runner.done().catch(() => {}); // the model may call on to the end
  assert.equal(typeof asked, "string");
}

async function responses() {
  const fields = { model: "demo", input: "Name a colour.", temperature: 0, max_output_tokens: 16 };
  const answer = await client.responses.create(fields);
  assert.ok(answer.output_text.length > 0);
  let text = "";
  let last = null;
  for await (const event of await client.responses.create({ ...fields, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
    last = event;
  }
  assert.equal(text, answer.output_text);
  assert.ok(["response.completed", "response.incomplete"].includes(last.type));
  const done = await client.responses.stream(fields).finalResponse();
  assert.equal(done.output_text, answer.output_text);
}

async function others() {
  const text = await client.completions.create({ model: "demo", prompt: "One, two,", max_tokens: 5 });
  assert.equal(text.usage.completion_tokens, 5);
  const vectors = await client.embeddings.create({ model: "demo", input: ["the cat", "a dog"] });
  assert.equal(vectors.data.length, 2);
  const length = Math.hypot(...vectors.data[0].embedding);
  assert.ok(Math.abs(length - 1) < 1e-3, `an embedding of length ${length}`);
  const names = [];
  for await (const model of client.models.list()) names.push(model.id);
  assert.deepEqual(names, ["demo"]);
  assert.equal((await client.models.retrieve("demo")).id, "demo");
}

async function errors() {
  await assert.rejects(client.chat.completions.create({ ...brief, model: "nobody" }), OpenAI.NotFoundError);
  await assert.rejects(client.chat.completions.create({ ...brief, temperature: 9 }), (error) => {
    assert.ok(error instanceof OpenAI.BadRequestError);
    assert.equal(error.param, "temperature");
    return true;
  });
  const stream = await client.chat.completions.create({ ...brief, max_tokens: 400, stream: true });
  for await (const chunk of stream) {
    assert.ok(chunk.choices);
    stream.controller.abort();
  }
}

for (const part of [chat, structured, tools, responses, others, errors]) {
  await part();
  console.log(part.name, "ok");
}
