// The map: a card for each service with its instances, callers to the left of what they call, and lines between them.

import { html, useLayoutEffect, useRef, useState } from "./vendor/htm-preact.mjs";
import { key } from "./follow.js";
import { latency, rate } from "./units.js";

const PROTOCOLS = { grpc: "gRPC", jsonrpc: "JSON-RPC", http: "HTTP" };

export function Map({ services, rates, choose }) {
  const { columns, edges } = arrange(services);
  const [lit, light] = useState("");
  const map = useRef();
  const places = usePlaces(map);
  const busy = (name) => services.find((each) => each.name === name).instances.some((each) => each.rate);
  const card = (service) => html`
    <${Service} key=${service.name} ...${{ service, rates, choose, light }} alone=${!edges.some((edge) => touches(edge, service.name))}
      lit=${lit && edges.some((edge) => touches(edge, lit) && touches(edge, service.name))} />`;
  return html`
    <div class="map" ref=${map}>
      <svg class="edges" aria-hidden="true">
        <defs>
          <marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">
            <path d="M1 1 7 4 1 7" fill="none" stroke="context-stroke" stroke-width="1.5" />
          </marker>
        </defs>
        ${places && edges.map((edge) => html`
          <path key=${`${edge.from} ${edge.to}`} d=${line(places, edge)} marker-end="url(#arrow)"
            class=${[lit && (touches(edge, lit) ? "lit" : "dim"), busy(edge.from) && busy(edge.to) && "busy"].filter(Boolean).join(" ")} />`)}
      </svg>
      ${columns.map((column, n) => html`
        <div class="column" key=${n}>
          ${column.map((each) => each.service ? card(each.service) : html`<i class="pass" key=${each.place} data-place=${each.place} />`)}
        </div>`)}
    </div>`;
}

function Service({ service, rates, choose, light, lit, alone }) {
  const { name, protocol, instances, calls } = service;
  const measured = instances.some((each) => each.in_flight !== null);
  const total = instances.reduce((sum, each) => sum + (each.rate ?? 0), 0);
  const most = Math.max(1, ...instances.flatMap((each) => rates[key(each)] ?? []));
  const well = instances.every((each) => each.passing);
  return html`
    <article class=${["service", !well && "ill", lit && "lit", alone && "alone"].filter(Boolean).join(" ")} data-place=${name} aria-label=${name}
      onMouseEnter=${() => light(name)} onMouseLeave=${() => light("")} onFocusIn=${() => light(name)} onFocusOut=${() => light("")}>
      <header>
        <h3>${choose(name) ? html`<a href=${choose(name)}>${name}</a>` : name}</h3>
        ${protocol && html`<span class="tag">${PROTOCOLS[protocol] ?? protocol}</span>`}
        ${!service.public && protocol !== "http" && html`<span class="tag" title="not reachable through the gateway">internal</span>`}
        ${measured && html`<span class="total">${rate(total)}<small>/s</small></span>`}
      </header>
      ${calls.length > 0 && html`<p class="hidden">calls ${calls.join(", ")}</p>`}
      ${measured && html`<div class="heads" aria-hidden="true"><span>calls/s</span><span>err/s</span><span>p95</span></div>`}
      <ul>${instances.map((each) => html`<${Instance} key=${key(each)} instance=${each} rates=${rates[key(each)] ?? []} most=${most} />`)}</ul>
    </article>`;
}

function Instance({ instance, rates, most }) {
  const { id, address, passing, version } = instance;
  const told = (value, unit) => html`<span class="figure">${value}<span class="hidden">${unit}</span></span>`;
  return html`
    <li class=${passing ? "instance" : "instance failing"} data-instance=${id}>
      <details>
        <summary>
          <i class="dot" /><span class="hidden">${passing ? "passing" : "failing"}</span>
          <span class="id" title=${id}>${id}</span>
          ${!passing ? html`<span class="figure bad wide">fails its check</span>` : instance.in_flight !== null && html`
            <${Spark} values=${rates} most=${most} />
            ${told(rate(instance.rate), "calls per second")}
            <span class=${instance.errors ? "figure bad" : "figure"}>${rate(instance.errors)}<span class="hidden">errors per second</span></span>
            ${told(latency(instance.p95), "95th percentile")}`}
        </summary>
        <dl>
          <dt>address</dt><dd>${address}</dd>
          ${version && html`<dt>version</dt><dd>${version}</dd>`}
          ${instance.in_flight !== null && html`
            <dt>in flight</dt><dd>${instance.in_flight}</dd>
            <dt>median</dt><dd>${latency(instance.p50)}</dd>
            <dt>95th percentile</dt><dd>${latency(instance.p95)}</dd>`}
        </dl>
      </details>
    </li>`;
}

