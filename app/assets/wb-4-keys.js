// Keyboard, search in the text, play over time, colour scheme.
(function () {
  "use strict";
  const facts = workbench.facts;
  const step = (changes) => workbench.change(changes, { replace: true });
  const clamp = (value, size) => Math.max(0, Math.min(value, size - 1));

  function moveToken(by) {
    const total = facts.tokens.length;
    if (!total) return;
    const from = workbench.query() ?? total - 1;
    const to = clamp(from + by, total);
    step({ q: to, t: null });
    workbench.say(`token ${workbench.describeToken(to)}`);
    const active = document.activeElement;
    if (active && active.classList.contains("token")) {
      active.closest("[data-strip]").querySelector(`[data-token="${to}"]`)?.focus({ preventScroll: false });
    }
  }
  function moveLayer(by) {
    const layer = clamp((workbench.number("layer") || 0) + by, facts.heads.length);
    step({ layer: layer || null });
    workbench.say(`layer ${layer}`);
  }
  function moveHead(by) {
    const layer = workbench.number("layer") || 0;
    const head = clamp((workbench.number("head") || 0) + by, facts.heads[layer] || 1);
    step({ head: head || null });
    workbench.say(`head ${head}`);
  }

  const dialogOpen = () => document.querySelector("[role=dialog]");
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const target = event.target;
    const typing = target.closest && target.closest("input, textarea, select, [role=slider], [role=listbox], [role=radiogroup], [role=menu], .ag-root, [contenteditable=true]");
    if (event.key === "Escape") {
      if (target.id === "token-search") closeSearch();
      else if (!dialogOpen() && !typing) step({ q: null, k: null, t: null, rows: null, cols: null });
      return;
    }
    if (typing || dialogOpen()) return;
    const actions = {
      ArrowLeft: () => moveToken(-1), ArrowRight: () => moveToken(1),
      ArrowUp: () => moveLayer(1), ArrowDown: () => moveLayer(-1),
      "[": () => moveHead(-1), "]": () => moveHead(1),
      "/": openSearch, "?": () => window.dash_clientside.set_props("help", { opened: true }),
    };
    if (actions[event.key] && (facts.tokens.length || event.key === "?")) { event.preventDefault(); actions[event.key](); }
  });

  // ---- search --------------------------------------------------------------------------------------------------------

  let found = [];
  // Matches may run over several tokens (a byte-level text has one letter per token); the token where each begins is kept.
  function findAll(text) {
    if (!text) return [];
    const whole = facts.tokens.join("").toLowerCase(), starts = [], wanted = text.toLowerCase();
    let at = 0;
    for (const token of facts.tokens) { starts.push(at); at += token.length; }
    const hits = [];
    for (let place = whole.indexOf(wanted); place >= 0 && hits.length < 1000; place = whole.indexOf(wanted, place + 1)) {
      let low = 0, high = starts.length - 1;
      while (low < high) { const middle = (low + high + 1) >> 1; if (starts[middle] <= place) low = middle; else high = middle - 1; }
      if (hits[hits.length - 1] !== low) hits.push(low);
    }
    return hits;
  }
  function openSearch() {
    document.getElementById("strip-search")?.classList.add("is-open");
    const input = document.getElementById("token-search");
    input?.focus();
    input?.select();
  }
  function closeSearch() {
    document.getElementById("strip-search")?.classList.remove("is-open");
    document.getElementById("token-search")?.blur();
    const label = document.getElementById("strip-found");
    if (label) label.textContent = "";
    document.querySelectorAll(".token.is-found").forEach((each) => each.classList.remove("is-found"));
  }
  function showFound(input) {
    found = findAll(input.value);
    const label = document.getElementById("strip-found");
    if (label) label.textContent = input.value ? `${found.length} found` : "";
    document.querySelectorAll(".token.is-found").forEach((each) => each.classList.remove("is-found"));
    for (const index of found) document.querySelectorAll(`[data-token="${index}"]`).forEach((each) => each.classList.add("is-found"));
  }
  document.addEventListener("input", (event) => { if (event.target.id === "token-search") showFound(event.target); });
  document.addEventListener("keydown", (event) => {
    if (event.target.id !== "token-search" || event.key !== "Enter") return;
    showFound(event.target);
    if (!found.length) return;
    const here = workbench.query() ?? -1;
    const next = event.shiftKey ? [...found].reverse().find((index) => index < here) : found.find((index) => index > here);
    const to = next ?? (event.shiftKey ? found[found.length - 1] : found[0]);
    step({ q: to, t: null });
    workbench.say(`found at token ${to}`);
  });

  // ---- buttons that only move the view -------------------------------------------------------------------------------

  let timer = null;
  function stopPlaying() {
    clearInterval(timer);
    timer = null;
    document.querySelectorAll("[data-action=play]").forEach((each) => {
      each.setAttribute("aria-pressed", "false");
      each.querySelector(".icon").className = "icon icon-play";
    });
  }
  function play(button) {
    if (timer) return stopPlaying();
    const total = facts.tokens.length;
    if (workbench.position() >= total - 1) step({ t: 0 });
    button.setAttribute("aria-pressed", "true");
    button.querySelector(".icon").className = "icon icon-pause";
    const slow = matchMedia("(prefers-reduced-motion: reduce)").matches;
    timer = setInterval(() => {
      if (document.querySelector(".graph[data-dash-is-loading=true]")) return; // the server is still drawing the last step
      const next = workbench.position() + 1;
      if (next >= total || !document.body.contains(button)) return stopPlaying();
      step({ t: next });
    }, slow ? 1500 : 250);
  }

  const ACTIONS = {
    play,
    step: (button) => { stopPlaying(); step({ t: clamp(workbench.position() + Number(button.dataset.by), facts.tokens.length) }); },
    compare: () => workbench.change({ t2: workbench.params().has("t2") ? null : workbench.position() }),
    "compare-here": () => workbench.change({ t2: workbench.position() }),
    untrack: (button) => workbench.toggleTracked(button.dataset.entry),
    "whole-map": () => workbench.change({ rows: null, cols: null }),
    "whole-shared": () => workbench.change({ urows: null, ucols: null }),
    "whole-state": () => workbench.change({ srows: null, scols: null }),
    near: () => {
      const total = facts.tokens.length, half = 24;
      const around = (centre) => { const start = clamp(centre - half, Math.max(1, total - 2 * half)); return `${start}-${Math.min(total, start + 2 * half)}`; };
      const query = workbench.query() ?? total - 1;
      workbench.change({ rows: around(query), cols: around(workbench.number("k") ?? query) });
    },
    search: openSearch,
    "strip-open": (button) => {
      const open = button.closest(".strip-bar").classList.toggle("is-open");
      button.setAttribute("aria-expanded", String(open));
    },
    help: () => window.dash_clientside.set_props("help", { opened: true }),
    "copy-link": () => navigator.clipboard?.writeText(location.href).then(() => workbench.say("Link copied."), () => {}),
    scheme: () => {
      const dark = document.documentElement.getAttribute("data-mantine-color-scheme") === "dark";
      const scheme = dark ? "light" : "dark";
      document.documentElement.setAttribute("data-mantine-color-scheme", scheme);
      document.cookie = `workbench_scheme=${scheme}; path=/; max-age=31536000; SameSite=Strict`;
      window.dash_clientside.set_props("mantine", { forceColorScheme: scheme });
      window.dash_clientside.set_props("scheme", { data: scheme });
    },
  };
  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-action]");
    if (button && ACTIONS[button.dataset.action]) { ACTIONS[button.dataset.action](button); return; }
    // Links of the navigation change the page without loading it anew.
    const anchor = event.target.closest("a.nav-link, a.in-app");
    if (anchor && !event.ctrlKey && !event.metaKey && !event.shiftKey && event.button === 0) {
      event.preventDefault();
      history.pushState({}, "", anchor.getAttribute("href"));
      window.dispatchEvent(new PopStateEvent("popstate"));
      window.scrollTo(0, 0);
    }
  });
})();
