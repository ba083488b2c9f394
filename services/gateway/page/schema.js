// What a JSON Schema asks for, as far as a form has to know, and what has been typed in as JSON.
//
// A form's state is a tree like the message: texts for single values ("" where there is none), arrays, and objects, in
// which ONEOF with the first field of a group holds the one that is chosen.

import { number, parse } from "./exact.js";

export const ONEOF = "oneof ";

// Returns { kind, schema, ... }: of an "object" its fields by name and the groups of fields of which one may be set; of
// an "array" and a "map" the schema of what is in it; of an "enum" the options.
export function shape(schema, root) {
  const found = whole(schema, root);
  const kind = (type) => [found.type].flat().includes(type);
  if (found.properties || found.allOf) return object(found);
  if (kind("array") && kind("object")) return { kind: "json", schema: found };
  if (kind("array")) return { kind: "array", schema: found, items: found.items ?? {} };
  if (found.enum && !kind("boolean")) return { kind: "enum", schema: found, options: names(found.enum) };
  if (kind("boolean")) return { kind: "boolean", schema: found };
  if (kind("integer")) return { kind: "integer", schema: found };
  if (kind("number")) return { kind: "number", schema: found };
  if (kind("string")) return { kind: "string", schema: found };
  if (kind("object") && typeof found.additionalProperties === "object")
    return { kind: "map", schema: found, items: found.additionalProperties };
  if (kind("object")) return object(found);
  return { kind: "json", schema: found };
}

// Of what an enum may be given as, the names rather than the numbers.
const names = (options) => {
  const texts = options.filter((each) => typeof each === "string");
  return texts.length ? texts : options.filter((each) => each !== null);
};

// Follows references, and chooses the most telling of alternatives: a number rather than the text that also stands for it.
function whole(schema, root) {
  let found = schema;
  for (let n = 0; found.$ref && n < 16; n++) {
    const { $ref, ...beside } = found;
    found = { ...$ref.slice(2).split("/").reduce((at, name) => at?.[name.replaceAll("~1", "/").replaceAll("~0", "~")], root), ...beside };
  }
  const options = (found.anyOf ?? found.oneOf)?.map((each) => whole(each, root)).filter((each) => each.type !== "null");
  if (!options?.length || found.properties) return found;
  if (options.filter((each) => each.properties).length > 1) return { description: found.description };
  const named = (option) => option.enum && !option.enum.includes("NaN");
  const order = [(o) => o.properties, (o) => o.type === "array", named, (o) => o.type === "boolean",
    (o) => [o.type].flat().includes("integer"), (o) => [o.type].flat().includes("number"), () => true];
  const best = order.map((fits) => options.find(fits)).find(Boolean);
  return { ...best, description: found.description ?? best.description, title: found.title ?? best.title };
}

function object(schema) {
  const properties = Object.entries(schema.properties ?? {}).filter(([, each]) => !each.deprecated);
  const fields = Object.fromEntries(properties);
  // Of a oneof's fields, none or one is there: the schema has an alternative for none, and one for each.
  const rules = [schema, ...(schema.allOf ?? [])].map((part) => part.oneOf).filter(Boolean);
  const groups = rules.map(([none, ...some]) => ({
    name: none.title ?? "",
    members: some.flatMap((each) => each.required ?? []).filter((each) => fields[each]),
  }));
  return { kind: "object", schema, fields, groups: groups.filter(({ members }) => members.length), required: schema.required ?? [] };
}

export const typeName = ({ kind, schema }) =>
  schema.format ?? { boolean: "bool", json: "any JSON", enum: "one of", object: "message" }[kind] ?? kind;

export function empty(form) {
  return { object: {}, array: [], map: [] }[form.kind] ?? "";
}

// Returns what a state stands for; undefined for what has not been filled in. Whether it is right is the gateway's to say.
export function encode(form, state, root, wanted = false) {
  switch (form.kind) {
    case "object": {
      const chosen = form.groups.map(({ members }) => state?.[ONEOF + members[0]]);
      const found = {};
      for (const [name, schema] of Object.entries(form.fields)) {
        const group = form.groups.findIndex(({ members }) => members.includes(name));
        if (group >= 0 && chosen[group] !== name) continue;
        const field = shape(schema, root);
        const value = encode(field, state?.[name] ?? (group >= 0 ? empty(field) : undefined), root, group >= 0 || form.required.includes(name));
        if (value !== undefined) found[name] = value;
      }
      return state === undefined ? undefined : found;
    }
    case "array": {
      const items = shape(form.items, root);
      return state?.length || wanted ? (state ?? []).map((each) => encode(items, each, root, true)) : undefined;
    }
    case "map": {
      const items = shape(form.items, root);
      return state?.length || wanted
        ? Object.fromEntries((state ?? []).map(([name, each]) => [name, encode(items, each, root, true)])) : undefined;
    }
    case "string":
      return state || wanted ? state ?? "" : undefined;
    case "integer":
    case "number":
      return state?.trim() ? number(state.trim()) : wanted ? 0 : undefined;
    case "boolean":
      return state ? state === "true" : wanted ? false : undefined;
    case "enum":
      return state ? form.options.find((each) => String(each) === state) : wanted ? form.options[0] : undefined;
    default:
      try {
        return state?.trim() ? parse(state) : undefined;
      } catch {
        return state;
      }
  }
}

// The path of a field, written the same way whoever names it: p.weight, score[1], pageToken for page_token.
export const samePath = (path) =>
  path.replace(/^[/$.]+/, "").replace(/\[["']?([^\]"']*)["']?\]/g, ".$1").replaceAll("/", ".").replace(/_+([a-z0-9])/g, (_, letter) => letter.toUpperCase());
