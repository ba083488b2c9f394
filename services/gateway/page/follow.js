// Following /live: what runs now, what it did in the last minute, and what has come and gone.

import { useEffect, useState } from "./vendor/htm-preact.mjs";

const AGAIN = 1000; // ms after which a connection that was lost is made again
const SILENCE = 12000; // ms without a word after which it counts as lost; the gateway says something each 5 s
const REMEMBERED = 40; // rates of each instance
const EVENTS = 6;

export const key = (instance) => `${instance.id} ${instance.address}`;

export function useLive() {
  const [live, setLive] = useState({ connected: false, services: null, rates: {}, events: [], consul: "" });
  useEffect(() => {
    let source, timer;
    const lose = () => {
      source.close();
      clearTimeout(timer);
      timer = setTimeout(connect, AGAIN);
      setLive((before) => ({ ...before, connected: false }));
    };
    const connect = () => {
      source = new EventSource("/live");
      timer = setTimeout(lose, SILENCE);
      source.onerror = lose;
      source.onmessage = ({ data }) => {
        clearTimeout(timer);
        timer = setTimeout(lose, SILENCE);
        setLive((before) => next(before, JSON.parse(data)));
      };
    };
    connect();
    return () => {
      source.close();
      clearTimeout(timer);
    };
  }, []);
  return live;
}

function next(before, { services, consul }) {
  const rates = {};
  for (const instance of services.flatMap((service) => service.instances)) {
    const name = key(instance);
    rates[name] = [...(before.rates[name] ?? []), instance.rate ?? 0].slice(-REMEMBERED);
  }
  const told = before.services ? changes(before.services, services) : [];
  return { connected: true, services, rates, consul, events: [...told, ...before.events].slice(0, EVENTS) };
}

function changes(before, now) {
  const at = new Date();
  const states = (services) =>
    new Map(services.flatMap((service) => service.instances).map((each) => [each.id, each.passing]));
  const [were, are] = [states(before), states(now)];
  const found = [];
  for (const [id, passes] of are) {
    if (!were.has(id)) found.push({ id, at, what: "has come", good: true });
    else if (were.get(id) && !passes) found.push({ id, at, what: "fails its check", good: false });
    else if (!were.get(id) && passes) found.push({ id, at, what: "passes again", good: true });
  }
  for (const id of were.keys()) if (!are.has(id)) found.push({ id, at, what: "has gone", good: false });
  return found;
}
