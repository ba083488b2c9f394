// JSON whose numbers stay what they are: a double holds no integer beyond 2^53.

export const number = (text) => {
  const value = Number(text);
  if (String(value) === text) return value;
  return JSON.rawJSON && isNumber(text) ? JSON.rawJSON(text) : text;
};

export const parse = (text) => JSON.parse(text, (_, value, context) =>
  typeof value === "number" && context ? number(context.source) : value);

// Laid out over lines; a text that is no JSON is returned as it is.
export function pretty(text) {
  try {
    return JSON.stringify(parse(text), null, 2);
  } catch {
    return text;
  }
}

const isNumber = (text) => /^-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?$/.test(text);
