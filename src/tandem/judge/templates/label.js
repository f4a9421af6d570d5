"use strict";
(() => {
  const { key, pairs } = JSON.parse(document.getElementById("data").textContent);
  const store = `tandem-labels-${key}`;
  const find = (id) => document.getElementById(id);
  const read = () => { try { return JSON.parse(localStorage.getItem(store)) || {}; } catch { return {}; } };
  const state = Object.assign({ verdicts: [], annotator: "" }, read());
  let at = Math.min(state.verdicts.length, Math.max(pairs.length - 1, 0));

  const keep = () => { try { localStorage.setItem(store, JSON.stringify(state)); } catch { /* a private window */ } };

  function turn(message) {
    const block = document.createElement("div");
    block.className = "turn";
    const role = document.createElement("b");
    role.textContent = message.role;
    const text = document.createElement("div");
    text.className = "text";
    text.textContent = message.content;
    block.append(role, text);
    return block;
  }

  function show() {
    const done = state.verdicts.length, pair = pairs[at];
    find("pair").hidden = !pair;
    find("back").disabled = at === 0;
    find("save").disabled = done === 0;
    for (const button of document.querySelectorAll("[data-verdict]")) {
      button.disabled = !pair;
      button.setAttribute("aria-pressed", String(state.verdicts[at] === button.dataset.verdict));
    }
    if (!pair) return;
    const finished = done === pairs.length ? " That was the last one: save the labels." : "";
    find("where").textContent = `Pair ${at + 1} of ${pairs.length}; ${done} labelled.${finished}`;
    find("turns").replaceChildren(...pair.messages.map(turn));
    find("answer-a").textContent = pair.answers[0] || "(empty)";
    find("answer-b").textContent = pair.answers[1] || "(empty)";
  }

  function choose(verdict) {
    if (!pairs[at]) return;
    state.verdicts[at] = verdict;
    find("saved").textContent = "";
    keep();
    if (at < pairs.length - 1) at += 1;
    show();
    window.scrollTo(0, 0);
    find("where").focus({ preventScroll: true });
  }

  function save() {
    const lines = state.verdicts.map((verdict, index) => JSON.stringify({
      prompt_id: pairs[index].prompt_id, verdict,
      a: pairs[index].digests[0], b: pairs[index].digests[1], annotator: state.annotator,
    }) + "\n");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
    link.download = "human_labels.jsonl";
    link.click();
    find("saved").textContent = `${lines.length} labels saved as human_labels.jsonl: give that file to judge.py as --human_labels.`;
  }

  for (const button of document.querySelectorAll("[data-verdict]")) {
    button.addEventListener("click", () => choose(button.dataset.verdict));
  }
  find("back").addEventListener("click", () => { at = Math.max(at - 1, 0); show(); });
  find("save").addEventListener("click", save);
  find("annotator").value = state.annotator;
  find("annotator").addEventListener("input", (event) => { state.annotator = event.target.value; keep(); });
  document.addEventListener("keydown", (event) => {
    // A key that is held down must not label one pair after another
    if (event.repeat || event.target === find("annotator") || event.ctrlKey || event.metaKey || event.altKey) return;
    const verdict = { a: "A", b: "B", n: "tie" }[event.key.toLowerCase()];
    if (verdict) choose(verdict);
  });
  show();
})();
