// The page: what runs now, and a form for each method.

import { html, render, useEffect, useState } from "./vendor/htm-preact.mjs";
import { methods as described } from "./calls.js";
import { useLive } from "./follow.js";
import { Map } from "./map.js";
import { Method } from "./method.js";
import { count, rate } from "./units.js";

const SETTLED = 2000; // ms after a change by which the gateway has asked a new service for its methods

function Page() {
  const live = useLive();
  const services = live.services;
  const { methods, failed } = useMethods(services);
  const chosen = useHash();
  const method = methods?.find(({ name }) => name === chosen) ?? methods?.find(({ name }) => name === "sum.Add") ?? methods?.[0];
  const choose = (service) => {
    const first = methods?.find((each) => each.service === service);
    return first && `#${first.name}`;
  };
  return html`
    <a class="skip" href="#call">Skip to the methods</a>
    <header class="top">
      <div class="brand"><img src="/page/icon.svg" alt="" width="28" height="28" /><h1>Rollcall</h1></div>
      <p class=${live.connected ? "state" : "state lost"} role="status"><i class="dot" />${live.connected ? "live" : services ? "connection lost, trying again" : "connecting"}</p>
      <nav aria-label="Elsewhere">
        <a href="/docs">API</a>
        ${live.consul && html`<a href=${live.consul} target="_blank" rel="noreferrer">Consul<span aria-hidden="true"> ↗</span></a>`}
      </nav>
    </header>
    <main>
      <section aria-labelledby="services" class=${live.connected ? "" : "stale"}>
        <div class="title"><h2 id="services">Services</h2>${services && html`<${Summary} services=${services} />`}<a class="jump" href="#call">Call a method <span aria-hidden="true">↓</span></a></div>
        ${!services ? html`<p class="none">${live.connected === false && "Waiting for the gateway …"}</p>`
          : services.length === 0 ? html`<p class="none">Nothing is registered. Start a service, and it will show here.</p>`
          : html`<${Map} services=${services} rates=${live.rates} choose=${choose} />`}
        <div role="log" aria-label="What has changed">
          <ul class="events">${live.events.map(({ id, at, what, good }) => html`
            <li key=${`${at.getTime()} ${id} ${what}`} class=${good ? "" : "bad"}><time>${at.toLocaleTimeString("en-GB")}</time> <b>${id}</b> ${what}</li>`)}
          </ul>
        </div>
      </section>
      <section aria-labelledby="call" class="call">
        <div class="title"><h2 id="call" tabindex="-1">Call a method</h2></div>
        ${method ? html`
          <div class="bench">
            <${Menu} methods=${methods} chosen=${method} />
            <${Method} key=${method.name} method=${method} />
          </div>`
          : html`<p class="none">${failed || (methods ? "There is no public service to call." : "Asking for the methods …")}</p>`}
      </section>
    </main>`;
}

function Summary({ services }) {
  const all = services.flatMap((service) => service.instances);
  const passing = all.filter((each) => each.passing).length;
  return html`
    <p class="summary">
      ${count(services.length, "service")} · <span class=${passing < all.length ? "bad" : ""}>${passing === all.length ? `all ${count(all.length, "instance")} passing` : `${passing} of ${count(all.length, "instance")} passing`}</span>
      ${" · "}${rate(all.reduce((sum, each) => sum + (each.rate ?? 0), 0))} calls/s
    </p>`;
}

function Menu({ methods, chosen }) {
  const services = [...new Set(methods.map(({ service }) => service))];
  return html`
    <nav class="menu" aria-label="Methods">
      ${services.map((service) => html`
        <div key=${service}>
          <h3>${service}</h3>
          <ul>${methods.filter((each) => each.service === service).map((each) => html`
            <li key=${each.name}><a href=${`#${each.name}`} aria-current=${each === chosen ? "true" : undefined}>${each.method}</a></li>`)}
          </ul>
        </div>`)}
    </nav>`;
}

// The methods, asked for again when another set of services or versions runs, and once more when the gateway has settled.
function useMethods(services) {
  const [found, setFound] = useState({ methods: null, failed: "" });
  const what = services?.filter((each) => each.public).map(({ name, instances }) => `${name} ${instances.map(({ id, address }) => id + address)}`).join();
  useEffect(() => {
    const ask = () => described().then(
      (methods) => setFound({ methods, failed: "" }),
      (error) => setFound((before) => ({ ...before, failed: `The methods are not known: ${error.message}` })),
    );
    ask();
    const timer = setTimeout(ask, SETTLED);
    return () => clearTimeout(timer);
  }, [what]);
  return found;
}

function useHash() {
  const now = () => decodeURIComponent(location.hash.slice(1));
  const [hash, setHash] = useState(now);
  useEffect(() => {
    const changed = () => setHash((before) => (now() === "call" ? before : now()));
    addEventListener("hashchange", changed);
    return () => removeEventListener("hashchange", changed);
  }, []);
  return hash;
}

render(html`<${Page} />`, document.body);
