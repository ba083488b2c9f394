// A form for a message, whatever it is made of.

import { createContext, html, useContext, useLayoutEffect, useRef } from "./vendor/htm-preact.mjs";
import { ONEOF, empty, samePath, shape, typeName } from "./schema.js";

const Around = createContext();

// `root` is what the schema's references are relative to, `violations` what was said to be wrong, by field.
export function Form({ schema, root, state, onChange, violations, name }) {
  const wrong = {};
  for (const { field, description } of violations ?? []) wrong[samePath(field)] = description;
  const form = shape(schema, root);
  return html`
    <${Around.Provider} value=${{ root, wrong }}>
      ${form.kind === "object"
        ? html`<${Fields} form=${form} state=${state} set=${onChange} path="" id=${name} />
            ${Object.keys(form.fields).length === 0 && html`<p class="muted">Its message has no fields.</p>`}`
        : html`<${Field} label=${schema.title ?? "value"} schema=${schema} state=${state} set=${onChange} path="" id=${name} root />`}
    <//>`;
}

function Fields({ form, state, set, path, id }) {
  const grouped = form.groups.flatMap(({ members }) => members);
  const field = (name, label = name) => html`
    <${Field} key=${name} label=${label} schema=${form.fields[name]} state=${state[name]} path=${path ? `${path}.${name}` : name}
      id=${`${id}-${name}`} chosen=${grouped.includes(name)} set=${(value) => set({ ...state, [name]: value })} />`;
  const choice = ({ name, members }) => {
    const [key, chosen] = [ONEOF + members[0], state[ONEOF + members[0]] ?? ""];
    const option = (member) => html`
      <label class="option"><input type="radio" name=${`${id}-${key}`} checked=${chosen === member}
        onChange=${() => set({ ...state, [key]: member })} />${member || "none"}</label>`;
    return html`
      <fieldset class="choice" key=${key}>
        <legend>${name || members.join(", ")} <span class="type">one of</span></legend>
        <div class="options">${["", ...members].map(option)}</div>
        ${chosen && field(chosen)}
      </fieldset>`;
  };
  const first = (name) => form.groups.find(({ members }) => members[0] === name);
  return html`
    <div class="fields">
      ${Object.keys(form.fields).map((name) => (grouped.includes(name) ? first(name) && choice(first(name)) : field(name)))}
    </div>`;
}

function Field({ label, schema, state, set, path, id, chosen, root: isRoot }) {
  const { root } = useContext(Around);
  const form = shape(schema, root);
  if (form.kind === "array" || form.kind === "map") return html`<${Items} ...${{ form, label, state, set, path, id }} />`;
  if (form.kind !== "object") return html`<${Value} ...${{ form, label, state, set, path, id }} />`;
  // A message within a message is there or not, and may be one of its own kind: it is shown once it has been added.
  if (state === undefined && !isRoot && !chosen)
    return html`
      <div class="field">
        <span class="label">${label} <span class="type">message</span></span>
        <button type="button" class="add" onClick=${() => set({})}>Add ${label}</button>
        <${Wrong} path=${path} id=${id} />
      </div>`;
  return html`
    <fieldset class="message">
      <legend>${label} <span class="type">message</span></legend>
      <${Fields} form=${form} state=${state ?? {}} set=${set} path=${path} id=${id} />
      <${Wrong} path=${path} id=${id} />
      ${!chosen && html`<button type="button" class="add" onClick=${() => set(undefined)}>Remove ${label}</button>`}
    </fieldset>`;
}

function Items({ form, label, state = [], set, path, id }) {
  const { root } = useContext(Around);
  const items = shape(form.items, root);
  const single = !["object", "array", "map", "json"].includes(items.kind);
  const isMap = form.kind === "map";
  const [box, added] = [useRef(), useRef(false)];
  useLayoutEffect(() => {
    if (added.current) [...box.current.querySelectorAll("input, select, textarea")].at(isMap ? -2 : -1)?.focus();
    added.current = false;
  });
  const replace = (n, value) => set(state.map((each, m) => (m === n ? value : each)));
  const remove = (n) => {
    set(state.filter((_, m) => m !== n));
    box.current.querySelector(":scope > .add").focus();
  };
  const add = () => {
    added.current = true;
    set([...state, isMap ? ["", empty(items)] : empty(items)]);
  };
  return html`
    <fieldset class=${single && !isMap ? "items single" : "items"} ref=${box}>
      <legend>${label} <span class="type">${isMap ? "map of" : "repeated"} ${typeName(items)}</span></legend>
      <div class="list">
        ${state.map((each, n) => html`
          <div class="item" key=${n}>
            ${isMap && html`<input aria-label=${`key ${n + 1} of ${label}`} value=${each[0]} onInput=${(event) => replace(n, [event.target.value, each[1]])} />`}
            <${Field} label=${`${label} ${n + 1}`} schema=${form.items} state=${isMap ? each[1] : each} id=${`${id}-${n}`} chosen
              path=${isMap ? `${path}.${each[0]}` : `${path}[${n}]`} set=${(value) => replace(n, isMap ? [each[0], value] : value)} />
            <button type="button" class="remove" aria-label=${`Remove ${label} ${n + 1}`} onClick=${() => remove(n)}>×</button>
          </div>`)}
      </div>
      <button type="button" class="add" onClick=${add}>Add ${label}</button>
      <${Wrong} path=${path} id=${id} />
    </fieldset>`;
}

function Value({ form, label, state = "", set, path, id }) {
  const { wrong } = useContext(Around);
  const violated = wrong[samePath(path)];
  const common = {
    id, value: state, "aria-invalid": violated ? "true" : undefined, "aria-describedby": violated ? `${id}-wrong` : undefined,
    onInput: (event) => set(event.target.value),
  };
  const options = form.kind === "boolean" ? [true, false] : form.options;
  const control = options
    ? html`<select ...${common}><option value="">not set</option>${options.map((each) => html`<option value=${String(each)}>${String(each)}</option>`)}</select>`
    : form.kind === "json" ? html`<textarea ...${common} rows="3" spellcheck=${false} />`
    : html`<input ...${common} type="text" autocomplete="off" spellcheck=${false} inputmode=${{ integer: "numeric", number: "decimal" }[form.kind]} />`;
  return html`
    <div class="field">
      <label class="label" for=${id}>${label} <span class="type">${typeName(form)}</span></label>
      ${control}
      ${["string", "json"].includes(form.kind) && form.schema.description && html`<p class="hint">${form.schema.description}</p>`}
      <${Wrong} path=${path} id=${id} />
    </div>`;
}

function Wrong({ path, id }) {
  const violated = useContext(Around).wrong[samePath(path)];
  return violated && html`<p class="violation" id=${`${id}-wrong`}>${violated}</p>`;
}
