// One method: its form on one side, and what has come of it on the other.

import { html, useEffect, useRef, useState } from "./vendor/htm-preact.mjs";
import { call, open, spread, stream } from "./calls.js";
import { pretty } from "./exact.js";
import { Form } from "./form.js";
import { empty, encode, shape } from "./schema.js";
import { count } from "./units.js";

const MANY = 1000;
const SHOWN = 200; // messages of a stream
const PACE = 100; // ms
const KINDS = { unary: "one answer", server_stream: "stream of answers", client_stream: "stream of messages", bidi_stream: "messages both ways" };

const typed = {}; // what was typed into each form, for whoever comes back to it

export function Method({ method }) {
  const form = shape(method.schema, method.root);
  const [state, setState] = useState(typed[method.name] ?? empty(form));
  const [result, setResult] = useState(null);
  const running = useRef(null);
  useEffect(() => () => running.current?.(), []);
  const change = (value) => setState((typed[method.name] = value));
  const message = () => JSON.stringify(encode(form, state, method.root, true));
  const Kind = { unary: Unary, server_stream: Streamed }[method.kind] ?? Chat;
  const violations = result?.problem?.violations;
  const page = useRef();
  // Where it stands below the form, it is brought into view.
  useEffect(() => {
    if (result && matchMedia("(max-width: 720px)").matches) page.current.querySelector(".outcome").scrollIntoView({ block: "nearest" });
  }, [!result, result?.busy]);
  return html`<div class="contents" ref=${page}>
    <${Kind} ...${{ method, message, result, setResult, running, clear: () => change(empty(form)) }}>
      <header>
        <h3>${method.service}<b>.${method.method}</b></h3>
        <p class="about"><span class="tag">${KINDS[method.kind]}</span>
          ${method.idempotent && html`<span class="tag" title="its contract says so: it is tried again when an instance fails">safe to repeat</span>`}
          <code>${method.contract}</code></p>
        ${method.doc && html`<p class="muted">${method.doc}</p>`}
      </header>
      <${Form} ...${{ schema: method.schema, root: method.root, state, violations, name: method.name }} onChange=${change} />
    <//></div>`;
}

// What all kinds share: a form that is sent, a row of buttons, and beside them what has come of it.
function Frame({ children, onSubmit, buttons, label, after }) {
  const submit = (event) => {
    event.preventDefault();
    onSubmit();
  };
  return html`
    <form class="form" onSubmit=${submit} aria-label=${label}>${children}<div class="buttons">${buttons}</div>${after}</form>`;
}

function Unary({ method, message, result, setResult, running, children }) {
  const [seconds, setSeconds] = useState("");
  const busy = result?.busy;
  const once = async () => {
    setResult({ busy: true });
    setResult(await call(method, message(), seconds));
  };
  const many = async () => {
    const abort = new AbortController();
    running.current = () => abort.abort();
    setResult({ busy: true, spread: { instances: {}, done: 0, times: MANY, failed: 0, latencies: [], ms: 0 } });
    const show = paced((found) => setResult({ busy: true, spread: found }));
    const found = await spread(method, message(), MANY, abort.signal, show);
    show.cancel();
    setResult({ spread: found });
  };
  const buttons = html`
    <button class="primary" disabled=${busy}>Call</button>
    ${method.idempotent && (busy && result.spread
      ? html`<button type="button" onClick=${() => running.current()}>Stop</button>`
      : html`<button type="button" disabled=${busy} onClick=${many}>Send ${MANY.toLocaleString("en")} calls</button>`)}
    <${Deadline} ...${{ seconds, setSeconds }} />`;
  return html`
    <${Frame} label=${method.name} onSubmit=${() => busy || once()} buttons=${buttons} after=${html`<${Curl} ...${{ method, message }} />`}>${children}<//>
    <div class="outcome">
      ${!result ? html`<p class="none">The answer will show here, with the time it took and the instance that gave it.</p>`
        : result.spread ? html`<${Spread} found=${result.spread} />`
        : html`<${Outcome} result=${result} />${result.text && !result.problem && html`<${Json} text=${result.text} />`}`}
    </div>`;
}

