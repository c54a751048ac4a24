// The API key: of this tab alone, and sent with every request where there is one.

const NAME = "awq-serve.key";
const field = document.getElementById("key");

field.value = sessionStorage.getItem(NAME) ?? "";
field.addEventListener("input", () => {
  if (field.value) sessionStorage.setItem(NAME, field.value);
  else sessionStorage.removeItem(NAME);
});

/** `fetch` with the key. Rejects with an Error that carries the server's own words where it refuses. */
export async function request(path, options = {}) {
  const headers = { ...options.headers };
  if (field.value) headers.Authorization = `Bearer ${field.value}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  let message = `${answer.status} ${answer.statusText}`;
  try {
    message = (await answer.json()).error.message ?? message;
  } catch {
    // Something between here and the server answered; the status has to do.
  }
  throw new Error(answer.status === 401 ? `${message} (Settings: API key)` : message);
}

/** Calls `listener` when another key has been entered. */
export function onKeyChange(listener) {
  field.addEventListener("change", listener);
}
