"use strict";
(() => {
  const PAGE = 25;
  const data = JSON.parse(document.getElementById("answers-data").textContent);
  const OUTCOMES = {
    won: `${data.judged_name} won`, lost: `${data.judged_name} lost`, tie: "Tie", disagree: "Orders disagree", unjudged: "Not judged",
  };
  const names = Object.fromEntries(data.labels.map(({ id, name }) => [id, name]));
  const list = document.getElementById("pairs");
  const status = document.getElementById("status");
  const search = document.getElementById("search");
  const buttons = [...document.querySelectorAll("[data-outcome]")];
  const [previous, next] = ["previous", "next"].map((id) => document.getElementById(id));
  const where = document.getElementById("where");
  let outcome = "all", query = "", start = 0, found = [];

  // Model text goes through textContent alone: whatever it holds, it stays text
  function element(tag, className, text) {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function add(parent, tag, className, text) {
    return parent.appendChild(element(tag, className, text));
  }

  const nameOf = (label) => names[label] || label;

  const haystacks = new Map();
  function haystack(row) {
    if (!haystacks.has(row)) {
      const parts = [row.prompt_id, ...row.messages.map((turn) => turn.content), ...Object.values(row.answers),
        ...row.verdicts.map((verdict) => verdict.text)];
      haystacks.set(row, parts.join("\n").toLowerCase());
    }
    return haystacks.get(row);
  }

  function drawTurn(parent, turn) {
    const block = add(parent, "div", "turn");
    add(block, "b", "", turn.role);
    add(block, "div", "text", turn.content);
  }

  function drawPrompt(parent, messages) {
    const earlier = messages.slice(0, -1);
    if (earlier.length > 0) {
      const fold = add(parent, "details");
      fold.style.margin = "0 0 .6rem";
      add(fold, "summary", "", earlier.length === 1 ? "1 earlier turn" : `${earlier.length} earlier turns`);
      earlier.forEach((turn) => drawTurn(fold, turn));
    }
    messages.slice(-1).forEach((turn) => drawTurn(parent, turn));
  }

  // A node is text, or its element's name and its children (report/markdown.py, which knows no other elements)
  const ELEMENTS = new Set(data.elements);
  function addNodes(parent, nodes) {
    for (const node of nodes) {
      if (typeof node === "string") { parent.append(node); continue; }
      const [name, ...children] = node;
      const block = add(parent, ELEMENTS.has(name) ? name : "span");
      if (typeof children[0] === "number") block.setAttribute("start", String(children.shift()));
      addNodes(block, children);
    }
  }

  function drawAnswers(parent, { answers, non_answers: nonAnswers, formatted }) {
    const grid = add(parent, "div", "answers");
    for (const { id, name } of data.labels) {
      if (!(id in answers)) continue;
      const block = add(grid, "div", `answer m-${id}`);
      const title = add(block, "h4", "", name);
      if (id in nonAnswers) add(title, "span", "mark", data.reasons[nonAnswers[id]] || nonAnswers[id]);
      if (id in formatted) addNodes(add(block, "div", "formatted"), formatted[id]);
      else add(block, "div", answers[id] ? "text" : "empty", answers[id] || "(empty)");
    }
  }

  // Long answers are cut to a readable height, which is known only once they are on the page
  function offerMore(article) {
    const texts = [...article.querySelectorAll(".answer :is(.text, .formatted)")];
    if (!texts.some((text) => text.scrollHeight > text.clientHeight + 1)) return;
    const button = element("button", "more", "Show whole answers");
    button.type = "button";
    button.setAttribute("aria-expanded", "false");
    button.addEventListener("click", () => {
      const short = article.classList.toggle("short");
      button.textContent = short ? "Show whole answers" : "Show less";
      button.setAttribute("aria-expanded", String(!short));
    });
    article.querySelector(".answers").after(button);
  }

  function said(verdict) {
    const shown = `${nameOf(verdict.first)} shown first: `;
    if (verdict.status !== "ok") return `${shown}no verdict (${verdict.status})`;
    return shown + (verdict.named === "tie" ? "a tie" : `${nameOf(verdict.named)} is better`);
  }

  function drawVerdicts(parent, verdicts) {
    if (verdicts.length === 0) return;
    const fold = add(parent, "details", "rationales");
    add(fold, "summary", "", "What the judge said in both orders");
    const grid = add(fold, "div", "orders");
    for (const verdict of verdicts) {
      const block = add(grid, "div");
      add(block, "b", "", said(verdict));
      add(block, "div", "text", verdict.text || "No reason given.");
    }
  }

  function drawPair(row) {
    const article = element("article", "pair short");
    article.id = `prompt-${row.number}`;
    const head = add(article, "header");
    add(head, "h3", "", `Prompt ${row.number}`);
    add(head, "span", `outcome ${row.outcome}`, OUTCOMES[row.outcome]);
    add(head, "code", "", row.prompt_id);
    drawPrompt(article, row.messages);
    drawAnswers(article, row);
    drawVerdicts(article, row.verdicts);
    return article;
  }

  function draw() {
    const shown = found.slice(start, start + PAGE);
    list.replaceChildren(...shown.map(drawPair));
    [...list.children].forEach(offerMore);
    const range = `${start + 1} to ${start + shown.length} of ${found.length}`;
    status.textContent = found.length === 0 ? "No prompt matches." : `Prompts ${range}`;
    where.textContent = found.length === 0 ? "" : range;
    previous.disabled = start === 0;
    next.disabled = start + PAGE >= found.length;
  }

  function find() {
    found = data.rows.filter((row) => (outcome === "all" || row.outcome === outcome)
      && (query === "" || haystack(row).includes(query)));
    start = 0;
    draw();
  }

  function choose(wanted) {
    outcome = wanted;
    buttons.forEach((other) => other.setAttribute("aria-pressed", String(other.dataset.outcome === wanted)));
  }

  // #prompt-12, as the list of lost verdicts links to it
  function goToPrompt() {
    const number = Number((/^#prompt-(\d+)$/.exec(location.hash) || [])[1]);
    if (!(number >= 1 && number <= data.rows.length)) return;
    choose("all");
    search.value = query = "";
    find();
    start = Math.floor((number - 1) / PAGE) * PAGE;
    draw();
    const article = document.getElementById(`prompt-${number}`);
    article.querySelectorAll("details.rationales").forEach((fold) => { fold.open = true; });
    article.scrollIntoView();
  }

  function turn(pages) {
    start += pages * PAGE;
    draw();
    document.getElementById("answers").scrollIntoView();
    status.focus({ preventScroll: true });
  }

  // On paper there is no pager: all that is chosen is there, and nothing is folded away
  const unfolded = [];
  window.addEventListener("beforeprint", () => {
    list.replaceChildren(...found.map(drawPair));
    for (const fold of document.querySelectorAll("details:not([open])")) {
      fold.open = true;
      unfolded.push(fold);
    }
  });
  window.addEventListener("afterprint", () => {
    unfolded.splice(0).forEach((fold) => { fold.open = false; });
    draw();
  });

  data.rows.forEach((row, index) => { row.number = index + 1; });
  for (const button of buttons) {
    button.addEventListener("click", () => {
      choose(button.dataset.outcome);
      find();
    });
  }
  let waiting;
  search.addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { query = search.value.trim().toLowerCase(); find(); }, 120);
  });
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  find();
  window.addEventListener("hashchange", goToPrompt);
  goToPrompt();
})();