function Streamed({ method, message, result, setResult, running, children }) {
  const [seconds, setSeconds] = useState("");
  const [seen, setSeen] = useState({ total: 0, last: [] });
  const busy = result?.busy;
  const start = async () => {
    const abort = new AbortController();
    running.current = () => abort.abort();
    setResult({ busy: true });
    const show = paced((found) => setSeen({ ...found }));
    const found = { total: 0, last: [] };
    setSeen(found);
    const take = (data) => {
      found.last = [...found.last.slice(1 - SHOWN), { n: ++found.total, data }];
      show(found);
    };
    const end = await stream(method, message(), seconds, abort.signal, take);
    show.cancel();
    setSeen({ ...found });
    setResult({ ...end, total: found.total });
  };
  const buttons = html`
    ${/* Keys: else the button would turn into the other one under the click, and send the form. */ ""}
    ${busy ? html`<button key="stop" type="button" class="primary" onClick=${() => running.current()}>Stop</button>` : html`<button key="start" class="primary">Start</button>`}
    <${Deadline} ...${{ seconds, setSeconds }} />`;
  return html`
    <${Frame} label=${method.name} onSubmit=${() => busy || start()} buttons=${buttons} after=${html`<${Curl} ...${{ method, message }} flags="-N " />`}>${children}<//>
    <div class="outcome">
      ${!result && html`<p class="none">What the stream brings will show here, until it ends or you stop it.</p>`}
      ${result && html`<${Outcome} result=${result} busy="streaming" total=${result.total} />`}
      ${seen.total > 0 && html`
        <p class="muted count">${count(seen.total, "message")}${seen.total > SHOWN ? `, the last ${SHOWN} of them:` : ""}</p>
        <ol class="messages" tabindex="0" aria-label="Messages of the stream, the newest first">
          ${[...seen.last].reverse().map(({ n, data }) => html`<li key=${n}><span class="muted">${n.toLocaleString("en")}</span><code>${data}</code></li>`)}
        </ol>`}
    </div>`;
}

function Chat({ method, message, result, setResult, running, clear, children }) {
  const [said, setSaid] = useState([]);
  const session = useRef(null);
  const [waiting, setWaiting] = useState(false); // for the service's last words
  const [box, log] = [useRef(), useRef()];
  const busy = result?.busy;
  const add = (who, data) => setSaid((before) => [...before.slice(1 - SHOWN), { who, data, at: new Date() }]);
  useEffect(() => log.current?.scrollTo(0, log.current.scrollHeight), [said]);
  const send = () => {
    const body = message();
    const deliver = () => {
      session.current.send(body);
      add("you", body);
    };
    if (busy) deliver();
    else {
      setSaid([]);
      setWaiting(false);
      setResult({ busy: true });
      session.current = open(method, deliver, (data) => add("service", data), (end) => setResult(end));
      running.current = session.current.stop;
    }
    clear();
    box.current.querySelector("input, select, textarea")?.focus();
  };
  const finish = () => {
    setWaiting(true);
    session.current.finish();
  };
  const buttons = html`
    <button class="primary" disabled=${busy && waiting}>Send</button>
    ${busy && html`<button type="button" disabled=${waiting} onClick=${finish}>Finish</button><button type="button" onClick=${() => running.current()}>Stop</button>`}`;
  return html`
    <div class="contents" ref=${box}>
      <${Frame} label=${method.name} onSubmit=${send} buttons=${buttons}>${children}<//>
      <div class="outcome">
        ${!result && html`<p class="none">Each message that you send will show here, and each answer. The first one opens the stream; Finish ends your side of it.</p>`}
        ${said.length > 0 && html`
          <div class="chat" role="log" tabindex="0" aria-label="What was said" ref=${log}>
            <ol>${said.map(({ who, data, at }, n) => html`
              <li key=${n} class=${who}><span class="hidden">${who}:</span><code>${data}</code><time>${at.toLocaleTimeString("en-GB")}</time></li>`)}
            </ol>
          </div>`}
        ${result && html`<${Outcome} result=${result} busy=${waiting ? "waiting for the service's last words" : "open"} />`}
      </div>
    </div>`;
}

