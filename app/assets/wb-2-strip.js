// Token strips: the run's text as one button per token. A strip is any element with a data-strip attribute; its JSON may
// carry a colour and a value text per token, and tokens of its own where it is another text: those are not pinned nor marked.
// One listener per strip serves all its tokens.
(function () {
  "use strict";
  const WINDOW = 1024; // tokens drawn at once; longer texts are paged around the pinned token
  const drawn = new WeakMap();

  function draw(strip) {
    const source = JSON.parse(strip.getAttribute("data-strip") || "{}");
    const tokens = source.tokens || workbench.facts.tokens;
    const total = tokens.length;
    const centre = source.centre ?? (drawn.get(strip) || {}).centre ?? (source.tokens ? 0 : workbench.query() ?? 0);
    const start = total <= WINDOW ? 0 : Math.max(0, Math.min(centre - WINDOW / 2, total - WINDOW));
    const stop = Math.min(total, start + WINDOW);
    const mean = tokens.slice(start, stop).reduce((sum, text) => sum + text.length, 0) / Math.max(1, stop - start);
    strip.classList.toggle("is-words", mean > 1.6);
    strip.classList.toggle("strip-coloured", Boolean(source.colours));
    const parts = document.createDocumentFragment();
    if (start > 0) parts.append(pager(strip, start - WINDOW / 2, `… ${start} earlier`));
    for (let index = start; index < stop; index++) parts.append(token(tokens[index], index, source));
    if (stop < total) parts.append(pager(strip, stop + WINDOW / 2, `${total - stop} later …`));
    strip.replaceChildren(parts);
    strip.setAttribute("role", "group");
    drawn.set(strip, { source, start, stop, centre });
    mark(strip);
    if (!strip.wbLinked) link(strip);
  }

  function token(text, index, source) {
    const button = document.createElement("button");
    const [look, standIn] = workbench.tokenLook(text);
    button.type = "button";
    button.className = "token";
    button.tabIndex = -1;
    button.dataset.token = index;
    const glyph = document.createElement("span");
    if (standIn) glyph.className = "glyph";
    glyph.textContent = look;
    button.append(glyph);
    let label = `token ${index}: ${look}`;
    if (source.colours) {
      const [background, ink] = source.colours[index] || ["", ""];
      if (background) Object.assign(button.style, { background: background, color: ink });
      else button.classList.add("is-masked");
      label += source.values && source.values[index] ? `, ${source.values[index]}` : "";
    }
    button.title = label;
    button.setAttribute("aria-label", label);
    return button;
  }

  function pager(strip, centre, text) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "strip-more";
    button.textContent = text;
    button.addEventListener("click", () => { drawn.set(strip, { centre }); draw(strip); });
    return button;
  }

  const at = (event) => {
    const button = event.target.closest(".token");
    return button && !another(event.currentTarget) ? Number(button.dataset.token) : null;
  };

  const another = (strip) => Boolean(((drawn.get(strip) || {}).source || {}).tokens);

  function link(strip) {
    strip.wbLinked = true;
    strip.addEventListener("mouseover", (event) => {
      const index = at(event);
      if (index !== null) workbench.hover({ query: index, key: index });
    });
    strip.addEventListener("mouseleave", () => workbench.hover({ query: null, key: null }));
    strip.addEventListener("focusin", (event) => {
      const index = at(event);
      if (index !== null) workbench.hover({ query: index, key: index });
    });
    strip.addEventListener("click", (event) => {
      const index = at(event);
      if (index === null) return;
      const pinned = workbench.query();
      if (event.shiftKey && pinned !== null) {
        const span = `${Math.min(pinned, index)}-${Math.max(pinned, index) + 1}`;
        workbench.change({ rows: span, cols: span });
      } else workbench.change({ q: index, t: null });
    });
  }

  function mark(strip) {
    const pinned = workbench.shownToken();
    const key = workbench.number("k");
    const hovered = workbench.hovered();
    const kept = ["is-query", "is-key", "is-hover"];
    strip.querySelectorAll(".is-query, .is-key, .is-hover").forEach((each) => each.classList.remove(...kept));
    const find = (index) => (index === null || another(strip) ? null : strip.querySelector(`[data-token="${index}"]`));
    const classes = [[pinned, "is-query"], [key, "is-key"], [hovered.query, "is-hover"], [hovered.key, "is-hover"]];
    for (const [index, name] of classes) find(index)?.classList.add(name);
    strip.querySelectorAll('[tabindex="0"]').forEach((each) => { each.tabIndex = -1; });
    const entry = find(pinned) || strip.querySelector(".token"); // one tab stop per strip; the arrow keys move inside
    if (entry) entry.tabIndex = 0;
  }

  function reveal(strip) {
    const state = drawn.get(strip);
    const pinned = workbench.shownToken();
    if (!state || pinned === null) return;
    if (pinned < state.start || pinned >= state.stop) { drawn.set(strip, { centre: pinned }); draw(strip); }
    const button = strip.querySelector(`[data-token="${pinned}"]`);
    if (!button) return;
    const box = strip.getBoundingClientRect(), place = button.getBoundingClientRect();
    if (place.left < box.left + 30 || place.right > box.right - 30) strip.scrollLeft += place.left - box.left - box.width / 2;
    if (place.top < box.top || place.bottom > box.bottom) strip.scrollTop += place.top - box.top - box.height / 2;
  }

  const all = () => document.querySelectorAll("[data-strip]");
  document.addEventListener("wb:hover", () => all().forEach(mark));
  let known = null;
  document.addEventListener("wb:view", () => {
    const changed = known !== workbench.facts.tokens;
    known = workbench.facts.tokens;
    all().forEach((strip) => { if (changed) draw(strip); else mark(strip); });
    all().forEach((strip) => { if (strip.closest(".strip-bar")) reveal(strip); });
    const label = document.getElementById("strip-position");
    const pinned = workbench.shownToken();
    if (label) label.textContent = !known.length ? "no run" : pinned === null ? `${known.length} tokens` : `token ${pinned} of ${known.length}`;
  });
  new MutationObserver((changes) => {
    for (const change of changes) {
      if (change.type === "attributes") draw(change.target);
      else for (const node of change.addedNodes) {
        if (node.nodeType !== 1) continue;
        if (node.matches("[data-strip]")) draw(node);
        node.querySelectorAll?.("[data-strip]").forEach(draw);
      }
    }
  }).observe(document.documentElement, { subtree: true, childList: true, attributes: true, attributeFilter: ["data-strip"] });
})();
