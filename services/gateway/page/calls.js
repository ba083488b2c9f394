// Calls as the gateway takes them: one answer, a stream of answers, or messages in both directions.

import { parse } from "./exact.js";

const LOST = { title: "No answer", detail: "The gateway does not answer. Is it running, and is the network there?" };

// The methods that there are, from the gateway's own description of them.
export async function methods() {
  const response = await fetch("/openapi.json");
  if (!response.ok) throw new Error(`expected /openapi.json, got status ${response.status}`);
  const root = await response.json();
  const found = Object.entries(root.paths).flatMap(([path, verbs]) =>
    Object.values(verbs).filter((each) => each?.["x-rollcall"]).map((operation) => {
      const about = operation["x-rollcall"];
      const schema = about.request ?? operation.requestBody?.content["application/json"].schema ?? {};
      return { ...about, path, schema, name: `${about.service}.${about.method}`, root };
    }));
  return found.sort((a, b) => a.service.localeCompare(b.service) || kinds.indexOf(a.kind) - kinds.indexOf(b.kind));
}

const kinds = ["unary", "server_stream", "client_stream", "bidi_stream"];

const post = (method, body, seconds, signal) =>
  fetch(method.path, {
    method: "POST",
    headers: { "content-type": "application/json", ...(seconds ? { "x-request-timeout": seconds } : {}) },
    body,
    signal,
  });

// Makes one call. Returns { status, ms, instance, trace, text, problem }, with a problem where it has failed.
export async function call(method, body, seconds) {
  const begun = performance.now();
  try {
    const response = await post(method, body, seconds);
    const text = await response.text();
    return outcome(response, text, performance.now() - begun);
  } catch {
    return { status: 0, ms: performance.now() - begun, instance: "", problem: LOST };
  }
}

function outcome(response, text, ms) {
  return {
    status: response.status,
    ms,
    instance: response.headers.get("rollcall-instance") ?? "",
    trace: response.headers.get("traceparent")?.split("-")[1] ?? "",
    text,
    problem: response.ok ? null : problem(text, response),
  };
}

function problem(text, response) {
  try {
    return JSON.parse(text);
  } catch {
    return { title: response.statusText || "Failed", status: response.status, detail: text.slice(0, 500) };
  }
}

// Makes a call whose answer is a stream: `onMessage` gets the text of each, until it has ended or is aborted.
export async function stream(method, body, seconds, signal, onMessage) {
  const begun = performance.now();
  const since = () => performance.now() - begun;
  try {
    const response = await post(method, body, seconds, signal);
    if (!response.ok) return outcome(response, await response.text(), since());
    const found = outcome(response, "", 0);
    for await (const { event, data } of events(response.body)) {
      if (event === "end") return { ...found, ms: since(), instance: JSON.parse(data).instance };
      if (event === "error") return { ...found, ms: since(), problem: JSON.parse(data) };
      onMessage(data);
    }
    return { ...found, ms: since(), problem: { ...LOST, detail: "The connection was lost before the stream's end." } };
  } catch {
    return signal.aborted ? { status: 0, ms: since(), stopped: true } : { status: 0, ms: since(), problem: LOST };
  }
}

// https://html.spec.whatwg.org/multipage/server-sent-events.html, as far as the gateway uses it
async function* events(body) {
  let rest = "";
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part = await reader.read(); !part.done; part = await reader.read()) {
    const whole = (rest + part.value).split("\n\n");
    rest = whole.pop();
    for (const text of whole) {
      const fields = text.split("\n").map((line) => /^(\w+): ?(.*)$/.exec(line)).filter(Boolean);
      const data = fields.filter(([, name]) => name === "data").map(([, , value]) => value).join("\n");
      if (data) yield { event: fields.find(([, name]) => name === "event")?.[2] ?? "message", data };
    }
  }
}

// Opens a call that takes messages. `onMessage` gets the text of each answer, `onEnd` how it has ended.
export function open(method, onOpen, onMessage, onEnd) {
  const begun = performance.now();
  const socket = new WebSocket(`${location.origin.replace(/^http/, "ws")}${method.path}`);
  let end = { problem: LOST };
  socket.onopen = onOpen;
  socket.onmessage = ({ data }) => {
    const said = parse(data);
    if ("result" in said) onMessage(JSON.stringify(said.result));
    else end = said.error ? { problem: said.error } : { instance: said.end.instance };
  };
  socket.onclose = () => onEnd({ status: "", ...end, ms: performance.now() - begun });
  return {
    send: (body) => socket.send(body),
    finish: () => socket.send(""),
    stop: () => {
      end = { stopped: true };
      socket.close();
    },
  };
}

// Makes many calls, some at a time; tells after each how they have spread over the instances so far.
export async function spread(method, body, times, signal, onProgress) {
  const found = { instances: {}, failed: 0, problem: null, done: 0, times, latencies: [], ms: 0 };
  const begun = performance.now();
  let left = times;
  const caller = async () => {
    while (left-- > 0 && !signal.aborted) {
      const { instance, problem, ms } = await call(method, body);
      found.done++;
      if (problem) found.failed++;
      else found.instances[instance || "unknown"] = (found.instances[instance || "unknown"] ?? 0) + 1;
      found.problem ??= problem;
      found.latencies.push(ms);
      found.ms = performance.now() - begun;
      onProgress({ ...found });
    }
  };
  await Promise.all(Array.from({ length: AT_ONCE }, caller));
  return { ...found, over: true };
}

const AT_ONCE = 6; // as many as browsers make to one server by HTTP/1.1; the others would wait in the browser
