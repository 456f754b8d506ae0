// OpenAI's own client for Node, unmodified, asked what a page or an editor asks.
// Run by test_openai_npm.py: node openai_npm.mjs BASE_URL KEY, in a folder with node_modules.
import assert from "node:assert/strict";
import { createRequire } from "node:module";

const require = createRequire(`${process.cwd()}/`);
const OpenAI = require("openai");
const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 100_000 });
const messages = [{ role: "user", content: "Name three rivers." }];
const counting = [{ role: "user", content: "Count from 1 to 1000 in words." }];
const given = { model: "base", messages, max_tokens: 12, temperature: 0 };
const tool = {
  type: "function",
  function: {
    name: "get_weather",
    description: "Look up the weather of a city.",
    parameters: {
      type: "object",
      properties: { city: { type: "string", maxLength: 30 }, unit: { enum: ["C", "F"] } },
      required: ["city", "unit"],
      additionalProperties: false,
    },
  },
};
const checks = {
  async models() {
    const found = [];
    for await (const each of client.models.list()) found.push(each.id);
    assert.deepEqual(found, ["base"]);
  },

  async chat() {
    const found = await client.chat.completions.create(given);
    assert.ok(found.choices[0].message.content);
    assert.equal(found.usage.total_tokens, found.usage.prompt_tokens + found.usage.completion_tokens);
  },

  async stream() {
    const whole = await client.chat.completions.create(given);
    let text = "";
    let usage = null;
    const options = { include_usage: true };
    for await (const chunk of await client.chat.completions.create({
      ...given, stream: true, stream_options: options,
    })) {
      text += chunk.choices[0]?.delta.content ?? "";
      usage = chunk.usage ?? usage;
    }
    assert.equal(text, whole.choices[0].message.content);
    assert.deepEqual(usage, whole.usage);
  },

  async helper() {
    const runner = client.chat.completions.stream(given);
    let text = "";
    runner.on("content", (delta) => { text += delta; });
    const final = await runner.finalChatCompletion();
    assert.equal(text, final.choices[0].message.content);
  },

  async tools() {
    const ask = [{ role: "user", content: "What is the weather in Paris in C?" }];
    const body = { ...given, messages: ask, max_tokens: 100, tools: [tool] };
    const whole = await client.chat.completions.create({ ...body, tool_choice: "required" });
    const call = whole.choices[0].message.tool_calls[0];
    assert.equal(call.function.name, "get_weather");
    assert.deepEqual(Object.keys(JSON.parse(call.function.arguments)).sort(), ["city", "unit"]);
    let told = "";
    for await (const chunk of await client.chat.completions.create({
      ...body, tool_choice: "required", stream: true,
    })) {
      for (const part of chunk.choices[0]?.delta.tool_calls ?? []) {
        if (part.index === 0) told += part.function.arguments ?? "";
      }
    }
    assert.equal(told, call.function.arguments);
    const free = await client.chat.completions.create({ ...body, tool_choice: "auto" });
    const { content, tool_calls } = free.choices[0].message;
    assert.ok(content || tool_calls.length);
  },

  async json_schema() {
    const schema = {
      type: "object",
      properties: { name: { type: "string", maxLength: 20 }, old: { type: "boolean" } },
      required: ["name", "old"],
      additionalProperties: false,
    };
    const found = await client.chat.completions.parse({
      ...given, max_tokens: 80,
      response_format: { type: "json_schema", json_schema: { name: "s", strict: true, schema } },
    });
    const { name, old } = found.choices[0].message.parsed;
    assert.ok(typeof name === "string" && typeof old === "boolean");
  },

  async embeddings() {
    const input = ["a river", "a lake"];
    const coded = await client.embeddings.create({ model: "base", input });
    const plain = await client.embeddings.create({ model: "base", input, encoding_format: "float" });
    assert.equal(coded.data.length, 2);
    plain.data[1].embedding.forEach((value, i) => {
      assert.ok(Math.abs(value - coded.data[1].embedding[i]) < 1e-3);
    });
  },

  async errors() {
    const ask = (more) => client.chat.completions.create({ ...given, ...more });
    await assert.rejects(ask({ model: "gpt-4" }), OpenAI.NotFoundError);
    await assert.rejects(ask({ temperature: -1 }), OpenAI.BadRequestError);
    await assert.rejects(ask({ messages: [] }), OpenAI.BadRequestError);
    const stranger = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
    await assert.rejects(stranger.models.list(), OpenAI.AuthenticationError);
  },

  async cancel() {
    for (let i = 0; i < 4; i += 1) {
      const stream = await client.chat.completions.create(
        { ...given, messages: counting, max_tokens: 1500, stream: true }, { maxRetries: 8 },
      );
      for await (const chunk of stream) {
        assert.equal(chunk.object, "chat.completion.chunk");
        break; // the client leaves
      }
    }
    const leaving = new AbortController();
    const asked = client.chat.completions.create(
      { ...given, messages: counting, max_tokens: 1500 }, { signal: leaving.signal },
    );
    setTimeout(() => leaving.abort(), 200);
    await assert.rejects(asked, OpenAI.APIUserAbortError);
    const patient = await client.chat.completions.create(given, { maxRetries: 8 });
    assert.ok(patient.choices[0].message.content);
  },

  async timeout() {
    const asked = client.chat.completions.create(
      { ...given, messages: counting, max_tokens: 1500 }, { timeout: 200 },
    );
    await assert.rejects(asked, OpenAI.APIConnectionTimeoutError);
  },
};

const failed = [];
for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
    console.log(`ok ${name}`);
  } catch (error) {
    failed.push(name);
    console.log(`FAILED ${name}: ${error.stack}`);
  }
}
process.exitCode = failed.length ? 1 : 0;