function Spark({ values, most }) {
  const [width, height] = [78, 18];
  const points = values.map((value, n) =>
    `${(width - (values.length - 1 - n) * 2).toFixed(1)},${(height - 1 - (value / most) * (height - 3)).toFixed(1)}`);
  return html`
    <svg class="spark" viewBox="0 0 ${width} ${height}" preserveAspectRatio="none" aria-hidden="true">
      ${points.length > 1 && html`
        <polygon points=${`${points[0].split(",")[0]},${height} ${points.join(" ")} ${width},${height}`} />
        <polyline points=${points.join(" ")} />`}
    </svg>`;
}

const touches = (edge, name) => edge.from === name || edge.to === name;

// Who stands where: each service one column to the right of its rightmost caller; those that neither call nor are called
// where there is most room. A line that would cross a column of others gets a place of its own to pass through.
function arrange(services) {
  const byName = new globalThis.Map(services.map((service) => [service.name, service]));
  const edges = services.flatMap((service) =>
    service.calls.filter((to) => byName.has(to) && to !== service.name).map((to) => ({ from: service.name, to, via: [] })));
  const callers = [...new Set(edges.map((edge) => edge.from))];
  for (const edge of edges) edge.lane = callers.indexOf(edge.from) % 3;
  const depth = {};
  const place = (name, path) => {
    if (path.includes(name) || depth[name] >= path.length) return; // a circle, or as far right already
    depth[name] = path.length;
    for (const edge of edges) if (edge.from === name) place(edge.to, [...path, name]);
  };
  const connected = services.filter(({ name }) => edges.some((edge) => touches(edge, name)));
  for (const { name } of connected) place(name, []);
  const columns = [...Array(Math.max(0, ...Object.values(depth)) + 1)].map(() => []);
  for (const service of connected) columns[depth[service.name]].push({ service });
  for (const edge of edges)
    for (let n = depth[edge.from] + 1; n < depth[edge.to]; n++) {
      const passing = `${edge.from} ${edge.to} ${n}`;
      edge.via.push(passing);
      columns[n].push({ place: passing });
    }
  // Those that call on stand in the middle, beside what they call.
  const callsOn = ({ service, place }) => place || edges.some((edge) => edge.from === service.name);
  for (const [n, column] of columns.entries()) {
    const ends = column.filter((each) => !callsOn(each));
    const half = Math.ceil(ends.length / 2);
    columns[n] = [...ends.slice(0, half), ...column.filter(callsOn), ...ends.slice(half)];
  }
  const alone = services.filter((service) => !connected.includes(service));
  while (connected.length ? columns.length < 3 : columns.length < Math.min(3, alone.length)) columns.push([]);
  const rows = (column) => column.reduce((sum, each) => sum + (each.service ? 3 + each.service.instances.length : 0), 0);
  for (const service of alone) columns.reduce((least, column) => (rows(column) < rows(least) ? column : least)).push({ service });
  return { columns, edges };
}

// Where the cards are, in px from the map's corner; measured again whenever one changes its size.
function usePlaces(map) {
  const [places, setPlaces] = useState(null);
  const known = useRef("");
  const measure = () => {
    const found = { stacked: getComputedStyle(map.current).display === "flex" };
    for (const { dataset, offsetLeft: x, offsetTop: y, offsetWidth: width, offsetHeight: height } of map.current.querySelectorAll("[data-place]"))
      found[dataset.place] = { x, y, width, height };
    const text = JSON.stringify(found);
    if (text !== known.current) setPlaces(found);
    known.current = text;
  };
  useLayoutEffect(measure);
  useLayoutEffect(() => {
    const observer = new ResizeObserver(measure);
    observer.observe(map.current);
    map.current.addEventListener("toggle", measure, true);
    return () => observer.disconnect();
  }, []);
  return places;
}

function line(places, { from, to, via, lane }) {
  const [a, b] = [places[from], places[to]];
  if (!a || !b) return "";
  const middle = (place) => place.y + place.height / 2;
  if (places.stacked) {
    // Cards stand in one column: the lines run beside it, each caller's in a lane of its own.
    const x = a.x - 13 - 5 * lane;
    const [start, end] = [a.y + 22, b.y + 22];
    const turn = end > start ? 8 : -8;
    return `M${a.x} ${start}H${x + 8}Q${x} ${start} ${x} ${start + turn}V${end - turn}Q${x} ${end} ${x + 8} ${end}H${b.x - 1}`;
  }
  const stops = [...via.map((name) => places[name]), b].filter(Boolean);
  let [x, y] = [a.x + a.width, middle(a)];
  let path = `M${x} ${y}`;
  for (const stop of stops) {
    const [left, level] = [stop === b ? stop.x - 2 : stop.x, middle(stop)];
    const bend = Math.max(24, (left - x) / 2);
    path += `C${x + bend} ${y} ${left - bend} ${level} ${left} ${level}`;
    if (stop !== b) path += `H${stop.x + stop.width}`;
    [x, y] = [stop.x + stop.width, level];
  }
  return path;
}
