// Figures: hovering shows the exact value and marks its tokens everywhere, clicking pins, dragging zooms, and a figure can be
// saved. What a figure's axes stand for is written in its layout.meta by app/figures.
(function () {
  "use strict";
  const graphs = () => [...document.querySelectorAll(".graph .js-plotly-plot")];
  const metaOf = (gd) => (gd.layout && gd.layout.meta) || {};

  // ---- marks ---------------------------------------------------------------------------------------------------------

  // The cell of an axis that a token stands for, as [start, stop] in axis coordinates. Pictures draw cell i from i to i + 1,
  // lines draw token i at i. An axis with `tokens` counts something else than tokens: cell i begins with the token tokens[i] of the
  // open run, or with one that only the other run has, which has a negative number of its own.
  const cell = (axis, index) => {
    const place = axis.tokens ? placeOf(axis.tokens, index) : index;
    return [place + (axis.origin || 0), place + 1 + (axis.origin || 0)];
  };
  function placeOf(tokens, index) {
    if (index < 0) return tokens.indexOf(index);
    let place = -1;
    tokens.forEach((first, at) => { if (first >= 0 && first <= index) place = at; });
    return place;
  }
  const tokenAt = (axis, place) => (axis.tokens ? axis.tokens[place] ?? null : place);

  const THINNEST = 2; // pixels: in a long text one token is thinner than a pixel, and its mark must still be seen

  function place(gd, name, x, y) {
    const { xaxis, yaxis } = gd._fullLayout;
    const inside = (axis, span) => {
      if (!span) return [0, axis._length];
      const [low, high] = span.map((value) => axis.l2p(value)).sort((a, b) => a - b);
      if (high <= 0 || low >= axis._length) return null;
      const middle = (low + high) / 2, half = Math.max(high - low, THINNEST) / 2;
      return [Math.max(0, middle - half), Math.min(axis._length, middle + half)];
    };
    const across = inside(xaxis, x), down = inside(yaxis, y);
    if (!across || !down) return;
    const [x0, x1] = across, [y0, y1] = down;
    const mark = document.createElement("div");
    mark.className = `mark ${name}`;
    Object.assign(mark.style, {
      left: `${xaxis._offset + x0}px`, top: `${yaxis._offset + y0}px`, width: `${x1 - x0}px`, height: `${y1 - y0}px`,
    });
    gd.append(mark);
  }

  function markFigure(gd) {
    gd.querySelectorAll(":scope > .mark").forEach((each) => each.remove());
    const meta = metaOf(gd);
    if (!meta.x || !gd._fullLayout || !gd._fullLayout.xaxis || !gd._fullLayout.xaxis.l2p) return;
    const hovered = workbench.hovered();
    const pins = { query: workbench.query(), key: workbench.number("k"), position: workbench.position(), depth: workbench.number("depth") };
    if (meta.click === "tile") {
      place(gd, "mark-tile", cell(meta.x, workbench.number("head") || 0), cell(meta.y, workbench.number("layer") || 0));
      return;
    }
    for (const [side, axis] of [["x", meta.x], ["y", meta.y || {}]]) {
      const span = (index) => (side === "x" ? [cell(axis, index), null] : [null, cell(axis, index)]);
      const role = axis.role === "token" ? "query" : axis.role;
      const over = axis.role === "key" ? hovered.key : axis.role === "depth" ? null : hovered.query;
      if (!["query", "key", "position", "depth"].includes(role)) continue;
      if (over !== null) place(gd, "mark-hover", ...span(over));
      if (pins[role] !== null && pins[role] !== undefined) place(gd, role === "key" ? "mark-key" : "mark-pin", ...span(pins[role]));
    }
  }
  const markAll = () => graphs().forEach(markFigure);
  document.addEventListener("wb:hover", markAll);
  document.addEventListener("wb:view", markAll);

  // ---- labels --------------------------------------------------------------------------------------------------------

  const BETWEEN = 3; // pixels between two labels under an axis, at least

  // Where labels under an axis would lie on each other, as words do in a narrow figure, only every second, third, … is shown.
  function thinLabels(gd) {
    const axes = {};
    gd.querySelectorAll("g[class^='xaxislayer'] text").forEach((label) => {
      const level = /rotate\((?!0[,)])/.test(label.getAttribute("transform") || "") ? null : label.parentNode.getAttribute("class");
      if (level) (axes[level] = axes[level] || []).push(label);
    });
    Object.values(axes).forEach((labels) => {
      const boxes = labels.map((label) => label.getBoundingClientRect());
      const shown = labels.map((_, index) => index).sort((a, b) => boxes[a].left - boxes[b].left);
      const meet = (step) => shown.some((at, index) => {
        const next = shown[index + step];
        return index % step === 0 && next !== undefined && boxes[at].right + BETWEEN > boxes[next].left;
      });
      let step = 1;
      while (step < labels.length && meet(step)) step += 1;
      shown.forEach((at, index) => { labels[at].style.visibility = index % step ? "hidden" : ""; });
    });
  }

  // ---- pointer -------------------------------------------------------------------------------------------------------

  function cellUnder(gd, event) {
    const meta = metaOf(gd);
    let x = event.xvals ? event.xvals[0] : undefined, y = event.yvals ? event.yvals[0] : undefined;
    const point = event.points && event.points[0];
    if (point && !meta.value) { x = point.x; y = point.y; }
    if (typeof x !== "number") return null;
    const index = (value, axis) => (typeof value === "number" && axis ? Math.floor(value - (axis.origin || 0)) : null);
    return { x: index(x, meta.x), y: index(y, meta.y) };
  }

  function hoverTokens(meta, at) {
    const next = { query: null, key: null };
    for (const side of ["x", "y"]) {
      const role = (meta[side] || {}).role, index = at[side] === null || at[side] < 0 ? null : tokenAt(meta[side] || {}, at[side]);
      if (index === null) continue;
      if (role === "query" || role === "key") next[role] = index;
      if (role === "token" || role === "position") next.query = next.key = index;
    }
    return next;
  }

  const readout = document.createElement("div");
  readout.className = "readout is-hidden";
  readout.setAttribute("role", "tooltip");
  document.addEventListener("DOMContentLoaded", () => document.body.append(readout));
  if (document.body) document.body.append(readout);

  function showReadout(answer, event) {
    const line = (name, text) => {
      const row = document.createElement("div");
      const value = document.createElement("span");
      value.className = "token-text";
      value.textContent = text;
      row.append(`${name} `, value);
      return row;
    };
    const value = document.createElement("b");
    value.textContent = answer.text;
    value.dataset.value = answer.value;
    readout.replaceChildren(value, ...answer.rows.map(([name, text]) => line(name, text)));
    readout.classList.remove("is-hidden");
    const { offsetWidth: width, offsetHeight: height } = readout;
    readout.style.left = `${Math.min(event.clientX + 16, innerWidth - width - 8)}px`;
    readout.style.top = `${event.clientY + 18 + height > innerHeight ? event.clientY - height - 10 : event.clientY + 18}px`;
    const panel = document.getElementById("inspector-value");
    if (panel) panel.textContent = answer.text;
    const rows = document.getElementById("inspector-value-rows");
    if (rows) rows.replaceChildren(...answer.rows.flatMap(([name, text]) => {
      const term = document.createElement("dt"), description = document.createElement("dd");
      term.textContent = name; description.textContent = text; description.className = "mono";
      return [term, description];
    }));
  }
  function hideReadout() {
    wanted = null;
    readout.classList.add("is-hidden");
  }

  // One question at a time is on its way to the server; while it is, only the newest one waits.
  let wanted = null, asking = false, shown = "";
  async function ask() {
    if (asking || !wanted) return;
    const { address, event } = wanted;
    wanted = null;
    if (address === shown && !readout.classList.contains("is-hidden")) return;
    asking = true;
    try {
      const response = await fetch(address);
      if (response.ok) { shown = address; showReadout(await response.json(), event); }
    } catch (error) { /* the server has gone; the page says so elsewhere */ } finally { asking = false; }
    ask();
  }

  function link(gd) {
    gd.wbLinked = true;
    gd.on("plotly_hover", (event) => {
      const meta = metaOf(gd), at = cellUnder(gd, event);
      if (!at) return;
      workbench.hover(hoverTokens(meta, at));
      const inside = (index, axis) => index !== null && index >= 0 && (!axis.size || index < axis.size);
      if (meta.value && inside(at.x, meta.x) && inside(at.y, meta.y)) {
        wanted = { address: `/value/${meta.panel}?${addressOfView(meta)}&x=${at.x}&y=${at.y}`, event: event.event };
        ask();
      }
    });
    gd.on("plotly_unhover", () => { workbench.hover({ query: null, key: null }); hideReadout(); });
    gd.on("plotly_click", (event) => {
      const meta = metaOf(gd), at = cellUnder(gd, event);
      if (at) clicked(meta, at);
    });
    gd.on("plotly_relayout", (event) => {
      const meta = metaOf(gd);
      if (!meta.zoom || event["xaxis.range[0]"] === undefined) return;
      const span = (axis) => {
        const ends = [event[`${axis}.range[0]`], event[`${axis}.range[1]`]].sort((a, b) => a - b);
        const size = (axis === "xaxis" ? meta.x : meta.y).size;
        const start = Math.max(0, Math.min(Math.floor(ends[0]), size - 1));
        return `${start}-${Math.max(start + 1, Math.min(Math.ceil(ends[1]), size))}`;
      };
      workbench.change({ [meta.zoom.x]: span("xaxis"), ...(meta.zoom.y ? { [meta.zoom.y]: span("yaxis") } : {}) });
    });
    gd.on("plotly_doubleclick", () => {
      const zoom = metaOf(gd).zoom;
      if (zoom) workbench.change({ [zoom.x]: null, ...(zoom.y ? { [zoom.y]: null } : {}) });
    });
    gd.on("plotly_afterplot", () => { markFigure(gd); thinLabels(gd); requestAnimationFrame(() => thinLabels(gd)); });
    new ResizeObserver(() => requestAnimationFrame(() => thinLabels(gd))).observe(gd);
    document.fonts.ready.then(() => thinLabels(gd));
    thinLabels(gd);
    gd.addEventListener("mouseleave", () => { workbench.hover({ query: null, key: null }); hideReadout(); });
    markFigure(gd);
  }

  const addressOfView = (meta) => (meta.view ? meta.view : location.search.slice(1));

  function clicked(meta, at) {
    if (meta.click === "pattern") {
      const [q, k] = [tokenAt(meta.y, at.y), tokenAt(meta.x, at.x)];
      if (q >= 0 && k >= 0) workbench.change({ q, k, t: null });
    }
    if (meta.click === "row" && at.y >= 0) workbench.change({ q: at.y, t: null }); // its columns are no tokens of the run
    if (meta.click === "depth") workbench.change({ q: at.x, depth: at.y, t: null });
    // What a cell sets: the changes of its column and of its row.
    if (meta.click === "choose") workbench.change({ ...(meta.choices.x || [])[at.x], ...(meta.choices.y || [])[at.y] });
    if (meta.click === "tile") workbench.change({ head: at.x || null, layer: at.y || null });
    if (meta.click === "token") workbench.change({ q: at.x, t: null });
    if (meta.click === "position") workbench.change({ t: at.x });
    if (meta.click === "after") workbench.change({ t: at.y });
    if (meta.click === "layer" && meta.layers[at.x] !== null) workbench.change({ layer: meta.layers[at.x] || null });
    if (meta.click === "track") toggleTracked(`${at.y}.${at.x}`);
  }

  function toggleTracked(entry) {
    const kept = (workbench.params().get("track") || "").split(",").filter(Boolean);
    const next = kept.includes(entry) ? kept.filter((each) => each !== entry) : [...kept, entry].slice(-8);
    workbench.change({ track: next.join(",") || null });
  }
  workbench.toggleTracked = toggleTracked;

  let waiting = false;
  new MutationObserver(() => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      graphs().forEach((gd) => { if (gd.on && !gd.wbLinked) link(gd); });
    });
  }).observe(document.documentElement, { subtree: true, childList: true });

  // ---- saving --------------------------------------------------------------------------------------------------------

  // A picture enlarged without smoothing: neither the browser nor an SVG viewer may blur one cell into the next.
  async function enlarged(picture, width, height) {
    const image = new Image();
    image.src = picture.source;
    await image.decode();
    const canvas = document.createElement("canvas");
    Object.assign(canvas, { width: Math.max(image.width, Math.round(width)), height: Math.max(image.height, Math.round(height)) });
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    return { ...picture, source: canvas.toDataURL("image/png") };
  }

  function wrapped(words, letters) {
    const lines = [""];
    for (const word of words) {
      const last = lines[lines.length - 1];
      if (last && last.length + word.length + 3 > letters) lines.push(word);
      else lines[lines.length - 1] = last ? `${last} · ${word}` : word;
    }
    return lines;
  }

  // The saved figure carries its title and its run, so that it still says what it is when it lies in a paper's folder.
  async function save(gd, panel, name, format) {
    const escape = (value) => value.replace(/&/g, "&amp;").replace(/</g, "&lt;");
    const { width, height, margin: before, xaxis, yaxis } = gd._fullLayout;
    const facts = [...panel.querySelectorAll(".panel-foot .fact")].map((each) => (each.dataset.run ? `run ${each.dataset.run}` : each.textContent));
    const caption = wrapped(facts, width / 6.2);
    const margin = { ...before, t: (before.t || 0) + 40, b: (before.b || 0) + 14 + 14 * caption.length };
    const text = (words, y, shift, size, anchor) => ({
      text: words, xref: "paper", yref: "paper", x: 0, y, xshift: 12 - margin.l, yshift: shift, xanchor: "left", yanchor: anchor,
      align: "left", showarrow: false, font: { size },
    });
    const title = (panel.querySelector(".panel-title") || {}).textContent || "";
    const images = await Promise.all((gd.layout.images || []).map((each) => enlarged(each, 2 * xaxis._length, 2 * yaxis._length)));
    const layout = {
      ...gd.layout, autosize: false, margin, images,
      annotations: [
        ...(gd.layout.annotations || []),
        text(`<b>${escape(title)}</b>`, 1, margin.t - 12, 15, "top"),
        text(caption.map(escape).join("<br>"), 0, 10 - margin.b, 10, "bottom"),
      ],
    };
    await window.Plotly.downloadImage({ data: gd.data, layout }, {
      format, width, height: height + 40 + 14 + 14 * caption.length, scale: format === "png" ? 2 : 1,
      filename: `${workbench.facts.run}-${name}`,
    });
  }

  workbench.exportFigure = function (format) {
    const id = window.dash_clientside.callback_context.triggered_id;
    const panel = id && document.getElementById(`panel-${id.panel}`);
    const gd = panel && panel.querySelector(".js-plotly-plot");
    if (gd) save(gd, panel, id.panel, format).then(() => workbench.say("Figure saved."), () => workbench.say("The figure could not be saved."));
    return window.dash_clientside.no_update;
  };
})();