function Outcome({ result, busy = "waiting", total }) {
  const { problem, status, ms, instance, trace, stopped } = result;
  const head = result.busy ? html`<p class="status"><i class="dot busy" />${busy} …</p>`
    : stopped ? html`<p class="status"><i class="dot still" />stopped${total !== undefined && ` after ${count(total, "message")}`}</p>`
    : problem ? html`<p class="status bad"><i class="dot" />${problem.status ?? ""} ${problem.title}</p>`
    : html`<p class="status good"><i class="dot" />${status} OK</p>`;
  return html`
    <div role="status" class="result">
      ${head}
      ${!result.busy && html`
        <p class="facts"><span>${ms < 10 ? ms.toFixed(1) : Math.round(ms).toLocaleString("en")} ms</span>
          ${instance && html`<span>answered by <b class="by">${instance}</b></span>`}
          ${trace && html`<span class="trace" title="the call's trace, as logs and traces of all services have it">trace <code>${trace}</code></span>`}</p>`}
      ${problem && html`
        <div class="problem">
          ${problem.code && html`<code>${problem.code}</code>`}
          <p>${problem.detail}</p>
          <ul>${(problem.violations ?? []).filter(({ description }) => !problem.detail.includes(description)).map(({ field, description }) => html`
            <li><code>${field}</code> ${description}</li>`)}</ul>
        </div>`}
    </div>`;
}

function Spread({ found }) {
  const rows = Object.entries(found.instances).sort(([a], [b]) => a.localeCompare(b, "en", { numeric: true }));
  const most = Math.max(1, ...Object.values(found.instances));
  const sorted = [...found.latencies].sort((a, b) => a - b);
  const at = (share) => `${(sorted[Math.floor((sorted.length - 1) * share)] ?? 0).toFixed(1)} ms`;
  const over = found.over;
  return html`
    <div class="spread">
      <p class=${found.failed ? "status bad" : over ? "status good" : "status"} role="status">
        <i class=${over ? "dot" : "dot busy"} />${over ? `${count(found.done, "call")}, ${found.failed || "none"} failed` : `sending ${found.times.toLocaleString("en")} calls …`}</p>
      <ul>
        ${rows.map(([instance, calls]) => html`
          <li key=${instance}><span class="by">${instance}</span>
            <span class="bar"><i style=${{ width: `${(calls / most) * 100}%` }} /></span><b>${calls.toLocaleString("en")}</b></li>`)}
      </ul>
      <p class="facts"><span>${found.done.toLocaleString("en")} in ${(found.ms / 1000).toFixed(1)} s</span>
        <span>${found.ms ? Math.round((found.done / found.ms) * 1000).toLocaleString("en") : 0} calls/s</span>
        <span>half within ${at(0.5)}</span><span>95 % within ${at(0.95)}</span></p>
      ${found.problem && html`<div class="problem"><p>${found.problem.title}: ${found.problem.detail}</p></div>`}
    </div>`;
}

// JSON laid out over lines, its parts told apart by colour.
function Json({ text }) {
  const parts = pretty(text).split(/("(?:[^"\\]|\\.)*"(?:\s*:)?|-?\d[\d.eE+-]*|true|false|null)/);
  const kind = (part) => (/^".*:$/s.test(part) ? "key" : part[0] === '"' ? "text" : "value");
  return html`<pre class="json" tabindex="0" aria-label="Answer"><code>${parts.map((part, n) => (n % 2 ? html`<span class=${kind(part)}>${part}</span>` : part))}</code></pre>`;
}

function Deadline({ seconds, setSeconds }) {
  return html`
    <label class="deadline">within <input inputmode="decimal" placeholder="5" value=${seconds} onInput=${(event) => setSeconds(event.target.value.trim())} /> s</label>`;
}

function Curl({ method, message, flags = "" }) {
  const [shown, show] = useState(false);
  const line = () => `curl ${flags}${location.origin}${method.path} -H 'content-type: application/json' -d '${message().replaceAll("'", "'\\''")}'`;
  return html`
    <details class="curl" onToggle=${(event) => show(event.target.open)}><summary>As a command</summary>${shown && html`<pre tabindex="0"><code>${line()}</code></pre>`}</details>`;
}

// Calls a function now and then only, with the newest that there is: drawing costs more than what is drawn.
function paced(draw) {
  let timer, newest;
  const show = (found) => {
    newest = found;
    timer ??= setTimeout(() => {
      timer = undefined;
      draw(newest);
    }, PACE);
  };
  show.cancel = () => clearTimeout(timer);
  return show;
}
